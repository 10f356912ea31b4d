"""Test the demo's dataset: repeatable, no held-out row in training, answers true to the pixels, readable."""

import hashlib
import json
from pathlib import Path

import demo
import demo_data
import numpy as np
import pytest
from demo_data import COLOURS
from PIL import Image

import data
from model import Qwen3VLConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("demo")
    demo_data.make_demo_data(output, num_describe=60, num_answer=160, num_held_out=15, seed=3)
    return output


def rows_of(folder: Path, part: str) -> list[dict]:
    return json.loads((folder / "data" / f"{part}.json").read_text())


def see(file: Path) -> list[tuple[int, int, str, str]]:
    """Return (row, column, shape, colour) of each cell with a shape, from the pixels alone.

    The colour is the nearest hue. The outline's distance from its centre, as a function of the angle, tells the shape:
    it has one peak per corner. A circle's distance is constant, and a square's varies less than a cross's.
    """
    pixels = np.asarray(Image.open(file).convert("HSV")).astype(float) / 255
    things = []
    for row in range(3):
        for column in range(3):
            hue, saturation, _ = pixels[64 * row : 64 * row + 64, 64 * column : 64 * column + 64].transpose(2, 0, 1)
            inside = saturation > 0.3
            if inside.sum() < 100:
                continue
            angle = np.median((hue[inside] + 0.2) % 1) - 0.2  # red's hues lie on both sides of 0
            colour = min(COLOURS, key=lambda name: abs((COLOURS[name][0] - angle + 0.5) % 1 - 0.5))
            y, x = np.nonzero(inside)
            y, x = y - y.mean(), x - x.mean()
            sector = ((np.arctan2(y, x) / (2 * np.pi) % 1) * 30).astype(int)
            radius = np.array([np.hypot(x, y)[sector == s].max() for s in range(30)])
            waves = np.abs(np.fft.rfft(radius / radius.mean()))[3:6] / 15  # amplitudes of 3, 4 and 5 peaks
            peaks = 3 + int(waves.argmax())
            shape = {3: "triangle", 4: "square" if waves[1] < 0.2 else "cross", 5: "star"}[peaks]
            things.append((row, column, "circle" if waves.max() < 0.04 else shape, colour))
    return things


def answer(kind: str, question: str, images: list[list[tuple[int, int, str, str]]]) -> str:
    """Answer one of the demo's questions from what `see` found in its images."""
    if kind == "numbers":
        numbers = [int(digit) for digit in question if digit.isdigit()]
        return str(max(numbers) if "largest" in question else min(numbers))
    if kind == "pair":
        return ", ".join(f"{things[0][3]} {things[0][2]}" for things in images)
    things = images[0]
    places = [
        f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}" for row, column, _, _ in things
    ]
    if kind == "list":
        return ", ".join(f"{place} {thing[3]} {thing[2]}" for place, thing in zip(places, things, strict=True))
    if kind == "where":
        return ", ".join(places)
    if kind == "count":
        return ("one", "two", "three", "four")[len(things) - 1]
    (shared,) = {thing[2] if kind == "shape" else thing[3] for thing in things}  # all things look alike
    return shared


def test_make_rows_answers_match_pixels(folder):
    checked = 0
    for row in rows_of(folder, "held_out") + rows_of(folder, "answer")[:80]:
        images = [see(folder / "data" / path) for path in row["image"]]
        turns = iter(row["conversations"])
        for kind, question, reply in zip(row["kinds"], turns, turns, strict=True):
            assert reply["value"] == answer(kind, question["value"], images), (row["id"], question)
            checked += 1
    assert checked > 200


def test_make_demo_data_repeats_with_seed(folder, tmp_path):
    demo_data.make_demo_data(tmp_path, num_describe=60, num_answer=160, num_held_out=15, seed=3)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert all((folder / file).read_bytes() == (tmp_path / file).read_bytes() for file in files)


def test_make_rows_held_out_not_in_training(folder):
    def contents(parts: tuple[str, ...]) -> set:
        """Return hashes of images, what the images show, and the texts of questions without an image."""
        found = set()
        for row in (row for part in parts for row in rows_of(folder, part)):
            if not row["image"]:
                found.update(turn["value"] for turn in row["conversations"][::2])
            for path in row["image"]:
                file = folder / "data" / path
                found.add(hashlib.sha256(Image.open(file).tobytes()).hexdigest())
                found.add(tuple(see(file)))
        return found

    held_out = contents(("held_out",))
    assert len(held_out) >= 15 * (2 * 7 + 1)  # 15 of each kind: five kinds with one image, one with two, one with none
    assert held_out.isdisjoint(contents(("describe", "answer")))


def test_make_demo_data_questions_without_answers(folder):
    held_out, questions = rows_of(folder, "held_out"), rows_of(folder, "questions")
    assert [row["id"] for row in questions] == [row["id"] for row in held_out]
    assert all(len(row["conversations"]) == 1 for row in questions)


def test_demo_data_readable_by_processor(folder):
    processor = data.Processor(folder / "base")
    config = Qwen3VLConfig.from_json(folder / "base")
    assert processor.image_token_id == config.image_token_id
    assert processor.tokenizer.get_vocab_size() == config.text.vocab_size
    for row in rows_of(folder, "held_out"):
        sample = processor.encode(row, media_dir=folder / "data")
        assert sample.grid_thw.tolist() == [[1, 6, 6]] * len(row["image"])
        supervised = sample.labels[sample.labels != -100].tolist()
        assert processor.decode(supervised).strip() == row["conversations"][1]["value"]


def test_demo_config_readable_by_transformers(folder):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    assert config.text_config.num_experts == 4
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "base")
    text = "What colour is the star?\n"
    assert tokenizer(text)["input_ids"] == data.Processor(folder / "base").tokenizer.encode(text).ids


def test_score_counts_right_and_guessed():
    train = [{"kinds": [kind], "conversations": [{}, {"value": "red"}]} for kind in demo_data.KINDS]
    held_out = [{"kinds": ["colour"], "conversations": [{}, {"value": value}]} for value in ("red", "blue", "blue")]
    assert demo.score(held_out, ["red", " blue ", "red"], train)["colour"] == (3, 2, 1)  # asked, right, guessed right
