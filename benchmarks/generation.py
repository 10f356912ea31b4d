"""Compare answers with transformers' `generate`: the same weights and prompts, measured in turns.

    python benchmarks/generation.py [--rounds 7] [--threads 2] [--only dense-1,moe-16]

Answers are greedy and have 64 tokens, to prompts with an image. transformers gets the prompts padded on the left.
Prefill is the time to the first token; the time per token is that of the later ones. In float32 the answers of both
sides must be equal, or the figures do not count.
"""
from __future__ import annotations

import argparse
import sys
import tempfile

import comparison
import numpy as np
import torch
from comparison import synchronized_time

import kernels_npu

TOKENS = 64
PROMPT = [20, ("image", 16, 16), 44]
CASES = {f"{kind}-{batch}": (kind == "moe", batch) for kind in ("dense", "moe") for batch in (1, 16)}


def ours(directory: str, rows: list, device: str, dtype: torch.dtype):
    """Measure `infer.Generator`. Its callback gives the times of the tokens."""
    from infer import Generator, load_model

    kernels_npu.select(device)
    generator = Generator(load_model(directory, dtype=str(dtype).removeprefix("torch.")), ())
    batch = comparison.packed_batch(rows, device, dtype)

    def turn() -> tuple[float, float, list]:
        times = [synchronized_time(device)]
        answers = generator.generate(batch, max_new_tokens=TOKENS,
                                     on_token=lambda *_: times.append(synchronized_time(device)))
        return times[1] - times[0], (times[-1] - times[1]) / (TOKENS - 1), answers

    return turn


def transformers(directory: str, rows: list, device: str, dtype: torch.dtype):
    """Measure `generate`. A logits processor gives the times, because streamers take one sequence only."""
    model = comparison.load_transformers(directory, device, dtype).eval()
    model.generation_config.eos_token_id = None
    inputs = comparison.padded_inputs(rows, device, dtype, left=True)
    length = inputs["input_ids"].shape[1]

    def turn() -> tuple[float, float, list]:
        recorder = TimeRecorder(device)
        began = synchronized_time(device)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS, pad_token_id=0,
                             logits_processor=[recorder])
        first, last = recorder.times[0], synchronized_time(device)
        return first - began, (last - first) / (TOKENS - 1), out[:, length:].tolist()

    return turn


class TimeRecorder:
    """A logits processor that records when each step's logits are ready and leaves them unchanged."""

    def __init__(self, device: str):
        self.device, self.times = device, []

    def __call__(self, input_ids, scores):
        self.times.append(synchronized_time(self.device))
        return scores


def compare(name: str, moe: bool, batch: int, args: argparse.Namespace) -> bool:
    """Print one case's figures. Return False if the answers differ in float32."""
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    rows = [[part + 3 * b if i == 2 else part for i, part in enumerate(PROMPT)] for b in range(batch)]
    with tempfile.TemporaryDirectory() as directory:
        comparison.write_model(directory, comparison.config(moe), args.device, dtype)
        results = comparison.measure_in_turns({"ours": ours, "transformers": transformers},
                                              (directory, rows, args.device, dtype), args.rounds, args.threads)
    our_turns, reference_turns = results["ours"][1:], results["transformers"][1:]
    columns = zip(*our_turns, strict=True), zip(*reference_turns, strict=True)
    (our_prefill, our_token, our_answers), (prefill, token, answers) = columns
    parts = [f"{title} {1000 * np.median(a):.1f} and {1000 * np.median(b):.1f} ms, ratio {comparison.ratio(a, b)}"
             for title, a, b in (("prefill", our_prefill, prefill), ("per token", our_token, token))]
    equal = all(a == b for a, b in zip(our_answers, answers, strict=True))
    print(f"{name:9} " + "; ".join(parts) + ("" if equal else "; THE ANSWERS DIFFER, the figures do not count"),
          flush=True)
    return equal or dtype != torch.float32  # in bf16 two tokens of nearly equal logits may change places


def main() -> None:
    args = comparison.make_parser(__doc__, list(CASES)).parse_args()
    print(f"{comparison.describe_machine(args.device, args.threads)}; medians of {args.rounds}: ours and transformers'")
    results = [compare(name, *CASES[name], args) for name in args.only]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
