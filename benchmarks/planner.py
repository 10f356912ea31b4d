"""Compare the planner's step times with real steps over gloo on this machine, for several layouts of two ranks.

    python benchmarks/planner.py

Each rank has one thread. The device's figures are measured first, in two processes at a time: the rate of matrix
products, the memory's bandwidth, and the bandwidth and latency of gloo. A CPU does not overlap transfers with kernels,
so that the order of the layouts is what counts.
"""
from __future__ import annotations

import json
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
from tools import planner
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
REPEATS = 4


def fastest(action) -> float:
    """Return the shortest of several times, in seconds; all ranks start together."""
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def measure_device(argv: list[str]) -> None:
    """Write a device's figures to device.json in --save."""
    torch.set_num_threads(1)
    state = parallel.ParallelState(kernels_npu.ops)
    a, flat = torch.randn(1024, 1024), torch.randn(1 << 24)
    gathered, small = torch.empty(2 << 22), torch.empty(2)
    tflops = 2 * 1024**3 / fastest(lambda: a @ a) / 1e12
    memory = 2 * flat.nbytes / fastest(lambda: flat.neg()) / 1e9
    link = gathered.nbytes / 2 / fastest(lambda: dist.all_gather_into_tensor(gathered, flat[: 1 << 22])) / 1e9
    latency = fastest(lambda: dist.all_gather_into_tensor(small, flat[:1]))
    if state.rank == 0:
        Path(argv[1]).mkdir()
        (Path(argv[1]) / "device.json").write_text(json.dumps({
            "tflops": tflops / planner.MATMUL_EFFICIENCY, "memory_gbs": memory / planner.MEMORY_EFFICIENCY,
            "link_gbs": link / planner.LINK_EFFICIENCY, "latency": latency}))
    state.close()


def measure_step(argv: list[str]) -> None:
    """Write the seconds of a step with a dry run's batch to step.json in --save."""
    torch.set_num_threads(1)
    args = train.parse_args(["--dataset", "none", "--train-iters", "1", *argv])
    state = parallel.ParallelState(kernels_npu.ops, 1, cp=args.context_parallel_size, ep=args.expert_parallel_size,
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
    seconds = fastest(lambda: train.train_step(
        net, optimizer, [batch] * accumulation, state, loss_type=args.loss_type, clip_grad=1.0, error=None,
        read_flags=lambda: ()))
    if state.rank == 0:
        Path(args.save).mkdir()
        (Path(args.save) / "step.json").write_text(json.dumps(seconds))
    state.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "config.json").write_text(json.dumps(comparison.config(True)))
        flags = ["--init-from-hf-path", directory, "--seq-length", "256", "--global-batch-size", "4", "--fp32"]
        save = helpers.run_job(["--save", folder / "device"], 2, measure_device, 300)
        figures = json.loads((save / "device.json").read_text())
        planner.LATENCY = figures.pop("latency")
        figures |= {"network_gbs": figures["link_gbs"], "devices_per_node": 2}
        print("device: " + ", ".join(f"{name} {value:.3g}" for name, value in figures.items()))
        given = ["--device-figures", ",".join(f"{name}={value}" for name, value in figures.items())]
        rows = []
        for i, layout in enumerate(LAYOUTS):
            args = train.parse_args(["--dry-run", "--world-size", "2", *flags, *given, *layout])
            predicted = planner.Planner(args).evaluate(planner.layout_of(args))["step_time_s"]
            save = helpers.run_job([*flags, *layout, "--save", folder / str(i)], 2, measure_step, 600)
            rows.append((json.loads((save / "step.json").read_text()), predicted, " ".join(layout)))
            print(f"measured {rows[-1][0]:7.2f} s   predicted {predicted:7.2f} s   {rows[-1][2]}", flush=True)
    pairs = [(a, b) for a in rows for b in rows if a[0] < 0.95 * b[0]]
    right = sum(a[1] < b[1] for a, b in pairs)
    print(f"{right} of {len(pairs)} pairs that differ by more than 5 % are in the right order")


if __name__ == "__main__":
    main()
