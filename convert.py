"""Weights and checkpoints: Hugging Face safetensors <-> model <-> DCP, crash-safe saves, and the conversions.

A *source* is a directory of stored tensors (see `Source`). Loading, resharding and both conversions copy slices from a
source, so that a process holds only a few chunks beside its own shard.

A checkpoint has the format of torch.distributed.checkpoint (DCP), which `dcp.load` reads: tensors in chunks of at most
CHUNK_BYTES, parameters and buffers under their Hugging Face names, optimizer state as `optimizer.KEY.NAME`. Beside them
lie `checksums.json`, `settings.json` and each rank's `trainer_state_rank_00000.pt`. Reading an untrusted checkpoint
runs no code. A run with adapters saves only what it trains; `AdaptedWeights` reads that with the weights beneath.

    python convert.py hf_to_dcp --hf_dir DIR --dcp_dir DIR
    python convert.py dcp_to_hf --load_dir ITER_DIR --save_dir DIR --model_assets_dir HF_DIR
    python convert.py dcp_to_peft --load_dir ITER_DIR --save_dir DIR --model_assets_dir HF_DIR
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
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from tqdm import tqdm

import data
import kernels_npu
from common import InputError, Parser, is_peer_failure, number, one_line, print_line, read_json, run_program, shorten
from model import Qwen3VLConfig, build_model
from parallel import Adapter, add_adapters, local_shard_and_offset, named_adapters, run_synced

CHUNK_BYTES = 16 << 20
TRACKER = "latest_checkpointed_iteration.txt"
CHECKSUMS = "checksums.json"
SETTINGS = "settings.json"
INDEX = "model.safetensors.index.json"
SAFETENSORS_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BUFFER_TYPES = {"I64": torch.int64, "I32": torch.int32}
EXPERTS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LAYOUT = {"expert_layout": "published"}  # in our safetensors headers, because square experts do not show their layout

TensorInfo = tuple[torch.dtype, torch.Size]
TensorChunk = tuple[str, torch.Size, tuple[int, ...], Tensor]  # name, shape of the full tensor, offset in it, values

logger = logging.getLogger(__name__)


class Source(Protocol):
    """A directory of stored tensors, which is opened without reading their values."""

    path: Path
    tensors: dict[str, TensorInfo]

    def check_compatible(self, model: nn.Module) -> Source:
        """Compare names and shapes with the model's and return self. Raises InputError."""

    def read(self, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Return a slice of a tensor in its stored type. It may be a view of shared memory: never write to it."""

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor, or the first one that does."""


# ---- tensors and their chunks --------------------------------------------------------------------------------------


def _slices(offset: Iterable[int], sizes: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))


def _overlap(
    offset: Iterable[int], sizes: Iterable[int], other_offset: Iterable[int], other_sizes: Iterable[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Return where two blocks of a tensor overlap, as slices of each block, or None."""
    one, other = [], []
    for a, n, b, m in zip(offset, sizes, other_offset, other_sizes, strict=True):
        begin, end = max(a, b), min(a + n, b + m)
        if begin >= end:
            return None
        one.append(slice(begin - a, end - a))
        other.append(slice(begin - b, end - b))
    return tuple(one), tuple(other)


def _row_chunks(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a tensor into blocks of rows of at most CHUNK_BYTES and yield each one's (offset, sizes).

    A single row is never cut.
    """
    if not shape:
        yield (), ()
    elif 0 not in shape:
        rows = max(1, CHUNK_BYTES // (math.prod(shape[1:]) * itemsize))
        for start in range(0, shape[0], rows):
            yield (start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:])


def _local_chunks(tensor: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Cut this rank's shard of a DTensor, or a plain tensor, into chunks: (offset in the full tensor, view)."""
    shard, shard_offset = local_shard_and_offset(tensor)
    for offset, sizes in _row_chunks(shard.shape, shard.element_size()):
        yield tuple(a + b for a, b in zip(shard_offset, offset, strict=True)), shard[_slices(offset, sizes)]


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds: the model's parameters and persistent buffers by name, tied weights once."""
    names = model.state_dict().keys()  # FSDP2 reshards here; without it, parameters may still be gathered
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in tensors if name in names}


# ---- loading a model -----------------------------------------------------------------------------------------------


def _fill(target: Tensor, source: Source, name: str) -> None:
    """Read this rank's part of a stored tensor into `target`, converting it to the target's type."""
    for offset, chunk in _local_chunks(target):
        chunk.copy_(source.read(name, offset, chunk.shape))


def load_weights(model: nn.Module, source: Source | None, seed: int = 0) -> None:
    """Fill every parameter and persistent buffer in its own type; each rank reads its own slices.

    `source` has passed `check_compatible(model)`. Tensors that it lacks get initial values drawn from `seed`; without a
    source, all tensors do. Raises InputError for damaged files.
    """
    tensors = stored_tensors(model)
    absent = {name for name in tensors if source is None or name not in source.tensors}
    if absent:
        model.init_weights(seed, local_shard_and_offset, names=absent)
    for name, tensor in tensors.items():
        if name not in absent:
            _fill(tensor, source, name)


def load_optimizer(source: Source, model: nn.Module, optimizer: Optimizer) -> None:
    """Load the stored optimizer state, whatever its keys; each rank reads its own slices. Raises InputError.

    A tensor of its parameter's shape gets the parameter's type and layout. Any other, such as AdamW's `step`, is loaded
    in full: onto the parameter's device if its group is fused or capturable, else onto the CPU. Parameters without
    stored state, because they were frozen, start without one.
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
                value = source.read(stored, (0,) * len(shape), shape).to(p.device if on_device else "cpu", copy=True)
            optimizer.state[p][key] = value
    missing = [name for name in parameters if name not in keys]
    if missing:
        logger.warning("%s: no optimizer state for %d of %d trainable parameters (%s, ...), which start without it",
                       source.path, len(missing), len(parameters), missing[0])


def load_trainer_state(directory: Path, rank: int) -> dict | None:
    """Return the trainer state that `rank` saved, rank 0's if there were fewer ranks, or None. Raises InputError."""
    path = directory / f"trainer_state_rank_{rank:05d}.pt"
    if not path.exists():
        path = directory / "trainer_state_rank_00000.pt"
    return _read_trainer_state(path) if path.exists() else None


def load_data_positions(directory: Path) -> list[dict]:
    """Return the "data" of every rank's trainer state, ordered by rank. Raises InputError."""
    return [_read_trainer_state(path)["data"] for path in sorted(directory.glob("trainer_state_rank_*.pt"))]


def read_settings(directory: Path) -> dict:
    """Return the settings that a checkpoint was saved with, {} for one without them. Raises InputError."""
    path = directory / SETTINGS
    if not path.exists():
        return {}
    _read_verified(path, _read_checksums(directory))
    return read_json(path)


def _read_trainer_state(path: Path) -> dict:
    content = _read_verified(path, _read_checksums(path.parent))
    try:
        return _torch_load(content)
    except Exception as e:  # damaged bytes can raise nearly anything
        raise InputError(f"{path}: is damaged or not a trainer state; use another checkpoint") from e


# ---- sources -------------------------------------------------------------------------------------------------------


def _is_file_name(name: object) -> bool:
    """Return whether `name` is a plain file name, which cannot lead to another directory."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search("[/\0]", name)


_LAYER = re.compile(r"model\.(?:language_model\.layers|visual\.blocks|visual\.deepstack_merger_list)\.\d+")


def _check_names_and_shapes(tensors: dict[str, TensorInfo], model: nn.Module, path: Path) -> None:
    """Compare the names and shapes in a source with the model's. Raises InputError.

    Two kinds of unknown tensors are ignored: layers beyond config.json's depth, because editing it is how users cut a
    model, and the lm_head.weight that some checkpoints with tied weights hold beside the embedding.
    """
    expected = {name: tensor.shape for name, tensor in stored_tensors(model).items()}
    layers = {name: match[0] for name in [*tensors, *expected] if (match := _LAYER.match(name))}
    cut_layers = set(layers.values()) - {layers.get(name) for name in expected}
    missing = [name for name in expected if name not in tensors and not model.may_be_absent(name)]
    unknown = [name for name in tensors
               if name not in expected and name != "lm_head.weight" and layers.get(name) not in cut_layers]
    problems = [f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
                for what, names in (("missing", missing), ("unknown", unknown)) if names]
    if problems:
        raise InputError(f"{path}: its tensors are not those of the model that config.json describes: "
                         f"{'; '.join(problems)}; use the config.json that belongs to these weights")
    if cut_layers:
        logger.warning("%s: %d layers are beyond the depth in config.json and are not read", path, len(cut_layers))
    for name, shape in expected.items():
        if name in tensors and tensors[name][1] != shape:
            raise InputError(f"{path}: {name} has shape {shorten(list(tensors[name][1]))}, config.json requires "
                             f"{list(shape)}; use the config.json that belongs to these weights")


def _check_tied_copy(source: Source, model: nn.Module) -> None:
    """Raise InputError if the source holds another lm_head.weight than the embedding that the model uses for it."""
    copy, embedding = "lm_head.weight", "model.language_model.embed_tokens.weight"
    if copy in stored_tensors(model) or not {copy, embedding} <= source.tensors.keys():
        return
    (dtype, shape), (_, copy_shape) = source.tensors[embedding], source.tensors[copy]
    chunks = _row_chunks(shape, dtype.itemsize)
    if shape != copy_shape or any((source.read(copy, *at) != source.read(embedding, *at)).any() for at in chunks):
        raise InputError(f"{source.file_of(copy)}: {copy} differs from {embedding}, but config.json says that they are "
                         "one (tie_word_embeddings is true): set that to false to use both, or remove lm_head.weight")


def hf_has_weights(hf_dir: str | Path) -> bool:
    """Return whether a Hugging Face directory holds safetensors, as one file or as an index of several."""
    return any((Path(hf_dir) / name).exists() for name in ("model.safetensors", INDEX))


class HuggingFaceWeights:
    """Read the safetensors of a Hugging Face directory. Raises InputError for missing and damaged files."""

    def __init__(self, hf_dir: str | Path, single_file: str = "model.safetensors"):
        self.path, self.single_file = Path(hf_dir), single_file
        self.tensors: dict[str, TensorInfo] = {}
        self.files = self._list_files()  # file name -> names of its tensors
        self._views = {}  # tensor name -> safetensors' lazy slice
        self._transposed: set[str] = set()
        self._is_published_layout = True
        for file in self.files:
            self._open(file)

    def _list_files(self) -> dict[str, list[str]]:
        """Return {file: names of its tensors} from the index. For a single file the list of names is empty."""
        if (self.path / self.single_file).exists():
            return {self.single_file: []}
        index = self.path / INDEX
        pickles = [*self.path.glob("pytorch_model*.bin")]
        if not index.exists() and pickles:
            raise InputError(f"{pickles[0]}: is a pickle, which can run code; convert it to safetensors")
        if not index.exists():
            raise InputError(f"{self.path}: holds no weights (neither {self.single_file} nor {INDEX})")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: has no weight_map; download it again")
        files: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            if not _is_file_name(file):
                raise InputError(f"{index}: says that {name} is in {shorten(file)}, which is not a file of this "
                                 "directory; download it again")
            files.setdefault(file, []).append(name)
        return files

    def _open(self, file: str) -> None:
        path = self.path / file
        try:
            handle = safe_open(path, "pt")  # the header must describe the file exactly, so truncation is found here
        except (SafetensorError, OSError) as e:
            raise InputError(f"{path}: is damaged or incomplete ({one_line(e)}); download it again") from e
        self._is_published_layout &= LAYOUT.items() <= (handle.metadata() or {}).items()
        stored = set(handle.keys())
        self.files[file] = self.files[file] or sorted(stored)
        for name in self.files[file]:
            if name not in stored:
                raise InputError(f"{path}: lacks {name}, which {INDEX} lists; download it again")
            view = self._views[name] = handle.get_slice(name)
            dtype = (SAFETENSORS_TYPES | BUFFER_TYPES).get(view.get_dtype())
            if dtype is None:
                raise InputError(f"{path}: {name} has type {view.get_dtype()}; quantised weights are not supported, "
                                 f"only {', '.join(SAFETENSORS_TYPES)}")
            self.tensors[name] = dtype, torch.Size(view.get_shape())

    def check_compatible(self, model: nn.Module) -> HuggingFaceWeights:
        """Compare names and shapes with the model's, find the layout of the experts, and return self.

        Published checkpoints and transformers 4 store [E, D, 2I] and [E, I, D]; transformers 5 writes [E, 2I, D] and
        [E, D, I] under the same names. The shape of a square tensor (2I == D or I == D) does not show the layout, and
        neither does the other tensor's. On loading a published checkpoint, transformers 5 transposes the other tensor
        but never a square one, and then saves both (huggingface/transformers#47031). The headers that `dcp_to_hf`
        writes name the layout.
        """
        for name, tensor in stored_tensors(model).items():
            if name not in self.tensors or not name.endswith(EXPERTS) or self._is_published_layout:
                continue
            dtype, stored_shape = self.tensors[name]
            transposed_shape = torch.Size(tensor.shape[i] for i in (0, 2, 1))
            if stored_shape == tensor.shape == transposed_shape:
                raise InputError(
                    f"{self.path}: {name} is square, {list(stored_shape)}: its shape does not show whether its layout "
                    "is the published one or transformers 5's; change moe_intermediate_size or hidden_size")
            if stored_shape == transposed_shape:
                self._transposed.add(name)
                self.tensors[name] = dtype, tensor.shape
        _check_names_and_shapes(self.tensors, model, self.path)
        _check_tied_copy(self, model)
        return self

    def file_of(self, name: str) -> Path:
        return self.path / next(file for file, names in self.files.items() if name in names)

    def read(self, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Return a slice of a tensor, in the published layout. It may be a view of the mapped file."""
        window = _slices(offset, sizes)
        if name in self._transposed:
            return self._views[name][window[0], window[2], window[1]].transpose(1, 2)
        return self._views[name][window]


_DCP_CLASSES = {  # everything that the pickle in a DCP checkpoint's .metadata needs
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype))},
    "pathlib": {"PosixPath"},
}
_DCP_INSTANCES = (_StorageInfo, *(getattr(dcp_metadata, name) for name in _DCP_CLASSES[dcp_metadata.__name__]
                                  if name != "_MEM_FORMAT_ENCODING"))


class _MetadataUnpickler(pickle._Unpickler):  # in Python; the operations of pickle's C version cannot be overridden
    """Read a pickle that may use the classes in _DCP_CLASSES and nothing else."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str):
        if name not in _DCP_CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)

    def load_build(self) -> None:
        """Set an instance's attributes. On a class, the same operation would change the class in this process."""
        if type(self.stack[-2]) not in _DCP_INSTANCES:
            raise pickle.UnpicklingError(f"it sets attributes of {shorten(self.stack[-2])}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _torch_load(content: bytes) -> object:
    """Return what `torch.save` wrote: tensors in plain containers. Runs no code; damaged bytes raise many types."""
    file = io.BytesIO(content)
    if zipfile.ZipFile(file).testzip() is not None:
        raise ValueError("a checksum in it is wrong")  # torch.load does not compare them
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _read_checksums(directory: Path) -> dict[str, dict]:
    """Return checksums.json: file name -> {"bytes", "sha256"}; {} if there is none. Raises InputError."""
    path = directory / CHECKSUMS
    records = read_json(path, missing_ok=True)
    for name, record in records.items():
        fields = [type(record.get(key)) for key in ("bytes", "sha256")] if isinstance(record, dict) else None
        if not _is_file_name(name) or fields != [int, str]:
            raise InputError(f"{path}: its entry {shorten(name)} is damaged; use another checkpoint")
    return records


def _check_sizes(directory: Path, sizes: dict[str, int]) -> None:
    """Raise InputError for a file that is missing or smaller than it should be."""
    for name, size in sizes.items():
        path = directory / name
        if not path.is_file():
            raise InputError(f"{path}: is missing; use another checkpoint")
        if path.stat().st_size < size:
            raise InputError(f"{path}: is damaged ({path.stat().st_size} of {size} bytes); use another checkpoint")


def _read_verified(path: Path, records: dict[str, dict]) -> bytes:
    """Return the bytes of a small file after comparing them with its checksum, if it has one. Raises InputError."""
    content = path.read_bytes()
    if path.name in records and hashlib.sha256(content).hexdigest() != records[path.name]["sha256"]:
        raise InputError(f"{path}: is damaged (its checksum is wrong); use another checkpoint")
    return content


class CheckpointWeights:
    """Read a DCP directory. Opening it checks that every file has its size and every tensor all of its values.

    Raises InputError for missing and damaged files.
    """

    def __init__(self, directory: str | Path):
        self.path = Path(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self._chunks: dict[str, list[tuple[torch.Size, torch.Size, _StorageInfo]]] = {}  # (offset, sizes, location)
        self._recent: dict[tuple[str, int], Tensor] = {}  # the chunks of the latest read, which the next often needs
        if not (self.path / ".metadata").exists():
            raise InputError(f"{self.path}: is not a checkpoint (it has no .metadata)")
        records = _read_checksums(self.path)
        _check_sizes(self.path, {name: record["bytes"] for name, record in records.items()})
        content = _read_verified(self.path / ".metadata", records)
        try:
            ends = self._read_metadata(_MetadataUnpickler(io.BytesIO(content)).load())
        except Exception as e:  # a damaged pickle, and what it creates, can raise nearly anything
            raise InputError(f"{self.path / '.metadata'}: is damaged or not a DCP checkpoint's "
                             f"({one_line(e)[:200]}); use another checkpoint") from e
        _check_sizes(self.path, ends)

    def _read_metadata(self, metadata: dcp_metadata.Metadata) -> dict[str, int]:
        """Fill `tensors` and `_chunks`. Returns the byte at which the last chunk of each file ends."""
        ends: dict[str, int] = {}
        for name, tensor in metadata.state_dict_metadata.items():
            if not isinstance(tensor, dcp_metadata.TensorStorageMetadata):
                continue  # an object that another tool stored is a pickle, and is never read
            chunks = []
            for chunk in tensor.chunks:
                location = metadata.storage_data[dcp_metadata.MetadataIndex(name, chunk.offsets)]
                file, end = location.relative_path, location.offset + location.length
                if not _is_file_name(file):
                    raise ValueError(f"{file!r} is not a file of this directory")
                axes = zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
                if not all(0 <= offset <= offset + size <= full_size for offset, size, full_size in axes):
                    raise ValueError(f"{name} {list(tensor.size)} has a chunk outside it")
                chunks.append((chunk.offsets, chunk.sizes, location))
                ends[file] = max(ends.get(file, 0), end)
            if sum(sizes.numel() for _, sizes, _ in chunks) != tensor.size.numel():
                raise ValueError(f"{name} {list(tensor.size)} is incomplete")
            dtype = tensor.properties.dtype
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"the type of {name} is {shorten(dtype)}")
            self.tensors[name] = dtype, tensor.size
            self._chunks[name] = chunks
        return ends

    def check_compatible(self, model: nn.Module) -> CheckpointWeights:
        """Compare names and shapes with the model's and return self. Raises InputError."""
        weights = {name: info for name, info in self.tensors.items() if not name.startswith("optimizer.")}
        _check_names_and_shapes(weights, model, self.path)
        _check_tied_copy(self, model)
        return self

    def file_of(self, name: str) -> Path:
        return self.path / self._chunks[name][0][2].relative_path

    def read(self, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Return a slice of a tensor, assembled from the chunks that overlap it."""
        overlapping = []
        for chunk_offset, chunk_sizes, location in self._chunks[name]:
            if overlap := _overlap(offset, sizes, chunk_offset, chunk_sizes):
                overlapping.append((chunk_sizes, location, *overlap))
        needed = {(location.relative_path, location.offset) for _, location, _, _ in overlapping}
        self._recent = {key: chunk for key, chunk in self._recent.items() if key in needed}
        parts = [(in_result, self._read_chunk(name, chunk_sizes, location)[in_chunk])
                 for chunk_sizes, location, in_result, in_chunk in overlapping]
        if len(parts) == 1:
            return parts[0][1]
        result = torch.empty(sizes, dtype=self.tensors[name][0])
        for in_result, values in parts:
            result[in_result] = values
        return result

    def _read_chunk(self, name: str, sizes: torch.Size, location: _StorageInfo) -> Tensor:
        """Return a stored chunk, kept from the latest `read` or read after its checksum was compared."""
        key = location.relative_path, location.offset
        if key in self._recent:
            return self._recent[key]
        path = self.path / location.relative_path
        try:
            with open(path, "rb") as file:
                file.seek(location.offset)
                chunk = _torch_load(file.read(location.length))
            if (chunk.dtype, chunk.shape) != (self.tensors[name][0], sizes):
                raise ValueError(f"it holds {chunk.dtype} {list(chunk.shape)}")
        except Exception as e:  # nearly anything; torch's own message would advise to run the file's code
            raise InputError(f"{path}: the chunk of {name} at byte {location.offset} is damaged; use another checkpoint"
                             ) from e
        self._recent[key] = chunk
        return chunk


# ---- adapters ------------------------------------------------------------------------------------------------------


def _read_full(source: Source, name: str) -> Tensor:
    shape = source.tensors[name][1]
    return source.read(name, (0,) * len(shape), shape)


def _check_trained(stored: dict[str, torch.Size], expected: dict[str, torch.Size], path: Path) -> None:
    """Compare the names and shapes of adapters, and of what was trained beside them. Raises InputError."""
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            found, wanted = (list(shapes[name]) if name in shapes else "absent" for shapes in (stored, expected))
            raise InputError(f"{path}: {name} is {found}, but {wanted} in this model; use the config.json and the "
                             "--lora-target-modules that its adapters were trained with")


class AdaptedWeights:
    """Read what a run with adapters has trained, and beneath it the weights that the run began with.

    A model with adapters loads both as they are. For a model without them, `read` adds the adapters' products to the
    weights, in float32. `settings` are those of `parallel.add_adapters`, and "base", see `open_checkpoint`.
    """

    def __init__(self, base: Source, trained: Source | None, settings: dict):
        self.base, self.trained, self.settings = base, trained, settings
        self.path = (trained or base).path
        self.tensors: dict[str, TensorInfo] = {}
        self._merged: dict[str, tuple[str, Adapter]] = {}  # weight -> its adapter
        # The experts of a layer are merged window by window, and each window needs a part of both factors.
        self._read_factor = functools.lru_cache(maxsize=2)(functools.partial(_read_full, trained))

    def check_compatible(self, model: nn.Module) -> AdaptedWeights:
        """Compare names and shapes with the model's and return self. Raises InputError."""
        self.base.check_compatible(model)  # finds the layout of experts and so their shapes
        self.tensors = self.base.tensors | (self.trained.tensors if self.trained else {})
        if not named_adapters(model):
            model = build_model(model.config)
            add_adapters(model, self.settings)
            self._merged = {adapter.weight_name: (name, adapter) for name, adapter in named_adapters(model).items()}
        if self.trained:
            stored = {n: shape for n, (_, shape) in self.trained.tensors.items() if not n.startswith("optimizer.")}
            expected = {n: t.shape for n, t in stored_tensors(model).items() if ".lora." in n or n in stored}
            _check_trained(stored, expected, self.path)
        return self

    def read(self, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """Return a slice of a tensor: what was trained, a weight with its adapter, or the weight itself."""
        if self.trained and name in self.trained.tensors:
            return self.trained.read(name, offset, sizes)
        values = self.base.read(name, offset, sizes)
        if name not in self._merged:
            return values
        adapter_name, adapter = self._merged[name]
        a, b = (self._read_factor(f"{adapter_name}.{leaf}").float() for leaf in "AB")
        left, right = (b, a) if len(sizes) == 2 else (a, b)  # a weight is [out, in], but experts' are [E, in, out]
        *experts, rows, columns = _slices(offset, sizes)
        return values.float() + adapter.scale * left[(*experts, rows)] @ right[(*experts, slice(None), columns)]


def open_checkpoint(load_dir: str | Path, hf_dir: str | Path) -> CheckpointWeights | AdaptedWeights:
    """Open a checkpoint and, if it holds adapters, the weights that they belong to.

    These are the safetensors of `hf_dir`, or the full checkpoint that the run with adapters was started from.
    """
    checkpoint = CheckpointWeights(find_checkpoint(load_dir))
    adapters = read_settings(checkpoint.path).get("adapters")
    if adapters is None:
        return checkpoint
    base = adapters["base"]
    if base is not None and not (Path(base) / ".metadata").exists():
        raise InputError(f"{checkpoint.path}: its adapters belong to the weights of the checkpoint {base}, which is "
                         "missing; put it, or a link to it, there")
    return AdaptedWeights(CheckpointWeights(base) if base else HuggingFaceWeights(hf_dir), checkpoint, adapters)


class RelaidTensors:
    """Read the tensors of another source under other names and in another layout."""

    def __init__(self, source: Source, layouts: dict[str, tuple[str, Callable[[Tensor], Tensor]]]):
        """layouts: {name: (the other source's name, function from the other layout)}."""
        self.source, self.layouts, self.path = source, layouts, source.path
        self.tensors = {}
        for name, (stored, layout) in layouts.items():
            dtype, shape = source.tensors[stored]
            self.tensors[name] = dtype, layout(torch.empty(shape, device="meta")).shape

    def read(self, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        stored, layout = self.layouts[name]
        return layout(_read_full(self.source, stored))[_slices(offset, sizes)]


def peft_names(model: nn.Module) -> dict[str, str]:
    """Return PEFT's name of each A and B. PEFT wraps a layer's experts twice; the inner adapter is gate_up_proj's."""
    names = {}
    for name, adapter in named_adapters(model).items():
        layer, _, weight = adapter.weight_name.rpartition(".")
        inner = ".base_layer" if weight == "gate_up_proj" else ""
        for leaf in "AB":
            names[f"{name}.{leaf}"] = f"base_model.model.{layer}{inner}.lora_{leaf}.weight"
    return names


def to_peft(name: str, values: Tensor) -> Tensor:
    """Return an A or B in PEFT's layout, which differs for experts: [E * r, in] and [out, r * E]."""
    if values.ndim == 3:
        values = values.transpose(1, 2).flatten(0, 1) if name.endswith("A") else values.permute(2, 1, 0).flatten(1)
    return values


def from_peft(name: str, like: Tensor, values: Tensor) -> Tensor:
    """Return an A or B from PEFT's layout; `like` has the result's shape."""
    if like.ndim == 3:
        experts, inputs, outputs = like.shape
        if name.endswith("A"):
            return values.view(experts, outputs, inputs).transpose(1, 2)
        return values.view(outputs, inputs, experts).permute(2, 1, 0)
    return values


def read_peft_settings(directory: str | Path) -> dict:
    """Return the rank, alpha and target modules of a PEFT directory. Raises InputError unless it is plain LoRA."""
    path = Path(directory) / PEFT_CONFIG
    config = read_json(path)
    unsupported = [key for key in ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern",
                                   "modules_to_save") if config.get(key)]
    unsupported += [key for key, plain in (("peft_type", "LORA"), ("bias", "none")) if config.get(key, plain) != plain]
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        unsupported.append("init_lora_weights")  # with these, PEFT changes the weights beneath
    if unsupported or not {"r", "lora_alpha"} <= config.keys():
        raise InputError(f"{path}: is not that of plain LoRA ({', '.join(unsupported) or 'no r or lora_alpha'}): merge "
                         "the adapter into the weights with PEFT, or train another one")
    names = HuggingFaceWeights(directory, PEFT_WEIGHTS).tensors
    layers = {n.partition(".lora_")[0].removeprefix("base_model.model.").removesuffix(".base_layer") for n in names}
    return {"rank": config["r"], "alpha": config["lora_alpha"], "target_modules": sorted(layers)}


def open_peft(directory: str | Path, model: nn.Module) -> RelaidTensors:
    """Open the adapters of a PEFT directory. Raises InputError if they are not those of the model."""
    source, names = HuggingFaceWeights(directory, PEFT_WEIGHTS), peft_names(model)
    parameters = {name: model.get_parameter(name) for name in names}
    stored = {name: shape for name, (_, shape) in source.tensors.items()}
    _check_trained(stored, {names[name]: to_peft(name, p).shape for name, p in parameters.items()}, source.path)
    return RelaidTensors(source, {name: (names[name], functools.partial(from_peft, name, p))
                                  for name, p in parameters.items()})


# ---- writing -------------------------------------------------------------------------------------------------------


class _HashedFile:
    """A new file. When its `with` block ends it is flushed to the disk, and `records` has its checksums.json entry."""

    def __init__(self, path: Path, records: dict[str, dict]):
        self.path, self.size, self._hash, self._records = path, 0, hashlib.sha256(), records

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
        self._records[self.path.name] = {"bytes": self.size, "sha256": self._hash.hexdigest()}


def _write_bytes(path: Path, data: bytes, records: dict[str, dict]) -> None:
    with _HashedFile(path, records) as file:
        file.write(data)


def _write_shard(path: Path, chunks: Iterable[TensorChunk], records: dict[str, dict]) -> list[tuple]:
    """Write chunks one after the other. Returns the entries that `_write_metadata` needs."""
    entries = []
    with _HashedFile(path, records) as file:
        for name, shape, offset, values in chunks:
            start = file.size
            buffer = io.BytesIO()  # if torch.save wrote to the file itself, it would hide why a write failed
            # A view would be saved with all of its storage.
            torch.save(values.cpu().clone(memory_format=torch.contiguous_format), buffer)
            file.write(buffer.getbuffer())
            location = _StorageInfo(path.name, start, file.size - start)
            entries.append((name, values.dtype, shape, torch.Size(offset), values.shape, location))
    return entries


def _write_metadata(directory: Path, entries: Iterable[tuple], records: dict[str, dict]) -> None:
    """Write the `.metadata` that makes a DCP checkpoint of written shards."""
    tensors: dict[str, dcp_metadata.TensorStorageMetadata] = {}
    storage = {}
    for name, dtype, shape, offset, sizes, location in entries:
        empty = dcp_metadata.TensorStorageMetadata(dcp_metadata.TensorProperties(dtype=dtype), shape, [])
        chunks = tensors.setdefault(name, empty).chunks
        storage[dcp_metadata.MetadataIndex(name, offset, len(chunks))] = location
        chunks.append(dcp_metadata.ChunkStorageMetadata(offset, sizes))
    _write_bytes(directory / ".metadata", pickle.dumps(dcp_metadata.Metadata(tensors, storage_data=storage)), records)


def _flush_directory(directory: Path) -> None:
    """Flush the names in a directory to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tracker(directory: Path, text: str) -> None:
    """Replace the tracker file, which names the newest iteration, or 'release'."""
    temporary = directory / f".tmp_{TRACKER}"
    temporary.unlink(missing_ok=True)
    _write_bytes(temporary, text.encode(), {})
    os.replace(temporary, directory / TRACKER)
    _flush_directory(directory)


# ---- directories that are complete or absent -----------------------------------------------------------------------


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _synced(action: Callable, group: dist.ProcessGroup | None):
    """Call `run_synced` on the background's gloo group; None is the default group, whose device is `ops.device`."""
    return run_synced(action, group, "cpu" if group is not None else kernels_npu.ops.device)


def _on_rank_0(action: Callable, group: dist.ProcessGroup | None) -> None:
    """Run `action` on rank 0 alone. If it fails, every rank raises."""
    _synced(lambda: action() if _rank() == 0 else None, group)


def _gather(value: object, group: dist.ProcessGroup | None) -> list:
    """Return the values of all ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


@contextlib.contextmanager
def atomic_directory(
    final: Path, tracker: str | None = None, stale: str | None = None, group: dist.ProcessGroup | None = None
) -> Iterator[tuple[Path, dict[str, dict]]]:
    """Write a directory that is complete or absent, whatever happens; every rank of `group` enters.

    Yields (staging directory, records). The block writes its files into the staging directory through `_HashedFile`,
    which flushes them and fills `records`. When the block has ended, rank 0 checks the files' sizes, writes the
    checksums, renames the directory to `final` and, last, writes `tracker`. If anything fails, the staging directory is
    removed and an older `final` stays.

    First, what killed writers left behind is removed, for every name that matches the pattern `stale` (None: `final`).
    """
    staging = final.with_name(f".tmp_{final.name}")
    records: dict[str, dict] = {}
    try:
        _on_rank_0(lambda: _begin(staging, final, stale or glob.escape(final.name)), group)
        yield staging, records
        all_records = {name: record for each in _gather(records, group) for name, record in each.items()}
        _on_rank_0(lambda: _commit(staging, final, all_records, tracker), group)
    finally:
        if _rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)  # after a commit it has its final name


def _begin(staging: Path, final: Path, stale: str) -> None:
    """Create the staging directory, and clean up after writers of `stale` names that were killed."""
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(f".tmp_{stale}"):
        shutil.rmtree(leftover)
    for replaced in final.parent.glob(f".old_{stale}"):
        original = replaced.with_name(replaced.name.removeprefix(".old_"))
        if original.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, original)
    staging.mkdir()


def _commit(staging: Path, final: Path, records: dict[str, dict], tracker: str | None) -> None:
    """Complete the staging directory and rename it to `final`. `records` are those of all ranks."""
    for name, record in records.items():
        if not (staging / name).is_file() or (staging / name).stat().st_size != record["bytes"]:
            raise InputError(f"{staging / name}: rank 0 sees only a part of it; use storage that every node shares")
    _write_bytes(staging / CHECKSUMS, json.dumps(records, indent=1, sort_keys=True).encode(), {})
    _flush_directory(staging)
    replaced = final.with_name(f".old_{final.name}")
    if final.exists():
        os.rename(final, replaced)  # `find_checkpoint` looks there in case this process dies before the next line
    os.rename(staging, final)
    _flush_directory(final.parent)
    if tracker is not None:
        write_tracker(final.parent, tracker)
    shutil.rmtree(replaced, ignore_errors=True)


# ---- a training run's checkpoints ----------------------------------------------------------------------------------


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a run's checkpoint holds: `stored_tensors`, without frozen parameters if the model has adapters."""
    tensors = stored_tensors(model)
    if named_adapters(model):
        tensors = {name: t for name, t in tensors.items() if t.requires_grad or not isinstance(t, nn.Parameter)}
    return tensors


def _chunks_to_save(model: nn.Module, optimizer: Optimizer | None) -> Iterator[TensorChunk]:
    """Yield what this rank writes: its shard of every DTensor (replicas take turns), and on rank 0 plain tensors."""
    tensors = {}
    for name, tensor in saved_tensors(model).items():
        tensors[name] = tensor
        state = optimizer.state.get(tensor, {}) if optimizer is not None else {}
        tensors |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
    for i, (name, tensor) in enumerate(tensors.items()):
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            axes = zip(mesh.get_coordinate(), mesh.shape, tensor.placements, strict=True)
            is_writer = all(rank == i % size for rank, size, placement in axes if placement.is_replicate())
        else:
            is_writer = _rank() == 0
        if is_writer:
            for offset, values in _local_chunks(tensor):
                yield name, tensor.shape, offset, values


def _save(
    final: Path, chunks: Iterable[TensorChunk], trainer_state: dict | None, settings: dict | None, retain: int | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Write the iteration directory `final` and point the tracker to it; every rank of `group` calls this.

    `chunks` and `trainer_state` are this rank's. If a rank fails, it raises InputError, the others PeerError, and the
    earlier iterations are unchanged (see `atomic_directory`).
    """
    iteration, rank = int(final.name.removeprefix("iter_")), _rank()
    if rank == 0:
        print_line(f"saving checkpoint at iteration {iteration:7d} to {final.parent}")

    def write() -> list[tuple]:
        entries = _write_shard(staging / f"__{rank}_0.distcp", chunks, records)
        if trainer_state is not None:
            buffer = io.BytesIO()
            torch.save(trainer_state, buffer)
            _torch_load(buffer.getvalue())  # refuse to save a state that cannot be loaded
            _write_bytes(staging / f"trainer_state_rank_{rank:05d}.pt", buffer.getvalue(), records)
        return entries

    def describe() -> None:
        _write_metadata(staging, itertools.chain(*entries_of_ranks), records)
        if settings is not None:
            _write_bytes(staging / SETTINGS, json.dumps(settings, indent=1).encode(), records)
        CheckpointWeights(staging)  # every tensor has all of its values

    try:
        with atomic_directory(final, str(iteration), "iter_*", group) as (staging, records):
            entries_of_ranks = _gather(_synced(write, group), group)
            _on_rank_0(describe, group)
    except Exception as e:
        if is_peer_failure(e):
            raise
        failure = InputError(f"{final}: was not saved: {one_line(e)}; the iterations before it are as they were")
        failure.only_on_this_rank = getattr(e, "only_on_this_rank", False)  # for `run_program`
        raise failure from e
    if rank == 0:
        print_line(f"successfully saved checkpoint from iteration {iteration:7d} to {final.parent}")
    if retain:
        _on_rank_0(lambda: _prune(final.parent, iteration, retain), group)


class CheckpointWriter:
    """Save a run's checkpoints one at a time. The `with` block ends when the last one is written.

    In the background, training waits only while this rank's chunks are copied to host memory, which is allocated once.
    A thread then writes the checkpoint. It has its own process group, so that its collectives never mix with those of
    training. A failure raises in `wait` or in the next `save`.
    """

    def __init__(self, background: bool = False, timeout: timedelta | None = None):
        self._thread = ThreadPoolExecutor(1, "save") if background else None
        self._group = dist.new_group(backend="gloo", timeout=timeout) if background else None
        self._saving: Future | None = None
        self._copies: dict[tuple, Tensor] = {}

    def save(
        self, save_dir: str | Path, iteration: int, model: nn.Module, optimizer: Optimizer | None = None,
        trainer_state: dict | None = None, retain: int | None = None, settings: dict | None = None,
    ) -> Path:
        """Write `save_dir/iter_XXXXXXX`, or start to write it in the background, and return it; every rank calls this.

        `trainer_state` is this rank's: plain types and tensors, with "iteration" (int) and "data" (dict). `retain` is
        the number of iterations to keep, among those up to this one. `settings` are the run's, for `read_settings`:
        JSON types, the same on every rank. Raises the errors of `_save`.
        """
        self.wait()  # the previous save still reads the copies
        final, chunks = Path(save_dir) / f"iter_{iteration:07d}", _chunks_to_save(model, optimizer)
        if self._thread is None:
            _save(final, chunks, trainer_state, settings, retain, None)
        else:
            copies = [(name, shape, offset, self._copy((name, offset), values))
                      for name, shape, offset, values in chunks]
            kernels_npu.ops.synchronize()
            self._saving = self._thread.submit(_save, final, copies, copy.deepcopy(trainer_state),
                                               copy.deepcopy(settings), retain, self._group)
        return final

    def _copy(self, key: tuple, values: Tensor) -> Tensor:
        on_accelerator = not values.is_cpu
        if key not in self._copies:
            self._copies[key] = torch.empty(values.shape, dtype=values.dtype, pin_memory=on_accelerator)
        return self._copies[key].copy_(values, non_blocking=on_accelerator)

    def failed(self) -> bool:
        """Return whether the background save has failed on this rank; `wait` then raises on every rank."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def wait(self) -> None:
        """Wait until nothing is being saved, and raise what the save raised."""
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
                logger.error("%s", e)  # without hiding the error that ends the run
        if self._thread is not None:
            self._thread.shutdown()


def _iterations(save_dir: Path) -> dict[int, Path]:
    """Return the directories of the iterations in a save directory, in order."""
    found = {int(d.name[5:]): d for d in save_dir.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", d.name)}
    return dict(sorted(found.items()))


def _prune(save_dir: Path, newest: int, retain: int) -> None:
    """Remove all but the last `retain` iterations up to `newest`."""
    for directory in [d for i, d in _iterations(save_dir).items() if i <= newest][:-retain]:
        doomed = directory.with_name(f".tmp_{directory.name}")
        os.rename(directory, doomed)  # a directory that is half removed must not look like an iteration
        shutil.rmtree(doomed)


def find_checkpoint(load_dir: str | Path) -> Path:
    """Return the checkpoint in a directory: itself, or the one that the tracker file in it names.

    Raises InputError if there is none.
    """
    path = Path(load_dir)
    if (path / ".metadata").exists():
        return path
    if not (path / TRACKER).is_file():
        problem = f"has no {TRACKER}" if path.is_dir() else "does not exist"
        advice = ("convert it first (convert.py hf_to_dcp)" if hf_has_weights(path) else
                  "give a save directory, one of its iter_XXXXXXX, or an output of hf_to_dcp")
        raise InputError(f"{path}: is not a checkpoint (it {problem}): {advice}")
    tracker = (path / TRACKER).read_text(errors="replace").strip()
    if not re.fullmatch(r"release|[0-9]{1,12}", tracker):
        raise InputError(f"{path / TRACKER}: holds {shorten(tracker)} instead of an iteration's number or 'release'; "
                         "name one of the iterations")
    name = tracker if tracker == "release" else f"iter_{int(tracker):07d}"
    for directory in (path / name, path / f".old_{name}"):  # the second if a save that replaced the first was killed
        if (directory / ".metadata").exists():
            return directory
    raise InputError(f"{path / TRACKER}: names {name}, which is missing or incomplete; name another iteration")


# ---- conversions ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _conversion(final: Path, nbytes: int, tracker: str | None = None) -> Iterator[tuple[Path, dict[str, dict], tqdm]]:
    """Check that the disk has room for `nbytes`, then yield what `atomic_directory` does, and a progress bar."""
    existing = next(d for d in final.parents if d.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise InputError(f"{existing}: {nbytes / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; free some space")
    try:
        with (tqdm(total=nbytes, desc=final.name, unit="B", unit_scale=True) as bar,
              atomic_directory(final, tracker) as (staging, records)):
            yield staging, records, bar
    except OSError as e:
        raise InputError(f"{final}: was not written: {e.strerror or e}") from e


def hf_to_dcp(hf_dir: str | Path, dcp_dir: str | Path, overwrite: bool = False) -> Path:
    """Write `dcp_dir/release` and its tracker file: types as stored, published layout, one shard per source file."""
    model = build_model(Qwen3VLConfig.from_json(hf_dir))
    source = HuggingFaceWeights(hf_dir).check_compatible(model)
    final = Path(dcp_dir).resolve() / "release"
    if _iterations(final.parent):
        raise InputError(f"{final.parent}: is the directory of a training run; choose another --dcp_dir")
    if not overwrite and (final.exists() or (final.parent / TRACKER).exists()):
        raise InputError(f"{final.parent}: already holds a checkpoint; choose another --dcp_dir, or give --overwrite")
    names = {name for name in stored_tensors(model) if name in source.tensors}

    def chunks(file: str) -> Iterator[TensorChunk]:
        for name in source.files[file]:
            if name not in names:
                continue
            dtype, shape = source.tensors[name]
            for offset, sizes in _row_chunks(shape, dtype.itemsize):
                yield name, shape, offset, source.read(name, offset, sizes)
                bar.update(math.prod(sizes) * dtype.itemsize)

    total = sum(_nbytes(source.tensors[name]) for name in names)
    with _conversion(final, total, tracker="release") as (staging, records, bar):
        entries = []
        for i, file in enumerate(source.files):
            entries += _write_shard(staging / f"__0_{i}.distcp", chunks(file), records)
        _write_metadata(staging, entries, records)
    return final


def _nbytes(info: TensorInfo) -> int:
    dtype, shape = info
    return dtype.itemsize * shape.numel()


# configuration, tokenizer, chat template, licence; neither weights nor code
_ASSET = re.compile(r".*(?<!\.index)\.json|.*\.(txt|jinja|model)|(LICEN[SC]E|NOTICE).*")


def dcp_to_hf(load_dir: str | Path, save_dir: str | Path, model_assets_dir: str | Path, dtype: str | None = None,
              overwrite: bool = False, max_shard_gb: float = 5, keep_preprocessor: bool = False) -> Path:
    """Write a checkpoint's parameters and buffers as a Hugging Face directory, with the base model's assets.

    `dtype` ('bfloat16', ...) is the parameters' type, by default the one in the assets' config.json, or else the stored
    type. Buffers keep their own. Adapters are merged into the weights that they belong to (see `open_checkpoint`). The
    preprocessor files get the limits of the training run and a line is printed, unless `keep_preprocessor`.
    """
    assets = Path(model_assets_dir)
    config = Qwen3VLConfig.from_json(assets)
    model = build_model(config)
    source = open_checkpoint(load_dir, assets).check_compatible(model)
    final = Path(save_dir).resolve()
    _check_output(final, [assets.resolve(), source.path.resolve()], overwrite)
    dtype = dtype or config.dtype
    names = [name for name in stored_tensors(model) if name in source.tensors]
    parameters = {name for name, _ in model.named_parameters()}
    output = _output_tensors({name: source.tensors[name] for name in names}, parameters, dtype)
    shards = _split_into_shards(output, max_shard_gb * 1e9)
    total = sum(map(_nbytes, output.values()))
    limits = {} if keep_preprocessor else read_settings(source.path).get("media_limits", {})
    preprocessors = data.preprocessor_files(assets, limits) if limits else {}
    files = {path.name: path.read_bytes() for path in assets.glob("*")
             if path.is_file() and _ASSET.fullmatch(path.name) and path.name != CHECKSUMS}
    files |= {name: json.dumps(content, indent=2).encode() for name, content in preprocessors.items()}
    if dtype is not None:
        files["config.json"] = _config_with_dtype(files["config.json"], dtype)
    with _conversion(final, total) as (staging, records, bar):
        weight_map = {}
        for i, shard in enumerate(shards):
            file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(shard, file_name)
            with _HashedFile(staging / file_name, records) as file:
                _write_safetensors(file, {name: output[name] for name in shard}, source, bar)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_bytes(staging / INDEX, json.dumps(index, indent=2).encode(), records)
        for name, content in sorted(files.items()):
            _write_bytes(staging / name, content, records)
    if preprocessors:
        print(f"{final}: wrote the training run's {data.describe_limits(limits)} into {' and '.join(preprocessors)} "
              "(--keep-preprocessor copies the base model's files)")
    return final


def dcp_to_peft(
    load_dir: str | Path, save_dir: str | Path, model_assets_dir: str | Path, overwrite: bool = False
) -> Path:
    """Write a checkpoint's adapters as a PEFT directory. Raises InputError if other weights were trained too."""
    source = CheckpointWeights(find_checkpoint(load_dir))
    settings = read_settings(source.path).get("adapters")
    stored = {name: shape for name, (_, shape) in source.tensors.items() if not name.startswith("optimizer.")}
    others = [name for name in stored if ".lora." not in name]
    if settings is None or others:
        reason = "has no adapters" if settings is None else f"holds more than adapters ({others[0]}, ...)"
        raise InputError(f"{source.path}: {reason}, so PEFT cannot load it; convert it with dcp_to_hf")
    model = build_model(Qwen3VLConfig.from_json(model_assets_dir))
    add_adapters(model, settings)
    names = peft_names(model)
    _check_trained(stored, {name: model.get_parameter(name).shape for name in names}, source.path)
    final = Path(save_dir).resolve()
    _check_output(final, [Path(model_assets_dir).resolve(), source.path.resolve()], overwrite)
    relaid = RelaidTensors(source, {peft_name: (name, functools.partial(to_peft, name))
                                    for name, peft_name in names.items()})
    experts = [target for target in settings["target_modules"] if target.endswith("experts")]
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model_assets_dir), "bias": "none",
        "r": settings["rank"], "lora_alpha": settings["alpha"], "lora_dropout": settings["dropout"],
        "target_modules": [target for target in settings["target_modules"] if target not in experts],
        "target_parameters": [f"{target}.{name}" for target in experts for name in ("gate_up_proj", "down_proj")],
        "exclude_modules": ["patch_embed.proj"] * ("proj" in settings["target_modules"]),  # a convolution there
        "inference_mode": True,
    }
    with _conversion(final, sum(map(_nbytes, relaid.tensors.values()))) as (staging, records, bar):
        with _HashedFile(staging / PEFT_WEIGHTS, records) as file:
            _write_safetensors(file, relaid.tensors, relaid, bar)
        _write_bytes(staging / PEFT_CONFIG, json.dumps(config, indent=1).encode(), records)
    if settings["base"]:
        logger.warning("%s: its adapters belong to the weights of %s, which dcp_to_hf converts",
                       final, settings["base"])
    return final


def _check_output(final: Path, inputs: list[Path], overwrite: bool) -> None:
    """Raise InputError unless `final` is new, or may be overwritten and is an earlier conversion's output."""
    if not final.exists() or final.is_dir() and not any(final.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{final}: already exists; choose another --save_dir, or give --overwrite")
    holds_input = any(final == path or final in path.parents for path in inputs)
    if holds_input or not any((final / name).exists() for name in (INDEX, PEFT_CONFIG)):
        raise InputError(f"{final}: is not overwritten, because it holds the input or is not the output of an earlier "
                         "conversion; choose another --save_dir")


def _output_tensors(
    stored: dict[str, TensorInfo], parameters: Collection[str], dtype: str | None
) -> dict[str, TensorInfo]:
    """Return the types and shapes to write: parameters in `dtype` if given, all else as stored. Raises InputError."""
    types = {str(t).removeprefix("torch."): t for t in SAFETENSORS_TYPES.values()}
    if dtype is not None and dtype not in types:
        raise InputError(f"config.json: its dtype {dtype!r} is not a type of weights; give --dtype bfloat16")
    output = {}
    for name, (stored_type, shape) in stored.items():
        output[name] = types[dtype] if dtype and name in parameters else stored_type, shape
        if output[name][0] not in (*types.values(), *BUFFER_TYPES.values()):
            raise InputError(f"{name} has type {stored_type}, which is not a type of weights; give --dtype bfloat16")
    if any(name.endswith(EXPERTS) and shape[1] == shape[2] for name, (_, shape) in output.items()):
        logger.warning("the experts are square: transformers 5 will take them for its own transposed layout")
    return output


def _split_into_shards(tensors: dict[str, TensorInfo], max_bytes: float) -> list[list[str]]:
    """Distribute names, in order, over as few files of at most `max_bytes` as possible."""
    shards: list[list[str]] = []
    remaining = 0.0
    for name, info in tensors.items():
        remaining -= _nbytes(info)
        if remaining < 0 or not shards:
            shards.append([])
            remaining = max_bytes - _nbytes(info)
        shards[-1].append(name)
    return shards


def _write_safetensors(file: _HashedFile, tensors: dict[str, TensorInfo], source: Source, bar: tqdm) -> None:
    """Write tensors in the given types, chunk by chunk. Wide types come first, because readers map aligned values."""
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1][0].itemsize))
    labels = {dtype: label for label, dtype in (SAFETENSORS_TYPES | BUFFER_TYPES).items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt", **LAYOUT}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + _nbytes((dtype, shape))
        header[name] = {"dtype": labels[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name, (dtype, shape) in tensors.items():
        stored_type, _ = source.tensors[name]
        for offset, sizes in _row_chunks(shape, max(dtype.itemsize, stored_type.itemsize)):
            values = source.read(name, offset, sizes).to(dtype).contiguous()
            file.write(memoryview(values.view(-1).view(torch.uint8).numpy()))
            bar.update(values.nbytes)


def _config_with_dtype(content: bytes, dtype: str) -> bytes:
    """Return config.json with the type of the weights; unchanged bytes if it names that type already."""
    config = json.loads(content)
    parts = (config, config["text_config"], config["vision_config"])
    entries = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if key in part] or [(config, "dtype")]
    if all(part.get(key) == dtype for part, key in entries):
        return content
    for part, key in entries:
        part[key] = dtype
    return json.dumps(config, indent=2, ensure_ascii=False).encode()


# ---- verify --------------------------------------------------------------------------------------------------------


def verify(directory: str | Path) -> list[str]:
    """Check a directory's files, or those of every iteration in a save directory, against checksums.json.

    Without one, only the sizes in headers and indices are checked. Returns one line per directory; raises InputError at
    the first that is damaged.
    """
    path = Path(directory)
    if not path.is_dir():
        raise InputError(f"{path}: is not a directory")
    if (path / TRACKER).exists():
        find_checkpoint(path)
    checkpoints = [*_iterations(path).values(), *path.glob("release")]
    return [_verify_one(checkpoint) for checkpoint in checkpoints or [path]]


def _verify_one(path: Path) -> str:
    if not (path / CHECKSUMS).exists():
        source = CheckpointWeights(path) if (path / ".metadata").exists() else HuggingFaceWeights(path)
        if not source.tensors:
            raise InputError(f"{path}: holds no tensors; use another checkpoint")
        return (f"{path}: {len(source.tensors)} tensors, sizes are right "
                f"(without {CHECKSUMS}, contents cannot be checked)")
    records = _read_checksums(path)
    for file in path.iterdir():
        if file.is_file() and file.name not in (*records, CHECKSUMS):
            raise InputError(f"{file}: is not in {CHECKSUMS}; use another checkpoint")
    sizes = {name: record["bytes"] for name, record in records.items()}
    _check_sizes(path, sizes)
    with tqdm(total=sum(sizes.values()), desc=path.name, unit="B", unit_scale=True) as bar:
        for name, record in records.items():
            digest = hashlib.sha256()
            with open(path / name, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    bar.update(len(block))
            if digest.hexdigest() != record["sha256"]:
                raise InputError(f"{path / name}: has other contents than were written; use another checkpoint")
    return f"{path}: {len(records)} files, {sum(sizes.values()) / 1e9:.3f} GB, all as written"


# ---- command line --------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    """Run the command line. `common.run_program` reports what this raises."""
    parser = Parser(description="Hugging Face safetensors <-> DCP checkpoints", prog="convert.py")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{hf_to_dcp,dcp_to_hf,dcp_to_peft,verify}")
    to_dcp = commands.add_parser("hf_to_dcp", help="convert a Hugging Face directory to DCP_DIR/release")
    to_dcp.add_argument("--hf_dir", required=True, help="directory with config.json and safetensors")
    to_dcp.add_argument("--dcp_dir", required=True, help="directory to write release/ and the tracker file to")
    to_hf = commands.add_parser("dcp_to_hf", help="convert a checkpoint to a Hugging Face directory, adapters merged")
    to_peft = commands.add_parser("dcp_to_peft", help="convert a checkpoint's adapters to a PEFT directory")
    for command in (to_hf, to_peft):
        command.add_argument("--load_dir", required=True,
                             help="an iteration's directory, or a save directory for its latest")
        command.add_argument("--save_dir", required=True, help="directory to write")
        command.add_argument("--model_assets_dir", required=True, help="Hugging Face directory of the base model: its "
                             "configuration, tokenizer and licence, and the weights that adapters are merged into")
    to_hf.add_argument("--dtype", choices=["bfloat16", "float16", "float32"],
                       help="type of the written weights (default: the one in config.json, else as stored)")
    to_hf.add_argument("--keep-preprocessor", action="store_true",
                       help="copy the preprocessor files as they are, without the training run's limits of pixels and "
                       "frames")
    to_hf.add_argument("--max-shard-size", type=number(float, 0, above=True), default=5.0, metavar="GB",
                       help="largest size of a safetensors file")
    for command in (to_dcp, to_hf, to_peft):
        command.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    verifier = commands.add_parser("verify", help="check a directory's files against their checksums")
    verifier.add_argument("dir", help="a checkpoint, a save directory or a Hugging Face directory")
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args, unknown = parser.parse_known_args(argv)
    if unknown:  # the command's own parser suggests similar flags
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.command == "hf_to_dcp":
        print("wrote", hf_to_dcp(args.hf_dir, args.dcp_dir, args.overwrite))
    elif args.command == "dcp_to_hf":
        print("wrote", dcp_to_hf(args.load_dir, args.save_dir, args.model_assets_dir, args.dtype, args.overwrite,
                                 args.max_shard_size, args.keep_preprocessor))
    elif args.command == "dcp_to_peft":
        print("wrote", dcp_to_peft(args.load_dir, args.save_dir, args.model_assets_dir, args.overwrite))
    else:
        print("\n".join(verify(args.dir)))


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
