"""train.py against transformers' model in a plain PyTorch loop, and against itself.

Six steps of AdamW give the reference's losses and gradient norms to 1e-4: float32 rounding differs by 1e-6 in the first
step, and Adam's division by the root of small second moments lets it grow to some 1e-5 in six.
"""
from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import common
import data
import train
from model import COMPONENTS, component_of

ROOT = Path(__file__).parent.parent
MODELS = {"dense": tiny.config_dict(), "moe": tiny.config_dict(moe=True), "tied": tiny.config_dict(tied=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models and rows: text.json, pictures.json, mixed.jsonl."""
    path = tmp_path_factory.mktemp("train")
    for name, raw in MODELS.items():
        tiny.hf_dir(path / name, raw, tiny.hf_model(raw))
    rng = np.random.default_rng(0)
    for i in range(8):
        height, width = rng.integers(20, 110, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path / f"{i}.png")
    words = "red green a blue sky with two small boats on the left".split()

    def talk(turns: int) -> list[dict]:
        text = [" ".join(rng.choice(words, rng.integers(1, 7))) for _ in range(2 * turns)]
        return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(text)]

    def with_pictures(messages: list[dict], *numbers: int) -> dict:
        messages[0]["content"] = "<image>" * len(numbers) + messages[0]["content"]
        return {"messages": messages, "images": [f"{n}.png" for n in numbers]}

    text = [{"messages": talk(1 + i % 3)} for i in range(10)]
    pictures = [with_pictures(talk(1 + i % 2), *range(i % 3, i % 3 + 1 + i % 2)) for i in range(10)]
    (path / "text.json").write_text(json.dumps(text))
    (path / "pictures.json").write_text(json.dumps(pictures))
    mixed = [row for pair in zip(text, pictures, strict=True) for row in pair]
    (path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    return path


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was():
    """A run in this process sets signal handlers, and one that ends in an error leaves its process group."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(n) for n in names]
    yield
    for n, handler in zip(names, before, strict=True):
        signal.signal(n, handler)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(folder: Path, save: Path, *flags, model="moe", dataset="mixed.jsonl", iters=6) -> list[dict]:
    """train.py in this process; the objects of metrics.jsonl."""
    train.main(["--init-from-hf-path", str(folder / model), "--dataset", str(folder / dataset), "--save", str(save),
                "--train-iters", str(iters), "--device", "cpu", "--lr", "1e-3", "--no-shuffle", "--num-workers", "0",
                *map(str, flags)])
    return read_metrics(save)


def read_metrics(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def shell(*argv, **kwargs) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=120, **kwargs)


def reference(folder: Path, model: str, dataset: str, *, micro=1, accumulation=1, loss_type="default", iters=6, lr=1e-3,
              lrs=None, weight_decay=0.0, clip=1.0, warmup=0, aux_coef=0.0, frozen=(), options=None,
              packed=None) -> list[tuple]:
    """(loss, gradient norm, learning rate) of each step of transformers' model, one sample to a forward; `packed` has
    the numbers of the samples in each micro-batch of one step after the other."""
    hf = tiny.hf_model(MODELS[model])
    processor = data.Processor(folder / model)
    rows = data.RowDataset([str(folder / dataset)])
    groups = []
    for tower in COMPONENTS:
        params = [p for n, p in hf.named_parameters() if component_of(n) == tower]
        for p in params:
            p.requires_grad_(tower not in frozen)
        groups.append({"params": params, "max_lr": (lrs or {}).get(tower, lr)})
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
    out = []
    for step in range(iters):
        factor = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (iters - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = factor * group["max_lr"]
        optimizer.zero_grad()
        size = micro * accumulation
        micro_batches = [range(i, i + micro) for i in range(step * size, (step + 1) * size, micro)]
        if packed:
            micro_batches = packed[step * accumulation : (step + 1) * accumulation]
        samples, counts = [], []  # the latter of supervised tokens: each sample's, its micro-batch's
        for numbers in micro_batches:
            for i in numbers:
                row, source, media = rows[i % len(rows)]
                samples.append(processor.encode(row, media, source, data.EncodeOptions(**(options or {}))))
            each = [int((s.labels != -100).sum()) for s in samples[-len(numbers) :]]
            counts += [(n, sum(each)) for n in each]
        total = 0.0
        for i, sample in enumerate(samples):
            kinds = ["image"] * len(sample.grid_thw)
            sample.kinds = kinds
            result = hf(**tiny.hf_inputs(sample), output_router_logits=aux_coef > 0)
            nll = torch.nn.functional.cross_entropy(result.logits[0], sample.labels, ignore_index=-100, reduction="sum")
            loss = {
                "default": nll / counts[i][1] / accumulation, "per_sample": nll / counts[i][0] / len(samples),
                "per_token": nll / sum(n for n, _ in counts),
            }[loss_type]
            if aux_coef:
                assert micro == 1
                loss = loss + aux_coef * result.aux_loss / accumulation
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_([p for g in groups for p in g["params"]], clip or math.inf).item()
        out.append((total, norm, optimizer.param_groups[-1]["lr"]))
        optimizer.step()
    return out


CASES = {
    "dense text": ("dense", "text.json", [], {}),
    "dense pictures": ("dense", "pictures.json", ["--loss-chunk-size", 7], {}),
    "tied mixed, accumulation, per token": (
        "tied", "mixed.jsonl", ["--micro-batch-size", 2, "--global-batch-size", 6, "--loss-type", "per_token"],
        {"micro": 2, "accumulation": 3, "loss_type": "per_token"}),
    "moe pictures, recompute": ("moe", "pictures.json", ["--recompute", "full", "--loss-chunk-size", 1], {}),
    "moe text, warm-up, no clipping": (
        "moe", "text.json", ["--lr-warmup-iters", 2, "--clip-grad", 0], {"warmup": 2, "clip": 0}),
    "moe mixed, accumulation, per sample, recompute": (
        "moe", "mixed.jsonl", ["--micro-batch-size", 3, "--global-batch-size", 6, "--loss-type", "per_sample",
                               "--recompute", "full"], {"micro": 3, "accumulation": 2, "loss_type": "per_sample"}),
    "moe mixed, default over uneven micro-batches": (
        "moe", "mixed.jsonl", ["--micro-batch-size", 2, "--global-batch-size", 4, "--loss-chunk-size", 0],
        {"micro": 2, "accumulation": 2}),
    "moe pictures, auxiliary loss": (
        "moe", "pictures.json", ["--router-aux-loss-coef", 0.1, "--global-batch-size", 2],
        {"aux_coef": 0.1, "accumulation": 2}),
    "dense mixed, a rate for each tower, weight decay": (
        "dense", "mixed.jsonl", ["--vision-lr", 1e-4, "--projector-lr", 5e-4, "--weight-decay", 0.1,
                                 "--text-attn-implementation", "eager", "--vision-attn-implementation", "eager"],
        {"lrs": {"vision encoder": 1e-4, "vision projector": 5e-4}, "weight_decay": 0.1}),
    "moe pictures, only the projector trains": (
        "moe", "pictures.json", ["--freeze-vision-encoder", "--freeze-text-decoder"],
        {"frozen": ("vision encoder", "text decoder")}),
    "dense mixed, prompt supervised": (
        "dense", "mixed.jsonl", ["--train-on-prompt", "--no-init-model-with-meta-device"],
        {"options": {"train_on_prompt": True}}),
}


@pytest.mark.parametrize("case", CASES)
def test_six_steps_equal_transformers(folder, tmp_path, case):
    model, dataset, flags, settings = CASES[case]
    metrics = run(folder, tmp_path, *flags, model=model, dataset=dataset)
    expected = reference(folder, model, dataset, **settings)
    assert len(metrics) == len(expected) == 6
    for m, (loss, norm, lr) in zip(metrics, expected, strict=True):
        assert m["loss"] == pytest.approx(loss, rel=1e-4), m["iteration"]
        assert m["grad_norm"] == pytest.approx(norm, rel=1e-4), m["iteration"]
        assert m["lr"] == pytest.approx(lr, abs=1e-12)


@pytest.mark.parametrize("loss_type", ["default", "per_sample", "per_token"])
def test_packed_rows_equal_their_samples_one_by_one(folder, tmp_path, loss_type):
    """Two packed rows a step, of pictures, videos and text, against transformers' model on each sample alone."""
    model, dataset = "moe", "mixed.jsonl"
    flags = ["--packing", "--seq-length", 300, "--global-batch-size", 2, "--loss-type", loss_type]
    metrics = run(folder, tmp_path, *flags, model=model, dataset=dataset)
    loader = data.Loader(
        data.RowDataset([str(folder / dataset)]), data.Processor(folder / model), micro_batch_size=1,
        global_batch_size=1, dp_rank=0, dp_size=1, seed=0, shuffle=False, num_workers=0, on_bad_sample="error",
        options=data.EncodeOptions(seq_length=300), packing=True)
    packed = [[int(re.search(r"row (\d+)", source)[1]) - 1 for source in batch.sources]
              for batch in itertools.islice(loader, 12)]
    assert max(map(len, packed)) > 2 and [m["samples"] for m in metrics] == [len(a + b) for a, b in
                                                                            zip(packed[::2], packed[1::2], strict=True)]
    expected = reference(folder, model, dataset, accumulation=2, loss_type=loss_type, packed=packed)
    for m, (loss, norm, _) in zip(metrics, expected, strict=True):
        assert m["loss"] == pytest.approx(loss, rel=1e-4), m["iteration"]
        assert m["grad_norm"] == pytest.approx(norm, rel=1e-4), m["iteration"]


@pytest.mark.parametrize("reading", ["", "--streaming", "--packing", "--packing --streaming"])
def test_epochs(folder, tmp_path, reading):
    """An epoch's samples are known, its packed rows judged by lengths; the last of them is what is left."""
    rows = data.RowDataset([str(folder / "text.json")])
    train.main(["--init-from-hf-path", str(folder / "dense"), "--dataset", str(folder / "text.json"), "--save",
                str(tmp_path), "--device", "cpu", "--train-epochs", "2", "--num-workers", "0", "--seq-length", "300",
                *reading.split()])
    metrics = read_metrics(tmp_path)
    used = sum(m["samples"] for m in metrics)
    if "--packing" in reading:
        assert len(metrics) < len(rows) and abs(used - 2 * len(rows)) <= len(rows), (len(metrics), used)
    else:
        assert used == len(metrics) == 2 * len(rows)


def weights(save: Path) -> dict[str, torch.Tensor]:
    import convert
    directory = convert.find_checkpoint(save)
    source = convert.CheckpointWeights(directory)
    return {n: source.read(n, (0,) * len(shape), tuple(shape)) for n, (_, shape) in source.tensors.items()}


def assert_same_weights(a: Path, b: Path):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("workers, reading", [
    (2, ""), (2, "--streaming --shuffle-buffer 4"), (2, "--packing --seq-length 160"),
    (2, "--packing --streaming --seq-length 160"), (0, "--packing --streaming --seq-length 160"),
])
def test_a_resumed_run_is_the_uninterrupted_one(folder, tmp_path, workers, reading):
    """Bit for bit: losses, weights and optimizer state, with shuffling over an epoch's end and accumulation."""
    flags = ["--shuffle", "--global-batch-size", 4, "--num-workers", workers, "--seed", 3, *reading.split()]
    whole = run(folder, tmp_path / "whole", *flags, iters=8)
    run(folder, tmp_path / "parts", *flags, "--save-interval", 3, iters=8)
    for last in (8, 6):  # as if the run had died between iteration 3's checkpoint and iteration 6's
        (tmp_path / "parts" / f"iter_{last:07d}").rename(tmp_path / f"gone{last}")
    (tmp_path / "parts" / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = run(folder, tmp_path / "parts", *flags, "--load", tmp_path / "parts", iters=8)
    assert [m["iteration"] for m in resumed] == list(range(1, 9))
    timeless = [{k: v for k, v in m.items() if not k.endswith("_s")} for m in resumed]
    assert timeless == [{k: v for k, v in m.items() if not k.endswith("_s")} for m in whole]
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_resuming_a_finished_run_says_so(folder, tmp_path, caplog):
    run(folder, tmp_path, iters=2)
    caplog.set_level("INFO")
    run(folder, tmp_path, "--load", tmp_path, iters=2)
    assert "nothing to do" in caplog.text


def test_finetune_takes_the_weights_only(folder, tmp_path):
    run(folder, tmp_path / "a", iters=2)
    metrics = run(folder, tmp_path / "b", "--load", tmp_path / "a", "--finetune", iters=1)
    assert [m["iteration"] for m in metrics] == [1]
    first = run(folder, tmp_path / "c", iters=1)
    assert metrics[0]["loss"] < first[0]["loss"]  # the same row, after two steps of training


def test_without_optimizer_or_random_state(folder, tmp_path):
    run(folder, tmp_path / "a", "--no-save-optim", "--no-save-rng", iters=2)
    assert not [n for n in weights(tmp_path / "a") if n.startswith("optimizer.")]
    state = torch.load(tmp_path / "a" / "iter_0000002" / "trainer_state_rank_00000.pt", weights_only=True)
    assert "rng" not in state and state["iteration"] == 2
    metrics = run(folder, tmp_path / "a", "--load", tmp_path / "a", "--no-load-optim", "--no-load-rng", iters=3)
    assert [m["iteration"] for m in metrics] == [1, 2, 3]


def test_frozen_towers_do_not_move_and_the_table_says_so(folder, tmp_path, caplog):
    caplog.set_level("INFO")
    run(folder, tmp_path, "--freeze-vision-encoder", "--freeze-vision-projector", iters=2)
    table = [line for line in caplog.messages if "trainable" in line]
    rows = {line.split("  ")[0].strip(): re.findall(r"\d[\d,]*", line) for line in table}
    start = {k: tiny.our_layout(k, v) for k, v in tiny.hf_model(MODELS["moe"]).state_dict().items()}
    after = weights(tmp_path)
    for name, value in start.items():
        assert torch.equal(value, after[name]) == (".visual." in name), name
    for tower in COMPONENTS:
        size = sum(v.numel() for k, v in start.items() if component_of(k) == tower)
        assert rows[tower] == [f"{size:,}", f"{size if tower == 'text decoder' else 0:,}"]


def test_held_out_loss_is_every_row_once(folder, tmp_path):
    """Mean over the supervised tokens of all held-out rows, also where micro-batches do not divide them."""
    metrics = run(folder, tmp_path, "--eval-dataset", folder / "text.json", "--eval-interval", 2,
                  "--micro-batch-size", 3, "--lr", 0, iters=3)
    assert [m["eval_loss"] is None for m in metrics] == [True, False, False]
    hf = tiny.hf_model(MODELS["moe"])
    processor, rows = data.Processor(folder / "moe"), data.RowDataset([str(folder / "text.json")])
    total = count = 0
    for row, source, media in (rows[i] for i in range(len(rows))):
        sample = processor.encode(row, media_dir=media, source=source)
        sample.kinds = []
        logits = hf(**tiny.hf_inputs(sample)).logits[0]
        total += torch.nn.functional.cross_entropy(logits, sample.labels, ignore_index=-100, reduction="sum").item()
        count += int((sample.labels != -100).sum())
    assert metrics[1]["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics[2]["eval_loss"] == metrics[1]["eval_loss"]  # and evaluation leaves training alone


def test_random_weights_train(folder, tmp_path):
    (folder / "bare").mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (folder / "bare" / name).write_bytes((folder / "moe" / name).read_bytes())
    metrics = run(folder, tmp_path / "a", "--init", "random", "--max-samples", 1, model="bare", iters=25)
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    again = run(folder, tmp_path / "b", "--init", "random", "--max-samples", 1, model="bare", iters=1)
    other = run(folder, tmp_path / "c", "--init", "random", "--max-samples", 1, "--seed", 1, model="bare", iters=1)
    assert again[0]["loss"] == metrics[0]["loss"] != other[0]["loss"]


@pytest.mark.parametrize("flag", ["--freeze-text-decoder", "--freeze-vision-encoder", "--freeze-vision-projector"])
def test_a_frozen_tower_and_steps_without_pictures(folder, tmp_path, flag):
    """With the text decoder frozen a step of text alone has no gradient at all: norm 0, and nothing moves."""
    metrics = run(folder, tmp_path, flag, iters=2)  # a row of text, then one with a picture
    assert (metrics[0]["grad_norm"] == 0) == (flag == "--freeze-text-decoder")
    assert metrics[1]["grad_norm"] > 0


def test_bf16_keeps_float32_parameters(folder, tmp_path):
    """bf16 has 8 bits: a loss near 6 is right to some 1 %; what is stored, and Adam's state, stay float32."""
    exact = run(folder, tmp_path / "fp32", "--loss-type", "per_token", iters=2)
    metrics = run(folder, tmp_path / "bf16", "--bf16", "--loss-type", "per_token", iters=2)
    assert metrics[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.02)
    assert metrics[0]["loss"] != exact[0]["loss"]
    assert {v.dtype for v in weights(tmp_path / "bf16").values()} == {torch.float32}


def test_metrics_and_log_line(folder, tmp_path, capsys):
    metrics = run(folder, tmp_path, "--micro-batch-size", 2, "--global-batch-size", 4, "--log-interval", 2,
                  "--seq-length", 90, iters=5)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" iteration")]
    assert [m["iteration"] for m in metrics] == [1, 2, 3, 4, 5]
    assert [int(re.search(r"iteration +(\d+)/ +5 \|", line)[1]) for line in lines] == [2, 4]
    tokens, seconds = (sum(m[key] for m in metrics[:2]) for key in ("tokens", "step_time_s"))  # a rate over all of it
    assert float(re.search(r"per device: (\S+)", lines[0])[1]) == pytest.approx(tokens / seconds, abs=0.5)
    for word in ("consumed samples:", "elapsed time per iteration (ms):", "learning rate:", "global batch size:     4",
                 "lm loss:", "grad norm:", "tokens per second per device:"):
        assert word in lines[0]
    assert float(re.search(r"lm loss: (\S+)", lines[0])[1]) == pytest.approx(
        (metrics[0]["loss"] + metrics[1]["loss"]) / 2, rel=1e-6)  # the mean since the last line
    for m in metrics:
        assert m["samples"] == 4 and 0 < m["supervised_tokens"] < m["tokens"] <= 4 * 90
        assert 0 <= m["data_time_s"] < m["step_time_s"] and m["model_flops"] > 0
        assert m["mfu"] is None and m["memory_allocated"] is None and m["eval_loss"] is None
    assert sum(m["truncated_samples"] for m in metrics) > 0
    assert json.loads((tmp_path / "args.json").read_text())["global_batch_size"] == 4


def test_bad_rows_are_skipped_and_counted(folder, tmp_path, caplog):
    rows = [json.loads(line) for line in (folder / "mixed.jsonl").read_text().splitlines()]
    rows[1]["images"] = ["missing.png"]
    (folder / "dirty.json").write_text(json.dumps(rows))
    metrics = run(folder, tmp_path, "--on-bad-sample", "skip", "--global-batch-size", 2, dataset="dirty.json", iters=2)
    assert [m["skipped_samples"] for m in metrics] == [1, 0]
    assert "missing.png" in caplog.text


def test_not_finite_is_not_applied_and_ends_the_run(folder, tmp_path, monkeypatch, capsys):
    """Weights that give no number: ten steps are counted, then one line, and the weights are as they were."""
    raw = MODELS["dense"]
    hf = tiny.hf_model(raw)
    hf.lm_head.weight.data[0, 0] = float("inf")
    tiny.hf_dir(folder / "broken", raw, hf)
    status = common.run_program(train.main, [
        "--init-from-hf-path", str(folder / "broken"), "--dataset", str(folder / "text.json"), "--save", str(tmp_path),
        "--train-iters", "30", "--num-workers", "0"])
    assert status == 1
    assert "error: ten steps in a row were not finite" in capsys.readouterr().err
    metrics = read_metrics(tmp_path)
    assert len(metrics) == 9 and {m["skipped_iterations"] for m in metrics} == {1}
    assert {m["loss"] for m in metrics} == {None}


ERRORS = [
    (["--train-iters", 0], 2, r"--train-iters: '0' is not an integer at least 1"),
    (["--eval-iters", 10**30], 2, r"--eval-iters: '1000.*' is not an integer at least 1 and at most 1e\+09"),
    (["--distributed-timeout-minutes", 1e300], 2, "--distributed-timeout-minutes: .* at most 1e"),
    (["--dataset", "a\x1b[2Jb.json"], 1, r"a\\x1b\[2Jb.json"),  # a terminal would obey
    (["--lr", "fast"], 2, r"--lr: 'fast' is not a number"),
    (["--lr", "nan"], 2, r"--lr: 'nan'"),
    (["--adam-beta1", 1.5], 2, r"--adam-beta1: '1.5' .* below 1"),
    (["--adam-beta2", 1], 2, r"--adam-beta2: '1' .* below 1"),
    (["--save", ""], 2, "--save is empty"),
    (["--eval-iters", 3], 2, "--eval-iters need --eval-dataset"),
    (["@/dev/null/flags"], 2, "/dev/null/flags"),
    (["--profile-dir", "/dev/null/x"], 1, "/dev/null/x"),
    (["--train-epoch", 3], 2, r"unrecognized arguments: --train-epoch .*did you mean --train-epochs"),
    (["--global-batch-size", 5, "--micro-batch-size", 2], 2, r"the nearest that are: 4 or 6"),
    (["--min-lr", 1], 2, r"--min-lr 1 is above --lr"),
    (["--train-on-prompt", "--mask-history"], 2, "exclude each other"),
    (["--shuffle-buffer", 5], 2, "--shuffle-buffer shuffles a stream: give --streaming"),
    (["--train-epochs", 1], 2, "not allowed with"),
    (["--freeze-vision-encoder", "--freeze-vision-projector", "--freeze-text-decoder"], 2, "every tower is frozen"),
    (["--text-attn-implementation", "flash_attention_2"], 2, "flash_attention_2.*take one of eager, sdpa"),
    (["--device", "cuda"], 2, "--device cuda: this PyTorch sees no CUDA device"),
    (["--device", "npu"], 2, "--device npu"),
    (["--dataset", "missing.json"], 1, "missing.json"),
    (["--init-from-hf-path", "nowhere"], 1, "nowhere"),
    (["--load", "nowhere"], 1, "nowhere"),
    (["--eval-dataset", "held_out.json"], 1, "held_out.json"),
    (["--seq-length", 8], 1, r"mixed.jsonl.*row.*8"),
]


@pytest.mark.parametrize(("flags", "status", "message"), ERRORS)
def test_errors_are_one_line(folder, tmp_path, capsys, flags, status, message):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    argv = ["--init-from-hf-path", folder / "moe", "--dataset", folder / "mixed.jsonl", "--train-iters", 2,
            "--device", "cpu", "--save", tmp_path / "new", "--num-workers", 0, *flags]
    assert common.run_program(train.main, list(map(str, argv))) == status
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(message, lines[0]) and "Traceback" not in error
    

def test_a_directory_without_weights(folder, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / "moe" / name).read_bytes())
    argv = ["--init-from-hf-path", tmp_path, "--dataset", folder / "text.json", "--train-iters", 1]
    assert common.run_program(train.main, list(map(str, argv))) == 1
    assert "holds no safetensors: give a directory with weights, --init random" in capsys.readouterr().err


def test_save_must_not_hold_another_run(folder, tmp_path, capsys):
    run(folder, tmp_path, iters=1)
    argv = ["--init-from-hf-path", folder / "moe", "--dataset", folder / "text.json", "--train-iters", 2,
            "--save", tmp_path]
    assert common.run_program(train.main, list(map(str, argv))) == 2
    assert f"--save {tmp_path} holds another run: give --load {tmp_path}" in capsys.readouterr().err


def test_only_the_run_that_load_names_may_be_in_save(folder, tmp_path, capsys):
    """Not a run in the folder above --load's; its own iterations are fine, but not to start anew from."""
    run(folder, tmp_path, iters=1)
    run(folder, tmp_path / "inner", iters=1)
    base = ["--init-from-hf-path", folder / "moe", "--dataset", folder / "text.json", "--train-iters", 2,
            "--save", tmp_path]
    for flags in (["--load", tmp_path / "inner"], ["--load", tmp_path, "--finetune"]):
        assert common.run_program(train.main, list(map(str, base + flags))) == 2
        assert "error: --" in capsys.readouterr().err
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert [m["iteration"] for m in read_metrics(tmp_path)] == [1]
    metrics = run(folder, tmp_path, "--load", tmp_path / "iter_0000001", iters=2)
    assert [m["iteration"] for m in metrics] == [1, 2]


def test_a_damaged_metrics_file_is_named(folder, tmp_path, capsys):
    run(folder, tmp_path, iters=1)
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    argv = ["--init-from-hf-path", folder / "moe", "--dataset", folder / "text.json", "--train-iters", 2,
            "--save", tmp_path, "--load", tmp_path, "--num-workers", 0]
    assert common.run_program(train.main, list(map(str, argv))) == 1
    assert "metrics.jsonl: is damaged" in capsys.readouterr().err


def test_what_was_not_saved_is_said(folder, tmp_path, capsys):
    train.main(["--init-from-hf-path", str(folder / "moe"), "--dataset", str(folder / "text.json"), "--train-iters",
                "1", "--num-workers", "0"])
    assert "done: nothing was saved: there is no --save" in capsys.readouterr().out


def test_damaged_flag_files(tmp_path, capsys):
    for content, message in ((b"--lr 1 'x", "No closing quotation"), (b"\xff\xfe", "decode"), (b"@self", "recursion")):
        (tmp_path / "flags").write_bytes(content.replace(b"@self", f"@{tmp_path / 'flags'}".encode()))
        assert common.run_program(train.main, [f"@{tmp_path / 'flags'}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_flags_from_a_file_and_the_last_one_counts(tmp_path):
    (tmp_path / "flags").write_text("# a run\n--init-from-hf-path D\n--dataset a.json  # rows\n--lr 3\n--no-shuffle\n")
    args = train.parse_args([f"@{tmp_path / 'flags'}", "--train-iters", "1", "--lr", "5", "--shuffle"])
    assert args.dataset == "a.json" and args.lr == 5 and args.shuffle


def test_sigterm_saves_and_the_run_goes_on(folder, tmp_path):
    """The command line as a user runs it: stopped in the middle, it saves, exits 0, says how to go on, and does."""
    flags = ["train.py", "--init-from-hf-path", folder / "moe", "--dataset", folder / "mixed.jsonl", "--save", tmp_path,
             "--train-iters", 100000, "--lr-decay-style", "constant", "--lr", 1e-3, "--global-batch-size", 3]
    process = subprocess.Popen([sys.executable, *map(str, flags)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and f"go on with --load {tmp_path}" in out
    done = len(read_metrics(tmp_path))
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(done)
    flags[flags.index(100000)] = done + 2
    assert shell(*flags, "--load", tmp_path).returncode == 0
    assert [m["iteration"] for m in read_metrics(tmp_path)] == list(range(1, done + 3))
    # the same iterations without an interruption
    flags[flags.index(tmp_path)] = tmp_path / "whole"
    assert shell(*flags).returncode == 0
    assert_same_weights(tmp_path, tmp_path / "whole")


def torchrun(ranks: int, *argv) -> subprocess.CompletedProcess:
    return shell("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, "train.py", *argv)


def test_two_ranks_equal_one(folder, tmp_path):
    """FSDP2 over gloo: the same rows, so the same losses and norms (1e-5: sums in another order)."""
    flags = ["--init-from-hf-path", folder / "moe", "--dataset", folder / "mixed.jsonl", "--train-iters", 4,
             "--lr", 1e-3, "--global-batch-size", 4, "--num-workers", 1, "--router-aux-loss-coef", 0.01]
    result = torchrun(2, *flags, "--save", tmp_path / "two")
    assert result.returncode == 0, result.stderr[-2000:]
    train.main(list(map(str, [*flags, "--save", tmp_path / "one"])))
    for one, two in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for key in ("loss", "grad_norm", "aux_loss"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), (one["iteration"], key)
        assert two["tokens"] == one["tokens"] and two["supervised_tokens"] == one["supervised_tokens"]


def test_a_bad_row_ends_every_rank_with_one_line(folder, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(
        [{"id": f"r{i}", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
         for i in range(7)] + [{"id": "culprit", "messages": [{"role": "user", "content": "<image>"}]}]))
    began = time.monotonic()
    result = torchrun(2, "--init-from-hf-path", folder / "dense", "--dataset", tmp_path / "rows.json", "--no-shuffle",
                      "--train-iters", 50)
    assert result.returncode != 0 and time.monotonic() - began < 60
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "rows.json" in errors[0] and "culprit" in errors[0]
    assert "train.py\", line" not in result.stderr  # no traceback of ours, not even on the rank that waited
