"""Training steps beside transformers: the same weights, the same rows, in turn.

    python benchmarks/training.py [--rounds 7] [--threads 2] [--only dense-mixed,memory]

A step is forward, backward, clipping and AdamW, in float32 on a CPU, in bf16 on CUDA. transformers gets its rows padded
to the longest, as its collators do. The losses of both are printed: they must agree, or the figures do not count.
`memory` is the most memory of a step of one row of 8,192 tokens with the released models' vocabulary of 151,936, in a
model that is otherwise small.
"""
from __future__ import annotations

import argparse
import sys
import tempfile

import beside
import numpy as np
import torch
from beside import clock, config, peak_mb

import kernels_npu

LR = 1e-4
EQUAL = [[40, ("image", 20, 20), 114]] * 4  # 256 tokens each, a picture of 320 x 320 pixels
MIXED = [[40, ("image", 20, 26), 120], [400], [30, ("image", 14, 10), ("image", 8, 16), 60], [90],
         [25, ("image", 26, 30), 150], [140], [20, ("image", 10, 12), 35], [10, ("image", 16, 16), 200]]
TEXT = [[400], [90], [140], [250]]
CASES = {
    "dense-equal": (config(False), EQUAL), "dense-mixed": (config(False), MIXED),
    "moe-equal": (config(True), EQUAL), "moe-mixed": (config(True), MIXED), "dense-text": (config(False), TEXT),
    "memory": (config(False, vocab_size=151936, hidden_size=256), [[8192]]),
}
# On CUDA: the width of 8B, and of 30B-A3B with a fourth of its experts, in four layers
WIDE = {"hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936}
SPARSE = WIDE | {"hidden_size": 2048, "num_key_value_heads": 4}


def ours(directory: str, rows: list, device: str, dtype: torch.dtype):
    """This project's step: what train.py does on one rank in float32, but for its own clipping, loader and log."""
    model = beside.load_ours(directory, device, dtype)
    optimizer = kernels_npu.ops.adamw([{"params": list(model.parameters())}], lr=LR)
    batch = beside.packed(rows, device, dtype)
    return lambda: step(model, optimizer, lambda: model(batch)[0], device)


def transformers(directory: str, rows: list, device: str, dtype: torch.dtype):
    """transformers' step."""
    model = beside.load_transformers(directory, device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    inputs = beside.padded(rows, device, dtype)
    unsupervised = (inputs["attention_mask"] == 0) | (inputs["mm_token_type_ids"] > 0)
    inputs["labels"] = inputs["input_ids"].masked_fill(unsupervised, -100)
    return lambda: step(model, optimizer, lambda: model(**inputs, use_cache=False).loss, device)


def step(model, optimizer, compute_loss, device: str) -> tuple[float, float, float]:
    """-> (seconds, loss, most memory so far in MB)."""
    began = clock(device)
    loss = compute_loss()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return clock(device) - began, loss.item(), peak_mb(device)


def compare(name: str, raw: dict, rows: list, args: argparse.Namespace) -> bool:
    """Prints one case's figures; False where the losses disagree."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as directory:
        beside.write_model(directory, raw)
        results = beside.in_turn({"ours": ours, "transformers": transformers}, (directory, rows, args.device, dtype),
                                 1 if name == "memory" else args.rounds, args.threads)
    (mine, my_losses, my_peaks), (theirs, their_losses, their_peaks) = (
        zip(*results[side], strict=True) for side in ("ours", "transformers"))
    off = np.abs(np.array(my_losses) / np.array(their_losses) - 1)
    print(f"{name:12} ours {np.median(mine[1:]):6.3f} s, transformers {np.median(theirs[1:]):6.3f} s, ratio "
          f"{beside.ratio(mine[1:], theirs[1:])}; most memory {my_peaks[-1]:,.0f} and {their_peaks[-1]:,.0f} MB, ratio "
          f"{my_peaks[-1] / their_peaks[-1]:.2f}; losses {my_losses[0]:.5f} to {my_losses[-1]:.5f}, "
          f"{np.median(off):.0e} apart, {off.max():.0e} at most", flush=True)
    # bf16 has 8 bits. A token between two experts goes to another one after a rounding, and moves a step's loss by up
    # to 1e-3, between two runs of transformers, too; so in most steps they must agree, and in all nearly
    agree = np.median(off) < (1e-4 if dtype == torch.float32 else 2e-2) and off.max() < 5e-2
    if not agree:
        print(f"{name}: the losses disagree, the figures do not count: {my_losses}, {their_losses}")
    return agree


def main() -> None:
    args = beside.flags(__doc__, list(CASES)).parse_args()
    print(f"{beside.machine(args.device, args.threads)}; a step in seconds, median of {args.rounds}")
    good = True
    for name in args.only:
        raw, rows = CASES[name]
        if args.device == "cuda" and name != "memory":
            raw = config(name.startswith("moe"), **(SPARSE if name.startswith("moe") else WIDE))
            rows = rows * 8
        good &= compare(name, raw, rows, args)
    sys.exit(not good)


if __name__ == "__main__":
    main()
