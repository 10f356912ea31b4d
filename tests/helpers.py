"""Helpers of several test files: subprocesses, ranks without torchrun, and the flags and files of a run."""
from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
import convert
import train

ROOT = Path(__file__).parent.parent

# Ranks are forked from a server that has already imported the slow modules. Forking pytest itself would copy a process
# that has threads (autograd's, CUDA's), which do not survive a fork.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.checkpoint",
                              "safetensors.torch", "tokenizers", "PIL.Image", "pytest", "tqdm"])


# ---- processes -----------------------------------------------------------------------------------------------------


def shell(*argv, timeout: float = 120, **kwargs) -> subprocess.CompletedProcess:
    """Run `python ARGV` in the repository's root and capture its output."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
                          **kwargs)


def torchrun(ranks: int, *argv, **kwargs) -> subprocess.CompletedProcess:
    """Run `torchrun --nproc-per-node RANKS train.py ARGV`."""
    return shell("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "train.py", *argv, **kwargs)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank_process(rank: int, world_size: int, port: int, main: Callable, argv: list[str], log: Path) -> None:
    """Run `main` with the environment that torchrun sets; write standard output and error to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                   "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = common.run_program(main, argv)
    sys.stdout.flush()
    os._exit(status)


class Job:
    """Run train.py, or another picklable `main`, on forked ranks. It needs `--save` in its flags."""

    all: list[Job] = []

    def __init__(self, argv: list, world_size: int = 1, main: Callable = train.main):
        argv = list(map(str, argv))
        self.save = Path(argv[argv.index("--save") + 1])
        log_dir = self.save.with_name(self.save.name + "_logs")
        log_dir.mkdir(parents=True, exist_ok=True)
        self.logs = [log_dir / f"rank{rank}.log" for rank in range(world_size)]
        port = free_port()
        Job.all.append(self)
        self.ranks = [FORKS.Process(target=_rank_process, args=(rank, world_size, port, main, argv, self.logs[rank]))
                      for rank in range(world_size)]
        for process in self.ranks:
            process.start()

    def output(self) -> str:
        """Return everything that the ranks have written so far."""
        return "\n".join(f"--- rank {r}\n{log.read_text()}" for r, log in enumerate(self.logs) if log.exists())

    def wait_for_iteration(self, iteration: int, seconds: float = 60) -> None:
        """Wait until metrics.jsonl holds an iteration, or a rank has ended."""
        deadline, metrics = time.monotonic() + seconds, self.save / "metrics.jsonl"
        while not (metrics.exists() and f'"iteration": {iteration},' in metrics.read_text()):
            assert time.monotonic() < deadline, f"no iteration {iteration} in {seconds} s\n{self.output()}"
            if not all(process.is_alive() for process in self.ranks):
                return
            time.sleep(0.005)

    def kill(self, signal_number: int, *ranks: int) -> None:
        """Send a signal to some ranks, by default to all."""
        for process in [self.ranks[rank] for rank in ranks] or self.ranks:
            os.kill(process.pid, signal_number)

    def wait(self, seconds: float = 90) -> list[int]:
        """Return the ranks' exit statuses. Like torchrun, terminate the other ranks once one has failed.

        At the deadline all ranks are killed and the test fails with their output.
        """
        deadline, terminated = time.monotonic() + seconds, False
        while any(process.is_alive() for process in self.ranks) and time.monotonic() < deadline:
            if not terminated and any(process.exitcode for process in self.ranks):
                terminated = True
                for process in self.ranks:
                    process.terminate()
            time.sleep(0.01)
        hanging = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        self.end()
        assert not hanging, f"ranks {hanging} still run after {seconds} s\n{self.output()}"
        return [process.exitcode for process in self.ranks]

    def end(self) -> None:
        """Kill the ranks that still run."""
        for process in self.ranks:
            process.kill()
            process.join()


def run_job(argv: list, world_size: int = 1, main: Callable = train.main, seconds: float = 90) -> Path:
    """Run a job that must succeed and return its save directory."""
    job = Job(argv, world_size, main)
    assert job.wait(seconds) == [0] * world_size, job.output()[-6000:]
    return job.save


# ---- flags and results of a run ------------------------------------------------------------------------------------


def train_argv(model: Path, dataset: Path, save: Path, *more, iters: int) -> list[str]:
    """Return train.py's flags for a small deterministic run on the CPU; `more` flags come last and win."""
    return [*map(str, (
        "--init-from-hf-path", model, "--dataset", dataset, "--save", save, "--device", "cpu", "--train-iters", iters,
        "--lr", 1e-3, "--no-shuffle", "--num-workers", 0, *more))]


def write_mixed_rows(folder: Path, count: int = 8) -> Path:
    """Write `count` rows, every other one with an image, to folder / "rows.json"; return that path."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        images = [f"{i}.png"] * (i % 2)
        for name in images:
            pixels = rng.integers(0, 256, (30 + 10 * i, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
        question = {"role": "user", "content": "<image>" * len(images) + "what is this"}
        answer = {"role": "assistant", "content": f"this is number {i}"}
        rows.append({"messages": [question, answer], "images": images})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def read_metrics(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def without_timings(save: Path) -> list[dict]:
    return [{k: v for k, v in m.items() if not k.endswith("_s")} for m in read_metrics(save)]


def weights(save: Path) -> dict[str, torch.Tensor]:
    """Return every stored tensor of a run's latest checkpoint, the optimizer's included."""
    source = convert.CheckpointWeights(convert.find_checkpoint(save))
    return {n: source.read(n, (0,) * len(shape), tuple(shape)) for n, (_, shape) in source.tensors.items()}


def assert_same_weights(a: Path, b: Path) -> None:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]
