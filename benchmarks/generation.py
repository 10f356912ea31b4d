"""Answers beside transformers' `generate`: the same weights, the same prompts, in turn.

    python benchmarks/generation.py [--rounds 7] [--threads 2] [--only dense-1,moe-16]

Greedy answers of 64 tokens that nothing ends early, to prompts with a picture; transformers gets them padded on the
left. Prefill is the time to the first token, the rest is the time of each further one. The answers of both must be the
same, or the figures do not count.
"""
from __future__ import annotations

import argparse
import sys
import tempfile

import beside
import numpy as np
import torch
from beside import clock

import kernels_npu

TOKENS = 64
PROMPT = [20, ("image", 16, 16), 44]
CASES = {f"{kind}-{batch}": (kind == "moe", batch) for kind in ("dense", "moe") for batch in (1, 16)}


def ours(directory: str, rows: list, device: str, dtype: torch.dtype):
    """`infer.Generator`, the first token's time taken by its callback."""
    from infer import Generator, load_model

    kernels_npu.select(device)
    generator = Generator(load_model(directory, dtype=str(dtype).removeprefix("torch.")), ())
    batch = beside.packed(rows, device, dtype)

    def turn() -> tuple[float, float, list]:
        times = [clock(device)]
        answers = generator.generate(batch, max_new_tokens=TOKENS, on_token=lambda *_: times.append(clock(device)))
        return times[1] - times[0], (times[-1] - times[1]) / (TOKENS - 1), answers

    return turn


def transformers(directory: str, rows: list, device: str, dtype: torch.dtype):
    """`generate`, a logits processor noting when each step comes (its streamers take one sequence only)."""
    model = beside.load_transformers(directory, device, dtype).eval()
    model.generation_config.eos_token_id = None
    inputs = beside.padded(rows, device, dtype, left=True)
    length = inputs["input_ids"].shape[1]

    def turn() -> tuple[float, float, list]:
        stamps = BatchTimes(device)
        began = clock(device)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0,
                             logits_processor=[stamps])
        first, last = stamps.times[0], clock(device)
        return first - began, (last - first) / (TOKENS - 1), out[:, length:].tolist()

    return turn


class BatchTimes:
    """Notes when each step's logits are there; `generate` calls it with them."""

    def __init__(self, device: str):
        self.device, self.times = device, []

    def __call__(self, input_ids, scores):
        self.times.append(clock(self.device))
        return scores


def compare(name: str, moe: bool, batch: int, args: argparse.Namespace) -> bool:
    """Prints one case's figures; False where the answers differ."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    rows = [[part + 3 * b if i == 2 else part for i, part in enumerate(PROMPT)] for b in range(batch)]
    with tempfile.TemporaryDirectory() as directory:
        beside.write_model(directory, beside.config(moe))
        results = beside.in_turn({"ours": ours, "transformers": transformers}, (directory, rows, args.device, dtype),
                                 args.rounds, args.threads)
    mine, theirs = (list(zip(*results[side][1:], strict=True)) for side in ("ours", "transformers"))
    same = all(a == b for a, b in zip(mine[2], theirs[2], strict=True))
    parts = [f"{what} {1000 * np.median(a):.1f} and {1000 * np.median(b):.1f} ms, ratio {beside.ratio(a, b)}"
             for what, a, b in zip(("prefill", "per token"), mine, theirs, strict=False)]
    print(f"{name:9} " + "; ".join(parts) + ("" if same else "; THE ANSWERS DIFFER, the figures do not count"),
          flush=True)
    return same or dtype != torch.float32  # in bf16 two likely tokens may change places


def main() -> None:
    args = beside.flags(__doc__, list(CASES)).parse_args()
    print(f"{beside.machine(args.device, args.threads)}; medians of {args.rounds}: ours and transformers'")
    results = [compare(name, *CASES[name], args) for name in args.only]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
