"""Compare image preprocessing with transformers' Pillow processor, and measure how long a step waits for data.

    python benchmarks/preprocessing.py [--rounds 9] [--batches 30] [--step-ms 60]

The program draws images of COCO's sizes and some large ones, as JPEG and PNG. Both processors must give the same
pixels. They then take turns, so that other programs on the machine slow down both. Times are processor time of one
thread. The second table reads the same images through `Loader` while a step computes matrix products. Its waits are
wall time, and only mean something where cores are free for the workers.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from qwen_tokenizer import build_tokenizer  # noqa: E402
from transformers.image_utils import load_image  # noqa: E402
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil  # noqa: E402

import data  # noqa: E402
from data import Loader, Processor, RowDataset  # noqa: E402

COCO = [(640, 480), (480, 640), (640, 427), (500, 375), (640, 640), (427, 640), (375, 500), (640, 360)]
LARGE = [(1920, 1080), (2448, 3264), (4000, 3000)]


def draw(folder: Path, suffix: str, sizes: list[tuple[int, int]], rng: np.random.Generator) -> list[Path]:
    """Draw smooth shapes with fine noise, which compress about as well as photographs."""
    paths = []
    for i, (width, height) in enumerate(sizes):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + rng.integers(-8, 9, (height, width, 1), dtype=np.int16)
        paths.append(folder / f"{width}x{height}-{i}{suffix}")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def seconds_each(function, paths: list[Path]) -> float:
    started = time.process_time()
    for path in paths:
        function(path)
    return (time.process_time() - started) / len(paths)


def spread(values: list[float], digits: int = 1) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in (min(values), float(np.median(values)), max(values)))


def compare(title: str, paths: list[Path], rounds: int, processor: Processor, reference) -> None:
    """Print images per second of both processors and their ratio: minimum, median and maximum of the rounds."""

    def ours(path: Path) -> np.ndarray:
        return processor.process_image(data.load_image(path))[0]

    def transformers(path: Path) -> np.ndarray:
        return reference(load_image(str(path)), return_tensors="np")["pixel_values"]

    for path in paths:
        if not np.array_equal(ours(path), transformers(path)):
            sys.exit(f"error: {path.name}: the pixels differ from transformers'")
    times = [(seconds_each(ours, paths), seconds_each(transformers, paths)) for _ in range(rounds)]
    columns = [1 / a for a, _ in times], [1 / b for _, b in times]
    print(f"{title:12}{spread(columns[0]):>26}{spread(columns[1]):>26}{spread([b / a for a, b in times], 2):>22}")


def data_waits(dataset: RowDataset, processor: Processor, workers: int, batches: int, step_s: float) -> list[float]:
    """Return the seconds that each step waits for its batch of 4 rows, without the first five while workers start."""
    loader = Loader(
        dataset,
        processor,
        micro_batch_size=4,
        dp_rank=0,
        dp_size=1,
        seed=0,
        num_workers=workers,
        on_bad_sample="error",
        options=data.EncodeOptions(seq_length=8192),
    )
    matrix, waits, stream = torch.randn(256, 256), [], iter(loader)
    for _ in range(batches + 5):
        started = time.perf_counter()
        next(stream)
        waits.append(time.perf_counter() - started)
        until = time.process_time() + step_s  # processor time, so that sharing a core does not shorten the step
        while time.process_time() < until:
            matrix @ matrix
    return waits[5:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="measured turns per processor")
    parser.add_argument("--batches", type=int, default=30, help="batches in the second table")
    parser.add_argument("--step-ms", type=float, default=60, help="processor time of a step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    half = [0.5, 0.5, 0.5]
    reference = Qwen2VLImageProcessorPil(patch_size=16, size=size, image_mean=half, image_std=half)
    processor, rng = Processor(build_tokenizer()), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print("images per second, one thread (min / median / max of rounds)")
        print(f"{'':12}{'data.py':>26}{'transformers, Pillow':>26}{'ratio':>22}")
        coco = draw(folder, ".jpg", COCO, rng)
        compare("COCO, JPEG", coco, args.rounds, processor, reference)
        compare("COCO, PNG", draw(folder, ".png", COCO, rng), args.rounds, processor, reference)
        compare("large, JPEG", draw(folder, ".jpg", LARGE, rng), args.rounds, processor, reference)
        compare("large, PNG", draw(folder, ".png", LARGE[:2], rng), args.rounds, processor, reference)

        turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A bus. " * 20}]
        rows = [{"messages": turns, "images": [path.name]} for path in coco]
        (folder / "rows.json").write_text(json.dumps(rows * 8))
        dataset = RowDataset([str(folder / "rows.json")])
        print(f"\ndata_time_s of batches of four, with a step of {args.step_ms:.0f} ms (min / median / max)")
        for workers in (0, 1, 2):
            waits = data_waits(dataset, processor, workers, args.batches, args.step_ms / 1000)
            print(f"{workers} workers   {spread(waits, 4)}   mean {np.mean(waits):.4f}", flush=True)


if __name__ == "__main__":
    main()
