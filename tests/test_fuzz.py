"""Damaged and hostile files: whatever a reader is given, it ends soon, in little memory, with a result or InputError.

Every input is made from a valid one by mutations, drawn from the target's name and the input's number alone:

    python tests/test_fuzz.py Tokenizer 1234     makes that input again and shows the traceback
"""
from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import logging
import math
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # for the command line above

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.distributed.checkpoint import metadata as dcp_metadata  # noqa: E402

import common  # noqa: E402
import convert  # noqa: E402
import data  # noqa: E402
import infer  # noqa: E402
import model  # noqa: E402

CLEAN = common.InputError  # one line for the user
SECONDS = 10  # for one input
MEGABYTES = 800  # on top of what the process holds before; a picture at Pillow's limit takes 540

# ---- mutations -----------------------------------------------------------------------------------------------------

DEEP = "deep nesting of "  # such strings become that many brackets, which json.dumps could not write
HOSTILE = [
    None, True, False, 0, 1, -1, 2, 7, 255, 1000, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, -(2**63), 10**12, 10**400, 0.5,
    -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf, "", "x", "\0", "\ud800", "\udcff", "\x1b[2J", "-1", "é" * 9,
    "x" * 70000, "<image>", "<image>" * 300, "<video>", "<|im_end|>", "../../etc/passwd", "/etc/passwd", "/dev/zero",
    "..", ".", "fifo", "a/b", "x" * 300, "a.png", "b.gif", [], {}, [[]], [None], [{}], [0] * 500, {"": 0},
    {"path": "a.png"}, {"path": ["a.png", "b.jpg"], "fps": 2.0}, ["a.png", "a.png"], DEEP + "30", DEEP + "450",
    DEEP + "900", DEEP + "5000", DEEP + "100000",
]


def places(value) -> Iterator[tuple[dict | list, object]]:
    """(container, key) of everything inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutate_value(value, rng: random.Random):
    """The JSON value with some parts replaced, removed, moved or repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 2, 2, 2, 5))):
        everything = list(places(value)) if len(str(value)) < 100_000 else []
        if not everything or rng.random() < 0.02:
            value = copy.deepcopy(rng.choice(HOSTILE))
            continue
        container, key = rng.choice(everything)
        other, from_key = rng.choice(everything)
        another = json.loads(json.dumps(other[from_key]))
        kind = rng.randrange(8)
        if kind < 4:
            container[key] = copy.deepcopy(rng.choice(HOSTILE))
        elif kind == 4:
            del container[key]
        elif kind == 5:
            container[key] = another
        elif isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), another)
        elif isinstance(container[key], int | float) and not isinstance(container[key], bool):
            container[key] *= rng.choice((-1, 2, 3, 1000, 10**6, 10**9))
        else:
            container[str(from_key)] = container.pop(key)
    return value


def mutate_json(value, rng: random.Random) -> bytes:
    """The value mutated, as JSON text; now and then with a doubled key or damaged bytes."""
    text = json.dumps(mutate_value(value, rng), ensure_ascii=rng.random() < 0.9)
    parts = text.split(f'"{DEEP}')
    for i, part in enumerate(parts[1:], 1):
        depth, rest = part.split('"', 1)
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        parts[i] = opening * int(depth) + "0" + closing * int(depth) + rest
    text = "".join(parts)
    braces = [i for i, c in enumerate(text[:20000]) if c == "{"]
    keys = [key for container, key in places(value) if isinstance(container, dict)]
    if braces and keys and rng.random() < 0.2:
        at, hostile = rng.choice(braces) + 1, rng.choice(HOSTILE)
        text = f"{text[:at]}{json.dumps(rng.choice(keys))}: {json.dumps(hostile)}, {text[at:]}"
    encoded = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(encoded, rng) if rng.random() < 0.15 else encoded


def mutate_bytes(content: bytes, rng: random.Random, start: int = 0, end: int | None = None) -> bytes:
    """The bytes with some from `start` to `end` flipped, replaced, cut out, put in or repeated, or the end cut off."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        limit = min(len(content), end if end is not None else len(content))
        if limit <= start:
            break
        at, length = rng.randrange(start, limit), rng.choice((1, 1, 2, 4, 8, 40, 1000))
        kind = rng.randrange(8)
        if kind < 2:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            content[at] = rng.choice(b'\0\xff\x7f\x80"\\[]{},:0 \n')
        elif kind == 3:
            del content[at if rng.random() < 0.3 else at : at + length]
        elif kind == 4:
            content[at:at] = rng.randbytes(length)
        elif kind == 5:
            source = rng.randrange(start, limit)
            content[at:at] = content[source : source + length]
        elif kind == 6:
            number = rng.choice((0, 1, -1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)))
            width = rng.choice((1, 2, 4, 8))
            order = rng.choice(("little", "big"))
            content[at : at + width] = (number % 256**width).to_bytes(width, order)
        else:
            del content[at:]
    return bytes(content)


# ---- what is damaged, and its readers ------------------------------------------------------------------------------

ROWS = [
    {"id": "7", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
    {"messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": "<image> or <image>?"},
                  {"role": "assistant", "content": "Both."}], "images": ["a.png", "b.jpg"], "videos": []},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>"}, {"type": "image", "image": "b.jpg"},
                                               {"type": "video", "video": "v.gif"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "Ja."}]}]},
    {"id": 3, "video": ["a.png", "a.png", "a.png"], "conversations": [
        {"from": "user", "value": "<video>Tell."}, {"from": "assistant", "value": "No."}]},
    {"messages": [{"role": "user", "content": "<video>"}, {"role": "assistant", "content": "?"}],
     "videos": [{"path": "frames", "fps": 4.0}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Grüße \U0001f600"}]},
]
GENERATION = {"eos_token_id": [258, 256], "temperature": 0.7, "text_config": {"eos_token_id": 258}}
VIDEO_PROCESSOR = {"size": {"shortest_edge": 4096, "longest_edge": 65536}, "patch_size": 16, "temporal_patch_size": 2,
                   "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_frames": 4}


def make_valid(root: Path) -> None:
    """Small valid files of every kind: media, a Hugging Face directory, a checkpoint."""
    picture = Image.effect_noise((40, 36), 60).convert("RGB")
    for name in ("a.png", "b.jpg", "c.webp", "d.bmp", "e.tif", "f.ppm", "frames/1.png", "frames/2.png"):
        (root / name).parent.mkdir(exist_ok=True)
        picture.save(root / name)
    frames = [Image.effect_noise((40, 36), 60).convert("P") for _ in range(3)]
    for name in ("v.gif", "v.webp", "v.png"):
        frames[0].save(root / name, save_all=True, append_images=frames[1:], duration=[100, 300, 100])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(root / "turned.jpg", exif=exif)
    frames[0].save(root / "clear.png", transparency=3)
    os.mkfifo(root / "fifo")

    raw = tiny.config_dict(moe=True, layers=1)
    raw["vision_config"] |= {"depth": 1, "deepstack_visual_indexes": [0]}
    hf = tiny.hf_dir(root / "hf", raw)
    (hf / "video_preprocessor_config.json").write_text(json.dumps(VIDEO_PROCESSOR))
    (hf / "generation_config.json").write_text(json.dumps(GENERATION))
    torch.manual_seed(0)
    made = model.Qwen3VL(model.Qwen3VLConfig.from_json(hf))
    made.init_weights(0)
    weights = {name: p.detach().to(torch.bfloat16) for name, p in made.named_parameters()}
    save_file(weights, hf / "model.safetensors")
    split = tiny.hf_dir(root / "split", raw)
    names = [sorted(weights)[:20], sorted(weights)[20:]]
    files = [f"model-{i + 1:05d}-of-00002.safetensors" for i in range(2)]
    for file, part in zip(files, names, strict=True):
        save_file({name: weights[name] for name in part}, split / file)
    weight_map = {name: file for file, part in zip(files, names, strict=True) for name in part}
    (split / convert.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    size = len(json.dumps(ROWS[5]))  # of each of the rows that TrainerState makes
    start = 1 + 3 * (size + 2)
    state = {"iteration": 3, "world": 1,
             "data": {"consumed": 12, "epoch": 0, "rows": 30, "dealt": [0, 1],
                      "waiting": [[0, 3, start, start + size]]},
             "rng": {"torch": torch.get_rng_state(), "device": None, "python": list(random.getstate()[1])}}
    convert.save_checkpoint(root / "run", 3, made, None, state)


class Target:
    """The readers of one kind of file: `run` makes the input of a number and reads it."""

    def __init__(self, root: Path):
        self.root, self.dir, self.input = root, root, b""
        self.prepare()

    def prepare(self) -> None:
        """Whatever all inputs share."""

    def run(self, rng: random.Random) -> None:
        """Makes an input, keeps it in `self.input` and reads it. Raises what the reader raises."""
        raise NotImplementedError

    def damage(self, path: Path, content: bytes) -> None:
        self.input = content
        path.write_bytes(content)

    def mutated_row(self, rng: random.Random) -> object:
        """What a damaged row's text holds; where that is not JSON, a row of which a value is changed."""
        self.input = mutate_json(rng.choice(ROWS), rng)
        try:
            return json.loads(self.input)
        except (ValueError, RecursionError):
            return mutate_value(rng.choice(ROWS), rng)


class ParseRow(Target):
    def run(self, rng: random.Random) -> None:
        row = self.mutated_row(rng)
        for turn in data.parse_row(row, rng.random() < 0.3):
            assert turn.role in ("system", "user", "assistant")
            assert all(isinstance(part, str | data.Media) for part in turn.parts)


class Encode(Target):
    def prepare(self) -> None:
        self.processor = data.Processor(self.root / "hf", video_maxlen=8)

    def run(self, rng: random.Random) -> None:
        row = self.mutated_row(rng)
        options = data.EncodeOptions(seq_length=rng.choice((None, 20, 4096)), confine_paths=rng.random() < 0.7,
                                     for_generation=rng.random() < 0.2)
        sample = self.processor.encode(row, self.root, options=options)
        assert len(sample.labels) == len(sample.input_ids) == sample.position_ids.shape[1]
        assert self.processor.count_tokens(row, self.root, options=options) == len(sample.input_ids)


class RowFiles(Target):
    """RowDataset, RowStream (also begun in the middle) and Python's own parser agree, or all refuse."""

    def run(self, rng: random.Random) -> None:
        rows = [rng.choice(ROWS) for _ in range(rng.choice((1, 2, 3, 20)))]
        separator = rng.choice(("\n", "\r\n", "\n\n", " \n"))
        is_list = rng.random() < 0.5
        if rng.random() < 0.7:
            damaged = rng.randrange(len(rows))
            texts = [mutate_json(row, rng) if i == damaged else json.dumps(row).encode() for i, row in enumerate(rows)]
        else:
            texts = [json.dumps(row, indent=rng.choice((None, 1)) if is_list else None).encode() for row in rows]
        content = (b"[" + (", " + separator).encode().join(texts) + b"]" if is_list
                   else separator.encode().join(texts))
        content = b"\xef\xbb\xbf" * (rng.random() < 0.1) + content + rng.choice((b"", b"\n", b"\0", b"]", b"["))
        path = self.dir / "rows.json"
        self.damage(path, mutate_bytes(content, rng) if rng.random() < 0.5 else content)

        spans, streamed = self.spans(path), self.streamed(path)
        assert (spans is None) == (streamed is None), "RowDataset and RowStream do not both refuse"
        if self.input.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            expected = self.parsed()
            if spans is not None or expected:
                assert expected is not None, "not a JSON list, but taken for one"
                assert spans is not None, "a JSON list, but refused"
                assert len(spans) == len(expected)
        elif spans is not None:
            lines = self.input.removeprefix(b"\xef\xbb\xbf").split(b"\n")
            assert len(spans) == sum(bool(line.strip()) for line in lines), "rows are not the lines"
        if spans is None:
            raise common.InputError("refused")
        assert spans == streamed, "RowDataset and RowStream differ"
        dataset = data.RowDataset([str(path)])
        for i in range(len(spans)):
            with contextlib.suppress(*CLEAN):
                row, _, _ = dataset[i]
                if self.input.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
                    assert repr(row) == repr(expected[i])  # NaN is not equal to itself

    def spans(self, path: Path) -> list | None:
        try:
            dataset = data.RowDataset([str(path)])
            return [dataset.span(i) for i in range(len(dataset))]
        except common.InputError:
            return None

    def streamed(self, path: Path) -> list | None:
        try:
            stream = data.RowStream([str(path)], buffer=3)
            count = stream.count()
            rows = stream.stream({}, None)
            pairs = [next(rows) for _ in range(count)]
            middle = stream.stream(pairs[count // 2][1], None)
            again = [next(middle)[0] for _ in range(count)]
            spans = [span for span, _ in pairs]
            assert again == (spans * 3)[count // 2 + 1 :][:count], "a stream begun in the middle differs"
            return spans
        except common.InputError:
            return None

    def parsed(self) -> list | None:
        try:
            # As to where rows end; a row of which bytes or numbers are bad is refused when it is read.
            value = json.loads(self.input.removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape"), strict=False,
                               parse_int=lambda digits: int(digits) if len(digits) < 4000 else 0)
            return value if isinstance(value, list) and value else None
        except (ValueError, RecursionError):
            return None


class HuggingFace(Target):
    """A copy of the Hugging Face directory, of which one file is damaged."""

    source = "hf"

    def prepare(self) -> None:
        self.dir = self.root / type(self).__name__
        shutil.copytree(self.root / self.source, self.dir, symlinks=True)
        self.valid = {path.name: path.read_bytes() for path in self.dir.iterdir()}
        self.expected = convert.expected_shapes(self.dir)
        self.damaged = self.dir / "config.json"

    def damage_one(self, name: str, content: bytes) -> None:
        self.damaged.write_bytes(self.valid[self.damaged.name])
        self.damaged = self.dir / name
        self.damage(self.damaged, content)

    def damage_json(self, rng: random.Random, *names: str) -> None:
        name = rng.choice(names)
        self.damage_one(name, mutate_json(json.loads(self.valid[name]), rng))


class Config(HuggingFace):
    def run(self, rng: random.Random) -> None:
        self.damage_json(rng, "config.json")
        config = model.Qwen3VLConfig.from_json(self.dir)
        if rng.random() < 0.1 and config.text.num_hidden_layers + config.vision.depth < 20:
            convert.expected_shapes(self.dir)


class Processor(HuggingFace):
    def run(self, rng: random.Random) -> None:
        self.damage_json(rng, "config.json", *["preprocessor_config.json", "video_preprocessor_config.json"] * 3)
        processor = data.Processor(self.dir, video_maxlen=4)
        for row in ROWS[0], ROWS[3]:
            processor.encode(row, media_dir=self.root)


class Tokenizer(HuggingFace):
    def run(self, rng: random.Random) -> None:
        valid = self.valid["tokenizer.json"]
        if rng.random() < 0.7:
            self.damage_json(rng, "tokenizer.json")
        else:
            self.damage_one("tokenizer.json", mutate_bytes(valid, rng))
        processor = data.Processor(self.dir)
        ids = processor.encode(ROWS[5], media_dir=self.root).input_ids
        processor.decode(ids)


class EndTokens(HuggingFace):
    def run(self, rng: random.Random) -> None:
        self.damage_json(rng, "generation_config.json")
        infer.end_token_ids(self.dir, SimpleNamespace(im_end_token_id=258))


class Safetensors(HuggingFace):
    def run(self, rng: random.Random) -> None:
        valid = self.valid["model.safetensors"]
        size = 8 + int.from_bytes(valid[:8], "little")
        if rng.random() < 0.6:
            header = mutate_json(json.loads(valid[8:size]), rng)
            header += b" " * (-len(header) % 8)
            content = len(header).to_bytes(8, "little") + header + valid[size:]
        else:
            content = mutate_bytes(valid, rng, end=rng.choice((8, size, None)))
        self.damage_one("model.safetensors", content)
        read_all(convert.HuggingFaceWeights(self.dir).check_compatible(self.expected), rng)
        convert.HuggingFaceWeights(self.dir).check_compatible(self.expected)


class Index(HuggingFace):
    source = "split"

    def run(self, rng: random.Random) -> None:
        self.damage_json(rng, convert.INDEX)
        read_all(convert.HuggingFaceWeights(self.dir).check_compatible(self.expected), rng)


def read_all(source: convert.HuggingFaceWeights | convert.CheckpointWeights, rng: random.Random) -> None:
    for name in rng.sample(sorted(source.tensors), min(3, len(source.tensors))):
        _, shape = source.tensors[name]
        assert source.read(name, (0,) * len(shape), shape).shape == shape


class Checkpoint(HuggingFace):
    source = "run/iter_0000003"

    def prepare(self) -> None:
        self.dir = self.root / type(self).__name__ / "iter_0000003"
        shutil.copytree(self.root / self.source, self.dir)
        self.valid = {path.name: path.read_bytes() for path in self.dir.iterdir()}
        self.expected = convert.expected_shapes(self.root / "hf")
        self.damaged = self.dir / convert.CHECKSUMS
        self.undamaged = convert.CheckpointWeights(self.root / self.source)
        self.names = sorted(self.undamaged.tensors)


class Metadata(Checkpoint):
    def run(self, rng: random.Random) -> None:
        content = self.valid[".metadata"]
        if (kind := rng.random()) < 0.3:
            content = mutate_bytes(content, rng)
        elif kind < 0.95:  # a whole pickle, of other values
            metadata = pickle.loads(content)
            tensors, storage = metadata.state_dict_metadata, metadata.storage_data
            for name in rng.sample(self.names, rng.choice((1, 1, 2))):
                tensor, chunk = tensors[name], tensors[name].chunks[0]
                at = dcp_metadata.MetadataIndex(name, chunk.offsets, 0)
                if at not in storage:  # the tensor before this one was put in its place
                    continue
                thing, kind = rng.choice((tensor, tensor.properties, chunk, storage[at])), rng.randrange(8)
                field = rng.choice([f.name for f in dataclasses.fields(thing) if f.name != "memory_format"])
                old, shapes = getattr(thing, field), [rng.choices((0, 1, 3, 56, 2**40, -5), k=n) for n in range(4)]
                if kind == 0:
                    del storage[at]
                elif kind == 1:
                    storage[at] = storage[rng.choice(list(storage))]
                elif kind == 2:
                    tensors[rng.choice(self.names)] = tensor
                elif kind == 3:
                    tensor.chunks.append(rng.choice(tensor.chunks))
                elif isinstance(old, torch.Size) and kind < 7:
                    object.__setattr__(thing, field, torch.Size(rng.choice(shapes)))
                elif isinstance(old, int) and kind < 7:
                    object.__setattr__(thing, field, old + rng.choice((1, -1, 64, 2**40, -(2**40), 2**70)))
                else:
                    object.__setattr__(thing, field, rng.choice(HOSTILE))
            if rng.random() < 0.05:
                field = rng.choice([f.name for f in dataclasses.fields(metadata)])
                setattr(metadata, field, rng.choice(HOSTILE))
            content = pickle.dumps(metadata, rng.choice((2, 4, 5)))
        self.damage_one(".metadata", content)
        directory = convert.find_checkpoint(self.dir)
        read_all(convert.CheckpointWeights(directory).check_compatible(self.expected), rng)


class Shard(Checkpoint):
    def run(self, rng: random.Random) -> None:
        name = rng.choice(self.names)
        (_, _, info), *_ = self.undamaged._chunks[name]
        valid, (start, end) = self.valid[info.relative_path], (info.offset, info.offset + info.length)
        piece = mutate_bytes(valid[start:end], rng)[: end - start].ljust(end - start, b"\0")
        self.damage_one(info.relative_path, valid[:start] + piece + valid[end:])
        source = convert.CheckpointWeights(self.dir)
        _, shape = source.tensors[name]
        source.read(name, (0,) * len(shape), shape)


class TrainerState(Checkpoint):
    def prepare(self) -> None:
        super().prepare()
        (self.root / "rows.json").write_text(json.dumps(ROWS[5:] * 30))
        dataset, processor = data.RowDataset([str(self.root / "rows.json")]), data.Processor(self.root / "hf")
        self.loader = data.Loader(
            dataset, processor, micro_batch_size=1, global_batch_size=1, dp_rank=0, dp_size=1, seed=0, shuffle=True,
            num_workers=0, on_bad_sample="error", options=data.EncodeOptions(seq_length=999), packing=True)

    def run(self, rng: random.Random) -> None:
        name = "trainer_state_rank_00000.pt"
        content = self.valid[name]
        if rng.random() < 0.5:
            content = mutate_bytes(content, rng)
        else:
            state, buffer = torch.load(io.BytesIO(content), weights_only=True), io.BytesIO()
            torch.save(mutate_value(state | {"rng": None}, rng), buffer)
            content = buffer.getvalue()
        self.damage_one(name, content)
        for state in convert.load_data_positions(self.dir):
            self.loader.resume_state = state
            batches = iter(self.loader)
            for _ in range(3):
                next(batches)


class Checksums(Checkpoint):
    def run(self, rng: random.Random) -> None:
        tracker = self.dir.parent / convert.TRACKER
        tracker.write_bytes(b"3")
        if rng.random() < 0.8:
            self.damage_json(rng, convert.CHECKSUMS)
        else:
            self.damage(tracker, mutate_bytes(b"3", rng))
        convert.find_checkpoint(self.dir.parent)
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            convert.verify(self.dir.parent)


class Pictures(Target):
    def prepare(self) -> None:
        self.processor = data.Processor(self.root / "hf", video_maxlen=4)
        names = ("a.png", "b.jpg", "c.webp", "d.bmp", "e.tif", "f.ppm", "v.gif", "v.webp", "v.png", "turned.jpg",
                 "clear.png")
        self.valid = {name: (self.root / name).read_bytes() for name in names}

    def run(self, rng: random.Random) -> None:
        name = rng.choice(list(self.valid))
        path = self.root / f"damaged{Path(name).suffix}"
        content = self.valid[name]
        self.damage(path, mutate_bytes(content, rng, end=rng.choice((None, 64, 200))))
        try:
            assert data.load_image(path, decode=False).size
            self.processor.process_image(data.load_image(path))
        except common.InputError:
            pass
        video = data.open_video(path.name, self.root, True, 2.0)
        self.processor.process_video(video)


TARGETS = {  # inputs of the long form; the short one takes a fiftieth
    ParseRow: 30_000, Encode: 6_000, RowFiles: 12_000, Config: 20_000, Processor: 8_000, Tokenizer: 8_000,
    EndTokens: 2_000, Safetensors: 8_000, Index: 3_000, Metadata: 4_000, Shard: 3_000, TrainerState: 3_000,
    Checksums: 4_000, Pictures: 8_000,
}


# ---- running them --------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an Exception: no reader may take it for a damaged file."""


def _alarm(number: int, frame) -> None:
    raise Hang


def megabytes(field: str) -> float:
    """A field of this process's /proc/self/status: VmRSS, VmHWM (the most so far), VmSize."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def memory_peak() -> Callable[[], float]:
    """Returns what tells by how many MB the most memory held since now is more than what is held now."""
    Path("/proc/self/clear_refs").write_text("5")  # begins VmHWM anew
    before = megabytes("VmRSS")
    return lambda: megabytes("VmHWM") - before


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Address space for a gigabyte more than now, and an alarm for whoever sets the timer."""
    before = signal.signal(signal.SIGALRM, _alarm)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (int(megabytes("VmSize") + 2048) << 20, hard))
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def fuzz(kind: type[Target], root: Path, numbers) -> tuple[int, float]:
    """Reads inputs; returns how many were refused, and by how many MB the most memory held rose."""
    target, refused = kind(root), 0
    with limits():
        peak = memory_peak()
        for number in numbers:
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                target.run(random.Random(f"{kind.__name__} {number}"))
            except CLEAN as e:
                refused += 1
                assert len(str(e)) < 3000, f"{kind.__name__} {number}: a message of {len(str(e))} characters"
            except BaseException as e:
                if isinstance(e, KeyboardInterrupt):
                    raise
                what = "took too long" if isinstance(e, Hang) else f"raised {type(e).__name__}: {str(e)[:300]}"
                raise AssertionError(f"input {number} of {kind.__name__} {what}: {target.input[:600]!r}") from e
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        return refused, peak()


# ---- files made to do harm -----------------------------------------------------------------------------------------


class RunsCode:
    """Its pickle makes the file `ran` when it is loaded."""

    def __init__(self, root: Path):
        self.command = f"touch {root / 'ran'}"

    def __reduce__(self):
        return os.system, (self.command,)


def torch_zip(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    """What torch.load takes, with this pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        parts = {"data.pkl": content, "version": b"3\n", "byteorder": b"little", "data/0": b"\0" * 9}
        for name, part in parts.items():
            archive.writestr(f"archive/{name}", part)
    return file.getvalue()


def a_config(root: Path, text: dict | None = None, vision: dict | None = None, **top) -> None:
    raw = json.loads((root / "hf/config.json").read_text())
    raw["text_config"] |= text or {}
    raw["vision_config"] |= vision or {}
    (root / "hf/config.json").write_text(json.dumps(raw | top))


def a_header(root: Path, change, data_: bytes = b"\0" * 64) -> None:
    """A safetensors file of two tensors of 32 bytes whose header is changed."""
    header = {name: {"dtype": "F32", "shape": [8], "data_offsets": [at, at + 32]} for name, at in (("a", 0), ("b", 32))}
    change(header)
    encoded = header.pop("raw") if "raw" in header else json.dumps(header).encode()
    (root / "hf/model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + data_)


def an_index(root: Path, file) -> None:
    (root / "hf/model.safetensors").unlink()
    (root / "hf" / convert.INDEX).write_text(json.dumps({"weight_map": {"a": file}}))


def a_tokenizer(root: Path, **changes) -> None:
    path = root / "hf/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def a_piece(root: Path, content: bytes) -> None:
    """The first piece of a shard replaced, nothing else."""
    iteration = root / "run/iter_0000003"
    (_, _, info), *_ = convert.CheckpointWeights(iteration)._chunks["model.visual.patch_embed.proj.weight"]
    shard = bytearray((iteration / info.relative_path).read_bytes())
    shard[info.offset : info.offset + len(content)] = content
    (iteration / info.relative_path).write_bytes(shard)


def a_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def a_sparse(path: Path, begin: bytes) -> None:
    path.write_bytes(begin)
    os.truncate(path, 1 << 36)


def a_link(path: Path, to: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def read_hf(root: Path) -> None:
    """All that a program reads of a Hugging Face directory."""
    config = model.Qwen3VLConfig.from_json(root / "hf")
    processor = data.Processor(root / "hf")
    for row in (ROWS[0], ROWS[4], ROWS[5]):
        processor.encode(row, media_dir=root)
    infer.end_token_ids(root / "hf", processor)
    assert config.text.num_hidden_layers == 1
    convert.HuggingFaceWeights(root / "hf").check_compatible(convert.expected_shapes(root / "hf"))


def read_run(root: Path) -> None:
    """All that a program reads of a save directory."""
    with torch.device("meta"):
        made = model.Qwen3VL(model.Qwen3VLConfig.from_json(root / "hf"))
    made.to_empty(device="cpu")
    with contextlib.redirect_stderr(io.StringIO()):
        convert.load_checkpoint(convert.find_checkpoint(root / "run"), made)
        convert.verify(root / "run")


def read_row(root: Path, confine: bool = True, **row) -> None:
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    data.Processor(root / "hf").encode({"messages": messages} | row, media_dir=root,
                                         options=data.EncodeOptions(confine_paths=confine))


def read_rows(root: Path) -> None:
    for make in data.RowDataset, data.RowStream:
        make([str(root / "rows.json")]).count()


ITER = "run/iter_0000003"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(ran) (w) file\n"
# {(((a, a), (a, a)), ...): None}, sixty deep
PAIRS_OF_PAIRS = b"\x80\x02}X\1\0\0\0aq\0" + b"".join(
    b"h%c\x86q%c" % (i, i + 1) for i in range(60)) + b"Ns."
DEEP_PAIR = b"\x80\x02})" + b"\x85" * 300_000 + b"Ns."  # {((((...),),),): None}
SETS_METHOD = (b"\x80\x02cpathlib\nPosixPath\nN}X\x0e\0\0\0is_relative_toctorch.distributed.checkpoint.metadata\n"
               b"MetadataIndex\ns\x86b.")  # PosixPath.is_relative_to = MetadataIndex
DEEP_LAYOUT = b"\x80\x02ctorch.serialization\n_get_layout\n)" + b"\x85" * 300_000 + b"\x85R."
DEEP_STATE = (b"\x80\x02ctorch.distributed.checkpoint.metadata\nStorageMeta\n)\x81}X\x0c\0\0\0__setstate__"
              b"ctorch.serialization\n_get_layout\nsb)" + b"\x85" * 300_000 + b"b.")
EQUAL_KEYS = [i * (2**61 - 1) for i in range(100)]  # of one hash; 60,000 take minutes


def a_metadata(root: Path, change) -> None:
    """The checkpoint's description changed, or what `change` returns instead of it."""
    path = root / ITER / ".metadata"
    (path.parent / convert.CHECKSUMS).unlink()
    made = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(made) or made))


def side_by_side(made: dcp_metadata.Metadata, count: int, twice: int) -> None:
    """A tensor cut into this many columns, of which some are there twice and as many not."""
    size, columns = torch.Size, [*range(twice), *range(twice, count - twice), *range(twice)]
    chunks = [dcp_metadata.ChunkStorageMetadata(size((0, i)), size((1, 1))) for i in columns]
    properties = dcp_metadata.TensorProperties(dtype=torch.float32)
    made.state_dict_metadata["optimizer.x"] = dcp_metadata.TensorStorageMetadata(properties, size((1, count)), chunks)
    info = next(iter(made.storage_data.values()))
    made.storage_data |= {dcp_metadata.MetadataIndex("optimizer.x", c.offsets): copy.copy(info) for c in chunks}


def many_dimensions(made: dcp_metadata.Metadata) -> None:
    name = "model.language_model.norm.weight"
    tensor, numbers = made.state_dict_metadata[name], [0] * 200_000
    info = copy.copy(made.storage_data[dcp_metadata.MetadataIndex(name, tensor.chunks[0].offsets)])
    made.storage_data[dcp_metadata.MetadataIndex(name, numbers)] = info
    at, size, tensor.size = (torch.Size(n + i for n in numbers) for i in (0, 1, 1))
    tensor.chunks = [dcp_metadata.ChunkStorageMetadata(at, size)]
POISONED = {
    # name: (how the file is made, who reads it, what the error names)
    "metadata runs code": (
        lambda r: (r / ITER / ".metadata").write_bytes(pickle.dumps(RunsCode(r))), read_run, "posix.system"),
    "metadata with a memo of 32 GB": (
        lambda r: (r / ITER / ".metadata").write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f."), read_run, ".metadata"),
    "metadata with a text of 1 TB": (
        lambda r: (r / ITER / ".metadata").write_bytes(b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little")), read_run,
        ".metadata"),
    "metadata with a hash that takes for ever": (
        lambda r: (r / ITER / ".metadata").write_bytes(PAIRS_OF_PAIRS), read_run, "a nested value twice"),
    "metadata with keys of one hash": (
        lambda r: a_metadata(r, lambda _: dict.fromkeys(EQUAL_KEYS)), read_run, "keys that no checkpoint needs"),
    "metadata with indices of one hash": (
        lambda r: a_metadata(r, lambda _: {dcp_metadata.MetadataIndex(i): 0 for i in EQUAL_KEYS}), read_run,
        "keys that no checkpoint needs"),
    "metadata with a key that overflows the stack": (
        lambda r: (r / ITER / ".metadata").write_bytes(DEEP_PAIR), read_run, "keys that no checkpoint needs"),
    "metadata with an argument that overflows the stack": (
        lambda r: (r / ITER / ".metadata").write_bytes(DEEP_LAYOUT), read_run, "no checkpoint needs"),
    "metadata with a state that overflows the stack": (
        lambda r: (r / ITER / ".metadata").write_bytes(DEEP_STATE), read_run, "no checkpoint needs"),
    "metadata changes a class": (
        lambda r: (r / ITER / ".metadata").write_bytes(SETS_METHOD), read_run, "changes a class"),
    "metadata with 5,000 columns, some twice": (
        lambda r: a_metadata(r, lambda made: side_by_side(made, 5_000, 9)), read_run, "optimizer.x"),
    "metadata of 200,000 dimensions": (lambda r: a_metadata(r, many_dimensions), read_run, "norm.weight has shape [1"),
    "trainer state with a world of tensors": (
        lambda r: (torch.save({"iteration": 3, "data": {}, "world": torch.zeros(2)},
                              r / ITER / "trainer_state_rank_00000.pt"), (r / ITER / convert.CHECKSUMS).unlink()),
        read_run, "not a trainer's state"),
    "metadata is a pipe": (lambda r: a_fifo(r / ITER / ".metadata"), read_run, ".metadata"),
    "metadata of 64 GB": (lambda r: a_sparse(r / ITER / ".metadata", b"\x80\x04"), read_run, ".metadata"),
    "shard is a pipe": (lambda r: a_fifo(r / ITER / "__0_0.distcp"), read_run, "__0_0.distcp"),
    "shard is a device": (lambda r: a_link(r / ITER / "__0_0.distcp", "/dev/zero"), read_run, "__0_0.distcp"),
    "piece runs code": (lambda r: a_piece(r, torch_zip(pickle.dumps(RunsCode(r), 2))), read_run, "__0_0.distcp"),
    "piece is a bare pickle": (lambda r: a_piece(r, pickle.dumps(RunsCode(r), 2)), read_run, "__0_0.distcp"),
    "trainer state runs code": (
        lambda r: (r / ITER / "trainer_state_rank_00000.pt").write_bytes(torch_zip(pickle.dumps(RunsCode(r), 2))),
        read_run, "trainer_state"),
    "trainer state is a bare pickle": (
        lambda r: (r / ITER / "trainer_state_rank_00000.pt").write_bytes(pickle.dumps(RunsCode(r), 2)), read_run,
        "trainer_state"),
    "trainer state with a hash that takes for ever": (
        lambda r: (r / ITER / "trainer_state_rank_00000.pt").write_bytes(torch_zip(PAIRS_OF_PAIRS)), read_run,
        "trainer_state"),
    "trainer state asks for 2 GB": (
        lambda r: (r / ITER / "trainer_state_rank_00000.pt").write_bytes(
            torch_zip(b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.")), read_run, "trainer_state"),
    "trainer state unpacks to 128 MB": (
        lambda r: (r / ITER / "trainer_state_rank_00000.pt").write_bytes(
            torch_zip(b"\x80\x02X\0\0\0\x08" + b"a" * (1 << 27) + b".", zipfile.ZIP_DEFLATED)), read_run,
        "trainer_state"),
    "trainer state is a pipe": (
        lambda r: a_fifo(r / ITER / "trainer_state_rank_00000.pt"), read_run, "trainer_state"),
    "checksums of a device": (lambda r: (
        a_link(r / ITER / "x", "/dev/zero"),
        (r / ITER / convert.CHECKSUMS).write_text('{"x": {"bytes": 0, "sha256": ""}}')), read_run,
        "x: is missing; take another checkpoint"),
    "checksums of the parent": (lambda r: (
        (r / ITER / convert.CHECKSUMS).write_text('{"..": {"bytes": 4096, "sha256": ""}}')), read_run, "'..'"),
    "tracker is a pipe": (lambda r: a_fifo(r / "run" / convert.TRACKER), read_run, convert.TRACKER),
    "tracker is a device": (lambda r: a_link(r / "run" / convert.TRACKER, "/dev/zero"), read_run, convert.TRACKER),
    "tracker leads out": (lambda r: (r / "run" / convert.TRACKER).write_text("../../x"), read_run, convert.TRACKER),

    "header claims 10 TB": (lambda r: a_header(r, lambda h: h["b"].update(
        shape=[5 * 10**12 // 2], data_offsets=[32, 32 + 10**13])), read_hf, "model.safetensors"),
    "header of 4 GB": (
        lambda r: (r / "hf/model.safetensors").write_bytes((1 << 32).to_bytes(8, "little") + b"{" * 99), read_hf,
        "a header of 4294967296 bytes"),
    "header of 4 GB in a file of 64 GB": (
        lambda r: a_sparse(r / "hf/model.safetensors", (1 << 32).to_bytes(8, "little")), read_hf, "a header of"),
    "header of 2**64 bytes": (
        lambda r: (r / "hf/model.safetensors").write_bytes(b"\xff" * 99), read_hf, "a header of"),
    "tensors overlap": (lambda r: a_header(r, lambda h: h["b"].update(data_offsets=[16, 48])), read_hf, "damaged"),
    "a hole between tensors": (
        lambda r: a_header(r, lambda h: h["b"].update(data_offsets=[40, 72])), read_hf, "damaged"),
    "negative offsets": (lambda r: a_header(r, lambda h: h["a"].update(data_offsets=[-32, 0])), read_hf, "damaged"),
    "offsets backwards": (lambda r: a_header(r, lambda h: h["a"].update(data_offsets=[32, 0])), read_hf, "damaged"),
    "offsets beyond 64 bits": (
        lambda r: a_header(r, lambda h: h["b"].update(data_offsets=[2**64 - 32, 2**64])), read_hf, "damaged"),
    "shapes overflow": (lambda r: a_header(r, lambda h: h["b"].update(shape=[2**62, 2**62])), read_hf, "damaged"),
    "shape beyond torch's": (
        lambda r: a_header(r, lambda h: h["b"].update(shape=[2**63, 0], data_offsets=[32, 32]), b"\0" * 32), read_hf,
        "hf"),
    "shape against bytes": (lambda r: a_header(r, lambda h: h["b"].update(shape=[9])), read_hf, "damaged"),
    "type against bytes": (lambda r: a_header(r, lambda h: h["b"].update(dtype="F64")), read_hf, "damaged"),
    "name twice": (lambda r: a_header(r, lambda h: h.update(
        raw=json.dumps(h).replace('"b"', '"a"').encode())), read_hf, "model.safetensors"),
    "deep header": (lambda r: a_header(r, lambda h: h.update(raw=b"[" * 100_000)), read_hf, "damaged"),
    "weights are a pipe": (lambda r: a_fifo(r / "hf/model.safetensors"), read_hf, "not a regular file"),
    "weights are a device": (lambda r: a_link(r / "hf/model.safetensors", "/dev/zero"), read_hf, "not a regular file"),
    "weights are a pickle": (lambda r: (r / "hf/model.safetensors").rename(r / "hf/pytorch_model.bin"), read_hf,
                             "is a pickle, which can run code"),
    **{f"index names {file!r}": (lambda r, file=file: an_index(r, file), read_hf, "not a file of this directory")
       for file in ("../../etc/passwd", "/etc/passwd", "..", "", "a/../../b", 7, None, ["x"], "x\0", "x" * 999)},
    "index names a pipe": (lambda r: (a_fifo(r / "hf/x"), an_index(r, "x")), read_hf, "x: is not a regular file"),
    "index is a pipe": (lambda r: (an_index(r, "x"), a_fifo(r / "hf" / convert.INDEX)), read_hf, "not a regular file"),
    "index of 64 GB": (lambda r: (an_index(r, "x"), a_sparse(r / "hf" / convert.INDEX, b"{")), read_hf, "bytes"),

    **{f"config: {change}": (lambda r, change=change: a_config(r, **change), read_hf, "config.json")
       for change in (
           {"text": {"num_hidden_layers": 10**9}}, {"text": {"hidden_size": 10**12}}, {"text": {"hidden_size": -56}},
           {"text": {"vocab_size": 9 * 10**7, "hidden_size": 8 * 10**6}, "vision": {"out_hidden_size": 8 * 10**6}},
           {"text": {"num_experts": 9 * 10**7, "moe_intermediate_size": 9 * 10**7}},
           {"text": {"rms_norm_eps": math.nan}}, {"text": {"hidden_size": "56"}}, {"text": {"num_hidden_layers": True}},
           {"text": {"num_key_value_heads": 0}}, {"vision": {"num_heads": 10**7}},
           {"vision": {"patch_size": 9 * 10**7}}, {"vision": {"patch_size": 99}},
           {"vision": {"spatial_merge_size": 9}}, {"vision": {"temporal_patch_size": 9}},
           {"vision": {"spatial_merge_size": 9 * 10**7}}, {"vision": {"num_position_embeddings": 2.5}},
           {"vision": {"deepstack_visual_indexes": [10**30]}}, {"vision": {"depth": 10**300}},
           {"text": {"rope_parameters": {"mrope_section": [-(10**9), 10**9, 12]}}})},
    "config nested 100,000 deep": (lambda r: (r / "hf/config.json").write_text("[" * 100_000), read_hf, "config.json"),
    "config is a pipe": (lambda r: a_fifo(r / "hf/config.json"), read_hf, "not a regular file"),
    "config of 64 GB": (lambda r: a_sparse(r / "hf/config.json", b"{"), read_hf, "config.json: has"),
    "config of a number with 5,000 digits": (
        lambda r: (r / "hf/config.json").write_text('{"x": ' + "9" * 5000 + "}"), read_hf, "config.json"),
    "generation configuration is a pipe": (lambda r: a_fifo(r / "hf/generation_config.json"), read_hf, "regular file"),
    **{f"preprocessor: {change}": (
        lambda r, change=change: (r / "hf/preprocessor_config.json").write_text(json.dumps(change)), read_hf,
        "preprocessor") for change in (
            {"min_pixels": 10**12, "max_pixels": 10**12}, {"size": {"shortest_edge": 10**15}}, {"patch_size": 2**52},
            {"patch_size": 99, "merge_size": 10}, {"merge_size": 9}, {"temporal_patch_size": 9},
            {"image_std": [1e-320] * 3}, {"image_mean": [math.nan] * 3}, {"size": 7}, [7])},
    "preprocessor is a pipe": (lambda r: a_fifo(r / "hf/preprocessor_config.json"), read_hf, "not a regular file"),

    "tokenizer is a pipe": (lambda r: a_fifo(r / "hf/tokenizer.json"), read_hf, "not a regular file"),
    "tokenizer of 64 GB": (lambda r: a_sparse(r / "hf/tokenizer.json", b"{"), read_hf, "tokenizer.json has"),
    "tokenizer nested deep": (lambda r: (r / "hf/tokenizer.json").write_text("[" * 10**6), read_hf, "tokenizer"),
    "tokenizer with a token beyond the vocabulary": (lambda r: a_tokenizer(r, added_tokens=[
        {"id": 4 * 10**9, "content": "<|im_start|>", "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}]), read_hf, "tokenizer.json"),

    "tokenizer that repeats letters": (lambda r: a_tokenizer(r, normalizer={
        "type": "Replace", "pattern": {"String": "a"}, "content": "b" * 10**6}), read_hf, "normalizer Replace"),
    "tokenizer with a slow expression": (lambda r: a_tokenizer(r, pre_tokenizer={
        "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}),
        lambda r: read_row(r, messages=[{"role": "user", "content": "a" * 5000 + "!"},
                                        {"role": "assistant", "content": "b"}]), "cannot be tokenized"),
    "tokenizer that doubles bytes": (lambda r: a_tokenizer(r, pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}] * 24}), read_hf,
        "the pre_tokenizers ['ByteLevel'"),
    "tokenizer that draws lots": (lambda r: a_tokenizer(r, model=json.loads(
        (r / "hf/tokenizer.json").read_text())["model"] | {"dropout": 0.5}), read_hf, "dropout of 0.5"),

    "dataset is a pipe": (lambda r: a_fifo(r / "rows.json"), read_rows, "not a regular file"),
    "dataset is a device": (lambda r: a_link(r / "rows.json", "/dev/zero"), read_rows, "not a regular file"),
    "row of 64 GB": (lambda r: a_sparse(r / "rows.json", b'{"messages": "'), read_rows, "longer than 16 MB"),
    "element of 100 MB": (
        lambda r: (r / "rows.json").write_bytes(b'[{"messages": "' + b"a" * 10**8), read_rows, "longer than 16 MB"),
    "row of 5 million characters": (lambda r: None, lambda r: read_row(r, messages=[
        {"role": "user", "content": "a" * 5 * 10**6}, {"role": "assistant", "content": "b"}]),
        "5000001 characters of text"),
    "row of 5,000 pictures": (lambda r: None, lambda r: read_row(r, images=["a.png"] * 5000), "5000 pictures"),
    "blank dataset of 64 GB": (lambda r: (
        (r / "rows.json").write_bytes(b" " * (1 << 27) + b"x")), read_rows, "begins with"),

    "picture is PostScript": (
        lambda r: (r / "x.jpg").write_bytes(EPS), lambda r: read_row(r, images=["x.jpg"]), "x.jpg cannot be read"),
    "picture is a pipe": (lambda r: a_fifo(r / "x.jpg"), lambda r: read_row(r, images=["x.jpg"]), "not a file"),
    "picture of 10**9 pixels": (
        lambda r: (r / "x.ppm").write_bytes(b"P6 40000 40000 255\n" + b"x" * 99),
        lambda r: read_row(r, images=["x.ppm"]), "decompression bomb"),
    "animation of 10**10 pixels": (
        lambda r: (r / "x.gif").write_bytes(b"GIF89a" + struct.pack("<HH", 9000, 9000) + b"\0\0\0" + 125 * (
            b"\x2c\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0") + b";"),
        lambda r: read_row(r, videos=["x.gif"]), "125 frames of 9000x9000 pixels"),
    "picture linked from elsewhere": (
        lambda r: a_link(r / "x.jpg", "/etc/passwd"), lambda r: read_row(r, images=["x.jpg"]), "--confine-paths"),
    "frames linked from elsewhere": (
        lambda r: a_link(r / "frames/3.png", "/etc/passwd"), lambda r: read_row(r, videos=["frames"]),
        "--confine-paths"),
    "path out of the folder": (lambda r: None, lambda r: read_row(r, images=["../../etc/passwd"]), "--confine-paths"),
    "absolute path": (lambda r: None, lambda r: read_row(r, videos=["/etc"]), "--confine-paths"),
    "video is a playlist": (
        lambda r: (r / "x.mp4").write_text("ffconcat version 1.0\nfile v.gif\n"),
        lambda r: read_row(r, videos=["x.mp4"]), "x.mp4"),
    "video is a list of addresses": (
        lambda r: (r / "x.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n"),
        lambda r: read_row(r, videos=["x.mp4"]), "x.mp4"),
}


@pytest.mark.parametrize("case", POISONED)
def test_poisoned_files_give_clean_errors(case: str, tmp_path):
    make, read, named = POISONED[case]
    make_valid(tmp_path)
    make(tmp_path)
    with limits():
        peak = memory_peak()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with pytest.raises(CLEAN) as caught:
                read(tmp_path)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        more = peak()
    assert named in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 3000
    assert not (tmp_path / "ran").exists()
    assert Path("/a").is_relative_to("/")  # the class is as it was
    assert more < 400, f"{more:.0f} MB"


def test_the_valid_files_are_read(tmp_path):
    """What `POISONED` starts from has no fault of its own."""
    make_valid(tmp_path)
    for read in read_hf, read_run, lambda r: read_row(r, images=["a.png"], videos=["frames"]):
        read(tmp_path)


def test_a_tokenizer_neither_cuts_nor_fills_up(tmp_path):
    make_valid(tmp_path)
    ids = data.Processor(tmp_path / "hf").encode(ROWS[5], media_dir=tmp_path).input_ids
    a_tokenizer(tmp_path, truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
                padding={"strategy": {"Fixed": 2 * 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                         "pad_id": 0, "pad_type_id": 0, "pad_token": "x"})
    assert data.Processor(tmp_path / "hf").encode(ROWS[5], media_dir=tmp_path).input_ids.tolist() == ids.tolist()


def test_code_beside_a_model_is_not_run(tmp_path):
    """The equivalent of trust_remote_code=False: `auto_map` and the files that it names mean nothing here."""
    make_valid(tmp_path)
    a_config(tmp_path, auto_map={"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None]})
    (tmp_path / "hf/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    read_hf(tmp_path)
    assert not (tmp_path / "ran").exists() and "evil" not in sys.modules


# ---- running the damaged ones --------------------------------------------------------------------------------------


def shares(count: int) -> int:
    """Inputs of the short form."""
    return max(60, count // 50)


@pytest.mark.parametrize("kind", TARGETS, ids=lambda kind: kind.__name__)
def test_damaged_files_give_clean_errors(kind: type[Target], tmp_path):
    make_valid(tmp_path)
    count = shares(TARGETS[kind])
    refused, megabytes_more = fuzz(kind, tmp_path, range(count))
    assert 0 < refused < count  # else the mutations are too weak, or too strong, to show anything
    assert megabytes_more < MEGABYTES


@pytest.mark.slow
def test_a_hundred_thousand_damaged_files(tmp_path, capsys):
    make_valid(tmp_path)
    for kind, count in TARGETS.items():
        began = time.monotonic()
        refused, more = fuzz(kind, tmp_path, range(300_000, 300_000 + count))
        assert 0 < refused < count and more < MEGABYTES
        with capsys.disabled():
            print(f"\n{kind.__name__:13} {count:7,d} inputs, {refused:7,d} refused, the rest read; "
                  f"{more:4.0f} MB, {time.monotonic() - began:4.0f} s", end="", flush=True)
    with capsys.disabled():
        print(f"\n{'in all':13} {sum(TARGETS.values()):7,d} inputs: no traceback, no hang", flush=True)
    assert sum(TARGETS.values()) >= 100_000


if __name__ == "__main__":
    chosen = next(kind for kind in TARGETS if kind.__name__.lower() == sys.argv[1].lower())
    with tempfile.TemporaryDirectory() as folder:
        make_valid(Path(folder))
        print(fuzz(chosen, Path(folder), [int(number) for number in sys.argv[2:]]))
