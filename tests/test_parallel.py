"""Many ranks against one: the same rows give the same losses, norms, gradients and weights in every layout.

Tolerances. Layouts add the same numbers in another order, which changes a float32 gradient by about 1e-7 of its
tensor's largest value. Losses and norms of the first step agree as well; four steps of training let the difference
grow to about 1e-6. The tests allow 1e-4. Weights are compared to 1e-5 + 1e-5 |w|: Adam divides by the root of the
second moment. So a gradient that is only rounding (that of a key's bias is truly 0) would turn 1e-9 into a step of the
full learning rate. With --adam-eps 1e-5, rounding changes a weight by at most lr * 1e-7 / 1e-5. A wrong gradient of a
small tensor is invisible in a norm and in such steps, so every gradient is compared by itself, too: as Adam's mean of
gradients, to 1e-4 of the tensor's largest value.
"""
from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
import signal
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
from helpers import ROOT, Job, error_lines, read_metrics, run_job, torchrun, train_argv, weights
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import convert
import data
import kernels_npu
import parallel
import train
from model import Qwen3VL, Qwen3VLConfig

# ---- models and rows ------------------------------------------------------------------------------------------------


def config_dict(moe: bool = False, tied: bool = False) -> dict:
    """Return tiny's configuration with sizes that four ranks can share.

    It has 8 text heads, 2 key-value heads (fewer than ranks), 4 vision heads, 8 experts and an odd vocabulary size.
    """
    raw = tiny.config_dict(moe=moe, tied=tied, layers=3, vocab_size=265, num_attention_heads=8)
    raw["vision_config"] |= {"num_heads": 4, "depth": 3, "deepstack_visual_indexes": [0, 1]}
    if moe:
        raw["text_config"]["num_experts"] = 8
    return raw


MODELS = {"dense": config_dict(), "tied": config_dict(tied=True), "moe": config_dict(moe=True),
          "starved": config_dict(moe=True)}


def starve(hf) -> None:
    """Make the router avoid experts 4 to 7, so that with EP 2 the second rank gets no token."""
    text, visual = hf.model.language_model, hf.model.visual
    with torch.no_grad():
        text.embed_tokens.weight[:, 0] = visual.merger.linear_fc2.bias[0] = 8.0  # a feature that every token has
        for layer in text.layers:
            layer.post_attention_layernorm.weight[0] = 1.0
            layer.mlp.gate.weight[4:, 0] = -20.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a directory with models, and with rows in files named for what the four samples of a global batch hold."""
    path = tmp_path_factory.mktemp("parallel")
    for name, raw in MODELS.items():
        hf = tiny.hf_model(raw)
        if name == "starved":
            starve(hf)
        tiny.hf_dir(path / name, raw, hf)
    six_heads = tiny.config_dict()
    six_heads["vision_config"]["num_heads"] = 6
    tiny.hf_dir(path / "six_heads", six_heads, tiny.hf_model(six_heads))
    for name, rows in rows_by_file(path).items():
        (path / f"{name}.json").write_text(json.dumps(rows))
    return path


def rows_by_file(path: Path) -> dict[str, list[dict]]:
    """Write images and videos to a directory and return the rows of each dataset file."""
    rng = np.random.default_rng(0)

    def write_image(file: Path, height: int, width: int) -> None:
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)

    for i, size in enumerate([(32, 32), (96, 96), (40, 100), (90, 64), (64, 64), (33, 90)]):
        write_image(path / f"{i}.png", *size)
    for i in range(2):
        (path / f"video{i}").mkdir()
        for frame in range(4 + i):
            write_image(path / f"video{i}" / f"{frame}.png", 40 + 20 * i, 64)

    def text(low: int, high: int) -> str:
        return "".join(rng.choice(list("abcdefgh "), rng.integers(low, high)))

    def row(question: str = "", **media) -> dict:
        question, answer = question or text(3, 20), text(2, 25)
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **media}

    def images(*numbers: int) -> dict:  # in the middle of the text, so that a cut in two splits some of them
        return row(text(12, 24) + "<image>" * len(numbers), images=[f"{n}.png" for n in numbers])

    def video(i: int) -> dict:
        return row(text(1, 9) + "<video>", videos=[{"path": f"video{i}", "fps": 2.0}])

    return {
        "text": [row() for _ in range(5)],
        "images": [images(*[(i + j) % 6 for j in range(1 + i % 3)]) for i in range(11)],
        # text, images, a video, text; each alone in its micro-batch
        "kinds": [r for i in range(3) for r in (row(), images(i % 6, (i + 3) % 6), video(i % 2), row())],
        # a step with images in one micro-batch only, then a step without any
        "alone": [row(), images(4, 1), row(), row(), row(), row(), row(), row()],
        "dirty": [row() for _ in range(15)] + [images(99)],  # this image does not exist
    }


def layout_argv(folder: Path, model: str, dataset: str, save: Path, *flags, iters: int = 4) -> list[str]:
    """Return the flags of a run whose first flags are the same for every layout."""
    return train_argv(folder / model, folder / f"{dataset}.json", save, "--global-batch-size", 4, "--adam-eps", 1e-5,
                      *flags, iters=iters)


def run_layout(world_size: int, argv: list[str], main: Callable = train.main) -> Path:
    """Run a layout that must succeed and return its save directory. Skip the test if PyTorch is too old for it."""
    if "--fsdp-size" in argv and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        pytest.skip("hybrid sharding over gloo needs a newer PyTorch")
    return run_job(argv, world_size, main)


@pytest.fixture(scope="module")
def one_rank(folder, tmp_path_factory) -> Callable[..., Path]:
    """Return one_rank(model, dataset, *flags): the save directory of a run on one rank, each made once."""

    @functools.cache
    def run(model: str, dataset: str, *flags) -> Path:
        return run_layout(1, layout_argv(folder, model, dataset, tmp_path_factory.mktemp("one") / "save", *flags))

    return run


# ---- losses, gradients and weights ----------------------------------------------------------------------------------

COUNTS = ("iteration", "samples", "tokens", "supervised_tokens", "skipped_samples", "truncated_samples",
          "skipped_iterations", "lr")


def assert_same_training(one: Path, many: Path) -> None:
    """Compare every iteration's metrics, then every gradient and weight, to the tolerances given above."""
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
HOST = ["--cpu-offload", "--deterministic", "--synchronize-per-layer"]
AUX = ["--router-aux-loss-coef", 0.1]
PROJECTOR_ONLY = ["--freeze-vision-encoder", "--freeze-text-decoder"]
DIRTY = ["--on-bad-sample", "skip", "--seq-length", 50, "--global-batch-size", 8]
EVAL = ["--eval-dataset", "text.json", "--eval-interval", 2]  # five rows: some ranks receive none
PER_TOKEN = ["--loss-type", "per_token", "--global-batch-size", 12, "--loss-chunk-size", 7]
PER_SAMPLE = ["--loss-type", "per_sample", "--micro-batch-size", 2]
LORA = ["--lora-rank", 4, "--lr", 1e-2]  # the projector and the vision encoder are trained in full
LORA_ALL = [*LORA, "--lora-target-modules", "q_proj,o_proj,qkv,linear_fc2"]
LORA_EXPERTS = [*LORA, "--lora-target-modules", "v_proj,experts", "--freeze-vision-encoder"]
PACKED = ["--packing", "--seq-length", 150, "--global-batch-size", 2]  # two samples or more in a row

# (model, rows, flags of one rank and many alike): [(ranks, flags of the many)]
CASES = {
    ("dense", "kinds"): [(2, []), (4, [*CP2, *OFFLOAD])],
    ("tied", "alone"): [(4, [*CP2, *FSDP2])],
    ("moe", "kinds", *AUX): [(4, [*EP2, *CP2]), (4, [*EP2, *CP4, *FSDP2])],
    ("starved", "alone", *AUX): [(2, EP2), (4, [*EP4, *CP2, *OFFLOAD])],
    ("moe", "text", *EVAL): [(4, [*EP2, *CP2, *HOST])],
    # accumulation 3 on four ranks, 12 on one
    ("dense", "kinds", *PER_TOKEN): [(4, [])],
    ("moe", "images", *AUX, "--loss-type", "per_token", "--micro-batch-size", 2): [(4, [*EP4, *CP2, *RECOMPUTE])],
    # two samples in a micro-batch
    ("dense", "images", *PER_SAMPLE): [(4, [*CP4, *OFFLOAD])],
    ("moe", "kinds", *PER_SAMPLE): [(4, [*EP2, *CP2])],
    ("moe", "alone", *PROJECTOR_ONLY): [(4, [*EP2, *CP2, *OFFLOAD])],
    ("moe", "kinds", "--freeze-text-decoder"): [(4, [*EP2, *RECOMPUTE])],
    ("dense", "dirty", *DIRTY): [(4, CP2)],
    ("moe", "kinds", *PACKED, "--streaming"): [(4, [*CP4, *EP4])],
    ("dense", "alone", *LORA): [(2, CP2)],
    ("tied", "kinds", *LORA_ALL): [(4, [*CP2, *FSDP2, *OFFLOAD])],
    ("moe", "kinds", *AUX, *LORA_EXPERTS): [(4, [*EP2, *FSDP2, *RECOMPUTE])],
    ("starved", "alone", *LORA_EXPERTS, *PACKED): [(2, [*EP2, *CP2, *OFFLOAD])],
}
# `make test-slow`: one feature at a time, or features that the cases above combine differently. A failure here says
# which feature is wrong.
ONE_AT_A_TIME = {
    ("dense", "kinds"): [(4, RECOMPUTE), (4, FSDP2), (4, CP4)],
    ("dense", "kinds", *PACKED, "--loss-type", "per_sample"): [(2, [*CP2, *OFFLOAD])],
    ("dense", "alone", "--freeze-vision-encoder", "--freeze-vision-projector"): [(4, [*CP2, *OFFLOAD])],
    ("tied", "alone"): [(4, [])],
    ("tied", "kinds", *LORA_ALL): [(2, [])],
    ("moe", "kinds", *AUX): [
        (2, []), (4, FSDP2), (2, CP2), (2, EP2), (4, EP4), (4, EP2), (4, CP4), (4, [*EP2, *FSDP2, *RECOMPUTE])],
    ("moe", "images", "--micro-batch-size", 2): [(2, [*EP2, *CP2])],
    ("moe", "kinds", *AUX, *LORA_EXPERTS): [(2, []), (4, [*EP2, *CP2])],
}


def case_name(case: tuple) -> str:
    (model, rows, *flags), world_size, many = case
    short = [str(flag).removeprefix("--").replace("-parallel-size", "") for flag in (*flags, *many)]
    return " ".join([model, rows, str(world_size), *short])


def params(cases: dict, **kwargs) -> list:
    each = [(key, *one) for key, several in cases.items() for one in several]
    return [pytest.param(case, id=case_name(case), **kwargs) for case in each]


@pytest.mark.parametrize("case", [*params(CASES), *params(ONE_AT_A_TIME, marks=pytest.mark.slow)])
def test_train_layouts_equal_one_rank(folder, tmp_path, one_rank, case):
    assert_equals_one_rank(folder, tmp_path, one_rank, case)


def assert_equals_one_rank(folder: Path, tmp_path: Path, one_rank: Callable, case: tuple, main=train.main) -> None:
    """Compare the training of a case of many ranks, by `main`, with that of one rank."""
    (model, rows, *flags), world_size, many = case
    flags = [folder / flag if flag == "text.json" else flag for flag in flags]
    one = one_rank(model, rows, *flags)
    argv = layout_argv(folder, model, rows, tmp_path / "many", *flags, *many)
    assert_same_training(one, run_layout(world_size, argv, main))


def encode_rows(folder: Path, dataset: str) -> list[data.Sample]:
    processor, rows = data.Processor(folder / "moe"), data.RowDataset([str(folder / f"{dataset}.json")])
    return [processor.encode(row, media_dir=media, source=source)
            for row, source, media in (rows[i] for i in range(len(rows)))]


@pytest.mark.parametrize("cp", [2, 4])
def test_layout_rows_cover_uneven_splits(folder, one_rank, cp):
    """The cases above test what they claim: lengths that do not divide, and media on both sides of a cut."""
    samples = {name: encode_rows(folder, name) for name in ("kinds", "images", "alone", "text")}
    every = [sample for each in samples.values() for sample in each]
    assert any(len(s.input_ids) % 2 for s in every) and any(len(s.input_ids) % 4 == 2 for s in every)
    visual_tokens = [int(s.grid_thw.prod(1).sum()) // 4 for s in every if len(s.grid_thw)]  # 2x2 patches each
    assert any(n < 4 for n in visual_tokens) and any(n % cp for n in visual_tokens)
    for name in ("kinds", "images", "alone"):
        split_media = 0
        for s in samples[name]:
            media = (s.input_ids == tiny.IMAGE) | (s.input_ids == tiny.VIDEO)
            size = math.ceil(len(media) / cp)
            split_media += sum(bool(media[cut - 1] and media[cut]) for cut in range(size, len(media), size))
        assert split_media, name
    for name in ("kinds", "alone"):
        with_media = [len(s.grid_thw) > 0 for s in samples[name][:4]]
        assert with_media == [False, True, name == "kinds", False]
    assert not any(len(s.grid_thw) for s in samples["alone"][4:] + samples["text"])
    dirty = read_metrics(one_rank("dense", "dirty", *DIRTY))
    assert sum(m["skipped_samples"] for m in dirty) == 2 and sum(m["truncated_samples"] for m in dirty) > 0


def test_starved_experts_get_no_token(folder, one_rank):
    """The model "starved" does what its cases claim, before and after training."""
    model = Qwen3VL(Qwen3VLConfig.from_json(folder / "starved"))
    trained = convert.find_checkpoint(one_rank("starved", "alone", *AUX))
    for source in (convert.HuggingFaceWeights(folder / "starved"), convert.CheckpointWeights(trained)):
        convert.load_weights(model, source)
        for sample in encode_rows(folder, "alone"):
            with torch.no_grad():
                _, stats = model.hidden_states(data.collate([sample]))
            assigned = torch.stack(stats)[:, 0]  # [layers, E]
            assert assigned[:, 4:].sum() == 0 and assigned.sum() == 3 * 3 * len(sample.input_ids)


def compiled(argv: list[str]) -> None:
    """Run train.py; blocks are traced, but run PyTorch's kernels, as Inductor needs g++. New lengths compile once."""
    compile_module = torch.nn.Module.compile
    torch._dynamo.config.recompile_limit = 6  # PyTorch has 8
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.nn.Module.compile = functools.partialmethod(compile_module, backend="aot_eager")
    train.main(argv)


@pytest.mark.parametrize("case", params({
    ("dense", "kinds", *EVAL): [(1, ["--compile"])],
    ("moe", "kinds", *AUX, *LORA_EXPERTS): [(1, ["--compile"])],
    ("moe", "kinds", *AUX): [(4, [*EP2, *CP2, "--compile"])],
}))
def test_compile_equals_eager(folder, tmp_path, one_rank, case):
    assert_equals_one_rank(folder, tmp_path, one_rank, case, compiled)


def test_torchrun_all_axes(folder, tmp_path, one_rank):
    """The command line as a user runs it: experts, context and FSDP on four ranks."""
    result = torchrun(4, *layout_argv(folder, "moe", "kinds", tmp_path / "many", *AUX, *EP2, *CP2, *OFFLOAD))
    assert result.returncode == 0, result.stderr[-4000:]
    assert_same_training(one_rank("moe", "kinds", *AUX), tmp_path / "many")
    assert result.stdout.count("iteration        4/       4") == 1  # only rank 0 logs


def test_grad_square_sum_of_a_large_tensor():
    """PyTorch's norm of all 16 million numbers at once is 1 % too small on a CPU."""
    p = torch.nn.Parameter(torch.empty(4096, 4096))
    p.grad = torch.full_like(p, 0.5 ** 3.5)
    state = SimpleNamespace(device="cpu", dp_replicate=2)
    assert parallel.grad_square_sum([p], state).item() == pytest.approx(0.5**7 * 2**24 / 2, rel=1e-4)


# ---- user errors and failures ----------------------------------------------------------------------------------------

INVALID_SIZES = [  # six_heads has 6 heads and 2 key-value heads for text, 6 heads for vision
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


@pytest.mark.parametrize(("model", "world_size", "flags", "message"), INVALID_SIZES)
def test_train_invalid_sizes(folder, tmp_path, model, world_size, flags, message):
    """One line names the sizes that work, and all ranks end soon."""
    start = time.monotonic()
    job = Job(layout_argv(folder, model, "text", tmp_path / "save", *flags), world_size)
    statuses = job.wait()
    errors = error_lines(job.output())
    assert len(errors) == 1 and re.search(message, errors[0]), job.output()
    assert 2 in statuses and set(statuses) <= {2, -signal.SIGTERM} and "Traceback" not in job.output()
    assert time.monotonic() - start < 30


def test_train_bad_image_on_one_rank(folder, tmp_path):
    """A bad image in the second step, for two of four ranks: one line, and no rank hangs."""
    rows = json.loads((folder / "kinds.json").read_text())
    (tmp_path / "bad.png").write_bytes((folder / "1.png").read_bytes()[:200])
    rows[5] |= {"id": "culprit", "images": [str(tmp_path / "bad.png"), "1.png"]}
    (folder / "damaged.json").write_text(json.dumps(rows))
    start = time.monotonic()
    job = Job(layout_argv(folder, "moe", "damaged", tmp_path / "save", *EP2, *CP2), 4)
    statuses = job.wait()
    assert 1 in statuses and set(statuses) <= {1, -signal.SIGTERM} and time.monotonic() - start < 30
    errors = error_lines(job.output())
    assert len(errors) == 1 and "bad.png" in errors[0] and "culprit" in errors[0], job.output()
    assert "Traceback" not in job.output() and len(read_metrics(tmp_path / "save")) == 1


def broken_in_second_step(argv: list[str]) -> None:
    """Run train.py; rank 1 has a bug in the second of the four micro-batches of its second step."""
    forward, count = Qwen3VL.forward, itertools.count(1)

    def broken_forward(self, batch):
        if next(count) == 6 and os.environ["RANK"] == "1":
            raise RuntimeError("broken on purpose")
        return forward(self, batch)

    Qwen3VL.forward = broken_forward
    train.main(argv)


def test_train_exception_on_one_rank(folder, tmp_path):
    """A bug prints its traceback once; the ranks that waited for the broken one end and print nothing."""
    start = time.monotonic()
    job = Job(layout_argv(folder, "moe", "text", tmp_path / "save", *EP2, *CP2), 2, broken_in_second_step)
    first, second = job.wait()
    assert first in (1, -signal.SIGTERM) and second == 1 and time.monotonic() - start < 45, job.output()
    assert len(re.findall("^RuntimeError: broken on purpose", job.output(), re.M)) == 1, job.output()
    assert job.output().count("in broken_forward") == 1 and "Traceback" not in job.logs[0].read_text(), job.output()
    assert not error_lines(job.output()) and len(read_metrics(tmp_path / "save")) == 1


def test_torchrun_killed_rank(folder, tmp_path):
    """SIGKILL, as the system sends when memory runs out: torchrun reports it and no rank is left."""
    argv = layout_argv(folder, "moe", "text", tmp_path / "save", *EP2, *CP2, iters=100000)
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    log = tmp_path / "output"
    with open(log, "w") as output:
        job = subprocess.Popen([*program, *argv], cwd=ROOT, stdout=output, stderr=output)
    try:
        metrics, deadline = tmp_path / "save" / "metrics.jsonl", time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert job.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
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
    assert "Signal 9 (SIGKILL)" in log.read_text() and 'train.py", line' not in log.read_text()


# ---- checkpoints between layouts ------------------------------------------------------------------------------------


def train_without_updates(argv: list[str]) -> None:
    """Run train.py with an optimizer that changes nothing, so that it saves what it has loaded."""
    torch.optim.AdamW.step = lambda self, closure=None: None
    train.main(argv)


def test_checkpoint_loads_exactly_in_every_layout(folder, tmp_path):
    """Weights and optimizer state stay the same bit for bit, while each layout loads what the previous one saved."""
    previous = run_layout(4, layout_argv(folder, "moe", "kinds", tmp_path / "0", *EP2, iters=2))
    expected = weights(previous)
    assert sum(name.startswith("optimizer.exp_avg_sq.") for name in expected) * 4 == len(expected)
    assert sum(bool(value.any()) for value in expected.values()) > 0.9 * len(expected)
    for i, (world_size, flags) in enumerate([(2, []), (4, EP2), (1, []), (4, [*EP2, *FSDP2])], 1):
        argv = layout_argv(folder, "moe", "kinds", tmp_path / str(i), *flags, "--load", previous, iters=2 + i)
        previous = run_layout(world_size, argv, train_without_updates)
        found = weights(previous)
        assert convert.find_checkpoint(previous).name == f"iter_{2 + i:07d}" and found.keys() == expected.keys()
        assert not [n for n in expected if not torch.equal(found[n], expected[n])], (world_size, flags)


def test_resume_in_another_layout(folder, tmp_path, one_rank):
    """Two steps in one layout and two in another equal four steps on one rank."""
    flags = [*AUX, "--save-interval", 2]
    save = run_layout(4, layout_argv(folder, "moe", "kinds", tmp_path / "save", *flags, *EP2, *FSDP2))
    (save / "iter_0000004").rename(tmp_path / "gone")  # as if the run had died in between
    (save / convert.TRACKER).write_text("2")
    run_layout(2, layout_argv(folder, "moe", "kinds", save, *flags, *CP2, "--load", save))
    assert_same_training(one_rank("moe", "kinds", *AUX), save)


@pytest.mark.parametrize("reading", ["", pytest.param("--streaming", marks=pytest.mark.slow)])
def test_resume_packing_on_other_ranks(folder, tmp_path, reading):
    """Two ranks, then two pairs, then one rank: up to the end of the epoch every row is read exactly once."""
    processor, rows = data.Processor(folder / "moe"), data.RowDataset([str(folder / "kinds.json")])
    options = data.EncodeOptions(seq_length=150)
    lengths = [len(processor.encode(rows[i][0], folder, "", options).input_ids) for i in range(len(rows))]
    for last, (world_size, *flags) in {1: (2,), 2: (4, *CP2), 8: (1,)}.items():
        flags = [*PACKED, *reading.split(), "--global-batch-size", 2 if world_size > 1 else 1, *flags]
        load = ["--load", tmp_path / "save"] * (last > 1)
        run_layout(world_size, layout_argv(folder, "moe", "kinds", tmp_path / "save", *flags, *load, iters=last))
    metrics = read_metrics(tmp_path / "save")
    sums = [(sum(m["samples"] for m in metrics[:i]), sum(m["tokens"] for m in metrics[:i])) for i in range(9)]
    assert (len(rows), sum(lengths)) in sums[3:], sums


# ---- memory ---------------------------------------------------------------------------------------------------------


def anonymous_memory() -> int:
    """Return this process's anonymous memory in bytes: without mapped files, which the system may drop at any time."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def load_and_measure(argv: list[str]) -> None:
    """Run train.py up to its first batch. Each rank writes the size of its shards and the peak that loading added."""
    to_empty, peak, done, models = torch.nn.Module.to_empty, [0], threading.Event(), []

    def sample(before: int) -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_memory() - before)

    def begin(self, **kwargs):
        if not models:
            models.append(self)
            thread.start()
        return to_empty(self, **kwargs)

    def report(self):
        done.set()
        thread.join()
        shards = sum(parallel.local_shard_and_offset(p)[0].nbytes for p in models[0].parameters())
        save, rank = Path(argv[argv.index("--save") + 1]), os.environ["RANK"]
        (save / f"memory{rank}.json").write_text(json.dumps({"shards": shards, "peak": peak[0]}))
        torch.distributed.barrier()  # no rank leaves while another still loads
        os._exit(0)

    thread = threading.Thread(target=lambda: sample(anonymous_memory()), daemon=True)
    torch.nn.Module.to_empty, data.Loader.stages = begin, report
    train.main(argv)


@pytest.fixture(scope="module")
def large(folder) -> tuple[int, int, int]:
    """Write a mixture of experts with 16 layers to folder / "large".

    Returns the size in bytes of the model, of a layer and of the largest tensor.
    """
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
    sizes = [p.nbytes for p in model.parameters()]
    return sum(sizes), sum(p.nbytes for p in model.model.language_model.layers[0].parameters()), max(sizes)


@pytest.mark.parametrize("kind", ["safetensors", "checkpoint"])
def test_load_memory_is_shards_and_a_chunk(folder, tmp_path, large, kind):
    """Four ranks read their own slices: never the full model, and never another rank's part of it.

    A model of 2 MB shows what the program itself needs; that is subtracted. 4 MB are left for the allocator. Reading
    safetensors may take a layer (16 MB). Reading a checkpoint may take four times a chunk, here a tensor of 9 MB: the
    previous chunk, the file's bytes, PyTorch's copy of them, and the values. The full model (253 MB) exceeds the limit,
    and so does another rank's part: a rank has 63 MB, or 127 MB with hybrid sharding.
    """
    total, layer, tensor = large
    reading = 4 * tensor if kind == "checkpoint" else layer

    def measure(name: str, *flags) -> list[dict]:
        source = []
        if kind == "checkpoint":
            source = ["--load", folder / f"{name}_dcp"]
            if not source[1].exists():
                convert.hf_to_dcp(folder / name, source[1])
        save = tmp_path / "_".join(map(str, (name, *flags)))
        run_layout(4, layout_argv(folder, name, "text", save, *flags, *source), load_and_measure)
        return [json.loads((save / f"memory{rank}.json").read_text()) for rank in range(4)]

    overheads = [rank["peak"] - rank["shards"] for rank in measure("moe")]
    for flags, share in (([], total / 4), ([*EP2, *FSDP2], total / 2)):
        for rank, overhead in zip(measure("large", *flags), overheads, strict=True):
            assert rank["shards"] == pytest.approx(share, rel=0.02)
            loading = rank["peak"] - overhead
            assert 0.9 * rank["shards"] < loading < rank["shards"] + reading + 4e6, (overhead, reading)


class StorageLifetimes(TorchDispatchMode):
    """Record when each storage was created and freed, in operations, and which of them were inputs of a block.

    It holds weak references to the storages themselves, so it does not depend on how they are kept or moved.
    """

    def __init__(self):
        super().__init__()
        self.alive, self.lifetimes, self.clock = {}, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.record_freed()
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if type(tensor) is torch.Tensor:
                self.lifetime(tensor)
        return result

    def record_freed(self) -> None:
        self.clock += 1
        for key in [key for key, life in self.alive.items() if life.reference.expired()]:
            self.alive.pop(key).end = self.clock

    def lifetime(self, tensor: torch.Tensor) -> SimpleNamespace:
        """Return the record of a tensor's storage, made at the first call."""
        reference = StorageWeakRef(tensor.untyped_storage())
        if reference.cdata not in self.alive:  # an address is not reused while a weak reference holds it
            life = SimpleNamespace(reference=reference, begin=self.clock, end=math.inf, component=None)
            self.alive[reference.cdata] = life
            self.lifetimes.append(life)
        return self.alive[reference.cdata]

    def watch(self, component: str, block: torch.nn.Module) -> None:
        """Mark the storages that a block receives as input."""
        forward = block.forward

        def recorded(x, *args):
            self.lifetime(x).component = component
            return forward(x, *args)

        block.forward = recorded

    def max_inputs_alive(self, component: str) -> int:
        """Return how many inputs of a component's blocks were alive at once, at the worst moment."""
        self.record_freed()
        inputs = [life for life in self.lifetimes if life.component == component]
        return max(sum(other.begin <= life.begin < other.end for other in inputs) for life in inputs)


@pytest.mark.parametrize("moe", [False, True])
def test_offload_keeps_two_inputs_on_device(tmp_path, moe):
    """At most two blocks' inputs are alive at once, in forward and backward; without offload all of them are.

    The gradients are the same bit for bit.
    """
    raw = config_dict(moe)
    raw["text_config"]["num_hidden_layers"] = raw["vision_config"]["depth"] = 7
    hf_dir = tiny.hf_dir(tmp_path / "hf", raw, tiny.hf_model(raw))
    sample = tiny.row([9, ("image", 4, 6), 5, ("video", 2, 4, 4), 12])
    positions = torch.arange(len(sample.input_ids)).expand(3, -1)
    gradients, counts = [], []
    for offload in (False, True):
        state = parallel.ParallelState(kernels_npu.select("cpu"), 1)
        with torch.device("meta"):
            model = Qwen3VL(Qwen3VLConfig.from_json(hf_dir))
        lifetimes = StorageLifetimes()
        components = {"vision": model.model.visual.blocks, "text": model.model.language_model.layers}
        for component, blocks in components.items():
            for block in blocks:
                lifetimes.watch(component, block)
        parallel.parallelize(model, state, compute_dtype=torch.float32, recompute=True, offload=offload, compile=False)
        model.to_empty(device="cpu")
        convert.load_weights(model, convert.HuggingFaceWeights(hf_dir))
        for _ in range(2):  # the second step as the first: nothing is left over
            batch = tiny.batch_of([sample], [positions])
            with lifetimes:
                model(batch)[0].backward()
        counts.append([lifetimes.max_inputs_alive(component) for component in components])
        gradients.append({name: parallel.local_shard_and_offset(p.grad)[0] for name, p in model.named_parameters()})
        state.close()
    without_offload, with_offload = counts
    assert min(without_offload) >= 7 and max(with_offload) <= 2, counts
    for name, value in gradients[0].items():
        assert torch.equal(gradients[1][name], value), name
