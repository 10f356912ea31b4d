"""The NPU backend with no NPU at hand: `make test-npu` runs this with the real torch_npu (stub.py) and no CANN.

1 and 2: schemas and shapes, by torch_npu's dispatcher and FakeTensorMode, gradients included. 3: the checks that
torch_npu's C++ makes before it launches a kernel, up to the launch. 4: numbers, on an emulated device (emulate.py).
None of this shows that a kernel of Ascend's does what its documentation says.
"""
from __future__ import annotations

import contextlib
import json
import os
import random
import signal
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

import infer  # noqa: E402
import kernels_npu  # noqa: E402
import train  # noqa: E402
from kernels_npu import Npu, Torch  # noqa: E402

ROOT = Path(__file__).parents[2]
SCHEMAS = json.loads((ROOT / "tests/npu/schemas.json").read_text())
VERSION = torch_npu.__version__.split("+")[0]
CPU = Torch(torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def hccl_is_gloo():
    emulate.gloo_as_hccl()


@pytest.fixture
def real(monkeypatch) -> Npu:
    """The backend on the device of the stub, which launches nothing."""
    monkeypatch.setattr(kernels_npu, "ops", kernels_npu.ops)
    return kernels_npu.select("npu", torch.float32)


@pytest.fixture
def npu(real) -> Npu:
    """The backend on the emulated device."""
    with emulate.Emulation():
        yield real


# ---- the operations ------------------------------------------------------------------------------------------------
# A case: tensors on the CPU, and what is done with them, the same for both backends.

LENGTHS = {"packed": [0, 5, 6, 13], "single": [0, 9], "equal": [0, 4, 8]}


def attention(form: str, cu_seqlens: list[int], causal: bool, heads: int = 6, groups: int = 3, size: int = 24):
    def run(ops, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention_implementation("eager" if ops is CPU else form)(q, k, v, cu_seqlens, causal)

    return [torch.randn(cu_seqlens[-1], n, size) for n in (heads, heads // groups, heads // groups)], run


def norm(rows: int):
    return [torch.randn(rows, 40) * 3, torch.rand(40)], lambda ops, x, weight: ops.rms_norm(x, weight, 1e-2)


def rotary(rows: int, heads: int):
    angle = torch.rand(rows, 12) * 6
    tables = [t(torch.cat((angle, angle), -1)) for t in (torch.cos, torch.sin)]  # float32, as the model makes them
    return [torch.randn(rows, heads, 24)], lambda ops, x: ops.rotary(x, *(t.to(x.device) for t in tables))


def swiglu(rows: int):
    return [torch.randn(rows, 24)], lambda ops, x: ops.swiglu(x)


def routed(tokens: int, experts: int, top_k: int, used: int | None = None) -> Tensor:
    """Experts of each token [T, k], none twice; `used`: of which the first so many only."""
    return torch.rand(tokens, used or experts).argsort(1)[:, :top_k]


def mixture(tokens: int, experts: int, top_k: int, used: int | None = None):
    """All of the mixture: permute, two grouped products with SwiGLU between, unpermute."""
    ids = routed(tokens, experts, top_k, used)

    def run(ops, x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        rows, where, counts = ops.moe_permute(x, ids.to(x.device), experts)
        hidden = ops.swiglu(ops.grouped_matmul(rows, gate_up, counts))
        return ops.moe_unpermute(ops.grouped_matmul(hidden, down, counts), where, weights)

    shapes = (tokens, 20), (experts, 20, 14), (experts, 7, 20)
    return [*(torch.randn(s) for s in shapes), torch.rand(tokens, top_k)], run


def product(counts: list[int]):
    def run(ops, x: Tensor, weight: Tensor) -> Tensor:
        return ops.grouped_matmul(x, weight, torch.tensor(counts, device=x.device))

    return [torch.randn(sum(counts), 20), torch.randn(len(counts), 20, 12)], run


CASES = {
    **{f"attention {form} {name} {'causal' if causal else 'full'}": (attention, form, lengths, causal)
       for form in ("eager", "sdpa", "flash_attention_2") for name, lengths in LENGTHS.items()
       for causal in (True, False)},
    "attention one key-value head": (attention, "flash_attention_2", [0, 3, 20], True, 8, 8, 32),
    # in turns of one and two tokens: more than one call takes, twice over
    "attention of 2100 sequences": (attention, "flash_attention_2", [(3 * i + 1) // 2 for i in range(2101)], True),
    "attention without groups": (attention, "flash_attention_2", [0, 3, 20], True, 4, 1, 16),
    "norm": (norm, 11), "norm of a row": (norm, 1), "norm of none": (norm, 0),
    "rotary": (rotary, 13, 6), "rotary one head": (rotary, 5, 1), "rotary many rows": (rotary, 1500, 2),
    "rotary none": (rotary, 0, 2),
    "swiglu": (swiglu, 11), "swiglu of none": (swiglu, 0),
    "product": (product, [3, 5, 1, 4]), "product, an expert without rows": (product, [0, 5, 0, 3, 0]),
    "product, all rows to one": (product, [0, 0, 7]), "product, one expert": (product, [6]),
    "product, no rows": (product, [0, 0, 0]), "product, one expert without rows": (product, [0]),
    "mixture": (mixture, 13, 7, 3), "mixture, one choice": (mixture, 13, 4, 1),
    "mixture, experts without tokens": (mixture, 9, 8, 2, 3), "mixture, one expert": (mixture, 5, 1, 1),
    "mixture, one token": (mixture, 1, 5, 2), "mixture, no tokens": (mixture, 0, 5, 2),
}


def make(case: str):
    torch.manual_seed(0)
    function, *arguments = CASES[case]
    return function(*arguments)


def run(ops: Torch, call, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The result and the gradient of each tensor, on the CPU in float32."""
    tensors = [t.to(dtype).to(ops.device).requires_grad_() for t in tensors]
    out = call(ops, *tensors)
    torch.manual_seed(1)
    grads = torch.autograd.grad(out, tensors, torch.randn(out.shape).to(out.device, out.dtype))
    return [t.detach().cpu().float() for t in (out, *grads)]


def check(ops: Npu, case: str, dtype: torch.dtype) -> None:
    """Result and gradients against the plain form in float32, from the same (rounded) numbers."""
    tensors, call = make(case)
    found = run(ops, call, tensors, dtype)
    expected = run(CPU, call, [t.to(dtype).float() for t in tensors], torch.float32)
    bound = 1e-5 if dtype == torch.float32 else 2e-2  # bf16: 8 bits, rounded several times
    for name, a, b in zip(("result", *(f"gradient {i}" for i in range(9))), found, expected, strict=False):
        assert a.shape == b.shape, name
        assert not b.numel() or (a - b).abs().max() <= bound * b.abs().max(), name  # nor NaN


# ---- level 1: schemas ----------------------------------------------------------------------------------------------


def test_the_stored_schemas_are_those_of_this_torch_npu():
    for name, text in SCHEMAS[VERSION].items():
        packet, _, overload = name.partition(".")
        registered = getattr(getattr(torch.ops.npu, packet), overload or "default")._schema
        assert torch._C.parse_schema(f"npu::{text}") == registered


def test_the_dispatcher_refuses_a_wrong_keyword(real):
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
    """Names of the operations that a backward goes through."""
    names, stack, seen = set(), [out.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.add(node.name())
            stack += [following for following, _ in node.next_functions]
    return names


@pytest.mark.parametrize("case", BACKWARDS)
def test_shapes_and_gradients_of_fake_tensors(real, case):
    """torch_npu's own shape functions and autograd formulas: a missing one would show as a warning, not an error."""
    tensors, call = make(case)
    expected = run(CPU, call, tensors, torch.float32)
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
    """Kernel's name -> a call of ours that gets as far as its launch."""
    real.causal_mask = on_npu(2048, 2048, dtype=torch.bool)  # its making would be the first launch
    q, k, x, counts = on_npu(8, 6, 16), on_npu(8, 2, 16), on_npu(8, 16), on_npu(4, dtype=torch.int64)
    ids, where = on_npu(8, 2, dtype=torch.int32), on_npu(16, dtype=torch.int32)
    return {
        "FlashAttentionVarLenScore": lambda: real.attention_flash(q, k, k, [0, 3, 8], True),
        "RmsNorm": lambda: real.rms_norm(x, x[0], 1e-6),
        "RotaryPositionEmbedding": lambda: real.rotary(q, x, x),
        "SwiGlu": lambda: real.swiglu(x),
        "MoeTokenPermute": lambda: real.moe_permute(x, ids, 4),
        "GroupedMatmul": lambda: real.grouped_matmul(x, on_npu(4, 16, 12), counts),
        "MoeTokenUnpermute": lambda: real.moe_unpermute(on_npu(16, 16), where, on_npu(8, 2)),
    }


@pytest.mark.parametrize("kernel", ["FlashAttentionVarLenScore", "RmsNorm", "RotaryPositionEmbedding", "SwiGlu",
                                    "MoeTokenPermute", "GroupedMatmul", "MoeTokenUnpermute"])
def test_our_calls_pass_the_host_checks(real, kernel):
    with pytest.raises(RuntimeError, match=rf"call aclnn{kernel}(V\d)? failed, error code is 561103"):
        launches(real)[kernel]()


def test_the_host_checks_refuse_what_they_know(real):
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
def test_operation_is_the_plain_one(npu, case, dtype):
    check(npu, case, dtype)


@pytest.mark.parametrize("top_k, ids", [(2, [[2, 0], [1, 2], [0, 1], [4, 2]]), (1, [[1], [0], [1], [1]])])
def test_permutation_and_counts_are_the_plain_ones(npu, top_k, ids):
    x = torch.randn(4, 6)
    expected = CPU.moe_permute(x, torch.tensor(ids), 5)
    found = npu.moe_permute(x.npu(), torch.tensor(ids).npu(), 5)
    for a, b in zip(found, expected, strict=True):
        assert a.cpu().tolist() == b.tolist()
    assert found[2].dtype == torch.int64


def test_the_fused_operations_run(real):
    """And not the plain forms, which would pass every comparison."""
    with emulate.Emulation() as device:
        for case in BACKWARDS:
            tensors, call = make(case)
            run(real, call, tensors, torch.float32)
    forward = kernels_npu.NPU_OPERATIONS
    ran = {name.removeprefix("_") for name in device.ran}
    assert set(forward) <= ran
    assert {"npu_fusion_attention_grad", "npu_rms_norm_backward", "npu_swiglu_backward"} <= ran
    assert device.ran["npu_grouped_matmul"] >= 9  # forward, and backward for rows and weight: 3 products


# Each is a mistake that has been made with these operations: a check must fail for it.

def patched(name: str, **changes):
    """torch_npu's operation with arguments changed on the way: new values, or functions of the old ones."""
    original = getattr(torch_npu, name)

    def call(*args, **kwargs):
        for key, value in changes.items():
            kwargs[key] = value(kwargs.get(key)) if callable(value) else value
        return original(*args, **kwargs)

    return name, call


def wrong_way_round(*args, permute=torch_npu.npu_moe_token_permute, **kwargs):
    rows, where = permute(*args, **kwargs)
    return rows, where.argsort().int()


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
    "epsilon left out": (patched("npu_rms_norm", epsilon=1e-6), "norm"),  # the operation's own
    "counts passed as sums": (patched("npu_grouped_matmul", group_list_type=0), "product"),
    "sums passed as counts": (patched("npu_grouped_matmul", group_list=lambda c: c.cumsum(0)), "product"),
    "wrong group_type": (patched("npu_grouped_matmul", group_type=lambda t: 2 - t), "product"),
    "several outputs": (patched("npu_grouped_matmul", split_item=0), "product"),
    "permutation the wrong way round": (("npu_moe_token_permute", wrong_way_round), "mixture"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(npu, monkeypatch, fault):
    (name, wrong), case = FAULTS[fault]
    case += " causal" * case.startswith("attention")
    check(npu, case, torch.float32)
    monkeypatch.setattr(torch_npu, name, wrong)
    with pytest.raises((AssertionError, RuntimeError)) as found:
        check(npu, case, torch.float32)
    assert "561103" not in str(found.value)  # found on the emulated device, not for want of one


@pytest.mark.parametrize("level", ["emulated", "fake"])
def test_a_missing_backward_is_found(real, monkeypatch, level):
    class Forward:
        @staticmethod
        def apply(x, weight, counts):
            return torch_npu.npu_grouped_matmul(
                [x], [weight], group_list=counts, split_item=2, group_type=0, group_list_type=1)[0]

    monkeypatch.setattr(kernels_npu, "_NpuGroupedMatmul", Forward)
    with pytest.raises((RuntimeError, AttributeError, UserWarning), match="differentiated|NoneType|autograd kernel"):
        if level == "fake":
            test_shapes_and_gradients_of_fake_tensors(real, "product")
        else:
            with emulate.Emulation():
                check(real, "product", torch.float32)


def test_what_is_not_emulated_is_an_error(npu):
    x = torch.randn(4, 8).npu()
    with pytest.raises(NotImplementedError, match="npu::npu_gelu has no reference"):
        torch.ops.npu.npu_gelu(x, approximate="none")
    with pytest.raises(RuntimeError, match="on the CPU"):
        torch.add(x, torch.ones(8))


def test_transformers_own_model_gives_its_loss(npu):
    """A check of the bench itself, on a model that is not ours."""
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
    """A dense and a mixture model that two ranks can share out, and rows with and without pictures."""
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
        pictures = [f"{i}.png"] * (i % 3 > 0)
        talk = {"user": "<image>" * len(pictures) + "what is " + "this " * i, "assistant": "a red " + "boat " * (9 - i)}
        rows.append({"messages": [{"role": r, "content": c} for r, c in talk.items()], "images": pictures})
    (path / "rows.json").write_text(json.dumps(rows))
    return path


@pytest.fixture(autouse=True)
def leave_the_process_as_it_was(monkeypatch):
    monkeypatch.setattr(kernels_npu, "ops", kernels_npu.ops)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def flags(folder: Path, save: Path, model: str, device: str, *more) -> list[str]:
    return ["--init-from-hf-path", str(folder / model), "--dataset", str(folder / "rows.json"), "--save", str(save),
            "--train-iters", str(ITERATIONS), "--device", device, "--lr", "1e-3", "--num-workers", "0", "--no-shuffle",
            "--global-batch-size", "2", *(more or ["--fp32"])]


def metrics(save: Path) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each iteration."""
    lines = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
    return [(m["loss"], m["grad_norm"]) for m in lines]


def same(found: list[tuple], expected: list[tuple], tolerance: float = 1e-4) -> bool:
    return len(found) == len(expected) and all(
        a == pytest.approx(b, rel=tolerance) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def on_cpu(folder) -> dict[str, list[tuple]]:
    """Model -> what train.py --device cpu logs, on one rank."""
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
def test_training_equals_the_cpu(folder, tmp_path, on_cpu, model, more):
    with emulate.Emulation() as device:
        train.main(flags(folder, tmp_path, model, "npu", "--fp32", *more))
    assert same(metrics(tmp_path), on_cpu[model])
    assert bool(device.ran.get("npu_grouped_matmul")) == (model == "moe" and not more)


def test_training_in_bf16_is_near(folder, tmp_path, on_cpu):
    """The device's own choice of type. Eight bits are left of each number: a fault would show as more than 5 %."""
    with emulate.Emulation():
        train.main(flags(folder, tmp_path, "moe", "npu", "--bf16"))
    assert same(metrics(tmp_path), on_cpu["moe"], tolerance=0.05)


def test_a_fault_shows_in_training(folder, tmp_path, on_cpu, monkeypatch):
    monkeypatch.setattr(torch_npu, *FAULTS["permutation the wrong way round"][0])
    with emulate.Emulation():
        train.main(flags(folder, tmp_path, "moe", "npu"))
    assert not same(metrics(tmp_path), on_cpu["moe"])


def emulated(*argv, ranks: int = 1) -> subprocess.CompletedProcess:
    """A program of ours on the emulated device, in processes of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    # the launcher itself needs no torch_npu: each rank fetches it
    env = {k: v for k, v in os.environ.items() if k not in ("LD_LIBRARY_PATH", "PYTHONPATH")}
    result = subprocess.run([sys.executable, *launcher, ROOT / "tests/npu/emulate.py", *map(str, argv)], cwd=ROOT,
                            env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return result


@pytest.mark.parametrize("more", [["--expert-parallel-size", "2"], ["--context-parallel-size", "2"]], ids=["EP", "CP"])
def test_two_ranks_equal_one(folder, tmp_path, on_cpu, more):
    """FSDP2 over two ranks with expert or context parallelism; then on from the checkpoint of the second iteration."""
    save = tmp_path / "whole"
    emulated("train.py", *flags(folder, save, "moe", "npu", "--fp32", "--save-interval", "2", *more), ranks=2)
    assert same(metrics(save), on_cpu["moe"])
    again = tmp_path / "again"
    load = "--load", str(save / "iter_0000002")
    if "--expert-parallel-size" in more:
        emulated("train.py", *flags(folder, again, "moe", "npu", "--fp32", *load, *more), ranks=2)
    else:  # what an NPU has saved, a CPU reads
        train.main(flags(folder, again, "moe", "cpu", "--fp32", *load))
    assert same(metrics(again), on_cpu["moe"][2:])


def test_the_checkpoint_of_one_rank(folder, tmp_path, on_cpu):
    """Saved on npu, loaded on npu, random states included, and on from there."""
    with emulate.Emulation():
        train.main(flags(folder, tmp_path / "whole", "dense", "npu", "--fp32", "--save-interval", "2"))
        random.seed(5)
        load = "--load", str(tmp_path / "whole/iter_0000002")
        train.main(flags(folder, tmp_path / "again", "dense", "npu", "--fp32", *load))
    assert metrics(tmp_path / "again") == metrics(tmp_path / "whole")[2:]


def test_answers_are_those_of_the_cpu(folder, capsys):
    """infer.py: inference mode, the cache, sampling."""
    answers = []
    for device, there in (("cpu", contextlib.nullcontext()), ("npu", emulate.Emulation())):
        with there:
            infer.main(["--model", str(folder / "moe"), "--image", str(folder / "1.png"), "--prompt", "What is this?",
                        "--max-new-tokens", "9", "--dtype", "float32", "--device", device])
        answers.append(capsys.readouterr().out)
    assert answers[1] == answers[0] != ""


def test_the_users_own_check():
    """`python kernels_npu.py` is the first thing that someone with an NPU runs."""
    out = emulated("kernels_npu.py", "--device", "npu").stdout
    assert "all operations are right" in out and "OFF" not in out
