"""Every operation that has a device-specific form, behind one object: `kernels_npu.ops`.

`Torch` is the reference: plain PyTorch that runs anywhere, and the judge of every faster form. A device's class
inherits from it and overrides what that device does better, so that inheritance is the fallback. `select(device)`
chooses the class once, at start-up; no forward compares device names.

    python kernels_npu.py [--device npu]    checks every operation on this machine's device against `Torch`

Shapes: T tokens, H heads, K key-value heads, d head size, D hidden size, E experts, I expert width, k experts a token.
"""
from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UsageError


class Torch:
    """The operations in plain PyTorch (CPU)."""

    distributed_backend = "gloo"
    compute_dtype = torch.float32  # the default of --bf16 / --fp32 on this device
    is_accelerator = False

    def __init__(self, device: torch.device, compute_dtype: torch.dtype | None = None):
        self.device = device
        self.compute_dtype = compute_dtype or self.compute_dtype
        self.settings: dict[str, str] = {}  # what was set on the device, for the log

    # ---- attention -------------------------------------------------------------------------------------------------

    def attention_implementations(self) -> dict[str, Callable[..., Tensor]]:
        """The attention implementations of this device, by the names that flags give them; the fastest is the last."""
        return {"eager": self.attention_eager, "sdpa": self.attention_sdpa}

    @property
    def default_attention(self) -> str:
        return list(self.attention_implementations())[-1]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool, implementation: str | None = None
    ) -> Tensor:
        """Attention of packed sequences: q [T,H,d], k and v [T,K,d] -> [T,H,d].

        `cu_seqlens` is a host list [0, ..., T]: each sequence attends to itself only. The scale is d ** -0.5.
        `implementation` is a name in `attention_implementations`, by default the fastest.
        """
        return self.attention_implementation(implementation)(q, k, v, cu_seqlens, causal)

    def attention_implementation(self, implementation: str | None = None) -> Callable[..., Tensor]:
        """Return the attention function of a name (None: the default). Raises UsageError if this device lacks it."""
        implementation, forms = implementation or self.default_attention, self.attention_implementations()
        if implementation not in forms:
            raise UsageError(f"attention implementation {implementation!r} is not available on {self.device.type} in "
                             f"{self.compute_dtype}: take one of {', '.join(forms)}")
        return forms[implementation]

    def attention_eager(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool) -> Tensor:
        """softmax(q k^T / sqrt(d)) v written out, the softmax in float32."""

        def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [N, H, L, d] each
            scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            if causal:
                future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(future, float("-inf"))
            return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

        return _per_sequence(one, q, k, v, cu_seqlens)

    def attention_sdpa(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool) -> Tensor:
        """The same through torch.nn.functional.scaled_dot_product_attention."""
        sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=causal)
        return _per_sequence(sdpa, q, k, v, cu_seqlens)

    # ---- pointwise -------------------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm (arXiv:1910.07467) of the last dimension: float32, cast back, then times weight."""
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        return weight * normed.to(x.dtype)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding (arXiv:2104.09864), half-split form: x [T,H,d], cos and sin [T,d] -> [T,H,d] in x's type.

        Computed in the type that x and the tables promote to: float32 tables give a float32 rotation.
        """
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
        return (x * cos[:, None] + rotated * sin[:, None]).to(x.dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(first half) * second half (arXiv:2002.05202): [..., 2I] -> [..., I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    # ---- mixture of experts ----------------------------------------------------------------------------------------

    def moe_route(self, router_logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """[T,E] logits -> (probabilities [T,E] float32, weights [T,k] float32 that add up to 1, expert ids [T,k])."""
        probs = router_logits.softmax(-1, dtype=torch.float32)
        # gathered by index, so that recompute, which keeps top-k's result, still finds its way to the probabilities
        expert_ids = probs.topk(top_k, dim=-1).indices
        weights = probs.gather(-1, expert_ids)
        return probs, weights / weights.sum(-1, keepdim=True), expert_ids

    def moe_permute(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of the tokens in expert order: x [T,D], expert_ids [T,k] ->
        (rows [T*k,D], where [T*k]: the row of (token, choice) in them, counts [E]: rows of each expert)."""
        flat = expert_ids.flatten()
        order = flat.argsort(stable=True)
        where = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        counts = flat.new_zeros(num_experts).scatter_add_(0, flat, torch.ones_like(flat))  # bincount waits for a device
        return x.index_select(0, order // expert_ids.shape[1]), where, counts

    def moe_unpermute(self, rows: Tensor, where: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's k rows: rows [T*k,D], where [T*k], weights [T,k] -> [T,D]."""
        chosen = rows.index_select(0, where).unflatten(0, weights.shape)
        return (chosen * weights.to(rows.dtype)[..., None]).sum(1)

    def grouped_matmul(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """Row group e of x times weight[e]: x [N,K], weight [E,K,M], counts [E] adding up to N -> [N,M]."""
        aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
        if hasattr(F, "grouped_mm") and aligned and len(x):
            return F.grouped_mm(x, weight, offs=counts.cumsum(0).int())
        return self.grouped_matmul_loop(x, weight, counts)

    def grouped_matmul_loop(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        """The same, one product after the other."""
        # unbind, not indexing: its backward stacks once, where indexing would add E zero-filled [E,K,M] tensors
        groups = zip(x.split(self.to_host(counts)), weight.unbind(0), strict=True)
        # no rows at all: an empty product, which still hangs on x and weight
        return torch.cat([rows @ w for rows, w in groups if len(rows)] or [x @ weight[0]])

    def to_host(self, counts: Tensor) -> list:
        """Counts of rows, which the host must know to split them: waits for the device."""
        return counts.tolist()

    # ---- optimizer and device --------------------------------------------------------------------------------------

    def adamw(self, groups: list[dict], **settings) -> torch.optim.Optimizer:
        """AdamW (arXiv:1711.05101) over parameter groups, in one pass over each parameter."""
        return torch.optim.AdamW(groups, fused=True, **settings)

    def prepare_for_decoding(self, model: nn.Module) -> None:
        """Store the weights of a `model.Qwen3VL` as decoding reads them fastest, their shapes unchanged."""

    def memory(self) -> tuple[int | None, int | None]:
        """(most bytes allocated, most bytes reserved) on the device since start-up; None where it has no allocator."""
        return None, None

    def synchronize(self) -> None:
        """Waits until the device has done what it was given."""

    def get_rng_state(self) -> Tensor | None:
        """The device's own random state, None where it is the CPU's."""
        return None

    def set_rng_state(self, state: Tensor) -> None:
        """Sets what `get_rng_state` returned."""

    def peak_flops(self) -> float | None:
        """Dense bf16 FLOP/s of the device by its maker's data sheet; None where it is not known."""
        return None

    def implementations(self) -> dict[str, str]:
        """Which class's form of each operation runs, for the log."""
        names = ("rms_norm", "rotary", "swiglu", "moe_route", "moe_permute", "grouped_matmul", "moe_unpermute", "adamw")
        forms = {**self.attention_implementations(), **{name: getattr(self, name) for name in names}}
        return {name: form.__qualname__.split(".")[-2] for name, form in forms.items()}


class Cpu(Torch):
    """CPUs: faster decoding of a few tokens at a time."""

    def grouped_matmul(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not 0 < len(x) < len(weight):
            return super().grouped_matmul(x, weight, counts)
        # Decoding: most experts have no rows, and their weights are not read.
        active = [(expert, count) for expert, count in enumerate(counts.tolist()) if count]
        groups = zip(x.split([count for _, count in active]), active, strict=True)
        return torch.cat([rows @ weight[expert] for rows, (expert, _) in groups])

    @torch.no_grad()
    def prepare_for_decoding(self, model: nn.Module) -> None:
        tied = model.lm_head.weight is model.model.language_model.embed_tokens.weight
        for module in model.modules():
            is_float32 = isinstance(module, nn.Linear) and module.weight.dtype == torch.float32
            if is_float32 and not (module is model.lm_head and tied):  # an embedding is read by rows
                module.weight.data = module.weight.T.contiguous().T


class Accelerator(Torch):
    """What CUDA devices and NPUs share: memory, streams and random state have one interface in PyTorch."""

    compute_dtype = torch.bfloat16
    is_accelerator = True
    PEAKS: dict[str, float | None] = {}  # dense bf16 FLOP/s, by a regular expression for the device's name

    def __init__(self, device: torch.device, compute_dtype: torch.dtype | None = None):
        super().__init__(device, compute_dtype)
        self.module = torch.get_device_module(device)

    def memory(self) -> tuple[int | None, int | None]:
        return self.module.max_memory_allocated(), self.module.max_memory_reserved()

    def synchronize(self) -> None:
        self.module.synchronize()

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

    # dense bf16, NVIDIA's data sheets (their headline figures are with sparsity: half of those); the first that fits.
    # Of a slice (MIG) they say nothing.
    PEAKS = {"MIG": None, "H[18]00 PCIe": 756e12, "H[12]00 NVL": 835e12, "H[128]00": 989e12, r"A[18]00\b": 312e12,
             "L40S": 362e12}

    def attention_implementations(self) -> dict[str, Callable[..., Tensor]]:
        half = self.compute_dtype in (torch.bfloat16, torch.float16)  # all that the kernel takes
        return {**super().attention_implementations(), **({"flash_attention_2": self.attention_flash} if half else {})}

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return weight * F.rms_norm(x, weight.shape, eps=eps)  # float32 inside, and one kernel in newer PyTorch

    def attention_flash(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool) -> Tensor:
        """FlashAttention-2 (arXiv:2307.08691) over sequences of any lengths in one call, as PyTorch ships it."""
        if q.dtype == torch.float32:
            raise UsageError("flash_attention_2 takes bf16 or float16: give sdpa for float32")
        bounds = _on_device(tuple(cu_seqlens), q.device)
        longest = max(b - a for a, b in itertools.pairwise(cu_seqlens))
        # the operation under torch.nn.attention.varlen, which torch 2.7.1 has not
        return torch.ops.aten._flash_attention_forward(
            q.contiguous(), k.contiguous(), v.contiguous(), bounds, bounds, longest, longest, 0.0, causal, False,
            scale=q.shape[-1] ** -0.5,
        )[0]


class Npu(Accelerator):
    """Ascend NPUs, through torch_npu. Its operations' semantics: the op-plugin documentation of each."""

    distributed_backend = "hccl"

    # dense bf16, the figures that VeOmni counts with; Huawei's data sheets give no more than a rounded one
    PEAKS = {"Ascend910B": 354e12, "Ascend910_93": 354e12}

    def __init__(self, device: torch.device, compute_dtype: torch.dtype | None = None):
        super().__init__(device, compute_dtype)
        torch.npu.set_compile_mode(jit_compile=False)  # operators as they are shipped: shapes change with every batch
        torch.npu.config.allow_internal_format = False  # or weights turn up in the device's own layouts
        allocator = os.environ.get("PYTORCH_NPU_ALLOC_CONF")
        if allocator is None:
            try:  # segments that grow fragment less
                torch.npu.memory._set_allocator_settings("expandable_segments:True")
                allocator = "expandable_segments:True"
            except RuntimeError:  # the driver has no virtual memory; the setting is left on all the same
                allocator = "expandable_segments:False"
                torch.npu.memory._set_allocator_settings(allocator)
        self.settings = {"torch_npu": torch_npu.__version__, "jit_compile": "False", "allow_internal_format": "False",
                         "allocator": allocator}

    def attention_implementations(self) -> dict[str, Callable[..., Tensor]]:
        return {**super().attention_implementations(), "flash_attention_2": self.attention_flash}

    @functools.cached_property
    def causal_mask(self) -> Tensor:
        """What sparse_mode 3 takes, whatever the lengths: True is masked."""
        return torch.ones(2048, 2048, dtype=torch.bool, device=self.device).triu(1)

    def attention_flash(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool) -> Tensor:
        """npu_fusion_attention in its packed layout: lengths are cumulative, on the host, without the leading 0."""
        if len(cu_seqlens) > 1025:  # it takes 1024 sequences at most; long videos have more frames
            cut = cu_seqlens[1024]
            first = self.attention_flash(q[:cut], k[:cut], v[:cut], cu_seqlens[:1025], causal)
            rest = [end - cut for end in cu_seqlens[1024:]]
            return torch.cat((first, self.attention_flash(q[cut:], k[cut:], v[cut:], rest, causal)))
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
        # one type for all, and the four dimensions [1, T, H, d] that every release takes
        rotated = torch_npu.npu_rotary_mul(x[None].to(cos.dtype), cos[None, :, None], sin[None, :, None])
        return rotated[0].to(x.dtype)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        return torch_npu.npu_swiglu(gate_up.contiguous(), dim=-1) if gate_up.numel() else super().swiglu(gate_up)

    def moe_permute(self, x: Tensor, expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        if not len(x):
            return super().moe_permute(x, expert_ids, num_experts)
        rows, where = torch_npu.npu_moe_token_permute(x, expert_ids.int())
        # in the middle of its bin an id is counted right however the device rounds; exact below 2**24 rows
        counts = torch.histc(expert_ids.float() + 0.5, bins=num_experts, min=0, max=num_experts)
        return rows, where, counts.long()

    def moe_unpermute(self, rows: Tensor, where: Tensor, weights: Tensor) -> Tensor:
        if not len(rows):
            return super().moe_unpermute(rows, where, weights)
        return torch_npu.npu_moe_token_unpermute(rows, where, probs=weights.to(rows.dtype))

    def grouped_matmul(self, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        if len(weight) == 1 or not len(x):  # lists of one count are documented as invalid
            return x @ weight[0]
        return _NpuGroupedMatmul.apply(x, weight, counts)


class NpuWithoutFusedMoe(Npu):
    """--no-use-npu-fused-moe: the plain forms, on the NPU."""

    moe_permute, grouped_matmul, moe_unpermute = Torch.moe_permute, Torch.grouped_matmul_loop, Torch.moe_unpermute


class _NpuGroupedMatmul(torch.autograd.Function):
    """npu_grouped_matmul has no backward of its own: gradients would be None, with no more than a warning.

    group_type names the axis that the groups divide: 0 the rows (of x and of the result), 2 the inner one.
    group_list_type 1: counts, not their running sums. split_item 2: one tensor comes out.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight, counts)
        return torch_npu.npu_grouped_matmul(
            [x], [weight], group_list=counts, split_item=2, group_type=0, group_list_type=1
        )[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, counts = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch_npu.npu_grouped_matmul(
                [grad], [weight.transpose(1, 2)], group_list=counts, split_item=2, group_type=0, group_list_type=1
            )[0]
        if ctx.needs_input_grad[1]:
            grad_weight = torch_npu.npu_grouped_matmul(
                [x.T], [grad], group_list=counts, split_item=2, group_type=2, group_list_type=1
            )[0]
        return grad_x, grad_weight, None


NPU_OPERATIONS = ("npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu", "npu_moe_token_permute",
                  "npu_grouped_matmul", "npu_moe_token_unpermute")


def import_torch_npu() -> None:
    """Makes torch_npu known here and to PyTorch. Raises UsageError that says what to install where it is missing,
    broken or too old."""
    global torch_npu
    # Read when torch_npu starts: memory that several streams have used can serve again early, or sdpa with the fused
    # mixture of experts can run out of it.
    os.environ.setdefault("MULTI_STREAM_MEMORY_REUSE", "1")
    try:
        import torch_npu
    except ImportError as e:
        if not isinstance(e, ModuleNotFoundError) or e.name != "torch_npu":
            raise UsageError(f"--device npu: torch_npu does not load ({e}): source CANN's "
                             "set_env.sh first, and take the torch_npu of this torch and Python") from e
        version = torch.__version__.split("+")[0]
        raise UsageError(f"--device npu: torch_npu is not installed: pip install 'torch_npu=={version}.*'") from e
    missing = [name for name in NPU_OPERATIONS if not hasattr(torch_npu, name)]
    if missing:
        raise UsageError(f"--device npu: torch_npu {torch_npu.__version__} has no {', '.join(missing)}: take "
                         "2.7.1.post11 or newer, the one that belongs to your torch")


@functools.lru_cache(maxsize=8)
def _on_device(cu_seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once for all layers: a copy to the device makes the host wait."""
    return torch.tensor(cu_seqlens, dtype=torch.int32, device=device)


def _per_sequence(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int]) -> Tensor:
    """Runs `attend` ([N,H,L,d] each) on every sequence of packed q [T,H,d], k and v [T,K,d], those of one length that
    lie side by side in one call."""
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
    runs = [(n, len(list(same))) for n, same in itertools.groupby(lengths)]
    parts = zip(runs, *(t.split([n * times for n, times in runs]) for t in (q, k, v)), strict=True)
    out = [attend(*(t.unflatten(0, (times, n)).transpose(1, 2) for t in qkv)).transpose(1, 2).flatten(0, 1)
           for (n, times), *qkv in parts]
    return torch.cat(out) if len(out) > 1 else out[0]


ATTENTION = ("eager", "sdpa", "flash_attention_2")  # flag values; a device may lack some
DEVICES = ("auto", "npu", "cuda", "cpu")  # what --device takes
ops: Torch = Cpu(torch.device("cpu"))


def select(device: str = "auto", compute_dtype: torch.dtype | None = None, fused_moe: bool | None = None) -> Torch:
    """Chooses the backend for `--device` (auto, npu, cuda, cpu), makes its device current, and returns it as `ops`.

    compute_dtype: None takes the device's. fused_moe: --use-npu-fused-moe, None where the device has it. Under torchrun
    each local rank takes the device of its number. Raises UsageError where what is asked for is not there: there is no
    silent fallback.
    """
    global ops
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "npu" if _npu_is_there() else "cuda" if torch.cuda.is_available() else "cpu"
    if fused_moe and device != "npu":
        raise UsageError(f"--use-npu-fused-moe: {device} has none: leave it out, or take --device npu")
    if device == "cpu":
        ops = Cpu(torch.device("cpu"), compute_dtype)
        return ops
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: this PyTorch sees no CUDA device: take --device cpu or a CUDA build")
    if device == "npu":
        import_torch_npu()
    module = torch.get_device_module(device)
    if not (count := module.device_count()):
        raise UsageError(f"--device {device}: PyTorch sees none here: look whether the driver does, or take another")
    if local_rank >= count:
        raise UsageError(f"--device {device}: local rank {local_rank} has no device, this machine has {count}: start "
                         "no more processes than that (--nproc-per-node)")
    module.set_device(local_rank)
    kind = Cuda if device == "cuda" else NpuWithoutFusedMoe if fused_moe is False else Npu
    ops = kind(torch.device(device, local_rank), compute_dtype)
    return ops


def _npu_is_there() -> bool:
    if importlib.util.find_spec("torch_npu") is None:
        return False
    import_torch_npu()  # installed but broken is said, not passed over
    if not torch.npu.is_available():  # nor would a DataLoader run, which torch_npu patches
        raise UsageError("torch_npu is installed and sees no NPU: give --device cpu, with "
                         "TORCH_DEVICE_BACKEND_AUTOLOAD=0 in the environment")
    return True


if __name__ == "__main__":  # `check_kernels` imports this file again, as `kernels_npu`
    from tools.check_kernels import run

    sys.exit(run(sys.argv[1:]))
