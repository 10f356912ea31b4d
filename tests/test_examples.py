"""The launch scripts: wrong values end before Python starts, right ones reach train.py, two nodes train as one."""
from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from helpers import ROOT, free_port, read_metrics, write_mixed_rows

import train

SCRIPTS = sorted((ROOT / "examples").glob("finetune_*.sh"))
DEVICES = {"finetune_8b": 8, "finetune_32b": 16, "finetune_30b_a3b": 16, "finetune_235b_a22b": 256}
# the scripts must not see these if the shell that runs the tests has set them
SCRIPT_VARIABLES = {
    "MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK", "NODE_ADDR", "NPUS_PER_NODE", "CKPT", "DATASET", "SAVE", "EP",
    "CP", "LORA_RANK", "MICRO_BATCH_SIZE", "GLOBAL_BATCH_SIZE", "DRY", "ASCEND_SET_ENV", "ASCEND_TOOLKIT_HOME",
}
VARIABLES = {  # from the guide that the scripts follow: values that work, values that do not
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
    "LORA_RANK": ("0 16", "-1 x"),
    "NPUS_PER_NODE": ("1 8", "0 all -8 65"),
    "NODE_RANK": ("0", "1 x"),
    "MASTER_PORT": ("1024 65535", "0 1023 65536 http"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a directory with a mixture of experts (`model`) and rows.json; its name has spaces."""
    path = tmp_path_factory.mktemp("examples with a space")
    raw = tiny.config_dict(moe=True)
    raw["text_config"]["num_experts"] = 8
    tiny.hf_dir(path / "model", raw, tiny.hf_model(raw))
    write_mixed_rows(path)
    return path


def environment(folder: Path, **variables) -> dict[str, str]:
    """Return the environment of a script: the model and rows of `folder`, and `variables`."""
    outer = {k: v for k, v in os.environ.items() if k not in SCRIPT_VARIABLES and k not in VARIABLES}
    path = f"{Path(sys.executable).parent}:{outer['PATH']}"
    return {**outer, "PATH": path, "CKPT": str(folder / "model"), "DATASET": str(folder / "rows.json"),
            **{k: str(v) for k, v in variables.items()}}


def run_script(folder: Path, name: str, *argv, **variables) -> subprocess.CompletedProcess:
    """Run a script, by default with DRY=1, from a directory outside the checkout."""
    return subprocess.run(["bash", ROOT / f"examples/{name}.sh", *map(str, argv)], capture_output=True, text=True,
                          env=environment(folder, **{"DRY": 1, **variables}), cwd=folder, timeout=30)


def start_script(folder: Path, name: str, *argv, **variables) -> subprocess.Popen:
    """Start a script that trains on one device."""
    return subprocess.Popen(["bash", ROOT / f"examples/{name}.sh", *map(str, argv)], cwd=folder, text=True,
                            env=environment(folder, OMP_NUM_THREADS=1, NPUS_PER_NODE=1, **variables),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def train_flags(result: subprocess.CompletedProcess) -> list[str]:
    """Return the flags of train.py in the command that a script printed."""
    assert result.returncode == 0, result.stderr
    command = shlex.split(result.stdout)
    return command[command.index(str(ROOT / "train.py")) + 1:]


def assert_refused(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Check that a script ended with status 2 and one line that has all `parts`."""
    assert result.returncode == 2 and not result.stdout, result
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line, line


# ---- flags and variables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "examples/env.sh"], ids=lambda p: p.name)
def test_script_syntax(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0


@pytest.mark.parametrize("name", DEVICES)
def test_script_flags_fit_train(folder, name):
    """train.py accepts the flags, and the layout divides the devices, the samples and the experts."""
    assert {p.stem for p in SCRIPTS} == set(DEVICES)
    result = run_script(folder, name, "--train-iters", 2, "--lr", "3e-5", MASTER_ADDR="10.0.0.1")
    args = train.parse_args(train_flags(result))
    assert args.init_from_hf_path == str(folder / "model") and args.dataset == str(folder / "rows.json")
    assert args.train_iters == 2 and args.lr == 3e-5  # the last flag counts
    command = shlex.split(result.stdout)
    nodes, per_node = (int(command[command.index(flag) + 1]) for flag in ("--nnodes", "--nproc-per-node"))
    devices = nodes * per_node
    assert devices == DEVICES[name]
    dp_size = devices // args.context_parallel_size
    samples, accumulation = train.batch_sizes(args.micro_batch_size, args.global_batch_size, dp_size)
    assert (samples, accumulation) == (devices, 1)
    # 128 experts are divided over the ranks that share them, their inner sizes (768 and 1536) over the rest
    assert devices % args.expert_parallel_size == 0 and 128 % args.expert_parallel_size == 0
    assert 768 % (devices // args.expert_parallel_size) == 0


def test_script_flags_replace_exclusive_defaults(folder):
    """--train-epochs excludes the script's own --train-iters, and --lr-warmup-iters its --lr-warmup-fraction."""
    result = run_script(folder, "finetune_8b", "--train-epochs", 2, "--lr-warmup-iters", 5)
    args = train.parse_args(train_flags(result))
    assert (args.train_iters, args.train_epochs, args.lr_warmup_iters, args.lr_warmup_fraction) == (None, 2, 5, None)


@pytest.mark.parametrize(("rank", "lr"), [(0, 1e-5), (16, 1e-4)])
def test_script_lora_rank(folder, rank, lr):
    args = train.parse_args(train_flags(run_script(folder, "finetune_30b_a3b", LORA_RANK=rank)))
    assert (args.lora_rank, args.lr) == (rank, lr)


@pytest.mark.parametrize("name,value", [(k, v) for k, (_, wrong) in VARIABLES.items() for v in wrong.split()])
def test_script_wrong_value(folder, name, value):
    result = run_script(folder, "finetune_8b", DRY=0, **{name: value})
    assert_refused(result, f"error: {name}={value}: must be ")


def test_script_error_message(folder):
    result = run_script(folder, "finetune_8b", DRY=0, HCCL_CONNECT_TIMEOUT=5)
    assert result.stderr == "error: HCCL_CONNECT_TIMEOUT=5: must be a whole number in 120..7200\n"


@pytest.mark.parametrize("name", VARIABLES)
def test_script_right_values(folder, name):
    for value in VARIABLES[name][0].split():
        result = run_script(folder, "finetune_8b", GLOBAL_BATCH_SIZE=64, **{name: value})
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", DEVICES)
def test_script_exports_variables(folder, name):
    """A torchrun that prints its environment shows the defaults, and that a value from outside wins."""
    (folder / name).mkdir()
    torchrun = folder / name / "torchrun"
    torchrun.write_text("#!/bin/sh\nenv\n")
    torchrun.chmod(0o755)
    given = {"NPU_ASD_ENABLE": "2", "MASTER_ADDR": "10.0.0.1", "PATH": f"{torchrun.parent}:{os.environ['PATH']}"}
    result = run_script(folder, name, DRY=0, **given)
    assert result.returncode == 0, result.stderr
    seen = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
    assert set(list(VARIABLES)[:15]) <= seen.keys()  # the rest is for the scripts alone
    assert seen["NPU_ASD_ENABLE"] == "2" and seen["CUDA_DEVICE_MAX_CONNECTIONS"] == "2"
    expected = ("1", "2") if name == "finetune_235b_a22b" else ("2", "1")
    assert (seen["TASK_QUEUE_ENABLE"], seen["MULTI_STREAM_MEMORY_REUSE"]) == expected


@pytest.mark.parametrize(("name", "variables", "parts"), [
    ("finetune_8b", {"NNODES": 2}, ("MASTER_ADDR=localhost", "NNODES=2")),
    ("finetune_8b", {"NNODES": 2, "NODE_RANK": 2, "MASTER_ADDR": "10.0.0.1"}, ("NODE_RANK=2", "0..1")),
    ("finetune_8b", {"NNODES": 2, "MASTER_ADDR": "a b"}, ("MASTER_ADDR=a b",)),
    ("finetune_8b", {"NODE_ADDR": "a b"}, ("NODE_ADDR=a b",)),
    ("finetune_30b_a3b", {"NPUS_PER_NODE": 4}, ("EP=8", "4 devices")),
    ("finetune_8b", {"CP": 3}, ("CP=3", "8 devices")),
    ("finetune_8b", {"CP": "no"}, ("CP=no",)),
    ("finetune_8b", {"NPUS_PER_NODE": 3}, ("GLOBAL_BATCH_SIZE=8", "multiple of 3")),
])
def test_script_impossible_layout(folder, name, variables, parts):
    assert_refused(run_script(folder, name, **variables), *parts)


def test_script_layout_flag_replaces_variable(folder):
    """train.py checks a flag's value; the script does not check the variable that the flag replaces."""
    result = run_script(folder, "finetune_30b_a3b", "--expert-parallel-size=4", NPUS_PER_NODE=4)
    assert train.parse_args(train_flags(result)).expert_parallel_size == 4


def test_script_missing_files(folder):
    nowhere = folder / "nowhere"
    for variables, parts in (
        ({"CKPT": nowhere}, (f"CKPT={nowhere}", "config.json")),
        ({"DATASET": f"{folder / 'rows.json'},no.json"}, ("DATASET=", "no.json")),
        ({"ASCEND_SET_ENV": folder / "set_env.sh"}, ("ASCEND_SET_ENV=",)),
        ({"ASCEND_TOOLKIT_HOME": folder}, ("ASCEND_TOOLKIT_HOME=",)),
    ):
        assert_refused(run_script(folder, "finetune_8b", **variables), *parts)
    flags = ["--init-from-hf-path", "elsewhere", "--dataset", "other.json"]
    result = run_script(folder, "finetune_8b", *flags, CKPT="nowhere", DATASET="no.json")
    assert train.parse_args(train_flags(result)).dataset == "other.json"
    (folder / "flags").write_text("--dataset other.json\n")
    assert train_flags(run_script(folder, "finetune_8b", "@flags", DATASET="no.json"))[-1] == "@flags"


@pytest.mark.parametrize("home", [".", "latest"])
def test_script_sources_cann(folder, home, tmp_path):
    """Source a set_env.sh that, like CANN's own, reads unset variables and ends with a status other than 0."""
    (tmp_path / "latest").mkdir()
    (tmp_path / "set_env.sh").write_text('export LD_LIBRARY_PATH=/cann:$NOT_SET_AT_ALL\necho sourced >&2\nfalse\n')
    result = run_script(folder, "finetune_8b", ASCEND_TOOLKIT_HOME=tmp_path / home)
    assert result.returncode == 0 and result.stderr == "sourced\n"


# ---- training --------------------------------------------------------------------------------------------------------


def test_script_two_nodes_equal_one_process(folder, tmp_path):
    """Two nodes of one device, both on this machine, split the experts and train as one process does."""
    flags = ["--device", "cpu", "--train-iters", 2, "--lr", "1e-3", "--lr-warmup-iters", 0, "--num-workers", 0,
             "--no-freeze-vision-encoder", "--no-freeze-vision-projector"]
    variables = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NODE_ADDR": "127.0.0.1",
                 "EP": 2, "GLOBAL_BATCH_SIZE": 4, "SAVE": tmp_path / "two"}
    nodes = [start_script(folder, "finetune_30b_a3b", *flags, NODE_RANK=i, **variables) for i in range(2)]
    try:
        for node in nodes:
            output, _ = node.communicate(timeout=120)
            assert node.returncode == 0, output[-3000:]
    finally:
        for node in nodes:
            node.terminate()  # the script forwards the signal to its processes
            node.wait(60)

    one_device = {"EP": 1, "NPUS_PER_NODE": 1, "GLOBAL_BATCH_SIZE": 4, "SAVE": tmp_path / "one"}
    train.main(train_flags(run_script(folder, "finetune_30b_a3b", *flags, **one_device)))
    two = read_metrics(tmp_path / "two")
    for a, b in zip(two, read_metrics(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert len(two) == 2 and two[0]["loss"] != two[1]["loss"]


def test_script_sigterm_saves_and_exits_0(folder, tmp_path):
    """The script waits for the checkpoint; torchrun alone would end with 1 and kill its workers after 30 s."""
    node = start_script(folder, "finetune_30b_a3b", "--device", "cpu", "--train-iters", 100000, "--num-workers", 1,
                        EP=1, SAVE=tmp_path, GLOBAL_BATCH_SIZE=2, MASTER_PORT=free_port())
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2) and time.monotonic() < deadline:
        time.sleep(0.1)
    node.send_signal(signal.SIGTERM)
    output, _ = node.communicate(timeout=60)
    assert node.returncode == 0 and f"--load {tmp_path}" in output, output[-3000:]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(len(read_metrics(tmp_path)))
