"""LoRA: adapters against PEFT on transformers, their checkpoints, conversions and refusals."""
from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from helpers import assert_same_weights, read_metrics, run_job, train_argv, weights, without_timings, write_mixed_rows
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import common
import convert
import infer
import kernels_npu
import parallel
import train
from model import Qwen3VLConfig, build_model, component_of, step_flops
from tools.dry_run import fake_batch

DECODER = list(parallel.DEFAULT_TARGETS)
VISION = ["qkv", "proj", "linear_fc1", "linear_fc2"]
# name: (moe, target modules, whether the experts are adapted)
CASES = {
    "dense decoder": (False, DECODER, False), "dense vision": (False, VISION, False),
    "moe decoder": (True, DECODER[:4], False), "moe experts": (True, ["q_proj"], True),
    "moe all": (True, [*DECODER[:4], *VISION], True),
}


def peft_model(moe: bool, targets: list[str], experts: bool):
    """Return transformers' model with new PEFT adapters of rank 3 and alpha 5, and its configuration."""
    raw = tiny.config_dict(moe=moe)
    hf = tiny.hf_model(raw)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] * experts
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets, target_parameters=parameters,
                        exclude_modules=["patch_embed.proj"])
    torch.manual_seed(1)
    return get_peft_model(hf, config), raw


def hf_loss(logits, labels):
    return torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=-100)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++")
def test_adapter_compiled_by_inductor_keeps_its_scale():
    adapter = parallel.Adapter("weight", (2, 8), (12, 2), scale=3.0).to_empty(device="cpu")
    for p in adapter.parameters():
        torch.nn.init.normal_(p)
    out, x = torch.randn(5, 12), torch.randn(5, 8)
    torch.testing.assert_close(torch.compile(adapter)(out, x), out + 3 * (x @ adapter.A.T @ adapter.B.T))


@pytest.mark.parametrize("case", CASES)
def test_training_equals_peft(tmp_path, case):
    """Six AdamW steps from PEFT's own adapters: equal losses and gradients."""
    peft, raw = peft_model(*CASES[case])
    hf = peft.base_model.model
    tiny.hf_dir(tmp_path / "hf", raw, tiny.hf_model(raw))
    peft.save_pretrained(tmp_path / "peft")

    model = build_model(tiny.our_config(raw, tmp_path), is_frozen=lambda name: True)
    settings = convert.read_peft_settings(tmp_path / "peft")
    assert (settings["rank"], settings["alpha"]) == (3, 5)
    settings = parallel.add_adapters(model, settings | {"dropout": 0.0})
    trained = convert.open_peft(tmp_path / "peft", model)
    source = convert.AdaptedWeights(convert.HuggingFaceWeights(tmp_path / "hf"), trained, settings | {"base": None})
    source.check_compatible(model)
    names = convert.peft_names(model)
    model.to_empty(device="cpu")
    convert.load_weights(model, source)

    samples = [tiny.row([5, ("image", 4, 6), 9]), tiny.row([17], 1), tiny.row([3, ("video", 2, 4, 4), 12], 2)]
    ours, theirs = ([p for p in m.parameters() if p.requires_grad] for m in (model, peft))
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in theirs)
    optimizers = [torch.optim.AdamW(p, lr=1e-3, eps=1e-5) for p in (ours, theirs)]
    for step in range(6):
        batch = tiny.batch_from_hf(hf, samples[step % 3 : step % 3 + 1])
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected = hf_loss(peft(**tiny.hf_inputs(samples[step % 3])).logits[0], batch.labels)
        loss, _ = model(batch)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        if step % 3 == 1 and case == "dense vision":  # text alone does not reach the adapters
            assert not loss.requires_grad and not expected.requires_grad
            continue
        expected.backward()
        loss.backward()
        expected_grads = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters()}
        nonzero = 0
        for name, peft_name in names.items():
            grad, wanted = model.get_parameter(name).grad, expected_grads[peft_name]
            if wanted is None:  # no image
                assert grad is None
                continue
            nonzero += bool(wanted.any())
            assert (convert.to_peft(name, grad) - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7, name
        assert nonzero > len(names) // 4
        for optimizer in optimizers:
            optimizer.step()
    base = convert.HuggingFaceWeights(tmp_path / "hf").check_compatible(build_model(model.config))
    assert not [n for n in base.tensors if not torch.equal(convert._read_full(base, n), model.get_parameter(n))]


# ---- runs -----------------------------------------------------------------------------------------------------------

LORA = ["--lora-rank", 4]
ALL = [*LORA, "--lora-target-modules", "q_proj,o_proj,qkv,linear_fc1,experts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a directory with the models "dense" and "moe" and rows."""
    path = tmp_path_factory.mktemp("lora")
    for moe in (False, True):
        raw = tiny.config_dict(moe=moe)
        if moe:
            raw["text_config"]["num_experts"] = 8
        tiny.hf_dir(path / ("moe" if moe else "dense"), raw, tiny.hf_model(raw))
    write_mixed_rows(path)
    return path


def argv(folder: Path, model: str, save: Path, *flags, iters: int = 3) -> list[str]:
    return train_argv(folder / model, folder / "rows.json", save, "--global-batch-size", 2, "--lr", 1e-2,
                      "--lr-decay-style", "constant", *flags, iters=iters)


def logits(model, hf):
    """Return the logits of a sample of our model, and of transformers' model."""
    sample = tiny.row([5, ("image", 4, 6), 9])
    with torch.no_grad():
        theirs = hf(**tiny.hf_inputs(sample)).logits[0]
        if model is None:
            return None, theirs
        batch = tiny.batch_from_hf(hf, [sample])
        return model.lm_head(model.hidden_states(batch)[0]), theirs


def load_transformers(directory: Path, raw: dict):
    """Return transformers' model with the weights of a directory in the published layout."""
    source = convert.HuggingFaceWeights(directory)
    source.check_compatible(build_model(tiny.our_config(raw, directory)))
    hf = tiny.hf_model(raw)
    hf.load_state_dict({name: tiny.our_layout(name, convert._read_full(source, name)) for name in source.tensors})
    return hf


@pytest.mark.parametrize(("model", "flags"), [
    ("dense", [*LORA, "--lora-target-modules", "proj,down_proj", "--lora-dropout", 0.1]), ("moe", ALL),
    ("moe", [*LORA, "--lora-target-modules", "experts"]),
])
def test_conversions_equal_peft(folder, tmp_path, model, flags):
    """A run's adapters, merged and exported: equal logits, and base weights without adapters bit for bit."""
    raw = json.loads((folder / model / "config.json").read_text())
    save = run_job(argv(folder, model, tmp_path / "save", *flags, "--freeze-vision-encoder",
                        "--freeze-vision-projector"))
    checkpoint = convert.find_checkpoint(save)
    stored = weights(save)
    assert all(".lora." in name for name in stored) and all(value.any() for value in stored.values())
    convert.dcp_to_hf(save, tmp_path / "hf", folder / model, "float32")
    convert.main(["dcp_to_peft", "--load_dir", str(save), "--save_dir", str(tmp_path / "peft"),
                  "--model_assets_dir", str(folder / model)])
    base, merged = (convert.HuggingFaceWeights(d) for d in (folder / model, tmp_path / "hf"))
    same = {name for name in base.tensors
            if torch.equal(convert._read_full(base, name), convert._read_full(merged, name))}
    twin = build_model(tiny.our_config(raw, tmp_path))
    parallel.add_adapters(twin, convert.read_settings(checkpoint)["adapters"])
    assert base.tensors.keys() - same == {a.weight_name for a in parallel.named_adapters(twin).values()}

    kernels_npu.select("cpu")
    hf = load_transformers(tmp_path / "hf", raw)
    ours, expected = logits(infer.load_model(folder / model, save), hf)
    _, unmerged = logits(None, PeftModel.from_pretrained(tiny.hf_model(raw), tmp_path / "peft"))
    _, untrained = logits(None, tiny.hf_model(raw))
    largest = expected.abs().max()
    assert (expected - untrained).abs().max() > 1e-2 * largest
    assert (ours - expected).abs().max() <= 1e-5 * largest
    assert (unmerged - expected).abs().max() <= 1e-5 * largest


def test_base_in_the_layout_of_transformers_5(folder, tmp_path):
    """A base with transposed experts gives the same run and the same merged weights."""
    base = convert.HuggingFaceWeights(folder / "moe")
    shutil.copytree(folder / "moe", tmp_path / "transposed")
    save_file({name: value.transpose(1, 2).contiguous() if name.endswith(convert.EXPERTS) else value
               for name in base.tensors for value in [convert._read_full(base, name)]},
              tmp_path / "transposed" / "model.safetensors")
    merged = []
    for i, hf_dir in enumerate((folder / "moe", tmp_path / "transposed")):
        flags = argv(folder, "moe", tmp_path / f"save{i}", *ALL, *FROZEN, "--init-from-hf-path", hf_dir, iters=1)
        convert.dcp_to_hf(run_job(flags), tmp_path / f"hf{i}", hf_dir, "float32")
        merged.append(convert.HuggingFaceWeights(tmp_path / f"hf{i}"))
    assert merged[0].tensors == merged[1].tensors
    assert not [n for n in base.tensors if not torch.equal(*(convert._read_full(s, n) for s in merged))]


# ---- checkpoints ----------------------------------------------------------------------------------------------------

FROZEN = ["--freeze-vision-encoder", "--freeze-vision-projector"]


@pytest.mark.parametrize(("model", "ranks", "flags"), [
    ("dense", 1, [*LORA, "--lora-dropout", 0.3, "--recompute", "full", *FROZEN]),
    ("moe", 2, [*ALL, "--expert-parallel-size", 2, "--bf16"]),
])
def test_resume_is_exact(folder, tmp_path, model, ranks, flags):
    """Two steps and two more equal four steps, bit for bit. Checkpoints hold what is trained, and nothing else."""
    full = run_job(argv(folder, model, tmp_path / "full", *flags, iters=4), ranks)
    part = run_job(argv(folder, model, tmp_path / "part", *flags, iters=2), ranks)
    run_job(argv(folder, model, part, *flags, "--load", part, iters=4), ranks)
    assert_same_weights(full, part)
    assert without_timings(full) == without_timings(part)
    names = {name for name in weights(full) if not name.startswith("optimizer.")}
    assert all(".lora." in name for name in names)
    size = sum(f.stat().st_size for f in convert.find_checkpoint(full).iterdir())
    assert size < (folder / model / "model.safetensors").stat().st_size


def test_dropout(folder, tmp_path):
    """Recompute draws the same masks, and evaluation none."""
    flags = [*LORA, *FROZEN, "--eval-dataset", folder / "rows.json", "--lr", 0]
    runs = [run_job(argv(folder, "dense", tmp_path / str(i), *flags, *more, iters=1))
            for i, more in enumerate(([], ["--lora-dropout", 0.5], ["--lora-dropout", 0.5, "--recompute", "full"]))]
    none, dropped, recomputed = (read_metrics(run)[0] for run in runs)
    assert dropped["grad_norm"] == recomputed["grad_norm"] != none["grad_norm"]
    assert none["eval_loss"] == dropped["eval_loss"]


def test_lora_init_and_projector(folder, tmp_path):
    """Adapters come back from a PEFT directory bit for bit; with a trained projector they cannot be exported."""
    first = run_job(argv(folder, "moe", tmp_path / "first", *ALL, iters=2))
    convert.dcp_to_peft(first, tmp_path / "peft", folder / "moe")
    second = run_job(argv(folder, "moe", tmp_path / "second", "--lora-init", tmp_path / "peft", "--lr", 0, iters=1), 2)
    expected = {name: value for name, value in weights(first).items() if not name.startswith("optimizer.")}
    found = weights(second)
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]
    with_projector = run_job(argv(folder, "moe", tmp_path / "third", *LORA, "--freeze-vision-encoder", iters=1))
    assert {component_of(name) for name in weights(with_projector) if ".lora." not in name
            and not name.startswith("optimizer.")} == {"vision projector"}
    with pytest.raises(common.InputError, match="holds more than adapters .*convert it with dcp_to_hf"):
        convert.dcp_to_peft(with_projector, tmp_path / "peft3", folder / "moe")
    convert.dcp_to_hf(with_projector, tmp_path / "hf3", folder / "moe", "float32")
    merged, stored = convert.HuggingFaceWeights(tmp_path / "hf3"), weights(with_projector)
    name = "model.visual.merger.linear_fc1.weight"
    assert torch.equal(convert._read_full(merged, name), stored[name])


@pytest.mark.parametrize(("model", "config"), [
    ("dense", {"target_modules": r".*visual\.blocks.*\.linear_fc1"}),  # without those of the mergers
    ("dense", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    ("moe", {"target_modules": [], "target_parameters": [f"layers.1.mlp.experts.{w}" for w in ("gate_up_proj",
                                                                                              "down_proj")]}),
])
def test_lora_init_with_adapters_in_some_layers(folder, tmp_path, model, config):
    """Targets that no list of last names describes: PEFT loads again what came back, with equal logits."""
    raw = json.loads((folder / model / "config.json").read_text())
    peft = get_peft_model(tiny.hf_model(raw), LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, **config))
    peft.save_pretrained(tmp_path / "peft")
    save = run_job(argv(folder, model, tmp_path / "save", "--lora-init", tmp_path / "peft", *FROZEN,
                        "--freeze-text-decoder", "--lr", 0, iters=1))
    convert.dcp_to_peft(save, tmp_path / "copy", folder / model)
    first, second = (convert.HuggingFaceWeights(tmp_path / d, convert.PEFT_WEIGHTS) for d in ("peft", "copy"))
    assert first.tensors == second.tensors
    assert not [n for n in first.tensors if not torch.equal(*(convert._read_full(s, n) for s in (first, second)))]
    _, expected = logits(None, peft)
    _, found = logits(None, PeftModel.from_pretrained(tiny.hf_model(raw), tmp_path / "copy"))
    assert torch.equal(found, expected)


def test_full_checkpoint_as_base(folder, tmp_path, capsys):
    """Adapters on a full checkpoint: its weights are the base of the run, its resume, its merge and its answers."""
    full = run_job(argv(folder, "dense", tmp_path / "full", iters=2))
    flags = [*LORA, *FROZEN]
    for load in (full, full / "iter_0000002"):
        assert common.run_program(train.main, argv(folder, "dense", full, *flags, "--load", load)) == 2
        assert "starts a new run on the weights of --load: give another --save" in capsys.readouterr().err
    adapted = run_job(argv(folder, "dense", tmp_path / "lora", *flags, "--load", full, iters=2))
    assert [m["iteration"] for m in read_metrics(adapted)] == [1, 2]
    run_job(argv(folder, "dense", adapted, *flags, "--load", adapted, iters=3))
    convert.dcp_to_hf(adapted, tmp_path / "hf", folder / "dense", "float32")
    merged, base = convert.HuggingFaceWeights(tmp_path / "hf"), weights(full)
    for name in merged.tensors:
        has_adapter = "language_model.layers" in name and "norm" not in name
        assert torch.equal(convert._read_full(merged, name), base[name]) != has_adapter, name
    (full / "iter_0000002").rename(tmp_path / "moved")
    with pytest.raises(common.InputError, match="belong to the weights of the checkpoint .*iter_0000002, which is"):
        convert.open_checkpoint(adapted, folder / "dense")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    """Return a run with adapters of rank 4 and a frozen vision tower."""
    return run_job(argv(folder, "dense", tmp_path_factory.mktemp("run") / "save", *LORA, *FROZEN, iters=1))


@pytest.mark.parametrize(("flags", "message"), [
    ([], "has other adapters .*give --lora-rank 4 --lora-alpha 8 --lora-dropout 0 --lora-target-modules "
     "down_proj,.*, not --lora-rank 0"),
    (["--lora-rank", 8, "--lora-alpha", 8], "give --lora-rank 4, not --lora-rank 8"),
    ([*LORA, "--lora-alpha", 5], "give --lora-alpha 8, not --lora-alpha 5"),
    ([*LORA, "--lora-target-modules", "q_proj"], "give --lora-target-modules down_proj,.*,v_proj, not --lora-target"),
    ([*LORA, "--lora-dropout", 0.1], "give --lora-dropout 0, not --lora-dropout 0.1"),
    (LORA, "only one of its run and this one trains the vision encoder: give the same --freeze"),
])
def test_load_with_other_settings_is_refused(folder, tmp_path, run, capsys, flags, message):
    freeze = [] if flags is LORA else FROZEN
    assert common.run_program(train.main, argv(folder, "dense", tmp_path / "save", *flags, *freeze, "--load", run)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line


@pytest.mark.parametrize(("flags", "message"), [
    (["--lora-alpha", 3], "describe adapters: give --lora-rank too"),
    ([*LORA, "--init", "random"], "adapters need trained weights"),
    ([*LORA, "--lora-target-modules", "q_proj,nothing"],
     "the model has no nothing: give some of down_proj, gate_proj, k_proj, linear_fc1, linear_fc2, o_proj, proj, "
     "q_proj, qkv, up_proj, v_proj"),
    (["--lora-init", "DIR", "--lora-rank", 3], "--lora-rank 3: --lora-init has 4"),
])
def test_wrong_flags(folder, tmp_path, run, capsys, flags, message):
    if "DIR" in flags:
        convert.dcp_to_peft(run, tmp_path / "peft", folder / "dense")
        flags = [tmp_path / "peft" if flag == "DIR" else flag for flag in flags]
    assert common.run_program(train.main, argv(folder, "dense", tmp_path / "save", *flags)) == 2
    assert message in capsys.readouterr().err


def test_experts_with_dropout_are_refused(folder, tmp_path, capsys):
    assert common.run_program(train.main, argv(folder, "moe", tmp_path / "save", *ALL, "--lora-dropout", 0.1)) == 2
    assert "--lora-dropout: the inputs of experts cannot be dropped" in capsys.readouterr().err


@pytest.mark.parametrize("change", [
    {"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 2}}, {"r": None}, {"init_lora_weights": "pissa"},
])
def test_lora_init_other_kinds_are_refused(folder, tmp_path, run, change):
    convert.dcp_to_peft(run, tmp_path / "peft", folder / "dense")
    path = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    with pytest.raises(common.InputError, match="adapter_config.json: is not that of plain LoRA"):
        convert.read_peft_settings(tmp_path / "peft")


# ---- memory and FLOPs -----------------------------------------------------------------------------------------------


def test_parallelize_keeps_frozen_weights_in_the_compute_type(folder):
    """Adapters and a trained projector are float32; everything else is bf16, on 1 rank and with its group of FSDP2."""
    state = parallel.ParallelState(kernels_npu.select("cpu"), 1)
    args = train.parse_args(argv(folder, "moe", folder / "none", *LORA, "--freeze-vision-encoder"))
    model, _ = train.build_trainable_model(args, Qwen3VLConfig.from_json(folder / "moe"))
    train.configure_model(model, state, **train.model_settings(args) | {"compute_dtype": torch.bfloat16})
    for name, p in model.named_parameters():
        is_trained = ".lora." in name or component_of(name) == "vision projector"
        assert p.requires_grad == is_trained and p.dtype == (torch.float32 if is_trained else torch.bfloat16), name


@pytest.mark.parametrize("targets", ["q_proj,v_proj,experts,linear_fc1", "qkv,linear_fc2"])
def test_step_flops_equal_the_count_of_pytorch(folder, monkeypatch, targets):
    """Allow 3 %, as test_step_flops_equals_the_count_of_pytorch of test_model.py explains."""
    monkeypatch.setattr(kernels_npu.Torch, "grouped_matmul", kernels_npu.Torch.grouped_matmul_loop)
    args = train.parse_args(argv(folder, "moe", folder / "none", "--lora-rank", 8, "--lora-target-modules", targets,
                                 *FROZEN, "--freeze-text-decoder"))
    model, _ = train.build_trainable_model(args, Qwen3VLConfig.from_json(folder / "moe"))
    model.to_empty(device="cpu")
    model.init_weights(0)
    model.set_attention("eager", "eager")
    samples = [tiny.row([5, ("image", 6, 8), 90]), tiny.row([17], 1)]
    batch = tiny.batch_of(samples, [torch.arange(len(s.input_ids)).expand(3, -1) for s in samples])
    with FlopCounterMode(display=False) as counter:
        model(batch)[0].backward()
    t = model.config.text
    half = t.num_hidden_layers * t.num_attention_heads * t.head_dim * sum(len(s.input_ids) ** 2 for s in samples)
    found = step_flops(model.config, batch.cu_seqlens, batch.grid_thw, len(batch.supervised_index), set(),
                       parallel.adapter_flops(model))
    assert found == pytest.approx(counter.get_total_flops() - 2 * 3 * half, rel=0.03)
    assert train.flops_counter(model)(batch) == found


def test_dry_run(folder, capsys):
    """Adapters take a float32 parameter, gradient and two moments; frozen weights take bf16."""
    flags = ["--dry-run", "--world-size", 2, "--init-from-hf-path", folder / "moe", *ALL, "--seq-length", 64]
    assert common.run_program(train.main, list(map(str, flags))) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    args = train.parse_args(list(map(str, flags)))
    model, _ = train.build_trainable_model(args, Qwen3VLConfig.from_json(folder / "moe"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    assert report["parameter_bytes"] == pytest.approx(2 * frozen / 2 + 4 * trained / 2, rel=0.05)
    assert report["optimizer_bytes"] == pytest.approx(8 * trained / 2, rel=0.05)
    batch = fake_batch(model.config, 64, 1)  # each of two ranks has one
    assert report["flops_per_step"] == pytest.approx(2 * train.flops_counter(model)(batch))
