"""Memory and speed of reading rows as a stream: `python benchmarks/streaming.py [--rows N] [--dir DIR]`.

Writes N rows (10 million, about 1.6 GB) as JSON lines and as an array, walks each as `train.py --streaming` does, and
prints this process's memory on the way, rows per second, and what it takes to resume at the last row.
"""
from __future__ import annotations

import argparse
import collections
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import RowStream


def memory_mb() -> float:
    """Anonymous memory of this process, without libraries and cached files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where the two files are written, and removed")
    args = parser.parse_args()
    for suffix, first, between, last in ((".jsonl", "", "\n", "\n"), (".json", "[", ",", "]")):
        with tempfile.NamedTemporaryFile("w", suffix=suffix, dir=args.dir) as file:
            file.write(first)
            for i in range(args.rows):
                texts = ("user", f"What is {i} plus {i}?"), ("assistant", f"{2 * i}.")
                turns = [{"role": role, "content": text} for role, text in texts]
                file.write(between * (i > 0) + json.dumps({"id": i, "messages": turns, "images": []}))
            file.write(last)
            file.flush()
            print(f"{suffix}: {args.rows:,} rows, {Path(file.name).stat().st_size / 1e9:.2f} GB")
            stream, began = RowStream([file.name]), time.perf_counter()
            rows = stream.stream({}, seed=0)
            for part in range(11):
                if part:
                    behind = collections.deque(itertools.islice(rows, args.rows // 10), maxlen=1)
                print(f"  {part * args.rows // 10:12,} rows: {memory_mb():7.1f} MB")
            seconds = time.perf_counter() - began
            print(f"  {args.rows / seconds:,.0f} rows/s")
            (_, state), began = behind[0], time.perf_counter()
            span, _ = next(RowStream([file.name]).stream(state | {"done": state["done"] - 1}, seed=0))
            assert stream.read(span)[0]["id"] == span.number
            print(f"  resuming at the last row: {1000 * (time.perf_counter() - began):.1f} ms")


if __name__ == "__main__":
    main()
