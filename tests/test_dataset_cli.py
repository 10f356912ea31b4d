"""python data.py llava and check: the conversion and training on it, known statistics, the page in a browser."""
from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
from helpers import ROOT, read_metrics, shell
from PIL import Image

import data
import train
from common import InputError, UsageError
from tools import dataset_cli, report

EVIL = "<script>document.title='pwned'</script> \"'> <img src=x onerror=\"document.title='pwned'\">"


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """A directory with a tokenizer of bytes and a model's configuration, which is all that `check` needs."""
    return tiny.hf_dir(tmp_path_factory.mktemp("hf"), tiny.config_dict())


def say(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def draw(path: Path, width: int = 64, height: int = 64, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write(path: Path, rows: list) -> Path:
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    return path


# ---- llava -----------------------------------------------------------------------------------------------------------


def llava_rows() -> list[dict]:
    """Return rows in the form of LLaVA-Instruct-150K."""
    def talk(*texts: str) -> list[dict]:
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    return [
        {"id": "000000033471", "image": "000000033471.jpg", "conversations": talk(
            "<image>\nWhat are the colors of the bus in the image?", "The bus in the image is white and red.",
            "What feature can be seen on the back of the bus?", "The back of the bus features an advertisement.")},
        {"id": "000000052846", "image": "000000052846.jpg", "conversations": talk(
            "Where is the cat positioned in the image?\n<image>", "The cat is on top of the back of the couch.")},
        {"id": "000000033471", "conversations": talk("How many is two?", "2 \u2013 \u4e8c.")},
        {"id": "000000000001", "image": "000000000001.jpg", "conversations": talk("<image>\nGone?", "Yes.")},
    ]


@pytest.fixture
def coco(tmp_path) -> Path:
    """A folder COCO2017 with two images, and the annotations beside it."""
    for seed, name in enumerate(("000000033471.jpg", "000000052846.jpg")):
        draw(tmp_path / "COCO2017/train2017" / name, seed=seed)
    write(tmp_path / "llava.json", llava_rows())
    return tmp_path / "COCO2017"


def convert(coco: Path, output: Path, *flags, annotations: str = "llava.json") -> None:
    dataset_cli.main(["llava", "--annotations", str(coco.parent / annotations), "--image_dir", str(coco / "train2017"),
                   "--output", str(output), *flags])


def test_llava_rows(coco, capsys):
    convert(coco, coco / "out.json")
    rows = json.loads((coco / "out.json").read_text())
    assert rows[0] == {
        "id": "000000033471",
        "messages": say("<image>\nWhat are the colors of the bus in the image?",
                        "The bus in the image is white and red.", "What feature can be seen on the back of the bus?",
                        "The back of the bus features an advertisement."),
        "images": ["./train2017/000000033471.jpg"],
    }
    assert rows[1]["messages"][0]["content"] == "Where is the cat positioned in the image?\n<image>"
    assert rows[2] == {"id": "000000033471", "messages": say("How many is two?", "2 – 二."), "images": []}
    assert len(rows) == 3
    last = capsys.readouterr().out.splitlines()[-1]
    assert "3 rows, 1 skipped" in last and "train2017/000000000001.jpg" in last

    convert(coco, coco / "out.jsonl")
    assert [json.loads(line) for line in (coco / "out.jsonl").read_text().splitlines()] == rows
    write(coco.parent / "lines.jsonl", llava_rows())
    convert(coco, coco / "again.json", annotations="lines.jsonl")
    assert (coco / "again.json").read_text() == (coco / "out.json").read_text()
    convert(coco, coco.parent / "train2017.json")  # the images are below its folder
    assert json.loads((coco.parent / "train2017.json").read_text())[0]["images"] == [
        "./COCO2017/train2017/000000033471.jpg"]
    rows_with_keys = [llava_rows()[0] | {"system": "s", "source": "x"}]
    rows_with_keys[0]["conversations"][1]["weight"] = 0
    write(coco.parent / "keys.json", rows_with_keys)
    convert(coco, coco / "keys.json", annotations="keys.json")
    (row,) = json.loads((coco / "keys.json").read_text())
    assert (row["system"], row["source"], row["messages"][1]["weight"]) == ("s", "x", 0)  # nothing is lost
    (coco / "elsewhere").mkdir()
    convert(coco, coco / "elsewhere/out.json")
    assert json.loads((coco / "elsewhere/out.json").read_text())[0]["images"] == [
        str(coco / "train2017/000000033471.jpg")]


def test_llava_output_trains(coco, hf):
    """The supervised tokens are the answers with their ends, and nothing else."""
    convert(coco, coco / "out.json")
    processor, dataset = data.Processor(hf), data.RowDataset([str(coco / "out.json")])
    for i, row in enumerate(json.loads((coco / "out.json").read_text())):
        read, source, media_dir = dataset[i]
        sample = processor.encode(read, media_dir=media_dir, source=source)
        labels = sample.labels[sample.labels != data.IGNORE].tolist()
        answers = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        supervised = processor.tokenizer.decode(labels, skip_special_tokens=False)
        assert supervised == "".join(f"{answer}<|im_end|>\n" for answer in answers)
        assert len(sample.grid_thw) == len(row["images"])
    train.main(["--init-from-hf-path", str(hf), "--init", "random", "--dataset", str(coco / "out.json"), "--save",
                str(coco / "save"), "--train-iters", "2", "--global-batch-size", "3", "--num-workers", "0",
                "--device", "cpu"])
    metrics = read_metrics(coco / "save")
    answers = [turn["value"] for row in llava_rows()[:3] for turn in row["conversations"] if turn["from"] == "gpt"]
    supervised = sum(len(answer.encode()) + 2 for answer in answers)  # <|im_end|> and the newline
    assert [m["supervised_tokens"] for m in metrics] == [supervised] * 2
    assert all(np.isfinite(m["loss"]) and m["skipped_samples"] == 0 for m in metrics)


@pytest.mark.parametrize("row, message", [
    ([1], "not an object"),
    ({"id": "7"}, "'conversations' must be a list"),
    ({"id": "7", "conversations": []}, "'conversations' must be a list"),
    ({"id": "7", "conversations": [{"from": "robot", "value": "x"}]}, "from 'robot'"),
    ({"id": "7", "conversations": [{"from": ["gpt"], "value": "x"}]}, "from ['gpt']"),
    ({"id": "7", "conversations": [{"from": "gpt", "value": 3}]}, "conversations[0] must be"),
    ({"id": "7", "image": 3, "conversations": [{"from": "gpt", "value": "x"}]}, "'image' must be"),
])
def test_llava_malformed_row(coco, row, message):
    write(coco.parent / "bad.json", [llava_rows()[0], row])
    with pytest.raises(InputError, match=re.escape(message)) as error:
        convert(coco, coco / "out.json", annotations="bad.json")
    where = "bad.json row 2" + (" (id 7)" if isinstance(row, dict) else "")
    assert where in str(error.value) and "\n" not in str(error.value)
    assert sorted(p.name for p in coco.iterdir()) == ["train2017"]


def test_llava_wrong_folder_or_existing_output(coco):
    (coco / "val2017").mkdir()
    argv = ["llava", "--annotations", str(coco.parent / "llava.json"), "--output", str(coco / "out.json")]
    with pytest.raises(InputError, match="lacks the images of all 3 rows.*--image_dir"):
        dataset_cli.main([*argv, "--image-dir", str(coco / "val2017")])
    with pytest.raises(InputError, match="not a folder: .*--image_dir"):
        dataset_cli.main([*argv, "--image-dir", str(coco / "nowhere")])
    assert not (coco / "out.json").exists()
    (coco / "out.json").write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        convert(coco, coco / "out.json")
    assert (coco / "out.json").read_text() == "mine"
    convert(coco, coco / "out.json", "--overwrite")
    assert len(json.loads((coco / "out.json").read_text())) == 3


def test_llava_full_disk(coco, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"out.json cannot be written \(No space left on device\)"):
        convert(coco, coco / "out.json")
    assert sorted(p.name for p in coco.iterdir()) == ["train2017"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_llava_interrupted(coco, number):
    write(coco.parent / "long.jsonl", llava_rows()[:1] * 100_000)
    program = subprocess.Popen([sys.executable, "data.py", "llava", "--annotations", coco.parent / "long.jsonl",
                                "--image_dir", coco / "train2017", "--output", coco / "out.json"], cwd=ROOT,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 40
    while not list(coco.glob("*.partial")):
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    program.send_signal(number)
    errors = program.communicate(timeout=30)[1]
    assert "Traceback" not in errors and not (coco / "out.json").exists()
    if number != signal.SIGKILL:
        assert program.returncode == 130 and errors.splitlines()[-1].startswith("error: interrupted")
        assert not list(coco.glob("*.partial"))


# ---- check -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path) -> Path:
    """Write a.json and b.jsonl, whose statistics are known. Four rows are bad."""
    draw(tmp_path / "p.png", 64, 96)  # 2 x 3 tokens
    draw(tmp_path / "q.png", 64, 96)  # the same image
    draw(tmp_path / "r.png", 64, 64, seed=1)  # 2 x 2 tokens
    for i in range(4):
        draw(tmp_path / f"clip/{i}.png", seed=i)  # two pairs of 2 x 2 tokens
    write(tmp_path / "a.json", [
        {"id": 1, "messages": say("<image>hi", "yes"), "images": ["p.png"]},
        {"id": 2, "messages": say("<image>hi", "yes"), "images": ["q.png"]},
        {"id": 1, "messages": say("<image>hi", "yes"), "images": ["r.png"]},
        {"id": 3, "messages": say("<image>hi", "yes"), "images": ["none.png"]},
        {"id": EVIL, "messages": say("<image>hi", "yes"), "images": ["nil\0.png"]},
    ])
    write(tmp_path / "b.jsonl", [
        {"id": 1, "messages": [{"role": "system", "content": "s"}, *say("a", "b", "c", "d")]},
        {"id": 4, "messages": say("long", "x" * 400)},
        {"id": 5, "messages": say("<video>", "a clip"), "videos": ["clip"]},
        {"id": "\x1b[2J", "messages": [{"role": "user", "content": "\ud800"}]},
    ])
    with open(tmp_path / "b.jsonl", "a") as stream:
        stream.write("{not json\n")
    return tmp_path


def check(hf: Path, *paths, **kwargs) -> None:
    flags = [str(x) for key, value in kwargs.items() for x in (f"--{key.replace('_', '-')}", value)]
    dataset_cli.main(["check", "--init-from-hf-path", str(hf), "--dataset", ",".join(map(str, paths)), *flags])


def figures_in(out: str) -> dict[str, int]:
    """Return the figures of a printed summary by name."""
    return {m[1]: int(m[2].replace(",", "")) for m in re.finditer(r"(?m)^([a-z][a-z ]*?)  +([\d,]+)(?:  .*)?$", out)}


def test_check_statistics(rows, hf, capsys):
    with pytest.raises(InputError, match=r"4 of 10 rows are bad, listed above"):
        check(hf, rows / "a.json", rows / "b.jsonl", seq_length=200, num_workers=0)
    out = capsys.readouterr().out
    turn = len("<") + len("user\n") + len(">\n")  # <|im_start|>, <|im_end|> and two newlines: one token a byte
    image_rows = 3 * (turn + 2 + 2) + 6 + 6 + 4  # "hi", <|vision_start|>, <|vision_end|>, media tokens
    image_rows += 3 * (len("<assistant\n>\n") + 3)
    system = len("<system\n>\n") + 1 + 2 * (turn + 1) + 2 * (len("<assistant\n>\n") + 1)
    times = len("<0.2 seconds>") + len("<1.2 seconds>")
    video = turn + times + 2 * (2 + 4) + len("<assistant\n>\n") + len("a clip")
    supervised = 3 * (3 + 2) + 2 * (1 + 2) + (200 - turn - 4 - len("<assistant\n")) + 6 + 2
    assert figures_in(out) == {
        "rows": 10, "turns": 3 * 2 + 5 + 2 + 2, "images": 3, "videos": 1, "truncated": 1,
        "tokens": image_rows + system + 200 + video, "supervised": supervised, "media": 6 + 6 + 4 + 2 * 4,
        "repeated": 1, "repeated ids": 1, "unsupervised": 0, "outside": 0,
        "packed rows": -(-(image_rows + system + 200 + video) // 200),
    }
    bad = [line for line in out.splitlines() if line.startswith("bad: ")]
    a, b = rows / "a.json", rows / "b.jsonl"
    assert [line.split(": ")[1] for line in bad] == [
        f"{a} row 4 (id 3)", f"{a} row 5 (id {EVIL})", f"{b} row 4 (id \\x1b[2J)", f"{b} row 5"]
    assert "none.png does not exist" in bad[0] and "'nil\\x00.png'" in bad[1] and "not JSON" in bad[3]
    assert "\x1b" not in out and "\0" not in out
    assert re.search(r"(?m)^ +5 +2 +6 +3 +0 .*a\.json$", out) and re.search(r"(?m)^ +5 +2 +9 +0 +1 .*b\.jsonl$", out)
    assert f"{a} row 2 as {a} row 1" in out


def test_check_lists_unused_keys(tmp_path, hf, capsys):
    rows = [{"id": i, "messages": say("a", "b"), "source": "x", "empty": None} for i in range(3)]
    rows[0]["messages"][0]["name"] = rows[0]["messages"][1]["name"] = EVIL
    rows[1] |= {"Image": "p.png", "images": ["none.png"], EVIL: 1}
    write(tmp_path / "rows.json", rows)
    with pytest.raises(InputError, match="1 of 3 rows are bad"):
        check(hf, tmp_path / "rows.json", num_workers=0, report=tmp_path / "r.html")
    lines = capsys.readouterr().out.partition(report.UNUSED_KEYS)[2].strip().splitlines()
    assert [line.split(maxsplit=1) for line in lines[:4]] == [
        ["3", "source"], ["1", EVIL[:100]], ["1", "Image"], ["1", "messages[].name"]]
    page = Page((tmp_path / "r.html").read_text())
    assert "source: 3" in page.texts and "messages[].name: 1" in page.texts and not page.tags["script"]
    write(tmp_path / "rows.json", [{"id": 1, "messages": say("a", "b")}])
    check(hf, tmp_path / "rows.json", num_workers=0)
    assert report.UNUSED_KEYS not in capsys.readouterr().out


def test_check_refuses_unsupported_keys(tmp_path, hf, capsys):
    write(tmp_path / "rows.json", [
        {"messages": say("a", "b"), "objects": [{"name": "f"}]},
        {"messages": [say("a")[0], {"role": "assistant", "content": "b", "weight": 0}]},
        {"messages": say("a", "b"), "system": "s"},
    ])
    with pytest.raises(InputError, match="2 of 3 rows are bad"):
        check(hf, tmp_path / "rows.json", num_workers=0)
    out = capsys.readouterr().out
    assert "row 1: 'objects' is not supported" in out and "row 2: 'messages[1].weight' is not supported" in out
    assert figures_in(out)["turns"] == 3 and report.UNUSED_KEYS not in out


def test_check_reports_chat_template(tmp_path):
    """Each program says once how it renders rows, and refuses a flag that its chat template does not know."""
    folder = tiny.hf_dir(tmp_path / "hf", tiny.config_dict())
    rows = write(tmp_path / "rows.json", [{"messages": say("a", "b")}])
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    argv = ("data.py", "check", "--init-from-hf-path", folder, "--dataset", rows, "--num-workers", "2")
    done = shell(*argv)
    assert done.returncode == 0 and done.stderr.count("is not the chat template of Qwen3-VL-Instruct") == 1
    done = shell(*argv, "--no-enable-thinking")
    assert done.returncode == 2 and done.stderr.startswith("error: --no-enable-thinking: the chat template of ")


def test_check_thinking(tmp_path, capsys):
    folder = tiny.hf_dir(tmp_path / "hf", tiny.config_dict())
    (folder / "chat_template.jinja").write_text("{% if add_generation_prompt %}{{ '<think>\\n' if enable_thinking }}")
    rows = say("a", "<think>b</think>c")
    rows[1]["reasoning_content"] = "d"
    write(tmp_path / "rows.json", [{"messages": rows}, {"messages": say("e", "f")}])
    supervised = []
    for flags in ((), ("--enable-thinking",), ("--no-enable-thinking",)):
        dataset_cli.main(["check", "--init-from-hf-path", str(folder), "--dataset", str(tmp_path / "rows.json"),
                          "--num-workers", "0", *flags])
        out = capsys.readouterr().out
        supervised.append(figures_in(out)["supervised"])
        assert report.UNUSED_KEYS not in out
    thought, answers = len("d\n</think>\n\n"), len("<think>b</think>c>\n") + len("f>\n")  # a byte is a token
    assert supervised == [thought + answers, thought + answers, answers]


BOXES = {
    '{"bbox_2d": [0, 1, 1000, 999], "label": "1200"}': False,
    '[{"bbox_2d": [5, 5, 10, 10]}, {"bbox_2d": [12, 30, 1280, 720]}]': True,
    "[{'bbox_2d': [[1, 2, 3, 4],\n [5, 6, 7, 1001]]}]": True,
    '{"point_2d": [-3, 20]}': True,
    '{"bbox": [0.5, 0.5, 1000.5, 3]}': True,
    '{"bbox_3d": [-3, 2000, 1]} and [1, 2, 3000, 4]': False,
    "<|object_ref_start|>bus 5000<|object_ref_end|><|box_start|>(1,2),(1000,4)<|box_end|>": False,
    "<|box_start|>(1,2),(1920,4)<|box_end|>": True,
}


def test_check_warns_of_boxes(tmp_path, hf, capsys):
    outside = '{"bbox_2d": [1, 2, 3, 2000]}'
    rows = [{"messages": say(outside, answer)} for answer in BOXES]
    write(tmp_path / "rows.json", rows)
    check(hf, tmp_path / "rows.json", num_workers=0)
    out = capsys.readouterr().out
    pattern = r"(?m)^warning: \S+ row (\d+): an answer's box leaves 0 to 1000"
    warned = [int(number) for number in re.findall(pattern, out)]
    assert warned == [i for i, is_outside in enumerate(BOXES.values(), 1) if is_outside]
    assert figures_in(out)["outside"] == len(warned) and '\'bbox_2d\': [[1, 2, 3, 4],' in out
    write(tmp_path / "rows.json", [{"messages": say("a", outside)}] * 30)
    check(hf, tmp_path / "rows.json", num_workers=0)
    out = capsys.readouterr().out
    assert out.count("warning: ") == dataset_cli.MAX_EXAMPLES and figures_in(out)["outside"] == 30


def test_check_with_any_number_of_workers(rows, hf, capsys):
    write(rows / "many.json", [{"id": i, "messages": say("ask", "tell " * (i % 7))} for i in range(70)])
    seen = set()
    for workers in (0, 1, 2):
        with pytest.raises(InputError):
            check(hf, rows / "many.json", rows / "a.json", rows / "b.jsonl", num_workers=workers,
                  report=rows / "report.html")
        seen.add((capsys.readouterr().out, (rows / "report.html").read_text()))
    assert len(seen) == 1


def test_check_encode_flags(rows, hf, capsys):
    def figures(**flags) -> dict[str, int]:
        dataset_cli.main(["check", "--init-from-hf-path", str(hf), "--dataset", str(rows / "good.json"),
                       "--num-workers", "0", *[f"--{k}={v}" if v else f"--{k}" for k, v in flags.items()]])
        return figures_in(capsys.readouterr().out)

    good = [json.loads(line) for line in (rows / "b.jsonl").read_text().splitlines()[:3]]
    write(rows / "good.json", [*good, {"messages": say("<image>", "x"), "images": [str(rows / "p.png")]}])
    plain = figures()
    assert figures(**{"mask-history": ""})["supervised"] == plain["supervised"] - 3
    assert figures(**{"train-on-prompt": ""})["supervised"] > plain["supervised"]
    assert figures(**{"image-max-pixels": 32 * 32, "image-min-pixels": 1})["media"] == plain["media"] - 5
    assert figures(**{"video-maxlen": 2})["media"] == plain["media"] - 4
    assert figures(**{"max-samples": 1})["rows"] == 1
    (rows / "elsewhere").mkdir()
    with pytest.raises(InputError, match="2 of 4 rows are bad"):
        figures(**{"dataset-dir": rows / "elsewhere", "confine-paths": ""})


def test_check_command_line(rows, hf, tmp_path):
    good = write(tmp_path / "good.json", [{"messages": say("a", "b")}])
    done = shell("data.py", "check", "--init-from-hf-path", hf, "--dataset", rows / "a.json",
                 env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 2 of 5 rows are bad, listed above: ")
    (tmp_path / "flags").write_text(f"check\n--dataset {good} # rows\n--init-from-hf-path {hf}\n")
    done = shell("data.py", f"@{tmp_path / 'flags'}")
    assert (done.returncode, figures_in(done.stdout)["rows"]) == (0, 1)


def test_check_unusable_file(tmp_path, hf):
    good = write(tmp_path / "good.json", [{"messages": say("a", "b")}])
    (tmp_path / "bad.json").write_bytes(b"[1, {")
    with pytest.raises(InputError, match="bad.json is not a JSON array"):
        check(hf, good, tmp_path / "bad.json", report=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("argv, message", [
    ([], "required: {llava,check}"),
    (["check"], "--dataset"),
    (["check", "--dataset", "x", "--init-from-hf-path", "y", "--seqlength", "3"], "did you mean --seq-length"),
    (["check", "--dataset", "x", "--init-from-hf-path", "y", "--num-workers", "-1"], "at least 0"),
    (["check", "--dataset", "x", "--init-from-hf-path", "y", "--report", "/no/folder/x.html"], "cannot be written"),
    (["check", "--dataset", "x", "--init-from-hf-path", "y", "--mask-history", "--train-on-prompt"], "exclude"),
    (["check", "--dataset", "x", "--init-from-hf-path", "y", "--image-min-pixels", "9", "--image-max-pixels", "8"],
     "above --image-max-pixels"),
    (["llava", "--annotations", "x", "--image_dir", "y", "--output", ""], "--output is empty"),
])
def test_usage_errors(argv, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        dataset_cli.main(argv)


def test_check_ctrl_c(tmp_path, hf):
    """A terminal sends it to all processes. There is no traceback and no page."""
    write(tmp_path / "long.jsonl", [{"messages": say("a", "b " * 2000)}] * 20_000)
    program = subprocess.Popen([sys.executable, "data.py", "check", "--init-from-hf-path", hf, "--dataset",
                                tmp_path / "long.jsonl", "--num-workers", "2", "--report", tmp_path / "r.html"],
                               cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    seen = b""
    while b"row" not in seen or b"| 0/" in seen[-60:]:  # until rows were read
        seen += os.read(program.stderr.fileno(), 4096)
        assert program.poll() is None
    os.killpg(program.pid, signal.SIGINT)
    errors = program.communicate(timeout=30)[1].decode()  # returns after all processes have closed the pipe
    assert program.returncode == 130 and errors.splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in errors and not list(tmp_path.glob("r.html*"))


def test_check_killed_worker(rows, hf, monkeypatch):
    monkeypatch.setattr(data.Processor, "encode", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(InputError, match="--num-workers"):
        check(hf, rows / "a.json", num_workers=1)


def test_quantile_and_histogram():
    values = Counter(range(1, 101))
    assert [dataset_cli._quantile(values, q) for q in (0, 0.5, 0.95, 1)] == [1, 50, 95, 100]
    assert dataset_cli.histogram(Counter()) == []
    assert dataset_cli.histogram(Counter({0: 3, 2: 1})) == [("0", 3), ("1", 0), ("2", 1)]
    bars = dataset_cli.histogram(values + Counter([10_000]))
    assert sum(count for _, count in bars) == 101 and bars[0] == ("0-9", 9) and bars[-1] == ("100 and more", 2)


# ---- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.texts, self.marked, self._open = Counter(), [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, text):
        self.texts.append(text)
        if "mark" in self._open:
            self.marked.append(text)


def test_page_escapes_markup(tmp_path, hf):
    folder = tmp_path / "<b onclick='x'>&amp;"
    folder.mkdir()
    write(folder / "rows.jsonl", [
        {"id": EVIL, "messages": say(EVIL, f"\0\u202e{EVIL}")},
        {"id": f"\0{EVIL}", "messages": say("<image>", "x"), "images": [EVIL]},
    ])
    with pytest.raises(InputError, match="1 of 2"):
        check(hf, folder / "rows.jsonl", num_workers=0, report=tmp_path / "r.html")
    source = (tmp_path / "r.html").read_text()
    assert not set(source) & set("\0\u202e\x1b") and "http" not in source.replace("http-equiv", "")
    page = Page(source)
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "a", "form", "base"}
    assert page.tags["img"] == 0  # no shown row has an image
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("href", "srcset")]
    text = "".join(page.texts)
    assert text.count(EVIL) >= 5 and f"\\x00\\u202e{EVIL}" in "".join(page.marked) and folder.name in text


def test_page_rows(rows, hf):
    processor, dataset = data.Processor(hf), data.RowDataset([str(rows / "a.json"), str(rows / "b.jsonl")])
    Image.new("RGB", (64, 96), (250, 20, 90)).save(rows / "p.png")
    reader = dataset_cli.RowReader(dataset, processor, data.EncodeOptions(mask_history=True, seq_length=200))
    summary = dataset_cli.Statistics(reader).summary(200)

    def show(index: int) -> tuple[Page, str]:
        page = Page(report.page(summary, [reader.sample(index)], processor))
        return page, "".join(page.texts).partition("Sample rows")[2]

    page, text = show(0)
    assert "".join(page.marked) == "markedyes<|im_end|>↵\n" and "image 3×2 = 6 tokens" in text
    assert "vision_start" not in text and "image_pad" not in text
    (image,) = [value for name, value in page.attributes if name == "src"]
    head, _, body = image.partition(",")
    assert head == "data:image/jpeg;base64"
    (rows / "thumb.jpg").write_bytes(base64.b64decode(body))
    shown = np.asarray(Image.open(rows / "thumb.jpg")).astype(int)
    assert shown.shape == (96, 64, 3) and np.abs(shown - (250, 20, 90)).max() < 8

    page, text = show(5)  # only the last of two answers
    assert "".join(page.marked) == "markedd<|im_end|>↵\n" and "system" in text
    assert "truncated" in show(6)[1] and "truncated" not in text
    page, text = show(7)
    assert text.index("<0.2 seconds>") < text.index("frames 1/2 2×2 = 4 tokens") < text.index("<1.2 seconds>")
    assert page.tags["img"] == 2


def test_unpatchify_inverts_process_image(hf):
    """An image that needs no resizing is restored exactly."""
    processor = data.Processor(hf)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    patches, grid = processor.process_image(Image.fromarray(pixels))
    assert np.array_equal(report.unpatchify(patches, grid, processor)[0], pixels)


def test_page_stays_small(tmp_path, hf):
    """The page is short even with many bad rows, long texts, ids and names, and many turns and images in a row."""
    draw(tmp_path / "p.png", 96, 96)
    long = {"id": "i" * 10**5, "messages": say("<image>" * 40 + "y" * 10**6, *["z" * 2000] * 199),
            "images": ["p.png"] * 40}
    bad = [{"id": "j" * 1000, "messages": [{"role": f"<{i}>" * 10, "content": "x" * 10_000}]} for i in range(399)]
    bad.append({"messages": [{"role": "r" * 10**6, "content": "x"}]})
    write(tmp_path / "rows.jsonl", [*bad, long, {"messages": say("a", "b")}])
    with pytest.raises(InputError, match="400 of 402"):
        check(hf, tmp_path / "rows.jsonl", num_workers=0, seq_length=10**7, report=tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert len(page) < 600_000 and page.count("<img") <= 9 and "1,000,000 characters" in page
    assert "389 more" in page and "other reasons" not in page and "200 turns" in page


@pytest.mark.parametrize("files, rows_each", [(1, 1), (1, 5), (3, 40), (20, 2), (2, 0)])
def test_choose_rows(tmp_path, hf, files, rows_each):
    """Every dataset has a share of the shown rows, with its first and last row. Bad rows are never shown."""
    paths = [write(tmp_path / f"{i}.json", [{"messages": say("a", f"{i} {k}")} for k in range(rows_each)] + [0])
             for i in range(files)]
    reader = dataset_cli.RowReader(data.RowDataset(list(map(str, paths))), data.Processor(hf), data.EncodeOptions())
    statistics = dataset_cli.Statistics(reader)
    for index, row in enumerate(row for start in range(0, len(reader.dataset), 16) for row in reader[start]):
        statistics.add(index, row)
    chosen = [reader.dataset.span(i)[:2] for i in statistics.choose()]
    assert min(files * rows_each, 8) <= len(chosen) <= dataset_cli.MAX_SHOWN
    assert all(row < rows_each for _, row in chosen) and len(set(chosen)) == len(chosen)
    if 0 < files * rows_each <= 120 and files <= 3:
        assert {(file, row) for file in range(files) for row in (0, rows_each - 1)} <= set(chosen)


def test_statistics_limit_reasons(rows, hf):
    reader = dataset_cli.RowReader(data.RowDataset([str(rows / "a.json")]), data.Processor(hf), data.EncodeOptions())
    statistics = dataset_cli.Statistics(reader)
    for i in range(200):
        for word in ("x" * i, "x"):
            statistics.add(0, dataset_cli.RowInfo("a.json row 1", f"wrong {word}", {"rows": 1, "bad": 1}, [], 0, 0))
    reasons = statistics.summary(4096).reasons
    assert len(reasons) <= dataset_cli.MAX_REASONS + 1 and sum(group[0] for _, group in reasons) == 400
    assert dict(reasons)["wrong x"][0] == 201
    assert max(len(group) for _, group in reasons) == 1 + dataset_cli.MAX_EXAMPLES


@pytest.mark.slow
def test_page_in_a_browser(rows, hf):
    """Chromium runs no script, finds every part, and paints images, bars and marks in light and dark."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is installed")
    with open(rows / "b.jsonl", "a") as stream:
        stream.write(json.dumps({"id": EVIL, "messages": say(EVIL, EVIL)}) + "\n")
    with pytest.raises(InputError, match="4 of 11"):
        check(hf, rows / "a.json", rows / "b.jsonl", num_workers=0, report=rows / "r.html")

    def chromium(*flags) -> str:
        argv = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={rows / 'profile'}", *flags]
        return subprocess.run([*argv, (rows / "r.html").as_uri()], capture_output=True, text=True, timeout=120,
                              check=True).stdout

    page = Page(chromium("--dump-dom"))
    assert page.tags["title"] == 1 and "Dataset check" in page.texts and "pwned" not in page.texts
    text = "".join(page.texts)
    for part in ("4 rows cannot be used", "Distribution", "Datasets", "Bad rows", "Repeated rows", "Sample rows", EVIL):
        assert part in text
    assert page.tags["svg"] == 4 and page.tags["img"] == 5 and page.tags["article"] == 7 and not page.tags["script"]
    colours = []
    for scheme in ("1", "0"):  # light, dark
        chromium(f"--screenshot={rows / 'shot.png'}", "--window-size=1000,4000", "--hide-scrollbars",
                 f"--blink-settings=preferredColorScheme={scheme}")
        counts = Image.open(rows / "shot.png").convert("RGB").getcolors(2**24)
        colours.append({colour for count, colour in counts if count > 200})
    assert {(0x3B, 0x6F, 0xD4), (0xD7, 0xF0, 0xDD), (255, 255, 255)} <= colours[0]
    assert {(0x7A, 0xA2, 0xF2), (0x1F, 0x4A, 0x33), (0x12, 0x15, 0x1B)} <= colours[1]
