"""Training steps beside transformers: the same weights, the same rows, in turn.

    python benchmarks/training.py [--rounds 7] [--threads 2] [--only dense-mixed,memory]

Each side lives in a process of its own, and the two take turns, so that other programs on the machine slow down both. A
step is forward, backward, clipping and AdamW in float32. transformers runs at its best here: sdpa, experts by
`grouped_mm`, and rows padded to the longest, as its collators do. The losses of both are printed: they must agree, or
the figures do not count. `memory` is the most memory of a step of one row of 8,192 tokens with the released models'
vocabulary of 151,936, in a model that is otherwise small.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import tiny  # noqa: E402

LR = 1e-4


def config(moe: bool, **text) -> dict:
    """A model that a CPU trains in a second or two: four decoder layers of width 512, four vision blocks of 256."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2,
             "head_dim": 64, "initializer_range": 0.02, "vocab_size": 32768} | text
    raw = tiny.config_dict(moe=moe, layers=4, **sizes)
    raw["text_config"]["rope_parameters"]["mrope_section"] = [12, 10, 10]
    raw["text_config"]["rope_scaling"]["mrope_section"] = [12, 10, 10]
    raw["vision_config"] |= {"hidden_size": 256, "intermediate_size": 1024, "num_heads": 4, "depth": 4,
                             "out_hidden_size": sizes["hidden_size"], "num_position_embeddings": 2304,
                             "deepstack_visual_indexes": [0, 1, 2]}
    if moe:
        raw["text_config"] |= {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 384}
    return raw


EQUAL = [[40, ("image", 20, 20), 114]] * 4  # 256 tokens each, a picture of 320 x 320 pixels
MIXED = [[40, ("image", 20, 26), 120], [400], [30, ("image", 14, 10), ("image", 8, 16), 60], [90],
         [25, ("image", 26, 30), 150], [140], [20, ("image", 10, 12), 35], [10, ("image", 16, 16), 200]]
CASES = {
    "dense-equal": (config(False), EQUAL), "dense-mixed": (config(False), MIXED),
    "moe-equal": (config(True), EQUAL), "moe-mixed": (config(True), MIXED),
}
MEMORY = config(False, vocab_size=151936, hidden_size=256), [[8192]]


class Ours:
    """This project's model and step, as train.py takes it on one rank without FSDP."""

    def __init__(self, raw: dict, directory: str, rows: list):
        from convert import load_hf_weights
        from data import mrope_positions
        from model import Qwen3VL, Qwen3VLConfig

        self.model = Qwen3VL(Qwen3VLConfig.from_json(directory))
        load_hf_weights(self.model, directory)
        self.model.loss_chunk_size = 1024
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        samples = [tiny.row(parts, seed) for seed, parts in enumerate(rows)]
        positions = [torch.from_numpy(mrope_positions(len(s.input_ids), media_runs(s))) for s in samples]
        self.batch = tiny.batch_of(samples, positions)

    def step(self) -> float:
        loss, _ = self.model(self.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Transformers:
    """transformers' model and step."""

    def __init__(self, raw: dict, directory: str, rows: list):
        import transformers

        kind = transformers.Qwen3VLMoeForConditionalGeneration if raw["model_type"] == "qwen3_vl_moe" else (
            transformers.Qwen3VLForConditionalGeneration)
        extra = {"experts_implementation": "grouped_mm"} if raw["model_type"] == "qwen3_vl_moe" else {}
        self.model = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="sdpa", **extra).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR)
        samples = [tiny.row(parts, seed) for seed, parts in enumerate(rows)]
        length = max(len(s.input_ids) for s in samples)
        padded = [torch.nn.functional.pad(s.input_ids, (0, length - len(s.input_ids))) for s in samples]
        ids = torch.stack(padded)
        mask = torch.stack([(torch.arange(length) < len(s.input_ids)).long() for s in samples])
        media = (ids == tiny.IMAGE) & mask.bool()
        labels = ids.masked_fill(media | (mask == 0), -100)
        self.inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": media.int()}
        if any(len(s.grid_thw) for s in samples):
            self.inputs["pixel_values"] = torch.cat([s.pixel_values for s in samples])
            self.inputs["image_grid_thw"] = torch.cat([s.grid_thw for s in samples])

    def step(self) -> float:
        loss = self.model(**self.inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def media_runs(sample: SimpleNamespace) -> list[tuple[int, int, int]]:
    """(start, rows, columns) of each picture's tokens."""
    starts = (torch.nonzero(sample.input_ids == tiny.START).flatten() + 1).tolist()
    return [(start, h // 2, w // 2) for start, (_, h, w) in zip(starts, sample.grid_thw.tolist(), strict=True)]


def serve(side: str, raw: dict, directory: str, rows: list, threads: int, pipe) -> None:
    """A side's process: takes a step each time it is asked, and says its seconds, its loss and its memory."""
    torch.set_num_threads(threads)
    runner = {"ours": Ours, "transformers": Transformers}[side](raw, directory, rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send("ready")
    while pipe.recv():
        began = time.perf_counter()
        loss = runner.step()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((seconds, loss, peak / 1024, (peak - before) / 1024))


def compare(name: str, raw: dict, rows: list, rounds: int, threads: int) -> dict:
    """Prints and returns one case's figures."""
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        tiny.hf_dir(Path(directory), raw, tiny.hf_model(raw))
        context = multiprocessing.get_context("spawn")
        sides = {}
        for side in ("ours", "transformers"):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(side, raw, directory, rows, threads, there), daemon=True)
            process.start()
            assert here.recv() == "ready"
            sides[side] = process, here
        results = {side: [] for side in sides}
        for _ in range(rounds + 1):
            for side, (_, pipe) in sides.items():
                pipe.send(True)
                results[side].append(pipe.recv())
        for process, pipe in sides.values():
            pipe.send(False)
            process.join()
    losses = {side: [loss for _, loss, _, _ in each] for side, each in results.items()}
    off = max(abs(a / b - 1) for a, b in zip(*losses.values(), strict=True))
    seconds = {side: np.array([each[0] for each in result[1:]]) for side, result in results.items()}  # warm by then
    ratios = seconds["ours"] / seconds["transformers"]
    memory = {side: each[-1][2] for side, each in results.items()}
    ours, theirs = (float(np.median(each)) for each in seconds.values())
    print(f"{name:12} ours {ours:6.3f} s, transformers {theirs:6.3f} s, ratio {np.median(ratios):.2f} "
          f"({ratios.min():.2f} to {ratios.max():.2f}); most memory {memory['ours']:,.0f} and "
          f"{memory['transformers']:,.0f} MB, ratio {memory['ours'] / memory['transformers']:.2f}; losses "
          f"{losses['ours'][0]:.5f} to {losses['ours'][-1]:.5f}, {off:.0e} apart", flush=True)
    if off > 1e-3:
        print(f"{name}: the losses disagree, the figures do not count: {losses}")
    return {"ratio": float(np.median(ratios)), "memory_ratio": memory["ours"] / memory["transformers"], "off": off}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", help="comma-separated: " + ", ".join([*CASES, "memory"]))
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else [*CASES, "memory"]
    print(f"{args.threads} threads, float32, PyTorch {torch.__version__}; seconds of a step: median of {args.rounds}")
    for name, (raw, rows) in CASES.items():
        if name in wanted:
            compare(name, raw, rows, args.rounds, args.threads)
    if "memory" in wanted:
        compare("memory", *MEMORY, 1, args.threads)


if __name__ == "__main__":
    main()
