"""Compare the predictions of --dry-run with real steps over gloo, measured by PyTorch's own memory tracker."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import tiny
import torch
from helpers import ROOT, run_job, shell
from torch.distributed.fsdp import FSDPModule

import common
import convert
import kernels_npu
import model
import parallel
import train
from tools import devices, planner
from tools.dry_run import MemoryTracker, fake_batch, shallow
from tools.dry_run import predict as predict_step


def config_dict(**kinds) -> dict:
    """Return a configuration whose 8 text heads, 4 vision heads and 8 experts four ranks can share."""
    raw = tiny.config_dict(**kinds, layers=3, vocab_size=265, num_attention_heads=8)
    raw["vision_config"] |= {"num_heads": 4, "depth": 3, "deepstack_visual_indexes": [0, 1]}
    if kinds.get("moe"):
        raw["text_config"]["num_experts"] = 8
    return raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a directory of configurations."""
    path = tmp_path_factory.mktemp("dry_run")
    for name, raw in (("dense", config_dict()), ("tied", config_dict(tied=True)), ("moe", config_dict(moe=True))):
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps(raw))
    return path


def predict(capsys, *argv) -> dict:
    """Run train.py --dry-run in this process and return the JSON object that it prints last."""
    if "--fsdp-size" in argv and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        pytest.skip("this PyTorch has no replicas on a CPU")
    train.main(["--dry-run", *map(str, argv)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---- against real steps ---------------------------------------------------------------------------------------------


class EvenRouting(kernels_npu.Torch):
    """The reference operations, but every expert gets the same number of tokens, as a dry run assumes."""

    def moe_route(self, router_logits, top_k):
        probs, weights, expert_ids = super().moe_route(router_logits, top_k)
        return probs, weights, torch.arange(expert_ids.numel()).view_as(expert_ids) % router_logits.shape[1]


def measure_step(argv: list[str]) -> None:
    """Measure train.py's second step with a dry run's batch; write the result to measured.json in --save."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
    from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
    from torch.utils._python_dispatch import _disable_current_modes

    args = train.parse_args(["--dataset", "none", "--train-iters", "1", "--init", "random", "--fp32", *argv])
    ops = kernels_npu.ops = EvenRouting(torch.device("cpu"))
    state = parallel.ParallelState(ops, 1, cp=args.context_parallel_size, ep=args.expert_parallel_size,
                                   fsdp=args.fsdp_size)
    config = model.Qwen3VLConfig.from_json(args.init_from_hf_path)
    net = model.build_model(config, train.freezing_predicate(args))
    train.configure_model(net, state, **train.model_settings(args))
    net.to_empty(device="cpu")
    convert.load_weights(net, None, args.seed)
    optimizer = train.make_optimizer(net, **train.optimizer_settings(args))
    trainable, sharded = [p for p in net.parameters() if p.requires_grad], bool(parallel.fsdp_modules(net))
    _, accumulation = train.batch_sizes(args.micro_batch_size, args.global_batch_size, state.dp_size)
    batch = fake_batch(config, args.seq_length, args.micro_batch_size)
    batch.pixel_values = torch.zeros(batch.pixel_values.shape)
    train.set_loss_weights(batch, args.loss_type, accumulation, accumulation, state)
    batch, cpu = parallel.local_batch(batch, state), torch.device("cpu")
    for owner, name in ((parallel._BlockInput, "__init__"), (parallel.Offload, "_copy")):  # host memory
        setattr(owner, name, _disable_current_modes()(getattr(owner, name)))

    def step(tracker: MemTracker | None = None) -> tuple[int, int]:
        """Return (bytes of activations after forward, bytes of gradients after backward)."""
        kept = 0
        for _ in range(accumulation):
            if tracker:
                tracker.reset_mod_stats()
            loss, _ = net(batch)
            if tracker:
                kept = tracker.get_tracker_snapshot()[cpu][(_FSDPRefType if sharded else _MemRefType).ACT]
            loss.backward()
            del loss
        (square_sum,) = state.sum(parallel.grad_square_sum(trainable, state))
        parallel.clip_gradients(trainable, square_sum**0.5, args.clip_grad)
        grads = sum(parallel.to_local(p.grad).nbytes for p in trainable)
        optimizer.step()
        optimizer.zero_grad()
        return kept, grads

    step()
    inputs = batch.pixel_values, batch.input_ids, batch.labels, batch.position_ids
    tracker = FSDPMemTracker(net, optimizer) if sharded else MemTracker()
    if sharded:
        tracker.track_inputs(inputs)
    else:
        tracker.track_external(net, optimizer, *inputs)
    with tracker:
        kept, grads = step(tracker)
    peak = tracker.get_tracker_snapshot("peak")[cpu]
    if state.rank == state.cp_size - 1:
        supervised, weight = len(batch.supervised_index), net.lm_head.weight
        made_by_loss = 4 * supervised * config.text.hidden_size + 4 * weight.numel() * weight.requires_grad
        optimizer_states = [t for states in optimizer.state.values() for t in states.values()]
        Path(args.save).mkdir()
        (Path(args.save) / "measured.json").write_text(json.dumps({
            "parameter_bytes": sum(parallel.to_local(p).nbytes for p in net.parameters()), "gradient_bytes": grads,
            "optimizer_bytes": sum(parallel.to_local(t).nbytes for t in optimizer_states),
            "activation_bytes": kept - made_by_loss, "peak_bytes": peak["Total"],
        }))
    state.close()


# Ranks, model, flags: each setting of recompute, each kind of parallelism, accumulation, a frozen component.
LAYOUTS = {
    "one rank": (1, "moe", "--recompute", "full"),  # without FSDP2
    "fsdp 2": (2, "dense", "--recompute", "none", "--global-batch-size", 4),
    "tied": (2, "tied", "--recompute", "full", "--micro-batch-size", 2),
    "hybrid": (4, "dense", "--activation-offload", "--fsdp-size", 2, "--freeze-vision-encoder"),
    "cp 4": (4, "moe", "--activation-offload", "--context-parallel-size", 4),
    "ep 2": (2, "moe", "--recompute", "none", "--expert-parallel-size", 2),
    "ep 2 cp 2": (4, "moe", "--expert-parallel-size", 2, "--context-parallel-size", 2, "--recompute", "full"),
}


SLOW = {"tied", "cp 4", "ep 2"}  # the others combine their features


@pytest.mark.parametrize("layout", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYOUTS])
def test_dry_run_equals_measured_step(folder, tmp_path, capsys, layout):
    """The contract is ten per cent. Both trackers see the same step and differ only by the batch's integers."""
    world_size, name, *flags = LAYOUTS[layout]
    old = not hasattr(FSDPModule, "set_force_sum_reduction_for_comms")
    if old and layout != "fsdp 2":
        pytest.skip("this PyTorch has no tracker for tied weights, no replicas on a CPU, no grouped matmul")
    flags = ["--init-from-hf-path", folder / name, "--seq-length", 601, *flags]
    save = run_job([*flags, "--save", tmp_path / "save"], world_size, measure_step)
    real = json.loads((save / "measured.json").read_text())
    report = predict(capsys, "--world-size", world_size, "--fp32", *flags)
    kept = report["activation_bytes"][report["activation_setting"]]
    for part in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"):
        assert report[part] == real[part], part
    assert kept == pytest.approx(real["activation_bytes"], rel=0.01)
    assert report["peak_bytes"] == pytest.approx(real["peak_bytes"], rel=0.01)
    assert report["peak_bytes"] == sum(report["peak_parts"].values())


# ---- the report -----------------------------------------------------------------------------------------------------


def test_dry_run_numbers_by_hand(folder, capsys):
    """4 bytes of everything in 601 tokens, hidden size 56, 3 layers, 3 experts per token."""
    r = predict(capsys, "--init-from-hf-path", folder / "moe", "--seq-length", 601, "--world-size", 4, "--fp32",
                "--expert-parallel-size", 2, "--recompute", "none", "--loss-chunk-size", 100, "--global-batch-size", 12)
    assert (r["micro_batches"], r["visual_tokens"], r["supervised_tokens"], r["images"]) == (3, 300, 301, 1)
    assert r["logits_bytes"] == 100 * 265 * 4
    rows, counts = 4 * 601 * 3 * 56 * 4, 8 * 8  # rows go there and back, in forward and in backward
    assert r["all_to_all_bytes"] == 3 * 3 * (rows + counts)
    one = predict(capsys, "--init-from-hf-path", folder / "moe", "--seq-length", 601, "--world-size", 1, "--fp32")
    assert r["flops_per_step"] == 12 * one["flops_per_step"] == 4 * r["flops_per_rank"]
    assert one["parameters"] == one["model_parameters"] == r["model_parameters"]
    assert (one["parameter_bytes"], one["gradient_bytes"]) == (4 * one["parameters"], 4 * one["parameters"])
    assert one["optimizer_bytes"] == pytest.approx(8 * one["parameters"], rel=1e-2)  # and AdamW's step for each tensor
    assert (one["host_bytes"], one["activation_setting"]) == (0, "recompute")
    kept = one["activation_bytes"]
    assert kept["recompute_offload"] < kept["recompute"] < kept["none"]


def test_prefetch_order(folder, capsys, monkeypatch):
    """Blocks run in the order in which each prefetches the next: a merger of DeepStack features after its block."""
    entered, enter = [], MemoryTracker.enter

    def record(tracker: MemoryTracker, block: str) -> None:
        entered.append(block)
        enter(tracker, block)

    monkeypatch.setattr(MemoryTracker, "enter", record)
    predict(capsys, "--init-from-hf-path", folder / "dense", "--world-size", 8, "--seq-length", 200)
    net = model.build_model(model.Qwen3VLConfig.from_json(folder / "dense"))
    names = {module: name for name, module in net.named_modules()}
    order = [names[block] for block in parallel.blocks(net)]
    assert entered[: len(order)] == order


def test_dry_run_cpu_offload(folder, capsys):
    """The device needs none of the parameters, gradients and optimizer state; the host all of them."""
    flags = ["--init-from-hf-path", folder / "moe", "--world-size", 2, "--seq-length", 200]
    device, host = predict(capsys, *flags), predict(capsys, *flags, "--cpu-offload", "--synchronize-per-layer")
    kept = [device[f"{part}_bytes"] for part in ("parameter", "gradient", "optimizer")]
    assert kept == [host[f"{part}_bytes"] for part in ("parameter", "gradient", "optimizer")]
    assert device["host_bytes"] == 0 and host["host_bytes"] >= sum(kept)
    assert {"parameters", "optimizer state"} <= device["peak_parts"].keys()
    assert not {"parameters", "gradients", "optimizer state"} & host["peak_parts"].keys()
    assert host["peak_bytes"] <= device["peak_bytes"] - kept[0] - kept[2]


@pytest.mark.parametrize("flags", [
    ("--seq-length", 1), ("--seq-length", 2, "--micro-batch-size", 3),
    ("--freeze-text-decoder", "--freeze-vision-encoder", "--text-attn-implementation", "flash_attention_2"),
    ("--expert-parallel-size", 2, "--fsdp-size", 4, "--loss-type", "per_sample", "--router-aux-loss-coef", 0.1),
])
def test_dry_run_flags(folder, capsys, flags):
    report = predict(capsys, "--init-from-hf-path", folder / "moe", "--world-size", 8, "--seq-length", 200, *flags)
    assert report["peak_bytes"] > report["parameter_bytes"] + report["optimizer_bytes"]
    assert (report["compute_dtype"], report["activation_setting"], report["fits"]) == ("bfloat16", "recompute", None)


def test_dry_run_fewer_layers_than_deepstack_features(tmp_path, capsys):
    raw = config_dict()
    raw["text_config"]["num_hidden_layers"] = 1  # the second merger's features are unused: it has no gradient
    (tmp_path / "config.json").write_text(json.dumps(raw))
    report = predict(capsys, "--init-from-hf-path", tmp_path, "--world-size", 2, "--seq-length", 200)
    assert 0 < report["gradient_bytes"] < report["parameter_bytes"]


# ---- the command line -----------------------------------------------------------------------------------------------


def test_dry_run_8b_on_8_ranks_exceeds_16_gib(tmp_path):
    save = tmp_path / "new" / "folder"
    result = shell("train.py", "--dry-run", "--init-from-hf-path", "configs/qwen3-vl-8b", "--world-size", 8,
                   "--device-memory", 16, "--save", save, timeout=300)
    assert result.returncode == 1
    *lines, last = result.stdout.splitlines()
    report = json.loads(last)
    assert report == json.loads((save / "dry_run.json").read_text())
    assert [f.name for f in save.iterdir()] == ["dry_run.json"]
    assert report["fits"] is False
    assert report["parameters"] == pytest.approx(8_767_123_696 / 8, rel=1e-3)
    assert report["largest_all_gather_bytes"] == 8 * 18_992 * 4096 * 2  # embeddings of 151936 tokens in bf16
    text = "\n".join(" ".join(line.split()) for line in lines)
    peak = f"peak bytes {report['peak_bytes'] / 2**30:.2f} GiB"
    for expected in ("it assumes rows", "seq length 4,096", "images 2\n", peak):
        assert expected in text, expected
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    excess = report["peak_bytes"] / 2**30 - 16
    largest = max(report["peak_parts"], key=report["peak_parts"].get)
    assert f"{excess:.2f} GiB too little" in error and largest in error and "--world-size" in error
    assert "Traceback" not in result.stderr


def test_dry_run_fits(folder, capsys):
    report = predict(capsys, "--init-from-hf-path", folder / "dense", "--world-size", 2, "--device-memory", 0.5)
    assert report["fits"] is True


@pytest.mark.parametrize("flags, message", [
    (["--dry-run"], "--world-size"),
    (["--world-size", "2", "--dataset", "x", "--train-iters", "1"], "--world-size belongs to --dry-run"),
    (["--device-memory", "2", "--dataset", "x", "--train-iters", "1"], "--device-memory belongs to --dry-run"),
    (["--plan", "--dataset", "x", "--train-iters", "1"], "--plan belongs to --dry-run"),
    (["--dry-run", "--world-size", "8", "--device-figures", "speed=3"], "where NAME is one of tflops, memory_gib"),
    (["--dry-run", "--world-size", "8", "--device-figures", "tflops=0"], "--device-figures tflops=0: give NAME=NUMBER"),
    (["--dry-run", "--world-size", "8", "--device-figures", "tflops=nan"], "--device-figures tflops=nan: give"),
    (["--dry-run", "--plan", "--world-size", "8", "--compile"], "a dry run cannot trace compiled blocks"),
    (["--dry-run", "--plan", "--world-size", "8", "--freeze-vision-encoder", "--freeze-vision-projector",
      "--freeze-text-decoder"], "every component is frozen"),
    (["--dry-run", "--world-size", "8", "--assume-device", "h300"], "give one of ascend-910b, ascend-910c, a100"),
    (["--train-iters", "1"], "--dataset"),
    (["--dataset", "x"], "--train-iters"),
    (["--dry-run", "--world-size", "8", "--context-parallel-size", "3"], "give one of 1, 2, 4, 8"),
    (["--dry-run", "--world-size", "8", "--context-parallel-size", "16"], "give one of 1, 2, 4, 8"),
    (["--dry-run", "--world-size", "8", "--fsdp-size", "3"], "give one of 1, 2, 4, 8"),
    (["--dry-run", "--world-size", "16", "--context-parallel-size", "16"], "cannot share 8 heads"),
    (["--dry-run", "--world-size", "8", "--global-batch-size", "12"], "the nearest that are: 8 or 16"),
])
def test_dry_run_wrong_flags(folder, capsys, flags, message):
    status = common.run_program(train.main, ["--init-from-hf-path", str(folder / "dense"), *flags])
    assert status == 2 and message in capsys.readouterr().err


def test_dry_run_missing_config(tmp_path, capsys):
    argv = ["--init-from-hf-path", str(tmp_path), "--dry-run", "--world-size", "2"]
    assert common.run_program(train.main, argv) == 1
    assert "config.json" in capsys.readouterr().err


# ---- few layers instead of all --------------------------------------------------------------------------------------


def deep_config(**kinds) -> dict:
    """Return a configuration with so many layers that a dry run leaves out some of each kind."""
    raw = config_dict(**kinds)
    raw["text_config"] |= {"num_hidden_layers": 11} | ({"decoder_sparse_step": 2} if kinds else {})
    raw["vision_config"] |= {"depth": 9, "deepstack_visual_indexes": [2, 5]}
    return raw


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("deep")
    for name, raw in (("dense", deep_config()), ("mixed", deep_config(moe=True))):
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps(raw))
    return path


def flat_report(argv, full_depth: bool) -> dict:
    """Return the report of a dry run on 8 ranks, without nesting."""
    args = train.parse_args(["--dry-run", "--world-size", "8", "--seq-length", "601", *map(str, argv)])
    report = predict_step(args, full_depth)
    nested = [(f"{key}.{name}", n) for key in ("activation_bytes", "peak_parts") for name, n in report.pop(key).items()]
    return report | dict(nested)


OPTIONS = [
    ("--recompute", "full"),
    ("--recompute", "none", "--global-batch-size", 16),
    ("--activation-offload", "--context-parallel-size", 2, "--global-batch-size", 8),
    ("--fsdp-size", 4, "--freeze-text-decoder", "--recompute", "none"),
    ("--freeze-vision-encoder", "--freeze-vision-projector"),
    ("--expert-parallel-size", 4, "--context-parallel-size", 4, "--micro-batch-size", 2),
    ("--expert-parallel-size", 2, "--fsdp-size", 4, "--activation-offload", "--router-aux-loss-coef", 0.1),
    ("--lora-rank", 4, "--freeze-vision-encoder", "--freeze-vision-projector", "--activation-offload"),
    ("--lora-rank", 4, "--lora-target-modules", "qkv,q_proj,linear_fc1", "--recompute", "none"),
    ("--lora-rank", 4, "--lora-target-modules", "v_proj,experts", "--expert-parallel-size", 4, "--cpu-offload"),
    ("--cpu-offload", "--activation-offload", "--global-batch-size", 16),
    ("--cpu-offload", "--freeze-text-decoder", "--context-parallel-size", 2, "--recompute", "none"),
]


def assert_equal_reports(few: dict, full: dict) -> None:
    assert few.keys() == full.keys()
    for key, value in full.items():
        assert few[key] == (pytest.approx(value, rel=1e-3) if type(value) in (int, float) else value), key


def test_shallow_keeps_special_layers(deep_folder):
    config, removed, indexes = shallow(model.Qwen3VLConfig.from_json(deep_folder / "mixed"))
    assert [indexes[f"model.visual.blocks.{i}"] for i in range(config.vision.depth)] == [0, 2, 5, 8]
    assert config.vision.deepstack_visual_indexes == [1, 2]
    # layers 0 and 1 receive features; 2, 6 and 8 are the first and last dense ones between, 3, 7 and 9 of the others
    assert [indexes[f"model.language_model.layers.{i}"] for i in range(9)] == [0, 1, 2, 3, 6, 7, 8, 9, 10]
    assert [config.text.is_moe_layer(i) for i in range(9)] == [False, True] * 4 + [False]
    assert sum(r.count for r in removed) == 9 + 11 - 4 - 9


def test_few_layers_equal_all_layers(deep_folder):
    options = ["--expert-parallel-size", 2, "--lora-rank", 4, "--cpu-offload", "--global-batch-size", 16]
    argv = ["--init-from-hf-path", deep_folder / "mixed", *options]
    assert_equal_reports(flat_report(argv, False), flat_report(argv, True))


@pytest.mark.parametrize("text, vision, options", [
    # features of the first block: a merger keeps the input of the second one
    ({}, {"deepstack_visual_indexes": [0, 1, 8]}, ("--freeze-vision-encoder", "--recompute", "none")),
    # two sparse layers are never neighbours
    ({"num_hidden_layers": 17, "num_experts_per_tok": 2, "decoder_sparse_step": 3, "mlp_only_layers": [0, 5, 16]},
     {"depth": 14, "deepstack_visual_indexes": [3, 4, 11, 12]},
     ("--expert-parallel-size", 2, "--context-parallel-size", 2, "--global-batch-size", 16)),
])
def test_few_layers_equal_all_layers_of_odd_models(tmp_path, text, vision, options):
    raw = deep_config(moe=True)
    raw["text_config"] |= text
    raw["vision_config"] |= vision
    (tmp_path / "config.json").write_text(json.dumps(raw))
    argv = ["--init-from-hf-path", tmp_path, *options]
    assert_equal_reports(flat_report(argv, False), flat_report(argv, True))


@pytest.mark.parametrize("options", [("--global-batch-size", 16), ("--cpu-offload",)])
def test_replicas_keep_reduced_gradients(tmp_path, options):
    """FSDP2 keeps a tensor that it all-reduces until the end of backward, beside the gradient that it is added to."""
    raw = deep_config()
    raw["text_config"] |= {"intermediate_size": 20_000}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    argv = ["--init-from-hf-path", tmp_path, "--fsdp-size", 2, "--seq-length", 32, *options]
    few, full = (flat_report(argv, full_depth) for full_depth in (False, True))
    assert_equal_reports(few, full)
    assert full["peak_parts.backward"] > 0.9 * full["gradient_bytes"]
    row = evaluate([*argv, "--seq-length", 601])[2]
    peak = flat_report([*argv, "--seq-length", 601], False)["peak_bytes"]
    assert row["memory_gib"] * 2**30 == pytest.approx(peak, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name, options", [(n, o) for n in ("dense", "mixed") for o in OPTIONS
                                           if n == "mixed" or "--expert-parallel-size" not in o])
def test_few_layers_equal_all_layers_with_options(deep_folder, name, options):
    argv = ["--init-from-hf-path", deep_folder / name, *options]
    assert_equal_reports(flat_report(argv, False), flat_report(argv, True))


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [
    ("8b", ["--world-size", 16, "--recompute", "none"]),
    ("30b-a3b", ["--world-size", 16, "--expert-parallel-size", 8, "--global-batch-size", 32, "--seq-length", 8192]),
])
def test_few_layers_equal_all_layers_of_published_models(name, flags):
    argv = ["--init-from-hf-path", f"configs/qwen3-vl-{name}", *flags]
    assert_equal_reports(flat_report(argv, False), flat_report(argv, True))


# ---- the planner ----------------------------------------------------------------------------------------------------


def evaluate(argv) -> tuple[argparse.Namespace, planner.Planner, dict]:
    args = train.parse_args(["--dry-run", "--world-size", "8", "--seq-length", "2048", *map(str, argv)])
    one = planner.Planner(args)
    return args, one, one.evaluate(planner.layout_of(args), exact=True)


@pytest.mark.parametrize("name, options", [
    ("mixed", ("--recompute", "none", "--expert-parallel-size", 2, "--fsdp-size", 4)),
    ("mixed", ("--activation-offload", "--expert-parallel-size", 8, "--context-parallel-size", 4)),
    ("dense", ("--recompute", "full", "--global-batch-size", 16, "--freeze-vision-encoder")),
    ("mixed", ("--recompute", "none", "--expert-parallel-size", 2, "--lora-rank", 4)),
    ("mixed", ("--lora-rank", 4, "--freeze-vision-encoder", "--freeze-vision-projector", "--activation-offload")),
    ("mixed", ("--lora-rank", 4, "--lora-target-modules", "experts,qkv", "--cpu-offload")),
    ("dense", ("--cpu-offload", "--global-batch-size", 16)),
    (ROOT / "configs/qwen3-vl-8b", ("--recompute", "none")),  # the peak is in the loss, and lm_head is not tied
])
def test_pieces_equal_dry_run(deep_folder, name, options):
    """The pieces' memory is the dry run's, and so are the bytes of the collectives."""
    args, one, row = evaluate(["--init-from-hf-path", deep_folder / name, *options])
    report = predict_step(args)
    assert row["memory_gib"] * 2**30 == pytest.approx(report["peak_bytes"], rel=0.01)
    layout = planner.layout_of(args)
    work = one.measure(layout.cp, layout.ep, layout.micro_batch, layout.recompute).work
    sent = sum(n * one.counts[block] for (_, block, kind), n in work.items() if kind in ("cp bytes", "ep bytes"))
    features = 0 if layout.cp == 1 else report["all_to_all_bytes"] - sent  # outside of the blocks
    assert sent + features == report["all_to_all_bytes"] / report["micro_batches"] and features < 0.1 * sent + 1


def test_pieces_interpolate(deep_folder):
    """Expert-parallel and micro-batch sizes between the measured ones are within 3 %, and not below."""
    argv = ["--init-from-hf-path", deep_folder / "mixed", "--expert-parallel-size", 4, "--micro-batch-size", 2]
    args, one, row = evaluate(argv)
    exact = one.measure(1, 4, 2, True)
    mixed = one.pieces(1, 4, 2, True)
    for moment, peak in exact.peaks.items():
        assert 0.999 * peak <= mixed.peaks[moment] <= 1.03 * peak, moment
    for resource in ("compute", "memory bandwidth"):
        total = [sum(n for key, n in p.work.items() if key[2] == resource) for p in (exact, mixed)]
        assert total[1] == pytest.approx(total[0], rel=0.03)


class SwiGLU(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels_npu.ops.swiglu(x).sin()


def test_fused_operation(monkeypatch):
    """A fused operation moves its arguments and results only, and a block that runs again counts once more."""
    monkeypatch.setattr(devices, "MEMORY_EFFICIENCY", 1)
    profile = planner.Profile(devices.DEVICES["h100"]._replace(memory_gbs=1))
    kernels_npu.ops = planner.PlannedDevice(profile, {"swiglu"})
    x = torch.empty(10, 8, device="meta", requires_grad=True)
    with profile:
        out = parallel.recompute_block(SwiGLU(), x)
        profile.phase = "backward"
        out.backward(torch.empty_like(out))
    assert {phase: round(1e9 * seconds) for (phase, _, _), seconds in profile.work.items()} == {
        "forward": 480 + 320, "backward": 480 + 800 + 320 + 480}  # again, backward, cos, times the gradient
    assert devices.fused_operations("h100") == {"rms_norm", "attention_sdpa"}
    assert devices.fused_operations("ascend-910b") == {*devices.FUSIBLE} - {"attention_flash"} | {"attention_sdpa"}


def test_seconds_with_adapters_and_offload(folder):
    """Frozen weights take no gradients and no AdamW; --cpu-offload copies shards, and AdamW uses the host's memory."""
    argv = ["--init-from-hf-path", folder / "moe", "--recompute", "none"]
    _, one, full = evaluate(argv)
    _, two, lora = evaluate([*argv, "--lora-rank", 8, "--freeze-vision-encoder", "--freeze-vision-projector"])
    gradients = [p.total(p.sharding(1, 8).gradients) for p in (one, two)]
    shards = [p.total(p.sharding(1, 8).shard) for p in (one, two)]
    assert gradients[1] < 0.2 * gradients[0] and lora["step_time_s"] < full["step_time_s"]
    assert shards[1] + 2 * gradients[1] < 0.3 * (shards[0] + 2 * gradients[0])
    _, _, host = evaluate([*argv, "--cpu-offload", "--device-figures", "host_memory_gbs=1e-3"])
    adamw = gradients[0] * planner.OPTIMIZER_TRAFFIC / (1e6 * devices.MEMORY_EFFICIENCY)
    assert host["step_parts_s"]["host memory"] == pytest.approx(adamw) and host["bound"] == "host memory"
    _, _, copies = evaluate([*argv, "--cpu-offload", "--device-figures", "host_gbs=1e-5"])
    assert copies["bound"] == "host copies"
    # each shard goes to the device once or twice, and its gradient back
    sent = copies["step_parts_s"]["host copies"] * 1e4 * devices.LINK_EFFICIENCY
    assert 2 < sent / gradients[0] < 3


def test_seconds_by_hand(folder):
    """Twice the FLOP/s halve the kernels' time where they are compute bound; a slow network becomes the bound."""
    argv = ["--init-from-hf-path", folder / "dense", "--recompute", "none"]
    slow_compute = "tflops=1e-6,memory_gbs=1e6,link_gbs=1e6,network_gbs=1e6"
    _, _, one = evaluate([*argv, "--device-figures", slow_compute])
    _, _, two = evaluate([*argv, "--device-figures", slow_compute.replace("1e-6", "2e-6")])
    assert one["bound"] == two["bound"] == "compute"
    assert one["step_time_s"] == pytest.approx(2 * two["step_time_s"], rel=1e-3)
    _, _, short = evaluate([*argv, "--seq-length", 32, "--device-figures", slow_compute])
    assert one["mfu"] < short["mfu"] == pytest.approx(devices.MATMUL_EFFICIENCY, rel=0.05)  # attention works twice
    _, _, three = evaluate([*argv, "--device-figures", "devices_per_node=1,network_gbs=1e-3"])
    assert three["bound"] == "parameter traffic"
    _, _, four = evaluate([*argv[:2], "--activation-offload", "--device-figures", "host_gbs=1e-4"])
    assert four["bound"] == "host copies"
    _, _, five = evaluate(["--init-from-hf-path", folder / "moe", "--expert-parallel-size", 8,
                           "--device-figures", "link_gbs=1e-3"])
    assert five["bound"] == "all-to-all"


def test_collectives_by_hand(monkeypatch):
    for name in ("LATENCY", "HOP_IN_NODE", "HOP_BETWEEN_NODES"):
        monkeypatch.setattr(devices, name, 0)
    monkeypatch.setattr(devices, "LINK_EFFICIENCY", 1)
    device = devices.Device(1, 1, 1, link_gbs=1000, network_gbs=10, devices_per_node=8, host_gbs=1, host_memory_gbs=1)
    assert device.ring(8e9, 8, 1) == pytest.approx(7 / 1000)  # within a node
    assert device.ring(8e9, 16, 1) == pytest.approx(4 / 80)  # half of it crosses the 8 links of a node
    assert device.ring(8e9, 2, 8) == pytest.approx(4 / 10)  # one device per node
    assert device.ring(8e9, 1, 1) == 0
    assert device.all_to_all(8e9, 1, 8) == pytest.approx(7 / 1000)
    assert device.all_to_all(8e9, 1, 16) == pytest.approx(4 / 10)


def test_plan(folder, tmp_path, capsys):
    argv = ["--init-from-hf-path", folder / "moe", "--world-size", 4, "--seq-length", 200, "--device-memory", 0.02]
    train.main(["--dry-run", "--plan", *map(str, argv), "--save", str(tmp_path / "save")])
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "save" / "plan.json").read_text())
    assert set(rows[0]) == {"flags", "memory_gib", "step_time_s", "tokens_per_s_per_device", "mfu", "bound"}
    speeds = [row["tokens_per_s_per_device"] for row in rows]
    assert speeds == sorted(speeds, reverse=True)
    assert max(row["memory_gib"] for row in rows) <= 0.02
    assert len(lines) == 1 + 1 + min(10, len(rows)) + 1 and lines[-1] == " ".join(rows[0]["flags"])
    one = planner.Planner(train.parse_args(["--dry-run", "--plan", *map(str, argv)]))
    assert 0 < len(rows) < len(one.layouts())  # some do not fit
    report = predict(capsys, *argv, *rows[0]["flags"])
    assert report["fits"] and report["peak_bytes"] / 2**30 == pytest.approx(rows[0]["memory_gib"], rel=0.03)
    assert report["step_time_s"] == pytest.approx(rows[0]["step_time_s"], rel=0.03)


def test_plan_global_batch_size(folder):
    argv = ["--dry-run", "--plan", "--init-from-hf-path", str(folder / "dense"), "--world-size", "4"]
    layouts = planner.Planner(train.parse_args([*argv, "--global-batch-size", "4"])).layouts()
    assert {(x.cp, x.micro_batch) for x in layouts} == {(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)}
    assert {x.ep for x in layouts} == {1} and {x.fsdp for x in layouts} == {1, 2, 4}


def test_plan_nothing_fits(folder, capsys):
    argv = ["--dry-run", "--plan", "--init-from-hf-path", str(folder / "dense"), "--world-size", "2",
            "--device-memory", "0.001"]
    assert common.run_program(train.main, argv) == 1
    assert "no layout fits" in capsys.readouterr().err


def test_gpu_benchmark_predicts(folder, monkeypatch):
    """benchmarks/gpu.py prints a dry run's prediction for one rank, and the measured values as multiples of it."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import gpu

    size = argparse.Namespace(seq_length=64, rows=2)
    report = gpu.predict(folder / "moe", ["--recompute", "full", "--activation-offload"], "h200", size)
    assert (report["assumed_device"], report["world_size"], report["compute_dtype"]) == ("h200", 1, "bfloat16")
    assert (report["micro_batch_size"], report["activation_setting"]) == (2, "recompute_offload")
    measured = {"seconds": 2 * report["step_time_s"], "memory": report["peak_bytes"] / 2}
    assert gpu.compare(measured, report).endswith("measured / predicted 2.00 and 0.50")
    peaks = {"NVIDIA H200": 989e12, "NVIDIA GH200 480GB": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L40S": 362e12}
    assert [gpu.planned_device(name, peak) for name, peak in peaks.items()] == ["h200", None, None, None]
    batch = gpu.random_batch(model.Qwen3VLConfig.from_json(folder / "moe"), size)
    assert len(batch.input_ids) == 128 and batch.pixel_values.device.type == "cpu"
