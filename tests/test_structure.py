"""Test what the README promises about the files: imports, flags, names, and plain language."""
from __future__ import annotations

import argparse
import ast
import importlib
import io
import re
import subprocess
import sys
import textwrap
import tokenize
import types
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {  # the README's map
    "common": set(),
    "kernels_npu": {"common"},
    "data": {"common"},
    "model": {"common", "kernels_npu"},
    "parallel": {"common", "kernels_npu", "model"},
    "convert": {"common", "kernels_npu", "data", "model", "parallel"},
    "infer": {"common", "kernels_npu", "data", "model", "convert"},
    "train": {"common", "kernels_npu", "data", "model", "parallel", "convert"},
}
PROGRAMS = {"train.py": "train", "infer.py": "infer", "convert.py": "convert", "data.py": "tools.dataset_cli"}
PAGES = ["README.md", "README.zh.md", "CONTRIBUTING.md", "docs/dashboards.md", "docs/evidence.md",
         "benchmarks/NOTES.md"]


# ---- the map -------------------------------------------------------------------------------------------------------


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_follow_map(name):
    found = imported_modules(ROOT / f"{name}.py")
    assert found & MAY_IMPORT.keys() <= MAY_IMPORT[name]
    assert "transformers" not in found
    assert "torch_npu" not in found or name == "kernels_npu"
    importlib.import_module(name)


# ---- flags ---------------------------------------------------------------------------------------------------------


def parsers_of(program: str, monkeypatch) -> list[argparse.ArgumentParser]:
    """Return a program's parser followed by those of its commands."""
    created = []

    def record(self, *args):
        created.append(self)
        raise common.UsageError("recorded")

    monkeypatch.setattr(common.Parser, "parse_known_args", record)
    with pytest.raises(common.UsageError, match="recorded"):
        importlib.import_module(PROGRAMS[program]).main([])
    commands = [a for a in created[0]._actions if isinstance(a, argparse._SubParsersAction)]
    return created + [parser for action in commands for parser in action.choices.values()]


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_prints(program):
    result = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and not result.stderr


@pytest.mark.parametrize("program", PROGRAMS)
def test_flags_have_help_and_group(program, monkeypatch):
    for parser in parsers_of(program, monkeypatch):
        actions = [a for a in parser._actions if not isinstance(a, argparse._SubParsersAction)]
        assert not [a.dest for a in actions if not a.help]
        groups = parser._action_groups[2:]  # the first two are argparse's own
        grouped = {a.dest for group in groups for a in group._group_actions} | {"help", "debug", "verbose"}
        assert not groups or not [a.dest for a in actions if a.dest not in grouped]


# ---- the pages -----------------------------------------------------------------------------------------------------


def test_readme_length():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES)
def test_page_names_existing_code(page):
    """Check files, make targets, and what the pages call `name` in `file.py`."""
    text = (ROOT / page).read_text()
    paths = re.findall(r"\b(?:docs|tools|tests|examples|configs|benchmarks|\.github)/[\w./-]*\w", text)
    paths += re.findall(r"\]\((?!http)([^)#]+)\)", text)
    paths += [f"tests/{name}" for name in re.findall(r"`(test_\w+\.py)`", text)]
    assert not [p for p in paths if not (ROOT / p).exists() and not (ROOT / page).parent.joinpath(p).exists()]
    makefile = (ROOT / "Makefile").read_text()
    assert not [t for t in re.findall(r"`make ([\w-]+)", text) if not re.search(rf"^{t}:", makefile, re.MULTILINE)]
    missing = []
    for names, file in re.findall(r"(`[\w.]+`(?:(?:, | and )`[\w.]+`)*) in `([\w/]+\.py)`", text):
        tree = ast.parse((ROOT / file).read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        defined |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        defined |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        missing += [f"{file}: {n}" for n in re.findall(r"\w+(?=`)", names) if n not in defined]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_page_names_existing_flags(page, monkeypatch):
    known = {"--help", "--index-url", "--nproc-per-node", "--extra-index-url"}  # pip's and torchrun's
    for program in PROGRAMS:
        for parser in parsers_of(program, monkeypatch):
            known |= set(parser._option_string_actions)
    for file in sorted(ROOT.glob("tools/*.py")) + sorted(ROOT.glob("benchmarks/*.py")):
        known |= set(re.findall(r'add_argument\("(--[\w-]+)"', file.read_text()))
    known |= {f"--freeze-{part}" for part in ("vision", "text")}
    text = without_foreign_keys((ROOT / page).read_text())
    unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", text, re.ASCII)) - known
    assert not unknown, ", ".join(sorted(unknown))


def without_foreign_keys(text: str) -> str:
    """Remove MindSpeed-MM's keys, the first column of a table with that heading, unless the second says "same name"."""
    tables = re.compile(r"^\| MindSpeed-MM \|.*\n(?:\|.*\n)*", re.MULTILINE)
    return tables.sub(lambda table: re.sub(r"(?m)^\|[^|]*\|(?! 同名)", "|", table[0]), text)


def test_dashboard_recipe(tmp_path, monkeypatch):
    """Run the lines of docs/dashboards.md while a run writes, evaluates and writes again."""
    metrics, logged = tmp_path / "out" / "metrics.jsonl", []
    metrics.parent.mkdir()
    (metrics.parent / "args.json").write_text('{"lr": 1e-5}')
    first, second = '{"iteration": 1, "loss": 2.0, "eval_loss": null}\n', '{"iteration": 2, "loss": 1.0, "eval_loss": '
    contents = iter([first + second + "null}\n", first + second + '1.5}\n{"iteration": 3, "lo'])

    def next_poll(seconds=None):
        metrics.write_text(next(contents))  # StopIteration ends the recipe

    fake = types.SimpleNamespace(init=lambda **kwargs: logged.append(kwargs),
                                 log=lambda values, step: logged.append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("time.sleep", next_poll)
    monkeypatch.chdir(tmp_path)
    recipe = re.search(r"(?:^    .*\n)+", (ROOT / "docs/dashboards.md").read_text(), re.MULTILINE)[0]
    assert len(recipe.splitlines()) <= 10
    next_poll()
    with pytest.raises(StopIteration):
        exec(textwrap.dedent(recipe), {})
    assert logged == [
        {"project": "qwen3-vl", "config": {"lr": 1e-5}},
        (1, {"iteration": 1, "loss": 2.0}),
        (2, {"iteration": 2, "loss": 1.0}),
        (2, {"iteration": 2, "loss": 1.0, "eval_loss": 1.5}),
    ]


# ---- plain language ------------------------------------------------------------------------------------------------

PRIVATE_WORDS = re.compile(
    r"\b(pictures?|strangers?|told|said|judge[sd]?|mistakes?|wholly|beforehand|everyones|thereof|therein|whereby|"
    r"go(?:es)? on|went on|in hand|nor would|of which|comes? away|makes? place|what is there|once and for all)\b",
    re.IGNORECASE,
)
FRAGMENT = re.compile(r"(Of|What|Whether|Else|As|Whose|Where|Which|That|How many|How much|No more|Nor|Such)\b")
DEFINITION = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PROSE_FILES = [
    path for pattern in ("*.py", "tools/*.py", "tests/*.py", "tests/npu/*.py", "benchmarks/*.py", "*.md", "docs/*.md",
                         "benchmarks/*.md")
    for path in sorted(ROOT.glob(pattern)) if path.name != "test_structure.py"
]


def prose_of(path: Path) -> list[tuple[int, str]]:
    """Return (line, text) of a file's prose.

    In Markdown that is every line. In Python it is comments, names of functions and classes, docstrings and, outside of
    tests/, every other string: help texts and messages.
    """
    text = path.read_text()
    if path.suffix == ".md":
        return list(enumerate(text.splitlines(), 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    found = [(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT]
    nodes = list(ast.walk(ast.parse(text)))
    found += [(n.lineno, n.name.replace("_", " ")) for n in nodes if isinstance(n, DEFINITION)]
    in_tests = "tests" in path.relative_to(ROOT).parts
    constants = [n.value for n in nodes if isinstance(n, ast.Expr)] if in_tests else nodes
    return found + [(n.lineno, n.value) for n in constants if isinstance(n, ast.Constant) and isinstance(n.value, str)]


@pytest.mark.parametrize("path", PROSE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_plain(path):
    """Check for words of the glossary in design.md's left column, and for docstrings that are sentence fragments."""
    found = [f"{path}:{line}: {match[0]!r}" for line, text in prose_of(path) for match in PRIVATE_WORDS.finditer(text)]
    for node in ast.walk(ast.parse(path.read_text() if path.suffix == ".py" else "")):
        if isinstance(node, ast.Module | DEFINITION) and FRAGMENT.match(ast.get_docstring(node) or ""):
            found.append(f"{path}:{node.body[0].lineno}: {ast.get_docstring(node)[:60]!r}")
    assert not found, "\n".join(found)
