"""Every operation with a device-specific implementation, behind one object: `kernels_npu.ops`.

`Torch` is the reference: plain PyTorch, which runs on any device and which every faster implementation is tested
against. The class of a device inherits from it and overrides what the device does faster, so inheritance is the
fallback. `select(device)` chooses the class once at start-up. Every operation is looked up when it is called, as
`kernels_npu.ops.X(...)`, so that no module keeps an operation from before `select`.

    python kernels_npu.py [--device npu]    compare every operation on this machine's device with `Torch`
    python kernels_npu.py --report          print versions, devices and environment first, for a bug report

Shapes: T tokens, H heads, K key-value heads, d head size, D hidden size, E experts, I expert width, k experts a token.
"""
from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UsageError


class Torch:
    """The operations in plain PyTorch."""

    distributed_backend = "gloo"
    compute_dtype = torch.float32  # this device's default for --bf16 / --fp32
    is_accelerator = False

    def __init__(self, device: torch.device, compute_dtype: torch.dtype | None = None):
        self.device = device
        self.compute_dtype = compute_dtype or self.compute_dtype
        self.settings: dict[str, str] = {}  # changed settings of the device, for the log
        self.profiler = torch.profiler  # torch_npu's has the same interface

    # ---- attention -------------------------------------------------------------------------------------------------

    def attention_implementations(self) -> dict[str, Callable[..., Tensor]]:
        """Return this device's attention implementations by flag value; the last is the default, the fastest."""
        return {"eager": self.attention_eager, "sdpa": self.attention_sdpa}

    @property
    def default_attention(self) -> str:
        return list(self.attention_implementations())[-1]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool, implementation: str | None = None
    ) -> Tensor:
        """Compute attention of packed sequences: q [T,H,d], k and v [T,K,d] -> [T,H,d].

        `cu_seqlens` is a host list [0, ..., T]: each sequence attends to itself only. The scale is d ** -0.5.
        `implementation` is a key of `attention_implementations`; None is the default.
        """
        return self.attention_implementation(implementation)(q, k, v, cu_seqlens, causal)

    def attention_implementation(self, implementation: str | None = None) -> Callable[..., Tensor]:
        """Return the attention function of a name (None: the default). Raises UsageError if this device lacks it."""
        available = self.attention_implementations()
        name = implementation or self.default_attention
        if name not in available:
            raise UsageError(f"attention implementation {name!r} is not available on {self.device.type} in "
                             f"{self.compute_dtype}: take one of {', '.join(available)}")
        return available[name]

    def attention_eager(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool) -> Tensor:
        """Compute softmax(q k^T / sqrt(d)) v step by step, with the softmax in float32."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [N, H, L, d] each
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            if causal:
                future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(future, float("-inf"))
            return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

        return _per_sequence(attend, q, k, v, cu_seqlens)

    def attention_sdpa(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool) -> Tensor:
        """Compute attention with torch.nn.functional.scaled_dot_product_attention."""
        sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=causal)
        return _per_sequence(sdpa, q, k, v, cu_seqlens)

    # ---- pointwise -------------------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Apply root mean square norm (arXiv:1910.07467) to the last dimension, in float32 up to the weight."""
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply rotary embedding (arXiv:2104.09864) to half-split pairs: x [T,H,d], cos and sin [T,d] -> [T,H,d].

        It computes in the type that x and the tables promote to, and returns x's type.
        """
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
        return (x * cos[:, None] + rotated * sin[:, None]).to(x.dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """Compute silu(first half) * second half (arXiv:2002.05202): [..., 2I] -> [..., I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def argmax(self, logits: Tensor) -> Tensor:
        """Return the likeliest token of each row, [B,V] -> [B], or a NaN's index if there is one."""
        return logits.argmax(-1)

    # ---- mixture of experts ----------------------------------------------------------------------------------------

    def moe_route(self, router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Choose each token's experts from logits [T,E].

        Returns probabilities [T,E] float32, weights [T,k] float32 that add up to 1, and expert ids [T,k].
        """
        probs = router_logits.softmax(-1, dtype=torch.float32)
        # Recompute reuses the ids of the first forward; gathering by id connects the weights to the new probabilities.
        expert_ids = probs.topk(top_k, dim=-1).indices
        weights = probs.gather(-1, expert_ids)
        return probs, weights / weights.sum(-1, keepdim=True), expert_ids

    def moe_permute(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copy each token k times and sort the copies by expert: x [T,D], expert_ids [T,k].

        Returns rows [T*k,D]; slot_to_row [T*k], the row of slot t*k + i, which is token t's i-th expert; counts [E],
        the number of rows of each expert.
        """
        slots = expert_ids.flatten()
        row_to_slot = slots.argsort(stable=True)
        row_numbers = torch.arange(len(slots), device=slots.device)
        slot_to_row = torch.empty_like(row_to_slot).scatter_(0, row_to_slot, row_numbers)
        counts = slots.new_zeros(num_experts).scatter_add_(0, slots, torch.ones_like(slots))  # bincount would sync
        return x.index_select(0, row_to_slot // expert_ids.shape[1]), slot_to_row, counts

    def moe_unpermute(self, rows: Tensor, slot_to_row: Tensor, weights: Tensor) -> Tensor:
        """Sum each token's k rows, weighted: rows [T*k,D], slot_to_row [T*k], weights [T,k] -> [T,D]."""
        chosen = rows.index_select(0, slot_to_row).unflatten(0, weights.shape)
        return (chosen * weights.to(rows.dtype)[..., None]).sum(1)

    def grouped_matmul(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Multiply consecutive groups of rows with one matrix each: x [N,K], weight [E,K,M] -> [N,M].

        counts [E] is the number of rows of each group; it adds up to N.
        """
        aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
        if hasattr(F, "grouped_mm") and aligned and len(x):
            return F.grouped_mm(x, weight, offs=counts.cumsum(0).int())
        return self.grouped_matmul_loop(x, weight, counts)

    def experts(self, x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Apply each token's SwiGLU experts and sum their weighted outputs.

        x [T,D], expert_ids and weights [T,k], gate_up [E,D,2I], down [E,I,D] -> [T,D].
        """
        rows, slot_to_row, counts = self.moe_permute(x, expert_ids, gate_up.shape[0])
        rows = self.grouped_matmul(self.swiglu(self.grouped_matmul(rows, gate_up, counts)), down, counts)
        return self.moe_unpermute(rows, slot_to_row, weights)

    def grouped_matmul_loop(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Compute `grouped_matmul` with one product per group."""
        # The backward of unbind stacks once; that of indexing would add E zero-filled [E,K,M] tensors.
        groups = zip(x.split(self.to_host(counts)), weight.unbind(0), strict=True)
        # Without rows the product is empty, but still part of the graph of x and weight.
        return torch.cat([rows @ w for rows, w in groups if len(rows)] or [x @ weight[0]])

    def to_host(self, counts: Tensor) -> list:
        """Return row counts as a list, which the host needs to split rows. This waits for the device."""
        return counts.tolist()

    # ---- optimizer and device --------------------------------------------------------------------------------------

    def adamw(self, groups: list[dict], **settings) -> torch.optim.Optimizer:
        """Return AdamW (arXiv:1711.05101) over parameter groups, with one kernel per update."""
        return torch.optim.AdamW(groups, fused=True, **settings)

    def prepare_for_decoding(self, model: nn.Module) -> None:
        """Store the weights of a `model.Qwen3VL` as decoding reads them fastest, their shapes unchanged."""

    def memory(self) -> tuple[int | None, int | None]:
        """Return the peak of bytes (allocated, reserved) on the device since start-up; None on a CPU."""
        return None, None

    def devices(self) -> list[str]:
        """Return the name and the memory of each device of this kind, for a bug report."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return [f"{platform.machine()}, {os.cpu_count()} cores, {memory / 2**30:.1f} GiB"]

    def synchronize(self) -> None:
        """Wait until the device has finished its queued work."""

    def to_device(self, tensor: Tensor) -> Tensor:
        """Copy a small host tensor to the device. The host does not wait for the device's queued work."""
        return tensor.to(self.device)

    def get_rng_state(self) -> Tensor | None:
        """Return the device's own random state, or None on a CPU."""
        return None

    def set_rng_state(self, state: Tensor) -> None:
        """Restore a state that `get_rng_state` returned."""

    def peak_flops(self) -> float | None:
        """Return the device's dense bf16 FLOP/s from its data sheet, or None if it is unknown."""
        return None

    def implementations(self) -> dict[str, str]:
        """Return {operation: class that implements it on this device}, for the log."""
        names = ("rms_norm", "rotary", "swiglu", "moe_route", "moe_permute", "grouped_matmul", "moe_unpermute", "adamw")
        functions = {**self.attention_implementations(), **{name: getattr(self, name) for name in names}}
        return {name: function.__qualname__.split(".")[-2] for name, function in functions.items()}


class Cpu(Torch):
    """CPUs, with faster decoding of a few tokens at a time."""

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return _CpuSwiglu.apply(gate_up)

    def grouped_matmul(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not 0 < len(x) < len(weight):
            return super().grouped_matmul(x, weight, counts)
        # In decoding most experts have no rows: do not read their weights.
        active = [(expert, count) for expert, count in enumerate(counts.tolist()) if count]
        groups = zip(x.split([count for _, count in active]), active, strict=True)
        return torch.cat([rows @ weight[expert] for rows, (expert, _) in groups])

    def experts(self, x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        if torch.is_grad_enabled() or len(x) != 1:
            return super().experts(x, expert_ids, weights, gate_up, down)
        chosen = expert_ids[0].tolist()  # one token needs no permutation
        rows = self.swiglu(torch.cat([x @ gate_up[expert] for expert in chosen])).split(1)
        rows = torch.cat([row @ down[expert] for row, expert in zip(rows, chosen, strict=True)])
        return weights.to(rows.dtype) @ rows

    def argmax(self, logits: Tensor) -> Tensor:
        return torch.from_numpy(logits.float().numpy().argmax(-1))  # an eighth of PyTorch's time

    @torch.no_grad()
    def prepare_for_decoding(self, model: nn.Module) -> None:
        head = model.lm_head.weight
        if head.dtype != torch.float32 or not _is_faster_by_columns(head):
            return
        tied = head is model.model.language_model.embed_tokens.weight
        for module in model.modules():
            if isinstance(module, nn.Linear) and not (module is model.lm_head and tied):  # it is read row by row
                module.weight.data = module.weight.T.contiguous().T


class _CpuSwiglu(torch.autograd.Function):
    """Compute `Torch.swiglu` with less new memory: a CPU clears each of its pages, which takes longer than the sums."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad_gate_up = torch.empty_like(gate_up)
        (gate, up), (grad_gate, grad_up) = (t.chunk(2, dim=-1) for t in (gate_up, grad_gate_up))
        torch.mul(grad, up, out=grad_gate)
        torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        torch.mul(grad, F.silu(gate), out=grad_up)
        return grad_gate_up


def _is_faster_by_columns(weight: Tensor) -> bool:
    """Measure products of 1 and of 16 rows with 16 MB of a weight [V, D]: CPUs differ in the layout they prefer.

    Columns must win clearly for both. So a busy machine, where the ratios approach 1, keeps rows. The choice changes
    results only by rounding.
    """
    by_row = weight[: 2**22 // weight.shape[1]]
    by_column = by_row.T.contiguous().T

    def seconds(x: Tensor, weight: Tensor) -> float:
        start = time.perf_counter()
        F.linear(x, weight)
        return time.perf_counter() - start

    for count in (1, 16):
        x = by_row.new_ones(count, by_row.shape[1])
        if statistics.median(seconds(x, by_column) / seconds(x, by_row) for _ in range(31)) > 0.95:
            return False
    return True


class Accelerator(Torch):
    """CUDA devices and NPUs, whose memory, streams and random state have the same interface in PyTorch."""

    compute_dtype = torch.bfloat16
    is_accelerator = True
    PEAKS: dict[str, float | None] = {}  # regular expression for the device's name -> dense bf16 FLOP/s

    def __init__(self, device: torch.device, compute_dtype: torch.dtype | None = None):
        super().__init__(device, compute_dtype)
        self.module = torch.get_device_module(device)

    def memory(self) -> tuple[int | None, int | None]:
        return self.module.max_memory_allocated(), self.module.max_memory_reserved()

    def devices(self) -> list[str]:
        numbers = range(self.module.device_count())
        memory = [self.module.get_device_properties(i).total_memory / 2**30 for i in numbers]
        return [f"{self.module.get_device_name(i)}, {memory[i]:.1f} GiB" for i in numbers]

    def synchronize(self) -> None:
        self.module.synchronize()

    def to_device(self, tensor: Tensor) -> Tensor:
        if tensor.device == self.device:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)  # a copy from pageable memory would wait

    def get_rng_state(self) -> Tensor | None:
        return self.module.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        self.module.set_rng_state(state)

    def peak_flops(self) -> float | None:
        name = self.module.get_device_name()
        return next((peak for model, peak in self.PEAKS.items() if re.search(model, name)), None)


class Cuda(Accelerator):
    """NVIDIA devices."""

    distributed_backend = "nccl"

    # NVIDIA's data sheets: half of the headline figures, which assume sparsity. A device's slice (MIG) has no figure.
    # The first match counts.
    PEAKS = {"MIG": None, "H[18]00 PCIe": 756e12, "H[12]00 NVL": 835e12, "H[128]00": 989e12, r"A[18]00\b": 312e12,
             "L40S": 362e12}

    def attention_implementations(self) -> dict[str, Callable[..., Tensor]]:
        available = super().attention_implementations()
        if self.compute_dtype != torch.float32:  # which the kernel lacks
            available["flash_attention_2"] = self.attention_flash
        return available

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return weight * F.rms_norm(x, weight.shape, eps=eps)  # computes in float32; one kernel in newer PyTorch

    def attention_flash(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool) -> Tensor:
        """Call PyTorch's FlashAttention-2 (arXiv:2307.08691) once for sequences of any lengths."""
        if q.dtype == torch.float32:
            raise UsageError("flash_attention_2 needs bf16 or float16: give sdpa for float32")
        bounds = _on_device(tuple(cu_seqlens), self)
        longest = max(b - a for a, b in itertools.pairwise(cu_seqlens))
        # the operation behind torch.nn.attention.varlen, which torch 2.7.1 lacks
        return torch.ops.aten._flash_attention_forward(
            q.contiguous(), k.contiguous(), v.contiguous(), bounds, bounds, longest, longest, 0.0, causal, False,
            scale=q.shape[-1] ** -0.5,
        )[0]


class Npu(Accelerator):
    """Ascend NPUs, through torch_npu, whose op-plugin repository documents the operations."""

    distributed_backend = "hccl"

    # VeOmni's figures; Huawei's data sheets only give rounded ones
    PEAKS = {"Ascend910B": 354e12, "Ascend910_93": 354e12}

    def __init__(self, device: torch.device, compute_dtype: torch.dtype | None = None):
        super().__init__(device, compute_dtype)
        self.profiler = torch_npu.profiler
        torch.npu.set_compile_mode(jit_compile=False)  # use the shipped kernels: shapes change with every batch
        torch.npu.config.allow_internal_format = False  # keep weights in PyTorch's layouts
        allocator = os.environ.get("PYTORCH_NPU_ALLOC_CONF")
        if allocator is None:
            try:  # expandable segments fragment less
                torch.npu.memory._set_allocator_settings("expandable_segments:True")
                allocator = "expandable_segments:True"
            except RuntimeError:  # the driver has no virtual memory, but the setting stays on
                allocator = "expandable_segments:False"
                torch.npu.memory._set_allocator_settings(allocator)
        self.settings = {"torch_npu": torch_npu.__version__, "jit_compile": "False", "allow_internal_format": "False",
                         "allocator": allocator}

    def attention_implementations(self) -> dict[str, Callable[..., Tensor]]:
        return super().attention_implementations() | {"flash_attention_2": self.attention_flash}

    @functools.cached_property
    def causal_mask(self) -> Tensor:
        """Return the mask that sparse_mode 3 takes for any lengths: True is masked."""
        return torch.ones(2048, 2048, dtype=torch.bool, device=self.device).triu(1)

    def attention_flash(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool) -> Tensor:
        """Call npu_fusion_attention with packed sequences: cumulative lengths on the host, without the leading 0."""
        if len(cu_seqlens) > 1025:  # one call takes at most 1024 sequences; long videos have more frames
            cut = cu_seqlens[1024]
            first = self.attention_flash(q[:cut], k[:cut], v[:cut], cu_seqlens[:1025], causal)
            remaining = [end - cut for end in cu_seqlens[1024:]]
            return torch.cat((first, self.attention_flash(q[cut:], k[cut:], v[cut:], remaining, causal)))
        ends = cu_seqlens[1:]
        return torch_npu.npu_fusion_attention(
            q, k, v, q.shape[1], "TND", atten_mask=self.causal_mask if causal else None, scale=q.shape[-1] ** -0.5,
            keep_prob=1.0, actual_seq_qlen=ends, actual_seq_kvlen=ends, sparse_mode=3 if causal else 0,
        )[0]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0] if x.numel() else super().rms_norm(x, weight, eps)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not x.numel():
            return super().rotary(x, cos, sin)
        # Every release takes four dimensions, [1, T, H, d], of one type.
        rotated = torch_npu.npu_rotary_mul(x[None].to(cos.dtype), cos[None, :, None], sin[None, :, None])
        return rotated[0].to(x.dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return torch_npu.npu_swiglu(gate_up.contiguous(), dim=-1) if gate_up.numel() else super().swiglu(gate_up)

    def moe_permute(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        if not len(x):
            return super().moe_permute(x, expert_ids, num_experts)
        rows, slot_to_row = torch_npu.npu_moe_token_permute(x, expert_ids.int())
        # + 0.5 moves an id to the middle of its bin, whatever the rounding. Counts are exact below 2**24 rows.
        counts = torch.histc(expert_ids.float() + 0.5, bins=num_experts, min=0, max=num_experts)
        return rows, slot_to_row, counts.long()

    def moe_unpermute(self, rows: Tensor, slot_to_row: Tensor, weights: Tensor) -> Tensor:
        if not len(rows):
            return super().moe_unpermute(rows, slot_to_row, weights)
        return torch_npu.npu_moe_token_unpermute(rows, slot_to_row, probs=weights.to(rows.dtype))

    def grouped_matmul(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        if len(weight) == 1 or not len(x):  # the documentation forbids lists of one count
            return x @ weight[0]
        return _NpuGroupedMatmul.apply(x, weight, counts)


class NpuWithoutFusedMoe(Npu):
    """NPUs with the plain mixture-of-experts operations (--no-use-npu-fused-moe)."""

    moe_permute, grouped_matmul, moe_unpermute = Torch.moe_permute, Torch.grouped_matmul_loop, Torch.moe_unpermute


def _npu_grouped_product(x: Tensor, weight: Tensor, counts: Tensor, axis: int) -> Tensor:
    """Call npu_grouped_matmul. The groups divide `axis`: 0 is the rows of x and of the result, 2 the inner axis.

    group_list_type 1 means that the list has counts, not cumulative sums. split_item 2 returns one tensor.
    """
    return torch_npu.npu_grouped_matmul(
        [x], [weight], group_list=counts, split_item=2, group_type=axis, group_list_type=1
    )[0]


class _NpuGroupedMatmul(torch.autograd.Function):
    """Add a backward to npu_grouped_matmul, which has none: gradients would be None, with only a warning."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight, counts)
        return _npu_grouped_product(x, weight, counts, axis=0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = _npu_grouped_product(grad, weight.transpose(1, 2), counts, axis=0)
        if ctx.needs_input_grad[1]:
            grad_weight = _npu_grouped_product(x.T, grad, counts, axis=2)
        return grad_x, grad_weight, None


NPU_OPERATIONS = ("npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_moe_token_permute",
                  "npu_grouped_matmul", "npu_moe_token_unpermute")


def import_torch_npu() -> None:
    """Import torch_npu, which registers the device. Raises UsageError if it is missing, broken or too old."""
    global torch_npu
    # torch_npu reads this when it starts. Without it, memory that several streams used is freed late, and sdpa with the
    # fused mixture of experts can run out of memory.
    os.environ.setdefault("MULTI_STREAM_MEMORY_REUSE", "1")
    try:
        import torch_npu
    except ImportError as e:
        if not isinstance(e, ModuleNotFoundError) or e.name != "torch_npu":
            raise UsageError(f"--device npu: torch_npu does not load ({e}): source CANN's "
                             "set_env.sh first, and install the torch_npu of this torch and Python") from e
        version = torch.__version__.split("+")[0]
        raise UsageError(f"--device npu: torch_npu is not installed: pip install 'torch_npu=={version}.*'") from e
    missing = [name for name in NPU_OPERATIONS if not hasattr(torch_npu, name)]
    if missing:
        raise UsageError(f"--device npu: torch_npu {torch_npu.__version__} has no {', '.join(missing)}: "
                         "install 2.7.1.post11 or newer, in your torch's version")


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # training cannot save a tensor that inference has created
def _on_device(cu_seqlens: tuple[int, ...], ops: Torch) -> Tensor:
    """Copy sequence bounds to the device once for all layers."""
    return ops.to_device(torch.tensor(cu_seqlens, dtype=torch.int32))


def _per_sequence(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int]) -> Tensor:
    """Call `attend`, which takes [N,H,L,d] each, on every sequence of packed q [T,H,d], k and v [T,K,d].

    Neighbouring sequences of the same length share a call.
    """
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
    groups = [(length, len(list(same))) for length, same in itertools.groupby(lengths)]
    parts = zip(groups, *(t.split([length * count for length, count in groups]) for t in (q, k, v)), strict=True)
    out = []
    for (length, count), *qkv in parts:
        result = attend(*(t.unflatten(0, (count, length)).transpose(1, 2) for t in qkv))
        out.append(result.transpose(1, 2).flatten(0, 1))
    return torch.cat(out) if len(out) > 1 else out[0]


ATTENTION = ("eager", "sdpa", "flash_attention_2")  # flag values; a device may lack some
DEVICES = ("auto", "npu", "cuda", "cpu")  # values of --device
# cuBLAS, HCCL and CANN's matrix products read these once, when the device or a process group is first used.
DETERMINISTIC_ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "HCCL_DETERMINISTIC": "true", "CLOSE_MATMUL_K_SHIFT": "1",
}
ops: Torch = Cpu(torch.device("cpu"))


def select(
    device: str = "auto", compute_dtype: torch.dtype | None = None, fused_moe: bool | None = None,
    deterministic: bool = False,
) -> Torch:
    """Choose the backend for `--device` (auto, npu, cuda, cpu), make its device current, and return it as `ops`.

    compute_dtype: None is the device's default. fused_moe: --use-npu-fused-moe; None is on if the device has it.
    deterministic: an operation that has no deterministic implementation raises. Under torchrun each local rank takes
    the device of its number. Raises UsageError if the device is not available.
    """
    global ops
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ |= DETERMINISTIC_ENVIRONMENT
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "npu" if _npu_is_available() else "cuda" if torch.cuda.is_available() else "cpu"
    if fused_moe and device != "npu":
        raise UsageError(f"--use-npu-fused-moe: {device} has none: leave it out, or give --device npu")
    if device == "cpu":
        ops = Cpu(torch.device("cpu"), compute_dtype)
        return ops
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this PyTorch sees no CUDA device: give --device cpu or install a CUDA build")
    if device == "npu":
        import_torch_npu()
    module = torch.get_device_module(device)
    if not (count := module.device_count()):
        raise UsageError(f"--device {device}: PyTorch sees no device: check the driver, or give another --device")
    if local_rank >= count:
        raise UsageError(f"--device {device}: local rank {local_rank} has no device, this machine has {count}: "
                         "give a smaller --nproc-per-node")
    module.set_device(local_rank)
    kind = Cuda if device == "cuda" else NpuWithoutFusedMoe if fused_moe is False else Npu
    ops = kind(torch.device(device, local_rank), compute_dtype)
    return ops


def _npu_is_available() -> bool:
    if importlib.util.find_spec("torch_npu") is None:
        return False
    import_torch_npu()  # raises if it is installed but broken
    if not torch.npu.is_available():  # torch_npu's patched DataLoader would fail too
        raise UsageError("torch_npu is installed and sees no NPU: give --device cpu, with "
                         "TORCH_DEVICE_BACKEND_AUTOLOAD=0 in the environment")
    return True


if __name__ == "__main__":  # check_kernels imports this file a second time, as `kernels_npu`
    from tools.check_kernels import run

    sys.exit(run(sys.argv[1:]))
