"""The threat model: untrusted files never run code, and damaged data is refused in one line.

`POISONED` is a table of files made to do harm. The fuzz test damages valid files; a number and a name reproduce an
input:

    python tests/test_fuzz.py "rows" 1234
"""
from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # for the command line above

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.distributed.checkpoint import metadata as dcp_metadata  # noqa: E402

import convert  # noqa: E402
import data  # noqa: E402
from common import InputError  # noqa: E402
from model import Qwen3VLConfig, build_model  # noqa: E402

ROWS = [
    {"id": "7", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A bus."},
        {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
    {"messages": [{"role": "system", "content": "Short."}, {"role": "user", "content": "<image> or <image>?"},
                  {"role": "assistant", "content": "Both."}], "images": ["a.png", "b.jpg"], "videos": []},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>"}, {"type": "image", "image": "b.jpg"},
                                               {"type": "video", "video": "v.gif"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "Ja."}]}]},
    {"messages": [{"role": "user", "content": "<video>"}, {"role": "assistant", "content": "?"}],
     "videos": [{"path": "frames", "fps": 4.0}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Grüße \U0001f600"}]},
]
IMAGES = ("a.png", "b.jpg", "c.webp", "d.bmp", "e.tif", "f.ppm", "v.gif", "v.webp")
ITERATION = "run/iter_0000003"
STATE_FILE = f"{ITERATION}/trainer_state_rank_00000.pt"


def make_valid(root: Path) -> None:
    """Write small valid files of every kind: images, a Hugging Face directory, a checkpoint."""
    image = Image.effect_noise((40, 36), 60).convert("RGB")
    (root / "frames").mkdir()
    for name in (*IMAGES[:6], "frames/1.png", "frames/2.png"):
        image.save(root / name)
    frames = [Image.effect_noise((40, 36), 60).convert("P") for _ in range(3)]
    for name in IMAGES[6:]:
        frames[0].save(root / name, save_all=True, append_images=frames[1:], duration=[100, 300, 100])
    raw = tiny.config_dict(moe=True, layers=1)
    raw["vision_config"] |= {"depth": 1, "deepstack_visual_indexes": [0]}
    hf = tiny.hf_dir(root / "hf", raw)
    model = build_model(Qwen3VLConfig.from_json(hf)).to_empty(device="cpu")
    model.init_weights(0)
    save_file({name: p.detach().bfloat16() for name, p in model.named_parameters()}, hf / "model.safetensors")
    state = {"iteration": 3, "world": 1, "data": {"consumed": 12}, "rng": {"torch": torch.get_rng_state()}}
    convert.CheckpointWriter().save(root / "run", 3, model, None, state)


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("valid")
    make_valid(root)
    return root


@pytest.fixture
def root(valid, tmp_path) -> Path:
    """A copy of the valid files to damage."""
    return shutil.copytree(valid, tmp_path / "root")


# ---- readers -------------------------------------------------------------------------------------------------------


def read_hf(root: Path) -> None:
    """Read all that a program reads of a Hugging Face directory."""
    model = build_model(Qwen3VLConfig.from_json(root / "hf"))
    processor = data.Processor(root / "hf")
    for row in ROWS[0], ROWS[4]:
        processor.decode(processor.encode(row, root).input_ids)
    read_tensors(convert.HuggingFaceWeights(root / "hf").check_compatible(model))


def read_tensors(source: convert.Source) -> None:
    for name, (_, shape) in list(source.tensors.items())[::5]:
        assert source.read(name, (0,) * len(shape), shape).shape == shape


def read_run(root: Path) -> None:
    """Read all that a program reads of a save directory."""
    model = build_model(Qwen3VLConfig.from_json(root / "hf"))
    directory = convert.find_checkpoint(root / "run")
    read_tensors(convert.CheckpointWeights(directory).check_compatible(model))
    state = convert.load_trainer_state(directory, rank=0)
    assert state["iteration"] == 3 and state["data"] == {"consumed": 12}
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
        convert.verify(root / "run")


def read_row(root: Path, **row) -> None:
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    options = data.EncodeOptions(confine_paths=True)
    data.Processor(root / "hf").encode({"messages": messages} | row, root, options=options)


def test_readers_accept_valid_files(root):
    """The files that the other tests damage have no fault of their own."""
    read_hf(root)
    read_run(root)
    read_row(root, images=["a.png"], videos=["frames"])


# ---- files made to do harm -----------------------------------------------------------------------------------------


class RunsCode:
    """Its pickle creates the file `ran` when it is loaded."""

    def __init__(self, root: Path):
        self.command = f"touch {root / 'ran'}"

    def __reduce__(self):
        return os.system, (self.command,)


def code(root: Path, protocol: int = 2) -> bytes:
    return pickle.dumps(RunsCode(root), protocol)


def torch_zip(content: bytes) -> bytes:
    """Return a file that torch.load accepts, with this pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in {"data.pkl": content, "version": b"3\n", "byteorder": b"little", "data/0": b"\0" * 9}.items():
            archive.writestr(f"archive/{name}", part)
    return file.getvalue()


def set_metadata(root: Path, content: bytes) -> None:
    (root / ITERATION / convert.CHECKSUMS).unlink()  # an untrusted checkpoint has fitting checksums, or none
    (root / ITERATION / ".metadata").write_bytes(content)


def change_metadata(root: Path, change) -> None:
    metadata = pickle.loads((root / ITERATION / ".metadata").read_bytes())
    change(metadata)
    set_metadata(root, pickle.dumps(metadata))


def set_paths(metadata: dcp_metadata.Metadata, path: str) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = path


def set_chunk(root: Path, content: bytes) -> None:
    """Replace the first chunk of a tensor that `read_tensors` reads."""
    source = convert.CheckpointWeights(root / ITERATION)
    (_, _, place), *_ = source._chunks[next(iter(source.tensors))]
    shard = bytearray((root / ITERATION / place.relative_path).read_bytes())
    shard[place.offset : place.offset + place.length] = content.ljust(place.length, b"\0")
    (root / ITERATION / place.relative_path).write_bytes(shard)

    def set_length(metadata: dcp_metadata.Metadata) -> None:
        for info in metadata.storage_data.values():
            if info.offset == place.offset:
                info.length = len(content)

    change_metadata(root, set_length)


def set_state(root: Path, content: bytes) -> None:
    (root / ITERATION / convert.CHECKSUMS).unlink()
    (root / STATE_FILE).write_bytes(content)


def set_header(root: Path, **change) -> None:
    """Write a safetensors file of two tensors of 32 bytes, and change one's entry in the header."""
    header = {name: {"dtype": "F32", "shape": [8], "data_offsets": [at, at + 32]} for name, at in (("a", 0), ("b", 32))}
    header["b"] |= change
    encoded = json.dumps(header).encode()
    (root / "hf/model.safetensors").write_bytes(len(encoded).to_bytes(8, "little") + encoded + b"\0" * 64)


def set_index(root: Path, file: str) -> None:
    (root / "hf/model.safetensors").unlink()
    (root / "hf" / convert.INDEX).write_text(json.dumps({"weight_map": {"a": file}}))


def link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


# pathlib.PosixPath.is_relative_to = MetadataIndex: every path would then lie inside --dataset-dir
BUILD_ON_A_CLASS = (b"\x80\x02cpathlib\nPosixPath\nN}X\x0e\0\0\0is_relative_toctorch.distributed.checkpoint.metadata\n"
                    b"MetadataIndex\ns\x86b.")
BUILD_ON_A_FUNCTION = b"\x80\x02ctorch.serialization\n_get_layout\n}X\1\0\0\0xK\1sb."
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(ran) (w) file\n"
POISONED = {
    # name: (how to make the file, who reads it, what the error names)
    **{f"metadata runs code, protocol {n}": (lambda r, n=n: set_metadata(r, code(r, n)), read_run, "posix.system")
       for n in (0, 2, 4)},
    "metadata changes a class": (lambda r: set_metadata(r, BUILD_ON_A_CLASS), read_run, "sets attributes of <class"),
    "metadata changes a function": (lambda r: set_metadata(r, BUILD_ON_A_FUNCTION), read_run, "sets attributes of"),
    "metadata is something else": (lambda r: set_metadata(r, pickle.dumps({"a": 1})), read_run, ".metadata"),
    **{f"metadata leads to {path}": (lambda r, path=path: change_metadata(r, lambda m: set_paths(m, path)), read_run,
                                     "not a file of this directory") for path in ("../../x", "/etc/passwd", "..", 7)},
    "metadata stores an object": (
        lambda r: change_metadata(r, lambda m: m.state_dict_metadata.update(
            {"model.visual.patch_embed.proj.weight": dcp_metadata.BytesStorageMetadata()})),  # dcp.load unpickles it
        read_run, "1 missing: model.visual.patch_embed.proj.weight"),
    "chunk runs code": (lambda r: set_chunk(r, torch_zip(code(r))), read_run, "__0_0.distcp"),
    "chunk is a bare pickle": (lambda r: set_chunk(r, code(r)), read_run, "__0_0.distcp"),
    "trainer state runs code": (lambda r: set_state(r, torch_zip(code(r))), read_run, "trainer_state"),
    "trainer state is a bare pickle": (lambda r: set_state(r, code(r)), read_run, "trainer_state"),
    "checksums of another directory": (
        lambda r: (r / ITERATION / convert.CHECKSUMS).write_text('{"../a": {"bytes": 1, "sha256": ""}}'), read_run,
        "'../a'"),
    "tracker leads out": (lambda r: (r / "run" / convert.TRACKER).write_text("../../x"), read_run, convert.TRACKER),

    "weights are a pickle": (lambda r: (r / "hf/model.safetensors").rename(r / "hf/pytorch_model.bin"), read_hf,
                             "is a pickle, which can run code"),
    **{f"index leads to {file!r}": (lambda r, file=file: set_index(r, file), read_hf, "not a file of this directory")
       for file in ("../../etc/passwd", "/etc/passwd", "..", "", 7, None, ["x"], "x\0")},
    **{f"safetensors with {change}": (lambda r, change=change: set_header(r, **change), read_hf, "model.safetensors")
       for change in ({"data_offsets": [16, 48]}, {"data_offsets": [40, 72]}, {"data_offsets": [-32, 0]},
                      {"data_offsets": [32, 32 + 10**13], "shape": [25 * 10**11]}, {"shape": [2**62, 2**62]},
                      {"shape": [9]}, {"dtype": "F64"})},

    "image is PostScript": (lambda r: (r / "x.jpg").write_bytes(POSTSCRIPT), lambda r: read_row(r, images=["x.jpg"]),
                            "x.jpg cannot be read"),
    "image of 10**9 pixels": (lambda r: (r / "x.ppm").write_bytes(b"P6 40000 40000 255\n" + b"x" * 99),
                              lambda r: read_row(r, images=["x.ppm"]), "decompression bomb"),
    "image linked from elsewhere": (lambda r: link(r / "x.jpg", "/etc/passwd"),
                                    lambda r: read_row(r, images=["x.jpg"]), "--confine-paths"),
    "frames linked from elsewhere": (lambda r: link(r / "frames/3.png", "/etc/passwd"),
                                     lambda r: read_row(r, videos=["frames"]), "--confine-paths"),
    "path out of the folder": (lambda r: None, lambda r: read_row(r, images=["../../etc/passwd"]), "--confine-paths"),
    "absolute path": (lambda r: None, lambda r: read_row(r, videos=["/etc"]), "--confine-paths"),
    "video is a playlist": (lambda r: (r / "x.mp4").write_text("ffconcat version 1.0\nfile v.gif\n"),
                            lambda r: read_row(r, videos=["x.mp4"]), "x.mp4"),
    "video is a list of addresses": (
        lambda r: (r / "x.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n"),
        lambda r: read_row(r, videos=["x.mp4"]), "x.mp4"),
}


@pytest.mark.parametrize("case", POISONED)
def test_poisoned_file_is_refused(case, root):
    make, read, named = POISONED[case]
    make(root)
    with pytest.raises(InputError) as error:
        read(root)
    assert named in str(error.value) and "\n" not in str(error.value)
    assert not (root / "ran").exists()
    assert Path("/a").is_relative_to("/") and not hasattr(torch.serialization._get_layout, "x")


def test_code_beside_a_model_is_not_run(root):
    """`auto_map` and the files that it names mean nothing here, as with trust_remote_code=False."""
    raw = json.loads((root / "hf/config.json").read_text())
    raw["auto_map"] = {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None]}
    (root / "hf/config.json").write_text(json.dumps(raw))
    (root / "hf/evil.py").write_text(f"open({str(root / 'ran')!r}, 'w')")
    read_hf(root)
    assert not (root / "ran").exists() and "evil" not in sys.modules


# ---- damaged files -------------------------------------------------------------------------------------------------

HOSTILE = [None, True, 0, -1, 7, 2**63, 0.5, float("nan"), "", "x", "\0", "é", "<image>", "<image>" * 99, "<video>",
           "<|im_end|>", "../../etc/passwd", "/etc/passwd", "..", "a.png", "v.gif", "x" * 300, [], {}, [None], [{}],
           {"path": "a.png"}, {"path": ["a.png", "b.jpg"], "fps": 2.0}]


def positions(value) -> Iterator[tuple[dict | list, object]]:
    """Yield (container, key) of everything inside a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from positions(value[key])


def mutate_value(value, rng: random.Random):
    """Return a copy of a JSON value with some parts replaced, removed or moved."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        everything = list(positions(value))
        if not everything:
            break
        (container, key), (other, other_key) = rng.choices(everything, k=2)
        kind = rng.randrange(5)
        if kind == 0:
            del container[key]
        elif kind == 1:
            container[key] = copy.deepcopy(other[other_key])
        else:
            container[key] = copy.deepcopy(rng.choice(HOSTILE))
    return value


def mutate_bytes(content: bytes, rng: random.Random, end: int | None = None) -> bytes:
    """Return the bytes with some before `end` flipped, replaced, removed or inserted, or with the rest cut off."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        limit = min(len(content), end or len(content))
        if not limit:
            break
        at, length = rng.randrange(limit), rng.choice((1, 1, 4, 40))
        kind = rng.randrange(5)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at] = rng.choice(b'\0\xff\x7f"\\[]{},:0 \n')
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = rng.randbytes(length)
        else:
            del content[at:]
    return bytes(content)


def fuzz_rows(root: Path, rng: random.Random) -> None:
    row = mutate_value(rng.choice(ROWS), rng)
    options = data.EncodeOptions(seq_length=rng.choice((None, 20, 4096)), confine_paths=rng.random() < 0.7)
    sample = data.Processor(root / "hf", video_maxlen=8).encode(row, root, options=options)
    assert len(sample.labels) == len(sample.input_ids) == sample.position_ids.shape[1]


def fuzz_row_files(root: Path, rng: random.Random) -> None:
    """A damaged list is read as Python's own parser reads it, or refused; lines are refused one by one."""
    rows = rng.choices(ROWS, k=3)
    is_list = rng.random() < 0.5
    text = json.dumps(rows, indent=rng.choice((None, 1))) if is_list else "\n".join(map(json.dumps, rows))
    path = root / "rows.json"
    path.write_bytes(mutate_bytes(text.encode(), rng))
    dataset = data.RowDataset([str(path)])
    found = [dataset[i][0] for i in range(len(dataset))]
    if is_list and path.read_bytes().lstrip().startswith(b"["):
        assert repr(found) == repr(json.loads(path.read_bytes(), strict=False))


def fuzz_config(root: Path, rng: random.Random) -> None:
    path = root / "hf/config.json"
    content = path.read_bytes()
    if rng.random() < 0.5:
        content = mutate_bytes(content, rng)
    else:
        raw = json.loads(content)
        container, key = rng.choice([(c, k) for c, k in positions(raw) if isinstance(c, dict)])
        container.pop(key)
        content = json.dumps(raw).encode()
    path.write_bytes(content)
    build_model(Qwen3VLConfig.from_json(root / "hf"))


def fuzz_processor(root: Path, rng: random.Random) -> None:
    path = root / "hf" / rng.choice(("tokenizer.json", "tokenizer.json", "preprocessor_config.json"))
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    processor = data.Processor(root / "hf")
    processor.decode(processor.encode(ROWS[0], root).input_ids)


def fuzz_safetensors(root: Path, rng: random.Random) -> None:
    path = root / "hf/model.safetensors"
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(mutate_bytes(content, rng, end=rng.choice((8, header_end, None))))
    model = build_model(Qwen3VLConfig.from_json(root / "hf"))
    read_tensors(convert.HuggingFaceWeights(root / "hf").check_compatible(model))


def fuzz_checkpoint(root: Path, rng: random.Random) -> None:
    """A damaged file of a checkpoint is refused, wherever the damage is, unless nothing has changed."""
    name = rng.choice((".metadata", ".metadata", "__0_0.distcp", "trainer_state_rank_00000.pt", convert.CHECKSUMS))
    path = root / ITERATION / name
    valid = path.read_bytes()
    path.write_bytes(mutate_bytes(valid, rng))
    if name != convert.CHECKSUMS and rng.random() < 0.7:  # as untrusted checkpoints come
        (root / ITERATION / convert.CHECKSUMS).unlink()
    try:
        read_run(root)
    except AssertionError as e:  # a trainer state that was loaded, and is another one
        assert name == "trainer_state_rank_00000.pt", e


def fuzz_images(root: Path, rng: random.Random) -> None:
    name = rng.choice(IMAGES)
    path = root / name
    path.write_bytes(mutate_bytes(path.read_bytes(), rng, end=rng.choice((None, 64, 200))))
    processor = data.Processor(root / "hf", video_maxlen=4)
    if name.startswith("v."):
        processor.process_video(data.open_video(name, root, True, 2.0))
    else:
        processor.process_image(data.load_image(path))


FUZZ = {"rows": fuzz_rows, "row files": fuzz_row_files, "config": fuzz_config, "processor": fuzz_processor,
        "safetensors": fuzz_safetensors, "checkpoint": fuzz_checkpoint, "images": fuzz_images}


def read_damaged(kind: str, number: int, valid: Path) -> bool:
    """Damage a copy of the valid files and read it. Returns whether it was refused."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = shutil.copytree(valid, Path(folder) / "root")
        try:
            FUZZ[kind](root, random.Random(f"{kind} {number}"))
            return False
        except InputError as e:
            assert len(str(e)) < 3000, e
            return True


@pytest.mark.parametrize("count", [120, pytest.param(3000, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("kind", FUZZ)
def test_damaged_file_is_refused_or_read(kind, count, valid):
    """Nothing but InputError is raised, however a file is damaged."""
    refused = 0
    for number in range(count):
        try:
            refused += read_damaged(kind, number, valid)
        except Exception as e:
            raise AssertionError(f"python tests/test_fuzz.py {kind!r} {number} raises {type(e).__name__}") from e
    assert 0 < refused < count  # else the mutations are too weak or too strong to show anything


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        make_valid(Path(folder))
        print("refused" if read_damaged(sys.argv[1], int(sys.argv[2]), Path(folder)) else "read")
