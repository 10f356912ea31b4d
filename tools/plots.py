"""Plot the loss curve of any `metrics.jsonl`, and a sheet of questions with a model's answers.

    python tools/plots.py save_dir/metrics.jsonl loss.png

It needs matplotlib: pip install matplotlib (or the project's `plots` extra).
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

try:
    import matplotlib
except ImportError:
    sys.exit("error: the plots need matplotlib: pip install matplotlib (or pip install -e '.[plots]')")

matplotlib.use("Agg")  # draws to files and needs no display
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402
from PIL import Image  # noqa: E402

INK, FAINT, PAPER = "#1f2430", "#7a8194", "#f3f4f7"
BLUE, ORANGE, GREEN, RED = "#3b6fd4", "#e07b2d", "#23865a", "#cc3b3b"


def plot_loss(metrics_file: Path, output: Path, title: str = "Loss", events: dict[int, str] | None = None) -> None:
    """Plot the training loss of each step, its running mean, and the held-out loss if there is one.

    Args:
        metrics_file: a run's `metrics.jsonl`.
        output: the PNG file to write.
        title: the text above the curve.
        events: {step: label} of vertical lines.
    """
    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    steps = [row["iteration"] for row in rows]
    losses = [row["loss"] for row in rows]
    smooth, mean = [], losses[0]
    for loss in losses:
        mean += 0.1 * (loss - mean)
        smooth.append(mean)
    held_out = [(row["iteration"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=160)
    figure.set_facecolor("white")
    axes.plot(steps, losses, color=BLUE, alpha=0.22, linewidth=0.8)
    axes.plot(steps, smooth, color=BLUE, linewidth=1.9, label="training (running mean)")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=ORANGE, markersize=4.5, linewidth=1.4, label="held out")
        axes.annotate(
            f"{held_out[-1][1]:.3f}", held_out[-1], (6, 4), textcoords="offset points", color=ORANGE, fontsize=9
        )
    for step, label in (events or {}).items():
        axes.axvline(step, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            label, (step, 1), (5, -4), ("data", "axes fraction"), "offset points", color=FAINT, fontsize=9, va="top"
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.set_xlim(0, steps[-1] * 1.06)
    axes.set_title(title, loc="left", fontsize=12.5, color=INK, pad=14, fontweight="bold")
    axes.set_xlabel("optimizer step", color=FAINT)
    axes.set_ylabel("loss, nats per token", color=FAINT)
    axes.tick_params(colors=FAINT, which="both", length=0)
    axes.grid(True, color="#e6e8ee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.legend(frameon=False, labelcolor=INK, fontsize=10)
    figure.tight_layout()
    figure.savefig(output)
    plt.close(figure)


def plot_answers(cards: list[dict], output: Path, title: str, subtitle: str, columns: int = 4) -> None:
    """Draw a sheet of cards, each with its images, question, answer and verdict.

    Args:
        cards: dicts with `images` (list of paths, may be empty), `question`, `prediction` and the right `answer`.
        output: the PNG file to write.
        title: the headline.
        subtitle: the line below the headline.
        columns: number of cards in a row.
    """
    card_width, card_height, gap, margin, head = 2.55, 3.85, 0.22, 0.4, 1.0  # inches
    rows = -(-len(cards) // columns)
    width = 2 * margin + columns * (card_width + gap) - gap
    height = margin + head + rows * (card_height + gap)
    figure = plt.figure(figsize=(width, height), dpi=150, facecolor=PAPER)

    def place(x: float, y: float, w: float, h: float) -> Axes:
        """Return an empty frame; the arguments are inches from the top left corner."""
        axes = figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))
        axes.set_axis_off()
        return axes

    heading = place(margin, margin, width - 2 * margin, head)
    heading.text(0, 0.98, title, fontsize=19, color=INK, fontweight="bold", va="top")
    heading.text(0, 0.45, subtitle, fontsize=11.5, color=FAINT, va="top")
    for i, card in enumerate(cards):
        x = margin + i % columns * (card_width + gap)
        y = margin + head + i // columns * (card_height + gap)
        _draw_card(place, card, x, y, card_width, card_height)
    figure.savefig(output)
    plt.close(figure)


def _draw_card(place, card: dict, x: float, y: float, width: float, height: float) -> None:
    """Draw one card in frames that `place(x, y, w, h)` creates."""
    right = card["prediction"].strip() == card["answer"].strip()
    colour = GREEN if right else RED
    frame = place(x, y, width, height)
    frame.set(xlim=(0, width), ylim=(height, 0))
    frame.add_patch(
        FancyBboxPatch(
            (0.03, 0.03), width - 0.06, height - 0.06, boxstyle="round,pad=0,rounding_size=0.1",
            facecolor="white", edgecolor="#dfe2ea" if right else RED, linewidth=1.0,
        )
    )  # fmt: skip
    pad = 0.2
    side = width - 2 * pad
    if card["images"]:
        number = len(card["images"])
        each = (side - 0.1 * (number - 1)) / number
        for i, path in enumerate(card["images"]):
            axes = place(x + pad + i * (each + 0.1), y + pad + (side - each) / 2 * (number > 1), each, each)
            with Image.open(path) as image:
                axes.imshow(image.convert("RGB"), interpolation="lanczos")
        frame.text(pad, side + 0.48, card["question"], fontsize=10.5, color=INK)
    else:
        frame.text(pad, pad + 0.1, "text only", fontsize=9, color=FAINT, va="top")
        question = textwrap.fill(card["question"], 17)
        frame.text(pad, pad + side / 2, question, fontsize=15, color=INK, va="center", linespacing=1.4)
    mark = "\N{HEAVY CHECK MARK} " if right else "\N{HEAVY BALLOT X} "
    size, columns = (13, 20) if len(card["prediction"]) <= 16 else (8.8, 30) if right else (7.5, 38)
    answer = frame.annotate(
        textwrap.fill(mark + card["prediction"], columns), (pad, side + 0.72),
        fontsize=size, color=colour, fontweight="bold", va="top", linespacing=1.3,
    )  # fmt: skip
    if not right:
        note = textwrap.fill(f"right: {card['answer']}", 40)
        frame.annotate(
            note, (0, 0), (0, -4), answer, "offset points", fontsize=7.5, color=FAINT, va="top", linespacing=1.2
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Plot the loss curve of a run.")
    parser.add_argument("metrics", type=Path, help="the run's metrics.jsonl")
    parser.add_argument("output", type=Path, help="the PNG file to write")
    args = parser.parse_args()
    plot_loss(args.metrics, args.output)


if __name__ == "__main__":
    main()
