"""The map of the files holds: who may import whom, and that every flag has a help text."""
from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {  # the README's map
    "kernels_npu": set(),
    "data": set(),
    "model": {"kernels_npu"},
    "parallel": {"kernels_npu", "model"},
    "convert": {"kernels_npu", "model", "parallel"},
    "infer": {"kernels_npu", "data", "model", "convert"},
    "train": {"kernels_npu", "data", "model", "parallel", "convert"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_follow_the_map(name):
    found = imports(ROOT / f"{name}.py")
    assert found & MAY_IMPORT.keys() <= MAY_IMPORT[name]
    assert "transformers" not in found
    assert "torch_npu" not in found or name == "kernels_npu"


def test_there_are_seven_files():
    assert {p.stem for p in ROOT.glob("*.py")} == MAY_IMPORT.keys()


@pytest.mark.parametrize("program", ["train.py", "convert.py", "infer.py", "data.py"])
def test_help(program):
    result = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and not result.stderr


def test_every_flag_of_train_has_help_and_stands_in_a_group(monkeypatch):
    parsers = []
    kernels_npu = importlib.import_module("kernels_npu")
    train = importlib.import_module("train")

    def keep(self, argv):
        parsers.append(self)
        raise kernels_npu.UsageError("kept")

    monkeypatch.setattr(kernels_npu.Parser, "parse_args", keep)
    with pytest.raises(kernels_npu.UsageError):
        train.parse_args([])
    actions = [a for a in parsers[0]._actions if a.dest != "help"]
    grouped = {id(a) for group in parsers[0]._action_groups[2:] for a in group._group_actions}
    assert len(actions) > 60
    assert not [a.option_strings for a in actions if not a.help or id(a) not in grouped]
