"""Everything that is applied to a built model from outside to train it on many ranks.

The file holds the process groups, adapters, context and expert parallelism, recompute and offload, FSDP2, and gradient
clipping. `model.py` calls nothing here: this file replaces the seams that `model.py` documents, and FSDP2 hooks onto
its modules. So the same forward runs on one rank and on many.

Neighbouring ranks share a sample (context parallel) and the experts of a layer (expert parallel); the two groups
overlap. All ranks shard every other parameter. With a smaller --fsdp-size, each group of that many neighbours holds a
full replica.

Shapes: T tokens, H heads, K key-value heads, d head size, D hidden size, E experts, I expert width, k experts a token,
r rank of an adapter.
"""
from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import kernels_npu
from common import PeerError, UsageError
from kernels_npu import Torch
from model import Experts, Qwen3VL, TextAttention, VisionAttention, component_of, full_tensor_and_offset

# ---- ranks ---------------------------------------------------------------------------------------------------------


def run_synced(action: Callable, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu"):
    """Run `action` on every rank of `group` and return this rank's result.

    If it raises on any rank, every rank raises: the lowest failing rank its own error, which it reports, and the others
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


def _divisors(total: int, fits: Callable[[int], bool] = lambda size: True) -> str:
    """List the divisors of a number of ranks that fit, for an error message."""
    return ", ".join(str(n) for n in range(1, total + 1) if total % n == 0 and fits(n))


class ParallelState:
    """This rank's position among all ranks, and the process groups and meshes that it belongs to.

    `dp_rank` and `dp_size` say which share of the rows this rank reads. The `cp_size` ranks of one share split each of
    its batches among them.
    """

    def __init__(self, ops: Torch, timeout_minutes: float = 10, *, cp: int = 1, ep: int = 1, fsdp: int | None = None):
        """Join the process group that torchrun describes in the environment, or make a group of one rank.

        A process group that exists already is used (the dry run has a fake one). `cp` and `ep` are the context- and
        expert-parallel sizes. Parameters are sharded over `fsdp` ranks (None: all) and replicated over the others.
        Raises UsageError for sizes that do not divide.
        """
        self.timeout = timedelta(minutes=timeout_minutes)
        self.device = ops.device
        if "RANK" in os.environ and not dist.is_initialized():
            try:
                dist.init_process_group(ops.distributed_backend, timeout=self.timeout)
            except ValueError as e:
                raise UsageError(f"RANK is set in the environment, but not all that torchrun sets ({e}): start this "
                                 "program with torchrun, or unset RANK") from e
        elif not dist.is_initialized():
            dist.init_process_group(
                ops.distributed_backend, timeout=self.timeout, store=dist.HashStore(), rank=0, world_size=1
            )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        fsdp = fsdp or self.world_size
        for flag, size, total, ranks in (
            ("context-parallel-size", cp, self.world_size, "the number of ranks"),
            ("fsdp-size", fsdp, self.world_size, "the number of ranks"),
            ("expert-parallel-size", ep, fsdp, "the ranks that parameters are sharded over"),
        ):
            if total % size:
                raise UsageError(f"--{flag} {size} does not divide {total}, {ranks}: give one of {_divisors(total)}")
        self.cp_size, self.cp_rank = cp, self.rank % cp
        self.dp_size, self.dp_rank = self.world_size // cp, self.rank // cp
        self.ep_size, self.fsdp_size, self.dp_replicate = ep, fsdp, self.world_size // fsdp
        self.current_sources: list[str] = []  # the rows of the latest batch, for an error message

        shape, names = (fsdp,), ("shard",)
        if self.dp_replicate > 1:
            shape, names = (self.dp_replicate, fsdp), ("replicate", "shard")
        self.mesh = self._make_mesh(shape, names)
        if cp > 1:
            self.cp_group = self._make_mesh((self.dp_size, cp), ("dp", "cp")).get_group("cp")
        if ep > 1:  # one mesh with a name for each axis: torch 2.7.1 accepts no other
            mesh = self._make_mesh((*shape[:-1], fsdp // ep, ep), (*names, "ep"))
            self.ep_mesh, self.expert_mesh = mesh["ep"], mesh[names]

    def _make_mesh(self, shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        """Arrange all ranks in a mesh. `init_device_mesh` would give its groups PyTorch's default timeout."""
        if len(shape) == 1:
            return DeviceMesh.from_group(dist.group.WORLD, self.device.type, mesh_dim_names=names)
        mesh = torch.arange(self.world_size).view(shape)
        groups = []
        for dim in range(mesh.ndim):
            ranks_of_groups = mesh.movedim(dim, -1).flatten(0, -2).tolist()
            groups.append(dist.new_subgroups_by_enumeration(ranks_of_groups, timeout=self.timeout)[0])
        return DeviceMesh.from_group(groups, self.device.type, mesh, mesh_dim_names=names)

    def sum(self, *values: float | Tensor) -> list[float]:
        """Sum each number over all ranks, in float64. The host waits for the device once.

        HCCL cannot reduce float64, so one all-gather collects the numbers and each rank adds them up.
        """
        on_device = [v.float() for v in values if isinstance(v, Tensor)]
        copied = iter(torch.stack(on_device).tolist() if on_device else ())
        local = torch.tensor([next(copied) if isinstance(v, Tensor) else v for v in values], dtype=torch.float64)
        if self.world_size == 1:
            return local.tolist()
        gathered = [torch.empty_like(local, device=self.device) for _ in range(self.world_size)]
        dist.all_gather(gathered, local.to(self.device))
        return torch.stack(gathered).cpu().sum(0).tolist()

    def sum_over_dp(self, *values: float) -> list[float]:
        """Sum numbers that describe rows: the context-parallel ranks read the same rows, which count once."""
        return [value / self.cp_size for value in self.sum(*values)]

    def run_synced(self, action: Callable):
        """Call `run_synced` on all ranks."""
        return run_synced(action, device=self.device)

    def report_alive(self) -> None:
        """Answer `unresponsive_ranks` of the other ranks after a collective has failed."""
        dist.distributed_c10d._get_default_store().set(f"alive/{self.rank}", "")

    def unresponsive_ranks(self) -> list[int]:
        """Return the ranks that do not call this or `report_alive` within 5 seconds."""
        self.report_alive()
        time.sleep(5)
        store = dist.distributed_c10d._get_default_store()
        return [rank for rank in range(self.world_size) if not store.check([f"alive/{rank}"])]

    def close(self) -> None:
        """Leave the process group."""
        # Gloo's threads need the interpreter to release the last collective's tensors, and destroying the group holds
        # the interpreter while it waits for these threads. Let them finish first.
        time.sleep(0.05)
        dist.destroy_process_group()


class AllToAll(torch.autograd.Function):
    """Exchange rows [N, ...] within a group: `send_sizes[r]` rows go to rank r, in the order of the ranks.

    Returns `recv_sizes[r]` rows from each rank r, in the same order. Backward sends the gradients back.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, send_sizes: list[int], recv_sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.reverse = recv_sizes, send_sizes, group
        out = rows.new_empty((sum(recv_sizes), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), recv_sizes, send_sizes, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return AllToAll.apply(grad, *ctx.reverse), None, None, None


# ---- adapters ------------------------------------------------------------------------------------------------------

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # where they exist


class Adapter(nn.Module):
    """Add a low-rank product to the output of a frozen weight (LoRA, arXiv:2106.09685): out + alpha / r * B A x.

    For a linear layer A is [r, in] and B [out, r]; for the experts of a layer A is [E, in, r] and B [E, r, out].
    """

    def __init__(self, weight_name: str, a: tuple[int, ...], b: tuple[int, ...], scale: float, dropout: float = 0.0):
        super().__init__()
        self.weight_name, self.scale = weight_name, scale
        self.A, self.B = (nn.Parameter(torch.empty(shape, device="meta")) for shape in (a, b))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, out: Tensor, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """Take x [N, in] and the weight's product with it [N, out]; counts [E] are each expert's consecutive rows."""
        a, b = to_local(self.A), to_local(self.B)
        if counts is None:
            product = F.linear(self.scale * F.linear(self.dropout(x), a), b)
        else:
            ops = kernels_npu.ops
            product = ops.grouped_matmul(self.scale * ops.grouped_matmul(x, a, counts), b, counts)
        return out + product  # torch.add(alpha=...) is wrong with --compile: Inductor's addmm ignores alpha

    def draw(self, leaf: str, block: Tensor, generator: torch.Generator) -> None:
        """Draw initial values as PEFT does, for `Qwen3VL.init_weights`: A is Kaiming uniform, B is zero."""
        bound = block.shape[1] ** -0.5 if leaf == "A" else 0.0
        block.uniform_(-bound, bound, generator=generator)


class AdapterGroup(nn.Module):
    """Hold the adapters of a block, or of a layer's experts, as its child `lora`, and run its forward.

    So the hooks of FSDP2 gather the adapters while the block runs. They are a group of their own because they are
    float32 and the frozen weights are not.
    """

    def __init__(self, owner: nn.Module, adapters: dict[str, Adapter]):
        super().__init__()
        for name, adapter in adapters.items():
            self.add_module(name, adapter)
        owner.lora = self
        owner.forward = functools.partial(self, owner.forward)

    def forward(self, run: Callable, *args):
        return run(*args)


def run_adapted_experts(
    lora: AdapterGroup, x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Apply experts with adapters: the `run_experts` seam. Shapes are those of `model.run_experts`."""
    ops = kernels_npu.ops
    rows, slot_to_row, counts = ops.moe_permute(x, expert_ids, gate_up.shape[0])
    rows = ops.swiglu(lora.gate_up_proj(ops.grouped_matmul(rows, gate_up, counts), rows, counts))
    rows = lora.down_proj(ops.grouped_matmul(rows, down, counts), rows, counts)
    return ops.moe_unpermute(rows, slot_to_row, weights)


def add_adapters(model: Qwen3VL, settings: dict) -> dict:
    """Add adapters to a model on the meta device, and freeze the weights of each component that has some.

    settings: `rank`, `alpha`, `dropout` and `target_modules`, the ends of names of linear layers and of `Experts`
    (None: the default). Returns them with the targets that were used: the last part of a name where it describes only
    layers with adapters, and full names elsewhere. Raises UsageError if a target does not exist.
    """
    rank, dropout, scale = settings["rank"], settings["dropout"], settings["alpha"] / settings["rank"]
    names = {module: name for name, module in model.named_modules()}
    layers = {names[m]: m for block in blocks(model) for m in block.modules() if isinstance(m, (nn.Linear, Experts))
              and not names[m].endswith(".gate")}  # in PEFT, a router is no linear layer
    last_part = {name: name.rpartition(".")[2] for name in layers}

    def matches(target: str) -> list[str]:
        return [name for name in layers if f".{name}".endswith(f".{target}")]

    requested = settings["target_modules"] or list(filter(matches, DEFAULT_TARGETS))
    for target in requested:
        if not matches(target):
            raise UsageError(f"--lora-target-modules, --lora-init: the model has no {target}: give some of "
                             f"{', '.join(sorted(set(last_part.values())))}")
    targeted = {name for target in requested for name in matches(target)}
    targets = {last if targeted.issuperset(matches(last)) else name for name, last in last_part.items()
               if name in targeted}
    if dropout and any(isinstance(layers[name], Experts) for name in targeted):
        raise UsageError("--lora-dropout: the inputs of experts cannot be dropped, as in PEFT: leave it or experts out")
    for block in blocks(model):
        adapters = {}
        for name in [names[m] for m in block.modules() if names[m] in targeted]:
            layer = layers[name]
            if isinstance(layer, Experts):
                of_experts = {
                    leaf: Adapter(f"{name}.{leaf}", (*p.shape[:2], rank), (len(p), rank, p.shape[2]), scale)
                    for leaf, p in layer.named_parameters()
                }
                layer.run_experts = functools.partial(run_adapted_experts, AdapterGroup(layer, of_experts))
            else:
                sizes = (rank, layer.in_features), (layer.out_features, rank)
                adapter = adapters[last_part[name]] = Adapter(f"{name}.weight", *sizes, scale, dropout)
                layer.register_forward_hook(lambda _, args, out, adapter=adapter: adapter(out, *args))
        if adapters:
            AdapterGroup(block, adapters)

    components = {component_of(name) for name in targeted}
    for name, p in model.named_parameters():
        p.requires_grad_(".lora." in name or p.requires_grad and component_of(name) not in components)
    model.may_be_absent = lambda name, others=model.may_be_absent: ".lora." in name or others(name)
    return settings | {"target_modules": sorted(targets)}


def named_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Return the adapters of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def adapter_flops(model: Qwen3VL, prefix: str = "") -> dict[str, float]:
    """Return each component's `adapters` for `model.step_flops`, of the adapters whose name starts with `prefix`."""
    flops: dict[str, float] = {}
    for adapter in (adapter for name, adapter in named_adapters(model).items() if name.startswith(prefix)):
        component = component_of(adapter.weight_name)
        used = model.config.text.num_experts_per_tok / len(adapter.A) if adapter.A.ndim == 3 else 1
        flops[component] = flops.get(component, 0) + used * (adapter.A.numel() + adapter.B.numel())
    return flops


# ---- context parallel ----------------------------------------------------------------------------------------------


def even_bounds(total: int, ranks: int) -> list[int]:
    """Return the boundaries [0, ..., total] of an even split; the first `total % ranks` slices are one longer."""
    return [rank * (total // ranks) + min(rank, total % ranks) for rank in range(ranks + 1)]


def overlaps(start: int, stop: int, bounds: list[int]) -> list[int]:
    """Return how many elements of [start, stop) lie between each pair of neighbouring bounds."""
    return [max(0, min(stop, high) - max(start, low)) for low, high in itertools.pairwise(bounds)]


def local_batch(batch, state: ParallelState):
    """Return this rank's part of a `data.Batch`, on its device.

    Under context parallelism this is a slice of the tokens and, so that the vision encoder's work is even, an equally
    large slice of the patches. `exchange_features` then sends visual features to the ranks that hold their tokens.
    `cu_seqlens` and `grid_thw` still describe the full batch.
    """
    if state.cp_size == 1:
        return batch.to(state.device)
    bounds = even_bounds(len(batch.input_ids), state.cp_size)
    start, stop = bounds[state.cp_rank : state.cp_rank + 2]
    changes = {}
    for field in dataclasses.fields(batch):
        value, kind = getattr(batch, field.name), field.metadata.get("kind")
        if kind == "token" and value is not None:
            changes[field.name] = value[..., start:stop]
        elif kind == "index":
            changes[field.name] = value[(value >= start) & (value < stop)] - start

    # token_bounds divides the visual tokens by the rank that holds the token, patch_bounds by the rank that encodes its
    # patches. A batch without media has one dummy token, see Qwen3VL.embed.
    num_visual = len(batch.visual_index)
    token_bounds = torch.searchsorted(batch.visual_index, torch.tensor(bounds)).tolist()
    patch_bounds = even_bounds(max(1, num_visual), state.cp_size)
    held = token_bounds[state.cp_rank : state.cp_rank + 2]
    encoded = patch_bounds[state.cp_rank : state.cp_rank + 2]
    patches_per_token = len(batch.pixel_values) // max(1, num_visual)
    changes["pixel_values"] = batch.pixel_values[patches_per_token * encoded[0] : patches_per_token * encoded[1]]
    changes["local_visual_tokens"] = slice(*encoded)
    changes["feature_splits"] = overlaps(encoded[0], encoded[1], token_bounds), overlaps(held[0], held[1], patch_bounds)
    return dataclasses.replace(batch, **changes).to(state.device)


def ulysses(attention: Callable[..., Tensor], rows_per_token: int, state: ParallelState) -> Callable[..., Tensor]:
    """Wrap the `attention` seam with DeepSpeed-Ulysses (arXiv:2309.14509).

    Each rank has a slice of the rows with all heads. An all-to-all gives it all rows of its share of the heads, and
    another one returns the results. `rows_per_token` rows (a visual token's patches) stay together. If there are fewer
    key-value heads than ranks, they are repeated.
    """
    size, group = state.cp_size, state.cp_group

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool) -> Tensor:
        bounds = even_bounds(cu_seqlens[-1] // rows_per_token, size)
        rows_of_ranks = [rows_per_token * (stop - start) for start, stop in itertools.pairwise(bounds)]
        local_rows = [len(q)] * size
        if k.shape[1] < size:
            k, v = (t.repeat_interleave(size // k.shape[1], dim=1) for t in (k, v))
        heads = [t.unflatten(1, (size, -1)) for t in (q, k, v)]  # [local rows, ranks, heads of a rank, d]
        rows = torch.cat(heads, dim=2).transpose(0, 1).flatten(0, 1)
        rows = AllToAll.apply(rows, local_rows, rows_of_ranks, group)  # [all rows, this rank's heads of q, k and v, d]
        out = attention(*rows.split([t.shape[2] for t in heads], dim=1), cu_seqlens, causal)
        out = AllToAll.apply(out, rows_of_ranks, local_rows, group)
        return out.unflatten(0, (size, len(q))).transpose(0, 1).flatten(1, 2)

    return attend


def exchange_features(state: ParallelState, features: list[Tensor], batch) -> list[Tensor]:
    """Send visual features [n, D] to the ranks that hold their tokens: the `exchange_features` seam."""
    exchanged = AllToAll.apply(torch.cat(features, dim=1), *batch.feature_splits, state.cp_group)
    return list(exchanged.chunk(len(features), dim=1))


def _all_reduce_expert_counts(
    state: ParallelState, module: nn.Module, args: tuple, output: tuple[Tensor, list[Tensor]]
) -> tuple[Tensor, list[Tensor]]:
    """Sum the tokens of each expert over the ranks of a sample, for the auxiliary loss: a hook on the text decoder.

    The probabilities beside the counts stay local, because the ranks' losses are summed.
    """
    hidden_states, router_stats = output
    if not router_stats:
        return output
    counts = torch.stack([stats[0] for stats in router_stats]).detach()
    dist.all_reduce(counts, group=state.cp_group)
    return hidden_states, [torch.stack((c, stats[1])) for c, stats in zip(counts, router_stats, strict=True)]


def _context_parallel(model: Qwen3VL, state: ParallelState) -> None:
    """Replace the seams of attention and visual features. Raises UsageError for heads that cannot be shared."""
    text, vision = model.config.text, model.config.vision

    def fits(ranks: int) -> bool:
        kv_heads = text.num_key_value_heads
        even_kv_heads = kv_heads % ranks == 0 or ranks % kv_heads == 0
        return text.num_attention_heads % ranks == 0 and vision.num_heads % ranks == 0 and even_kv_heads

    if not fits(state.cp_size):
        raise UsageError(f"--context-parallel-size {state.cp_size} cannot share {text.num_attention_heads} heads, "
                         f"{text.num_key_value_heads} key-value heads and {vision.num_heads} vision heads: give one of "
                         f"{_divisors(state.world_size, fits)}")
    for module in model.modules():
        if isinstance(module, TextAttention):
            module.attention = ulysses(module.attention, 1, state)
        elif isinstance(module, VisionAttention):
            module.attention = ulysses(module.attention, vision.spatial_merge_size**2, state)
    model.exchange_features = functools.partial(exchange_features, state)
    model.model.language_model.register_forward_hook(functools.partial(_all_reduce_expert_counts, state))


# ---- expert parallel -----------------------------------------------------------------------------------------------


def expert_parallel_forward(
    group: dist.ProcessGroup, run_local: Callable[..., Tensor], x: Tensor, expert_ids: Tensor, weights: Tensor,
    gate_up: DTensor, down: DTensor,
) -> Tensor:
    """Run the experts of all ranks: the `run_experts` seam with expert parallelism (GShard, arXiv:2006.16668).

    Copies of the tokens go to the ranks of their experts, through `run_local` there, which is the seam without expert
    parallelism, and return. No token is dropped. Shapes are those of `model.run_experts`.
    """
    ops, size = kernels_npu.ops, dist.get_world_size(group)
    rows, slot_to_row, send_counts = ops.moe_permute(x, expert_ids, gate_up.shape[0])
    recv_counts = torch.empty_like(send_counts)  # [ranks, experts of this rank]: rows that each rank will send
    dist.all_to_all_single(recv_counts, send_counts, group=group)
    counts = torch.stack((send_counts, recv_counts)).view(2, size, -1)
    send_sizes, recv_sizes = ops.to_host(counts.sum(-1))  # the only wait for the device in a layer
    rows = AllToAll.apply(rows, send_sizes, recv_sizes, group)
    # The rows arrive grouped by sender, but experts need them grouped by expert: run_local permutes a second time.
    gate_up, down = gate_up.to_local(), down.to_local()
    local_ids = torch.arange(len(gate_up), device=x.device).repeat(size)
    local_ids = local_ids.repeat_interleave(counts[1].flatten(), output_size=len(rows))[:, None]
    rows = run_local(rows, local_ids, torch.ones_like(local_ids, dtype=weights.dtype), gate_up, down)
    return ops.moe_unpermute(AllToAll.apply(rows, recv_sizes, send_sizes, group), slot_to_row, weights)


def _expert_parallel(model: Qwen3VL, state: ParallelState) -> None:
    """Keep this rank's experts only: their parameters become DTensors, sharded over the `ep` axis."""
    num_experts, size = model.config.text.num_experts, state.ep_size
    if not num_experts:
        raise UsageError(f"--expert-parallel-size {size}: the model has no experts: leave the flag out")
    if num_experts % size:
        raise UsageError(f"--expert-parallel-size {size}: the model has {num_experts} experts: give one of "
                         f"{_divisors(math.gcd(state.world_size, num_experts))}")
    for experts in (module for module in model.modules() if isinstance(module, Experts)):
        for module in experts.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                local = p.detach().chunk(size)[state.ep_mesh.get_local_rank()].clone()
                dtensor = DTensor.from_local(local, state.ep_mesh, [Shard(0)], run_check=False)
                setattr(module, name, nn.Parameter(dtensor, requires_grad=p.requires_grad))
        group = state.ep_mesh.get_group()
        experts.run_experts = functools.partial(expert_parallel_forward, group, experts.run_experts)


# ---- recompute and offload -----------------------------------------------------------------------------------------


def recompute_block(block: nn.Module, *args, has_dropout: bool = False):
    """Run a block without keeping its activations, which backward computes again: the `block_fn` seam.

    The result of top-k is kept. In a second computation, rounding could send a token to other experts. With
    `has_dropout`, dropout draws the same mask again.
    """
    if not torch.is_grad_enabled():
        return block(*args)
    keep_routing = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.topk.default])
    return checkpoint(
        block, *args, use_reentrant=False, preserve_rng_state=has_dropout, context_fn=keep_routing,
        determinism_check="none",
    )


class _BlockInput:
    """A block's input: on the device until the next block starts, then on the host until its backward approaches."""

    def __init__(self, x: Tensor, previous: _BlockInput | None, pinned: bool):
        self.on_device, self.previous = x.detach(), previous
        self.on_host = torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned)
        self.device, self.copied = x.device, None


class Offload:
    """Recompute blocks and keep each block's input on the host: the `block_fn` seam.

    Copies run on a separate stream: to the host while the block computes, and back while the following block runs
    backward. The device holds two inputs at most: in forward the current block's and the one that it produces, in
    backward the current block's and the next one needed.
    """

    def __init__(self, ops: Torch, has_dropout: bool = False):
        self.has_dropout = has_dropout
        self.streams = torch.get_device_module(ops.device)
        self.copy_stream, self.pinned = self.streams.Stream(), ops.is_accelerator
        self.latest: _BlockInput | None = None  # in forward

    def __call__(self, block: nn.Module, *args):
        if not torch.is_grad_enabled():
            return block(*args)
        with saved_tensors_hooks(self._pack, self._unpack):  # a checkpoint saves nothing but its tensor arguments
            return recompute_block(block, *args, has_dropout=self.has_dropout)

    def _pack(self, x: Tensor) -> Tensor | _BlockInput:
        if not x.requires_grad:  # rotary tables, which all blocks share
            return x
        if self.latest and self.latest.on_device is not None:
            if x.untyped_storage() is self.latest.on_device.untyped_storage():  # a merger and the next block share it
                return self.latest
            self.streams.current_stream().wait_event(self.latest.copied)  # before the memory is used again
            self.latest.on_device = None
        self.latest = kept = _BlockInput(x, self.latest, self.pinned)
        self._copy(kept, kept.on_host, kept.on_device)
        return kept

    def _unpack(self, kept: Tensor | _BlockInput) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.latest = None
        self._fetch(kept)
        self.streams.current_stream().wait_event(kept.copied)
        x, previous, kept.on_device, kept.previous = kept.on_device, kept.previous, None, None
        if previous:
            self._fetch(previous)
        return x

    def _fetch(self, kept: _BlockInput) -> None:
        if kept.on_device is None:
            kept.on_device = torch.empty_like(kept.on_host, device=kept.device)
            self._copy(kept, kept.on_device, kept.on_host)

    def _copy(self, kept: _BlockInput, target: Tensor, source: Tensor) -> None:
        self.copy_stream.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.copy_stream):
            target.copy_(source, non_blocking=True)
            kept.copied = self.copy_stream.record_event()


# ---- torch.compile --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Untraced:
    """Hold an argument that `torch.compile` passes on without a look, so that it compiles once for all its values."""

    value: object


def _compile_blocks(model: Qwen3VL) -> None:
    """Compile each block. Attention and experts run uncompiled in the middle of the block.

    Their sizes change with each micro-batch, and `torch.compile` cannot trace all of their operations: NPU kernels,
    exchanges between ranks, float32's `grouped_mm`. A block compiled for each list of sequence lengths would reach
    PyTorch's limit of compilations after eight micro-batches, and run uncompiled from then on.
    """
    class Uncompiled:  # objects, because torch 2.7.1 compiles again for each disabled function
        def __init__(self, function: Callable):
            self.function = function

        @torch.compiler.disable
        def __call__(self, *args, **kwargs):
            return self.function(*(a.value if isinstance(a, _Untraced) else a for a in args), **kwargs)

    for module in model.modules():
        for name in ("attention", "run_experts"):
            if hasattr(module, name):
                setattr(module, name, Uncompiled(getattr(module, name)))
    visual, text = model.model.visual, model.model.language_model
    for block in (*visual.blocks, *text.layers):
        block.compile()
    visual.block_fn = text.block_fn = _compiled_block


def _compiled_block(block: nn.Module, x: Tensor, *args):
    """Run a compiled block, or an uncompiled merger: the `block_fn` seam."""
    return block(x, *(_Untraced(a) if isinstance(a, list) else a for a in args))


# ---- FSDP2 ---------------------------------------------------------------------------------------------------------


def parallelize(
    model: Qwen3VL, state: ParallelState, *, compute_dtype: torch.dtype, recompute: bool = False, offload: bool = False,
    compile: bool = False, cpu_offload: bool = False, synchronize_per_layer: bool = False,
) -> None:
    """Apply expert and context parallelism, recompute or offload, compilation and FSDP2 to a model, in place.

    The model is on the meta device or the CPU, and each parameter's `requires_grad` is final. Parameters stay float32
    shards, with `cpu_offload` in host memory; those that are frozen in a model with adapters become `compute_dtype`.
    Each group is gathered in `compute_dtype` on the device when its module runs, and its gradients are reduced there in
    float32. A single rank that computes in float32 uses FSDP2 only for `cpu_offload`. Raises UsageError for sizes that
    the model does not allow.
    """
    visual, text = model.model.visual, model.model.language_model
    has_adapters = bool(named_adapters(model))
    if has_adapters:
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.to(compute_dtype)
    if state.ep_size > 1:
        _expert_parallel(model, state)
    if state.cp_size > 1:
        _context_parallel(model, state)
    has_dropout = any(isinstance(module, nn.Dropout) for module in model.modules())
    if offload:
        visual.block_fn = text.block_fn = Offload(kernels_npu.ops, has_dropout)
    elif recompute:
        visual.block_fn = text.block_fn = functools.partial(recompute_block, has_dropout=has_dropout)
    if compile:
        if recompute or offload:  # the second run of a block may be compiled differently and save other tensors
            raise UsageError("--compile does not work with recompute: give --recompute none, or leave out --compile")
        _compile_blocks(model)
    if synchronize_per_layer:
        # A host that runs ahead of its device allocates memory for blocks whose predecessors still hold theirs.
        for block in (*visual.blocks, *text.layers):
            block.register_forward_pre_hook(lambda *_: kernels_npu.ops.synchronize())  # in recompute as well

    if state.world_size == 1 and compute_dtype == torch.float32 and not cpu_offload:
        return  # FSDP2 would only copy all parameters and gradients: a fifth of a step

    model.vision_always = state.world_size > 1
    # cast_forward_inputs would turn loss weights and rotary tables into bf16
    policy = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    # All collectives run on the device: FSDP2 copies a shard there before a gather, and a gradient back after its
    # reduction. From pinned memory, which a dry run's tensors lack, the copies overlap with computation.
    place = CPUOffloadPolicy(pin_memory=state.device.type != "cpu") if cpu_offload else OffloadPolicy()
    shard = functools.partial(fully_shard, mesh=state.mesh, mp_policy=policy, offload_policy=place)
    place_experts = functools.partial(_expert_placement, state)
    of_experts = _expert_modules(model) if state.ep_size > 1 else set()
    gathers = []  # in forward order: the modules whose parameters are gathered for the same block
    for block in blocks(model):
        is_last = block is text.layers[-1]  # backward needs its parameters at once
        groups = [m for m in block.modules() if m is block or m in of_experts or isinstance(m, AdapterGroup)]
        for module in reversed(groups):  # inner modules first
            shard(module, mesh=state.expert_mesh if module in of_experts else state.mesh,
                  reshard_after_forward=not is_last, shard_placement_fn=place_experts)
        gathers.append(groups)
    if has_adapters:  # torch 2.7.1 refuses different types in one group, here the root's
        shard(visual, reshard_after_forward=False)
    if model.config.tie_word_embeddings:
        shard([text.embed_tokens, model.lm_head], reshard_after_forward=False)  # separate groups would untie them
    else:
        shard(text.embed_tokens)
        shard(model.lm_head, reshard_after_forward=False)
        gathers.append([model.lm_head])
    shard(model, reshard_after_forward=False)
    for modules, following in itertools.pairwise([[text.embed_tokens], *gathers]):
        modules[0].set_modules_to_forward_prefetch(following)
    _sum_gradients(model, state)


def blocks(model: Qwen3VL) -> list[nn.Module]:
    """Return the modules that are recomputed and sharded one at a time, in forward order."""
    visual, text = model.model.visual, model.model.language_model
    encoder, mergers = [], iter(visual.deepstack_merger_list)
    for i, block in enumerate(visual.blocks):
        encoder += [block, next(mergers)] if i in visual.config.deepstack_visual_indexes else [block]
    return [*encoder, visual.merger, *text.layers]


def _expert_modules(model: Qwen3VL) -> set[nn.Module]:
    """Return the modules that hold parameters of experts: `Experts` and the groups of their adapters."""
    return {m for experts in model.modules() if isinstance(experts, Experts) for m in (experts, *experts.children())}


def _sum_gradients(model: Qwen3VL, state: ParallelState) -> None:
    """Make the reduction of gradients match the loss formula, loss = sum_i w_i * nll_i over all ranks.

    The gradient of that loss is the sum of the ranks' gradients. FSDP2 averages instead, over all `world_size` ranks.
    So `train.set_loss_weights` multiplies every w_i by `world_size`, and the logged loss is divided by it.

    With expert parallelism an expert's gradient already contains the tokens of the `ep_size` ranks that share its mesh
    position, and FSDP2 averages it over `world_size / ep_size` ranks only. It is `ep_size` times too large, and a hook
    divides it.

    Not every backend can average, and NCCL's average over one rank can miss elements (NVIDIA/nccl#1950). So the
    reduction is a sum, and FSDP2 divides by itself. In torch 2.7.1 it does not: there, the hook divides by the ranks
    that share a replica. The average over replicas remains, which gloo lacks.
    """
    of_experts = _expert_modules(model)
    for module in fsdp_modules(model):
        divisor = state.ep_size if module in of_experts else 1
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
        elif state.dp_replicate > 1 and dist.get_backend() == "gloo":
            raise UsageError("--fsdp-size: this PyTorch cannot replicate parameters on a CPU: leave the flag out, "
                             "or install a newer PyTorch")
        elif (group := module._get_fsdp_state()._fsdp_param_group) is not None:
            group.reduce_scatter_reduce_op = dist.ReduceOp.SUM
            divisor = state.fsdp_size
        if divisor > 1:
            module.set_all_reduce_hook(functools.partial(_divide, divisor=divisor))


def _divide(gradient: Tensor, divisor: int) -> None:
    """Divide a reduced gradient: FSDP2's all-reduce hook."""
    gradient.div_(divisor)
    if not gradient.is_cpu:
        # FSDP2 allocates the gradient on its reduce-scatter stream, and adds it to an earlier micro-batch's on the
        # stream of this hook. The next reduce-scatter must not reuse its memory before.
        gradient.record_stream(torch.get_device_module(gradient.device).current_stream())


def _expert_placement(state: ParallelState, p: nn.Parameter) -> Shard | None:
    """Choose the dimension in which FSDP2 shards experts [E, D, 2I] and [E, I, D]; None is its default, dimension 0.

    A dimension that divides evenly is preferred: if not, half of the ranks could have no expert. Expert parallelism has
    already sharded dimension 0, and FSDP2 requires even shards in the others.
    """
    if p.ndim != 3:
        return None
    ranks = state.fsdp_size // state.ep_size
    for dim in (1, 2) if state.ep_size > 1 else (0, 1, 2):
        if p.shape[dim] % ranks == 0:
            return Shard(dim)
    if state.ep_size == 1:
        return None
    raise UsageError(f"--expert-parallel-size {state.ep_size} leaves {ranks} ranks to shard experts {list(p.shape)} "
                     "over, and neither of their last two dimensions divides by that: give another size")


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free the parameters that a forward without a backward left gathered."""
    for module in fsdp_modules(model):
        module.reshard()


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, or a plain tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard_and_offset(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return this rank's shard of a DTensor (all of a plain tensor), detached, and its offset in the full tensor."""
    if not isinstance(tensor, DTensor):
        return full_tensor_and_offset(tensor)
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.detach().to_local(), tuple(offset)


# ---- gradient clipping ---------------------------------------------------------------------------------------------


@torch.no_grad()
def grad_square_sum(parameters: list[nn.Parameter], state: ParallelState) -> Tensor:
    """Return this rank's part of the squared 2-norm of all gradients: the sum over all ranks is the squared norm.

    Whatever a parameter's mesh, each element of its gradient lies on one rank of each replica. With --cpu-offload the
    gradients are on the CPU; the result is on the device.
    """
    grads = [to_local(p.grad) for p in parameters if p.grad is not None]
    if not grads:  # the text decoder is frozen and the step had no media
        return torch.zeros((), device=state.device)
    if grads[0].is_cpu:  # the CPU's norm of a large tensor is inaccurate (0.5 % for 64 million numbers), unlike a row's
        norms = torch.cat([torch.linalg.vector_norm(grad, dim=-1).flatten() for grad in grads])
    else:
        norms = torch.stack(torch._foreach_norm(grads))
    return norms.square().sum().to(state.device) / state.dp_replicate


@torch.no_grad()
def clip_gradients(parameters: list[nn.Parameter], norm: float, max_norm: float, factor: float = 1.0) -> None:
    """Multiply the gradients by `factor`, and scale them down to `max_norm` (0: never).

    `norm` is their total 2-norm after the multiplication.
    """
    grads = [to_local(p.grad) for p in parameters if p.grad is not None]
    if 0 < max_norm < norm:
        factor *= max_norm / (norm + 1e-6)
    if grads and factor != 1:
        torch._foreach_mul_(grads, factor)
