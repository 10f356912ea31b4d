"""Test the NPU backend without an NPU: `make test-npu` runs this with the real torch_npu (stub.py) and no CANN.

1 and 2: schemas and shapes, by torch_npu's dispatcher and FakeTensorMode, gradients included. 3: the checks of
torch_npu's C++ before it launches a kernel. 4: numbers, on an emulated device (emulate.py). No test shows that a kernel
of Ascend does what its documentation says.
"""
from __future__ import annotations

import contextlib
import inspect
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

torch_npu = pytest.importorskip("torch_npu", reason="needs torch_npu: make test-npu")

import emulate  # noqa: E402
import tiny  # noqa: E402
from helpers import read_metrics, train_argv  # noqa: E402

import infer  # noqa: E402
import kernels_npu  # noqa: E402
import parallel  # noqa: E402
import train  # noqa: E402
from kernels_npu import Npu, Torch  # noqa: E402
from tools import check_kernels  # noqa: E402
from tools.check_kernels import attention, grouped_matmul, mixture, rms_norm, rotary, swiglu  # noqa: E402

ROOT = Path(__file__).parents[2]
SCHEMAS = json.loads((ROOT / "tests/npu/schemas.json").read_text())
VERSION = torch_npu.__version__.split("+")[0]
CPU = Torch(torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def hccl_is_gloo():
    emulate.gloo_as_hccl()


@pytest.fixture
def real(monkeypatch) -> Npu:
    """Select the backend on the stub's device, which launches nothing."""
    monkeypatch.setattr(kernels_npu, "ops", kernels_npu.ops)
    return kernels_npu.select("npu", torch.float32)


@pytest.fixture
def npu(real) -> Npu:
    """Select the backend on the emulated device."""
    with emulate.Emulation():
        yield real


# ---- the operations ------------------------------------------------------------------------------------------------

LENGTHS = {"packed": [0, 5, 6, 13], "single": [0, 9], "equal": [0, 4, 8]}
CASES = {  # name: (function of tools/check_kernels.py, its arguments)
    **{f"attention {name} {lengths} {'causal' if causal else 'full'}":
       (attention, name, 6, 2, 24, cu_seqlens, causal)
       for name in ("eager", "sdpa", "flash_attention_2") for lengths, cu_seqlens in LENGTHS.items()
       for causal in (True, False)},
    "attention one key-value head": (attention, "flash_attention_2", 8, 1, 32, [0, 3, 20], True),
    # lengths alternate between one and two; one call takes 1024 sequences
    "attention of 2100 sequences": (
        attention, "flash_attention_2", 6, 2, 24, [(3 * i + 1) // 2 for i in range(2101)], True),
    "attention without groups": (attention, "flash_attention_2", 4, 4, 16, [0, 3, 20], True),
    "norm": (rms_norm, 11, 40), "norm of a row": (rms_norm, 1, 40), "norm of none": (rms_norm, 0, 40),
    "rotary": (rotary, 13, 6, 24, False), "rotary in x's type": (rotary, 13, 6, 24, True),
    "rotary one head": (rotary, 5, 1, 24, False), "rotary many rows": (rotary, 1500, 2, 24, False),
    "rotary none": (rotary, 0, 2, 24, False),
    "swiglu": (swiglu, 11, 24), "swiglu of none": (swiglu, 0, 24),
    "product": (grouped_matmul, [3, 5, 1, 4], 20, 12),
    "product, an expert without rows": (grouped_matmul, [0, 5, 0, 3, 0], 20, 12),
    "product, all rows to one": (grouped_matmul, [0, 0, 7], 20, 12),
    "product, one expert": (grouped_matmul, [6], 20, 12),
    "product, no rows": (grouped_matmul, [0, 0, 0], 20, 12),
    "product, one expert without rows": (grouped_matmul, [0], 20, 12),
    "mixture": (mixture, 13, 7, 3, 20, 7), "mixture, one choice": (mixture, 13, 4, 1, 20, 7),
    "mixture, experts without tokens": (mixture, 9, 8, 2, 20, 7, 3), "mixture, one expert": (mixture, 5, 1, 1, 20, 7),
    "mixture, one token": (mixture, 1, 5, 2, 20, 7), "mixture, no tokens": (mixture, 0, 5, 2, 20, 7),
}


def make(name: str) -> check_kernels.Case:
    torch.manual_seed(0)
    function, *arguments = CASES[name]
    return function(*arguments)


def check(ops: Npu, name: str, dtype: torch.dtype) -> None:
    """Compare result and gradients with the plain implementation in float32 on the same rounded numbers."""
    bound = 1e-5 if dtype == torch.float32 else check_kernels.BOUNDS[dtype]
    assert check_kernels.error_of(ops, make(name), dtype) <= bound  # False for NaN


# ---- level 1: schemas ----------------------------------------------------------------------------------------------


def test_stored_schemas_equal_those_of_this_torch_npu():
    for name, text in SCHEMAS[VERSION].items():
        packet, _, overload = name.partition(".")
        registered = getattr(getattr(torch.ops.npu, packet), overload or "default")._schema
        assert torch._C.parse_schema(f"npu::{text}") == registered


def test_dispatcher_refuses_a_wrong_keyword(real):
    x = torch.empty(2, 4, device="npu")
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'eps'"):
        torch_npu.npu_rms_norm(x, x[0], eps=1e-6)


# ---- level 2: shapes and gradients of fake tensors -----------------------------------------------------------------

BACKWARDS = {
    "attention flash_attention_2 packed causal": {"NpuFusionAttentionBackward"}, "norm": {"NpuRmsNormBackward"},
    "rotary": {"NpuRotaryMulBackward"}, "swiglu": {"NpuSwigluBackward"}, "product": {"_NpuGroupedMatmulBackward"},
    "mixture": {"NpuMoeTokenPermuteBackward", "_NpuGroupedMatmulBackward", "NpuSwigluBackward",
                "NpuMoeTokenUnpermuteBackward"},
}


def graph(out: Tensor) -> set[str]:
    """Return the names of the operations in the backward of a tensor."""
    names, stack, seen = set(), [out.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            stack += [next_node for next_node, _ in node.next_functions]
    return names


@pytest.mark.parametrize("case", BACKWARDS)
def test_operation_on_fake_tensors_has_the_shapes_and_gradients(real, case):
    """Use torch_npu's shape functions and autograd formulas; a missing formula is a warning, not an error."""
    tensors, call = make(case)
    expected = check_kernels.run_case(CPU, (tensors, call), torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        fakes = [torch.empty(t.shape, device="npu", requires_grad=True) for t in tensors]
        out = call(real, *fakes)
        grads = torch.autograd.grad(out, fakes, torch.empty_like(out))
        assert [t.shape for t in (out, *grads)] == [t.shape for t in expected]
        assert all(t.device.type == "npu" and t.dtype == torch.float32 for t in (out, *grads))
        found = graph(out)
    for name in BACKWARDS[case]:
        assert any(name in f for f in found), found


# ---- level 3: torch_npu's checks before a launch -------------------------------------------------------------------


def on_npu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="npu")


def launches(real: Npu) -> dict:
    """Return {kernel: one of our calls that reaches its launch}."""
    real.causal_mask = on_npu(2048, 2048, dtype=torch.bool)  # otherwise building the mask would be the first launch
    q, k, x, counts = on_npu(8, 6, 16), on_npu(8, 2, 16), on_npu(8, 16), on_npu(4, dtype=torch.int64)
    ids, slot_to_row = on_npu(8, 2, dtype=torch.int32), on_npu(16, dtype=torch.int32)
    return {
        "FlashAttentionVarLenScore": lambda: real.attention_flash(q, k, k, [0, 3, 8], True),
        "RmsNorm": lambda: real.rms_norm(x, x[0], 1e-6),
        "RotaryPositionEmbedding": lambda: real.rotary(q, x, x),
        "SwiGlu": lambda: real.swiglu(x),
        "MoeTokenPermute": lambda: real.moe_permute(x, ids, 4),
        "GroupedMatmul": lambda: real.grouped_matmul(x, on_npu(4, 16, 12), counts),
        "MoeTokenUnpermute": lambda: real.moe_unpermute(on_npu(16, 16), slot_to_row, on_npu(8, 2)),
    }


@pytest.mark.parametrize("kernel", ["FlashAttentionVarLenScore", "RmsNorm", "RotaryPositionEmbedding", "SwiGlu",
                                    "MoeTokenPermute", "GroupedMatmul", "MoeTokenUnpermute"])
def test_operation_passes_the_host_checks(real, kernel):
    with pytest.raises(RuntimeError, match=rf"call aclnn{kernel}(V\d)? failed, error code is 561103"):
        launches(real)[kernel]()


def test_host_checks_refuse_wrong_arguments(real):
    q, x, counts = on_npu(8, 6, 16), on_npu(8, 16), on_npu(4, dtype=torch.int64)
    lengths = {"actual_seq_qlen": [8], "actual_seq_kvlen": [8]}
    for message, call in {
        "input_layout should be": lambda: torch_npu.npu_fusion_attention(q, q, q, 6, "THD", **lengths),
        "actual_seq_qlen and actual_seq_kvlen": lambda: torch_npu.npu_fusion_attention(q, q, q, 6, "TND"),
        "sparse_mode value": lambda: torch_npu.npu_fusion_attention(q, q, q, 6, "TND", sparse_mode=9, **lengths),
        "group_type": lambda: torch_npu.npu_grouped_matmul([x], [on_npu(4, 16, 2)], group_list=counts, split_item=2),
        "same device": lambda: torch_npu.npu_rms_norm(x, torch.ones(16)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


# ---- level 4: numbers on the emulated device -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_operation_equals_the_plain_one(npu, case, dtype):
    check(npu, case, dtype)


@pytest.mark.parametrize("top_k, ids", [(2, [[2, 0], [1, 2], [0, 1], [4, 2]]), (1, [[1], [0], [1], [1]])])
def test_moe_permute_equals_the_plain_one(npu, top_k, ids):
    x = torch.randn(4, 6)
    expected = CPU.moe_permute(x, torch.tensor(ids), 5)
    found = npu.moe_permute(x.npu(), torch.tensor(ids).npu(), 5)
    for a, b in zip(found, expected, strict=True):
        assert a.cpu().tolist() == b.tolist()
    assert found[2].dtype == torch.int64


def test_operations_run_the_fused_kernels(real):
    """The plain implementations would pass every comparison."""
    with emulate.Emulation() as device:
        for case in BACKWARDS:
            check_kernels.run_case(real, make(case), torch.float32)
    ran = {name.removeprefix("_") for name in device.ran}
    assert set(kernels_npu.NPU_OPERATIONS) <= ran
    assert {"npu_fusion_attention_grad", "npu_rms_norm_backward", "npu_swiglu_backward"} <= ran
    assert device.ran["npu_grouped_matmul"] >= 9  # three products, each forward and backward for rows and weight


# Faults that have been made with these operations; the comparison must find each.

def patched(name: str, **changes):
    """Return torch_npu's operation with changed arguments: new values, or functions of the old values."""
    original = getattr(torch_npu, name)

    def call(*args, **kwargs):
        for key, value in changes.items():
            kwargs[key] = value(kwargs.get(key)) if callable(value) else value
        return original(*args, **kwargs)

    return name, call


def inverted(*args, permute=torch_npu.npu_moe_token_permute, **kwargs):
    rows, slot_to_row = permute(*args, **kwargs)
    return rows, slot_to_row.argsort().int()


FAULTS = {
    "inverted mask": (patched("npu_fusion_attention", atten_mask=lambda m: ~m), "attention flash_attention_2 packed"),
    "no mask": (patched("npu_fusion_attention", atten_mask=None), "attention flash_attention_2 packed"),
    "leading 0": (patched("npu_fusion_attention", actual_seq_qlen=lambda e: [0, *e],
                          actual_seq_kvlen=lambda e: [0, *e]), "attention flash_attention_2 packed"),
    "lengths not summed": (patched("npu_fusion_attention", actual_seq_qlen=lambda e: [5, 1, 7],
                                   actual_seq_kvlen=lambda e: [5, 1, 7]), "attention flash_attention_2 packed"),
    "sequences as one": (patched("npu_fusion_attention", actual_seq_qlen=lambda e: e[-1:],
                                 actual_seq_kvlen=lambda e: e[-1:]), "attention flash_attention_2 packed"),
    "scale left out": (patched("npu_fusion_attention", scale=1.0), "attention flash_attention_2 packed"),
    "epsilon left out": (patched("npu_rms_norm", epsilon=1e-6), "norm"),  # the operation's default
    "counts passed as sums": (patched("npu_grouped_matmul", group_list_type=0), "product"),
    "sums passed as counts": (patched("npu_grouped_matmul", group_list=lambda c: c.cumsum(0)), "product"),
    "wrong group_type": (patched("npu_grouped_matmul", group_type=lambda t: 2 - t), "product"),
    "several outputs": (patched("npu_grouped_matmul", split_item=0), "product"),
    "inverted permutation": (("npu_moe_token_permute", inverted), "mixture"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds_a_fault(npu, monkeypatch, fault):
    (name, wrong), case = FAULTS[fault]
    case += " causal" * case.startswith("attention")
    check(npu, case, torch.float32)
    monkeypatch.setattr(torch_npu, name, wrong)
    with pytest.raises((AssertionError, RuntimeError)) as found:
        check(npu, case, torch.float32)
    assert "561103" not in str(found.value)  # not an error of the missing device


@pytest.mark.parametrize("level", ["emulated", "fake"])
def test_check_finds_a_missing_backward(real, monkeypatch, level):
    class Forward:
        @staticmethod
        def apply(x, weight, counts):
            return torch_npu.npu_grouped_matmul(
                [x], [weight], group_list=counts, split_item=2, group_type=0, group_list_type=1)[0]

    monkeypatch.setattr(kernels_npu, "_NpuGroupedMatmul", Forward)
    with pytest.raises((RuntimeError, AttributeError, UserWarning), match="differentiated|NoneType|autograd kernel"):
        if level == "fake":
            test_operation_on_fake_tensors_has_the_shapes_and_gradients(real, "product")
        else:
            with emulate.Emulation():
                check(real, "product", torch.float32)


def test_emulation_refuses_other_operations(npu):
    x = torch.randn(4, 8).npu()
    with pytest.raises(NotImplementedError, match="npu::npu_gelu has no reference"):
        torch.ops.npu.npu_gelu(x, approximate="none")
    with pytest.raises(RuntimeError, match="on the CPU"):
        torch.add(x, torch.ones(8))


def test_emulation_runs_the_model_of_transformers(npu):
    """Test the emulation with a model that is not ours."""
    raw = tiny.config_dict(moe=True)
    sample = tiny.row([9, ("image", 4, 6), 5])
    losses, grads = [], []
    for device in ("cpu", "npu"):
        hf = tiny.hf_model(raw).to(device)
        inputs = {k: v.to(device) for k, v in tiny.hf_inputs(sample).items()}
        loss = hf(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        losses.append(loss.item())
        grads.append({n: p.grad.cpu() for n, p in hf.named_parameters() if p.grad is not None})
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grads[1][name], grad, atol=1e-5 * max(1.0, float(grad.abs().max()))), name


# ---- programs on the emulated device -------------------------------------------------------------------------------

ITERATIONS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a directory with a dense and a mixture-of-experts model, and rows with and without images."""
    import numpy as np
    from PIL import Image

    path = tmp_path_factory.mktemp("npu")
    for name in ("dense", "moe"):
        raw = tiny.config_dict(moe=name == "moe")
        raw["vision_config"]["num_heads"] = 4
        if name == "moe":
            raw["text_config"]["num_experts"] = 6
        tiny.hf_dir(path / name, raw, tiny.hf_model(raw))
    rng, rows = np.random.default_rng(0), []
    for i in range(2 * ITERATIONS):
        Image.fromarray(rng.integers(0, 256, (40 + 9 * i, 60, 3), dtype=np.uint8)).save(path / f"{i}.png")
        images = [f"{i}.png"] * (i % 3 > 0)
        turns = {"user": "<image>" * len(images) + "what is " + "this " * i, "assistant": "a red " + "boat " * (9 - i)}
        rows.append({"messages": [{"role": r, "content": c} for r, c in turns.items()], "images": images})
    (path / "rows.json").write_text(json.dumps(rows))
    return path


@pytest.fixture(autouse=True)
def restore_ops(monkeypatch):
    monkeypatch.setattr(kernels_npu, "ops", kernels_npu.ops)


def flags(folder: Path, save: Path, model: str, device: str, *more) -> list[str]:
    return train_argv(folder / model, folder / "rows.json", save, "--device", device, "--global-batch-size", 2,
                      *(more or ["--fp32"]), iters=ITERATIONS)


def metrics(save: Path) -> list[tuple[float, float]]:
    """Return (loss, gradient norm) of each iteration."""
    return [(m["loss"], m["grad_norm"]) for m in read_metrics(save)]


def same(found: list[tuple], expected: list[tuple], tolerance: float = 1e-4) -> bool:
    return len(found) == len(expected) and all(
        a == pytest.approx(b, rel=tolerance) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def on_cpu(folder) -> dict[str, list[tuple]]:
    """Return {model: metrics of train.py --device cpu on one rank}."""
    found = {}
    for model in ("dense", "moe"):
        train.main(flags(folder, folder / f"cpu {model}", model, "cpu"))
        found[model] = metrics(folder / f"cpu {model}")
        assert len(found[model]) == ITERATIONS
    return found


@pytest.mark.parametrize("model, more", [
    ("dense", ["--no-init-model-with-meta-device"]), ("moe", []),
    ("moe", ["--no-use-npu-fused-moe", "--text-attn-implementation", "sdpa",
                                         "--vision-attn-implementation", "eager", "--activation-offload"])])
def test_train_equals_the_cpu(folder, tmp_path, on_cpu, model, more):
    with emulate.Emulation() as device:
        train.main(flags(folder, tmp_path, model, "npu", "--fp32", *more))
    assert same(metrics(tmp_path), on_cpu[model])
    assert bool(device.ran.get("npu_grouped_matmul")) == (model == "moe" and not more)


def test_train_in_bf16_is_close(folder, tmp_path, on_cpu):
    """Numbers have 8 bits; a fault would change the loss by more than 5 %."""
    with emulate.Emulation():
        train.main(flags(folder, tmp_path, "moe", "npu", "--bf16"))
    assert same(metrics(tmp_path), on_cpu["moe"], tolerance=0.05)


def test_train_cpu_offload_equals_the_device(folder, tmp_path, monkeypatch):
    """Keep parameters, gradients and optimizer state on the host; save and resume from there."""
    devices, clip = set(), parallel.clip_gradients

    def record(parameters, *args):
        devices.update(t.device.type for p in parameters for t in (p, p.grad) if t is not None)
        return clip(parameters, *args)

    monkeypatch.setattr(parallel, "clip_gradients", record)
    found = {}
    on_host = ["--cpu-offload", "--save-interval", 2, "--async-save", "--no-init-model-with-meta-device"]
    resumed = ["--cpu-offload", "--load", tmp_path / "host/iter_0000002"]
    for name, more in {"device": [], "host": on_host, "resumed": resumed}.items():
        devices.clear()
        with emulate.Emulation():
            train.main(flags(folder, tmp_path / name, "moe", "npu", "--fp32", *more))
        assert devices == {"npu" if name == "device" else "cpu"}
        found[name] = metrics(tmp_path / name)
    assert same(found["host"], found["device"], 1e-5)
    assert found["resumed"] == found["host"][2:]


def test_make_profiler_takes_torch_npus(real, tmp_path, monkeypatch):
    signature = inspect.signature(torch_npu.profiler.profile)
    monkeypatch.setattr(torch_npu.profiler, "profile", lambda **settings: settings)  # the real one writes files
    settings = train.make_profiler(str(tmp_path), 2, 3)
    signature.bind(**settings)
    actions = [settings["schedule"](step).name for step in range(4)]
    assert actions == ["WARMUP", "RECORD", "RECORD_AND_SAVE", "NONE"]


def test_train_shows_a_fault(folder, tmp_path, on_cpu, monkeypatch):
    monkeypatch.setattr(torch_npu, *FAULTS["inverted permutation"][0])
    with emulate.Emulation():
        train.main(flags(folder, tmp_path, "moe", "npu"))
    assert not same(metrics(tmp_path), on_cpu["moe"])


def emulated(*argv, ranks: int = 1) -> subprocess.CompletedProcess:
    """Run one of our programs on the emulated device, in subprocesses."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    # the launcher runs without torch_npu, which emulate.py adds in each rank
    env = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "PYTHONPATH")}
    result = subprocess.run([sys.executable, *launcher, ROOT / "tests/npu/emulate.py", *map(str, argv)], cwd=ROOT,
                            env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result


@pytest.mark.parametrize("more", [
    ["--expert-parallel-size", "2"], ["--context-parallel-size", "2"],
    ["--expert-parallel-size", "2", "--cpu-offload", "--deterministic", "--synchronize-per-layer"]],
    ids=["EP", "CP", "EP on the host"])
def test_train_on_two_ranks_equals_one(folder, tmp_path, on_cpu, more):
    """Use FSDP2 with expert or context parallelism; then resume from the second iteration."""
    save = tmp_path / "uninterrupted"
    emulated("train.py", *flags(folder, save, "moe", "npu", "--fp32", "--save-interval", "2", *more), ranks=2)
    assert same(metrics(save), on_cpu["moe"])
    again = tmp_path / "again"
    load = "--load", str(save / "iter_0000002")
    if "--expert-parallel-size" in more:
        emulated("train.py", *flags(folder, again, "moe", "npu", "--fp32", *load, *more), ranks=2)
    else:  # a CPU loads the checkpoint of an NPU
        train.main(flags(folder, again, "moe", "cpu", "--fp32", *load))
    assert same(metrics(again), on_cpu["moe"][2:])


def test_train_resumes_on_one_rank(folder, tmp_path):
    """Restore the random states too."""
    with emulate.Emulation():
        train.main(flags(folder, tmp_path / "uninterrupted", "dense", "npu", "--fp32", "--save-interval", "2"))
        random.seed(5)
        load = "--load", str(tmp_path / "uninterrupted/iter_0000002")
        train.main(flags(folder, tmp_path / "again", "dense", "npu", "--fp32", *load))
    assert metrics(tmp_path / "again") == metrics(tmp_path / "uninterrupted")[2:]


def test_infer_equals_the_cpu(folder, capsys):
    answers = []
    for device, context in (("cpu", contextlib.nullcontext()), ("npu", emulate.Emulation())):
        with context:
            infer.main(["--model", str(folder / "moe"), "--image", str(folder / "1.png"), "--prompt", "What is this?",
                        "--max-new-tokens", "9", "--dtype", "float32", "--device", device])
        answers.append(capsys.readouterr().out)
    assert answers[1] == answers[0] != ""


def test_check_kernels_finds_no_error():
    out = emulated("kernels_npu.py", "--report", "--device", "npu").stdout
    assert "all operations are right" in out and "OFF" not in out
    assert f"torch_npu {VERSION}" in out and "npu:0 " in out and "TASK_QUEUE_ENABLE=0" in out
