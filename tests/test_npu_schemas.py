"""Compare every torch_npu call in kernels_npu.py with the operation's schema in the released wheels, without torch_npu.

tests/npu/extract_schemas.py extracts the schemas to tests/npu/schemas.json.
"""
from __future__ import annotations

import ast
import json
import sys
import types
from pathlib import Path

import pytest
import torch

import kernels_npu
from common import UsageError

ROOT = Path(__file__).parent.parent
SCHEMAS = json.loads((ROOT / "tests/npu/schemas.json").read_text())
LITERALS = {"int": int, "float": (int, float), "bool": bool, "str": str}


def calls(source: str) -> list[tuple[str, ast.Call]]:
    """Return (operation, call) of every call of a torch_npu.npu_* operation."""
    found = []
    for node in ast.walk(ast.parse(source)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if name.startswith(("torch_npu.npu_", "torch.ops.npu.")):
            found.append((name.split(".")[-1], node))
    return found


def misfit(call: ast.Call, schema: torch._C.FunctionSchema) -> str | None:
    """Return how a call violates the schema, or None."""
    if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
        return "passes * or **, so that its arguments cannot be read: write them out"
    arguments = {a.name: a for a in schema.arguments}
    positional = [a.name for a in schema.arguments if not a.kwarg_only]
    if len(call.args) > len(positional):
        return f"passes {len(call.args)} arguments by position, {len(positional)} are allowed"
    given = dict(zip(positional, call.args, strict=False))
    for keyword in call.keywords:
        if keyword.arg not in arguments:
            return f"knows no argument {keyword.arg}"
        if keyword.arg in given:
            return f"is given {keyword.arg} twice"
        given[keyword.arg] = keyword.value
    missing = [name for name, a in arguments.items() if name not in given and not a.has_default_value()]
    if missing:
        return f"needs {', '.join(missing)}"
    for name, value in given.items():
        kind = str(arguments[name].type)
        is_list, literal = "List[" in kind, isinstance(value, (ast.List, ast.Tuple, ast.ListComp))
        if literal and not is_list or kind == "List[Tensor]" and not literal:
            return f"takes {kind} for {name}, got {ast.unparse(value)}"
        if isinstance(value, ast.Constant):
            optional, kind = kind.startswith("Optional["), kind.removeprefix("Optional[").removesuffix("]")
            good = optional if value.value is None else kind in LITERALS and isinstance(value.value, LITERALS[kind])
            if not good or isinstance(value.value, bool) and kind != "bool":
                return f"takes {kind} for {name}, got {value.value!r}"
    return None


def misfits(source: str, version: str) -> list[str]:
    """Return a line for each call that fits none of the operation's schemas in a version."""
    problems = []
    for name, call in calls(source):
        schemas = [text for key, text in SCHEMAS[version].items() if key.split(".")[0] == name]
        wrong = [misfit(call, torch._C.parse_schema(f"npu::{schema}")) for schema in schemas]
        wrong = wrong or ["is not in that wheel"]
        if None not in wrong:  # one of several overloads must fit
            problems.append(f"line {call.lineno}: {name} {wrong[0]}")
    return problems


@pytest.mark.parametrize("version", SCHEMAS)
def test_every_call_fits_its_schema(version):
    assert misfits((ROOT / "kernels_npu.py").read_text(), version) == []


def test_schemas_cover_the_called_operations():
    """Run tests/npu/extract_schemas.py again after adding a call."""
    called = {name for name, _ in calls((ROOT / "kernels_npu.py").read_text())}
    assert len(called) > 5
    for version, schemas in SCHEMAS.items():
        assert {key.split(".")[0] for key in schemas} == called, version


@pytest.mark.parametrize("wrong, message", [
    ("torch_npu.npu_rms_norm(x, w, eps=1e-6)", "line 1: npu_rms_norm knows no argument eps"),
    ("torch_npu.npu_rms_norm(x)", "line 1: npu_rms_norm needs gamma"),
    ("torch_npu.npu_rms_norm(x, w, gamma=w)", "line 1: npu_rms_norm is given gamma twice"),
    ("torch_npu.npu_rms_norm(x, w, 1e-6, True)",
     "line 1: npu_rms_norm passes 4 arguments by position, 3 are allowed"),
    ("torch_npu.npu_swiglu(x, dim='last')", "line 1: npu_swiglu takes int for dim, got 'last'"),
    ("torch_npu.npu_swiglu(*x)", "line 1: npu_swiglu passes * or **, so that its arguments cannot be read: write them"
     " out"),
    ("torch_npu.npu_grouped_matmul(x, [w], group_list=c)",
     "line 1: npu_grouped_matmul takes List[Tensor] for x, got x"),
    ("torch_npu.npu_grouped_matmul([x], [w], None)",
     "line 1: npu_grouped_matmul passes 3 arguments by position, 2 are allowed"),
    ("torch_npu.npu_moe_token_permute(x, [i])", "line 1: npu_moe_token_permute takes Tensor for indices, got [i]"),
    ("torch_npu.npu_moe_token_permute(x, i, padded_mode=0)",
     "line 1: npu_moe_token_permute takes bool for padded_mode, got 0"),
    ("torch_npu.npu_moe_teleport(x)", "line 1: npu_moe_teleport is not in that wheel"),
])
def test_misfits_finds_a_wrong_call(wrong, message):
    assert misfits(wrong, "2.13.0") == [message]


def test_misfits_finds_an_argument_of_newer_wheels():
    source = "torch_npu.npu_rotary_mul(x, c, s, rotate=r)"
    assert misfits(source, "2.13.0") == []
    assert misfits(source, "2.7.1") == ["line 1: npu_rotary_mul knows no argument rotate"]


def test_import_torch_npu_without_an_operation_names_it(monkeypatch):
    called = {name for name, _ in calls((ROOT / "kernels_npu.py").read_text())}
    monkeypatch.setattr(kernels_npu, "torch_npu", None, raising=False)
    for missing in called:
        old = types.ModuleType("torch_npu")
        old.__version__ = "2.1.0"
        vars(old).update(dict.fromkeys(called - {missing}))
        monkeypatch.setitem(sys.modules, "torch_npu", old)
        with pytest.raises(UsageError, match=rf"2\.1\.0 has no {missing}.*2\.7\.1\.post11"):
            kernels_npu.import_torch_npu()
