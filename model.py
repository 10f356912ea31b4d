"""Qwen3-VL (arXiv:2511.21631): vision encoder, projector, dense or mixture-of-experts text decoder, and loss.

Tokens are always packed: samples lie end to end as [T, ...] with `cu_seqlens`, and each sample attends to itself.
There is no batch dimension, no padding and no attention mask. Parameter names, shapes and layouts are those of the
published checkpoints, so that no conversion renames or transposes a tensor.

Shapes: T tokens, D hidden size, H heads, K key-value heads, d head size, E experts, I expert width, V vocabulary;
P patches, C vision hidden size, N images and videos.

`parallel.py`, `infer.py` and `train.py` change a forward only through this list.

Seams, which are callables with a default here:
- `VisionAttention.attention`, `TextAttention.attention`: the implementation, Ulysses, the KV cache.
- `Experts.run_experts`: expert parallelism.
- `VisionModel.block_fn`, `TextModel.block_fn`: call a block. Recompute, offload.
- `Qwen3VL.exchange_features`: send visual features to the ranks that hold their tokens.
- `LMHead.loss_fn`: the loss of a batch.
Settings:
- `Qwen3VL.vision_always`: run the vision encoder without media too, so that the collectives of several ranks match.
- `Qwen3VL.loss_chunk_size`, `Qwen3VL.router_aux_loss_coef`.
Fields of a batch that context parallelism sets:
- `local_visual_tokens`: the slice of the visual tokens whose patches this rank has.
- `feature_splits`: how many features `exchange_features` sends and receives.
Hooks:
- Context parallelism adds a forward hook to `TextModel`, which sums the router statistics over ranks.
- Adapters add forward hooks to linear layers, and wrap the forward of blocks and of `Experts`.
- FSDP2 gathers parameters in hooks. A parameter must be used in the forward of the module that FSDP2 wraps.
"""
from __future__ import annotations

import functools
import itertools
import math
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels_npu
from common import InputError, read_json, shorten

# ---- configuration -------------------------------------------------------------------------------------------------


@dataclass
class VisionConfig:
    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: list[int]
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    initializer_range: float = 0.02
    hidden_act: str = "gelu_pytorch_tanh"

    @property
    def patch_dim(self) -> int:
        """The number of pixel values in a patch: 3 * 2 * 16 * 16 = 1536."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    mrope_section: list[int]
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    num_experts: int = 0  # 0: dense
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] = field(default_factory=list)

    def is_moe_layer(self, layer: int) -> bool:
        sparse = self.num_experts > 0 and (layer + 1) % self.decoder_sparse_step == 0
        return sparse and layer not in self.mlp_only_layers


@dataclass
class Qwen3VLConfig:
    text: TextConfig
    vision: VisionConfig
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    dtype: str | None  # the stored weights' type according to the file

    @staticmethod
    def from_json(path: str | Path) -> Qwen3VLConfig:
        """Read a Hugging Face `config.json`, or the one in a directory, in the form of transformers 4.57 or 5.

        Raises InputError, which names the file and the key, if the model cannot be built from it.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        raw = read_json(path)
        if raw.get("model_type") not in ("qwen3_vl", "qwen3_vl_moe"):
            raise InputError(f"{path}: model_type is {shorten(raw.get('model_type'))}, it must be qwen3_vl or "
                             "qwen3_vl_moe")
        text, vision = raw.get("text_config"), raw.get("vision_config")
        if not isinstance(text, dict) or not isinstance(vision, dict):
            raise InputError(f"{path}: needs text_config and vision_config, each an object")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}  # transformers 5, transformers 4
        if not isinstance(rope, dict):
            raise InputError(f"{path}: text_config.rope_parameters must be an object")
        if rope.get("rope_type", "default") != "default":
            raise InputError(f"{path}: rope_type {shorten(rope['rope_type'])} is not supported, only 'default' is")
        # transformers 5 writes the opposite value into text_config for mixture-of-experts models
        tied = raw.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise InputError(f"{path}: tie_word_embeddings must be true or false")
        moe = raw["model_type"] == "qwen3_vl_moe"
        text = {
            **text,
            "rope_theta": rope.get("rope_theta", text.get("rope_theta", 5e6)),
            "mrope_section": rope.get("mrope_section", [24, 20, 20]),
            "num_experts": text.get("num_experts", text.get("num_local_experts")) if moe else 0,
        }
        if moe and not text["num_experts"]:
            raise InputError(f"{path}: text_config.num_experts is missing")
        config = Qwen3VLConfig(
            text=_build(TextConfig, text, f"{path}: text_config"),
            vision=_build(VisionConfig, vision, f"{path}: vision_config"),
            tie_word_embeddings=tied,
            image_token_id=raw.get("image_token_id", 151655),
            video_token_id=raw.get("video_token_id", 151656),
            dtype=raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype"),
        )
        config._check(path)
        return config

    def _check(self, path: Path) -> None:
        """Raise InputError if an edited value, or one from another model, does not fit the others."""
        t, v = self.text, self.vision
        experts_fit = 1 <= t.num_experts_per_tok <= t.num_experts and t.moe_intermediate_size > 0
        indexes = v.deepstack_visual_indexes
        for rule, holds in {
            "text_config.num_key_value_heads must divide num_attention_heads":
                t.num_attention_heads % t.num_key_value_heads == 0,
            "text_config.mrope_section must be three numbers that add up to head_dim / 2":
                len(t.mrope_section) == 3 and min(t.mrope_section) >= 0 and 2 * sum(t.mrope_section) == t.head_dim,
            "text_config needs moe_intermediate_size, and num_experts_per_tok between 1 and num_experts":
                t.num_experts == 0 or experts_fit,
            "text_config.hidden_act must be 'silu'": t.hidden_act == "silu",
            "vision_config.hidden_act must be 'gelu_pytorch_tanh'": v.hidden_act == "gelu_pytorch_tanh",
            "vision_config.in_channels must be 3": v.in_channels == 3,
            "vision_config.hidden_size must be a multiple of 4 * num_heads": v.hidden_size % (4 * v.num_heads) == 0,
            "vision_config.out_hidden_size must equal text_config.hidden_size": v.out_hidden_size == t.hidden_size,
            "vision_config.num_position_embeddings must be a square":
                math.isqrt(v.num_position_embeddings) ** 2 == v.num_position_embeddings,
            "vision_config.deepstack_visual_indexes must rise and stay below depth":
                indexes == sorted(set(indexes) & set(range(v.depth))),
        }.items():
            if not holds:
                raise InputError(f"{path}: {rule}")


def _build(cls: type, values: dict, where: str):
    """Build a config dataclass from a JSON object; unknown keys and null values are ignored. Raises InputError."""
    json_types = {"int": int, "float": (int, float), "str": str, "list[int]": list}  # by annotation
    known = {}
    for f in fields(cls):
        value = values.get(f.name)
        if value is None:
            if f.default is MISSING and f.default_factory is MISSING:
                raise InputError(f"{where}.{f.name} is missing")
            continue
        items = value if isinstance(value, list) else ()
        if not isinstance(value, json_types[f.type]) or not all(isinstance(item, int) for item in items):
            raise InputError(f"{where}.{f.name} is {shorten(value)}, it must be {f.type}")
        if f.type == "int" and value < 1 and f.name != "num_experts":
            raise InputError(f"{where}.{f.name} is {value}, it must be above 0")
        known[f.name] = value
    return cls(**known)


def device_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool, implementation: str | None = None
) -> Tensor:
    """Call the current device's attention (see `kernels_npu.Torch.attention`): the default of the `attention` seam."""
    return kernels_npu.ops.attention(q, k, v, cu_seqlens, causal, implementation)


# ---- vision encoder and projector ----------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Embed patches. The checkpoint's Conv3d has stride = kernel, so it is a matrix product over a patch's values."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed patches [P, 1536], each flattened as (channel, time, row, column), as [P, C]."""
        weight = self.proj.weight.flatten(1)
        return F.linear(pixel_values.to(weight.dtype), weight, self.proj.bias)


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.attention: Callable = device_attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: list[int]) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [P, heads, d] each
        q, k = (kernels_npu.ops.rotary(t, cos, sin) for t in (q, k))
        return self.proj(self.attention(q, k, v, cu_seqlens, causal=False).flatten(1))


class VisionMLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.linear_fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=1e-6)
        self.attn = VisionAttention(config)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: list[int]) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, cu_seqlens)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Merge 2x2 patches into one token of the text decoder.

    `norm_after_merge`: the DeepStack mergers normalise the merged patches, the final merger each patch.
    """

    def __init__(self, config: VisionConfig, norm_after_merge: bool):
        super().__init__()
        self.merged_size = config.hidden_size * config.spatial_merge_size**2
        self.norm_after_merge = norm_after_merge
        self.norm = nn.LayerNorm(self.merged_size if norm_after_merge else config.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(self.merged_size, self.merged_size)
        self.linear_fc2 = nn.Linear(self.merged_size, config.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Merge patches [P, C], in merge-block order, into tokens [P/4, D]."""
        x = self.norm(x.view(-1, self.merged_size) if self.norm_after_merge else x).view(-1, self.merged_size)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))


class VisionModel(nn.Module):
    """Encode images and videos of any size in one pass: token embeddings and DeepStack features (arXiv:2406.04334)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config, norm_after_merge=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(config, norm_after_merge=True) for _ in config.deepstack_visual_indexes
        )
        self.block_fn: Callable = plain_block

    def dummy(self, device: torch.device, tokens: slice) -> tuple[Tensor, Tensor]:
        """Return (pixel_values, grid_thw) of the smallest image, which makes one token; `tokens` as in `forward`."""
        side = self.config.spatial_merge_size
        pixel_values = torch.zeros(side**2, self.config.patch_dim, device=device)
        return self.patches_of(pixel_values, tokens), torch.tensor([[1, side, side]])

    def patches_of(self, patches: Tensor, tokens: slice) -> Tensor:
        """Select the patches ([P, ...], in merge-block order) of a slice of the visual tokens."""
        return patches.unflatten(0, (-1, self.config.spatial_merge_size**2))[tokens].flatten(0, 1)

    def forward(
        self, pixel_values: Tensor, grid_thw: Tensor, tokens: slice = slice(None)
    ) -> tuple[Tensor, list[Tensor]]:
        """Return token embeddings [P/4, D] and, for each DeepStack layer, features [P/4, D].

        pixel_values [P, 1536]; grid_thw [N, 3] on the host: frames, rows and columns of patches of each image or video.
        tokens: the visual tokens of `grid_thw` whose patches are in pixel_values; other ranks may have the others.
        """
        rows, columns, neighbour_ids, bilinear_weights = (
            kernels_npu.ops.to_device(self.patches_of(p, tokens)) for p in patch_positions(grid_thw, self.config)
        )
        frames = [h * w for t, h, w in grid_thw.tolist() for _ in range(t)]
        cu_seqlens = [0, *itertools.accumulate(frames)]  # attention stays within a frame
        cos, sin = self.rotary_tables(rows, columns)

        x = self.patch_embed(pixel_values)
        positions = self.pos_embed(neighbour_ids) * bilinear_weights[..., None]
        x = x + positions.sum(1).to(x.dtype)
        deepstack = []
        for i, block in enumerate(self.blocks):
            x = self.block_fn(block, x, cos, sin, cu_seqlens)
            if i in self.config.deepstack_visual_indexes:
                deepstack.append(self.block_fn(self.deepstack_merger_list[len(deepstack)], x))
        return self.block_fn(self.merger, x), deepstack

    def rotary_tables(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [P, d] float32 each, of 2-D rotary embedding.

        One half of the angles is proportional to the row, the other half to the column.
        """
        half = self.config.hidden_size // self.config.num_heads // 2
        inv_freq = 1.0 / 10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32, device=rows.device) / half)
        angles = torch.cat((rows[:, None] * inv_freq, columns[:, None] * inv_freq), dim=-1)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def patch_positions(grid_thw: Tensor, config: VisionConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the position of each patch, in merge-block order (row/2, column/2, row%2, column%2), frame by frame.

    Returns rows [P] and columns [P], in patches. The learned square of position embeddings is interpolated to the
    image's size: neighbour_ids [P, 4] are the four embeddings around each patch, bilinear_weights [P, 4] their weights.
    """
    side, merge = math.isqrt(config.num_position_embeddings), config.spatial_merge_size
    parts = []
    for t, h, w in grid_thw.tolist():
        y = torch.arange(h)[:, None].expand(h, w)
        x = torch.arange(w)[None, :].expand(h, w)
        y, x = (
            p.reshape(h // merge, merge, w // merge, merge).transpose(1, 2).flatten().repeat(t) for p in (y, x)
        )
        at_y, at_x = torch.linspace(0, side - 1, h)[y], torch.linspace(0, side - 1, w)[x]
        top, left = at_y.long(), at_x.long()
        bottom, right = (top + 1).clamp(max=side - 1), (left + 1).clamp(max=side - 1)
        dy, dx = at_y - top, at_x - left
        neighbours = (top * side + left, top * side + right, bottom * side + left, bottom * side + right)
        weights = ((1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx)
        parts.append((y, x, torch.stack(neighbours, -1), torch.stack(weights, -1)))
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


# ---- text decoder --------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels_npu.ops.rms_norm(x, self.weight, self.eps)


class TextAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.attention: Callable = device_attention

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: list[int]) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = kernels_npu.ops.rotary(self.q_norm(q), cos, sin)
        k = kernels_npu.ops.rotary(self.k_norm(k), cos, sin)
        return self.o_proj(self.attention(q, k, v, cu_seqlens, causal=True).flatten(1))


class TextMLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None


def run_experts(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Call the current device's experts (see `kernels_npu.Torch.experts`): the default of the `run_experts` seam."""
    return kernels_npu.ops.experts(x, expert_ids, weights, gate_up, down)


class Experts(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        E, D, I = config.num_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
        self.gate_up_proj = nn.Parameter(torch.empty(E, D, 2 * I))
        self.down_proj = nn.Parameter(torch.empty(E, I, D))
        self.run_experts: Callable = run_experts

    def forward(self, x: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        return self.run_experts(x, expert_ids, weights, self.gate_up_proj, self.down_proj)


class SparseMLP(nn.Module):
    """Mixture of experts: send each token to its top k experts, weighted by the router's renormalised probabilities."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the experts' outputs [T, D] for x [T, D], and the router statistics [2, E].

        The statistics of an expert are the number of tokens assigned to it and the sum of its probabilities. In
        inference mode they are None.
        """
        probs, weights, expert_ids = kernels_npu.ops.moe_route(self.gate(x), self.top_k)
        out = self.experts(x, expert_ids, weights)
        if torch.is_inference_mode_enabled():
            return out, None
        assigned = torch.zeros_like(probs).scatter_(1, expert_ids, 1.0).sum(0)
        return out, torch.stack((assigned, probs.sum(0)))


class DecoderLayer(nn.Module):
    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.self_attn = TextAttention(config)
        self.mlp = SparseMLP(config) if config.is_moe_layer(layer) else TextMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: list[int]) -> tuple[Tensor, Tensor | None]:
        """Return the hidden states [T, D] for x [T, D], and the router statistics of a `SparseMLP` or None."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cu_seqlens)
        out, router_stats = self.mlp(self.post_attention_layernorm(x))
        return x + out, router_stats


class TextModel(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.block_fn: Callable = plain_block

    def forward(
        self, inputs: deque[Tensor], position_ids: Tensor, cu_seqlens: list[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the hidden states [T, D] and the router statistics [2, E] of each mixture-of-experts layer.

        inputs: a queue of the embeddings [T, D] and the DeepStack features [T, D], one for each of the first layers.
        This method takes tensors from the queue as it uses them, so that no caller keeps them in memory.
        position_ids [3, T]: time, row, column.
        """
        x = inputs.popleft()
        cos, sin = (table.to(x.dtype) for table in self.rotary_tables(position_ids))
        stats = []
        for layer in self.layers:
            x, router_stats = self.block_fn(layer, x, cos, sin, cu_seqlens)
            if inputs:
                x = x + inputs.popleft()
            if router_stats is not None:
                stats.append(router_stats)
        return self.norm(x), stats

    def rotary_tables(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, [T, d] float32 each, of interleaved mRoPE.

        Frequencies 1, 4, 7... use the row and 2, 5, 8... the column, up to the length of their sections. The other
        frequencies use time.
        """
        d, (_, height, width) = self.config.head_dim, self.config.mrope_section
        device = position_ids.device
        inv_freq = 1.0 / self.config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)
        axis = torch.zeros(d // 2, dtype=torch.long, device=device)
        axis[1 : 3 * height : 3] = 1
        axis[2 : 3 * width : 3] = 2
        angles = position_ids.float()[axis].T * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


# ---- loss ----------------------------------------------------------------------------------------------------------


class ChunkedCrossEntropy(torch.autograd.Function):
    """Compute `chunked_cross_entropy` and its gradients with one chunk of logits in memory at a time.

    1. Forward computes a chunk's logits, reduces them to the chunk's loss, and turns them in place into their gradient.
    2. That gradient gives the chunk's rows of grad_hidden, and is added to grad_weight in float32. The next chunk uses
       the same memory.
    3. Backward only scales the gradients of forward. So neither direction holds more than one chunk of logits.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, chunk_size: int, grads: bool):
        need_hidden, need_weight = (grads and need for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        new_like = torch.empty_like if hidden.dtype == torch.float32 and len(labels) else torch.zeros_like
        grad_weight = new_like(weight, dtype=torch.float32) if need_weight else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        chunk_size = min(chunk_size or len(labels), len(labels))
        memory = hidden.new_empty(chunk_size, len(weight), dtype=torch.float32)  # each chunk's logits in turn
        for start in range(0, len(labels), max(1, chunk_size)):
            part = slice(start, start + chunk_size)
            target = labels[part, None]
            logits = memory[: len(target)]
            if hidden.dtype == torch.float32:
                torch.mm(hidden[part], weight.T, out=logits)
            else:
                logits.copy_(hidden[part] @ weight.T)
            logits -= logits.amax(-1, keepdim=True)  # in place: logsumexp would allocate two more copies
            at_target = logits.gather(1, target)[:, 0]
            total = logits.exp_().sum(-1)
            loss += weights[part] @ (total.log() - at_target)
            if need_hidden or need_weight:
                grad = logits.mul_((weights[part] / total)[:, None])  # weighted softmax
                grad = grad.scatter_add_(1, target, -weights[part, None]).to(hidden.dtype)
            if need_hidden:
                torch.mm(grad, weight, out=grad_hidden[part])
            if need_weight and grad.dtype == torch.float32:
                grad_weight.addmm_(grad.T, hidden[part], beta=int(start > 0))  # the first chunk overwrites
            elif need_weight:
                grad_weight += grad.T @ hidden[part]
            grad = None  # a copy in bf16: free it before the next chunk's is allocated
        ctx.grads = grad_hidden, grad_weight
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor):
        grads = ctx.grads
        del ctx.grads  # they are scaled in place, so a second backward must not use them
        return (*(g if g is None else g.mul_(scale.to(g.dtype)) for g in grads), None, None, None, None)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, chunk_size: int) -> Tensor:
    """Return sum_i weights[i] * -log p(labels[i]), where p is the softmax of hidden[i] @ weight.T.

    hidden [S, D], weight [V, D], labels [S], weights [S] float32 -> scalar float32. `chunk_size` is the number of rows
    of logits in memory at a time; 0 takes all rows at once.
    """
    return ChunkedCrossEntropy.apply(hidden, weight, labels, weights, chunk_size, torch.is_grad_enabled())


def weighted_cross_entropy(hidden: Tensor, weight: Tensor, batch, chunk_size: int) -> Tensor:
    """Return the weighted cross entropy of a batch's supervised tokens: the default of the `loss_fn` seam.

    hidden [T, D] and weight [V, D] of the language model head; batch: a `data.Batch` -> scalar float32. With context
    parallelism the tokens are this rank's slice, and `cu_seqlens` is that of all ranks' tokens.
    """
    index = batch.supervised_index
    return chunked_cross_entropy(hidden[index], weight, batch.labels[index], batch.loss_weights[index], chunk_size)


class LMHead(nn.Linear):
    """Project hidden states to logits, or compute the loss from them.

    The loss is computed in this forward because FSDP's hooks gather the weight for it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_fn: Callable = weighted_cross_entropy

    def forward(self, x: Tensor, batch=None, chunk_size: int = 0) -> Tensor:
        """Return the logits [T, V] of x [T, D]; with a `data.Batch`, return its loss, a scalar."""
        if batch is None:
            return super().forward(x)
        return self.loss_fn(x, self.weight, batch, chunk_size)


def load_balancing_loss(router_stats: list[Tensor], num_tokens: int) -> Tensor:
    """Return E * sum_e f_e P_e (arXiv:2101.03961, equations 4 to 6), pooled over layers and tokens.

    Even routing gives k. router_stats: [2, E] for each layer; num_tokens: the number of tokens in one layer.
    """
    assigned, probs = torch.stack(router_stats).sum(0) / (len(router_stats) * num_tokens)
    return len(probs) * (assigned * probs).sum()


# ---- full model ----------------------------------------------------------------------------------------------------


def plain_block(block: nn.Module, *args):
    """Call the block: the default of the `block_fn` seam."""
    return block(*args)


def full_tensor_and_offset(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the tensor and offset 0 in each dimension: one process has the full tensor."""
    return tensor.detach(), (0,) * tensor.ndim


def keep_features(features: list[Tensor], batch) -> list[Tensor]:
    """Return the features unchanged, as one rank has every token: the default of the `exchange_features` seam."""
    return features


class Qwen3VL(nn.Module):
    """The full model. Build it with `build_model`, allocate it with `to_empty`, then fill it with weights."""

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()  # a level in the published names
        self.model.visual = VisionModel(config.vision)
        self.model.language_model = TextModel(config.text)
        self.lm_head = LMHead(config.text.hidden_size, config.text.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight
        self.exchange_features: Callable = keep_features
        self.vision_always = False
        self.loss_chunk_size = 1024
        self.router_aux_loss_coef = 0.0

    def _apply(self, fn: Callable, recurse: bool = True) -> Qwen3VL:
        super()._apply(fn, recurse)
        # `to_empty` replaces parameters module by module, which would untie the embedding
        embedding = self.model.language_model.embed_tokens.weight
        if self.config.tie_word_embeddings and self.lm_head.weight is not embedding:
            self.lm_head.weight = embedding
        return self

    def set_attention(self, text: str | None = None, vision: str | None = None) -> None:
        """Choose the attention implementations ('eager', 'sdpa', ...) of the text decoder and the vision encoder.

        None is the device's default. Raises UsageError if the device lacks an implementation.
        """
        for implementation in (text, vision):
            kernels_npu.ops.attention_implementation(implementation)  # raises before the first forward
        for module in self.modules():
            if isinstance(module, TextAttention):
                module.attention = functools.partial(device_attention, implementation=text)
            elif isinstance(module, VisionAttention):
                module.attention = functools.partial(device_attention, implementation=vision)

    def embed(self, batch) -> deque[Tensor]:
        """Return the text decoder's inputs as a queue: token embeddings, then DeepStack features, [T, D] each.

        The embeddings of media tokens are visual features. DeepStack features are zero at all other tokens. The decoder
        empties the queue, so that each tensor is freed after its use.
        """
        x = self.model.language_model.embed_tokens(batch.input_ids)
        visual, tokens = self.model.visual, batch.local_visual_tokens
        has_media = len(batch.grid_thw) > 0
        if has_media:
            features, deepstack = visual(batch.pixel_values, batch.grid_thw, tokens)
        elif self.vision_always:
            features, deepstack = visual(*visual.dummy(x.device, tokens), tokens)
        else:
            return deque([x])
        # If there are fewer text layers than features, the last features are unused, on ranks without media too.
        deepstack = deepstack[: self.config.text.num_hidden_layers]
        if not has_media:
            return deque([x + 0.0 * sum(f.sum() for f in (features, *deepstack)).to(x.dtype)])
        features, *deepstack = self.exchange_features([features, *deepstack], batch)
        if len(features) != len(batch.visual_index):
            raise InputError(f"the row has {len(batch.visual_index)} media tokens, its images and videos make "
                             f"{len(features)}")
        deepstack = [torch.zeros_like(x).index_copy(0, batch.visual_index, f.to(x.dtype)) for f in deepstack]
        return deque([x.index_copy(0, batch.visual_index, features.to(x.dtype)), *deepstack])

    def hidden_states(self, batch) -> tuple[Tensor, list[Tensor]]:
        """Return the hidden states [T, D] after the last norm, and the router statistics of the layers."""
        return self.model.language_model(self.embed(batch), batch.position_ids, batch.cu_seqlens)

    def forward(self, batch) -> tuple[Tensor, Tensor]:
        """Return the loss and, detached and without its coefficient, the router auxiliary loss of a micro-batch.

        batch: a `data.Batch` on the model's device. Its `loss_weights` and `aux_weight` make both losses this
        micro-batch's terms of the sum over the step.
        """
        x, router_stats = self.hidden_states(batch)
        loss = self.lm_head(x, batch, self.loss_chunk_size)
        aux_loss = loss.new_zeros(())
        if router_stats:
            aux_loss = load_balancing_loss(router_stats, batch.cu_seqlens[-1]) * batch.aux_weight
            if self.router_aux_loss_coef:
                loss = loss + self.router_aux_loss_coef * aux_loss
        return loss, aux_loss.detach()

    def may_be_absent(self, name: str) -> bool:
        """Return whether a checkpoint may lack this parameter or buffer, which then keeps its initial value."""
        return False

    @torch.no_grad()
    def init_weights(
        self, seed: int, local_shard_and_offset: Callable = full_tensor_and_offset, names: Collection[str] | None = None
    ) -> None:
        """Initialise the parameters and persistent buffers, or those of the given `names`.

        Weights are normal with the config's standard deviation; biases and buffers are 0, norms 1. A module with a
        method `draw` draws the values of its own parameters.
        `local_shard_and_offset` returns a tensor's slice on this rank and where the slice begins. Values come in blocks
        of rows, each with a generator seeded by `seed`, the name and the row. So they do not depend on how the model is
        sharded, and a rank generates little more than its own slice.
        """
        stored = self.state_dict().keys()
        for name, buffer in self.named_buffers():
            if name in (stored if names is None else names):
                buffer.zero_()
        for name, param in self.named_parameters():
            if names is not None and name not in names:
                continue
            module, _, leaf = name.rpartition(".")
            owner = self.get_submodule(module)
            local, (first, *inner) = local_shard_and_offset(param)
            if leaf == "bias" or isinstance(owner, (RMSNorm, nn.LayerNorm)):
                local.fill_(float(leaf != "bias"))
                continue
            std = (self.config.vision if ".visual." in name else self.config.text).initializer_range
            total, *row = param.shape
            rows = max(1, (1 << 22) // math.prod(row))
            for start in range(first // rows * rows, first + len(local), rows):
                seed_32_bits = zlib.crc32(f"{seed} {name} {start}".encode())
                generator = torch.Generator().manual_seed(seed_32_bits)
                block = torch.empty(min(rows, total - start), *row)
                if hasattr(owner, "draw"):
                    owner.draw(leaf, block, generator)
                else:
                    block.normal_(0.0, std, generator=generator)
                begin, end = max(first, start), min(first + len(local), start + rows)
                own = tuple(slice(o, o + n) for o, n in zip(inner, local.shape[1:], strict=True))
                local[begin - first : end - first] = block[(slice(begin - start, end - start), *own)]


def build_model(config: Qwen3VLConfig, is_frozen: Callable[[str], bool] = lambda name: False) -> Qwen3VL:
    """Build the model on the meta device, for training, inference, conversion and the dry run alike.

    `is_frozen` takes a parameter's name. A change to the set of parameters belongs here, where every program sees it.
    """
    with torch.device("meta"):
        model = Qwen3VL(config)
    for name, p in model.named_parameters():
        p.requires_grad_(not is_frozen(name))
    return model


# ---- accounting ----------------------------------------------------------------------------------------------------

COMPONENTS = ("vision encoder", "vision projector", "text decoder")


def component_of(name: str) -> str:
    """Return the component of a parameter's name. The projector is the merger and the DeepStack mergers."""
    if name.startswith(("model.visual.merger.", "model.visual.deepstack_merger_list.")):
        return "vision projector"
    return "vision encoder" if name.startswith("model.visual.") else "text decoder"


def parameter_table(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, tuple[int, int]]:
    """Return {component: (number of parameters, number of trainable parameters)}."""
    table = {component: (0, 0) for component in COMPONENTS}
    for name, p in named_parameters:
        total, trainable = table[component_of(name)]
        table[component_of(name)] = total + p.numel(), trainable + p.numel() * p.requires_grad
    return table


def trainable_components(model: Qwen3VL) -> set[str]:
    """Return the components with at least one parameter that requires a gradient."""
    return {component_of(name) for name, p in model.named_parameters() if p.requires_grad}


def step_flops(
    config: Qwen3VLConfig, cu_seqlens: list[int], grid_thw: Tensor, num_supervised: int,
    trainable: Collection[str] = COMPONENTS, adapters: dict[str, float] | None = None,
) -> float:
    """Return the floating point operations of forward and backward of one packed row, without recompute.

    Only matrix products count. Causal attention counts half, and unsupervised tokens have no logits. Backward computes
    the gradients of the weights of the `trainable` components, and those of the activations in these components and in
    the components after them. So it is twice forward if every component is trainable. `adapters` holds, for a component
    with trainable adapters, their multiply-adds for a row of its activations: a patch, a visual token or a token. The
    weights of such a component are frozen.
    """
    t, v = config.text, config.vision
    q, kv = t.num_attention_heads * t.head_dim, t.num_key_value_heads * t.head_dim
    num_moe = sum(t.is_moe_layer(i) for i in range(t.num_hidden_layers))
    attention = t.hidden_size * (2 * q + 2 * kv) * t.num_hidden_layers
    dense = 3 * t.hidden_size * t.intermediate_size * (t.num_hidden_layers - num_moe)
    sparse = (3 * t.num_experts_per_tok * t.moe_intermediate_size + t.num_experts) * t.hidden_size * num_moe
    patches = [(frames * h * w, h * w) for frames, h, w in grid_thw.tolist()]  # per image or video, and per frame
    total = sum(n for n, _ in patches)
    block = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
    merged = v.hidden_size * v.spatial_merge_size**2
    merger = (merged * merged + merged * v.out_hidden_size) * (1 + len(v.deepstack_visual_indexes))
    rows = total, total // v.spatial_merge_size**2, cu_seqlens[-1]
    forward = (  # multiply-adds of each component: with weights, between activations
        (rows[0] * v.depth * block,
         v.depth * sum(2 * v.hidden_size * n * frame for n, frame in patches)),
        (rows[1] * merger, 0),
        (rows[2] * (attention + dense + sparse) + num_supervised * t.hidden_size * t.vocab_size,
         t.num_hidden_layers * sum(q * (b - a) ** 2 for a, b in itertools.pairwise(cu_seqlens))),
    )
    adapters = adapters or {}
    trainable = set(trainable) - adapters.keys()
    backward = COMPONENTS[0] in trainable
    flops = 2 * total * v.patch_dim * v.hidden_size * (1 + backward)  # pixels have no gradient
    for component, n, (with_weights, of_activations) in zip(COMPONENTS, rows, forward, strict=True):
        backward |= component in trainable or component in adapters
        flops += 2 * with_weights * (1 + backward + (component in trainable)) + 2 * of_activations * (1 + 2 * backward)
        flops += 6 * n * adapters.get(component, 0)
    return float(flops)
