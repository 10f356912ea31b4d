"""Print the table of docs/planner.md, and plot it: weak scaling of the planner's best layouts.

    python benchmarks/scaling.py --plot docs/scaling.png

Each rank has one row of 8,192 tokens in a step, whatever the number of ranks. An eighth of the devices' memory is left
to the allocator, the communication library and kernels' workspaces.
"""
from __future__ import annotations

import argparse

from comparison import ROOT

import train
from tools import planner

RANKS = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
MODELS = {"30B-A3B": "30b-a3b", "235B-A22B": "235b-a22b"}
DEVICES = ("ascend-910b", "h100")


def best_layouts(model: str, device: str) -> list[tuple[int, planner.Layout | None, dict]]:
    """Return (ranks, the fastest layout or None, its figures) for each number of ranks."""
    args = train.parse_args(["--dry-run", "--plan", "--init-from-hf-path", str(ROOT / f"configs/qwen3-vl-{model}"),
                             "--assume-device", device, "--seq-length", "8192", "--world-size", str(RANKS[0])])
    plans, rows = planner.Planner(args), []
    for ranks in RANKS:
        args.world_size = args.global_batch_size = ranks
        planner.Planner.sharding.cache_clear()  # it depends on the number of ranks
        ranked = planner.rank_layouts(plans, 7 / 8 * plans.device.memory_gib)
        rows.append((ranks, *ranked[0]) if ranked else (ranks, None, {}))
    return rows


def exposed(row: dict) -> float:
    """Return the share of a step that waits for communication."""
    parts = row["step_parts_s"]
    return (parts.get("all-to-all", 0) + parts.get("parameter traffic", 0)) / row["step_time_s"]


def plot(results: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), dpi=140)
    for (model, device), rows in results.items():
        rows = [(ranks, row) for ranks, layout, row in rows if layout]
        style = {"marker": "o", "linestyle": "-" if device == DEVICES[0] else "--", "label": f"{model}, {device}",
                 "color": "#3b6fd4" if model == "30B-A3B" else "#e07b2d"}
        axes[0].plot([ranks for ranks, _ in rows], [row["mfu"] for _, row in rows], **style)
        axes[1].plot([ranks for ranks, _ in rows], [exposed(row) for _, row in rows], **style)
    for axis, title in zip(axes, ("predicted MFU", "share of a step that waits for communication"), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, [f"{n:,}" for n in RANKS], fontsize=7)
        axis.set_xlabel("ranks")
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plot", metavar="PNG")
    args = parser.parse_args()
    results = {(name, device): best_layouts(model, device) for device in DEVICES for name, model in MODELS.items()}
    for (model, device), rows in results.items():
        print(f"\n{model} on {device}:\n\n| ranks | CP | EP | FSDP | batch | activations | GiB | tokens/s per device | "
              "MFU | waits for communication | bound |\n|" + "---|" * 11)
        for ranks, layout, row in rows:
            if layout is None:
                print(f"| {ranks:,} | does not fit |" + " |" * 9)
                continue
            setting = "offload" if layout.offload else "recompute" if layout.recompute else "keep"
            print(f"| {ranks:,} | {layout.cp} | {layout.ep} | {layout.fsdp:,} | {layout.micro_batch} | {setting} | "
                  f"{row['memory_gib']:.0f} | {row['tokens_per_s_per_device']:,.0f} | {row['mfu']:.2f} | "
                  f"{exposed(row):.0%} | {row['bound']} |")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
