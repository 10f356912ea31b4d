"""Memory and speed of reading rows as a stream: `python benchmarks/streaming.py [--rows N] [--dir DIR]`.

Writes N rows (10 million, about 1.6 GB) as JSON lines and as an array, and reads the rows' locations from each file as
`train.py --streaming` does. Prints this process's memory along the way, rows per second, and the time to resume at the
last row.
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
    """Return this process's anonymous memory, without libraries and cached files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def write_rows(file, rows: int, start: str, separator: str, end: str) -> None:
    file.write(start)
    for i in range(rows):
        texts = ("user", f"What is {i} plus {i}?"), ("assistant", f"{2 * i}.")
        turns = [{"role": role, "content": text} for role, text in texts]
        file.write(separator * (i > 0) + json.dumps({"id": i, "messages": turns, "images": []}))
    file.write(end)
    file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000, help="number of rows in each file")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="folder for the two temporary files")
    args = parser.parse_args()
    for suffix, start, separator, end in ((".jsonl", "", "\n", "\n"), (".json", "[", ",", "]")):
        with tempfile.NamedTemporaryFile("w", suffix=suffix, dir=args.dir) as file:
            write_rows(file, args.rows, start, separator, end)
            print(f"{suffix}: {args.rows:,} rows, {Path(file.name).stat().st_size / 1e9:.2f} GB")
            stream, started = RowStream([file.name]), time.perf_counter()
            rows = stream.stream({}, seed=0)
            for part in range(11):
                if part:
                    last = collections.deque(itertools.islice(rows, args.rows // 10), maxlen=1)
                print(f"  {part * args.rows // 10:12,} rows: {memory_mb():7.1f} MB")
            seconds = time.perf_counter() - started
            print(f"  {args.rows / seconds:,.0f} rows/s")
            (_, state), started = last[0], time.perf_counter()
            span, _ = next(RowStream([file.name]).stream(state | {"done": state["done"] - 1}, seed=0))
            assert stream.read(span)[0]["id"] == span.number
            print(f"  resume at the last row: {1000 * (time.perf_counter() - started):.1f} ms")


if __name__ == "__main__":
    main()
