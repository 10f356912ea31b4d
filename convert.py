"""Weights and checkpoints: Hugging Face safetensors <-> model <-> DCP, crash-safe saves, and the two conversions.

A *source* is a directory of stored weights, opened without reading them: `tensors` says each one's type and shape, and
`read(name, offset, sizes)` brings one window. `HuggingFaceWeights` (safetensors) and `CheckpointWeights` (DCP) are the
two; loading a model, resharding and both conversions are windows copied from one of them, so that nobody holds more
than a piece. Files are memory-mapped: what is read of them is page cache, not the process's own memory.

What is written is torch.distributed.checkpoint's format (`dcp.load` reads it): tensors in pieces of at most
`CHUNK_BYTES`, parameters under their Hugging Face names, optimizer state as `optimizer.exp_avg.NAME`. Beside it
`checksums.json`, and each rank's `trainer_state_rank_00000.pt`. A stranger's pickle runs no code: see `read_metadata`.

    python convert.py hf_to_dcp --hf_dir DIR --dcp_dir DIR
    python convert.py dcp_to_hf --load_dir ITER_DIR --save_dir DIR --model_assets_dir HF_DIR
    python convert.py verify DIR
"""
from __future__ import annotations

import contextlib
import copy
import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import math
import os
import pickle
import pickletools
import re
import reprlib
import shutil
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from tqdm import tqdm

import kernels_npu
from common import InputError, Parser, is_peer_failure, number, read_json, run_program
from model import Qwen3VLConfig, build_model
from parallel import local_shard_and_offset

CHUNK_BYTES = 16 << 20
METADATA_BYTES = 256 << 20  # of .metadata; 235B's with its optimizer has 40 MB
HEADER_BYTES = 16 << 20  # of a safetensors file; 235B's files have a few KB
ASSET_BYTES = 64 << 20  # of a tokenizer, say, which has 11 MB
TRACKER = "latest_checkpointed_iteration.txt"
CHECKSUMS = "checksums.json"
INDEX = "model.safetensors.index.json"
SAFETENSORS_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EXPERTS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
LAYOUT = {"expert_layout": "published"}  # in the header of what we write, for square experts (see `fit`)

TensorInfo = tuple[torch.dtype, torch.Size]  # what a source knows of a tensor without reading it
TensorChunk = tuple[str, torch.Size, tuple[int, ...], Tensor]  # of a tensor: its name, its whole shape, offset, values

logger = logging.getLogger(__name__)


# ---- windows into tensors ------------------------------------------------------------------------------------------


def _slices(offset: Iterable[int], sizes: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))


def _row_chunks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, sizes) of runs of rows that are at most CHUNK_BYTES (a longer single row stays whole)."""
    if not shape:
        yield (), ()
    elif 0 not in shape:
        rows = max(1, CHUNK_BYTES // (math.prod(shape[1:]) * itemsize))
        for start in range(0, shape[0], rows):
            yield (start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:])


def _local_pieces(tensor: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """This rank's part of a DTensor, or all of a plain tensor: (where it begins in the whole, view) of its pieces."""
    local, origin = local_shard_and_offset(tensor)
    for offset, sizes in _row_chunks(local.shape, local.element_size()):
        yield tuple(a + b for a, b in zip(origin, offset, strict=True)), local[_slices(offset, sizes)]


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds: the model's parameters and persistent buffers by name, tied weights once."""
    names = model.state_dict().keys()  # FSDP2 reshards here; after a no_grad forward the parameters were gathered
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in tensors if name in names}


def _fill(target: Tensor, source: HuggingFaceWeights | CheckpointWeights, name: str) -> None:
    """Read this rank's part of the stored tensor into `target`, converting it to the target's type."""
    for offset, part in _local_pieces(target):
        part.copy_(source.read(name, offset, part.shape))


def load_weights(model: nn.Module, source: HuggingFaceWeights | CheckpointWeights | None, seed: int = 0) -> None:
    """Fill every parameter and persistent buffer, plain or DTensor, in its own type. A rank reads its own slices only.

    `source` has passed `check_compatible(model)`. Tensors that it lacks get their initial values from `seed`; without a
    source, all do. Raises InputError for damaged files.
    """
    tensors = stored_tensors(model)
    absent = tensors.keys() - (source.tensors.keys() if source is not None else set())
    if absent:
        model.init_weights(seed, local_shard_and_offset, names=absent)
    for name, tensor in tensors.items():
        if name not in absent:
            _fill(tensor, source, name)


# ---- sources -------------------------------------------------------------------------------------------------------


def _is_file_name(name: object) -> bool:
    """Whether this is the name of a file of the same directory, and no path out of it."""
    good = isinstance(name, str) and os.path.basename(name) == name not in ("", ".", "..")
    return good and len(name) < 256 and "\0" not in name


def _short(name: object) -> str:
    """A stranger's name for an error's one line."""
    return str(name)[:200]


_LAYER = re.compile(r"model\.(?:language_model\.layers|visual\.blocks|visual\.deepstack_merger_list)\.\d+")


def _check_names_and_shapes(tensors: dict[str, TensorInfo], model: nn.Module, where: Path) -> None:
    """Compare the names and shapes in a source with the model's. Raises InputError.

    Two kinds of unknown tensors are accepted and stay unread: layers beyond config.json's depth, because editing it is
    how users cut a model, and the lm_head.weight that some tied checkpoints hold beside the embedding.
    """
    expected = {name: tensor.shape for name, tensor in stored_tensors(model).items()}
    layers = {name: m[0] for name in [*tensors, *expected] if (m := _LAYER.match(name))}
    cut = set(layers.values()) - {layers.get(name) for name in expected}
    missing = [name for name in expected if name not in tensors and not model.may_be_absent(name)]
    unknown = [name for name in tensors
               if name not in expected and name != "lm_head.weight" and layers.get(name) not in cut]
    problems = [f"{len(names)} {what}: {', '.join(name[:200] for name in names[:3])}{', ...' if len(names) > 3 else ''}"
                for what, names in (("missing", missing), ("unknown", unknown)) if names]
    if problems:
        raise InputError(f"{where}: its tensors are not those of the model that config.json describes: "
                         f"{'; '.join(problems)}; take the config.json that belongs to these weights")
    if cut:
        logger.warning("%s: %d layers are not in config.json and stay unread", where, len(cut))
    for name, shape in expected.items():
        if name in tensors and tensors[name][1] != shape:
            raise InputError(f"{where}: {name} has shape {_short(list(tensors[name][1]))}, "
                             f"config.json makes it {list(shape)}")


def hf_has_weights(hf_dir: str | Path) -> bool:
    """Whether a Hugging Face directory holds safetensors (one file, or an index of several)."""
    return any((Path(hf_dir) / name).exists() for name in ("model.safetensors", INDEX))


class HuggingFaceWeights:
    """The safetensors of a Hugging Face directory. Raises InputError for what is missing, truncated or inconsistent."""

    def __init__(self, hf_dir: str | Path):
        self.path = Path(hf_dir)
        self.files = self._files()  # file name -> names of its tensors, in stored order
        self.tensors: dict[str, TensorInfo] = {}
        self._slices = {}
        self._transposed: set[str] = set()
        self._published = True  # every file says so
        for file, names in self.files.items():
            try:
                self._check_header(self.path / file)
                handle = safe_open(self.path / file, "pt")
                self._published &= LAYOUT.items() <= (handle.metadata() or {}).items()
                stored = set(handle.keys())
                names = self.files[file] = names or sorted(stored)
                for name in names:
                    if name not in stored:
                        raise InputError(f"{self.path / file}: lacks {_short(name)}, which {INDEX} says is there")
                    self._slices[name] = view = handle.get_slice(name)
                    if view.get_dtype() not in SAFETENSORS_TYPES:
                        raise InputError(
                            f"{self.path / file}: {_short(name)} is {view.get_dtype()}; only weights in "
                            f"{', '.join(SAFETENSORS_TYPES)} can be used, not quantised ones")
                    self.tensors[name] = SAFETENSORS_TYPES[view.get_dtype()], torch.Size(view.get_shape())
            except SafetensorError as e:  # the header must cover the file exactly, so this is where truncation shows
                raise InputError(f"{self.path / file}: is damaged or incomplete ({str(e)[:300]}); "
                                 "download it again") from e
            except (OSError, OverflowError, UnicodeError) as e:
                raise InputError(f"{self.path / file}: cannot be read ({e}); download it again") from e

    @staticmethod
    def _check_header(path: Path) -> None:
        """The library reads a header whatever its length, and would wait for ever for a pipe's."""
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES:
            raise InputError(f"{path}: is damaged (a header of {length} bytes); download it again")

    def _files(self) -> dict[str, list[str]]:
        if (self.path / "model.safetensors").exists():
            return {"model.safetensors": []}
        index = self.path / INDEX
        if not index.exists():
            pickles = [*self.path.glob("pytorch_model*.bin")]
            raise InputError(f"{pickles[0]}: is a pickle, which can run code; only safetensors are read" if pickles else
                             f"{self.path}: holds no weights (neither model.safetensors nor {INDEX})")
        files: dict[str, list[str]] = {}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: has no weight_map; download it again")
        for name, file in weight_map.items():
            if not _is_file_name(file):
                raise InputError(f"{index}: {_short(name)} is said to be in {_short(repr(file))}, "
                                 "which is not a file of this directory")
            files.setdefault(file, []).append(name)
        return files

    def check_compatible(self, model: nn.Module) -> HuggingFaceWeights:
        """Compare names and shapes with the model's, find the layout of the experts, and return self.

        Published checkpoints and transformers 4 store [E, D, 2I] and [E, I, D]; transformers 5 writes [E, 2I, D] and
        [E, D, I] under the same names. A square tensor (2I == D or I == D) cannot tell, and its neighbour is no
        evidence either: transformers 5 turns a published checkpoint's other experts on loading, but never square ones,
        and then saves both (huggingface/transformers#47031). What `dcp_to_hf` has written says its layout.
        """
        for name, tensor in stored_tensors(model).items():
            if name.endswith(EXPERTS) and name in self.tensors and not self._published:
                shape, (dtype, stored) = tensor.shape, self.tensors[name]
                turned = torch.Size((shape[0], shape[2], shape[1]))
                if stored == shape == turned:
                    raise InputError(
                        f"{self.path}: {name} is square, {list(shape)}: its shape cannot tell the published layout "
                        "from transformers 5's transposed one; change moe_intermediate_size or hidden_size")
                if stored == turned:
                    self._transposed.add(name)
                    self.tensors[name] = dtype, shape
        _check_names_and_shapes(self.tensors, model, self.path)
        return self

    def read(self, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """One window of a tensor, in the published layout; it may be a view of the mapped file: do not write to it."""
        window = _slices(offset, sizes)
        if name in self._transposed:
            return self._slices[name][window[0], window[2], window[1]].transpose(1, 2)
        return self._slices[name][window]


_DCP_CLASSES = {  # all that the pickle of a DCP checkpoint's description needs
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype))},
    "pathlib": {"PosixPath"},
}


_DCP_DATA = (_StorageInfo, *(getattr(dcp_metadata, name) for name in _DCP_CLASSES[dcp_metadata.__name__]
                             if name != "_MEM_FORMAT_ENCODING"))


class _MetadataUnpickler(pickle._Unpickler):  # Python's own: in the C one a few bytes can take all memory for its memo
    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self.hashes: set[int] = set()

    def find_class(self, module: str, name: str):
        if name not in _DCP_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)

    def check(self, code: int) -> None:
        """Before an operation: attributes set on a class would change this process, and a function in the place of a
        method would be called; hashes of tuples in tuples can overflow the stack, and keys of one hash take for ever.
        """
        first, last = self.stack[-2:] if code != pickle.SETITEMS[0] else (None, None)
        bad = False
        if code == pickle.BUILD[0] and type(first) is not dcp_metadata.TensorProperties:
            bad = type(first) not in _DCP_DATA or type(last) is not dict or any(map(callable, last.values()))
        elif code in (pickle.REDUCE[0], pickle.NEWOBJ[0]) and first is not torch.Size:
            bad = any(isinstance(part, (tuple, dcp_metadata.MetadataIndex)) for part in last)
        for key in self.stack[::2] if code == pickle.SETITEMS[0] else [first] if code == pickle.SETITEM[0] else ():
            if type(key) is not str:
                bad = (bad or type(key) is not dcp_metadata.MetadataIndex or type(key.fqn) is not str
                       or type(key.offset) not in (torch.Size, type(None)) or hash(key) in self.hashes)
                self.hashes.add(0 if bad else hash(key))
        if bad:
            raise pickle.UnpicklingError("it changes a class or has keys that no checkpoint needs")
        pickle._Unpickler.dispatch[code](self)

    def load_again(self, code: int) -> None:
        """Brings something a second time. Pairs of pairs of pairs made so have hashes that take for ever."""
        pickle._Unpickler.dispatch[code](self)
        again, nested = self.stack[-1], (tuple, list, dict, *_DCP_DATA)
        if isinstance(again, nested[1:]) or isinstance(again, tuple) and (
                len(again) > 64 or any(isinstance(part, nested) for part in again)):
            raise pickle.UnpicklingError("it has a nested value twice, which no checkpoint needs")

    for _op in (pickle.GET, pickle.BINGET, pickle.LONG_BINGET, pickle.DUP):
        dispatch[_op[0]] = functools.partial(lambda code, self: self.load_again(code), _op[0])
    for _op in (pickle.BUILD, pickle.REDUCE, pickle.NEWOBJ, pickle.SETITEM, pickle.SETITEMS):
        dispatch[_op[0]] = functools.partial(lambda code, self: self.check(code), _op[0])
    for _op in (pickle.DICT, pickle.EMPTY_SET, pickle.FROZENSET, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX):
        del dispatch[_op[0]]  # which no checkpoint needs


def read_metadata(directory: Path) -> dcp_metadata.Metadata:
    """DCP's description of a checkpoint: a pickle, read admitting only the plain classes that DCP writes into it."""
    path = directory / ".metadata"
    try:
        if path.exists() and not path.is_file():
            raise TypeError("it is not a regular file")
        if path.stat().st_size > METADATA_BYTES:
            raise ValueError(f"it has more than {METADATA_BYTES} bytes")
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()  # in memory no length can be overstated
        if not isinstance(metadata, dcp_metadata.Metadata):
            raise TypeError(f"it holds a {type(metadata).__name__}")
        return metadata
    except FileNotFoundError as e:
        raise InputError(f"{directory}: is not a checkpoint (it has no .metadata)") from e
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise _damaged(path, f"is damaged or not a DCP checkpoint's ({str(e)[:300]})") from e


def _checksums(directory: Path) -> dict[str, dict]:
    """What checksums.json says of each file; nothing where there is none. Raises InputError."""
    records = read_json(directory / CHECKSUMS) if (directory / CHECKSUMS).exists() else {}
    for name, record in records.items():
        fields = (record.get("bytes"), record.get("sha256")) if isinstance(record, dict) else ()
        if not _is_file_name(name) or [type(field) for field in fields] != [int, str] or not 0 <= fields[0] < 2**63:
            raise InputError(f"{directory / CHECKSUMS}: its entry {_short(repr(name))} is damaged")
    return records


def _wrong_sizes(directory: Path, records: dict[str, dict]) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) of the files that are not there or have another size than they were written with."""
    for name, record in records.items():
        size = (directory / name).stat().st_size if os.path.isfile(directory / name) else None
        if size != record["bytes"]:
            yield name, "is missing" if size is None else f"is damaged ({size} of {record['bytes']} bytes)"


def _damaged(file: Path, what: str) -> InputError:
    """The error for a checkpoint's file. It names the run's other iterations, of which only the user takes one."""

    def whole(iteration: Path) -> bool:
        try:
            return not any(_wrong_sizes(iteration, _checksums(iteration)))
        except InputError:
            return False

    here = file.parent.resolve()
    others = [d for d in reversed(_iterations(here.parent).values()) if d != here and (d / ".metadata").exists()]
    instead = " or ".join(f"--load {d}" for d in list(filter(whole, others))[:3])
    return InputError(f"{file}: {what}; take another checkpoint" + f": {instead}" * bool(instead))


def _check_contents(file: Path, records: dict[str, dict]) -> None:
    """Of a small file, which is read whole anyway."""
    if file.name in records and hashlib.sha256(file.read_bytes()).hexdigest() != records[file.name]["sha256"]:
        raise _damaged(file, "has other contents than were written")


def _is_whole(shape: torch.Size, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether (offset, sizes) fill a tensor, no two on one place. They do if the corners of the boxes, with signs that
    change along each edge, sum at every point to the corners of the whole. They are sorted, not in a dict: hashes of
    tuples can be made equal. At most three dimensions may be cut: there are 2**dimensions corners."""
    if any({len(at), len(sizes)} != {len(shape)} or any(n < 0 for n in sizes) for at, sizes in boxes):
        return False
    if 0 in shape:
        return all(0 in sizes for _, sizes in boxes)
    cut = [i for i, whole in enumerate(shape) if any((at[i], sizes[i]) != (0, whole) for at, sizes in boxes)]
    if len(cut) > 3:
        return False
    corners = []
    for sign, at, sizes in [(-1, [0] * len(shape), shape), *((1, *box) for box in boxes)]:
        for ends in itertools.product((0, 1), repeat=len(cut)):
            point = tuple(at[i] + sizes[i] * end for i, end in zip(cut, ends, strict=True))
            corners.append((point, sign * (-1) ** sum(ends)))
    corners.sort()
    return not any(sum(sign for _, sign in same) for _, same in itertools.groupby(corners, key=lambda c: c[0]))


class CheckpointWeights:
    """A DCP directory. Opening it checks that every tensor is whole, every file of its size and every piece inside."""

    def __init__(self, directory: str | Path):
        self.path = Path(directory)
        metadata = read_metadata(self.path)
        self._records = _checksums(self.path)
        for name, what in _wrong_sizes(self.path, self._records):
            raise _damaged(self.path / name, what)
        _check_contents(self.path / ".metadata", self._records)
        self.tensors: dict[str, TensorInfo] = {}
        self._chunks: dict[str, list[tuple[torch.Size, torch.Size, _StorageInfo]]] = {}
        lengths: dict[str, int] = {}
        try:
            for name, tensor in metadata.state_dict_metadata.items():
                if not isinstance(tensor, dcp_metadata.TensorStorageMetadata):
                    continue  # objects of other tools: they are pickles, and stay unread
                self.tensors[name] = tensor.properties.dtype, tensor.size
                if [type(part) for part in self.tensors[name]] != [torch.dtype, torch.Size]:
                    raise TypeError(f"{name[:200]} has no type or no shape")
                if any(type(part) is not torch.Size for c in tensor.chunks for part in (c.offsets, c.sizes)):
                    raise TypeError(f"{name[:200]} has pieces without a place")
                places = [metadata.storage_data[dcp_metadata.MetadataIndex(name, c.offsets)] for c in tensor.chunks]
                self._chunks[name] = [(c.offsets, c.sizes, at) for c, at in zip(tensor.chunks, places, strict=True)]
                for _, _, info in self._chunks[name]:
                    if not _is_file_name(info.relative_path):
                        raise ValueError(f"{reprlib.repr(info.relative_path)} is not a file of this directory")
                    lengths[info.relative_path] = max(lengths.get(info.relative_path, 0), info.offset + info.length)
                if not _is_whole(tensor.size, [(c.offsets, c.sizes) for c in tensor.chunks]):
                    raise ValueError(f"{name[:200]} {list(tensor.size)} is not whole")
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise _damaged(self.path / ".metadata", f"is damaged ({_short(e)})") from e
        for file, length in lengths.items():
            if not os.path.isfile(self.path / file):
                raise _damaged(self.path / file, "is missing")
            if (size := (self.path / file).stat().st_size) < length:
                raise _damaged(self.path / file, f"is damaged ({size} of {length} bytes)")

    def check_compatible(self, model: nn.Module) -> CheckpointWeights:
        """Compare names and shapes with the model's, and return self. Raises InputError."""
        weights = {name: info for name, info in self.tensors.items() if not name.startswith("optimizer.")}
        _check_names_and_shapes(weights, model, self.path)
        return self

    def read(self, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """One window of a tensor, put together from the pieces that overlap it."""
        window = torch.empty(sizes, dtype=self.tensors[name][0])
        for at, shape, info in self._chunks[name]:
            begin = [max(a, b) for a, b in zip(offset, at, strict=True)]
            counts = [min(a + n, b + m) - c for a, n, b, m, c in zip(offset, sizes, at, shape, begin, strict=True)]
            if all(n > 0 for n in counts):
                piece = self._piece(name, shape, info, all(counts[i] == n for i, n in enumerate(shape)))
                piece = piece[_slices((a - b for a, b in zip(begin, at, strict=True)), counts)]
                window[_slices((a - b for a, b in zip(begin, offset, strict=True)), counts)] = piece
        return window

    def _piece(self, name: str, shape: torch.Size, info: _StorageInfo, all_is_read: bool) -> Tensor:
        """A stored piece as a view of the mapped file: torch.save wrote it, a zip with the values uncompressed. Its
        checksum is compared where all of it is read anyway, and where we wrote it (others may leave theirs out)."""
        path = self.path / info.relative_path
        with open(path, "rb") as file:
            try:
                view = _Part(file, info.offset, info.length)
                form = _load_plain(view, "meta")
                if (form.shape, form.dtype) != (shape, self.tensors[name][0]) or not form.is_contiguous():
                    raise ValueError(f"it holds {form.dtype} {list(form.shape)}")
                view.seek(0)
                start = info.offset + torch._C.PyTorchFileReader(view).get_record_offset("data/0")
                start += form.storage_offset() * form.itemsize
                mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
                raw = mapped[start : start + form.nbytes]
                if all_is_read and self._records:
                    behind = mapped[start + form.nbytes :][:8].numpy().tobytes()  # zip's descriptor: a mark, the CRC
                    if behind[:4] == b"PK\7\10" and behind[4:] != zlib.crc32(raw.numpy()).to_bytes(4, "little"):
                        raise ValueError("its values are not those that were written")
                return (raw if start % form.itemsize == 0 else raw.clone()).view(form.dtype).view(shape)
            except Exception as e:  # nearly anything; torch's own words advise running the file's code
                raise _damaged(path, f"the piece of {name} at byte {info.offset} is damaged") from e


class _Part(io.RawIOBase):
    """Some of a file's bytes as a file (DCP's own `_create_file_view` is wrong about places counted from the end)."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer) -> int:
        self._file.seek(self._start + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += count
        return count


def _load_plain(file: BinaryIO, device: str) -> object:
    """torch.load of tensors in plain containers, without what can take far more memory than the file has bytes:
    compression (torch.save does not compress) and bytearray(10**9), which weights_only admits. Raises nearly anything.
    """
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            name, is_pickle = entry.filename, entry.filename.endswith("data.pkl")
            if entry.compress_type != zipfile.ZIP_STORED or is_pickle and entry.file_size > 1 << 20:
                raise ValueError(f"{name} is compressed or too large")
            tuples, before = set(), ""
            for op, arg, _ in pickletools.genops(archive.read(entry)) if is_pickle else ():
                if "GLOBAL" in op.name and not re.fullmatch(_PLAIN, str(arg)):
                    raise ValueError(f"it names {arg}")
                if op.name in ("DUP", "MEMOIZE") or "GET" in op.name and arg in tuples:  # see `load_again`
                    raise ValueError("it has a tuple twice")
                if "PUT" in op.name and before.startswith("TUPLE"):
                    tuples.add(arg)
                before = op.name
    file.seek(0)
    return torch.load(file, map_location=device, weights_only=True)


_PLAIN = r"torch\._utils _rebuild_tensor_v2|torch \w+Storage|collections OrderedDict"


# ---- writing -------------------------------------------------------------------------------------------------------


class _HashedFile:
    """A new file, on the disk when its `with` block ends; its entry for checksums.json is in `files` then."""

    def __init__(self, path: Path, files: dict[str, dict]):
        self.path, self.size, self._hash, self._files = path, 0, hashlib.sha256(), files

    def __enter__(self) -> _HashedFile:
        self._file = open(self.path, "xb")
        return self

    def write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self.size += self._file.write(data)

    def __exit__(self, *exception) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._files[self.path.name] = {"bytes": self.size, "sha256": self._hash.hexdigest()}


def _write_bytes(path: Path, data: bytes, files: dict[str, dict]) -> None:
    with _HashedFile(path, files) as file:
        file.write(data)


def _write_shard(path: Path, pieces: Iterable[TensorChunk], files: dict[str, dict]) -> list[tuple]:
    """Writes one after the other. Returns what `_write_metadata` needs."""
    entries = []
    with _HashedFile(path, files) as file:
        for name, whole, offset, values in pieces:
            file.write(b"\0" * (-file.size % 64))  # aligned, so that a reader can map the values
            start = file.size
            buffer = io.BytesIO()  # torch.save straight into a file hides why a write failed
            torch.save(values.cpu().clone(memory_format=torch.contiguous_format), buffer)  # without what is around it
            file.write(buffer.getbuffer())
            info = _StorageInfo(path.name, start, file.size - start)
            entries.append((name, values.dtype, whole, torch.Size(offset), values.shape, info))
    return entries


def _write_metadata(directory: Path, entries: list[tuple], files: dict[str, dict]) -> None:
    """The `.metadata` that makes a DCP checkpoint of written shards."""
    tensors: dict[str, dcp_metadata.TensorStorageMetadata] = {}
    storage = {}
    for name, dtype, whole, offset, shape, info in entries:
        empty = dcp_metadata.TensorStorageMetadata(dcp_metadata.TensorProperties(dtype=dtype), whole, [])
        chunks = tensors.setdefault(name, empty).chunks
        storage[dcp_metadata.MetadataIndex(name, offset, len(chunks))] = info
        chunks.append(dcp_metadata.ChunkStorageMetadata(offset, shape))
    _write_bytes(directory / ".metadata", pickle.dumps(dcp_metadata.Metadata(tensors, storage_data=storage)), files)


def _sync(directory: Path) -> None:
    """Flushes a directory's names to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """A directory with all in it; of a link, the link alone."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _begin(final: Path, family: str | None = None) -> Path:
    """An empty directory to write `final` in. Clears up after killed writers of it (or of all that match `family`)."""
    final.parent.mkdir(parents=True, exist_ok=True)
    family = family or glob.escape(final.name)
    for left in final.parent.glob(f".tmp_{family}"):
        _remove(left)
    for aside in final.parent.glob(f".old_{family}"):
        replaced = aside.with_name(aside.name.removeprefix(".old_"))
        _remove(aside) if os.path.lexists(replaced) else os.rename(aside, replaced)
    partial = final.with_name(f".tmp_{final.name}")
    partial.mkdir()
    return partial


def write_tracker(directory: Path, text: str) -> None:
    """Says which iteration is the newest, or 'release'."""
    temporary = directory / f".tmp_{TRACKER}"
    temporary.unlink(missing_ok=True)
    _write_bytes(temporary, text.encode(), {})
    os.replace(temporary, directory / TRACKER)
    _sync(directory)


def _complete(partial: Path, final: Path, files: dict[str, dict], tracker: str | None = None) -> None:
    """The promise: a directory is complete or it is not there, whatever happens.

    The files are already on the disk (`_HashedFile`). Their sizes are checked, the checksums written, the names
    flushed; only then is the directory renamed to its real name, and only then does the tracker point to it.
    """
    for name, what in _wrong_sizes(partial, files):
        raise InputError(f"{partial / name}: {what} after it was written: it must be on storage that every node "
                         "shares")
    _write_bytes(partial / CHECKSUMS, json.dumps(files, indent=1, sort_keys=True).encode(), {})
    _sync(partial)
    aside = final.with_name(f".old_{final.name}")
    if os.path.lexists(final):
        os.rename(final, aside)  # find_checkpoint takes it from there if we die before the next line
    os.rename(partial, final)
    _sync(final.parent)
    if tracker is not None:
        write_tracker(final.parent, tracker)
    with contextlib.suppress(OSError):
        _remove(aside)


@contextlib.contextmanager
def _building(final: Path, nbytes: int, tracker: str | None = None) -> Iterator[tuple[Path, dict, tqdm]]:
    """A conversion's output: (the directory to write in, its files' entries for checksums.json, a bar of bytes done).
    Complete when the block ends, gone if it fails."""
    there = next(d for d in final.parents if d.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise InputError(f"{there}: {nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
    partial = _begin(final)
    try:
        files: dict[str, dict] = {}
        with tqdm(total=nbytes, desc=final.name, unit="B", unit_scale=True) as bar:
            yield partial, files, bar
        _complete(partial, final, files, tracker)
    except OSError as e:
        raise InputError(f"{final}: cannot be written ({e.strerror or e}); nothing is left of it") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- a training run's checkpoints ----------------------------------------------------------------------------------


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _run_synced(action: Callable[[], object], group: dist.ProcessGroup | None, on_rank_0: bool = False) -> list:
    """Runs `action` on every rank (or on rank 0 alone) and gathers the results. If it fails on one it raises on all:
    no rank goes on to wait for another that will not come."""
    result = problem = cause = None
    try:
        if _rank() == 0 or not on_rank_0:
            result = action()
    except Exception as e:  # whatever it is: the others wait for this rank's word
        problem, cause = f"{e} (rank {_rank()})" if dist.is_initialized() else str(e), e
    outcomes = [(result, problem)]
    if dist.is_initialized():
        outcomes *= dist.get_world_size()
        dist.all_gather_object(outcomes, (result, problem), group)
    for _, problem in outcomes:
        if problem is not None:
            raise InputError(problem) from cause
    return [value for value, _ in outcomes]


def _own_pieces(model: nn.Module, optimizer: Optimizer | None) -> Iterator[TensorChunk]:
    """What this rank writes: its part of every DTensor (replicas take turns), and on rank 0 the plain tensors."""
    state = stored_tensors(model)
    for name, tensor in list(state.items()):
        values = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        state |= {f"optimizer.{key}.{name}": value for key, value in values.items()}
    for i, (name, tensor) in enumerate(state.items()):
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            places = zip(mesh.get_coordinate(), mesh.shape, tensor.placements, strict=True)
            mine = all(at == i % n for at, n, placement in places if placement.is_replicate())
        else:
            mine = _rank() == 0
        for offset, part in _local_pieces(tensor) if mine else ():
            yield name, tensor.shape, offset, part


def save_checkpoint(
    save_dir: str | Path, iteration: int, model: nn.Module, optimizer: Optimizer | None = None,
    trainer_state: dict | None = None, retain: int | None = None,
) -> Path:
    """Writes `save_dir/iter_XXXXXXX` and points the tracker to it; every rank calls it. Returns the directory.

    `trainer_state` is this rank's: plain types and tensors, "iteration" (an int) and "data" (a dict) among them.
    `retain`: of the iterations up to this one keep the newest N. Whatever happens, the directory is complete or it is
    not there (see `_complete`), and a failure on one rank (a full disk, say) raises InputError on all of them, with the
    earlier iterations as they were.
    """
    final = Path(save_dir) / f"iter_{iteration:07d}"
    _save(final, _own_pieces(model, optimizer), trainer_state, retain, None)
    return final


def _save(
    final: Path, pieces: Iterable[TensorChunk], trainer_state: dict | None, retain: int | None,
    group: dist.ProcessGroup | None,
) -> None:
    """All of a save, in the foreground or not: `pieces` are this rank's, `group` is for its collectives alone."""
    partial = final.with_name(f".tmp_{final.name}")
    iteration, rank = int(final.name.removeprefix("iter_")), _rank()

    def write() -> tuple[list, dict]:
        files: dict[str, dict] = {}
        entries = _write_shard(partial / f"__{rank}_0.distcp", pieces, files)
        if trainer_state is not None:
            buffer = io.BytesIO()
            torch.save(trainer_state, buffer)
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)  # what could not be loaded is not saved
            _write_bytes(partial / f"trainer_state_rank_{rank:05d}.pt", buffer.getvalue(), files)
        return entries, files

    def complete() -> None:
        files = {name: record for _, records in written for name, record in records.items()}
        _write_metadata(partial, [entry for entries, _ in written for entry in entries], files)
        CheckpointWeights(partial)  # every tensor whole
        _complete(partial, final, files, tracker=str(iteration))

    try:
        _run_synced(lambda: _begin(final, "iter_*"), group, on_rank_0=True)
        written = _run_synced(write, group)
        _run_synced(complete, group, on_rank_0=True)
    except InputError as e:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{final}: was not saved: {e}; the iterations before it are as they were") from e
    if retain:
        _run_synced(lambda: _prune(final.parent, iteration, retain), group, on_rank_0=True)


class CheckpointWriter:
    """A run's saves, one at a time; `with` it ends when the last is written.

    In the background: training stands still while this rank's part is copied to host memory (taken once), then a thread
    does with the copy what `save_checkpoint` does. It talks to the other ranks over a process group of its own, so that
    its collectives never mix with those of training. A failure raises in `wait` or the next `save`.
    """

    def __init__(self, background: bool, timeout: timedelta):
        self._thread = ThreadPoolExecutor(1, "save") if background else None
        self._group = dist.new_group(backend="gloo", timeout=timeout) if background else None
        self._saving: Future | None = None
        self._copies: dict[tuple, Tensor] = {}

    def save(
        self, save_dir: str | Path, iteration: int, model: nn.Module, optimizer: Optimizer | None, trainer_state: dict,
        retain: int | None,
    ) -> None:
        """`save_checkpoint`, or its beginning."""
        self.wait()  # for the copy's memory, too
        if self._thread is None:
            save_checkpoint(save_dir, iteration, model, optimizer, trainer_state, retain)
            return
        pieces = [(name, whole, offset, self._copy((name, offset), values))
                  for name, whole, offset, values in _own_pieces(model, optimizer)]
        kernels_npu.ops.synchronize()
        final = Path(save_dir) / f"iter_{iteration:07d}"
        self._saving = self._thread.submit(_save, final, pieces, copy.deepcopy(trainer_state), retain, self._group)

    def _copy(self, key: tuple, values: Tensor) -> Tensor:
        pinned = not values.is_cpu  # then it is on the accelerator
        if key not in self._copies:
            self._copies[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        return self._copies[key].copy_(values, non_blocking=pinned)

    def failed(self) -> bool:
        """Whether the save in the background has ended in an error, which `wait` raises; on the others it will, too."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Until nothing is being saved. Raises what the save raised."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait()
        except Exception as e:
            if error is None:
                raise
            if not is_peer_failure(e):
                logger.error("%s", e)  # beside what ends the run
        if self._thread is not None:
            self._thread.shutdown()


def _iterations(save_dir: Path) -> dict[int, Path]:
    found = {int(d.name[5:]): d for d in save_dir.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", d.name)}
    return dict(sorted(found.items()))


def _prune(save_dir: Path, newest: int, retain: int) -> None:
    for directory in [d for i, d in _iterations(save_dir).items() if i <= newest][:-retain]:
        doomed = directory.with_name(f".tmp_{directory.name}")
        os.rename(directory, doomed)  # first the name: half a removal must not look like an iteration
        _remove(doomed)


def find_checkpoint(load_dir: str | Path) -> Path:
    """The checkpoint's directory in a run's save directory (its latest complete iteration) or a converted one; one
    that is named itself. Raises InputError if there is none."""
    path = Path(load_dir)
    if (path / ".metadata").exists():
        return path
    complete = ", ".join(d.name for d in _iterations(path).values() if (d / ".metadata").exists())
    if not (path / TRACKER).exists():
        hint = (f"name one of its iterations ({complete})" if complete else
                "convert it first (convert.py hf_to_dcp)" if hf_has_weights(path) else
                "give a save directory, one of its iter_XXXXXXX, or what hf_to_dcp wrote")
        raise InputError(f"{path}: {'is not there' if not path.exists() else f'has no {TRACKER}'}: {hint}")
    if not (path / TRACKER).is_file():
        raise InputError(f"{path / TRACKER}: is not a regular file")
    with open(path / TRACKER, errors="replace") as file:
        tracker = file.read(1000).strip()
    if tracker != "release" and not re.fullmatch(r"\d{1,12}", tracker):
        raise InputError(f"{path / TRACKER}: holds {tracker[:40]!r}, not an iteration's number or 'release'")
    name = tracker if tracker == "release" else f"iter_{int(tracker):07d}"
    for directory in (path / name, path / f".old_{name}"):  # the second: a save that replaced it was killed
        if (directory / ".metadata").exists():
            return directory
    state = "incomplete (it has no .metadata)" if (path / name).exists() else "not there"
    hint = f"name another one of {complete}" if complete else "no complete one is there"
    raise InputError(f"{path / TRACKER}: names {name}, which is {state}; {hint}")


def load_checkpoint(directory: str | Path, model: nn.Module, optimizer: Optimizer | None = None) -> dict | None:
    """Load an iteration's directory: the weights, the optimizer's state if given and stored, the trainer state.

    Any number of ranks may have written it. Returns this rank's trainer state. Raises InputError for damaged files,
    missing tensors and other shapes.
    """
    source = CheckpointWeights(directory).check_compatible(model)
    load_weights(model, source)
    if optimizer is not None:
        load_optimizer(source, model, optimizer)
    return load_trainer_state(source.path, _rank())


def load_optimizer(source: CheckpointWeights, model: nn.Module, optimizer: Optimizer) -> None:
    """Load the stored optimizer state, whatever its keys; a rank reads its own slices.

    A tensor of its parameter's shape is loaded in the parameter's layout and type. Any other, such as Adam's `step`, is
    loaded in full, and stays on the CPU unless the parameter's group is fused or capturable. Parameters without a
    stored state, which were frozen, start without one.
    """
    keys: dict[str, list[str]] = {}  # parameter name -> keys of its stored state
    for stored in source.tensors:
        if stored.startswith("optimizer."):
            key, _, name = stored.removeprefix("optimizer.").partition(".")
            keys.setdefault(name, []).append(key)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: tensor for name, tensor in stored_tensors(model).items() if tensor in groups}
    for name, p in parameters.items():
        on_device = groups[p].get("fused") or groups[p].get("capturable")
        for key in keys.get(name, ()):
            stored = f"optimizer.{key}.{name}"
            _, shape = source.tensors[stored]
            if shape == p.shape:
                value = torch.zeros_like(p.detach())
                _fill(value, source, stored)
            else:
                value = source.read(stored, (0,) * len(shape), shape).to(p.device if on_device else "cpu")
            optimizer.state[p][key] = value
    without = [name for name in parameters if name not in keys]
    if without:
        logger.warning("%s: no optimizer state for %d of %d trainable parameters (%s, ...): it starts from zero",
                       source.path, len(without), len(parameters), without[0])


def load_trainer_state(directory: Path, rank: int) -> dict | None:
    """Return the trainer state that a rank saved, or rank 0's if the run had fewer ranks, or None if there is none."""
    path = directory / f"trainer_state_rank_{rank:05d}.pt"
    path = path if path.exists() else directory / "trainer_state_rank_00000.pt"
    return _trainer_state(path) if path.exists() else None


def load_data_positions(directory: Path) -> list[dict]:
    """Return the "data" of every rank's trainer state, in the order of the ranks that saved them."""
    return [_trainer_state(path)["data"] for path in sorted(directory.glob("trainer_state_rank_*.pt"))]


def _trainer_state(path: Path) -> dict:
    if not path.is_file():
        raise InputError(f"{path}: is not a regular file; take another checkpoint")
    with open(path, "rb") as file:
        try:
            state = {**_load_plain(file, "cpu")}
            counts, dicts = (state["iteration"], state.get("world", 1)), (state["data"], state.get("rng", {}))
            if any(type(n) is not int or n < 0 for n in counts) or not all(isinstance(d, dict) for d in dicts):
                raise TypeError("its iteration and data are not a count and a dict")
        except Exception as e:  # as in `_piece`
            raise _damaged(path, "is damaged or not a trainer's state") from e
    _check_contents(path, _checksums(path.parent))
    return state


# ---- the conversions -----------------------------------------------------------------------------------------------


def hf_to_dcp(hf_dir: str | Path, dcp_dir: str | Path, overwrite: bool = False) -> Path:
    """Writes `dcp_dir/release` (types as stored, published layout, a shard for each source file) and the tracker."""
    model = build_model(Qwen3VLConfig.from_json(hf_dir))
    source = HuggingFaceWeights(hf_dir).check_compatible(model)
    expected = {name: t.shape for name, t in stored_tensors(model).items() if name in source.tensors}
    final = Path(dcp_dir).resolve() / "release"
    if _iterations(final.parent):
        raise InputError(f"{final.parent}: is a training run's directory; choose another --dcp_dir")
    if not overwrite and (final.exists() or final.with_name(TRACKER).exists()):
        raise InputError(f"{final.parent}: holds a checkpoint already; choose another --dcp_dir, or give --overwrite")
    itemsize = {name: source.tensors[name][0].itemsize for name in expected}

    def pieces(names: list[str]) -> Iterator[TensorChunk]:
        for name in filter(expected.__contains__, names):
            for offset, sizes in _row_chunks(expected[name], itemsize[name]):
                yield name, expected[name], offset, source.read(name, offset, sizes)
                bar.update(math.prod(sizes) * itemsize[name])

    total = sum(itemsize[name] * shape.numel() for name, shape in expected.items())
    with _building(final, total, tracker="release") as (partial, files, bar):
        entries = []
        for i, names in enumerate(source.files.values()):
            entries += _write_shard(partial / f"__0_{i}.distcp", pieces(names), files)
        _write_metadata(partial, entries, files)
    return final


# configurations, tokenizer, chat template, licence; not weights, and no code
_ASSET = re.compile(r".*(?<!\.index)\.json|.*\.(txt|jinja|model)|(LICEN[SC]E|NOTICE).*")


def dcp_to_hf(load_dir: str | Path, save_dir: str | Path, model_assets_dir: str | Path, dtype: str | None = None,
              overwrite: bool = False, max_shard_gb: float = 5) -> Path:
    """Writes a checkpoint's parameters as a Hugging Face directory: safetensors, index, the base model's assets.

    `dtype` ('bfloat16', ...) defaults to the one that the assets' config.json names, else to what is stored.
    """
    assets = Path(model_assets_dir)
    copied = [path for path in sorted(assets.glob("*"))
              if path.is_file() and _ASSET.fullmatch(path.name) and path.name != CHECKSUMS]
    for path in copied:
        if path.stat().st_size > ASSET_BYTES:
            raise InputError(f"{path}: has more than {ASSET_BYTES} bytes; take it out of --model_assets_dir")
    config = Qwen3VLConfig.from_json(assets)
    model = build_model(config)
    source = CheckpointWeights(find_checkpoint(load_dir)).check_compatible(model)
    expected = {name: t.shape for name, t in stored_tensors(model).items() if name in source.tensors}
    final = Path(save_dir).resolve()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        if not overwrite:
            raise InputError(f"{final}: is there already; choose another --save_dir, or give --overwrite")
        inputs = [assets.resolve(), source.path.resolve()]
        if not (final / INDEX).exists() or any(final == d or final in d.parents for d in inputs):
            raise InputError(f"{final}: is not the output of an earlier conversion, or holds this one's input: "
                             "it is not overwritten; choose another --save_dir")
    named = dtype or config.dtype
    target = next((t for t in SAFETENSORS_TYPES.values() if str(t) == f"torch.{named}"), None)
    if named and target is None:
        raise InputError(f"{assets / 'config.json'}: dtype {named!r} is not a weight's; give --dtype bfloat16")
    if any(name.endswith(EXPERTS) and shape[1] == shape[2] for name, shape in expected.items()):
        logger.warning("the experts are square: transformers 5 will take them for its own transposed layout")
    types = {name: target or source.tensors[name][0] for name in expected}
    for name, kind in types.items():
        if kind not in SAFETENSORS_TYPES.values():
            raise InputError(f"{source.path}: {name} is {kind}, which is not a weight's type; give --dtype bfloat16")
    nbytes = {name: types[name].itemsize * shape.numel() for name, shape in expected.items()}
    shards: list[list[str]] = []
    room = 0.0
    for name in expected:
        room -= nbytes[name]
        if room < 0 or not shards:
            shards.append([])
            room = max_shard_gb * 1e9 - nbytes[name]
        shards[-1].append(name)
    total = sum(nbytes.values())
    with _building(final, total) as (partial, files, bar):
        weight_map = {}
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(names, file)
            with _HashedFile(partial / file, files) as output:
                _write_safetensors(output, names, types, source, bar)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_bytes(partial / INDEX, json.dumps(index, indent=2).encode(), files)
        for path in copied:
            data = path.read_bytes()
            if path.name == "config.json" and target is not None:
                data = _config_with_dtype(data, named)
            _write_bytes(partial / path.name, data, files)
    return final


def _write_safetensors(
    file: _HashedFile, names: list[str], types: dict[str, torch.dtype], source: CheckpointWeights, bar: tqdm
) -> None:
    """Tensors in these types, piece by piece. Wide types go first: readers map the values, and need them aligned."""
    names = sorted(names, key=lambda name: -types[name].itemsize)
    labels = {dtype: label for label, dtype in SAFETENSORS_TYPES.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **LAYOUT}}
    end = 0
    for name in names:
        shape = source.tensors[name][1]
        begin, end = end, end + types[name].itemsize * shape.numel()
        header[name] = {"dtype": labels[types[name]], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in names:
        stored, shape = source.tensors[name]
        for offset, sizes in _row_chunks(shape, max(types[name].itemsize, stored.itemsize)):
            values = source.read(name, offset, sizes).to(types[name])
            file.write(memoryview(values.view(-1).view(torch.uint8).numpy()))
            bar.update(values.nbytes)


def _config_with_dtype(data: bytes, dtype: str) -> bytes:
    """config.json with the type of the weights beside it; the user's own bytes where that is what it says already."""
    config = json.loads(data)
    parts = (config, config["text_config"], config["vision_config"])
    named = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part] or [(config, "dtype")]
    if all(part.get(key) == dtype for part, key in named):
        return data
    for part, key in named:
        part[key] = dtype
    return json.dumps(config, indent=2, ensure_ascii=False).encode()


def verify(directory: str | Path) -> list[str]:
    """Checks a directory's files against checksums.json, or what can be checked without one: the sizes that headers and
    indices give. A save directory: each of its iterations. Returns one line for each; raises InputError at the first
    directory that is damaged."""
    path = Path(directory)
    if not path.is_dir():
        raise InputError(f"{path}: is not a directory")
    parts = [*_iterations(path).values(), *([path / "release"] if (path / "release").is_dir() else [])]
    if (path / TRACKER).exists():
        find_checkpoint(path)
    return [_verify_one(part) for part in parts or [path]]


def _verify_one(path: Path) -> str:
    if not (path / CHECKSUMS).exists():
        source = CheckpointWeights(path) if (path / ".metadata").exists() else HuggingFaceWeights(path)
        if not source.tensors:
            raise InputError(f"{path}: holds no tensors; take another checkpoint")
        return (f"{path}: {len(source.tensors)} tensors, sizes are right "
                f"(there is no {CHECKSUMS}: contents cannot be checked)")
    records = _checksums(path)
    unlisted = sorted({file.name for file in path.iterdir() if file.is_file()} - records.keys() - {CHECKSUMS})
    wrong = dict(_wrong_sizes(path, records))
    bad = [f"{name} is not in {CHECKSUMS}" for name in unlisted] + [f"{name} {what}" for name, what in wrong.items()]
    with tqdm(total=sum(r["bytes"] for r in records.values()), desc=path.name, unit="B", unit_scale=True) as bar:
        for name, record in records.items():
            if name in wrong:
                continue
            digest = hashlib.sha256()
            with open(path / name, "rb") as file:
                while data := file.read(1 << 20):
                    digest.update(data)
                    bar.update(len(data))
            if digest.hexdigest() != record["sha256"]:
                bad.append(f"{name} has other contents than were written")
    if bad:
        raise InputError(f"{path}: {len(bad)} files are not as written: {'; '.join(bad[:3])}"
                         f"{'; ...' if len(bad) > 3 else ''}")
    return f"{path}: {len(records)} files, {sum(r['bytes'] for r in records.values()) / 1e9:.3f} GB, all as written"


# ---- command line --------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    """The command line; raises what `common.run_program` reports."""
    parser = Parser(description="Hugging Face safetensors <-> DCP checkpoints", prog="convert.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{hf_to_dcp,dcp_to_hf,verify}")
    to_dcp = commands.add_parser("hf_to_dcp", help="makes DCP_DIR/release of a Hugging Face directory")
    to_dcp.add_argument("--hf_dir", required=True, help="config.json and safetensors")
    to_dcp.add_argument("--dcp_dir", required=True, help="gets release/ and the tracker file")
    to_hf = commands.add_parser("dcp_to_hf", help="makes a Hugging Face directory of a checkpoint")
    to_hf.add_argument("--load_dir", required=True, help="an iteration's directory (of a save directory: its latest)")
    to_hf.add_argument("--save_dir", required=True, help="the Hugging Face directory to write")
    to_hf.add_argument("--model_assets_dir", required=True, help="where configuration, tokenizer and licence come from")
    to_hf.add_argument("--dtype", choices=["bfloat16", "float16", "float32"],
                       help="of the weights written (default: the assets' configuration's, else as stored)")
    to_hf.add_argument("--max-shard-size", type=number(float, 0, above=True), default=5.0, metavar="GB",
                       help="of one safetensors file")
    for command in (to_dcp, to_hf):
        command.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    verifier = commands.add_parser("verify", help="checks a directory's files against their checksums")
    verifier.add_argument("dir", help="a checkpoint, a save directory or a Hugging Face directory")
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # said by the command's own parser, which knows the flags that come near
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.command == "hf_to_dcp":
        print("wrote", hf_to_dcp(args.hf_dir, args.dcp_dir, args.overwrite))
    elif args.command == "dcp_to_hf":
        print("wrote", dcp_to_hf(args.load_dir, args.save_dir, args.model_assets_dir, args.dtype, args.overwrite,
                                 args.max_shard_size))
    else:
        print("\n".join(verify(args.dir)))


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
