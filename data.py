"""Rows of data to packed batches: JSON row -> Sample -> Batch. 

From top to bottom: what a row may hold (`parse_row`), pictures and videos, token ids, labels, positions and patches
(`Processor`), files of rows (`RowDataset`), and the endless, resumable stream of micro-batches (`Loader`). As a program
it converts and inspects datasets (tools/dataset_cli.py):

    python data.py llava --annotations llava_instruct_150k.json --image_dir COCO2017/train2017 --output rows.json
    python data.py check --dataset rows.json --init-from-hf-path DIR --report report.html

Everything equals transformers' Qwen3-VL processor with its Pillow picture processor (ids, positions, pixels; video
prompts as transformers 4.57 writes them) but for one thing, on purpose: control tokens are written by this file only.
A "<|im_end|>" in a row's text becomes the ordinary tokens of its characters. (The tokenizer's added tokens that are
not special, such as <think>, stay tokens.) The only active markup is `<image>` and `<video>` in user turns.

Letters: T tokens, P patches, N pictures and videos, Nv media tokens, Ns supervised tokens.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import functools
import gc
import hashlib
import itertools
import json
import logging
import math
import os
import re
import sys
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

from common import InputError, UsageError, leave_process_group, number, one_line, shorten

logger = logging.getLogger(__name__)
# Pillow refuses pictures of more than twice as many pixels as this: of 120 million (the largest cameras' have 108). A
# file of a few kilobytes can have as many; each copy takes 360 to 480 MB. Its warning at half of that is noise.
# (Filters that change for each picture would make Python forget which warnings it has shown.)
Image.MAX_IMAGE_PIXELS = 60_000_000
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

IGNORE = -100  # the label of a token that is not supervised


# ---------------------------------------------------------------------------------------------- samples and batches


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
    pixel_values: Tensor = _declare("patch")  # [P, 1536] float32
    grid_thw: Tensor = _declare("media")  # [N, 3] int64
    visual_index: Tensor = _declare("index")  # [Nv] int64, positions of the media tokens
    supervised_index: Tensor = _declare("index")  # [Ns] int64, positions whose label is not IGNORE
    sources: list[str] = _declare("sample")
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


def collate(
    samples: list[Sample],
    resume_state: dict | None = None,
    rows_read: list[int] | None = None,
    rows_bad: list[int] | None = None,
) -> Batch:
    """Pack samples end to end. An empty list (every row was bad) gives a batch of one unsupervised token."""
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
        cu_seqlens=cu_seqlens,
        rows_read=rows_read or [],
        rows_bad=rows_bad or [],
        resume_state=resume_state or {},
    )


# ---------------------------------------------------------------------------------------- flags of rows and media

@dataclass(frozen=True)
class EncodeOptions:
    """Choose what `Processor.encode` makes of a row."""

    seq_length: int | None = None  # cut longer samples to this many tokens
    train_on_prompt: bool = False  # supervise every token except media tokens
    mask_history: bool = False  # supervise the last answer only
    for_generation: bool = False  # drop a last answer and end with the start of an answer
    confine_paths: bool = False  # refuse media outside the media directory

    def __post_init__(self):
        if self.train_on_prompt and self.mask_history:
            raise UsageError("--train-on-prompt and --mask-history exclude each other: give one of them")


ENCODE_DEFAULTS = EncodeOptions()
MEDIA_LIMITS = ("image_min_pixels", "image_max_pixels", "video_min_pixels", "video_max_pixels", "video_fps",
                "video_maxlen")


def add_media_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of MEDIA_LIMITS, which several programs have."""
    for kind in ("image", "video"):
        for end, size in (("min", "smallest"), ("max", "largest")):
            group.add_argument(f"--{kind}-{end}-pixels", type=number(int, 1), metavar="N",
                               help=f"{size} {kind} (default: the model's)")
    group.add_argument("--video-fps", type=number(float, 0, above=True), default=2.0, metavar="X",
                       help="frames taken per second of video")
    group.add_argument("--video-maxlen", type=number(int, 2), default=64, metavar="N", help="most frames of a video")


def media_limits(args: argparse.Namespace) -> dict[str, float | None]:
    """Those flags as `Processor` takes them. Raises UsageError where a minimum is above its maximum."""
    for kind in ("image", "video"):
        low, high = getattr(args, f"{kind}_min_pixels"), getattr(args, f"{kind}_max_pixels")
        if low and high and low > high:
            raise UsageError(f"--{kind}-min-pixels {low} is above --{kind}-max-pixels {high}: give a smaller one")
    return {name: getattr(args, name) for name in MEDIA_LIMITS}


def add_row_flags(group: argparse._ArgumentGroup) -> None:
    """The flags of `encode_options` but --seq-length, whose meaning differs: what training makes of a row."""
    switch = argparse.BooleanOptionalAction
    group.add_argument("--confine-paths", action=switch, default=False, help="refuse media outside the dataset "
                       "directory")
    group.add_argument("--train-on-prompt", action=switch, default=False, help="supervise everything but media tokens")
    group.add_argument("--mask-history", action=switch, default=False, help="supervise the last answer only")


def encode_options(args: argparse.Namespace) -> EncodeOptions:
    """Return the options that the flags give. Raises UsageError if two flags exclude each other."""
    return EncodeOptions(
        seq_length=args.seq_length,
        train_on_prompt=args.train_on_prompt,
        mask_history=args.mask_history,
        confine_paths=args.confine_paths,
    )


# -------------------------------------------------------------------------------------------------- what a row may hold

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
PLACEHOLDER = re.compile("(<image>|<video>)")
MAX_CHARACTERS, MAX_MEDIA = 2_000_000, 4096  # of a row; 262,144 tokens hold no more of either, by far of texts
STILL_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".ppm")
IMAGE_SUFFIXES = (*STILL_SUFFIXES, ".gif", ".webp")
# Whatever its name says, nothing else is decoded: Pillow would start Ghostscript for a .jpg that is PostScript inside,
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# and FFmpeg would follow a playlist's addresses out of the folder and onto the network.
VIDEO_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": "asf,avi,flv,gif,matroska,webm,mov,mp4,m4a,3gp,3g2,"
                 "mj2,mpeg,mpegts,mpegvideo,mpegtsraw,mxf,ogg,wtv,h264,hevc,ivf,m4v,nut,yuv4mpegpipe,apng"}
NOT_IN_PATHS = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")  # \udc80 to \udcff are a name's bytes beyond UTF-8


@dataclass
class Media:
    """A picture or video as the row names it: a path, a list of paths, or `{"path": ..., "fps": ...}`."""

    kind: str  # "image" or "video"
    key: str  # where the row names it: "images[0]"
    spec: str | list | dict | None  # None: a placeholder that waits for one of the row's media


@dataclass
class Turn:
    """One message: its role, and its texts and media in order."""

    role: str
    parts: list[str | Media]


def parse_row(row: dict, for_generation: bool = False) -> list[Turn]:
    """A row of either format as turns: an optional system turn, then user and assistant in turn.

    `{"messages": [{"role", "content"}], "images", "videos"}` or `{"conversations": [{"from", "value"}], "image",
    "video"}`. `<image>` and `<video>` count in user turns only: transformers' template shows no media elsewhere.
    Content may also be a list of `{"type": "text" | "image" | "video", ...}`, whose texts are taken literally.
    With `for_generation` a last answer is dropped. Raises InputError.
    """
    if not isinstance(row, dict):
        raise InputError(f"a row must be an object with 'messages' or 'conversations', this is {_type(row)}")
    name = "messages" if "messages" in row else "conversations"
    role_key, text_key = ("role", "content") if name == "messages" else ("from", "value")
    if name not in row:
        keys = ", ".join(row) or "none"
        raise InputError(f"the row has neither 'messages' nor 'conversations'; its keys: {keys[:200]}")
    if not isinstance(row[name], list) or not row[name]:
        raise InputError(f"'{name}' must be a list of turns, this is {_type(row[name])}")

    turns = []
    for i, message in enumerate(row[name]):
        if not isinstance(message, dict) or role_key not in message or text_key not in message:
            raise InputError(f"{name}[{i}] must be an object with '{role_key}' and '{text_key}'")
        role = ROLES.get(message[role_key]) if isinstance(message[role_key], str) else None
        if role is None:
            found = shorten(message[role_key])
            raise InputError(f"{name}[{i}]: unknown {role_key} {found}, use one of {', '.join(ROLES)}")
        expected = "assistant" if turns and turns[-1].role == "user" else "user"
        if role != expected and not (role == "system" and i == 0):
            raise InputError(
                f"{name}[{i}] is the {role}'s where the {expected}'s is expected: after an optional first system "
                "turn, user and assistant take turns"
            )
        turns.append(Turn(role, _split_content(message[text_key], role, f"{name}[{i}].{text_key}")))

    if for_generation and turns[-1].role == "assistant":
        turns.pop()
    last, lacking = ("user", "question") if for_generation else ("assistant", "answer")
    if turns[-1].role != last:
        raise InputError(f"'{name}' must end with a turn of the {last}: there is no {lacking}")
    _fill_placeholders(turns, _list_media(row, "image"), _list_media(row, "video"))
    texts = [part for turn in turns for part in turn.parts if isinstance(part, str)]
    characters, media = sum(map(len, texts)), sum(len(turn.parts) for turn in turns) - len(texts)
    if characters > MAX_CHARACTERS or media > MAX_MEDIA:
        raise InputError(f"the row has {characters} characters of text and {media} pictures and videos, "
                         f"{MAX_CHARACTERS} and {MAX_MEDIA} at most are read: split it")
    return turns


def _split_content(content, role: str, where: str) -> list[str | Media]:
    """A message's content as texts and media in order."""
    if isinstance(content, str):
        parts = PLACEHOLDER.split(content) if role == "user" else [content]
        parts[1::2] = [Media(placeholder[1:-1], where, None) for placeholder in parts[1::2]]
        return parts
    if not isinstance(content, list):
        raise InputError(f"{where} must be a string, this is {_type(content)}")
    parts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind in ("image", "video") and role == "user":
            parts.append(Media(kind, f"{where}[{i}]", part.get(kind, part.get("path"))))
        else:
            raise InputError(f"{where}[{i}] must be of type 'text', or in a user's turn 'image' or 'video'")
    return parts


def _list_media(row: dict, kind: str) -> list[Media]:
    """The media under `image` or `images` (`video`, `videos`)."""
    keys = [key for key in (kind, kind + "s") if row.get(key) not in (None, [])]
    if len(keys) > 1:
        raise InputError(f"the row has both '{keys[0]}' and '{keys[1]}': keep one")
    if not keys:
        return []
    key, value = keys[0], row[keys[0]]
    if not isinstance(value, list):
        return [Media(kind, key, value)]
    if key == "video" and all(isinstance(item, str) and item.lower().endswith(STILL_SUFFIXES) for item in value):
        return [Media(kind, key, value)]  # one video, as a list of its frames
    return [Media(kind, f"{key}[{i}]", item) for i, item in enumerate(value)]


def _fill_placeholders(turns: list[Turn], images: list[Media], videos: list[Media]) -> None:
    """Puts the row's media in their placeholders, or all before the first user text if there is no placeholder."""
    slots = [part for turn in turns for part in turn.parts if isinstance(part, Media)]
    if not slots:
        first = next(turn for turn in turns if turn.role == "user")
        first.parts[:0] = images + videos
        return
    for kind, given in (("image", images), ("video", videos)):
        waiting = [slot for slot in slots if slot.kind == kind and slot.spec is None]
        if len(waiting) != len(given):
            raise InputError(
                f"the user's turns have {len(waiting)} <{kind}> placeholders, but the row has {len(given)} {kind}s: "
                "the two must be as many"
            )
        for slot, media in zip(waiting, given, strict=True):
            slot.key, slot.spec = media.key, media.spec


def _type(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number") if value or not isinstance(value, dict | list | str) else "empty"


# ------------------------------------------------------------------------------------------------- pictures and videos


def resolve_path(path: str, media_dir: str | Path, confine: bool) -> Path:
    """`path`, relative to `media_dir`. Raises InputError if there is no such file or it is outside and `confine`."""
    if not isinstance(path, str) or not path or NOT_IN_PATHS.search(path):
        raise InputError(f"a path is needed, this is {_type(path)}{': ' + repr(path)[:100] if path else ''}")
    if path.startswith(("http://", "https://", "data:")):
        raise InputError(f"{path[:80]} is not a file on disk: download it first")
    full = Path(media_dir, path)
    if confine and not Path(os.path.realpath(full)).is_relative_to(os.path.realpath(media_dir)):
        raise InputError(f"{path[:1000]} is outside {media_dir}, which --confine-paths forbids")
    if not os.path.exists(full):
        raise InputError(f"{str(full)[:1000]} does not exist")
    return full


def load_image(path: Path, decode: bool = True) -> Image.Image:
    """The picture upright and in RGB, as transformers 5.23 makes it from a path. Raises InputError.

    EXIF rotation is applied and an alpha channel dropped, but what has one transparent colour (palettes, some PNG) is
    laid on white: its `load_image` leaves that colour in `info`, where its picture processor then finds it.
    Without `decode` only the header is read, and only `size` means something: it may be the size before the rotation,
    which the number of tokens does not depend on, as `smart_resize` treats both sides alike.
    """
    with _reading(path, "a picture"), Image.open(path, formats=FORMATS) as image:
        if not decode:
            return image
        ImageOps.exif_transpose(image, in_place=True)
        image = image.convert("RGB")
        if image.info.get("transparency") is None:
            return image
        opaque = image.convert("RGBA").getchannel("A")  # 0 or 255: as `_on_white`, in less memory
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=opaque)
        return white


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise InputError(f"{path} cannot be read as {kind}: {one_line(error)}") from error


@dataclass
class _Header:
    """A frame that is not decoded."""

    size: tuple[int, int]  # width, height


@dataclass
class Video:
    """A video, of which only what its prompt needs has been read."""

    num_frames: int
    fps: float  # frames per second, of a varying rate the mean
    # When each frame appears and the last one ends, in seconds from the first, [num_frames + 1], if the rate varies.
    # If it does not, None: frame i appears at i / fps.
    times: np.ndarray | None
    # read(numbers, decode): the frames of these numbers, which must rise, one by one: decoded, or with a `size` only
    read: Callable[[list[int], bool], Iterator[Image.Image | _Header]]


def open_video(spec: str | list | dict, media_dir: str | Path, confine: bool, default_fps: float) -> Video:
    """A list of pictures, a folder of them (in the order of the numbers in their names), an animated picture or a
    video file; or `{"path": any of these, "fps": rate}`, where the rate comes before what the file says.

    Pictures that come without a rate are taken to have been picked at the rate that is asked for, `default_fps`, as
    the Qwen team's own tools do. Raises InputError.
    """
    path, fps = (spec.get("path"), spec.get("fps")) if isinstance(spec, dict) else (spec, None)
    if fps is not None and (type(fps) not in (int, float) or not 0.001 <= fps <= 1e6):
        raise InputError(f"'fps' must be a number of frames per second, 0.001 at least, this is {shorten(fps)}")
    if isinstance(path, list):
        paths = [resolve_path(item, media_dir, confine) for item in path]
    else:
        full = resolve_path(path, media_dir, confine)
        if not full.is_dir():
            animated = full.suffix.lower() in (*IMAGE_SUFFIXES, ".apng")
            return _open_animation(full, fps) if animated else _open_video_file(full, fps)
        names = [name for name in os.listdir(full) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
        names.sort(key=lambda name: [int(s) if s.isdecimal() else s for s in re.split("([0-9]+)", name)])
        paths = [resolve_path(os.path.join(path, name), media_dir, confine) for name in names]
    return Video(
        num_frames=len(paths),
        fps=float(fps or default_fps),
        times=None,
        read=lambda numbers, decode: (load_image(paths[i], decode) for i in numbers),
    )


ANIMATION_PIXELS = 2 * 10**9  # all of them are decoded, in a dozen seconds, to find how long each frame stays


def _open_animation(path: Path, fps: float | None) -> Video:
    """An animated GIF, WebP or PNG. Transparent pixels are laid on white, as PyAV shows those of a GIF."""

    def frames() -> Iterator[Image.Image]:
        with _reading(path, "an animation"), Image.open(path, formats=FORMATS) as image:
            for number in range(getattr(image, "n_frames", 1)):
                image.seek(number)
                image.load()  # only now does a WebP know a frame's duration
                yield image

    def read(numbers: list[int], decode: bool) -> Iterator[Image.Image | _Header]:
        if not decode:
            yield from [_Header(size)] * len(numbers)
            return
        wanted = set(numbers)
        with _reading(path, "an animation"):
            for number, image in enumerate(frames()):
                if number in wanted:
                    yield _on_white(image) if image.has_transparency_data else image.convert("RGB")
                if number == numbers[-1]:
                    break

    with _reading(path, "an animation"), Image.open(path, formats=FORMATS) as image:
        count, size, times = getattr(image, "n_frames", 1), image.size, None
        if count * size[0] * size[1] > ANIMATION_PIXELS:
            raise InputError(f"{path} has {count} frames of {size[0]}x{size[1]} pixels, {ANIMATION_PIXELS:.0e} pixels "
                             "in all at most are read: make it shorter or smaller")
    if fps is None:
        # In milliseconds. Browsers, too, take 0 for 100.
        times = np.cumsum([0] + [image.info.get("duration") or 100 for image in frames()]) / 1000
        fps = count / times[-1]
        times = None if _is_steady(times, fps) else times
    return Video(count, float(fps), times, read)


SEEK_FRAMES = 16  # to get less far ahead in a video file, decoding is quicker than jumping


def _open_video_file(path: Path, fps: float | None) -> Video:
    """A video file, through PyAV. Frames stay as they are stored: like transformers, this turns none of them.

    One pass over the packets, without decoding, counts the frames and finds when each is shown. What a header states
    may be missing or wrong; but a file that lacks more than a tenth of it was cut off, and that is an error.
    """
    try:
        import av
    except ImportError as error:
        raise InputError(f"{path}: reading video files needs PyAV: pip install av") from error
    with _reading(path, "a video"), av.open(f"file:{path}", options=VIDEO_OPTIONS) as container:
        if not container.streams.video:
            raise ValueError("it holds no video")
        stream = container.streams.video[0]
        size, stated = (stream.width, stream.height), stream.frames
        if not all(size):
            raise ValueError("the size of its frames is not to be found")
        rate, unit = float(stream.average_rate or 0), float(stream.time_base)
        # Of each packet: when its frame is shown, for how long, and whether decoding can begin with it.
        packets, held = [], 0
        for packet in container.demux(stream):
            held += packet.size > 0  # an empty one marks the end
            if packet.size and not packet.is_discard:
                packets.append((packet.pts, packet.duration, packet.is_keyframe))
    if held < 0.9 * stated:
        raise InputError(f"{path} states {stated} frames but holds {held}: it was cut off, get it again")
    count, times, mean, keys = len(packets), None, 0.0, np.zeros(1, int)
    if count > 1 and all(pts is not None for pts, _, _ in packets):
        packets.sort(key=lambda packet: packet[0])  # they come in the order of decoding
        ticks = np.array([pts for pts, _, _ in packets])
        last = packets[-1][1] or (ticks[-1] - ticks[0]) / (count - 1)
        if np.diff(ticks).min() > 0:  # else the times are worth nothing
            times = (np.append(ticks, ticks[-1] + last) - ticks[0]) * unit
            keys, mean = np.flatnonzero([is_key for _, _, is_key in packets]), count / times[-1]
    if fps or times is None or _is_steady(times, rate or mean):
        fps, times = fps or rate or mean, None
    else:
        fps = mean
    if not fps:
        raise InputError(f"{path} states no frame rate: give it as {{'path': ..., 'fps': ...}}")

    def read(numbers: list[int], decode: bool) -> Iterator[Image.Image | _Header]:
        if not decode:
            yield from [_Header(size)] * len(numbers)
            return
        with _reading(path, "a video"), av.open(f"file:{path}", options=VIDEO_OPTIONS) as container:
            stream, at = container.streams.video[0], -1
            frames = enumerate(container.decode(stream))
            for i, number in enumerate(numbers):
                key = max(keys[keys <= number], default=0)
                if key - at > SEEK_FRAMES:
                    container.seek(tick := int(ticks[key]), stream=stream)
                    decoded = container.decode(stream)  # what comes before the key frame may be broken
                    decoded = itertools.dropwhile(lambda f, tick=tick: f.pts != tick or not f.key_frame, decoded)
                    frames = ((int(np.searchsorted(ticks, frame.pts)), frame) for frame in decoded)
                at, frame = next((pair for pair in frames if pair[0] >= number), (-1, None))
                if at != number:  # this file cannot seek, or ends too early
                    yield from read_in_order(numbers[i:])
                    return
                yield frame.to_image()

    def read_in_order(numbers: list[int]) -> Iterator[Image.Image]:
        at = -1
        with av.open(f"file:{path}", options=VIDEO_OPTIONS) as container:
            for at, frame in enumerate(container.decode(video=0)):
                if at in numbers:
                    yield frame.to_image()
                if at == numbers[-1]:
                    return
        if at + 1 < 0.9 * count:
            raise ValueError(f"it states {count} frames, but only {at + 1} can be decoded")
        # In old AVI files a packet or two may hold no frame of their own. What was shown last stays.
        yield from [frame.to_image()] * sum(number > at for number in numbers)

    return Video(count, float(fps), times, read)


def _is_steady(times: np.ndarray, fps: float) -> bool:
    """Whether frame i appears at i / fps, give or take half a frame, as files round times."""
    return bool(np.abs(times[:-1] * fps - np.arange(len(times) - 1)).max() <= 0.5)


def smart_resize(
    height: int, width: int, frames: int, temporal: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width, multiples of `factor`, that keep frames * height * width within the pixel limits.

    transformers' functions of that name: a picture's with `frames` = `temporal` = 1, or a video's, which rounds the
    number of frames to a multiple of `temporal`. Rounding is Python's, half to even. Raises InputError beyond 200:1.
    """
    if max(height, width) / min(height, width) > 200:
        raise InputError(f"{width}x{height} pixels: the longer side may be at most 200 times the shorter")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    pixels = round(frames / temporal) * temporal * new_height * new_width
    if pixels > max_pixels:
        beta = math.sqrt(frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif pixels < min_pixels:
        beta = math.sqrt(min_pixels / (frames * height * width))
        new_height, new_width = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
    return new_height, new_width


# ----------------------------------------------------------------------------------------------------------- processing

# The released models' preprocessor files (transformers' class defaults differ), for directories without them.
DEFAULTS = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "rescale_factor": 1 / 255, "min_frames": 4}
DEFAULTS |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
DEFAULT_PIXELS = {"image": (65536, 16777216), "video": (4096, 25165824)}
PIXEL_KEYS = ("min_pixels", "max_pixels", "shortest_edge", "longest_edge")
JSON_BYTES, TOKENIZER_BYTES = 1 << 20, 64 << 20  # most of a configuration and of a tokenizer; Qwen3-VL's has 11 MB
# Sizes that ask for more than a few times the memory of the released models' largest pictures are mistakes, or worse.
LIMITS = {"image_mean": (-1e6, 1e6), "image_std": (1e-6, 1e6), "min_pixels": (0, 2**25), "shortest_edge": (0, 2**25)}
LIMITS |= {"patch_size": (0, 65), "temporal_patch_size": (0, 9), "merge_size": (0, 9)}
EXAMPLES = DEFAULTS | dict.fromkeys(PIXEL_KEYS, 65536) | {"vocab_size": 151936}  # what settings must look like
CONTROL_TOKENS = {
    "im_start_token_id": "<|im_start|>",
    "im_end_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


@functools.cache
def _pair_tables(rescale_factor: float, means: tuple, stds: tuple) -> np.ndarray:
    """[3, 65536] float64, each two float32 side by side: what the two bytes of a uint16 become in each channel, with
    transformers' roundings: rescaled in float64, normalised in float32."""
    levels = (np.arange(256, dtype=np.float64) * rescale_factor).astype(np.float32)
    tables = (levels - np.array(means, np.float32)[:, None]) / np.array(stds, np.float32)[:, None]  # [3, 256]
    both = np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2)  # in the machine's own order of bytes
    return np.ascontiguousarray(tables[:, both]).view(np.float64)[..., 0]


class Processor:
    """Tokenizer, chat template, pictures, videos and positions of one model, from its Hugging Face directory.

    Pixel limits come from preprocessor_config.json, video_preprocessor_config.json or transformers 5's
    processor_config.json where present, else they are the released models'; arguments override. `image_*_pixels`
    limit each picture's height * width, `video_*_pixels` each video's frames * height * width. A video is sampled at
    `video_fps`, `video_maxlen` frames at most. Raises InputError if a file is missing, damaged or contradicts another.
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
    ):
        path = Path(hf_dir, "tokenizer.json")
        if not path.exists():
            raise InputError(f"{path} does not exist: the model's tokenizer is needed")
        _check_size(path, TOKENIZER_BYTES)
        with _tokenizing(f"{path} cannot be read as a tokenizer"):
            self.tokenizer = Tokenizer.from_file(str(path))
        kinds = [type(part).__name__ for part in (self.tokenizer.normalizer, self.tokenizer.decoder)]
        if kinds[0] not in ("NFC", "NoneType") or kinds[1] not in ("ByteLevel", "NoneType"):  # others can grow a text
            raise InputError(f"{path} has a normalizer {kinds[0]} and a decoder {kinds[1]}, Qwen3-VL's are NFC and "
                             "ByteLevel")
        split = self.tokenizer.pre_tokenizer
        split = {"type": "None"} if split is None else json.loads(split.__getstate__())
        splits = [part["type"] for part in split.get("pretokenizers", [split])]
        if set(splits) - {"Split", "ByteLevel", "None"} or splits.count("ByteLevel") > 1:  # each can double the bytes
            raise InputError(f"{path} has the pre_tokenizers {shorten(splits)}, Qwen3-VL's are Split and ByteLevel")
        if dropout := getattr(self.tokenizer.model, "dropout", None):
            raise InputError(f"{path} has a dropout of {dropout}, which makes a text's tokens random: set it to null")
        self.tokenizer.encode_special_tokens = True  # those in a text are split into ordinary tokens
        self.tokenizer.no_padding()  # a file may ask for either: what is cut or filled up is told by this file alone
        self.tokenizer.no_truncation()

        config_path = Path(hf_dir, "config.json")
        config = _read_json(config_path)
        text, vision = _section(config, "text_config", config_path), _section(config, "vision_config", config_path)
        for name, token in CONTROL_TOKENS.items():
            token_id = self.tokenizer.token_to_id(token)
            if token_id is None:
                raise InputError(f"{path} has no token {token}: this is not a Qwen3-VL tokenizer")
            if config.get(name, token_id) != token_id:
                raise InputError(f"{path} gives {token} the id {token_id}, but config.json's {name} is "
                                 f"{shorten(config[name])}")
            setattr(self, name, token_id)
        token, token_id = max(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        if token_id >= text.get("vocab_size", math.inf):
            raise InputError(f"{path} has {token} as id {token_id}, config.json's vocab_size is {text['vocab_size']}")

        shared = Path(hf_dir, "processor_config.json")
        both = _read_json(shared)
        image = _section(both, "image_processor", shared) | _read_json(Path(hf_dir, "preprocessor_config.json"))
        video = _section(both, "video_processor", shared) | _read_json(Path(hf_dir, "video_preprocessor_config.json"))
        self.image, self.video = DEFAULTS | image, DEFAULTS | video
        self.image_pixels = _pixel_limits("image", image, image_min_pixels, image_max_pixels)
        self.video_pixels = _pixel_limits("video", video, video_min_pixels, video_max_pixels)
        self.patch, self.merge = self.image["patch_size"], self.image["merge_size"]
        self.temporal = self.image["temporal_patch_size"]
        for name in ("patch_size", "temporal_patch_size", "merge_size"):
            stated = vision.get(name.replace("merge", "spatial_merge"), DEFAULTS[name])
            if not self.image[name] == self.video[name] == stated:
                found = f"{self.image[name]} for pictures, {self.video[name]} for videos, {shorten(stated)}"
                raise InputError(f"{hf_dir}: the preprocessor files and config.json disagree on {name}: {found}")
        if self.patch % 2:
            raise InputError(f"{hf_dir}: patch_size {self.patch} is odd: pixels are taken in pairs, it must be even")
        if not (0.001 <= video_fps <= 1e6 and video_maxlen >= self.temporal):
            raise InputError(f"video_fps {video_fps} must be between 0.001 and 1e6, and video_maxlen {video_maxlen} at "
                             f"least {self.temporal}")
        self.video_fps, self.video_maxlen = video_fps, video_maxlen

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True  # not part of a tokenizer's own pickle

    def decode(self, ids: list[int] | Tensor) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _encode_text(self, text: str) -> list[int]:
        with _tokenizing("a text cannot be tokenized"):
            try:
                return self.tokenizer.encode(text, add_special_tokens=False).ids
            except TypeError as error:
                raise InputError("a text holds half of a surrogate pair (\\ud800 to \\udfff)") from error

    @functools.cached_property
    def _newline(self) -> list[int]:
        return self._encode_text("\n")

    @functools.cached_property
    def _answer_begins(self) -> list[int]:
        return self._encode_text("assistant\n")

    def process_image(self, image: Image.Image, decode: bool = True) -> tuple[np.ndarray | None, tuple[int, int, int]]:
        """Patches [P, 1536] float32 and grid (1, rows, columns) of an RGB picture, bit for bit transformers'.

        Without `decode` the patches are None, and of the picture only its size matters.
        """
        height, width = smart_resize(image.height, image.width, 1, 1, self.patch * self.merge, *self.image_pixels)
        grid = 1, height // self.patch, width // self.patch
        return self._patchify([image], 1, grid, self.image) if decode else None, grid

    def process_video(
        self, video: Video, decode: bool = True
    ) -> tuple[np.ndarray | None, tuple[int, int, int], list[float]]:
        """Patches, grid (frame pairs, rows, columns) and each pair's time in seconds of a video (see `open_video`).

        Sampling, sizes and times are transformers'. It resizes frames with torchvision only, Pillow's differ from those
        by up to 2 of 255 levels, 0.02 on average at most (`make test-slow` measures); frames not resized are equal.
        Without `decode` no frame is decoded and the patches are None.
        """
        if video.num_frames < 2:
            raise InputError(f"a video needs two frames, this has {video.num_frames}")
        numbers = self._choose_frames(video)
        images = video.read(numbers, decode)  # one by one: as many of a film's frames would fill the memory
        first = next(images)
        width, height = first.size
        factor = self.patch * self.merge
        scale = max(1.0, factor / height, factor / width)  # as transformers 5; 4.57 refuses sides below `factor`
        height, width = int(height * scale), int(width * scale)
        height, width = smart_resize(height, width, len(numbers), self.temporal, factor, *self.video_pixels)
        grid = -(-len(numbers) // self.temporal), height // self.patch, width // self.patch

        def of_one_size() -> Iterator[Image.Image]:
            yield first
            for index, image in zip(numbers[1:], images, strict=True):
                if image.size != first.size and (decode or image.size != first.size[::-1]):  # headers: before rotation
                    raise InputError(f"frame {index} has {image.size} pixels, the first {first.size}: make them equal")
                yield image

        patches = self._patchify(of_one_size(), len(numbers), grid, self.video) if decode else None
        if not decode:
            list(of_one_size())
        numbers += numbers[-1:] * (-len(numbers) % self.temporal)
        times = [i / video.fps for i in numbers] if video.times is None else video.times[numbers].tolist()
        pairs = zip(times[:: self.temporal], times[self.temporal - 1 :: self.temporal], strict=True)
        return patches, grid, [(first + last) / 2 for first, last in pairs]

    def _choose_frames(self, video: Video) -> list[int]:
        """Numbers of the frames to take, evenly spaced: by number as transformers, or in time where the rate varies.

        A frame that stays for long may be the nearest to several moments; it is taken once.
        """
        count = max(int(video.num_frames / video.fps * self.video_fps), self.video["min_frames"])
        count = min(count, self.video_maxlen, video.num_frames)
        if video.times is None:
            return np.linspace(0, video.num_frames - 1, count).round().astype(int).tolist()
        starts = video.times[:-1]
        moments = np.linspace(0, starts[-1], count)
        after = np.searchsorted(starts, moments).clip(min=1)
        return np.unique(np.where(moments - starts[after - 1] <= starts[after] - moments, after - 1, after)).tolist()

    def _patchify(
        self, images: Iterable[Image.Image], count: int, grid: tuple[int, int, int], settings: dict
    ) -> np.ndarray:
        """`count` images, resized to the grid, cut into patches [t * h * w, channel * temporal * patch * patch] whose
        order is that of merge blocks.

        The last image is repeated to fill a patch. Values are looked up, two neighbours at once (see `_pair_tables`);
        one row of blocks at a time, as whole pictures do not fit in a processor's cache.
        """
        (t, h, w), m, p = grid, self.merge, self.patch
        tables = _pair_tables(settings["rescale_factor"], tuple(settings["image_mean"]), tuple(settings["image_std"]))
        patches = np.empty((t, h // m, w // m, m, m, 3, self.temporal, p, p), np.float32)
        for i, image in enumerate(images):
            if settings is self.video:  # as torchvision: the width first. Pillow's order depends on the sizes
                image = image.resize((w * p, image.height), Image.Resampling.BICUBIC)
            image = image.resize((w * p, h * p), Image.Resampling.BICUBIC)
            first = i % self.temporal
            to = patches[i // self.temporal, ..., first : None if i == count - 1 else first + 1, :, :]
            for channel, plane in enumerate(image.split()):
                lines = np.asarray(plane).view(f"V{p}")  # a patch's line as one element
                for row, blocks in enumerate(lines.reshape(h // m, m, p, w // m, m).transpose(0, 3, 1, 4, 2)):
                    pairs = np.ascontiguousarray(blocks).view(np.uint16)
                    values = np.take(tables[channel], pairs).view(np.float32)
                    to[row, :, :, :, channel] = values.reshape(w // m, m, m, 1, p, p)
        return patches.reshape(t * h * w, -1)

    def encode(
        self, row: dict, media_dir: str | Path, source: str = "", options: EncodeOptions = ENCODE_DEFAULTS
    ) -> Sample:
        """Encode a row of either format as token ids, labels, positions and patches.

        Supervised tokens are each answer, its <|im_end|> and the newline after it; with `mask_history` only those of
        the last answer; with `train_on_prompt` all tokens except media tokens, <|vision_start|> and <|vision_end|>.
        A sample longer than `seq_length` loses whole exchanges (question and answer) from its end; if the first
        exchange alone is too long, the end of its answer is cut. With `for_generation` a last answer is dropped and
        the sample ends with "<|im_start|>assistant\\n". Raises InputError, whose message begins with `source`.
        """
        chunks, truncated = self._encode_row(row, media_dir, source, options, decode=True)
        ids = np.array([token for chunk in chunks for token in chunk.ids], np.int64)
        starts = np.cumsum([0] + [len(chunk.ids) for chunk in chunks]).tolist()
        runs = [(start + at, h, w) for chunk, start in zip(chunks, starts, strict=False) for at, h, w in chunk.runs]
        media = np.isin(ids, (self.image_token_id, self.video_token_id))
        supervised = np.zeros(len(ids), bool)
        if options.train_on_prompt and not options.for_generation:
            supervised = ~media & ~np.isin(ids, (self.vision_start_token_id, self.vision_end_token_id))
        elif not options.for_generation:
            answers = [i for i, chunk in enumerate(chunks) if chunk.answer is not None]
            for i in answers[-1:] if options.mask_history else answers:
                supervised[starts[i] + chunks[i].answer : starts[i + 1]] = True
        labels = np.full(len(ids), IGNORE, np.int64)
        labels[:-1] = np.where(supervised[1:], ids[1:], IGNORE)
        pixels = [patches for chunk in chunks for patches in chunk.pixels]
        pixels = pixels or [np.empty((0, 3 * self.temporal * self.patch**2), np.float32)]
        return Sample(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(mrope_positions(len(ids), runs)),
            pixel_values=torch.from_numpy(pixels[0] if len(pixels) == 1 else np.concatenate(pixels)),
            grid_thw=torch.tensor([grid for chunk in chunks for grid in chunk.grids], dtype=torch.int64).view(-1, 3),
            visual_index=torch.from_numpy(np.flatnonzero(media)),
            source=source,
            truncated=truncated,
        )

    def count_tokens(
        self, row: dict, media_dir: str | Path, source: str = "", options: EncodeOptions = ENCODE_DEFAULTS
    ) -> int:
        """How many tokens `encode` makes of a row, given the same options, without decoding its media.

        Of pictures and frames only headers are read, of video files only packets; an animation's times are known after
        decoding it only. Raises the InputErrors of `encode` that can be seen so.
        """
        chunks, _ = self._encode_row(row, media_dir, source, options, decode=False)
        return sum(len(chunk.ids) for chunk in chunks)

    def _encode_row(
        self, row: dict, media_dir: str | Path, source: str, options: EncodeOptions, decode: bool
    ) -> tuple[list[EncodedTurn], bool]:
        """The turns that fit in `seq_length`, and whether that is not all. Without `decode` they lack the pixels.
        Media of turns beyond the length are not read."""
        try:
            for_generation = options.for_generation
            limit = options.seq_length or sys.maxsize
            chunks, length = [], 0
            for turn in parse_row(row, for_generation):
                chunks.append(self._encode_turn(turn, media_dir, options.confine_paths, decode, limit - length))
                length += len(chunks[-1].ids)
                if length > limit and turn.role == "assistant" and not for_generation:
                    break
            if for_generation:
                chunks.append(EncodedTurn([self.im_start_token_id, *self._answer_begins]))
                length += len(chunks[-1].ids)
            if length <= limit:
                return chunks, False
            if sum(chunk.answer is not None for chunk in chunks) > 1 and not for_generation:
                return chunks[:-2], True  # without the last exchange it fitted
            answer = chunks[-1].answer or 0
            prompt = length - len(chunks[-1].ids) + answer
            if for_generation or prompt >= limit:
                media = sum(h * w for chunk in chunks for _, h, w in chunk.runs)
                raise InputError(
                    f"{length} tokens do not fit in a sequence length of {limit}: {prompt} of them, {media} of "
                    "pictures or videos, come before the first answer; raise --seq-length, or lower --image-max-pixels"
                )
            del chunks[-1].ids[limit - length :]
            return chunks, True
        except InputError as error:
            raise InputError(f"{source}: {one_line(error)}" if source else one_line(error)) from error

    def _encode_turn(self, turn: Turn, media_dir: str | Path, confine: bool, decode: bool, space: int) -> EncodedTurn:
        """<|im_start|>role\\n...<|im_end|>\\n, as chat_template.jinja renders a message.

        Text between control tokens is tokenized in one piece, as merges may cross the newline after the role. (A token
        that joins it with a newline at an answer's start counts as prompt: no prompt ends with half of it, so it can
        never be predicted.) A picture is one run of media tokens, a video one for each pair of frames, after its time.
        """
        chunk = EncodedTurn([self.im_start_token_id])
        text = f"{turn.role}\n"
        for part in turn.parts:
            if isinstance(part, str):
                text += part
                continue
            decode = decode and len(chunk.ids) <= space  # a question that does not fit is left out, or an error
            try:
                if part.kind == "image":
                    path = resolve_path(part.spec, media_dir, confine)
                    pixels, grid = self.process_image(load_image(path, decode), decode)
                    captions, pad = [""], self.image_token_id
                else:
                    video = open_video(part.spec, media_dir, confine, self.video_fps)
                    pixels, grid, times = self.process_video(video, decode)
                    captions, pad = [f"<{time:.1f} seconds>" for time in times], self.video_token_id
            except InputError as error:
                raise InputError(f"{part.key}: {error}") from error
            chunk.pixels.append(pixels)
            chunk.grids.append(grid)
            rows, columns = grid[1] // self.merge, grid[2] // self.merge
            for caption in captions:
                chunk.ids += [*self._encode_text(text + caption), self.vision_start_token_id]
                chunk.runs.append((len(chunk.ids), rows, columns))
                chunk.ids += [pad] * (rows * columns) + [self.vision_end_token_id]
                text = ""
        chunk.ids += [*self._encode_text(text), self.im_end_token_id, *self._newline]
        if turn.role == "assistant":
            chunk.answer = 1 + len(self._answer_begins)
        return chunk


@dataclass
class EncodedTurn:
    """One turn, encoded."""

    ids: list[int]
    answer: int | None = None  # where the answer's tokens begin, in an assistant's turn
    runs: list[tuple[int, int, int]] = field(default_factory=list)  # start, rows, columns of each picture or frame pair
    pixels: list[np.ndarray] = field(default_factory=list)
    grids: list[tuple[int, int, int]] = field(default_factory=list)


def mrope_positions(length: int, runs: list[tuple[int, int, int]]) -> np.ndarray:
    """Positions [3, length] (temporal, height, width) of text with runs (start, rows, columns) of media tokens.

    A text token adds one on all axes; a run that begins at position p holds (p, p + row, p + column), and what follows
    it goes on at p + max(rows, columns).
    """
    positions = np.empty((3, length), np.int64)
    done = position = 0
    for start, rows, columns in runs:
        positions[:, done:start] = np.arange(position, position + start - done)
        position += start - done
        done = start + rows * columns
        run = np.full((3, rows, columns), position)
        run[1] += np.arange(rows)[:, None]
        run[2] += np.arange(columns)
        positions[:, start:done] = run.reshape(3, -1)
        position += max(rows, columns)
    positions[:, done:] = np.arange(position, position + length - done)
    return positions


@contextlib.contextmanager
def _tokenizing(what: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except BaseException as error:  # tokenizers raises plain Exception, and what it did not expect as no Exception
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"{what}: {one_line(error)[:300]}") from error
        raise


def _read_json(path: Path) -> dict:
    """The object in a configuration file; {} if there is no such file."""
    if not path.exists():
        return {}
    _check_size(path, JSON_BYTES)
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {one_line(error)}") from error
    return _section({str(path): value}, str(path))


def _check_size(path: Path, most: int) -> None:
    """Raises InputError for what is no regular file (reading a pipe never ends) or larger than anything published."""
    if not path.is_file():
        raise InputError(f"{path} is not a regular file")
    if (size := path.stat().st_size) > most:
        raise InputError(f"{path} has {size} bytes, {most} at most are read")


def _section(values: dict, name: str, file: Path | None = None) -> dict:
    """The object `name` of a file's values, its settings checked against EXAMPLES; {} if it is not there."""
    section, where = values.get(name, {}), f"{file}: {name}" if file else name
    if not isinstance(section, dict):
        raise InputError(f"{where} must hold an object, this is {_type(section)}")
    if "size" in section:
        _section(section, "size", where)
    for key in [key for key in EXAMPLES if key in section and not (key in PIXEL_KEYS and section[key] is None)]:
        value, example = section[key], EXAMPLES[key]
        numbers, examples = (x if isinstance(x, list) and isinstance(example, list) else [x] for x in (value, example))
        low, high = LIMITS.get(key, (0, 1e8))
        if [type(x) in (int, type(examples[0])) and low < x < high for x in numbers] != [True] * len(examples):
            found = shorten(value) if isinstance(value, list | dict) else json.dumps(value)[:100]
            raise InputError(f"{where}: {key} is {found}: it must be positive, such as {json.dumps(example)}, "
                             f"and below {high:g}")
    return section


def _pixel_limits(kind: str, settings: dict, minimum: int | None, maximum: int | None) -> tuple[int, int]:
    """The limits given, else the preprocessor file's (whose min_pixels comes before its size), else the defaults.

    A limit given alone moves the other if it must: a maximum below the file's minimum is both.
    """
    size, defaults = settings.get("size", {}), DEFAULT_PIXELS[kind]
    low = settings.get("min_pixels") or size.get("shortest_edge") or defaults[0]
    high = settings.get("max_pixels") or size.get("longest_edge") or defaults[1]
    low = minimum if minimum is not None else min(low, maximum or low)
    high = maximum if maximum is not None else max(high, minimum or high)
    if not 0 <= low <= high or high < 1:
        raise InputError(f"{kind}_min_pixels {low} must not be above {kind}_max_pixels {high}")
    return low, high


# -------------------------------------------------------------------------------------------------------- files of rows


class RowFile:
    """A file of rows. To add a format, write a subclass and give its suffix in `ROW_FORMATS`.

    A row is found by a half-open range [start, end) of integers in a unit that the format chooses, such as bytes or row
    numbers. The ranges of a file increase and do not overlap. `read` runs in forked worker processes, so that it
    must not use a file handle that was opened before the fork. All methods may raise OSError.
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
    window, at, at_end = "", 0, False  # window[0] is byte `offset` of the file; everything before `at` is done
    while True:
        match = separator.match(window, at)
        mark, start = match[1], match.end()
        is_last = mark[-1:] == "]"
        problem, position = "", start
        if not mark or mark[0] not in expected:
            problem, position = f"expected {' or '.join(expected)}", match.start(1)
        elif not is_last:
            try:
                position = parse(window, start)[1]
            except (ValueError, RecursionError) as error:
                problem, position = getattr(error, "msg", one_line(error)), getattr(error, "pos", start)
        # Where the window ends, an element looks damaged or ends too early. A cut string is an error at its start.
        if not at_end and (position > len(window) - 16 or problem.startswith("Unterminated")):
            chunk = stream.read(max(1 << 20, len(window) - at))  # doubles the window while an element exceeds it
            offset, window, at = offset + at, window[at:] + chunk.decode("latin-1"), 0
            at_end = not chunk
            continue
        if is_last and not problem:
            if start == len(window):
                return
            problem = "extra data after the array"
        if problem:
            raise InputError(f"{path} is not a JSON array: {problem} (byte {offset + position})")
        yield offset + start, offset + position
        at, expected = position, ",]"


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
    buffer: int | None = None  # number of rows in a block of a stream

    def __init__(self, paths: list[str], dataset_dir: str | None = None, max_samples: int | None = None):
        if dataset_dir is not None and not os.path.isdir(dataset_dir):
            raise InputError(f"{dataset_dir} is not a folder: --dataset-dir is the folder that media paths start from")
        self.paths, self.max_samples = [str(path) for path in paths], max_samples
        if "" in self.paths:
            raise InputError("the name of a dataset is empty: separate file names by single commas")
        self.media_dirs = [Path(dataset_dir or Path(path).parent) for path in self.paths]
        self.files = [ROW_FORMATS.get(Path(path).suffix, JsonRows)(path) for path in self.paths]
        for path, file in zip(self.paths, self.files, strict=True):
            try:
                if next(file.scan(), None) is None:
                    raise InputError(f"{path} holds no rows: a dataset is a JSON array of rows or JSON lines")
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

        `state` is {} at the start. Each of the blocks that `_blocks` yields is shuffled in an order that depends on
        `seed` and the epoch; `seed` None keeps the files' order. Raises InputError.
        """
        if state:
            self._check_position(state)
        layout = {"sizes": self.sizes, "shuffle_buffer": self.buffer}
        consumed, epoch, done = (state.get(name, 0) for name in ("consumed", "epoch", "done"))
        first_block = state.get("block")
        while True:
            for block, size, span_at in self._blocks(first_block):
                order = range(size)
                if seed is not None:
                    order = np.random.default_rng([seed, epoch, *block]).permutation(size)
                while done < size:
                    span = span_at(int(order[done]))
                    done, consumed = done + 1, consumed + 1
                    yield span, {"consumed": consumed, "epoch": epoch, "block": block, "done": done} | layout
                done = 0
            first_block, epoch, done = None, epoch + 1, 0

    def _check_position(self, state: dict) -> None:
        """Compare a position with these datasets. Raises InputError if only one of them was streamed."""
        was_streamed = state["shuffle_buffer"] is not None
        if was_streamed != (self.buffer is not None):
            raise InputError(
                f"the checkpoint's data was read with{'' if was_streamed else 'out'} --streaming: "
                f"{'give' if was_streamed else 'omit'} --streaming, or give --finetune to restart the data"
            )
        if state["sizes"] != self.sizes:
            logger.warning(
                "the datasets have sizes %s, but had %s when saved: the order is new, rows may be lost or repeated",
                self.sizes, state["sizes"],
            )
        if state["shuffle_buffer"] != self.buffer:  # other blocks would lose rows
            self.buffer = state["shuffle_buffer"]
            logger.warning("the stream keeps the shuffle buffer of %d rows that it was saved with", self.buffer)


class RowDataset(RowSource):
    """Rows of known number, read from disk on demand. Only the range of each row is kept in memory, in 16 bytes.

    `cache_dir` keeps the ranges for the next start. Its files may be deleted at any time.
    """

    def __init__(
        self, paths: list[str], dataset_dir: str | None = None, cache_dir: str | None = None,
        max_samples: int | None = None,
    ):
        super().__init__(paths, dataset_dir, max_samples)
        self.ranges = [_cached_index(file, cache_dir)[:max_samples] for file in self.files]  # [rows, 2] each
        self.sizes = [len(ranges) for ranges in self.ranges]
        self.ends = np.cumsum(self.sizes)

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
        return len(self)

    def file_rows(self, file: int) -> float:
        """Return the number of rows of a file."""
        return self.sizes[file]

    def _blocks(self, first: list[int] | None) -> Iterator[tuple[list[int], int, Callable[[int], Span]]]:
        """Yield one block that holds the whole epoch (see `RowStream._blocks`)."""
        yield [], len(self), self.span


class RowStream(RowSource):
    """Rows of unknown number, found by reading the files once an epoch.

    Each block of `buffer` successive rows is shuffled on its own. A position is therefore the start of a block and a
    number below `buffer`, and all ranks find the same order without communication.
    """

    def __init__(
        self, paths: list[str], dataset_dir: str | None = None, max_samples: int | None = None, buffer: int = 1000
    ):
        super().__init__(paths, dataset_dir, max_samples)
        self.buffer = buffer
        self.sizes = [file.size() for file in self.files]
        self._found = [(1, 1)] * len(paths)  # for each file: the number of rows found so far, and the end of the last

    def count(self) -> int:
        """Return the number of rows in an epoch. This reads every file."""
        return sum(1 for _ in self._spans(0, 0, 0))

    def file_rows(self, file: int) -> float:
        """Return an estimate of a file's number of rows, from the rows found so far."""
        rows, end = self._found[file]
        return rows * self.sizes[file] / end

    def _blocks(self, first: list[int] | None) -> Iterator[tuple[list[int], int, Callable[[int], Span]]]:
        """Yield the blocks of the rest of an epoch: (where it starts, number of rows, function of a row's location).

        A block starts at [file number, row number, position in the file]; `first` is where the first one starts.
        """
        start = first or [0, 0, 0]
        spans = self._spans(*start)
        while block := list(itertools.islice(spans, self.buffer)):
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
    """Return the ranges [rows, 2] of a file's rows, from `cache_dir` unless the file has changed since."""
    if cache_dir is None:
        return _index(file)
    status = os.stat(file.path)
    identity = f"{os.path.abspath(file.path)} {status.st_size} {status.st_mtime_ns}"
    cached = Path(cache_dir, f"rows-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npy")
    if cached.exists():
        try:
            return np.load(cached)
        except (OSError, EOFError, ValueError) as error:
            logger.warning("%s is damaged and is built again: %s", cached, one_line(error))
    ranges = _index(file)
    temporary = cached.with_suffix(f".{uuid.uuid4().hex}")  # other processes may write the same index
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            np.save(stream, ranges)
        os.replace(temporary, cached)
    except OSError as error:  # such as a full disk, which only makes the next start slower
        logger.warning("%s cannot be written: %s", cached, error.strerror)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return ranges


def _index(file: RowFile) -> np.ndarray:
    """Return the ranges [rows, 2] of a file's rows."""
    return np.fromiter(itertools.chain.from_iterable(file.scan()), np.int64).reshape(-1, 2)


# ----------------------------------------------------------------------------------------------------------- the stream

PACKING_WINDOW = 128  # samples


@dataclass
class Loader:
    """An endless stream of micro-batches, the same for any number of workers and exact when resumed.

    The main process decides the order: it iterates `dataset.stream`, assigns rows to data-parallel ranks, and sends the
    rows' locations to stateless workers. Each Batch carries the position after it, `resume_state`.

    The stream is cut into micro-batches of `micro_batch_size` rows, which go to the ranks in turn. Global batch k
    starts at row k * global_batch_size in every layout. With `packing`, single rows go to the ranks in turn, and a
    micro-batch has `micro_batch_size` packed rows of up to `seq_length` tokens each (see `_packed_rows`).

    With `on_bad_sample` "error", the main process raises a bad row's InputError. With "skip", the row is left out and
    logged once; `check_bad_row_rate` raises if there are too many.
    """

    dataset: RowDataset | RowStream
    processor: Processor
    _: KW_ONLY
    micro_batch_size: int
    global_batch_size: int
    dp_rank: int
    dp_size: int
    seed: int
    shuffle: bool
    num_workers: int
    on_bad_sample: str  # "error" or "skip"
    options: EncodeOptions
    packing: bool = False
    pin_memory: bool = False  # for copies to an accelerator
    resume_state: dict | list[dict] | None = None  # one rank's position, or all ranks' if their number may differ
    num_samples: int | None = None  # ends the stream after so many rows; the last batches of some ranks may be empty

    def __post_init__(self):
        self._rows_per_step = self.micro_batch_size * self.dp_size  # of one micro-batch on every rank
        if self.global_batch_size % self._rows_per_step:
            raise InputError(
                f"a global batch of {self.global_batch_size} cannot be divided into micro-batches of "
                f"{self.micro_batch_size} on {self.dp_size} data-parallel ranks"
            )
        self._order_seed = self.seed if self.shuffle else None
        self._rows_read, self._rows_bad = np.zeros((2, len(self.dataset.paths)), np.int64)
        self._first_epoch = 0

    def __iter__(self) -> Iterator[Batch]:
        states = self.resume_state if isinstance(self.resume_state, list) else [self.resume_state or {}]
        if "rank_layout" in states[0] and not self.packing:
            raise InputError("the checkpoint's data was packed: give --packing, or --finetune to restart the data")
        self._first_epoch = states[0].get("epoch", 0)
        items = self._packed(states) if self.packing else self._micro_batches(states[0])
        logged = set()
        for batch, failures in self._in_workers(self._load, items, self.num_workers, self.pin_memory):
            for message in failures:
                if self.on_bad_sample == "error":
                    raise InputError(message)
                if message not in logged:
                    logger.warning("skipped: %s", message)
                    logged.add(message)
            yield batch

    def check_bad_row_rate(self, rows_read: list[int], rows_bad: list[int], epoch: int) -> None:
        """Raise InputError if more than a tenth of a dataset's rows are bad.

        `rows_read` and `rows_bad` are the rows of each file since the last call, summed over all ranks; `epoch` is the
        current one.
        """
        self._rows_read += rows_read
        self._rows_bad += rows_bad
        epochs = epoch - self._first_epoch + 1
        for file, (read, bad) in enumerate(zip(self._rows_read.tolist(), self._rows_bad.tolist(), strict=True)):
            rows = self.dataset.file_rows(file)
            if read >= min(10, rows) and bad > 0.1 * epochs * rows:
                raise InputError(
                    f"{self.dataset.paths[file]}: {bad} of {read} rows read are bad, more than a tenth of the "
                    "dataset; the log has the reasons"
                )

    def epoch_size(self) -> float:
        """Return the number of rows in an epoch. With `packing`, estimate the number of packed rows.

        The estimate divides the tokens of up to 1000 rows by `seq_length`, as if packed rows had no unused space. With
        samples much shorter than `seq_length`, it is too low by less than 2 %.
        """
        rows = self.dataset.count()
        if not self.packing:
            return rows
        measured = itertools.islice(self.dataset.stream({}, self._order_seed), min(rows, 1000))
        lengths = [self._measure(item)[2] for item in measured]
        return rows * sum(lengths) / len(lengths) / self.options.seq_length

    def _in_workers(self, function: Callable, items: Iterator, workers: int, pin_memory: bool = False) -> Iterator:
        """Return an iterator over `function(item)` of each item, in order, computed in worker processes."""
        if workers:  # forked workers crash when they destroy an earlier run's process groups, whose threads they lack
            gc.collect()
        return iter(DataLoader(
            _FunctionDataset(function), batch_size=None, sampler=items, num_workers=workers, pin_memory=pin_memory,
            worker_init_fn=leave_process_group,
            generator=torch.Generator(),  # the global one belongs to the training, whose random state is resumed
        ))

    def _load(self, item: tuple[list[Span], dict]) -> tuple[Batch, list[str]]:
        """Make a micro-batch of the rows at some locations. A worker runs this.

        The errors of bad rows are returned, not raised, because torch would hide them in a worker's traceback.
        """
        spans, state = item
        samples, failures = [], []
        rows_read, rows_bad = [0] * len(self.dataset.paths), [0] * len(self.dataset.paths)
        for span in spans:
            rows_read[span.file] += 1
            try:
                row, source, media_dir = self.dataset.read(span)
                samples.append(self.processor.encode(row, media_dir=media_dir, source=source, options=self.options))
            except InputError as error:
                rows_bad[span.file] += 1
                failures.append(str(error))
        return collate(samples, state, rows_read, rows_bad), failures

    def _micro_batches(self, state: dict) -> Iterator[tuple[list[Span], dict]]:
        """Yield this rank's rows of each micro-batch, and the position after the rows of all ranks."""
        rows = itertools.islice(self.dataset.stream(state, self._order_seed), self.num_samples)
        first = self.dp_rank * self.micro_batch_size
        while step := list(itertools.islice(rows, self._rows_per_step)):
            yield [span for span, _ in step[first : first + self.micro_batch_size]], step[-1][1]

    def _packed(self, states: list[dict]) -> Iterator[tuple[list[Span], dict]]:
        """Yield the rows of each micro-batch of packed rows, and the position after them."""
        packed_rows = self._packed_rows(states)
        while step := list(itertools.islice(packed_rows, self.micro_batch_size)):
            yield [span for spans, _ in step for span in spans], step[-1][1]

    def _packed_rows(self, states: list[dict]) -> Iterator[tuple[list[Span], dict]]:
        """Yield the samples of each packed row (see `pack_row`), and the position after them.

        A packed row never mixes two epochs. A worker measures the samples' lengths ahead, if there are workers. The
        position includes the samples in the buffer.
        """
        undelivered, state = self._undelivered_rows(states)
        rows_of_this_rank = (
            (span, next_state) for span, next_state in self.dataset.stream(state, self._order_seed)
            if (next_state["consumed"] - 1) % self.dp_size == self.dp_rank
        )
        rows = itertools.chain(((span, state) for span in undelivered), rows_of_this_rank)
        buffer: list[tuple[Span, int]] = []  # samples that are not packed yet, and their lengths
        seq_length = self.options.seq_length
        measured = self._in_workers(self._measure, rows, min(1, self.num_workers))
        for count, (span, next_state, length) in enumerate(measured):
            # Everything that was buffered at the checkpoint must be back in the buffer before packing starts. Only then
            # does a resumed run pack exactly as the interrupted one would have.
            is_new = count >= len(undelivered)
            while is_new and buffer and (next_state["epoch"] != state["epoch"] or ready_to_pack(buffer, seq_length)):
                row, buffer = pack_row(buffer, seq_length)
                position = {"rank_layout": [self.dp_rank, self.dp_size], "buffer": [list(span) for span, _ in buffer]}
                yield [span for span, _ in row], state | position
            buffer.append((span, length))
            state = next_state

    def _measure(self, item: tuple[Span, dict]) -> tuple[Span, dict, int]:
        """Add the number of tokens to a row's location and position.

        A bad row counts as one token, so that it is still packed and reported. If it ends the run, it counts as a full
        row, so that it is reported soon.
        """
        span, state = item
        try:
            row, source, media_dir = self.dataset.read(span)
            length = self.processor.count_tokens(row, media_dir=media_dir, source=source, options=self.options)
        except InputError:
            length = self.options.seq_length if self.on_bad_sample == "error" else 1
        return span, state, length

    def _undelivered_rows(self, states: list[dict]) -> tuple[list[Span], dict]:
        """Return the rows of before the checkpoint that this rank still has to pack, and the position to continue from.

        Ranks pack at different speeds, so that each saves its own position. If the layout of ranks has changed, all
        ranks continue from the furthest position. The rows before it that no rank has packed are divided anew.
        """
        layout = [self.dp_rank, self.dp_size]
        own = [state for state in states if state.get("rank_layout", layout) == layout]
        if own:
            return [Span(*span) for span in own[0].get("buffer", [])], own[0]
        spans = [Span(*span) for state in states for span in state["buffer"]]
        consumed = {state["rank_layout"][0]: state["consumed"] for state in states}
        oldest, newest = (choose(states, key=lambda state: state["consumed"]) for choose in (min, max))
        stream = self.dataset.stream(oldest, self._order_seed)
        for span, state in itertools.islice(stream, newest["consumed"] - oldest["consumed"]):
            rank = (state["consumed"] - 1) % newest["rank_layout"][1]
            if state["consumed"] > consumed[rank]:
                spans.append(span)
        return spans[self.dp_rank :: self.dp_size], newest


def ready_to_pack(buffer: list[tuple[Span, int]], seq_length: int) -> bool:
    """Return whether enough samples are buffered to fill a row well.

    The conditions are a multiple of PACKING_WINDOW samples and tokens for two rows.
    """
    return len(buffer) % PACKING_WINDOW == 0 and sum(length for _, length in buffer) >= 2 * seq_length


def pack_row(buffer: list[tuple[Span, int]], seq_length: int) -> tuple[list, list]:
    """Choose samples for one packed row of `seq_length` tokens. Returns (chosen, remaining), in the buffer's order.

    The oldest sample comes first, then repeatedly the longest that still fits.
    """
    chosen = {0}
    remaining = seq_length - buffer[0][1]
    for i in sorted(range(1, len(buffer)), key=lambda i: -buffer[i][1]):
        if buffer[i][1] <= remaining:
            remaining -= buffer[i][1]
            chosen.add(i)
    return [buffer[i] for i in sorted(chosen)], [pair for i, pair in enumerate(buffer) if i not in chosen]


class _FunctionDataset:
    """Present a function as the dataset that DataLoader needs."""

    def __init__(self, function: Callable):
        self.function = function

    def __getitem__(self, item):
        return self.function(item)


if __name__ == "__main__":
    from tools.dataset_cli import run  # imports this file a second time, as `data`

    sys.exit(run(sys.argv[1:]))
