import os
import signal
from pathlib import Path

# One thread in every process of the tests: the models are too small for more, several ranks share two cores, and
# OpenMP's threads do not survive the forks of some tests. Subprocesses inherit the variable.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from qwen_tokenizer import build_tokenizer  # noqa: E402

import common  # noqa: E402
import kernels_npu  # noqa: E402


@pytest.fixture(scope="session")
def qwen_dir() -> Path:
    """Directory with the real Qwen3-VL `tokenizer.json` (see qwen_tokenizer.py)."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def processor(qwen_dir):
    from data import Processor

    return Processor(qwen_dir)


@pytest.fixture(scope="session")
def reference(qwen_dir):
    from reference import Reference

    return Reference(qwen_dir)


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """Return a folder of unusual images."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)

    def noise(*shape, high=256, dtype=np.uint8):
        return rng.integers(0, high, shape).astype(dtype)

    rgb = Image.fromarray(noise(75, 120, 3)).resize((400, 250))
    rgb.save(folder / "rgb.png")
    rgb.save(folder / "photo.jpg", quality=80)
    Image.fromarray(noise(31, 47, 3)).save(folder / "small.png")
    Image.fromarray(noise(1, 1, 3)).save(folder / "1x1.png")
    Image.fromarray(noise(30, 6000, 3)).save(folder / "6000x30.png")
    Image.fromarray(noise(900, 5, 3)).save(folder / "5x900.png")
    Image.fromarray(noise(256, 256, 3)).save(folder / "exact.png")
    Image.fromarray(noise(300, 333, 4)).save(folder / "rgba.png")
    Image.fromarray(noise(300, 333)).save(folder / "grey.png")
    Image.fromarray(noise(300, 333, 2), "LA").save(folder / "grey_alpha.png")
    Image.fromarray(noise(300, 333, high=65536, dtype=np.uint16)).save(folder / "grey16.png")
    Image.fromarray(noise(300, 333, high=2) * 255).convert("1").save(folder / "bilevel.png")
    Image.fromarray(noise(300, 333, 4), "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise(300, 333).astype(np.float32)).save(folder / "float.tiff")
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=50)
    palette.save(folder / "palette.png")
    palette.save(folder / "palette_transparent.png", transparency=3)
    palette.save(folder / "palette.gif", transparency=7)
    rgb.save(folder / "animated.webp", save_all=True, append_images=[rgb.rotate(90)])
    for orientation in (2, 5, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        rgb.save(folder / f"exif{orientation}.jpg", exif=exif)
    Image.fromarray(noise(600, 900, 3)).resize((4600, 3700)).save(folder / "large.jpg")
    return folder


@pytest.fixture(autouse=True)
def restore_process():
    """Undo what a run leaves in this process (operations, signal handlers, a process group), and end forked ranks."""
    names = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before, ops = [signal.getsignal(n) for n in names], kernels_npu.ops
    yield
    kernels_npu.ops = ops  # a dry run leaves those of a fake device
    for n, handler in zip(names, before, strict=True):
        signal.signal(n, handler)
    common.stop_requested.clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    from helpers import Job

    for job in Job.all:
        job.end()
    Job.all.clear()
