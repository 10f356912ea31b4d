"""Measure what train.py's options cost and save.

    python benchmarks/options.py [--only dense] [--device cuda]

Each run trains a random model through train.py, including its loader, its clipping, and FSDP2 in bf16. The rows are
packed images and text. The first run uses the defaults and each other run one option. The program prints the time of
a step, MFU where the device's peak is known, and peak memory. On a CPU the model is small. On CUDA it has the widths of
8B (dense) or 30B-A3B (moe), and fewer layers.
"""
from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import comparison
import numpy as np
import tiny
from comparison import ROOT
from PIL import Image

OPTIONS = {
    "no recompute": ["--recompute", "none"], "recompute": ["--recompute", "full"],
    "recompute and offload": ["--recompute", "full", "--activation-offload"],
    "no recompute, loss in one chunk": ["--recompute", "none", "--loss-chunk-size", "0"],
}


def model_config(moe: bool, device: str, layers: int | None) -> dict:
    """Return a small configuration for a CPU, and that of 8B or 30B-A3B for a GPU; `layers` cuts it (None: all)."""
    raw = comparison.config(moe, vocab_size=32768)
    if device == "cuda":
        name = "qwen3-vl-30b-a3b" if moe else "qwen3-vl-8b"
        raw = json.loads((ROOT / "configs" / name / "config.json").read_text())
    if layers:
        raw["text_config"]["num_hidden_layers"] = layers
        raw["vision_config"]["depth"] = min(raw["vision_config"]["depth"], layers)
        raw["vision_config"]["deepstack_visual_indexes"] = [0, 1, 2][:layers]
    return raw | {"image_token_id": tiny.IMAGE, "video_token_id": tiny.VIDEO, "vision_start_token_id": tiny.START,
                  "vision_end_token_id": tiny.END}


def write_inputs(folder: Path, raw: dict) -> None:
    """Write config.json, a byte tokenizer and 64 rows, two thirds of them with an image."""
    tiny.hf_dir(folder, raw)
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"] = {"shortest_edge": 65536, "longest_edge": 16777216}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    rng, rows = np.random.default_rng(0), []
    for i in range(64):
        text = "".join(chr(97 + c) for c in rng.integers(0, 26, int(rng.integers(100, 600))))
        row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]}
        if i % 3:
            size = tuple(int(side) for side in rng.integers(200, 640, 2))
            pixels = rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize(size).save(folder / f"{i}.jpg")
            row["messages"][0]["content"] = "<image>What?"
            row["images"] = [f"{i}.jpg"]
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows))


def run(folder: Path, options: list[str], args: argparse.Namespace) -> dict:
    """Train in a new process. Return medians over the steps after the first two, and peak memory in bytes."""
    out = Path(tempfile.mkdtemp(dir=folder))
    command = [sys.executable, ROOT / "train.py", "--init-from-hf-path", folder, "--init", "random", "--dataset",
               folder / "rows.json", "--packing", "--seq-length", args.seq_length, "--save", out, "--no-save-optim",
               "--train-iters", args.steps + 2, "--device", args.device, *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    with open(out / "log", "w") as log:
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: {' '.join(options)}: train.py failed:\n{(out / 'log').read_text()[-2000:]}")
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][2:]
    return {
        "step": statistics.median(m["step_time_s"] for m in steps), "loss": steps[-1]["loss"],
        "tokens": statistics.median(m["tokens_per_s"] for m in steps), "mfu": steps[-1]["mfu"] and
        statistics.median(m["mfu"] for m in steps), "memory": steps[-1]["memory_allocated"] or usage.ru_maxrss * 1024,
    }


def main() -> None:
    parser = comparison.make_parser(__doc__, ["dense", "moe"], rounds=False)
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens in a packed row")
    parser.add_argument("--steps", type=int, default=5, help="steps that are measured")
    parser.add_argument("--layers", type=int, help="layers of the text decoder")
    args = parser.parse_args()
    machine = comparison.describe_machine(args.device, args.threads)
    print(f"{machine}; train.py, one packed row of {args.seq_length} tokens per step")
    for model in args.only:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            layers = args.layers or (4 if args.device == "cpu" else 6)
            write_inputs(folder, model_config(model == "moe", args.device, layers))
            first = None
            for title, options in OPTIONS.items():
                if "--activation-offload" in options and args.device == "cpu":
                    continue  # a CPU has no device memory to save
                m = run(folder, options, args)
                first = first or m
                mfu = f", MFU {m['mfu']:.3f}" if m["mfu"] else ""
                print(f"{model:6} {title:32} {m['step']:7.3f} s ({m['step'] / first['step']:.2f}), {m['tokens']:6,.0f} "
                      f"tokens/s{mfu}, peak memory {m['memory'] / 2**20:7,.0f} MB "
                      f"({m['memory'] / first['memory']:.2f}); loss {m['loss']:.5f}", flush=True)


if __name__ == "__main__":
    main()
