"""Run `make demo`: train a small Qwen3-VL-MoE from scratch and ask it about images that it has never seen.

    python tools/demo.py [--output demo_out] [--seed 0]

The demo runs the programs as a user would run them. It draws a dataset, trains, converts the checkpoint, and asks
held-out questions. Then it prints the share of right answers and the share that guessing gets right. The exit status is
1 if fewer than 95 % of the answers are right.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import plots  # first, because it says what to install if matplotlib is missing
from demo_data import KINDS
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
ENOUGH = 0.95
PYTHON = os.path.relpath(sys.executable, ROOT) if ROOT in Path(sys.executable).parents else sys.executable
BATCH = 32
TRAIN_FLAGS = (
    f"--train-iters 750 --micro-batch-size {BATCH} --lr 2e-3 --lr-warmup-iters 50 --adam-beta2 0.99 "
    "--router-aux-loss-coef 0.01 --no-shuffle --num-workers 1 --log-interval 20 --eval-interval 100 --eval-iters 2"
)


def run(title: str, command: str) -> None:
    """Print a command and run it in the repository's root with this Python. Exit if it fails."""
    print(f"\n== {title}\n$ {PYTHON} {command}", flush=True)
    started = time.monotonic()
    # Unbuffered output shows each log line at once, also through a pipe. The matrices are so small that a second thread
    # saves a quarter of the time on an idle machine, and costs ten times as much where another program needs the core.
    env = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, env=env)
    if process.returncode:
        sys.exit(f"error: {command.split()[0]} ended with status {process.returncode}: see its message above")
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def answers_by_kind(rows: list[dict]) -> dict[str, Counter]:
    """Count how often each answer is given to each kind of question."""
    counts: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    for row in rows:
        for kind, turn in zip(row["kinds"], row["conversations"][1::2], strict=True):
            counts[kind][turn["value"]] += 1
    return counts


def score(held_out: list[dict], predictions: list[str], train: list[dict]) -> dict[str, tuple[int, int, int]]:
    """Return {kind: (questions, right answers, right guesses)}. The guess is the most frequent answer in training."""
    guesses = {kind: counts.most_common(1)[0][0] for kind, counts in answers_by_kind(train).items()}
    totals = {kind: [0, 0, 0] for kind in KINDS}
    for row, prediction in zip(held_out, predictions, strict=True):
        kind, answer = row["kinds"][0], row["conversations"][1]["value"]
        totals[kind][0] += 1
        totals[kind][1] += prediction.strip() == answer
        totals[kind][2] += guesses[kind] == answer
    return {kind: tuple(total) for kind, total in totals.items()}


def make_cards(held_out: list[dict], predictions: list[str], folder: Path) -> list[dict]:
    """Return up to sixteen cards: the first two questions of each kind, then wrong answers, then more questions."""
    cards = [
        {
            "images": [folder / path for path in row["image"]],
            "question": row["conversations"][0]["value"].replace("<image>", ""),
            "answer": row["conversations"][1]["value"],
            "prediction": prediction.strip(),
        }
        for row, prediction in zip(held_out, predictions, strict=True)
    ]
    seen: Counter = Counter()
    first, rest = [], []
    for row, card in zip(held_out, cards, strict=True):
        seen[row["kinds"][0]] += 1
        (first if seen[row["kinds"][0]] <= 2 else rest).append(card)
    rest.sort(key=lambda card: card["prediction"] == card["answer"])  # wrong answers first
    return (first + rest)[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small Qwen3-VL-MoE from scratch and ask it questions.")
    parser.add_argument("--output", type=Path, default=Path("demo_out"), help="directory for all output")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images, the weights and the order of the rows")
    args = parser.parse_args()
    started = time.monotonic()
    out = Path(os.path.relpath(args.output, ROOT))
    os.chdir(ROOT)
    for name in ("data", "base", "run", "model"):  # from an earlier demo
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "answers.jsonl").unlink(missing_ok=True)

    data, base, model = out / "data", out / "base", out / "model"
    o, d, b, m = (shlex.quote(str(path)) for path in (out, data, base, model))
    run("Draw images, with questions and answers", f"tools/demo_data.py --output {o} --seed {args.seed}")
    # The order matters: describing images (twice) teaches the model to see; then it learns to answer all questions.
    run(
        "Train a mixture-of-experts Qwen3-VL from scratch",
        f"train.py --init-from-hf-path {b} --init random --dataset {d}/describe.json,{d}/describe.json,{d}/answer.json "
        f"--eval-dataset {d}/held_out.json --save {o}/run --seed {args.seed} {TRAIN_FLAGS}",
    )
    run(
        "Convert the checkpoint to a Hugging Face directory",
        f"convert.py dcp_to_hf --load_dir {o}/run --save_dir {m} --model_assets_dir {b}",
    )
    run(
        "Ask about images that it has never seen",
        f"infer.py --model {m} --input {d}/questions.json --output {o}/answers.jsonl --batch-size 64",
    )

    train = [row for part in ("describe", "answer") for row in json.loads((data / f"{part}.json").read_text())]
    held_out = json.loads((data / "held_out.json").read_text())
    predictions = [json.loads(line)["prediction"] for line in (out / "answers.jsonl").read_text().splitlines()]
    results = score(held_out, predictions, train)
    questions, right, guessed = (sum(column) for column in zip(*results.values(), strict=True))
    parameters = _count_parameters(model)
    describing = 2 * len(json.loads((data / "describe.json").read_text())) // BATCH
    plots.plot_loss(
        out / "run" / "metrics.jsonl",
        out / "loss.png",
        f"A {parameters / 1e6:.1f}M-parameter Qwen3-VL-MoE from scratch",
        {0: "describing images", describing: "answering questions"},
    )
    plots.plot_answers(
        make_cards(held_out, predictions, data),
        out / "answers.png",
        "Images it has never seen",
        f"Qwen3-VL-MoE, {parameters / 1e6:.1f}M parameters, trained from scratch on a CPU. "
        f"Held-out questions answered right: {right / questions:.1%}; by guessing: {guessed / questions:.1%}.",
    )

    examples = {}
    for row in held_out:
        examples.setdefault(row["kinds"][0], row)
    print(f"\n{'kind':10} {'for example':44} {'right':>9} {'guessing':>9}")
    for kind, (number, good, guess) in results.items():
        example = examples[kind]["conversations"][0]["value"].replace("<image>", "")
        print(f"{kind:10} {example:44} {good / number:9.1%} {guess / number:9.1%}")
    print(f"{'all':10} {f'{questions} held-out questions':44} {right / questions:9.1%} {guessed / questions:9.1%}")
    print(
        f"\n{time.monotonic() - started:.0f} s in all. The loss curve is {out}/loss.png, answers with their images "
        f"{out}/answers.png."
    )
    image = shlex.quote(str(data / examples["count"]["image"][0]))
    print(f"""
Next, ask it something yourself:
$ {PYTHON} infer.py --model {m} --image {image} --prompt "What is where?"
and train it further on your own rows (your file in place of {d}/answer.json; the README has the format):
$ {PYTHON} train.py --init-from-hf-path {m} --dataset {d}/answer.json --save {o}/more --train-iters 20 \\
    --micro-batch-size 8 --lr 1e-4""")
    if right < ENOUGH * questions:
        sys.exit(f"error: {right / questions:.1%} of the held-out answers are right, less than {ENOUGH:.0%}")


def _count_parameters(model: Path) -> int:
    """Return the number of parameters stored in a Hugging Face directory."""
    total = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                size = 1
                for length in tensors.get_slice(name).get_shape():
                    size *= length
                total += size
    return total


if __name__ == "__main__":
    main()
