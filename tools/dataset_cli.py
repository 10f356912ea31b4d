"""The dataset command line: convert LLaVA-Instruct-150K to rows with messages, and check datasets before training.

`python data.py llava` converts. `python data.py check` reads every row as training would, and reports what it finds as
text and, with --report, as an HTML page (`tools/report.py`).
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
from collections.abc import Iterable, Iterator
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
MAX_REASONS, MAX_EXAMPLES = 40, 10  # kinds of bad rows that are counted separately, and rows of each that are shown
MAX_KEYS = 40  # keys without an effect that are listed
MAX_SHOWN = 12  # rows that the page renders
# Coordinates in an answer: {"bbox_2d": [x1, y1, x2, y2]}, {"point_2d": [x, y]}, <|box_start|>(x1,y1),(x2,y2)<|box_end|>
BOX = re.compile(r"""["'](?:bbox|bbox_2d|point_2d)["']\s*:\s*(\[[][\d\s.,-]*\])|<\|box_start\|>(.*?)<\|box_end\|>""")


# ---- llava -----------------------------------------------------------------------------------------------------------


def convert_llava(annotations: str, image_dir: str, output: str, overwrite: bool = False) -> str:
    """Write LLaVA-Instruct-150K's rows as rows with messages, and return a summary line. Raises InputError.

    Rows with a missing image are left out, as in the guide's script. Image paths are relative to the output's folder
    ("./train2017/X.jpg" for an output in COCO2017, as in the guide) if the images are below it, so that
    training needs no --dataset-dir. Otherwise the paths are absolute. Other keys of rows and messages are kept.
    """
    if not os.path.isdir(image_dir):
        raise InputError(f"{image_dir} is not a folder: give COCO's image folder train2017 as --image_dir")
    if os.path.exists(output) and not overwrite:
        raise InputError(f"{output} exists: give another --output, or --overwrite")
    dataset = data.RowDataset([annotations])
    image_dir, folder = os.path.abspath(image_dir), os.path.dirname(os.path.abspath(output))
    start, separator, end = ("", "\n", "\n") if output.endswith(".jsonl") else ("[\n", ",\n", "\n]\n")
    written, found, skipped, missing = 0, 0, 0, []  # rows written, images found, rows skipped, some missing images
    with atomic_file(output) as stream:
        for i in tqdm(range(len(dataset)), desc=os.path.basename(output), unit=" rows"):
            row, source, _ = dataset[i]
            names, messages = _parse_llava(row, source)
            paths = [os.path.join(image_dir, name) for name in names]
            absent = [path for path in paths if not os.path.isfile(path)]
            found += len(paths) - len(absent)
            if absent:
                skipped += 1
                missing += absent[: 3 - len(missing)]
                continue
            relative = [os.path.relpath(path, folder) for path in paths]
            row = {key: row[key] for key in row if key not in ("image", "conversations")} | {"messages": messages}
            row["images"] = [p if r.startswith("..") else f"./{r}" for p, r in zip(paths, relative, strict=True)]
            stream.write((separator if written else start) + json.dumps(row))
            written += 1
        if skipped and not found:
            raise InputError(
                f"{image_dir} lacks the images of all {skipped} rows, such as {visible(missing[0])}: give COCO's image "
                "folder train2017 as --image_dir"
            )
        stream.write(end)
    examples = f": {', '.join(map(visible, missing))}{', ...' if skipped > len(missing) else ''}" if missing else ""
    return f"wrote {output}: {written:,} rows, {skipped:,} skipped because an image is missing{examples}"


def _parse_llava(row: dict, source: str) -> tuple[list[str], list[dict]]:
    """Return a row's image names and messages. Raises InputError."""
    if not isinstance(row, dict):
        raise InputError(f"{source} is not an object with 'conversations': give llava_instruct_150k.json as "
                         "--annotations")
    images, turns = row.get("image") or [], row.get("conversations")
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise InputError(f"{source}: 'image' must be a file name")
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{source}: 'conversations' must be a list of turns")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise InputError(f"{source}: conversations[{i}] must be an object with 'from' and a text as 'value'")
        if turn.get("from") not in ("human", "gpt"):
            raise InputError(f"{source}: conversations[{i}] is from {repr(turn.get('from'))[:80]}, not human or gpt")
        role = {"human": "user", "gpt": "assistant"}[turn["from"]]
        other_keys = {key: turn[key] for key in turn if key not in ("from", "value")}
        messages.append(other_keys | {"role": role, "content": turn["value"]})
    return images, messages


@contextlib.contextmanager
def atomic_file(path: str) -> Iterator[TextIO]:
    """Yield a stream for a new content of `path`, which replaces the file only if the block completes."""
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


# ---- check -----------------------------------------------------------------------------------------------------------


class RowInfo(NamedTuple):
    """The facts about one row that the statistics need."""

    source: str  # "train.json row 12 (id 33471)"
    reason: str  # why the row is bad, or ""
    counts: dict[str, int]
    image_tokens: list[int]  # tokens of each image
    content: int  # hash of the ids and pixels; 0 for a bad row
    identity: int  # hash of the file and id; 0 for a row without an id
    unused_keys: Iterable[str] = ()  # keys that have no effect
    outside: str = ""  # the first box in an answer that leaves 0 to 1000, or ""


class RowReader:
    """A map-style dataset of chunks of rows, each read as training reads it."""

    def __init__(self, dataset: data.RowDataset, processor: data.Processor, options: data.EncodeOptions):
        self.dataset, self.processor, self.options = dataset, processor, options

    def __getitem__(self, start: int) -> list[RowInfo]:
        return [self.read(i) for i in range(start, min(start + CHUNK, len(self.dataset)))]

    def name(self, index: int) -> str:
        """Return a row's file and number."""
        span = self.dataset.span(index)
        return f"{self.dataset.paths[span.file]} row {span.number + 1}"

    def sample(self, index: int) -> data.Sample:
        """Return an encoded row. Raises InputError."""
        row, source, media_dir = self.dataset[index]
        return self.processor.encode(row, media_dir=media_dir, source=source, options=self.options)

    def read(self, index: int) -> RowInfo:
        source, identity, file = self.name(index), 0, self.dataset.span(index).file
        unused: set[str] = set()
        try:
            row, source, media_dir = self.dataset[index]
            if isinstance(row, dict):
                unused = data.unused_keys(row, self.processor.template.has_thoughts)
                if row.get("id") is not None:
                    identity = _hash(f"{file} {row['id']}".encode("utf-8", "surrogatepass"))
            sample = self.processor.encode(row, media_dir=media_dir, source=source, options=self.options)
        except InputError as error:
            reason = str(error).removeprefix(source).lstrip(": ")[:500]
            return RowInfo(source, reason, {"rows": 1, "bad": 1}, [], 0, identity, unused)
        media = report.list_media(sample, self.processor)
        image_tokens = [tokens for kind, _, tokens in media if kind == "image"]
        supervised = int((sample.labels != data.IGNORE).sum())
        outside = box_outside(row)
        counts = {
            "rows": 1,
            "turns": int((sample.input_ids == self.processor.im_start_token_id).sum()),
            "images": len(image_tokens),
            "videos": len(media) - len(image_tokens),
            "tokens": len(sample.input_ids),
            "supervised": supervised,
            "media": len(sample.visual_index),
            "truncated": int(sample.truncated),
            "unsupervised": int(supervised == 0),
            "outside": int(outside != ""),
        }
        # Hash every 48th pixel value. The hash is of pixels, not paths, to find one image under two names.
        content = _hash(sample.input_ids.numpy().tobytes(), sample.pixel_values[:, ::48].numpy().tobytes())
        return RowInfo(source, "", counts, image_tokens, content, identity, unused, outside)


def box_outside(row: dict) -> str:
    """Return the first box or point in the answers of a good row that leaves 0 to 1000, or ""."""
    for turn in data.parse_row(row):
        for box in BOX.finditer("".join(turn.parts) if turn.role == "assistant" else ""):
            numbers = re.findall(r"-?\d+(?:\.\d+)?", box[1] or box[2])
            if any(not 0 <= float(n) <= 1000 for n in numbers):
                return box[0][:200]
    return ""


def _hash(*parts: bytes) -> int:
    """Return a hash of 64 bits that is not 0."""
    return int.from_bytes(hashlib.blake2b(b"".join(parts), digest_size=8).digest(), "big") or 1


class Statistics:
    """Sums, histograms, two hashes per row, and some of the bad rows."""

    def __init__(self, reader: RowReader):
        self.reader, rows = reader, len(reader.dataset)
        self.files = [Counter() for _ in reader.dataset.paths]
        self.tokens, self.supervised_percent, self.images, self.image_tokens = (Counter() for _ in range(4))
        self.contents, self.identities = np.zeros((2, rows), np.uint64)
        self.unused_keys: Counter[str] = Counter()
        self.first_rows: dict[str, int] = {}  # trait -> the first row that has it
        self.reasons: dict[str, list] = {}  # kind of reason -> [number of rows, (source, reason), ...]

    def add(self, index: int, row: RowInfo) -> None:
        """Count a row."""
        counts = row.counts
        self.files[self.reader.dataset.span(index).file].update(counts)
        self.contents[index], self.identities[index] = row.content, row.identity
        self.unused_keys.update(row.unused_keys)
        if row.reason:  # reasons that differ only in paths, quotations and numbers are of one kind
            kind = re.sub(r"\S*/\S*|'[^']*'|\"[^\"]*\"|(?<![\w-])\d+", "…", row.reason)[:150]
            known = kind in self.reasons or len(self.reasons) < MAX_REASONS
            group = self.reasons.setdefault(kind if known else "other reasons", [0])
            group[0] += 1
            if len(group) <= MAX_EXAMPLES:
                group.append((row.source, row.reason))
            return
        self.tokens[counts["tokens"]] += 1
        self.supervised_percent[100 * counts["supervised"] // counts["tokens"]] += 1
        self.images[counts["images"]] += 1
        self.image_tokens.update(row.image_tokens)
        traits = {"video": counts["videos"], "several images": counts["images"] > 1, "truncated": counts["truncated"],
                  "no image": not row.image_tokens}
        for trait in [trait for trait, present in traits.items() if present]:
            self.first_rows.setdefault(trait, index)

    def choose(self) -> list[int]:
        """Return the good rows to show: the first with each trait, then rows spread evenly over every dataset."""
        good, ends = np.flatnonzero(self.contents), np.cumsum([counts["rows"] for counts in self.files])
        files = [rows for rows in np.split(good, np.searchsorted(good, ends)) if len(rows)]
        remaining = MAX_SHOWN - len(self.first_rows)
        files = files[:: max(1, -(-len(files) // remaining))]
        per_file = remaining // max(1, len(files))
        spread = [rows[np.linspace(0, len(rows) - 1, min(per_file, len(rows))).astype(int)] for rows in files]
        return sorted({int(i) for i in [*self.first_rows.values(), *np.concatenate(spread or [good])][:MAX_SHOWN]})

    def summary(self, seq_length: int) -> report.Summary:
        """Return what is printed and shown on the page."""
        total = sum(self.files, Counter())
        tokens = total["tokens"]
        low, median, p95, high = (f"{_quantile(self.tokens, q):,}" if tokens else "-" for q in (0, 0.5, 0.95, 1))
        repeats, same_ids = _repeats(self.contents), _repeats(self.identities)
        figures = [
            ("rows", total["rows"], f"{total['bad']:,} of them bad"),
            ("turns", total["turns"], "system, user and assistant"),
            ("images", total["images"], ""),
            ("videos", total["videos"], ""),
            ("tokens", tokens, f"{low} to {high} per row, median {median}, p95 {p95}"),
            ("supervised", total["supervised"], f"{100 * total['supervised'] / max(1, tokens):.1f}% of tokens"),
            ("media", total["media"], f"{100 * total['media'] / max(1, tokens):.1f}% of tokens: images, videos"),
            ("truncated", total["truncated"], f"rows longer than {seq_length:,} tokens"),
            ("repeated", len(repeats), "rows with the content of an earlier one"),
            ("repeated ids", len(same_ids), "rows with the id of an earlier one in their file"),
            ("unsupervised", total["unsupervised"], "rows without a supervised token"),
            ("outside", total["outside"], "rows with a box outside 0 to 1000, Qwen3-VL's relative coordinates"),
            ("packed rows", -(-tokens // seq_length), f"of {seq_length:,} tokens, at least"),
        ]
        return report.Summary(
            rows=total["rows"],
            bad=total["bad"],
            figures=[(name, f"{value:,}", note) for name, value, note in figures],
            histograms=[
                ("tokens per row", histogram(self.tokens)),
                ("supervised tokens per row, %", histogram(self.supervised_percent)),
                ("images per row", histogram(self.images)),
                ("tokens per image", histogram(self.image_tokens)),
            ],
            datasets=list(zip(self.reader.dataset.paths, self.files, strict=True)),
            unused_keys=sorted(self.unused_keys.items(), key=lambda item: (-item[1], item[0]))[:MAX_KEYS],
            reasons=sorted(self.reasons.items(), key=lambda item: -item[1][0]),
            repeats=[(self.reader.name(i), self.reader.name(first)) for i, first in repeats[:20].tolist()],
        )


def _repeats(hashes: np.ndarray) -> np.ndarray:
    """Return (row, first row with the same hash) [N, 2] for each row that repeats an earlier one."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    first = first[group]
    later = np.flatnonzero((first != np.arange(len(hashes))) & (hashes != 0))
    return np.stack([later, first[later]], axis=1)


def _quantile(values: Counter, q: float) -> int:
    """Return the smallest value that is at least as large as a share `q` of all values."""
    remaining = q * values.total()
    for value in sorted(values):
        remaining -= values[value]
        if remaining <= 0:
            return value
    return value


def histogram(values: Counter, bins: int = 12) -> list[tuple[str, int]]:
    """Return (label, count) of about `bins` equal ranges. The last range includes a long tail."""
    if not values:
        return []
    low, high, top = min(values), _quantile(values, 0.99), max(values)
    high = top if top < max(2 * high, bins) else high
    step = next(s for e in range(12) for s in (10**e, 2 * 10**e, 5 * 10**e) if s * bins > high - low)
    first, last = low // step, high // step
    counts = [0] * (last - first + 1)
    for value, count in values.items():
        counts[min(value // step, last) - first] += count
    starts = [(first + i) * step for i in range(len(counts))]
    labels = [f"{start:,}" if step == 1 else f"{start:,}-{start + step - 1:,}" for start in starts]
    labels[-1] = labels[-1] if top // step == last else f"{starts[-1]:,} and more"
    return list(zip(labels, counts, strict=True))


def check(args: argparse.Namespace) -> None:
    """Read every row, print the summary and write the page. Raises InputError if rows are bad."""
    limits = data.media_limits(args)
    processor = data.Processor(args.init_from_hf_path, enable_thinking=args.enable_thinking, **limits)
    dataset = data.RowDataset(args.dataset.split(","), args.dataset_dir, args.cache_dir, args.max_samples)
    reader = RowReader(dataset, processor, data.encode_options(args))
    statistics = Statistics(reader)
    starts = range(0, len(dataset), CHUNK)
    chunks = DataLoader(reader, batch_size=None, sampler=starts, num_workers=min(args.num_workers, len(starts)),
                        collate_fn=list, worker_init_fn=leave_process_group)
    try:
        with tqdm(total=len(dataset), unit=" rows", desc="check") as bar:
            for start, rows in zip(starts, chunks, strict=True):
                for index, row in enumerate(rows, start):
                    statistics.add(index, row)
                    if row.reason:
                        tqdm.write(f"bad: {visible(row.source)}: {visible(row.reason)}")
                    if row.outside and sum(counts["outside"] for counts in statistics.files) <= MAX_EXAMPLES:
                        tqdm.write(f"warning: {visible(row.source)}: an answer's box leaves 0 to 1000, Qwen3-VL's "
                                   f"coordinates relative to the image: {visible(row.outside)}")
                bar.update(len(rows))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError("a worker process was killed, perhaps because memory ran out: give a smaller --num-workers or "
                         "a smaller --image-max-pixels") from error
    summary = statistics.summary(args.seq_length)
    print("\n".join(_as_text(summary)), flush=True)
    if args.report:
        samples = (reader.sample(index) for index in statistics.choose())
        with atomic_file(args.report) as stream:
            stream.write(report.page(summary, samples, processor))
        print(f"wrote {args.report}")
    if summary.bad:
        raise InputError(
            f"{summary.bad:,} of {summary.rows:,} rows are bad, listed above: repair them, remove them, or (up to a "
            "tenth of a dataset) train with --on-bad-sample skip"
        )


def _as_text(summary: report.Summary) -> Iterator[str]:
    """Yield the lines of the printed summary."""
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
    if summary.unused_keys:
        yield f"\n{report.UNUSED_KEYS}"
        yield from (f"{count:12,}  {visible(key[:100])}" for key, count in summary.unused_keys)
    if summary.repeats:
        yield "\nrows with the same content, for example"
        yield from (f"  {visible(row)} as {visible(first)}" for row, first in summary.repeats[:5])


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse and check the flags. Raises UsageError."""
    parser = Parser(prog="data.py", description="Convert and check datasets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{llava,check}")
    llava = commands.add_parser("llava", help="convert LLaVA-Instruct-150K with COCO2017 to rows with messages")
    llava.add_argument("--annotations", required=True, metavar="FILE", help="llava_instruct_150k.json")
    llava.add_argument("--image_dir", "--image-dir", required=True, metavar="DIR", help="folder COCO2017/train2017")
    llava.add_argument("--output", required=True, metavar="FILE", help="JSON array, or JSON lines for a .jsonl file")
    llava.add_argument("--overwrite", action="store_true", help="replace an existing output")

    check_parser = commands.add_parser("check", help="read every row as training would, and report statistics and bad "
                                       "rows")
    count = number(int, 1)
    g = check_parser.add_argument_group("rows")
    g.add_argument("--dataset", required=True, metavar="A.json,B.jsonl", help="files of rows, separated by commas")
    g.add_argument("--init-from-hf-path", required=True, metavar="DIR", help="Hugging Face directory with "
                   "configuration, tokenizer and preprocessors (weights are not read)")
    g.add_argument("--report", metavar="FILE", help="write an HTML page with histograms and sample rows")
    g.add_argument("--num-workers", type=number(int, 0), default=os.cpu_count() or 1, metavar="N",
                   help="processes that read rows; 0 reads them in the main process")
    g.add_argument("--dataset-dir", metavar="DIR", help="folder that media paths are relative to (default: the folder "
                   "of each file)")
    g.add_argument("--cache-dir", metavar="DIR", help="keep the index of each dataset here for the next start")
    g.add_argument("--max-samples", type=count, metavar="N", help="read only the first N rows of each dataset")
    g = check_parser.add_argument_group("as in training")
    g.add_argument("--seq-length", type=count, default=4096, metavar="N", help="longest sample in tokens")
    data.add_media_flags(g)
    data.add_row_flags(g)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show a traceback with an error")

    args, unknown = parser.parse_known_args(argv)
    if unknown:  # the command's own parser knows which flags are similar
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    for name in ("output", "dataset_dir", "cache_dir", "report"):
        if getattr(args, name, None) == "":
            raise UsageError(f"--{name.replace('_', '-')} is empty: give a path, or omit the flag")
    if args.command == "check":
        data.encode_options(args)  # raises for flags that exclude each other
        data.media_limits(args)  # raises for a minimum above its maximum
    target = args.output if args.command == "llava" else args.report
    if target and (os.path.isdir(target) or not os.access(Path(target).absolute().parent, os.W_OK)):
        raise UsageError(f"{target} cannot be written: give a file in an existing folder with write permission")
    return args


def main(argv: list[str]) -> None:
    """Run a command. Raises the errors that `run` reports."""
    args = parse_args(argv)
    if args.command == "llava":
        print(convert_llava(args.annotations, args.image_dir, args.output, args.overwrite))
    else:
        check(args)


def run(argv: list[str]) -> int:
    """Run the program and return its exit status. An interrupted program leaves no output."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # rows may hold characters that the terminal's encoding lacks
    try:
        return run_program(main, argv)
    except KeyboardInterrupt:
        print("error: interrupted: nothing was written", file=sys.stderr)
        return 130
