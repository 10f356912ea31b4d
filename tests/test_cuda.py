"""Tests that need an NVIDIA GPU: `make test-cuda`, or `pytest -m cuda`. Without a GPU they are skipped."""
from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import torch
from helpers import read_metrics, run_job, shell, train_argv, weights, write_mixed_rows

import convert
import data
import kernels_npu
import parallel
import train
from model import Qwen3VL, Qwen3VLConfig
from tools import check_kernels

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODELS = {"dense": tiny.config_dict(), "moe": tiny.config_dict(moe=True), "tied": tiny.config_dict(tied=True)}
EVEN = tiny.config_dict(moe=True)  # heads and experts that divide by two
EVEN["text_config"]["num_experts"] = 8
EVEN["vision_config"]["num_heads"] = 4
CUDA = ["--device", "cuda"]
FLOAT32 = [*CUDA, "--fp32"]
BF16 = [*CUDA, "--bf16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a directory with models and rows.json."""
    path = tmp_path_factory.mktemp("cuda")
    for name, raw in (MODELS | {"even": EVEN}).items():
        tiny.hf_dir(path / name, raw, tiny.hf_model(raw))
    write_mixed_rows(path, 12)
    return path


@pytest.fixture(autouse=True)
def select_cpu():
    """Select the CPU's operations again after each test."""
    yield
    kernels_npu.select("cpu")


def run(folder: Path, save: Path, *flags, model: str = "dense", iters: int = 6) -> list[dict]:
    """Train in this process and return the metrics; --adam-eps bounds what rounding can do to a step."""
    train.main(train_argv(folder / model, folder / "rows.json", save, "--global-batch-size", 2, "--adam-eps", 1e-5,
                          *flags, iters=iters))
    return read_metrics(save)


def assert_close(expected: list[dict], found: list[dict], tolerance: float) -> None:
    """Compare the losses and gradient norms of two runs, iteration by iteration."""
    for a, b in zip(expected, found, strict=True):
        for key in ("iteration", "loss", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=tolerance), f"iteration {a['iteration']}: {key}"


# ---- operations and training steps -----------------------------------------------------------------------------------


def test_operations_equal_torch():
    """Compare every operation with `Torch`, forward and backward, in float32 and bf16."""
    assert check_kernels.check_operations(kernels_npu.select("cuda"))


@pytest.mark.parametrize("model", MODELS)
def test_train_float32_equals_cpu(folder, tmp_path, model):
    """Six steps agree to 1e-3: a GPU adds in another order, and its matrix products may use TF32."""
    cpu = run(folder, tmp_path / "cpu", model=model)
    gpu = run(folder, tmp_path / "gpu", *FLOAT32, model=model)
    assert_close(cpu, gpu, 1e-3)
    assert all(m["memory_allocated"] > 0 for m in gpu)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("model", ["dense", "moe"])
def test_train_bf16_equals_cpu(folder, tmp_path, model, attention):
    """Six steps in bf16 agree with float32 on the CPU to 2e-2, with each attention implementation."""
    cpu = run(folder, tmp_path / "cpu", model=model)
    implementation = ["--text-attn-implementation", attention, "--vision-attn-implementation", attention]
    assert_close(cpu, run(folder, tmp_path / "gpu", *BF16, *implementation, model=model), 2e-2)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_train_recompute_and_offload_equal_plain(folder, tmp_path, model):
    """Recompute, with or without activation offload, gives the same steps; 1e-4 because some GPU sums are unordered."""
    plain = run(folder, tmp_path / "plain", *FLOAT32, "--recompute", "none", model=model)
    recompute = run(folder, tmp_path / "recompute", *FLOAT32, "--recompute", "full", model=model)
    offload = run(folder, tmp_path / "offload", *FLOAT32, "--recompute", "full", "--activation-offload", model=model)
    assert_close(plain, recompute, 1e-4)
    assert_close(plain, offload, 1e-4)


@pytest.mark.parametrize("workers", [0, 2])
def test_train_batches_are_pinned(folder, tmp_path, monkeypatch, workers):
    """The loader's tensors are in pinned memory when they are copied to the device. Loss weights are made later."""
    to, pageable, copied = data.Batch.to, set(), []

    def recorded(batch: data.Batch, device) -> data.Batch:
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if f.metadata["kind"] in data.ON_DEVICE}
        pageable.update(name for name, value in tensors.items()
                        if name != "loss_weights" and value.numel() and not value.is_pinned())
        copied.append(batch)
        return to(batch, device)

    monkeypatch.setattr(data.Batch, "to", recorded)
    run(folder, tmp_path / "save", *CUDA, "--num-workers", workers, iters=3)
    assert len(copied) == 3 * 2 and not pageable  # two micro-batches a step


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_train_deterministic_and_cpu_offload(folder, tmp_path, model):
    """Two deterministic runs are equal bit for bit, and with parameters on the host losses are equal to 1e-5.

    Each run is a process: cuBLAS reads its environment once.
    """
    runs = []
    for name, more in {"first": [], "second": [], "host": ["--cpu-offload"]}.items():
        argv = train_argv(folder / model, folder / "rows.json", tmp_path / name, *BF16, "--deterministic",
                          "--global-batch-size", 2, "--adam-eps", 1e-5, *more, iters=6)
        result = shell("train.py", *argv)
        assert result.returncode == 0, result.stderr
        runs.append(read_metrics(tmp_path / name))
    first, second, host = runs
    assert [(m["loss"], m["grad_norm"]) for m in first] == [(m["loss"], m["grad_norm"]) for m in second]
    assert_close(first, host, 1e-5)
    assert host[-1]["memory_allocated"] < first[-1]["memory_allocated"]


def test_step_does_not_wait(folder):
    """Forward and backward of a row with an image make the host wait for the device nowhere."""
    kernels_npu.select("cuda", torch.bfloat16)
    row = json.loads((folder / "rows.json").read_text())[1]
    batch = data.collate([data.Processor(folder / "dense").encode(row, folder)])
    batch.loss_weights = torch.ones(len(batch.input_ids))
    batch = batch.to("cuda")
    model = Qwen3VL(Qwen3VLConfig.from_json(folder / "dense")).to("cuda", torch.bfloat16)
    model.init_weights(0)
    for mode in ("default", "error"):  # the first step allocates
        kernels_npu._on_device.cache_clear()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model(batch)[0].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("layout", [
    [], ["--fsdp-size", 1], ["--context-parallel-size", 2], ["--expert-parallel-size", 2],
    ["--expert-parallel-size", 2, "--context-parallel-size", 2, "--activation-offload"],
], ids=["fsdp", "replicas", "context", "experts", "all"])
def test_two_ranks_equal_one(folder, tmp_path, layout):
    """Two ranks over NCCL, with accumulation, give the steps of one CPU; a save and a resume work too."""
    flags = ["--global-batch-size", 4, "--lr-decay-style", "constant", "--router-aux-loss-coef", 0.1]
    expected = run(folder, tmp_path / "cpu", *flags, model="even")
    many, save = [*flags, "--adam-eps", 1e-5, *FLOAT32, *layout], tmp_path / "gpus"
    for iters, more in ((3, []), (6, ["--load", save])):
        run_job(train_argv(folder / "even", folder / "rows.json", save, *many, *more, iters=iters), 2)
    assert_close(expected, read_metrics(save), 1e-3)


# ---- checkpoints and answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--async-save"]], ids=["foreground", "background"])
def test_resume_equals_uninterrupted_run(folder, tmp_path, more):
    """Three steps, a save and three more equal six steps; the CPU can read the checkpoint."""
    flags = [*FLOAT32, *more, "--lr-decay-style", "constant"]
    expected = run(folder, tmp_path / "six", *flags, model="moe")
    run(folder, tmp_path / "save", *flags, model="moe", iters=3)
    saved = weights(tmp_path / "save")
    assert any(name.startswith("optimizer.exp_avg.") for name in saved)
    assert all(value.isfinite().all() for value in saved.values())
    resumed = run(folder, tmp_path / "save", *flags, "--load", tmp_path / "save", model="moe")
    assert_close(expected, resumed, 1e-4)


def answer(folder: Path, *flags) -> str:
    result = shell("infer.py", "--model", folder / "dense", "--image", folder / "1.png", "--prompt", "What is this?",
                   "--max-new-tokens", 12, *flags)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_infer_equals_cpu(folder):
    """A greedy answer in float32 is the CPU's; bf16, the device's default, answers too."""
    assert answer(folder, *CUDA, "--dtype", "float32") == answer(folder, "--device", "cpu", "--dtype", "float32")
    answer(folder, *CUDA, "--dtype", "bfloat16")


def test_infer_rows(folder, tmp_path):
    """Answer a file of rows, several at a time, from a GPU run's checkpoint."""
    run(folder, tmp_path / "save", *CUDA, iters=1)
    output = tmp_path / "answers.jsonl"
    result = shell("infer.py", "--model", folder / "dense", "--load", convert.find_checkpoint(tmp_path / "save"),
                   "--input", folder / "rows.json", "--output", output, "--batch-size", 4, "--max-new-tokens", 8, *CUDA)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 12 and all("prediction" in row for row in rows)


# ---- memory ----------------------------------------------------------------------------------------------------------


def text_batch(model_dir: Path, tokens: int) -> data.Batch:
    """Return a batch of one text row on the GPU, of at least `tokens` tokens, most of them supervised."""
    row = {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": "a" * tokens}]}
    batch = data.collate([data.Processor(model_dir).encode(row, model_dir)])
    batch.loss_weights = torch.full((len(batch.input_ids),), 1 / len(batch.supervised_index))
    return batch.to("cuda")


def peak_of_step(model: Qwen3VL, batch: data.Batch) -> int:
    """Return the device memory in bytes that a second forward and backward adds at its peak; keep its gradients."""
    model(batch)[0].backward()
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(batch)[0].backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_loss_memory_is_one_chunk_of_logits(tmp_path):
    """With 151,936 logits a token, 4096 tokens at once take over 2.5 GB; chunks of 256 take a sixteenth of that."""
    tiny.hf_dir(tmp_path, tiny.config_dict(vocab_size=151_936, layers=3))
    kernels_npu.select("cuda", torch.float32)
    model = Qwen3VL(Qwen3VLConfig.from_json(tmp_path)).cuda()
    model.init_weights(0)
    batch = text_batch(tmp_path, 4096)
    model.loss_chunk_size = 0  # all logits at once
    full = peak_of_step(model, batch)
    model.zero_grad()
    model.loss_chunk_size = 256
    assert full > 4096 * 151_936 * 4 and peak_of_step(model, batch) < 0.3 * full


def test_offload_keeps_inputs_on_host(tmp_path):
    """All but two of the 16 blocks' inputs leave the device, and the gradients stay the same to rounding."""
    ops = kernels_npu.select("cuda", torch.float32)
    tiny.hf_dir(tmp_path, tiny.config_dict(layers=16))
    batch = text_batch(tmp_path, 20_000)
    peaks, gradients = [], []
    for offload in (False, True):
        state = parallel.ParallelState(ops, 1)
        with torch.device("meta"):
            model = Qwen3VL(Qwen3VLConfig.from_json(tmp_path))
        parallel.parallelize(model, state, compute_dtype=torch.float32, recompute=True, offload=offload)
        model.to_empty(device="cuda")
        model.init_weights(0)
        peaks.append(peak_of_step(model, batch))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        state.close()
    one_input = len(batch.input_ids) * 56 * 4
    assert peaks[0] - peaks[1] > 10 * one_input
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        error = (gradients[1][name] - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max() + 1e-8, name
