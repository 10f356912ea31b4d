"""Compare infer.py with transformers' generate token by token, and test the command line."""
from __future__ import annotations

import copy
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from reference import THINKING
from safetensors.torch import load_file, save_file

import convert
import data
import infer
import kernels_npu
from common import InputError, run_program

ROWS = {
    "image": [5, ("image", 4, 6), 9],
    "images": [3, ("image", 2, 2), 4, ("image", 6, 4), 1, ("image", 2, 8), 6],
    "text": [17],
    "video": [4, ("video", 3, 4, 4), 8],
}
NEVER = [-1]  # no token ends the answer


@pytest.fixture(scope="module", params=["dense", "moe"])
def pair(request, tmp_path_factory):
    raw = tiny.config_dict(moe=request.param == "moe", layers=3)
    hf = tiny.hf_model(raw).eval()
    return hf, tiny.ours_from_hf(hf, raw, tmp_path_factory.mktemp("config"))


def hf_answer(hf, inputs: dict, count: int) -> list[int]:
    out = hf.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, inputs["input_ids"].shape[1]:].tolist()


def make_batch(hf, kinds):
    samples = [tiny.row(ROWS[kind], seed=seed) for seed, kind in enumerate(kinds)]
    return samples, tiny.batch_from_hf(hf, samples)


# ---- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROWS)
def test_generate_greedily_equals_transformers(pair, kind):
    hf, ours = pair
    [sample], batch = make_batch(hf, [kind])
    expected = hf_answer(hf, tiny.hf_inputs(sample), 24)
    assert infer.Generator(ours, NEVER).generate(batch, max_new_tokens=24) == [expected]


def test_generate_in_a_batch_equals_each_alone(pair):
    hf, ours = pair
    samples, batch = make_batch(hf, ROWS)
    expected = [hf_answer(hf, tiny.hf_inputs(s), 24) for s in samples]
    assert infer.Generator(ours, NEVER).generate(batch, max_new_tokens=24) == expected

    ends = {expected[0][6], expected[2][11]}  # sequences end at different times and leave the batch
    cut = [ids[: next((i for i, t in enumerate(ids) if t in ends), 24)] for ids in expected]
    assert len({len(ids) for ids in cut}) > 2
    assert infer.Generator(ours, ends).generate(batch, max_new_tokens=24) == cut


def test_generate_has_the_logits_of_an_uncached_forward(pair):
    """Use 300 tokens, so that the cache grows, and a batch that shrinks."""
    hf, ours = pair
    samples, batch = make_batch(hf, ["images", "text", "video"])
    alone = infer.Generator(ours, NEVER).generate(batch, max_new_tokens=300)
    ends = {max(alone[0][:20], key=alone[0].index)}  # the token that appears last
    logits = []
    handle = ours.lm_head.register_forward_hook(lambda module, args, out: logits.append(out.clone()))
    answers = infer.Generator(ours, ends).generate(batch, max_new_tokens=300)
    handle.remove()
    lengths = [len(a) for a in answers]
    assert 0 < lengths[0] < 20 and max(lengths) == 300

    longest_first = sorted(range(3), key=lambda b: -len(samples[b].input_ids))
    for b, (sample, answer) in enumerate(zip(samples, answers, strict=True)):
        before = [lengths[other] for other in longest_first[: longest_first.index(b)]]
        cached = torch.stack([step[sum(n >= i for n in before)]  # its row among the alive sequences
                              for i, step in enumerate(logits) if i < len(answer)])
        full = tiny.batch_from_hf(hf, [sample])
        full.input_ids = torch.cat((full.input_ids, torch.tensor(answer)))
        following = full.position_ids.max() + 1 + torch.arange(len(answer))
        full.position_ids = torch.cat((full.position_ids, following.expand(3, -1)), dim=1)
        full.cu_seqlens = [0, len(full.input_ids)]
        with torch.no_grad():
            uncached = ours.lm_head(ours.hidden_states(full)[0])[-len(answer) - 1 : -1]
        assert (cached - uncached).abs().max() <= 2e-5 * uncached.abs().max()


def test_generate_groups_sequences_of_similar_length(pair, monkeypatch):
    """Two long prompts among short ones share no attention call with them, and no answer changes."""
    hf, ours = pair
    samples = [tiny.row(parts, seed) for seed, parts in enumerate(([17], [700], [30, ("image", 4, 6)], [690]))]
    calls, attend = [], torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **options):
        calls.append((len(q), k.shape[2], attn_mask is not None))
        return attend(q, k, v, attn_mask=attn_mask, **options)

    batch, generator = tiny.batch_from_hf(hf, samples), infer.Generator(ours, NEVER)
    with monkeypatch.context() as m:
        m.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
        answers = generator.generate(batch, max_new_tokens=4)
    assert answers == [hf_answer(hf, tiny.hf_inputs(s), 4) for s in samples]
    short = len(samples[2].input_ids)
    assert calls[-2:] == [(2, 703, True), (2, short + 3, True)]


def test_generate_restores_the_attention_seam(pair):
    _, ours = pair
    layers = ours.model.language_model.layers
    before = [layer.self_attn.attention for layer in layers]
    _, batch = make_batch(pair[0], ["text"])
    infer.Generator(ours, NEVER).generate(batch, max_new_tokens=2)
    assert [layer.self_attn.attention for layer in layers] == before
    with pytest.raises(ZeroDivisionError):
        infer.Generator(ours, NEVER).generate(batch, on_token=lambda sequence, token: 1 / 0)
    assert [layer.self_attn.attention for layer in layers] == before


# ---- sampling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 20, 0.8), (1.9, 5, 1.0), (0.6, 0, 0.35),
                                                       (1.0, 1000, 0.01), (3.0, 0, 0.95)])
def test_sample_equals_transformers_warpers(temperature, top_k, top_p):
    """With evenly spaced uniform numbers, each token is drawn as often as its probability, to one draw."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * torch.randn(1, 60, generator=torch.Generator().manual_seed(0))
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    draws = 20_000
    uniform = 1 - torch.arange(draws) / draws
    ids = infer.sample(logits.expand(draws, -1), uniform, temperature, top_k, top_p)
    drawn = ids.bincount(minlength=60) / draws
    assert (drawn - expected.softmax(-1)[0]).abs().max() <= 2 / draws
    assert set(ids.tolist()) <= set(expected[0].isfinite().nonzero()[:, 0].tolist())


def test_generate_draws_depend_only_on_seed_and_row(pair):
    hf, ours = pair
    generator, options = infer.Generator(ours, NEVER), dict(max_new_tokens=10, temperature=1.0, top_p=0.9)
    samples, batch = make_batch(hf, ["text", "image", "text"])
    batched = generator.generate(batch, **options, seed=3, first_row=5)
    for i, sample in enumerate(samples):
        one = tiny.batch_from_hf(hf, [sample])
        assert generator.generate(one, **options, seed=3, first_row=5 + i) == [batched[i]]
    assert generator.generate(batch, **options, seed=4, first_row=5) != batched


def penalised_answer(hf, inputs: dict, count: int, repetition: float, presence: float) -> list[int]:
    """Generate greedily: an uncached forward of transformers' model for each token, its own repetition processor."""
    from transformers import RepetitionPenaltyLogitsProcessor

    prompt = inputs["input_ids"].shape[1]
    processor = RepetitionPenaltyLogitsProcessor(repetition)
    for _ in range(count):
        ids = inputs["input_ids"]
        with torch.no_grad():
            scores = processor(ids, hf(**inputs).logits[:, -1].float())
        for token in set(ids[0, prompt:].tolist()):
            scores[0, token] -= presence
        inputs["input_ids"] = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 1))
    return inputs["input_ids"][0, prompt:].tolist()


@pytest.mark.parametrize("repetition, presence", [(1.3, 0.0), (0.8, 0.0), (1.0, 1.5), (1.2, -0.7)])
def test_generate_with_penalties_in_a_batch_equals_transformers(pair, repetition, presence):
    hf, ours = pair
    samples, batch = make_batch(hf, ["image", "text", "video"])
    expected = [penalised_answer(hf, tiny.hf_inputs(s), 12, repetition, presence) for s in samples]
    options = {"max_new_tokens": 12, "repetition_penalty": repetition, "presence_penalty": presence}
    assert infer.Generator(ours, NEVER).generate(batch, **options) == expected
    assert expected != infer.Generator(ours, NEVER).generate(batch, max_new_tokens=12)
    if presence == 0:
        inputs = tiny.hf_inputs(samples[0])
        out = hf.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0,
                          repetition_penalty=repetition)
        assert out[0, inputs["input_ids"].shape[1]:].tolist() == expected[0]

    end = expected[1][3]  # the text's answer ends before the others, which keep their penalties
    cut = [ids[: ids.index(end)] if end in ids else ids for ids in expected]
    assert len({len(ids) for ids in cut}) > 1
    assert infer.Generator(ours, {end}).generate(batch, **options) == cut


def test_penalise_by_formula():
    """Token 0 is in the prompt, 1 and 2 in the answer, 3 in neither; bfloat16 logits are penalised in float32."""
    logits = torch.tensor([[3.0, -2.0, 1.0, 5.0]], dtype=torch.bfloat16)
    used = torch.tensor([[infer.PROMPT, infer.ANSWER, infer.ANSWER, 0]], dtype=torch.int8)
    expected = torch.tensor([[3 / 1.1, -2 * 1.1 - 0.3, 1 / 1.1 - 0.3, 5.0]])
    torch.testing.assert_close(infer.penalise(logits, used, 1.1, 0.3), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("file, flags, expected", [
    ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05,
      "presence_penalty": 1.5}, [], (0.7, 20, 0.8, 1.05, 1.5)),
    ({"do_sample": True, "temperature": 0.7, "top_k": 20}, ["--temperature", 0, "--top-k", 0], (0, 0, 1, 1, 0)),
    ({"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.2}, [], (0, 50, 1, 1.2, 0)),
    ({"temperature": 0.7}, ["--presence-penalty", 1], (0, 50, 1, 1, 1)),  # as transformers, which samples if asked to
    ({"do_sample": True, "top_p": None}, [], (1, 50, 1, 1, 0)),  # transformers' defaults
])
def test_sampling_settings_of_generation_config(tmp_path, file, flags, expected):
    from transformers import GenerationConfig

    (tmp_path / "generation_config.json").write_text(json.dumps(file))
    argv = [*map(str, ["--model", tmp_path, "--prompt", "x", *flags])]
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "presence_penalty")
    settings = infer.sampling_settings(infer.parse_args([*argv, "--use-generation-config"]))
    assert settings == dict(zip(names, expected, strict=True))
    theirs = GenerationConfig.from_pretrained(tmp_path).to_diff_dict()
    theirs = GenerationConfig._get_default_generation_params() | theirs
    if not flags and theirs["do_sample"]:
        for name in names[:4]:
            assert settings[name] == theirs[name]
    unused = infer.sampling_settings(infer.parse_args(argv))
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert unused == {name: given.get(f"--{name.replace('_', '-')}", infer.SAMPLING[name][1]) for name in names}


def test_sampling_settings_refuses_a_damaged_file(world, run, tmp_path):
    assets = tiny.hf_dir(tmp_path, json.loads((world.model / "config.json").read_text()))
    argv = ["--model", assets, "--prompt", "x", "--use-generation-config"]
    assert run(*argv)[2] == f"error: {assets}/generation_config.json: cannot be read (No such file or directory)\n"
    for value, message in ((-1, "top_k: '-1' is not an integer at least 0"), ("a", "top_k: 'a' is not an integer")):
        (assets / "generation_config.json").write_text(json.dumps({"top_k": value}))
        status, out, err = run(*argv)
        assert (status, out) == (1, "") and f"generation_config.json: {message}" in err and err.count("\n") == 1
    for name, neutral, value in (("min_p", None, 0.05), ("num_beams", 1, 4), ("no_repeat_ngram_size", 0, 3)):
        (assets / "generation_config.json").write_text(json.dumps({name: value}))
        assert f"generation_config.json: {name} is not supported: remove it" in run(*argv)[2]
        (assets / "generation_config.json").write_text(json.dumps({name: neutral}))
        assert "is not supported" not in run(*argv)[2]


# ---- the program ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a Hugging Face directory, its model in transformers, images, and rows of both formats."""
    folder = tmp_path_factory.mktemp("world")
    raw = tiny.config_dict(moe=True, layers=3)
    hf = tiny.hf_model(raw, seed=1).eval()
    model = tiny.hf_dir(folder / "model", raw, hf)
    for i, (name, size) in enumerate({"a.png": (64, 40), "b.png": (33, 90)}.items()):
        Image.effect_noise(size, 80 + i).convert("RGB").save(folder / name)
    rows = [
        {"id": "é1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                         {"from": "gpt", "value": "left out"}]},
        {"messages": [{"role": "user", "content": "Only text"}], "prediction": "old", "score": 0.1},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "<image> and <image>?"}],
         "images": ["b.png", "a.png"]},
        {"messages": [{"role": "user", "content": "Last"}], "note": "\ud800 日本"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(folder=folder, model=model, hf=hf, rows=rows, processor=data.Processor(model))


def expected_text(world, row: dict, count: int) -> str:
    """Return transformers' answer to a row."""
    sample = world.processor.encode(row, media_dir=world.folder, options=data.EncodeOptions(for_generation=True))
    sample = SimpleNamespace(input_ids=sample.input_ids, pixel_values=sample.pixel_values, grid_thw=sample.grid_thw,
                             kinds=["image"] * len(sample.grid_thw))
    ids = hf_answer(world.hf, tiny.hf_inputs(sample), count)
    end = world.processor.im_end_token_id
    return world.processor.decode(ids[: ids.index(end)] if end in ids else ids)


@pytest.fixture
def run(world, capfd, monkeypatch):
    """Return a function that runs the program in this process: (status, standard output, standard error)."""

    def run(*argv, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.chdir(world.folder)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capfd.readouterr()
        argv = ["--model", str(world.model), *map(str, argv)]
        status = run_program(infer.main, argv)
        return status, *capfd.readouterr()

    return run


def predictions(path: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in path.read_bytes().splitlines()]


def test_prompt_equals_transformers(world, run):
    for argv, row in (
        (["--prompt", "What is this? é", "--image", "a.png"],
         {"messages": [{"role": "user", "content": "What is this? é"}], "images": ["a.png"]}),
        (["--image", "a.png", "--image", "b.png", "--prompt", "One <image> two <image>", "--system", "Brief."],
         {"messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "One <image> two <image>"}],
          "images": ["a.png", "b.png"]}),
        (["--prompt", "no image", "--text-attn-implementation", "eager", "--dtype", "float32"],
         {"messages": [{"role": "user", "content": "no image"}]}),
    ):
        status, out, err = run(*argv, "--max-new-tokens", 12)
        assert (status, out, err) == (0, expected_text(world, row, 12) + "\n", "")


def test_load_with_a_checkpoint_equals_its_hugging_face_directory(world, run, tmp_path):
    convert.hf_to_dcp(world.model, tmp_path / "dcp")
    assets = tiny.hf_dir(tmp_path / "assets", json.loads((world.model / "config.json").read_text()))
    argv = ["--image", "a.png", "--prompt", "What?", "--max-new-tokens", 8]
    for load in (tmp_path / "dcp", tmp_path / "dcp" / "release"):
        assert run("--model", assets, "--load", load, *argv)[:2] == run(*argv)[:2]
    status, _, err = run("--model", assets, *argv)
    assert status == 1 and "no weights" in err


def test_load_uses_the_limits_of_the_training_run(world, run, tmp_path):
    model = infer.load_model(world.model)
    convert.CheckpointWriter().save(tmp_path, 1, model, settings={"media_limits": {"image_max_pixels": 1024}})
    argv = ["--image", "a.png", "--prompt", "What?", "--max-new-tokens", 8, "--verbose"]

    def prompt_tokens(*flags) -> int:
        status, _, err = run(*argv, *flags)
        assert status == 0 and (f"as in the training run of {tmp_path}: --image-max-pixels 1024\n" in err) == (
            flags == ("--load", tmp_path))
        return int(re.search(r"prompt tokens: (\d+)", err)[1])

    default, limited = prompt_tokens(), prompt_tokens("--image-max-pixels", 1024)
    assert default == limited + 1  # 32 x 64 pixels are two tokens
    assert prompt_tokens("--load", tmp_path) == limited
    assert prompt_tokens("--load", tmp_path, "--image-max-pixels", 96 * 96) == default


def test_load_model_refuses_another_output_matrix_than_the_tied_embedding(world, run, tmp_path):
    raw = tiny.config_dict(tied=True, layers=3)
    model = tiny.hf_dir(tmp_path, raw, tiny.hf_model(raw))
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"] + 1
    save_file(tensors, model / "model.safetensors")
    status, out, err = run("--model", model, "--prompt", "x")
    assert (status, out) == (1, "") and err.count("\n") == 1
    assert "model.safetensors: lm_head.weight differs from model.language_model.embed_tokens.weight" in err


def test_load_model_keeps_tied_embeddings(tmp_path):
    raw = tiny.config_dict(tied=True, layers=3)
    model = infer.load_model(tiny.hf_dir(tmp_path, raw, tiny.hf_model(raw)), dtype="bfloat16")
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_load_model_in_float32_selects_an_attention_that_has_it(tmp_path, monkeypatch):
    """On CUDA the default, flash_attention_2, has no float32, which config.json may ask for."""
    device = kernels_npu.Cuda(torch.device("cpu"))
    monkeypatch.setattr(kernels_npu, "ops", device)
    assert device.default_attention == "flash_attention_2"
    raw = tiny.config_dict(layers=3)
    infer.load_model(tiny.hf_dir(tmp_path, raw | {"dtype": "float32"}, tiny.hf_model(raw)))
    assert device.default_attention == "sdpa"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answer_rows_in_batches(world, run, tmp_path, batch_size):
    output = tmp_path / "answers.jsonl"
    argv = ["--input", "rows.jsonl", "--output", output, "--batch-size", batch_size, "--max-new-tokens", 9]
    status, out, err = run(*argv)
    assert (status, out) == (0, "") and "4/4" in err
    written = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert written == [row | {"prediction": expected_text(world, row, 9)} for row in world.rows]


def test_answer_rows_with_sampling_does_not_depend_on_batches_or_resuming(world, run, tmp_path):
    argv = ["--input", "rows.jsonl", "--max-new-tokens", 6, "--temperature", 1.2, "--top-k", 50, "--seed", 7]
    argv.append("--output")
    assert run(*argv, tmp_path / "one")[0] == run(*argv, tmp_path / "all", "--batch-size", 4)[0] == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "all").read_bytes()
    assert run(*argv, tmp_path / "other", "--seed", 8)[0] == 0
    assert predictions(tmp_path / "other") != predictions(tmp_path / "one")

    complete = (tmp_path / "one").read_bytes()
    lines = complete.splitlines(keepends=True)
    for kept in (b"", lines[0], lines[0] + lines[1][:20], b"".join(lines[:3]) + lines[3][:-1]):
        (tmp_path / "cut").write_bytes(kept)
        status, _, err = run(*argv, tmp_path / "cut", "--batch-size", 2)
        assert status == 0 and (tmp_path / "cut").read_bytes() == complete
    status, out, err = run(*argv, tmp_path / "cut")
    assert (status, out) == (0, "") and err == f"{tmp_path / 'cut'} already has the answers to all 4 rows\n"


@pytest.mark.parametrize("content", [b'{"id": "other"', b'{"id": "other"}\n', b"precious, no newline", b"[1]\n", b"\n"])
def test_resume_refuses_another_file(world, run, tmp_path, content):
    (tmp_path / "out").write_bytes(content)
    status, out, err = run("--input", "rows.jsonl", "--output", tmp_path / "out")
    assert (status, out) == (1, "")
    assert err.startswith(f"error: {tmp_path / 'out'} line 1 is not the answer to rows.jsonl row 1: ")
    assert err.count("\n") == 1 and (tmp_path / "out").read_bytes() == content


def test_resume_refuses_more_answers_than_rows(world, run, tmp_path):
    argv = ["--input", "rows.jsonl", "--output", tmp_path / "out", "--max-new-tokens", 1]
    assert run(*argv)[0] == 0
    with open(tmp_path / "out", "ab") as file:
        file.write(b"{}\n")
    status, _, err = run(*argv)
    assert status == 1 and "line 5 is not the answer" in err


def test_resume_refuses_rows_that_have_changed(world, run, tmp_path):
    rows = [{"id": i, "messages": [{"role": "user", "content": "x"}]} for i in range(3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows[:2]))
    argv = ["--input", tmp_path / "rows.json", "--output", tmp_path / "out", "--max-new-tokens", 1]
    assert run(*argv)[0] == 0
    rows[0]["id"] = "another"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    status, _, err = run(*argv)
    assert status == 1 and "line 1 is not the answer" in err


def test_answer_rows_with_a_bad_row_keeps_the_answers_before_it(world, run, tmp_path):
    bad = {"id": 9, "messages": [{"role": "user", "content": "x"}], "image": "gone.png"}
    rows = [*world.rows[:2], bad, world.rows[3]]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    argv = ["--input", tmp_path / "rows.json", "--dataset-dir", world.folder, "--output", tmp_path / "out",
            "--batch-size", 4, "--max-new-tokens", 5]
    for _ in range(2):
        status, out, err = run(*argv)
        last = err.splitlines()[-1]
        assert (status, out) == (1, "") and last.startswith(f"error: {tmp_path / 'rows.json'} row 3 (id 9): image: ")
        assert "gone.png does not exist" in last and "Traceback" not in err
        assert predictions(tmp_path / "out") == [expected_text(world, row, 5) for row in rows[:2]]
    bad["image"] = "a.png"  # once corrected, the run resumes
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert run(*argv)[0] == 0
    assert predictions(tmp_path / "out") == [expected_text(world, row, 5) for row in rows]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answer_rows_skips_bad_rows(world, run, tmp_path, batch_size):
    """The answers do not depend on the batches, nor on where an earlier run stopped."""
    lines = [json.dumps(row) for row in world.rows]
    bad = {"id": 9, "messages": [{"role": "user", "content": "x"}], "image": "gone.png", "error": "old"}
    lines = [lines[0], json.dumps(bad), "{no", *lines[1:], "[5]"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    argv = ["--input", tmp_path / "rows.jsonl", "--dataset-dir", world.folder, "--batch-size", batch_size,
            "--max-new-tokens", 5, "--temperature", 1.2, "--on-bad-sample", "skip", "--output"]
    status, out, err = run(*argv, tmp_path / "out")
    assert (status, out) == (0, "") and "3 rows were skipped" in err.splitlines()[-1] and "7/7" in err
    complete = (tmp_path / "out").read_bytes()
    written = [json.loads(line) for line in complete.splitlines()]
    assert [sorted(row.keys() & {"prediction", "error"}) for row in written] == [
        ["prediction"], ["error"], ["error"], *[["prediction"]] * 3, ["error"]]
    assert written[1].keys() == bad.keys() and "row 2 (id 9): image: " in written[1]["error"]
    assert written[2].keys() == written[6].keys() == {"error"}
    assert "row 3 cannot be read" in written[2]["error"] and "row 7" in written[6]["error"]

    assert run(*argv, tmp_path / "other", "--batch-size", 3)[0] == 0
    assert (tmp_path / "other").read_bytes() == complete
    kept = complete.splitlines(keepends=True)
    for content in (kept[0] + kept[1][:-9], b"".join(kept[:2]), b"".join(kept[:3]), b"".join(kept[:6]) + kept[6][:4]):
        (tmp_path / "cut").write_bytes(content)
        assert run(*argv, tmp_path / "cut")[0] == 0
        assert (tmp_path / "cut").read_bytes() == complete
    assert "already has the answers" in run(*argv, tmp_path / "cut", "--on-bad-sample", "error")[2]


def test_chat_keeps_the_conversation(world, run):
    argv = ["--chat", "--image", "a.png", "--system", "Brief.", "--max-new-tokens", 7]
    status, out, err = run(*argv, stdin="What é?\r\n\n  \nAnd now?\n".encode())
    row = {"messages": [{"role": "system", "content": "Brief."}, {"role": "user", "content": "What é?"}],
           "images": ["a.png"]}
    first = expected_text(world, row, 7)
    row["messages"] += [{"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
    assert (status, out, err) == (0, f"{first}\n{expected_text(world, row, 7)}\n", "")
    assert run(*argv, "--prompt", "What é?", stdin=b"And now?")[1] == out
    status, out, err = run(*argv, stdin="What é?\n".encode() + b"\xff\n")
    assert (status, out) == (1, f"{first}\n") and "surrogate" in err and err.count("\n") == 1


def test_chat_with_a_thinking_model(world, run, tmp_path):
    """Prompts ask for a thought, and a thought that was cut off is no answer in the next prompt."""
    model = shutil.copytree(world.model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(THINKING)
    thinking = SimpleNamespace(**vars(world) | {"processor": data.Processor(model)})
    status, out, err = run("--model", model, "--chat", "--max-new-tokens", 7, stdin=b"What?\nAnd now?\n")
    row = {"messages": [{"role": "user", "content": "What?"}]}
    first = expected_text(thinking, row, 7)
    assert first != expected_text(world, row, 7) and "</think>" not in first
    row["messages"] += [{"role": "assistant", "content": ""}, {"role": "user", "content": "And now?"}]
    assert (status, out, err) == (0, f"{first}\n{expected_text(thinking, row, 7)}\n", "")
    status, out, err = run("--model", model, "--prompt", "What?", "--no-enable-thinking")
    assert (status, out) == (2, "") and err.startswith("error: --no-enable-thinking: the chat template of ")


@pytest.mark.parametrize("change, message", [
    ({"text_config": []}, "config.json: needs text_config and vision_config, each an object"),
    ({"vision_config": 5}, "config.json: needs text_config and vision_config, each an object"),
    ({"text_config": tiny.config_dict()["text_config"] | {"vocab_size": "264"}}, "vocab_size is '264', it must be"),
])
def test_damaged_config_is_one_line(run, tmp_path, change, message):
    status, out, err = run("--model", tiny.hf_dir(tmp_path, tiny.config_dict() | change), "--prompt", "x")
    assert (status, out) == (1, "") and err.startswith(f"error: {tmp_path}") and message in err


def test_verbose_figures(run):
    status, _, err = run("--prompt", "Hi", "--max-new-tokens", 4, "--verbose")
    assert status == 0
    for figure in ("load time: ", "prompt tokens: 21", "time to first token: ", "new tokens: 4", "tokens per second: "):
        assert figure in err


# ---- streaming -----------------------------------------------------------------------------------------------------


def test_text_stream_returns_whole_characters(world):
    text = "né 😀日本"
    ids = [i for character in text for i in world.processor.tokenizer.encode(character).ids]
    stream = infer.TextStream(world.processor)
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) == text and stream.flush() == ""
    assert [part for part in parts if part] == list(text)
    assert stream.push(world.processor.im_start_token_id) == ""  # special tokens are not text


def test_text_stream_with_broken_characters_equals_decode(world):
    ids = torch.randint(0, 263, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    stream = infer.TextStream(world.processor)
    assert "".join([*map(stream.push, ids), stream.flush()]) == world.processor.decode(ids)


def test_stream_answer_prints_each_character_at_once(world, monkeypatch):
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="utf-8"))  # keeps what is not flushed
    ids = world.processor.tokenizer.encode("aé!").ids + world.processor.tokenizer.encode("é").ids[:1]
    printed = []

    def answer(samples, turn, on_token):
        for token in ids:
            on_token(0, token)
            printed.append(screen.getvalue().decode())

    answerer = SimpleNamespace(processor=world.processor, answer=answer)
    assert infer.stream_answer(answerer, None, 0) == "aé!\ufffd"
    assert printed == ["a", "a", "aé", "aé!", "aé!"] and screen.getvalue().decode() == "aé!\ufffd\n"


# ---- user errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv, status, message", [
    ([], 2, "nothing to answer: give --prompt, --chat or --input"),
    (["--input", "rows.jsonl"], 2, "--input needs --output"),
    (["--input", "rows.jsonl", "--output", "o", "--image", "a.png"], 2, "--image has no effect with --input"),
    (["--prompt", "x", "--batch-size", "2"], 2, "--batch-size has no effect without --input"),
    (["--prompt", "x", "--on-bad-sample", "skip"], 2, "--on-bad-sample has no effect without --input"),
    (["--prompt", "x", "--repetition-penalty", "0"], 2, "--repetition-penalty: '0' is not a number above 0"),
    (["--prompt", "x", "--temperature", "-1"], 2, "--temperature: '-1' is not a number at least 0"),
    (["--prompt", "x", "--top-p", "0"], 2, "--top-p: '0' is not a number above 0 and at most 1"),
    (["--prompt", "x", "--max-new-tokens", "0"], 2, "--max-new-tokens: '0'"),
    (["--prompt", "x", "--max-new-token", "5"], 2, "did you mean --max-new-tokens?"),
    (["--prompt", "x", "--image-min-pixels", "9", "--image-max-pixels", "8"], 2, "--image-min-pixels 9 is above"),
    (["--prompt", "x", "--image", "gone.png"], 1, "images[0]: gone.png does not exist"),
    (["--prompt", "x <image>"], 1, "<image>"),
    (["--prompt", "x", "--model", "gone"], 1, "gone: cannot be read (No such file or directory)"),
    (["--prompt", "x", "--load", "gone"], 1, "gone: is not a checkpoint"),
    (["--prompt", "x", "--device", "npu"], 2, "--device npu"),
    (["--prompt", "x", "--text-attn-implementation", "flash_attention_2"], 2, "flash_attention_2"),
    (["--input", "gone.json", "--output", "o"], 1, "gone.json"),
    (["--input", "rows.jsonl", "--output", "gone/o"], 1, "gone/o: No such file or directory"),
    (["--input", "rows.jsonl", "--output", "o", "--dataset-dir", "gone"], 1, "--dataset-dir"),
    (["--input", "rows.jsonl", "--output", "."], 1, ".: Is a directory"),
    (["--prompt", "x", "--video", ".", "--video-fps", "1e-320"], 2, "--video-fps: '1e-320' is not a number at least"),
])
def test_main_with_a_user_error_prints_one_line(run, argv, status, message):
    got, out, err = run(*argv)
    assert (got, out) == (status, "") and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_append_with_a_full_disk_raises(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(InputError, match="out: File too large: once this is fixed, the same command resumes"):
            infer.append(str(tmp_path / "out"), b"x" * 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_generate_with_weights_that_are_not_finite_raises(pair):
    hf, ours = pair
    ours = copy.deepcopy(ours)
    ours.model.language_model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="the logits are not finite"):
        infer.Generator(ours, NEVER).generate(make_batch(hf, ["text"])[1])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_generate_with_one_logit_that_is_not_finite_raises(pair, temperature, value):
    """Sampling must not turn the NaN probabilities into token 0."""
    hf, ours = pair
    handle = ours.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(1, torch.tensor([7]), value))
    try:
        with pytest.raises(InputError, match="the logits are not finite"):
            infer.Generator(ours, NEVER).generate(make_batch(hf, ["text"])[1], temperature=temperature)
    finally:
        handle.remove()


def test_program_in_an_ascii_locale(world, tmp_path):
    """Read the flags from a file."""
    (tmp_path / "flags").write_text(f"# a comment\n--model {world.model}\n--prompt 'What is it?'  # the question\n"
                                    "--image a.png\n--max-new-tokens 12\n")
    done = subprocess.run([sys.executable, Path(infer.__file__), f"@{tmp_path / 'flags'}"], capture_output=True,
                          cwd=world.folder, env=os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0"})
    row = {"messages": [{"role": "user", "content": "What is it?"}], "images": ["a.png"]}
    expected = expected_text(world, row, 12)
    assert not expected.isascii()
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, expected + "\n", b"")
