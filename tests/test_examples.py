"""The launch scripts: wrong values are told before Python starts, right ones reach train.py, two nodes train as one."""
from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import train

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("finetune_*.sh"))
DEVICES = {"finetune_8b": 8, "finetune_32b": 16, "finetune_30b_a3b": 16, "finetune_235b_a22b": 256}
# what an outer shell may have set must not reach the scripts
OURS = {
    "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "NODE_ADDR", "NPUS_PER_NODE", "CKPT", "DATASET", "SAVE", "EP",
    "CP", "MICRO_BATCH_SIZE", "GLOBAL_BATCH_SIZE", "DRY", "ASCEND_SET_ENV", "ASCEND_TOOLKIT_HOME",
}
VARIABLES = {  # facts of the guide: values that work, values that do not
    "ASCEND_SLOG_PRINT_TO_STDOUT": ("0 1", "2 -1 on"),
    "ASCEND_GLOBAL_LOG_LEVEL": ("0 4", "5 DEBUG"),
    "TASK_QUEUE_ENABLE": ("0 1 2", "3 x"),
    "COMBINED_ENABLE": ("0 1", "2"),
    "CPU_AFFINITY_CONF": ("0 1 2", "3"),
    "HCCL_CONNECT_TIMEOUT": ("120 7200", "5 119 7201 1e3 120s 0x80 0200 99999999999999999999"),
    "HCCL_EXEC_TIMEOUT": ("68 17340", "67 17341 -68"),
    "PYTORCH_NPU_ALLOC_CONF": ("expandable_segments:True expandable_segments:False", "expandable_segments:1 True"),
    "ACLNN_CACHE_LIMIT": ("1 10000000", "0 10000001"),
    "TOKENIZERS_PARALLELISM": ("False True", "2 yes"),
    "MULTI_STREAM_MEMORY_REUSE": ("0 1 2", "4"),
    "NPU_ASD_ENABLE": ("0 1 2 3", "4"),
    "ASCEND_LAUNCH_BLOCKING": ("0 1", "2"),
    "CUDA_DEVICE_MAX_CONNECTIONS": ("2 32", "1 0 33"),
    "TORCHELASTIC_SHUTDOWN_TIMEOUT": ("30 86400", "29"),
    "NNODES": ("1", "0 two 1.5"),
    "NPUS_PER_NODE": ("1 8", "0 all -8 65"),
    "NODE_RANK": ("0", "1 x"),
    "MASTER_PORT": ("1024 65535", "0 1023 65536 http"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with weights (`model`), and rows of which every other has a picture (`rows.json`)."""
    path = tmp_path_factory.mktemp("examples with a space")
    raw = tiny.config_dict(moe=True)
    raw["text_config"]["num_experts"] = 8
    tiny.hf_dir(path / "model", raw, tiny.hf_model(raw))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path / "a.png")
    rows = [{"messages": [{"role": "user", "content": "<image>" * (i % 2) + "what is this"},
                          {"role": "assistant", "content": f"number {i}"}], "images": ["a.png"] * (i % 2)}
            for i in range(8)]
    (path / "rows.json").write_text(json.dumps(rows))
    return path


def environment(folder: Path, **variables) -> dict[str, str]:
    outer = {k: v for k, v in os.environ.items() if k not in OURS and k not in VARIABLES}
    path = f"{Path(sys.executable).parent}:{outer['PATH']}"
    return {**outer, "PATH": path, "CKPT": str(folder / "model"), "DATASET": str(folder / "rows.json"),
            **{k: str(v) for k, v in variables.items()}}


def script(folder: Path, name: str, *argv, **variables) -> subprocess.CompletedProcess:
    """A script that ends after its checks, run from another directory than the checkout."""
    return subprocess.run(["bash", ROOT / f"examples/{name}.sh", *map(str, argv)], capture_output=True, text=True,
                          env=environment(folder, **{"DRY": 1, **variables}), cwd=folder, timeout=30)


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 2 and not result.stdout, result
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line, line


def flags(result: subprocess.CompletedProcess) -> list[str]:
    """The flags of train.py in a printed command."""
    assert result.returncode == 0, result.stderr
    command = shlex.split(result.stdout)
    return command[command.index(str(ROOT / "train.py")) + 1:]


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "examples/env.sh"], ids=lambda p: p.name)
def test_syntax(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0


@pytest.mark.parametrize("name", DEVICES)
def test_train_takes_what_a_script_passes(folder, name):
    assert {p.stem for p in SCRIPTS} == set(DEVICES)
    result = script(folder, name, "--train-iters", 2, "--lr", "3e-5", **{"MASTER_ADDR": "10.0.0.1"})
    args = train.parse_args(flags(result))
    assert args.init_from_hf_path == str(folder / "model") and args.dataset == str(folder / "rows.json")
    assert args.train_iters == 2 and args.lr == 3e-5  # the last flag counts
    words = shlex.split(result.stdout)
    nodes, each = (int(words[words.index(flag) + 1]) for flag in ("--nnodes", "--nproc-per-node"))
    assert nodes * each == DEVICES[name]
    samples, accumulation = train.batch_sizes(args, nodes * each // args.context_parallel_size)
    assert samples == DEVICES[name] and accumulation == 1
    # experts divide over the ranks that share them, and their inner sizes (768 and 1536) over the rest
    assert nodes * each % args.expert_parallel_size == 0 and 128 % args.expert_parallel_size == 0
    assert 768 % (nodes * each // args.expert_parallel_size) == 0


def test_flags_that_exclude_a_scripts_own(folder):
    result = script(folder, "finetune_8b", "--train-epochs", 2, "--lr-warmup-iters", 5)
    args = train.parse_args(flags(result))
    assert (args.train_iters, args.train_epochs, args.lr_warmup_iters, args.lr_warmup_fraction) == (None, 2, 5, None)


@pytest.mark.parametrize("name,value", [(k, v) for k, (_, wrong) in VARIABLES.items() for v in wrong.split()])
def test_wrong_values_are_told(folder, name, value):
    refused(script(folder, "finetune_8b", DRY=0, **{name: value}), f"error: {name}={value}: must be ")


def test_the_message(folder):
    result = script(folder, "finetune_8b", DRY=0, HCCL_CONNECT_TIMEOUT=5)
    assert result.stderr == "error: HCCL_CONNECT_TIMEOUT=5: must be a whole number in 120..7200\n"


@pytest.mark.parametrize("name", VARIABLES)
def test_right_values_are_taken(folder, name):
    for value in VARIABLES[name][0].split():
        result = script(folder, "finetune_8b", GLOBAL_BATCH_SIZE=64, **{name: value})
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", DEVICES)
def test_every_variable_of_the_guide_reaches_train(folder, name):
    """torchrun is replaced by a program that prints its environment: defaults are in their ranges, given values win."""
    (folder / name).mkdir()
    fake = folder / name / "torchrun"
    fake.write_text("#!/bin/sh\nenv\n")
    fake.chmod(0o755)
    given = {"NPU_ASD_ENABLE": "2", "MASTER_ADDR": "10.0.0.1", "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    result = script(folder, name, DRY=0, **given)
    assert result.returncode == 0, result.stderr
    seen = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
    for variable in list(VARIABLES)[:15]:
        assert variable in seen
    assert seen["NPU_ASD_ENABLE"] == "2" and seen["CUDA_DEVICE_MAX_CONNECTIONS"] == "2"
    large = name == "finetune_235b_a22b"
    wanted = ("1", "2") if large else ("2", "1")
    assert (seen["TASK_QUEUE_ENABLE"], seen["MULTI_STREAM_MEMORY_REUSE"]) == wanted


def test_layouts_that_cannot_work_are_told(folder):
    refused(script(folder, "finetune_8b", NNODES=2), "MASTER_ADDR=localhost", "NNODES=2")
    refused(script(folder, "finetune_8b", NNODES=2, NODE_RANK=2, MASTER_ADDR="10.0.0.1"), "NODE_RANK=2", "0..1")
    refused(script(folder, "finetune_8b", NNODES=2, MASTER_ADDR="a b"), "MASTER_ADDR=a b")
    refused(script(folder, "finetune_8b", NODE_ADDR="a b"), "NODE_ADDR=a b")
    refused(script(folder, "finetune_30b_a3b", NPUS_PER_NODE=4), "EP=8", "4 devices")
    refused(script(folder, "finetune_8b", CP=3), "CP=3", "8 devices")
    refused(script(folder, "finetune_8b", CP="no"), "CP=no")
    refused(script(folder, "finetune_8b", NPUS_PER_NODE=3), "GLOBAL_BATCH_SIZE=8", "multiple of 3")
    # a flag takes the variable's place, and train.py judges it
    args = train.parse_args(flags(script(folder, "finetune_30b_a3b", "--expert-parallel-size=4", NPUS_PER_NODE=4)))
    assert args.expert_parallel_size == 4


def test_missing_files_are_told(folder):
    refused(script(folder, "finetune_8b", CKPT=folder / "nowhere"), f"CKPT={folder / 'nowhere'}", "config.json")
    refused(script(folder, "finetune_8b", DATASET=f"{folder / 'rows.json'},no.json"), "DATASET=", "there is no no.json")
    refused(script(folder, "finetune_8b", DATASET=f"{folder / 'rows.json'},no.json"), "DATASET=", "there is no no.json")
    refused(script(folder, "finetune_8b", ASCEND_SET_ENV=folder / "set_env.sh"), "ASCEND_SET_ENV=")
    refused(script(folder, "finetune_8b", ASCEND_TOOLKIT_HOME=folder), "ASCEND_TOOLKIT_HOME=")
    result = script(folder, "finetune_8b", "--init-from-hf-path", "elsewhere", "--dataset", "other.json",
                    CKPT="nowhere", DATASET="no.json")
    assert train.parse_args(flags(result)).dataset == "other.json"
    (folder / "flags").write_text("--dataset other.json\n")
    assert flags(script(folder, "finetune_8b", "@flags", DATASET="no.json"))[-1] == "@flags"


@pytest.mark.parametrize("home", [".", "latest"])
def test_cann_is_set_up_from_its_own_script(folder, home, tmp_path):
    """A set_env.sh as CANN's: it reads variables that are not set, and ends with a status of its own."""
    (tmp_path / "latest").mkdir()
    (tmp_path / "set_env.sh").write_text('export LD_LIBRARY_PATH=/cann:$NOT_SET_AT_ALL\necho sourced >&2\nfalse\n')
    result = script(folder, "finetune_8b", ASCEND_TOOLKIT_HOME=tmp_path / home)
    assert result.returncode == 0 and result.stderr == "sourced\n"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def read_metrics(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def start(folder: Path, name: str, *argv, **variables) -> subprocess.Popen:
    return subprocess.Popen(["bash", ROOT / f"examples/{name}.sh", *map(str, argv)], cwd=folder, text=True,
                            env=environment(folder, OMP_NUM_THREADS=1, NPUS_PER_NODE=1, **variables),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_two_nodes_train_as_one_process(folder, tmp_path):
    """A script on two nodes of one device, both on this machine, with the experts split over them."""
    own = ["--device", "cpu", "--train-iters", 2, "--lr", "1e-3", "--lr-warmup-iters", 0, "--num-workers", 0,
           "--no-freeze-vision-encoder", "--no-freeze-vision-projector"]
    where = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NODE_ADDR": "127.0.0.1",
             "EP": 2, "GLOBAL_BATCH_SIZE": 4}
    nodes = [start(folder, "finetune_30b_a3b", *own, SAVE=tmp_path / "two", NODE_RANK=i, **where) for i in range(2)]
    try:
        for node in nodes:
            out, _ = node.communicate(timeout=120)
            assert node.returncode == 0, out[-3000:]
    finally:
        for node in nodes:
            node.terminate()  # forwarded to what it started
            node.wait(60)
    two = read_metrics(tmp_path / "two")

    one_device = {"EP": 1, "NPUS_PER_NODE": 1, "GLOBAL_BATCH_SIZE": 4, "SAVE": tmp_path / "one"}
    try:
        train.main(flags(script(folder, "finetune_30b_a3b", *own, **one_device)))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, signal.SIG_DFL)
    for a, b in zip(two, read_metrics(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert len(two) == 2 and two[0]["loss"] != two[1]["loss"]


def test_a_signal_to_the_script_saves_and_ends_with_0(folder, tmp_path):
    """torchrun alone would end with 1, and kill after 30 s."""
    node = start(folder, "finetune_30b_a3b", "--device", "cpu", "--train-iters", 100000, "--num-workers", 1,
                 EP=1, SAVE=tmp_path, GLOBAL_BATCH_SIZE=2, MASTER_PORT=free_port())
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    node.send_signal(signal.SIGTERM)
    out, _ = node.communicate(timeout=60)
    assert node.returncode == 0 and f"go on with --load {tmp_path}" in out, out[-3000:]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(len(read_metrics(tmp_path)))
