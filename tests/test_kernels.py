"""The plain operations against each one written the slow way, forward and backward, in float64 or float32."""
from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import kernels_npu
from kernels_npu import ops


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 8, 0], [0, 0, 0, 0]], ids=["uneven", "one expert", "no rows"])
def test_grouped_matmul(counts):
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


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
    ("NVIDIA H800 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA RTX A1000", None),
    ("NVIDIA H20", None), ("NVIDIA B200", None), ("NVIDIA L40", None), ("NVIDIA GeForce RTX 4090", None)])
def test_peaks_of_devices(monkeypatch, name, peak):
    device = object.__new__(kernels_npu.Cuda)
    device.module = SimpleNamespace(get_device_name=lambda: name)
    assert device.peak_flops() == peak


def test_permute_and_unpermute():
    """Rows come in expert order, each token's in the place that `where` names; weights come back on the right token."""
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    expert_ids = torch.tensor([[2, 0], [1, 2], [0, 1], [4, 2], [2, 1], [0, 4]])  # expert 3 gets nothing
    weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    rows, where, counts = ops.moe_permute(x, expert_ids, 5)
    assert counts.tolist() == [3, 3, 4, 0, 2]
    assert torch.equal(rows[where].unflatten(0, (6, 2)), x[:, None].expand(-1, 2, -1))
    assert torch.equal(expert_ids.flatten()[where.argsort()], expert_ids.flatten().sort().values)
    y = ops.moe_unpermute(rows * torch.arange(5).repeat_interleave(counts)[:, None], where, weights)
    expected = x * (weights * expert_ids).sum(1, keepdim=True)
    assert torch.allclose(y, expected)
    for a, b in zip(torch.autograd.grad(y.sum(), (x, weights)), torch.autograd.grad(expected.sum(), (x, weights)),
                    strict=True):
        assert torch.allclose(a, b)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cu_seqlens", [[0, 4, 8, 12], [0, 1, 8, 12], [0, 12]], ids=["equal", "uneven", "one"])
@pytest.mark.parametrize("form", ["eager", "sdpa"])
def test_attention(form, cu_seqlens, causal):
    """Query by query, in float64: 6 heads on 2 key-value heads, each sequence for itself."""
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
    y = ops.attention_implementation(form)(q, k, v, cu_seqlens, causal=causal)
    assert torch.allclose(y, expected, atol=1e-6)  # eager's softmax is in float32
    dy = torch.randn_like(y)
    grads = (torch.autograd.grad(out, (q, k, v), dy) for out in (y, expected))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_rms_norm_is_float32_inside():
    x = torch.randn(7, 16).bfloat16() * 300
    weight = torch.rand(16).bfloat16()
    y = ops.rms_norm(x, weight, 1e-6)
    exact = torch.nn.functional.rms_norm(x.double(), (16,), eps=1e-6)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, weight * exact.float().bfloat16())


def test_rotary_turns_pairs():
    """Half-split form: (x_i, x_{i + d/2}) turned by the angle of frequency i; the length stays, position 0 is left."""
    x, angle = torch.randn(5, 3, 8, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    angle[0] = 0
    tables = torch.cat((angle, angle), -1)
    y = ops.rotary(x, tables.cos(), tables.sin())
    pair, turned = torch.complex(x[..., :4], x[..., 4:]), torch.complex(y[..., :4], y[..., 4:])
    assert torch.allclose(turned, pair * torch.exp(1j * angle)[:, None])
    assert torch.equal(y[0], x[0])


def test_the_log_names_each_form():
    class Faster(kernels_npu.Torch):
        def swiglu(self, gate_up):
            return super().swiglu(gate_up)

    names = Faster(torch.device("cpu")).implementations()
    assert names["swiglu"] == "Faster" and names["rotary"] == "Torch"
