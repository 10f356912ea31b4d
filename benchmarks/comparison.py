"""Share what the benchmarks need: models of a size that a CPU can run, and two sides that are measured in turns.

Each side has a process of its own, and only one side works at a time. Anything else that the machine does then slows
down both sides alike. Ratios are computed turn by turn.
"""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
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

# ---- models --------------------------------------------------------------------------------------------------------


def config(moe: bool, **text) -> dict:
    """Return a configuration that a CPU trains in a second or two per step; `text` overrides the text decoder's sizes.

    It has four decoder layers of width 512 and four vision blocks of width 256. An MoE uses 4 of 32 experts.
    """
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


def write_model(directory: str | Path, raw: dict, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Write a Hugging Face directory with random weights, which both sides read. `device` draws them."""
    torch.manual_seed(0)
    tiny.hf_dir(Path(directory), raw, tiny.hf_model(raw, device=device).to(dtype))


def load_ours(directory: str, device: str, dtype: torch.dtype):
    """Load this project's model with every parameter in `dtype`."""
    import convert
    from model import Qwen3VLConfig, build_model

    ops = kernels_npu.select(device, dtype)
    model = build_model(Qwen3VLConfig.from_json(directory)).to(dtype)
    source = convert.HuggingFaceWeights(directory).check_compatible(model)
    model.to_empty(device=ops.device)
    convert.load_weights(model, source)
    return model


def load_transformers(directory: str, device: str, dtype: torch.dtype):
    """Load transformers' model with its fastest settings: sdpa, and `grouped_mm` for experts."""
    import transformers

    moe = json.loads((Path(directory) / "config.json").read_text())["model_type"] == "qwen3_vl_moe"
    model_class, extra = transformers.Qwen3VLForConditionalGeneration, {}
    if moe:
        model_class, extra = transformers.Qwen3VLMoeForConditionalGeneration, {"experts_implementation": "grouped_mm"}
    return model_class.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa", **extra).to(device)


# ---- inputs --------------------------------------------------------------------------------------------------------


def _samples(rows: list) -> list:
    return [tiny.row(parts, seed) for seed, parts in enumerate(rows)]


def _to_device(values: dict, device: str, dtype: torch.dtype) -> dict:
    """Move a batch's tensors to the device. Grids stay on the host, where both models read them."""
    def move(name: str, value):
        if not isinstance(value, torch.Tensor) or name == "grid_thw":
            return value
        return value.to(device, dtype if name.startswith("pixel_values") else None)
    return {name: move(name, value) for name, value in values.items()}


def packed_batch(rows: list, device: str, dtype: torch.dtype):
    """Return our model's batch of rows, given as the arguments of `tiny.row`."""
    from data import mrope_positions

    samples, positions = _samples(rows), []
    for sample in samples:
        starts = (torch.nonzero(sample.input_ids == tiny.START).flatten() + 1).tolist()
        spans = [(start, h // 2, w // 2) for start, (_, h, w) in zip(starts, sample.grid_thw.tolist(), strict=True)]
        positions.append(torch.from_numpy(mrope_positions(len(sample.input_ids), spans)))
    batch = tiny.batch_of(samples, positions)
    vars(batch).update(_to_device(vars(batch), device, dtype))
    return batch


def padded_inputs(rows: list, device: str, dtype: torch.dtype, left: bool = False) -> dict:
    """Return transformers' inputs of rows, padded to the longest: on the right, or on the left for `generate`."""
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


# ---- measuring -----------------------------------------------------------------------------------------------------


def synchronized_time(device: str) -> float:
    """Return the time in seconds once the device has finished its work."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a product of [2048, 768] and [768, 2304], the limit of a step of matrix products."""
    x, weight = torch.ones(2048, 768, device=device, dtype=dtype), torch.ones(768, 2304, device=device, dtype=dtype)
    out, repeats = x @ weight, 10
    began = synchronized_time(device)
    for _ in range(repeats):
        torch.mm(x, weight, out=out)
    return repeats * 2 * out.numel() * len(weight) / (synchronized_time(device) - began)


def peak_mb(device: str) -> float:
    """Return this process's peak memory in MB: the device's, or the resident memory on a CPU."""
    if device != "cpu":
        return torch.get_device_module(device).max_memory_allocated() / 2**20
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # getrusage counts the parent's peak, too
    return int(status["VmHWM"].split()[0]) / 1024


def _serve(make: Callable, arguments: tuple, threads: int, pipe) -> None:
    """Create a side, then run one turn for each True that the pipe brings."""
    torch.set_num_threads(threads)
    turn = make(*arguments)
    pipe.send(None)
    while pipe.recv():
        pipe.send(turn())


def measure_in_turns(sides: dict[str, Callable], arguments: tuple, rounds: int, threads: int) -> dict[str, list]:
    """Measure several sides in turns, each in its own process.

    sides: functions that take `arguments` and return a function without arguments, which runs one turn.
    Returns the results of each side's turns: one warm-up turn, then `rounds` turns.
    """
    context = multiprocessing.get_context("spawn")
    running = {}
    for name, make in sides.items():
        our_end, its_end = context.Pipe()
        process = context.Process(target=_serve, args=(make, arguments, threads, its_end), daemon=True)
        process.start()
        its_end.close()  # otherwise recv would wait forever for a side that died
        our_end.recv()
        running[name] = process, our_end
    results = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, (_, pipe) in running.items():
            pipe.send(True)
            results[name].append(pipe.recv())
    for process, pipe in running.values():
        pipe.send(False)
        process.join()
    return results


def ratio(ours: list[float], reference: list[float]) -> str:
    """Return the median and the range of the ratios, turn by turn."""
    ratios = np.array(ours) / np.array(reference)
    return f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


# ---- command line --------------------------------------------------------------------------------------------------


def make_parser(doc: str, cases: list[str], rounds: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the flags that all benchmarks have; --rounds is for those that measure in turns."""
    def some_cases(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(cases):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {','.join(cases)}")
        return text.split(",")

    parser, at_least_one = argparse.ArgumentParser(description=doc.split("\n\n")[0]), common.number(int, 1)
    devices = ("cpu", "cuda")[: 1 + torch.cuda.is_available()]
    parser.add_argument("--device", choices=devices, default=devices[-1], help="device to measure on")
    if rounds:
        parser.add_argument("--rounds", type=at_least_one, default=7, help="measured turns per side")
    parser.add_argument("--threads", type=at_least_one, default=len(os.sched_getaffinity(0)), help="threads per side")
    parser.add_argument("--only", type=some_cases, default=cases, metavar="A,B", help="run some of: " + ",".join(cases))
    return parser


def describe_machine(device: str, threads: int) -> str:
    """Return one line about the device and the software."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, bf16, PyTorch {torch.__version__}"
    models = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return f"{models[0] if models else 'CPU'}, {threads} threads, float32, PyTorch {torch.__version__}"
