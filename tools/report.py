"""The page of `python data.py check --report`: one HTML file with its images inside, no script, no network access.

All content from rows, paths and errors is escaped by `text` and never becomes an attribute.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

import data

THUMBNAIL = 256  # pixels of the longer side
MAX_IMAGES, MAX_TURNS, MAX_CHARACTERS = 8, 24, 1200  # of a row on the page: thumbnails, turns, characters per text
COLUMNS = ("rows", "bad", "turns", "images", "videos", "tokens", "supervised", "truncated")  # of the datasets' table
UNUSED_KEYS = "Keys that have no effect, and the rows that have them"
# Control characters, lone surrogates, and characters that change the direction of the text around them.
INVISIBLE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


@dataclass
class Summary:
    """The result of `check`."""

    rows: int
    bad: int
    figures: list[tuple[str, str, str]]  # name, value, note
    histograms: list[tuple[str, list[tuple[str, int]]]]  # title, (label, count)
    datasets: list[tuple[str, Counter]]  # path, counts
    unused_keys: list[tuple[str, int]]  # keys without an effect, and the numbers of rows that have them
    reasons: list[tuple[str, list]]  # kind of reason, [number of rows, (source, reason) of some rows, ...]
    repeats: list[tuple[str, str]]  # some rows, and the earlier rows that they repeat


def visible(value: str) -> str:
    """Return the text with invisible characters as escapes such as \\x00."""
    return INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), value)


def text(value: str, limit: int = MAX_CHARACTERS) -> str:
    """Return the text as HTML: escaped, with invisible characters shown, cut to `limit` characters."""
    cut = html.escape(visible(value[:limit]), quote=True)
    return cut if len(value) <= limit else f"{cut}<i>… {len(value):,} characters</i>"


def list_media(sample: data.Sample, processor: data.Processor) -> list[tuple[str, tuple[int, int, int], int]]:
    """Return ("image" or "video", grid, number of tokens) of each of a sample's images and videos, in order."""
    media, at, ids = [], 0, sample.input_ids[sample.visual_index].tolist()
    for t, h, w in sample.grid_thw.tolist():
        tokens = t * h * w // processor.merge_size**2
        media.append(("image" if ids[at] == processor.image_token_id else "video", (t, h, w), tokens))
        at += tokens
    return media


def unpatchify(patches: np.ndarray, grid: tuple[int, int, int], processor: data.Processor) -> np.ndarray:
    """Return the resized images [t, height, width, 3] uint8 of patches [t * h * w, 1536].

    Each pair of frames gives its first frame.
    """
    (t, h, w), m, p = grid, processor.merge_size, processor.patch_size
    blocks = patches.reshape(t, h // m, w // m, m, m, 3, processor.temporal_patch_size, p, p)[:, :, :, :, :, :, 0]
    pixels = blocks.transpose(0, 1, 3, 6, 2, 4, 7, 5).reshape(t, h * p, w * p, 3)
    mean, std = (np.array(processor.image[f"image_{name}"], np.float32) for name in ("mean", "std"))
    return ((pixels * std + mean) * 255).round().clip(0, 255).astype(np.uint8)


def _thumbnail(pixels: np.ndarray) -> str:
    """Return an <img> element with a JPEG of the pixels [height, width, 3]."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _thumbnails(sample: data.Sample, processor: data.Processor) -> Iterator[str]:
    """Yield HTML for each run of media tokens: its size and, for the first MAX_IMAGES, a thumbnail."""
    shown, at = 0, 0
    for kind, (t, h, w), _ in list_media(sample, processor):
        patches = sample.pixel_values[at : at + t * h * w].numpy().reshape(t, h * w, -1)
        at += t * h * w
        rows, columns = h // processor.merge_size, w // processor.merge_size
        for i in range(t):
            image = ""
            if shown < MAX_IMAGES:
                image = _thumbnail(unpatchify(patches[i], (1, h, w), processor)[0])
            shown += 1
            name = kind if kind == "image" else f"frames {i + 1}/{t}"
            size = f"{name} {rows}×{columns} = {rows * columns} tokens"
            yield f'<span class="media {kind}">{image}<small>{size}</small></span>'


def _row(sample: data.Sample, processor: data.Processor) -> str:
    """Return a row as training sees it: turns, images at their positions, supervised text marked."""
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    supervised = [False, *(label != data.IGNORE for label in labels[:-1])]  # labels[i] is the token i + 1
    thumbnails = _thumbnails(sample, processor)
    starts = [i for i, token in enumerate(ids) if token == processor.im_start_token_id] + [len(ids)]
    turns = [
        _turn(ids[start + 1 : end], supervised[start + 1 : end], thumbnails, processor)
        for start, end in itertools.islice(itertools.pairwise(starts), MAX_TURNS)
    ]
    if len(starts) - 1 > MAX_TURNS:
        turns.append(f"<p><i>… {len(starts) - 1:,} turns</i></p>")
    share = 100 * sum(supervised) // len(ids)
    note = f"{len(ids):,} tokens, {share} % supervised{', truncated' if sample.truncated else ''}"
    return f'<article><h3>{text(sample.source, 200)}</h3><p class="note">{note}</p>{"".join(turns)}</article>'


def _turn(ids: list[int], supervised: list[bool], thumbnails: Iterator[str], processor: data.Processor) -> str:
    """Return a turn. `ids` are its tokens after <|im_start|>."""
    parts: list[str] = []
    role = None

    def group_of(i: int) -> tuple[str, bool, int]:
        kind = _kind(ids[i], processor)
        return kind, supervised[i], i if kind == "control" else -1  # each control token is a group

    for (kind, is_supervised, _), positions in itertools.groupby(range(len(ids)), group_of):
        tokens = [ids[i] for i in positions]
        if kind == "media":
            part = next(thumbnails)
            time = re.search(r"&lt;[\d.]+ seconds&gt;$", parts[-1]) if parts else None
            if time:  # move the time of a video's frames to their caption
                parts[-1] = parts[-1][: time.start()]
                part = part.replace("<small>", f"<small>{time[0]} ")
        else:
            content = processor.tokenizer.decode(tokens, skip_special_tokens=False)
            if role is None:  # the first line
                role, _, content = content.partition("\n")
            part = text(content).replace("\n", '<span class="nl">↵</span>\n')
            part = f"<code>{part}</code>" if kind == "control" else part
        if tokens[0] not in (processor.vision_start_token_id, processor.vision_end_token_id):
            parts.append(f"<mark>{part}</mark>" if is_supervised and part else part)
    return f'<div class="turn"><b>{text(role or "", 20)}</b><div dir="auto">{"".join(parts)}</div></div>'


def _kind(token: int, processor: data.Processor) -> str:
    if token in (processor.image_token_id, processor.video_token_id):
        return "media"
    return "control" if any(token == getattr(processor, name) for name in data.CONTROL_TOKENS) else "text"


def _chart(title: str, bars: list[tuple[str, int]]) -> str:
    """Return a histogram as horizontal bars."""
    highest = max((count for _, count in bars), default=1)
    lines = []
    for i, (label, count) in enumerate(bars):
        y, length = 22 * i, 250 * count / highest
        lines.append(
            f'<text x="112" y="{y + 15}" text-anchor="end">{text(label)}</text>'
            f'<rect x="120" y="{y + 3}" width="{length:.1f}" height="16" rx="2"/>'
            f'<text x="{126 + length:.1f}" y="{y + 15}">{count:,}</text>'
        )
    drawing = f'<svg viewBox="0 0 430 {22 * len(bars)}" role="img">{"".join(lines)}</svg>' if bars else "<p>none</p>"
    return f'<figure><figcaption>{text(title)}</figcaption>{drawing}</figure>'


def _bad_rows(kind: str, count: int, *rows: tuple[str, str]) -> str:
    """Return examples of one kind of bad rows, folded if there are many. A single row has no heading."""
    lines = [f"<b>{text(source, 200)}</b> {text(reason, 400)}" for source, reason in rows]
    if count == len(lines) == 1:
        return f'<div class="bad-row">{lines[0]}</div>'
    lines += [f"… {count - len(rows):,} more"] * (count > len(rows))
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<details{' open' * (count < 4)}><summary><b>{count:,}</b> {text(kind)}</summary><ul>{items}</ul></details>"


def page(summary: Summary, samples: Iterable[data.Sample], processor: data.Processor) -> str:
    """Return the page. `samples` are the rows to show."""
    usable = summary.rows - summary.bad
    verdict = "Every row can be trained on" if not summary.bad else f"{summary.bad:,} rows cannot be used"
    cards = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd><small>{text(note)}</small></div>"
        for name, value, note in summary.figures
    )
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    datasets = "".join(
        f"<tr><td>{text(path, 200)}</td>{''.join(f'<td>{counts[name]:,}</td>' for name in COLUMNS)}</tr>"
        for path, counts in summary.datasets
    )
    bad = "<h2>Bad rows</h2><p class='note'>Examples of each kind. The program printed all.</p>" * bool(summary.bad)
    bad += "".join(_bad_rows(kind, *group) for kind, group in summary.reasons)
    unused = "".join(f"<li>{text(key, 100)}: {count:,}</li>" for key, count in summary.unused_keys)
    repeats = "".join(f"<li>{text(row, 200)} <i>as</i> {text(first, 200)}</li>" for row, first in summary.repeats)
    return PAGE.format(
        style=STYLE,
        verdict=verdict,
        state="bad" if summary.bad else "good",
        count=f"{usable:,} of {summary.rows:,} rows in {len(summary.datasets):,} dataset(s) are usable",
        cards=cards,
        charts="".join(_chart(*histogram) for histogram in summary.histograms),
        datasets=f"<tr><th>dataset</th>{head}</tr>{datasets}",
        bad=bad,
        unused=f"<h2>{UNUSED_KEYS}</h2><ul>{unused}</ul>" if unused else "",
        repeats=f"<h2>Repeated rows</h2><ul>{repeats}</ul>" if repeats else "",
        samples="".join(_row(sample, processor) for sample in samples),
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --faint: #667085; --paper: #f6f7f9; --card: #fff; --line: #e1e5ec;
  --accent: #3b6fd4; --mark: #d7f0dd; --good: #1f7a4d; --bad: #b93a32; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8f0; --faint: #98a2b5; --paper: #12151b; --card: #1b2029;
  --line: #2e3543; --accent: #7aa2f2; --mark: #1f4a33; --good: #62c993; --bad: #f08a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.25rem; }
h3 { margin: 0; font-size: 1rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
.note, small, dt, figcaption { color: var(--faint); font-size: .85rem; }
.note { margin: .1rem 0 .75rem; }
dl, .charts { display: grid; gap: .75rem; margin: 1.5rem 0 0; }
dl { grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
dl > div, figure, article, .table, details, .bad-row { background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; padding: .8rem 1rem; margin: 0; }
dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums; }
small { display: block; line-height: 1.35; }
figcaption { margin-bottom: .5rem; font-weight: 600; color: var(--ink); }
svg { display: block; width: 100%; font-size: 12px; font-variant-numeric: tabular-nums; }
svg rect { fill: var(--accent); } svg text { fill: var(--faint); }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { color: var(--faint); font-weight: 500; }
th, td { padding: .3rem .5rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr + tr td { border-top: 1px solid var(--line); }
details, .bad-row { margin-bottom: .5rem; font-size: .92rem; }
summary { cursor: pointer; } summary b { color: var(--bad); margin-right: .4rem; }
ul { margin: .5rem 0 0; padding-left: 1.2rem; font-size: .9rem; } li { margin-bottom: .25rem; }
article { margin-bottom: 1rem; }
.turn { display: grid; grid-template-columns: 5.5rem 1fr; gap: .75rem; padding: .5rem 0;
  border-top: 1px solid var(--line); }
.turn > b { color: var(--faint); font-size: .85rem; font-weight: 500; line-height: 1.75; }
.turn > div { white-space: pre-wrap; min-width: 0; }
mark { background: var(--mark); color: inherit; border-radius: 2px; -webkit-box-decoration-break: clone;
  box-decoration-break: clone; padding: .1em 0; }
code { font: .78em ui-monospace, "DejaVu Sans Mono", monospace; color: var(--faint); }
.nl { color: var(--faint); font-size: .8em; }
.media { display: inline-block; margin: 0 .6rem .3rem 0; white-space: normal; }
.media img { display: block; max-width: 100%; max-height: 11rem; border-radius: 4px; margin-bottom: .15rem; }
.video { max-width: 11rem; } .video img { max-height: 6rem; }
@media (max-width: 40rem) { .turn { grid-template-columns: 1fr; gap: .1rem; } dl { grid-template-columns: 1fr 1fr; } }
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>Dataset check</title><style>{style}</style></head><body>
<h1 class="{state}">{verdict}</h1><p class="note">{count}</p>
<dl>{cards}</dl>
<h2>Distribution</h2><div class="charts">{charts}</div>
<h2>Datasets</h2><div class="table"><table>{datasets}</table></div>
{unused}{bad}{repeats}
<h2>Sample rows</h2><p class="note">Rows as training sees them: images are resized for the model, supervised text is
<mark>marked</mark>, and tokens of the chat template are grey.</p>
{samples}
</body></html>
"""
