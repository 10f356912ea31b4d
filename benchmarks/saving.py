"""Measure how long training waits for a checkpoint: `python benchmarks/saving.py [--parameters 25] [--dir DIR]`.

Each of the given millions of parameters takes 12 bytes of a checkpoint. A random model of that size is trained and
saved every few steps, with and without --async-save in turn. For both, the benchmark prints how long the loop waited
in `save`, how long a step took during the save, and how long the checkpoint took to be complete.
"""
from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

import convert
import kernels_npu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parameters", type=float, default=25, metavar="MILLIONS", help="size of the model")
    parser.add_argument("--saves", type=int, default=5, help="number of saves of each kind; the first is not counted")
    parser.add_argument("--device", choices=kernels_npu.DEVICES, default="auto", help="device to train on")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="directory to write checkpoints to; removed after")
    args = parser.parse_args()
    ops = kernels_npu.select(args.device)
    dist.init_process_group(ops.distributed_backend, store=dist.HashStore(), rank=0, world_size=1)
    device_name = torch.get_device_module(ops.device).get_device_name() if ops.is_accelerator else "CPU"

    width = 1024
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(round(args.parameters * 1e6 / width**2))]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=width**-0.5)  # keeps the activations' size from layer to layer
    model = torch.nn.Sequential(*layers).to(ops.device)
    optimizer = ops.adamw([{"params": list(model.parameters())}], lr=1e-6)
    x = torch.randn(512, width, device=ops.device)

    def step() -> float:
        began = time.perf_counter()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ops.synchronize()
        return time.perf_counter() - began

    for _ in range(5):
        step()  # warm up
    step_times = []
    results: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    directory = Path(tempfile.mkdtemp(dir=args.dir))
    try:
        writers = {background: convert.CheckpointWriter(background, timedelta(minutes=10)) for background in results}
        for iteration in range(1, args.saves + 1):
            for background, writer in writers.items():
                step_times.append(step())
                began = time.perf_counter()
                writer.save(directory, iteration, model, optimizer, {"iteration": iteration, "data": {}}, 1)
                wait = time.perf_counter() - began
                steps = [step()]
                while writer._saving is not None and not writer._saving.done():
                    steps.append(step())
                results[background].append((wait, statistics.median(steps), time.perf_counter() - began))
                writer.wait()
    finally:
        shutil.rmtree(directory)
    size = 12 * sum(p.numel() for p in model.parameters())
    print(f"{device_name}, torch {torch.__version__}, {args.dir}: checkpoints of {size / 1e6:.0f} MB, a step without a "
          f"save takes {statistics.median(step_times):.3f} s")
    for background, rows in results.items():
        print(f"{'--async-save' if background else 'without':12}: first save waits {rows[0][0]:.3f} s, the others:")
        waits, steps, totals = zip(*rows[1:], strict=True)
        for what, values in (("wait", waits), ("step during save", steps), ("until complete", totals)):
            print(f"    {what:17} {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
