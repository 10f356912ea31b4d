"""What only a GPU can show: `pytest -m cuda`. Skipped, with the reason, where there is none."""
from __future__ import annotations

from collections import deque
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_train import MODELS, folder, leave_the_process_as_it_was, run  # noqa: F401  fixtures

import kernels_npu
from model import LMHead, Qwen3VL, Qwen3VLConfig
from parallel import Offload, recompute_block

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.fixture(autouse=True)
def the_cpu_again():
    yield
    kernels_npu.select("cpu")


def test_every_operation_is_right():
    """All overrides against `Torch` in float32, forward and backward: the user's own check."""
    assert kernels_npu.check_operations(kernels_npu.select("cuda"))


@pytest.mark.parametrize("model", MODELS)
def test_training_steps_equal_the_cpus(folder, tmp_path, model):  # noqa: F811
    """float32, 1e-3 over four steps: a GPU's matrix products may round to 10 bits, and add in another order."""
    cpu = run(folder, tmp_path / "cpu", model=model, iters=4)
    gpu = run(folder, tmp_path / "gpu", "--device", "cuda", "--fp32", model=model, iters=4)
    for a, b in zip(cpu, gpu, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        assert b["memory_allocated"] > 0


def peak(call) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_chunked_loss_holds_one_chunk_of_logits():
    head = LMHead(1024, 151_936, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(8192, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    batch = SimpleNamespace(labels=torch.zeros(8192, dtype=torch.long, device="cuda"),
                            loss_weights=torch.ones(8192, device="cuda"),
                            supervised_index=torch.arange(8192, device="cuda"))

    def step(chunk: int):
        head(hidden, batch, chunk).backward()
        head.weight.grad = hidden.grad = None

    assert peak(lambda: step(512)) < 0.3 * peak(lambda: step(0))


def test_offload_keeps_inputs_on_the_host(tmp_path):
    """Against recompute alone: all but two of the blocks' inputs leave the device, and gradients stay the same."""
    raw = tiny.config_dict(layers=16)
    ops = kernels_npu.select("cuda", torch.float32)
    tiny.hf_dir(tmp_path, raw)
    model = Qwen3VL(Qwen3VLConfig.from_json(tmp_path)).cuda()
    model.init_weights(0)
    text = model.model.language_model
    positions = torch.arange(60_000, device="cuda").expand(3, -1)

    def step():
        x = torch.randn(60_000, 56, device="cuda", generator=torch.Generator("cuda").manual_seed(0), requires_grad=True)
        text(deque([x * 1.0]), positions, [0, 60_000])[0].square().mean().backward()
        gradients.append(x.grad)

    peaks, gradients = [], []
    for block_fn in (recompute_block, Offload(ops)):
        text.block_fn = block_fn
        step()
        peaks.append(peak(step))
        gradients.pop()
    one_input = 60_000 * 56 * 4
    assert peaks[0] - peaks[1] > 10 * one_input
    assert torch.equal(gradients[0], gradients[1])
