import os
import signal
from pathlib import Path

# One thread in every process of the tests: the models are too small for more, several ranks share two cores, and
# OpenMP's threads do not survive the forks of some tests. Subprocesses inherit the variable.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from qwen_tokenizer import build_tokenizer  # noqa: E402

import common  # noqa: E402


@pytest.fixture(scope="session")
def qwen_dir() -> Path:
    """Directory with the real Qwen3-VL `tokenizer.json` (see qwen_tokenizer.py)."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def processor(qwen_dir):
    from data import Processor

    return Processor(qwen_dir)


@pytest.fixture(autouse=True)
def restore_process():
    """Undo what a training run leaves in this process (signal handlers, a process group), and end forked ranks."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(n) for n in names]
    yield
    for n, handler in zip(names, before, strict=True):
        signal.signal(n, handler)
    common.stop_requested.clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    from helpers import Job

    for job in Job.all:
        job.end()
    Job.all.clear()
