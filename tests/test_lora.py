"""LoRA: adapters against PEFT on transformers, their checkpoints, conversions and refusals."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from helpers import assert_same_weights, read_metrics, run_job, train_argv, weights, without_timings, write_mixed_rows
from peft import LoraConfig, PeftModel, get_peft_model

import common
import convert
import infer
import kernels_npu
import parallel
import train
from model import build_model

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
    names = list(convert._peft_tensors(model))
    model.to_empty(device="cpu")
    convert.load_weights(model, source)

    samples = [tiny.row([5, ("image", 4, 6), 9]), tiny.row([17], 1), tiny.row([3, ("video", 2, 4, 4), 12], 2)]
    ours, theirs = ([p for p in m.parameters() if p.requires_grad] for m in (model, peft))
    assert sum(p.numel() for p in ours) == sum(p.numel() for p in theirs)
    optimizers = [torch.optim.AdamW(p, lr=1e-2, eps=1e-5) for p in (ours, theirs)]
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
        for name, stored, _, _ in names:
            grad, wanted = model.get_parameter(name).grad, expected_grads[stored]
            if wanted is None:  # no image
                assert grad is None
                continue
            nonzero += bool(wanted.any())
            assert (convert._to_peft(grad, name[-1]) - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7, name
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


@pytest.mark.parametrize(("model", "flags"), [("dense", LORA), ("moe", ALL)])
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
