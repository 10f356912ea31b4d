"""Ranks as a grid, and what is done to a built model from outside: freezing, expert and context parallelism, recompute
and offload, FSDP2, gradient clipping.

Nothing here is called by `model.py`: the seams that it documents are replaced, and FSDP2 hooks onto its modules, so
that the same forward runs on one process and on many.

The grid: neighbouring ranks share a sample (context parallel) and a layer's experts (expert parallel); the two overlap.
Every rank holds a shard of every other parameter, or, with a smaller --fsdp-size, each run of that many ranks does.
"""
from __future__ import annotations

import bisect
import functools
import itertools
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import kernels_npu
from common import PeerError, UsageError
from kernels_npu import Torch
from model import Experts, Qwen3VL, TextAttention, VisionAttention, component_of, full_tensor_and_offset, run_experts

# ---- ranks ---------------------------------------------------------------------------------------------------------


def run_synced(action: Callable, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"):
    """Run `action` on every rank of `group` and return this rank's result.

    If it raises on any rank, every rank raises: the lowest failing rank its own error, which it reports, the others
    PeerError. So no rank waits in a collective that a failed rank never joins. `device` is the group's.
    """
    result = error = None
    try:
        result = action()
    except Exception as e:
        error = e
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        if error is not None:
            raise error
        return result
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    first_failed = torch.tensor(world_size if error is None else rank, dtype=torch.int32, device=device)
    dist.all_reduce(first_failed, dist.ReduceOp.MIN, group)
    if first_failed.item() == rank:
        error.only_on_this_rank = True
        raise error
    if first_failed.item() < world_size:
        raise PeerError
    return result


class ParallelState:
    """This process among all of them. `dp_rank` / `dp_size`: which share of the rows it reads, of how many; the
    `cp_size` ranks of one share split each of its batches among them."""

    def __init__(self, ops: Torch, timeout_minutes: float = 10, *, cp: int = 1, ep: int = 1, fsdp: int | None = None):
        """Joins the process group that torchrun describes in the environment; without torchrun, a group of one. A group
        that is there already is taken (the dry run's).

        cp, ep: context- and expert-parallel size; fsdp: ranks that parameters are sharded over (None: all), replicated
        over the rest. Raises UsageError for sizes that do not divide.
        """
        self.timeout = timeout = timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ and not dist.is_initialized():
            try:
                dist.init_process_group(ops.distributed_backend, timeout=timeout)
            except ValueError as e:
                raise UsageError(f"the environment has RANK, and not all that torchrun sets ({e}): start this with "
                                 "torchrun, or unset RANK") from e
        elif not dist.is_initialized():
            dist.init_process_group(
                ops.distributed_backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1
            )
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        fsdp = fsdp or self.world
        for flag, size, whole, of in (
            ("context-parallel-size", cp, self.world, "the number of ranks"),
            ("fsdp-size", fsdp, self.world, "the number of ranks"),
            ("expert-parallel-size", ep, fsdp, "the ranks that parameters are sharded over"),
        ):
            if whole % size:
                fitting = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
                raise UsageError(f"--{flag} {size} does not divide {whole}, {of}: give one of {fitting}")
        self.cp_size, self.ep_size, self.replicas = cp, ep, self.world // fsdp
        self.cp_rank, self.dp_rank, self.dp_size = self.rank % cp, self.rank // cp, self.world // cp
        self.device = ops.device
        self.current_sources: list[str] = []  # where the rows of the latest batch came from, to be told if it fails

        names = ("replicate", "shard")[self.replicas == 1 :]
        self.mesh = self._grid((self.replicas, fsdp)[self.replicas == 1 :], names)
        if cp > 1:
            self.cp_group = self._grid((self.dp_size, cp), ("dp", "cp")).get_group("cp")
        if ep > 1:  # one mesh with a name for each axis: torch 2.7.1 takes no other
            experts = self._grid((self.replicas, fsdp // ep, ep)[self.replicas == 1 :], (*names, "ep"))
            self.ep_mesh, self.expert_mesh = experts["ep"], experts[names]

    def _grid(self, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        """All ranks as a mesh. `init_device_mesh` would give its groups a timeout of PyTorch's own."""
        if len(shape) == 1:
            return DeviceMesh.from_group(dist.group.WORLD, self.device.type, mesh_dim_names=names)
        mesh = torch.arange(self.world).view(shape)
        lines = [mesh.movedim(dim, -1).flatten(0, -2).tolist() for dim in range(mesh.ndim)]
        groups = [dist.new_subgroups_by_enumeration(each, timeout=self.timeout)[0] for each in lines]
        return DeviceMesh.from_group(groups, self.device.type, mesh, mesh_dim_names=names)

    @functools.cached_property
    def backend_averages(self) -> bool:
        """Whether ReduceOp.AVG is one: torch 2.7.1 with gloo takes it for a sum, silently. All ranks ask at once."""
        one = torch.empty(1, device=self.device)
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in 2.13
        reduce_scatter(one, torch.ones(self.world, device=self.device), op=dist.ReduceOp.AVG)
        return one.item() == 1

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value summed over all ranks, in float64: one small all-gather, as HCCL cannot reduce float64."""
        own = torch.tensor([float(v) for v in values], dtype=torch.float64)
        if self.world == 1:
            return own.tolist()
        everyones = [torch.empty_like(own, device=self.device) for _ in range(self.world)]
        dist.all_gather(everyones, own.to(self.device))
        return torch.stack(everyones).cpu().sum(0).tolist()

    def sum_over_dp(self, *values: float) -> list[float]:
        """Sums of what each rank has counted in the rows that it reads, each row counted once."""
        return [value / self.cp_size for value in self.sum(*values)]

    def take(self, batch):
        """This rank's part of a `data.Batch`, on its device: a run of the tokens and, so that each has as much to do,
        an equal run of the patches, whose features `exchange_features` then brings to their tokens' ranks."""
        self.current_sources = batch.sources
        if self.cp_size > 1:
            bounds = _bounds(len(batch.input_ids), self.cp_size)
            begin, end = bounds[self.cp_rank : self.cp_rank + 2]
            visual, supervised = batch.visual_index.tolist(), batch.supervised_index.tolist()
            first, last = (bisect.bisect_left(supervised, at) for at in (begin, end))
            owned = [bisect.bisect_left(visual, at) for at in bounds]  # of which visual tokens the ranks hold the token
            made = _bounds(max(1, len(visual)), self.cp_size)  # and of which the patches; without any, of a dummy
            patches, tokens = (slice(*b[self.cp_rank : self.cp_rank + 2]) for b in (made, owned))
            per_token = len(batch.pixel_values) // max(1, len(visual))
            batch = replace(
                batch, input_ids=batch.input_ids[begin:end], labels=batch.labels[begin:end],
                position_ids=batch.position_ids[:, begin:end], loss_weights=batch.loss_weights[begin:end],
                supervised_index=batch.supervised_index[first:last] - begin,
                visual_index=batch.visual_index[tokens] - begin, local_visual_tokens=patches,
                feature_splits=(_overlaps(patches, owned), _overlaps(tokens, made)),
                pixel_values=batch.pixel_values[per_token * patches.start : per_token * patches.stop],
            )
        return batch.to(self.device)

    def run_synced(self, action: Callable):
        """Runs `action` on every rank and returns its result. If a person's mistake ends it on one, all ranks end: the
        first at fault raises the error, the others PeerError, and none waits for a collective that will not come."""
        return run_synced(action, device=self.device)

    def report_alive(self) -> None:
        """For `silent`: every rank does it whose collective broke off."""
        dist.distributed_c10d._get_default_store().set(f"alive/{self.rank}", "")

    def unresponsive_ranks(self) -> list[int]:
        """After a collective that broke off: the ranks that give no sign of life."""
        self.report_alive()
        time.sleep(5)  # others come a little later
        store = dist.distributed_c10d._get_default_store()
        return [rank for rank in range(self.world) if not store.check([f"alive/{rank}"])]

    def close(self) -> None:
        # Gloo's threads let go of the last collective's tensors, for which they need the interpreter. Destroying the
        # group holds on to that while it waits for them: so first they get their turn.
        time.sleep(0.05)
        dist.destroy_process_group()


def _bounds(total: int, ranks: int) -> list[int]:
    """Where each rank's run of `total` things begins, and the end: as even as can be, the first ranks' one longer."""
    return [rank * (total // ranks) + min(rank, total % ranks) for rank in range(ranks + 1)]


def _overlaps(run: slice, bounds: list[int]) -> list[int]:
    """How much of a run lies in each rank's."""
    return [max(0, min(run.stop, end) - max(run.start, begin)) for begin, end in itertools.pairwise(bounds)]


class AllToAll(torch.autograd.Function):
    """Rows [N, ...] to the ranks of a group: the first `send[0]` to rank 0, the next `send[1]` to rank 1, ...; returns
    the `receive[0]` that come from rank 0, then rank 1's, ... Backward sends the gradients the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.way_back = receive, send, group
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return AllToAll.apply(grad, *ctx.way_back), None, None, None


# ---- context parallel ----------------------------------------------------------------------------------------------


def ulysses(attention: Callable[..., Tensor], unit: int, ranks: ParallelState) -> Callable[..., Tensor]:
    """The `attention` seam with DeepSpeed-Ulysses (arXiv:2309.14509): each rank comes with its run of the rows and all
    heads, attends over the whole rows with its share of the heads, and leaves with its run of the result.

    unit: rows that are never parted (a visual token's patches). Key-value heads fewer than ranks are repeated.
    """
    size, group = ranks.cp_size, ranks.cp_group

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool) -> Tensor:
        bounds = _bounds(cu_seqlens[-1] // unit, size)
        everyones = [unit * (end - begin) for begin, end in itertools.pairwise(bounds)]
        mine = [len(q)] * size
        if k.shape[1] < size:
            k, v = (t.repeat_interleave(size // k.shape[1], dim=1) for t in (k, v))
        heads = [t.unflatten(1, (size, -1)) for t in (q, k, v)]  # [rows, ranks, heads of a rank, d]
        rows = torch.cat(heads, dim=2).transpose(0, 1).flatten(0, 1)
        rows = AllToAll.apply(rows, mine, everyones, group)  # [all rows, heads of this rank (q, k, v), d]
        out = attention(*rows.split([t.shape[2] for t in heads], dim=1), cu_seqlens, causal)
        out = AllToAll.apply(out, everyones, mine, group)
        return out.unflatten(0, (size, len(q))).transpose(0, 1).flatten(1, 2)

    return attend


def exchange_features(ranks: ParallelState, features: list[Tensor], batch) -> list[Tensor]:
    """The `exchange_features` seam: visual features [its share of them, D] each, to their tokens' ranks."""
    moved = AllToAll.apply(torch.cat(features, dim=1), *batch.feature_splits, ranks.cp_group)
    return list(moved.chunk(len(features), dim=1))


def _all_reduce_expert_counts(
    ranks: ParallelState, module: nn.Module, args: tuple, output: tuple[Tensor, list[Tensor]]
):
    """A hook on the text decoder: how many tokens chose each expert is counted over a whole sample, for the auxiliary
    loss. The probabilities beside it stay this rank's: the ranks' losses are summed anyway."""
    hidden_states, router_stats = output
    if not router_stats:
        return output
    assigned = torch.stack([stats[0] for stats in router_stats]).detach()
    dist.all_reduce(assigned, group=ranks.cp_group)
    return hidden_states, [torch.stack((a, stats[1])) for a, stats in zip(assigned, router_stats, strict=True)]


def _context_parallel(model: Qwen3VL, ranks: ParallelState) -> None:
    text, vision = model.config.text, model.config.vision

    def fits(n: int) -> bool:
        heads, groups = text.num_attention_heads, text.num_key_value_heads
        return not (heads % n or vision.num_heads % n or groups % n and n % groups)

    if not fits(ranks.cp_size):
        fitting = ", ".join(str(n) for n in range(1, ranks.world + 1) if ranks.world % n == 0 and fits(n))
        raise UsageError(f"--context-parallel-size {ranks.cp_size} cannot share out {text.num_attention_heads} heads, "
                         f"{text.num_key_value_heads} key-value heads and {vision.num_heads} vision heads: give one of "
                         f"{fitting}")
    for module in model.modules():
        if isinstance(module, TextAttention):
            module.attention = ulysses(module.attention, 1, ranks)
        elif isinstance(module, VisionAttention):
            module.attention = ulysses(module.attention, vision.spatial_merge_size**2, ranks)
    model.exchange_features = functools.partial(exchange_features, ranks)
    model.model.language_model.register_forward_hook(functools.partial(_all_reduce_expert_counts, ranks))


# ---- expert parallel -----------------------------------------------------------------------------------------------


def expert_parallel_forward(
    group: dist.ProcessGroup, x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: DTensor, down: DTensor
) -> Tensor:
    """The `run_experts` seam with expert parallelism (GShard, arXiv:2006.16668), no token dropped: the copies of the
    tokens go to the ranks of their experts, through `model.run_experts` there, and come back."""
    ops, size = kernels_npu.ops, dist.get_world_size(group)
    rows, where, counts = ops.moe_permute(x, expert_ids, gate_up.shape[0])
    theirs = torch.empty_like(counts)  # [ranks, experts of this rank]: rows that each will send
    dist.all_to_all_single(theirs, counts, group=group)
    both = torch.stack((counts, theirs)).view(2, size, -1)
    send, receive = ops.to_host(both.sum(-1))  # the one wait for the device in a layer: lengths must be known here
    rows = AllToAll.apply(rows, send, receive, group)
    gate_up, down = gate_up.to_local(), down.to_local()
    local_ids = torch.arange(len(gate_up), device=x.device).repeat(size)
    local_ids = local_ids.repeat_interleave(both[1].flatten(), output_size=len(rows))[:, None]
    rows = run_experts(rows, local_ids, torch.ones_like(local_ids, dtype=weights.dtype), gate_up, down)
    return ops.moe_unpermute(AllToAll.apply(rows, receive, send, group), where, weights)


def _expert_parallel(model: Qwen3VL, ranks: ParallelState) -> None:
    """Leaves each rank its experts: the parameters become DTensors, split over the ranks of the `ep` axis."""
    num_experts, size = model.config.text.num_experts, ranks.ep_size
    if not num_experts or num_experts % size:
        fitting = ", ".join(str(n) for n in range(1, ranks.world + 1) if ranks.world % n == 0 == num_experts % n)
        has = f"has {num_experts} experts: give one of {fitting}" if num_experts else "has no experts: leave it out"
        raise UsageError(f"--expert-parallel-size {size}: the model {has}")
    at = ranks.ep_mesh.get_local_rank()
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        for name, p in list(experts.named_parameters()):
            own = p.detach().chunk(size)[at].clone()
            dtensor = DTensor.from_local(own, ranks.ep_mesh, [Shard(0)], run_check=False)
            setattr(experts, name, nn.Parameter(dtensor, requires_grad=p.requires_grad))
        experts.run_experts = functools.partial(expert_parallel_forward, ranks.ep_mesh.get_group())


# ---- freezing, recompute, offload ----------------------------------------------------------------------------------


def freeze(model: Qwen3VL, towers: set[str]) -> None:
    """Stops the training of every parameter of the named towers (`model.COMPONENTS`)."""
    for name, p in model.named_parameters():
        p.requires_grad_(component_of(name) not in towers)


def recompute_block(block: nn.Module, *args):
    """The `block_fn` seam with recompute: backward runs the block again instead of keeping what is inside it.

    Top-k's result is kept: in a second run, rounding could send a token to other experts than the first forward did.
    """
    if not torch.is_grad_enabled():
        return block(*args)
    keep_routing = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.topk.default])
    return checkpoint(
        block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=keep_routing, determinism_check="none"
    )


class _Input:
    """A block's input: on the device until the next block begins, on the host until its own backward comes near."""

    def __init__(self, x: Tensor, before: _Input | None, pinned: bool):
        self.on_device, self.before = x.detach(), before
        self.on_host = torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned)
        self.device, self.copied = x.device, None


class Offload:
    """The `block_fn` seam with recompute whose one kept tensor, the block's input, waits on the host for backward.

    Copies run on a stream of their own: out while the block computes, back while the block after it does. So the device
    holds two inputs at most: in forward the running block's and the one that it makes for the next, in backward the
    running block's and the one that comes after.
    """

    def __init__(self, ops: Torch):
        self.streams = torch.get_device_module(ops.device)
        self.side, self.pinned = self.streams.Stream(), ops.is_accelerator
        self.last: _Input | None = None  # of the block that runs, in forward

    def __call__(self, block: nn.Module, *args):
        if not torch.is_grad_enabled():
            return block(*args)
        with saved_tensors_hooks(self._pack, self._unpack):  # all that a checkpoint saves is its tensor arguments
            return recompute_block(block, *args)

    def _pack(self, x: Tensor) -> Tensor | _Input:
        if not x.requires_grad:  # rotary tables, which all blocks share
            return x
        if self.last and self.last.on_device is not None:
            if x.untyped_storage() is self.last.on_device.untyped_storage():  # a merger's and the next block's
                return self.last
            self.streams.current_stream().wait_event(self.last.copied)  # before its memory is used again
            self.last.on_device = None
        self.last = kept = _Input(x, self.last, self.pinned)
        self._copy(kept, kept.on_host, kept.on_device)
        return kept

    def _unpack(self, kept: Tensor | _Input) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.last = None
        self._fetch(kept)
        self.streams.current_stream().wait_event(kept.copied)
        x, before, kept.on_device, kept.before = kept.on_device, kept.before, None, None
        if before:
            self._fetch(before)
        return x

    def _fetch(self, kept: _Input) -> None:
        if kept.on_device is None:
            kept.on_device = torch.empty_like(kept.on_host, device=kept.device)
            self._copy(kept, kept.on_device, kept.on_host)

    def _copy(self, kept: _Input, target: Tensor, source: Tensor) -> None:
        self.side.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.side):
            target.copy_(source, non_blocking=True)
            kept.copied = self.side.record_event()


# ---- FSDP2 ---------------------------------------------------------------------------------------------------------


def parallelize(
    model: Qwen3VL, ranks: ParallelState, *, compute_dtype: torch.dtype, recompute: bool = False, offload: bool = False,
    compile: bool = False,
) -> None:
    """Expert and context parallelism, recompute (with or without offload), compilation and FSDP2 for a model on the
    meta device (or the CPU), in place; freeze it before. Raises UsageError for sizes that the model cannot be cut to.

    Parameters stay float32 shards; each group is gathered in `compute_dtype` when its module runs, and its gradients
    are reduced in float32. One rank that computes in float32 goes without FSDP2.
    """
    visual, text = model.model.visual, model.model.language_model
    if ranks.ep_size > 1:
        _expert_parallel(model, ranks)
    if ranks.cp_size > 1:
        _context_parallel(model, ranks)
    if recompute or offload:
        visual.block_fn = text.block_fn = Offload(kernels_npu.ops) if offload else recompute_block
    if compile:
        if recompute or offload:  # the second run of a block may be compiled another way, and save other tensors
            raise UsageError("--compile does not go with recompute: give --recompute none, or leave out --compile")
        for block in (*visual.blocks, *text.layers):
            block.compile()

    if ranks.world == 1 and compute_dtype == torch.float32:
        return  # nothing to cut and nothing to cast: FSDP2 would copy all parameters and gradients, a fifth of a step

    model.vision_always = ranks.world > 1
    # cast_forward_inputs would turn loss weights and rotary tables into bf16
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    shard = functools.partial(fully_shard, mesh=ranks.mesh, mp_policy=policy)
    parts = [*visual.blocks, *visual.deepstack_merger_list, visual.merger, *text.layers]
    order = [[text.embed_tokens], *([part] for part in parts)]  # in which they run
    if model.config.tie_word_embeddings:
        shard([text.embed_tokens, model.lm_head], reshard_after_forward=False)  # apart, they would come untied
    else:
        shard(text.embed_tokens)
        shard(model.lm_head, reshard_after_forward=False)
        order.append([model.lm_head])
    for group in order[1 : len(parts) + 1]:
        module, last = group[0], group[0] is text.layers[-1]  # backward needs the last one at once
        experts = [m for m in module.modules() if isinstance(m, Experts)] if ranks.ep_size > 1 else []
        for each in experts:
            fully_shard(each, mesh=ranks.expert_mesh, mp_policy=policy, reshard_after_forward=not last,
                        shard_placement_fn=functools.partial(_expert_shard, ranks))
        shard(module, reshard_after_forward=not last, shard_placement_fn=functools.partial(_expert_shard, ranks))
        group += experts
    shard(model, reshard_after_forward=False)
    for (module, *_), following in itertools.pairwise(order):
        module.set_modules_to_forward_prefetch(following)

    # FSDP2 averages over the ranks of a parameter's mesh. The loss's weights carry the number of all ranks, so that the
    # average is a sum; experts are averaged over ep times fewer.
    for module in fsdp_modules(model):
        divisor = ranks.ep_size if isinstance(module, Experts) else 1
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)  # not every backend averages in every collective
        elif not ranks.backend_averages:
            if ranks.replicas > 1:
                raise UsageError("--fsdp-size: this PyTorch has no replicas on a CPU: leave it out, or take a "
                                 "newer one")
            divisor = ranks.world
        if divisor > 1:
            module.set_all_reduce_hook(lambda gradient, divisor=divisor: gradient.div_(divisor))


def _expert_shard(ranks: ParallelState, p: nn.Parameter) -> Shard | None:
    """Experts [E, D, 2I] and [E, I, D] are cut where their size divides, or half of the ranks could have none; FSDP2
    requires it beyond the first dimension, which expert parallelism has cut already."""
    if p.ndim != 3:
        return None
    size = ranks.world // ranks.replicas // ranks.ep_size
    for dim in range(ranks.ep_size > 1, 3):
        if p.shape[dim] % size == 0:
            return Shard(dim)
    if ranks.ep_size == 1:
        return None
    raise UsageError(f"--expert-parallel-size {ranks.ep_size} leaves {size} ranks to cut experts {list(p.shape)} over, "
                     "and neither of their last two sizes divides by that: give another")


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Frees what a forward without a backward left gathered."""
    for module in fsdp_modules(model):
        module.reshard()


def to_local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard_and_offset(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a DTensor, or all of a plain tensor, detached, and where it begins in the whole."""
    if not isinstance(tensor, DTensor):
        return full_tensor_and_offset(tensor)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.detach().to_local(), tuple(offset)


@torch.no_grad()
def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float, ranks: ParallelState) -> float:
    """Scales the gradients down to a total 2-norm of `max_norm` (0: never) and returns the norm that they had.

    Whatever its mesh, every element of a gradient lies on one rank (of each replica), so the ranks' sums of squares, in
    float64, add up to the whole norm.
    """
    grads = [to_local(p.grad) for p in parameters if p.grad is not None]
    # none at all where the text decoder is frozen, and the step had no picture
    norms = torch.stack(torch._foreach_norm(grads)).cpu().double() if grads else torch.zeros(1)
    (total,) = ranks.sum((norms**2).sum() / ranks.replicas)
    norm = total**0.5
    if grads and max_norm > 0 and norm > max_norm:
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
    return norm
