"""How time and memory of a step grow: `python benchmarks/growth.py [--only length,experts] [--plot docs/growth.png]`.

Against a row's length, the number of experts at equal active parameters, the pictures of a row, and, by the dry run,
the number of ranks. Beside each time stands that per floating point operation, beside each memory that per token,
picture or expert, relative to the first line: a column that rises is growth beyond the mathematics. Every point is
measured in a process of its own, whose most memory is that of one step less that of the loaded model.
"""
from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path

import beside
import tiny
import torch
from beside import ROOT, clock, peak_mb

LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]
EXPERTS = [8, 16, 32, 64, 128]
PICTURES = [1, 2, 4, 8, 16, 32, 64]
RANKS = [8, 16, 32, 64, 128, 256, 512, 1024]
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "layers": 3}


def points(case: str) -> list[tuple[int, dict, list]]:
    """(what grows, configuration, rows) of each point of a case."""
    if case == "length":
        return [(n, beside.config(False, **SMALL), [[n]]) for n in LENGTHS]
    if case == "pictures":
        return [(n, beside.config(False, **SMALL), [[16, *[("image", 20, 20), 4] * n]]) for n in PICTURES]
    grown = []
    for n in EXPERTS:
        raw = beside.config(True, **SMALL)
        raw["text_config"] |= {"num_experts": n, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
        grown.append((n, raw, [[4096]]))
    return grown


def measure(raw: dict, rows: list, device: str, threads: int, pipe) -> None:
    """Sends (seconds of forward and backward, seconds of the optimizer, floating point operations, MB of a step)."""
    torch.set_num_threads(threads)
    import kernels_npu
    from model import Qwen3VL, Qwen3VLConfig, step_flops

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    ops = kernels_npu.select(device, dtype)
    with tempfile.TemporaryDirectory() as directory:
        tiny.hf_dir(Path(directory), raw)
        config = Qwen3VLConfig.from_json(directory)
    with torch.device("meta"):
        model = Qwen3VL(config).to(dtype)
    model.to_empty(device=ops.device).init_weights(0)
    optimizer = ops.adamw([{"params": list(model.parameters())}], lr=1e-4)
    batch = beside.packed(rows, device, dtype)
    flops = step_flops(config, batch.cu_seqlens, batch.grid_thw, len(batch.supervised_index))
    before, times = peak_mb(device), []
    while len(times) < 2 or sum(a + b for a, b in times) < 3 and len(times) < 12:
        began = clock(device)
        model(batch)[0].backward()
        computed = clock(device)
        optimizer.step()
        optimizer.zero_grad()
        times.append((computed - began, clock(device) - computed))
    compute, optimize = (min(each) for each in zip(*times[1:], strict=True))
    pipe.send((compute, optimize, flops, peak_mb(device) - before))


def ranks_table(model: str) -> list[tuple]:
    """What the dry run says of one rank and one step, from 8 to 1024 ranks: (ranks, GiB of state, peak GiB, GiB that
    all-gathers bring, GiB that all-to-alls send)."""
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
    """One panel for each table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(tables), figsize=(4 * len(tables), 3.6), dpi=130)
    labels = {"length": "tokens of a row", "experts": "experts, 4 of them active", "pictures": "pictures of a row",
              "ranks": "ranks (30B-A3B, 4,096 tokens, dry run)"}
    for panel, (case, rows) in zip([panels] if len(tables) == 1 else panels, tables.items(), strict=True):
        at = [row[0] for row in rows]
        if case == "ranks":
            series = {"parameters, gradients, optimizer (GiB)": 1, "peak of a rank (GiB)": 2,
                      "all-gathered a step (GiB)": 3}
        else:
            series = {"a step (s)": 1, "the same time per FLOP as the first (s)": 2, "memory of a step (GB)": 3}
        for (label, column), style in zip(series.items(), ("o-", "k:", "s-"), strict=True):
            panel.plot(at, [row[column] for row in rows], style, label=label, markersize=4)
        panel.set(xscale="log", yscale="log", xlabel=labels[case])
        low, high = panel.get_ylim()
        panel.set_ylim(low / 2, high * 6)  # room for the legend
        panel.set_xticks(at, [f"{n:,}" for n in at], rotation=45, fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.legend(fontsize=7)
    figure.suptitle(machine, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = beside.flags(__doc__, ["length", "experts", "pictures", "ranks"], rounds=False)
    parser.add_argument("--plot", type=Path, metavar="F.png", help="draw it")
    args = parser.parse_args()
    machine = beside.machine(args.device, args.threads)
    print(machine)
    context, tables = multiprocessing.get_context("spawn"), {}
    for case in args.only:
        if case == "ranks":
            print(f"\n{'ranks':>8} {'state of a rank':>16} {'peak':>10} {'all-gathers bring':>18} "
                  f"{'all-to-alls send':>18}   GiB a step, 30B-A3B, EP 8")
            tables[case] = ranks_table("qwen3-vl-30b-a3b")
            continue
        print(f"\n{case:>8} {'forward, backward':>18} {'optimizer':>10} {'TFLOP':>8} {'s per TFLOP':>12} "
              f"{'relative':>9} {'MB of a step':>13} {'MB of each':>11}")
        tables[case] = []
        for n, raw, rows in points(case):
            here, there = context.Pipe()
            process = context.Process(target=measure, args=(raw, rows, args.device, args.threads, there))
            process.start()
            there.close()
            compute, optimize, flops, memory = here.recv()
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
