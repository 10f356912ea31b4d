"""Ranks as a grid, and what is done to a built model from outside: freezing, recompute, FSDP2, gradient clipping.

Nothing here is called by `model.py`: the seams that it documents are replaced, and FSDP2 hooks onto its modules, so
that the same forward runs on one process and on many. A world of one goes the same way as a large one.
"""
from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kernels_npu import PeerError, Torch, UsageError
from model import Qwen3VL, tower_of


class Ranks:
    """This process among all of them. `dp_rank` / `dp_size`: which share of the rows it reads, of how many."""

    def __init__(self, ops: Torch, timeout_minutes: float = 10):
        """Joins the process group that torchrun describes in the environment; without torchrun, a group of one."""
        timeout = timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(ops.distributed_backend, timeout=timeout)
        else:
            dist.init_process_group(
                ops.distributed_backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1
            )
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.dp_rank, self.dp_size = self.rank, self.world
        self.mesh = init_device_mesh(ops.device.type, (self.world,))
        self.device = ops.device
        # torch 2.7.1 with gloo takes ReduceOp.AVG for a sum, silently: ask, and let `parallelize` make up for it
        one = torch.empty(1, device=self.device)
        reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in 2.13
        reduce_scatter(one, torch.ones(self.world, device=self.device), op=dist.ReduceOp.AVG)
        self.backend_averages = one.item() == 1

    def sum(self, *values: float | Tensor) -> list[float]:
        """Each value summed over all ranks, in float64: one small all-reduce."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.world > 1:
            dist.all_reduce(total)
        return total.tolist()

    def together(self, action: Callable):
        """Runs `action` on every rank and returns its result. If a person's mistake ends it on one, all ranks end: the
        first at fault raises the error, the others PeerError, and none waits for a collective that will not come."""
        result, mistake = None, None
        try:
            result = action()
        except (UsageError, ValueError, OSError) as e:
            mistake = e
        at_fault = torch.tensor(self.rank if mistake else self.world, device=self.device)
        if self.world > 1:
            dist.all_reduce(at_fault, op=dist.ReduceOp.MIN)
        if mistake and at_fault.item() == self.rank:
            mistake.said_by_this_rank = True
            raise mistake
        if at_fault.item() < self.world:
            raise PeerError
        return result

    def close(self) -> None:
        dist.destroy_process_group()


def freeze(model: Qwen3VL, towers: set[str]) -> None:
    """Stops the training of every parameter of the named towers (`model.TOWERS`)."""
    for name, p in model.named_parameters():
        p.requires_grad_(tower_of(name) not in towers)


def recompute_block(block: nn.Module, *args):
    """The `run_block` seam with recompute: backward runs the block again instead of keeping what is inside it.

    Top-k's result is kept: in a second run, rounding could send a token to other experts than the first forward did.
    """
    if not torch.is_grad_enabled():
        return block(*args)
    keep_routing = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.topk.default])
    return checkpoint(
        block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=keep_routing, determinism_check="none"
    )


def parallelize(model: Qwen3VL, ranks: Ranks, *, compute_dtype: torch.dtype, recompute: bool, compile: bool) -> None:
    """Recompute, compilation and FSDP2 for a model on the meta device (or the CPU), in place.

    Parameters stay float32 shards; each group is gathered in `compute_dtype` when its module runs, and its gradients
    are reduced in float32.
    """
    visual, text = model.model.visual, model.model.language_model
    if recompute:
        visual.run_block = text.run_block = recompute_block
    if compile:
        for block in (*visual.blocks, *text.layers):
            block.compile()

    shard = functools.partial(
        fully_shard,
        mesh=ranks.mesh,
        # cast_forward_inputs would turn loss weights and rotary tables into bf16
        mp_policy=MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False),
    )
    parts = [*visual.blocks, *visual.deepstack_merger_list, visual.merger, *text.layers]
    order = [text.embed_tokens, *parts]  # in which they run
    if model.config.tie_word_embeddings:
        shard([text.embed_tokens, model.lm_head], reshard_after_forward=False)  # apart, they would come untied
    else:
        shard(text.embed_tokens)
        shard(model.lm_head, reshard_after_forward=False)
        order.append(model.lm_head)
    for module in parts:
        shard(module, reshard_after_forward=module is not text.layers[-1])  # backward needs the last one at once
    shard(model, reshard_after_forward=False)
    for module, following in zip(order, order[1:], strict=False):
        module.set_modules_to_forward_prefetch([following])
    if not ranks.backend_averages:
        for module in fsdp_modules(model):
            module.set_all_reduce_hook(lambda gradient: gradient.div_(ranks.world))


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Frees what a forward without a backward left gathered."""
    for module in fsdp_modules(model):
        module.reshard()


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """This rank's part of a DTensor, or all of a plain tensor, detached, and where it begins in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.detach().to_local(), tuple(offset)


def write_shard(param: Tensor, value: Tensor) -> None:
    """Stores a whole value in a parameter, of which this rank may hold a slice only."""
    local, offset = local_part(param)
    local.copy_(value[tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))])


@torch.no_grad()
def clip_grad_norm(parameters: list[nn.Parameter], max_norm: float, ranks: Ranks) -> float:
    """Scales the gradients down to a total 2-norm of `max_norm` (0: never) and returns the norm that they had.

    Every element of a gradient lies on one rank, so the ranks' sums of squares, in float64, add up to the whole norm.
    """
    grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in parameters if p.grad is not None]
    # none at all where all that trains is the vision encoder, and the step had no picture
    squares = torch.stack(torch._foreach_norm(grads)).double() ** 2 if grads else torch.zeros(1)
    (total,) = ranks.sum(squares.sum())
    norm = total**0.5
    if grads and max_norm > 0 and norm > max_norm:
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
    return norm
