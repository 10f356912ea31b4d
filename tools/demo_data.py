"""Create what `make demo` trains on: drawn images with questions, a tiny tokenizer, and a small model's configuration.

    python tools/demo_data.py --output demo_out [--describe 4800] [--answer 14400] [--held-out 80] [--seed 0]

An image has one to four coloured shapes, each in a cell of a 3 x 3 grid, with random position, size, angle and shade.
Rows are in the LLaVA format of `data.py`: questions about one image, about two, or (text only) about numbers. Held-out
arrangements of shapes and held-out questions about numbers do not occur in training. Nothing is downloaded. The same
seed gives the same files.
"""

import argparse
import colorsys
import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = {  # hue, saturation and value in the middle of each colour's shades
    "red": (0.985, 0.76, 0.88),
    "orange": (0.075, 0.84, 0.95),
    "yellow": (0.140, 0.80, 0.97),
    "green": (0.390, 0.66, 0.64),
    "blue": (0.590, 0.74, 0.85),
    "purple": (0.760, 0.58, 0.75),
}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
WORDINGS = {
    "list": ("What is where?", "List what is in the image."),
    "colour": ("What colour do you see?", "Name the colour."),
    "shape": ("What shape do you see?", "Name the shape."),
    "count": ("How many are there?", "Count what you see."),
    "where": ("Which places are filled?", "Name the filled places."),
    "pair": ("What is in each image?", "Describe both images."),
    "numbers": ("Which is the {}?",),
}
KINDS = {"list": 1, "colour": 1, "shape": 1, "count": 1, "where": 1, "pair": 2, "numbers": 0}  # number of images
COUNTS = ("one", "two", "three", "four")

IMAGE_PIXELS = 192  # side of an image as drawn; the processor halves it
MODEL_PIXELS = 96  # side as the model sees it: 6 x 6 patches, 9 tokens

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# Qwen's tokenizer splits text into words with this expression before it merges bytes.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Thing(NamedTuple):
    """One shape of an image, in the cell (row, column) of the 3 x 3 grid, both from 0 at the top left."""

    row: int
    column: int
    shape: str
    colour: str


Scene = tuple[Thing, ...]  # in reading order, at most one thing in a cell


class Question(NamedTuple):
    """A question without its wording: `kind` is a key of WORDINGS, and `subject` fills the gap in the wording."""

    kind: str
    subject: str
    answer: str


def make_scene(rng: random.Random, mixed: bool) -> Scene:
    """Return a random arrangement of one to four things, all of one shape and colour unless `mixed`."""
    cells = rng.sample([(row, column) for row in range(3) for column in range(3)], rng.randint(1, 4))
    look = rng.choice(SHAPES), rng.choice(list(COLOURS))
    looks = [(rng.choice(SHAPES), rng.choice(list(COLOURS))) if mixed else look for _ in cells]
    return tuple(Thing(*cell, *look) for cell, look in zip(sorted(cells), looks, strict=True))


def ask(kind: str, scenes: list[Scene], rng: random.Random) -> Question:
    """Return a question of a kind about one scene (`pair`: two scenes, `numbers`: none)."""
    if kind == "numbers":
        numbers = rng.sample(range(10), 3)
        word, pick = rng.choice([("largest", max), ("smallest", min)])
        return Question(kind, "{} of {}, {} and {}".format(word, *numbers), str(pick(numbers)))
    scene = scenes[0]
    places = [f"{ROWS[thing.row]} {COLUMNS[thing.column]}" for thing in scene]
    answer = {
        "list": ", ".join(f"{place} {thing.colour} {thing.shape}" for place, thing in zip(places, scene, strict=True)),
        "colour": scene[0].colour,
        "shape": scene[0].shape,
        "count": COUNTS[len(scene) - 1],
        "where": ", ".join(places),
        "pair": ", ".join(f"{scene[0].colour} {scene[0].shape}" for scene in scenes),
    }[kind]
    return Question(kind, "", answer)


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene as a square RGB image of IMAGE_PIXELS, with everything random that no question asks about."""
    scale = 2  # draw at twice the size and average, for smooth edges
    cell = IMAGE_PIXELS * scale / 3
    image = Image.new("RGB", (IMAGE_PIXELS * scale,) * 2, _rgb(rng.random(), rng.uniform(0, 0.09), 0.98))
    canvas = ImageDraw.Draw(image)
    for thing in scene:
        hue, saturation, value = COLOURS[thing.colour]
        fill = _rgb(
            hue + rng.uniform(-0.012, 0.012), saturation * rng.uniform(0.88, 1.08), value * rng.uniform(0.9, 1.03)
        )
        radius = cell * rng.uniform(0.31, 0.42)
        slack = cell / 2 - radius * 1.05
        x = (thing.column + 0.5) * cell + rng.uniform(-slack, slack)
        y = (thing.row + 0.5) * cell + rng.uniform(-slack, slack)
        if thing.shape == "circle":
            radius *= 0.9
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            canvas.polygon(_corners(thing.shape, x, y, radius, rng.uniform(-12, 12)), fill=fill)
    return image.reduce(scale)


def _corners(shape: str, x: float, y: float, radius: float, degrees: float) -> list[tuple[float, float]]:
    """Return the corners of a shape around (x, y), none farther than `radius`, rotated by an angle."""
    if shape == "cross":  # the corners of a plus sign with arms of half-width 0.3
        arm, end = 0.3, math.sqrt(1 - 0.3**2)
        quarter = [(arm, -arm), (arm, -end), (-arm, -end)]
        polar = []
        for turn in range(4):
            polar += [(math.hypot(a, b), math.atan2(b, a) - turn * math.pi / 2) for a, b in quarter]
    else:
        number = {"square": 4, "triangle": 3, "star": 10}[shape]
        start = math.pi / 4 if shape == "square" else math.pi / 2
        polar = [(0.45 if shape == "star" and i % 2 else 1.0, 2 * math.pi * i / number - start) for i in range(number)]
    turn = math.radians(degrees)
    return [(x + radius * r * math.cos(a + turn), y + radius * r * math.sin(a + turn)) for r, a in polar]


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    """Return an RGB colour (0 to 255) from hue, saturation and value (0 to 1; hue wraps, the others are clipped)."""
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue % 1, min(saturation, 1), min(value, 1)))


def make_rows(num_describe: int, num_answer: int, num_held_out: int, seed: int, folder: Path) -> dict[str, list[dict]]:
    """Draw the images into `folder`/images and return the rows of "describe", "answer" and "held_out".

    Args:
        num_describe: training rows that list what is in an image; every fourth is about numbers. The long answers teach
            the model to see fastest.
        num_answer: training rows of all kinds, with several questions each.
        num_held_out: held-out rows of each kind, with one question each.
        seed: the same seed gives the same rows and images.
        folder: the paths of images in rows are relative to it.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    held_out_content: set[Scene | Question] = set()

    def make_row(name: str, kinds: list[str], held_out: bool = False) -> dict:
        questions: list[Question] = []
        while not questions:
            scenes = [make_scene(rng, mixed=kinds[0] == "list") for _ in range(KINDS[kinds[0]])]
            asked = [ask(kind, scenes, rng) for kind in rng.sample(kinds, len(kinds))]
            if held_out_content.isdisjoint(scenes or asked):
                questions = asked
        if held_out:
            held_out_content.update(scenes or questions)
        paths = [f"images/{name}{letter}.png" for letter in ("", "b")[: len(scenes)]]
        for path, scene in zip(paths, scenes, strict=True):
            draw(scene, rng).save(folder / path, compress_level=1)
        conversations = []
        for question in questions:
            text = rng.choice(WORDINGS[question.kind]).format(question.subject)
            conversations.append({"from": "human", "value": text})
            conversations.append({"from": "gpt", "value": question.answer})
        conversations[0]["value"] = "<image>" * len(scenes) + conversations[0]["value"]
        return {"id": name, "kinds": [q.kind for q in questions], "image": paths, "conversations": conversations}

    about_one = ["colour", "shape", "count", "where"]
    describe = [["list"], ["list"], ["list"], ["numbers"]]
    answer = [["list"], ["list"], ["list"], about_one, about_one, ["pair"], ["numbers"], ["numbers"]]
    held_out_kinds = list(KINDS) * num_held_out
    with tqdm(desc="drawing", unit=" rows", total=num_describe + num_answer + len(held_out_kinds)) as progress:

        def make_part(name: str, groups: list[list[str]], held_out: bool = False) -> list[dict]:
            rows = []
            for i, kinds in enumerate(groups):
                rows.append(make_row(f"{name}-{i:05d}", kinds, held_out))
                progress.update()
            return rows

        return {  # the held-out part comes first, because the others must avoid its content
            "held_out": make_part("held-out", [[kind] for kind in held_out_kinds], held_out=True),
            "describe": make_part("describe", [describe[i % len(describe)] for i in range(num_describe)]),
            "answer": make_part("answer", [answer[i % len(answer)] for i in range(num_answer)]),
        }


def make_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer with the structure and special tokens of Qwen's on some texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def make_config(tokenizer: Tokenizer) -> dict:
    """Return the `config.json` of a small Qwen3-VL-MoE whose ids match the tokenizer's.

    No two dimensions of an expert are equal, so that a transposed weight raises an error.
    """
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    hidden_size = 128
    return {
        "architectures": ["Qwen3VLMoeForConditionalGeneration"],
        "model_type": "qwen3_vl_moe",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_moe_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "decoder_sparse_step": 1,
            "dtype": "float32",
            "head_dim": 32,
            "hidden_act": "silu",
            "hidden_size": hidden_size,
            "initializer_range": 0.1,
            "intermediate_size": 320,
            "max_position_embeddings": 4096,
            "mlp_only_layers": [],
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
            "num_attention_heads": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
            "rope_theta": 10000,
            "tie_word_embeddings": True,  # transformers 4 reads it here
            "use_cache": True,
            "vocab_size": tokenizer.get_vocab_size(),
        },
        "vision_config": {
            "model_type": "qwen3_vl_moe",
            "deepstack_visual_indexes": [0, 1],
            "depth": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 96,
            "in_channels": 3,
            "initializer_range": 0.1,
            "intermediate_size": 256,
            "num_heads": 3,
            "num_position_embeddings": (MODEL_PIXELS // 16) ** 2,
            "out_hidden_size": hidden_size,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }


def write_model_assets(folder: Path, texts: Iterable[str]) -> None:
    """Write what `train.py --init random` reads: tokenizer, configuration, preprocessors and end tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(texts)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    pixels = MODEL_PIXELS**2
    preprocessor = {
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.95, 0.95, 0.95],  # the background becomes about 0, so that shapes stand out
        "image_std": [0.3, 0.3, 0.3],
        "processor_class": "Qwen3VLProcessor",
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
    }
    for name, content in {
        "config.json": make_config(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
        },
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "do_sample": False,
        },
        "preprocessor_config.json": preprocessor | {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": preprocessor
        | {
            "video_processor_type": "Qwen3VLVideoProcessor",
            "size": {"shortest_edge": pixels, "longest_edge": 32 * pixels},
        },
    }.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def make_demo_data(output: Path, num_describe: int, num_answer: int, num_held_out: int, seed: int) -> None:
    """Write `output`/data and `output`/base: rows, questions.json (held-out rows without answers), and the model."""
    parts = make_rows(num_describe, num_answer, num_held_out, seed, output / "data")
    parts["questions"] = [row | {"conversations": row["conversations"][:-1]} for row in parts["held_out"]]
    for name, rows in parts.items():
        (output / "data" / f"{name}.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    turns = (turn["value"] for row in parts["describe"] + parts["answer"] for turn in row["conversations"])
    write_model_assets(output / "base", (turn.replace("<image>", "") for turn in turns))


def main() -> None:
    parser = argparse.ArgumentParser(description="Create the demo's dataset, tokenizer and model configuration.")
    parser.add_argument("--output", type=Path, default=Path("demo_out"), help="folder for data/ and base/")
    parser.add_argument("--describe", type=int, default=4800, help="training rows that describe an image")
    parser.add_argument("--answer", type=int, default=14400, help="training rows with questions of all kinds")
    parser.add_argument("--held-out", type=int, default=80, help="held-out rows of each kind of question")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is random")
    args = parser.parse_args()
    make_demo_data(args.output, args.describe, args.answer, args.held_out, args.seed)


if __name__ == "__main__":
    main()
