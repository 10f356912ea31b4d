"""Compare the plain operations with slow, direct formulas, forward and backward, in float64 or float32."""
from __future__ import annotations

import importlib.metadata
import os
import re
from types import SimpleNamespace

import pytest
import tiny
import torch

import kernels_npu
from common import UsageError
from kernels_npu import Cpu, Torch, ops
from model import Qwen3VL
from tools import check_kernels


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 8, 0], [0, 0, 0, 0]], ids=["uneven", "one expert", "no rows"])
def test_grouped_matmul_equals_a_product_per_row(counts):
    x = torch.randn(sum(counts), 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    y = ops.grouped_matmul(x, weight, torch.tensor(counts))
    experts = torch.arange(4).repeat_interleave(torch.tensor(counts))
    expected = (x[:, :, None] * weight[experts]).sum(1)
    assert torch.allclose(y, expected)
    dy = torch.randn_like(y)
    grads = (torch.autograd.grad(out, (x, weight), dy) for out in (y, expected))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("tokens", [1, 3])
def test_experts_of_a_cpu_equal_the_plain_ones_without_gradients(tokens):
    gate_up, down = torch.randn(6, 8, 10), torch.randn(6, 5, 8)
    x, weights = torch.randn(tokens, 8), torch.rand(tokens, 2)
    expert_ids = torch.stack([torch.randperm(6)[:2] for _ in range(tokens)])
    with torch.no_grad():
        y, expected = (device(torch.device("cpu")).experts(x, expert_ids, weights, gate_up, down)
                       for device in (Cpu, Torch))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_of_a_cpu_equals_the_plain_one(dtype):
    """The first of equal values counts, and a NaN is above all values."""
    logits = torch.tensor([[0, 3, 3], [-1, torch.nan, 5], [-7, -torch.inf, -8]], dtype=dtype)
    assert [device(logits.device).argmax(logits).tolist() for device in (Cpu, Torch)] == 2 * [[1, 1, 0]]


@pytest.mark.parametrize("by_columns", [True, False])
def test_prepare_for_decoding_keeps_weights(monkeypatch, tmp_path, by_columns):
    """The layout follows the measurement. No value changes, and a tied embedding keeps its rows."""
    monkeypatch.setattr(kernels_npu, "_is_faster_by_columns", lambda weight: by_columns)
    for tied in (False, True):
        ours = Qwen3VL(tiny.our_config(tiny.config_dict(tied=tied), tmp_path))
        before = {name: p.clone() for name, p in ours.named_parameters()}
        Cpu(torch.device("cpu")).prepare_for_decoding(ours)
        assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())
        assert ours.model.language_model.layers[0].self_attn.q_proj.weight.is_contiguous() != by_columns
        assert ours.lm_head.weight.is_contiguous() == (tied or not by_columns)


@pytest.mark.parametrize("slow, expected", [
    (lambda rows, by_row: by_row, True), (lambda rows, by_row: not by_row, False),
    (lambda rows, by_row: by_row == (rows == 1), False)])
def test_is_faster_by_columns_measures_one_row_and_many(monkeypatch, slow, expected):
    clock = iter(range(10**6))
    monkeypatch.setattr(kernels_npu.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.nn.functional, "linear",
                        lambda x, weight: slow(len(x), weight.is_contiguous()) and next(clock))
    assert kernels_npu._is_faster_by_columns(torch.randn(8, 4)) == expected


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA H800 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA RTX A1000", None),
    ("NVIDIA H20", None), ("NVIDIA B200", None), ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090", None)])
def test_peak_flops_by_device_name(monkeypatch, name, peak):
    device = object.__new__(kernels_npu.Cuda)
    device.module = SimpleNamespace(get_device_name=lambda: name)
    assert device.peak_flops() == peak


def test_sequence_bounds_of_inference_serve_training():
    """Flash attention saves the bounds for backward, which PyTorch refuses for a tensor made in inference mode."""
    device = kernels_npu.Cuda(torch.device("cpu"), torch.bfloat16)
    with torch.inference_mode():
        bounds = kernels_npu._on_device((0, 3, 5), device)
    assert not bounds.is_inference() and bounds.tolist() == [0, 3, 5] and bounds.dtype == torch.int32
    assert kernels_npu._on_device((0, 3, 5), device) is bounds


def test_grouped_matmul_without_gradients_reads_only_active_experts():
    cpu, weight = Cpu(torch.device("cpu")), torch.randn(6, 8, 4)
    weight[[0, 2, 3]] = torch.nan
    x, counts = torch.randn(4, 8), torch.tensor([0, 1, 0, 0, 2, 1])
    with torch.no_grad():
        y = cpu.grouped_matmul(x, weight, counts)
    assert torch.allclose(y, torch.cat((x[:1] @ weight[1], x[1:3] @ weight[4], x[3:] @ weight[5])), atol=1e-6)


def test_permute_then_unpermute_restores_tokens():
    """Rows are in expert order, `slot_to_row` finds a token's rows, and weights belong to the right token."""
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    expert_ids = torch.tensor([[2, 0], [1, 2], [0, 1], [4, 2], [2, 1], [0, 4]])  # expert 3 gets nothing
    weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    rows, slot_to_row, counts = ops.moe_permute(x, expert_ids, 5)
    assert counts.tolist() == [3, 3, 4, 0, 2]
    assert torch.equal(rows[slot_to_row].unflatten(0, (6, 2)), x[:, None].expand(-1, 2, -1))
    assert torch.equal(expert_ids.flatten()[slot_to_row.argsort()], expert_ids.flatten().sort().values)
    y = ops.moe_unpermute(rows * torch.arange(5).repeat_interleave(counts)[:, None], slot_to_row, weights)
    expected = x * (weights * expert_ids).sum(1, keepdim=True)
    assert torch.allclose(y, expected)
    for a, b in zip(torch.autograd.grad(y.sum(), (x, weights)), torch.autograd.grad(expected.sum(), (x, weights)),
                    strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cu_seqlens", [[0, 4, 8, 12], [0, 1, 8, 12], [0, 12]], ids=["equal", "uneven", "one"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_equals_a_sum_per_query(implementation, cu_seqlens, causal):
    """Use 6 heads on 2 key-value heads in float64."""
    T = cu_seqlens[-1]
    q, k, v = (torch.randn(T, h, 5, dtype=torch.float64, requires_grad=True) for h in (6, 2, 2))
    expected = []
    for t in range(T):
        start = max(s for s in cu_seqlens if s <= t)
        end = t + 1 if causal else min(s for s in cu_seqlens if s > t)
        for h in range(6):
            scores = k[start:end, h // 3] @ q[t, h] / 5**0.5
            expected.append(scores.softmax(0) @ v[start:end, h // 3])
    expected = torch.stack(expected).unflatten(0, (T, 6))
    y = ops.attention(q, k, v, cu_seqlens, causal, implementation)
    assert torch.allclose(y, expected, atol=1e-6)  # eager computes its softmax in float32
    dy = torch.randn_like(y)
    grads = (torch.autograd.grad(out, (q, k, v), dy) for out in (y, expected))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_rms_norm_computes_in_float32():
    x = torch.randn(7, 16).bfloat16() * 300
    weight = torch.rand(16).bfloat16()
    y = ops.rms_norm(x, weight, 1e-6)
    exact = torch.nn.functional.rms_norm(x.double(), (16,), eps=1e-6)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, weight * exact.float().bfloat16())


def test_rotary_rotates_half_split_pairs():
    """Frequency i rotates (x_i, x_{i + d/2}). The angle at position 0 is 0."""
    x, angle = torch.randn(5, 3, 8, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    angle[0] = 0
    tables = torch.cat((angle, angle), -1)
    y = ops.rotary(x, tables.cos(), tables.sin())
    pair, rotated = torch.complex(x[..., :4], x[..., 4:]), torch.complex(y[..., :4], y[..., 4:])
    assert torch.allclose(rotated, pair * torch.exp(1j * angle)[:, None])
    assert torch.equal(y[0], x[0])


def test_select_deterministic_sets_the_environment_before_the_device(monkeypatch):
    seen = {}

    def import_torch_npu() -> None:
        seen.update(os.environ)
        raise UsageError

    monkeypatch.setattr(kernels_npu, "ops", ops)
    monkeypatch.setattr(kernels_npu, "import_torch_npu", import_torch_npu)
    for name in kernels_npu.DETERMINISTIC_ENVIRONMENT:
        monkeypatch.setenv(name, "")
    with pytest.raises(UsageError):
        kernels_npu.select("npu", deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert seen["HCCL_DETERMINISTIC"] == "true" and seen["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    kernels_npu.select("cpu")
    assert not torch.are_deterministic_algorithms_enabled()


def test_report_is_printed_before_a_device_that_fails(monkeypatch, tmp_path, capsys):
    (tmp_path / "x86_64-linux").mkdir()
    (tmp_path / "x86_64-linux/ascend_toolkit_install.info").write_text("package_name=Ascend\nversion=8.3.RC1\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "1200")
    monkeypatch.setenv("HOME_ADDRESS", "private")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_kernels.run(["--report", "--device", "cuda"]) == 2
    out = capsys.readouterr().out
    assert f"torch {importlib.metadata.version('torch')}" in out and "torch_npu " in out
    assert "CANN: version=8.3.RC1 (" in out and "Ascend driver: " in out and "NVIDIA driver: " in out
    assert "HCCL_CONNECT_TIMEOUT=1200" in out and "private" not in out


def test_report_names_the_devices(monkeypatch, capsys):
    monkeypatch.setattr(kernels_npu, "ops", ops)
    monkeypatch.setattr(check_kernels, "cases", lambda ops: [])
    check_kernels.main(["--report", "--device", "cpu"])
    assert re.search(r"(?m)^cpu:0 .* \d+ cores, \d+\.\d GiB$", capsys.readouterr().out)
    check_kernels.main(["--device", "cpu"])
    assert "GiB" not in capsys.readouterr().out


class Faster(Torch):
    """A device with a wrong `swiglu`."""

    def swiglu(self, gate_up):
        return 1.5 * super().swiglu(gate_up)


def test_implementations_names_the_class_of_each_operation():
    names = Faster(torch.device("cpu")).implementations()
    assert names["swiglu"] == "Faster" and names["rotary"] == "Torch"


@pytest.mark.parametrize("wrong", [lambda x: 1.5 * x, lambda x: x * torch.nan, lambda x: x[:1], lambda x: x.detach()])
def test_error_of_finds_a_wrong_operation(wrong):
    """A wrong value, NaN, a wrong shape and a missing gradient exceed every bound."""

    class Wrong(Torch):
        def swiglu(self, gate_up):
            return wrong(super().swiglu(gate_up))

    case = check_kernels.swiglu(5, 8)
    assert check_kernels.error_of(ops, case, torch.bfloat16) <= check_kernels.BOUNDS[torch.bfloat16]
    assert not check_kernels.error_of(Wrong(torch.device("cpu")), case, torch.float32) <= 0.1


def test_check_operations_marks_a_wrong_operation(capsys, monkeypatch):
    monkeypatch.setattr(check_kernels, "cases", lambda ops: [
        ("swiglu", "(5, 8)", check_kernels.swiglu, (5, 8)), ("rms_norm", "(5, 8)", check_kernels.rms_norm, (5, 8))])
    assert check_kernels.check_operations(ops)
    assert not check_kernels.check_operations(Faster(torch.device("cpu")))
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("OFF") for line in lines] == [False] * 5 + [False, True, True, False, False]
