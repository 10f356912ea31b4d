"""The dataset command line: `python data.py llava` converts LLaVA-Instruct-150K to rows with messages, `python data.py
check` reads every row of a dataset as training would and says what it found, in text and as a page (`tools/report.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from common import InputError, Parser, UsageError, leave_process_group, number, run_program
from tools import report
from tools.report import visible

CHUNK = 16  # rows that a worker reads at a time
MAX_KINDS, KEPT = 40, 10  # kinds of bad rows that are told apart, and rows of a kind that the page shows
SHOWN = 12  # rows that the page renders


# ---------------------------------------------------------------------------------------------------------------- llava


def convert_llava(annotations: str, image_dir: str, output: str, overwrite: bool = False) -> str:
    """Writes LLaVA-Instruct-150K's rows as rows with messages; a line of what was done. Raises InputError.

    Rows whose picture is missing are left out, as the guide's script does. Paths are relative to the output's folder
    ("./train2017/X.jpg" for an output in COCO2017, which is what the guide has) if the pictures are below it, so that
    training needs no --dataset-dir; else absolute, which nothing but moving the pictures breaks.
    """
    if not os.path.isdir(image_dir):
        raise InputError(f"{image_dir} is no folder: --image_dir names the one with COCO's pictures, train2017")
    if os.path.exists(output) and not overwrite:
        raise InputError(f"{output} exists: give another --output, or --overwrite")
    dataset = data.RowDataset([annotations])
    image_dir, folder = os.path.abspath(image_dir), os.path.dirname(os.path.abspath(output))
    begin, between, end = ("", "\n", "\n") if output.endswith(".jsonl") else ("[\n", ",\n", "\n]\n")
    written, found, missing, skipped = 0, 0, [], 0
    with written_whole(output) as stream:
        for i in tqdm(range(len(dataset)), desc=os.path.basename(output), unit=" rows"):
            row, source, _ = dataset[i]
            names, messages = _read_llava(row, source)
            paths = [os.path.join(image_dir, name) for name in names]
            lost = [path for path in paths if not os.path.isfile(path)]
            found += len(paths) - len(lost)
            if lost:
                skipped += 1
                missing += lost[: 3 - len(missing)]
                continue
            relative = [os.path.relpath(path, folder) for path in paths]
            row = {key: row[key] for key in ("id",) if key in row} | {"messages": messages}
            row["images"] = [p if r.startswith("..") else f"./{r}" for p, r in zip(paths, relative, strict=True)]
            stream.write((between if written else begin) + json.dumps(row))
            written += 1
        if skipped and not found:
            raise InputError(
                f"{image_dir} has the picture of none of {skipped} rows, such as {visible(missing[0])}: --image_dir "
                "names the folder with COCO's pictures, train2017"
            )
        stream.write(end)
    examples = f": {', '.join(map(visible, missing))}{', ...' if skipped > len(missing) else ''}" if missing else ""
    return f"wrote {output}: {written:,} rows, {skipped:,} skipped whose picture is missing{examples}"


def _read_llava(row: dict, source: str) -> tuple[list[str], list[dict]]:
    """A row's pictures and messages. Raises InputError."""
    if not isinstance(row, dict):
        raise InputError(f"{source} is no object with 'conversations': --annotations takes llava_instruct_150k.json")
    images, turns = row.get("image") or [], row.get("conversations")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise InputError(f"{source}: 'image' must be the name of a picture")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{source}: 'conversations' must be a list of turns")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise InputError(f"{source}: conversations[{i}] must be an object with 'from' and a text as 'value'")
        if turn.get("from") not in ("human", "gpt"):
            raise InputError(f"{source}: conversations[{i}] is from {repr(turn.get('from'))[:80]}, not human or gpt")
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        messages.append({"role": role, "content": turn["value"]})
    return images, messages


@contextlib.contextmanager
def written_whole(path: str) -> Iterator[TextIO]:
    """A stream to write `path` with: the file is there when the block has ended, whole, or as it was before."""
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): nothing is left of it") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


# ---------------------------------------------------------------------------------------------------------------- check


class Row(NamedTuple):
    """What is kept of a row that was read."""

    source: str  # "train.json row 12 (id 33471)"
    reason: str  # why it is bad; "" if it is not
    counts: dict[str, int]
    sizes: list[int]  # tokens of each picture
    content: int  # hashes of what training sees and of the id; 0: none
    identity: int


class RowReader:
    """Rows read as training reads them, CHUNK at a time: what a loader's worker does."""

    def __init__(self, dataset: data.RowDataset, processor: data.Processor, options: data.EncodeOptions):
        self.dataset, self.processor, self.options = dataset, processor, options

    def __getitem__(self, start: int) -> list[Row]:
        return [self.read(i) for i in range(start, min(start + CHUNK, len(self.dataset)))]

    def name(self, index: int) -> str:
        """Where a row stands, without its id."""
        span = self.dataset.span(index)
        return f"{self.dataset.paths[span.file]} row {span.number + 1}"

    def sample(self, index: int) -> data.Sample:
        """A row, encoded. Raises InputError."""
        row, source, media_dir = self.dataset[index]
        return self.processor.encode(row, media_dir=media_dir, source=source, options=self.options)

    def read(self, index: int) -> Row:
        """What the figures need of a row."""
        source, identity, file = self.name(index), 0, self.dataset.span(index).file
        try:
            row, source, media_dir = self.dataset[index]
            if isinstance(row, dict) and row.get("id") is not None:
                identity = _hash(f"{file} {row['id']}".encode("utf-8", "surrogatepass"))
            sample = self.processor.encode(row, media_dir=media_dir, source=source, options=self.options)
        except InputError as error:
            reason = str(error).removeprefix(source).lstrip(": ")[:500]  # it may quote a text of megabytes
            return Row(source, reason, {"rows": 1, "bad": 1}, [], 0, identity)
        media = report.list_media(sample, self.processor)
        sizes = [tokens for kind, _, tokens in media if kind == "picture"]
        supervised = int((sample.labels != data.IGNORE).sum())
        counts = {
            "rows": 1, "turns": int((sample.input_ids == self.processor.im_start_token_id).sum()),
            "pictures": len(sizes), "videos": len(media) - len(sizes), "tokens": len(sample.input_ids),
            "supervised": supervised, "media": len(sample.visual_index), "truncated": int(sample.truncated),
            "unsupervised": int(supervised == 0),
        }
        # One value of 48 tells pictures apart as well as all do; a picture under two names is found, too.
        content = _hash(sample.input_ids.numpy().tobytes(), sample.pixel_values[:, ::48].numpy().tobytes())
        return Row(source, "", counts, sizes, content, identity)


def _hash(*pieces: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for piece in pieces:
        digest.update(piece)
    return int.from_bytes(digest.digest(), "big") or 1


class Figures:
    """What is known of the rows: sums, histograms, two hashes a row, and some of the bad ones."""

    def __init__(self, reader: RowReader):
        self.reader, rows = reader, len(reader.dataset)
        self.files = [Counter() for _ in reader.dataset.paths]
        self.tokens, self.shares, self.pictures, self.sizes = Counter(), Counter(), Counter(), Counter()
        self.contents, self.identities = np.zeros((2, rows), np.uint64)
        self.firsts: dict[str, int] = {}  # trait: the first row that has it
        self.reasons: dict[str, list] = {}  # kind of reason: how many, then some rows as (source, reason)

    def add(self, index: int, row: Row) -> None:
        """Counts a row."""
        counts = row.counts
        self.files[self.reader.dataset.span(index).file].update(counts)
        self.contents[index], self.identities[index] = row.content, row.identity
        if row.reason:  # of one kind are those that differ in paths, quotations and numbers
            kind = re.sub(r"\S*/\S*|'[^']*'|\"[^\"]*\"|(?<![\w-])\d+", "…", row.reason)[:150]
            known = kind in self.reasons or len(self.reasons) < MAX_KINDS
            group = self.reasons.setdefault(kind if known else "other reasons", [0])
            group[0] += 1
            if len(group) <= KEPT:
                group.append((row.source, row.reason))
            return
        self.tokens[counts["tokens"]] += 1
        self.shares[100 * counts["supervised"] // counts["tokens"]] += 1
        self.pictures[counts["pictures"]] += 1
        self.sizes.update(row.sizes)
        several = counts["pictures"] > 1
        traits = {"video": counts["videos"], "pictures": several, "cut": counts["truncated"], "text": not row.sizes}
        for trait in [trait for trait, has in traits.items() if has]:
            self.firsts.setdefault(trait, index)

    def choose(self) -> list[int]:
        """Rows to show: the first of each kind, and from every dataset alike, from all over each."""
        good, ends = np.flatnonzero(self.contents), np.cumsum([counts["rows"] for counts in self.files])
        parts = [part for part in np.split(good, np.searchsorted(good, ends)) if len(part)]
        room = SHOWN - len(self.firsts)
        parts = parts[:: max(1, -(-len(parts) // room))]
        each = room // max(1, len(parts))
        places = [part[np.linspace(0, len(part) - 1, min(each, len(part))).astype(int)] for part in parts]
        return sorted({int(i) for i in [*self.firsts.values(), *np.concatenate(places or [good])][:SHOWN]})

    def summary(self, seq_length: int) -> report.Summary:
        """What is printed and what the page shows."""
        total = sum(self.files, Counter())
        tokens = total["tokens"]
        low, median, p95, high = (f"{_quantile(self.tokens, q):,}" if tokens else "-" for q in (0, 0.5, 0.95, 1))
        repeats, same_ids = _repeats(self.contents), _repeats(self.identities)
        figures = [
            ("rows", total["rows"], f"{total['bad']:,} of them bad"),
            ("turns", total["turns"], "system, user and assistant"),
            ("pictures", total["pictures"], ""),
            ("videos", total["videos"], ""),
            ("tokens", tokens, f"{low} to {high} a row, median {median}, p95 {p95}"),
            ("supervised", total["supervised"], f"{100 * total['supervised'] / max(1, tokens):.1f}% of tokens"),
            ("media", total["media"], f"{100 * total['media'] / max(1, tokens):.1f}% of tokens: pictures, videos"),
            ("truncated", total["truncated"], f"rows longer than {seq_length:,} tokens"),
            ("repeated", len(repeats), "rows with the content of an earlier one"),
            ("repeated ids", len(same_ids), "rows with the id of an earlier one of their file"),
            ("unsupervised", total["unsupervised"], "rows without a supervised token"),
            ("packed rows", -(-tokens // seq_length), f"of {seq_length:,} tokens, at least"),
        ]
        return report.Summary(
            rows=total["rows"],
            bad=total["bad"],
            figures=[(name, f"{value:,}", note) for name, value, note in figures],
            histograms=[
                ("tokens per row", histogram(self.tokens)),
                ("supervised tokens of a row, %", histogram(self.shares)),
                ("pictures per row", histogram(self.pictures)),
                ("tokens per picture", histogram(self.sizes)),
            ],
            datasets=list(zip(self.reader.dataset.paths, self.files, strict=True)),
            reasons=sorted(self.reasons.items(), key=lambda item: -item[1][0]),
            repeats=[(self.reader.name(i), self.reader.name(first)) for i, first in repeats[:20].tolist()],
        )


def _repeats(hashes: np.ndarray) -> np.ndarray:
    """(row, first row with its hash) [N, 2] of each that is not the first."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    first = first[group]
    later = np.flatnonzero((first != np.arange(len(hashes))) & (hashes != 0))
    return np.stack([later, first[later]], axis=1)


def _quantile(values: Counter, share: float) -> int:
    """The smallest value that so large a share of them does not exceed."""
    left = share * values.total()
    for value in sorted(values):
        left -= values[value]
        if left <= 0:
            return value
    return value


def histogram(values: Counter, most: int = 12) -> list[tuple[str, int]]:
    """(range, how many) of about `most` equal ranges; the last takes a long tail, too."""
    if not values:
        return []
    low, high, top = min(values), _quantile(values, 0.99), max(values)
    high = top if top < max(2 * high, most) else high
    step = next(s for e in range(12) for s in (10**e, 2 * 10**e, 5 * 10**e) if s * most > high - low)
    first, last = low // step, high // step
    bins = [0] * (last - first + 1)
    for value, count in values.items():
        bins[min(value // step, last) - first] += count
    starts = [(first + i) * step for i in range(len(bins))]
    labels = [f"{start:,}" if step == 1 else f"{start:,}-{start + step - 1:,}" for start in starts]
    labels[-1] = labels[-1] if top // step == last else f"{starts[-1]:,} and more"
    return list(zip(labels, bins, strict=True))


def check(args: argparse.Namespace) -> None:
    """Reads every row, prints what it found and writes the page. Raises InputError if rows are bad."""
    processor = data.Processor(args.init_from_hf_path, **data.media_limits(args))
    dataset = data.RowDataset(args.dataset.split(","), args.dataset_dir, args.cache_dir, args.max_samples)
    reader = RowReader(dataset, processor, data.encode_options(args))
    figures = Figures(reader)
    starts = range(0, len(dataset), CHUNK)
    chunks = DataLoader(reader, batch_size=None, sampler=starts, num_workers=min(args.num_workers, len(starts)),
                        collate_fn=list, worker_init_fn=leave_process_group)
    try:
        with tqdm(total=len(dataset), unit=" rows", desc="check") as bar:
            for start, rows in zip(starts, chunks, strict=True):
                for index, row in enumerate(rows, start):
                    figures.add(index, row)
                    if row.reason:
                        tqdm.write(f"bad: {visible(row.source)}: {visible(row.reason)}")
                bar.update(len(rows))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError("a process was ended from outside, as where memory runs out: give a smaller --num-workers, "
                         "or a smaller --image-max-pixels") from error
    summary = figures.summary(args.seq_length)
    print("\n".join(_as_text(summary)), flush=True)
    if args.report:
        samples = (reader.sample(index) for index in figures.choose())
        with written_whole(args.report) as stream:
            stream.write(report.page(summary, samples, processor))
        print(f"wrote {args.report}")
    if summary.bad:
        raise InputError(
            f"{summary.bad:,} of {summary.rows:,} rows are bad, listed above: mend them, leave them out, or (up to a "
            "tenth of a dataset) train with --on-bad-sample skip"
        )


def _as_text(summary: report.Summary) -> Iterator[str]:
    for name, value, note in summary.figures:
        yield f"{name:13}{value:>14}  {note}".rstrip()
    for title, bars in summary.histograms:
        yield f"\n{title}"
        width, longest = max((len(label) for label, _ in bars), default=0), max((n for _, n in bars), default=1)
        for label, count in bars:
            yield f"  {label:>{width}} {'#' * -(-40 * count // longest):40} {count:,}"
    yield "\n" + "".join(f"{name:>12}" for name in report.COLUMNS) + "  dataset"
    for path, counts in summary.datasets:
        yield "".join(f"{counts[name]:12,}" for name in report.COLUMNS) + f"  {visible(path)}"
    if summary.repeats:
        yield "\nthe same content, for example"
        yield from (f"  {visible(row)} as {visible(first)}" for row, first in summary.repeats[:5])


# --------------------------------------------------------------------------------------------------------- command line


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises UsageError."""
    parser = Parser(prog="data.py", description="Datasets: conversion and inspection")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{llava,check}")
    llava = commands.add_parser("llava", help="converts LLaVA-Instruct-150K, with COCO2017, to rows with messages")
    llava.add_argument("--annotations", required=True, metavar="FILE", help="llava_instruct_150k.json")
    llava.add_argument("--image_dir", "--image-dir", required=True, metavar="DIR", help="COCO2017/train2017")
    llava.add_argument("--output", required=True, metavar="FILE", help="a JSON array, or JSON lines if it ends so")
    llava.add_argument("--overwrite", action="store_true", help="replace an earlier output")

    check_parser = commands.add_parser("check", help="reads every row as training would: counts, bad rows, a page")
    count = number(int, 1)
    g = check_parser.add_argument_group("rows")
    g.add_argument("--dataset", required=True, metavar="A.json,B.jsonl", help="files of rows, comma-separated")
    g.add_argument("--init-from-hf-path", required=True, metavar="DIR", help="Hugging Face directory: configuration, "
                   "tokenizer, preprocessors (weights are not read)")
    g.add_argument("--report", metavar="FILE", help="write a page with histograms and sample rows (HTML)")
    g.add_argument("--num-workers", type=number(int, 0), default=os.cpu_count() or 1, metavar="N",
                   help="processes that read rows; 0: this one")
    g.add_argument("--dataset-dir", metavar="DIR", help="media paths are relative to it (default: the file's folder)")
    g.add_argument("--cache-dir", metavar="DIR", help="keeps the index of each dataset for the next start")
    g.add_argument("--max-samples", type=count, metavar="N", help="the first N rows of each dataset")
    g = check_parser.add_argument_group("as in training")
    g.add_argument("--seq-length", type=count, default=4096, metavar="N", help="the longest sample, in tokens")
    data.add_media_flags(g)
    data.add_row_flags(g)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show a traceback with an error")

    args, unknown = parser.parse_known_args(argv)
    if unknown:  # said by the command's own parser, which knows the flags that come near
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    for name in ("output", "dataset_dir", "cache_dir", "report"):
        if getattr(args, name, None) == "":
            raise UsageError(f"--{name.replace('_', '-')} is empty: give a path, or leave it out")
    if args.command == "check":
        data.encode_options(args)  # those that exclude each other are told now
        data.media_limits(args)  # and a minimum above its maximum
    target = args.output if args.command == "llava" else args.report
    if target and (os.path.isdir(target) or not os.access(Path(target).absolute().parent, os.W_OK)):
        raise UsageError(f"{target} cannot be written: give a file in a folder that exists and that you may write in")
    return args


def main(argv: list[str]) -> None:
    """The command line; raises what `run` reports."""
    args = parse_args(argv)
    if args.command == "llava":
        print(convert_llava(args.annotations, args.image_dir, args.output, args.overwrite))
    else:
        check(args)


def run(argv: list[str]) -> int:
    """The program; its exit status. Interrupted, it removes what it had begun to write."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # rows may hold what the terminal's encoding has not
    try:
        return run_program(main, argv)
    except KeyboardInterrupt:
        print("error: interrupted: nothing is written", file=sys.stderr)
        return 130
