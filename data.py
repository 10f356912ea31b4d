"""Turn dataset rows into packed batches: JSON row -> Sample -> Batch.

From top to bottom: samples and batches, options and flags, row formats (`parse_row`), images and videos, tokens,
labels, positions and patches (`Processor`), files of rows (`RowDataset`, `RowStream`), and the endless, resumable
stream of micro-batches (`Loader`). The program converts and inspects datasets (tools/dataset_cli.py):

    python data.py llava --annotations llava_instruct_150k.json --image_dir COCO2017/train2017 --output rows.json
    python data.py check --dataset rows.json --init-from-hf-path DIR --report report.html

Token ids, positions and pixels equal those of transformers' Qwen3-VL processor with its Pillow image processor; video
prompts equal those of transformers 4.57. One difference is intended: only this file writes control tokens. An
"<|im_end|>" in a row's text becomes the ordinary tokens of its characters. Added tokens that are not special, such as
<think>, stay tokens. The only markup is `<image>` and `<video>` in user turns.

Shapes: T tokens, P patches, N images and videos, Nv media tokens, Ns supervised tokens.
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
from types import SimpleNamespace
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
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
    pixel_values: Tensor = _declare("patch")  # [P, 1536] float32
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


def encode_options(args: argparse.Namespace) -> EncodeOptions:
    """Return the options that the flags give. Raises UsageError if two flags exclude each other."""
    return EncodeOptions(
        seq_length=args.seq_length,
        train_on_prompt=args.train_on_prompt,
        mask_history=args.mask_history,
        confine_paths=args.confine_paths,
    )


# ---- row formats -------------------------------------------------------------------------------------------------

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
PLACEHOLDER = re.compile("(<image>|<video>)")
STILL_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".ppm")
IMAGE_SUFFIXES = (*STILL_SUFFIXES, ".gif", ".webp")


@dataclass
class Media:
    """An image or video of a row."""

    kind: str  # "image" or "video"
    key: str  # the key that names it, for error messages: "images[0]"
    spec: str | list | dict | None  # a path, a list of paths or {"path": ..., "fps": ...}; None for a placeholder


@dataclass
class Turn:
    """One message: its role, and its texts and media in order."""

    role: str
    parts: list[str | Media]


def parse_row(row: dict, for_generation: bool = False) -> list[Turn]:
    """Convert a row to turns: an optional system turn, then user and assistant turns alternately.

    The two formats are `{"messages": [{"role", "content"}], "images", "videos"}` and `{"conversations": [{"from",
    "value"}], "image", "video"}`. `<image>` and `<video>` are placeholders in user turns only, as in transformers'
    chat template. Content may also be a list of `{"type": "text" | "image" | "video", ...}`; placeholders in its texts
    are ordinary text. `for_generation` drops a final answer. Raises InputError.
    """
    if not isinstance(row, dict):
        raise InputError(f"a row must be an object with 'messages' or 'conversations', not {shorten(row)}")
    name = "messages" if "messages" in row else "conversations"
    role_key, text_key = ("role", "content") if name == "messages" else ("from", "value")
    if name not in row:
        keys = ", ".join(row) or "none"
        raise InputError(f"the row has neither 'messages' nor 'conversations'; its keys: {keys[:200]}")
    if not isinstance(row[name], list) or not row[name]:
        raise InputError(f"'{name}' must be a list of turns, not {shorten(row[name])}")

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
                f"{name}[{i}] has the role {role} where {expected} is expected: after an optional first system turn, "
                "user and assistant must alternate"
            )
        turns.append(Turn(role, _split_content(message[text_key], role, f"{name}[{i}].{text_key}")))

    if for_generation and turns[-1].role == "assistant":
        turns.pop()
    last, missing = ("user", "question") if for_generation else ("assistant", "answer")
    if turns[-1].role != last:
        raise InputError(f"'{name}' must end with a turn of the {last}: there is no {missing}")
    _fill_placeholders(turns, _list_media(row, "image"), _list_media(row, "video"))
    return turns


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
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append(part["text"])
        elif kind in ("image", "video") and role == "user":
            parts.append(Media(kind, f"{key}[{i}]", part.get(kind, part.get("path"))))
        else:
            raise InputError(f"{key}[{i}] must be of type 'text', or in a user's turn 'image' or 'video'")
    return parts


def _list_media(row: dict, kind: str) -> list[Media]:
    """Return the media under the row's keys `image` and `images`, or `video` and `videos`."""
    keys = [key for key in (kind, kind + "s") if row.get(key) not in (None, [])]
    if len(keys) > 1:
        raise InputError(f"the row has both '{keys[0]}' and '{keys[1]}': keep one")
    if not keys:
        return []
    key, value = keys[0], row[keys[0]]
    if not isinstance(value, list):
        return [Media(kind, key, value)]
    if key == "video" and all(isinstance(item, str) and item.lower().endswith(STILL_SUFFIXES) for item in value):
        return [Media(kind, key, value)]  # a list of frames is one video
    return [Media(kind, f"{key}[{i}]", item) for i, item in enumerate(value)]


def _fill_placeholders(turns: list[Turn], images: list[Media], videos: list[Media]) -> None:
    """Put the row's media into its placeholders, or before the first user text if the row has no placeholders."""
    slots = [part for turn in turns for part in turn.parts if isinstance(part, Media)]
    if not slots:
        first = next(turn for turn in turns if turn.role == "user")
        first.parts[:0] = images + videos
        return
    for kind, given in (("image", images), ("video", videos)):
        empty = [slot for slot in slots if slot.kind == kind and slot.spec is None]
        if len(empty) != len(given):
            raise InputError(
                f"the user's turns have {len(empty)} <{kind}> placeholders, but the row has {len(given)} {kind}s: "
                "give as many of one as of the other"
            )
        for slot, media in zip(empty, given, strict=True):
            slot.key, slot.spec = media.key, media.spec


# ---- images and videos -------------------------------------------------------------------------------------------

# A file's content may differ from its suffix. Without these lists Pillow would start Ghostscript for PostScript, and
# FFmpeg would open the addresses in a playlist, in other folders or on the network.
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
VIDEO_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": "asf,avi,flv,gif,matroska,webm,mov,mp4,m4a,3gp,3g2,"
                 "mj2,mpeg,mpegts,mpegvideo,mpegtsraw,mxf,ogg,wtv,h264,hevc,ivf,m4v,nut,yuv4mpegpipe,apng"}


def resolve_path(path: str, media_dir: str | Path, confine: bool) -> Path:
    """Return `path`, relative to `media_dir`.

    Raises InputError if the file does not exist, or if `confine` is set and it is outside `media_dir`.
    """
    if not isinstance(path, str) or not path or "\0" in path:
        raise InputError(f"a path is needed, not {shorten(path)}")
    if path.startswith(("http://", "https://", "data:")):
        raise InputError(f"{path[:80]} is not a file on disk: download it first")
    full = Path(media_dir, path)
    if confine and not Path(os.path.realpath(full)).is_relative_to(os.path.realpath(media_dir)):
        raise InputError(f"{path} is outside {media_dir}, which --confine-paths forbids")
    if not os.path.exists(full):
        raise InputError(f"{full} does not exist")
    return full


def load_image(path: Path, decode: bool = True) -> Image.Image:
    """Load an image in RGB, rotated as its EXIF data says, equal to transformers 5.23's. Raises InputError.

    An alpha channel is dropped, but a single transparent colour (of a palette or some PNG files) becomes white: that
    is what transformers' `load_image` and image processor do together. Without `decode` only the header is read, and
    only `size` is valid. It may be the size before rotation, which gives the same number of tokens.
    """
    with _decoding(path, "an image"), Image.open(path, formats=IMAGE_FORMATS) as image:
        if not decode:
            return image
        ImageOps.exif_transpose(image, in_place=True)
        image = image.convert("RGB")
        return image if image.info.get("transparency") is None else _on_white(image)


def _on_white(image: Image.Image) -> Image.Image:
    """Return the image in RGB with its transparent pixels on a white background."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


@contextlib.contextmanager
def _decoding(path: Path, kind: str) -> Iterator[None]:
    """Convert whatever a decoder raises for a damaged file to an InputError."""
    try:
        yield
    except InputError:
        raise
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
    # Decodes the frames with these rising numbers one at a time, as a full-size frame takes much memory.
    read: Callable[[list[int]], Iterator[Image.Image]]
    header: Callable[[int], Image.Image]  # returns a frame that is not decoded: only its `size` is valid


def open_video(spec: str | list | dict, media_dir: str | Path, confine: bool, default_fps: float) -> Video:
    """Open the video that a row names. Raises InputError.

    It is a list of images, a folder of images (sorted by the numbers in their names), an animated image, a video file,
    or `{"path": any of these, "fps": rate}`. A rate given there takes precedence over the file's. Images without a rate
    count as sampled at `default_fps`, as in the Qwen team's own tools.
    """
    path, fps = (spec.get("path"), spec.get("fps")) if isinstance(spec, dict) else (spec, None)
    if fps is not None and (type(fps) not in (int, float) or not 0.001 <= fps <= 1e6):
        raise InputError(f"'fps' must be a number of frames per second, 0.001 or more, not {shorten(fps)}")
    if isinstance(path, list):
        paths = [resolve_path(item, media_dir, confine) for item in path]
    else:
        full = resolve_path(path, media_dir, confine)
        if not full.is_dir():
            is_animation = full.suffix.lower() in (*IMAGE_SUFFIXES, ".apng")
            return _open_animation(full, fps) if is_animation else _open_video_file(full, fps)
        names = [name for name in os.listdir(full) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
        names.sort(key=lambda name: [int(s) if s.isdecimal() else s for s in re.split("([0-9]+)", name)])
        paths = [resolve_path(os.path.join(path, name), media_dir, confine) for name in names]
    return Video(
        num_frames=len(paths),
        fps=float(fps or default_fps),
        times=None,
        read=lambda numbers: (load_image(paths[i]) for i in numbers),
        header=lambda i: load_image(paths[i], decode=False),
    )


def _open_animation(path: Path, fps: float | None) -> Video:
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
    return Video(count, float(fps), times, read, header=lambda _: image)


MIN_COMPLETE = 0.9  # a file with a smaller share of its frames was cut off; headers and old codecs miscount a few
SEEK_FRAMES = 16  # decoding this many frames takes about as long as seeking


def _open_container(path: Path):
    """Open a video file with PyAV. Raises InputError if PyAV is not installed."""
    try:
        import av
    except ImportError as error:
        raise InputError(f"{path}: reading video files needs PyAV: pip install av") from error
    return av.open(f"file:{path}", options=VIDEO_OPTIONS)


def _open_video_file(path: Path, fps: float | None) -> Video:
    """Open a video file. Like transformers, ignore a rotation stored in it.

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

    return Video(count, float(fps), times, read, header=lambda _: header)


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
            yield frame.to_image()  # past the end, the last one: in old AVI files some packets hold no frame


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


@dataclass
class EncodedTurn:
    """One turn as tokens and patches."""

    ids: list[int]
    answer_start: int | None = None  # index of the answer's first token, in an assistant's turn
    visual_spans: list[tuple[int, int, int]] = field(default_factory=list)  # (start, rows, columns) of media tokens
    pixels: list[np.ndarray] = field(default_factory=list)  # patches of each image or video
    grids: list[tuple[int, int, int]] = field(default_factory=list)  # (frame pairs, rows, columns) of patches


class Processor:
    """Encode rows for one model: tokenizer, chat template, images, videos and positions.

    Settings come from the model's Hugging Face directory. Its pixel limits are those of preprocessor_config.json,
    video_preprocessor_config.json or transformers 5's processor_config.json, else the released models'; arguments
    override them. `image_*_pixels` limit an image's height * width, `video_*_pixels` a video's frames * height * width.
    A video is sampled at `video_fps` frames per second, up to `video_maxlen` frames. `end_token_ids` are the tokens
    that end an answer. Raises InputError if a file is missing, damaged or contradicts another.
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
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers has no exception classes of its own
            raise InputError(f"{path} cannot be read as a tokenizer: {one_line(error)}") from error
        self.tokenizer.encode_special_tokens = True  # control tokens in a text become ordinary tokens
        self.tokenizer.no_padding()  # the file may ask for padding and truncation
        self.tokenizer.no_truncation()

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
        self._answer_prefix_ids = [self.im_start_token_id, *self._encode_text("assistant\n")]

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.tokenizer.encode_special_tokens = True  # a pickled tokenizer loses this setting

    def decode(self, ids: list[int] | Tensor) -> str:
        """Return the text of token ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def _encode_text(self, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError as error:  # scraped data often holds half of an emoji
            raise InputError("a text holds half of a surrogate pair (\\ud800 to \\udfff)") from error

    def process_image(self, image: Image.Image, decode: bool = True) -> tuple[np.ndarray | None, tuple[int, int, int]]:
        """Return the patches [P, 1536] float32 and the grid (1, rows, columns) of an RGB image.

        The patches equal transformers' bit for bit. Without `decode` they are None, and only the image's size matters.
        """
        factor = self.patch_size * self.merge_size
        height, width = smart_resize(image.height, image.width, 1, 1, factor, *self.image_pixels)
        grid = 1, height // self.patch_size, width // self.patch_size
        return self._patchify([image], 1, grid, self.image) if decode else None, grid

    def process_video(
        self, video: Video, decode: bool = True
    ) -> tuple[np.ndarray | None, tuple[int, int, int], list[float]]:
        """Return a video's patches [P, 1536], grid (frame pairs, rows, columns) and each frame pair's time in seconds.

        Frame numbers, sizes and times equal transformers'. transformers resizes frames with torchvision. Pillow's
        results differ from those by at most 2 of 255 levels, and by at most 0.02 on average (`make test-slow` measures
        it); frames that keep their size are equal. Without `decode` no frame is decoded and the patches are None.
        """
        if video.num_frames < 2:
            raise InputError(f"a video needs two frames, this has {video.num_frames}")
        numbers = self._choose_frames(video)
        frames = video.read(numbers) if decode else map(video.header, numbers)
        first = next(frames)
        width, height = first.size
        factor = self.patch_size * self.merge_size
        scale = max(1.0, factor / height, factor / width)  # as transformers 5; 4.57 refuses sides below `factor`
        height, width = int(height * scale), int(width * scale)
        height, width = smart_resize(height, width, len(numbers), self.temporal_patch_size, factor, *self.video_pixels)
        pairs = -(-len(numbers) // self.temporal_patch_size)
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

    def _choose_frames(self, video: Video) -> list[int]:
        """Choose evenly spaced frames: by number as transformers does, or by time if the frame rate varies.

        By time, a frame that is the nearest to several sampling times is taken once.
        """
        count = max(int(video.num_frames / video.fps * self.video_fps), self.video["min_frames"])
        count = min(count, self.video_maxlen, video.num_frames)
        if video.times is None:
            return np.linspace(0, video.num_frames - 1, count).round().astype(int).tolist()
        starts = video.times[:-1]
        targets = np.linspace(0, starts[-1], count)
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
        self, row: dict, media_dir: str | Path, source: str = "", options: EncodeOptions = ENCODE_DEFAULTS
    ) -> Sample:
        """Encode a row of either format as token ids, labels, positions and patches.

        Supervised tokens are each answer, its <|im_end|> and the newline after it; with `mask_history` only those of
        the last answer; with `train_on_prompt` all tokens except media tokens, <|vision_start|> and <|vision_end|>.
        A sample longer than `seq_length` loses whole exchanges (question and answer) from its end. If its first
        exchange alone is too long, the end of that answer is cut. With `for_generation` a final answer is dropped and
        the sample ends with "<|im_start|>assistant\\n". Raises InputError, whose message begins with `source`.
        """
        turns, truncated = self._encode_row(row, media_dir, source, options, decode=True)
        ids = np.array([token for turn in turns for token in turn.ids], np.int64)
        starts = np.cumsum([0] + [len(turn.ids) for turn in turns]).tolist()
        spans = [(turn_start + start, rows, columns)
                 for turn, turn_start in zip(turns, starts, strict=False)
                 for start, rows, columns in turn.visual_spans]
        is_media = np.isin(ids, (self.image_token_id, self.video_token_id))

        supervised = np.zeros(len(ids), bool)
        if options.train_on_prompt and not options.for_generation:
            supervised = ~is_media & ~np.isin(ids, (self.vision_start_token_id, self.vision_end_token_id))
        elif not options.for_generation:
            answers = [i for i, turn in enumerate(turns) if turn.answer_start is not None]
            for i in answers[-1:] if options.mask_history else answers:
                supervised[starts[i] + turns[i].answer_start : starts[i + 1]] = True
        labels = np.full(len(ids), IGNORE, np.int64)
        labels[:-1] = np.where(supervised[1:], ids[1:], IGNORE)

        pixels = [patches for turn in turns for patches in turn.pixels]
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

    def count_tokens(
        self, row: dict, media_dir: str | Path, source: str = "", options: EncodeOptions = ENCODE_DEFAULTS
    ) -> int:
        """Return how many tokens `encode` makes of a row, without decoding its media.

        It reads only the headers of images and the packets of video files; animations are decoded for their times.
        Raises the InputErrors of `encode` that this can find.
        """
        turns, _ = self._encode_row(row, media_dir, source, options, decode=False)
        return sum(len(turn.ids) for turn in turns)

    def _encode_row(
        self, row: dict, media_dir: str | Path, source: str, options: EncodeOptions, decode: bool
    ) -> tuple[list[EncodedTurn], bool]:
        """Return the turns that fit in `seq_length`, and whether anything was cut.

        Without `decode` the turns have no pixels. Media in turns beyond the sequence length are not decoded.
        """
        limit = options.seq_length or sys.maxsize
        try:
            turns, length = [], 0
            for turn in parse_row(row, options.for_generation):
                turns.append(self._encode_turn(turn, media_dir, options.confine_paths, decode, limit - length))
                length += len(turns[-1].ids)
                if length > limit and turn.role == "assistant" and not options.for_generation:
                    break
            if options.for_generation:
                turns.append(EncodedTurn(self._answer_prefix_ids))
                length += len(turns[-1].ids)
            if length > limit:
                return self._truncate(turns, limit), True
            return turns, False
        except InputError as error:
            raise InputError(f"{source}: {one_line(error)}" if source else one_line(error)) from error

    def _truncate(self, turns: list[EncodedTurn], limit: int) -> list[EncodedTurn]:
        """Cut the last exchange, which exceeds `limit` tokens. Raises InputError if no answer would remain."""
        answer_start = turns[-1].answer_start  # None for a generation prompt, which is never cut
        if answer_start is not None and sum(turn.answer_start is not None for turn in turns) > 1:
            return turns[:-2]
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

    def _encode_turn(self, turn: Turn, media_dir: str | Path, confine: bool, decode: bool, space: int) -> EncodedTurn:
        """Encode a turn as <|im_start|>role\\n...<|im_end|>\\n, as chat_template.jinja renders it.

        An image is one span of media tokens; a video is one span per frame pair, each after its time. All text between
        two control tokens is tokenized together, because merges may cross the newline after the role. A token that
        merges this newline with one at the start of an answer counts as prompt: no generation prompt ends in it, so
        the model can never be asked to predict it. Media are not decoded beyond `space` tokens.
        """
        encoded = EncodedTurn([self.im_start_token_id])
        text = f"{turn.role}\n"
        for part in turn.parts:
            if isinstance(part, str):
                text += part
                continue
            decode = decode and len(encoded.ids) <= space  # the turn does not fit: its pixels are not used
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
            encoded.pixels.append(pixels)
            encoded.grids.append(grid)
            rows, columns = grid[1] // self.merge_size, grid[2] // self.merge_size
            for caption in captions:
                encoded.ids += [*self._encode_text(text + caption), self.vision_start_token_id]
                encoded.visual_spans.append((len(encoded.ids), rows, columns))
                encoded.ids += [pad] * (rows * columns) + [self.vision_end_token_id]
                text = ""
        encoded.ids += [*self._encode_text(text), self.im_end_token_id, *self._newline_ids]
        if turn.role == "assistant":
            encoded.answer_start = len(self._answer_prefix_ids)
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


def _pixel_limits(kind: str, settings: dict, minimum: int | None, maximum: int | None) -> tuple[int, int]:
    """Return the limits given, else the preprocessor's (`min_pixels` before `size`), else the released models'.

    A single given limit moves the other one if necessary: a maximum below the model's minimum becomes both.
    """
    size, defaults = settings.get("size", {}), DEFAULT_PIXELS[kind]
    low = settings.get("min_pixels") or size.get("shortest_edge") or defaults[0]
    high = settings.get("max_pixels") or size.get("longest_edge") or defaults[1]
    low = minimum if minimum is not None else min(low, maximum or low)
    high = maximum if maximum is not None else max(high, minimum or high)
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
    shuffle_buffer: int | None = None  # number of rows in a block of a stream

    def __init__(self, paths: list[str], dataset_dir: str | None = None, max_samples: int | None = None):
        if dataset_dir is not None and not os.path.isdir(dataset_dir):
            raise InputError(f"--dataset-dir {dataset_dir} is not a folder: give the folder of the media paths")
        self.paths, self.max_samples = [str(path) for path in paths], max_samples
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
        settings = {"sizes": self.sizes, "shuffle_buffer": self.shuffle_buffer}
        consumed, epoch, done = (state.get(name, 0) for name in ("consumed", "epoch", "done"))
        block = state.get("block")
        while True:
            for start, size, span_at in self._blocks(block):
                order = range(size)
                if seed is not None:
                    order = np.random.default_rng([seed, epoch, *start]).permutation(size)
                for i in range(done, size):
                    consumed += 1
                    position = {"consumed": consumed, "epoch": epoch, "block": start, "done": i + 1}
                    yield span_at(int(order[i])), position | settings
                done = 0
            block, epoch, done = None, epoch + 1, 0

    def _blocks(self, first: list[int] | None) -> Iterator[tuple[list[int], int, Callable[[int], Span]]]:
        """Yield the blocks of an epoch, from the start of the block `first` on (None: all blocks).

        A block is given by its start (a list of numbers), its number of rows, and a function that returns the location
        of the i-th row.
        """
        raise NotImplementedError

    def _check_position(self, state: dict) -> None:
        """Compare a position with these datasets. Raises InputError if only one of them was streamed."""
        was_streamed = state["shuffle_buffer"] is not None
        if was_streamed != (self.shuffle_buffer is not None):
            raise InputError(
                f"the checkpoint's data was read with{'' if was_streamed else 'out'} --streaming: "
                f"{'give' if was_streamed else 'omit'} --streaming, or give --finetune to restart the data"
            )
        if state["sizes"] != self.sizes:
            logger.warning(
                "the datasets have sizes %s, but had %s when saved: the order is new, rows may be lost or repeated",
                self.sizes, state["sizes"],
            )
        if state["shuffle_buffer"] != self.shuffle_buffer:  # other blocks would lose rows
            self.shuffle_buffer = state["shuffle_buffer"]
            logger.warning("the stream keeps the shuffle buffer of %d rows that it was saved with", self.shuffle_buffer)


class RowDataset(RowSource):
    """Rows of known number, read from disk on demand. Only the range of each row is in memory, in 16 bytes.

    The ranges are also kept in `cache_dir` for the next start. The files there may be deleted at any time.
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
        yield [], len(self), self.span  # one block per epoch


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

    def _blocks(self, first: list[int] | None) -> Iterator[tuple[list[int], int, Callable[[int], Span]]]:
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
    resume_state: dict | list[dict] | None = None  # one rank's position, or all ranks' if their number may differ
    num_samples: int | None = None  # ends the stream after so many rows; the last batches of some ranks may be empty

    def __post_init__(self):
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
        samples much shorter than `seq_length`, it is too low by about 1 to 2 %.
        """
        rows = self.dataset.count()
        if not self.packing:
            return rows
        measured = itertools.islice(self.dataset.stream({}, self.seed), min(rows, 1000))
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
                samples += [self.processor.encode(part, media_dir, source, self.options) for part in split_row(row)]
            except InputError as error:
                rows_bad[span.file] += 1
                failures.append(str(error))
        return collate(samples, resume_state=state, rows_read=rows_read, rows_bad=rows_bad), failures

    def _micro_batches(self, state: dict) -> Iterator[tuple[list[Span], dict]]:
        """Yield this rank's rows of each micro-batch, and the position after the rows of all ranks."""
        rows = itertools.islice(self.dataset.stream(state, self.seed), self.num_samples)
        first = self.dp_rank * self.micro_batch_size
        while step := list(itertools.islice(rows, self.micro_batch_size * self.dp_size)):
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
            (span, next_state) for span, next_state in self.dataset.stream(state, self.seed)
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
        """Return a row's location, the position after it (both as given), and its number of tokens.

        A bad row counts as one token, so that it is still packed and reported. If it ends the run, it counts as a full
        row, so that it is reported soon.
        """
        span, state = item
        try:
            row, source, media_dir = self.dataset.read(span)
            parts = split_row(row)
            length = sum(self.processor.count_tokens(part, media_dir, source, self.options) for part in parts)
        except InputError:
            length = self.options.seq_length if self.on_bad_sample == "error" else 1
        return span, state, length

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
