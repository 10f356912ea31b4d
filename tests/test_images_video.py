"""Images and videos in data.py: pixels, sampling, times and positions equal transformers'; damaged files."""
from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import subprocess
import sys
import types
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageFile, features
from reference import HALF, changed, chat
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
from common import InputError, Parser, UsageError
from data import EncodeOptions, Processor

LAYS_ON_WHITE = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)

# ---- images ---------------------------------------------------------------------------------------------------------

IMAGES = (
    "rgb.png photo.jpg small.png 1x1.png 6000x30.png 5x900.png exact.png rgba.png grey.png grey_alpha.png grey16.png "
    "bilevel.png cmyk.jpg float.tiff palette.png palette_transparent.png palette.gif animated.webp exif2.jpg exif5.jpg "
    "exif6.jpg exif8.jpg large.jpg"
).split()


@pytest.mark.parametrize("name", IMAGES)
def test_process_image_equals_transformers(name, images, reference, processor):
    if name in ("palette.gif", "palette_transparent.png") and not LAYS_ON_WHITE:
        pytest.skip("this transformers does not lay a palette's transparent colour on white yet, as 5.23 does")
    limits = {"longest_edge": 4 * 1024 * 1024} if name == "large.jpg" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about palettes with transparency
        pixels, grid = reference.process_image(images / name, **limits)
        image = data.load_image(images / name)
    if limits:
        processor = changed(processor, image_pixels=(65536, limits["longest_edge"]))
    ours, our_grid = processor.process_image(image)
    assert [list(our_grid)] == grid.tolist()
    assert ours.dtype == np.float32 and np.array_equal(ours, pixels)


def test_encode_orders_media_by_token(processor, images):
    row = chat("<video> and <image>", "x", images=["small.png"], videos=[["small.png", "small.png"]])
    swapped = chat("<image> and <video>", "x", images=["small.png"], videos=[["small.png", "small.png"]])
    a, b = (processor.encode(r, media_dir=images) for r in (row, swapped))
    assert a.grid_thw[1].tolist() == b.grid_thw[0].tolist() and a.grid_thw[0].tolist() == b.grid_thw[1].tolist()
    rows = [int(g.prod()) for g in a.grid_thw]
    assert torch.equal(torch.cat(a.pixel_values.split(rows)[::-1]), b.pixel_values)
    media = (a.input_ids == processor.image_token_id) | (a.input_ids == processor.video_token_id)
    assert torch.equal(a.visual_index, media.nonzero().flatten())


def test_load_image_large_without_warning(tmp_path):
    """Pillow's limit is 179 million pixels. A fresh process shows its warnings, which pytest captures."""
    (tmp_path / "large.ppm").write_bytes(b"P6 13300 13300 255\n")
    code = "import sys, data; print(data.load_image(data.Path(sys.argv[1]), decode=False).size)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "large.ppm"], capture_output=True, text=True,
                          cwd=Path(data.__file__).parent)
    assert (done.stdout, done.stderr) == ("(13300, 13300)\n", "")


@pytest.mark.parametrize("name", sorted({*Image.SAVE} & {*data.IMAGE_FORMATS}) + ["MPO"])
def test_load_image_formats(name, tmp_path):
    """Each format that Pillow writes is read as transformers reads it."""
    if name == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for mode in ("RGB", "P", "1", "F"):
        with contextlib.suppress(OSError, ValueError):  # the format has no such mode
            noise.convert(mode).save(tmp_path / "image", format=name)
            break
    with Image.open(tmp_path / "image") as image:
        assert image.format == ("JPEG" if name == "MPO" and not hasattr(image, "n_frames") else name)
    assert np.array_equal(data.load_image(tmp_path / "image"), load_image(str(tmp_path / "image")))
    assert data.load_image(tmp_path / "image", decode=False).size == data.load_image(tmp_path / "image").size


def test_load_image_unknown_format(tmp_path):
    """PostScript would need Ghostscript. The error names what can be read."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.eps")
    with pytest.raises(InputError, match=r"a.eps cannot be read .* none of the formats AVIF, .*JPEG2000, MPO, .*WEBP"):
        data.load_image(tmp_path / "a.eps")
    assert {"AVIF", "ICO", "JPEG2000", "TGA"} - set(data.IMAGE_FORMATS) <= {"AVIF"}
    assert {".avif", ".jp2", ".tga", ".ico", ".mpo", ".jpg", ".webp"} - set(data.IMAGE_SUFFIXES) <= {".avif"}


# ---- content parts ---------------------------------------------------------------------------------------------------


def part_row(part: dict, text: str = "?", **media) -> dict:
    """Return a row whose question is a content part and a text."""
    content = [part, {"type": "text", "text": text}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "!"}], **media}


def encode_part(processor, folder: Path, part: dict, **media):
    """Encode a row with one content part, with and without decoding."""
    row = part_row(part, **media)
    sample = processor.encode(row, media_dir=folder)
    assert_same_but_pixels(processor.encode(row, media_dir=folder, decode=False), sample)
    return sample


def assert_same_but_pixels(measured: data.Sample, sample: data.Sample) -> None:
    """Compare a sample that was not decoded, whose images and videos may not be upright."""
    assert measured.pixel_values.shape == (0, 1536)
    for name in ("input_ids", "labels", "visual_index"):
        assert torch.equal(getattr(measured, name), getattr(sample, name)), name
    assert torch.equal(measured.grid_thw.prod(1), sample.grid_thw.prod(1)) and measured.truncated == sample.truncated


def test_image_part_sources(processor, images):
    """Every way to name an image gives the same sample, also with --confine-paths unless the file is outside."""
    path = images / "small.png"
    url = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    expected = processor.encode(chat("<image>?", "!", images=["small.png"]), media_dir=images)
    parts = [
        {"type": "image", "image": f"file://{path}"},
        {"type": "image", "image": "file://small.png"},
        {"type": "image", "image": url},
        {"type": "image", "path": "small.png"},
        {"type": "image", "url": "small.png", "image": None, "max_pixels": None},
        {"type": "image", "image": {"path": "small.png", "bytes": None}},
        {"type": "image_url", "image_url": {"url": f"file://{path}"}},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": "small.png"},
    ]
    (images / "a copy%20.png").write_bytes(path.read_bytes())
    parts += [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
              {"type": "image", "image": url.replace("image/png", "image/png;charset=utf-8")},
              {"type": "image", "image": url.replace("image/png", "image")},  # as in the Qwen team's examples
              {"type": "image", "image": (images / "a copy%20.png").as_uri()},
              {"type": "image", "image": f"file://{images}/a copy%20.png"}]
    rows = [*map(part_row, parts), chat("<image>?", "!", images=[url]), chat("<image>?", "!", image={"path": url})]
    for row in rows:
        sample = processor.encode(row, media_dir=images, options=EncodeOptions(confine_paths=True))
        assert torch.equal(sample.input_ids, expected.input_ids), row
        assert torch.equal(sample.pixel_values, expected.pixel_values), row
        assert_same_but_pixels(processor.encode(row, media_dir=images, decode=False), expected)
    frames = encode_part(processor, images, {"type": "video", "video": [url, f"file://{path}"]})
    assert frames.grid_thw.tolist() == [[1, 2, 4]]
    elsewhere = Path(data.__file__).parent
    assert torch.equal(processor.encode(rows[0], media_dir=elsewhere).input_ids, expected.input_ids)
    with pytest.raises(InputError, match="outside .*--confine-paths"):
        processor.encode(rows[0], media_dir=elsewhere, options=EncodeOptions(confine_paths=True))


@pytest.mark.parametrize(("part", "message"), [
    ({"type": "image", "image": "https://a/b.png"}, "https://a/b.png is not a file on disk: download it first"),
    ({"type": "image_url", "image_url": {"url": "http://a/b.png"}}, "http://a/b.png is not a file on disk"),
    ({"type": "image", "image": "S3://a/b.png"}, "S3://a/b.png is not a file on disk: download it first"),
    ({"type": "image", "image": "QUJD" * 10000}, "[ABCDJQU]{500,990} does not exist"),
    ({"type": "image", "image": "data:image/png;base64,iVBORw0K"}, "data:image/png;base64,iVBORw0K cannot be read as"),
    ({"type": "image", "image": "data:image/png;base64,abcde"}, "cannot be read as an image: Invalid base64"),
    ({"type": "video", "video": "data:video/mp4;base64,AAAA"}, "data:video/mp4;base64,AAAA is not a file on disk"),
    ({"type": "image", "image": "file:///none.png"}, "/none.png does not exist"),
    ({"type": "video", "video": ["small.png"] * 4, "source_fps": 2, "raw_fps": 30}, "raw_fps' is not supported"),
    ({"type": "image", "image": "small.png", "fps": 2}, "'fps' is not an option of images"),
    ({"type": "image", "image": {"path": "small.png", "bytes": "x"}}, "'bytes' is not an option of images"),
    ({"type": "image", "image": "small.png", "max_pixels": "9"}, "'max_pixels' must be a number from 0.001 to 1e12"),
    ({"type": "image", "image": "small.png", "max_pixels": -1}, "'max_pixels' must be a number"),
    ({"type": "image", "image": "small.png", "max_pixels": True}, "'max_pixels' must be a number"),
    ({"type": "image", "image": "small.png", "min_pixels": 9, "max_pixels": 4}, "min_pixels 9 is above max_pixels 4"),
    ({"type": "image", "image": "small.png", "resized_width": 64}, "'resized_height' and 'resized_width' belong"),
    ({"type": "video", "video": ["small.png"] * 4, "fps": 2, "nframes": 4}, "'nframes' and 'fps' exclude each other"),
    ({"type": "video", "video": ["small.png"] * 4, "fps": 2, "sample_fps": 4}, "'sample_fps' and 'fps' exclude"),
    ({"type": "video", "video": ["small.png"] * 4, "nframes": 6}, "cannot take 6 frames of 4: change 'nframes'"),
    ({"type": "video", "video": {"path": ["small.png"] * 4, "fps": 2}, "max_frames": 1}, "cannot take 0 frames of 4"),
    ({"type": "video", "video": ["small.png"] * 4, "video_start": 1.5}, "leave less than two frames of a video of 2.0"),
    ({"type": "video", "video": "animated.webp", "sample_fps": 4}, "'sample_fps' is the rate of a list of frames"),
])
def test_bad_part(part, message, processor, images):
    for decode in (True, False):
        with pytest.raises(InputError, match=rf"messages\[0\].content\[0\].*{message}") as caught:
            processor.encode(part_row(part), media_dir=images, decode=decode)
        assert "\n" not in str(caught.value)


def test_empty_image_is_no_image(processor, images):
    """An empty value means no image, but a bare placeholder without an image stays an error."""
    expected = processor.encode(chat("?", "!"), media_dir=images)
    for value in ("", None, [], [None], [None, None], {"path": None, "bytes": None}, {"url": ""}):
        rows = [chat("?", "!", **{key: value}) for key in ("image", "images", "video", "videos")]
        rows += [part_row({"type": kind, kind: value}) for kind in ("image", "video")]
        for row in rows:
            assert torch.equal(processor.encode(row, media_dir=images).input_ids, expected.input_ids), row
        filled = encode_part(processor, images, {"type": "image", "image": value}, images=["small.png"])
        assert len(filled.grid_thw) == 1
    with pytest.raises(InputError, match="1 <image> placeholders, but the row has 0 images"):
        processor.encode(part_row({"type": "image"}), media_dir=images)


@pytest.mark.parametrize(("options", "grid"), [
    # smart_resize with the limits: sqrt(640 * 480 / 65536) = 2.17; 480 / 2.17 / 32 = 6.9 and 640 / 2.17 / 32 = 9.2
    ({"min_pixels": 1024, "max_pixels": 65536}, (12, 18)),
    ({"max_pixels": 4096}, (2, 4)),  # below the processor's minimum, which it moves
    ({"min_pixels": 500_000}, (40, 52)),  # sqrt(500000 / 307200) = 1.28; 19.1 and 25.5 are rounded up
    ({"resized_height": 280, "resized_width": 420}, (18, 26)),  # 280 / 32 = 8.75, 420 / 32 = 13.1
    ({"resized_height": 64, "resized_width": 64, "min_pixels": 9e6}, (4, 4)),
    ({"resized_height": 32, "resized_width": 32}, (4, 4)),  # at least four tokens
    ({"resized_height": 8192, "resized_width": 32}, None),
])
def test_image_part_options(options, grid, processor, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8))
    noise.save(tmp_path / "a.png")
    part = {"type": "image", "image": "a.png", **options}
    if grid is None:
        with pytest.raises(InputError, match="32x8192 pixels: the longer side may be at most 200 times the shorter"):
            encode_part(processor, tmp_path, part)
        return
    sample = encode_part(processor, tmp_path, part)
    assert sample.grid_thw.tolist() == [[1, *grid]]
    resized = noise.resize((16 * grid[1], 16 * grid[0]), Image.Resampling.BICUBIC)
    same = Qwen2VLImageProcessorPil(patch_size=16, do_resize=False, image_mean=HALF, image_std=HALF)
    assert torch.equal(sample.pixel_values, same(resized, return_tensors="pt")["pixel_values"])
    for row in ({"images": [{"path": "a.png", **options}]}, {"image": {"path": "a.png", **options}}):
        again = processor.encode(chat("<image>?", "!", **row), media_dir=tmp_path)
        assert torch.equal(again.input_ids, sample.input_ids)
    limits = {"shortest_edge": options.get("min_pixels"), "longest_edge": options.get("max_pixels")}
    if None not in limits.values():
        limited = Qwen2VLImageProcessorPil(patch_size=16, size=limits, image_mean=HALF, image_std=HALF)
        assert torch.equal(sample.pixel_values, limited(noise, return_tensors="pt")["pixel_values"])


# ---- videos ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "fps", "size"),
    [
        (2, 2.0, (64, 64)),
        (3, 2.0, (97, 50)),
        (9, 30.0, (40, 200)),
        (31, 7.0, (33, 20)),
        (200, 2.5, (64, 48)),
        (5, 0.5, (320, 240)),
    ],
)
def test_video_of_images_equals_transformers(count, fps, size, reference, processor, tmp_path):
    rng = np.random.default_rng(count)
    frames = [Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(count)]
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"f{i}.png")  # f10 sorts after f9
    ids, positions, grid, resized, indices = reference.encode_video(processor, "What?", frames, fps)
    listed = [f"f{i}.png" for i in range(count)]
    for video in ({"path": listed, "fps": fps}, {"path": ".", "fps": fps}):
        row = {"conversations": [{"from": "human", "value": "<video>What?"}], "video": video}
        sample = processor.encode(row, media_dir=tmp_path, options=EncodeOptions(for_generation=True))
        assert sample.input_ids.tolist() == ids.tolist()
        assert sample.position_ids.tolist() == positions.tolist()
        assert sample.grid_thw.tolist() == grid.tolist()
        # Frame by frame, the pixels are those of the image processor: each temporal half of a patch is one frame's.
        halves = sample.pixel_values.view(int(grid[0, 0]), -1, 3, 2, 256)
        chosen = indices + indices[-1:] * (len(indices) % 2)
        for i, number in enumerate(chosen):
            same = Qwen2VLImageProcessorPil(patch_size=16, do_resize=False, image_mean=HALF, image_std=HALF)
            image = frames[number].resize(resized[::-1], Image.Resampling.BICUBIC)
            expected = same(image, do_resize=False, return_tensors="pt")["pixel_values"].view(-1, 3, 2, 256)
            assert torch.equal(halves[i // 2, :, :, i % 2], expected[:, :, 0])


def test_video_sources_agree(processor, tmp_path):
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(8)]
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=500)
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], duration=500, lossless=True)

    def encode(**media):
        return processor.encode(chat("?", "!", **media), media_dir=tmp_path)

    images = [f"{i}.png" for i in range(8)]
    expected = encode(videos=[{"path": images, "fps": 2.0}])
    assert expected.grid_thw.tolist() == [[4, 4, 4]]
    text = processor.decode(expected.input_ids)
    assert all(f"<{time} seconds>" in text for time in ("0.2", "1.2", "2.2", "3.2"))
    for media in ({"videos": [images]}, {"video": images}, {"videos": ["a.webp"]}):  # no rate: video_fps
        assert torch.equal(encode(**media).pixel_values, expected.pixel_values), media
    gif = encode(videos=["a.gif"])  # 256 colours only
    assert torch.equal(gif.input_ids, expected.input_ids) and torch.equal(gif.grid_thw, expected.grid_thw)
    assert (gif.pixel_values - expected.pixel_values).abs().mean() < 0.2
    slow = encode(videos=[{"path": "a.gif", "fps": 4.0}])
    assert slow.grid_thw.tolist() == [[2, 4, 4]]


def write_video(path: Path, count: int, rate, codec: str = "libx264", pts: list[int] | None = None, **options) -> list:
    """Write a video file and return its frames as PyAV decodes them in order, like transformers' backend of that name.

    Frame i is grey, with level 4 * i at the left. `pts` are in milliseconds.
    """
    av = pytest.importorskip("av", reason="the video extra is not installed")
    index_first = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=index_first) as container:
        stream = container.add_stream(codec, rate=rate, options={key: str(value) for key, value in options.items()})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        if pts:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(count):
            pixels = np.full((64, 96, 3), 255, np.uint8)
            pixels[:, :64] = 4 * i % 256
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if pts:
                frame.pts, frame.time_base = pts[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        return list(container.decode(video=0))


@pytest.mark.parametrize(
    ("name", "codec", "rate", "options"),
    [
        ("a.mp4", "mpeg4", 15, {}),
        ("b-frames.mp4", "libx264", 30, {"bf": 2}),
        ("milliseconds.mkv", "libx264", Fraction(30000, 1001), {"bf": 2}),  # also: states no number of frames
        ("offset.ts", "libx264", 25, {"bf": 2}),  # the first frame is shown at 0.08 seconds
        ("a.avi", "mpeg4", 25, {"bf": 2}),
        ("a.webm", "libvpx", 24, {}),
        ("bare.h264", "libx264", 25, {}),  # no times at all
    ],
)
def test_video_file_constant_rate(name, codec, rate, options, processor, reference, tmp_path):
    """Frames and times are chosen by index, as in transformers, however the file rounds its times."""
    frames = [frame.to_image() for frame in write_video(tmp_path / name, 50, rate, codec, **options)]
    for i, frame in enumerate(frames):
        frame.save(tmp_path / f"{i}.png")
    by_file = processor.encode(chat("<video>?", "!", videos=[name]), media_dir=tmp_path)
    listed = {"path": [f"{i}.png" for i in range(50)], "fps": float(rate)}
    by_frames = processor.encode(chat("<video>?", "!", videos=[listed]), media_dir=tmp_path)
    assert torch.equal(by_file.input_ids, by_frames.input_ids)
    assert torch.equal(by_file.pixel_values, by_frames.pixel_values)
    prompt, _, grid, _, _ = reference.encode_video(processor, "?", frames, float(rate))
    assert by_file.input_ids[: len(prompt)].tolist() == prompt.tolist() and torch.equal(by_file.grid_thw, grid)


def prompt_times(processor, sample) -> list[str]:
    return re.findall(r"<([0-9.]+) seconds>", processor.decode(sample.input_ids))


def left_levels(sample) -> list[float]:
    """Return the level, 0 to 255, of the first pixel of each frame."""
    frames = sample.pixel_values.view(int(sample.grid_thw[0, 0]), -1, 3, 2, 256)[:, 0, 0, :, 0]
    return ((frames.flatten() + 1) * 127.5).tolist()


UNEVEN = np.cumsum([1000, *[40] * 30, 2500, *[40] * 20, 300, *[500] * 7, 40]).tolist()  # milliseconds, not from 0


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webp"])
def test_video_varying_rate(name, processor, tmp_path):
    """Frames are taken evenly in time and the prompt gives their real times; by index, both would be wrong."""
    starts = (np.array(UNEVEN) - UNEVEN[0]) / 1000
    if name == "a.webp":
        stills = [Image.new("RGB", (96, 64), (4 * i,) * 3) for i in range(len(UNEVEN))]
        durations = [*np.diff(UNEVEN).tolist(), 40]
        stills[0].save(tmp_path / name, save_all=True, append_images=stills[1:], duration=durations, lossless=True)
    else:
        frames = write_video(tmp_path / name, len(UNEVEN), 25, pts=UNEVEN, bf=2)
        assert np.allclose([frame.time - frames[0].time for frame in frames], starts, atol=0.002)
    sample = processor.encode(chat("<video>?", "!", videos=[name]), media_dir=tmp_path)
    numbers = [round(level / 4) for level in left_levels(sample)]
    assert numbers[0] == 0 and numbers[-1] == len(UNEVEN) - 1
    moments = np.linspace(0, starts[-1], int((starts[-1] + 0.04) * 2))  # two a second; the last frame stays for 0.04
    nearest = sorted({int(np.abs(starts - moment).argmin()) for moment in moments})
    nearest += nearest[-1:] * (len(nearest) % 2)
    assert numbers == nearest
    pairs = starts[numbers].reshape(-1, 2).mean(axis=1)
    assert prompt_times(processor, sample) == [f"{time:.1f}" for time in pairs]
    # The row's rate takes precedence over the file's times.
    given = processor.encode(chat("<video>?", "!", videos=[{"path": name, "fps": 10}]), media_dir=tmp_path)
    indices = np.linspace(0, len(UNEVEN) - 1, int(len(UNEVEN) / 10 * 2)).round()
    assert prompt_times(processor, given) == [f"{time:.1f}" for time in indices.reshape(-1, 2).mean(axis=1) / 10]


def test_video_options(processor, qwen_dir, tmp_path):
    parser = Parser()
    data.add_media_flags(parser)
    for fps in ("0", "1e-320", "nan"):
        with pytest.raises(UsageError, match=f"--video-fps: '{fps}' is not a number at least 0.001"):
            parser.parse_args(["--video-fps", fps])
    write_video(tmp_path / "a.mp4", 60, 10)

    def grid(processor):
        return processor.encode(chat("<video>?", "!", videos=["a.mp4"]), media_dir=tmp_path).grid_thw.tolist()

    assert grid(processor) == [[6, 4, 6]]
    assert grid(changed(processor, video_fps=5.0)) == [[15, 4, 6]]
    assert grid(changed(processor, video_fps=5.0, video_maxlen=8)) == [[4, 4, 6]]
    assert grid(changed(processor, video_fps=0.1)) == [[2, 4, 6]]  # transformers' four frames at least
    assert grid(changed(processor, video_pixels=(4096, 12 * 32 * 64))) == [[6, 2, 2]]
    limits = {"video_min_pixels": 10 * 128 * 192, "video_max_pixels": 10 * 128 * 224}
    assert grid(Processor(qwen_dir, video_fps=4.0, video_maxlen=10, **limits)) == [[5, 8, 12]]


SIX_SECONDS = [  # of 60 frames. The numbers are qwen-vl-utils': np.linspace(first, last, count), rounded
    ({}, [0, 5, 11, 16, 21, 27, 32, 38, 43, 48, 54, 59]),
    ({"fps": 1}, [0, 12, 24, 35, 47, 59]),
    ({"fps": 1.25}, [0, 12, 24, 35, 47, 59]),  # 7.5, rounded down to a multiple of two
    ({"fps": 0.5}, [0, 20, 39, 59]),  # four at least
    ({"fps": 0.5, "min_frames": 5}, [0, 12, 24, 35, 47, 59]),  # rounded up
    ({"fps": 10, "max_frames": 7}, [0, 12, 24, 35, 47, 59]),  # rounded down
    ({"max_frames": 4}, [0, 20, 39, 59]),
    ({"min_frames": 14}, [0, 5, 9, 14, 18, 23, 27, 32, 36, 41, 45, 50, 54, 59]),
    ({"nframes": 7}, [0, 8, 17, 25, 34, 42, 51, 59]),  # round(3.5) is 4
    ({"nframes": 5}, [0, 20, 39, 59]),  # round(2.5) is 2
    ({"nframes": 2}, [0, 59]),
    ({"video_start": 1.05, "video_end": 3.02}, [11, 17, 24, 30]),  # whose times stay those of the full video
    ({"video_start": 4}, [40, 46, 53, 59]),
    ({"video_end": 1.0, "fps": 3.7}, [0, 3, 7, 10]),
    ({"video_start": 0, "video_end": 99, "nframes": 4}, [0, 20, 39, 59]),
]


@pytest.mark.parametrize(("options", "numbers"), SIX_SECONDS)
def test_video_part_frames(options, numbers, processor, tmp_path):
    write_video(tmp_path / "a.mp4", 60, 10)
    sample = encode_part(processor, tmp_path, {"type": "video", "video": "a.mp4", **options})
    assert [round(level / 4) for level in left_levels(sample)] == numbers
    assert prompt_times(processor, sample) == [
        f"{(a / 10 + b / 10) / 2:.1f}" for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
    row = chat("<video>?", "!", videos=[{"path": "file://a.mp4", **{k: v for k, v in options.items() if k != "fps"}}])
    if "fps" not in options:  # `fps` of such an object is the video's own rate
        assert torch.equal(processor.encode(row, media_dir=tmp_path).pixel_values, sample.pixel_values)
    filled = encode_part(processor, tmp_path, {"type": "video", **options}, videos=["a.mp4"])
    assert torch.equal(filled.input_ids, sample.input_ids)


def test_video_part_range_of_varying_rate(processor, tmp_path):
    write_video(tmp_path / "a.mkv", len(UNEVEN), 25, pts=UNEVEN, bf=2)
    starts = (np.array(UNEVEN) - UNEVEN[0]) / 1000
    part = {"type": "video", "video": "a.mkv", "video_start": 3.6, "video_end": 5.6}
    sample = encode_part(processor, tmp_path, part)
    numbers = [round(level / 4) for level in left_levels(sample)]
    inside = np.flatnonzero((starts >= 3.6) & (starts <= 5.6))
    assert (numbers[0], numbers[-1]) == (inside[0], inside[-1])
    assert len(numbers) == int((starts[inside[-1] + 1] - starts[inside[0]]) * 2) == 4
    assert prompt_times(processor, sample) == [f"{t:.1f}" for t in starts[numbers].reshape(2, 2).mean(axis=1)]


@pytest.mark.parametrize(("options", "numbers", "fps"), [
    ({}, range(9), 2),
    ({"sample_fps": 4}, range(9), 4),  # all frames: they were sampled already
    ({"fps": 4}, range(9), 4),  # qwen-vl-utils' name of it for Qwen2.5-VL
    ({"sample_fps": 0.7}, range(9), 0.7),
    ({"sample_fps": 4, "nframes": 4}, [0, 3, 5, 8], 4),
    ({"sample_fps": 4, "max_frames": 3}, [0, 4, 8], 4),
    ({"sample_fps": 4, "video_start": 0.6, "video_end": 1.6}, range(3, 7), 4),
    ({"source": 4}, [0, 3, 5, 8], 4),  # {"path": ..., "fps": 4}: taken twice a second
    ({"source": 4, "fps": 3}, [0, 2, 3, 5, 6, 8], 4),
])
def test_video_part_of_frames(options, numbers, fps, processor, tmp_path):
    for i in range(9):
        Image.new("RGB", (64, 64), (4 * i,) * 3).save(tmp_path / f"{i}.webp")
    for path in ([f"{i}.webp" for i in range(9)], "."):
        given = {**options, "video": path}
        if "source" in given:
            given["video"] = {"path": path, "fps": given.pop("source")}
        sample = encode_part(processor, tmp_path, {"type": "video", **given})
        padded = [*numbers, *[numbers[-1]] * (len(numbers) % 2)]
        assert [round(level / 4) for level in left_levels(sample)] == padded
        times = [(a / fps + b / fps) / 2 for a, b in zip(padded[::2], padded[1::2], strict=True)]
        assert prompt_times(processor, sample) == [f"{time:.1f}" for time in times]


@pytest.mark.parametrize("suffix", ["webp", "gif", "avif", "jpg"])
def test_video_key_with_list_of_frames(suffix, processor, tmp_path):
    """A list of images under `video` is one video; a list of one animation is that animation."""
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    names = [f"{i}.{suffix}" for i in range(4)]
    for i, name in enumerate(names):
        Image.new("RGB", (64, 64), (40 * i,) * 3).save(tmp_path / name)
    one, nested = ({key: value} for key, value in (("video", names), ("videos", [names])))
    samples = [processor.encode(chat("<video>?", "!", **media), media_dir=tmp_path) for media in (one, nested)]
    assert samples[0].grid_thw.tolist() == [[2, 4, 4]]
    assert torch.equal(samples[0].input_ids, samples[1].input_ids)
    frames = [Image.new("RGB", (64, 64), (9 * i,) * 3) for i in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=500)
    sample = processor.encode(chat("<video>?", "!", video=["a.gif"]), media_dir=tmp_path)
    assert sample.grid_thw.tolist() == [[2, 4, 4]]


@pytest.mark.parametrize(("options", "size", "grid"), [
    # Of 12 frames of 96x64 pixels. qwen-vl-utils limits each frame: total_pixels / 12 * 2 = 2048 pixels at most
    ({"total_pixels": 12288}, (96, 64), (6, 2, 2)),
    ({"max_pixels": 2048}, (96, 64), (6, 2, 2)),
    ({"total_pixels": 24576, "max_pixels": 1e9}, (96, 64), (6, 2, 4)),  # 4096 a frame; max_pixels does not raise it
    # sqrt(131072 / 6144) = 4.62; 64 * 4.62 / 32 = 9.2 and 96 * 4.62 / 32 = 13.9 are rounded up
    ({"min_pixels": 131072, "max_pixels": 200000}, (96, 64), (6, 20, 28)),
    ({"min_pixels": 131072, "total_pixels": 12288}, (96, 64), (6, 20, 28)),  # the minimum wins
    ({"resized_height": 280, "resized_width": 420}, (96, 64), (6, 18, 26)),
    ({"resized_height": 64, "resized_width": 64, "total_pixels": 1}, (96, 64), (6, 4, 4)),
    # 768 tokens a frame at most: sqrt(1600 * 1200 / (768 * 1024)) = 1.5625 gives 1024x768 pixels
    ({"max_pixels": 4e6, "nframes": 2}, (1600, 1200), (1, 48, 64)),
    ({"total_pixels": 4e6, "nframes": 2}, (1600, 1200), (1, 48, 64)),
])
def test_video_part_pixels(options, size, grid, processor, tmp_path):
    Image.new("RGB", size).save(tmp_path / "a.png")
    sample = encode_part(processor, tmp_path, {"type": "video", "video": ["a.png"] * 12, **options})
    assert sample.grid_thw.tolist() == [list(grid)]


# Signs of a, b, c, d in the display matrix: a stored point (x, y) is shown at (a x + c y, b x + d y).
ORIENTATIONS = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0),
                (0, -1, -1, 0)]


@pytest.mark.parametrize("matrix", ORIENTATIONS)
def test_video_rotation(matrix, processor, tmp_path):
    """A stored display matrix turns the frames, also after seeking; the matrix is in the MP4 file's track header."""
    write_video(tmp_path / "stored.mp4", 60, 10, g=20)
    content = (tmp_path / "stored.mp4").read_bytes()
    a, b, c, d = (sign << 16 for sign in matrix)
    start = content.index(b"tkhd") + 44
    assert np.frombuffer(content[start : start + 36], ">i4").tolist() == [65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30]
    turned = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    (tmp_path / "a.mp4").write_bytes(content[:start] + turned + content[start + 36 :])

    numbers = [0, 1, 45, 59]
    videos = (data.open_video(name, tmp_path, False, 2.0) for name in ("stored.mp4", "a.mp4"))
    stored, shown = (list(video.read(numbers)) for video in videos)
    for before, after in zip(stored, shown, strict=True):
        assert after.size == (before.size if matrix[0] else before.size[::-1])
        for x, y in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            corners = []
            for image, (i, j) in ((before, (x, y)), (after, (matrix[0] * x + matrix[2] * y,
                                                             matrix[1] * x + matrix[3] * y))):
                corners.append(image.getpixel(((i > 0) * (image.width - 1), (j > 0) * (image.height - 1))))
            assert corners[0] == corners[1]
    sample = encode_part(processor, tmp_path, {"type": "video", "video": "a.mp4"})
    assert sample.grid_thw.tolist() == [[6, 4, 6] if matrix[0] else [6, 6, 4]]


def test_video_seeking_decodes_little(processor, tmp_path, monkeypatch):
    """The end of a long video is read from a key frame, not from the start."""
    write_video(tmp_path / "a.mp4", 200, 25, g=20, bf=2)
    import av

    def open_and_count(path: str, **options):
        container = open_(path, **options)

        def decode(stream):
            for frame in container.decode(stream):
                decoded.append(frame)
                yield frame

        return contextlib.nullcontext(types.SimpleNamespace(
            streams=container.streams, demux=container.demux, seek=container.seek, decode=decode))

    open_, decoded = av.open, []
    monkeypatch.setattr(av, "open", open_and_count)
    assert len(list(data.open_video("a.mp4", tmp_path, False, 2.0).read([199]))) == 1
    assert len(decoded) <= 25
    decoded.clear()
    row = part_row({"type": "video", "video": "a.mp4", "video_start": 7.3})
    assert processor.encode(row, media_dir=tmp_path).grid_thw.tolist() == [[2, 4, 6]]
    assert len(decoded) <= 45  # with B-frames FFmpeg seeks to an earlier key frame


def test_video_seeking(tmp_path):
    """Skipping to key frames gives the same frames as decoding everything, also in files that cannot seek."""
    for name, codec, options in (
        ("a.mp4", "libx264", {"g": 20, "bf": 2}),
        ("open.mp4", "libx264", {"g": 20, "x264-params": "open-gop=1"}),
        ("a.ts", "libx264", {"g": 20}),
        ("a.mpg", "mpeg2video", {"g": 20, "bf": 2}),
        ("a.webm", "libvpx", {"g": 20}),
    ):
        frames = write_video(tmp_path / name, 200, 25, codec, **options)
        video = data.open_video(name, tmp_path, False, 2.0)
        for numbers in ([0, 50, 100, 150, 199], [77], list(range(200)), [1, 22, 23, 90, 91, 198]):
            images = list(video.read(numbers))
            assert [np.asarray(image).tobytes() for image in images] == [
                np.asarray(frames[number].to_image()).tobytes() for number in numbers
            ], (name, numbers)


def test_video_damaged_files(processor, tmp_path):
    av = pytest.importorskip("av", reason="the video extra is not installed")
    write_video(tmp_path / "v.mp4", 40, 15, "mpeg4")
    write_video(tmp_path / "one.mp4", 1, 15)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    content = (tmp_path / "v.mp4").read_bytes()
    (tmp_path / "head.mp4").write_bytes(content[:20])
    with av.open(str(tmp_path / "v.mp4")) as container:
        middle = [packet.pos for packet in container.demux(video=0) if packet.size][20]
    (tmp_path / "cut.mp4").write_bytes(content[:middle])
    (tmp_path / "damaged.mp4").write_bytes(content[:middle] + bytes(len(content) - middle))
    write_video(tmp_path / "v.ts", 40, 15)
    content = (tmp_path / "v.ts").read_bytes()
    middle = len(content) // 376 * 188  # its packets have 188 bytes, the first three describe the file
    (tmp_path / "no-start.ts").write_bytes(content[:564] + content[middle:])
    for name, message in (
        ("head.mp4", "cannot be read as a video"),
        ("no-start.ts", "cannot be read as a video: its frames have no size"),
        ("cut.mp4", "states 40 frames but holds 20: it was cut off"),
        ("damaged.mp4", "cannot be read as a video"),
        ("sound.mp4", "cannot be read as a video: it holds no video"),
        ("one.mp4", "a video needs two frames, this has 1"),
    ):
        with pytest.raises(InputError, match=rf"^videos\[0\]: .*{message}") as caught:
            processor.encode(chat("<video>?", "!", videos=[name]), media_dir=tmp_path)
        assert "\n" not in str(caught.value)


def test_animation_frames(processor, tmp_path):
    """Frames look as in a viewer: parts are drawn over the previous frame, transparent pixels are white."""
    red, blue, white = (255, 0, 0), (0, 0, 255), (255, 255, 255)
    first, part = Image.new("RGBA", (64, 64), (*red, 255)), Image.new("RGBA", (64, 64))
    part.paste((*blue, 255), (0, 0, 32, 32))
    holes = Image.new("RGBA", (64, 64), (*red, 255))
    holes.paste((0, 0, 0, 0), (32, 0, 64, 32))
    for name in ("a.gif", "a.webp", "a.png", "a.apng"):
        options = {"lossless": True} if name == "a.webp" else {"blend": 1} if "png" in name else {"disposal": 1}
        if name == "a.apng":
            options["format"] = "PNG"
        second = Image.alpha_composite(first, part) if name == "a.webp" else part  # Pillow's WebP is not blended
        first.save(tmp_path / name, save_all=True, append_images=[second], duration=[500, 250], **options)
        video = data.open_video(name, tmp_path, False, 2.0)
        shown = [[image.getpixel((x, 5)) for x in (5, 40)] for image in video.read([0, 1])]
        assert shown == [[red, red], [blue, red]], name
        assert (video.num_frames, video.fps, video.times) == (2, 2 / 0.75, None)
        assert np.array_equal(np.asarray(data.load_image(tmp_path / name)), np.asarray(first.convert("RGB")))
        holes.save(tmp_path / name, save_all=True, append_images=[part], duration=0, **options)
        video = data.open_video(name, tmp_path, False, 2.0)
        assert [image.getpixel((40, 5)) for image in video.read([0])] == [white], name
        assert video.fps == 10  # browsers, too, take 0 for a tenth of a second
        holes.save(tmp_path / name, **{key: value for key, value in options.items() if key == "format"})
        with pytest.raises(InputError, match="a video needs two frames, this has 1"):
            processor.encode(chat("<video>?", "!", videos=[name]), media_dir=tmp_path)


def test_video_folder_ignores_other_files(processor, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (64, 64), (10 * i,) * 3).save(folder / f"{i}.png")
    row = chat("<video>?", "!", videos=["frames"])
    expected = processor.encode(row, media_dir=tmp_path)
    (folder / "notes.txt").write_text("x")
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / "._0.png").write_bytes(b"x")  # macOS leaves these on other file systems
    (folder / "sub").mkdir()
    assert torch.equal(processor.encode(row, media_dir=tmp_path).pixel_values, expected.pixel_values)
    with pytest.raises(InputError, match="a video needs two frames, this has 0"):
        processor.encode(chat("<video>?", "!", videos=["frames/sub"]), media_dir=tmp_path)


# ---- token counts ----------------------------------------------------------------------------------------------------

COUNTED = [
    ({}, chat("Hello", "Hi!", "How are you?", "Well.")),
    ({}, chat("system:Brief.", "<image>What?", "A bus.", "<image>", "Red", images=["rgb.png", "exif6.jpg"])),
    ({}, chat("<image><image><image>", "x", images=["exif5.jpg", "palette.gif", "5x900.png"])),
    ({}, chat("<video><image>", "x", images=["grey16.png"], videos=[["rgb.png"] * 5])),
    ({}, chat("<video>", "x", videos=[["exif6.jpg", "exif8.jpg", "exif5.jpg"]])),
    ({}, chat("<video>", "x", videos=["animated.webp"])),
    ({}, chat("<video>", "x", videos=[{"path": "clip.mp4", "fps": 5}])),
    ({}, chat("<video><video>", "x", videos=["clip.mp4", "uneven.mkv"])),
    ({}, part_row({"type": "image", "image": "exif6.jpg", "max_pixels": 20000, "min_pixels": 1024})),
    ({}, part_row({"type": "video", "video": "clip.mp4", "fps": 5, "video_start": 0.7, "total_pixels": 20000})),
    ({"for_generation": True}, chat("<image>What?", "A bus.", images=["small.png"])),
    ({"seq_length": 200}, chat("<image>What?", "word " * 300, images=["small.png"])),
    ({"seq_length": 300}, chat("<image>What?", "word " * 60, "And?", "word " * 300, images=["small.png"])),
    ({"seq_length": 90, "train_on_prompt": True}, chat("<image>What?", "A", "<image>", "B", images=["small.png"] * 2)),
    ({"mask_history": True, "confine_paths": True}, chat("\n<image>\n", "\n\n", images=["small.png"])),
]


@pytest.mark.parametrize(("options", "row"), COUNTED)
def test_encode_without_decoding(options, row, images, processor, tmp_path, monkeypatch):
    """The sample has its tokens and labels, and no image or video frame is decoded (animations are)."""
    if any(name in json.dumps(row) for name in ("clip", "uneven")):
        write_video(tmp_path / "clip.mp4", 40, 15)
        write_video(tmp_path / "uneven.mkv", len(UNEVEN), 25, pts=UNEVEN)
        images = tmp_path
    expected = processor.encode(row, images, options=EncodeOptions(**options))
    if "webp" not in json.dumps(row):
        monkeypatch.setattr(ImageFile.ImageFile, "load", None)
        monkeypatch.setattr(Processor, "_patchify", None)
    if images == tmp_path:
        import av

        def open_for_packets(path: str, **options):
            container = open_(path, **options)
            packets_only = types.SimpleNamespace(streams=container.streams, demux=container.demux)
            return contextlib.nullcontext(packets_only)

        open_ = av.open
        monkeypatch.setattr(av, "open", open_for_packets)
    assert_same_but_pixels(processor.encode(row, images, options=EncodeOptions(**options), decode=False), expected)


# ---- transformers 4.57, with torchvision -----------------------------------------------------------------------------

TRANSFORMERS_4 = """
import functools, json, sys, types
import numpy as np, torch
from PIL import Image
try:
    import torchvision
except RuntimeError:  # one built for CUDA, beside a torch for the CPU: of its own operators only the names are needed
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import transformers
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.video_utils import VideoMetadata, load_video
assert transformers.__version__.startswith("4.57"), transformers.__version__

def sample(metadata, videos, **_):
    return videos.sample_frames(metadata)

tokenizer_file, template, cases, output = sys.argv[1:]
tokenizer = transformers.Qwen2TokenizerFast(tokenizer_file=tokenizer_file)
half = [0.5, 0.5, 0.5]
images = transformers.Qwen2VLImageProcessor(
    patch_size=16, image_mean=half, image_std=half, min_pixels=65536, max_pixels=16777216
)
results = []
for case in json.load(open(cases)):
    size = dict(zip(("shortest_edge", "longest_edge"), case["pixels"]))
    videos = transformers.Qwen3VLVideoProcessor(fps=case["fps"], max_frames=case["max_frames"], size=size)
    processor = transformers.Qwen3VLProcessor(images, tokenizer, videos, chat_template=open(template).read())
    clips, metadata = [], []
    for video in case["videos"]:
        if isinstance(video, str):
            clip, facts = load_video(video, backend="pyav", sample_indices_fn=functools.partial(sample, videos=videos))
        else:
            facts = VideoMetadata(total_num_frames=len(video["frames"]), fps=video["fps"])
            facts.frames_indices = videos.sample_frames(facts)
            clip = np.stack([np.asarray(Image.open(video["frames"][i]).convert("RGB")) for i in facts.frames_indices])
        clips.append(clip)
        metadata.append(facts)
    out = processor(
        text=[processor.apply_chat_template(case["messages"], tokenize=False)],
        images=[Image.open(path) for path in case["images"]] or None,
        videos=clips, video_metadata=metadata, do_sample_frames=False, return_tensors="pt",
    )
    positions, _ = Qwen3VLModel.get_rope_index(
        types.SimpleNamespace(config=transformers.Qwen3VLConfig()), out["input_ids"], out.get("image_grid_thw"),
        out["video_grid_thw"], attention_mask=out["attention_mask"],
    )
    results.append(dict(out) | {"position_ids": positions[:, 0]})
torch.save(results, output)
"""


@pytest.mark.slow
@pytest.mark.skipif("TRANSFORMERS_4_PYTHON" not in os.environ, reason="make test-slow sets TRANSFORMERS_4_PYTHON")
def test_videos_equal_transformers_4(qwen_dir, tmp_path):
    """Tokens, positions and grids equal the real 4.57 processor's; pixels are as near as `process_video` states."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (150, 200, 3), dtype=np.uint8)) for _ in range(23)]
    smooth = [frame.crop((0, 0, 16, 12)).resize((200, 150), Image.Resampling.BICUBIC) for frame in noise]
    smooth[0].save(tmp_path / "a.gif", save_all=True, append_images=smooth[1:], duration=200)
    with Image.open(tmp_path / "a.gif") as image:
        gif = [image.convert("RGB") for i in range(23) if image.seek(i) is None]
    exact = [frame.crop((0, 0, 192, 128)) for frame in noise]
    stills = {}
    for name, frames in {"noise": noise, "smooth": smooth, "gif": gif, "exact": exact}.items():
        (tmp_path / name).mkdir()
        stills[name] = [f"{name}/{i}.png" for i in range(23)]
        for path, frame in zip(stills[name], frames, strict=True):
            frame.save(tmp_path / path)
    write_video(tmp_path / "slow.mp4", 50, 15, bf=2)
    write_video(tmp_path / "fast.mp4", 131, Fraction(30000, 1001))

    small, large = {"video_max_pixels": 12 * 80 * 100}, {"video_min_pixels": 16 * 500 * 600}
    three_a_second = [{"path": stills[name], "fps": 3.0} for name in ("exact", "noise", "smooth")]
    rows = [  # videos, images, settings, and how far pixels may be from transformers': at most, on average
        (three_a_second[:1], [], {}, (0, 0)),
        (three_a_second[1:2], [], small, (2, 0.01)),
        (three_a_second[1:2], [], large, (2, 0.01)),
        (three_a_second[1:2], [], {}, (2, 0.01)),
        (three_a_second[2:], [], small, (2, 0.01)),
        (three_a_second[2:], [], large, (2, 0.01)),
        ([{"path": "noise", "fps": 4.0}], [], {}, (2, 0.01)),
        ([stills["exact"]], [], {}, (0, 0)),
        (["a.gif"], [], {}, (2, 0.01)),
        (["slow.mp4"], [], {}, (0, 0)),
        (["fast.mp4"], [], {"video_fps": 5.0}, (0, 0)),
        (["fast.mp4"], [], {"video_fps": 5.0, "video_maxlen": 7}, (0, 0)),
        (["slow.mp4", "fast.mp4", "exact"], [stills["smooth"][0]] * 2, {}, (0, 0)),
    ]
    cases, samples = [], []
    for videos, images, settings, _ in rows:
        processor = Processor(qwen_dir, **settings)
        text = "Compare <video>" + "<image> and <video>" * len(images)
        row = chat(text, "An answer.", "Why?", "So.", videos=videos, images=images)
        samples.append(processor.encode(row, media_dir=tmp_path))
        assert_same_but_pixels(processor.encode(row, media_dir=tmp_path, decode=False), samples[-1])
        parts = [part for part in data.PLACEHOLDER.split(text) if part]
        content = [{"type": p[1:-1]} if p in ("<image>", "<video>") else {"type": "text", "text": p} for p in parts]
        clips = []
        for video in videos:
            path, fps = (video["path"], video["fps"]) if isinstance(video, dict) else (video, processor.video_fps)
            if path == "a.gif":
                path, fps = "gif", 5.0
            names = stills.get(path, []) if isinstance(path, str) else path
            frames = {"frames": [str(tmp_path / name) for name in names], "fps": fps}
            clips.append(frames if names else str(tmp_path / path))
        cases.append({
            "messages": [{"role": "user", "content": content}, *row["messages"][1:]], "videos": clips,
            "images": [str(tmp_path / name) for name in images], "pixels": processor.video_pixels,
            "fps": processor.video_fps, "max_frames": processor.video_maxlen,
        })
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    python = Path(os.environ["TRANSFORMERS_4_PYTHON"])
    files = (qwen_dir / "tokenizer.json", Path(__file__).parent / "assets" / "chat_template.jinja",
        tmp_path / "cases.json", tmp_path / "out.pt")
    subprocess.run([python, "-c", TRANSFORMERS_4, *files], check=True,
        env=os.environ | {"PYTHONPATH": str(python.parents[1] / "torchvision")})
    for sample, expected, row in zip(samples, torch.load(tmp_path / "out.pt"), rows, strict=True):
        assert sample.input_ids.tolist() == expected["input_ids"][0].tolist()
        assert sample.position_ids.tolist() == expected["position_ids"].tolist()
        grids = {kind: list(expected.get(f"{kind}_grid_thw", [])) for kind in ("video", "image")}
        pixels = {"video": expected["pixel_values_videos"], "image": expected.get("pixel_values", torch.zeros(0, 1536))}
        for i, (grid, ours) in enumerate(zip(sample.grid_thw, sample.pixel_values.split(
                sample.grid_thw.prod(1).tolist()), strict=True)):
            kind = ("video", "image")[i % 2]  # they take turns
            assert grid.tolist() == grids[kind].pop(0).tolist()
            wanted, pixels[kind] = pixels[kind].split([len(ours), len(pixels[kind]) - len(ours)])
            levels = (ours - wanted).abs() * 127.5
            print(kind, f"max {levels.max():.4f} mean {levels.mean():.4f}", row[2])
            most, mean = row[3] if kind == "video" else (0, 0)
            assert levels.max() <= most + 1e-3 and levels.mean() <= mean + 1e-3
        assert not grids["video"] and not grids["image"]
