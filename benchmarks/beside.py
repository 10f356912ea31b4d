"""What the comparisons share: models of a size that this machine runs, and two sides that are asked in turn.

Each side lives in a process of its own and does one thing at a time, first one, then the other, so that whatever else
the machine does slows down both. Ratios are taken turn by turn.
"""
from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402

import common  # noqa: E402
import kernels_npu  # noqa: E402


def config(moe: bool, **text) -> dict:
    """By default a model that a CPU trains in a second or two: four decoder layers of width 512, four vision blocks of
    256, of the experts four of 32."""
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 2,
             "head_dim": 64, "initializer_range": 0.02, "vocab_size": 32768} | text
    raw = tiny.config_dict(moe=moe, **{"layers": 4} | sizes)
    sections = [12, 10, 10] if sizes["head_dim"] == 64 else [24, 20, 20]
    for rope in ("rope_parameters", "rope_scaling"):
        raw["text_config"][rope]["mrope_section"] = sections
    raw["vision_config"] |= {"hidden_size": 256, "intermediate_size": 1024, "num_heads": 4, "depth": 4,
                             "out_hidden_size": sizes["hidden_size"], "num_position_embeddings": 2304,
                             "deepstack_visual_indexes": [0, 1, 2]}
    if moe:
        raw["text_config"] |= {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 384}
    return raw


def write_model(directory: str | Path, raw: dict) -> None:
    """A Hugging Face directory with random weights for both sides."""
    torch.manual_seed(0)
    tiny.hf_dir(Path(directory), raw, tiny.hf_model(raw))


def load_ours(directory: str, device: str, dtype: torch.dtype):
    """This project's model, every parameter in `dtype`."""
    from convert import load_hf_weights
    from model import Qwen3VL, Qwen3VLConfig

    ops = kernels_npu.select(device, dtype)
    with torch.device("meta"):
        model = Qwen3VL(Qwen3VLConfig.from_json(directory)).to(dtype)
    model.to_empty(device=ops.device)
    load_hf_weights(model, directory)
    return model


def load_transformers(directory: str, device: str, dtype: torch.dtype):
    """transformers' model at its best: sdpa, experts by `grouped_mm`."""
    import json

    import transformers

    moe = json.loads((Path(directory) / "config.json").read_text())["model_type"] == "qwen3_vl_moe"
    kind = transformers.Qwen3VLMoeForConditionalGeneration if moe else transformers.Qwen3VLForConditionalGeneration
    extra = {"experts_implementation": "grouped_mm"} if moe else {}
    return kind.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa", **extra).to(device)


def _samples(rows: list) -> list:
    return [tiny.row(parts, seed) for seed, parts in enumerate(rows)]


def _to_device(values: dict, device: str, dtype: torch.dtype) -> dict:
    """Tensors of a batch where the model is; grids stay on the host, where our model and pictures' sizes are read."""
    def move(name: str, value):
        if not isinstance(value, torch.Tensor) or name == "grid_thw":
            return value
        return value.to(device, dtype if name.startswith("pixel_values") else None)
    return {name: move(name, value) for name, value in values.items()}


def packed(rows: list, device: str, dtype: torch.dtype):
    """Our model's batch of rows as `tiny.row` takes them."""
    from data import mrope_positions

    samples, positions = _samples(rows), []
    for sample in samples:
        starts = (torch.nonzero(sample.input_ids == tiny.START).flatten() + 1).tolist()
        media = [(at, h // 2, w // 2) for at, (_, h, w) in zip(starts, sample.grid_thw.tolist(), strict=True)]
        positions.append(torch.from_numpy(mrope_positions(len(sample.input_ids), media)))
    batch = tiny.batch_of(samples, positions)
    vars(batch).update(_to_device(vars(batch), device, dtype))
    return batch


def padded(rows: list, device: str, dtype: torch.dtype, left: bool = False) -> dict:
    """transformers' inputs of rows: padded to the longest, as its collators do, or on the left, as `generate` needs."""
    samples = _samples(rows)
    length = max(len(s.input_ids) for s in samples)
    missing = [length - len(s.input_ids) for s in samples]
    ids, mask = (
        torch.stack([F.pad(t, (n, 0) if left else (0, n)) for t, n in zip(tensors, missing, strict=True)])
        for tensors in ([s.input_ids for s in samples], [torch.ones_like(s.input_ids) for s in samples])
    )
    media = (ids == tiny.IMAGE) & mask.bool()
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": media.int()}
    if media.any():
        inputs["pixel_values"] = torch.cat([s.pixel_values for s in samples])
        inputs["image_grid_thw"] = torch.cat([s.grid_thw for s in samples])
    return _to_device(inputs, device, dtype)


def peak_mb(device: str) -> float:
    """The most memory that this process has held so far: of the device, or all of it on a CPU."""
    if device != "cpu":
        return torch.get_device_module(device).max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _serve(make: Callable, arguments: tuple, threads: int, pipe) -> None:
    torch.set_num_threads(threads)
    turn = make(*arguments)
    pipe.send(None)
    while pipe.recv():
        pipe.send(turn())


def in_turn(sides: dict[str, Callable], arguments: tuple, rounds: int, threads: int) -> dict[str, list]:
    """Makes each side (a function of `arguments` that returns a function without any) in its own process, calls what it
    returned once to warm up and `rounds` times, and gives all results of each."""
    context = multiprocessing.get_context("spawn")
    running = {}
    for name, make in sides.items():
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(make, arguments, threads, there), daemon=True)
        process.start()
        there.close()  # so that a side that dies is noticed
        here.recv()
        running[name] = process, here
    results = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, (_, pipe) in running.items():
            pipe.send(True)
            results[name].append(pipe.recv())
    for process, pipe in running.values():
        pipe.send(False)
        process.join()
    return results


def ratio(ours: list[float], theirs: list[float]) -> str:
    """The median of the ratios, turn by turn, and their spread."""
    ratios = np.array(ours) / np.array(theirs)
    return f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


def flags(doc: str, cases: list[str], rounds: bool = True) -> argparse.ArgumentParser:
    """The flags that all have; --rounds where turns are taken."""
    def some(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(cases):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: give some of {','.join(cases)}")
        return text.split(",")

    parser, at_least_one = argparse.ArgumentParser(description=doc.split("\n\n")[0]), common.number(int, 1)
    devices = ("cpu", "cuda")[: 1 + torch.cuda.is_available()]
    parser.add_argument("--device", choices=devices, default=devices[-1])
    if rounds:
        parser.add_argument("--rounds", type=at_least_one, default=7, help="turns that count")
    parser.add_argument("--threads", type=at_least_one, default=len(os.sched_getaffinity(0)), help="of each side")
    parser.add_argument("--only", type=some, default=cases, metavar="A,B", help="of " + ",".join(cases))
    return parser


def machine(device: str, threads: int) -> str:
    """What the figures were measured on."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, bf16, PyTorch {torch.__version__}"
    models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{models[0] if models else 'CPU'}, {threads} threads, float32, PyTorch {torch.__version__}"


def clock(device: str) -> float:
    if device != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()
