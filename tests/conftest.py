from pathlib import Path

import pytest
from qwen_tokenizer import build_tokenizer


@pytest.fixture(scope="session")
def qwen_dir() -> Path:
    """Directory with the real Qwen3-VL `tokenizer.json` (see qwen_tokenizer.py)."""
    return build_tokenizer()
