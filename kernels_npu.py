"""Every operation that has a device-specific form, behind one object: `kernels_npu.ops`.

`Torch` is the reference: plain PyTorch that runs anywhere, and the judge of every faster form. A device's class
inherits from it and overrides what that device does better, so that inheritance is the fallback. `select(device)`
chooses the class once, at start-up; nothing outside this file compares device names.

Shapes: T tokens, H heads, K key-value heads, d head size, D hidden size, E experts, I expert width, k experts a token.
"""
from __future__ import annotations

import argparse
import difflib
import functools
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class InputError(ValueError):
    """What a person gave cannot be used: exit status 1. The message is one line: what is wrong, where, what to do."""


class UsageError(Exception):
    """The command line is wrong: exit status 2."""


class PeerError(Exception):
    """Another rank has failed, and says why."""


class Torch:
    """The operations in plain PyTorch (CPU)."""

    distributed_backend = "gloo"
    compute_dtype = torch.float32  # the default of --bf16 / --fp32 on this device
    is_accelerator = False

    def __init__(self, device: torch.device):
        self.device = device

    # ---- attention -------------------------------------------------------------------------------------------------

    default_attention = "sdpa"

    def attention(self, implementation: str) -> Callable[..., Tensor]:
        """The attention named so: a callable (q [T,H,d], k [T,K,d], v [T,K,d], cu_seqlens, causal) -> [T,H,d].

        `cu_seqlens` is a host list [0, ..., T]: every sequence attends to itself alone. The scale is d ** -0.5.
        """
        forms = {"eager": self.attention_eager, "sdpa": self.attention_sdpa}
        if implementation not in forms:
            raise UsageError(f"attention implementation {implementation!r} is not available on {self.device.type}: "
                             f"take one of {', '.join(forms)}")
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
        # unbind, not indexing: its backward stacks once, where indexing would add E zero-filled [E,K,M] tensors
        groups = zip(x.split(self.to_host(counts)), weight.unbind(0), strict=True)
        # no rows at all: an empty product, which still hangs on x and weight
        return torch.cat([rows @ w for rows, w in groups if len(rows)] or [x @ weight[0]])

    def to_host(self, counts: Tensor) -> list:
        """Counts of rows, which the host must know to split them: waits for the device."""
        return counts.tolist()

    # ---- optimizer and device --------------------------------------------------------------------------------------

    def adamw(self, groups: list[dict], **settings) -> torch.optim.Optimizer:
        """AdamW (arXiv:1711.05101) over parameter groups."""
        return torch.optim.AdamW(groups, **settings)

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
        names = ("attention_eager", "attention_sdpa", "rms_norm", "rotary", "swiglu", "moe_route", "moe_permute",
                 "grouped_matmul", "moe_unpermute", "adamw")
        owner = {n: next(c for c in type(self).__mro__ if n in vars(c)).__name__ for n in names}
        return {n: owner[n] for n in names}


class Cuda(Torch):
    """NVIDIA devices."""

    distributed_backend = "nccl"
    compute_dtype = torch.bfloat16
    is_accelerator = True

    # dense bf16, NVIDIA's data sheets (their headline figures are with sparsity: half of those)
    PEAKS = {"H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}

    def adamw(self, groups: list[dict], **settings) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, fused=True, **settings)

    def memory(self) -> tuple[int | None, int | None]:
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def get_rng_state(self) -> Tensor | None:
        return torch.cuda.get_rng_state()

    def set_rng_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state)

    def peak_flops(self) -> float | None:
        name = torch.cuda.get_device_name()
        return next((peak for model, peak in self.PEAKS.items() if model in name), None)


def _per_sequence(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int]) -> Tensor:
    """Runs `attend` ([N,H,L,d] each) on every sequence of packed q [T,H,d], k and v [T,K,d]: in one call if all are
    of one length, else one after the other."""
    if q.shape[1] != k.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    lengths = [end - start for start, end in zip(cu_seqlens, cu_seqlens[1:], strict=False)]
    if len(set(lengths)) == 1:
        batched = [t.unflatten(0, (-1, lengths[0])).transpose(1, 2) for t in (q, k, v)]  # [N, H, L, d]
        return attend(*batched).transpose(1, 2).flatten(0, 1)
    parts = zip(*(t.transpose(0, 1)[None].split(lengths, dim=2) for t in (q, k, v)), strict=True)
    return torch.cat([attend(*part)[0].transpose(0, 1) for part in parts])


ops: Torch = Torch(torch.device("cpu"))


def select(device: str = "auto") -> Torch:
    """Chooses the backend for `--device` (auto, npu, cuda, cpu), makes its device current, and returns it as `ops`.

    Under torchrun each local rank takes the device of its number. Raises UsageError where the device asked for is
    not there: there is no silent fallback.
    """
    global ops
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise UsageError("--device cuda: this PyTorch sees no CUDA device: take --device cpu or a CUDA build")
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"--device cuda: local rank {local_rank} has no device, this machine has "
                             f"{torch.cuda.device_count()}: start no more processes than that (--nproc-per-node)")
        torch.cuda.set_device(local_rank)
        ops = Cuda(torch.device("cuda", local_rank))
    elif device == "npu":
        raise UsageError("--device npu: the NPU backend is not part of this version yet; take --device cpu or cuda")
    else:
        ops = Torch(torch.device("cpu"))
    return ops


# ---- what the programs share: one line for a person's mistake ------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Flags whose errors are one line that says what to give instead. `@FILE` reads flags from a file."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False, fromfile_prefix_chars="@", formatter_class=_Help)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def parse_known_args(self, args=None, namespace=None):
        try:
            return super().parse_known_args(args, namespace)
        except (ValueError, RecursionError) as e:
            files = ", ".join(arg for arg in args or () if arg.startswith("@"))
            self.error(f"{files} cannot be read as flags ({str(e) or type(e).__name__}): give one to a line")

    def error(self, message: str):
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        for word in re.findall(r"--[\w-]+", message) if "unrecognized" in message else ():
            near = difflib.get_close_matches(word, flags, n=1)
            message += f" (did you mean {near[0]}?)" if near else f" ({self.prog} --help lists the flags)"
        raise UsageError(message)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, where there is one that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or isinstance(action.default, bool)
        return action.help if says_nothing else super()._get_help_string(action)


def number(
    kind: type, low: float, high: float = float("inf"), *, above: bool = False, below: bool = False
) -> Callable[[str], float]:
    """An argparse type: a number of `kind` in [low, high]; without low if `above`, without high if `below`."""

    def parse(text: str):
        wanted = f"{'above' if above else 'at least'} {low:g}"
        wanted += f" and {'below' if below else 'at most'} {high:g}" if high < float("inf") else ""
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        inside = (low < value if above else low <= value) and (value < high if below else value <= high)
        if not inside or value == float("inf"):
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {what} {wanted}")
        return value

    return parse


def run_program(main: Callable[[list[str]], None], argv: list[str], *mistakes: type[Exception]) -> int:
    """Runs `main` and returns the exit status: 0; 1 for input that cannot be used; 2 for a wrong command line.

    A person's mistake (InputError, OSError and `mistakes`) is one line on standard error, a traceback with `--debug`;
    anything else is ours, and shows its traceback. Under torchrun every rank often finds the same mistake: rank 0 says
    it at once, the others after a pause in which torchrun ends them if rank 0 has spoken. A rank whose peer has failed
    (`PeerError`, or a collective that broke off) says nothing and waits for torchrun to end it.
    """
    try:
        main(argv)
        return 0
    except (PeerError, RuntimeError) as e:
        if not isinstance(e, PeerError) and not re.search("closed by peer|reset by peer|Broken pipe", str(e)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(10)
        return 1
    except (UsageError, InputError, OSError, *mistakes) as e:
        if "--debug" in argv:
            traceback.print_exc()
        mistake, status = e, 2 if isinstance(e, UsageError) else 1
    if int(os.environ.get("RANK", 0)) > 0 and not getattr(mistake, "said_by_this_rank", False):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    if isinstance(mistake, OSError) and mistake.filename is not None:
        mistake = f"{mistake.filename}: {mistake.strerror}"
    print("error:", " ".join(str(mistake).split("\n")), file=sys.stderr, flush=True)
    return status
