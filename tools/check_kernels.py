"""Compare every operation of this machine's device with `Torch`, and time it: `python kernels_npu.py` runs this.

A case is (arguments, call): float32 or integer tensors, and a function of (ops, *arguments). The tests use it too.
"""
from __future__ import annotations

import glob
import importlib.metadata
import itertools
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import kernels_npu
from common import InputError, Parser, run_program
from kernels_npu import Cuda, Torch

Case = tuple[list[Tensor], Callable[..., Tensor]]

# float32 matrix products may round to 10 bits on a device; bfloat16 has 8 bits
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

# ---- cases ---------------------------------------------------------------------------------------------------------


def attention(
    implementation: str, heads: int, kv_heads: int, head_dim: int, cu_seqlens: list[int], causal: bool
) -> Case:
    def call(ops: Torch, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        name = "eager" if type(ops) is Torch else implementation  # the reference lacks some implementations
        return ops.attention(q, k, v, cu_seqlens, causal, name)

    return [torch.randn(cu_seqlens[-1], n, head_dim) for n in (heads, kv_heads, kv_heads)], call


def rms_norm(*shape: int) -> Case:
    eps = 1e-2  # not a device operation's default, so that the check notices if the argument is ignored
    return [3 * torch.randn(shape), torch.rand(shape[-1])], lambda ops, x, weight: ops.rms_norm(x, weight, eps)


def rotary(tokens: int, heads: int, head_dim: int, cast_tables: bool) -> Case:
    """Rotate with tables in x's type, as the text decoder does, or in float32, as the vision encoder does."""
    angles = 6 * torch.rand(tokens, head_dim // 2).repeat(1, 2)

    def call(ops: Torch, x: Tensor) -> Tensor:
        tables = [table.to(x.device, x.dtype if cast_tables else None) for table in (angles.cos(), angles.sin())]
        return ops.rotary(x, *tables)

    return [torch.randn(tokens, heads, head_dim)], call


def swiglu(*shape: int) -> Case:
    return [torch.randn(shape)], lambda ops, x: ops.swiglu(x)


def moe_route(tokens: int, experts: int, top_k: int) -> Case:
    def call(ops: Torch, logits: Tensor) -> Tensor:
        probs, weights, _ = ops.moe_route(logits, top_k)
        return torch.cat((probs, weights), dim=1)

    return [torch.randn(tokens, experts)], call


def random_expert_ids(tokens: int, experts: int, top_k: int) -> Tensor:
    """Return different experts for each token, [tokens, top_k]."""
    return torch.rand(tokens, experts).argsort(1)[:, :top_k]


def moe_permute(tokens: int, experts: int, top_k: int) -> Case:
    """Permute, scale each row by its expert's number, and unpermute, so that a misplaced row shows."""
    expert_ids = random_expert_ids(tokens, experts, top_k)

    def call(ops: Torch, x: Tensor, weights: Tensor) -> Tensor:
        rows, slot_to_row, counts = ops.moe_permute(x, expert_ids.to(x.device), experts)
        scale = torch.arange(1, experts + 1, device=x.device).repeat_interleave(counts) / experts
        return ops.moe_unpermute(rows * scale[:, None].to(rows.dtype), slot_to_row, weights)

    return [torch.randn(tokens, 256), torch.randn(tokens, top_k)], call


def grouped_matmul(counts: list[int], inner: int, outer: int) -> Case:
    def call(ops: Torch, x: Tensor, weight: Tensor) -> Tensor:
        return ops.grouped_matmul(x, weight, torch.tensor(counts, device=x.device))

    return [torch.randn(sum(counts), inner), torch.randn(len(counts), inner, outer) / inner**0.5], call


def mixture(tokens: int, experts: int, top_k: int, hidden: int, width: int, used: int | None = None) -> Case:
    """Run a mixture of experts. The tokens use only the first `used` experts."""
    expert_ids = random_expert_ids(tokens, used or experts, top_k)

    def call(ops: Torch, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return ops.experts(x, expert_ids.to(x.device), weights, gate_up, down)

    gate_up = torch.randn(experts, hidden, 2 * width) / hidden**0.5
    down = torch.randn(experts, width, hidden) / width**0.5
    return [torch.randn(tokens, hidden), torch.rand(tokens, top_k), gate_up, down], call


def adamw(*shape: int) -> Case:
    def call(ops: Torch, p: Tensor, grad: Tensor) -> Tensor:
        p = p.detach().float().clone().requires_grad_()
        optimizer = ops.adamw([{"params": [p]}], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            p.grad = grad.detach().to(p.dtype)
            optimizer.step()
        return p.detach()

    return [torch.randn(shape), torch.randn(shape)], call


def cases(ops: Torch) -> list[tuple[str, str, Callable[..., Case], tuple]]:
    """Return (operation, size, function that builds the case, its arguments) of every check on a device."""
    attentions = (
        ("8/2 heads of 128, causal, 4 sequences", 8, 2, 128, [0, 7, 64, 65, 1024], True),
        ("4/4 heads of 72, 3 sequences", 4, 4, 72, [0, 256, 512, 600], False),
        ("4/1 heads of 64, causal, 1 sequence", 4, 1, 64, [0, 512], True),
    )
    routings = ((512, 16, 4), (64, 8, 1), (3, 64, 2))  # tokens, experts, k; the last leaves most experts unused
    row_counts = ([100, 0, 412, 0], [512], [0, 0, 0, 0], [0, 1, 0, 255])
    return [
        *((name, size, attention, (name, *arguments))
          for size, *arguments in attentions for name in ops.attention_implementations()),
        ("rms_norm", "(1024, 512)", rms_norm, (1024, 512)),
        ("rms_norm", "(512, 8, 128)", rms_norm, (512, 8, 128)),
        ("rotary", "(512, 8, 128)", rotary, (512, 8, 128, True)),
        ("rotary", "(512, 8, 72), float32 tables", rotary, (512, 8, 72, False)),
        ("swiglu", "(1024, 768)", swiglu, (1024, 768)),
        *(("moe_route", f"{t} tokens to {k} of {e}", moe_route, (t, e, k)) for t, e, k in routings),
        *(("moe_permute, moe_unpermute", f"{t} tokens to {k} of {e}", moe_permute, (t, e, k)) for t, e, k in routings),
        *(("grouped_matmul", f"rows {counts}", grouped_matmul, (counts, 256, 384)) for counts in row_counts),
        ("moe_permute to moe_unpermute", "64 tokens to 2 of 8", mixture, (64, 8, 2, 256, 192)),
        ("adamw", "(64, 64)", adamw, (64, 64)),
    ]


# ---- comparison ----------------------------------------------------------------------------------------------------


def run_case(ops: Torch, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Return the result and the gradient of each float argument, in float32 on the CPU."""
    arguments, call = case
    arguments = [a.to(ops.device, dtype).requires_grad_() if a.is_floating_point() else a.to(ops.device)
                 for a in arguments]
    out = call(ops, *arguments)
    results = [out]
    if out.requires_grad:
        grad = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
        results += torch.autograd.grad(out, [a for a in arguments if a.requires_grad], grad)
    return [r.detach().float().cpu() for r in results]


def rounded(case: Case, dtype: torch.dtype) -> Case:
    """Round the arguments to `dtype`, so that the reference computes from the same numbers."""
    arguments, call = case
    return [a.to(dtype).float() if a.is_floating_point() else a for a in arguments], call


def error_of(ops: Torch, case: Case, dtype: torch.dtype) -> float:
    """Return the largest difference from `Torch` in float32, relative to the largest value of each tensor.

    The result is inf for another number of gradients or another shape, NaN if a value is NaN.
    """
    case = rounded(case, dtype)
    expected = run_case(Torch(torch.device("cpu")), case, torch.float32)
    found = run_case(ops, case, dtype)
    if [t.shape for t in found] != [t.shape for t in expected]:
        return math.inf
    errors = [(a - b).abs().max() / b.abs().max().clamp(min=1e-6)
              for a, b in zip(found, expected, strict=True) if b.numel()]
    return torch.stack(errors).max().item() if errors else 0.0


def milliseconds(ops: Torch, case: Case, dtype: torch.dtype) -> float:
    """Return the median time of five forwards and backwards."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run_case(ops, case, dtype)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def check_operations(ops: Torch) -> bool:
    """Print a line for each operation, size and type. Return False if an error exceeds its bound.

    The columns are the class that implements the operation, its error, the bound, and the times of this and of the
    plain implementation.
    """
    print(f"{'operation':28} {'size':38} {'type':9} {'class':8} {'error':>8} {'bound':>8} {'ms':>8} {'plain ms':>8}")
    classes, all_right = ops.implementations(), True
    for operation, size, build, build_arguments in cases(ops):
        torch.manual_seed(0)
        case = build(*build_arguments)
        for dtype, bound in BOUNDS.items():
            if operation == "flash_attention_2" and dtype == torch.float32 and isinstance(ops, Cuda):
                continue  # the kernel has no float32
            error = error_of(ops, case, dtype)
            is_right = error <= bound  # False for NaN
            all_right &= is_right
            times = [milliseconds(each, case, dtype) for each in (ops, Torch(ops.device))]
            name = operation.replace(",", "").split()[0]
            print(f"{operation:28} {size:38} {str(dtype)[6:]:9} {classes[name]:8} {error:8.1e} {bound:8.0e} "
                  f"{times[0]:8.3f} {times[1]:8.3f}{'' if is_right else '  OFF'}")
    return all_right


# ---- report --------------------------------------------------------------------------------------------------------

PACKAGES = ("torch", "torch_npu", "safetensors", "tokenizers", "transformers")
VARIABLES = re.compile("(ACL|ASCEND|CLOSE_MATMUL|COMBINED|CPU_AFFINITY|CUBLAS|CUDA|GLOO|HCCL|MULTI_STREAM|NCCL|NPU|OMP_"
                       "|PYTORCH|TASK_QUEUE|TOKENIZERS|TORCH)|(LD_LIBRARY_PATH|PYTHONPATH)$")


def installed_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def version_line(*patterns: str) -> str:
    """Return the first line with the word "version" in the files that match the patterns."""
    for path in itertools.chain.from_iterable(map(glob.glob, patterns)):
        for line in Path(path).read_text(errors="replace").splitlines():
            if "version" in line.lower():
                return f"{line.strip()} ({path})"
    return "not found"


def print_report() -> None:
    """Print the versions and the environment variables that a bug report needs."""
    print(f"python {platform.python_version()}, {platform.platform()}")
    for package in PACKAGES:
        print(package, installed_version(package))
    cann = os.environ.get("ASCEND_HOME_PATH", "/usr/local/Ascend/ascend-toolkit/latest")
    print("CANN:", version_line(f"{cann}/*/ascend_*_install.info", f"{cann}/ascend_*_install.info"))
    print("Ascend driver:", version_line("/usr/local/Ascend/driver/version.info"))
    print("CUDA:", torch.version.cuda or "not in this torch")
    print("NVIDIA driver:", version_line("/proc/driver/nvidia/version"))
    for name in sorted(filter(VARIABLES.match, os.environ)):
        print(f"{name}={os.environ[name]}")


def main(argv: list[str]) -> None:
    parser = Parser(prog="kernels_npu.py", description="Compare every operation on this machine's device with `Torch`.")
    parser.add_argument("--device", choices=kernels_npu.DEVICES, default="auto", help="the device to check")
    parser.add_argument("--report", action="store_true",
                        help="first print versions, devices and environment variables, for a bug report")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    args = parser.parse_args(argv)
    if args.report:  # before `select`, which may fail
        print_report()
    ops = kernels_npu.select(args.device)
    if args.report:
        for number, device in enumerate(ops.devices()):
            print(f"{ops.device.type}:{number} {device}")
    print(f"device: {ops.device}; torch {torch.__version__}" + "".join(f"; {k} {v}" for k, v in ops.settings.items()))
    if not check_operations(ops):
        raise InputError(f"{ops.device}: operations marked OFF are wrong on this device: do not train on it")
    print("all operations are right")


def run(argv: list[str]) -> int:
    return run_program(main, argv)
