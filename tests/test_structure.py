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
    "common": set(),
    "kernels_npu": {"common"},
    "data": {"common"},
    "model": {"common", "kernels_npu"},
    "parallel": {"common", "kernels_npu", "model"},
    "convert": {"common", "kernels_npu", "model", "parallel"},
    "infer": {"common", "kernels_npu", "data", "model", "convert"},
    "train": {"common", "kernels_npu", "data", "model", "parallel", "convert"},
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


def test_mapped_files_exist():
    assert MAY_IMPORT.keys() <= {p.stem for p in ROOT.glob("*.py")}


@pytest.mark.parametrize("program", ["train.py", "convert.py", "infer.py", "data.py"])
def test_help(program):
    result = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and not result.stderr


def test_every_flag_of_train_has_help_and_stands_in_a_group(monkeypatch):
    parsers = []
    common = importlib.import_module("common")
    train = importlib.import_module("train")

    def keep(self, argv):
        parsers.append(self)
        raise common.UsageError("kept")

    monkeypatch.setattr(common.Parser, "parse_args", keep)
    with pytest.raises(common.UsageError):
        train.parse_args([])
    actions = [a for a in parsers[0]._actions if a.dest != "help"]
    grouped = {id(a) for group in parsers[0]._action_groups[2:] for a in group._group_actions}
    assert len(actions) > 60
    assert not [a.option_strings for a in actions if not a.help or id(a) not in grouped]
