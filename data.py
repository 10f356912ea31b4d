"""Turn dataset rows into packed batches: JSON row -> Sample -> Batch.

From top to bottom: samples and batches, options and flags, row formats (`parse_row`), images and videos, tokens,
labels, positions and patches (`Processor`), files of rows (`RowDataset`, `RowStream`), and the endless, resumable
stream of micro-batches (`Loader`). The program converts and inspects datasets (tools/dataset_cli.py):

    python data.py llava --annotations llava_instruct_150k.json --image_dir COCO2017/train2017 --output rows.json
    python data.py check --dataset rows.json --init-from-hf-path DIR --report report.html

Token ids, positions and pixels equal those of transformers' Qwen3-VL processor with its Pillow image processor; video
prompts equal those of transformers 4.57. Options in a row, such as `max_pixels`, act as in the Qwen team's
qwen-vl-utils. Two differences are intended. Rotated videos are upright. And only this file writes control tokens: an
"<|im_end|>" in a row's text becomes the ordinary tokens of its characters. Other added tokens, such as <think> and
<|box_start|>, stay tokens. The only markup is `<image>` and `<video>` in user and tool turns.

Shapes: T tokens, P patches, N images and videos, Nv media tokens, Ns supervised tokens.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import contextlib
import functools
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import os
import re
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from common import InputError, UsageError, leave_process_group, number, one_line, read_json, shorten

logger = logging.getLogger(__name__)
# Pillow warns about images of more than 89 million pixels, which large photographs have, and refuses twice as many.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

IGNORE = -100  # the label of a token that is not supervised


# ---- samples and batches -----------------------------------------------------------------------------------------


def _declare(kind: str, **options):
    """Declare a field's kind, which `collate`, `Batch.to` and `parallel.local_batch` follow.

    token   one entry per token, in the last dimension: concatenated; on the device; sliced by context parallelism
    index   positions of tokens: concatenated, offset by the sample's first token; on the device; sliced
    patch   one row per patch of pixels: concatenated; on the device; sliced with the visual tokens
    media   one row per image or video: concatenated; on the host
    sample  one value per sample: a list; on the host
    host    everything else; on the host
    """
    return field(metadata={"kind": kind}, **options)


ON_DEVICE = ("token", "index", "patch")


@dataclass
class Sample:
    """One encoded row."""

    input_ids: Tensor = _declare("token")  # [T] int64
    labels: Tensor = _declare("token")  # [T] int64, shifted: labels[i] is the token to predict at i, or IGNORE
    position_ids: Tensor = _declare("token")  # [3, T] int64 (temporal, height, width), from 0
    pixel_values: Tensor = _declare("patch")  # [P, 1536] float32, images and videos in token order
    grid_thw: Tensor = _declare("media")  # [N, 3] int64: frame pairs, rows and columns of patches, in token order
    visual_index: Tensor = _declare("index")  # [Nv] int64, positions of the media tokens
    source: str = _declare("sample")  # "train.json row 12 (id 33471)"
    truncated: bool = _declare("sample")  # cut to the sequence length


@dataclass
class Batch:
    """Samples packed end to end, each with positions from 0; `cu_seqlens` bounds their attention.

    Under context parallelism a rank holds one slice of the tokens and another, independent slice of the patches. Fields
    of the kinds media, sample and host still describe the full batch.
    """

    input_ids: Tensor = _declare("token")  # [T] int64
    labels: Tensor = _declare("token")  # [T] int64, shifted
    position_ids: Tensor = _declare("token")  # [3, T] int64
    pixel_values: Tensor = _declare("patch")  # [P, 1536] float32, or the Loader's `pixel_dtype`
    grid_thw: Tensor = _declare("media")  # [N, 3] int64
    visual_index: Tensor = _declare("index")  # [Nv] int64, positions of the media tokens
    supervised_index: Tensor = _declare("index")  # [Ns] int64, positions whose label is not IGNORE
    sources: list[str] = _declare("sample")
    sample_ids: Tensor = _declare("token")  # [T] int64, the number of each token's sample
    cu_seqlens: list[int] = _declare("host")  # [0, ..., T]
    truncated: int = _declare("host", default=0)  # samples cut to the sequence length
    rows_read: list[int] = _declare("host", default_factory=list)  # of each dataset file
    rows_bad: list[int] = _declare("host", default_factory=list)  # the bad ones among them
    resume_state: dict = _declare("host", default_factory=dict)  # JSON: the position in the stream after this batch
    # Set by train.set_loss_weights before the forward:
    loss_weights: Tensor | None = _declare("token", default=None)  # [T] float32
    aux_weight: float = _declare("host", default=0.0)  # this batch's share of the step's router auxiliary loss
    # Set by parallel.local_batch:
    local_visual_tokens: slice = _declare("host", default_factory=lambda: slice(None))  # whose patches are here
    feature_splits: tuple[list[int], list[int]] | None = _declare("host", default=None)  # sizes to send, to receive

    def measure(self) -> Measurement:
        """Return the micro-batch's size."""
        supervised = self.sample_ids[self.supervised_index].bincount(minlength=len(self.cu_seqlens) - 1).tolist()
        return Measurement(self.sources, supervised, self.cu_seqlens[-1], len(self.grid_thw), self.resume_state)

    def _convert(self, convert: Callable[[Tensor], Tensor]) -> Batch:
        """Return a copy with `convert` applied to the tensors that belong on the device."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["kind"] in ON_DEVICE}
        return replace(self, **{name: convert(value) for name, value in values.items() if value is not None})

    def to(self, device: torch.device | str) -> Batch:
        """Return a copy on `device`; the copy is asynchronous from pinned memory."""
        return self._convert(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return a copy in pinned memory (DataLoader calls this)."""
        return self._convert(Tensor.pin_memory)


class Measurement(NamedTuple):
    """The size of a micro-batch, which texts and headers tell before pixels are decoded."""

    sources: list[str]  # of the samples
    supervised: list[int]  # supervised tokens of each sample; an empty batch has one sample without any
    length: int  # tokens
    media: int  # images and videos
    resume_state: dict  # the position in the stream after this micro-batch
    # Set by the Loader:
    spans: Sequence[Span] = ()  # of the rows
    failures: Sequence[str] = ()  # the errors of bad rows
    batch: Batch | None = None  # the complete micro-batch, if it has no pixels


def collate(samples: list[Sample], **stream_fields) -> Batch:
    """Pack samples end to end. An empty list (every row was bad) gives a batch of one unsupervised token.

    `stream_fields` are `rows_read`, `rows_bad` and `resume_state` of the batch.
    """
    sources = [sample.source for sample in samples]
    if not samples:
        empty, zero = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        samples = [Sample(
            input_ids=zero, labels=zero + IGNORE, position_ids=zero.expand(3, 1), pixel_values=torch.zeros(0, 1536),
            grid_thw=empty.view(0, 3), visual_index=empty, source="", truncated=False,
        )]
    cu_seqlens = [0, *itertools.accumulate(len(sample.input_ids) for sample in samples)]
    packed: dict[str, Tensor | list] = {}
    for f in fields(Sample):
        values = [getattr(sample, f.name) for sample in samples]
        if f.metadata["kind"] == "sample":
            packed[f.name] = values
        elif f.metadata["kind"] == "index":
            packed[f.name] = torch.cat([v + start for v, start in zip(values, cu_seqlens, strict=False)])
        else:
            packed[f.name] = torch.cat(values, dim=-1 if f.metadata["kind"] == "token" else 0)
    del packed["source"]
    return Batch(
        **packed | {"truncated": sum(packed["truncated"])},
        supervised_index=torch.nonzero(packed["labels"] != IGNORE).flatten(),
        sources=sources,
        sample_ids=torch.arange(len(samples)).repeat_interleave(torch.tensor(cu_seqlens).diff()),
        cu_seqlens=cu_seqlens,
        **stream_fields,
    )


# ---- options and flags -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodeOptions:
    """Options of `Processor.encode`."""

    seq_length: int | None = None  # cut longer samples to this many tokens
    train_on_prompt: bool = False  # supervise every token except those of media
    mask_history: bool = False  # supervise the last answer only
    for_generation: bool = False  # drop a final answer, and end with the start of an answer instead
    confine_paths: bool = False  # refuse media outside the media directory

    def __post_init__(self):
        if self.train_on_prompt and self.mask_history:
            raise UsageError("--train-on-prompt and --mask-history exclude each other: give one of them")


ENCODE_DEFAULTS = EncodeOptions()
MEDIA_LIMITS = ("image_min_pixels", "image_max_pixels", "video_min_pixels", "video_max_pixels", "video_fps",
                "video_maxlen")


def add_media_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags named in MEDIA_LIMITS."""
    for kind, pixels in (("image", "height x width"), ("video", "frames x height x width")):
        for limit, change in (("min", "enlarge smaller"), ("max", "shrink larger")):
            group.add_argument(f"--{kind}-{limit}-pixels", type=number(int, 1), metavar="N",
                               help=f"{change} {kind}s to N pixels, {pixels} (default: the model's setting)")
    group.add_argument("--video-fps", type=number(float, 0.001, 1e6), metavar="X",
                       help="frames to sample per second of video (default: 2.0)")
    group.add_argument("--video-maxlen", type=number(int, 2), metavar="N",
                       help="maximum number of frames to sample from a video (default: 64)")


def media_limits(args: argparse.Namespace) -> dict[str, float]:
    """Return those of these flags that were given, as arguments of `Processor`.

    Raises UsageError if a minimum is above its maximum.
    """
    for kind in ("image", "video"):
        low, high = getattr(args, f"{kind}_min_pixels"), getattr(args, f"{kind}_max_pixels")
        if low and high and low > high:
            raise UsageError(f"--{kind}-min-pixels {low} is above --{kind}-max-pixels {high}: give a smaller one")
    return {name: getattr(args, name) for name in MEDIA_LIMITS if getattr(args, name) is not None}


def describe_limits(limits: dict[str, float]) -> str:
    """Return the flags that give these limits."""
    return ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in limits.items())


def add_row_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of `encode_options`, except --seq-length, whose meaning differs between programs."""
    switch = argparse.BooleanOptionalAction
    group.add_argument("--confine-paths", action=switch, default=False,
                       help="refuse media files outside the dataset directory")
    group.add_argument("--train-on-prompt", action=switch, default=False,
                       help="supervise every token except those of media")
    group.add_argument("--mask-history", action=switch, default=False, help="supervise the last answer only")
    add_thinking_flag(group)


def add_thinking_flag(group: argparse._ArgumentGroup) -> None:
    """Add --enable-thinking, an argument of `Processor`."""
    group.add_argument("--enable-thinking", action=argparse.BooleanOptionalAction, default=None,
                       help="for a chat template that knows enable_thinking: prompts ask for a thought, or with --no- "
                       "end with an empty one, and answers lose theirs")


def encode_options(args: argparse.Namespace) -> EncodeOptions:
    """Return the options that the flags give. Raises UsageError if two flags exclude each other."""
    return EncodeOptions(
        seq_length=args.seq_length,
        train_on_prompt=args.train_on_prompt,
        mask_history=args.mask_history,
        confine_paths=args.confine_paths,
    )


# ---- row formats -------------------------------------------------------------------------------------------------

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "function_call": "assistant", "tool": "tool", "observation": "tool"}
NEXT_ROLES = {None: ("user", "system"), "system": ("user",), "user": ("assistant",), "assistant": ("user", "tool"),
              "tool": ("assistant", "tool", "user")}  # role of a message -> roles that may follow
PLACEHOLDER = re.compile("(<image>|<video>)")
# <image 1>, <|image_1|>, <Image>, <|image_pad|>
OTHER_PLACEHOLDER = re.compile(r"<\|?(image|video)([ _-]?\d*|_pad)\|?>", re.IGNORECASE)
IMAGE_URL = re.compile("data:image[^,]*;base64,", re.IGNORECASE)  # the Qwen team's examples lack the format

# The keys that are used. All others are metadata, which `data.py check` counts, unless they are in the tuples below.
ROW_KEYS = ("id", "messages", "conversations", "system", "tools", "image", "images", "video", "videos")
MESSAGE_KEYS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ANSWER_KEYS = ("tool_calls", "loss")  # and reasoning_content, if the chat template uses it
PART_CONTENTS = ("text", "image", "image_url", "video", "video_url")
PART_KEYS = ("type", *PART_CONTENTS, "path", "url")  # and MediaOptions
# A row that has one of these is refused where the key is not used, because it would mean something else without it.
PROMPT_KEYS = ("tools", "tool_calls", "functions", "function_call", "objects", "audio", "audios", "raw_fps")
TRAINING_KEYS = ("chosen", "rejected", "rejected_response", "rejected_messages", "label", "kto_tag", "channel",
                 "loss_scale", "loss_mask")  # these have no effect on the prompts of infer.py
MESSAGE_TRAINING_KEYS = (*TRAINING_KEYS, "loss", "weight", "train", "training")  # of messages and content parts
EMPTY = (None, "", [], {})  # a key with such a value counts as absent: tools that write tables fill in absent keys


@dataclass
class Media:
    """An image or video of a row."""

    kind: str  # "image" or "video"
    key: str  # the key that names it, for error messages: "images[0]"
    # A path, a list of paths or {"path": ..., "fps": ...}. A placeholder has None, or "" if the row need not fill it.
    spec: str | list | dict | None
    options: dict = field(default_factory=dict)  # fields of MediaOptions, not checked yet


@dataclass(frozen=True)
class MediaOptions:
    """Settings of one image or video in a row, with the names and meanings of the Qwen team's qwen-vl-utils.

    Those that are None are the processor's.
    """

    min_pixels: float | None = None  # height x width of an image, or of each frame of a video
    max_pixels: float | None = None
    resized_height: float | None = None  # a size instead of pixel limits, which `smart_resize` rounds
    resized_width: float | None = None
    # Of videos only:
    total_pixels: float | None = None  # height x width of a video's frame pairs together
    fps: float | None = None  # frames to take per second
    sample_fps: float | None = None  # of frames: the rate at which they were taken from a video
    nframes: float | None = None  # number of frames to take
    min_frames: float | None = None
    max_frames: float | None = None
    video_start: float | None = None  # seconds
    video_end: float | None = None
    source_fps: float | None = None  # `fps` of {"path": ..., "fps": ...}: the video's own rate

    def __post_init__(self):
        for pair in (("nframes", "fps"), ("sample_fps", "fps")):
            if None not in (getattr(self, name) for name in pair):
                raise InputError(f"'{pair[0]}' and '{pair[1]}' exclude each other: keep one")
        if (self.resized_height is None) != (self.resized_width is None):
            raise InputError("'resized_height' and 'resized_width' belong together: give both or none")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise InputError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}: give a smaller one")


NO_OPTIONS = MediaOptions()
VIDEO_OPTIONS = tuple(f.name for f in fields(MediaOptions) if f.name != "source_fps")
IMAGE_OPTIONS = VIDEO_OPTIONS[: VIDEO_OPTIONS.index("total_pixels")]


@dataclass
class Turn:
    """One message, or consecutive tool answers: its role, and its texts and media in order."""

    role: str  # "system", "user", "assistant" or "tool"
    parts: list[str | Media]
    thought: str | None = None  # reasoning_content of an answer
    calls: list[str] = field(default_factory=list)  # tool calls of an answer, as the chat template writes them
    loss: bool | None = None  # whether to supervise this turn; None leaves it to the options


def is_no_media(value) -> bool:
    """Return whether a value names no image or video, such as "", [null] or {"path": null, "bytes": null}."""
    if isinstance(value, list):
        return all(item is None for item in value)
    return all(item in EMPTY for item in value.values()) if isinstance(value, dict) else value in EMPTY


def parse_row(row: dict, for_generation: bool = False) -> list[Turn]:
    """Convert a row to turns: an optional system turn, then user and assistant turns alternately.

    The two formats are `{"messages": [{"role", "content"}], "images", "videos"}` and `{"conversations": [{"from",
    "value"}], "image", "video"}`. Both may have the system turn's text under `system`. `<image>` and `<video>` are
    placeholders in user and tool turns only, as in transformers' chat template. Content may also be a list of `{"type":
    "text" | "image" | "video", ...}`; placeholders in its texts are ordinary text. `for_generation` drops a final
    answer. Raises InputError.

    The row's `tools` become the end of the system turn. An assistant's message may have `tool_calls`, or be a
    `function_call` whose text is the calls as JSON. Messages with the role `tool` or `observation` may follow it,
    and after them the user's, such as one that shows the tool's image.
    """
    if not isinstance(row, dict):
        raise InputError(f"a row must be an object with 'messages' or 'conversations', not {shorten(row)}")
    _refuse_keys(row, for_generation)
    names = [name for name in MESSAGE_KEYS if row.get(name) not in EMPTY]
    if len(names) > 1:
        raise InputError("the row has both 'messages' and 'conversations': keep one")
    name = names[0] if names else "messages"
    role_key, text_key = MESSAGE_KEYS[name]
    if name not in row:
        keys = ", ".join(row) or "none"
        raise InputError(f"the row has neither 'messages' nor 'conversations'; its keys: {keys[:200]}")
    if not isinstance(row[name], list) or not row[name]:
        raise InputError(f"'{name}' must be a list of turns, not {shorten(row[name])}")

    turns: list[Turn] = []
    system = row.get("system")
    if system not in EMPTY:
        if not isinstance(system, str):
            raise InputError(f"'system' must be a string, not {shorten(system)}")
        turns.append(Turn("system", [system]))
    for i, message in enumerate(row[name]):
        has_calls = isinstance(message, dict) and message.get("tool_calls") not in EMPTY
        if not isinstance(message, dict) or role_key not in message or text_key not in message and not has_calls:
            raise InputError(f"{name}[{i}] must be an object with '{role_key}' and '{text_key}'")
        role = ROLES.get(message[role_key]) if isinstance(message[role_key], str) else None
        if role is None:
            found = shorten(message[role_key])
            raise InputError(f"{name}[{i}]: unknown {role_key} {found}, use one of {', '.join(ROLES)}")
        expected = NEXT_ROLES[turns[-1].role if turns else None]
        if role not in expected:
            raise InputError(
                f"{name}[{i}] has the role {role} where {' or '.join(expected)} is expected: after an optional first "
                "system turn (or the row's key 'system'), answers of the assistant alternate with turns of user or tool"
            )
        turn = _parse_message(message, role_key, text_key, role, f"{name}[{i}]")
        if role == "tool":
            turn.parts = ["<tool_response>\n", *turn.parts, "\n</tool_response>"]
        if role == "tool" and turns[-1].role == "tool":
            turns[-1].parts += ["\n", *turn.parts]
            turns[-1].loss = False if turn.loss is False else turns[-1].loss  # one turn: they are supervised together
        else:
            turns.append(turn)
    if tools := _read_objects(row.get("tools"), "'tools'"):
        if turns[0].role == "system":
            turns[0].parts.append("\n\n")
        else:
            turns.insert(0, Turn("system", []))
        turns[0].parts.append(TOOLS_PROMPT.format("".join("\n" + _to_json(tool) for tool in tools)))

    if for_generation and turns[-1].role == "assistant":
        turns.pop()
    last, missing = (("user", "tool"), "question") if for_generation else (("assistant",), "answer")
    if turns[-1].role not in last:
        raise InputError(f"'{name}' must end with a turn of the {' or '.join(last)}: there is no {missing}")
    _fill_placeholders(turns, _list_media(row, "image"), _list_media(row, "video"))
    return turns


def _parse_message(message: dict, role_key: str, text_key: str, role: str, key: str) -> Turn:
    """Convert a message. `role` is its role in the chat template, `key` names it in error messages."""
    content, thought, loss = message.get(text_key), message.get("reasoning_content"), message.get("loss")
    if role == "assistant" and thought is not None and not isinstance(thought, str):
        raise InputError(f"'{key}.reasoning_content' must be a string, not {shorten(thought)}")
    if loss not in (*EMPTY, 0, 1):  # True equals 1
        raise InputError(f"'{key}.loss' must be true or false, not {shorten(loss)}")
    if loss and role != "assistant":
        raise InputError(f"'{key}.loss' is true, but only messages of the assistant can be supervised one by one: "
                         "remove the key (--train-on-prompt supervises all prompts)")
    calls_key = f"'{key}.tool_calls'"
    calls = _read_objects(message.get("tool_calls"), calls_key)
    if calls and role != "assistant":
        raise InputError(f"{calls_key} is only for messages of the assistant: remove it")
    if message[role_key] == "function_call":
        calls_key = f"{key}.{text_key}"
        content, calls = [], _read_objects([content] if content in EMPTY else content, calls_key)
    elif calls and content in EMPTY:
        content = []
    return Turn(
        role=role,
        parts=_split_content(content, "user" if role == "tool" else role, f"{key}.{text_key}"),
        thought=thought,
        calls=[_render_call(call, calls_key) for call in calls],
        loss=None if loss in EMPTY else bool(loss),
    )


def _read_objects(value, key: str) -> list[dict]:
    """Return a list of objects, which may be a single object, or written as JSON. Raises InputError."""
    content = [] if value in EMPTY else value
    if isinstance(content, str):
        with contextlib.suppress(ValueError):
            content = json.loads(content)
    content = [content] if isinstance(content, dict) else content
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise InputError(f"{key} must be a list of objects, or such a list as JSON in a string, not {shorten(value)}")
    return content


def _row_objects(row: dict) -> Iterator[tuple[str, dict, tuple[str, ...], tuple[str, ...]]]:
    """Yield the path of each object (the row, its messages, their parts), the object, its used and training keys."""
    yield "", row, ROW_KEYS, TRAINING_KEYS
    for name, keys in MESSAGE_KEYS.items():
        messages = row.get(name)
        for i, message in enumerate(messages if isinstance(messages, list) else ()):
            if isinstance(message, dict):
                yield f"{name}[{i}].", message, keys + ANSWER_KEYS, MESSAGE_TRAINING_KEYS
                parts = message.get(keys[1])
                for k, part in enumerate(parts if isinstance(parts, list) else ()):
                    if isinstance(part, dict):
                        path, used_keys = f"{name}[{i}].{keys[1]}[{k}].", PART_KEYS + VIDEO_OPTIONS
                        yield path, part, used_keys, MESSAGE_TRAINING_KEYS
                        for key in ("image_url", "video_url"):
                            if isinstance(part.get(key), dict):
                                yield f"{path}{key}.", part[key], used_keys, MESSAGE_TRAINING_KEYS


def _refuse_keys(row: dict, for_generation: bool) -> None:
    """Raise InputError if the row has a key that is not supported."""
    for path, item, used_keys, training_keys in _row_objects(row):
        for key in PROMPT_KEYS if for_generation else PROMPT_KEYS + training_keys:
            if key not in used_keys and key in item and item[key] not in EMPTY:
                raise InputError(f"'{path}{key}' is not supported, and the row means something else without it: remove "
                                 "the key, or the row")


def unused_keys(row: dict, has_thoughts: bool = False) -> set[str]:
    """Return the names of a row's keys that have no effect, such as "source" and "messages[].name".

    `has_thoughts`: the chat template is a Thinking model's (see `ChatTemplate`), so that reasoning_content is used.
    """
    return {
        re.sub(r"\[\d+\]", "[]", path) + key
        for path, item, used_keys, training_keys in _row_objects(row)
        for key, value in item.items()
        if key not in used_keys + PROMPT_KEYS + training_keys and value not in EMPTY
        and not (has_thoughts and key == "reasoning_content")
    }


def split_row(row: dict) -> list[dict]:
    """Return the rows that become one sample each: here the row itself.

    A format whose rows hold several samples, such as a chosen and a rejected answer, is split here.
    """
    return [row]


def _split_content(content, role: str, key: str) -> list[str | Media]:
    """Split a message's content into texts and media. `key` names the content in error messages."""
    if isinstance(content, str):
        parts = PLACEHOLDER.split(content) if role == "user" else [content]
        parts[1::2] = [Media(placeholder[1:-1], key, None) for placeholder in parts[1::2]]
        return parts
    if not isinstance(content, list):
        raise InputError(f"{key} must be a string, not {shorten(content)}")
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        is_text = kind == "text" and isinstance(part.get("text"), str)
        if not is_text and (kind not in PART_CONTENTS[1:] or role != "user"):
            raise InputError(f"{key}[{i}] must be of type 'text', or in a user's turn 'image' or 'video'")
        kind = kind.removesuffix("_url")
        for name in PART_CONTENTS:
            if not name.startswith(kind) and not is_no_media(part.get(name)):
                raise InputError(f"{key}[{i}] is of type '{part['type']}' but has '{name}': give that a part of its "
                                 "own")
        parts.append(part["text"] if is_text else _media_part(part, kind, f"{key}[{i}]"))
    return parts


def _media_part(part: dict, kind: str, key: str) -> Media:
    """Return the image or video of a content part. Tools that write tables may have added empty keys to the part."""
    sources = [part[name] for name in (kind, f"{kind}_url", "path", "url") if name in part]
    spec = next((source for source in sources if not is_no_media(source)), "" if sources else None)
    return Media(kind, key, spec, {name: part[name] for name in VIDEO_OPTIONS if part.get(name) is not None})


def _list_media(row: dict, kind: str) -> list[Media]:
    """Return the media under the row's keys `image` and `images`, or `video` and `videos`."""
    keys = [key for key in (kind, kind + "s") if not is_no_media(row.get(key))]
    if len(keys) > 1:
        raise InputError(f"the row has both '{keys[0]}' and '{keys[1]}': keep one")
    if not keys:
        return []
    key, value = keys[0], row[keys[0]]
    if not isinstance(value, list):
        return [Media(kind, key, value)]
    are_images = all(
        isinstance(item, str) and (item.lower().endswith(IMAGE_SUFFIXES) or IMAGE_URL.match(item)) for item in value)
    if key == "video" and are_images and len(value) > 1:  # else it is one animation
        return [Media(kind, key, value)]  # a list of frames is one video
    return [Media(kind, f"{key}[{i}]", item) for i, item in enumerate(value)]


def _fill_placeholders(turns: list[Turn], images: list[Media], videos: list[Media]) -> None:
    """Put the row's media into its placeholders, or before the first user text if the row has no placeholders."""
    media = {"image": images, "video": videos}
    for turn in turns:
        turn.parts = [part for part in turn.parts
                      if isinstance(part, str) or part.spec != "" or media[part.kind]]
    slots = [part for turn in turns for part in turn.parts if isinstance(part, Media)]
    if not slots:
        texts = "\n".join(part for turn in turns if turn.role == "user" for part in turn.parts)
        if (images or videos) and (other := OTHER_PLACEHOLDER.search(texts)):
            raise InputError(f"{other[0]} in a user's turn is not a placeholder: write <image> or <video> there, in a "
                             "list of parts a part such as {'type': 'image'}, or another text")
        first = next(turn for turn in turns if turn.role == "user")
        first.parts[:0] = images + videos
        return
    for kind, given in media.items():
        empty = [slot for slot in slots if slot.kind == kind and not slot.spec]
        if len(empty) != len(given):
            raise InputError(
                f"the user's turns have {len(empty)} <{kind}> placeholders, but the row has {len(given)} {kind}s: "
                "give as many of one as of the other"
            )
        for slot, item in zip(empty, given, strict=True):
            slot.key, slot.spec = item.key, item.spec


# ---- chat template -----------------------------------------------------------------------------------------------

# The published chat templates: SHA-256 without the white space outside of literals.
TEMPLATES = {
    "Qwen3-VL-Instruct": "c63fdc8ee923fc9bcdde5a86415249142538e4b2aaa27c43ce6f743db4db5d5a",
    "Qwen3-VL-Thinking": "21b8d87f6d20988e5154a8e3cf5a6899900a1b6d9ea1feca61ff8918b0b463c7",
}
LITERAL_OR_SPACE = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|\s+""", re.DOTALL)
THINKING_PROMPT = re.compile(r"""<think>(\\n|\s)*(["'{]|$)""")  # the end of a Thinking model's generation prompt
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
TOOLS_PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>{}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True)
class ChatTemplate:
    """The properties of a model's chat template that `render_turns` follows."""

    has_thoughts: bool = False  # render as Qwen3-VL-Thinking's template does, else as Qwen3-VL-Instruct's
    answer_prefix: str = "assistant\n"  # the end of a prompt, after <|im_start|>


def load_chat_template(hf_dir: str | Path, enable_thinking: bool | None = None) -> ChatTemplate:
    """Return the properties of a directory's chat template, and warn if it is not one of TEMPLATES.

    A template has thoughts if its generation prompt ends with "<think>\\n" or depends on `enable_thinking`. Raises
    UsageError if it does not depend on `enable_thinking`, but a value is given. transformers looks for the template in
    the same files, in the same order.
    """
    path = Path(hf_dir, "chat_template.jinja")
    template = path.read_text("utf-8", "replace") if path.exists() else None
    for name in ("chat_template.json", "tokenizer_config.json"):
        if not template:
            path = Path(hf_dir, name)
            template = read_json(path, missing_ok=True).get("chat_template")
            if isinstance(template, list):  # of named templates
                template = next((item.get("template") for item in template if item.get("name") == "default"), None)
    template = str(template or "")
    prompt = template.rpartition("add_generation_prompt")[2]
    asks_for_thought, has_switch = bool(THINKING_PROMPT.search(prompt)), "enable_thinking" in prompt
    if enable_thinking is not None and not has_switch:
        flag = "--enable-thinking" if enable_thinking else "--no-enable-thinking"
        raise UsageError(f"{flag}: the chat template of {hf_dir} does not know enable_thinking: leave the flag out")
    has_thoughts = asks_for_thought or has_switch
    name = "Qwen3-VL-Thinking" if has_thoughts else "Qwen3-VL-Instruct"
    digest = hashlib.sha256(LITERAL_OR_SPACE.sub(r"\1", template).encode()).hexdigest()
    if template and digest != TEMPLATES[name] and os.environ.get("RANK", "0") == "0":
        logger.warning("%s is not the chat template of %s and is not used: rows are rendered as %s's does, "
                       "<|im_start|>role, newline, content, <|im_end|>, newline", path, name, name)
    thought = EMPTY_THOUGHT if enable_thinking is False else "<think>\n" if asks_for_thought else ""
    return ChatTemplate(has_thoughts, "assistant\n" + thought)


def render_turns(turns: list[Turn], template: ChatTemplate) -> Iterator[tuple[str, list[str | Media]]]:
    """Yield what the chat template writes between <|im_start|> and <|im_end|> of each turn, in two parts.

    The first part is not supervised: the role, and the start of an answer that a prompt may end with. A template with
    thoughts strips those of answers before the last question. The last answer has at least an empty thought, which
    belongs to the first part.
    """
    last_question = max((i for i, turn in enumerate(turns) if _is_question(turn)), default=len(turns))
    for i, turn in enumerate(turns):
        if turn.role != "assistant":
            yield "system\n" if turn.role == "system" else "user\n", turn.parts
            continue
        prefix = start = "assistant\n"
        content, has_content = "".join(turn.parts), bool(turn.parts)
        if template.has_thoughts:
            thought = turn.thought or ""
            if turn.thought is None and "</think>" in content:
                thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
                content = content.split("</think>")[-1].lstrip("\n")
            has_content = bool(content)
            if template.answer_prefix.endswith(EMPTY_THOUGHT):
                thought = ""
            if i > last_question and (i == len(turns) - 1 or thought):
                thought, content = thought.strip("\n"), content.lstrip("\n")
                start += f"<think>\n{thought}\n</think>\n\n"
                prefix = template.answer_prefix if thought else start
        lines = [content, *turn.calls] if has_content else turn.calls
        yield prefix, [(start + "\n".join(lines)).removeprefix(prefix)]


def _is_question(turn: Turn) -> bool:
    """Return whether a turn is the user's, and not a tool answer written as text."""
    text = "".join(part if isinstance(part, str) else part.kind for part in turn.parts)
    is_tool_answer = text.startswith("<tool_response>") and text.endswith("</tool_response>")
    return turn.role == "user" and not is_tool_answer


def _render_call(call: dict, key: str) -> str:
    """Return a tool call, `{"name", "arguments"}` or `{"function": ...}`, as the chat template writes it."""
    call = call.get("function") or call
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
        raise InputError(f"{key} must have objects with 'name' and 'arguments', not {shorten(call)}")
    arguments = call["arguments"]
    arguments = arguments if isinstance(arguments, str) else _to_json(arguments)
    return f'<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>'


def _to_json(value) -> str:
    """Return JSON as transformers' `tojson` writes it."""
    return json.dumps(value, ensure_ascii=False)


# ---- images and videos -------------------------------------------------------------------------------------------

# A file's content may differ from its suffix. Without these lists Pillow would start Ghostscript for PostScript, and
# FFmpeg would open the addresses in a playlist, in other folders or on the network. Pillow tries the formats in this
# order; the last two have no signature. It reads MPO as JPEG. Builds of Pillow may lack some formats.
Image.init()
IMAGE_FORMATS = [name for name in (
    "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "BLP", "CUR", "DCX", "DDS", "DIB", "FLI",
    "ICNS", "ICO", "MSP", "PCX", "PSD", "QOI", "SGI", "SUN", "XBM", "XPM", "SPIDER", "TGA",
) if name in Image.OPEN]
IMAGE_SUFFIXES = tuple(
    suffix for suffix, name in Image.registered_extensions().items() if name in (*IMAGE_FORMATS, "MPO"))
FFMPEG_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": "asf,avi,flv,gif,matroska,webm,mov,mp4,m4a,3gp,3g2,"
                 "mj2,mpeg,mpegts,mpegvideo,mpegtsraw,mxf,ogg,wtv,h264,hevc,ivf,m4v,nut,yuv4mpegpipe,apng"}


def read_spec(media: Media) -> tuple[str | list, MediaOptions]:
    """Return where an image or video is, as a path or list of paths, and its options. Raises InputError."""
    path, inner = media.spec, {}
    if isinstance(path, dict):
        inner = {key: value for key, value in path.items() if value is not None}
        key = next((key for key in ("path", "url", media.kind) if key in inner), None)
        if key is None:
            raise InputError(f"a path is needed, not {shorten(path)}")
        path = inner.pop(key)
    inner.pop("detail", None)  # of OpenAI's image_url: a model's setting that Qwen3-VL lacks
    for name, value in (*media.options.items(), *inner.items()):
        if name not in (IMAGE_OPTIONS if media.kind == "image" else VIDEO_OPTIONS):
            raise InputError(f"'{name}' is not an option of {media.kind}s: remove it")
        least = 0 if name in ("video_start", "video_end") else 0.001
        if type(value) not in (int, float) or not least <= value <= 1e12:
            raise InputError(f"'{name}' must be a number from {least} to 1e12, not {shorten(value)}")
    if "fps" in inner:
        inner["source_fps"] = inner.pop("fps")
    return path, MediaOptions(**media.options | inner)


def resolve_path(path: str, media_dir: str | Path, confine: bool) -> Path:
    """Return `path`, which may be a "file://" URL, relative to `media_dir`.

    Raises InputError if the file does not exist, or if `confine` is set and it is outside `media_dir`.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise InputError(f"a path is needed, not {shorten(path)}")
    if re.match(r"(?!file)[a-z]\w+://|data:", path, re.IGNORECASE):
        raise InputError(f"{path[:80]} is not a file on disk: download it first")
    full = Path(media_dir, path.removeprefix("file://"))
    if path.startswith("file://") and not os.path.exists(full):
        full = Path(media_dir, unquote(path.removeprefix("file://")))  # as Path.as_uri() writes it
    if confine and not Path(os.path.realpath(full)).is_relative_to(os.path.realpath(media_dir)):
        raise InputError(f"{path} is outside {media_dir}, which --confine-paths forbids")
    if not os.path.exists(full):
        raise InputError(f"{str(full)[:1000]} does not exist")
    return full


def find_image(path: str, media_dir: str | Path, confine: bool) -> Path | str:
    """Return the file of an image, as `resolve_path` does, or a "data:image/...;base64,..." URL as it is."""
    if isinstance(path, str) and IMAGE_URL.match(path):
        return path
    return resolve_path(path, media_dir, confine)


def load_image(path: Path | str, decode: bool = True) -> Image.Image:
    """Load an image in RGB, rotated as its EXIF data says, equal to transformers 5.23's. Raises InputError.

    An alpha channel is dropped, but a single transparent colour (of a palette or some PNG files) becomes white: that
    is what transformers' `load_image` and image processor do together. Without `decode` only the header is read, and
    only `size` is valid. It may be the size before rotation, which gives the same number of tokens. `path` is a file,
    or as a string a "data:image/...;base64,..." URL.
    """
    name = path if isinstance(path, Path) else path[:60]
    with _decoding(name, "an image"), Image.open(_image_source(path), formats=IMAGE_FORMATS) as image:
        if not decode:
            return image
        ImageOps.exif_transpose(image, in_place=True)
        image = image.convert("RGB")
        return image if image.info.get("transparency") is None else _on_white(image)


def _image_source(path: Path | str) -> Path | io.BytesIO:
    """Return what Pillow opens: a file, or the content of a "data:" URL."""
    return path if isinstance(path, Path) else io.BytesIO(base64.b64decode(path.partition(",")[2]))


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image in RGB with its transparent pixels on a white background."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


@contextlib.contextmanager
def _decoding(path: Path | str, kind: str) -> Iterator[None]:
    """Convert whatever a decoder raises for a damaged file to an InputError."""
    try:
        yield
    except InputError:
        raise
    except UnidentifiedImageError as error:
        reason = f"it is damaged, or in none of the formats {', '.join(sorted((*IMAGE_FORMATS, 'MPO')))}"
        raise InputError(f"{path} cannot be read as {kind}: {reason}") from error
    except Exception as error:
        raise InputError(f"{path} cannot be read as {kind}: {one_line(error)}") from error


@dataclass
class Video:
    """A video whose frames are not read yet."""

    num_frames: int
    fps: float  # frames per second; the mean if the rate varies
    # If the rate varies: each frame's time and the end of the last, in seconds from the first, [num_frames + 1].
    # None if the rate is constant: frame i is shown at i / fps.
    times: np.ndarray | None
    sample_fps: float | None  # frames to take per second; None takes all of them
    # Decodes the frames with these rising numbers one at a time, as a full-size frame takes much memory.
    read: Callable[[list[int]], Iterator[Image.Image]]
    header: Callable[[int], Image.Image]  # returns a frame that is not decoded: only its `size` is valid

    def frame_range(self, start: float | None, end: float | None) -> tuple[int, int]:
        """Return the numbers of the first and last frame between two times in seconds. Raises InputError."""
        first, last = 0, self.num_frames - 1
        starts = None if self.times is None else self.times[:-1]
        if start is not None:
            first = math.ceil(start * self.fps) if starts is None else int(np.searchsorted(starts, start))
        if end is not None:
            number = math.floor(end * self.fps) if starts is None else int(np.searchsorted(starts, end, "right")) - 1
            last = min(last, number)
        if first >= last:
            seconds = self.num_frames / self.fps
            raise InputError(f"'video_start' and 'video_end' leave less than two frames of a video of {seconds:.2f} s")
        return first, last


def open_video(
    path: str | list, media_dir: str | Path, confine: bool, default_fps: float, options: MediaOptions = NO_OPTIONS
) -> Video:
    """Open the video that a row names. Raises InputError.

    It is a list of images, a folder of images (sorted by the numbers in their names), an animated image or a video
    file. `options.source_fps` takes precedence over the file's rate. A video is sampled at `options.fps`, else at
    `default_fps`. As in the Qwen team's own tools, images count as sampled already, at `options.sample_fps` or
    `options.fps`, else at `default_fps`. Images with a `source_fps` are sampled like a file.
    """
    if isinstance(path, list):
        paths = [find_image(item, media_dir, confine) for item in path]
    else:
        full = resolve_path(path, media_dir, confine)
        if not full.is_dir():
            if options.sample_fps is not None:
                raise InputError("'sample_fps' is the rate of a list of frames: give 'fps' for a video file")
            open_file = _open_animation if full.suffix.lower() in IMAGE_SUFFIXES else _open_video_file
            return open_file(full, options.source_fps, options.fps or default_fps)
        names = [name for name in os.listdir(full) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
        names.sort(key=lambda name: [int(s) if s.isdecimal() else s for s in re.split("([0-9]+)", name)])
        paths = [resolve_path(os.path.join(path, name), media_dir, confine) for name in names]
    rate = options.sample_fps or options.fps or default_fps
    return Video(
        num_frames=len(paths),
        fps=float(options.source_fps or rate),
        times=None,
        sample_fps=rate if options.source_fps else None,
        read=lambda numbers: (load_image(paths[i]) for i in numbers),
        header=lambda i: load_image(paths[i], decode=False),
    )


def _open_animation(path: Path, fps: float | None, sample_fps: float) -> Video:
    """Open an animated GIF, WebP or PNG. Transparent pixels become white, as PyAV decodes a GIF."""

    def frames() -> Iterator[Image.Image]:
        with _decoding(path, "an animation"), Image.open(path, formats=IMAGE_FORMATS) as image:
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                image.load()  # Pillow knows the duration of a WebP's frame only after this
                yield image

    def read(numbers: list[int]) -> Iterator[Image.Image]:
        with _decoding(path, "an animation"):
            for number, image in enumerate(itertools.islice(frames(), numbers[-1] + 1)):
                if number in numbers:
                    yield _on_white(image) if image.has_transparency_data else image.convert("RGB")

    with _decoding(path, "an animation"), Image.open(path, formats=IMAGE_FORMATS) as image:
        count, times = getattr(image, "n_frames", 1), None
    if fps is None:
        durations = [frame.info.get("duration") or 100 for frame in frames()]  # ms; browsers show 0 as 100, too
        times = np.cumsum([0, *durations]) / 1000
        fps = count / times[-1]
        times = None if _is_steady(times, fps) else times
    return Video(count, float(fps), times, sample_fps, read, header=lambda _: image)


MIN_COMPLETE = 0.9  # a file with a smaller share of its frames was cut off; headers and old codecs miscount a few
SEEK_FRAMES = 16  # decoding this many frames takes about as long as seeking


def _open_container(path: Path):
    """Open a video file with PyAV. Raises InputError if PyAV is not installed."""
    try:
        import av
    except ImportError as error:
        raise InputError(f"{path}: reading video files needs PyAV: pip install av") from error
    return av.open(f"file:{path}", options=FFMPEG_OPTIONS)


def _open_video_file(path: Path, fps: float | None, sample_fps: float) -> Video:
    """Open a video file. Its header gives the size before rotation.

    Reading all packets, without decoding, counts the frames and gives their times: headers may lack both.
    """
    with _decoding(path, "a video"), _open_container(path) as container:
        if not container.streams.video:
            raise ValueError("it holds no video")
        stream = container.streams.video[0]
        header = SimpleNamespace(size=(stream.width, stream.height))
        if not all(header.size):
            raise ValueError("its frames have no size")
        stated_count, stated_fps = stream.frames, float(stream.average_rate or 0)
        packets = [(packet.pts, packet.duration, packet.is_keyframe, packet.is_discard)
                   for packet in container.demux(stream) if packet.size]  # an empty packet marks the end
        seconds_per_tick = float(stream.time_base)
    if len(packets) < MIN_COMPLETE * stated_count:
        raise InputError(f"{path} states {stated_count} frames but holds {len(packets)}: it was cut off, get it again")

    packets = [packet for packet in packets if not packet[3]]  # an edit list may hide the first frames
    count, times, mean_fps = len(packets), None, 0.0
    ticks, keys = np.zeros(count, int), np.zeros(0, int)
    if count > 1 and all(pts is not None for pts, *_ in packets):
        packets.sort(key=lambda packet: packet[0])  # from decoding order to the order of display
        ticks = np.array([pts for pts, *_ in packets])
        if np.diff(ticks).min() > 0:  # else the times are unusable
            last_duration = packets[-1][1] or (ticks[-1] - ticks[0]) / (count - 1)
            times = (np.append(ticks, ticks[-1] + last_duration) - ticks[0]) * seconds_per_tick
            keys = np.flatnonzero([is_keyframe for _, _, is_keyframe, _ in packets])
            mean_fps = count / times[-1]
    if fps or times is None or _is_steady(times, stated_fps or mean_fps):
        fps, times = fps or stated_fps or mean_fps, None
    else:
        fps = mean_fps
    if not fps:
        raise InputError(f"{path} states no frame rate: give it as {{'path': ..., 'fps': ...}}")

    def read(numbers: list[int]) -> Iterator[Image.Image]:
        with _decoding(path, "a video"):
            yield from _decode_frames(path, numbers, ticks, keys)

    return Video(count, float(fps), times, sample_fps, read, header=lambda _: header)


def _decode_frames(path: Path, numbers: list[int], ticks: np.ndarray, keys: np.ndarray) -> Iterator[Image.Image]:
    """Decode the frames with these rising numbers; seek over long gaps.

    ticks: each frame's time in the file's unit, for seeking. keys: numbers of the key frames to which it may seek.
    """
    with _open_container(path) as container:
        stream = container.streams.video[0]
        frames, position, frame = container.decode(stream), -1, None  # position: the number of the last decoded frame
        for i, number in enumerate(numbers):
            key = max(keys[keys <= number], default=0)
            if key - position > SEEK_FRAMES:
                tick = int(ticks[key])
                container.seek(tick, stream=stream)  # to the key frame or before it
                frames = (frame for frame in container.decode(stream) if frame.pts is not None and frame.pts >= tick)
                frame = next(frames, None)
                if frame is None or frame.pts != tick or not frame.key_frame:  # the file cannot seek: read all of it
                    yield from _decode_frames(path, numbers[i:], ticks, keys[:0])
                    return
                position = key
            while position < number and (following := next(frames, None)) is not None:
                position, frame = position + 1, following
            if position < number and position + 1 < MIN_COMPLETE * len(ticks):
                raise ValueError(f"it has {len(ticks)} frames, but only {position + 1} can be decoded")
            yield _upright_image(frame)  # past the end, the last one: in old AVI files some packets hold no frame


# A display matrix (a, b, c, d) shows the stored point (x, y) at (a x + c y, b x + d y). Pillow turns counterclockwise.
UPRIGHT = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def _upright_image(frame) -> Image.Image:
    """Return PyAV's frame as an image, turned as its display matrix says.

    Phones store portrait videos lying. Players and torchcodec turn them; transformers with PyAV does not.
    """
    image = frame.to_image()
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return image
    matrix = np.round(np.frombuffer(side_data, np.int32)[[0, 1, 3, 4]] / 65536).astype(int)
    turn = UPRIGHT.get(tuple(matrix.tolist()))
    return image if turn is None else image.transpose(turn)


def _is_steady(times: np.ndarray, fps: float) -> bool:
    """Return whether each frame i is shown at i / fps, within half a frame because files round their times."""
    return bool(np.abs(times[:-1] * fps - np.arange(len(times) - 1)).max() <= 0.5)


def smart_resize(
    height: int, width: int, frames: int, temporal_factor: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return height and width, multiples of `factor`, that keep frames * height * width within the pixel limits.

    Equals transformers' functions of this name, for images (`frames` = `temporal_factor` = 1) and for videos, which
    round the number of frames to a multiple of `temporal_factor`. Like Python's, their rounding of halves is to even.
    Raises InputError beyond an aspect ratio of 200:1.
    """
    if max(height, width) / min(height, width) > 200:
        raise InputError(f"{width}x{height} pixels: the longer side may be at most 200 times the shorter")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    pixels = round(frames / temporal_factor) * temporal_factor * new_height * new_width
    if pixels > max_pixels:
        beta = math.sqrt(frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif pixels < min_pixels:
        beta = math.sqrt(min_pixels / (frames * height * width))
        new_height, new_width = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return new_height, new_width


# ---- processing --------------------------------------------------------------------------------------------------

# The settings of the released models, for directories without preprocessor files. transformers' class defaults differ.
DEFAULTS = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "rescale_factor": 1 / 255, "min_frames": 4,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
DEFAULT_PIXELS = {"image": (65536, 16777216), "video": (4096, 25165824)}
PROCESSOR_FILE = "processor_config.json"  # of transformers 5, for both kinds
PREPROCESSOR_FILES = {"image": "preprocessor_config.json", "video": "video_preprocessor_config.json"}
PREPROCESSOR_CLASSES = {
    "image": {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"},
    "video": {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"},
}
CONTROL_TOKENS = {
    "im_start_token_id": "<|im_start|>",
    "im_end_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
TEXT_TOKENS = (*CONTROL_TOKENS.values(), "<|endoftext|>", "<|vision_pad|>")  # stay text when a row's text has them


@dataclass
class EncodedTurn:
    """One turn as tokens and patches."""

    ids: list[int]
    role: str = "assistant"
    answer_start: int | None = None  # index of the answer's first token, in an assistant's turn
    loss: bool | None = None  # as in Turn
    visual_spans: list[tuple[int, int, int]] = field(default_factory=list)  # (start, rows, columns) of media tokens
    pixels: list[np.ndarray] = field(default_factory=list)  # patches of each image or video
    grids: list[tuple[int, int, int]] = field(default_factory=list)  # (frame pairs, rows, columns) of patches


class Processor:
    """Encode rows for one model: tokenizer, chat template, images, videos and positions.

    Settings come from the model's Hugging Face directory. Its pixel limits are those of preprocessor_config.json,
    video_preprocessor_config.json or transformers 5's processor_config.json, else the released models'; arguments
    override them. `image_*_pixels` limit an image's height * width, `video_*_pixels` a video's frames * height * width.
    A video is sampled at `video_fps` frames per second, up to `video_maxlen` frames. `end_token_ids` are the tokens
    that end an answer. `enable_thinking` is for chat templates that know it: False renders without thoughts. Raises
    InputError if a file is missing, damaged or contradicts another, UsageError if `enable_thinking` has no effect.
    """

    def __init__(
        self,
        hf_dir: str | Path,
        *,
        image_min_pixels: int | None = None,
        image_max_pixels: int | None = None,
        video_min_pixels: int | None = None,
        video_max_pixels: int | None = None,
        video_fps: float = 2.0,
        video_maxlen: int = 64,
        enable_thinking: bool | None = None,
    ):
        path = Path(hf_dir, "tokenizer.json")
        self.tokenizer, self._special_ids = _load_tokenizer(path)
        self.template = load_chat_template(hf_dir, enable_thinking)

        config_path = Path(hf_dir, "config.json")
        config = read_json(config_path, missing_ok=True)
        text, vision = (_section(config, name, config_path) for name in ("text_config", "vision_config"))
        for name, token in CONTROL_TOKENS.items():
            token_id = self.tokenizer.token_to_id(token)
            if token_id is None:
                raise InputError(f"{path} has no token {token}: this is not a Qwen3-VL tokenizer")
            if config.get(name, token_id) != token_id:
                found = shorten(config[name])
                raise InputError(f"{path} gives {token} the id {token_id}, but config.json's {name} is {found}")
            setattr(self, name, token_id)
        token, token_id = max(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        if token_id >= text.get("vocab_size", math.inf):
            raise InputError(f"{path} has {token} as id {token_id}, config.json's vocab_size is {text['vocab_size']}")
        self.end_token_ids = {self.im_end_token_id, *_end_token_ids(hf_dir)}  # a base model's may lack <|im_end|>

        self.image, self.video = _media_settings(hf_dir, "image"), _media_settings(hf_dir, "video")
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            stated = vision.get(name.replace("merge", "spatial_merge"), DEFAULTS[name])
            if not self.image[name] == self.video[name] == stated:
                found = f"{self.image[name]} for images, {self.video[name]} for videos, {shorten(stated)}"
                raise InputError(f"{hf_dir}: the preprocessor files and config.json disagree on {name}: {found}")
        self.patch_size, self.merge_size = self.image["patch_size"], self.image["merge_size"]
        self.temporal_patch_size = self.image["temporal_patch_size"]
        self.image_pixels = _pixel_limits("image", self.image, image_min_pixels, image_max_pixels)
        self.video_pixels = _pixel_limits("video", self.video, video_min_pixels, video_max_pixels)
        self.video_fps, self.video_maxlen = video_fps, video_maxlen
        self._newline_ids = self._encode_text("\n")

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True  # a pickled tokenizer loses this setting

    def decode(self, ids: list[int] | Tensor) -> str:
        """Return the text of token ids, without special tokens."""
        return self.tokenizer.decode([i for i in map(int, ids) if i not in self._special_ids])

    def _encode_text(self, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # scraped data often holds half of an emoji
            raise InputError("a text holds half of a surrogate pair (\\ud800 to \\udfff)") from error

    def process_image(
        self, image: Image.Image, decode: bool = True, options: MediaOptions = NO_OPTIONS
    ) -> tuple[np.ndarray | None, tuple[int, int, int]]:
        """Return the patches [P, 1536] float32 and the grid (1, rows, columns) of an RGB image.

        The patches equal transformers' bit for bit. Without `decode` they are None, and only the image's size matters.
        """
        height, width = self._given_size(options) or smart_resize(
            image.height, image.width, 1, 1, self.patch_size * self.merge_size,
            *_override_limits(self.image_pixels, options.min_pixels, options.max_pixels),
        )
        grid = 1, height // self.patch_size, width // self.patch_size
        return self._patchify([image], 1, grid, self.image) if decode else None, grid

    def _given_size(self, options: MediaOptions) -> tuple[int, int] | None:
        """Return the options' size, if any, rounded and limited to 4 to 16384 tokens as in qwen-vl-utils."""
        if options.resized_height is None:
            return None
        factor = self.patch_size * self.merge_size
        limits = 4 * factor**2, 16384 * factor**2
        return smart_resize(options.resized_height, options.resized_width, 1, 1, factor, *limits)

    def _frame_limits(self, options: MediaOptions, count: int) -> tuple[float, float]:
        """Return the limits of height * width of each of `count` frames, as qwen-vl-utils computes them.

        A frame has at most 768 tokens. Unlike there, absent options are the processor's limits divided by `count`.
        """
        low, total = self.video_pixels
        if options.total_pixels is not None:
            total = options.total_pixels * self.temporal_patch_size
        low = options.min_pixels or low / count
        high = max(min(768 * (self.patch_size * self.merge_size) ** 2, total / count), int(low * 1.05))
        high = min(options.max_pixels or high, high)
        return min(low, high), high

    def process_video(
        self, video: Video, decode: bool = True, options: MediaOptions = NO_OPTIONS
    ) -> tuple[np.ndarray | None, tuple[int, int, int], list[float]]:
        """Return a video's patches [P, 1536], grid (frame pairs, rows, columns) and each frame pair's time in seconds.

        Frame numbers, sizes and times equal transformers'. transformers resizes frames with torchvision. Pillow's
        results differ from those by at most 2 of 255 levels, and by at most 0.02 on average (`make test-slow` measures
        it); frames that keep their size are equal. Without `decode` no frame is decoded and the patches are None.
        """
        if video.num_frames < 2:
            raise InputError(f"a video needs two frames, this has {video.num_frames}")
        numbers = self._choose_frames(video, options)
        frames = video.read(numbers) if decode else map(video.header, numbers)
        first = next(frames)
        width, height = first.size
        factor = self.patch_size * self.merge_size
        scale = max(1.0, factor / height, factor / width)  # as transformers 5; 4.57 refuses sides below `factor`
        height, width = int(height * scale), int(width * scale)
        pairs = -(-len(numbers) // self.temporal_patch_size)
        if options.resized_height is not None:
            height, width = self._given_size(options)
        elif any((options.min_pixels, options.max_pixels, options.total_pixels)):
            limits = self._frame_limits(options, pairs * self.temporal_patch_size)
            height, width = smart_resize(height, width, 1, 1, factor, *limits)
        else:
            height, width = smart_resize(
                height, width, len(numbers), self.temporal_patch_size, factor, *self.video_pixels)
        grid = pairs, height // self.patch_size, width // self.patch_size

        def checked_frames() -> Iterator[Image.Image]:
            yield first
            for i, frame in zip(numbers[1:], frames, strict=True):
                is_rotated = not decode and frame.size == first.size[::-1]  # headers give the size before rotation
                if frame.size != first.size and not is_rotated:
                    raise InputError(f"frame {i} has {frame.size} pixels, the first {first.size}: make them equal")
                yield frame

        if decode:
            patches = self._patchify(checked_frames(), len(numbers), grid, self.video)
        else:
            patches = None
            list(checked_frames())  # check the sizes
        numbers += numbers[-1:] * (-len(numbers) % self.temporal_patch_size)
        times = [i / video.fps for i in numbers] if video.times is None else video.times[numbers].tolist()
        groups = [times[i : i + self.temporal_patch_size] for i in range(0, len(times), self.temporal_patch_size)]
        return patches, grid, [(group[0] + group[-1]) / 2 for group in groups]

    def _choose_frames(self, video: Video, options: MediaOptions) -> list[int]:
        """Choose evenly spaced frames: by number as transformers does, or by time if the frame rate varies.

        Options round the number of frames to full temporal patches, as qwen-vl-utils does. By time, a frame that is the
        nearest to several sampling times is taken once.
        """
        first, last = video.frame_range(options.video_start, options.video_end)
        available, multiple = last - first + 1, 1
        low, high = options.min_frames or self.video["min_frames"], options.max_frames or self.video_maxlen
        if options.nframes is not None:
            multiple = self.temporal_patch_size
            count = round(options.nframes / multiple) * multiple
        elif video.sample_fps is None:
            count = min(available, int(high))
        else:
            seconds = available / video.fps
            if video.times is not None:
                seconds = video.times[last + 1] - video.times[first]
            given = (options.fps, options.min_frames, options.max_frames, options.video_start, options.video_end)
            multiple = self.temporal_patch_size if any(value is not None for value in given) else 1
            low = math.ceil(low / multiple) * multiple
            count = min(max(int(seconds * video.sample_fps), low), int(high), available)
            count -= count % multiple
        if not multiple <= count <= available:
            raise InputError(f"cannot take {count} frames of {available}: change 'nframes' or 'max_frames'")
        if video.times is None:
            return np.linspace(first, last, count).round().astype(int).tolist()
        starts = video.times[:-1]
        targets = np.linspace(starts[first], starts[last], count)
        after = np.searchsorted(starts, targets).clip(min=1)
        is_earlier_nearer = targets - starts[after - 1] <= starts[after] - targets
        return np.unique(np.where(is_earlier_nearer, after - 1, after)).tolist()

    def _patchify(
        self, images: Iterable[Image.Image], count: int, grid: tuple[int, int, int], settings: dict
    ) -> np.ndarray:
        """Resize `count` images to the grid and cut them into patches [t * h * w, channel * temporal * patch * patch].

        Patches are in the order of merge blocks. The last image is repeated to fill a temporal patch. A table look-up
        normalises two neighbouring pixels at a time. The loop handles one row of merge blocks at a time, because a row
        fits in a processor's cache.
        """
        (t, h, w), m, p = grid, self.merge_size, self.patch_size
        tables = _pair_tables(settings["rescale_factor"], tuple(settings["image_mean"]), tuple(settings["image_std"]))
        patches = np.empty((t, h // m, w // m, m, m, 3, self.temporal_patch_size, p, p), np.float32)
        for i, image in enumerate(images):
            if settings is self.video:  # torchvision resizes the width first; Pillow's order depends on the sizes
                image = image.resize((w * p, image.height), Image.Resampling.BICUBIC)
            image = image.resize((w * p, h * p), Image.Resampling.BICUBIC)
            slot = i % self.temporal_patch_size
            slots = slice(slot, None if i == count - 1 else slot + 1)
            target = patches[i // self.temporal_patch_size, ..., slots, :, :]
            for channel, plane in enumerate(image.split()):
                lines = np.asarray(plane).view(f"V{p}")  # one line of a patch as one element
                blocks = lines.reshape(h // m, m, p, w // m, m).transpose(0, 3, 1, 4, 2)
                for row, block_row in enumerate(blocks):
                    pairs = np.ascontiguousarray(block_row).view(np.uint16)
                    values = np.take(tables[channel], pairs).view(np.float32)
                    target[row, :, :, :, channel] = values.reshape(w // m, m, m, 1, p, p)
        return patches.reshape(t * h * w, -1)

    def encode(
        self, row: dict, media_dir: str | Path, source: str = "", options: EncodeOptions = ENCODE_DEFAULTS,
        decode: bool = True,
    ) -> Sample:
        """Encode a row of either format as token ids, labels, positions and patches.

        Supervised tokens are each answer, its <|im_end|> and the newline after it; with `mask_history` only those of
        the last answer; with `train_on_prompt` all tokens except media tokens, <|vision_start|> and <|vision_end|>.
        An answer is one message of the assistant, tool calls included. `loss` of a message takes precedence.
        A sample longer than `seq_length` loses whole exchanges (from a user turn to the next) from its end. A first
        exchange that is too long loses its last tool answers and the answers to them, then the end of its only answer.
        The rest equals the start of the full sample. With `for_generation` a final answer is dropped and the sample
        ends as the chat template's generation prompt does. Raises InputError, whose message begins with `source`.

        Without `decode` the sample has no patches, and its grids and positions may be those before rotation. Then only
        the headers of images and the packets of video files are read; animations are decoded for their times. Errors
        that only decoding finds are not raised.
        """
        turns, truncated = self._encode_row(row, media_dir, source, options, decode)
        ids = np.array([token for turn in turns for token in turn.ids], np.int64)
        starts = np.cumsum([0] + [len(turn.ids) for turn in turns]).tolist()
        spans = [(turn_start + start, rows, columns)
                 for turn, turn_start in zip(turns, starts, strict=False)
                 for start, rows, columns in turn.visual_spans]
        is_media = np.isin(ids, (self.image_token_id, self.video_token_id))

        supervised = np.zeros(len(ids), bool)
        answers = [i for i, turn in enumerate(turns) if turn.answer_start is not None]
        chosen = range(len(turns)) if options.train_on_prompt else answers[-1:] if options.mask_history else answers
        for i, turn in enumerate(turns):
            if not options.for_generation and (i in chosen if turn.loss is None else turn.loss):
                start = 0 if options.train_on_prompt else turn.answer_start
                supervised[starts[i] + start : starts[i + 1]] = True
        supervised &= ~is_media & ~np.isin(ids, (self.vision_start_token_id, self.vision_end_token_id))
        labels = np.full(len(ids), IGNORE, np.int64)
        labels[:-1] = np.where(supervised[1:], ids[1:], IGNORE)

        pixels = [patches for turn in turns for patches in turn.pixels if decode]
        pixels = pixels or [np.empty((0, 3 * self.temporal_patch_size * self.patch_size**2), np.float32)]
        return Sample(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(mrope_positions(len(ids), spans)),
            pixel_values=torch.from_numpy(pixels[0] if len(pixels) == 1 else np.concatenate(pixels)),
            grid_thw=torch.tensor([grid for turn in turns for grid in turn.grids], dtype=torch.int64).view(-1, 3),
            visual_index=torch.from_numpy(np.flatnonzero(is_media)),
            source=source,
            truncated=truncated,
        )

    def _encode_row(
        self, row: dict, media_dir: str | Path, source: str, options: EncodeOptions, decode: bool
    ) -> tuple[list[EncodedTurn], bool]:
        """Return the turns that fit in `seq_length`, and whether anything was cut.

        Without `decode` the turns have no pixels. Media in turns beyond the sequence length are not decoded.
        """
        limit = options.seq_length or sys.maxsize
        try:
            parsed, turns, length = parse_row(row, options.for_generation), [], 0
            for turn, (prefix, parts) in zip(parsed, render_turns(parsed, self.template), strict=True):
                encoded = self._encode_turn(prefix, parts, media_dir, options.confine_paths, decode, limit - length)
                encoded.role, encoded.loss = turn.role, turn.loss
                if turn.role == "assistant":
                    # A token that merges newlines at the end of the prefix and the start of the answer counts as
                    # prompt: no generation prompt ends in it, so the model is never asked to predict it.
                    encoded.answer_start = 1 + len(self._encode_text(prefix))
                turns.append(encoded)
                length += len(encoded.ids)
                if length > limit and turn.role == "assistant" and not options.for_generation:
                    break
            if options.for_generation:
                turns.append(EncodedTurn([self.im_start_token_id, *self._encode_text(self.template.answer_prefix)]))
                length += len(turns[-1].ids)
            if length > limit:
                return self._truncate(turns, limit), True
            return turns, False
        except InputError as error:
            raise InputError(f"{source}: {one_line(error)}" if source else one_line(error)) from error

    def _truncate(self, turns: list[EncodedTurn], limit: int) -> list[EncodedTurn]:
        """Cut the last exchange, which exceeds `limit` tokens. Raises InputError if no answer would remain."""
        answer_start = turns[-1].answer_start  # None for a generation prompt, which is never cut
        if answer_start is not None:
            questions, answers = ([i for i, turn in enumerate(turns) if turn.role == role]
                                  for role in ("user", "assistant"))
            if len(questions) > 1:
                return turns[: max(i for i in answers if i < questions[-1]) + 1]  # tool answers may follow it
            if len(answers) > 1:
                return turns[: answers[-2] + 1]
        length = sum(len(turn.ids) for turn in turns)
        prompt = length - len(turns[-1].ids) + (answer_start or 0)
        if answer_start is None or prompt >= limit:
            media = sum(rows * columns for turn in turns for _, rows, columns in turn.visual_spans)
            raise InputError(
                f"{length} tokens do not fit in a sequence length of {limit}: {prompt} of them, {media} of images or "
                "videos, come before the first answer; raise --seq-length, or lower --image-max-pixels"
            )
        del turns[-1].ids[limit - length :]
        return turns

    def _encode_turn(
        self, prefix: str, parts: list[str | Media], media_dir: str | Path, confine: bool, decode: bool, space: int
    ) -> EncodedTurn:
        """Encode what `render_turns` yields for a turn, with <|im_start|>, <|im_end|> and a newline.

        An image is one span of media tokens; a video is one span per frame pair, each after its time. All text between
        two control tokens is tokenized together, because merges may cross the newline after the role. Media are not
        decoded beyond `space` tokens.
        """
        encoded = EncodedTurn([self.im_start_token_id])
        text = prefix
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            decode = decode and len(encoded.ids) <= space  # the turn does not fit: its pixels are not used
            try:
                path, media_options = read_spec(part)
                if part.kind == "image":
                    image = load_image(find_image(path, media_dir, confine), decode)
                    pixels, grid = self.process_image(image, decode, media_options)
                    captions, pad = [""], self.image_token_id
                else:
                    video = open_video(path, media_dir, confine, self.video_fps, media_options)
                    pixels, grid, times = self.process_video(video, decode, media_options)
                    captions, pad = [f"<{time:.1f} seconds>" for time in times], self.video_token_id
            except InputError as error:
                raise InputError(f"{part.key}: {error}") from error
            encoded.pixels.append(pixels)
            encoded.grids.append(grid)
            rows, columns = grid[1] // self.merge_size, grid[2] // self.merge_size
            for caption in captions:
                encoded.ids += [*self._encode_text(text + caption), self.vision_start_token_id]
                encoded.visual_spans.append((len(encoded.ids), rows, columns))
                encoded.ids += [pad] * (rows * columns) + [self.vision_end_token_id]
                text = ""
        encoded.ids += [*self._encode_text(text), self.im_end_token_id, *self._newline_ids]
        return encoded


@functools.cache
def _pair_tables(rescale_factor: float, means: tuple, stds: tuple) -> np.ndarray:
    """Return the normalised values of each pair of bytes in each channel, [3, 65536] float64 (two float32 each).

    They have transformers' roundings: rescaled in float64, normalised in float32.
    """
    levels = (np.arange(256, dtype=np.float64) * rescale_factor).astype(np.float32)
    tables = (levels - np.array(means, np.float32)[:, None]) / np.array(stds, np.float32)[:, None]  # [3, 256]
    pairs = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2)  # in the machine's byte order
    return np.ascontiguousarray(tables[:, pairs]).view(np.float64)[..., 0]


def mrope_positions(length: int, spans: list[tuple[int, int, int]]) -> np.ndarray:
    """Return positions [3, length] (temporal, height, width) of text with spans (start, rows, columns) of media tokens.

    A text token adds one on all axes. In a span that begins at position p, a token has (p, p + row, p + column), and
    the token after the span has position p + max(rows, columns).
    """
    positions = np.empty((3, length), np.int64)
    done = position = 0
    for start, rows, columns in spans:
        positions[:, done:start] = np.arange(position, position + start - done)
        position += start - done
        done = start + rows * columns
        span = np.full((3, rows, columns), position)
        span[1] += np.arange(rows)[:, None]
        span[2] += np.arange(columns)
        positions[:, start:done] = span.reshape(3, -1)
        position += max(rows, columns)
    positions[:, done:] = np.arange(position, position + length - done)
    return positions


def _load_tokenizer(path: Path) -> tuple[Tokenizer, set[int]]:
    """Return the tokenizer and the ids of the special tokens. Raises InputError.

    The tokenizer encodes special tokens as text. All but TEXT_TOKENS lose the mark, and so become their ids.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist: the model's tokenizer is needed")
    try:
        text = path.read_text("utf-8")
        start = text.index("[", text.index('"added_tokens"'))  # the vocabulary behind them takes long to parse
        added, end = json.JSONDecoder().raw_decode(text, start)
        special = [token for token in added if token["special"]]
        for token in special:
            token["special"] = token["content"] in TEXT_TOKENS
        tokenizer = Tokenizer.from_str(text[:start] + json.dumps(added) + text[end:])
    except Exception as error:  # tokenizers has no exception classes of its own
        raise InputError(f"{path} cannot be read as a tokenizer: {one_line(error)}") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()  # the file may ask for padding and truncation
    tokenizer.no_truncation()
    return tokenizer, {token["id"] for token in special}


def _end_token_ids(hf_dir: str | Path) -> set[int]:
    """Return `eos_token_id` of generation_config.json, else of config.json, else no ids. Raises InputError."""
    for path in (Path(hf_dir, "generation_config.json"), Path(hf_dir, "config.json")):
        config = read_json(path, missing_ok=True)
        ids = config.get("eos_token_id", _section(config, "text_config", path).get("eos_token_id"))
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int for i in ids):
            raise InputError(f"{path}: eos_token_id is {shorten(ids)}, it must be a token id or a list of them")
        if ids:
            return set(ids)
    return set()


def _section(config: dict, name: str, where: str | Path) -> dict:
    """Return the object `name` of a configuration, {} if it has none. Raises InputError for any other type."""
    section = config.get(name, {})
    if not isinstance(section, dict):
        raise InputError(f"{where}: {name} must be an object, not {shorten(section)}")
    return section


def _media_settings(hf_dir: str | Path, kind: str) -> dict:
    """Return the preprocessor settings of images or videos: a file of their own overrides processor_config.json."""
    shared, own = Path(hf_dir, PROCESSOR_FILE), Path(hf_dir, PREPROCESSOR_FILES[kind])
    settings = _section(read_json(shared, missing_ok=True), f"{kind}_processor", shared)
    settings = DEFAULTS | settings | read_json(own, missing_ok=True)
    where = own if own.exists() else shared
    size = _section(settings, "size", where)
    limits = [settings.get("min_pixels"), settings.get("max_pixels"), *map(size.get, ("shortest_edge", "longest_edge"))]
    if not all(isinstance(number, int) for number in (settings["min_frames"], *limits) if number is not None):
        raise InputError(f"{where}: min_frames and the limits of pixels must be integers")
    for name in ("image_mean", "image_std"):
        values = settings[name]
        if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
            raise InputError(f"{where}: {name} must be three numbers, not {shorten(values)}")
    if 0 in settings["image_std"]:
        raise InputError(f"{where}: image_std must not be 0")
    return settings


def _override_limits(limits: tuple, minimum: float | None, maximum: float | None) -> tuple:
    """Return pixel limits in which those given replace the others.

    A single given limit moves the other one if necessary: a maximum below the other limit becomes both.
    """
    low, high = limits
    return (
        minimum if minimum is not None else min(low, maximum or low),
        maximum if maximum is not None else max(high, minimum or high),
    )


def _pixel_limits(kind: str, settings: dict, minimum: int | None, maximum: int | None) -> tuple[int, int]:
    """Return the limits given, else the preprocessor's (`min_pixels` before `size`), else the released models'."""
    size, defaults = settings.get("size", {}), DEFAULT_PIXELS[kind]
    low = settings.get("min_pixels") or size.get("shortest_edge") or defaults[0]
    high = settings.get("max_pixels") or size.get("longest_edge") or defaults[1]
    low, high = _override_limits((low, high), minimum, maximum)
    if not 0 <= low <= high or high < 1:
        raise InputError(f"{kind}_min_pixels {low} must not be above {kind}_max_pixels {high}")
    return low, high


def preprocessor_files(hf_dir: str | Path, limits: dict[str, float]) -> dict[str, dict]:
    """Return a directory's preprocessor files with these limits in place: {file name: contents} of changed files.

    `limits` are those of `media_limits`. transformers prefers processor_config.json to the other files, and reads
    images' settings for videos that have none. So every place that a directory has is changed, and a kind that has none
    gets a file, with the released models' settings.
    """
    names = (PROCESSOR_FILE, *PREPROCESSOR_FILES.values())
    contents = {name: read_json(Path(hf_dir, name), missing_ok=True) for name in names}
    changed = {}
    for kind, own in PREPROCESSOR_FILES.items():
        sections = {PROCESSOR_FILE: contents[PROCESSOR_FILE].get(f"{kind}_processor"), own: contents[own]}
        sections = {name: section for name, section in sections.items() if section}
        if not sections:
            contents[own] = sections[own] = DEFAULTS | PREPROCESSOR_CLASSES[kind]
        elif not any(limit.startswith(kind) for limit in limits):
            continue
        minimum, maximum = limits.get(f"{kind}_min_pixels"), limits.get(f"{kind}_max_pixels")
        low, high = _pixel_limits(kind, _media_settings(hf_dir, kind), minimum, maximum)
        for name, section in sections.items():
            section["size"] = {"shortest_edge": low, "longest_edge": high}
            for key, value in (("min_pixels", low), ("max_pixels", high)):
                if section.get(key) is not None:  # transformers prefers it to `size`
                    section[key] = value
            for key, limit in (("fps", "video_fps"), ("max_frames", "video_maxlen")):
                if kind == "video" and limit in limits:
                    section[key] = limits[limit]
            changed[name] = contents[name]
    return changed


# ---- files of rows -----------------------------------------------------------------------------------------------


class RowFile:
    """A file of rows. To add a format, write a subclass and enter its suffix in `ROW_FORMATS`.

    A row is found by a half-open range [start, end) of integers in a unit that the format chooses, such as bytes or row
    numbers. The ranges of a file increase and do not overlap. All methods may raise OSError. `read` runs in forked
    worker processes and must not share a file handle with them.
    """

    def __init__(self, path: str):
        self.path = path

    def size(self) -> int:
        """Return an upper bound of the ranges' ends, in the format's unit."""
        raise NotImplementedError

    def scan(self, start: int = 0) -> Iterator[tuple[int, int]]:
        """Yield the range of each row from `start` on, in bounded memory. `start` is 0 or the end of a row.

        Raises InputError for a file that cannot be divided into rows.
        """
        raise NotImplementedError

    def read(self, start: int, end: int) -> dict:
        """Return the row of a range. Raises ValueError with a reason for a row that cannot be read."""
        raise NotImplementedError


class JsonRows(RowFile):
    """Rows in a JSON array or in JSON lines, in UTF-8. The ranges count bytes."""

    def size(self) -> int:
        return os.path.getsize(self.path)

    def scan(self, start: int = 0) -> Iterator[tuple[int, int]]:
        with open(self.path, "rb") as stream:
            first_byte = len(codecs.BOM_UTF8) if stream.read(3) == codecs.BOM_UTF8 else 0
            stream.seek(first_byte)
            while (chunk := stream.read(1 << 20)).isspace():
                pass
            mark = chunk.lstrip()[:1]
            if mark not in (b"[", b"{", b""):
                raise InputError(
                    f"{self.path} begins with {mark!r}: a dataset is a JSON array of rows or JSON lines, in UTF-8"
                )
            start = stream.seek(max(start, first_byte))
            if mark == b"[":
                yield from _scan_array(self.path, stream, start, "[" if start == first_byte else ",]")
                return
            for line in stream:
                end = start + len(line)
                if not line.isspace():
                    yield start, end
                start = end

    def read(self, start: int, end: int) -> dict:
        with open(self.path, "rb") as stream:
            stream.seek(start)
            content = stream.read(end - start)
        try:
            return json.loads(content.decode())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is not JSON in UTF-8 ({one_line(error)})") from error


ROW_FORMATS: dict[str, type[RowFile]] = {}  # by suffix, such as ".parquet"; files with other suffixes are JSON


def _scan_array(path: str, stream: BinaryIO, offset: int, expected: str) -> Iterator[tuple[int, int]]:
    """Yield the byte range of each element of a JSON array. Raises InputError.

    `offset` is the stream's position: the start of the array (`expected` is "[") or the end of an element (",]").

    The bytes are decoded as Latin-1, in which every byte is one character, so that the parser's positions are
    byte positions. The result is the same: in UTF-8, only characters inside strings have bytes above 127. The parser is
    lenient about the contents of rows, because `JsonRows.read` reports each bad row on its own.
    """
    parse = json.JSONDecoder(strict=False, parse_int=len).raw_decode
    separator = re.compile(r"[ \t\n\r]*(\[[ \t\n\r]*\]|[\[,\]]?)[ \t\n\r]*")
    window, done, at_end = "", 0, False  # window[0] is byte `offset` of the file; everything before `done` was yielded
    while True:
        match = separator.match(window, done)
        mark, start = match[1], match.end()
        closes = mark.endswith("]")
        problem, end = "", start  # `end` is where the element ends, or where the problem is
        if not mark or mark[0] not in expected:
            problem, end = f"expected {' or '.join(expected)}", match.start(1)
        elif not closes:
            try:
                end = parse(window, start)[1]
            except (ValueError, RecursionError) as error:
                problem, end = getattr(error, "msg", one_line(error)), getattr(error, "pos", start)
        # An element that the window cuts has a problem near the window's end, or is an unterminated string, or seems to
        # end there (a number). 16 bytes are more than the longest escape or literal.
        if not at_end and (end > len(window) - 16 or problem.startswith("Unterminated")):
            chunk = stream.read(max(1 << 20, len(window) - done))  # doubles the window while an element exceeds it
            offset, window, done = offset + done, window[done:] + chunk.decode("latin-1"), 0
            at_end = not chunk
            continue
        if closes and not problem:
            if start == len(window):
                return
            problem = "extra data after the array"
        if problem:
            raise InputError(f"{path} is not a JSON array: {problem} (byte {offset + end})")
        yield offset + start, offset + end
        done, expected = end, ",]"


class Span(NamedTuple):
    """The location of a row: the numbers of its file and of the row in the file, from 0, and its `RowFile` range."""

    file: int
    number: int
    start: int
    end: int


class RowSource:
    """Files of rows that are read as one dataset: the common part of `RowDataset` and `RowStream`.

    Only the first `max_samples` rows of each file are used. Media paths are relative to `dataset_dir`, by default to
    the folder of each file. Raises InputError.
    """

    sizes: list[int]  # of the files, to notice that they have changed
    weights: list[float]  # how many times each file's rows enter an epoch
    shuffle_buffer: int | None = None  # number of rows in a block of a stream

    def __init__(self, paths: list[str], dataset_dir: str | None = None, max_samples: int | None = None):
        if dataset_dir is not None and not os.path.isdir(dataset_dir):
            raise InputError(f"--dataset-dir {dataset_dir} is not a folder: give the folder of the media paths")
        self.paths, self.max_samples = [str(path) for path in paths], max_samples
        self.weights = [1.0] * len(paths)
        if "" in self.paths:
            raise InputError("the name of a dataset is empty: separate file names by single commas")
        self.media_dirs = [Path(dataset_dir or Path(path).parent) for path in self.paths]
        self.files = [ROW_FORMATS.get(Path(path).suffix, JsonRows)(path) for path in self.paths]
        for path, file in zip(self.paths, self.files, strict=True):
            try:
                if next(file.scan(), None) is None:
                    raise InputError(f"the dataset {path} holds no rows")
            except OSError as error:
                raise InputError(f"the dataset {path} cannot be read: {error.strerror}") from error

    def read(self, span: Span) -> tuple[dict, str, Path]:
        """Return a row, its source such as "train.json row 12 (id 33471)" (counted from 1), and its media folder."""
        source = f"{self.paths[span.file]} row {span.number + 1}"
        try:
            row = self.files[span.file].read(span.start, span.end)
        except (OSError, ValueError) as error:
            raise InputError(f"{source} cannot be read: {one_line(error)}") from error
        if isinstance(row, dict) and row.get("id") is not None:
            source += f" (id {' '.join(str(row['id']).split())[:100]})"
        return row, source, self.media_dirs[span.file]

    def stream(self, state: dict, seed: int | None) -> Iterator[tuple[Span, dict]]:
        """Yield the rows after the position `state`, endlessly, each with the position after it.

        `state` is {} at the start. The rows of each block (see `_blocks`) are shuffled, in an order that depends on
        `seed` and the epoch. If `seed` is None, the files' order is kept. Raises InputError.
        """
        if state:
            self._check_position(state)
        settings = {"sizes": self.sizes, "weights": self.weights, "shuffle_buffer": self.shuffle_buffer}
        consumed, epoch, done = (state.get(name, 0) for name in ("consumed", "epoch", "done"))
        block = state.get("block")
        while True:
            for start, size, span_at in self._blocks(block, epoch, seed):
                order = range(size)
                if seed is not None:
                    order = np.random.default_rng([seed, epoch, *start]).permutation(size)
                for i in range(done, size):
                    consumed += 1
                    position = {"consumed": consumed, "epoch": epoch, "block": start, "done": i + 1}
                    yield span_at(int(order[i])), position | settings
                done = 0
            block, epoch, done = None, epoch + 1, 0

    def _blocks(
        self, first: list[int] | None, epoch: int, seed: int | None
    ) -> Iterator[tuple[list[int], int, Callable[[int], Span]]]:
        """Yield the blocks of an epoch, from the start of the block `first` on (None: all blocks).

        A block is given by its start (a list of numbers), its number of rows, and a function that returns the location
        of the i-th row.
        """
        raise NotImplementedError

    def passes(self, file: int, epochs: range) -> int:
        """Return how many times at most a row of a file enters some epochs."""
        return len(epochs)

    def _check_position(self, state: dict) -> None:
        """Compare a position with these datasets. Raises InputError if only one of them was streamed."""
        was_streamed = state["shuffle_buffer"] is not None
        if was_streamed != (self.shuffle_buffer is not None):
            raise InputError(
                f"the checkpoint's data was read with{'' if was_streamed else 'out'} --streaming: "
                f"{'give' if was_streamed else 'omit'} --streaming, or give --finetune to restart the data"
            )
        saved_weights = state.get("weights", [1.0] * len(state["sizes"]))  # older checkpoints have none
        if (state["sizes"], saved_weights) != (self.sizes, self.weights):
            logger.warning(
                "the datasets have sizes %s and weights %s, but had %s and %s when saved: the order is new, rows may "
                "be lost or repeated", self.sizes, self.weights, state["sizes"], saved_weights,
            )
        if state["shuffle_buffer"] != self.shuffle_buffer:  # other blocks would lose rows
            self.shuffle_buffer = state["shuffle_buffer"]
            logger.warning("the stream keeps the shuffle buffer of %d rows that it was saved with", self.shuffle_buffer)


class RowDataset(RowSource):
    """Rows of known number, read from disk on demand. Only the range of each row is in memory, in 16 bytes.

    The ranges are also kept in `cache_dir` for the next start. The files there may be deleted at any time. `weights`
    affects the epochs of `stream` only (see `_epoch_rows`).
    """

    def __init__(
        self, paths: list[str], dataset_dir: str | None = None, cache_dir: str | None = None,
        max_samples: int | None = None, weights: list[float] | None = None,
    ):
        super().__init__(paths, dataset_dir, max_samples)
        self.ranges = [_cached_index(file, cache_dir)[:max_samples] for file in self.files]  # [rows, 2] each
        self.sizes = [len(ranges) for ranges in self.ranges]
        self.ends = np.cumsum(self.sizes)
        self.weights = weights or self.weights
        self.epoch_sizes = [  # rows of each file in an epoch: at least one, unless the weight is 0
            max(1, round(weight * size)) if weight else 0
            for weight, size in zip(self.weights, self.sizes, strict=True)
        ]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[dict, str, Path]:
        return self.read(self.span(index))

    def span(self, index: int) -> Span:
        """Return the location of a row. `index` counts from 0 over all files."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self.ends, index, side="right"))
        number = index - int(self.ends[file]) + self.sizes[file]
        return Span(file, number, *self.ranges[file][number].tolist())

    def count(self) -> int:
        """Return the number of rows in an epoch."""
        return sum(self.epoch_sizes)

    def file_rows(self, file: int) -> float:
        """Return the number of rows of a file."""
        return self.sizes[file]

    def _blocks(
        self, first: list[int] | None, epoch: int, seed: int | None
    ) -> Iterator[tuple[list[int], int, Callable[[int], Span]]]:
        rows = self._epoch_rows(epoch, seed)
        yield [], len(rows), lambda i: self.span(int(rows[i]))  # one block per epoch

    def passes(self, file: int, epochs: range) -> int:
        rows, size = self.epoch_sizes[file], self.sizes[file]
        return -(-rows * epochs.stop // size) - rows * epochs.start // size

    def _epoch_rows(self, epoch: int, seed: int | None) -> np.ndarray:
        """Return the rows of an epoch as arguments of `span`, file by file: first its full copies, then its share.

        A weight of 2.5 gives two copies and a share of half the rows, all in the file's order. To choose the shares,
        the rows are arranged in a random circle. The share of each epoch begins where the one before ended, so that
        all rows are used equally often. When a share ends at the circle's start, the rows are arranged anew. If `seed`
        is None, the shares are those of seed 0.
        """
        parts = []
        for file, (size, rows) in enumerate(zip(self.sizes, self.epoch_sizes, strict=True)):
            first = int(self.ends[file]) - size
            copies, share = divmod(rows, size)
            parts += [np.arange(first, first + size)] * copies
            if share:
                cycle, shares_before = divmod(epoch, size // math.gcd(size, share))
                order = np.random.default_rng([seed or 0, cycle, file, 1]).permutation(size)  # 1: unlike `stream`'s
                numbers = np.arange(share) + shares_before * share
                parts.append(first + np.sort(order.take(numbers, mode="wrap")))
        return np.concatenate(parts)


class RowStream(RowSource):
    """Rows of unknown number, found by reading the files once an epoch.

    Each block of `shuffle_buffer` successive rows is shuffled on its own. So a position is the start of a block and a
    number of rows in it, and all ranks find the same order without communication.
    """

    def __init__(
        self, paths: list[str], dataset_dir: str | None = None, max_samples: int | None = None,
        shuffle_buffer: int = 1000,
    ):
        super().__init__(paths, dataset_dir, max_samples)
        self.shuffle_buffer = shuffle_buffer
        self.sizes = [file.size() for file in self.files]
        self._found = [(1, 1)] * len(paths)  # for each file: the number of rows found so far, and the end of the last

    def count(self) -> int:
        """Return the number of rows in an epoch. This reads every file."""
        return sum(1 for _ in self._spans(0, 0, 0))

    def file_rows(self, file: int) -> float:
        """Return an estimate of a file's number of rows, from the rows found so far."""
        rows, end = self._found[file]
        return rows * self.sizes[file] / end

    def _blocks(
        self, first: list[int] | None, epoch: int, seed: int | None
    ) -> Iterator[tuple[list[int], int, Callable[[int], Span]]]:
        start = first or [0, 0, 0]  # number of the file, number of the row in it, start of the row's range
        spans = self._spans(*start)
        while block := list(itertools.islice(spans, self.shuffle_buffer)):
            yield start, len(block), block.__getitem__
            start = [block[-1].file, block[-1].number + 1, block[-1].end]

    def _spans(self, first_file: int, number: int, start: int) -> Iterator[Span]:
        """Yield the locations of the rest of an epoch, from a row of `first_file` and its position on."""
        for file in range(first_file, len(self.files)):
            numbers = itertools.count(number) if self.max_samples is None else range(number, self.max_samples)
            for row, (begin, end) in zip(numbers, self.files[file].scan(start), strict=False):
                self._found[file] = max(self._found[file], (row + 1, end))
                yield Span(file, row, begin, end)
            number = start = 0


def _cached_index(file: RowFile, cache_dir: str | None) -> np.ndarray:
    """Return the ranges [rows, 2] of a file's rows, from `cache_dir` if the file has not changed."""

    def build() -> np.ndarray:
        return np.fromiter(itertools.chain.from_iterable(file.scan()), np.int64).reshape(-1, 2)

    if cache_dir is None:
        return build()
    status = os.stat(file.path)
    identity = f"{os.path.abspath(file.path)} {status.st_size} {status.st_mtime_ns}"
    cached = Path(cache_dir, f"rows-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz")
    if cached.exists():
        try:
            return np.load(cached)["ranges"]
        except Exception as error:  # damaged bytes raise many types; a wrong value fails the archive's CRC
            logger.warning("%s is damaged and is built again: %s", cached, one_line(error))
    ranges = build()
    temporary = cached.with_suffix(f".{uuid.uuid4().hex}")  # other processes may write the same index
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            np.savez(stream, ranges=ranges)
        os.replace(temporary, cached)
    except OSError as error:  # such as a full disk, which only makes the next start slower
        logger.warning("%s cannot be written: %s", cached, error.strerror)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return ranges


# ---- the stream --------------------------------------------------------------------------------------------------

PACKING_WINDOW = 128  # samples


@dataclass
class Loader:
    """An endless stream of micro-batches, the same for any number of workers and exact when resumed.

    The main process decides the order: it iterates `dataset.stream`, assigns rows to data-parallel ranks, and sends the
    rows' locations to stateless workers. Each Batch carries the position after it, `resume_state`.

    Iterating gives the batches. `stages` gives each micro-batch twice. First comes a Measurement, then the Batch, whose
    pixels are decoded when it is asked for, or by workers a few micro-batches ahead.

    The stream is cut into micro-batches of `micro_batch_size` rows, which go to the ranks in turn. So a global batch
    has the same rows in every layout. With `packing`, single rows go to the ranks in turn, and a micro-batch has
    `micro_batch_size` packed rows of up to `seq_length` tokens each (see `_packed_rows`).

    With `on_bad_sample` "error", the main process raises a bad row's InputError. With "skip", the row is left out and
    logged once; `check_bad_row_rate` raises if there are too many.
    """

    dataset: RowDataset | RowStream
    processor: Processor
    _: KW_ONLY
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    seed: int | None  # of the shuffling; None keeps the files' order
    num_workers: int
    on_bad_sample: str  # "error" or "skip"
    options: EncodeOptions
    packing: bool = False
    pin_memory: bool = False  # for copies to an accelerator
    pixel_dtype: torch.dtype = torch.float32  # the type that the model computes in, so that pixels take less memory
    resume_state: dict | list[dict] | None = None  # one rank's position, or all ranks' if their number may differ
    num_samples: int | None = None  # ends the stream after so many rows; the last batches of some ranks may be empty
    _logged: set[str] = field(default_factory=set, init=False)  # errors of skipped rows

    def __iter__(self) -> Iterator[Batch]:
        return self.stages()[1]

    def stages(self) -> tuple[Iterator[Measurement], Iterator[Batch]]:
        """Return two iterators over the same micro-batches, measured and loaded. Both raise or log bad rows."""
        states = self.resume_state if isinstance(self.resume_state, list) else [self.resume_state or {}]
        if "rank_layout" in states[0] and not self.packing:
            raise InputError("the checkpoint's data was packed: give --packing, or --finetune to restart the data")
        self._first_epoch = states[0].get("epoch", 0)
        self._rows_read, self._rows_bad = np.zeros((2, len(self.dataset.paths)), np.int64)
        measured = self._packed(states) if self.packing else map(
            self._copy_batch, self._in_workers(self._measure, self._micro_batches(states[0])))
        measured, to_load, waiting = itertools.tee(measured, 3)
        return self._measured(measured), self._loaded(to_load, waiting)

    def _copy_batch(self, measurement: Measurement) -> Measurement:
        """Copy a batch from shared memory, where each tensor needs an open file, as it may wait for a full step.

        Pinned memory is a copy already.
        """
        if measurement.batch is None or not self.num_workers or self.pin_memory:
            return measurement
        return measurement._replace(batch=measurement.batch._convert(Tensor.clone))

    def _measured(self, measured: Iterator[Measurement]) -> Iterator[Measurement]:
        for measurement in measured:
            self._report(measurement.failures)
            yield measurement

    def _loaded(self, to_load: Iterator[Measurement], waiting: Iterator[Measurement]) -> Iterator[Batch]:
        """Yield the batches of `waiting`. Workers take their items from `to_load`, which runs ahead."""
        loaded = self._in_workers(self._load, ((m.spans, m.resume_state) if m.batch is None else None for m in to_load))
        for measurement in waiting:
            batch, failures = next(loaded) or (measurement.batch, measurement.failures)
            self._report(failures)
            yield batch
            del batch  # frees its pixels before the next ones are decoded

    def _report(self, failures: list[str]) -> None:
        """Raise the first error of bad rows, or log those that are not logged yet."""
        for message in failures:
            if self.on_bad_sample == "error":
                raise InputError(message)
            if message not in self._logged:
                logger.warning("skipped: %s", message)
                self._logged.add(message)

    def check_bad_row_rate(self, rows_read: list[int], rows_bad: list[int], epoch: int) -> None:
        """Raise InputError if more than a tenth of a dataset's rows are bad.

        `rows_read` and `rows_bad` are the rows of each file since the last call or the start of the iteration, summed
        over all ranks; `epoch` is the current one.
        """
        self._rows_read += rows_read
        self._rows_bad += rows_bad
        epochs = range(self._first_epoch, epoch + 1)
        for file, (read, bad) in enumerate(zip(self._rows_read.tolist(), self._rows_bad.tolist(), strict=True)):
            rows = self.dataset.file_rows(file)
            if read >= min(10, rows) and bad > 0.1 * self.dataset.passes(file, epochs) * rows:
                raise InputError(
                    f"{self.dataset.paths[file]}: {bad} of {read} rows read are bad, more than a tenth of the "
                    "dataset; the log has the reasons"
                )

    def epoch_size(self) -> float:
        """Return the number of rows in an epoch. With `packing`, estimate the number of packed rows.

        The estimate divides the tokens of up to 1000 rows by `seq_length`, as if packed rows had no unused space. With
        samples much shorter than `seq_length`, it is too low by about 1 to 2 %.
        """
        rows = self.dataset.count()
        if not self.packing:
            return rows
        measured = itertools.islice(self.dataset.stream({}, self.seed), min(rows, 1000))
        lengths = [self._measure(([span], state)).length for span, state in measured]
        return rows * sum(lengths) / len(lengths) / self.options.seq_length

    def _in_workers(self, function: Callable, items: Iterator) -> Iterator:
        """Yield `function(item)` for each item, in order, computed in worker processes of its own."""
        if self.num_workers:
            gc.collect()  # workers crash when they destroy an earlier run's process groups, whose threads a fork lacks
        yield from DataLoader(
            _FunctionDataset(function), batch_size=None, sampler=items, num_workers=self.num_workers,
            pin_memory=self.pin_memory, worker_init_fn=leave_process_group,
            generator=torch.Generator(),  # the global one belongs to the training, whose random state is resumed
        )

    def _load(self, item: tuple[list[Span], dict] | None, decode: bool = True) -> tuple[Batch, list[str]] | None:
        """Make a micro-batch of the rows at some locations, with or without pixels. A worker runs this.

        The errors of bad rows are returned, not raised, because torch would hide them in a worker's traceback.
        """
        if item is None:  # the measurement has the batch
            return None
        spans, state = item
        samples, failures = [], []
        rows_read, rows_bad = [0] * len(self.dataset.paths), [0] * len(self.dataset.paths)
        for span in spans:
            rows_read[span.file] += 1
            try:
                row, source, media_dir = self.dataset.read(span)
                samples += [self.processor.encode(part, media_dir, source, self.options, decode)
                            for part in split_row(row)]
            except InputError as error:
                rows_bad[span.file] += 1
                failures.append(str(error))
        batch = collate(samples, resume_state=state, rows_read=rows_read, rows_bad=rows_bad)
        return replace(batch, pixel_values=batch.pixel_values.to(self.pixel_dtype)), failures

    def _measure(self, item: tuple[list[Span], dict]) -> Measurement:
        """Measure the rows at some locations. A worker runs this.

        A bad row counts as one token, so that it is still packed and reported. If it ends the run, it counts as a full
        row, so that it is reported soon.
        """
        batch, failures = self._load(item, decode=False)
        measurement = batch.measure()._replace(spans=item[0], failures=failures)
        if failures and self.on_bad_sample == "error":
            return measurement._replace(length=self.options.seq_length)
        return measurement if self.packing or measurement.media else measurement._replace(batch=batch)

    def _micro_batches(self, state: dict) -> Iterator[tuple[list[Span], dict]]:
        """Yield this rank's rows of each micro-batch, and the position after the rows of all ranks."""
        rows = itertools.islice(self.dataset.stream(state, self.seed), self.num_samples)
        first = self.dp_rank * self.micro_batch_size
        while step := list(itertools.islice(rows, self.micro_batch_size * self.dp_size)):
            yield [span for span, _ in step[first : first + self.micro_batch_size]], step[-1][1]

    def _packed(self, states: list[dict]) -> Iterator[Measurement]:
        """Yield each micro-batch of packed rows, and the position after them."""
        packed_rows = self._packed_rows(states)
        while step := list(itertools.islice(packed_rows, self.micro_batch_size)):
            rows = [row for packed_row, _ in step for row in packed_row]
            yield Measurement(
                sources=[source for row in rows for source in row.sources],
                supervised=[n for row in rows for n in row.supervised],
                length=sum(row.length for row in rows),
                media=sum(row.media for row in rows),
                resume_state=step[-1][1],
                spans=[span for row in rows for span in row.spans],
                failures=[failure for row in rows for failure in row.failures],
            )

    def _packed_rows(self, states: list[dict]) -> Iterator[tuple[list[Measurement], dict]]:
        """Yield the samples of each packed row (see `pack_row`), and the position after them.

        A packed row never mixes two epochs. The position includes the samples in the buffer.
        """
        undelivered, state = self._undelivered_rows(states)
        rows_of_this_rank = (
            ([span], next_state) for span, next_state in self.dataset.stream(state, self.seed)
            if (next_state["consumed"] - 1) % self.dp_size == self.dp_rank
        )
        rows = itertools.chain((([span], state) for span in undelivered), rows_of_this_rank)
        buffer: list[Measurement] = []  # samples that are not packed yet
        seq_length = self.options.seq_length
        for count, row in enumerate(self._in_workers(self._measure, rows)):
            # Everything that was buffered at the checkpoint must be back in the buffer before packing starts. Only then
            # does a resumed run pack exactly as the interrupted one would have.
            is_new, next_state = count >= len(undelivered), row.resume_state
            while is_new and buffer and (next_state["epoch"] != state["epoch"] or ready_to_pack(buffer, seq_length)):
                chosen, buffer = pack_row(buffer, seq_length)
                spans = [list(span) for waiting in buffer for span in waiting.spans]
                yield chosen, state | {"rank_layout": [self.dp_rank, self.dp_size], "buffer": spans}
            buffer.append(row)
            state = next_state

    def _undelivered_rows(self, states: list[dict]) -> tuple[list[Span], dict]:
        """Return the rows before the checkpoint that this rank still has to pack, and the position to continue from.

        Ranks pack at different speeds, so that each saves its own position. If the layout of ranks has changed, all
        ranks continue from the furthest position, and the rows before it that no rank has packed are divided among the
        new ranks.
        """
        layout = [self.dp_rank, self.dp_size]
        own = [state for state in states if state.get("rank_layout", layout) == layout]
        if own:
            return [Span(*span) for span in own[0].get("buffer", [])], own[0]
        # Context-parallel ranks read the same rows and saved the same position.
        states = list({tuple(state["rank_layout"]): state for state in states}.values())
        spans = [Span(*span) for state in states for span in state["buffer"]]
        consumed = {state["rank_layout"][0]: state["consumed"] for state in states}
        states = sorted(states, key=lambda state: state["consumed"])
        newest, number = states[-1], states[-1]["consumed"] - states[0]["consumed"]
        for span, state in itertools.islice(self.dataset.stream(states[0], self.seed), number):
            rank = (state["consumed"] - 1) % newest["rank_layout"][1]
            if state["consumed"] > consumed[rank]:
                spans.append(span)
        return spans[self.dp_rank :: self.dp_size], newest


def ready_to_pack(buffer: list[Measurement], seq_length: int) -> bool:
    """Return whether enough samples are buffered to fill a row well.

    The conditions are a multiple of PACKING_WINDOW samples and tokens for two rows.
    """
    return len(buffer) % PACKING_WINDOW == 0 and sum(row.length for row in buffer) >= 2 * seq_length


def pack_row(buffer: list[Measurement], seq_length: int) -> tuple[list[Measurement], list[Measurement]]:
    """Choose samples for one packed row of `seq_length` tokens. Returns (chosen, remaining), in the buffer's order.

    The oldest sample comes first, then repeatedly the longest that still fits.
    """
    chosen = {0}
    remaining = seq_length - buffer[0].length
    for i in sorted(range(1, len(buffer)), key=lambda i: -buffer[i].length):
        if buffer[i].length <= remaining:
            remaining -= buffer[i].length
            chosen.add(i)
    return [buffer[i] for i in sorted(chosen)], [row for i, row in enumerate(buffer) if i not in chosen]


class _FunctionDataset:
    """Present a function as the dataset that DataLoader needs."""

    def __init__(self, function: Callable):
        self.function = function

    def __getitem__(self, item):
        return self.function(item)


if __name__ == "__main__":
    from tools.dataset_cli import run  # imports this file a second time, as `data`

    sys.exit(run(sys.argv[1:]))
