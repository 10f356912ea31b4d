"""Build the real Qwen tokenizer for tests from a file in a PyPI package.

The released Qwen3-VL `tokenizer.json` is on no package index, but the `dashscope` wheel contains `qwen.tiktoken` with
the same 151,643 byte sequences and their ranks. The ranks determine the BPE merges. Merging a token's bytes with only
lower-ranked tokens leaves exactly two parts, and these two are its merge.

    python tests/qwen_tokenizer.py [DIR]     builds .cache/qwen_tokenizer/tokenizer.json and prints its directory
"""

import base64
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

CACHE = Path(__file__).parents[1] / ".cache"
WHEEL = "dashscope==2.0.2"
RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|>"
).split()
NOT_SPECIAL = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()


def download_ranks(cache: Path = CACHE) -> Path:
    """Return the path of `qwen.tiktoken`: extract it from the wheel if needed and check its hash."""
    ranks = cache / "qwen.tiktoken"
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    if not ranks.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), WHEEL]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(cache.glob("dashscope-*.whl"))) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith("/qwen.tiktoken"))
            _write(ranks, wheel.read(member))
    digest = hashlib.sha256(ranks.read_bytes()).hexdigest()
    if digest != RANKS_SHA256:
        raise RuntimeError(f"{ranks}: sha256 {digest}, expected {RANKS_SHA256}; delete it and try again")
    return ranks


def build_tokenizer(cache: Path = CACHE) -> Path:
    """Return a directory with Qwen3-VL's `tokenizer.json`. The first call builds it in a few seconds."""
    target = cache / "qwen_tokenizer" / "tokenizer.json"
    if target.exists():
        return target.parent
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = download_ranks(cache).read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    printable = _byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(printable[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _last_merge(ranks, token, rank)
            merges.append((spell(left), spell(right)))
    model = models.BPE({spell(token): rank for token, rank in ranks.items()}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in NOT_SPECIAL])
    _write(target, tokenizer.to_str().encode())
    return target.parent


def _last_merge(ranks: dict[bytes, int], token: bytes, limit: int) -> tuple[bytes, bytes]:
    """Return the two parts that remain when a token's bytes are merged by ranks below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, position = limit, -1
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], limit)
            if rank < best:
                best, position = rank, i
        parts[position : position + 2] = [parts[position] + parts[position + 1]]
    return parts[0], parts[1]


def _byte_alphabet() -> list[str]:
    """Return GPT-2's printable character for each of the 256 bytes."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + hidden.index(byte)) for byte in range(256)]


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


if __name__ == "__main__":
    print(build_tokenizer(Path(sys.argv[1]) if len(sys.argv) > 1 else CACHE))
