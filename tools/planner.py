"""Predict the time of a training step, and choose a layout: train.py --dry-run, with --plan.

A layout is evaluated from measured pieces: the blocks of the shallow model of `dry_run`, without FSDP2 and on the meta
device, give activations, kernel times and all-to-all traffic. A formula adds what FSDP2 gathers, reduces and shards.
docs/planner.md has the assumptions.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

import kernels_npu
import parallel
from common import InputError, UsageError
from model import Experts, Qwen3VLConfig
from tools.devices import Device, assumed_device, fused_operations
from tools.dry_run import (
    FakeDevice,
    FakeParallelState,
    MemoryTracker,
    fake_batch,
    fake_positions,
    fake_process_group,
    full_flops,
    predict,
    shallow,
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

EMBEDDING = "model.language_model.embed_tokens"
MICRO_BATCHES = (1, 2, 4, 8)
WORK = ("compute", "memory bandwidth", "cp bytes", "cp calls", "ep bytes", "ep calls")
OPTIMIZER_TRAFFIC = 10  # times the gradients: AdamW moves seven values per parameter, the norm and clipping three


# ---- pieces ---------------------------------------------------------------------------------------------------------


class BeforeBackward(torch.autograd.Function):
    """Return a view of a tensor, and call a function before its gradient goes back."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, action: Callable[[], None], *saved: torch.Tensor) -> torch.Tensor:
        ctx.action = action
        ctx.save_for_backward(*saved)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        ctx.action()
        return grad, *(None for _ in ctx.needs_input_grad[1:])


class Profile(MemoryTracker):
    """Count the memory of tensors on the meta device, and the work of each phase and block."""

    def __init__(self, device: Device):
        super().__init__(None)
        self.device, self.blocks = device, {}
        self.cp_group: str | None = None  # the name of the context-parallel group
        self.in_kernel, self.kernel_flops = False, 0.0  # for an operation that counts as one kernel
        self.inputs: dict[str, int] = {}  # as in `Pieces`
        self.work: Counter[tuple[str, str, str]] = Counter()  # phase, block, resource -> seconds, bytes or calls

    def enter(self, block: str) -> None:
        if self.phase == "backward" and block != self.block:
            for p in self.blocks[self.block].parameters():
                p.grad = None  # FSDP2 has reduced it
        super().enter(block)

    def start_kernel(self) -> None:
        """Count only FLOPs until `end_kernel`: all operations until then are one kernel."""
        self.in_kernel, self.kernel_flops = True, 0.0

    def end_kernel(self, nbytes: int) -> None:
        self.in_kernel = False
        self.count_work(self.kernel_flops, nbytes)

    def count_work(self, flops: float, nbytes: int) -> None:
        """Add the time of a kernel, which either its FLOPs or its memory traffic limit."""
        if self.in_kernel:
            self.kernel_flops += flops
            return
        resource, seconds = self.device.kernel(flops, nbytes)
        self.work[self.phase, self.block, resource] += seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.partition("::")[2]
        if name == "alltoall_base_":
            kind = "cp" if dist.ProcessGroup.unbox(args[2]).group_name == self.cp_group else "ep"
            self.work[self.phase, self.block, f"{kind} bytes"] += args[1].nbytes
            self.work[self.phase, self.block, f"{kind} calls"] += 1
            return out
        inputs, results = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in (args, out))
        if not results or results[0].device.type != "meta" or "empty" in name:
            return out
        storages = {id(t.untyped_storage()) for t in inputs}
        if func._schema.is_mutable or id(results[0].untyped_storage()) not in storages:  # not a view
            is_product = name in ("mm", "bmm", "addmm", "baddbmm")
            flops = 2 * results[0].numel() * inputs[-1].shape[-2] if is_product else 0
            self.count_work(flops, total_bytes(*inputs, *results))
        return out


def total_bytes(*tensors: torch.Tensor) -> int:
    return sum(t.nbytes for t in tensors)


class PlannedDevice(FakeDevice):
    """A fake device that counts the work of its kernels. `fused` operations are one kernel in each direction."""

    def __init__(self, profile: Profile, fused: Collection[str]):
        super().__init__(torch.device("cpu"))
        self.profile = profile
        for name in fused:
            setattr(self, name, functools.partial(self.one_kernel, getattr(self, name)))

    def work(self, flops: float, *tensors: torch.Tensor) -> None:
        self.profile.count_work(flops, total_bytes(*tensors))

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor  # `fake_positions` are there

    def one_kernel(self, run: Callable, x: torch.Tensor, *args):
        """Run an operation of the reference, but count the traffic of its arguments and results only."""
        profile = self.profile
        tensors = [x, *(t for t in args if isinstance(t, torch.Tensor))]
        if x.requires_grad:
            x = BeforeBackward.apply(x, lambda: profile.end_kernel(nbytes), x.new_empty(0))
            last = x.grad_fn  # the last node of the operation's backward
        profile.start_kernel()
        try:
            out = run(x, *args)
        finally:  # recompute ends with an exception, when backward has all that it needs
            profile.in_kernel = False
        first, *others = out if isinstance(out, tuple) else (out,)
        profile.end_kernel(total_bytes(first, *others, *tensors))
        if x.requires_grad:
            nbytes = total_bytes(first, *tensors, *(t for t in tensors if t.requires_grad))

            def start_backward() -> None:  # it must keep no tensor
                _ = last.saved_tensors  # a block that is due for recompute runs now, not in the middle of the kernel
                profile.start_kernel()

            first = BeforeBackward.apply(first, start_backward)
        return (first, *others) if others else first


# ---- layouts --------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    cp: int
    ep: int
    fsdp: int
    micro_batch: int
    recompute: bool
    offload: bool

    def flags(self, world_size: int) -> list[str]:
        flags = ["--context-parallel-size", self.cp, "--expert-parallel-size", self.ep]
        flags += ["--fsdp-size", self.fsdp] if self.fsdp < world_size else []
        flags += ["--micro-batch-size", self.micro_batch, "--recompute", "full" if self.recompute else "none"]
        return [str(flag) for flag in flags] + ["--activation-offload"] * self.offload


class Pieces(NamedTuple):
    """Hold what the blocks of a micro-batch need, whatever the sharding. Bytes exclude parameters."""

    peaks: Counter[tuple[str, str]]  # phase and block -> bytes
    kept: Counter[str]  # block -> bytes of activations until its backward
    inputs: Counter[str]  # block -> bytes of its input if that has a gradient: recompute keeps, and offload copies it
    work: Counter[tuple[str, str, str]]  # as in `Profile`

    def mix(self, other: Pieces, share: float) -> Pieces:
        """Interpolate linearly between two measurements."""
        return Pieces(*(Counter({key: (1 - share) * a[key] + share * b[key] for key in a | b})
                        for a, b in zip(self, other, strict=True)))


class Sharding(NamedTuple):
    """Hold what FSDP2 needs, by block: seconds of collectives and bytes."""

    gather: Counter[str]
    reduce: Counter[str]
    shard: Counter[str]  # bytes of this rank's parameters
    gathered: Counter[str]  # all parameters of a block
    outer: Counter[str]  # those that are not experts of expert parallelism: FSDP2 gathers them first
    reduced: Counter[str]  # the float32 gradients of these
    gradients: Counter[str]  # this rank's shard


class Planner:
    """Evaluate layouts of a model; the flags that are not part of a layout are those of `args`."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device_name, self.device = assumed_device(args)
        self.fused = fused_operations(self.device_name)
        kernels_npu.ops = FakeDevice(torch.device("cpu"))
        self.config = Qwen3VLConfig.from_json(args.init_from_hf_path)
        self.shallow, self.removed, _ = shallow(self.config)
        self.model, _ = build_trainable_model(args, self.shallow)
        make_optimizer(self.model, **optimizer_settings(args))  # raises if every component is frozen
        self.dtype = model_settings(args)["compute_dtype"]
        names = {module: name for name, module in self.model.named_modules()}
        self.order = [*(names[block] for block in parallel.blocks(self.model)), "lm_head"]
        self.counts = Counter(dict.fromkeys(["", EMBEDDING, *self.order], 1))
        for r in self.removed:
            self.counts[r.like] += r.count
        sample = fake_batch(self.config, args.seq_length, 1)
        self.sample_flops = full_flops(self.config, self.model, self.removed, sample)

    @functools.cache  # noqa: B019
    def measure(self, cp: int, ep: int, micro_batch: int, recompute: bool) -> Pieces:
        """Run a micro-batch of the shallow model without FSDP2."""
        args = self.args
        fake_process_group(cp - 1, math.lcm(cp, ep))
        profile = Profile(self.device)
        ops = kernels_npu.ops = PlannedDevice(profile, self.fused)
        try:
            state = FakeParallelState(ops, cp=cp, ep=ep)
            profile.cp_group = state.cp_group.group_name if cp > 1 else None
            model, _ = build_trainable_model(args, self.shallow)
            state.world_size = 1  # `parallelize` applies everything but FSDP2, which one rank in float32 does without
            configure_model(model, state, **model_settings(args) | {
                "compute_dtype": torch.float32, "recompute": recompute, "offload": False, "cpu_offload": False,
                "synchronize_per_layer": False})
            model.to(self.dtype)
            batch = fake_batch(self.config, args.seq_length, micro_batch)
            set_loss_weights(batch, args.loss_type, 1, 1, state)
            shape = batch.pixel_values.shape
            state.device = torch.device("meta")
            batch = parallel.local_batch(replace(batch, pixel_values=torch.zeros(()).expand(shape)), state)
            ops.expert_rows = len(batch.input_ids) * self.config.text.num_experts_per_tok
            with profile, mock.patch("model.patch_positions", functools.partial(fake_positions, "meta")):
                profile.blocks = {"": model.model.visual.patch_embed, **dict(model.named_modules())}
                profile.watch(model)
                for name in self.order[:-1]:
                    model.get_submodule(name).register_forward_pre_hook(
                        lambda _, args, name=name: profile.inputs.update(
                            {name: args[0].nbytes * args[0].requires_grad}))
                for p in model.parameters():
                    profile.count(parallel.to_local(p), "parameters")
                with profile.tag("batch"):
                    pixels = torch.empty(shape, device="meta")
                    batch = replace(batch, pixel_values=pixels[: len(batch.pixel_values)])
                    del pixels
                with profile.tag("activations"):
                    loss, _ = model(batch)
                profile.phase = "backward"
                with profile.tag("backward"):
                    loss.backward()
        finally:
            dist.destroy_process_group()
        entered = profile.entered
        kept = Counter({block: entered[after]["activations"] - entered[block]["activations"]
                        for block, after in itertools.pairwise(self.order)})
        # A DeepStack merger shares its input with the next block.
        inputs = Counter({block: n for block, n in profile.inputs.items() if "deepstack" not in block})
        peaks = Counter({(phase, block): peak - parts["parameters"]
                         for (_, phase, block), (peak, parts) in profile.peaks.items()})
        return Pieces(peaks, kept, inputs, profile.work)

    @functools.cache  # noqa: B019
    def pieces(self, cp: int, ep: int, micro_batch: int, recompute: bool) -> Pieces:
        """Return `measure`, interpolated between few micro-batch sizes and expert-parallel sizes.

        Everything is linear in the tokens. An expert-parallel size above 1 only changes the number of local experts.
        """
        if micro_batch not in (1, MICRO_BATCHES[-1]):
            first, last = (self.pieces(cp, ep, n, recompute) for n in (1, MICRO_BATCHES[-1]))
            return first.mix(last, (micro_batch - 1) / (MICRO_BATCHES[-1] - 1))
        experts = self.config.text.num_experts
        if ep in (1, 2, experts) or experts % 2:
            return self.measure(cp, ep, micro_batch, recompute)
        few, many = (self.measure(cp, n, micro_batch, recompute) for n in (2, experts))
        return few.mix(many, (1 / 2 - 1 / ep) / (1 / 2 - 1 / experts))

    @functools.cache  # noqa: B019
    def sharding(self, ep: int, fsdp: int) -> Sharding:
        experts = [name for name, m in self.model.named_modules() if isinstance(m, Experts) and ep > 1]
        has_adapters = bool(parallel.named_adapters(self.model))
        groups: dict[tuple[str, bool, bool], Counter] = {}
        for name, p in self.model.named_parameters():
            block = next((b for b in (EMBEDDING, *self.order) if name.startswith(b + ".")), "")
            is_expert = any(name.startswith(e + ".") for e in experts)
            full, shard = p.numel() // (ep if is_expert else 1), p.numel() // fsdp
            if not is_expert and not (p.ndim == 3 and any(size % fsdp == 0 for size in p.shape)):
                shard = -(-p.shape[0] // fsdp) * (p.numel() // p.shape[0])  # FSDP2 pads the first dimension
                full = shard * fsdp
            stored = self.dtype.itemsize if has_adapters and not p.requires_grad else 4
            numbers = {"full": full, "stored": stored * shard, "trainable": full * p.requires_grad,
                       "trainable shard": shard * p.requires_grad}
            groups.setdefault((block, is_expert, ".lora." in name), Counter()).update(numbers)
        s, ring = Sharding(*(Counter() for _ in Sharding._fields)), self.device.ring
        for (block, is_expert, _), n in groups.items():
            ranks, stride = (fsdp // ep, ep) if is_expert else (fsdp, 1)
            s.gather[block] += ring(n["full"] * self.dtype.itemsize, ranks, stride)
            s.shard[block] += n["stored"]
            if n["trainable"]:
                s.reduce[block] += ring(4 * n["trainable"], ranks, stride)
                s.reduce[block] += 2 * ring(4 * n["trainable shard"], self.args.world_size // fsdp, fsdp)
            s.gathered[block] += n["full"] * self.dtype.itemsize
            if not is_expert:
                s.outer[block] += n["full"] * self.dtype.itemsize
                s.reduced[block] += 4 * n["trainable"]
            s.gradients[block] += 4 * n["trainable shard"]
        return s

    def total(self, of_blocks: Counter[str]) -> float:
        """Add up what all blocks of the full model have."""
        return sum(self.counts[block] * n for block, n in of_blocks.items())

    def seconds(self, layout: Layout, pieces: Pieces, s: Sharding) -> tuple[Counter[str], Counter[str]]:
        """Return the seconds of a micro-batch by part, and the seconds in which each resource is the bottleneck.

        Kernels, FSDP2's traffic and copies to the host overlap within a block; all-to-alls overlap with nothing. A part
        of a resource that overlaps with kernels is the time that kernels wait for it.
        """
        parts, bottlenecks = Counter(), Counter()
        stays = {"", EMBEDDING, *self.order[-2:]}  # FSDP2 does not gather these a second time
        for block, phase in itertools.product(self.counts, ("forward", "backward")):
            work = {key: self.counts[block] * pieces.work[phase, block, key] for key in WORK}
            kernels = {resource: work[resource] for resource in ("compute", "memory bandwidth")}
            busy = sum(kernels.values())
            is_gathered = phase == "forward" or busy and block not in stays
            traffic = s.gather[block] * is_gathered + s.reduce[block] * (phase == "backward")
            copied = pieces.inputs[block] * layout.offload
            if self.args.cpu_offload:
                copied += s.shard[block] * is_gathered + s.gradients[block] * (phase == "backward")
            overlapped = {"parameter traffic": traffic, "host copies": self.device.host_copy(copied)}
            slowest = max(overlapped, key=overlapped.get)
            longest = self.counts[block] * overlapped[slowest]
            exchange = sum(self.device.all_to_all(work[f"{kind} bytes"], work[f"{kind} calls"], size)
                           for kind, size in (("cp", layout.cp), ("ep", layout.ep)))
            parts.update(kernels | {slowest: max(0.0, longest - busy), "all-to-all": exchange})
            bottlenecks.update(({slowest: longest} if longest > busy else kernels) | {"all-to-all": exchange})
        return parts, bottlenecks

    def peak(self, layout: Layout, pieces: Pieces, s: Sharding, accumulates: bool) -> float:
        """Return the bytes at the peak. The moments are the phases of each block, and the end of the step."""
        order, tied = self.order, self.config.tie_word_embeddings
        static = self.total(s.shard) + 2 * self.total(s.gradients)  # with AdamW's state
        if self.args.world_size == 1 and self.dtype == torch.float32 and not self.args.cpu_offload:  # without FSDP2
            s = s._replace(gathered=Counter(), outer=Counter(), reduced=Counter())
        always = s.gathered[""] + s.gathered[EMBEDDING] * tied
        # FSDP2 keeps what it all-reduces over the replicas until backward ends. The first gradient is that tensor.
        has_copies = layout.fsdp < self.args.world_size and (accumulates or self.args.cpu_offload)
        on_device = not self.args.cpu_offload  # otherwise gradients leave the device at once
        all_gradients = self.total(s.gradients)
        moments = [
            all_gradients * on_device,
            all_gradients * (on_device + has_copies) + s.gathered[EMBEDDING] + s.reduced[EMBEDDING],
        ]
        positions = [(order.index(r.after), r) for r in self.removed]
        for (phase, block), peak in pieces.peaks.items():
            i = order.index(block) if block else -1
            previous, following = order[max(0, i - 1)], order[min(i + 1, len(order) - 1)]
            buffers = always + s.gathered[block]
            if phase == "forward" and block == order[-1]:  # no later gather frees the buffer of the last one
                buffers += s.gathered[previous] + s.gathered[previous if tied else block]
            elif phase == "forward":
                buffers += s.gathered[following]
            elif block == order[-1]:
                buffers += s.gathered[previous]
            else:
                buffers += s.outer[previous] * (i > 0)
                buffers += s.reduced[EMBEDDING if tied and following == order[-1] else following]
            kept = -sum(pieces.inputs[b] for b in order[: max(0, i - 1)]) * layout.offload
            gradients = sum(s.gradients[b] for b in order[i + 1 :]) if phase == "backward" else 0
            for position, r in positions:
                if i > position:
                    kept += r.count * pieces.kept[r.like] * (not layout.offload)
                elif phase == "backward":
                    gradients += r.count * s.gradients[r.like]
            held = (all_gradients if accumulates else gradients) * on_device + gradients * has_copies
            moments.append(peak + buffers + kept + held)
        return static * on_device + max(moments)

    def evaluate(self, layout: Layout, exact: bool = False) -> dict:
        """Return a layout's row of plan.json. `exact` measures the layout's own pieces."""
        world = self.args.world_size
        size, accumulation = batch_sizes(layout.micro_batch, self.args.global_batch_size, world // layout.cp)
        pieces = (self.measure if exact else self.pieces)(layout.cp, layout.ep, layout.micro_batch, layout.recompute)
        s = self.sharding(layout.ep, layout.fsdp)
        parts, bottlenecks = self.seconds(layout, pieces, s)
        resource, adamw = self.device.elementwise(OPTIMIZER_TRAFFIC * self.total(s.gradients), self.args.cpu_offload)
        for seconds in (parts, bottlenecks):
            seconds[resource] += adamw / accumulation
        step = accumulation * sum(parts.values())
        return {
            "flags": layout.flags(world),
            "memory_gib": self.peak(layout, pieces, s, accumulation > 1) / 2**30,
            "step_time_s": step,
            "tokens_per_s_per_device": size * self.args.seq_length / step / world,
            "mfu": size * self.sample_flops / (step * world * self.device.tflops * 1e12),
            "bound": max(bottlenecks, key=bottlenecks.get),
            "step_parts_s": {part: accumulation * n for part, n in parts.items()},
        }

    def layouts(self) -> list[Layout]:
        """Return all layouts that divide."""
        world, text, vision = self.args.world_size, self.config.text, self.config.vision
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        heads, kv_heads = math.gcd(text.num_attention_heads, vision.num_heads), text.num_key_value_heads
        cps = [n for n in divisors if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        samples = self.args.global_batch_size
        return [
            Layout(cp, ep, fsdp, micro, recompute, offload)
            for cp, ep, fsdp, micro in itertools.product(cps, divisors, divisors, MICRO_BATCHES)
            for recompute, offload in ((False, False), (True, False), (True, True))
            if fsdp % ep == 0 and (ep == 1 or text.num_experts and text.num_experts % ep == 0)
            and not (samples and samples % (micro * world // cp))
        ]


def layout_of(args: argparse.Namespace) -> Layout:
    settings = model_settings(args)
    return Layout(args.context_parallel_size, args.expert_parallel_size, args.fsdp_size or args.world_size,
                  args.micro_batch_size, settings["recompute"], settings["offload"])


def with_layout(args: argparse.Namespace, layout: Layout) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | {
        "context_parallel_size": layout.cp, "expert_parallel_size": layout.ep, "fsdp_size": layout.fsdp,
        "micro_batch_size": layout.micro_batch, "recompute": "full" if layout.recompute else "none",
        "activation_offload": layout.offload})


def rank_layouts(planner: Planner, memory_gib: float) -> list[tuple[Layout, dict]]:
    """Return the layouts that fit the memory of a device with their rows of plan.json, the fastest first."""
    rows, too_large = [], set()
    for layout in planner.layouts():  # by micro-batch size: a larger one needs more memory
        key = layout._replace(micro_batch=0)
        row = None if key in too_large else planner.evaluate(layout)
        if row and row["memory_gib"] <= memory_gib:
            rows.append((layout, row))
        else:
            too_large.add(key)
    return sorted(rows, key=lambda pair: -pair[1]["tokens_per_s_per_device"])


def plan(args: argparse.Namespace) -> None:
    """Print the ten fastest layouts that fit the memory of a device, and write all that fit to plan.json in --save."""
    planner = Planner(args)
    if not planner.layouts():
        raise UsageError(f"--global-batch-size {args.global_batch_size}: no layout of {args.world_size} ranks divides "
                         f"it: give a multiple of {args.world_size}")
    memory = args.device_memory or planner.device.memory_gib
    ranked = rank_layouts(planner, memory)
    while ranked and predict(with_layout(args, ranked[0][0]))["peak_bytes"] > memory * 2**30:
        del ranked[0]  # the pieces were too optimistic
    if not ranked:
        raise InputError(f"--device-memory {memory:g}: no layout fits: give a larger --world-size, or a smaller "
                         "--seq-length or --loss-chunk-size")
    print(f"{len(ranked)} layouts fit {memory:g} GiB; the fastest on {args.world_size} x "
          f"{planner.device_name} (docs/planner.md has the assumptions):")
    print(f"{'CP':>3} {'EP':>3} {'FSDP':>5} {'batch':>5}  {'activations':12} {'memory':>10} {'step':>9} "
          f"{'tokens/s':>8} {'MFU':>5}  bound")
    for layout, row in ranked[:10]:
        setting = "offload" if layout.offload else "recompute" if layout.recompute else "keep"
        print(f"{layout.cp:3} {layout.ep:3} {layout.fsdp:5} {layout.micro_batch:5}  {setting:12} "
              f"{row['memory_gib']:6.1f} GiB {row['step_time_s']:7.2f} s {row['tokens_per_s_per_device']:8.0f} "
              f"{row['mfu']:5.2f}  {row['bound']}")
    print(" ".join(ranked[0][1]["flags"]))
    if args.save:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        rows = [{key: value for key, value in row.items() if key != "step_parts_s"} for _, row in ranked]
        (Path(args.save) / "plan.json").write_text(json.dumps(rows, indent=1) + "\n")
