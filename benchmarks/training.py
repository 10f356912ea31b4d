"""Compare training steps with transformers: the same weights and rows, measured in turns.

    python benchmarks/training.py [--rounds 7] [--threads 2] [--only dense-mixed,memory]

A step is forward, backward, clipping and AdamW, in float32 on a CPU and in bf16 on CUDA. transformers gets rows padded
to the longest, as its collators pad them. The losses of both sides are printed. They must agree, or the figures do not
count. The share is that of the rate of one large matrix product, measured before each step, which our step reaches
with the FLOPs of `model.step_flops`. The case `memory` measures the peak memory of a step of one row of 8,192 tokens.
Its vocabulary is that of the released models (151,936), and its model is otherwise small.
"""
from __future__ import annotations

import argparse
import sys
import tempfile

import comparison
import numpy as np
import torch
from comparison import config, peak_mb, synchronized_time

import kernels_npu

LR = 1e-4
EQUAL = [[40, ("image", 20, 20), 114]] * 4  # 256 tokens each, with an image of 320 x 320 pixels
MIXED = [[40, ("image", 20, 26), 120], [400], [30, ("image", 14, 10), ("image", 8, 16), 60], [90],
         [25, ("image", 26, 30), 150], [140], [20, ("image", 10, 12), 35], [10, ("image", 16, 16), 200]]
TEXT = [[400], [90], [140], [250]]
LARGE = {"hidden_size": 768, "intermediate_size": 2304, "num_attention_heads": 12, "num_key_value_heads": 4}
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 2, "vocab_size": 2048}
LARGE_MOE = config(True, **LARGE)
LARGE_MOE["text_config"]["moe_intermediate_size"] = 576  # gate_up_proj must not be square
CASES = {
    "dense-equal": (config(False), EQUAL), "dense-mixed": (config(False), MIXED),
    "moe-equal": (config(True), EQUAL), "moe-mixed": (config(True), MIXED), "dense-text": (config(False), TEXT),
    "dense-large": (config(False, **LARGE), [[2048]]), "moe-large": (LARGE_MOE, [[2048]]),
    "dense-small": (config(False, **SMALL), TEXT), "moe-small": (config(True, **SMALL), TEXT),
    "memory": (config(False, vocab_size=151936, hidden_size=256), [[8192]]),
}
# on CUDA: four layers with the widths of 8B, or of 30B-A3B with a quarter of its experts; the vision encoder is small
WIDE = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936}
SPARSE = WIDE | {"hidden_size": 2048, "num_key_value_heads": 4}
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 768}


def ours(directory: str, rows: list, device: str, dtype: torch.dtype):
    """Measure this project's step on one rank, with PyTorch's clipping and without loader and log."""
    from model import step_flops

    model = comparison.load_ours(directory, device, dtype)
    optimizer = kernels_npu.ops.adamw([{"params": list(model.parameters())}], lr=LR)
    batch = comparison.packed_batch(rows, device, dtype)
    flops = step_flops(model.config, batch.cu_seqlens, batch.grid_thw, len(batch.supervised_index))

    def turn() -> tuple[float, float, float, float]:
        rate = comparison.product_rate(device, dtype)
        seconds, loss, peak = step(model, optimizer, lambda: model(batch)[0], device)
        return seconds, loss, peak, flops / seconds / rate

    return turn


def transformers(directory: str, rows: list, device: str, dtype: torch.dtype):
    """Measure transformers' step."""
    model = comparison.load_transformers(directory, device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    inputs = comparison.padded_inputs(rows, device, dtype)
    unsupervised = (inputs["attention_mask"] == 0) | (inputs["mm_token_type_ids"] > 0)
    inputs["labels"] = inputs["input_ids"].masked_fill(unsupervised, -100)
    return lambda: step(model, optimizer, lambda: model(**inputs, use_cache=False).loss, device)


def step(model, optimizer, compute_loss, device: str) -> tuple[float, float, float]:
    """Run one step. Return (seconds, loss, peak memory so far in MB)."""
    began = synchronized_time(device)
    loss = compute_loss()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return synchronized_time(device) - began, loss.item(), peak_mb(device)


def compare(name: str, raw: dict, rows: list, args: argparse.Namespace) -> bool:
    """Print one case's figures. Return False if the losses disagree."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as directory:
        comparison.write_model(directory, raw, args.device, dtype)
        results = comparison.measure_in_turns(
            {"ours": ours, "transformers": transformers}, (directory, rows, args.device, dtype),
            1 if name == "memory" else args.rounds, args.threads)
    our_times, our_losses, our_peaks, shares = zip(*results["ours"], strict=True)
    times, losses, peaks = zip(*results["transformers"], strict=True)
    difference = np.abs(np.array(our_losses) / np.array(losses) - 1)
    print(f"{name:12} ours {np.median(our_times[1:]):6.3f} s, transformers {np.median(times[1:]):6.3f} s, ratio "
          f"{comparison.ratio(our_times[1:], times[1:])}; share {np.median(shares[1:]):.2f}; "
          f"peak memory {our_peaks[-1]:,.0f} and {peaks[-1]:,.0f} MB, ratio {our_peaks[-1] / peaks[-1]:.2f}; "
          f"losses {our_losses[0]:.5f} to {our_losses[-1]:.5f}, differences "
          f"{np.median(difference):.0e} (median) and {difference.max():.0e} (largest)", flush=True)
    # bf16 has 8 bits. Rounding may move a token to another expert, which changes a step's loss by up to 1e-3, also
    # between two runs of transformers. So the median must be small, and the largest difference moderate.
    agree = np.median(difference) < (1e-4 if dtype == torch.float32 else 2e-2) and difference.max() < 5e-2
    if not agree:
        print(f"{name}: the losses disagree, the figures do not count: {our_losses}, {losses}")
    return agree


def main() -> None:
    args = comparison.make_parser(__doc__, list(CASES)).parse_args()
    print(f"{comparison.describe_machine(args.device, args.threads)}; seconds of a step, median of {args.rounds}")
    all_agree = True
    for name in args.only:
        raw, rows = CASES[name]
        if args.device == "cuda" and name != "memory":
            moe = name.startswith("moe")
            raw = config(moe, **(SPARSE if moe else WIDE))
            if moe:
                raw["text_config"] |= EXPERTS
            rows = rows * 8
        all_agree &= compare(name, raw, rows, args)
    sys.exit(not all_agree)


if __name__ == "__main__":
    main()
