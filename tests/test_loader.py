"""data.py from files of rows to batches: scanning, indexes, streams, resume, bad rows and packing."""
from __future__ import annotations

import csv
import itertools
import json
import math
import multiprocessing
import os
import random
from collections import Counter
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

import data
from common import InputError
from data import IGNORE, PACKING_WINDOW, EncodeOptions, JsonRows, Loader, RowDataset, RowStream, collate

DATASETS = [RowDataset, RowStream]


def chat(*turns: str, **keys) -> dict:
    """Return a row of user and assistant turns."""
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)], **keys}


def write(path: Path, rows: list) -> str:
    """Write rows as JSON lines or, for other suffixes, as a JSON array."""
    path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return str(path)


def as_saved(state: dict) -> dict:
    """Return a position as a checkpoint would hold it."""
    return json.loads(json.dumps(state))


def make_loader(dataset, processor, **settings) -> Loader:
    defaults = {"micro_batch_size": 1, "dp_rank": 0, "dp_size": 1, "seed": 3, "num_workers": 0,
                "on_bad_sample": "error", "options": EncodeOptions()}
    return Loader(dataset, processor, **(defaults | settings))


def take(loader, count: int) -> list:
    stream = iter(loader)
    return [next(stream) for _ in range(count)]


def ids(batches) -> list[list[str]]:
    return [[source.split("(id ")[1][:-1] for source in batch.sources] for batch in batches]


def flat(batches) -> list[str]:
    return [x for batch in ids(batches) for x in batch]


def assert_same_batches(actual: list, expected: list) -> None:
    assert ids(actual) == ids(expected)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.input_ids, b.input_ids) and a.cu_seqlens == b.cu_seqlens
        assert a.resume_state == b.resume_state


# ---- files of rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "message"), [
    (b"", "holds no rows"),
    (b" \n\n", "holds no rows"),
    (b"[]", "holds no rows"),
    (b"[ \n ]\n", "holds no rows"),
    (b'"text"', "begins with b'\"'"),
    (b"\x89PNG\0\0", r"begins with b'\\x89'"),
    ('[{"a": 1}]'.encode("utf-16"), "begins with"),
    (b'[{"a": 1},\n {"b": }]', r"Expecting value \(byte 18\)"),
    ('[{"ä": "ä"},\n {"b": }]'.encode(), r"Expecting value \(byte 22\)"),
    (b'[{"a": 1}\n {"b": 2}]', r"expected , or ] \(byte 11\)"),
    (b'[{"a": 1}, ]', r"Expecting value \(byte 11\)"),
    (b'[{"a": 1},\n {"b": "cut', r"Unterminated string starting at \(byte 18\)"),
    (b'[{"a": 1}', r"expected , or ] \(byte 9\)"),
    (b'[{"a": 1}] x', r"extra data after the array \(byte 11\)"),
    (b"[" * 100000, "recursion"),
])
def test_scan_damaged_file(content, message, tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path} .*{message}") as caught:
        RowDataset([str(path)])
    assert "\n" not in str(caught.value)


def test_dataset_missing_files(tmp_path):
    path = write(tmp_path / "a.json", [1])
    for kind in DATASETS:
        with pytest.raises(InputError, match="none.jsonl cannot be read: No such file"):
            kind([path, str(tmp_path / "none.jsonl")])
    with pytest.raises(InputError, match="--dataset-dir"):
        RowDataset([path], dataset_dir=str(tmp_path / "none"))
    with pytest.raises(InputError, match="the name of a dataset is empty"):
        RowDataset([path, ""])


BAD_TEXTS = [b'{"a": "\xff"}', b'{"a": "\0"}', b'{"a": "\xe2\x82"}']


@pytest.mark.parametrize(("layout", "bad"), [
    *((b'[{"id": 1}, %s, {"id": "\xc3\xa4"}]', bad) for bad in [*BAD_TEXTS, b"1" * 5000]),
    *((b'{"id": 1}\n\n%s\n{"id": "\xc3\xa4"}', bad) for bad in [*BAD_TEXTS, b'{"a": ', b"{}{}"]),
])
@pytest.mark.parametrize("kind", DATASETS)
def test_read_bad_row(kind, layout, bad, tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(layout % bad)
    dataset = kind([str(path)])
    spans = [span for span, _ in itertools.islice(dataset.stream({}, None), 3)]
    assert [dataset.read(span)[0]["id"] for span in (spans[0], spans[2])] == [1, "ä"]
    with pytest.raises(InputError, match=f"{path} row 2 cannot be read: it is not JSON in UTF-8"):
        dataset.read(spans[1])


@pytest.mark.parametrize("indent", [None, 2])
def test_read_rows_of_all_sizes(indent, tmp_path):
    """Compact and indented arrays with all of Unicode, larger than the window, and a row that is larger than it."""
    rng = np.random.default_rng(0)
    rows = [
        {"id": i, "t": "".join(rng.choice(list('"\\\n[]{},ä你🎉'), int(size))), "n": [[], {}]}
        for i, size in enumerate(rng.integers(0, 3000, 400))
    ]
    rows[7]["t"] = "ä" * 1_500_000
    rows += [1234567890123, "text", None, [1, [2]]]
    (tmp_path / "sub").mkdir()
    array, lines = tmp_path / "a.json", tmp_path / "sub" / "b.jsonl"
    array.write_text("\ufeff \n" + json.dumps(rows, ensure_ascii=False, indent=indent) + "\n")
    lines.write_text("\n".join(json.dumps(row) for row in rows[:50]) + "\n \n")
    dataset = RowDataset([str(array), str(lines)])
    assert len(dataset) == len(rows) + 50
    assert [dataset[i][0] for i in range(len(dataset))] == rows + rows[:50]
    assert dataset[len(rows)][1:] == (f"{lines} row 1 (id 0)", tmp_path / "sub")
    first = RowDataset([str(array), str(lines)], dataset_dir=str(tmp_path), max_samples=3)
    assert [first[i][0]["id"] for i in range(len(first))] == [0, 1, 2] * 2 and first[5][2] == tmp_path
    with pytest.raises(IndexError):
        first[6]


VALUES = ['{"a": [1, {"b": "]},"}]}', '"\\"ä€🎉"', "[]", "-12.5e-3", "true", "null", "NaN", '{"id": 7}', "0", '""']


def test_scan_array_agrees_with_json(tmp_path):
    """Random arrays, intact and damaged, read whole and from the end of each row on."""
    rng, path, intact = random.Random(0), tmp_path / "rows.json", 0
    for _ in range(400):
        space = rng.choice(("", " ", "\r\n\t"))
        text = "[" + f"{space},{space}".join(rng.choices(VALUES, k=rng.randint(1, 6))) + space + "]" + space
        content = bytearray(text.encode())
        if rng.random() < 0.5:
            del content[(at := rng.randrange(1, len(content))) : at + rng.randint(1, 3)]
        path.write_bytes(content)
        try:
            expected = json.loads(content)
        except ValueError:
            expected = None
        file = JsonRows(str(path))
        try:
            ranges = list(file.scan())
            rows = [file.read(*r) for r in ranges]
        except ValueError:  # of the array, or of a row whose text is not UTF-8
            assert expected is None, content
            continue
        assert repr(rows) == repr(expected), content  # NaN is not equal to itself
        assert all(list(file.scan(end)) == ranges[i + 1 :] for i, (_, end) in enumerate(ranges))
        intact += 1
    assert intact > 150


def test_scan_array_where_the_window_ends(tmp_path):
    """The first window ends at every byte of each value and separator."""
    path, rows = tmp_path / "rows.json", ",\n".join(VALUES * 2)
    for padding in range(len(rows.encode())):
        path.write_text(f'["{"x" * ((1 << 20) - 5 - padding)}", {rows}]')
        file = JsonRows(str(path))
        assert repr([file.read(*r) for r in file.scan()][1:]) == repr(json.loads(f"[{rows}]"))


class CsvRows(data.RowFile):
    """A format whose ranges count rows."""

    def _rows(self) -> list[dict]:
        with open(self.path, newline="") as stream:
            return list(csv.DictReader(stream))

    def size(self) -> int:
        return len(self._rows())

    def scan(self, start: int = 0):
        return ((i, i + 1) for i in range(start, self.size()))

    def read(self, start: int, end: int) -> dict:
        row = self._rows()[start]
        if not row["answer"]:
            raise ValueError("the answer is missing")
        return chat(row["question"], row["answer"], id=row["id"])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", DATASETS)
def test_row_format_by_suffix(kind, packing, tmp_path, processor, monkeypatch):
    """A new format needs one class: indexes, streams, resume, packing and bad rows work with it."""
    monkeypatch.setitem(data.ROW_FORMATS, ".csv", CsvRows)
    rows = [f"c{i},q{i},a{i}" for i in range(8)]
    (tmp_path / "a.csv").write_text("\n".join(["id,question,answer", *rows, "bad,q,"]))
    paths = [str(tmp_path / "a.csv"), write(tmp_path / "b.json", [chat("q", "a", id=f"j{i}") for i in range(4)])]
    settings = {"on_bad_sample": "skip", "packing": packing, "options": EncodeOptions(seq_length=64)}
    dataset = kind(paths)
    batches = list(itertools.takewhile(
        lambda batch: batch.resume_state["epoch"] == 0, make_loader(dataset, processor, **settings)))
    assert sorted(flat(batches)) == [f"c{i}" for i in range(8)] + [f"j{i}" for i in range(4)]
    assert sum(batch.rows_bad[0] for batch in batches) == 1
    assert [dataset.file_rows(0), dataset.count()] == [9, 13]
    resumed = make_loader(kind(paths), processor, resume_state=as_saved(batches[1].resume_state), **settings)
    assert_same_batches(take(resumed, len(batches) - 2), batches[2:])
    with pytest.raises(InputError, match=r"a.csv row 9 cannot be read: the answer is missing"):
        take(make_loader(kind(paths[:1]), processor), 9)
    (tmp_path / "a.csv").write_text("id,question,answer\n")
    with pytest.raises(InputError, match="a.csv holds no rows"):
        kind(paths)


def test_cached_index(tmp_path):
    cache = tmp_path / "cache"
    path = write(tmp_path / "a.json", [{"id": i} for i in range(5)])
    for _ in range(2):
        assert len(RowDataset([path], cache_dir=str(cache))) == 5
    (file,) = cache.iterdir()
    intact = file.read_bytes()
    flipped = [intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :] for at in (70, len(intact) // 2)]
    for damaged in (b"", b"damaged", intact[:-16], *flipped):
        file.write_bytes(damaged)
        assert [row["id"] for row, _, _ in RowDataset([path], cache_dir=str(cache))] == list(range(5))
        assert file.read_bytes() == intact
    write(Path(path), [{"id": i} for i in range(6)])
    with multiprocessing.get_context("fork").Pool(4) as pool:  # many processes at once
        assert pool.map(partial(RowDataset, cache_dir=str(cache)), [[path]] * 8, chunksize=1)[-1].count() == 6
    assert len(list(cache.iterdir())) == 2


def test_cached_index_full_disk(tmp_path, monkeypatch, caplog):
    path = write(tmp_path / "a.json", [{"id": 1}])
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(28, "No space left on device")))
    assert len(RowDataset([path], cache_dir=str(tmp_path / "cache"))) == 1
    assert "cannot be written: No space left" in caplog.text and not list((tmp_path / "cache").iterdir())


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> list[str]:
    """An array on several lines, JSON lines with blank ones, and an array on one line: 11, 6 and 9 rows."""
    rows = {name: [{"id": f"{name}{i}"} | chat(f"q{i}", "ä\n" * (7 * i % 23)) for i in range(count)]
            for name, count in (("a", 11), ("b", 6), ("c", 9))}
    (tmp_path / "a.json").write_text(json.dumps(rows["a"], indent=1, ensure_ascii=False))
    (tmp_path / "b.jsonl").write_text("\ufeff\n" + "\n\n".join(map(json.dumps, rows["b"])))
    (tmp_path / "c.json").write_text(json.dumps(rows["c"], separators=(",", ":")))
    return [str(tmp_path / name) for name in ("a.json", "b.jsonl", "c.json")]


EVERYTHING = [f"{name}{i}" for name, count in (("a", 11), ("b", 6), ("c", 9)) for i in range(count)]


def walk(dataset, count, state=None, seed=3) -> tuple[list[str], list[dict]]:
    """Return the ids of a stream's next rows and the positions after them."""
    rows = list(itertools.islice(dataset.stream(state or {}, seed), count))
    return [dataset.read(span)[0]["id"] for span, _ in rows], [as_saved(state) for _, state in rows]


@pytest.mark.parametrize("kind", [RowDataset, partial(RowStream, shuffle_buffer=4)])
def test_stream_epochs_and_resume(kind, files):
    dataset = kind(files)
    rows, states = walk(dataset, 78)
    epochs = [rows[:26], rows[26:52], rows[52:]]
    assert all(sorted(epoch) == sorted(EVERYTHING) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert EVERYTHING not in epochs and rows != walk(dataset, 78, seed=4)[0]
    assert walk(dataset, 40, seed=None)[0] == (EVERYTHING * 2)[:40]
    assert [state["consumed"] for state in states] == list(range(1, 79)) and dataset.count() == 26
    assert [state["epoch"] for state in states] == [0] * 26 + [1] * 26 + [2] * 26
    for i, state in enumerate(states[:60]):
        assert walk(kind(files), 17, state) == (rows[i + 1 : i + 18], states[i + 1 : i + 18])
    assert [round(dataset.file_rows(file)) for file in range(3)] == [11, 6, 9]
    few = kind(files, max_samples=7)
    assert sorted(walk(few, 20)[0]) == sorted(x for x in EVERYTHING if int(x[1:]) < 7) and few.count() == 20


def test_stream_and_dataset_find_the_same_rows(files):
    dataset, stream = RowDataset(files), RowStream(files)
    assert [dataset.span(i) for i in range(26)] == [span for span, _ in itertools.islice(stream.stream({}, None), 26)]
    assert len({dataset.span(i) for i in range(26)}) == 26


def test_stream_shuffle_buffer(files, caplog):
    rows, states = walk(RowStream(files, shuffle_buffer=5), 26)
    for block in range(0, 26, 5):
        assert sorted(rows[block : block + 5]) == sorted(EVERYTHING[block : block + 5])
    # A resumed stream keeps its buffer, because other blocks would lose rows.
    resumed, _ = walk(RowStream(files, shuffle_buffer=100), 49, states[6])
    assert sorted(rows[:7] + resumed[:19]) == sorted(EVERYTHING) and resumed[:3] == rows[7:10]
    assert resumed == walk(RowStream(files, shuffle_buffer=5), 56)[0][7:] and "buffer of 5 rows" in caplog.text


def test_stream_damaged_file(tmp_path):
    path, message = tmp_path / "rows.json", r"rows.json is not a JSON array: .* \(byte 333\)"
    path.write_text("[\n" + ",\n".join(['{"id": 1}'] * 30) + "\n,{]")
    _, states = walk(RowStream([str(path)], shuffle_buffer=4), 20)
    for state in (None, states[-1]):
        with pytest.raises(InputError, match=message):
            walk(RowStream([str(path)], shuffle_buffer=4), 31, state)
    with pytest.raises(InputError, match=message):
        RowDataset([str(path)])


def test_resume_with_other_flags_or_files(files, caplog, processor):
    state, streamed = walk(RowDataset(files), 3)[1][-1], walk(RowStream(files), 3)[1][-1]
    with pytest.raises(InputError, match="was read without --streaming: omit --streaming"):
        walk(RowStream(files), 1, state)
    with pytest.raises(InputError, match="was read with --streaming: give --streaming"):
        walk(RowDataset(files), 1, streamed)
    packed = state | {"rank_layout": [0, 1], "buffer": []}
    with pytest.raises(InputError, match="was packed: give --packing"):
        take(make_loader(RowDataset(files), processor, resume_state=packed), 1)
    with open(files[1], "a") as file:
        file.write("\n" + json.dumps({"id": "new"}))
    for kind, position in ((RowStream, streamed), (RowDataset, state)):
        walk(kind(files), 1, position)
        assert "the order is new" in caplog.messages.pop()
    state["sizes"] = [11, 7, 9]
    walk(RowDataset(files, weights=[2, 1, 0]), 1, state)
    assert "weights [2, 1, 0], but had [11, 7, 9] and [1.0, 1.0, 1.0] when saved" in caplog.messages.pop()
    del state["weights"]  # as in older checkpoints
    caplog.clear()
    walk(RowDataset(files), 1, state)
    assert not caplog.messages


# ---- dataset weights -------------------------------------------------------------------------------------------------


def epochs_of(dataset, count: int, seed: int | None = 3) -> list[list[str]]:
    rows, _ = walk(dataset, count * dataset.count(), seed=seed)
    return [rows[start : start + dataset.count()] for start in range(0, len(rows), dataset.count())]


def test_stream_weights(files):
    """Each epoch holds full copies and a share; the shares differ, and use all rows equally often."""
    dataset = RowDataset(files, weights=[2.5, 0, 1 / 3])
    assert dataset.count() == 28 + 3 and len(dataset) == 26 and dataset[25][0]["id"] == "c8"
    epochs = epochs_of(dataset, 9)
    totals, shares = Counter(), []
    for number, rows in enumerate(epochs, start=1):
        counts = Counter(rows)
        shares.append({row for row in rows if counts[row] == 3})
        assert {counts[f"a{i}"] for i in range(11)} == {2, 3} and len(shares[-1]) == 6
        assert [sum(row[0] == name for row in rows) for name in "abc"] == [28, 0, 3]
        totals += counts
        for name, size, expected in (("a", 11, number * 28 / 11), ("c", 9, number / 3)):
            assert {totals[f"{name}{i}"] for i in range(size)} <= {math.floor(expected), math.ceil(expected)}
    assert len(set(map(frozenset, shares))) == 9
    assert len({frozenset(row for row in rows if row[0] == "c") for rows in epochs}) > 6  # shuffled after each round
    assert epochs == epochs_of(RowDataset(files, weights=[2.5, 0, 1 / 3]), 9)
    assert epochs_of(dataset, 1, seed=4)[0] != epochs[0]
    few = epochs_of(RowDataset(files, max_samples=4, weights=[1, 0.5, 0.01]), 2)  # a weight above 0 is a row at least
    assert [Counter(row[0] for row in rows) for rows in few] == [{"a": 4, "b": 2, "c": 1}] * 2


def test_stream_weights_without_shuffling(files):
    """The copies of a file follow each other, then comes its share, both in the file's order."""
    epochs = epochs_of(RowDataset(files, weights=[2, 0.5, 0]), 2, seed=None)
    shares = [rows[22:] for rows in epochs]
    assert [rows[:22] for rows in epochs] == [[f"a{i}" for i in range(11)] * 2] * 2
    assert all(share == sorted(share) for share in shares) and sorted(sum(shares, [])) == [f"b{i}" for i in range(6)]


@pytest.mark.parametrize("packing", [False, True])
def test_loader_resume_with_weights(packing, files, processor):
    """A resume in the middle of the second epoch is exact, and other numbers of ranks read the same rows."""
    def ranks(size: int, count: int, **settings) -> list:
        settings = {"dp_size": size, "packing": packing, "options": EncodeOptions(seq_length=64)} | settings
        dataset = RowDataset(files, weights=[2, 0.5, 1.25])
        return [take(make_loader(dataset, processor, dp_rank=rank, **settings), count) for rank in range(size)]

    def two_epochs(*loaders: list) -> Counter:
        return Counter(row for batches in loaders for batch in batches if batch.resume_state["epoch"] < 2
                       for row in flat([batch]))

    expected = ranks(2, 40)
    at = next(i for i, batch in enumerate(expected[0]) if batch.resume_state["epoch"] == 1) + 2
    states = [as_saved(batches[at].resume_state) for batches in expected]
    for rank, state in enumerate(states):
        assert_same_batches(ranks(2, 39 - at, resume_state=state)[rank], expected[rank][at + 1 :])
    rows = two_epochs(*expected)
    assert rows.total() == 2 * RowDataset(files, weights=[2, 0.5, 1.25]).count() == 72
    first = [batches[: at + 1] for batches in expected]
    assert two_epochs(*first, *ranks(3, 30, resume_state=states if packing else states[0])) == rows


@pytest.mark.parametrize("weight", [3, 0.5, 0.3, 1.7])
def test_check_bad_row_rate_with_weights(weight, tmp_path, processor):
    """A tenth of a dataset may be bad, however often its rows are read and wherever the stream starts."""
    paths = [str(tmp_path / "a.json"), write(tmp_path / "b.json", [chat("q", "a")] * 3)]
    for bad in (2, 3):
        write(tmp_path / "a.json", [{"messages": []} if i < bad else chat("q", "a") for i in range(20)])
        dataset = RowDataset(paths, weights=[weight, 1])
        epoch = dataset.count()
        states = [state for _, state in itertools.islice(dataset.stream({}, 3), 4 * epoch)]
        for state in ({}, states[epoch // 2], states[3 * epoch // 2], states[3 * epoch]):
            loader = make_loader(dataset, processor, on_bad_sample="skip", resume_state=state)
            if bad == 2:
                check_rates([loader], 8 * epoch)
            else:
                with pytest.raises(InputError, match="a.json: .* more than a tenth of the dataset"):
                    check_rates([loader], 12 * epoch)


# ---- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 2), (2, 1), (2, 3), (4, 3)])
def test_loader_order_in_every_layout(micro_batch_size, dp_size, files, processor):
    """Global batch k is rows kG to (k+1)G-1 of the stream, and its micro-batches go to the ranks in turn."""
    stream = flat(take(make_loader(RowDataset(files), processor), 48))
    assert stream == walk(RowDataset(files), 48)[0]
    settings = {"micro_batch_size": micro_batch_size, "dp_size": dp_size}
    loaders = [make_loader(RowDataset(files), processor, dp_rank=rank, **settings) for rank in range(dp_size)]
    ranks = [ids(take(loader, 48 // (micro_batch_size * dp_size))) for loader in loaders]
    assert [x for step in zip(*ranks, strict=True) for batch in step for x in batch] == stream


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", [RowDataset, partial(RowStream, shuffle_buffer=6)])
def test_loader_resume(kind, workers, files, processor):
    def ranks(size: int, count: int, workers: int = workers, **settings) -> list:
        settings = {"micro_batch_size": 2, "dp_size": size} | settings
        return [take(make_loader(kind(files), processor, num_workers=workers, dp_rank=rank, **settings), count)
                for rank in range(size)]

    expected = ranks(2, 16, workers=0)
    first = ranks(2, 5)
    state = as_saved(first[0][-1].resume_state)
    assert state == first[1][-1].resume_state and state["consumed"] == 20
    for before, after, rank in zip(first, ranks(2, 11, resume_state=state), expected, strict=True):
        assert_same_batches(before + after, rank)
    # Three ranks continue with the last six rows of the epoch.
    other = ranks(3, 1, resume_state=state)
    assert sorted(x for batches in first + other for x in flat(batches)) == sorted(EVERYTHING)


def test_loader_num_samples(files, processor):
    """Each held-out row comes once in every layout. A rank may receive an empty batch."""
    settings = {"micro_batch_size": 2, "dp_size": 3, "seed": None, "num_samples": 15}
    ranks = [ids(make_loader(RowDataset(files), processor, dp_rank=rank, **settings)) for rank in range(3)]
    assert [x for step in zip(*ranks, strict=True) for batch in step for x in batch] == EVERYTHING[:15]
    assert [len(batch) for batch in ranks[2]] == [2, 2, 0]


def test_workers_leave_the_process_group(files, processor):
    """Ctrl-C and torchrun's SIGTERM go to a process group. The workers must outlive the current step."""
    stream = iter(make_loader(RowDataset(files), processor, num_workers=1))
    next(stream)
    workers = multiprocessing.active_children()  # one measures, one loads
    assert len(workers) == 2 and all(os.getpgid(worker.pid) == worker.pid != os.getpgrp() for worker in workers)
    stream.close()
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore:'pin_memory'")  # there is no accelerator
def test_loader_pin_memory(files, processor, monkeypatch):
    """DataLoader calls Batch.pin_memory, also within the loader's pairs of a batch and its failures."""
    data_loader = Mock(wraps=DataLoader)
    monkeypatch.setattr(data, "DataLoader", data_loader)
    (batch,) = take(make_loader(RowDataset(files), processor, pin_memory=True), 1)
    assert data_loader.call_args.kwargs["pin_memory"]
    monkeypatch.setattr(data.Batch, "pin_memory", lambda batch: "pinned")
    assert list(pin_memory((batch, ["a failure"]))) == ["pinned", ["a failure"]]  # torch 2.7.1 returns a list
    (measurement,) = itertools.islice(make_loader(RowDataset(files), processor).stages()[0], 1)
    assert pin_memory(measurement) == measurement._replace(batch="pinned")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_stages(workers, packing, processor, images, tmp_path, monkeypatch):
    """Measurements equal the batches, and no pixel is decoded before the main process asks for its micro-batch."""
    rows = [chat("<image>" * (i % 2) + f"q{i}", "a " * i, id=i, images=["small.png"] * (i % 2)) for i in range(12)]
    dataset = RowDataset([write(tmp_path / "rows.json", rows)], dataset_dir=images)
    settings = {"num_workers": workers, "micro_batch_size": 2, "packing": packing,
                "options": EncodeOptions(seq_length=256)}
    patchify = Mock(wraps=data.Processor._patchify)
    monkeypatch.setattr(data.Processor, "_patchify", lambda *args: patchify(*args))
    encode = Mock(wraps=data.Processor.encode)
    monkeypatch.setattr(data.Processor, "encode", lambda *args: encode(*args))
    measured, loaded = make_loader(dataset, processor, **settings).stages()
    ahead = list(itertools.islice(measured, 3))
    encode_count = encode.call_count
    assert not patchify.called and (workers or encode_count >= 6)
    batches = []
    for measurement in ahead:
        images_before = patchify.call_count
        batch = next(loaded)
        batches.append(batch)
        assert measurement[:5] == batch.measure()[:5]
        assert len(batch.pixel_values) == batch.grid_thw.prod(1).sum()
        assert workers or patchify.call_count - images_before == len(batch.grid_thw)
    assert sum(len(batch.grid_thw) for batch in batches) > 0
    assert_same_batches(batches, take(make_loader(dataset, processor, **settings), 3))
    measured.close()
    loaded.close()
    assert not multiprocessing.active_children()


def test_stages_hold_few_open_files(files, processor):
    """Micro-batches of text that wait for their step take no file descriptors: a process may have 1024."""
    measured, loaded = make_loader(RowDataset(files), processor, num_workers=1).stages()
    next(measured)
    before = len(os.listdir("/proc/self/fd"))
    waiting = list(itertools.islice(measured, 50))
    assert all(measurement.batch for measurement in waiting)
    assert len(os.listdir("/proc/self/fd")) < before + 50
    measured.close()
    loaded.close()


def test_stages_tokenize_text_once(files, processor, monkeypatch):
    encode = Mock(wraps=data.Processor.encode)
    monkeypatch.setattr(data.Processor, "encode", lambda *args: encode(*args))
    take(make_loader(RowDataset(files), processor), 10)
    assert encode.call_count == 10


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_pixel_dtype(workers, processor, images, tmp_path):
    rows = [write(tmp_path / "rows.json", [chat("<image>a", "b", id=0, images=["small.png"])])]
    exact, rounded = (
        take(make_loader(RowDataset(rows, dataset_dir=images), processor, num_workers=workers, pixel_dtype=dtype), 1)[0]
        for dtype in (torch.float32, torch.bfloat16))
    assert rounded.pixel_values.dtype == torch.bfloat16 and len(exact.pixel_values) > 0
    assert torch.equal(rounded.pixel_values, exact.pixel_values.bfloat16())  # as PatchEmbed rounds them
    assert rounded.position_ids.dtype == torch.int64


def test_collate(processor, images):
    rows = [chat("<image>a", "b", images=["small.png"]), chat("text", "only")]
    rows.append(chat("<image><image>", "c", images=["exact.png"] * 2))
    samples = [processor.encode(row, media_dir=images, source=f"s{i}") for i, row in enumerate(rows)]
    batch = collate(samples, resume_state={"consumed": 3}, rows_read=[4, 0], rows_bad=[1, 0])
    lengths = [len(s.input_ids) for s in samples]
    assert batch.cu_seqlens == [0, lengths[0], lengths[0] + lengths[1], sum(lengths)]
    assert (batch.sources, batch.rows_bad, batch.truncated, batch.loss_weights) == (["s0", "s1", "s2"], [1, 0], 0, None)
    for start, end, sample in zip(batch.cu_seqlens, batch.cu_seqlens[1:], samples, strict=False):
        assert torch.equal(batch.input_ids[start:end], sample.input_ids)
        assert torch.equal(batch.labels[start:end], sample.labels)
        assert torch.equal(batch.position_ids[:, start:end], sample.position_ids)
    assert (batch.input_ids[batch.visual_index] == processor.image_token_id).all()
    assert len(batch.visual_index) == batch.grid_thw.prod(1).sum() // 4 and len(batch.grid_thw) == 3
    assert torch.equal(batch.supervised_index, (batch.labels != IGNORE).nonzero().flatten())
    assert len(batch.pixel_values) == batch.grid_thw.prod(1).sum()
    batch.loss_weights = torch.ones(sum(lengths))
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.loss_weights.device.type == "meta"
    assert moved.grid_thw.device.type == "cpu" and moved.cu_seqlens == batch.cu_seqlens


# ---- bad rows --------------------------------------------------------------------------------------------------------


def check_rates(loaders: list[Loader], steps: int) -> None:
    """Take steps on all ranks, and check the rate of bad rows as the trainer does."""
    for batches in itertools.islice(zip(*loaders, strict=True), steps):
        read, bad = (np.sum([getattr(batch, name) for batch in batches], 0) for name in ("rows_read", "rows_bad"))
        for loader in loaders:
            loader.check_bad_row_rate(read.tolist(), bad.tolist(), batches[-1].resume_state["epoch"])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows(workers, tmp_path, processor, caplog):
    rows = [{"id": i} | chat("q", "a") for i in range(40)]
    rows[5] = {"id": 5} | chat("q", "a", images=["none.png"])
    rows[9]["messages"] = []
    dataset = RowDataset([write(tmp_path / "a.json", rows)])
    settings = {"seed": None, "micro_batch_size": 2, "num_workers": workers}
    batches = take(make_loader(dataset, processor, on_bad_sample="skip", **settings), 50)  # two and a half epochs
    assert [i for i, batch in enumerate(batches) if sum(batch.rows_bad)] == [2, 4, 22, 24, 42, 44]
    assert ids(batches[2:3]) == [["4"]] and ids(batches[4:5]) == [["8"]]
    assert len(caplog.messages) == 2  # each bad row once
    assert "row 6 (id 5): images[0]: " in caplog.messages[0] and "none.png does not exist" in caplog.messages[0]
    assert "row 10 (id 9): 'messages' must be" in caplog.messages[1]
    with pytest.raises(InputError, match=r"^[^\n]*a.json row 6 \(id 5\): images\[0\]: [^\n]*$"):
        take(make_loader(dataset, processor, **settings), 8)


def test_bad_row_that_only_decoding_finds(tmp_path, processor, caplog):
    """The measurement counts it, the batch leaves it out; to end the run at it, loading raises."""
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "intact.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "intact.png").read_bytes()[:200])
    rows = [chat("<image>q", "a", id=name, images=[f"{name}.png"]) for name in ("intact", "cut")]
    dataset = RowDataset([write(tmp_path / "rows.json", rows)])
    settings = {"seed": None, "micro_batch_size": 2}
    measured, loaded = make_loader(dataset, processor, on_bad_sample="skip", **settings).stages()
    measurement, batch = next(measured), next(loaded)
    assert not measurement.failures and len(measurement.supervised) == measurement.media == 2
    assert ids([batch]) == [["intact"]] and (batch.rows_read, batch.rows_bad) == ([2], [1])
    assert "row 2 (id cut): images[0]: " in caplog.text
    measured, loaded = make_loader(dataset, processor, **settings).stages()
    next(measured)
    with pytest.raises(InputError, match=r"row 2 \(id cut\): images\[0\]: "):
        next(loaded)


def test_bad_row_alone_in_its_batch(tmp_path, processor):
    dataset = RowDataset([write(tmp_path / "a.json", [{"messages": []}])])
    (batch,) = take(make_loader(dataset, processor, on_bad_sample="skip"), 1)
    assert batch.input_ids.tolist() == [0] and batch.labels.tolist() == [IGNORE] and batch.cu_seqlens == [0, 1]
    assert (batch.rows_read, batch.rows_bad) == ([1], [1]) and len(batch.supervised_index) == 0
    assert batch.position_ids.shape == (3, 1)
    assert batch.pixel_values.shape == (0, 1536) and batch.grid_thw.shape == (0, 3)


@pytest.mark.parametrize(("bad", "count"), [([0, 1, 2, 3, 4], 5), ([0, 3, 5, 6], 9), ([1], 5), ([0], 1), ([3, 8], 10)])
def test_check_bad_row_rate_of_few_rows(bad, count, tmp_path, processor):
    """A dataset of fewer than ten rows is checked once all were read, whether or not the last row is bad."""
    rows = [{} if i in bad else chat("q", "a") for i in range(count)]
    dataset = RowDataset([write(tmp_path / "few.json", rows)])
    loader = make_loader(dataset, processor, on_bad_sample="skip", seed=None)
    with pytest.raises(InputError, match=f"few.json: {len(bad)} of {count} rows read are bad, more than a tenth"):
        check_rates([loader], 50)
    ranks = [make_loader(dataset, processor, on_bad_sample="skip", dp_rank=rank, dp_size=2)
             for rank in (0, 1)]
    if len(bad) > 1:
        with pytest.raises(InputError, match="rows read are bad"):
            check_rates(ranks, 20)


def test_check_bad_row_rate_after_resume(tmp_path, processor):
    """A tenth of bad rows is accepted, wherever the stream starts."""
    dataset = RowDataset([write(tmp_path / "a.json", [{} if i in (0, 1) else chat("q", "a") for i in range(20)])])
    for seed in (None, 3):
        for _, state in itertools.islice(dataset.stream({}, seed), 20):
            settings = {"on_bad_sample": "skip", "seed": seed, "resume_state": state}
            check_rates([make_loader(dataset, processor, **settings)], 60)


@pytest.mark.parametrize("kind", DATASETS)
def test_check_bad_row_rate_of_one_dataset(kind, tmp_path, processor):
    """One dataset has more than a tenth of bad rows, the other has none."""
    rows = [chat("q", "a")] * 20
    rows[1] = rows[12] = {"messages": []}
    good, bad = write(tmp_path / "good.json", [chat("q", "a")] * 60), write(tmp_path / "bad.json", rows)
    check_rates([make_loader(kind([good, bad]), processor, on_bad_sample="skip")], 160)  # exactly a tenth
    write(tmp_path / "bad.json", [*rows[:15], {}, *rows[16:]])
    with pytest.raises(InputError, match=r"bad.json: 3 of \d+ rows read are bad, more than a tenth of the dataset"):
        check_rates([make_loader(kind([good, bad]), processor, on_bad_sample="skip")], 80)


def test_check_bad_row_rate_at_the_start_of_a_stream(tmp_path, processor):
    """Many bad rows at the start are few of a large file, whose size is estimated."""
    rows = [{} if i < 40 else chat("q", "a") for i in range(500)]
    stream = RowStream([write(tmp_path / "start.jsonl", rows)], shuffle_buffer=50)
    check_rates([make_loader(stream, processor, on_bad_sample="skip", seed=None)], 500)


# ---- packing ---------------------------------------------------------------------------------------------------------


def uneven(tmp_path, count=300, seed=0) -> list[str]:
    """Write rows with lengths as in LLaVA: mostly short, some long, one too long."""
    rng = np.random.default_rng(seed)
    words = np.clip(rng.lognormal(4.2, 0.8, count).astype(int), 1, 400)
    words[count // 2] = 700
    return [write(tmp_path / "rows.jsonl", [{"id": i} | chat(f"q{i}", "a " * int(n)) for i, n in enumerate(words)])]


def pack(dataset, processor, seq_length: int = 640, **settings) -> Loader:
    return make_loader(dataset, processor, packing=True, options=EncodeOptions(seq_length=seq_length), **settings)


def test_packed_rows(tmp_path, processor):
    """Packed rows are full and hold each row once an epoch."""
    dataset = RowDataset(uneven(tmp_path))
    order = flat(take(make_loader(dataset, processor), 300))
    batches = list(itertools.takewhile(lambda batch: batch.resume_state["epoch"] < 2, pack(dataset, processor)))
    rows = flat(batches)
    assert sorted(rows[:300]) == sorted(rows[300:]) == sorted(order)
    used = sorted(len(batch.input_ids) for batch in batches)
    assert used[-1] <= 640 and np.mean(used[2:]) > 0.99 * 640  # the last row of each epoch holds what remains
    assert pack(dataset, processor).epoch_size() == pytest.approx(len(used) / 2, rel=0.03)
    # A row waits for a limited time.
    arrival = {row: i for i, row in enumerate(order)}
    assert max(arrival[row] - i for i, row in enumerate(rows[:300])) < PACKING_WINDOW
    batch = batches[1]
    options = EncodeOptions(seq_length=640)
    samples = [processor.encode(dataset[int(i)][0], tmp_path, options=options) for i in ids([batch])[0]]
    expected = collate(samples)
    assert len(samples) > 2 and torch.equal(batch.input_ids, expected.input_ids)
    assert torch.equal(batch.position_ids, expected.position_ids) and batch.cu_seqlens == expected.cu_seqlens


def test_packed_rows_of_short_samples(tmp_path, processor):
    dataset = RowDataset([write(tmp_path / "rows.jsonl", [chat(f"q{i}", "a") for i in range(1500)])])
    loader = pack(dataset, processor, seq_length=8192)
    batches = list(itertools.takewhile(lambda batch: batch.resume_state["epoch"] == 0, loader))
    assert len(batches[0].sources) > 2 * PACKING_WINDOW
    assert min(len(batch.input_ids) for batch in batches[:-1]) > 0.99 * 8192
    assert loader.epoch_size() == pytest.approx(len(batches), abs=0.99)


@pytest.mark.parametrize("workers", [0, 2])
def test_packed_bad_rows(workers, tmp_path, processor, caplog):
    """Bad rows that only decoding finds, and others, are each reported once, and the rows around them are used."""
    paths = uneven(tmp_path, count=100)
    rows = [json.loads(line) for line in Path(paths[0]).read_text().splitlines()]
    rows[3]["images"], rows[7]["images"], rows[9] = ["none.png"], ["cut.png"], {"id": 9}
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "intact.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "intact.png").read_bytes()[:200])
    write(Path(paths[0]), rows)
    loader = pack(RowDataset(paths), processor, on_bad_sample="skip", num_workers=workers)
    batches = list(itertools.takewhile(lambda batch: batch.resume_state["epoch"] < 2, loader))
    assert sorted(flat(batches)) == sorted(2 * [str(i) for i in range(100) if i not in (3, 7, 9)])
    assert sum(batch.rows_bad[0] for batch in batches) == 6 and len(caplog.messages) == 3
    with pytest.raises(InputError, match="row . .id .*: "):
        take(pack(RowDataset(paths), processor, num_workers=workers), 40)


@pytest.mark.parametrize("kind, workers", [
    (RowDataset, 0), (partial(RowStream, shuffle_buffer=50), 2), pytest.param(RowDataset, 2, marks=pytest.mark.slow),
])
def test_packed_resume(workers, kind, tmp_path, processor):
    paths = uneven(tmp_path)
    for rank in range(2):
        settings = {"dp_rank": rank, "dp_size": 2, "micro_batch_size": 2,
                    "num_workers": workers}
        batches = take(pack(kind(paths), processor, **settings), 24)
        for at in (1, 10, 13):
            state = as_saved(batches[at].resume_state)
            resumed = take(pack(kind(paths), processor, resume_state=state, **settings), 23 - at)
            assert_same_batches(resumed, batches[at + 1 :])


def test_packed_resume_with_a_large_buffer(tmp_path, processor):
    """More short samples than a window are buffered; then long ones make a part of them enough for a row."""
    lengths = [*[1] * PACKING_WINDOW, *np.random.default_rng(0).integers(150, 1000, 300).tolist()]
    rows = [chat(f"q{i}", "a " * n, id=i) for i, n in enumerate(lengths)]
    dataset = RowDataset([write(tmp_path / "rows.jsonl", rows)])
    settings = {"seed": None, "seq_length": 2048}
    batches = take(pack(dataset, processor, **settings), 12)
    assert max(len(batch.resume_state["buffer"]) for batch in batches) > PACKING_WINDOW
    for at in (0, 2, 5):
        state = as_saved(batches[at].resume_state)
        assert_same_batches(take(pack(dataset, processor, resume_state=state, **settings), 11 - at), batches[at + 1 :])


@pytest.mark.parametrize("layouts", [(1, 2), (2, 1), (3, 2, 3), (2, 2, 5), (4, 1, 2)])
@pytest.mark.parametrize("kind", [RowDataset, partial(RowStream, shuffle_buffer=50)])
def test_packed_resume_on_other_ranks(layouts, kind, tmp_path, processor):
    """The ranks divide what any rank had buffered, and what it had not reached when the furthest one had."""
    paths, rows, states = uneven(tmp_path), [], None
    for run, size in enumerate(layouts):
        positions = []
        for rank in range(size):
            settings = {"dp_rank": rank, "dp_size": size, "resume_state": states}
            loader = pack(kind(paths), processor, **settings)
            for batch in itertools.islice(loader, None if run == len(layouts) - 1 else 4):
                if batch.resume_state["epoch"] > 0:
                    break
                rows += flat([batch])
            positions.append(as_saved(batch.resume_state))
        states = positions
    assert sorted(map(int, rows)) == list(range(300))
