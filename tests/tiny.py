"""Build small models with uneven sizes, directories and samples for the tests."""
from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch

import data

# 256 bytes, then the control tokens: the whole vocabulary of the tiny tokenizer
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
            "<|video_pad|>"]
START, END, IMAGE, VIDEO = 259, 260, 261, 262


def config_dict(moe: bool = False, tied: bool = False, vocab_size: int = 264, layers: int = 4, **text) -> dict:
    """Return a small Hugging Face configuration that transformers 4 and 5 accept.

    It has 3 heads per key-value head, head size 24, I != D, 2I != D, three DeepStack layers, unequal mrope sections and
    25 learned positions.
    """
    text = {
        "model_type": "qwen3_vl_moe_text" if moe else "qwen3_vl_text",
        "vocab_size": vocab_size, "hidden_size": 56, "intermediate_size": 72, "num_hidden_layers": layers,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096, "initializer_range": 0.1, "attention_bias": False, "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [5, 4, 3],
                            "mrope_interleaved": True},
        "pad_token_id": None, "tie_word_embeddings": tied,  # transformers 4 reads it here
        **text,
    }
    text["rope_scaling"] = {k: v for k, v in text["rope_parameters"].items() if k != "rope_theta"}  # transformers 4
    if moe:
        text |= {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "decoder_sparse_step": 1,
                 "mlp_only_layers": [], "norm_topk_prob": True}
    vision = {
        "model_type": "qwen3_vl_moe" if moe else "qwen3_vl", "depth": 5, "hidden_size": 48, "intermediate_size": 68,
        "num_heads": 3, "in_channels": 3, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "out_hidden_size": 56, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 2, 3],
        "hidden_act": "gelu_pytorch_tanh", "initializer_range": 0.1,
    }
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration" if moe else "Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl_moe" if moe else "qwen3_vl", "text_config": text, "vision_config": vision,
        "tie_word_embeddings": tied, "image_token_id": IMAGE, "video_token_id": VIDEO,
        "vision_start_token_id": START, "vision_end_token_id": END,
    }


def hf_model(raw: dict, seed: int = 0, device: str = "cpu"):
    """Build transformers' model in float32 with random parameters, norms and biases included."""
    import transformers as t

    moe = raw["model_type"] == "qwen3_vl_moe"
    config = (t.Qwen3VLMoeConfig if moe else t.Qwen3VLConfig)(**raw)
    torch.manual_seed(seed)
    with torch.device(device):
        model = (t.Qwen3VLMoeForConditionalGeneration if moe else t.Qwen3VLForConditionalGeneration)(config).float()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, device=device) * 0.05)
    return model


def our_layout(name: str, value: torch.Tensor) -> torch.Tensor:
    """Return a tensor of transformers' model in the published layout. Version 5 transposes experts."""
    transposed = transformers_5() and name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    return value.transpose(1, 2) if transposed else value


def transformers_5() -> bool:
    """Return whether transformers 5 is installed; `make test-slow` runs the model's tests with 4.57 too."""
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


def our_config(raw: dict, tmp_path: Path):
    """Return our configuration of a Hugging Face one; `config.json` is written to `tmp_path`."""
    from model import Qwen3VLConfig

    (tmp_path / "config.json").write_text(json.dumps(raw))
    return Qwen3VLConfig.from_json(tmp_path)


def ours_from_hf(hf, raw: dict, tmp_path: Path):
    """Build our model with the weights of transformers' model."""
    from model import Qwen3VL

    model = Qwen3VL(our_config(raw, tmp_path))
    model.load_state_dict({k: our_layout(k, v) for k, v in hf.state_dict().items()})
    return model


def hf_dir(path: Path, raw: dict, hf=None) -> Path:
    """Write a Hugging Face directory: configuration, byte tokenizer, and image processor (32 x 32 to 96 x 96 pixels).

    If transformers' model `hf` is given, write its weights too, in the published layout.
    """
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    (path / "preprocessor_config.json").write_text(json.dumps({
        "size": {"shortest_edge": 32 * 32, "longest_edge": 96 * 96}, "patch_size": 16, "temporal_patch_size": 2,
        "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer.save(str(path / "tokenizer.json"))
    if hf is not None:
        tied = raw["tie_word_embeddings"]
        save_file({k: our_layout(k, v).contiguous() for k, v in hf.state_dict().items()
                   if not (tied and k == "lm_head.weight")}, path / "model.safetensors", metadata={"format": "pt"})
    return path


def row(parts: list, seed: int = 0):
    """Build a sample: an integer is that many text tokens, ("image", h, w) and ("video", t, h, w) are patches.

    Returns input_ids, pixel_values, grid_thw and kinds ("image" or "video"), in token order.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, pixels, grids, kinds = [], [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(0, START, (part,), generator=generator).tolist()
            continue
        kind, *grid = part
        t, h, w = grid if kind == "video" else (1, *grid)
        for _ in range(t):
            ids += [START] + [IMAGE if kind == "image" else VIDEO] * (h * w // 4) + [END]
            if kind == "video":
                ids += [7, 8]  # in place of the next frame's time stamp
        pixels.append(torch.randn(t * h * w, 1536, generator=generator))
        grids.append([t, h, w])
        kinds.append(kind)
    return SimpleNamespace(
        input_ids=torch.tensor(ids), kinds=kinds, pixel_values=torch.cat(pixels) if pixels else torch.zeros(0, 1536),
        grid_thw=torch.tensor(grids, dtype=torch.long).reshape(-1, 3),
    )


def hf_inputs(sample) -> dict:
    """Return the arguments of transformers' forward for a sample of `row`."""
    ids = sample.input_ids[None]
    out = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if transformers_5():
        out["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    sizes = sample.grid_thw.prod(1).tolist()
    for kind, pixel_key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        pixels = [p for p, k in zip(sample.pixel_values.split(sizes), sample.kinds, strict=True) if k == kind]
        if pixels:
            out[pixel_key] = torch.cat(pixels)
            out[f"{kind}_grid_thw"] = sample.grid_thw[[i for i, k in enumerate(sample.kinds) if k == kind]]
    return out


def positions(hf, inputs: dict) -> torch.Tensor:
    """Return transformers' position ids [3, T] (time, row, column) for its forward's arguments."""
    ids, _ = hf.model.get_rope_index(**{k: v for k, v in inputs.items() if not k.startswith("pixel_values")})
    return ids[-3:, 0]


def batch_from_hf(hf, samples: list):
    """Pack samples for our model, with transformers' position ids."""
    return batch_of(samples, [positions(hf, hf_inputs(sample)) for sample in samples])


def batch_of(samples: list, positions: list[torch.Tensor], labels: list[torch.Tensor] | None = None):
    """Pack samples for our model. positions: [3, T] of each sample.

    labels are already shifted. By default each is the next token, or -100 if that is a media token.
    """
    if labels is None:
        labels = []
        for s in samples:
            target = torch.cat([s.input_ids[1:], torch.tensor([-100])])
            labels.append(target.masked_fill((target == IMAGE) | (target == VIDEO), -100))
    packed = []
    for s, position_ids, target in zip(samples, positions, labels, strict=True):
        media = (s.input_ids == IMAGE) | (s.input_ids == VIDEO)
        packed.append(data.Sample(
            input_ids=s.input_ids, labels=target, position_ids=position_ids, pixel_values=s.pixel_values,
            grid_thw=s.grid_thw, visual_index=media.nonzero()[:, 0], source="", truncated=False,
        ))
    batch = data.collate(packed)
    batch.loss_weights = torch.full((len(batch.input_ids),), 1.0 / max(1, len(batch.supervised_index)))
    batch.aux_weight = 1.0
    return batch
