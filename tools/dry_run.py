"""Predict what a training step needs on a rank: train.py --dry-run.

One process without weights or an accelerator runs the real step of the real, sharded model. PyTorch's fake tensors have
no memory, and its fake process group no other ranks. A tracker adds up the memory that the tensors would have taken.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import data
import kernels_npu
import parallel
from common import InputError, UsageError
from model import Qwen3VL, Qwen3VLConfig, plain_block
from train import (
    batch_sizes,
    build_trainable_model,
    configure_model,
    make_optimizer,
    model_settings,
    optimizer_settings,
    set_loss_weights,
)


class FakeDevice(kernels_npu.Accelerator):
    """An accelerator's defaults without the device. Experts get equal numbers of tokens, because routing is unknown."""

    expert_rows = 0  # rows that a rank sends to experts, and as many that it receives

    def attention_implementation(self, implementation: str | None = None):
        return self.attention_eager if implementation == "eager" else self.attention_sdpa  # flash: same memory

    def to_host(self, counts: torch.Tensor) -> list:
        n = counts.shape[-1]
        even = [self.expert_rows // n + (i < self.expert_rows % n) for i in range(n)]
        return even if counts.ndim == 1 else [even] * len(counts)

    def grouped_matmul(self, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return GroupedMatmul.apply(x, weight)


class GroupedMatmul(torch.autograd.Function):
    """Allocate what an accelerator's kernel does: the result, and in backward a gradient of each argument."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(len(x), weight.shape[2])

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(t) if needed else None for t, needed in pairs)


class FakeParallelState(parallel.ParallelState):
    """Ranks that all have the values of this one."""

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        return [self.world_size * (1.0 if isinstance(v, torch.Tensor) else v) for v in values]


class MemoryTracker(TorchDispatchMode):
    """Count the bytes of live storages by kind, and the bytes that collectives send.

    A new storage gets the current `kind`. Pinned memory is the host's, and not part of the peak.
    """

    def __init__(self, fake_mode: FakeTensorMode):
        super().__init__()
        self.fake_mode, self.kind = fake_mode, "other"
        self.known: dict[int, tuple] = {}  # storage id -> (weak reference, kind, bytes)
        self.live, self.most, self.sent = Counter(), Counter(), Counter()  # bytes by kind; `sent` by collective
        self.peak, self.at_peak = 0, Counter()

    def reset(self) -> None:
        """Restart the peaks and the traffic."""
        self.most, self.sent = self.live.copy(), Counter()
        self.peak, self.at_peak = self.total(), self.live.copy()

    def total(self) -> int:
        return sum(self.live.values()) - self.live["host"]

    @contextlib.contextmanager
    def tag(self, kind: str):
        """Set the kind of the storages that are created in this context."""
        before, self.kind = self.kind, kind
        yield
        self.kind = before

    def count(self, tensor: torch.Tensor | torch.UntypedStorage, kind: str) -> None:
        """Record a tensor's storage, or its new kind or size."""
        storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else tensor
        key, size = id(storage), storage.nbytes()
        reference = self.forget(key) or weakref.ref(storage, lambda _: self.forget(key))
        self.known[key] = reference, kind, size
        self.live[kind] += size
        self.most[kind] = max(self.most[kind], self.live[kind])
        total = self.total()
        if total > self.peak:
            self.peak, self.at_peak = total, self.live.copy()

    def forget(self, key: int) -> weakref.ref | None:
        reference, kind, size = self.known.pop(key, (None, self.kind, 0))
        self.live[kind] -= size
        return reference

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # the operation comes again with the local tensors
        out = func(*args, **(kwargs or {}))
        kind = "host" if kwargs and kwargs.get("pin_memory") else self.kind
        for t in out if isinstance(out, (tuple, list)) else (out,):
            # DTensor has a fake mode of its own, which only computes shapes.
            is_counted = isinstance(t, FakeTensor) and t.fake_mode is self.fake_mode
            if is_counted and id(t.untyped_storage()) not in self.known:
                self.count(t, kind)
        if func is torch.ops.c10d._allgather_base_.default:
            self.count(args[0], "gathered parameters")
            self.sent["all-gather"] += args[0].nbytes
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.count(args[1], "reduce-scatter buffers")
        elif func is torch.ops.c10d.alltoall_base_.default:
            self.sent["all-to-all"] += args[1].nbytes
        return out

    def __enter__(self):
        # FSDP2 allocates and frees gathered parameters with this method, which a dispatch mode does not see.
        self.resize = resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if id(storage) in self.known:
                self.count(storage, "gathered parameters")

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *error) -> None:
        torch.UntypedStorage.resize_ = self.resize
        super().__exit__(*error)


def fake_batch(config: Qwen3VLConfig, seq_length: int, micro_batch_size: int) -> data.Batch:
    """Return rows of `seq_length` tokens whose pixels are on the meta device.

    The first half of a row are images of 1024 tokens (in a short row, one image that fits), the second half is text.
    All text is supervised.
    """
    merge = config.vision.spatial_merge_size
    half = max(1, seq_length // 2)
    grid = torch.tensor([[1, 32 * merge, 32 * merge]] * (half // 1024) or [[1, merge, half * merge]])
    patches = int(grid.prod(1).sum())
    visual = patches // merge**2
    labels = torch.full((seq_length,), data.IGNORE)
    labels[visual - 1 : -1] = 0
    sample = data.Sample(
        input_ids=torch.zeros(seq_length, dtype=torch.int64),
        labels=labels,
        visual_index=torch.arange(visual),
        position_ids=torch.arange(seq_length).expand(3, -1),
        grid_thw=grid,
        source="",
        truncated=False,
        pixel_values=torch.empty(patches, config.vision.patch_dim, device="meta"),
    )
    return data.collate([sample] * micro_batch_size)


def recompute_setting(block_fn: Callable) -> str:
    """Return which of the three settings of activations a model uses, by its `block_fn` seam."""
    if block_fn is plain_block:
        return "none"
    return "recompute_offload" if isinstance(block_fn, parallel.Offload) else "recompute"


def trace_step(
    model: Qwen3VL, state: parallel.ParallelState, batch: data.Batch, accumulation: int, optimizer_flags: dict,
    cpu_offload: bool,
) -> dict[str, int | str | dict]:
    """Run a step of a configured model with fake tensors and return the numbers of `dry_run`."""
    kinds = ("parameters", "gradients", "optimizer state", "optimizer step")
    parameters, gradient, optimizer_state, optimizer_step = ["host"] * 4 if cpu_offload else kinds
    text, visual, ops = model.model.language_model, model.model.visual, kernels_npu.ops
    chosen, activations, all_gathers = text.block_fn, {}, {}
    setting = recompute_setting(chosen)
    other = {"none": plain_block, "recompute": parallel.recompute_block, "recompute_offload": parallel.Offload(ops)}
    del other[setting]
    # `local_batch` needs the values of the integers, so it comes before the fake tensors. The pixels are one element,
    # expanded; below, a slice of the full batch's pixels keeps all of them alive, as on a CPU.
    full_shape = batch.pixel_values.shape
    batch = parallel.local_batch(replace(batch, pixel_values=torch.zeros(()).expand(full_shape)), state)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake_mode, MemoryTracker(fake_mode) as memory:
        with memory.tag(parameters):
            model.to_empty(device=state.device)
        optimizer = make_optimizer(model, **optimizer_flags)
        trainable = [p for p in model.parameters() if p.requires_grad]
        with memory.tag(optimizer_state):  # it exists in every step but the first
            for p in trainable:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
        for p in trainable:
            p.register_post_accumulate_grad_hook(lambda p: memory.count(parallel.to_local(p.grad), gradient))
        for name, module in model.named_modules():
            if isinstance(module, parallel.FSDPModule):
                memory.reset()
                with memory.tag(parameters):  # FSDP2 pads them the first time
                    module.unshard()
                    module.reshard()
                all_gathers[name or "the root's own"] = memory.sent["all-gather"]
        with memory.tag("batch"):
            full_pixels = torch.empty(full_shape, device=state.device)
            batch = replace(batch, pixel_values=full_pixels[: len(batch.pixel_values)])
            del full_pixels
        ops.expert_rows = len(batch.input_ids) * model.config.text.num_experts_per_tok
        model.lm_head.register_forward_pre_hook(lambda *_: setattr(memory, "kind", "loss"))
        model.lm_head.register_forward_hook(lambda *_: setattr(memory, "kind", "activations"))

        def forward(name: str) -> torch.Tensor:
            with memory.tag("activations"):
                loss, _ = model(batch)
            activations[name] = memory.live["activations"]
            return loss

        while other:  # what the settings that were not chosen would keep; Offload and its host memory go with the item
            name, text.block_fn = other.popitem()
            visual.block_fn = text.block_fn
            forward(name)
            parallel.reshard(model)
        text.block_fn = visual.block_fn = chosen
        memory.reset()
        traced = min(2, accumulation)  # from the second micro-batch on there are gradients
        for _ in range(traced):
            loss = forward(setting)
            with memory.tag("backward"):
                loss.backward()
            del loss
        # mergers of DeepStack features beyond the text layers have no gradient
        gradients = sum(parallel.to_local(p.grad).nbytes for p in trainable if p.grad is not None)
        (square_sum,) = state.sum(parallel.grad_square_sum(trainable, state))
        parallel.clip_gradients(trainable, square_sum**0.5, max_norm=0.5)
        with memory.tag(optimizer_step):
            optimizer.step()
    shards = [parallel.to_local(p) for p in model.parameters()]
    supervised = len(batch.supervised_index)
    logits = min(model.loss_chunk_size or supervised, supervised)
    largest = max(all_gathers, key=all_gathers.get, default="none")  # a single rank may do without FSDP2
    states = [t for state in optimizer.state.values() for t in state.values()]
    return {
        "parameters": sum(p.numel() for p in shards), "parameter_bytes": sum(p.nbytes for p in shards),
        "gradient_bytes": gradients, "logits_bytes": logits * model.config.text.vocab_size * 4,
        "optimizer_bytes": sum(parallel.to_local(t).nbytes for t in states),
        "activation_setting": setting, "activation_bytes": activations,
        "backward_bytes": memory.most["backward"], "loss_bytes": memory.most["loss"],
        "largest_all_gather": largest, "largest_all_gather_bytes": all_gathers.get(largest, 0),
        "gathered_bytes": memory.most["gathered parameters"],
        "reduce_scatter_bytes": memory.most["reduce-scatter buffers"],
        "all_gather_bytes": memory.sent["all-gather"] // traced * accumulation,
        "all_to_all_bytes": memory.sent["all-to-all"] // traced * accumulation,
        "host_bytes": memory.most["host"], "peak_bytes": memory.peak,
        "peak_parts": {kind: n for kind, n in memory.at_peak.most_common() if n and kind != "host"},
    }


def dry_run(args: argparse.Namespace) -> None:
    """Print what a step with these flags needs on a rank of --world-size, and write it as JSON to --save.

    Raises InputError if --device-memory is too small.
    """
    import torch.distributed._tools.fake_collectives  # noqa: F401  torch 2.7.1 needs it for fake collectives
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = Qwen3VLConfig.from_json(args.init_from_hf_path)
    # Of the ranks that share a row, the last one has the most text and so the most logits.
    rank = min(args.context_parallel_size, args.world_size) - 1
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=args.world_size)
    ops = kernels_npu.ops = FakeDevice(torch.device("cpu"))  # PyTorch has no fake tensors of a device that is missing
    state = FakeParallelState(ops, cp=args.context_parallel_size, ep=args.expert_parallel_size, fsdp=args.fsdp_size)
    if args.compile:
        raise UsageError("--compile: a dry run cannot trace compiled blocks: leave it out")
    size, accumulation = batch_sizes(args.micro_batch_size, args.global_batch_size, state.dp_size)
    model, _ = build_trainable_model(args, config)
    total = sum(p.numel() for p in model.parameters())
    settings = model_settings(args)
    configure_model(model, state, **settings | {"synchronize_per_layer": False})  # which takes no memory
    batch = fake_batch(config, args.seq_length, args.micro_batch_size)
    flops = set_loss_weights([batch] * accumulation, args.loss_type, model, state).flops
    report = {
        "rank": state.rank, "world_size": state.world_size, "context_parallel_size": state.cp_size,
        "expert_parallel_size": state.ep_size, "fsdp_size": state.fsdp_size,
        "micro_batch_size": args.micro_batch_size, "global_batch_size": size, "micro_batches": accumulation,
        "seq_length": args.seq_length, "images": len(batch.grid_thw), "visual_tokens": len(batch.visual_index),
        "supervised_tokens": len(batch.supervised_index),
        "compute_dtype": str(settings["compute_dtype"]).removeprefix("torch."), "model_parameters": total,
        **trace_step(model, state, batch, accumulation, optimizer_settings(args), args.cpu_offload),
        "flops_per_step": flops, "flops_per_rank": flops / state.world_size,
    }
    memory = args.device_memory and args.device_memory * 2**30
    report |= {"device_memory_bytes": memory, "fits": report["peak_bytes"] <= memory if memory else None}
    state.close()
    print(describe(report))
    print(json.dumps(report))
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        (Path(args.save) / "dry_run.json").write_text(json.dumps(report, indent=1) + "\n")
    if memory and not report["fits"]:
        parts = report["peak_parts"]
        largest = next(iter(parts))
        raise InputError(
            f"--device-memory {args.device_memory:g} is {gib(report['peak_bytes'] - memory)} too little for a peak of "
            f"{gib(report['peak_bytes'])}, whose largest part is {largest}, {gib(parts[largest])}: give "
            + advice(largest, args, config))


def describe(report: dict) -> str:
    """Return the report of `dry_run` as text: a line for each number, bytes in GiB."""
    lines = ["dry run; it assumes rows of images in the first half and supervised text in the second, and an equal "
             "load of all experts; it leaves out the allocator's rounding, communication libraries and kernels' "
             "workspaces"]
    for key, value in report.items():
        if isinstance(value, dict):
            value = ", ".join(f"{kind} {gib(n)}" for kind, n in value.items())
        elif key.endswith("_bytes") and value is not None:
            value = gib(value)
        elif type(value) in (int, float):
            value = f"{value:,}" if type(value) is int else f"{value:.4g}"
        lines.append(f"  {key.replace('_', ' '):25} {value}")
    return "\n".join(lines)


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def advice(part: str, args: argparse.Namespace, config: Qwen3VLConfig) -> str:
    """Return flags that make a part of the peak smaller."""
    if part in ("parameters", "gradients", "optimizer state"):
        return "--cpu-offload or a larger " + ("--fsdp-size" if args.fsdp_size else "--world-size")
    if part == "loss":
        return "a smaller --loss-chunk-size"
    first = "a larger --expert-parallel-size, " * bool(config.text.num_experts)
    if part == "activations":
        recompute = args.recompute == "none"
        first = "--recompute full, " if recompute else "--activation-offload, " * (not args.activation_offload)
    return first + "a larger --context-parallel-size, or a smaller --seq-length or --micro-batch-size"
