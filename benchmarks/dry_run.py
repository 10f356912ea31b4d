"""Compare the dry run of few layers with the dry run of all layers, and time --plan, in one process.

    python benchmarks/dry_run.py [--config configs/qwen3-vl-235b-a22b] [--world-size 256]

The targets are at most a sixth of the full depth's time for a dry run, and at most its time for a plan.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import time

from comparison import ROOT

import train
from tools import dry_run, planner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=str(ROOT / "configs/qwen3-vl-235b-a22b"))
    parser.add_argument("--world-size", default="256")
    args = parser.parse_args()
    flags = ["--dry-run", "--init-from-hf-path", args.config, "--world-size", args.world_size, "--seq-length", "16384",
             "--device-memory", "64"]
    ep = train.parse_args([*flags, "--expert-parallel-size", "8"])
    dry_run.predict(train.parse_args(["--dry-run", "--init-from-hf-path", str(ROOT / "configs/qwen3-vl-2b"),
                                      "--world-size", "8"]))  # so that no side pays for PyTorch's start
    seconds = {}
    for name, action in {
        "full depth": lambda: dry_run.predict(ep, full_depth=True),
        "few layers": lambda: dry_run.predict(ep),
        "plan": lambda: planner.plan(train.parse_args([*flags, "--plan"])),
    }.items():
        start, cpu = time.perf_counter(), time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            action()
        seconds[name] = time.process_time() - cpu
        print(f"{name:12} {time.perf_counter() - start:7.1f} s, {seconds[name]:7.1f} s of CPU time "
              f"({seconds[name] / seconds['full depth']:.2f} of the full depth's)", flush=True)


if __name__ == "__main__":
    main()
