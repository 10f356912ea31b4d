"""Faults, injected: what is complete afterwards, what is lost (nothing), who says what, and how soon it ends.

The short form runs in `make test`; the long form (`-m slow`) kills many more runs. Each test adds to a table of how
often what was tried, which `pytest -s` shows, and the README has: lost is what was saved (or should have been) and is
gone, damaged, or other than in a run without the fault.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import tiny
import torch
from test_parallel import FORKS, lines_of, rank_process
from test_train import assert_same_weights, read_metrics

import common
import convert
import kernels_npu
import parallel
import train
from common import InputError
from convert import CheckpointWriter, find_checkpoint, load_checkpoint, save_checkpoint

ITERATIONS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Models without weights (they start from random ones), and rows."""
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


def flags(folder: Path, save: Path, *more, model: str = "dense", iters: int = ITERATIONS) -> list[str]:
    return list(map(str, [
        "--init-from-hf-path", folder / model, "--init", "random", "--dataset", folder / "rows.json", "--save", save,
        "--device", "cpu", "--train-iters", iters, "--global-batch-size", 4, "--lr", 1e-3, "--lr-decay-style",
        "constant", "--num-workers", 0, *more]))


class Job:
    """train.py (or another `main`) on forked ranks, the environment torchrun's, their words in a file each."""

    all: list[Job] = []

    def __init__(self, argv: list[str], world: int = 1, main: Callable = train.main):
        self.save = Path(argv[argv.index("--save") + 1])
        logs = self.save.with_name(self.save.name + "_logs")
        logs.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [logs / f"rank{rank}.log" for rank in range(world)]
        Job.all.append(self)
        self.ranks = [FORKS.Process(target=rank_process, args=(rank, world, port, main, argv, self.logs[rank]))
                      for rank in range(world)]
        for process in self.ranks:
            process.start()

    def words(self) -> str:
        return "\n".join(f"--- rank {r}\n{log.read_text()}" for r, log in enumerate(self.logs) if log.exists())

    def wait_for(self, iteration: int, seconds: float = 60) -> None:
        """Until the log has this iteration, or a rank has ended."""
        deadline, metrics = time.monotonic() + seconds, self.save / "metrics.jsonl"
        while not (metrics.exists() and f'"iteration": {iteration},' in metrics.read_text()):
            assert time.monotonic() < deadline, f"no iteration {iteration} in {seconds} s\n{self.words()}"
            if not all(process.is_alive() for process in self.ranks):
                return
            time.sleep(0.005)

    def kill(self, number: int, *ranks: int) -> None:
        for process in [self.ranks[rank] for rank in ranks] or self.ranks:
            os.kill(process.pid, number)

    def end(self, seconds: float = 60) -> list[int]:
        """Their exit statuses. As torchrun does, it ends the others once one has failed; at the deadline it kills all,
        and the test fails."""
        deadline = time.monotonic() + seconds
        asked = False
        while any(process.is_alive() for process in self.ranks) and time.monotonic() < deadline:
            if not asked and any(process.exitcode for process in self.ranks):
                asked = True
                for process in self.ranks:
                    process.terminate()
            time.sleep(0.01)
        hang = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        for process in self.ranks:
            process.kill()
            process.join()
        assert not hang, f"ranks {hang} still run after {seconds} s\n{self.words()}"
        return [process.exitcode for process in self.ranks]


def complete(save: Path) -> list[int]:
    """The iterations in a save directory, every one of which must be whole, and the tracker's among them."""
    found = sorted(int(d.name[5:]) for d in save.glob("iter_*"))
    for iteration in found:
        convert.verify(save / f"iter_{iteration:07d}")
    if found or (save / convert.TRACKER).exists():
        assert (save / convert.TRACKER).exists() or len(found) == 1  # the first may not be in the tracker yet
    if (save / convert.TRACKER).exists():
        assert find_checkpoint(save).name[5:] in {f"{i:07d}" for i in found}
    return found


def timeless(save: Path) -> list[dict]:
    return [{k: v for k, v in m.items() if not k.endswith("_s")} for m in read_metrics(save)]


def assert_same_run(expected: Path, found: Path, iterations: int) -> None:
    """Bit for bit, no iteration twice and none missing."""
    assert [m["iteration"] for m in read_metrics(found)] == list(range(1, iterations + 1))
    assert timeless(found) == timeless(expected)[:iterations]
    assert find_checkpoint(found).name == f"iter_{iterations:07d}"
    assert_same_weights(expected, found)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Callable[..., Path]:
    """whole(world, iterations): the --save of a run without faults, each made once."""
    runs: dict[tuple, Path] = {}

    def run(world: int, iterations: int) -> Path:
        if (world, iterations) not in runs:
            save = tmp_path_factory.mktemp("whole") / "save"
            job = Job(flags(folder, save, iters=iterations), world)
            assert job.end() == [0] * world, job.words()
            runs[world, iterations] = save
        return runs[world, iterations]

    return run


@pytest.fixture(autouse=True)
def no_rank_outlives_its_test():
    yield
    for job in Job.all:
        for process in job.ranks:
            process.kill()
            process.join()
    Job.all.clear()


TABLE: dict[str, list[int]] = {}  # fault -> [how often, lost]


def tried(fault: str, times: int = 1) -> None:
    """Called when all that could be lost was found to be there."""
    TABLE.setdefault(fault, [0, 0])[0] += times


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\n\n| fault | how often | lost |\n|---|---|---|")
    for fault, (times, lost) in TABLE.items():
        print(f"| {fault} | {times} | {lost or 'nothing'} |")


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

ASYNC = ["--async-save"]


def killed_until_done(folder: Path, save: Path, world: int, more: list, iterations: int, kills: int, seed: int) -> dict:
    """A run that saves every iteration and dies by kill -9 at random moments, one rank or all of them, each time going
    on from what is there, until it has died `kills` times and ended. Returns how often it died how."""
    moments = random.Random(seed)
    died = {"in a save": 0, "elsewhere": 0, "one rank": 0}
    argv = flags(folder, save, "--save-interval", 1, "--save-retain", 3, *more, iters=iterations)
    while True:
        if not (save / convert.TRACKER).exists():
            shutil.rmtree(save, ignore_errors=True)
        resume = ["--load", str(save)] if save.exists() else []
        done = int((save / convert.TRACKER).read_text()) if resume else 0
        job = Job(argv + resume, world)
        if sum(died[k] for k in ("in a save", "elsewhere")) >= kills:
            assert job.end(120) == [0] * world, job.words()
            return died
        job.wait_for(min(iterations - 1, done + moments.randint(0, 2) + 1))
        time.sleep(moments.uniform(0, 0.15))
        one = [moments.randrange(world)] if moments.random() < 0.5 else []
        alive = [process.is_alive() for process in job.ranks]
        with contextlib.suppress(ProcessLookupError):
            job.kill(signal.SIGKILL, *one)
        statuses = job.end(40)
        if not all(alive):  # it was done before
            assert statuses == [0] * world, job.words()
            continue
        assert -signal.SIGKILL in statuses and "Traceback" not in job.words(), job.words()
        assert complete(save) or not (save / convert.TRACKER).exists()
        left = list(save.glob(".tmp_iter_*")) + list(save.glob(".old_iter_*"))
        died["in a save" if left else "elsewhere"] += 1
        died["one rank"] += bool(one) and world > 1


SHORT = [(1, ASYNC, 1), (2, ASYNC, 1)]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
LONG = [(1, [], 25), (1, ASYNC, 25), (2, [], 12), (2, ASYNC, 12)]


@pytest.mark.parametrize(("world", "more", "kills"), [
    *SHORT, *(slow(*case) for case in LONG)])
def test_kill_9_at_random_moments(folder, tmp_path, whole, world, more, kills):
    """What is there is complete, and going on gives bit for bit the losses and weights of a run never killed."""
    iterations = 3 * kills + 3
    save = tmp_path / "save"
    died = killed_until_done(folder, save, world, more, iterations, kills, seed=kills + world)
    assert_same_run(whole(world, iterations), save, iterations)
    print(died)
    how = f"kill -9 at a random moment, {world} rank{'s' * (world > 1)}{', --async-save' * bool(more)}"
    tried(f"{how} ({died['in a save']} in a save)", kills)


def dies_in_a_save(argv: list[str]) -> None:
    """train.py whose rank 1 is killed when half of its shard of iteration 3 is written."""
    write = convert._HashedFile.write

    def half(self, values) -> None:
        if ".tmp_iter_0000003" in str(self.path) and os.environ["RANK"] == "1" and len(values) > 1000:
            write(self, values[: len(values) // 2])
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, values)

    convert._HashedFile.write = half
    train.main(argv)


@pytest.mark.parametrize("more", [slow([]), ASYNC], ids=["sync", "async"])
def test_a_rank_that_dies_in_a_save(folder, tmp_path, whole, more):
    save = tmp_path / "save"
    argv = flags(folder, save, "--save-interval", 1, *more, iters=6)
    job = Job(argv, 2, dies_in_a_save)
    first, second = job.end(30)
    assert first in (1, -signal.SIGTERM) and second == -signal.SIGKILL, job.words()
    assert "Traceback" not in job.words() and "gloo" not in job.logs[0].read_text().partition("micro-batch(es)")[2]
    assert complete(save) == [1, 2]
    job = Job([*argv, "--load", str(save)], 2)
    assert job.end() == [0, 0], job.words()
    assert_same_run(whole(2, 6), save, 6)
    tried("a rank killed with half of its shard written")


# ---- a disk that is full, or cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_no_space_at_every_write_of_a_save(tmp_path, monkeypatch, background):
    """ENOSPC at the first, the second, ... change of a save: one line, and the iteration before is as it was."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(20, 20)
        state = {"iteration": 1, "data": {}}
        save_checkpoint(tmp_path, 1, model, None, state)
        left = 0

        def full(change):
            def changed(*args, **options):
                nonlocal left
                left -= 1
                if left == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return change(*args, **options)
            return changed

        for owner, name in ((convert._HashedFile, "write"), (os, "fsync"), (Path, "mkdir"), (os, "rename"),
                            (os, "replace")):
            monkeypatch.setattr(owner, name, full(getattr(owner, name)))
        event, failed = 0, True
        while failed:
            event += 1
            left = event
            with CheckpointWriter(background, timedelta(minutes=1)) as saver:
                try:
                    saver.save(tmp_path, 2, model, None, state, None)
                    saver.wait()
                    failed = False
                except InputError as e:
                    assert re.search("iter_0000002: was not saved: .*No space left on device", str(e))
            left = 0
            assert complete(tmp_path) in ([1], [1, 2])  # the last to fail are flushes when all is in its place
            assert failed or find_checkpoint(tmp_path).name == "iter_0000002"
            assert load_checkpoint(find_checkpoint(tmp_path), model) == state
            if not failed:
                assert {f.name for f in tmp_path.iterdir()} == {"iter_0000001", "iter_0000002", convert.TRACKER}
        assert event > 12
        tried("ENOSPC at each write of a save", event - 1)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def group_of_one():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_is_saved_in_the_background_is_of_the_moment_of_the_save(tmp_path, monkeypatch, group_of_one):
    """Training changes weights, moments and its state before a byte is written; then a second save uses the memory."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    data_position = {"waiting": [1]}

    def step() -> list[torch.Tensor]:
        model(torch.ones(4)).sum().backward()
        optimizer.step()
        moments = [t for state in optimizer.state.values() for t in state.values()]
        return [t.detach().clone() for t in (*model.parameters(), *moments)]

    write, go_on = convert._write_shard, threading.Event()
    monkeypatch.setattr(convert, "_write_shard", lambda *args: (go_on.wait(30), write(*args))[1])
    expected = []
    with CheckpointWriter(True, timedelta(minutes=1)) as saver:
        for iteration in (1, 2):
            expected.append(step())
            state = {"iteration": iteration, "data": data_position}
            saver.save(tmp_path, iteration, model, optimizer, state, None)
            step()
            data_position["waiting"].append(iteration + 1)
            go_on.set()
    for iteration, values in enumerate(expected, 1):
        again = torch.nn.Linear(4, 4)
        resumed = torch.optim.AdamW(again.parameters())
        state = load_checkpoint(tmp_path / f"iter_{iteration:07d}", again, resumed)
        assert state["data"]["waiting"] == list(range(1, iteration + 1))
        moments = [t for each in resumed.state.values() for t in each.values()]
        assert all(torch.equal(a, b) for a, b in zip(values, (*again.parameters(), *moments), strict=True))


def test_the_end_of_a_run_waits_for_the_save_and_tells_its_failure(tmp_path, monkeypatch, caplog, group_of_one):
    write = convert._write_shard
    monkeypatch.setattr(convert, "_write_shard", lambda *args: (time.sleep(0.3), write(*args))[1])
    save = {"save_dir": tmp_path, "model": torch.nn.Linear(4, 4), "optimizer": None, "retain": None}
    with CheckpointWriter(True, timedelta(minutes=1)) as saver:
        saver.save(iteration=1, trainer_state={"iteration": 1, "data": {}}, **save)
    assert complete(tmp_path) == [1]
    unloadable = {"iteration": 2, "data": {"path": Path("/")}}
    with pytest.raises(InputError, match="iter_0000002: was not saved"):
        with CheckpointWriter(True, timedelta(minutes=1)) as saver:
            saver.save(iteration=2, trainer_state=unloadable, **save)
    with pytest.raises(KeyError, match="the reason"):  # which the failure of a save does not hide
        with CheckpointWriter(True, timedelta(minutes=1)) as saver:
            saver.save(iteration=2, trainer_state=unloadable, **save)
            raise KeyError("the reason")
    assert "iter_0000002: was not saved" in caplog.text and complete(tmp_path) == [1]


def with_little_room(argv: list[str]) -> None:
    """train.py where no file can grow beyond 100 kB: from iteration 40 on."""
    save = train.save_iteration

    def limited(args, iteration, *rest) -> None:
        if iteration == 40:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        save(args, iteration, *rest)

    train.save_iteration = limited
    train.main(argv)


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_in_the_background_that_fails_ends_the_run(folder, tmp_path, world):
    """With one line, soon (not at the end of a long run), on all ranks, and the iterations before intact."""
    job = Job(flags(folder, tmp_path / "save", "--save-interval", 20, *ASYNC, iters=100000), world, with_little_room)
    statuses = job.end(40)
    assert 1 in statuses and set(statuses) <= {1, -signal.SIGTERM}, job.words()
    errors = lines_of(job.words(), "error: ")
    assert len(errors) == 1 and re.search("iter_0000040: was not saved: .*File too large", errors[0]), job.words()
    assert "Traceback" not in job.words() and complete(tmp_path / "save") == [20]
    assert len(read_metrics(tmp_path / "save")) < 59  # not by the next save, which waits for this one
    tried("a file that cannot grow in a save in the background")


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ASYNC], ids=["sync", "async"])
def test_a_full_disk(folder, tmp_path, whole, more):
    """A real one (a small tmpfs). After room was made the run goes on to what it would have been."""
    disk = tmp_path / "disk"
    disk.mkdir()
    one = sum(f.stat().st_size for f in find_checkpoint(whole(2, 6)).iterdir())
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(3.5 * one)}", "tmpfs", disk]).returncode:
        pytest.skip("this needs to mount a file system")
    try:
        argv = flags(folder, disk / "save", "--save-interval", 1, *more, iters=6)
        job = Job(argv, 2)
        assert 1 in job.end(40), job.words()
        errors = lines_of(job.words(), "error: ")
        assert len(errors) == 1 and "No space left on device" in errors[0] and "Traceback" not in job.words()
        assert "the checkpoints will take" in job.words()  # said at the start
        assert complete(disk / "save") == [1, 2, 3]
        for iteration in (1, 2):
            shutil.rmtree(disk / "save" / f"iter_{iteration:07d}")
        job = Job([*argv, "--load", str(disk / "save"), "--save-retain", "1"], 2)
        assert job.end(40) == [0, 0], job.words()
        assert_same_run(whole(2, 6), disk / "save", 6)
        tried("a full disk (tmpfs), then room made")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_room_is_looked_at_before_loading(folder, tmp_path, monkeypatch, capsys, caplog):
    """A checkpoint of this model is 3 float32 for each parameter; no room for one is an error, for all a warning."""
    monkeypatch.setattr(train, "build_model", lambda *args: (_ for _ in ()).throw(InputError("it loads")))
    one = sum(f.stat().st_size for f in (tmp_path / "x").glob("*"))
    with torch.device("meta"):
        model = train.Qwen3VL(train.Qwen3VLConfig.from_json(folder / "dense"))
    one = 12 * sum(p.numel() for p in model.parameters())
    for free, more, message, warned in (
        (one - 1, [], "a checkpoint takes .* are free: make room", False),
        (one, [], "it loads", False),
        (one, ["--save-interval", 6], "it loads", True),
        (2 * one, ["--save-interval", 6], "it loads", False),
        (2 * one, ["--save-interval", 1, "--save-retain", 2], "it loads", True),
        (3 * one, ["--save-interval", 1, "--save-retain", 2], "it loads", False),
        (one // 3 + 1, ["--no-save-optim"], "it loads", False),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(free, 0, free))
        caplog.clear()
        assert common.run_program(train.main, flags(folder, tmp_path / "save", *more)) == 1
        assert re.search(f"^error: .*{message}", capsys.readouterr().err, re.M), (free, more)
        assert ("the checkpoints will take" in caplog.text) == warned, (free, more)
        torch.distributed.destroy_process_group()
    tried("no room for a checkpoint")


def test_a_directory_that_cannot_be_written_is_found_before_loading(folder):
    status, words = run_quietly(flags(folder, Path("/proc/sys"), "--load", "nowhere"))  # which it must not come to
    assert status == 1 and "error: --save /proc/sys: /proc/sys/run.lock cannot be written" in words, words
    tried("a directory that cannot be written")


def run_quietly(argv: list[str]) -> tuple[int, str]:
    """train.py in this process: its exit status, and what it wrote to standard error."""
    with contextlib.redirect_stderr(io.StringIO()) as words:
        status = common.run_program(train.main, argv)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return status, words.getvalue()


# ---- what was trained is saved before anything else can fail --------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_held_out_rows_that_are_bad_do_not_lose_what_was_trained(folder, tmp_path, world):
    rows = [json.loads((folder / "rows.json").read_text())[0]] * 2 + [{"messages": "none"}]
    (tmp_path / "held_out.json").write_text(json.dumps(rows))
    job = Job(flags(folder, tmp_path / "save", "--eval-dataset", tmp_path / "held_out.json", iters=3), world)
    assert 1 in job.end()
    assert "held_out.json" in lines_of(job.words(), "error: ")[0] and "Traceback" not in job.words()
    assert complete(tmp_path / "save") == [3] and len(read_metrics(tmp_path / "save")) == 3


@pytest.mark.parametrize("world, more, seconds", [(1, [], 0), (2, ["--eval-interval", 2], 2)])
def test_a_signal_does_not_wait_for_an_evaluation(folder, tmp_path, world, more, seconds):
    """Neither for one at the end of the run, nor in one: of 100,000 rows."""
    row = json.loads((folder / "rows.json").read_text())[0]
    (tmp_path / "held_out.json").write_text(json.dumps([row] * 100_000))
    argv = flags(folder, tmp_path / "save", "--eval-dataset", tmp_path / "held_out.json", *more, iters=100_000)
    job = Job(argv, world)
    job.wait_for(1)
    time.sleep(seconds)
    job.kill(signal.SIGTERM)
    assert job.end(20) == [0] * world, job.words()
    assert complete(tmp_path / "save") == [len(read_metrics(tmp_path / "save"))]


def test_a_run_that_went_back_does_not_go_on_from_what_it_left_behind(folder, tmp_path, whole):
    """To iteration 4 of 8, killed at 5, resumed: 4 comes next, not the 8 of the run before."""
    save = tmp_path / "save"
    argv = flags(folder, save, "--save-interval", 4, iters=8)
    assert Job(argv).end() == [0]
    job = Job([*argv, "--load", str(save / "iter_0000004")], main=dies_in_its_first_step)
    assert job.end() == [-signal.SIGKILL]
    assert find_checkpoint(save).name == "iter_0000004"
    assert Job([*flags(folder, save, "--save-interval", 4), "--load", str(save)]).end() == [0]
    assert [m["iteration"] for m in read_metrics(save)] == list(range(1, 13))
    assert_same_run(whole(1, 12), save, 12)


def dies_in_its_first_step(argv: list[str]) -> None:
    parallel.clip_grad_norm = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    train.main(argv)


@pytest.mark.parametrize("name", ["args.json", train.RUN_LOCK, "metrics.jsonl"])
def test_a_strangers_save_directory_writes_nowhere_else(folder, tmp_path, name):
    (tmp_path / "save").mkdir()
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "save" / name).symlink_to(tmp_path / "mine")
    status, words = run_quietly(flags(folder, tmp_path / "save"))
    assert status == 1 and f"{name} is no file of its own" in words and (tmp_path / "mine").read_text() == "precious"


# ---- two runs at one directory --------------------------------------------------------------------------------------


def test_the_second_run_at_a_directory_is_refused_while_the_first_lives(folder, tmp_path, whole):
    save = tmp_path / "save"
    argv = flags(folder, save, "--save-interval", 1, iters=6)
    first = Job(argv, main=stops_in_its_third_save)
    first.wait_for(3)
    deadline = time.monotonic() + 30
    while not list(save.glob(".tmp_iter_0000003/trainer*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # it is written
    before = sorted(f.name for f in save.rglob("*"))
    for more in ([], ["--load", str(save)]):
        status, words = run_quietly(argv + more)
        assert status == 1 and re.search(f"another run writes there, process {first.ranks[0].pid} on ", words), words
    assert sorted(f.name for f in save.rglob("*")) == before and ".tmp_iter_0000003" in before
    first.kill(signal.SIGKILL)
    first.end()
    second = Job([*argv, "--load", str(save)])  # a killed run's lock needs no hand work
    assert second.end() == [0], second.words()
    assert_same_run(whole(1, 6), save, 6)
    tried("a second run at a directory in use", 2)


def stops_in_its_third_save(argv: list[str]) -> None:
    write = convert._write_metadata

    def stop(directory, *rest) -> None:
        if "3" in directory.name:
            time.sleep(600)
        write(directory, *rest)

    convert._write_metadata = stop
    train.main(argv)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def refuse(*args) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with train.run_lock(tmp_path):
        assert f"{tmp_path}: its file system has no locks (No locks available)" in caplog.text


# ---- damage --------------------------------------------------------------------------------------------------------


def test_a_damaged_newest_iteration_is_told_and_another_is_the_users_to_take(folder, tmp_path, whole):
    """Whatever is wrong with it: the file, and the iterations that are whole. With that flag the run is the same."""
    job = Job(flags(folder, tmp_path / "saved", "--save-interval", 1, iters=4))
    assert job.end() == [0], job.words()

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    harm = {
        "missing": Path.unlink, "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
        "a bit flipped": flip, "emptied": lambda path: path.write_bytes(b""),
    }
    for name in ("__0_0.distcp", ".metadata", "trainer_state_rank_00000.pt"):
        for kind, do in harm.items():
            shutil.rmtree(tmp_path / "save", ignore_errors=True)
            shutil.copytree(tmp_path / "saved", tmp_path / "save")
            save = tmp_path / "save"
            do(save / "iter_0000004" / name)
            os.truncate(save / "iter_0000003" / "__0_0.distcp", 100)  # not to be recommended
            status, words = run_quietly([*flags(folder, save, iters=6), "--load", str(save)])
            errors = lines_of(words, "error: ")
            if (name, kind) == (".metadata", "missing"):
                assert status == 1 and "iter_0000004, which is incomplete" in errors[0], words
                assert "iter_0000001, iter_0000002" in errors[0]
            else:
                assert status == 1 and len(errors) == 1 and f"iter_0000004/{name}: " in errors[0], (name, kind, words)
                older = [f"--load {save / f'iter_000000{i}'}" for i in (2, 1)]
                assert errors[0].endswith(f"take another checkpoint: {' or '.join(older)}"), (name, kind, errors)
            tried("the newest checkpoint damaged")
    job = Job([*flags(folder, save, iters=6), "--load", str(save / "iter_0000002")])
    assert job.end() == [0], job.words()
    assert_same_run(whole(1, 6), save, 6)


# ---- signals and time limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "ranks"), [slow([], 2), (ASYNC, 1)], ids=["sync, both", "async, one"])
def test_sigterm_in_an_accumulation(folder, tmp_path, whole, monkeypatch, more, ranks):
    """Two ranks, two micro-batches to a step, the signal while the first is in hand: one checkpoint, exit 0 on both, a
    line, and the run that goes on is the one that was never stopped."""
    save = tmp_path / "save"
    job = Job(flags(folder, save, *more, iters=100000), 2, both_get_sigterm if ranks == 2 else one_gets_sigterm)
    assert job.end() == [0, 0], job.words()
    assert job.words().count(f"go on with --load {save}") == 1 and complete(save) == [3]
    job = Job([*flags(folder, save, iters=6), "--load", str(save)], 2)
    assert job.end() == [0, 0], job.words()
    assert_same_run(whole(2, 6), save, 6)
    tried("SIGTERM in an accumulation, 2 ranks")


def both_get_sigterm(argv: list[str]) -> None:
    """train.py that gets SIGTERM when it has taken the first micro-batch of its third step."""
    take, taken = parallel.ParallelState.take, []

    def taking(self, batch):
        taken.append(batch)
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, batch)

    parallel.ParallelState.take = taking
    train.main(argv)


def one_gets_sigterm(argv: list[str]) -> None:
    (both_get_sigterm if os.environ["RANK"] == "1" else train.main)(argv)


def test_sigusr1_saves_once_and_training_goes_on(folder, tmp_path, whole):
    """Sent to both ranks, a step apart: the second signal comes while the first one's save goes on."""
    save = tmp_path / "save"
    job = Job(flags(folder, save, iters=6), 2, gets_sigusr1)
    assert job.end() == [0, 0], job.words()
    assert complete(save) == [3, 6]
    assert_same_run(whole(2, 6), save, 6)
    tried("SIGUSR1, 2 ranks")


def gets_sigusr1(argv: list[str]) -> None:
    poll, write, polled = train.Signals.poll, train.save_iteration, []

    def polling(self):
        polled.append(1)
        if len(polled) == 3 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGUSR1)
        return poll(self)

    def saving(*args) -> None:
        if os.environ["RANK"] == "1" and len(polled) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        write(*args)

    train.Signals.poll, train.save_iteration = polling, saving
    train.main(argv)


def test_exit_duration(folder, tmp_path):
    job = Job(flags(folder, tmp_path / "save", "--exit-duration-in-mins", 0.05, iters=100000), 2)
    began = time.monotonic()
    assert job.end(40) == [0, 0], job.words()
    assert 3 < time.monotonic() - began < 20  # from the program's start
    done = len(read_metrics(tmp_path / "save"))
    assert complete(tmp_path / "save") == [done] and "stopped at iteration" in job.words()
    tried("--exit-duration-in-mins, 2 ranks")


# ---- ranks that fail ------------------------------------------------------------------------------------------------


def runs_out_of_memory(argv: list[str]) -> None:
    forward = train.Qwen3VL.forward

    def greedy(self, batch, calls=[]):  # noqa: B006
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            torch.empty(2**60, dtype=torch.uint8)
        return forward(self, batch)

    train.Qwen3VL.forward = greedy
    train.main(argv)


def test_out_of_memory_on_one_rank(folder, tmp_path):
    """PyTorch's own error (of its CPU allocator): one line, the rank, the rows in hand, what to do; the other ends."""
    began = time.monotonic()
    job = Job(flags(folder, tmp_path / "save", "--no-shuffle"), 2, runs_out_of_memory)
    assert set(job.end(30)) <= {1, -signal.SIGTERM} and time.monotonic() - began < 25, job.words()
    errors = lines_of(job.words(), "error: ")
    assert len(errors) == 1 and "Traceback" not in job.words(), job.words()
    assert re.search(r"rank 1: out of memory .*--micro-batch-size.*row-5\)$", errors[0]), errors  # step 2, its first
    tried("out of memory on one of 2 ranks")


def test_a_killed_worker_ends_all(folder, tmp_path):
    job = Job([*flags(folder, tmp_path / "save", "--num-workers", 2, iters=100000)], 2)
    job.wait_for(2)
    pid = job.ranks[1].pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert set(job.end(30)) <= {1, -signal.SIGTERM}, job.words()
    errors = lines_of(job.words(), "error: ")
    assert len(errors) == 1 and "Traceback" not in job.words(), job.words()
    reason = "(is killed by signal: Killed|exited unexpectedly)"
    assert re.search(rf"rank 1: DataLoader worker \(pid.*{reason}.*--num-workers", errors[0]), errors
    tried("kill -9 of a loader's worker")


def test_a_stopped_rank_ends_the_others_and_is_named(folder, tmp_path):
    job = Job(flags(folder, tmp_path / "save", "--distributed-timeout-minutes", 0.1, "--context-parallel-size", 2,
                    iters=100000), 2)
    job.wait_for(2)
    job.kill(signal.SIGSTOP, 1)
    deadline = time.monotonic() + 40
    while job.ranks[0].is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job.ranks[0].exitcode == 1, job.words()
    errors = lines_of(job.words(), "error: ")
    assert len(errors) == 1 and "Traceback" not in job.words(), job.words()
    assert re.search(r"rank 0: .* 0.1 minutes .*no sign of life from rank 1$", errors[0]), errors
    job.kill(signal.SIGKILL, 1)
    job.end()
    tried("SIGSTOP of one of 2 ranks")


def hangs(argv: list[str]) -> None:
    """train.py that in its third step waits for ever where no signal's handler runs, as for a device."""
    step, calls = parallel.clip_grad_norm, []

    def waiting(*args):
        calls.append(1)
        if len(calls) == 3:
            import ctypes

            print("waiting", flush=True)
            while True:
                ctypes.CDLL(None).pause()
        return step(*args)

    parallel.clip_grad_norm = waiting
    train.main(argv)


def test_a_hanging_step_that_was_asked_to_stop_ends(folder, tmp_path):
    job = Job(flags(folder, tmp_path / "save", "--distributed-timeout-minutes", 0.05), main=hangs)
    job.wait_for(2)
    deadline = time.monotonic() + 20
    while "waiting" not in job.words() and time.monotonic() < deadline:
        time.sleep(0.02)
    began = time.monotonic()
    job.kill(signal.SIGTERM)
    assert job.end(20) == [1] and 2.5 < time.monotonic() - began < 10, job.words()
    assert lines_of(job.words(), "error: ") == [
        "error: rank 0: asked to stop, and the step in hand has not ended in 0.05 minutes: look for a rank that died "
        "or hangs"]
    tried("a step that hangs, SIGTERM")


def show_timeouts(argv: list[str]) -> None:
    """Makes the ranks that train.py would, and prints the timeout of each group there is."""
    args = train.parse_args(argv)
    ranks = parallel.ParallelState(kernels_npu.select("cpu"), args.distributed_timeout_minutes, cp=2, ep=2, fsdp=2)
    for group in torch.distributed.distributed_c10d._world.pg_map:
        print("timeout:", group._get_backend(torch.device("cpu")).options._timeout.total_seconds(), flush=True)
    torch.distributed.barrier()  # rank 0 keeps the store, and must not leave while others make groups
    ranks.close()


def test_every_group_has_the_timeout(folder, tmp_path):
    job = Job(flags(folder, tmp_path / "save", "--distributed-timeout-minutes", 7), 4, show_timeouts)
    assert job.end() == [0] * 4, job.words()
    found = lines_of(job.words(), "timeout: ")
    assert len(found) > 4 * 5 and set(found) == {"timeout: 420.0"}, found


# ---- numbers going bad ----------------------------------------------------------------------------------------------


def goes_bad(argv: list[str]) -> None:
    """train.py whose rank 1 has a loss that is no number: in step 2, and from step 5 on."""
    take, taken = parallel.ParallelState.take, []

    def bad(self, batch):
        taken.append(1)
        if os.environ["RANK"] == "1" and (len(taken) == 2 or len(taken) >= 5):
            batch.loss_weights[:] = math.nan
        return take(self, batch)

    parallel.ParallelState.take = bad
    train.main(argv)


LAYOUTS = {"cp": ["--context-parallel-size", 2], "ep": ["--expert-parallel-size", 2, "--global-batch-size", 2]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loss_that_is_no_number_on_one_rank(folder, tmp_path, layout):
    """Skipped by both ranks alike; ten in a row end the run, with what was being saved in the background complete."""
    more = [*LAYOUTS[layout], "--micro-batch-size", 4 if layout == "cp" else 1, "--save-interval", 4, *ASYNC]
    job = Job(flags(folder, tmp_path / "save", *more, model="moe", iters=100), 2, goes_bad)
    assert set(job.end(60)) <= {1, -signal.SIGTERM}, job.words()
    errors = lines_of(job.words(), "error: ")
    assert len(errors) == 1 and "ten steps in a row were not finite, the last at iteration 14" in errors[0]
    assert re.search("row-[0-9]+", errors[0]), errors
    metrics = read_metrics(tmp_path / "save")
    assert [m["skipped_iterations"] for m in metrics] == [0, 1, 0, 0, *[1] * 9]
    assert all((m["loss"] is None) == bool(m["skipped_iterations"]) for m in metrics)
    for text in (job.logs[0].read_text(), job.logs[1].read_text()):
        assert len(re.findall("^iteration .*not applied; this rank's rows: .*row-", text, re.M)) >= 10
    assert complete(tmp_path / "save") == [4, 8, 12]
    saved = [convert.CheckpointWeights(tmp_path / "save" / f"iter_{i:07d}") for i in (4, 12)]
    for name, (_, shape) in saved[0].tensors.items():  # nothing has moved since the last good step, and all is finite
        first, last = (s.read(name, (0,) * len(shape), tuple(shape)) for s in saved)
        assert torch.equal(first, last) and first.isfinite().all(), name
    tried("a loss that is no number on one of 2 ranks", 11)
