"""Compare train.py with transformers' model in a plain PyTorch loop, and with itself.

Losses and gradient norms of six AdamW steps agree to 1e-4. Rounding in float32 differs by 1e-6 in the first step, and
dividing by the root of small second moments lets the difference grow to about 1e-5 in six steps.
"""
from __future__ import annotations

import gc
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
import weakref
from collections import Counter
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from helpers import (
    ROOT,
    assert_same_weights,
    error_lines,
    read_metrics,
    run_job,
    shell,
    torchrun,
    train_argv,
    weights,
    without_timings,
)
from PIL import Image
from transformers import Trainer

import common
import convert
import data
import kernels_npu
import train
from common import InputError
from model import COMPONENTS, Qwen3VL, component_of, weighted_cross_entropy

MODELS = {"dense": tiny.config_dict(), "moe": tiny.config_dict(moe=True), "tied": tiny.config_dict(tied=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a directory of models and rows: text.json, images.json, mixed.jsonl."""
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

    def with_images(messages: list[dict], *numbers: int) -> dict:
        messages[0]["content"] = "<image>" * len(numbers) + messages[0]["content"]
        return {"messages": messages, "images": [f"{n}.png" for n in numbers]}

    text = [{"messages": talk(1 + i % 3)} for i in range(10)]
    images = [with_images(talk(1 + i % 2), *range(i % 3, i % 3 + 1 + i % 2)) for i in range(10)]
    (path / "text.json").write_text(json.dumps(text))
    (path / "images.json").write_text(json.dumps(images))
    mixed = [row for pair in zip(text, images, strict=True) for row in pair]
    (path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    return path


def run(folder: Path, save: Path, *flags, model="moe", dataset="mixed.jsonl", iters=6) -> list[dict]:
    """Run train.py in this process and return the objects of metrics.jsonl."""
    train.main(train_argv(folder / model, folder / dataset, save, *flags, iters=iters))
    return read_metrics(save)


def fails(argv: list, capsys) -> tuple[int, str]:
    """Run train.py in this process; return its exit status and its one error line."""
    status = common.run_program(train.main, list(map(str, argv)))
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    (error,) = error_lines(stderr)
    return status, error


def reference(folder: Path, model: str, dataset: str, *, micro=1, accumulation=1, loss_type="default", iters=6, lr=1e-3,
              lrs=None, weight_decay=0.0, eps=1e-8, clip=1.0, warmup=0, aux_coef=0.0, frozen=(), options=None,
              packed=None, hf=None) -> list[tuple]:
    """Return (loss, gradient norm, learning rate) of each step of transformers' model, one sample per forward.

    `packed` lists the samples of each micro-batch, of all steps. `hf` is the model to train.
    """
    hf = hf or tiny.hf_model(MODELS[model])
    decayed = Trainer.get_decay_parameter_names(None, hf)
    processor = data.Processor(folder / model)
    rows = data.RowDataset([str(folder / dataset)])
    groups = []
    for component in COMPONENTS:
        for decays in (True, False):
            params = [p for n, p in hf.named_parameters() if component_of(n) == component and (n in decayed) == decays]
            for p in params:
                p.requires_grad_(component not in frozen)
            groups.append({"params": params, "max_lr": (lrs or {}).get(component, lr),
                           "weight_decay": weight_decay if decays else 0.0})
    optimizer = torch.optim.AdamW(groups, lr=lr, eps=eps)
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
        samples, counts = [], []  # counts of supervised tokens: (the sample's, its micro-batch's)
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
    "dense images": ("dense", "images.json", ["--loss-chunk-size", 7], {}),
    "tied mixed, accumulation, per token": (
        "tied", "mixed.jsonl", ["--micro-batch-size", 2, "--global-batch-size", 6, "--loss-type", "per_token"],
        {"micro": 2, "accumulation": 3, "loss_type": "per_token"}),
    "moe images, recompute": ("moe", "images.json", ["--recompute", "full", "--loss-chunk-size", 1], {}),
    "moe text, warm-up, no clipping": (
        "moe", "text.json", ["--lr-warmup-iters", 2, "--clip-grad", 0], {"warmup": 2, "clip": 0}),
    "moe mixed, accumulation, per sample, recompute": (
        "moe", "mixed.jsonl", ["--micro-batch-size", 3, "--global-batch-size", 6, "--loss-type", "per_sample",
                               "--recompute", "full"], {"micro": 3, "accumulation": 2, "loss_type": "per_sample"}),
    "moe mixed, default over uneven micro-batches": (
        "moe", "mixed.jsonl", ["--micro-batch-size", 2, "--global-batch-size", 4, "--loss-chunk-size", 0],
        {"micro": 2, "accumulation": 2}),
    "moe images, auxiliary loss": (
        "moe", "images.json", ["--router-aux-loss-coef", 0.1, "--global-batch-size", 2],
        {"aux_coef": 0.1, "accumulation": 2}),
    "dense mixed, a learning rate per component, weight decay": (
        "dense", "mixed.jsonl", ["--vision-lr", 1e-4, "--projector-lr", 5e-4, "--weight-decay", 0.1,
                                 "--text-attn-implementation", "eager", "--vision-attn-implementation", "eager"],
        {"lrs": {"vision encoder": 1e-4, "vision projector": 5e-4}, "weight_decay": 0.1}),
    "moe images, only the projector trains": (
        "moe", "images.json", ["--freeze-vision-encoder", "--freeze-text-decoder"],
        {"frozen": ("vision encoder", "text decoder")}),
    "dense mixed, prompt supervised": (
        "dense", "mixed.jsonl", ["--train-on-prompt", "--no-init-model-with-meta-device"],
        {"options": {"train_on_prompt": True}}),
}


@pytest.mark.parametrize("case", CASES)
def test_train_equals_transformers(folder, tmp_path, case):
    model, dataset, flags, settings = CASES[case]
    metrics = run(folder, tmp_path, *flags, model=model, dataset=dataset)
    expected = reference(folder, model, dataset, **settings)
    assert len(metrics) == len(expected) == 6
    for m, (loss, norm, lr) in zip(metrics, expected, strict=True):
        assert m["loss"] == pytest.approx(loss, rel=1e-4), m["iteration"]
        assert m["grad_norm"] == pytest.approx(norm, rel=1e-4), m["iteration"]
        assert m["lr"] == pytest.approx(lr, abs=1e-12)


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_weight_decay_equals_transformers(folder, tmp_path, model):
    """After one step, the weights agree to 1e-6. The decay of a norm's weight would change it by 1e-4."""
    flags = ["--weight-decay", 0.1, "--adam-eps", 1e-2, "--lr-decay-style", "constant"]
    run(folder, tmp_path, *flags, model=model, dataset="images.json", iters=1)
    hf = tiny.hf_model(MODELS[model])
    reference(folder, model, "images.json", weight_decay=0.1, eps=1e-2, iters=1, hf=hf)
    after = weights(tmp_path)
    for name, value in hf.state_dict().items():
        torch.testing.assert_close(after[name], tiny.our_layout(name, value), rtol=0, atol=1e-6, msg=name)


def test_make_optimizer_groups(folder):
    """Each component has a group with decay and one of vectors without; both have the component's learning rate."""
    model = train.build_model(train.Qwen3VLConfig.from_json(folder / "dense"))
    lrs = {"vision encoder": 2.0, "vision projector": 3.0}
    optimizer = train.make_optimizer(model, lr=1.0, component_lrs=lrs, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        group = group_of[p]
        assert group["max_lr"] == lrs.get(component_of(name), 1.0), name
        assert group["weight_decay"] == (0.1 if p.ndim > 1 else 0), name
    assert len(optimizer.param_groups) == 6 and optimizer.param_groups[-1]["max_lr"] == 1.0


@pytest.mark.parametrize("loss_type", ["default", "per_sample", "per_token"])
def test_train_packed_rows_equal_transformers(folder, tmp_path, loss_type):
    """Compare two packed rows per step with transformers' model on each sample alone."""
    model, dataset = "moe", "mixed.jsonl"
    flags = ["--packing", "--seq-length", 300, "--global-batch-size", 2, "--loss-type", loss_type]
    metrics = run(folder, tmp_path, *flags, model=model, dataset=dataset)
    loader = data.Loader(
        data.RowDataset([str(folder / dataset)]), data.Processor(folder / model), micro_batch_size=1,
        dp_rank=0, dp_size=1, seed=None, num_workers=0, on_bad_sample="error",
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
def test_train_epochs(folder, tmp_path, reading):
    """The samples of an epoch are counted; its packed rows are estimated from their lengths."""
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


def test_dataset_weights(folder, tmp_path):
    """--train-epochs counts weighted epochs, and rows_read counts each file's rows in them, over a resume as well."""
    names = [str(folder / "text.json"), str(folder / "images.json")]  # ten rows each
    flags = ["--dataset", ",".join(names), "--dataset-weights", "2,0.5", "--shuffle", "--global-batch-size", 5]
    run(folder, tmp_path, *flags, iters=7)
    argv = train_argv(folder / "moe", "", tmp_path, *flags, "--load", tmp_path, iters=0)
    at = argv.index("--train-iters")
    train.main([*argv[:at], "--train-epochs", "2", *argv[at + 2 :]])
    metrics = read_metrics(tmp_path)
    assert len(metrics) == 10 and {m["samples"] for m in metrics} == {5}
    for epoch in (metrics[:5], metrics[5:]):
        assert [sum(m["rows_read"][name] for m in epoch) for name in names] == [20, 5]


@pytest.mark.parametrize("workers, reading", [
    (2, ""), (2, "--streaming --shuffle-buffer 4"),
    pytest.param(2, "--packing --seq-length 160", marks=pytest.mark.slow),
    (2, "--packing --streaming --seq-length 160"), (0, "--packing --streaming --seq-length 160"),
])
def test_resume_equals_uninterrupted_run(folder, tmp_path, workers, reading):
    """Losses, weights and optimizer state are equal bit for bit, over an epoch's end and with accumulation."""
    flags = ["--shuffle", "--global-batch-size", 4, "--num-workers", workers, "--seed", 3, *reading.split()]
    run(folder, tmp_path / "full", *flags, iters=8)
    run(folder, tmp_path / "parts", *flags, "--save-interval", 3, iters=8)
    for last in (8, 6):  # as if the run had died after iteration 3's checkpoint and before iteration 6's
        (tmp_path / "parts" / f"iter_{last:07d}").rename(tmp_path / f"gone{last}")
    (tmp_path / "parts" / "latest_checkpointed_iteration.txt").write_text("3")
    resumed = run(folder, tmp_path / "parts", *flags, "--load", tmp_path / "parts", iters=8)
    assert [m["iteration"] for m in resumed] == list(range(1, 9))
    assert without_timings(tmp_path / "parts") == without_timings(tmp_path / "full")
    assert_same_weights(tmp_path / "full", tmp_path / "parts")


def test_resume_finished_run(folder, tmp_path, caplog):
    run(folder, tmp_path, iters=2)
    caplog.set_level("INFO")
    run(folder, tmp_path, "--load", tmp_path, iters=2)
    assert "nothing to do" in caplog.text


def test_finetune_loads_weights_only(folder, tmp_path):
    run(folder, tmp_path / "a", iters=2)
    metrics = run(folder, tmp_path / "b", "--load", tmp_path / "a", "--finetune", iters=1)
    assert [m["iteration"] for m in metrics] == [1]
    first = run(folder, tmp_path / "c", iters=1)
    assert metrics[0]["loss"] < first[0]["loss"]  # the same row, after two steps of training


def test_resume_without_optimizer_and_rng(folder, tmp_path):
    run(folder, tmp_path / "a", "--no-save-optim", "--no-save-rng", iters=2)
    assert not [n for n in weights(tmp_path / "a") if n.startswith("optimizer.")]
    state = torch.load(tmp_path / "a" / "iter_0000002" / "trainer_state_rank_00000.pt", weights_only=True)
    assert "rng" not in state and state["iteration"] == 2
    metrics = run(folder, tmp_path / "a", "--load", tmp_path / "a", "--no-load-optim", "--no-load-rng", iters=3)
    assert [m["iteration"] for m in metrics] == [1, 2, 3]


def test_freeze_flags(folder, tmp_path, caplog):
    """Frozen components keep their weights, and the log's table counts no trainable parameters in them."""
    caplog.set_level("INFO")
    run(folder, tmp_path, "--freeze-vision-encoder", "--freeze-vision-projector", iters=2)
    table = [line for line in caplog.messages if "trainable" in line]
    rows = {line.split("  ")[0].strip(): re.findall(r"\d[\d,]*", line) for line in table}
    start = {k: tiny.our_layout(k, v) for k, v in tiny.hf_model(MODELS["moe"]).state_dict().items()}
    after = weights(tmp_path)
    for name, value in start.items():
        assert torch.equal(value, after[name]) == (".visual." in name), name
    for component in COMPONENTS:
        size = sum(v.numel() for k, v in start.items() if component_of(k) == component)
        assert rows[component] == [f"{size:,}", f"{size if component == 'text decoder' else 0:,}"]


def test_freezing_by_name(folder, tmp_path, monkeypatch):
    """Any predicate over names can freeze: only the layer norms of the text decoder train here."""
    monkeypatch.setattr(train, "freezing_predicate", lambda args: lambda name: "layernorm" not in name)
    run(folder, tmp_path, iters=1)
    start = {k: tiny.our_layout(k, v) for k, v in tiny.hf_model(MODELS["moe"]).state_dict().items()}
    after = weights(tmp_path)
    moved = {name for name, value in start.items() if not torch.equal(value, after[name])}
    assert moved == {name for name in start if "layernorm" in name}
    assert {name.partition(".exp_avg.")[2] for name in after if ".exp_avg." in name} == moved


def test_evaluate_uses_each_row_once(folder, tmp_path):
    """The loss is the mean over all supervised held-out tokens, also if micro-batches do not divide the rows."""
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
    assert metrics[2]["eval_loss"] == metrics[1]["eval_loss"]  # evaluation does not change the training


def test_evaluate_files(folder, tmp_path, monkeypatch):
    """Each held-out file has its loss, and eval_loss is the mean over the tokens of all files."""
    board = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Mock(SummaryWriter=board))
    names, processor = [str(folder / "text.json"), str(folder / "images.json")], data.Processor(folder / "moe")
    losses, counts = {}, []
    for name in names:
        _, metrics = run(folder, tmp_path / Path(name).stem, "--eval-dataset", name, "--lr", 0, iters=2)
        losses[name] = metrics["eval_loss"]
        counts.append(sum((processor.encode(row, media_dir=media).labels != data.IGNORE).sum().item()
                          for row, _, media in data.RowDataset([name])))
    first, last = run(folder, tmp_path / "both", "--eval-dataset", ",".join(names), "--lr", 0, "--tensorboard-dir",
                      tmp_path / "board", iters=2)
    assert first["eval_losses"] is None and last["eval_losses"] == losses and losses[names[0]] != losses[names[1]]
    assert last["eval_loss"] == pytest.approx(np.average(list(losses.values()), weights=counts), rel=1e-6)
    scalars = {call.args[0]: call.args[1:] for call in board.return_value.add_scalar.call_args_list}
    assert scalars[f"eval_losses/{names[1]}"] == (losses[names[1]], 2)
    assert scalars["eval_loss"] == (last["eval_loss"], 2) and "iteration" not in scalars
    assert scalars[f"rows_read/{folder / 'mixed.jsonl'}"] == (1, 2)


def write_held_out(path: Path, folder: Path, bad: int, count: int) -> Path:
    """Write `count` rows and return the path. The first `bad` rows name a missing image."""
    rows = [json.loads((folder / "text.json").read_text())[0] | {"images": ["missing.png"] * (i < bad)}
            for i in range(count)]
    path.write_text(json.dumps(rows))
    return path


def test_evaluate_without_supervised_tokens(folder, tmp_path, caplog, capsys):
    """The first held-out rows are bad: the loss is null, not 0, and a warning says why."""
    held_out = write_held_out(tmp_path / "rows.json", folder, 1, 20)
    metrics = run(folder, tmp_path / "save", "--eval-dataset", held_out, "--eval-iters", 1, "--eval-interval", 1,
                  "--on-bad-sample", "skip", iters=2)
    assert [m["eval_loss"] for m in metrics] == [None, None]
    assert caplog.text.count("have no supervised token, so that there is no eval_loss") == 2
    assert "eval loss" not in capsys.readouterr().out


@pytest.mark.parametrize(("bad", "fits"), [(2, True), (3, False), (20, False)])
def test_evaluate_too_many_bad_rows(folder, tmp_path, capsys, caplog, bad, fits):
    """A tenth of the held-out rows may be bad, however often they are read. More end the run, after a checkpoint."""
    held_out = write_held_out(tmp_path / "rows.json", folder, bad, 20)
    argv = train_argv(folder / "dense", folder / "text.json", tmp_path / "save", "--eval-dataset", held_out,
                      "--eval-interval", 1, "--on-bad-sample", "skip", iters=3)
    if fits:
        train.main(argv)
        assert all(m["eval_loss"] > 0 for m in read_metrics(tmp_path / "save"))
        assert caplog.text.count("skipped: ") == bad  # once each, although every evaluation skips them
    else:
        status, error = fails(argv, capsys)
        assert status == 1 and f"rows.json: {bad} of 20 rows read are bad" in error
        assert [m["eval_loss"] for m in read_metrics(tmp_path / "save")] == [None]
        assert convert.find_checkpoint(tmp_path / "save").name == "iter_0000001"


def test_train_from_random_weights(folder, tmp_path):
    (folder / "bare").mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (folder / "bare" / name).write_bytes((folder / "moe" / name).read_bytes())
    metrics = run(folder, tmp_path / "a", "--init", "random", "--max-samples", 1, model="bare", iters=25)
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    again = run(folder, tmp_path / "b", "--init", "random", "--max-samples", 1, model="bare", iters=1)
    other = run(folder, tmp_path / "c", "--init", "random", "--max-samples", 1, "--seed", 1, model="bare", iters=1)
    assert again[0]["loss"] == metrics[0]["loss"] != other[0]["loss"]


@pytest.mark.parametrize("flag", ["--freeze-text-decoder", "--freeze-vision-encoder", "--freeze-vision-projector"])
def test_freeze_flags_and_steps_without_images(folder, tmp_path, flag):
    """With a frozen text decoder, a step of text alone has no gradient: its norm is 0."""
    metrics = run(folder, tmp_path, flag, iters=2)  # a row of text, then one with an image
    assert (metrics[0]["grad_norm"] == 0) == (flag == "--freeze-text-decoder")
    assert metrics[1]["grad_norm"] > 0


def test_train_bf16_keeps_float32_parameters(folder, tmp_path):
    """bf16 has 8 bits, so a loss near 6 is accurate to about 1 %. Stored weights and AdamW's state are float32."""
    exact = run(folder, tmp_path / "fp32", "--loss-type", "per_token", iters=2)
    metrics = run(folder, tmp_path / "bf16", "--bf16", "--loss-type", "per_token", iters=2)
    assert metrics[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.02)
    assert metrics[0]["loss"] != exact[0]["loss"]
    assert {v.dtype for v in weights(tmp_path / "bf16").values()} == {torch.float32}


@pytest.mark.parametrize("flags", [[], ["--packing", "--seq-length", 300, "--freeze-text-decoder"]])
def test_train_step_holds_the_pixels_of_one_micro_batch(folder, tmp_path, monkeypatch, flags):
    """Pixels have the compute type. They are decoded after the last micro-batch's were freed."""
    forward, patchify, pixels, events = Qwen3VL.forward, data.Processor._patchify, [], []

    def record_decoding(*args):
        events.append(("decode", [ref for ref in pixels if ref() is not None]))
        return patchify(*args)

    def record_forward(self, batch):
        assert batch.pixel_values.dtype == torch.bfloat16
        pixels.append(weakref.ref(batch.pixel_values))
        events.append(("forward", len(batch.grid_thw)))
        return forward(self, batch)

    monkeypatch.setattr(data.Processor, "_patchify", record_decoding)
    monkeypatch.setattr(Qwen3VL, "forward", record_forward)
    run(folder, tmp_path, "--bf16", "--global-batch-size", 4, *flags, dataset="images.json", iters=3)
    expected = [event for kind, count in events if kind == "forward"
                for event in [("decode", [])] * count + [("forward", count)]]
    assert events == expected and len(pixels) == 12 and ("decode", []) in events


def test_save_hf(folder, tmp_path, capsys):
    """Only a run that is complete writes what dcp_to_hf would write."""
    flags = ["--save-hf", tmp_path / "hf", "--image-max-pixels", 4096]
    run(folder, tmp_path / "save", *flags, "--exit-duration-in-mins", 1e-6, iters=2)
    assert not (tmp_path / "hf").exists()
    run(folder, tmp_path / "save", *flags, "--load", tmp_path / "save", iters=2)
    convert.dcp_to_hf(tmp_path / "save", tmp_path / "expected", folder / "moe")
    names = {path.name for path in (tmp_path / "expected").iterdir()}
    assert names == {path.name for path in (tmp_path / "hf").iterdir()} and "model.safetensors.index.json" in names
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name
    argv = train_argv(folder / "moe", folder / "text.json", tmp_path / "other", *flags, iters=1)
    assert fails(argv, capsys) == (2, f"error: --save-hf {tmp_path / 'hf'} exists: give a new directory")
    (tmp_path / "file").touch()
    flags = ["--save-hf", tmp_path / "file" / "hf"]
    argv = train_argv(folder / "moe", folder / "text.json", tmp_path / "other", *flags, iters=1)
    assert fails(argv, capsys) == (1, f"error: {tmp_path / 'file'}: File exists") and not (tmp_path / "other").exists()


def log_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r" \[[^]]*\] iteration ", line)]


def test_cpu_offload_equals_device(folder, tmp_path):
    """Through FSDP2 and back to its checkpoint: equal losses and norms to 1e-5."""
    flags = ["--global-batch-size", 2, "--router-aux-loss-coef", 0.01, "--seq-length", 90]
    expected = run(folder, tmp_path / "device", *flags, iters=4)
    flags.append("--cpu-offload")
    run(folder, tmp_path / "host", *flags, "--save-interval", 2, "--no-init-model-with-meta-device", iters=4)
    run(folder, tmp_path / "resumed", *flags, "--load", tmp_path / "host/iter_0000002", iters=4)
    for name, first in (("host", 0), ("resumed", 2)):
        for a, b in zip(expected[first:], read_metrics(tmp_path / name), strict=True):
            for key in ("iteration", "loss", "grad_norm", "aux_loss"):
                assert b[key] == pytest.approx(a[key], rel=1e-5), (name, key)


def test_synchronize_per_layer(folder, tmp_path, monkeypatch):
    """Wait before each of the four text blocks, in forward and in recompute."""
    calls = []
    monkeypatch.setattr(kernels_npu.Cpu, "synchronize", lambda self: calls.append(self))
    run(folder, tmp_path / "off", "--recompute", "full", dataset="text.json", iters=1)
    assert not calls
    run(folder, tmp_path / "on", "--recompute", "full", "--synchronize-per-layer", dataset="text.json", iters=1)
    assert len(calls) == 8


def test_garbage_is_collected_at_fixed_iterations(folder, tmp_path, monkeypatch):
    events, step, threshold = [], train.train_step, gc.get_threshold()

    def record_step(*args, **kwargs):
        events.append("step")
        return step(*args, **kwargs)

    def record_collection(phase: str, info: dict) -> None:
        if phase == "start":
            events.append("collection")

    monkeypatch.setattr(train, "train_step", record_step)
    monkeypatch.setattr(train, "GARBAGE_INTERVAL", 2)
    gc.set_threshold(1)  # the automatic collector would run all the time
    gc.callbacks.append(record_collection)
    try:
        run(folder, tmp_path, dataset="text.json", iters=4)
        assert gc.isenabled() and gc.get_freeze_count() == 0
    finally:
        gc.callbacks.remove(record_collection)
        gc.set_threshold(*threshold)
    last = len(events) - events[::-1].index("step")
    assert events[events.index("step") : last] == ["step", "collection", "step", "step", "collection", "step"]


def test_profile_dir(folder, tmp_path):
    flags = ["--profile-dir", tmp_path / "trace", "--profile-step-start", 2, "--profile-step-end", 2]
    run(folder, tmp_path / "save", *flags, dataset="text.json", model="dense", iters=3)
    (trace,) = (tmp_path / "trace").iterdir()
    steps = {event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "ProfilerStep" in event["name"]}
    assert steps == {"ProfilerStep#1"}  # counted from 0


def test_metrics_log(folder, tmp_path, capsys):
    metrics = run(folder, tmp_path, "--micro-batch-size", 2, "--global-batch-size", 4, "--log-interval", 2,
                  "--seq-length", 90, iters=5)
    lines = log_lines(capsys.readouterr().out)
    assert [m["iteration"] for m in metrics] == [1, 2, 3, 4, 5]
    assert [int(re.search(r"iteration +(\d+)/ +5 \|", line)[1]) for line in lines] == [2, 4]
    tokens, seconds = (sum(m[key] for m in metrics[:2]) for key in ("tokens", "step_time_s"))
    assert float(re.search(r"per device: (\S+)", lines[0])[1]) == pytest.approx(tokens / seconds, abs=0.5)
    for word in ("consumed samples:", "elapsed time per iteration (ms):", "learning rate:", "global batch size:     4",
                 "lm loss:", "loss scale: 1.0 |", "grad norm:", "tokens per sample:", "tokens per second per device:"):
        assert word in lines[0]
    assert float(re.search(r"lm loss: (\S+)", lines[0])[1]) == pytest.approx(
        (metrics[0]["loss"] + metrics[1]["loss"]) / 2, rel=1e-6)  # the mean since the last line
    for m in metrics:
        assert m["samples"] == 4 and 0 < m["supervised_tokens"] < m["tokens"] <= 4 * 90
        assert 0 <= m["data_time_s"] < m["step_time_s"] and m["model_flops"] > 0
        assert m["mfu"] is None and m["memory_allocated"] is None and m["eval_loss"] is None
    assert sum(m["truncated_samples"] for m in metrics) > 0
    assert json.loads((tmp_path / "args.json").read_text())["global_batch_size"] == 4


def test_metrics_log_eval_loss(folder, tmp_path, capsys):
    """An evaluation is added to the line of its iteration, in metrics.jsonl and in the log; both then continue."""
    metrics = run(folder, tmp_path, "--eval-dataset", folder / "text.json", "--eval-interval", 2, "--eval-iters", 1,
                  "--log-interval", 5, iters=5)
    assert [m["iteration"] for m in metrics] == [1, 2, 3, 4, 5]
    assert [m["eval_loss"] is not None for m in metrics] == [False, True, False, True, True]
    lines = log_lines(capsys.readouterr().out)
    logged = {int(re.search(r"iteration +(\d+)/", line)[1]): float(re.search(r"eval loss: (\S+)", line)[1])
              for line in lines}
    assert logged == {m["iteration"]: pytest.approx(m["eval_loss"]) for m in metrics if m["eval_loss"]}


# Megatron's and MindSpeed-MM's scripts read their logs with such commands. LOG is the log's path.
STEP_TIMES = [
    "grep 'elapsed time per iteration' LOG | awk -F ':' '{print $5}' | awk -F '|' '{print $1}'",
    "grep 'elapsed time per iteration' LOG | awk -F '[:,|]' '{print $7}'",
    "grep 'elapsed time per iteration' LOG | awk -F 'elapsed time per iteration [(]ms[)]:' '{print $2}' "
    "| awk -F '|' '{print $1}'",
]
BATCH_SIZES = [
    "grep 'global batch size' LOG | awk -F 'global batch size:' '{print $2}' | awk -F '|' '{print $1}'",
    "sed -nE 's:.* iteration +([0-9]+)/.* consumed samples\\: +([0-9]+) .*:\\2 \\1:p' LOG | awk '{print $1 / $2}'",
]
TOKENS_PER_SAMPLE = "grep 'tokens per sample' LOG | awk -F 'tokens per sample:' '{print $2}' | awk -F '|' '{print $1}'"
SAVE_PATH = "grep 'saving checkpoint at iteration' LOG | tail -n 1 | awk -F ' to ' '{print $2}' | awk '{print $1}'"


def test_log_line_scripts(folder, tmp_path, capsys):
    metrics = run(folder, tmp_path / "save", "--global-batch-size", 3, "--save-interval", 2, iters=5)
    (tmp_path / "train.log").write_text(capsys.readouterr().out)

    def read(command: str) -> list[str]:
        command = command.replace("LOG", str(tmp_path / "train.log"))
        return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout.split()

    for command in STEP_TIMES:
        expected = [pytest.approx(1000 * m["step_time_s"], abs=0.051) for m in metrics]
        assert list(map(float, read(command))) == expected, command
    for command in BATCH_SIZES:
        assert read(command) == ["3"] * 5, command
    assert list(map(float, read(TOKENS_PER_SAMPLE))) == [pytest.approx(m["tokens"] / 3, abs=0.051) for m in metrics]
    assert read(SAVE_PATH) == [str(tmp_path / "save")]


def test_log_line_format(capsys, monkeypatch):
    """Zero is a value. What cannot be computed is left out, and a step that was not applied has no part in the loss."""
    monkeypatch.setattr(time, "strftime", lambda form: form.replace("%Y-%m-%d %H:%M:%S", "2026-01-08 10:00:00"))
    metrics_log = train.MetricsLog(
        types.SimpleNamespace(rank=0, world_size=2), 0, save=None, tensorboard_dir=None, log_interval=1,
        train_iters=2000, global_batch_size=16, packed_length=None, loss_name="lm loss")
    metrics = {"iteration": 10, "loss": 0.0, "aux_loss": 0.0, "grad_norm": 0.0, "lr": 0.0, "samples": 16,
               "tokens": 13000, "step_time_s": 0.8124, "model_flops": 1.0, "skipped_samples": 0,
               "skipped_iterations": 0}
    metrics_log.write(160, **metrics)
    metrics_log.finish(0.0)
    skipped = {"iteration": 11, "loss": math.nan, "grad_norm": math.inf, "samples": 0, "skipped_samples": 2,
               "skipped_iterations": 1}
    metrics_log.write(176, **metrics | skipped)
    metrics_log.finish(None)
    zeros, not_applied = capsys.readouterr().out.splitlines()
    assert zeros == (
        " [2026-01-08 10:00:00] iteration       10/    2000 | consumed samples:          160 | elapsed time per "
        "iteration (ms): 812.4 | learning rate: 0.000000E+00 | global batch size:    16 | lm loss: 0.000000E+00 | "
        "loss scale: 1.0 | grad norm: 0.000 | tokens per sample: 812.5 | tokens per second per device: 8001 | "
        "load balancing loss: 0.0000 | eval loss: 0.000000E+00 | skipped samples: 0 | "
        "number of skipped iterations: 0 |")
    assert not_applied == (
        " [2026-01-08 10:00:00] iteration       11/    2000 | consumed samples:          176 | elapsed time per "
        "iteration (ms): 812.4 | learning rate: 0.000000E+00 | global batch size:    16 | loss scale: 1.0 | "
        "tokens per second per device: 8001 | skipped samples: 2 | number of skipped iterations: 1 |")


@pytest.mark.parametrize("flags", [[], ["--async-save"]])
def test_log_lines_of_a_save(folder, tmp_path, monkeypatch, flags):
    """The second line of a save follows when its iteration is complete."""
    lines = []

    def print_line(text: str) -> None:
        tracker = tmp_path / convert.TRACKER
        lines.append((text, tracker.read_text() if tracker.exists() else None))

    monkeypatch.setattr(convert, "print_line", print_line)
    run(folder, tmp_path, "--save-interval", 2, *flags, iters=3)
    assert lines == [
        (f"saving checkpoint at iteration       2 to {tmp_path}", None),
        (f"successfully saved checkpoint from iteration       2 to {tmp_path}", "2"),
        (f"saving checkpoint at iteration       3 to {tmp_path}", "2"),
        (f"successfully saved checkpoint from iteration       3 to {tmp_path}", "3"),
    ]


def test_metrics_log_loss_name(folder, tmp_path, monkeypatch, capsys):
    """The log line names another loss function by its `log_name`."""
    monkeypatch.setattr(weighted_cross_entropy, "log_name", "dpo loss", raising=False)
    run(folder, tmp_path, iters=1)
    (line,) = log_lines(capsys.readouterr().out)
    assert " | dpo loss: " in line and "lm loss" not in line


def test_train_loop_writes_metrics_before_saving(folder, tmp_path, monkeypatch):
    """A saved iteration always has its line in metrics.jsonl, whenever the run dies."""
    seen = []
    save = convert.CheckpointWriter.save

    def hooked(self, directory, iteration, *args):
        seen.append((iteration, read_metrics(tmp_path)[-1]["iteration"]))
        return save(self, directory, iteration, *args)

    monkeypatch.setattr(convert.CheckpointWriter, "save", hooked)
    run(folder, tmp_path, "--save-interval", 1, iters=2)
    assert seen == [(1, 1), (2, 2)]


def test_save_iteration_stores_the_media_limits_that_were_given(folder, tmp_path, caplog):
    run(folder, tmp_path / "a", "--image-max-pixels", 4096, "--video-fps", 2, iters=1)
    run(folder, tmp_path / "b", iters=1)
    for save, expected in (("a", {"image_max_pixels": 4096, "video_fps": 2.0}), ("b", {})):
        assert convert.read_settings(tmp_path / save / "iter_0000001") == {"media_limits": expected}
    run(folder, tmp_path / "b", "--load", tmp_path / "b", iters=2)
    assert "was saved with" not in caplog.text
    run(folder, tmp_path / "a", "--load", tmp_path / "a", "--image-max-pixels", 8192, iters=2)
    assert ("was saved with --image-max-pixels 4096, --video-fps 2.0, but this run has --image-max-pixels 8192"
            in caplog.text)


def test_train_loop_saves_before_bad_eval_row(folder, tmp_path, capsys):
    """A held-out row that cannot be used does not lose the steps since the last checkpoint."""
    (tmp_path / "held_out.json").write_text('[{"messages": "none"}]')
    argv = train_argv(folder / "dense", folder / "text.json", tmp_path / "save", "--eval-dataset",
                      tmp_path / "held_out.json", "--eval-interval", 2, iters=5)
    status, error = fails(argv, capsys)
    assert status == 1 and "held_out.json" in error
    assert convert.find_checkpoint(tmp_path / "save").name == "iter_0000002"


def test_train_skips_and_counts_bad_rows(folder, tmp_path, caplog):
    rows = [json.loads(line) for line in (folder / "mixed.jsonl").read_text().splitlines()]
    rows[1]["images"] = ["missing.png"]
    (folder / "dirty.json").write_text(json.dumps(rows))
    metrics = run(folder, tmp_path, "--on-bad-sample", "skip", "--global-batch-size", 2, dataset="dirty.json", iters=2)
    assert [m["skipped_samples"] for m in metrics] == [1, 0]
    assert "missing.png" in caplog.text


@pytest.mark.parametrize(("error", "cp_size"), [
    (InputError("bad row"), 1), (InputError("bad row"), 2), (MemoryError(), 1), (MemoryError(), 2)])
def test_feed_after_an_error(error, cp_size):
    """The rest of the step is empty, unless other ranks share the micro-batches and do not have the error."""
    full = data.collate([], rows_read=[1, 0], rows_bad=[1, 0])
    stages = iter([full.measure()] * 3), Mock(__next__=Mock(side_effect=[full, error]))
    feed = train.Feed(Mock(stages=lambda: stages, dataset=Mock(paths=["a", "b"])), cp_size)
    assert len(feed.measure(3)) == 3
    batches = feed.load(3)
    assert next(batches) is full and feed.error is None
    if cp_size == 2 and isinstance(error, MemoryError):
        with pytest.raises(MemoryError):
            next(batches)
    else:
        assert [batch.rows_read for batch in batches] == [[0, 0], [0, 0]]
        assert feed.error is error and feed.measure(3) == []


@pytest.mark.parametrize("loss_type", ["default", "per_sample", "per_token"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_train_skips_rows_that_only_decoding_finds(folder, tmp_path, loss_type, world_size):
    """Steps with a truncated image equal steps without that row, which holds the second step's only image.

    Losses and norms differ by rounding only, 1e-7, because they are divided by the final count after they were summed.
    AdamW divides by its large epsilon, so that rounding does not grow where gradients cancel (the bias of keys). A step
    that is not corrected differs by a third.
    """
    metrics = {}
    for name, path in late_bad_rows(folder).items():
        flags = ["--on-bad-sample", "skip", "--global-batch-size", 4, "--loss-type", loss_type, "--weight-decay", 0.1,
                 "--lr-decay-style", "constant", "--clip-grad", 2.0, "--adam-eps", 1e-3]
        save = run_job(train_argv(folder / "dense", path, tmp_path / name, *flags, iters=3), world_size)
        metrics[name] = without_timings(save)
    for found, expected in zip(metrics["cut.jpg"], metrics["absent.jpg"], strict=True):
        for m in (found, expected):
            m["rows_read"] = list(m["rows_read"].values())
        for key in ("loss", "grad_norm"):
            assert found.pop(key) == pytest.approx(expected.pop(key), rel=1e-6), key
        assert found == expected  # samples, tokens and FLOPs among others
    assert [m["skipped_samples"] for m in metrics["cut.jpg"]] == [0, 1, 0]
    found, expected = weights(tmp_path / "cut.jpg"), weights(tmp_path / "absent.jpg")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_train_late_bad_row_keeps_the_auxiliary_loss(folder, tmp_path):
    """The logged loss of the second step is that without the bad row, as its weights are: to 1e-6, see above."""
    losses = []
    for name, path in late_bad_rows(folder).items():
        flags = ["--on-bad-sample", "skip", "--global-batch-size", 4, "--loss-type", "per_token",
                 "--router-aux-loss-coef", 0.1]
        save = run_job(train_argv(folder / "moe", path, tmp_path / name, *flags, iters=2))
        losses.append([(m["loss"], m["aux_loss"]) for m in read_metrics(save)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


def late_bad_rows(folder: Path) -> dict[str, Path]:
    """Write two datasets of twelve rows, whose seventh has a bad image: truncated, which decoding finds, or absent."""
    rows = [json.loads(line) for line in (folder / "mixed.jsonl").read_text().splitlines()]
    images, text = [row for row in rows if "images" in row], [row for row in rows if "images" not in row]
    (folder / "cut.jpg").write_bytes(jpeg()[:-1000])
    paths = {}
    for name in ("cut.jpg", "absent.jpg"):
        bad = images[0] | {"images": [name] * len(images[0]["images"])}
        paths[name] = folder / f"{name}.json"
        paths[name].write_text(json.dumps([*images[1:5], *text[:2], bad, text[2], *images[5:9]]))
    return paths


def jpeg() -> bytes:
    """Return a JPEG file of noise, in which each part of the file holds some of the image."""
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize("iters", [10, 50])  # the tenth row is in the last step, or in an earlier one
def test_train_too_many_bad_rows(folder, tmp_path, capsys, iters):
    rows = json.loads((folder / "text.json").read_text())
    for row in rows[:3]:
        row["images"] = ["missing.png"]
    (folder / "bad.json").write_text(json.dumps(rows))
    argv = train_argv(folder / "dense", folder / "bad.json", tmp_path, "--on-bad-sample", "skip", iters=iters)
    status, error = fails(argv, capsys)
    assert status == 1 and "bad.json: 3 of 10 rows read are bad" in error


def test_train_nonfinite_steps_end_the_run(folder, tmp_path, capsys):
    """Infinite weights: nine steps are counted and not applied, the tenth ends the run with one line."""
    raw = MODELS["dense"]
    hf = tiny.hf_model(raw)
    hf.lm_head.weight.data[0, 0] = float("inf")
    tiny.hf_dir(folder / "broken", raw, hf)
    status, error = fails(train_argv(folder / "broken", folder / "text.json", tmp_path, iters=30), capsys)
    assert status == 1 and "ten steps in a row were not finite" in error and "text.json" in error
    metrics = read_metrics(tmp_path)
    assert len(metrics) == 9 and {m["skipped_iterations"] for m in metrics} == {1}
    assert {m["loss"] for m in metrics} == {None}


REQUIRED = ["--init-from-hf-path", "x"]
ERRORS = [
    (["--train-iters", 0], 2, r"--train-iters: '0' is not an integer at least 1"),
    (["--eval-iters", 10**30], 2, r"--eval-iters: '1000.*' is not an integer at least 1 and at most 1e\+09"),
    (["--distributed-timeout-minutes", 1e300], 2, "--distributed-timeout-minutes: .* at most 1e"),
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
    (["--freeze-vision-encoder", "--freeze-vision-projector", "--freeze-text-decoder"], 2, "every component is frozen"),
    (["--text-attn-implementation", "flash_attention_2"], 2, "flash_attention_2.*take one of eager, sdpa"),
    (["--device", "cuda"], 2, "--device cuda: this PyTorch sees no CUDA device"),
    (["--device", "npu"], 2, "--device npu"),
    (["--dataset", "missing.json"], 1, "missing.json"),
    (["--dataset-weights", "2,0.5"], 2, r"--dataset-weights has 2 number\(s\), --dataset 1 file\(s\)"),
    (["--dataset-weights=-1"], 2, "--dataset-weights: '-1' is not a number at least 0"),
    (["--dataset-weights", "2,"], 2, "--dataset-weights: '' is not a number"),
    (["--dataset-weights", "0"], 2, "--dataset-weights leaves out every dataset"),
    (["--dataset-weights", "2", "--streaming"], 2, "--dataset-weights .* --streaming"),
    (["--save", "out", "--save-hf", "x/../out"], 2, "--save-hf and --save are the same directory"),
    (["--init-from-hf-path", "nowhere"], 1, "nowhere"),
    (["--load", "nowhere"], 1, "nowhere"),
    (["--eval-dataset", "held_out.json"], 1, "held_out.json"),
    (["--seq-length", 8], 1, r"mixed.jsonl.*row.*8"),
]


@pytest.mark.parametrize(("flags", "status", "message"), ERRORS)
def test_train_user_errors(folder, tmp_path, capsys, flags, status, message):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    found, error = fails(train_argv(folder / "moe", folder / "mixed.jsonl", tmp_path / "new", *flags, iters=2), capsys)
    assert found == status and re.search(message, error), error


def test_train_without_safetensors(folder, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / "moe" / name).read_bytes())
    status, error = fails(train_argv(tmp_path, folder / "text.json", tmp_path / "save", iters=1), capsys)
    assert status == 1 and "holds no safetensors: give a directory with weights, --init random" in error


def test_save_refuses_another_run(folder, tmp_path, capsys):
    run(folder, tmp_path, iters=1)
    status, error = fails(train_argv(folder / "moe", folder / "text.json", tmp_path, iters=2), capsys)
    assert status == 2 and f"--save {tmp_path} holds another run: give --load {tmp_path}" in error


def test_save_directory_with_only_metrics_is_refused(folder, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')
    with pytest.raises(common.UsageError, match="saved no checkpoint: remove it"):
        run(folder, tmp_path, iters=1)


def test_save_accepts_only_the_loaded_run(folder, tmp_path, capsys):
    """A run in a folder above --load's is refused. A run may resume from its own iterations, but not start anew."""
    run(folder, tmp_path, iters=1)
    run(folder, tmp_path / "inner", iters=1)
    for flags in (["--load", tmp_path / "inner"], ["--load", tmp_path, "--finetune"]):
        status, _ = fails(train_argv(folder / "moe", folder / "text.json", tmp_path, *flags, iters=2), capsys)
        assert status == 2
        if dist.is_initialized():
            dist.destroy_process_group()
    assert [m["iteration"] for m in read_metrics(tmp_path)] == [1]
    metrics = run(folder, tmp_path, "--load", tmp_path / "iter_0000001", iters=2)
    assert [m["iteration"] for m in metrics] == [1, 2]


def test_resume_damaged_metrics(folder, tmp_path, capsys):
    run(folder, tmp_path, iters=1)
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    argv = train_argv(folder / "moe", folder / "text.json", tmp_path, "--load", tmp_path, iters=2)
    status, error = fails(argv, capsys)
    assert status == 1 and "metrics.jsonl: is damaged" in error


def test_train_without_save(folder, capsys):
    train.main(["--init-from-hf-path", str(folder / "moe"), "--dataset", str(folder / "text.json"), "--train-iters",
                "1", "--num-workers", "0"])
    assert "done: nothing was saved, because --save is missing" in capsys.readouterr().out


def test_parser_unknown_flags(capsys):
    """Typing errors get a suggestion. Flags of MindSpeed-MM's scripts do not; the guide has them."""
    for typo, flag in (("--seqlength", "--seq-length"), ("--laod", "--load"), ("--wieght-decay=1", "--weight-decay"),
                       ("--micro_batch_size", "--micro-batch-size")):
        _, error = fails([*REQUIRED, typo], capsys)
        assert error.endswith(f"unrecognized arguments: {typo} (did you mean {flag}?)")
    for foreign in ("--use-distributed-optimizer", "--distributed-backend nccl", "--log-tps", "--lr-warmup-init 0",
                    "--context-parallel-algo ulysses_cp_algo", "--pipeline-model-parallel-size 1", "--use-flash-attn",
                    "--ckpt-format torch", "--expert-model-parallel-size 2", "--calculate-per-token-loss", "--fp16",
                    "--lr-decay-iters 5", "--train-samples 5", "--exit-interval 5", "--end-weight-decay 0"):
        status, error = fails([*REQUIRED, *foreign.split()], capsys)
        assert status == 2 and "did you mean" not in error
        assert error.count("the migration table in README.zh.md") == 1


def test_parser_damaged_flag_files(tmp_path, capsys):
    for content, message in ((b"--lr 1 'x", "No closing quotation"), (b"\xff\xfe", "decode"), (b"@self", "recursion")):
        (tmp_path / "flags").write_bytes(content.replace(b"@self", f"@{tmp_path / 'flags'}".encode()))
        status, error = fails([f"@{tmp_path / 'flags'}"], capsys)
        assert status == 2 and message in error


def test_parser_flag_file_and_last_flag_wins(tmp_path):
    (tmp_path / "flags").write_text("# a run\n--init-from-hf-path D\n--dataset a.json  # rows\n--lr 3\n--no-shuffle\n")
    args = train.parse_args([f"@{tmp_path / 'flags'}", "--train-iters", "1", "--lr", "5", "--shuffle"])
    assert args.dataset == "a.json" and args.lr == 5 and args.shuffle


def test_sigterm_saves_and_resume_is_exact(folder, tmp_path):
    """The command line as a user runs it: stopped, it saves, exits 0 and names the flag that resumes it."""
    argv = [folder / "moe", folder / "mixed.jsonl"]
    flags = ["--lr-decay-style", "constant", "--global-batch-size", 3, "--num-workers", 2, "--shuffle"]
    process = subprocess.Popen(
        [sys.executable, "train.py", *train_argv(*argv, tmp_path / "save", *flags, iters=100_000)], cwd=ROOT,
        stdout=subprocess.PIPE, text=True)
    metrics = tmp_path / "save" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and f"resume with --load {tmp_path / 'save'}" in out
    done = len(read_metrics(tmp_path / "save"))
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_text() == str(done)
    resume = ["--load", tmp_path / "save"]
    result = shell("train.py", *train_argv(*argv, tmp_path / "save", *flags, *resume, iters=done + 2))
    assert result.returncode == 0, result.stderr
    assert [m["iteration"] for m in read_metrics(tmp_path / "save")] == list(range(1, done + 3))
    result = shell("train.py", *train_argv(*argv, tmp_path / "uninterrupted", *flags, iters=done + 2))
    assert result.returncode == 0, result.stderr
    assert_same_weights(tmp_path / "save", tmp_path / "uninterrupted")


# ---- two ranks ------------------------------------------------------------------------------------------------------


def test_train_two_ranks_equal_one(folder, tmp_path):
    """FSDP2 over gloo has the same losses and norms to 1e-5: only the order of the sums differs."""
    flags = ["--global-batch-size", 4, "--num-workers", 1, "--router-aux-loss-coef", 0.01]
    argv = [folder / "moe", folder / "mixed.jsonl"]
    result = torchrun(2, *train_argv(*argv, tmp_path / "two", *flags, iters=4))
    assert result.returncode == 0, result.stderr[-2000:]
    train.main(train_argv(*argv, tmp_path / "one", *flags, iters=4))
    for one, two in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        for key in ("loss", "grad_norm", "aux_loss"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), (one["iteration"], key)
        assert two["tokens"] == one["tokens"] and two["supervised_tokens"] == one["supervised_tokens"]


HOST_COLLECTIVES = ("all_gather", "all_gather_object", "all_reduce", "broadcast", "barrier", "gather", "scatter")


def count_collectives(argv: list[str]) -> None:
    """Run train.py and write each step's collectives of host values, from one step's end to the next one's."""
    counts, steps = Counter(), []

    def counted(name: str):
        collective = getattr(dist, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return collective(*args, **kwargs)

        return call

    step = train.train_step

    def counted_step(*args, **kwargs):
        result = step(*args, **kwargs)
        steps.append(dict(counts))
        counts.clear()
        return result

    for name in HOST_COLLECTIVES:
        setattr(dist, name, counted(name))
    train.train_step = counted_step
    train.main(argv)
    save = Path(argv[argv.index("--save") + 1])
    (save / f"collectives{os.environ['RANK']}.json").write_text(json.dumps(steps))


def test_train_step_has_two_exchanges(folder, tmp_path):
    """Two all-gathers of host values per step, with accumulation and bad rows as well (FSDP2's are other functions)."""
    rows = [json.loads(line) for line in (folder / "mixed.jsonl").read_text().splitlines()]
    rows[1]["images"], rows[3]["images"] = ["missing.png"], ["cut.jpg"] * len(rows[3]["images"])
    (folder / "cut.jpg").write_bytes(jpeg()[:-1000])
    (folder / "two_bad.json").write_text(json.dumps(rows))
    argv = train_argv(folder / "moe", folder / "two_bad.json", tmp_path / "save", "--global-batch-size", 4,
                      "--on-bad-sample", "skip", iters=5)
    save = run_job(argv, 2, count_collectives)
    for rank in range(2):
        _, *steps = json.loads((save / f"collectives{rank}.json").read_text())  # the first includes the set-up
        assert steps == [{"all_gather": 2}] * 4


def test_train_bad_row_ends_every_rank(folder, tmp_path):
    """The rank at fault prints one line; no rank hangs or prints a traceback."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"id": f"r{i}", "messages": messages} for i in range(7)]
    rows.append({"id": "culprit", "messages": [{"role": "user", "content": "<image>"}]})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    start = time.monotonic()
    result = torchrun(2, *train_argv(folder / "dense", tmp_path / "rows.json", tmp_path / "save", iters=50))
    assert result.returncode != 0 and time.monotonic() - start < 60
    (error,) = error_lines(result.stderr)
    assert "rows.json" in error and "culprit" in error
    assert "train.py\", line" not in result.stderr


def test_load_of_another_optimizers_state_is_refused(folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "save", iters=1)
    monkeypatch.setattr(kernels_npu.Torch, "adamw", lambda self, groups, **_: torch.optim.SGD(groups, lr=1e-3))
    flags = ["--load", tmp_path / "save"]
    with pytest.raises(common.InputError, match="AdamW.*SGD.*--no-load-optim"):
        run(folder, tmp_path / "other", *flags, iters=2)
    run(folder, tmp_path / "other", *flags, "--no-load-optim", iters=2)
