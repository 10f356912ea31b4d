"""Rows of data to packed batches: JSON row -> Sample -> Batch. Reads no other file of the project.

From top to bottom: what a row may hold (`parse_row`), pictures and videos to patches, token ids, labels and mRoPE
positions (`Processor`), files of rows (`RowDataset`), and the endless, resumable stream of micro-batches (`Loader`).

Everything here equals transformers' Qwen3-VL processor with its Pillow picture processor (ids, positions, pixels;
video prompts as transformers 4.57 writes them) with one exception on purpose: control tokens are written by this
file only. A user who types "<|im_end|>", or a dataset's text that holds it, gets the characters' ordinary tokens.
The only active markup is `<image>` and `<video>` in user turns.

Letters: T tokens, P patches, N pictures and videos, Nv media tokens, Ns supervised tokens.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)

IGNORE = -100  # the label of a token that is not supervised


class InputError(ValueError):
    """A row, picture, file or setting that cannot be used. The message is one line for the user."""


# ---------------------------------------------------------------------------------------------- samples and batches


@dataclass
class Sample:
    """One row, encoded."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, shifted already: labels[i] is the token to predict at i; -100: not supervised
    position_ids: Tensor  # [3, T] int64, (temporal, height, width), from 0
    pixel_values: Tensor  # [P, 1536] float32, pictures and videos in token order
    grid_thw: Tensor  # [N, 3] int64, in token order
    visual_index: Tensor  # [Nv] int64, positions of the media tokens
    source: str  # "train.json row 12 (id 33471)"
    truncated: bool


@dataclass
class Batch:
    """Samples laid end to end, each with positions from 0 and attending to itself within `cu_seqlens`."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, shifted already
    position_ids: Tensor  # [3, T] int64
    pixel_values: Tensor  # [P, 1536] float32
    grid_thw: Tensor  # [N, 3] int64, stays on the host
    cu_seqlens: list[int]  # [0, ..., T]
    visual_index: Tensor  # [Nv] int64, positions of the media tokens
    supervised_index: Tensor  # [Ns] int64, positions whose label is not -100
    loss_weights: Tensor | None  # [T] float32, set by the trainer before the forward
    sources: list[str]
    skipped: int  # bad rows left out
    truncated: int  # samples cut to the sequence length
    resume_state: dict = field(default_factory=dict)  # the position in the stream after this batch; json-able

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch with its tensors on `device`; `grid_thw` and the lists stay on the host."""
        moved = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor) and item.name != "grid_thw":
                value = value.to(device, non_blocking=non_blocking)
            moved[item.name] = value
        return Batch(**moved)


def collate(samples: list[Sample], resume_state: dict | None = None, skipped: int = 0) -> Batch:
    """Lays samples end to end. No samples (all of them were bad) make a batch of one unsupervised token."""
    cu_seqlens = [0]
    for sample in samples:
        cu_seqlens.append(cu_seqlens[-1] + len(sample.input_ids))
    if samples:
        input_ids = torch.cat([s.input_ids for s in samples])
        labels = torch.cat([s.labels for s in samples])
        position_ids = torch.cat([s.position_ids for s in samples], dim=1)
        pixel_values = torch.cat([s.pixel_values for s in samples])
        grid_thw = torch.cat([s.grid_thw for s in samples])
        visual_index = torch.cat([s.visual_index + start for s, start in zip(samples, cu_seqlens, strict=False)])
    else:
        cu_seqlens = [0, 1]
        input_ids, labels = torch.zeros(1, dtype=torch.int64), torch.full((1,), IGNORE)
        position_ids = torch.zeros(3, 1, dtype=torch.int64)
        pixel_values, grid_thw = torch.zeros(0, 1536), torch.zeros(0, 3, dtype=torch.int64)
        visual_index = torch.zeros(0, dtype=torch.int64)
    return Batch(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        pixel_values=pixel_values,
        grid_thw=grid_thw,
        cu_seqlens=cu_seqlens,
        visual_index=visual_index,
        supervised_index=torch.nonzero(labels != IGNORE).flatten(),
        loss_weights=None,
        sources=[s.source for s in samples],
        skipped=skipped,
        truncated=sum(s.truncated for s in samples),
        resume_state=resume_state or {},
    )


# --------------------------------------------------------------------------------------------------- what a row holds

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
PLACEHOLDER = re.compile("(<image>|<video>)")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
STILL_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".ppm")


@dataclass
class Media:
    """A picture or video as the row names it: a path, a list of paths, or `{"path": ..., "fps": ...}`."""

    kind: str  # "image" or "video"
    spec: str | list | dict
    key: str  # where the row names it: "images[0]"


@dataclass
class Turn:
    """One message: its role, and its texts and media in order."""

    role: str
    parts: list[str | Media]


def parse_row(row: dict, for_generation: bool = False) -> list[Turn]:
    """A row of either format as turns: an optional system turn, then user and assistant in turn.

    `{"messages": [{"role", "content"}], "images", "videos"}` or `{"conversations": [{"from", "value"}], "image",
    "video"}`. `<image>` and `<video>` count in user turns only: transformers' template shows no media elsewhere.
    Content may also be a list of `{"type": "text" | "image" | "video", ...}` parts, whose text is taken literally.
    With `for_generation` a last answer is dropped. Raises InputError.
    """
    if not isinstance(row, dict):
        raise InputError(f"a row must be an object with 'messages' or 'conversations', this is {_json_type(row)}")
    if "messages" in row:
        turns_key, role_key, text_key = "messages", "role", "content"
    elif "conversations" in row:
        turns_key, role_key, text_key = "conversations", "from", "value"
    else:
        raise InputError(f"neither 'messages' nor 'conversations' in the row (its keys: {', '.join(row) or 'none'})")
    messages = row[turns_key]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"'{turns_key}' must be a list of turns, this is {_json_type(messages)}")

    turns = []
    for i, message in enumerate(messages):
        where = f"{turns_key}[{i}]"
        if not isinstance(message, dict):
            raise InputError(f"{where} must be an object with '{role_key}' and '{text_key}', not {_json_type(message)}")
        for key in (role_key, text_key):
            if key not in message:
                raise InputError(f"{where} has no '{key}'")
        role = ROLES.get(message[role_key]) if isinstance(message[role_key], str) else None
        if role is None:
            raise InputError(f"{where}: unknown {role_key} {message[role_key]!r}, use one of {', '.join(ROLES)}")
        expected = "assistant" if turns and turns[-1].role == "user" else "user"
        if role != expected and not (role == "system" and i == 0):
            raise InputError(
                f"{where} is '{role}' where '{expected}' is expected: after an optional first system turn, "
                "user and assistant take turns"
            )
        turns.append(Turn(role, _split_content(message[text_key], role, f"{where}.{text_key}")))

    if for_generation and turns[-1].role == "assistant":
        turns.pop()
    wanted = "user" if for_generation else "assistant"
    if not turns or turns[-1].role != wanted:
        lacking = "no question to answer" if for_generation else "no answer to learn from"
        raise InputError(f"'{turns_key}' must end with the {wanted}'s turn: there is {lacking}")
    _place_media(turns, _list_media(row, "image"), _list_media(row, "video"))
    return turns


def _split_content(content, role: str, where: str) -> list[str | Media]:
    """Texts and media in order; a Media without `spec` stands for the next one of the row's list."""
    if isinstance(content, str):
        # In answers and system turns `<image>` is just text, as in transformers' template.
        texts = PLACEHOLDER.split(content) if role == "user" else [content]
        parts = [Media(t[1:-1], "", "") if PLACEHOLDER.fullmatch(t) and role == "user" else t for t in texts]
    elif isinstance(content, list):
        parts = []
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append(part["text"])
            elif kind in ("image", "video") and role == "user":
                spec = part.get(kind) or part.get("path") or ""
                parts.append(Media(kind, spec, f"{where}[{i}]"))
            else:
                raise InputError(
                    f"{where}[{i}] must be {{'type': 'text', 'text': ...}} or, in a user turn, of type image or video"
                )
    else:
        raise InputError(f"{where} must be a string, this is {_json_type(content)}")
    for part in parts:
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{where} holds half a surrogate pair at character {error.start}") from error
    return [part for part in parts if part != ""]


def _list_media(row: dict, kind: str) -> list[Media]:
    """The media under `image` or `images` (`video`, `videos`), each checked for its type."""
    keys = [key for key in (kind, kind + "s") if row.get(key) not in (None, [])]
    if len(keys) > 1:
        raise InputError(f"the row has both '{keys[0]}' and '{keys[1]}': keep one")
    if not keys:
        return []
    key, value = keys[0], row[keys[0]]
    if not isinstance(value, list):
        items = [Media(kind, value, key)]
    elif key == "video" and all(isinstance(v, str) and v.lower().endswith(STILL_SUFFIXES) for v in value):
        items = [Media(kind, value, key)]  # one video as a list of its frames
    else:
        items = [Media(kind, item, f"{key}[{i}]") for i, item in enumerate(value)]
    for item in items:
        path = item.spec
        if kind == "video" and isinstance(path, dict):
            path = path.get("path")
        paths = path if kind == "video" and isinstance(path, list) and path else [path]
        if not all(isinstance(p, str) and p for p in paths):
            forms = "a path" if kind == "image" else "a path, a list of paths or {'path': ..., 'fps': ...}"
            raise InputError(f"'{item.key}' must be {forms}, this is {_json_type(item.spec)}")
    return items


def _place_media(turns: list[Turn], images: list[Media], videos: list[Media]) -> None:
    """Puts each listed medium in its placeholder, or all before the first user text if there is no placeholder."""
    slots = [(turn, i) for turn in turns for i, part in enumerate(turn.parts) if isinstance(part, Media)]
    if not slots:
        first = next(turn for turn in turns if turn.role == "user")
        first.parts[:0] = images + videos
        return
    for kind, given in (("image", images), ("video", videos)):
        empty = [(turn, i) for turn, i in slots if turn.parts[i].kind == kind and not turn.parts[i].spec]
        if len(empty) != len(given):
            raise InputError(
                f"{len(empty)} <{kind}> placeholder{'s' * (len(empty) != 1)} in the user turns but {len(given)} "
                f"{kind}{'s' * (len(given) != 1)} in the row: the two must be as many"
            )
        for (turn, i), media in zip(empty, given, strict=True):
            turn.parts[i] = media


def _json_type(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, list | dict | str) and not value:
        return "empty"
    return names.get(type(value), "a number")


# ------------------------------------------------------------------------------------------------ pictures and videos


def resolve_path(path: str, media_dir: str | Path, confine: bool) -> Path:
    """`path` below `media_dir` (an absolute path stays as it is). Raises InputError if it must not leave, or is not."""
    if path.startswith(("http://", "https://", "data:")):
        raise InputError(f"{path[:80]}: only files on disk are read, download it first")
    if "\0" in path:
        raise InputError(f"{path!r}: a path cannot hold a NUL character")
    full = Path(media_dir, path)
    if confine and not full.resolve().is_relative_to(Path(media_dir).resolve()):
        raise InputError(f"{path} is outside {media_dir}, which --confine-paths forbids")
    if not full.exists():
        raise InputError(f"{full} does not exist")
    return full


def load_picture(path: Path) -> Image.Image:
    """The picture upright and in RGB, as transformers' `load_image` makes it: EXIF rotation applied, alpha dropped."""
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a picture")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise InputError(f"{path} cannot be read as a picture: {_one_line(error)}") from error


def smart_resize(
    height: int, width: int, frames: int, temporal: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Height and width, multiples of `factor`, that keep frames * height * width within the pixel limits.

    transformers' functions of that name: the picture's with `frames` = `temporal` = 1, else the video's, which
    rounds the number of frames to a multiple of `temporal`. Rounding is Python's, half to even.
    """
    if max(height, width) / min(height, width) > 200:
        raise InputError(f"{width}x{height} pixels: the longer side may be at most 200 times the shorter")
    new_height, new_width = round(height / factor) * factor, round(width / factor) * factor
    padded_frames = round(frames / temporal) * temporal
    if padded_frames * new_height * new_width > max_pixels:
        beta = math.sqrt(frames * height * width / max_pixels)
        new_height = max(factor, math.floor(height / beta / factor) * factor)
        new_width = max(factor, math.floor(width / beta / factor) * factor)
    elif padded_frames * new_height * new_width < min_pixels:
        beta = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * beta / factor) * factor
        new_width = math.ceil(width * beta / factor) * factor
    return new_height, new_width


@dataclass
class Video:
    """Frames that can be read by number, and their rate."""

    read: Callable[[list[int]], list[Image.Image]]
    num_frames: int
    fps: float


def open_video(media: Media, media_dir: str | Path, confine: bool, default_fps: float) -> Video:
    """A list of pictures, a folder of pictures (in the order of the numbers in their names), or an animated picture.

    The rate is the row's `fps`, else an animation's own, else `default_fps`: frames that come without a rate are
    taken to have been picked at the rate that is asked for, as the Qwen team's own tools do.
    """
    spec = media.spec if isinstance(media.spec, dict) else {"path": media.spec}
    fps = spec.get("fps")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < 1e6):
        raise InputError(f"'fps' must be a positive number of frames per second, this is {fps!r}")
    if isinstance(spec["path"], list):
        paths = [resolve_path(path, media_dir, confine) for path in spec["path"]]
    else:
        path = resolve_path(spec["path"], media_dir, confine)
        if not path.is_dir():
            return _open_animation(path, fps)
        names = [entry.name for entry in path.iterdir() if entry.suffix.lower() in PICTURE_SUFFIXES]
        names.sort(key=lambda name: [int(s) if s.isdigit() else s for s in re.split("([0-9]+)", name)])
        paths = [resolve_path(str(Path(spec["path"], name)), media_dir, confine) for name in names]
        if not paths:
            raise InputError(f"{path} is a folder without pictures")
    return Video(lambda numbers: [load_picture(paths[i]) for i in numbers], len(paths), float(fps or default_fps))


def _open_animation(path: Path, fps: float | None) -> Video:
    def frames(numbers: list[int]) -> Iterator[Image.Image]:
        try:
            with Image.open(path) as image:
                for i in numbers:
                    image.seek(i)
                    image.load()  # a WebP frame's duration is known only now
                    yield image
        except Exception as error:  # as in load_picture
            raise InputError(f"{path} cannot be read as an animation: {_one_line(error)}") from error

    try:
        with Image.open(path) as image:
            count = getattr(image, "n_frames", 1)
    except Exception as error:  # as in load_picture
        raise InputError(
            f"{path} is not a GIF or WebP animation ({_one_line(error)}); video files are not read yet: "
            "give a folder or a list of its frames"
        ) from error
    if fps is None:
        durations = [frame.info.get("duration") or 100 for frame in frames(list(range(count)))]  # ms; 0: as browsers
        fps = 1000 * count / sum(durations)
    return Video(lambda numbers: [frame.convert("RGB") for frame in frames(numbers)], count, float(fps))


def _one_line(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())


# --------------------------------------------------------------------------------------------------------- processing

# What the released models' preprocessor files say (transformers' class defaults differ).
IMAGE_DEFAULTS = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}
VIDEO_DEFAULTS = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "min_frames": 4}
SHARED_DEFAULTS = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
}


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
        hf_dir = Path(hf_dir)
        path = hf_dir / "tokenizer.json"
        if not path.exists():
            raise InputError(f"{path} does not exist: the model's tokenizer is needed")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise InputError(f"{path} cannot be read as a tokenizer: {_one_line(error)}") from error
        self.tokenizer.encode_special_tokens = True  # special tokens in text stay text
        config = _read_json(hf_dir / "config.json")
        self._set_token_ids(config, path)

        both = _read_json(hf_dir / "processor_config.json")
        image = both.get("image_processor", {}) | _read_json(hf_dir / "preprocessor_config.json")
        video = both.get("video_processor", {}) | _read_json(hf_dir / "video_preprocessor_config.json")
        self.image = SHARED_DEFAULTS | IMAGE_DEFAULTS | image
        self.video = SHARED_DEFAULTS | VIDEO_DEFAULTS | video
        self.image_pixels = _pixel_limits("image", self.image, image_min_pixels, image_max_pixels)
        self.video_pixels = _pixel_limits("video", self.video, video_min_pixels, video_max_pixels)
        self.patch, self.merge = self.image["patch_size"], self.image["merge_size"]
        self.temporal = self.image["temporal_patch_size"]
        names = {"patch_size": "patch_size", "merge_size": "spatial_merge_size", "temporal_patch_size": None}
        for name, config_name in names.items():
            stated = {self.image[name], self.video[name]}
            stated.add(config.get("vision_config", {}).get(config_name or name, self.image[name]))
            if len(stated) > 1:
                raise InputError(f"{hf_dir}: config.json and the preprocessor files disagree on {name}: {stated}")
        if not (video_fps > 0 and video_maxlen >= 2):
            raise InputError(f"video_fps {video_fps} must be above 0 and video_maxlen {video_maxlen} at least 2")
        self.video_fps, self.video_maxlen = video_fps, video_maxlen
        # How many tokens of an answer's turn come before the answer: what the generation prompt ends with.
        self.answer_start = len(self._encode_text("assistant\n"))

    def _set_token_ids(self, config: dict, path: Path) -> None:
        for name, token in (
            ("im_start", "<|im_start|>"),
            ("im_end", "<|im_end|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
        ):
            token_id = self.tokenizer.token_to_id(token)
            if token_id is None:
                raise InputError(f"{path} has no token {token}: this is not a Qwen3-VL tokenizer")
            stated = config.get(f"{name}_token_id", token_id)
            if stated != token_id:
                raise InputError(f"{path} gives {token} the id {token_id}, but config.json says {stated}")
            setattr(self, f"{name}_token_id", token_id)
        size, vocab_size = self.tokenizer.get_vocab_size(), config.get("text_config", {}).get("vocab_size")
        if vocab_size is not None and size > vocab_size:
            raise InputError(f"{path} has {size} tokens, more than config.json's vocab_size {vocab_size}")

    def __getstate__(self) -> dict:
        return self.__dict__ | {"tokenizer": self.tokenizer.to_str()}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.tokenizer = Tokenizer.from_str(state["tokenizer"])
        self.tokenizer.encode_special_tokens = True  # not part of a tokenizer's own pickle

    def _encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int] | Tensor) -> str:
        """Text of token ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def picture(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Patches [P, 1536] float32 and grid (1, rows, columns) of an RGB picture, bit for bit transformers'."""
        size = smart_resize(image.height, image.width, 1, 1, self.patch * self.merge, *self.image_pixels)
        resized = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        return self._patchify(np.asarray(resized)[None], self.image)

    def frames(self, video: Video) -> tuple[np.ndarray, tuple[int, int, int], list[float]]:
        """Patches, grid (pairs, rows, columns) and each pair's time in seconds: transformers' sampling and sizes.

        transformers resizes frames with torchvision only; Pillow's values are close to that, not equal.
        """
        if video.num_frames < self.temporal:
            raise InputError("a video of one frame: give it as a picture")
        wanted = int(video.num_frames / video.fps * self.video_fps)
        wanted = min(max(wanted, self.video["min_frames"]), self.video_maxlen, video.num_frames)
        numbers = np.linspace(0, video.num_frames - 1, wanted).round().astype(int).tolist()
        images = video.read(numbers)
        width, height = images[0].size
        for number, image in zip(numbers, images, strict=True):
            if image.size != (width, height):
                raise InputError(
                    f"frame {number} of the video has {image.width}x{image.height} pixels, the first {width}x{height}"
                )
        factor = self.patch * self.merge
        scale = max(1.0, factor / height, factor / width)  # transformers 5: 4.57 refuses sides below `factor`
        size = smart_resize(
            int(height * scale), int(width * scale), len(images), self.temporal, factor, *self.video_pixels
        )
        images = [image.resize((size[1], size[0]), Image.Resampling.BICUBIC) for image in images]
        padding = -len(images) % self.temporal
        images += images[-1:] * padding
        numbers += numbers[-1:] * padding
        pixels, grid = self._patchify(np.stack([np.asarray(image) for image in images]), self.video)
        firsts, lasts = numbers[:: self.temporal], numbers[self.temporal - 1 :: self.temporal]
        return pixels, grid, [(a / video.fps + b / video.fps) / 2 for a, b in zip(firsts, lasts, strict=True)]

    def _patchify(self, frames: np.ndarray, settings: dict) -> tuple[np.ndarray, tuple[int, int, int]]:
        """uint8 frames [t, h, w, 3] to patches in merge-block order, each flattened as (channel, t, h, w).

        Values are normalised through a table of the 256 possible ones, made with transformers' own roundings
        (rescaled in float64, normalised in float32). One frame (a picture) is repeated to fill a patch.
        """
        depth = 1 if len(frames) == 1 else self.temporal
        t, h, w = len(frames) // depth, frames.shape[1] // self.patch, frames.shape[2] // self.patch
        m, p = self.merge, self.patch
        blocks = frames.reshape(t, depth, h // m, m, p, w // m, m, p, 3).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        blocks = np.ascontiguousarray(blocks).reshape(t * h * w, 3, depth, p * p)
        levels = (np.arange(256, dtype=np.float64) * settings["rescale_factor"]).astype(np.float32)
        patches = np.empty((t * h * w, 3, self.temporal, p * p), np.float32)
        for channel, (mean, std) in enumerate(zip(settings["image_mean"], settings["image_std"], strict=True)):
            table = (levels - np.float32(mean)) / np.float32(std)
            patches[:, channel] = np.take(table, blocks[:, channel])
        return patches.reshape(t * h * w, -1), (t, h, w)

    def encode(
        self,
        row: dict,
        *,
        media_dir: str | Path,
        source: str = "",
        seq_length: int | None = None,
        train_on_prompt: bool = False,
        mask_history: bool = False,
        for_generation: bool = False,
        confine: bool = False,
    ) -> Sample:
        """A row of either format as token ids, labels, positions and patches.

        Supervised are each answer, its <|im_end|> and the newline after it; with `mask_history` the last answer
        only; with `train_on_prompt` every token but the media's (pads, <|vision_start|>, <|vision_end|>). A sample
        longer than `seq_length` loses whole exchanges (question and answer) from its end; if the first alone is too
        long, the end of its answer. `for_generation` drops a last answer and ends with "<|im_start|>assistant\n".
        `confine` refuses media outside `media_dir`. Raises InputError, which begins with `source`.
        """
        try:
            if train_on_prompt and mask_history:
                raise InputError("train_on_prompt and mask_history exclude each other")
            turns = parse_row(row, for_generation)
            reader = _RowReader(self, media_dir, confine)
            if for_generation:
                for turn in turns:
                    reader.append(turn)
                reader.append_generation_prompt()
                if seq_length and len(reader.ids) > seq_length:
                    raise InputError(f"the prompt has {len(reader.ids)} tokens, more than {seq_length}")
            truncated = False if for_generation else self._append_exchanges(reader, turns, seq_length)
        except InputError as error:
            raise InputError(f"{source}: {error}" if source else str(error)) from error
        return reader.sample(source, truncated, train_on_prompt, mask_history, for_generation)

    def _append_exchanges(self, reader: _RowReader, turns: list[Turn], seq_length: int | None) -> bool:
        """Appends question and answer by question and answer while they fit; returns whether something was cut."""
        first_answer = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
        for turn in turns[: first_answer + 1]:
            reader.append(turn)
        if seq_length is not None and len(reader.ids) > seq_length:
            prompt = reader.answers[0][0]
            if prompt >= seq_length:
                raise InputError(
                    f"{len(reader.ids)} tokens, and the {prompt} before the first answer ({len(reader.visual)} of "
                    f"them of pictures or videos) leave no room for it in a sequence length of {seq_length}: "
                    "raise --seq-length or lower --image-max-pixels or --video-max-pixels"
                )
            reader.cut(seq_length)
            return True
        for i in range(first_answer + 1, len(turns), 2):
            # An exchange is tried on a copy of the marks, so that one that does not fit leaves no trace.
            marks = reader.marks()
            for turn in turns[i : i + 2]:
                reader.append(turn)
            if seq_length is not None and len(reader.ids) > seq_length:
                reader.restore(marks)
                return True
        return False


class _RowReader:
    """A sample in the making: turns are appended, and the whole becomes a Sample."""

    def __init__(self, processor: Processor, media_dir: str | Path, confine: bool):
        self.processor, self.media_dir, self.confine = processor, media_dir, confine
        self.ids: list[int] = []
        self.visual: list[int] = []  # positions of media tokens
        self.runs: list[tuple[int, int, int]] = []  # start, rows and columns (in tokens) of each picture or frame
        self.answers: list[tuple[int, int]] = []  # from the first token of an answer to behind its last newline
        self.pixels: list[np.ndarray] = []
        self.grids: list[tuple[int, int, int]] = []

    def append(self, turn: Turn) -> None:
        """Appends <|im_start|>role\\n...<|im_end|>\\n: chat_template.jinja's rendering of one message."""
        p = self.processor
        # Text between control tokens is tokenized in one piece: a merge may cross the newline after the role.
        self.ids.append(p.im_start_token_id)
        start = len(self.ids) + p.answer_start
        text = f"{turn.role}\n"
        for part in turn.parts:
            if isinstance(part, str):
                text += part
            else:
                text = self._append_media(part, text)
        self.ids += p._encode_text(text)
        self.ids.append(p.im_end_token_id)
        self.ids += p._encode_text("\n")
        if turn.role == "assistant":
            # A token of "\n" merged with a newline at the answer's start is the prompt's: no prompt ends with half
            # of it, so it can never be predicted.
            self.answers.append((start, len(self.ids)))

    def append_generation_prompt(self) -> None:
        self.ids += [self.processor.im_start_token_id, *self.processor._encode_text("assistant\n")]

    def _append_media(self, media: Media, text: str) -> str:
        """Appends the text before and the tokens of one picture or video; returns the text that is left over: none."""
        p = self.processor
        try:
            if media.kind == "image":
                path = resolve_path(media.spec, self.media_dir, self.confine)
                pixels, grid = p.picture(load_picture(path))
                captions, pad = [""], p.image_token_id
            else:
                pixels, grid, times = p.frames(open_video(media, self.media_dir, self.confine, p.video_fps))
                captions, pad = [f"<{time:.1f} seconds>" for time in times], p.video_token_id
        except InputError as error:
            raise InputError(f"{media.key}: {error}") from error
        rows, columns = grid[1] // p.merge, grid[2] // p.merge
        for caption in captions:  # one run of tokens for a picture, one for each pair of frames
            self.ids += p._encode_text(text + caption)
            text = ""
            self.ids.append(p.vision_start_token_id)
            start = len(self.ids)
            self.runs.append((start, rows, columns))
            self.visual += range(start, start + rows * columns)
            self.ids += [pad] * (rows * columns)
            self.ids.append(p.vision_end_token_id)
        self.pixels.append(pixels)
        self.grids.append(grid)
        return text

    def marks(self) -> dict[str, int]:
        return {name: len(getattr(self, name)) for name in ("ids", "visual", "runs", "answers", "pixels", "grids")}

    def restore(self, marks: dict[str, int]) -> None:
        for name, length in marks.items():
            del getattr(self, name)[length:]

    def cut(self, length: int) -> None:
        """Cuts the last answer, which holds no media."""
        del self.ids[length:]
        self.answers[-1] = (self.answers[-1][0], length)

    def position_ids(self) -> np.ndarray:
        """mRoPE positions [3, T]: a text token adds one on all axes; a picture or frame that starts at p holds
        (p, p + row, p + column), and what follows goes on at p + max(rows, columns)."""
        positions = np.empty((3, len(self.ids)), np.int64)
        done = position = 0
        for start, rows, columns in self.runs:
            positions[:, done:start] = np.arange(position, position + start - done)
            position += start - done
            done = start + rows * columns
            run = positions[:, start:done].reshape(3, rows, columns)
            run[0], run[1], run[2] = position, position + np.arange(rows)[:, None], position + np.arange(columns)
            positions[:, start:done] = run.reshape(3, -1)
            position += max(rows, columns)
        positions[:, done:] = np.arange(position, position + len(self.ids) - done)
        return positions

    def sample(
        self, source: str, truncated: bool, train_on_prompt: bool, mask_history: bool, for_generation: bool
    ) -> Sample:
        p = self.processor
        ids = np.array(self.ids, np.int64)
        supervised = np.zeros(len(ids), bool)
        if train_on_prompt and not for_generation:
            media = (p.image_token_id, p.video_token_id, p.vision_start_token_id, p.vision_end_token_id)
            supervised = ~np.isin(ids, media)
        elif not for_generation:
            for start, end in self.answers[-1:] if mask_history else self.answers:
                supervised[start:end] = True
        labels = np.full(len(ids), IGNORE, np.int64)
        labels[:-1] = np.where(supervised[1:], ids[1:], IGNORE)
        width = 3 * p.temporal * p.patch**2
        pixels = np.concatenate(self.pixels) if len(self.pixels) > 1 else (self.pixels or [np.empty((0, width))])[0]
        return Sample(
            input_ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(self.position_ids()),
            pixel_values=torch.from_numpy(pixels.astype(np.float32, copy=False)),
            grid_thw=torch.tensor(self.grids, dtype=torch.int64).reshape(-1, 3),
            visual_index=torch.tensor(self.visual, dtype=torch.int64),
            source=source,
            truncated=truncated,
        )


def _read_json(path: Path) -> dict:
    """The object in a configuration file; {} if there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold an object, this is {_json_type(value)}")
    return value


def _pixel_limits(kind: str, settings: dict, minimum: int | None, maximum: int | None) -> tuple[int, int]:
    size = settings["size"]
    low = minimum or settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    high = maximum or settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    if not (low and high and 0 < low <= high):
        raise InputError(f"{kind}_min_pixels {low} and {kind}_max_pixels {high} must be positive and in order")
    return low, high


# ------------------------------------------------------------------------------------------------------- files of rows


class RowDataset:
    """Rows of JSON arrays and JSON-lines files, read from disk one at a time when asked for.

    Only the rows' byte ranges are kept, so memory stays small and worker processes have nothing to share.
    `max_samples` takes the first rows of each file. Media are relative to `dataset_dir`, by default each file's own
    folder. `cache_dir` keeps the byte ranges, by the file's content: it may be deleted at any time. Raises InputError.
    """

    def __init__(
        self,
        paths: list[str],
        dataset_dir: str | None = None,
        cache_dir: str | None = None,
        max_samples: int | None = None,
    ):
        if dataset_dir is not None and not Path(dataset_dir).is_dir():
            raise InputError(f"{dataset_dir}: the folder of the media does not exist (--dataset-dir)")
        self.paths = [str(path) for path in paths]
        self.media_dirs = [Path(dataset_dir) if dataset_dir else Path(path).parent for path in self.paths]
        self.ranges = [_cached_index(Path(path), cache_dir)[:max_samples] for path in self.paths]  # [rows, 2] each
        self.ends = np.cumsum([len(ranges) for ranges in self.ranges])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the file and of the row in it, both from 0."""
        file = int(np.searchsorted(self.ends, index, side="right"))
        return file, index - int(self.ends[file]) + len(self.ranges[file])

    def __getitem__(self, index: int) -> tuple[dict, str, Path]:
        """The row, where it comes from ("train.json row 12 (id 33471)", rows counted from 1), its media's folder."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        file, number = self.locate(index)
        source = f"{self.paths[file]} row {number + 1}"
        start, end = (int(offset) for offset in self.ranges[file][number])
        with open(self.paths[file], "rb") as stream:  # opened anew: a shared handle would share its position
            stream.seek(start)
            data = stream.read(end - start)
        try:
            row = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: not JSON: {_one_line(error)}") from error
        if isinstance(row, dict) and row.get("id") is not None:
            source += f" (id {row['id']})"
        return row, source, self.media_dirs[file]


def _cached_index(path: Path, cache_dir: str | None) -> np.ndarray:
    try:
        if cache_dir is None:
            return _index_rows(path)
        digest = hashlib.sha256()
        with open(path, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path}: the dataset cannot be read: {error.strerror}") from error
    cached = Path(cache_dir, f"rows-{digest.hexdigest()[:32]}.npy")
    if cached.exists():
        try:
            return np.load(cached)
        except (ValueError, EOFError):
            logger.warning("%s is damaged and is made anew", cached)
    ranges = _index_rows(path)
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_suffix(f".{os.getpid()}")
    with open(temporary, "wb") as stream:
        np.save(stream, ranges)
    os.replace(temporary, cached)
    return ranges


def _index_rows(path: Path) -> np.ndarray:
    """Byte ranges [rows, 2] of a file's rows. A JSON array is parsed to find them, in bounded memory."""
    with open(path, "rb") as stream:
        start = 3 if stream.read(3) == codecs.BOM_UTF8 else 0
        stream.seek(start)
        first = b""
        while (byte := stream.read(1)).isspace():
            pass
        first = byte
        stream.seek(start)
        if first == b"[":
            ranges = list(_scan_array(path, stream, start))
        elif first == b"{":
            ranges = []
            for line in stream:
                if not line.isspace():
                    ranges.append((start, start + len(line)))
                start += len(line)
        elif first == b"":
            raise InputError(f"{path} is empty: a dataset is a JSON list of rows, or one JSON object to a line")
        else:
            raise InputError(f"{path} begins with {first!r}: a dataset is a JSON list of rows, or JSON lines, in UTF-8")
    if not ranges:
        raise InputError(f"{path} holds no rows")
    return np.array(ranges, np.int64)


def _scan_array(path: Path, stream, offset: int) -> Iterator[tuple[int, int]]:
    """Byte range of each element of the JSON array in `stream`, which stands at byte `offset`."""
    decode, parse = codecs.getincrementaldecoder("utf-8")().decode, json.JSONDecoder().raw_decode
    space = re.compile(r"[ \t\n\r]*")
    text, at, lines = "", 0, 0  # a window of the file, the position in it, and the newlines before it
    read_bytes, chunk_size = offset, 1 << 20

    def more() -> bool:
        """Drops what is done from the window and reads on; False at the end of the file."""
        nonlocal text, at, lines, offset, read_bytes
        chunk = stream.read(max(chunk_size, len(text) - at))  # doubles while one row outgrows the window
        read_bytes += len(chunk)
        lines += text.count("\n", 0, at)
        offset += len(text[:at].encode())
        try:
            text, at = text[at:] + decode(chunk, final=not chunk), 0
        except UnicodeDecodeError as error:
            place = read_bytes - len(error.object) + error.start
            raise InputError(f"{path} is not UTF-8: {error.reason} at byte {place}") from error
        return bool(chunk)

    def fail(message: str, position: int) -> InputError:
        line, column = lines + text.count("\n", 0, position) + 1, position - text.rfind("\n", 0, position)
        return InputError(f"{path} is not JSON: {message} at line {line} column {column}")

    def next_char() -> str:
        nonlocal at
        while (at := space.match(text, at).end()) == len(text):
            if not more():
                return ""
        return text[at]

    next_char()
    at += 1  # the "[" that the caller saw
    if next_char() == "]":
        at += 1
    else:
        while True:
            next_char()
            try:
                _, end = parse(text, at)
                complete = end < len(text)
            except json.JSONDecodeError as error:
                # An element that the window cuts looks like an error at its end, or like an endless string.
                if error.pos < len(text) - 16 and not error.msg.startswith("Unterminated"):
                    raise fail(error.msg, error.pos) from error
                complete, problem = False, error
            except (RecursionError, ValueError) as error:
                raise fail(_one_line(error), at) from error
            else:
                problem = None
            if not complete:
                if more():
                    continue
                raise fail(problem.msg if problem else "the list has no end", problem.pos if problem else len(text))
            start = offset + len(text[:at].encode())
            yield start, start + len(text[at:end].encode())
            at = end
            separator = next_char()
            if separator not in (",", "]"):
                raise fail("expected ',' or ']'", at)
            at += 1
            if separator == "]":
                break
    if next_char():
        raise fail("extra data after the list", at)


# ---------------------------------------------------------------------------------------------------------- the stream


class Loader:
    """An endless stream of micro-batches, the same for any number of workers and exact when resumed.

    The stream of samples is the rows in order, epoch after epoch, each epoch shuffled by `seed` and its number. It
    is cut into micro-batches, which are dealt to the data-parallel ranks in turn: global batch k holds samples
    k * global_batch_size onwards whatever the layout. Each Batch carries the position behind it in `resume_state`.

    `on_bad_sample` "error" raises a bad row's InputError here, in the main process; "skip" leaves the row out, logs
    it once, and raises InputError once more than a tenth of a dataset's rows are bad.
    `encode_options` are keyword arguments of `Processor.encode`.
    """

    def __init__(
        self,
        dataset: RowDataset,
        processor: Processor,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool,
        num_workers: int,
        on_bad_sample: str,
        encode_options: dict,
        resume_state: dict | None = None,
    ):
        if global_batch_size % (micro_batch_size * dp_size):
            raise InputError(
                f"a global batch of {global_batch_size} cannot be dealt in micro-batches of {micro_batch_size} "
                f"to {dp_size} data-parallel ranks"
            )
        if on_bad_sample not in ("error", "skip"):
            raise InputError(f"on_bad_sample must be 'error' or 'skip', not {on_bad_sample!r}")
        self.dataset, self.dp_size, self.num_workers, self.on_bad_sample = dataset, dp_size, num_workers, on_bad_sample
        self.consumed = (resume_state or {}).get("consumed", 0)
        rows_then = (resume_state or {}).get("rows", len(dataset))
        if rows_then != len(dataset):
            logger.warning("the dataset has %d rows, %d when it was saved: the order differs", len(dataset), rows_then)
        self.micro_batches = _MicroBatches(
            dataset, processor, encode_options, micro_batch_size, dp_rank, dp_size, seed if shuffle else None
        )

    def __iter__(self) -> Iterator[Batch]:
        step = self.micro_batches.size * self.dp_size  # samples that all ranks together take at a time
        loader = DataLoader(
            self.micro_batches,
            batch_size=None,
            sampler=_Count(self.consumed, step),
            num_workers=self.num_workers,
            worker_init_fn=_ignore_signals,
        )
        seen, bad = np.zeros(len(self.dataset.paths)), np.zeros(len(self.dataset.paths))
        logged = set()
        for batch, files, failures in loader:
            for file, message in failures:
                if self.on_bad_sample == "error":
                    raise InputError(message)
                if message not in logged:
                    logged.add(message)
                    logger.warning("skipped: %s", message)
                bad[file] += 1
            for file in files:
                seen[file] += 1
            self._check_skipped(seen, bad)
            yield batch

    def _check_skipped(self, seen: np.ndarray, bad: np.ndarray) -> None:
        for file, path in enumerate(self.dataset.paths):
            # Until this rank has had its share of the file once, the share is what the bad rows are a tenth of.
            rows = max(seen[file], len(self.dataset.ranges[file]) / self.dp_size)
            if seen[file] >= 10 and bad[file] > 0.1 * rows:
                raise InputError(
                    f"{path}: {int(bad[file])} of {int(seen[file])} rows read are bad, more than a tenth of the "
                    "dataset: correct it, the reasons are above"
                )


class _Count:
    """start, start + step, ... without end: the sampler."""

    def __init__(self, start: int, step: int):
        self.start, self.step = start, step

    def __iter__(self) -> Iterator[int]:
        position = self.start
        while True:
            yield position
            position += self.step


class _MicroBatches:
    """This rank's micro-batch of the round that begins at a position of the stream: what a worker computes."""

    def __init__(
        self,
        dataset: RowDataset,
        processor: Processor,
        encode_options: dict,
        size: int,
        dp_rank: int,
        dp_size: int,
        seed: int | None,
    ):
        self.dataset, self.processor, self.encode_options = dataset, processor, encode_options
        self.size, self.dp_rank, self.dp_size, self.seed = size, dp_rank, dp_size, seed
        self.epoch, self.order = -1, None

    def row_number(self, position: int) -> int:
        """Row at a position of the stream."""
        epoch, index = divmod(position, len(self.dataset))
        if self.seed is None:
            return index
        if epoch != self.epoch:
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))
            self.epoch = epoch
        return int(self.order[index])

    def __getitem__(self, position: int) -> tuple[Batch, list[int], list[tuple[int, str]]]:
        """The Batch, the file of each of its rows, and (file, message) of each bad row.

        A bad row's message is returned, not raised: torch would bury it in the worker's traceback.
        """
        samples, files, failures = [], [], []
        start = position + self.dp_rank * self.size
        for number in (self.row_number(start + i) for i in range(self.size)):
            files.append(self.dataset.locate(number)[0])
            try:
                row, source, media_dir = self.dataset[number]
                samples.append(self.processor.encode(row, media_dir=media_dir, source=source, **self.encode_options))
            except InputError as error:
                failures.append((files[-1], str(error)))
        state = {"consumed": position + self.size * self.dp_size, "rows": len(self.dataset)}
        return collate(samples, state, len(failures)), files, failures


def _ignore_signals(worker: int) -> None:
    """A signal to the process group (Ctrl-C, torchrun's SIGTERM) is the trainer's to handle; it ends the workers."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
