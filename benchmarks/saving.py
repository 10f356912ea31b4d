"""How long training stands still for a checkpoint: `python benchmarks/saving.py [--parameters 25] [--dir DIR]`.

Trains a random model of so many million parameters (each 12 bytes of a checkpoint) through train.py's own saver, with
--async-save and without in turn, a save every few steps, and prints for each the time that the loop stood in `save`,
how long a step took meanwhile, and how long until the checkpoint was complete.
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
    parser.add_argument("--parameters", type=float, default=25, metavar="MILLIONS")
    parser.add_argument("--saves", type=int, default=5, help="of each kind; the first of each is not counted")
    parser.add_argument("--device", choices=kernels_npu.DEVICES, default="auto")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where the checkpoints are written, and removed")
    args = parser.parse_args()
    ops = kernels_npu.select(args.device)
    dist.init_process_group(ops.distributed_backend, store=dist.HashStore(), rank=0, world_size=1)
    name = torch.get_device_module(ops.device).get_device_name() if ops.is_accelerator else "CPU"

    width = 1024
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(round(args.parameters * 1e6 / width**2))]
    for layer in layers:  # that keep the size of what goes through them
        torch.nn.init.normal_(layer.weight, std=width**-0.5)
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
        step()  # the first ones take their time
    alone = []
    figures: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    directory = Path(tempfile.mkdtemp(dir=args.dir))
    try:
        savers = {background: convert.CheckpointWriter(background, timedelta(minutes=10)) for background in figures}
        for iteration in range(1, args.saves + 1):
            for background, saver in savers.items():
                alone.append(step())
                began = time.perf_counter()
                saver.save(directory, iteration, model, optimizer, {"iteration": iteration, "data": {}}, 1)
                stall = time.perf_counter() - began
                steps = [step()]
                while saver._saving is not None and not saver._saving.done():
                    steps.append(step())
                figures[background].append((stall, statistics.median(steps), time.perf_counter() - began))
                saver.wait()
    finally:
        shutil.rmtree(directory)
    size = 12 * sum(p.numel() for p in model.parameters())
    print(f"{name}, torch {torch.__version__}, {args.dir}: checkpoints of {size / 1e6:.0f} MB, a step alone takes "
          f"{statistics.median(alone):.3f} s")
    for background, rows in figures.items():
        print(f"{'--async-save' if background else 'without':12}: first save stalls {rows[0][0]:.3f} s, later ones:")
        stalls, steps, ends = zip(*rows[1:], strict=True)
        for what, values in (("stall", stalls), ("a step meanwhile", steps), ("until complete", ends)):
            print(f"    {what:17} {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
