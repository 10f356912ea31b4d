"""Predict what a training step needs on a rank: train.py --dry-run.

One process without weights or an accelerator runs the real step of the real, sharded model. PyTorch's fake tensors have
no memory, and its fake process group no other ranks. A tracker adds up the memory that the tensors would have taken.

The layers of a kind are alike, so that the step runs with few of them. `extend` adds what the others would hold.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import math
import weakref
from bisect import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import data
import kernels_npu
import parallel
from common import InputError, UsageError
from model import (
    DecoderLayer,
    LMHead,
    PatchMerger,
    Qwen3VL,
    Qwen3VLConfig,
    VisionBlock,
    VisionConfig,
    plain_block,
    step_flops,
    trainable_components,
)
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

    def work(self, flops: float, *tensors: torch.Tensor) -> None:
        """Count the work of a kernel on its arguments and results: the planner does."""

    def attention_implementation(self, implementation: str | None = None):
        return self.attention_eager if implementation == "eager" else self.attention_sdpa  # flash: same memory

    def attention_sdpa(self, q, k, v, cu_seqlens, causal):
        return kernels_npu._per_sequence(lambda *qkv: Attention.apply(*qkv, causal), q, k, v, cu_seqlens)

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
        out = x.new_empty(len(x), weight.shape[2])
        kernels_npu.ops.work(2 * x.numel() * weight.shape[2], x, weight, out)
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        pairs = zip((x, weight), ctx.needs_input_grad, strict=True)
        grads = tuple(torch.empty_like(t) if needed else None for t, needed in pairs)
        for needed in ctx.needs_input_grad:
            kernels_npu.ops.work(2 * x.numel() * weight.shape[2] * needed, x, weight, grad)
        return grads


class Attention(torch.autograd.Function):
    """Allocate what a flash attention kernel does: q, k, v [N, H, L, d]."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        ctx.flops = 4 * q.numel() * q.shape[2] * (0.5 if causal else 1)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        kernels_npu.ops.work(ctx.flops, q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        q, k, v, out, _ = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        kernels_npu.ops.work(2.5 * ctx.flops, q, k, v, out, grad, *grads)
        return *grads, None


class FakeParallelState(parallel.ParallelState):
    """Ranks that all have the values of this one."""

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        return [self.world_size * (1.0 if isinstance(v, torch.Tensor) else v) for v in values]


class MemoryTracker(TorchDispatchMode):
    """Count the bytes of live storages by kind, and the bytes that collectives send.

    A new storage gets the current `kind`. Pinned memory is the host's, and not part of the peak. `peaks` has the bytes
    by kind at the peak of each moment: (micro-batch, phase, name of the block that runs).
    """

    def __init__(self, fake_mode: FakeTensorMode | None):
        """fake_mode: count its tensors; None: count tensors on the meta device."""
        super().__init__()
        self.fake_mode, self.kind = fake_mode, "other"
        self.known: dict[int, tuple] = {}  # storage id -> (weak reference, kind, bytes)
        self.live, self.most = Counter(), Counter()  # bytes by kind
        self.sent = Counter()  # bytes by collective and block
        self.micro_batch, self.phase, self.block = 0, "forward", ""
        self.peaks: dict[tuple[int, str, str], tuple[int, Counter]] = {}
        self.host_peaks: Counter[tuple[int, str, str]] = Counter()  # the most of the host's bytes at each moment
        self.entered: dict[str, Counter] = {}  # by block in forward order: the live bytes at its start
        self.in_backward: set[str] = set()  # the blocks with a backward

    def reset(self) -> None:
        """Restart the peaks and the traffic."""
        self.most, self.sent, self.peaks, self.host_peaks = self.live.copy(), Counter(), {}, Counter()

    def enter(self, block: str) -> None:
        """Start the forward of a block, or in backward its second forward or its backward."""
        self.block = block
        if self.phase == "forward":
            self.entered[block] = self.live.copy()
        else:
            self.in_backward.add(block)

    def traffic(self, collective: str, block: str | None = None) -> int:
        """Return the bytes that a collective has sent, in a block or in all."""
        return sum(n for key, n in self.sent.items() if key[0] == collective and block in (None, key[1]))

    def watch(self, model: Qwen3VL) -> None:
        """Call `enter` when a block or the loss starts, and give the loss a kind of its own."""

        def enter_backward(module, args, output, name: str) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if output.requires_grad:
                output.register_hook(lambda _: self.enter(name))

        for name, module in model.named_modules():
            if isinstance(module, (VisionBlock, PatchMerger, DecoderLayer, LMHead)):
                module.register_forward_pre_hook(lambda *_, name=name: self.enter(name))
                module.register_forward_hook(partial(enter_backward, name=name), prepend=True)  # before FSDP2's
        model.lm_head.register_forward_pre_hook(lambda *_: setattr(self, "kind", "loss"))
        model.lm_head.register_forward_hook(lambda *_: setattr(self, "kind", "activations"))

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
        total, moment = self.total(), (self.micro_batch, self.phase, self.block)
        self.host_peaks[moment] = max(self.host_peaks[moment], self.live["host"])
        if total > self.peaks.get(moment, (-1,))[0]:
            self.peaks[moment] = total, self.live.copy()

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
            is_counted = isinstance(t, torch.Tensor) and t.device.type == "meta"
            if self.fake_mode:
                is_counted = isinstance(t, FakeTensor) and t.fake_mode is self.fake_mode
            if is_counted and id(t.untyped_storage()) not in self.known:
                self.count(t, kind)
        if func is torch.ops.c10d._allgather_base_.default:
            self.count(args[0], "gathered parameters")
            self.sent["all-gather", self.block] += args[0].nbytes
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.count(args[1], "reduce-scatter buffers")
            self.sent["reduce-scatter", self.block] += args[1].nbytes
        elif func is torch.ops.c10d.alltoall_base_.default:
            self.sent["all-to-all", self.block] += args[1].nbytes
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


def fake_positions(device: str, grid_thw: torch.Tensor, config: VisionConfig) -> tuple[torch.Tensor, ...]:
    """Return the shapes of `model.patch_positions`, whose values would take a second of host time."""
    patches = sum(map(math.prod, grid_thw.tolist()))
    index = partial(torch.empty, dtype=torch.int64, device=device)
    return index(patches), index(patches), index(patches, 4), torch.empty(patches, 4, device=device)


class Removed(NamedTuple):
    """Layers that a shallow model leaves out: `count` layers like `like` would follow the layer `after`."""

    count: int
    like: str
    after: str


def shallow(config: Qwen3VLConfig) -> tuple[Qwen3VLConfig, list[Removed], dict[str, int]]:
    """Return a configuration with few layers, what it leaves out, and the full model's index of each kept layer.

    Layers with a special role stay: the first and the last ones, those that make or receive DeepStack features, and in
    between the first and the last one of each kind. All text layers stay if these have other neighbours than before.
    """
    text, vision, removed, indexes = config.text, config.vision, Counter(), {}

    def keep(prefix: str, kinds: list[bool], special: set[int], after: int) -> list[int]:
        """Record the removed layers. A kept layer behind `after` represents those of its kind."""
        kept = sorted(special & set(range(len(kinds))))
        indexes.update((f"{prefix}.{j}", i) for j, i in enumerate(kept))
        for i in set(range(len(kinds))) - set(kept):
            like = next(j for j, k in enumerate(kept) if k > after and kinds[k] == kinds[i])
            removed[f"{prefix}.{like}", f"{prefix}.{bisect(kept, i) - 1}"] += 1
        return kept

    features = vision.deepstack_visual_indexes
    plain = next((i for i in range(vision.depth) if i not in features), 0)  # the block after it has a plain input
    special = {0, vision.depth - 1, plain, *(features or [1])}
    blocks = keep("model.visual.blocks", [True] * vision.depth, special, after=plain)
    kinds = [text.is_moe_layer(i) for i in range(text.num_hidden_layers)]
    start = max(1, len(features))  # the embedding's gradients join those of layer 0
    special = {*range(min(start, len(kinds))), len(kinds) - 1}
    for kind in set(kinds):
        middle = [i for i in range(start, len(kinds) - 1) if kinds[i] == kind]
        special.update(middle[:1] + middle[-len(set(kinds)) :])  # a late one needs a neighbour of its kind
    kept_kinds = [kinds[i] for i in sorted(special)]
    if neighbours(kept_kinds) != neighbours(kinds):
        special.update(range(len(kinds)))
    layers = keep("model.language_model.layers", kinds, special, after=start - 1)
    dense = [j for j, i in enumerate(layers) if not kinds[i]]
    text = replace(text, num_hidden_layers=len(layers), decoder_sparse_step=1, mlp_only_layers=dense)
    vision = replace(vision, depth=len(blocks), deepstack_visual_indexes=[blocks.index(i) for i in features])
    removed = [Removed(n, *names) for names, n in removed.items()]
    return replace(config, text=text, vision=vision), removed, indexes


def neighbours(kinds: list[bool]) -> set[tuple[bool, ...]]:
    """Return the kinds of all three successive layers: a layer's buffers depend on both neighbours."""
    return {tuple(kinds[i : i + 3]) for i in range(len(kinds))}


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of this rank's shards with their padding; a storage of several tensors counts once."""
    storages = {id(s): s.nbytes() for s in (parallel.to_local(t).untyped_storage() for t in tensors)}
    return sum(storages.values())


def trace_step(
    model: Qwen3VL, state: parallel.ParallelState, batch: data.Batch, accumulation: int, optimizer_flags: dict,
    removed: list[Removed], setting: str, cpu_offload: bool,
) -> dict[str, int | str | dict]:
    """Run a step of a configured model with fake tensors and return the numbers of `dry_run`.

    They include those of the `removed` layers. `setting` names what the model does with activations: `none`,
    `recompute` or `recompute_offload`.
    """
    kinds = ("parameters", "gradients", "optimizer state", "optimizer step")
    parameters, gradient, optimizer_state, optimizer_step = ["host"] * 4 if cpu_offload else kinds
    text, visual, ops = model.model.language_model, model.model.visual, kernels_npu.ops
    chosen, activations, entered, all_gathers = text.block_fn, {}, {}, {}
    other = {"none": plain_block, "recompute": parallel.recompute_block, "recompute_offload": parallel.Offload(ops)}
    del other[setting]
    # `local_batch` needs the values of the integers, so it comes before the fake tensors. The pixels are one element,
    # expanded; below, a slice of the full batch's pixels keeps all of them alive, as on a CPU.
    full_shape = batch.pixel_values.shape
    batch = parallel.local_batch(replace(batch, pixel_values=torch.zeros(()).expand(full_shape)), state)
    fakes = mock.patch("model.patch_positions", partial(fake_positions, "cpu"))
    with fakes, FakeTensorMode(allow_non_fake_inputs=True) as fake_mode, MemoryTracker(fake_mode) as memory:
        with memory.tag(parameters):
            model.to_empty(device=state.device)
        optimizer = make_optimizer(model, **optimizer_flags)
        trainable = [p for p in model.parameters() if p.requires_grad]
        with memory.tag(optimizer_state):  # it exists in every step but the first
            for p in trainable:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()

        def count_gradient(p: torch.Tensor) -> None:
            if cpu_offload and memory.micro_batch == 0:  # FSDP2's copy to the host, which does nothing on a CPU
                with memory.tag(gradient):
                    p.grad._local_tensor = parallel.to_local(p.grad).clone()
            memory.count(parallel.to_local(p.grad), gradient)

        for p in trainable:
            p.register_post_accumulate_grad_hook(count_gradient)
        for name, module in model.named_modules():
            if isinstance(module, parallel.FSDPModule):
                memory.reset()
                with memory.tag(parameters):  # FSDP2 pads them the first time
                    module.unshard()
                    module.reshard()
                all_gathers[name or "the root's own"] = memory.traffic("all-gather")
        with memory.tag("batch"):
            full_pixels = torch.empty(full_shape, device=state.device)
            batch = replace(batch, pixel_values=full_pixels[: len(batch.pixel_values)])
            del full_pixels
        ops.expert_rows = len(batch.input_ids) * model.config.text.num_experts_per_tok
        memory.watch(model)

        def forward(name: str) -> torch.Tensor:
            memory.phase, memory.block = "forward", ""
            with memory.tag("activations"):
                loss, _ = model(batch)
            activations[name], entered[name] = memory.live["activations"], memory.entered.copy()
            return loss

        while other:  # what the settings that were not chosen would keep; Offload and its host memory go with the item
            name, text.block_fn = other.popitem()
            visual.block_fn = text.block_fn
            forward(name)
            parallel.reshard(model)
        text.block_fn = visual.block_fn = chosen
        memory.reset()
        traced = min(2, accumulation)  # from the second micro-batch on there are gradients
        for memory.micro_batch in range(traced):
            loss = forward(setting)
            memory.phase = "backward"
            with memory.tag("backward"):
                loss.backward()
            del loss
        (square_sum,) = state.sum(parallel.grad_square_sum(trainable, state))
        parallel.clip_gradients(trainable, square_sum**0.5, max_norm=0.5)
        memory.phase = "optimizer"
        with memory.tag(optimizer_step):
            optimizer.step()
    supervised = len(batch.supervised_index)
    logits = min(model.loss_chunk_size or supervised, supervised)
    largest = max(all_gathers, key=all_gathers.get, default="none")  # a single rank may do without FSDP2
    numbers: Counter[str] = Counter()

    def add_numbers(module: torch.nn.Module, block: str | None, count: int) -> dict[str, list[torch.Tensor]]:
        """Add the numbers of `count` such modules; return the tensors of one, which padding may make larger."""
        parameters = list(module.parameters())
        held = {"parameter_bytes": parameters, "gradient_bytes": [p.grad for p in parameters if p.grad is not None],
                "optimizer_bytes": [t for p in parameters for t in optimizer.state.get(p, {}).values()]}
        numbers.update({"parameters": count * sum(parallel.to_local(p).numel() for p in parameters)})
        numbers.update({key: count * sum(parallel.to_local(t).nbytes for t in held[key]) for key in held})
        for key, collective in (("reduced_gradient_bytes", "reduce-scatter"), ("all_to_all_bytes", "all-to-all")):
            numbers[key] += count * memory.traffic(collective, block) // traced * accumulation
        return held

    add_numbers(model, None, 1)
    numbers["all_gather_bytes"] = memory.traffic("all-gather") // traced * accumulation
    peaks = {moment: parts for moment, (_, parts) in memory.peaks.items()}
    for moment, parts in peaks.items():
        parts["host"] = memory.host_peaks[moment]
    order = list(memory.entered)
    for count, like, after in removed:
        layer, following = model.get_submodule(like), order[order.index(like) + 1]
        kept = {name: at[following] - at[like] for name, at in entered.items()}
        held = add_numbers(layer, like, count)
        gathers = sum(all_gathers.get(f"{like}.{name}".rstrip("."), 0) for name, _ in layer.named_modules())
        numbers["all_gather_bytes"] += count * accumulation * gathers * (1 + (like in memory.in_backward))
        for name in activations:
            activations[name] += count * kept[name]["activations"]
        for (micro_batch, phase, block), parts in peaks.items():
            # Forward runs the removed layers between `after` and the next block, backward in the other direction.
            is_behind = block in order and order.index(block) > order.index(after)
            is_kept = is_behind and phase != "optimizer"
            has_gradients = micro_batch > 0 or phase == "optimizer" or phase == "backward" and not is_behind
            parts[parameters] += count * local_bytes(held["parameter_bytes"])
            parts[optimizer_state] += count * local_bytes(held["optimizer_bytes"])
            gradients = count * local_bytes(held["gradient_bytes"])
            parts[gradient] += gradients * has_gradients
            # FSDP2 keeps what it all-reduces over the replicas until backward ends. The first gradient is that tensor.
            if state.dp_replicate > 1 and phase == "backward" and not is_behind and (micro_batch > 0 or cpu_offload):
                parts["backward"] += gradients
            for kind in ("activations", "host"):
                parts[kind] += count * kept[setting][kind] * is_kept
    peak = max(peaks.values(), key=lambda parts: sum(parts.values()) - parts["host"])
    return {
        **numbers, "host_bytes": max(parts["host"] for parts in peaks.values()),
        "logits_bytes": logits * model.config.text.vocab_size * 4,
        "activation_setting": setting, "activation_bytes": activations,
        "loss_bytes": memory.most["loss"],
        "largest_all_gather": largest, "largest_all_gather_bytes": all_gathers.get(largest, 0),
        "gathered_bytes": memory.most["gathered parameters"],
        "reduce_scatter_bytes": memory.most["reduce-scatter buffers"],
        "peak_bytes": sum(peak.values()) - peak["host"],
        "peak_parts": {kind: n for kind, n in peak.most_common() if n and kind != "host"},
    }


def full_flops(config: Qwen3VLConfig, model: Qwen3VL, removed: list[Removed], batch: data.Batch) -> float:
    """Return the FLOPs of a batch in the full model, from its configuration and a model without the removed layers."""
    adapters = Counter(parallel.adapter_flops(model))
    for count, like, _ in removed:
        adapters.update({name: count * n for name, n in parallel.adapter_flops(model, f"{like}.").items()})
    return step_flops(config, batch.cu_seqlens, batch.grid_thw, len(batch.supervised_index),
                      trainable_components(model), adapters)


def fake_process_group(rank: int, world_size: int) -> None:
    """Make a process group whose collectives do nothing."""
    import torch.distributed._tools.fake_collectives  # noqa: F401  torch 2.7.1 needs it for fake collectives
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)


def predict(args: argparse.Namespace, full_depth: bool = False) -> dict:
    """Return what a step with these flags needs on a rank of --world-size. `full_depth` traces every layer."""
    config = Qwen3VLConfig.from_json(args.init_from_hf_path)
    shallow_config, removed, indexes = (config, [], {}) if full_depth else shallow(config)
    # Of the ranks that share a row, the last one has the most text and so the most logits.
    fake_process_group(min(args.context_parallel_size, args.world_size) - 1, args.world_size)
    ops = kernels_npu.ops = FakeDevice(torch.device("cpu"))  # PyTorch has no fake tensors of a device that is missing
    state = FakeParallelState(ops, cp=args.context_parallel_size, ep=args.expert_parallel_size, fsdp=args.fsdp_size)
    size, accumulation = batch_sizes(args.micro_batch_size, args.global_batch_size, state.dp_size)
    model, _ = build_trainable_model(args, shallow_config)
    total = sum(p.numel() for p in model.parameters())
    total += sum(r.count * sum(p.numel() for p in model.get_submodule(r.like).parameters()) for r in removed)
    settings = model_settings(args)
    setting = "recompute_offload" if settings["offload"] else "recompute" if settings["recompute"] else "none"
    configure_model(model, state, **settings | {"synchronize_per_layer": False})  # which takes no memory
    batch = fake_batch(config, args.seq_length, args.micro_batch_size)
    set_loss_weights(batch, args.loss_type, 1, 1, state)  # traced values have no effect
    flops = accumulation * state.dp_size * full_flops(config, model, removed, batch)
    report = {
        "rank": state.rank, "world_size": state.world_size, "context_parallel_size": state.cp_size,
        "expert_parallel_size": state.ep_size, "fsdp_size": state.fsdp_size,
        "micro_batch_size": args.micro_batch_size, "global_batch_size": size, "micro_batches": accumulation,
        "seq_length": args.seq_length, "images": len(batch.grid_thw), "visual_tokens": len(batch.visual_index),
        "supervised_tokens": len(batch.supervised_index),
        "compute_dtype": str(settings["compute_dtype"]).removeprefix("torch."), "model_parameters": total,
        **trace_step(model, state, batch, accumulation, optimizer_settings(args), removed, setting, args.cpu_offload),
        "flops_per_step": flops, "flops_per_rank": flops / state.world_size,
    }
    state.close()
    return report


def dry_run(args: argparse.Namespace) -> None:
    """Print what a step with these flags needs on a rank of --world-size, and write it as JSON to --save.

    With --plan, print the fastest layouts instead. Raises InputError if --device-memory is too small.
    """
    from tools import planner  # which imports this file

    if args.compile:
        raise UsageError("--compile: a dry run cannot trace compiled blocks: leave it out")
    if args.plan:
        return planner.plan(args)
    one = planner.Planner(args)  # raises for an unknown device
    report = predict(args)
    row = one.evaluate(planner.layout_of(args), exact=True)
    report |= {"assumed_device": one.device_name}
    report |= {key: value for key, value in row.items() if key not in ("flags", "memory_gib")}
    memory = args.device_memory and args.device_memory * 2**30
    report |= {"device_memory_bytes": memory, "fits": report["peak_bytes"] <= memory if memory else None}
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
            + advice(largest, args, Qwen3VLConfig.from_json(args.init_from_hf_path)))


def describe(report: dict) -> str:
    """Return the report of `dry_run` as text: a line for each number, bytes in GiB."""
    lines = ["dry run; it assumes rows of images in the first half and supervised text in the second, and an equal "
             "load of all experts; it leaves out the allocator's rounding, communication libraries and kernels' "
             "workspaces"]
    for key, value in report.items():
        if key == "step_parts_s":
            value = ", ".join(f"{resource} {seconds:.3g}" for resource, seconds in value.items())
        elif isinstance(value, dict):
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
