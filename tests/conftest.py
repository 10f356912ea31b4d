import os
from pathlib import Path

# One thread in every process of the tests: the models are too small for more, several ranks share two cores, and
# OpenMP's threads do not survive the forks of some tests. Before torch is imported, and inherited by subprocesses.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
from qwen_tokenizer import build_tokenizer  # noqa: E402


@pytest.fixture(scope="session")
def qwen_dir() -> Path:
    """Directory with the real Qwen3-VL `tokenizer.json` (see qwen_tokenizer.py)."""
    return build_tokenizer()
