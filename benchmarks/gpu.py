"""Measure training steps on one GPU with the widths of 8B and 30B-A3B: MFU, and what recompute and offload change.

    python benchmarks/gpu.py [--only dense,moe] [--layers 6] [--rows 8] [--steps 5]

A step is `train.train_step` with FSDP2 in bf16, AdamW and float32 weights, on the batch that a dry run assumes: rows of
4,096 tokens, the first half of them images. Below each measurement stands what `train.py --dry-run` predicts for it.
The model has random weights and fewer layers than the published one. One GPU holds all of the optimizer's state, so
that its share of the step is larger than in a run on many GPUs. So MFU is also given without the optimizer. On a CPU
the same code runs with a small model and short rows, to test it: the figures mean nothing there.
"""
from __future__ import annotations

import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import comparison
import torch
from comparison import ROOT, synchronized_time
from options import OPTIONS, model_config

import kernels_npu
import parallel
import train
from model import Qwen3VLConfig, RMSNorm, build_model
from tools.devices import DEVICES
from tools.dry_run import fake_batch


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


def random_batch(config: Qwen3VLConfig, args):
    """Return the batch that a dry run assumes, with random tokens and pixels: equal ones would share their experts."""
    batch = fake_batch(config, args.seq_length, args.rows)
    batch.input_ids = torch.randint(config.text.vocab_size, batch.input_ids.shape)
    batch.pixel_values = torch.randn(batch.pixel_values.shape).to(kernels_npu.ops.compute_dtype)  # as the loader does
    return batch


def measure(directory: str, flags: list[str], state: parallel.ParallelState, args) -> dict:
    """Return medians of the steps after two warm-up steps, and the peak of the allocated memory in bytes."""
    gc.collect()  # the model before this one
    module = kernels_npu.ops.module if args.device != "cpu" else None
    if module:
        module.empty_cache()
        module.reset_peak_memory_stats()
    model, optimizer = build(directory, flags, state)
    batch = random_batch(model.config, args)
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


def planned_device(name: str, peak: float | None) -> str | None:
    """Return the planner's name of a device with this name and peak FLOP/s, or None if it has no figures of it."""
    words = re.findall(r"\w+", name.lower())
    return next((d for d in DEVICES if d in words and DEVICES[d].tflops * 1e12 == peak), None)


def predict(directory: str, flags: list[str], device: str, args) -> dict:
    """Return the report of a dry run in a process of its own, because it has its own process group and operations."""
    command = [sys.executable, ROOT / "train.py", "--dry-run", "--world-size", 1, "--init-from-hf-path", directory,
               "--bf16", "--seq-length", args.seq_length, "--micro-batch-size", args.rows, "--assume-device", device,
               *flags]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(result.stderr.strip().rpartition("\n")[2])
    return json.loads(result.stdout.splitlines()[-1])


def compare(measured: dict, predicted: dict) -> str:
    """Return a line with the predicted time and memory, and the measured ones as multiples of them."""
    seconds, memory = predicted["step_time_s"], predicted["peak_bytes"]
    return (f"predicted for {predicted['assumed_device']}: {seconds:.3f} s, peak memory {memory / 2**30:.2f} GiB; "
            f"measured / predicted {measured['seconds'] / seconds:.2f} and {measured['memory'] / memory:.2f}")


def main() -> None:
    parser = comparison.make_parser(__doc__, ["dense", "moe"], rounds=False)
    parser.add_argument("--layers", type=int, help="layers of the text decoder (default: 6 dense, 4 MoE; 2 on a CPU)")
    parser.add_argument("--rows", type=int, default=8, help="rows in a step")
    parser.add_argument("--seq-length", type=int, help="tokens in a row (default: 4096; 128 on a CPU)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are measured")
    args = parser.parse_args()
    on_cpu = args.device == "cpu"
    args.seq_length = args.seq_length or (128 if on_cpu else 4096)
    torch.set_num_threads(args.threads)
    state = parallel.ParallelState(kernels_npu.select(args.device, torch.bfloat16))
    peak, failed = kernels_npu.ops.peak_flops(), False
    machine = comparison.describe_machine(args.device, args.threads)
    assumed = planned_device(machine.split(",")[0], peak)
    print(f"{machine}; a step of {args.rows} rows of {args.seq_length} tokens; peak {peak or 0:.3g} FLOP/s"
          + ("" if assumed else "; the planner has no figures of this device"), flush=True)
    for name in args.only:
        first = None
        layers = args.layers or (2 if on_cpu else 4 if name == "moe" else 6)
        with tempfile.TemporaryDirectory() as directory:
            (Path(directory) / "config.json").write_text(json.dumps(model_config(name == "moe", args.device, layers)))
            for title, flags in list(OPTIONS.items())[:3]:
                try:
                    m = measure(directory, flags, state, args)
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
                if assumed:
                    predicted, error = train.attempt(predict, directory, flags, assumed, args)
                    print(f"{'':6} " + (f"no prediction: {error}" if error else compare(m, predicted)), flush=True)
                    failed |= error is not None
    state.close()
    sys.exit(failed)


if __name__ == "__main__":
    main()
