"""Many ranks against one: the same rows give the same losses, norms, gradients and weights whatever the layout.

How near is near. Layouts add the same numbers in another order, which moves a float32 gradient by some 1e-7 of its
tensor's largest; losses and norms of the first step agree as well, and four steps of training let that grow to some
1e-6. The tests ask for the 1e-4 that training may be trusted with. Weights are compared to 1e-5 + 1e-5 |w|: Adam
divides by the root of the second moment, so where a gradient is nothing but rounding (a key's bias cannot change a
softmax: its true gradient is 0) it would turn 1e-9 into a step of the whole learning rate. --adam-eps 1e-5 bounds what
rounding can do to lr * 1e-7 / 1e-5. A small tensor's wrong gradient hides in a norm and in such steps, so every
gradient is judged by itself, too: Adam's mean of gradients, to 1e-4 of the tensor's largest.
"""
from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from test_train import read_metrics, shell, torchrun, weights
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import common
import convert
import data
import kernels_npu
import parallel
import train
from model import Qwen3VL, Qwen3VLConfig

# ---- ranks without torchrun -----------------------------------------------------------------------------------------

# Ranks are forked from a server that has imported what takes seconds: not from pytest itself, whose threads (a GPU's,
# autograd's) would not survive it.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.checkpoint",
                              "safetensors.torch", "tokenizers", "PIL.Image", "pytest", "tqdm"])


def rank_process(rank: int, world: int, port: int, main: Callable, argv: list[str], output: Path) -> None:
    """What a rank does: the program, with the environment that torchrun would give it, its words going to a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = common.run_program(main, argv)
    sys.stdout.flush()
    os._exit(status)


def start_ranks(world: int, main: Callable, argv: list, log_dir: Path, seconds: float = 90) -> tuple[list[int], str]:
    """Runs main(argv) on `world` ranks -> (their exit statuses, all that they wrote). As torchrun does, it ends the
    others once one has failed; at the deadline it kills them all, and the test fails with what they wrote."""
    log_dir.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [log_dir / f"rank{rank}.log" for rank in range(world)]
    ranks = [FORKS.Process(target=rank_process, args=(rank, world, port, main, list(map(str, argv)), logs[rank]))
             for rank in range(world)]
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.start()
    try:
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            if any(process.exitcode for process in ranks):
                for process in ranks:
                    process.terminate()
            time.sleep(0.02)
        hang = any(process.is_alive() for process in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    words = "\n".join(f"--- rank {rank}\n{log.read_text()}" for rank, log in enumerate(logs) if log.exists())
    assert not hang, f"still running after {seconds} s\n{words}"
    return [process.exitcode for process in ranks], words


# ---- models and rows ------------------------------------------------------------------------------------------------


def config_dict(moe: bool = False, tied: bool = False) -> dict:
    """tiny's model with sizes that four ranks can share: 8 text heads (2 key-value heads, fewer than ranks), 4 vision
    heads, 8 experts. The vocabulary is odd."""
    raw = tiny.config_dict(moe=moe, tied=tied, layers=3, vocab_size=265, num_attention_heads=8)
    raw["vision_config"] |= {"num_heads": 4, "depth": 3, "deepstack_visual_indexes": [0, 1]}
    if moe:
        raw["text_config"]["num_experts"] = 8
    return raw


MODELS = {"dense": config_dict(), "tied": config_dict(tied=True), "moe": config_dict(moe=True),
          "starved": config_dict(moe=True)}


def starve(hf) -> None:
    """Turns the router away from experts 4 to 7: they get no token, so with EP 2 the second rank gets none."""
    text, visual = hf.model.language_model, hf.model.visual
    with torch.no_grad():
        text.embed_tokens.weight[:, 0] = visual.merger.linear_fc2.bias[0] = 8.0  # a feature that every token has
        for layer in text.layers:
            layer.post_attention_layernorm.weight[0] = 1.0
            layer.mlp.gate.weight[4:, 0] = -20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models, and rows in files whose names say what the four samples of a global batch hold."""
    path = tmp_path_factory.mktemp("parallel")
    for name, raw in MODELS.items():
        hf = tiny.hf_model(raw)
        if name == "starved":
            starve(hf)
        tiny.hf_dir(path / name, raw, hf)
    six_heads = tiny.config_dict()
    six_heads["vision_config"]["num_heads"] = 6
    tiny.hf_dir(path / "six_heads", six_heads, tiny.hf_model(six_heads))
    rng = np.random.default_rng(0)

    def picture(file: Path, height: int, width: int) -> None:
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)

    for i, size in enumerate([(32, 32), (96, 96), (40, 100), (90, 64), (64, 64), (33, 90)]):
        picture(path / f"{i}.png", *size)
    for i in range(2):
        (path / f"video{i}").mkdir()
        for frame in range(4 + i):
            picture(path / f"video{i}" / f"{frame}.png", 40 + 20 * i, 64)

    def text(low: int, high: int) -> str:
        return "".join(rng.choice(list("abcdefgh "), rng.integers(low, high)))

    def row(question: str = "", **media) -> dict:
        question, answer = question or text(3, 20), text(2, 25)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **media}

    def pictures(*numbers: int) -> dict:  # amid the text, so that a cut in two goes through some of them
        return row(text(12, 24) + "<image>" * len(numbers), images=[f"{n}.png" for n in numbers])

    def video(i: int) -> dict:
        return row(text(1, 9) + "<video>", videos=[{"path": f"video{i}", "fps": 2.0}])

    files = {
        "text": [row() for _ in range(5)],
        "pictures": [pictures(*[(i + j) % 6 for j in range(1 + i % 3)]) for i in range(11)],
        # text, pictures, a video, text; each alone in its micro-batch
        "kinds": [(row(), pictures(i % 6, (i + 3) % 6), video(i % 2), row()) for i in range(3)],
        # pictures for one micro-batch alone, then a step without any
        "alone": [(row(), pictures(4, 1), row(), row()), (row(), row(), row(), row())],
    }
    for name in ("kinds", "alone"):
        files[name] = [each for step in files[name] for each in step]
    files["dirty"] = [row() for _ in range(15)] + [pictures(99)]  # there is no such picture
    for name, rows in files.items():
        (path / f"{name}.json").write_text(json.dumps(rows))
    return path


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def argv(folder: Path, model: str, dataset: str, save: Path, *flags, iters: int = 4) -> list[str]:
    return [*map(str, (
        "--init-from-hf-path", folder / model, "--dataset", folder / f"{dataset}.json", "--save", save, "--device",
        "cpu", "--train-iters", iters, "--global-batch-size", 4, "--lr", 1e-3, "--adam-eps", 1e-5, "--no-shuffle",
        "--num-workers", 0, *flags))]


def run_ranks(world: int, arguments: list[str], main: Callable = train.main) -> Path:
    """train.py on `world` ranks; returns its --save."""
    if "--fsdp-size" in arguments and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        pytest.skip("hybrid sharding over gloo needs a newer PyTorch")
    save = Path(arguments[arguments.index("--save") + 1])
    statuses, words = start_ranks(world, main, arguments, save.with_name(save.name + "_logs"))
    assert statuses == [0] * world, words[-6000:]
    return save


@pytest.fixture(scope="module")
def one_rank(folder, tmp_path_factory) -> Callable[..., Path]:
    """one_rank(model, dataset, *flags): the --save of a run in one process, each made once."""
    runs: dict[tuple, Path] = {}

    def run(model: str, dataset: str, *flags) -> Path:
        key = (model, dataset, *map(str, flags))
        if key not in runs:
            save = tmp_path_factory.mktemp("one") / "save"
            runs[key] = run_ranks(1, argv(folder, model, dataset, save, *flags))
        return runs[key]

    return run


# ---- losses, gradients and weights ----------------------------------------------------------------------------------

COUNTS = ("iteration", "samples", "tokens", "supervised_tokens", "skipped_samples", "truncated_samples",
          "skipped_iterations", "lr")


def assert_same_training(one: Path, many: Path) -> None:
    """Every iteration's figures, then every gradient and weight; see the head of this file."""
    expected, metrics = read_metrics(one), read_metrics(many)
    assert len(metrics) == len(expected)
    for a, b in zip(expected, metrics, strict=True):
        assert {key: b[key] for key in COUNTS} == {key: a[key] for key in COUNTS}
        for key in ("loss", "grad_norm", "aux_loss", "eval_loss", "model_flops"):
            close = b[key] == a[key] or a[key] is not None and b[key] == pytest.approx(a[key], rel=1e-4)
            assert close, f"iteration {a['iteration']}: {key} {b[key]}, on one rank {a[key]}"
    expected, found = weights(one), weights(many)
    assert found.keys() == expected.keys()
    wrong = {}
    for name, a in expected.items():
        b = found[name]
        if name.startswith("optimizer."):
            error, allowed = (a - b).abs().max(), 1e-4 * a.abs().max() + 1e-8
        else:
            error, allowed = ((a - b).abs() / (1 + a.abs())).max(), 1e-5
        if not error <= allowed:
            wrong[name] = f"{error:.1e} > {allowed:.1e}"
    assert not wrong


FSDP2 = ["--fsdp-size", 2]
CP2, CP4 = ["--context-parallel-size", 2], ["--context-parallel-size", 4]
EP2, EP4 = ["--expert-parallel-size", 2], ["--expert-parallel-size", 4]
RECOMPUTE = ["--recompute", "full"]
OFFLOAD = [*RECOMPUTE, "--activation-offload"]
AUX = ["--router-aux-loss-coef", 0.1]
PROJECTOR_ONLY = ["--freeze-vision-encoder", "--freeze-text-decoder"]
DIRTY = ["--on-bad-sample", "skip", "--seq-length", 50, "--global-batch-size", 8]
EVAL = ["--eval-dataset", "text.json", "--eval-interval", 2]  # five rows: some ranks come away empty
PER_TOKEN = ["--loss-type", "per_token", "--global-batch-size", 12, "--loss-chunk-size", 7]
PER_SAMPLE = ["--loss-type", "per_sample", "--micro-batch-size", 2]
PACKED = ["--packing", "--seq-length", 150, "--global-batch-size", 2]  # of two samples or more

# (model, rows, flags of one rank and many alike): [(ranks, flags of the many)]
CASES = {
    ("dense", "kinds"): [(2, []), (4, [*CP2, *OFFLOAD]), (4, CP4)],
    ("tied", "alone"): [(4, []), (4, [*CP2, *FSDP2])],
    ("moe", "kinds", *AUX): [
        (4, CP4), (4, [*EP2, *CP2]), (4, [*EP2, *FSDP2, *RECOMPUTE]), (4, [*EP2, *CP4, *FSDP2])],
    ("starved", "alone", *AUX): [(2, EP2), (4, [*EP4, *CP2, *OFFLOAD])],
    ("moe", "text", *EVAL): [(4, [*EP2, *CP2])],
    # accumulation 3 on four ranks, 12 on one
    ("dense", "kinds", *PER_TOKEN): [(4, [])],
    ("moe", "pictures", *AUX, "--loss-type", "per_token", "--micro-batch-size", 2): [(4, [*EP4, *CP2, *RECOMPUTE])],
    # two samples to a micro-batch
    ("dense", "pictures", *PER_SAMPLE): [(4, [*CP4, *OFFLOAD])],
    ("moe", "kinds", *PER_SAMPLE): [(4, [*EP2, *CP2])],
    ("moe", "alone", *PROJECTOR_ONLY): [(4, [*EP2, *CP2, *OFFLOAD])],
    ("dense", "alone", "--freeze-vision-encoder", "--freeze-vision-projector"): [(4, [*CP2, *OFFLOAD])],
    ("moe", "kinds", "--freeze-text-decoder"): [(4, [*EP2, *RECOMPUTE])],
    ("dense", "dirty", *DIRTY): [(4, CP2)],
    ("dense", "kinds", *PACKED, "--loss-type", "per_sample"): [(2, [*CP2, *OFFLOAD])],
    ("moe", "kinds", *PACKED, "--streaming"): [(4, [*CP4, *EP4])],
}
# `make test-slow`: one thing at a time, which the cases above have together; it shows which of them is at fault
ONE_AT_A_TIME = {
    ("dense", "kinds"): [(4, RECOMPUTE), (4, FSDP2)],
    ("moe", "kinds", *AUX): [(2, []), (4, FSDP2), (2, CP2), (2, EP2), (4, EP4), (4, EP2)],
    ("moe", "pictures", "--micro-batch-size", 2): [(2, [*EP2, *CP2])],
}


def case_name(case: tuple) -> str:
    (model, rows, *flags), world, many = case
    short = [str(flag).removeprefix("--").replace("-parallel-size", "") for flag in (*flags, *many)]
    return " ".join([model, rows, str(world), *short])


def params(cases: dict, **kwargs) -> list:
    each = [(key, *one) for key, several in cases.items() for one in several]
    return [pytest.param(case, id=case_name(case), **kwargs) for case in each]


@pytest.mark.parametrize("case", [*params(CASES), *params(ONE_AT_A_TIME, marks=pytest.mark.slow)])
def test_many_ranks_train_as_one(folder, tmp_path, one_rank, case):
    (model, rows, *flags), world, many = case
    flags = [folder / flag if flag == "text.json" else flag for flag in flags]
    one = one_rank(model, rows, *flags)
    many = run_ranks(world, argv(folder, model, rows, tmp_path / "many", *flags, *many))
    assert_same_training(one, many)


def encoded(folder: Path, dataset: str) -> list[data.Sample]:
    processor, rows = data.Processor(folder / "moe"), data.RowDataset([str(folder / f"{dataset}.json")])
    return [processor.encode(row, media_dir=media, source=source) for row, source, media in map(rows.__getitem__,
                                                                                                range(len(rows)))]


@pytest.mark.parametrize("cp", [2, 4])
def test_the_rows_are_the_hard_ones(folder, one_rank, cp):
    """The cases above mean what they say: lengths and patches that no cut divides, media on both sides of a cut."""
    samples = {name: encoded(folder, name) for name in ("kinds", "pictures", "alone", "text")}
    every = [sample for each in samples.values() for sample in each]
    assert any(len(s.input_ids) % 2 for s in every) and any(len(s.input_ids) % 4 == 2 for s in every)
    units = [int(s.grid_thw.prod(1).sum()) // 4 for s in every if len(s.grid_thw)]  # of 2x2 patches: tokens of pictures
    assert any(n < 4 for n in units) and any(n % cp for n in units)
    for name in ("kinds", "pictures", "alone"):
        straddles = 0
        for s in samples[name]:
            media = (s.input_ids == tiny.IMAGE) | (s.input_ids == tiny.VIDEO)
            size = math.ceil(len(media) / cp)
            straddles += sum(bool(media[cut - 1] and media[cut]) for cut in range(size, len(media), size))
        assert straddles, name
    for name in ("kinds", "alone"):
        with_media = [len(s.grid_thw) > 0 for s in samples[name][:4]]
        assert with_media == [False, True, name == "kinds", False]
    assert not any(len(s.grid_thw) for s in samples["alone"][4:] + samples["text"])
    dirty = read_metrics(one_rank("dense", "dirty", *DIRTY))
    assert sum(m["skipped_samples"] for m in dirty) == 2 and sum(m["truncated_samples"] for m in dirty) > 0


def test_starved_experts_get_no_token(folder, one_rank):
    """Before training and after it."""
    config = Qwen3VLConfig.from_json(folder / "starved")
    model = Qwen3VL(config)
    trained = convert.find_checkpoint(one_rank("starved", "alone", *AUX))
    for load in (lambda: convert.load_weights(model, convert.HuggingFaceWeights(folder / "starved")),
                 lambda: convert.load_checkpoint(trained, model)):
        load()
        for sample in encoded(folder, "alone"):
            with torch.no_grad():
                _, stats = model.hidden_states(data.collate([sample]))
            assigned = torch.stack(stats)[:, 0]  # [layers, E]
            assert assigned[:, 4:].sum() == 0 and assigned.sum() == 3 * 3 * len(sample.input_ids)


def test_torchrun_with_every_axis(folder, tmp_path, one_rank):
    """The command line as a user runs it: experts, context and FSDP on four ranks."""
    flags = argv(folder, "moe", "kinds", tmp_path / "many", *AUX, *EP2, *CP2, *OFFLOAD)
    result = torchrun(4, *flags)
    assert result.returncode == 0, result.stderr[-4000:]
    assert_same_training(one_rank("moe", "kinds", *AUX), tmp_path / "many")
    assert result.stdout.count("iteration        4/       4") == 1  # rank 0 alone speaks


# ---- mistakes and failures ------------------------------------------------------------------------------------------


def lines_of(words: str, start: str) -> list[str]:
    return [line for line in words.splitlines() if line.startswith(start)]


MISTAKES = [  # six_heads has 6 heads and 2 key-value heads for text, 6 heads for vision
    ("six_heads", 4, CP4, r"--context-parallel-size 4 .*6 heads, 2 key-value heads and 6 vision heads.* 1, 2$"),
    ("dense", 2, CP4, r"--context-parallel-size 4 .* 1, 2$"),
    ("dense", 4, ["--context-parallel-size", 3], r"--context-parallel-size 3 .* 1, 2, 4$"),
    ("moe", 3, ["--expert-parallel-size", 3, "--global-batch-size", 3], r"--expert-parallel-size 3.* 8 experts.* 1$"),
    ("moe", 4, ["--expert-parallel-size", 3], r"--expert-parallel-size 3 .* 1, 2, 4$"),
    ("moe", 4, [*EP4, *FSDP2], r"--expert-parallel-size 4 .* 1, 2$"),
    ("dense", 2, EP2, r"--expert-parallel-size 2.* no experts"),
    ("dense", 4, ["--fsdp-size", 3], r"--fsdp-size 3 .* 1, 2, 4$"),
    ("dense", 1, ["--activation-offload", "--recompute", "none"], r"--activation-offload.*--recompute full"),
    ("dense", 4, [*CP2, "--global-batch-size", 3], r"--global-batch-size 3 .*data-parallel size 2.* 2 or 4$"),
]


@pytest.mark.parametrize(("model", "world", "flags", "message"), MISTAKES)
def test_sizes_that_do_not_fit_are_a_line_that_names_those_that_do(folder, tmp_path, model, world, flags, message):
    began = time.monotonic()
    statuses, words = start_ranks(world, train.main, argv(folder, model, "text", tmp_path / "save", *flags), tmp_path)
    errors = lines_of(words, "error: ")
    assert len(errors) == 1 and re.search(message, errors[0]), words
    assert 2 in statuses and set(statuses) <= {2, -signal.SIGTERM} and "Traceback" not in words
    assert time.monotonic() - began < 30


def test_a_bad_picture_on_one_rank_ends_all(folder, tmp_path):
    """In the second step, on one of the two ranks that share its row or on both: one line, and no rank hangs."""
    rows = json.loads((folder / "kinds.json").read_text())
    (tmp_path / "bad.png").write_bytes((folder / "1.png").read_bytes()[:200])
    rows[5] |= {"id": "culprit", "images": [str(tmp_path / "bad.png"), "1.png"]}
    (folder / "damaged.json").write_text(json.dumps(rows))
    began = time.monotonic()
    flags = argv(folder, "moe", "damaged", tmp_path / "save", *EP2, *CP2)
    statuses, words = start_ranks(4, train.main, flags, tmp_path)
    assert 1 in statuses and set(statuses) <= {1, -signal.SIGTERM} and time.monotonic() - began < 30
    errors = lines_of(words, "error: ")
    assert len(errors) == 1 and "bad.png" in errors[0] and "culprit" in errors[0] and "Traceback" not in words, words
    assert len(read_metrics(tmp_path / "save")) == 1


BREAKS = """
import os, sys
sys.path.insert(0, {root!r})
import common, data, kernels_npu, parallel, train
clip, calls = parallel.clip_grad_norm, []

def breaks(*args, **kwargs):
    calls.append(1)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        raise RuntimeError("broken on purpose")
    return clip(*args, **kwargs)

parallel.clip_grad_norm = breaks
sys.exit(common.run_program(train.main, sys.argv[1:]))
"""


def test_an_exception_on_one_rank_ends_all(folder, tmp_path):
    """A fault of ours, in the middle of a step: its traceback, once, and nothing of those who waited for that rank."""
    (tmp_path / "breaks.py").write_text(BREAKS.format(root=str(Path(train.__file__).parent)))
    began = time.monotonic()
    result = shell("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, tmp_path / "breaks.py",
                   *argv(folder, "moe", "text", tmp_path / "save", *EP2, *CP2))
    assert result.returncode != 0 and time.monotonic() - began < 45
    told = [line for line in result.stderr.splitlines() if "RuntimeError: broken on purpose" in line]
    assert len(told) == 1, result.stderr[-4000:]
    assert result.stderr.count('train.py", line') == 3, result.stderr[-4000:]  # main, run and train, of one traceback
    assert len(read_metrics(tmp_path / "save")) == 1


def test_a_killed_rank_ends_all(folder, tmp_path):
    """SIGKILL, as the system does to the one that takes too much memory: torchrun says so, the others do not hang."""
    flags = argv(folder, "moe", "text", tmp_path / "save", *EP2, *CP2, iters=100000)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    with open(tmp_path / "words", "w") as words:
        job = subprocess.Popen([*program, *flags], cwd=Path(train.__file__).parent, stdout=words, stderr=words)
    try:
        metrics, deadline = tmp_path / "save" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "words").read_text()[-4000:]
            time.sleep(0.05)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        ranks = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(ranks) == 2
        os.kill(ranks[1], signal.SIGKILL)
        assert job.wait(timeout=30) != 0
        assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    finally:
        job.terminate()
        job.wait(timeout=30)
    words = (tmp_path / "words").read_text()
    assert "Signal 9 (SIGKILL)" in words and 'train.py", line' not in words, words[-4000:]


# ---- checkpoints between layouts ------------------------------------------------------------------------------------


def load_and_save(arguments: list[str]) -> None:
    """train.py, but in place of training it saves what it has loaded as the next iteration."""

    def save(args, model, optimizer, *rest) -> None:
        convert.save_checkpoint(args.save, 99, model, optimizer, {"iteration": 99, "data": {}})

    train.train = save
    train.main(arguments)


def test_a_checkpoint_fits_every_layout_exactly(folder, tmp_path):
    """Weights and optimizer, bit for bit, from layout to layout: each loads what the one before has saved."""
    first = run_ranks(4, argv(folder, "moe", "kinds", tmp_path / "0", *EP2, iters=2))
    expected, previous = weights(first), first
    assert sum(name.startswith("optimizer.exp_avg_sq.") for name in expected) * 4 == len(expected)
    assert sum(bool(value.any()) for value in expected.values()) > 0.9 * len(expected)
    layouts = [(2, []), (4, EP2), (1, []), (4, [*EP2, *FSDP2])]
    for i, (world, flags) in enumerate(layouts, 1):
        flags = argv(folder, "moe", "kinds", tmp_path / str(i), *flags, "--load", previous, iters=100)
        previous = run_ranks(world, flags, load_and_save)
        found = weights(previous)
        assert found.keys() == expected.keys()
        assert not [n for n in expected if not torch.equal(found[n], expected[n])], layouts[i - 1]


def test_training_goes_on_in_another_layout(folder, tmp_path, one_rank):
    flags = [*AUX, "--save-interval", 2]
    half = run_ranks(4, argv(folder, "moe", "kinds", tmp_path / "save", *flags, *EP2, *FSDP2))
    (half / "iter_0000004").rename(tmp_path / "gone")  # as if it had died in between
    (half / "latest_checkpointed_iteration.txt").write_text("2")
    run_ranks(2, argv(folder, "moe", "kinds", half, *flags, *CP2, "--load", half))
    assert_same_training(one_rank("moe", "kinds", *AUX), half)


@pytest.mark.parametrize("reading", ["", pytest.param("--streaming", marks=pytest.mark.slow)])
def test_packed_rows_are_dealt_to_other_ranks(folder, tmp_path, reading):
    """Two ranks, then two pairs, then one alone: samples and tokens up to an epoch's end are those of each row once."""
    processor, rows = data.Processor(folder / "moe"), data.RowDataset([str(folder / "kinds.json")])
    options = data.EncodeOptions(seq_length=150)
    lengths = [processor.count_tokens(rows[i][0], folder, options=options) for i in range(len(rows))]
    for last, (world, *flags) in {1: (2,), 2: (4, *CP2), 8: (1,)}.items():
        flags = [*PACKED, *reading.split(), "--global-batch-size", 2 if world > 1 else 1, *flags]
        load = ["--load", tmp_path / "save"] * (last > 1)
        run_ranks(world, argv(folder, "moe", "kinds", tmp_path / "save", *flags, *load, iters=last))
    metrics = read_metrics(tmp_path / "save")
    sums = [(sum(m["samples"] for m in metrics[:i]), sum(m["tokens"] for m in metrics[:i])) for i in range(9)]
    assert (len(rows), sum(lengths)) in sums[3:], sums


# ---- memory ---------------------------------------------------------------------------------------------------------


def anonymous() -> int:
    """Bytes of this process's anonymous memory: without mapped files, which the system may drop at any time."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def load_and_measure(arguments: list[str]) -> None:
    """train.py up to the loop; each rank writes the bytes of its shards and the most that loading has added."""
    build, peak, done = train.build_model, [0], threading.Event()

    def sample(before: int) -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous() - before)

    def begin(*args, **kwargs):
        thread.start()
        return build(*args, **kwargs)

    def report(args, model, optimizer, *rest) -> None:
        done.set()
        thread.join()
        parts = [parallel.local_shard_and_offset(p)[0] for p in model.parameters()]
        parts += [parallel.local_shard_and_offset(v)[0] for state in optimizer.state.values() for v in state.values()]
        result = {"shards": sum(part.nbytes for part in parts), "peak": peak[0]}
        (Path(args.save) / f"memory{os.environ['RANK']}.json").write_text(json.dumps(result))

    thread = threading.Thread(target=lambda: sample(anonymous()), daemon=True)
    train.build_model, train.train = begin, report
    train.main(arguments)


@pytest.fixture(scope="module")
def large(folder) -> tuple[int, int]:
    """A mixture of experts of 16 layers in folder / "large"; (bytes of it, of its largest layer)."""
    raw = config_dict(moe=True)
    raw["text_config"] |= {"hidden_size": 512, "num_hidden_layers": 16, "moe_intermediate_size": 264, "head_dim": 64}
    raw["text_config"]["rope_parameters"]["mrope_section"] = [12, 10, 10]
    raw["text_config"]["rope_scaling"]["mrope_section"] = [12, 10, 10]
    raw["vision_config"]["out_hidden_size"] = 512
    tiny.hf_dir(folder / "large", raw)
    with torch.device("meta"):
        model = Qwen3VL(Qwen3VLConfig.from_json(folder / "large"))
    save_file({name: torch.full(p.shape, 0.01) for name, p in model.named_parameters()},
              folder / "large" / "model.safetensors")
    return tuple(sum(p.nbytes for p in m.parameters()) for m in (model, model.model.language_model.layers[0]))


@pytest.mark.parametrize("kind", ["safetensors", "checkpoint"])
def test_loading_takes_the_shards_and_a_layer(folder, tmp_path, large, kind):
    """On four ranks, each from its own slices: never the whole model, and never another rank's part of it.

    A model of 2 MB shows what the program takes for itself (27 MB: modules, groups, the tokenizer), which is taken off;
    4 MB are left for the allocator. Any tensor read whole and kept, or a layer too many, shows: the model has 253 MB,
    a rank 63 (with hybrid sharding 127), a layer 16."""
    whole, layer = large

    def measure(name: str, *flags) -> list[dict]:
        source = []
        if kind == "checkpoint":
            source = ["--load", folder / f"{name}_dcp"]
            if not source[1].exists():
                convert.hf_to_dcp(folder / name, source[1])
        save = tmp_path / "_".join(map(str, (name, *flags)))
        run_ranks(4, argv(folder, name, "text", save, *flags, *source), load_and_measure)
        return [json.loads((save / f"memory{rank}.json").read_text()) for rank in range(4)]

    owns = [rank["peak"] - rank["shards"] for rank in measure("moe")]  # rank 0 has had some of it before (check_save)
    for flags, share in (([], whole / 4), ([*EP2, *FSDP2], whole / 2)):
        for rank, own in zip(measure("large", *flags), owns, strict=True):
            assert rank["shards"] == pytest.approx(share, rel=0.02)
            assert 0.9 * rank["shards"] < rank["peak"] - own < rank["shards"] + layer + 4e6, (own, layer)


class Storages(TorchDispatchMode):
    """When each storage was made and when freed, counted in operations, and which of them a block took as its input.

    It watches storages themselves, by weak references, so that it knows nothing of how they are kept or moved."""

    def __init__(self):
        super().__init__()
        self.alive, self.lives, self.clock = {}, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.bury()
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if type(tensor) is torch.Tensor:
                self.life(tensor)
        return result

    def bury(self) -> None:
        """Notes the end of those that are gone."""
        self.clock += 1
        for key in [key for key, life in self.alive.items() if life.reference.expired()]:
            self.alive.pop(key).end = self.clock

    def life(self, tensor: torch.Tensor) -> SimpleNamespace:
        reference = StorageWeakRef(tensor.untyped_storage())
        if reference.cdata not in self.alive:  # an address is not used again while a weak reference holds it
            life = SimpleNamespace(reference=reference, begin=self.clock, end=math.inf, tower=None)
            self.alive[reference.cdata] = life
            self.lives.append(life)
        return self.alive[reference.cdata]

    def watch(self, tower: str, block: torch.nn.Module) -> None:
        forward = block.forward

        def recorded(x, *args):
            self.life(x).tower = tower
            return forward(x, *args)

        block.forward = recorded

    def most_inputs(self, tower: str) -> int:
        """How many inputs of a tower's blocks were alive at once, at the worst moment."""
        self.bury()
        inputs = [life for life in self.lives if life.tower == tower]
        return max(sum(other.begin <= life.begin < other.end for other in inputs) for life in inputs)


@pytest.mark.parametrize("moe", [False, True])
def test_offload_leaves_two_inputs_on_the_device(tmp_path, moe):
    """Two blocks' inputs at most, text and vision, forward and backward; without offload they are all there at once,
    and the gradients are the same."""
    raw = config_dict(moe)
    raw["text_config"]["num_hidden_layers"] = raw["vision_config"]["depth"] = 7
    hf_dir = tiny.hf_dir(tmp_path / "hf", raw, tiny.hf_model(raw))
    sample = tiny.row([9, ("image", 4, 6), 5, ("video", 2, 4, 4), 12])
    positions = torch.arange(len(sample.input_ids)).expand(3, -1)
    gradients, counts = [], []
    for offload in (False, True):
        ranks = parallel.ParallelState(kernels_npu.select("cpu"), 1)
        with torch.device("meta"):
            model = Qwen3VL(Qwen3VLConfig.from_json(hf_dir))
        storages = Storages()
        towers = {"vision": model.model.visual.blocks, "text": model.model.language_model.layers}
        for tower, blocks in towers.items():
            for block in blocks:
                storages.watch(tower, block)
        parallel.parallelize(model, ranks, compute_dtype=torch.float32, recompute="full", offload=offload,
                             compile=False)
        model.to_empty(device="cpu")
        convert.load_weights(model, convert.HuggingFaceWeights(hf_dir).check_compatible(model))
        for _ in range(2):  # the second as the first: nothing is left over
            batch = tiny.batch_of([sample], [positions])
            with storages:
                model(batch)[0].backward()
        counts.append([storages.most_inputs(tower) for tower in towers])
        gradients.append({name: parallel.local_shard_and_offset(p.grad)[0] for name, p in model.named_parameters()})
        ranks.close()
    kept, offloaded = counts
    assert min(kept) >= 7 and max(offloaded) <= 2, counts
    for name, value in gradients[0].items():
        assert torch.equal(gradients[1][name], value), name
