"""Inject faults: what was saved stays complete, nothing that was saved is lost, and a run ends soon with one line.

The short cases run in `make test`; the slow ones (`-m slow`) kill many more runs. At the end of the module a table
says how often each fault was injected; `pytest -s` shows it. "Lost" would mean: saved data that is gone, damaged, or
different from a run without the fault. No test passes with such a loss.
"""
from __future__ import annotations

import collections
import contextlib
import errno
import functools
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import tiny
import torch
from helpers import (
    Job,
    assert_same_weights,
    error_lines,
    load_checkpoint,
    read_metrics,
    run_job,
    save_checkpoint,
    train_argv,
    without_timings,
)
from PIL import Image

import common
import convert
import data
import kernels_npu
import parallel
import train
from common import InputError
from convert import CheckpointWriter, find_checkpoint
from model import Qwen3VL, Qwen3VLConfig

ITERATIONS = 12
ASYNC = ["--async-save"]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a directory with two models (no weights: runs start from random ones) and 14 rows."""
    path = tmp_path_factory.mktemp("faults")
    for name in ("dense", "moe"):
        raw = tiny.config_dict(moe=name == "moe", layers=1)
        raw["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        raw["vision_config"] |= {"num_heads": 2, "depth": 1, "deepstack_visual_indexes": [0]}
        if name == "moe":
            raw["text_config"]["num_experts"] = 4
        tiny.hf_dir(path / name, raw)
    rows = [{"id": f"row-{i}", "messages": [{"role": "user", "content": "a red boat " * (1 + i % 4)},
                                            {"role": "assistant", "content": "blue sky " * (1 + i % 3)}]}
            for i in range(14)]
    (path / "rows.json").write_text(json.dumps(rows))
    return path


def fault_argv(folder: Path, save: Path, *more, model: str = "dense", iters: int = ITERATIONS) -> list[str]:
    """Return the flags of a run on the shuffled rows, four samples a step."""
    return train_argv(folder / model, folder / "rows.json", save, "--init", "random", "--global-batch-size", 4,
                      "--lr-decay-style", "constant", "--shuffle", *more, iters=iters)


@pytest.fixture(scope="module")
def reference_run(folder, tmp_path_factory) -> Callable[[int, int], Path]:
    """Return reference_run(world_size, iterations): the save directory of a run without faults, each made once."""

    @functools.cache
    def run(world_size: int, iterations: int) -> Path:
        save = tmp_path_factory.mktemp("reference") / "save"
        return run_job(fault_argv(folder, save, iters=iterations), world_size)

    return run


def run_in_process(argv: list[str]) -> tuple[int, str]:
    """Run train.py in this process and return its exit status and standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = common.run_program(train.main, argv)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return status, stderr.getvalue()


def verified_iterations(save: Path) -> list[int]:
    """Return the iterations in a save directory after verifying each, and the tracker."""
    found = sorted(int(d.name[5:]) for d in save.glob("iter_*"))
    for iteration in found:
        convert.verify(save / f"iter_{iteration:07d}")
    if (save / convert.TRACKER).exists():
        assert find_checkpoint(save).name in {f"iter_{i:07d}" for i in found}
    else:
        assert len(found) <= 1  # the tracker is written after the first iteration
    return found


def assert_same_run(expected: Path, found: Path, iterations: int) -> None:
    """Compare metrics and weights bit for bit: no iteration is missing or there twice."""
    assert [m["iteration"] for m in read_metrics(found)] == list(range(1, iterations + 1))
    assert without_timings(found) == without_timings(expected)[:iterations]
    assert find_checkpoint(found).name == f"iter_{iterations:07d}"
    assert_same_weights(expected, found)


def assert_one_error(job: Job, pattern: str) -> None:
    """Check that all ranks together printed one error line, matching `pattern`, and no traceback."""
    errors = error_lines(job.output())
    assert len(errors) == 1 and re.search(pattern, errors[0]), job.output()
    assert "Traceback" not in job.output(), job.output()


FAULTS: collections.Counter[str] = collections.Counter()


def count_fault(fault: str, times: int = 1) -> None:
    """Add to the table of injected faults, once a test has found that nothing was lost."""
    FAULTS[fault] += times


@pytest.fixture(scope="module", autouse=True)
def print_fault_table():
    yield
    print("\n\n| fault | times injected | lost |\n|---|---|---|")
    for fault, times in FAULTS.items():
        print(f"| {fault} | {times} | nothing |")


# ---- hooks: how the programs of the ranks below inject their faults --------------------------------------------------


def before_forward(action: Callable) -> None:
    """Call `action(n, batch)` before the model's n-th forward in this process, counted from 1."""
    forward, count = Qwen3VL.forward, itertools.count(1)

    def hooked(self, batch):
        action(next(count), batch)
        return forward(self, batch)

    Qwen3VL.forward = hooked


def before_save(action: Callable[[int], None]) -> None:
    """Call `action(n)` before the n-th checkpoint that this process saves, counted from 1."""
    save, count = CheckpointWriter.save, itertools.count(1)

    def hooked(self, *args, **kwargs):
        action(next(count))
        return save(self, *args, **kwargs)

    CheckpointWriter.save = hooked


def before_fsync(action: Callable[[Path], None]) -> None:
    """Call `action(path)` before this process flushes a file or directory to the disk."""
    fsync = os.fsync

    def hooked(descriptor: int) -> None:
        action(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    os.fsync = hooked


def this_rank() -> int:
    return int(os.environ["RANK"])


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def run_with_kills(
    folder: Path, save: Path, world_size: int, more: list, iterations: int, kills: int, seed: int
) -> collections.Counter:
    """Kill a run that saves every iteration at random moments, `kills` times, resuming it after each; then finish it.

    SIGKILL goes to one rank or to all. Returns how often a kill hit a save, something else, and one rank of several.
    """
    moments = random.Random(seed)
    killed: collections.Counter[str] = collections.Counter()
    argv = fault_argv(folder, save, "--save-interval", 1, "--save-retain", 3, *more, iters=iterations)
    while True:
        if not (save / convert.TRACKER).exists():
            shutil.rmtree(save, ignore_errors=True)
        resume = ["--load", str(save)] if save.exists() else []
        done = int((save / convert.TRACKER).read_text()) if resume else 0
        job = Job(argv + resume, world_size)
        if killed["in a save"] + killed["elsewhere"] >= kills:
            assert job.wait(120) == [0] * world_size, job.output()
            return killed
        job.wait_for_iteration(min(iterations - 1, done + moments.randint(0, 2) + 1))
        time.sleep(moments.uniform(0, 0.15))
        one_rank = [moments.randrange(world_size)] if moments.random() < 0.5 else []
        alive = [process.is_alive() for process in job.ranks]
        with contextlib.suppress(ProcessLookupError):
            job.kill(signal.SIGKILL, *one_rank)
        statuses = job.wait(40)
        if not all(alive):  # the run had already finished
            assert statuses == [0] * world_size, job.output()
            continue
        assert -signal.SIGKILL in statuses and "Traceback" not in job.output(), job.output()
        assert verified_iterations(save) or not (save / convert.TRACKER).exists()
        unfinished = list(save.glob(".*iter_*"))  # the staging directory of a save
        killed["in a save" if unfinished else "elsewhere"] += 1
        killed["one rank"] += bool(one_rank) and world_size > 1


@pytest.mark.parametrize(("world_size", "more", "kills"), [
    (1, ASYNC, 1), (2, ASYNC, 1), slow(1, [], 25), slow(1, ASYNC, 25), slow(2, [], 12), slow(2, ASYNC, 12)])
def test_train_killed_at_random_moments(folder, tmp_path, reference_run, world_size, more, kills):
    """Every checkpoint left is complete, and resuming gives the losses and weights of a run never killed."""
    iterations = 3 * kills + 3
    save = tmp_path / "save"
    killed = run_with_kills(folder, save, world_size, more, iterations, kills, seed=kills + world_size)
    assert_same_run(reference_run(world_size, iterations), save, iterations)
    print(killed)
    flags = ", --async-save" if more else ""
    count_fault(f"kill -9 at a random moment, {world_size} rank(s){flags} ({killed['in a save']} in a save)", kills)


def killed_with_half_a_shard(argv: list[str]) -> None:
    """Run train.py; rank 1 dies when it has written half of its shard of iteration 3."""

    def kill(path: Path) -> None:
        if "iter_0000003" in str(path) and path.name.startswith("__1_"):
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    before_fsync(kill)
    train.main(argv)


@pytest.mark.parametrize("more", [slow([]), ASYNC], ids=["foreground", "background"])
def test_save_rank_killed(folder, tmp_path, reference_run, more):
    save = tmp_path / "save"
    argv = fault_argv(folder, save, "--save-interval", 1, *more, iters=6)
    job = Job(argv, 2, killed_with_half_a_shard)
    first, second = job.wait(30)
    assert first in (1, -signal.SIGTERM) and second == -signal.SIGKILL, job.output()
    lines = job.logs[0].read_text().splitlines()
    assert not [line for line in lines if "Traceback" in line or "gloo" in line and not line.startswith("device:")]
    assert verified_iterations(save) == [1, 2]
    run_job([*argv, "--load", save], 2)
    assert_same_run(reference_run(2, 6), save, 6)
    count_fault("a rank killed with half of its shard written")


# ---- a disk that is full or cannot be written -----------------------------------------------------------------------


@pytest.fixture
def process_group():
    """Join a process group of one; the autouse fixture `restore_process` leaves it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


@pytest.fixture
def fail_change(monkeypatch) -> Callable[[int], None]:
    """Return fail_change(n): the n-th change of the file system from now on raises ENOSPC (0: none does)."""
    remaining = 0

    def count() -> None:
        nonlocal remaining
        remaining -= 1
        if remaining == 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def counted(change: Callable) -> Callable:
        def call(*args, **kwargs):
            count()
            return change(*args, **kwargs)
        return call

    class File(io.FileIO):
        def write(self, values) -> int:
            count()
            return super().write(values)

    def open_counted(path, mode: str = "r", **kwargs):
        return open(path, mode, **kwargs) if mode in ("r", "rb") else File(path, mode)

    def start(n: int) -> None:
        nonlocal remaining
        remaining = n

    monkeypatch.setattr(convert, "open", open_counted, raising=False)
    for owner, name in ((os, "fsync"), (Path, "mkdir"), (os, "rename"), (os, "replace")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return start


@pytest.mark.parametrize("background", [False, True])
def test_save_no_space_at_each_write(tmp_path, process_group, fail_change, background):
    """ENOSPC at the first, second, ... change of a save: one line, and the previous iteration is untouched."""
    model = torch.nn.Linear(20, 20)
    state = {"iteration": 1, "data": {}}
    save_checkpoint(tmp_path, 1, model, None, state)
    change, failed = 0, True
    while failed:
        change += 1
        fail_change(change)
        with CheckpointWriter(background, timedelta(minutes=1)) as writer:
            try:
                writer.save(tmp_path, 2, model, None, state, None)
                writer.wait()
                failed = False
            except InputError as e:
                assert re.search("iter_0000002: was not saved: .*No space left on device", str(e))
        fail_change(0)
        assert verified_iterations(tmp_path) in ([1], [1, 2])  # the last changes only flush a complete iteration
        assert failed or find_checkpoint(tmp_path).name == "iter_0000002"
        assert load_checkpoint(find_checkpoint(tmp_path), model) == state
    assert {f.name for f in tmp_path.iterdir()} == {"iter_0000001", "iter_0000002", convert.TRACKER}
    assert change > 12
    count_fault("ENOSPC at each write of a save", change - 1)


def test_background_save_copies_state(tmp_path, monkeypatch, process_group):
    """Training changes weights, moments and its state before a byte is written; a second save reuses the memory."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    data_position = {"waiting": [1]}

    def step() -> list[torch.Tensor]:
        model(torch.ones(4)).sum().backward()
        optimizer.step()
        moments = [t for state in optimizer.state.values() for t in state.values()]
        return [t.detach().clone() for t in (*model.parameters(), *moments)]

    mkdir, is_waiting, may_write = Path.mkdir, threading.Event(), threading.Event()

    def hold(*args, **kwargs) -> None:
        if threading.current_thread() is not threading.main_thread():
            is_waiting.set()
            may_write.wait(30)
        mkdir(*args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", hold)
    expected = []
    with CheckpointWriter(True, timedelta(minutes=1)) as writer:
        for iteration in (1, 2):
            expected.append(step())
            state = {"iteration": iteration, "data": data_position}
            writer.save(tmp_path, iteration, model, optimizer, state, None)
            step()
            data_position["waiting"].append(iteration + 1)
            assert is_waiting.wait(30)
            may_write.set()
    for iteration, values in enumerate(expected, 1):
        again = torch.nn.Linear(4, 4)
        resumed = torch.optim.AdamW(again.parameters())
        state = load_checkpoint(tmp_path / f"iter_{iteration:07d}", again, resumed)
        assert state["data"]["waiting"] == list(range(1, iteration + 1))
        moments = [t for each in resumed.state.values() for t in each.values()]
        assert all(torch.equal(a, b) for a, b in zip(values, (*again.parameters(), *moments), strict=True))


def test_checkpoint_writer_exit_waits_and_raises(tmp_path, monkeypatch, caplog, process_group):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda *args: (time.sleep(0.1), fsync(*args))[1])
    save = {"save_dir": tmp_path, "model": torch.nn.Linear(4, 4), "optimizer": None, "retain": None}
    with CheckpointWriter(True, timedelta(minutes=1)) as writer:
        writer.save(iteration=1, trainer_state={"iteration": 1, "data": {}}, **save)
    assert verified_iterations(tmp_path) == [1]
    unloadable = {"iteration": 2, "data": {"path": Path("/")}}
    with pytest.raises(InputError, match="iter_0000002: was not saved"):
        with CheckpointWriter(True, timedelta(minutes=1)) as writer:
            writer.save(iteration=2, trainer_state=unloadable, **save)
    with pytest.raises(KeyError, match="the reason"):  # a failed save does not hide the error that ends the run
        with CheckpointWriter(True, timedelta(minutes=1)) as writer:
            writer.save(iteration=2, trainer_state=unloadable, **save)
            raise KeyError("the reason")
    assert "iter_0000002: was not saved" in caplog.text and verified_iterations(tmp_path) == [1]


def with_small_files_from_second_save(argv: list[str]) -> None:
    """Run train.py; from its second save on no file can grow beyond 100 kB."""

    def limit(save: int) -> None:
        if save == 2:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    before_save(limit)
    train.main(argv)


@pytest.mark.parametrize("world_size", [1, 2])
def test_background_save_failure_ends_run(folder, tmp_path, world_size):
    """The run ends soon (not at its end) with one line on all ranks; the earlier iterations are intact."""
    argv = fault_argv(folder, tmp_path / "save", "--save-interval", 20, *ASYNC, iters=100000)
    job = Job(argv, world_size, with_small_files_from_second_save)
    statuses = job.wait(40)
    assert 1 in statuses and set(statuses) <= {1, -signal.SIGTERM}, job.output()
    assert_one_error(job, "iter_0000040: was not saved: .*File too large")
    assert verified_iterations(tmp_path / "save") == [20]
    assert len(read_metrics(tmp_path / "save")) < 59  # the next save, which would wait for this one, is not reached
    count_fault("a file that cannot grow during a background save")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ASYNC], ids=["foreground", "background"])
def test_save_full_disk(folder, tmp_path, reference_run, more):
    """Fill a small tmpfs. After space is freed the run resumes and equals a run without the fault."""
    disk = tmp_path / "disk"
    disk.mkdir()
    checkpoint_size = sum(f.stat().st_size for f in find_checkpoint(reference_run(2, 6)).iterdir())
    size = int(3.5 * checkpoint_size)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]).returncode:
        pytest.skip("this test needs permission to mount a file system")
    try:
        argv = fault_argv(folder, disk / "save", "--save-interval", 1, *more, iters=6)
        job = Job(argv, 2)
        assert 1 in job.wait(40), job.output()
        assert_one_error(job, "No space left on device")
        assert verified_iterations(disk / "save") == [1, 2, 3]
        for iteration in (1, 2):
            shutil.rmtree(disk / "save" / f"iter_{iteration:07d}")
        run_job([*argv, "--load", disk / "save", "--save-retain", "1"], 2)
        assert_same_run(reference_run(2, 6), disk / "save", 6)
        count_fault("a full disk (tmpfs), then space freed")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_train_checks_free_space(folder, tmp_path, monkeypatch):
    """Refuse to load a model whose checkpoint (3 float32 values per parameter) does not fit on the disk."""

    def stop_before_allocation(*args, **kwargs):
        raise InputError("the model is allocated")

    monkeypatch.setattr(torch.nn.Module, "to_empty", stop_before_allocation)
    with torch.device("meta"):
        model = Qwen3VL(Qwen3VLConfig.from_json(folder / "dense"))
    nbytes = 12 * sum(p.numel() for p in model.parameters())
    for free, more, message in (
        (nbytes - 1, [], "--save .* free"),
        (nbytes, [], "the model is allocated"),
        (nbytes // 3 - 1, ["--no-save-optim"], "--save .* free"),
        (nbytes // 3 + 1, ["--no-save-optim"], "the model is allocated"),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(free, 0, free))
        status, stderr = run_in_process(fault_argv(folder, tmp_path / "save", *more))
        assert status == 1 and re.search(f"^error: .*{message}", stderr, re.M), (free, more, stderr)
    count_fault("no space for a checkpoint")


def test_train_unwritable_save_dir(folder):
    """Report it before the checkpoint of --load, which does not exist, is read."""
    status, stderr = run_in_process(fault_argv(folder, Path("/proc/sys"), "--load", "nowhere"))
    assert status == 1 and re.search("error: --save /proc/sys: .*cannot be written", stderr), stderr
    count_fault("a directory that cannot be written")


# ---- trained iterations are saved before anything else can fail ------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
def test_train_bad_eval_rows(folder, tmp_path, world_size):
    """A bad held-out row ends the run only after the trained iterations are saved."""
    rows = [json.loads((folder / "rows.json").read_text())[0]] * 2 + [{"messages": "none"}]
    (tmp_path / "held_out.json").write_text(json.dumps(rows))
    argv = fault_argv(folder, tmp_path / "save", "--eval-dataset", tmp_path / "held_out.json", iters=3)
    job = Job(argv, world_size)
    assert 1 in job.wait()
    assert_one_error(job, r"held_out\.json")
    assert verified_iterations(tmp_path / "save") == [3] and len(read_metrics(tmp_path / "save")) == 3


@pytest.mark.parametrize("world_size, more, seconds", [(1, [], 0), (2, ["--eval-interval", 2], 2)])
def test_train_signal_during_evaluation(folder, tmp_path, world_size, more, seconds):
    """SIGTERM does not wait for an evaluation of 100,000 rows: one that runs ends, one at the end is left out."""
    row = json.loads((folder / "rows.json").read_text())[0]
    (tmp_path / "held_out.json").write_text(json.dumps([row] * 100_000))
    argv = fault_argv(folder, tmp_path / "save", "--eval-dataset", tmp_path / "held_out.json", *more, iters=100_000)
    job = Job(argv, world_size)
    job.wait_for_iteration(1)
    time.sleep(seconds)
    job.kill(signal.SIGTERM)
    assert job.wait(20) == [0] * world_size, job.output()
    assert verified_iterations(tmp_path / "save") == [len(read_metrics(tmp_path / "save"))]


def killed_in_first_step(argv: list[str]) -> None:
    before_forward(lambda n, batch: os.kill(os.getpid(), signal.SIGKILL))
    train.main(argv)


def test_resume_resets_tracker(folder, tmp_path, reference_run):
    """Resume from iteration 4 of 8 and die in 5: the next resume continues from 4, not from the old run's 8."""
    save = tmp_path / "save"
    argv = fault_argv(folder, save, "--save-interval", 4, iters=8)
    run_job(argv)
    job = Job([*argv, "--load", save / "iter_0000004"], main=killed_in_first_step)
    assert job.wait() == [-signal.SIGKILL]
    assert find_checkpoint(save).name == "iter_0000004"
    run_job([*fault_argv(folder, save, "--save-interval", 4), "--load", save])
    assert_same_run(reference_run(1, ITERATIONS), save, ITERATIONS)


# ---- two runs on one save directory ----------------------------------------------------------------------------------


def stopped_in_third_save(argv: list[str]) -> None:
    """Run train.py; it hangs in its third save, before the checkpoint is complete."""

    def stop(path: Path) -> None:
        if "iter_0000003" in str(path) and path.name == ".metadata":
            print("stopped in the save", flush=True)
            time.sleep(600)

    before_fsync(stop)
    train.main(argv)


def test_train_save_dir_in_use(folder, tmp_path, reference_run):
    """A second run is refused and changes nothing while the first lives; a killed run's lock needs no clean-up."""
    save = tmp_path / "save"
    argv = fault_argv(folder, save, "--save-interval", 1, iters=6)
    first = Job(argv, main=stopped_in_third_save)
    deadline = time.monotonic() + 60
    while "stopped in the save" not in first.output():
        assert time.monotonic() < deadline, first.output()
        time.sleep(0.02)
    before = sorted(f.name for f in save.rglob("*"))
    for more in ([], ["--load", str(save)]):
        status, stderr = run_in_process(argv + more)
        assert status == 1 and re.search(f"^error: --save {save}: another run", stderr, re.M), stderr
    assert sorted(f.name for f in save.rglob("*")) == before
    assert any(re.fullmatch(r"\..*iter_0000003", name) for name in before)
    first.kill(signal.SIGKILL)
    assert first.wait() == [-signal.SIGKILL]
    run_job([*argv, "--load", save])
    assert_same_run(reference_run(1, 6), save, 6)
    count_fault("a second run on a directory in use", 2)


# ---- damaged checkpoints ---------------------------------------------------------------------------------------------


def test_resume_damaged_checkpoint(folder, tmp_path, reference_run):
    """Damage to the newest iteration is one line that names the file; an older iteration resumes exactly."""
    saved = run_job(fault_argv(folder, tmp_path / "saved", "--save-interval", 1, iters=4))

    def flip_a_bit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    damage = {
        "missing": Path.unlink, "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
        "a bit flipped": flip_a_bit, "emptied": lambda path: path.write_bytes(b""),
    }
    save = tmp_path / "save"
    for name in ("__0_0.distcp", ".metadata", "trainer_state_rank_00000.pt"):
        for kind, apply in damage.items():
            shutil.rmtree(save, ignore_errors=True)
            shutil.copytree(saved, save)
            apply(save / "iter_0000004" / name)
            status, stderr = run_in_process([*fault_argv(folder, save, iters=6), "--load", str(save)])
            errors = error_lines(stderr)
            named = "iter_0000004" if (name, kind) == (".metadata", "missing") else f"iter_0000004/{name}"
            assert status == 1 and len(errors) == 1 and named in errors[0], (name, kind, stderr)
            assert "Traceback" not in stderr
            count_fault("the newest checkpoint damaged")
    run_job([*fault_argv(folder, save, iters=6), "--load", save / "iter_0000002"])
    assert_same_run(reference_run(1, 6), save, 6)


# ---- signals and time limits ----------------------------------------------------------------------------------------


def signalled_in_third_step(signal_number: int, ranks: tuple[int, ...], argv: list[str]) -> None:
    """Run train.py; some ranks get a signal in the first of the two micro-batches of their third step."""

    def send(forward: int, batch) -> None:
        if forward == 5 and this_rank() in ranks:
            os.kill(os.getpid(), signal_number)

    before_forward(send)
    train.main(argv)


@pytest.mark.parametrize(("signal_number", "more", "ranks"), [
    (signal.SIGTERM, ASYNC, (1,)), (signal.SIGINT, [], (0, 1)), slow(signal.SIGTERM, [], (0, 1))])
def test_train_stop_signal_during_accumulation(folder, tmp_path, reference_run, signal_number, more, ranks):
    """One checkpoint, exit status 0 on both ranks, one line that says how to resume, and an exact resume."""
    save = tmp_path / "save"
    main = functools.partial(signalled_in_third_step, signal_number, ranks)
    job = Job(fault_argv(folder, save, *more, iters=100000), 2, main)
    assert job.wait() == [0, 0], job.output()
    assert job.output().count(f"--load {save}") == 1 and verified_iterations(save) == [3]
    run_job([*fault_argv(folder, save, iters=6), "--load", save], 2)
    assert_same_run(reference_run(2, 6), save, 6)
    count_fault(f"{signal.Signals(signal_number).name} during accumulation, 2 ranks")


def sigusr1_in_third_step(argv: list[str]) -> None:
    """Run train.py; rank 0 gets SIGUSR1 in its third step, rank 1 when it starts the save that follows."""

    def send_in_save(save: int) -> None:
        if save == 1 and this_rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    before_save(send_in_save)
    signalled_in_third_step(signal.SIGUSR1, (0,), argv)


def test_train_sigusr1(folder, tmp_path, reference_run):
    """Both ranks get the signal, the second during the first one's save: one checkpoint, and training continues."""
    save = tmp_path / "save"
    job = Job(fault_argv(folder, save, iters=6), 2, sigusr1_in_third_step)
    assert job.wait() == [0, 0], job.output()
    assert verified_iterations(save) == [3, 6]
    assert_same_run(reference_run(2, 6), save, 6)
    count_fault("SIGUSR1, 2 ranks")


def test_train_exit_duration(folder, tmp_path):
    """--exit-duration-in-mins counts from the program's start, and ends the run as SIGTERM does."""
    save = tmp_path / "save"
    job = Job(fault_argv(folder, save, "--exit-duration-in-mins", 0.05, iters=100000), 2)
    start = time.monotonic()
    assert job.wait(40) == [0, 0], job.output()
    assert 3 < time.monotonic() - start < 20
    assert verified_iterations(save) == [len(read_metrics(save))]
    assert job.output().count(f"--load {save}") == 1
    count_fault("--exit-duration-in-mins, 2 ranks")


# ---- ranks that fail -------------------------------------------------------------------------------------------------


def out_of_memory_in_second_step(argv: list[str]) -> None:
    """Run train.py; PyTorch's CPU allocator fails on rank 1, in the first micro-batch of the second step."""

    def allocate(forward: int, batch) -> None:
        if forward == 3 and this_rank() == 1:
            torch.empty(2**60, dtype=torch.uint8)

    before_forward(allocate)
    train.main(argv)


def test_train_out_of_memory_on_one_rank(folder, tmp_path):
    """One line names the rank, its current rows and what to do; the other rank ends."""
    start = time.monotonic()
    job = Job(fault_argv(folder, tmp_path / "save", "--no-shuffle"), 2, out_of_memory_in_second_step)
    assert set(job.wait(30)) <= {1, -signal.SIGTERM} and time.monotonic() - start < 25, job.output()
    assert_one_error(job, r"rank 1: out of memory .*--micro-batch-size.*row-5\b")
    count_fault("out of memory on one of 2 ranks")


def out_of_memory_in_third_step(argv: list[str]) -> None:
    """Run train.py; rank 1 runs out of memory when it loads the second micro-batch of its third step."""
    load, count = data.Loader._load, itertools.count(1)

    def hooked(self, item, decode=True):
        if decode and next(count) == 6 and this_rank() == 1:
            raise MemoryError("Unable to allocate 8 MB")
        return load(self, item, decode)

    data.Loader._load = hooked
    train.main(argv)


@pytest.mark.parametrize(("main", "workers", "message"), [
    (train.main, 0, r"rows\.json row 12 \(id row-11\): images\[0\]: .*cut\.jpg cannot be read as .* truncated"),
    (train.main, 2, r"rows\.json row 12 \(id row-11\): images\[0\]: .*cut\.jpg cannot be read as .* truncated"),
    (out_of_memory_in_third_step, 0, "rank 1: out of memory .*8 MB"),
], ids=["truncated image", "truncated image, workers", "out of memory"])
def test_train_loading_fails_within_a_step(folder, tmp_path, main, workers, message):
    """The other rank has begun the step: both end at its end, which is not applied, with one line."""
    rows = json.loads((folder / "rows.json").read_text())
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "cut.jpg")
    os.truncate(tmp_path / "cut.jpg", 2000)
    if main is train.main:
        rows[11]["images"] = ["cut.jpg"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    argv = fault_argv(folder, tmp_path / "save", "--save-interval", 1, "--no-shuffle", "--dataset",
                      tmp_path / "rows.json", "--num-workers", workers)
    start = time.monotonic()
    job = Job(argv, 2, main)
    assert set(job.wait(40)) <= {1, -signal.SIGTERM} and time.monotonic() - start < 35, job.output()
    assert_one_error(job, message)
    assert verified_iterations(tmp_path / "save") == [1, 2] and len(read_metrics(tmp_path / "save")) == 2
    count_fault("a micro-batch that cannot be loaded, 2 ranks")


@pytest.mark.parametrize("worker", [0, -1], ids=["measures", "loads"])
def test_train_killed_worker(folder, tmp_path, worker):
    """A data loader's worker that is killed ends all ranks with one line."""
    job = Job(fault_argv(folder, tmp_path / "save", "--num-workers", 2, iters=100000), 2)
    job.wait_for_iteration(2)
    pid = job.ranks[1].pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(children[worker]), signal.SIGKILL)
    assert set(job.wait(30)) <= {1, -signal.SIGTERM}, job.output()
    assert_one_error(job, r"rank 1: DataLoader worker.*(is killed by signal|exited unexpectedly).*--num-workers")
    count_fault("kill -9 of a data loader's worker")


def test_train_stopped_rank(folder, tmp_path):
    """A rank that does not answer ends the others after the collective timeout, with one line that names it."""
    flags = ["--distributed-timeout-minutes", 0.1, "--context-parallel-size", 2]
    job = Job(fault_argv(folder, tmp_path / "save", *flags, iters=100000), 2)
    job.wait_for_iteration(2)
    job.kill(signal.SIGSTOP, 1)
    job.ranks[0].join(40)
    assert job.ranks[0].exitcode == 1, job.output()
    assert_one_error(job, r"rank 0: .* 0\.1 minutes .*rank 1$")
    count_fault("SIGSTOP of one of 2 ranks")


def print_group_timeouts(argv: list[str]) -> None:
    """Create the process groups that train.py would create, and print the timeout of each."""
    args = train.parse_args(argv)
    state = parallel.ParallelState(kernels_npu.select("cpu"), args.distributed_timeout_minutes, cp=2, ep=2, fsdp=2)
    for group in torch.distributed.distributed_c10d._world.pg_map:
        print("timeout:", group._get_backend(torch.device("cpu")).options._timeout.total_seconds(), flush=True)
    torch.distributed.barrier()  # rank 0 holds the store: it must not leave while others create groups
    state.close()


def test_parallel_state_group_timeouts(folder, tmp_path):
    """Every process group, those of mesh axes included, has the timeout of the flag."""
    job = Job(fault_argv(folder, tmp_path / "save", "--distributed-timeout-minutes", 7), 4, print_group_timeouts)
    assert job.wait() == [0] * 4, job.output()
    found = re.findall("^timeout: (.*)$", job.output(), re.M)
    assert len(found) > 4 * 5 and set(found) == {"420.0"}, found


# ---- numbers that are not finite -------------------------------------------------------------------------------------


def nan_on_rank_1(argv: list[str]) -> None:
    """Run train.py; rank 1 has a NaN loss in step 2, and from step 5 on."""

    def spoil(step: int, batch) -> None:
        if this_rank() == 1 and (step == 2 or step >= 5):
            batch.loss_weights[:] = math.nan

    before_forward(spoil)
    train.main(argv)


@pytest.mark.parametrize("layout", [
    ["--context-parallel-size", 2, "--micro-batch-size", 4], ["--expert-parallel-size", 2, "--global-batch-size", 2]],
    ids=["cp", "ep"])
def test_train_nonfinite_loss_on_one_rank(folder, tmp_path, layout):
    """Both ranks skip the step; ten in a row end the run, and the checkpoint being saved is completed."""
    argv = fault_argv(folder, tmp_path / "save", *layout, "--save-interval", 4, *ASYNC, model="moe", iters=100)
    job = Job(argv, 2, nan_on_rank_1)
    assert set(job.wait(60)) <= {1, -signal.SIGTERM}, job.output()
    assert_one_error(job, r"ten steps in a row .*iteration 14\b.*row-[0-9]+")
    metrics = read_metrics(tmp_path / "save")
    assert [m["skipped_iterations"] for m in metrics] == [0, 1, 0, 0, *[1] * 9]
    assert all((m["loss"] is None) == bool(m["skipped_iterations"]) for m in metrics)
    for log in job.logs:  # each rank logs its own rows
        assert len(re.findall(r"^iteration \d+: .*row-", log.read_text(), re.M)) >= 10
    assert verified_iterations(tmp_path / "save") == [4, 8, 12]
    saved = [convert.CheckpointWeights(tmp_path / "save" / f"iter_{i:07d}") for i in (4, 12)]
    for name, (_, shape) in saved[0].tensors.items():  # no step after iteration 4 was applied
        first, last = (s.read(name, (0,) * len(shape), tuple(shape)) for s in saved)
        assert torch.equal(first, last) and first.isfinite().all(), name
    count_fault("a loss that is not finite on one of 2 ranks", 11)
