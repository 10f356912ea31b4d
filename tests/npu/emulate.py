"""Emulate an NPU on the CPU, under the real torch_npu: run a program unchanged with `--device npu`.

    python tests/npu/emulate.py train.py --device npu ...
    torchrun --nproc-per-node 2 tests/npu/emulate.py train.py --device npu ...

With stub.py's libraries, device memory is host memory, and only kernels are missing. `Emulation` intercepts every
operation before its kernel and runs PyTorch's CPU kernel on the same bytes. Ascend's own operations have references
here, written from their documentation (gitcode.com/Ascend/op-plugin, docs/context) with the documented constraints.
hccl is gloo. Everything above the kernels is real: torch_npu's Python and C++ API, schemas, autograd formulas,
allocator and streams, FSDP2, DTensor and distributed checkpoints.

A test that passes here agrees with our reading of the documentation. No kernel of an NPU has run.
"""
from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import stub

if __name__ == "__main__":
    stub.activate()

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401  registers the device
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

REFERENCES: dict[str, Callable] = {}  # Ascend's operation, without overload -> reference on CPU tensors


def reference(*names: str) -> Callable:
    """Register the decorated function as the reference of these operations."""

    def register(function: Callable) -> Callable:
        REFERENCES.update(dict.fromkeys(names, function))
        return function

    return register


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"emulated NPU: {message}")


# ---- attention -----------------------------------------------------------------------------------------------------


def attention_blocks(a: dict) -> list[tuple[slice, slice]]:
    """Return the rows of q, and those of k and v, of each packed sequence."""
    bounds = []
    for name, tensor in (("actual_seq_qlen", a["query"]), ("actual_seq_kvlen", a["key"])):
        ends = a[name]
        require(ends is not None, f"{name} must be given with layout TND")
        ends = ends.tolist() if isinstance(ends, Tensor) else list(ends)
        require(0 < len(ends) <= 1024, f"{name} takes 1024 sequences at most, got {len(ends)}")
        require(ends[0] > 0, f"{name} is cumulative without a leading 0, got {ends}")
        require(ends == sorted(ends), f"{name} is cumulative, got {ends}")
        require(ends[-1] == len(tensor), f"{name} ends at {ends[-1]}, there are {len(tensor)} tokens")
        bounds.append([slice(*pair) for pair in zip([0, *ends], ends, strict=False)])
    require(len(bounds[0]) == len(bounds[1]), "actual_seq_qlen and actual_seq_kvlen differ in length")
    return list(zip(*bounds, strict=True))


def masked(a: dict, rows: int, columns: int) -> Tensor | None:
    """Return the mask of the scores [..., rows, columns]; True is masked. None masks no score."""
    mask, mode = a["atten_mask"], a["sparse_mode"]
    require(max(rows, columns) <= 2**20, "sequences are 1M long at most")
    if mask is None:  # "sparse_mode, pre_tockens and next_tockens have no effect: attention is full"
        return None
    require(mask.dtype in (torch.bool, torch.uint8), f"atten_mask must be bool or uint8, is {mask.dtype}")
    mask = mask.bool()
    if mode in (2, 3, 4):
        compressed = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
        require(mask.shape[-2:] == (2048, 2048) and bool((mask == compressed).all()),
                f"sparse_mode {mode} takes the compressed mask: [2048, 2048], True (masked) above the diagonal")
    if mode in (0, 1):
        require(a["pre_tockens"] >= rows and a["next_tockens"] >= columns, "a window is not emulated")
        require(mask.shape[-2:] == (rows, columns), f"atten_mask is {list(mask.shape)}, scores are {rows} x {columns}")
        require(not mask.all(-1).any(), "atten_mask masks a whole row")
        return mask
    require(mode in (2, 3), f"sparse_mode {mode} is not emulated")
    return torch.ones(rows, columns, dtype=torch.bool).triu(1 + (columns - rows if mode == 3 else 0))


def softmax_of(a: dict, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q and k [..., H, S, D] -> probabilities, and each row's largest score and sum, [..., H, S, 8] as documented."""
    scores = q @ k.transpose(-1, -2) * a["scale"]
    mask = masked(a, *scores.shape[-2:])
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total, *(t.expand(*t.shape[:-1], 8) for t in (top, total))


def attend(a: dict, q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None = None) -> tuple[Tensor, ...]:
    """q [..., H, S, D], k and v [..., K, S, D] -> output, largest score and sum; with grad: gradients of q, k and v."""
    groups = q.shape[-3] // k.shape[-3]
    wide_k, wide_v = (t.repeat_interleave(groups, dim=-3) for t in (k, v))
    probs, top, total = softmax_of(a, q, wide_k)
    if grad is None:
        return probs @ wide_v, top, total
    d_probs = grad @ wide_v.transpose(-1, -2)
    d_scores = probs * (d_probs - (d_probs * probs).sum(-1, keepdim=True)) * a["scale"]
    d_k, d_v = (t.unflatten(-3, (-1, groups)).sum(-3) for t in (d_scores.mT @ q, probs.mT @ grad))
    return d_scores @ wide_k, d_k, d_v


TO_BNSD = {"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3)}


def attention(a: dict, grad: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Check the inputs and call `attend` in float32 for any layout."""
    q, k, v, heads, layout = a["query"], a["key"], a["value"], a["head_num"], a["input_layout"]
    require(q.dtype in (torch.float16, torch.bfloat16, torch.float32), f"query is {q.dtype}")
    require(q.dtype == k.dtype == v.dtype, f"query, key and value are {q.dtype}, {k.dtype}, {v.dtype}")
    require(a["keep_prob"] == 1, "dropout is not emulated")
    for name in ("pse", "padding_mask", "prefix", "sink", "dropout_mask"):
        require(a.get(name) is None, f"{name} is not emulated")
    require(layout in ("TND", *TO_BNSD), f"layout {layout} is not emulated")
    axis = layout.index("N")
    require(q.ndim == k.ndim == v.ndim == len(layout), f"layout {layout} takes {len(layout)} dimensions")
    require(q.shape[axis] == heads, f"head_num is {heads}, query has {q.shape[axis]}")
    require(k.shape[axis] == v.shape[axis] and heads % k.shape[axis] == 0 and heads <= 256,
            f"{heads} heads and {k.shape[axis]} key-value heads")
    require(q.shape[-1] == k.shape[-1] >= v.shape[-1] and q.shape[-1] <= 768, "head sizes")
    require(q.numel() > 0 and k.numel() > 0, "no tokens")
    given = [t.float() for t in (q, k, v, *(() if grad is None else (grad,)))]
    if layout in TO_BNSD:
        order = TO_BNSD[layout]
        results = attend(a, *(t.permute(order) for t in given))
        return tuple(t.permute(order) if i == 0 or grad is not None else t for i, t in enumerate(results))
    require(len(q) <= 2**20, "1M tokens at most")
    parts = [attend(a, *(t[at].transpose(0, 1) for t, at in zip(given, (rows, keys, keys, rows), strict=False)))
             for rows, keys in attention_blocks(a)]
    return tuple(torch.cat([part[i] for part in parts], dim=1).transpose(0, 1) for i in range(3))


@reference("npu_fusion_attention", "npu_fusion_attention_v3")
def fusion_attention(**a):
    out, top, total = attention(a)
    dropout = (torch.zeros(1, dtype=torch.long),) * 2 if a["_name"].endswith("v3") else (0, 0, 0)  # seed, offset, size
    return out.to(a["query"].dtype).contiguous(), top.contiguous(), total.contiguous(), torch.empty(0), *dropout


@reference("npu_fusion_attention_grad", "npu_fusion_attention_grad_v3")
def fusion_attention_grad(**a):
    a["scale"] = a["scale_value"]
    for name, expected in zip(("softmax_max", "softmax_sum"), attention(a)[1:], strict=True):
        require(torch.allclose(a[name], expected), f"{name} is not the forward's")
    grads = attention(a, a["dy"])
    return *(g.to(a["query"].dtype).contiguous() for g in grads), *[torch.empty(0)] * (a["_outputs"] - 3)


# ---- pointwise -----------------------------------------------------------------------------------------------------


@reference("npu_rms_norm")
def rms_norm(*, input, gamma, epsilon, **_):
    require(gamma.ndim == 1 and gamma.shape[0] == input.shape[-1], "gamma must have the size of the last dimension")
    rstd = (input.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (input.float() * rstd * gamma.float()).to(input.dtype), rstd


@reference("npu_rms_norm_backward")
def rms_norm_backward(*, dy, input, gamma, rstd, **_):
    # dx = rstd * (g - x^ mean(g x^)) with x^ = x rstd and g = dy gamma
    normed, g = input.float() * rstd, dy.float() * gamma.float()
    dx = rstd * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx.to(input.dtype), (dy.float() * normed).flatten(0, -2).sum(0)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def check_rotary(x: Tensor, r1: Tensor, r2: Tensor, mode: str) -> None:
    require(mode == "half", f"rotary_mode {mode} is not emulated")
    require(x.dtype == r1.dtype == r2.dtype, f"input, r1 and r2 are {x.dtype}, {r1.dtype}, {r2.dtype}")
    require(x.ndim == r1.ndim == r2.ndim == 4 and r1.shape == r2.shape, "input, r1 and r2 have four dimensions")
    require(x.shape[-1] % 2 == 0 and x.shape[-1] < 896 and x.shape[-1] == r1.shape[-1], "D is even and below 896")
    layouts = {"BNSD": (0, 1, 2), "BSND": (0, 2, 1), "SBND": (1, 2, 0)}  # positions of B, N and S
    for b, n, s in layouts.values():
        fits = r1.shape[s] == x.shape[s] and r1.shape[b] in (1, x.shape[b]) and r1.shape[n] == 1
        if fits and x.shape[b] < 1000 and x.shape[n] < 1000:
            return
    require(False, f"no layout of {', '.join(layouts)} with B and N below 1000 fits input {list(x.shape)} and r1 "
                   f"{list(r1.shape)}")


@reference("npu_rotary_mul")
def rotary_mul(*, input, r1, r2, rotary_mode, rotate=None, **_):
    check_rotary(input, r1, r2, rotary_mode)
    require(rotate is None, "rotate is not emulated")
    x = input.float()
    return (x * r1.float() + rotate_half(x) * r2.float()).to(input.dtype)


@reference("npu_rotary_mul_backward")
def rotary_mul_backward(*, grad, input, r1, r2, rotary_mode, **_):
    check_rotary(input, r1, r2, rotary_mode)
    grad, x = grad.float(), input.float()
    grads = (grad * r1.float() - rotate_half(grad * r2.float()), (grad * x).sum_to_size(r1.shape),
             (grad * rotate_half(x)).sum_to_size(r2.shape))  # the transpose of a rotation is its inverse
    return tuple(g.to(input.dtype) for g in grads)


@reference("npu_swiglu")
def swiglu(*, input, dim, **_):
    require(input.shape[dim] % 2 == 0, f"dimension {dim} of {list(input.shape)} is odd")
    gate, up = input.float().chunk(2, dim=dim)
    return (gate * gate.sigmoid() * up).to(input.dtype)


@reference("npu_swiglu_backward")
def swiglu_backward(*, grad_output, input, dim, **_):
    gate, up = input.float().chunk(2, dim=dim)
    grad, s = grad_output.float(), gate.sigmoid()
    return torch.cat((grad * up * (s + gate * s * (1 - s)), grad * gate * s), dim=dim).to(input.dtype)


@reference("npu_dtype_cast", "_npu_dtype_cast")
def dtype_cast(*, input, dtype, **_):
    return input.to(dtype)


@reference("npu_dtype_cast_backward", "_npu_dtype_cast_backward")
def dtype_cast_backward(*, grad, dtype, **_):
    return grad.to(dtype)


# ---- mixture of experts --------------------------------------------------------------------------------------------


def check_moe(tokens: Tensor, indices: Tensor, padded_mode: bool) -> None:
    require(not padded_mode, "padded_mode is documented as False only")
    require(tokens.ndim == 2 and tokens.numel() > 0, f"tokens are {list(tokens.shape)}, must be [T, D], neither 0")
    require(indices.dtype in (torch.int32, torch.int64), f"indices are {indices.dtype}")


@reference("npu_moe_token_permute")
def moe_token_permute(*, tokens, indices, num_out_tokens, padded_mode, **_):
    check_moe(tokens, indices, padded_mode)
    require(not num_out_tokens or num_out_tokens == indices.numel(), "dropping tokens is not emulated")
    require(indices.ndim in (1, 2) and len(indices) == len(tokens), "indices must be [T] or [T, k]")
    top_k = indices.numel() // len(tokens)
    require(top_k <= 512, "topK is 512 at most")
    order = indices.flatten().argsort(stable=True)  # row -> slot t*k + i
    slot_to_row = torch.empty_like(order)
    slot_to_row[order] = torch.arange(len(order))
    return tokens[order // top_k], slot_to_row.int()


@reference("npu_moe_token_permute_grad")
def moe_token_permute_grad(*, tokens, grad_permuted_tokens, sorted_indices, padded_mode, **_):
    return moe_token_permute_grad_v2(
        grad_permuted_tokens=grad_permuted_tokens, sorted_indices=sorted_indices, tokens_size_0=len(tokens),
        tokens_dtype=tokens.dtype, num_topK=sorted_indices.numel() // len(tokens), padded_mode=padded_mode)


@reference("npu_moe_token_permute_grad_v2")
def moe_token_permute_grad_v2(*, grad_permuted_tokens, sorted_indices, tokens_size_0, tokens_dtype, num_topK, **_):
    rows = grad_permuted_tokens.float()[sorted_indices.long()]
    return rows.view(tokens_size_0, num_topK, -1).sum(1).to(tokens_dtype)


def check_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape) -> Tensor:
    check_moe(permuted_tokens, sorted_indices, padded_mode)
    require(sorted_indices.dtype == torch.int32 and sorted_indices.ndim == 1, "sorted_indices must be int32 [T * k]")
    require(len(permuted_tokens) == len(sorted_indices), "sorted_indices has another length than permuted_tokens")
    require(restore_shape is None, "restore_shape goes with padded_mode")
    if probs is None:
        return torch.ones(len(sorted_indices), 1)
    require(probs.ndim == 2 and probs.numel() == len(sorted_indices), f"probs are {list(probs.shape)}")
    require(probs.dtype == permuted_tokens.dtype, f"probs are {probs.dtype}")
    return probs.float()


@reference("npu_moe_token_unpermute")
def moe_token_unpermute(*, permuted_tokens, sorted_indices, probs, padded_mode, restore_shape, **_):
    weights = check_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
    chosen = permuted_tokens.float()[sorted_indices.long()].view(*weights.shape, -1)
    return (chosen * weights[..., None]).sum(1).to(permuted_tokens.dtype)


@reference("_npu_moe_token_unpermute")  # replaces the operation above if gradients are needed
def moe_token_unpermute_for_backward(*, permuted_tokens, **a):
    return moe_token_unpermute(permuted_tokens=permuted_tokens, **a), permuted_tokens.clone()


@reference("npu_moe_token_unpermute_grad")
def moe_token_unpermute_grad(*, permuted_tokens, grad_unpermuted_tokens, sorted_indices, probs, padded_mode,
                             restore_shape, **_):
    weights = check_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
    chosen = permuted_tokens.float()[sorted_indices.long()].view(*weights.shape, -1)
    grad = grad_unpermuted_tokens.float()[:, None]
    d_permuted = torch.zeros(permuted_tokens.shape).index_copy_(
        0, sorted_indices.long(), (grad * weights[..., None]).flatten(0, 1))
    d_probs = torch.empty(0) if probs is None else (grad * chosen).sum(-1).to(probs.dtype)
    return d_permuted.to(permuted_tokens.dtype), d_probs


@reference("npu_moe_token_unpermute_grad_v2")
def moe_token_unpermute_grad_v2(*, permuted_tokens, permuted_tokens_size_0, permuted_tokens_dtype,
                                grad_unpermuted_tokens, **a):
    if permuted_tokens is None:  # only the gradient of probs needs them
        require(a["probs"] is None, "the gradient of probs needs permuted_tokens")
        shape = permuted_tokens_size_0, grad_unpermuted_tokens.shape[1]
        permuted_tokens = torch.zeros(shape, dtype=permuted_tokens_dtype)
    return moe_token_unpermute_grad(
        permuted_tokens=permuted_tokens, grad_unpermuted_tokens=grad_unpermuted_tokens, **a)


def is_transposed(t: Tensor) -> bool:
    return not t.is_contiguous() and t.transpose(-1, -2).is_contiguous()


@reference("npu_grouped_matmul")
def grouped_matmul(*, x, weight, group_list, split_item, group_type, group_list_type, act_type=0, **others):
    require(len(x) == len(weight) == 1, "lists of several tensors are not emulated")
    unused = {k: v for k, v in others.items() if v is not None and not k.startswith("_")}
    require(not unused and not act_type, f"{', '.join(unused)} not emulated")
    x, w = x[0], weight[0]
    require(x.dtype == w.dtype and x.dtype in (torch.float16, torch.bfloat16, torch.float32),
            f"x and weight are {x.dtype} and {w.dtype}")
    require(x.numel() > 0 and w.numel() > 0, f"x {list(x.shape)} or weight {list(w.shape)} is empty")
    # the inner dimension in memory is the first one of a transposed view
    inner = max(t.shape[-1] if t.is_contiguous() else t.shape[-2] for t in (x, w))
    require(inner < 65536, "the inner dimension is 65535 at most")
    require(isinstance(group_list, Tensor) and group_list.dtype == torch.int64 and group_list.ndim == 1,
            "group_list must be a tensor [E] of int64")
    require(group_type in (0, 2), f"group_type {group_type} with one tensor each")
    require(split_item in (2, 3), f"split_item {split_item} gives several tensors, one comes out of one x and weight")
    groups = group_list.tolist()
    require(group_list_type in (0, 1), f"group_list_type {group_list_type} with {x.dtype}")
    if group_list_type == 1:
        require(len(groups) != 1, "a group_list of counts has more than one group")
    else:
        require(groups == sorted(groups), f"group_list_type 0 takes running sums, got {groups}")
        groups = [end - begin for begin, end in zip([0, *groups], groups, strict=False)]
    axis = 0 if group_type == 0 else 1
    require(min(groups) >= 0 and sum(groups) == x.shape[axis], f"groups of {groups} rows, x has {x.shape[axis]}")
    require(len(groups) <= 1024, "1024 groups at most")
    if group_type == 0:  # rows: x [M, K], weight [E, K, N] -> [M, N]
        require(x.ndim == 2 and w.ndim == 3 and w.shape[0] == len(groups), f"x {list(x.shape)}, weight {list(w.shape)}")
        require(x.shape[1] == w.shape[1], f"inner sizes {x.shape[1]} of x and {w.shape[1]} of weight")
        require(x.is_contiguous(), "x must not be transposed")
        require(w.is_contiguous() or is_transposed(w), "weight must be contiguous or a transpose")
        return [torch.cat([a.float() @ b.float() for a, b in zip(x.split(groups), w, strict=True)]).to(x.dtype)]
    # inner dimension: x [M, K] as the transpose of [K, M], weight [K, N] -> [E, M, N]
    require(x.ndim == 2 and w.ndim == 2 and x.shape[1] == w.shape[0], f"x {list(x.shape)}, weight {list(w.shape)}")
    require(is_transposed(x) or 1 in x.shape, "group_type 2 takes a transposed x")
    require(w.is_contiguous(), "group_type 2 takes a weight that is not transposed")
    pairs = zip(x.split(groups, dim=1), w.split(groups), strict=True)
    return [torch.stack([a.float() @ b.float() for a, b in pairs]).to(x.dtype)]


# ---- operations that have a kernel in torch_npu and none on the CPU --------------------------------------------------


@reference("matmul_backward")
def matmul_backward(*, grad, self, other, mask, **_):
    require(self.ndim > 1 and other.ndim > 1, "matmul with a vector is not emulated")
    gradients = (lambda: (grad @ other.mT).sum_to_size(self.shape), lambda: (self.mT @ grad).sum_to_size(other.shape))
    return tuple(compute() if needed else None for compute, needed in zip(gradients, mask, strict=True))


@reference("linear_backward")
def linear_backward(*, self, grad_output, weight, output_mask, **_):
    rows, grads = self.flatten(0, -2), grad_output.flatten(0, -2)
    gradients = (lambda: (grads @ weight).view_as(self), lambda: grads.T @ rows, lambda: grads.sum(0))
    return tuple(compute() if needed else None for compute, needed in zip(gradients, output_mask, strict=True))


@reference("repeat_interleave_backward_int")
def repeat_interleave_backward_int(*, grad, input, repeats, dim, **_):
    if dim is None:
        return grad.view(*input.shape, repeats).sum(-1)
    return grad.unflatten(dim, (input.shape[dim], repeats)).sum(dim % input.ndim + 1)


@reference("npu_gather_backward")
def gather_backward(*, grad, self_size, dim, index, **_):
    return torch.zeros(self_size, dtype=grad.dtype).scatter_add_(dim, index, grad)


@reference("histc")
def histc(*, self, bins, min, max, **_):
    return torch.histc(self.float(), bins, min, max).to(self.dtype)


# ---- the device ----------------------------------------------------------------------------------------------------

# Operations that need no kernel, or that torch_npu runs on the host.
PASS_THROUGH = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided",
           "aten::set_", "aten::resize_", "aten::record_stream", "aten::is_pinned", "aten::_pin_memory"}
MAY_MIX_DEVICES = {"aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::index", "aten::index_put_",
                   "aten::index_put", "aten::_index_put_impl_"}


def is_npu(x) -> bool:
    return isinstance(x, Tensor) and x.device.type == "npu"


def on_host(x):
    """Return a CPU tensor over an NPU tensor's bytes; return anything else unchanged."""
    if isinstance(x, torch.device) and x.type == "npu":
        return torch.device("cpu")
    if not is_npu(x):
        return x
    storage = x.untyped_storage()
    host = torch.empty(0, dtype=x.dtype)
    if not storage.nbytes():
        return host.set_(torch.UntypedStorage(0), 0, x.shape, x.stride())
    same = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device("cpu"), storage.nbytes())
    return host.set_(same, x.storage_offset(), x.shape, x.stride())


class Emulation(TorchDispatchMode):
    """Run operations on `npu` tensors on the CPU while active. `ran` counts Ascend's operations by name."""

    def __init__(self):
        super().__init__()
        self.ran: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, Tensor)]
        # A subclass such as DTensor dispatches its inner operations here again.
        if any(type(t) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor) for t in tensors):
            return NotImplemented
        devices = [x for x in flat if isinstance(x, torch.device)]
        touched = any(map(is_npu, tensors)) or any(d.type == "npu" for d in devices)
        schema = func._schema
        if schema.name.startswith("c10d::") and not touched:  # PyTorch sends pickled objects as bytes of gloo's device
            require(not any(t.is_floating_point() for t in tensors), f"{schema.name}: HCCL takes no CPU tensors")
        if not touched or schema.name in PASS_THROUGH or any(isinstance(t, FakeTensor) for t in tensors):
            return spoiled(func(*args, **kwargs)) if touched and "empty" in schema.name else func(*args, **kwargs)
        if schema.name.startswith("c10d::"):
            return collective(func, args, kwargs)
        aliases = [r.alias_info for r in schema.returns]
        if any(a is not None and not a.is_write for a in aliases):  # may return a view
            if not func._can_decompose():
                return func(*args, **kwargs)
            with self:  # e.g. `to`, which is only dispatched undecomposed in inference mode
                return func.decompose(*args, **kwargs)

        if schema.name not in MAY_MIX_DEVICES:
            on_cpu = [t for t in tensors if t.device.type == "cpu" and t.ndim]
            require(not any(map(is_npu, tensors)) or not on_cpu,
                    f"{schema.name} got tensors on npu and a tensor {[list(t.shape) for t in on_cpu]} on the CPU")
        require(not any(isinstance(x, torch.Generator) and x.device.type == "npu" for x in flat),
                f"{schema.name} with the device's generator: random numbers of the device are not emulated")
        host_args, host_kwargs = tree_map(on_host, (args, kwargs))
        results = self.run(func, host_args, host_kwargs)

        # Return a tensor that was written in place itself; copy every other result to the device.
        inputs = {i.name: v for i, v in zip(schema.arguments, args, strict=False)} | kwargs
        written = {frozenset(i.alias_info.before_set): inputs.get(i.name) for i in schema.arguments
                   if i.alias_info is not None and i.alias_info.is_write}
        to_cpu = devices and devices[0].type == "cpu" or schema.name == "aten::_copy_from" and not is_npu(args[1])
        single = len(schema.returns) == 1
        out = []
        for result, alias in zip([results] if single else results or (), aliases, strict=True):
            if alias is not None:
                out.append(written[frozenset(alias.before_set)])
            elif to_cpu:
                out.append(result)
            else:
                out.append(tree_map(to_npu, result))
        return out[0] if single else tuple(out) if out else None

    def run(self, func, args: tuple, kwargs: dict):
        namespace, name = func._schema.name.split("::")
        if name not in REFERENCES:
            if namespace == "npu":
                raise NotImplementedError(f"emulated NPU: npu::{name} has no reference: add one to {__file__}")
            return func(*args, **kwargs)
        if namespace == "npu":
            self.ran[name] = self.ran.get(name, 0) + 1
        named = {a.name: a.default_value for a in func._schema.arguments}
        named |= dict(zip(named, args, strict=False)) | kwargs
        named |= {"_outputs": len(func._schema.returns), "_name": name}
        return REFERENCES[name](**named)


def spoiled(x: Tensor) -> Tensor:
    """Fill uninitialised memory with values that show if they are read."""
    if is_npu(x) and not isinstance(x, FakeTensor) and x.dtype != torch.bool:
        on_host(x).fill_(torch.nan if x.is_floating_point() else 127)
    return x


def to_npu(x):
    if not isinstance(x, Tensor):
        return x
    device = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="npu")
    on_host(device).copy_(x)
    return device


# ---- collectives ---------------------------------------------------------------------------------------------------


def collective(func, args: tuple, kwargs: dict):
    """Run a collective with gloo on the same bytes, and wait for it. Check HCCL's limits."""
    if "reduce" in func._schema.name:
        reduced = [x for x in tree_flatten((args, kwargs))[0] if is_npu(x)]
        require(all(t.dtype != torch.float64 for t in reduced), "HCCL reduces no float64")
    results = func(*tree_map(on_host, args), **tree_map(on_host, kwargs))
    work = results[-1] if isinstance(results, tuple) else results
    work.wait()
    return (args[0], work) if isinstance(results, tuple) else work  # the first argument is the output


def gloo_as_hccl() -> None:
    """Register gloo as `hccl`, for CPU tensors too, as `collective` passes these."""

    def create(store, rank: int, size: int, timeout):
        return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)

    dist.Backend.register_backend("hccl", create, devices=["npu", "cpu"])


def main() -> None:
    """Run the program that the command line names, with the remaining arguments."""
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    gloo_as_hccl()
    with Emulation():
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
