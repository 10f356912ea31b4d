"""Measure training steps on one GPU with the widths of 8B and 30B-A3B: MFU, and what recompute and offload change.

    python benchmarks/gpu.py [--only dense,moe] [--layers 6] [--rows 8] [--steps 5]

A step is `train.train_step` with FSDP2 in bf16, AdamW and float32 weights, on packed rows of 4,096 tokens with images.
The model has random weights and fewer layers than the published one. One GPU holds all of the optimizer's state, so
that its share of the step is larger than in a run on many GPUs. So MFU is also given without the optimizer. On a CPU
the same code runs with a small model and short rows, to test it: the figures mean nothing there.
"""
from __future__ import annotations

import gc
import statistics
import sys
import tempfile
from pathlib import Path

import comparison
import tiny
import torch
from comparison import synchronized_time
from options import OPTIONS, model_config

import kernels_npu
import parallel
import train
from model import Qwen3VLConfig, RMSNorm, build_model

# 4,096 tokens with two images of 928 x 704 pixels; a short row with a small image
LONG, SHORT = [800, ("image", 44, 58), 1016, ("image", 44, 58), 1000], [40, ("image", 14, 10), 49]


def build(directory: str, flags: list[str], state: parallel.ParallelState):
    """Return the model and the optimizer that train.py makes for these flags, with weights drawn on the device."""
    settings = train.make_parser().parse_args(["--init-from-hf-path", directory, "--bf16", *flags])
    model = build_model(Qwen3VLConfig.from_json(directory))
    train.configure_model(model, state, **train.model_settings(settings))
    model.to_empty(device=state.device)
    norms = {id(p) for m in model.modules() if isinstance(m, (RMSNorm, torch.nn.LayerNorm)) for p in m.parameters()}
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            local = parallel.to_local(p)
            local.fill_(1.0) if id(p) in norms else local.normal_(0.0, 0.02)
    return model, train.make_optimizer(model, **train.optimizer_settings(settings))


def optimizer_seconds(optimizer: torch.optim.Optimizer, device: str) -> float:
    """Return the time of the optimizer alone, with gradients of zero."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)
    began = synchronized_time(device)
    optimizer.step()
    return synchronized_time(device) - began


def measure(directory: str, flags: list[str], state: parallel.ParallelState, rows: list, args) -> dict:
    """Return medians of the steps after two warm-up steps, and the peak of the allocated memory in bytes."""
    gc.collect()  # the model before this one
    module = kernels_npu.ops.module if args.device != "cpu" else None
    if module:
        module.empty_cache()
        module.reset_peak_memory_stats()
    model, optimizer = build(directory, flags, state)
    batch = comparison.packed_batch(rows, "cpu", torch.float32)
    if module:
        batch = batch.pin_memory()  # as the loader does
    times, flops_of = [], train.flops_counter(model)
    for _ in range(args.steps + 2):
        began = synchronized_time(args.device)
        step = train.train_step(model, optimizer, [batch.measure()], [batch], state, loss_type="default", clip_grad=1.0,
                                flops_of=flops_of, error=None, read_flags=lambda: ())
        times.append(synchronized_time(args.device) - began)
    return {
        "seconds": statistics.median(times[2:]), "loss": step.loss, "tokens": step.stats.tokens,
        "flops": step.stats.flops, "memory": module.max_memory_allocated() if module else 0,
        "optimizer": optimizer_seconds(optimizer, args.device),
    }


def main() -> None:
    parser = comparison.make_parser(__doc__, ["dense", "moe"], rounds=False)
    parser.add_argument("--layers", type=int, help="layers of the text decoder (default: 6 dense, 4 MoE; 2 on a CPU)")
    parser.add_argument("--rows", type=int, default=8, help="packed rows in a step")
    parser.add_argument("--steps", type=int, default=5, help="steps that are measured")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    torch.set_num_threads(args.threads)
    state = parallel.ParallelState(kernels_npu.select(args.device, torch.bfloat16))
    peak, failed = kernels_npu.ops.peak_flops(), False
    rows = [SHORT if on_cpu else LONG] * args.rows
    machine = comparison.describe_machine(args.device, args.threads)
    print(f"{machine}; a step of {args.rows} rows; peak {peak or 0:.3g} FLOP/s", flush=True)
    for name in args.only:
        first = None
        layers = args.layers or (2 if on_cpu else 4 if name == "moe" else 6)
        with tempfile.TemporaryDirectory() as directory:
            tiny.hf_dir(Path(directory), model_config(name == "moe", args.device, layers))
            for title, flags in list(OPTIONS.items())[:3]:
                try:
                    m = measure(directory, flags, state, rows, args)
                except Exception as e:  # print the other figures
                    print(f"{name:6} {title:24} failed: {type(e).__name__}: {e}", flush=True)
                    failed = True
                    continue
                first = first or m
                mfu = ""
                if peak:
                    fractions = [m["flops"] / peak / t for t in (m["seconds"], m["seconds"] - m["optimizer"])]
                    mfu = f"MFU {fractions[0]:.3f}, without the optimizer {fractions[1]:.3f}, "
                print(f"{name:6} {title:22} {m['seconds']:7.3f} s ({m['seconds'] / first['seconds']:.2f}), optimizer "
                      f"{m['optimizer']:.3f} s, {m['tokens'] / m['seconds']:8,.0f} tokens/s, {mfu}peak memory "
                      f"{m['memory'] / 2**30:6.2f} GiB ({m['memory'] / max(1, first['memory']):.2f}); loss "
                      f"{m['loss']:.5f}", flush=True)
    state.close()
    sys.exit(failed)


if __name__ == "__main__":
    main()
