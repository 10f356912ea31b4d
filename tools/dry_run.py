"""train.py --dry-run: what a step takes from a rank, found out in one process without weights or an accelerator.

The real model, sharded by the real `parallelize`, takes a real step with tensors that have no memory, among ranks that
are not there (PyTorch's fake tensors and fake process group), while a tracker adds up what it would have held.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import weakref
from collections import Counter
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
from model import Qwen3VL, Qwen3VLConfig, plain_block, trainable_components
from train import batch_sizes, make_optimizer, prepare, set_loss_weights


class FakeDevice(kernels_npu.Accelerator):
    """An accelerator that is not there: its defaults, and even routing for counts that nobody knows."""

    expert_rows = 0  # copies of its tokens that a rank sends to experts, and as many that it gets

    def attention_implementation(self, implementation: str | None = None):
        return self.attention_eager if implementation == "eager" else self.attention_sdpa  # flash takes sdpa's memory

    def to_host(self, counts: torch.Tensor) -> list:
        n = counts.shape[-1]
        even = [self.expert_rows // n + (i < self.expert_rows % n) for i in range(n)]
        return even if counts.ndim == 1 else [even] * len(counts)

    def grouped_matmul(self, x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return GroupedMatmul.apply(x, weight)


class GroupedMatmul(torch.autograd.Function):
    """What an accelerator's kernel takes: one result, and one gradient of each argument, for any number of experts."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x.new_empty(len(x), weight.shape[2])

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        return tuple(torch.empty_like(t) if needed else None for t, needed in pairs)


class FakeParallelState(parallel.ParallelState):
    """All ranks have what this one has."""

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        return [self.world_size * (1.0 if isinstance(v, torch.Tensor) else v) for v in values]


class MemoryTracker(TorchDispatchMode):
    """Bytes of the storages that are alive, each under the `kind` that was set when it came to be, and what
    collectives moved. Pinned memory is the host's, and no part of the peak."""

    def __init__(self, fake_mode: FakeTensorMode):
        super().__init__()
        self.fake_mode, self.kind = fake_mode, "other"
        self.known: dict[int, tuple] = {}  # by a storage's id: a weak reference, its kind, its bytes
        self.live, self.most, self.moved = Counter(), Counter(), Counter()  # bytes, by kind and by collective
        self.peak, self.at_peak = 0, Counter()

    def reset(self) -> None:
        """Peaks and traffic count from here."""
        self.most, self.moved = self.live.copy(), Counter()
        self.peak, self.at_peak = self.total(), self.live.copy()

    def total(self) -> int:
        return sum(self.live.values()) - self.live["host"]

    @contextlib.contextmanager
    def of(self, kind: str):
        """What comes to be in here is of this kind."""
        before, self.kind = self.kind, kind
        yield
        self.kind = before

    def count(self, tensor: torch.Tensor, kind: str) -> None:
        """Takes note of a tensor's storage, or of its new kind or size."""
        storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else tensor
        key, size = id(storage), storage.nbytes()
        reference = self.forget(key) or weakref.ref(storage, lambda _: self.forget(key))
        self.known[key] = reference, kind, size
        self.live[kind] += size
        self.most[kind] = max(self.most[kind], self.live[kind])
        if (total := self.total()) > self.peak:
            self.peak, self.at_peak = total, self.live.copy()

    def forget(self, key: int) -> weakref.ref | None:
        reference, kind, size = self.known.pop(key, (None, self.kind, 0))
        self.live[kind] -= size
        return reference

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again with the local tensors
        out = func(*args, **(kwargs or {}))
        kind = "host" if kwargs and kwargs.get("pin_memory") else self.kind
        for t in out if isinstance(out, (tuple, list)) else (out,):
            ours = isinstance(t, FakeTensor) and t.fake_mode is self.fake_mode  # DTensor has one for working out shapes
            if ours and id(t.untyped_storage()) not in self.known:
                self.count(t, kind)
        if func is torch.ops.c10d._allgather_base_.default:
            self.count(args[0], "gathered parameters")
            self.moved["all-gather"] += args[0].nbytes
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.count(args[1], "reduce-scatter buffers")
        elif func is torch.ops.c10d.alltoall_base_.default:
            self.moved["all-to-all"] += args[1].nbytes
        return out

    def __enter__(self):
        # FSDP2 takes and frees the memory of gathered parameters by this, which no mode sees
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


def fake_batch(args: argparse.Namespace, config: Qwen3VLConfig) -> data.Batch:
    """--micro-batch-size rows of --seq-length tokens: pictures of 1024 tokens in the first half (one that fits where
    that is shorter), then text, all of it supervised. The pixels are on the meta device."""
    length, merge = args.seq_length, config.vision.spatial_merge_size
    half = max(1, length // 2)
    grid = torch.tensor([[1, 32 * merge, 32 * merge]] * (half // 1024) or [[1, merge, half * merge]])
    patches = int(grid.prod(1).sum())
    visual = patches // merge**2
    labels = torch.full((length,), data.IGNORE)
    labels[visual - 1 : -1] = 0
    sample = data.Sample(
        input_ids=torch.zeros(length, dtype=torch.int64), labels=labels, visual_index=torch.arange(visual),
        position_ids=torch.arange(length).expand(3, -1), grid_thw=grid, source="", truncated=False,
        pixel_values=torch.empty(patches, config.vision.patch_dim, device="meta"),
    )
    return data.collate([sample] * args.micro_batch_size)


def trace_step(
    args: argparse.Namespace, model: Qwen3VL, ranks: parallel.ParallelState, batch: data.Batch, accumulation: int
) -> dict[str, int | str | dict]:
    """A step of a prepared model with tensors that have no memory -> the numbers of `dry_run`."""
    text, visual, ops = model.model.language_model, model.model.visual, kernels_npu.ops
    chosen, activations, all_gathers = text.block_fn, {}, {}
    setting = "none" if chosen is plain_block else "recompute_offload" if args.activation_offload else "recompute"
    other = {"none": plain_block, "recompute": parallel.recompute_block, "recompute_offload": parallel.Offload(ops)}
    del other[setting]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake_mode, MemoryTracker(fake_mode) as memory:
        with memory.of("parameters"):
            model.to_empty(device=ranks.device)
        optimizer = make_optimizer(args, model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        with memory.of("optimizer state"):  # which all steps but the first find there
            for p in trainable:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
        for p in trainable:
            p.register_post_accumulate_grad_hook(lambda p: memory.count(parallel.to_local(p.grad), "gradients"))
        for name, module in model.named_modules():
            if isinstance(module, parallel.FSDPModule):
                memory.reset()
                with memory.of("parameters"):  # the first time, FSDP2 pads them
                    module.unshard()
                    module.reshard()
                all_gathers[name or "the root's own"] = memory.moved["all-gather"]
        with memory.of("batch"):
            batch = replace(batch, pixel_values=torch.empty_like(batch.pixel_values, device=ranks.device))
            batch = ranks.take(batch)
        ops.expert_rows = len(batch.input_ids) * model.config.text.num_experts_per_tok
        model.lm_head.register_forward_pre_hook(lambda *_: setattr(memory, "kind", "loss"))
        model.lm_head.register_forward_hook(lambda *_: setattr(memory, "kind", "activations"))

        def forward(name: str) -> torch.Tensor:
            with memory.of("activations"):
                loss, _ = model(batch)
            activations[name] = memory.live["activations"]
            return loss

        while other:  # what the settings that were not chosen would keep
            name, text.block_fn = other.popitem()
            visual.block_fn = text.block_fn
            forward(name)
            parallel.reshard(model)
        text.block_fn = visual.block_fn = chosen
        memory.reset()
        traced = min(2, accumulation)  # from the second micro-batch on, there are gradients
        for _ in range(traced):
            loss = forward(setting)
            with memory.of("backward"):
                loss.backward()
            del loss
        shards = [parallel.to_local(p) for p in model.parameters()]
        gradients = sum(parallel.to_local(p.grad).nbytes for p in trainable)
        parallel.clip_grad_norm(trainable, args.clip_grad, ranks)
        with memory.of("optimizer step"):
            optimizer.step()
    supervised = len(batch.supervised_index)
    logits = min(args.loss_chunk_size or supervised, supervised)
    largest = max(all_gathers, key=all_gathers.get, default="none")  # on one rank there may be no FSDP2
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
        **{f"{kind.replace('-', '_')}_bytes": memory.moved[kind] // traced * accumulation
           for kind in ("all-gather", "all-to-all")},
        "host_bytes": memory.most["host"], "peak_bytes": memory.peak,
        "peak_parts": {kind: n for kind, n in memory.at_peak.most_common() if n and kind != "host"},
    }


def dry_run(args: argparse.Namespace) -> None:
    """Prints what a step with these flags takes from a rank of --world-size, and writes it as JSON.

    Raises InputError if --device-memory does not hold it.
    """
    import torch.distributed._tools.fake_collectives  # noqa: F401  torch 2.7.1 knows fake collectives by it
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = Qwen3VLConfig.from_json(args.init_from_hf_path)
    # of the ranks that share a row the last, which has the most text, and so the most logits
    rank = min(args.context_parallel_size, args.world_size) - 1
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=args.world_size)
    ops = kernels_npu.ops = FakeDevice(torch.device("cpu"))  # PyTorch has no fake tensors of a device it lacks
    ranks = FakeParallelState(ops, cp=args.context_parallel_size, ep=args.expert_parallel_size, fsdp=args.fsdp_size)
    ranks.backend_averages = False  # nobody answered, and torch 2.7.1 has no replicas on a CPU
    if args.compile:
        raise UsageError("--compile: a dry run cannot trace compiled blocks: leave it out")
    size, accumulation = batch_sizes(args, ranks.dp_size)
    with torch.device("meta"):
        model = Qwen3VL(config)
    total = sum(p.numel() for p in model.parameters())
    dtype = args.compute_dtype or ops.compute_dtype
    prepare(args, model, ranks, dtype)
    batch = fake_batch(args, config)
    flops = set_loss_weights([batch] * accumulation, args.loss_type, config, ranks, trainable_components(model)).flops
    report = {
        "rank": ranks.rank, "world_size": ranks.world, "context_parallel_size": ranks.cp_size,
        "expert_parallel_size": ranks.ep_size, "fsdp_size": ranks.world // ranks.replicas,
        "micro_batch_size": args.micro_batch_size, "global_batch_size": size, "micro_batches": accumulation,
        "seq_length": args.seq_length, "pictures": len(batch.grid_thw), "visual_tokens": len(batch.visual_index),
        "supervised_tokens": len(batch.supervised_index), "compute_dtype": str(dtype).removeprefix("torch."),
        "model_parameters": total, **trace_step(args, model, ranks, batch, accumulation),
        "flops_per_step": flops, "flops_per_rank": flops / ranks.world,
    }
    memory = args.device_memory and args.device_memory * 2**30
    report |= {"device_memory_bytes": memory, "fits": report["peak_bytes"] <= memory if memory else None}
    ranks.close()
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
            f"{gib(report['peak_bytes'])}; the largest part of it is {largest}, {gib(parts[largest])}: give "
            + remedy(largest, args, config))


def describe(report: dict) -> str:
    """`dry_run`'s numbers for a reader: a line each, bytes in GiB."""
    lines = ["dry run; it assumes rows whose first half are pictures, then text, all of it supervised, and equally "
             "busy experts; left out: the allocator's rounding, communication libraries, what kernels use inside"]
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


def remedy(part: str, args: argparse.Namespace, config: Qwen3VLConfig) -> str:
    """Flags that make a part of the peak smaller."""
    if part in ("parameters", "gradients", "optimizer state"):
        return "a larger --fsdp-size" if args.fsdp_size else "a larger --world-size"
    if part == "loss":
        return "a smaller --loss-chunk-size"
    first = "a larger --expert-parallel-size, " * bool(config.text.num_experts)
    if part == "activations":
        recompute = args.recompute == "none"
        first = "--recompute full, " if recompute else "--activation-offload, " * (not args.activation_offload)
    return first + "a larger --context-parallel-size, or a smaller --seq-length or --micro-batch-size"
