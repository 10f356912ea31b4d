"""Compare the planner's step times with real steps over gloo on this machine, for several layouts of two ranks.

    python benchmarks/planner.py

Each rank has one thread. The device's figures are measured first, in two processes at a time: the rate of matrix
products, the memory's bandwidth, and the bandwidth and latency of gloo. A CPU does not overlap transfers with kernels,
so that the order of the layouts is what counts.
"""
from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path

import comparison
import helpers
import torch
import torch.distributed as dist

import convert
import kernels_npu
import model
import parallel
import train
from tools import devices, planner
from tools.dry_run import fake_batch

LAYOUTS = (
    ("--recompute", "none"),
    ("--recompute", "full"),
    ("--recompute", "none", "--micro-batch-size", "2"),
    ("--recompute", "none", "--expert-parallel-size", "2"),
    ("--recompute", "none", "--context-parallel-size", "2"),
    ("--recompute", "none", "--fsdp-size", "1"),
    ("--recompute", "full", "--expert-parallel-size", "2", "--context-parallel-size", "2"),
)
REPEATS = 5
FLAGS = ("--seq-length", "256", "--global-batch-size", "4", "--fp32")


def device_actions() -> dict:
    """Return what measures the device: {name: (operations or bytes, function)}."""
    a, flat = torch.randn(1024, 1024), torch.randn(1 << 24)
    gathered, small = torch.empty(2 << 22), torch.empty(2)
    return {
        "tflops": (2 * 1024**3 / 1e12 / devices.MATMUL_EFFICIENCY, lambda: a @ a),
        "memory_gbs": (2 * flat.nbytes / 1e9 / devices.MEMORY_EFFICIENCY, flat.neg),
        "link_gbs": (gathered.nbytes / 2 / 1e9 / devices.LINK_EFFICIENCY,
                     lambda: dist.all_gather_into_tensor(gathered, flat[: 1 << 22])),
        "latency": (0, lambda: dist.all_gather_into_tensor(small, flat[:1])),
    }


def layout_step(argv: list[str]):
    """Return a function that trains a step with a dry run's batch."""
    args = train.parse_args(["--dataset", "none", "--train-iters", "1", *argv])
    state = parallel.ParallelState(kernels_npu.ops, cp=args.context_parallel_size, ep=args.expert_parallel_size,
                                   fsdp=args.fsdp_size)
    config = model.Qwen3VLConfig.from_json(args.init_from_hf_path)
    net = model.build_model(config)
    train.configure_model(net, state, **train.model_settings(args))
    net.to_empty(device="cpu")
    convert.load_weights(net, None, args.seed)
    optimizer = train.make_optimizer(net, **train.optimizer_settings(args))
    _, accumulation = train.batch_sizes(args.micro_batch_size, args.global_batch_size, state.dp_size)
    batch = fake_batch(config, args.seq_length, args.micro_batch_size)
    batch.pixel_values = torch.zeros(batch.pixel_values.shape)
    flops_of = train.flops_counter(net)
    return lambda: train.train_step(
        net, optimizer, [batch.measure()] * accumulation, [batch] * accumulation, state, loss_type=args.loss_type,
        flops_of=flops_of, clip_grad=1.0, error=None, read_flags=lambda: ())


def measure(argv: list[str]) -> None:
    """Write the shortest time of every action to seconds.json in --save. They take turns, as other load varies."""
    torch.set_num_threads(1)
    directory, save = argv[0], Path(argv[2])
    first = parallel.ParallelState(kernels_npu.ops)
    actions = {name: action for name, (_, action) in device_actions().items()}
    actions |= {" ".join(layout): layout_step(["--init-from-hf-path", directory, *FLAGS, *layout])
                for layout in LAYOUTS}
    seconds = dict.fromkeys(actions, math.inf)
    for _ in range(REPEATS):
        for name, action in actions.items():
            dist.barrier()
            start = time.perf_counter()
            action()
            dist.barrier()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    if first.rank == 0:
        save.mkdir()
        (save / "seconds.json").write_text(json.dumps(seconds))
    first.close()


def main() -> None:
    raw = comparison.config(True, vocab_size=4096)
    raw["text_config"]["num_experts"] = 8
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(raw))
        save = helpers.run_job([directory, "--save", Path(directory) / "out"], 2, measure, 900)
        seconds = json.loads((save / "seconds.json").read_text())
        figures = {name: work / seconds[name] for name, (work, _) in device_actions().items()}
        figures |= {"network_gbs": figures["link_gbs"], "devices_per_node": 2}
        del figures["latency"]
        devices.LATENCY = seconds["latency"]
        print("device: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
        given = ",".join(f"{name}={value}" for name, value in figures.items())
        rows = []
        for layout in LAYOUTS:
            args = train.parse_args(["--dry-run", "--world-size", "2", "--device-figures", given,
                                     "--init-from-hf-path", directory, *FLAGS, *layout])
            one = planner.Planner(args)
            one.fused = set()  # a CPU runs the reference
            row = one.evaluate(planner.layout_of(args), exact=True)
            predicted = row["step_time_s"]
            rows.append((seconds[" ".join(layout)], predicted))
            print(f"measured {rows[-1][0]:7.2f} s   predicted {predicted:7.2f} s   {' '.join(layout)}", flush=True)
    pairs = [(a, b) for a in rows for b in rows if a[0] < 0.9 * b[0]]
    right = sum(a[1] < b[1] for a, b in pairs)
    print(f"{right} of {len(pairs)} pairs that differ by more than 10 % are in the right order")


if __name__ == "__main__":
    main()
