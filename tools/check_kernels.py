"""python kernels_npu.py: check every operation of this machine's device against `Torch`, and time it."""
from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import kernels_npu
from common import InputError, Parser, run_program
from kernels_npu import Cuda, Torch


def cases(ops: Torch) -> Iterator[tuple[str, str, Callable[..., Tensor], list[Tensor]]]:
    """(operation, its size, how to call it on some backend, arguments in float32 or whole numbers) of each check."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    for heads, kv_heads, d, causal, bounds in (
        (8, 2, 128, True, [0, 7, 64, 65, 1024]), (4, 4, 72, False, [0, 256, 512, 600]), (4, 1, 64, True, [0, 512]),
    ):
        for form in ops.attention_implementations():
            def attend(o: Torch, q: Tensor, k: Tensor, v: Tensor, form=form, bounds=bounds, causal=causal) -> Tensor:
                return o.attention_implementations().get(form, o.attention_eager)(q, k, v, bounds, causal)

            size = f"{heads}/{kv_heads} heads of {d}, {'causal, ' * causal}{len(bounds) - 1} sequence(s)"
            yield form, size, attend, [normal(bounds[-1], n, d) for n in (heads, kv_heads, kv_heads)]
    for shape in ((1024, 512), (512, 8, 128)):
        # not 1e-6, which a form that drops it may take by itself
        yield "rms_norm", f"{shape}", lambda o, x, w: o.rms_norm(x, w, 1e-2), [normal(*shape), normal(shape[-1])]
    for d in (128, 72):
        angles = normal(512, d // 2).repeat(1, 2)
        arguments = [normal(512, 8, d), angles.cos(), angles.sin()]
        yield "rotary", f"(512, 8, {d})", lambda o, *args: o.rotary(*args), arguments
    yield "swiglu", "(1024, 768)", lambda o, x: o.swiglu(x), [normal(1024, 768)]
    for tokens, experts, k in ((512, 16, 4), (64, 8, 1), (3, 64, 2)):  # the last: most experts without a token
        size = f"{tokens} tokens to {k} of {experts}"
        yield "moe_route", size, lambda o, x, k=k: torch.cat(o.moe_route(x, k)[:2], 1), [normal(tokens, experts)]
        ids = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])

        def move(o: Torch, x: Tensor, weights: Tensor, ids: Tensor, experts=experts) -> Tensor:
            rows, where, counts = o.moe_permute(x, ids, experts)
            scale = torch.arange(1, experts + 1, device=x.device).repeat_interleave(counts)  # shows a misplaced row
            return o.moe_unpermute(rows * scale[:, None].to(rows.dtype) / experts, where, weights)

        yield "moe_permute, moe_unpermute", size, move, [normal(tokens, 256), normal(tokens, k), ids]
    for counts in ([100, 0, 412, 0], [512], [0, 0, 0, 0], [0, 1, 0, 255]):
        arguments = [normal(sum(counts), 256), normal(len(counts), 256, 384) / 16, torch.tensor(counts)]
        yield "grouped_matmul", f"rows {counts}", lambda o, *args: o.grouped_matmul(*args), arguments

    ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(64)])

    def mixture(o: Torch, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor) -> Tensor:
        rows, where, counts = o.moe_permute(x, ids, len(down))
        rows = o.grouped_matmul(o.swiglu(o.grouped_matmul(rows, gate_up, counts)), down, counts)
        return o.moe_unpermute(rows, where, weights)

    experts = [normal(8, 256, 384) / 16, normal(8, 192, 256) / 14]
    yield "moe_permute, and all after", "64 tokens to 2 of 8", mixture, [normal(64, 256), normal(64, 2), *experts, ids]

    def adamw(o: Torch, p: Tensor, g: Tensor) -> Tensor:
        p = p.detach().float().clone().requires_grad_()
        optimizer = o.adamw([{"params": [p]}], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            p.grad = g.detach().to(p.dtype)
            optimizer.step()
        return p.detach()

    yield "adamw", "(64, 64)", adamw, [normal(64, 64), normal(64, 64)]


def run_case(ops: Torch, call: Callable[..., Tensor], arguments: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result and the gradients of its arguments, in float32 on the CPU."""
    arguments = [a.to(ops.device, dtype).requires_grad_() if a.is_floating_point() else a.to(ops.device)
                 for a in arguments]
    out = call(ops, *arguments)
    results = [out]
    if out.requires_grad:
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
        wanted = [a for a in arguments if a.requires_grad]
        results += [g for g in torch.autograd.grad(out, wanted, weights, allow_unused=True) if g is not None]
    return [r.detach().float().cpu() for r in results]


def check_operations(ops: Torch) -> bool:
    """Prints a line for each operation, size and type: which form runs, its largest error (of result and gradients,
    relative to the largest value) beside the bound, its time beside the plain form's. False if any is off."""
    bounds = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # float32's matmuls may round to 10 bits; bf16 has 8
    print(f"{'operation':27} {'size':38} {'type':9} {'form':8} {'error':>8} {'bound':>8} {'ms':>8} {'plain ms':>8}")
    forms, good = ops.implementations(), True
    for name, size, call, arguments in cases(ops):
        for dtype, bound in bounds.items():
            if name == "flash_attention_2" and dtype == torch.float32 and isinstance(ops, Cuda):
                continue  # the kernel has none
            rounded = [a.to(dtype).float() if a.is_floating_point() else a for a in arguments]
            expected = run_case(Torch(torch.device("cpu")), call, rounded, torch.float32)
            found = run_case(ops, call, rounded, dtype)
            same = len(found) == len(expected) and all(a.shape == b.shape for a, b in zip(found, expected, strict=True))
            error = max((float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
                         for a, b in zip(found, expected, strict=True) if b.numel()), default=0.0) if same else math.inf
            times = [_milliseconds(o, call, rounded, dtype) for o in (ops, Torch(ops.device))]
            ok = error <= bound  # not for NaN
            good &= ok
            print(f"{name:27} {size:38} {str(dtype)[6:]:9} {forms[name.split(',')[0]]:8} {error:8.1e} {bound:8.0e} "
                  f"{times[0]:8.3f} {times[1]:8.3f}{'' if ok else '  OFF'}")
    return good


def _milliseconds(ops: Torch, call: Callable[..., Tensor], arguments: list[Tensor], dtype: torch.dtype) -> float:
    """Of one forward and backward, the median of five."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        run_case(ops, call, arguments, dtype)
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


def main(argv: list[str]) -> None:
    parser = Parser(prog="kernels_npu.py", description="checks every operation on this machine's device")
    parser.add_argument("--device", choices=kernels_npu.DEVICES, default="auto", help="what to check")
    parser.add_argument("--debug", action="store_true", help="show a traceback with an error")
    ops = kernels_npu.select(parser.parse_args(argv).device)
    print(f"device: {ops.device}; torch {torch.__version__}" + "".join(f"; {k} {v}" for k, v in ops.settings.items()))
    if not check_operations(ops):
        raise InputError(f"{ops.device}: operations marked OFF are not right here: do not train with them")
    print("all operations are right")


def run(argv: list[str]) -> int:
    return run_program(main, argv)
