"""transformers' Qwen3-VL processing, assembled from its parts, and the rows that tests of data.py give to both sides.

Qwen3VLProcessor itself needs torchvision, which is not a dependency. Its parts do not: the tokenizer with the chat
template, the Pillow image processor and the model's `get_rope_index`. The video processor's two plain functions are
compiled from its source.
"""
from __future__ import annotations

import ast
import math
import pickle
import types
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

# The chat templates of Qwen/Qwen3-VL-8B-Instruct and Qwen/Qwen3-VL-8B-Thinking on Hugging Face (Apache-2.0). Three
# public repositories agree on the second one's text, among them Mininglamp-AI/mano-skill.
TEMPLATE = (Path(__file__).parent / "assets" / "chat_template.jinja").read_text()
THINKING = (Path(__file__).parent / "assets" / "thinking_template.jinja").read_text()
SIZE = {"shortest_edge": 65536, "longest_edge": 16777216}
HALF = [0.5, 0.5, 0.5]


class Reference:
    """Process conversations and videos as transformers does."""

    def __init__(self, tokenizer_dir: Path):
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_dir / "tokenizer.json"))
        self.images = Qwen2VLImageProcessorPil(patch_size=16, size=dict(SIZE), image_mean=HALF, image_std=HALF)

    def process_image(self, path: Path, **size) -> tuple[np.ndarray, np.ndarray]:
        output = self.images(load_image(str(path)), size=SIZE | size, return_tensors="np")
        return output["pixel_values"], output["image_grid_thw"]

    def encode(self, messages: list[dict], generation: bool = False, template: str = TEMPLATE, **settings):
        """Return ids, positions, pixels and grids of messages whose content may hold images as {"image": path}."""
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=generation, **settings
        )
        contents = [message["content"] for message in messages if isinstance(message["content"], list)]
        parts = [part for content in contents for part in content]
        paths = [part["image"] for part in parts if part["type"] == "image"]
        pixels, grids = zip(*[self.process_image(path) for path in paths], strict=True) if paths else ((), ())
        texts = text.split("<|image_pad|>")
        for i, grid in enumerate(grids):  # Qwen3VLProcessor.replace_image_token
            texts[i] += "<|image_pad|>" * int(grid.prod() // 4)
        ids = self.tokenizer("".join(texts), return_tensors="pt", add_special_tokens=False)["input_ids"]
        grid_thw = torch.from_numpy(np.concatenate(grids)) if paths else torch.zeros(0, 3, dtype=torch.int64)
        token_types = (ids == self.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
        positions = rope_index(ids, token_types, grid_thw if paths else None, None)
        return ids[0], positions, np.concatenate(pixels) if paths else np.zeros((0, 1536), np.float32), grid_thw

    def encode_video(self, processor, text: str, frames: list[Image.Image], fps: float):
        """Return ids, positions, grid, frame size and frame numbers of a user turn that begins with a video.

        The prompt is that of transformers 4.57; sampling settings are `processor`'s.
        """
        sampler = types.SimpleNamespace(fps=processor.video_fps, min_frames=4, max_frames=processor.video_maxlen)
        metadata = types.SimpleNamespace(total_num_frames=len(frames), fps=fps)
        indices = VIDEO["sample_frames"](sampler, metadata).tolist()
        width, height = frames[0].size
        h, w = VIDEO["smart_resize"](len(indices), height, width, 2, 32, *processor.video_pixels)
        times = Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps, 2)
        grid = torch.tensor([[len(times), h // 16, w // 16]])
        prompt = "<|im_start|>user\n"
        for time in times:
            prompt += f"<{time:.1f} seconds><|vision_start|>" + "<|video_pad|>" * (h * w // 1024) + "<|vision_end|>"
        prompt += f"{text}<|im_end|>\n<|im_start|>assistant\n"
        ids = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        token_types = (ids == processor.video_token_id).int() * 2
        return ids[0], rope_index(ids, token_types, None, grid), grid, (h, w), indices


def rope_index(ids, token_types, image_grid_thw, video_grid_thw):
    """Return transformers' positions [3, T]. The method uses nothing of its model but the configuration."""
    model = types.SimpleNamespace(config=Qwen3VLConfig())
    model.get_vision_position_ids = types.MethodType(Qwen3VLModel.get_vision_position_ids, model)
    positions, _ = Qwen3VLModel.get_rope_index(model, ids, token_types, image_grid_thw, video_grid_thw)
    return positions[:, 0]


def functions_from_source(module_path: str, *names: str) -> dict:
    """Return plain functions of a transformers module that cannot be imported without torchvision."""
    tree = ast.parse((Path(transformers.__file__).parent / module_path).read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names]
    for node in found:
        node.decorator_list = []
    scope = {"np": np, "math": math, "VideoMetadata": object}
    exec(compile(ast.Module(found, []), module_path, "exec"), scope)
    return scope


VIDEO = functions_from_source("models/qwen3_vl/video_processing_qwen3_vl.py", "smart_resize", "sample_frames")


def chat(*turns: str, **media) -> dict:
    """Return a row of user and assistant turns. A first turn that starts with "system:" is a system turn."""
    roles = ["user", "assistant"] * len(turns)
    if turns[0].startswith("system:"):
        roles.insert(0, "system")
    messages = [{"role": r, "content": t.removeprefix("system:")} for r, t in zip(roles, turns, strict=False)]
    return {"messages": messages, **media}


def transformers_messages(row: dict, folder: Path) -> list[dict]:
    """Convert a row's messages to transformers' form: `<image>` becomes a part of the content."""
    paths, messages = iter(row.get("images", [])), []
    for message in row["messages"]:
        content = message["content"]
        if message["role"] in ("user", "tool") and "<image>" in content:
            texts = content.split("<image>")
            content = [{"type": "text", "text": texts[0]}]
            for text in texts[1:]:
                content += [{"type": "image", "image": str(folder / next(paths))}, {"type": "text", "text": text}]
        messages.append(message | {"content": content})
    return messages


def assert_equal(sample, expected) -> None:
    """Compare a Sample with the result of `Reference.encode`."""
    ids, positions, pixels, grid_thw = expected
    assert sample.input_ids.tolist() == ids.tolist()
    assert sample.position_ids.tolist() == positions.tolist()
    assert sample.grid_thw.tolist() == grid_thw.tolist()
    assert sample.pixel_values.dtype == torch.float32
    assert np.array_equal(sample.pixel_values.numpy(), pixels)


def changed(processor, **changes):
    """Return a copy of the processor with other settings; making a new processor takes longer."""
    copy = pickle.loads(pickle.dumps(processor))
    copy.__dict__.update(changes)
    return copy
