"""Measure how time and memory of a step grow with tokens, experts, images and ranks.

    python benchmarks/growth.py [--only length,experts] [--plot docs/growth.png]

The experts grow at equal active parameters, and the dry run predicts the figures for ranks. Each time is also printed
per floating-point operation, and each memory per token, expert or image. A column that rises then shows growth beyond
what the computation requires. Each point has a process of its own. Its memory is the peak of a step minus the memory of
the loaded model.
"""
from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path

import comparison
import tiny
import torch
from comparison import ROOT, peak_mb, synchronized_time

LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
EXPERTS = [8, 16, 32, 64, 128]
IMAGES = [1, 2, 4, 8, 16, 32, 64]
RANKS = [8, 16, 32, 64, 128, 256, 512, 1024]
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "layers": 3}


def points(case: str) -> list[tuple[int, dict, list]]:
    """Return (size, configuration, rows) of each point of a case."""
    if case == "length":
        return [(n, comparison.config(False, **SMALL), [[n]]) for n in LENGTHS]
    if case == "images":
        return [(n, comparison.config(False, **SMALL), [[16, *[("image", 20, 20), 4] * n]]) for n in IMAGES]
    grown = []
    for n in EXPERTS:
        raw = comparison.config(True, **SMALL)
        raw["text_config"] |= {"num_experts": n, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
        grown.append((n, raw, [[4096]]))
    return grown


def measure(raw: dict, rows: list, device: str, threads: int, pipe) -> None:
    """Send (seconds of forward and backward, seconds of the optimizer, FLOPs, MB of a step) through the pipe."""
    torch.set_num_threads(threads)
    import kernels_npu
    from model import Qwen3VLConfig, build_model, step_flops

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    ops = kernels_npu.select(device, dtype)
    with tempfile.TemporaryDirectory() as directory:
        tiny.hf_dir(Path(directory), raw)
        config = Qwen3VLConfig.from_json(directory)
    model = build_model(config).to(dtype)
    model.to_empty(device=ops.device).init_weights(0)
    optimizer = ops.adamw([{"params": list(model.parameters())}], lr=1e-4)
    batch = comparison.packed_batch(rows, device, dtype)
    flops = step_flops(config, batch.cu_seqlens, batch.grid_thw, len(batch.supervised_index))
    before, times = peak_mb(device), []
    while len(times) < 2 or sum(a + b for a, b in times) < 3 and len(times) < 12:
        began = synchronized_time(device)
        model(batch)[0].backward()
        computed = synchronized_time(device)
        optimizer.step()
        optimizer.zero_grad()
        times.append((computed - began, synchronized_time(device) - computed))
    compute, optimize = (min(each) for each in zip(*times[1:], strict=True))
    pipe.send((compute, optimize, flops, peak_mb(device) - before))


def ranks_table(model: str) -> list[tuple]:
    """Return the dry run's figures for one rank and one step, from 8 to 1024 ranks.

    Each row is (ranks, GiB of state, peak GiB, GiB received in all-gathers, GiB sent in all-to-alls).
    """
    rows = []
    for n in RANKS:
        with tempfile.TemporaryDirectory() as out:
            subprocess.run(
                [sys.executable, ROOT / "train.py", "--dry-run", "--world-size", str(n), "--init-from-hf-path",
                 ROOT / "configs" / model, "--seq-length", "4096", "--save", out, "--expert-parallel-size", "8"],
                check=True, stdout=subprocess.DEVNULL)
            report = json.loads((Path(out) / "dry_run.json").read_text())
        state = sum(report[f"{kind}_bytes"] for kind in ("parameter", "gradient", "optimizer"))
        values = state, report["peak_bytes"], report["all_gather_bytes"], report["all_to_all_bytes"]
        rows.append((n, *(value / 2**30 for value in values)))
        print(f"{n:8} {rows[-1][1]:16.3f} {rows[-1][2]:10.3f} {rows[-1][3]:18.2f} {rows[-1][4]:18.2f}", flush=True)
    return rows


def plot(tables: dict[str, list[tuple]], path: Path, machine: str) -> None:
    """Draw one panel per table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(tables), figsize=(4 * len(tables), 3.6), dpi=130)
    labels = {"length": "tokens in a row", "experts": "experts, 4 of them active", "images": "images in a row",
              "ranks": "ranks (30B-A3B, 4,096 tokens, dry run)"}
    for panel, (case, rows) in zip([panels] if len(tables) == 1 else panels, tables.items(), strict=True):
        sizes = [row[0] for row in rows]
        if case == "ranks":
            series = {"parameters, gradients, optimizer (GiB)": 1, "peak of a rank (GiB)": 2,
                      "all-gathers per step (GiB)": 3}
        else:
            series = {"time of a step (s)": 1, "time per FLOP as at the first point (s)": 2, "memory of a step (GB)": 3}
        for (label, column), style in zip(series.items(), ("o-", "k:", "s-"), strict=True):
            panel.plot(sizes, [row[column] for row in rows], style, label=label, markersize=4)
        panel.set(xscale="log", yscale="log", xlabel=labels[case])
        low, high = panel.get_ylim()
        panel.set_ylim(low / 2, high * 6)  # space for the legend
        panel.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=45, fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7)
    figure.suptitle(machine, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = comparison.make_parser(__doc__, ["length", "experts", "images", "ranks"], rounds=False)
    parser.add_argument("--plot", type=Path, metavar="F.png", help="draw the tables")
    args = parser.parse_args()
    machine = comparison.describe_machine(args.device, args.threads)
    print(machine)
    context, tables = multiprocessing.get_context("spawn"), {}
    for case in args.only:
        if case == "ranks":
            print(f"\n{'ranks':>8} {'state of a rank':>16} {'peak':>10} {'all-gather':>18} "
                  f"{'all-to-all':>18}   GiB per rank and step, 30B-A3B, EP 8")
            tables[case] = ranks_table("qwen3-vl-30b-a3b")
            continue
        print(f"\n{case:>8} {'forward, backward':>18} {'optimizer':>10} {'TFLOP':>8} {'s per TFLOP':>12} "
              f"{'relative':>9} {'MB of a step':>13} {'MB per unit':>11}")
        tables[case] = []
        for n, raw, rows in points(case):
            our_end, its_end = context.Pipe()
            process = context.Process(target=measure, args=(raw, rows, args.device, args.threads, its_end))
            process.start()
            its_end.close()  # otherwise recv would wait forever for a process that died
            compute, optimize, flops, memory = our_end.recv()
            process.join()
            first = tables[case][0] if tables[case] else (n, compute, compute, 0, flops)
            expected = first[1] * flops / first[4]
            tables[case].append((n, compute, expected, memory / 1000, flops))
            print(f"{n:8} {compute:16.3f} s {optimize:8.3f} s {flops / 1e12:8.3f} {compute / flops * 1e12:12.2f} "
                  f"{compute / expected:9.2f} {memory:13,.0f} {memory / n:11.3f}", flush=True)
    if args.plot:
        plot(tables, args.plot, machine)


if __name__ == "__main__":
    main()
