"""What --dry-run predicts, against real steps over gloo that PyTorch's own tracker has watched."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_parallel import config_dict, start_ranks
from torch.distributed.fsdp import FSDPModule

import common
import kernels_npu
import parallel
import train
from tools.dry_run import fake_batch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Configurations alone."""
    path = tmp_path_factory.mktemp("dry_run")
    for name, raw in (("dense", config_dict()), ("tied", config_dict(tied=True)), ("moe", config_dict(moe=True))):
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps(raw))
    return path


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was():
    yield
    kernels_npu.select("cpu")
    if dist.is_initialized():
        dist.destroy_process_group()


def predict(capsys, *argv) -> dict:
    """A dry run in this process -> the last line of what it prints."""
    if "--fsdp-size" in argv and not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        pytest.skip("this PyTorch has no replicas on a CPU")
    train.main(["--dry-run", *map(str, argv)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ---- against real steps ---------------------------------------------------------------------------------------------


class EvenRouting(kernels_npu.Torch):
    """The reference operations; every expert gets as many tokens, as a dry run assumes."""

    def moe_route(self, router_logits, top_k):
        probs, weights, expert_ids = super().moe_route(router_logits, top_k)
        return probs, weights, torch.arange(expert_ids.numel()).view_as(expert_ids) % router_logits.shape[1]


def real_step(argv: list[str]) -> None:
    """A rank of train.py's second step with the batch of a dry run, watched; its numbers go to the file argv[0]."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
    from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
    from torch.utils._python_dispatch import _disable_current_modes

    args = train.parse_args(["--dataset", "none", "--train-iters", "1", "--init", "random", "--fp32", *argv[1:]])
    ops = kernels_npu.ops = EvenRouting(torch.device("cpu"))
    ranks = parallel.ParallelState(ops, 1, cp=args.context_parallel_size, ep=args.expert_parallel_size,
                                   fsdp=args.fsdp_size)
    config = train.Qwen3VLConfig.from_json(args.init_from_hf_path)
    with torch.device("meta"):
        model = train.Qwen3VL(config)
    model = train.build_model(args, model, ranks, torch.float32, None)
    optimizer = train.make_optimizer(args, model)
    trainable, sharded = [p for p in model.parameters() if p.requires_grad], bool(parallel.fsdp_modules(model))
    _, accumulation = train.batch_sizes(args, ranks.dp_size)
    batch = fake_batch(args, config)
    batch.pixel_values = torch.zeros(batch.pixel_values.shape)
    train.set_loss_weights([batch] * accumulation, args.loss_type, config, ranks)
    batch, cpu = ranks.take(batch), torch.device("cpu")
    for owner, name in ((parallel._Input, "__init__"), (parallel.Offload, "_copy")):  # the host's memory does not count
        setattr(owner, name, _disable_current_modes()(getattr(owner, name)))

    def step(tracker: MemTracker | None = None) -> tuple[int, int]:
        """-> (bytes of activations after forward, bytes of gradients after backward)."""
        kept = 0
        for _ in range(accumulation):
            if tracker:
                tracker.reset_mod_stats()
            loss, _ = model(batch)
            if tracker:
                kept = tracker.get_tracker_snapshot()[cpu][(_FSDPRefType if sharded else _MemRefType).ACT]
            loss.backward()
            del loss
        parallel.clip_grad_norm(trainable, args.clip_grad, ranks)
        grads = sum(parallel.to_local(p.grad).nbytes for p in trainable)
        optimizer.step()
        optimizer.zero_grad()
        return kept, grads

    step()
    inputs = batch.pixel_values, batch.input_ids, batch.labels, batch.position_ids
    tracker = FSDPMemTracker(model, optimizer) if sharded else MemTracker()
    if sharded:
        tracker.track_inputs(inputs)
    else:
        tracker.track_external(model, optimizer, *inputs)
    with tracker:
        kept, grads = step(tracker)
    peak = tracker.get_tracker_snapshot("peak")[cpu]
    if ranks.rank == ranks.cp_size - 1:
        supervised, weight = len(batch.supervised_index), model.lm_head.weight
        made_by_loss = 4 * supervised * config.text.hidden_size + 4 * weight.numel() * weight.requires_grad
        states = [t for state in optimizer.state.values() for t in state.values()]
        Path(argv[0]).write_text(json.dumps({
            "parameter_bytes": sum(parallel.to_local(p).nbytes for p in model.parameters()), "gradient_bytes": grads,
            "optimizer_bytes": sum(parallel.to_local(t).nbytes for t in states),
            "activation_bytes": kept - made_by_loss, "peak_bytes": peak["Total"],
        }))
    ranks.close()


# ranks, model, flags: each setting of recompute, each kind of parallelism, accumulation, a frozen tower
LAYOUTS = {
    "one rank": (1, "moe", "--recompute", "full"),  # without FSDP2
    "fsdp 2": (2, "dense", "--recompute", "none", "--global-batch-size", 4),
    "tied": (2, "tied", "--recompute", "full", "--micro-batch-size", 2),
    "hybrid": (4, "dense", "--activation-offload", "--fsdp-size", 2, "--freeze-vision-encoder"),
    "cp 4": (4, "moe", "--activation-offload", "--context-parallel-size", 4),
    "ep 2": (2, "moe", "--recompute", "none", "--expert-parallel-size", 2),
    "ep 2 cp 2": (4, "moe", "--expert-parallel-size", 2, "--context-parallel-size", 2, "--recompute", "full"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_predicts_what_a_real_step_takes(folder, tmp_path, capsys, layout):
    """Ten per cent are asked for; the two trackers see the same step, and differ by the batch's integers."""
    world, model, *flags = LAYOUTS[layout]
    old = not hasattr(FSDPModule, "set_force_sum_reduction_for_comms")
    if old and layout != "fsdp 2":
        pytest.skip("this PyTorch: no tracker for tied weights, no replicas on a CPU, no grouped matmul in one call")
    flags = ["--init-from-hf-path", folder / model, "--seq-length", 601, *flags]
    statuses, words = start_ranks(world, real_step, [tmp_path / "real.json", *flags], tmp_path)
    assert statuses == [0] * world, words
    real = json.loads((tmp_path / "real.json").read_text())
    report = predict(capsys, "--world-size", world, "--fp32", *flags)
    kept = report["activation_bytes"][report["activation_setting"]]
    for part in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"):
        assert report[part] == real[part], part
    assert kept == pytest.approx(real["activation_bytes"], rel=0.01)
    assert report["peak_bytes"] == pytest.approx(real["peak_bytes"], rel=0.01)
    assert report["peak_bytes"] == sum(report["peak_parts"].values())


# ---- the report -----------------------------------------------------------------------------------------------------


def test_numbers_by_hand(folder, capsys):
    """What can be worked out on paper: 4 bytes of everything in 601 tokens, width 56, 3 layers, 3 experts a token."""
    r = predict(capsys, "--init-from-hf-path", folder / "moe", "--seq-length", 601, "--world-size", 4, "--fp32",
                "--expert-parallel-size", 2, "--recompute", "none", "--loss-chunk-size", 100, "--global-batch-size", 12)
    assert (r["micro_batches"], r["visual_tokens"], r["supervised_tokens"], r["pictures"]) == (3, 300, 301, 1)
    assert r["logits_bytes"] == 100 * 265 * 4
    there_and_back, counts = 4 * 601 * 3 * 56 * 4, 8 * 8  # in forward and in backward
    assert r["all_to_all_bytes"] == 3 * 3 * (there_and_back + counts)
    one = predict(capsys, "--init-from-hf-path", folder / "moe", "--seq-length", 601, "--world-size", 1, "--fp32")
    assert r["flops_per_step"] == 12 * one["flops_per_step"] == 4 * r["flops_per_rank"]
    assert one["parameters"] == one["model_parameters"] == r["model_parameters"]
    assert (one["parameter_bytes"], one["gradient_bytes"]) == (4 * one["parameters"], 4 * one["parameters"])
    assert one["optimizer_bytes"] == pytest.approx(8 * one["parameters"], rel=1e-2)  # and a count for each tensor
    assert (one["host_bytes"], one["activation_setting"]) == (0, "recompute")
    kept = one["activation_bytes"]
    assert kept["recompute_offload"] < kept["recompute"] < kept["none"]


@pytest.mark.parametrize("flags", [
    ("--seq-length", 1), ("--seq-length", 2, "--micro-batch-size", 3),
    ("--freeze-text-decoder", "--freeze-vision-encoder", "--text-attn-implementation", "flash_attention_2"),
    ("--expert-parallel-size", 2, "--fsdp-size", 4, "--loss-type", "per_sample", "--router-aux-loss-coef", 0.1),
])
def test_any_flags(folder, capsys, flags):
    report = predict(capsys, "--init-from-hf-path", folder / "moe", "--world-size", 8, "--seq-length", 200, *flags)
    assert report["peak_bytes"] > report["parameter_bytes"] + report["optimizer_bytes"]
    assert (report["compute_dtype"], report["activation_setting"], report["fits"]) == ("bfloat16", "recompute", None)


# ---- the command line -----------------------------------------------------------------------------------------------


def shell(*argv) -> subprocess.CompletedProcess:
    """train.py --dry-run, alone in its process."""
    return subprocess.run([sys.executable, "train.py", "--dry-run", *map(str, argv)], cwd=ROOT, text=True,
                          capture_output=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_8b_on_8_ranks_does_not_fit_in_16_gib(tmp_path):
    done = shell("--init-from-hf-path", "configs/qwen3-vl-8b", "--world-size", 8, "--device-memory", 16, "--save",
                 tmp_path / "new" / "folder")
    assert done.returncode == 1
    *lines, last = done.stdout.splitlines()
    report = json.loads(last)
    assert report == json.loads((tmp_path / "new" / "folder" / "dry_run.json").read_text())
    assert [f.name for f in (tmp_path / "new" / "folder").iterdir()] == ["dry_run.json"]
    assert report["fits"] is False
    assert report["parameters"] == pytest.approx(8_767_123_696 / 8, rel=1e-3)
    assert report["largest_all_gather_bytes"] == 8 * 18_992 * 4096 * 2  # embeddings of 151936 tokens in bf16
    words = "\n".join(" ".join(line.split()) for line in lines)
    peak = f"peak bytes {report['peak_bytes'] / 2**30:.2f} GiB"
    for said in ("it assumes rows", "seq length 4,096", "pictures 2\n", peak):
        assert said in words, said
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    over = report["peak_bytes"] / 2**30 - 16
    largest = max(report["peak_parts"], key=report["peak_parts"].get)
    assert f"{over:.2f} GiB too little" in error and largest in error and "--world-size" in error
    assert "Traceback" not in done.stderr


def test_fits(folder, capsys):
    report = predict(capsys, "--init-from-hf-path", folder / "dense", "--world-size", 2, "--device-memory", 0.5)
    assert report["fits"] is True


@pytest.mark.parametrize("flags, words", [
    (["--dry-run"], "--world-size"),
    (["--world-size", "2", "--dataset", "x", "--train-iters", "1"], "--world-size belongs to --dry-run"),
    (["--device-memory", "2", "--dataset", "x", "--train-iters", "1"], "--device-memory belongs to --dry-run"),
    (["--train-iters", "1"], "--dataset"),
    (["--dataset", "x"], "--train-iters"),
    (["--dry-run", "--world-size", "8", "--context-parallel-size", "3"], "give one of 1, 2, 4, 8"),
    (["--dry-run", "--world-size", "8", "--context-parallel-size", "16"], "give one of 1, 2, 4, 8"),
    (["--dry-run", "--world-size", "8", "--fsdp-size", "3"], "give one of 1, 2, 4, 8"),
    (["--dry-run", "--world-size", "16", "--context-parallel-size", "16"], "cannot share out 8 heads"),
    (["--dry-run", "--world-size", "8", "--global-batch-size", "12"], "the nearest that are: 8 or 16"),
])
def test_wrong_command_line(folder, capsys, flags, words):
    status = common.run_program(train.main, ["--init-from-hf-path", str(folder / "dense"), *flags])
    assert status == 2 and words in capsys.readouterr().err


def test_missing_configuration(tmp_path, capsys):
    argv = ["--init-from-hf-path", str(tmp_path), "--dry-run", "--world-size", "2"]
    assert common.run_program(train.main, argv) == 1
    assert "config.json" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name, flags", [
    ("30b-a3b", ["--world-size", 16, "--expert-parallel-size", 8, "--seq-length", 8192]),
    ("235b-a22b", ["--world-size", 256, "--expert-parallel-size", 8, "--seq-length", 16384, "--activation-offload"]),
])
def test_large_models_in_two_minutes(name, flags):
    began = time.perf_counter()
    done = shell("--init-from-hf-path", f"configs/qwen3-vl-{name}", *flags)
    seconds = time.perf_counter() - began
    print(f"\n{name}: {seconds:.0f} s\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    assert seconds < 120
