"""Answers questions about pictures and videos, from a Hugging Face directory or a training run's checkpoint.

    python infer.py --model DIR --image a.jpg --prompt "What is this?"
    python infer.py --model DIR --input questions.jsonl --output answers.jsonl --batch-size 8
    python infer.py --model DIR --image a.jpg --chat

`Generator` is the part to use from other programs: packed prompts in, token ids out. The answer, streamed as it is
made and ended by a newline, is all that goes to standard output.

Shapes: B running sequences, L cached tokens, H heads, K key-value heads, d head size, V vocabulary.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import convert
import data
import kernels_npu
from common import InputError, Parser, UsageError, number, read_json, run_program, shorten
from model import Qwen3VL, Qwen3VLConfig, TextModel, build_model

FOR_GENERATION = data.EncodeOptions(for_generation=True)

# ---- generation ----------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values [B, K, L, d] of every text layer, in the layers' `attention` seam while a `with` block lasts.

    All sequences end in the same column and the shorter ones begin later. So a new token of each goes into one column,
    and what lies before a sequence's beginning is masked once and for all.
    """

    def __init__(self, decoder: TextModel, cu_seqlens: list[int], position_ids: Tensor, room: int):
        """For the prompts in `cu_seqlens` with their position_ids [3, T]; `room`: new tokens to make place for at
        first, after which the place doubles."""
        self.decoder, self.layers = decoder, [layer.self_attn for layer in decoder.layers]
        lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
        self.length = max(lengths)  # columns in use
        self.starts = torch.tensor([self.length - n for n in lengths], device=position_ids.device)
        # a new token's position is one above the largest so far, the same on all three axes
        largest = [p.max() for p in position_ids.split(lengths, dim=1)]
        self.positions = torch.stack(largest) + 1  # [B], of the next token
        self.keys: list[Tensor] = [position_ids.new_empty(0)] * len(self.layers)
        self.values = list(self.keys)
        self.resize(self.length + room)

    def __enter__(self) -> KVCache:
        self.defaults = [layer.attention for layer in self.layers]
        for i, (layer, attention) in enumerate(zip(self.layers, self.defaults, strict=True)):
            layer.attention = functools.partial(self.prefill, i, attention)
        return self

    def __exit__(self, *exception) -> None:
        for layer, attention in zip(self.layers, self.defaults, strict=True):
            layer.attention = attention

    def resize(self, capacity: int) -> None:
        """Makes place for `capacity` columns in all."""
        self.capacity = capacity
        for buffers in (self.keys, self.values):
            for i, old in enumerate(buffers):
                if old.numel():  # before the prompts are seen there is nothing to keep
                    buffers[i] = F.pad(old, (0, 0, 0, capacity - old.shape[2]))
        columns = torch.arange(capacity, device=self.starts.device)
        weight = self.decoder.norm.weight
        self.mask = weight.new_zeros(len(self.starts), 1, 1, capacity)
        self.mask.masked_fill_((columns < self.starts[:, None])[:, None, None], float("-inf"))
        # a position is never above its column: a picture takes more tokens than it adds to the positions
        self.tables = [t.to(weight.dtype) for t in self.decoder.rotary_tables(columns.expand(3, -1))]

    def prefill(
        self, i: int, attention: Callable, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool
    ) -> Tensor:
        """The attention of layer i while the prompts pass: keeps k and v [T, K, d]."""
        for buffers, new in ((self.keys, k), (self.values, v)):
            # zeros: a masked score is exactly 0, but 0 times what empty memory may hold can be NaN
            buffers[i] = new.new_zeros(len(self.starts), new.shape[1], self.capacity, new.shape[2])
            for b, (start, end) in enumerate(itertools.pairwise(cu_seqlens)):
                buffers[i][b, :, self.length - (end - start) : self.length] = new[start:end].transpose(0, 1)
        self.layers[i].attention = functools.partial(self.decode, i)
        return attention(q, k, v, cu_seqlens, causal=causal)

    def decode(self, i: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: None, causal: bool) -> Tensor:
        """The attention of layer i from then on: q [B, H, d], one token of each sequence, on all that came before."""
        keys, values = (buffers[i][:, :, : self.length] for buffers in (self.keys, self.values))
        keys[:, :, -1], values[:, :, -1] = k, v
        # The query heads that share a key-value head go in as its queries: nothing is repeated.
        q = q.unflatten(1, (k.shape[1], -1))
        mask = self.mask[..., : self.length] if len(q) > 1 else None
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask).flatten(1, 2)

    def step(self, token_ids: Tensor) -> Tensor:
        """The next token [B] of each sequence -> hidden states [B, D] after the last norm."""
        if self.length == self.capacity:
            self.resize(2 * self.capacity)
        self.length += 1
        cos, sin = (table[self.positions] for table in self.tables)
        x = self.decoder.embed_tokens(token_ids)
        for layer in self.decoder.layers:
            x, _ = layer(x, cos, sin, None)
        self.positions += 1
        return self.decoder.norm(x)

    def keep(self, sequences: list[int]) -> None:
        """Drops the other sequences, and the columns that only they used."""
        at = torch.tensor(sequences, device=self.starts.device)
        self.starts, self.positions = self.starts[at], self.positions[at]
        unused = int(self.starts.min())
        self.starts -= unused
        self.length -= unused
        for buffers in (self.keys, self.values):
            buffers[:] = [old[at, :, unused:] for old in buffers]
        self.capacity -= unused
        self.mask = self.mask[at, ..., unused:]


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Draws a token for each row of logits [B, V], given uniform [B] in (0, 1] -> [B].

    In transformers' order: temperature; the `top_k` likeliest tokens (0: all); of those the fewest whose probabilities
    reach `top_p` (nucleus sampling, arXiv:1904.09751).
    """
    logits, ids = logits.float() / temperature, None
    if top_k or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # sorted
    probs = logits.softmax(-1)
    if top_p < 1:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
    cumulative = probs.cumsum(-1)
    choice = (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(-1, keepdim=True)
    return (choice if ids is None else ids.gather(-1, choice))[:, 0]


class Generator:
    """Answers with a model on its device: one pass over the packed prompts, then a token of each sequence at a time.
    A sequence that has ended leaves the batch."""

    def __init__(self, model: Qwen3VL, end_token_ids: Collection[int]):
        self.model, self.end_token_ids = model, frozenset(end_token_ids)

    @torch.inference_mode()
    def generate(
        self, batch, *, max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        seed: int = 42, first_row: int = 0, on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """New token ids of each prompt, without the end token.

        batch: a `data.Batch` of prompts on the model's device (encode them with `for_generation=True`).
        temperature: 0 is greedy; see `sample` for the others.
        seed, first_row: sequence b draws its random numbers from (seed, first_row + b), whatever it is batched with.
        on_token: is called with (sequence, token id) as soon as the token is known.
        """
        decoder, count = self.model.model.language_model, len(batch.cu_seqlens) - 1
        answers: list[list[int]] = [[] for _ in range(count)]
        random = [np.random.default_rng([seed, first_row + b]) for b in range(count)]
        running = list(range(count))
        with KVCache(decoder, batch.cu_seqlens, batch.position_ids, min(max_new_tokens, 256)) as cache:
            x, _ = self.model.hidden_states(batch)
            x = x[[end - 1 for end in batch.cu_seqlens[1:]]]
            for left in reversed(range(max_new_tokens)):
                logits = self.model.lm_head(x)
                if temperature == 0:
                    token_ids = logits.argmax(-1)
                else:
                    uniform = torch.tensor([1 - random[s].random() for s in running], device=logits.device)
                    token_ids = sample(logits, uniform, temperature, top_k, top_p)
                if not logits.gather(1, token_ids[:, None]).isfinite().all():  # NaN counts as the largest
                    raise InputError("the logits are not finite: look for damaged weights, or try another --dtype")
                stay = []
                for b, token in enumerate(token_ids.tolist()):
                    if token not in self.end_token_ids:
                        stay.append(b)
                        answers[running[b]].append(token)
                        if on_token:
                            on_token(running[b], token)
                if not stay or not left:
                    return answers
                if len(stay) < len(running):
                    running = [running[b] for b in stay]
                    token_ids = token_ids[stay]
                    cache.keep(stay)
                x = cache.step(token_ids)
        return answers


# ---- loading -------------------------------------------------------------------------------------------------------


def load_model(hf_dir: str | Path, load: str | Path | None = None, dtype: str | None = None) -> Qwen3VL:
    """The model on `kernels_npu.ops`'s device, with the weights of a Hugging Face directory or of a DCP checkpoint.

    `dtype` ('bfloat16', ...) defaults to config.json's on an accelerator, to float32 on a CPU. Raises InputError.
    """
    config, ops = Qwen3VLConfig.from_json(hf_dir), kernels_npu.ops
    if dtype is None and ops.is_accelerator:
        dtype = config.dtype or str(ops.compute_dtype).removeprefix("torch.")
    dtype = dtype or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"{Path(hf_dir) / 'config.json'}: dtype is {dtype!r}: choose one with --dtype")
    source = convert.CheckpointWeights(convert.find_checkpoint(load)) if load else convert.HuggingFaceWeights(hf_dir)
    model = build_model(config).to(getattr(torch, dtype))
    source.check_compatible(model)  # before memory is taken for what may not fit together
    model.to_empty(device=ops.device).requires_grad_(False)
    convert.load_weights(model, source)
    ops.prepare_for_decoding(model)
    return model


def end_token_ids(hf_dir: str | Path, processor: data.Processor) -> set[int]:
    """Where answers end: `eos_token_id` (one or several) of generation_config.json, else of config.json, else
    <|im_end|>. Raises InputError if it is not made of whole numbers."""
    for path in (Path(hf_dir) / "generation_config.json", Path(hf_dir) / "config.json"):
        if not path.exists():
            continue
        config = read_json(path)
        text = config.get("text_config")
        ids = config.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(type(i) is int for i in ids):
            raise InputError(f"{path}: eos_token_id is {shorten(ids)}, it must be a token id or a list of them")
        if ids:
            return set(ids)
    return {processor.im_end_token_id}


class TextStream:
    """An answer's text as its tokens come, in whole characters: a token may end in the middle of one."""

    def __init__(self, processor: data.Processor):
        self.processor, self.pending = processor, []

    def push(self, token_id: int) -> str:
        """The text that is certain now: nothing while the last character may be incomplete."""
        self.pending.append(token_id)
        return "" if self.processor.decode(self.pending).endswith("\ufffd") else self.rest()

    def rest(self) -> str:
        """What is held back still."""
        text, self.pending = self.processor.decode(self.pending), []
        return text


# ---- the program ---------------------------------------------------------------------------------------------------


class Answerer:
    """The processor and, loaded when first needed, the model that the command line names."""

    def __init__(self, args: argparse.Namespace):
        Qwen3VLConfig.from_json(args.model)  # its mistakes are told first
        self.args = args
        self.processor = data.Processor(args.model, **data.media_limits(args))
        self.end_token_ids = end_token_ids(args.model, self.processor)
        for name in (args.text_attn_implementation, args.vision_attn_implementation):
            kernels_npu.ops.attention_implementation(name)  # what is not available is told before the weights are read

    @functools.cached_property
    def generator(self) -> Generator:
        began = time.perf_counter()
        model = load_model(self.args.model, self.args.load, self.args.dtype)
        model.set_attention(self.args.text_attn_implementation, self.args.vision_attn_implementation)
        if self.args.verbose:
            print(f"load time: {time.perf_counter() - began:.2f} s", file=sys.stderr)
        return Generator(model, self.end_token_ids)

    def __call__(self, samples: list[data.Sample], first_row: int, on_token: Callable[[int, int], None] | None = None):
        """Answers' token ids. With --verbose, prints the figures."""
        args, generator, times = self.args, self.generator, []

        def note(sequence: int, token: int) -> None:
            times.append(time.perf_counter())
            if on_token:
                on_token(sequence, token)

        began = time.perf_counter()
        answers = generator.generate(
            data.collate(samples).to(kernels_npu.ops.device), max_new_tokens=args.max_new_tokens, seed=args.seed,
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, first_row=first_row, on_token=note)
        if args.verbose:
            first, rest = (times or [time.perf_counter()])[0] - began, times[-1] - times[0] if times else 0.0
            rate = f"{(len(times) - len(samples)) / rest:.1f}" if rest > 0 and len(times) > len(samples) else "-"
            prompt = sum(len(s.input_ids) for s in samples)
            tqdm.write(f"prompt tokens: {prompt} | time to first token: {first:.3f} s | new tokens: {len(times)} | "
                       f"tokens per second: {rate}", file=sys.stderr)
        return answers


def stream_answer(answer: Answerer, sample: data.Sample, turn: int) -> str:
    """Writes the answer to standard output as it comes, and returns it."""
    stream, pieces = TextStream(answer.processor), []

    def show(text: str) -> None:
        pieces.append(text)
        try:
            print(text, end="", flush=True)
        except OSError as e:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where Python tries again when it ends
            raise OSError(e.errno, e.strerror, "standard output") from e

    answer([sample], turn, lambda _, token: show(stream.push(token)))
    show(stream.rest() + "\n")
    return "".join(pieces)[:-1]


def questions(args: argparse.Namespace) -> Iterator[str]:
    """--prompt, and with --chat the lines of standard input that are not empty, each asked for when it is needed."""
    if args.prompt is not None:
        yield args.prompt
    while args.chat:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\r\n")


def answer_questions(args: argparse.Namespace, answer: Answerer) -> None:
    """Answers --prompt and the turns of --chat, each knowing the conversation so far."""
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    for turn, question in enumerate(questions(args)):
        try:
            question.encode()
        except UnicodeEncodeError as e:  # bytes that came as halves of surrogate pairs
            raise InputError(f"question {turn + 1}, {question[:100]!r}, is not UTF-8") from e
        messages.append({"role": "user", "content": question})
        row = {"messages": messages, "images": args.image, "videos": args.video}
        sample = answer.processor.encode(row, media_dir=".", options=FOR_GENERATION)
        messages.append({"role": "assistant", "content": stream_answer(answer, sample, turn)})


def output_line(row: dict, prediction: str) -> bytes:
    """The line of an answered row. Half a surrogate pair, which JSON allows, is written as it came: escaped."""
    row = {key: value for key, value in row.items() if key != "prediction"} | {"prediction": prediction}
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def resume(output: Path, rows: data.RowDataset) -> int:
    """How many rows an earlier run has answered; a half-written last line is cut off.

    Raises InputError if the file holds anything else than answers to the first rows.
    """
    if not output.exists():
        return 0
    if not output.is_file():  # a device may be read without end
        raise InputError(f"{output} is not a regular file: name another --output")
    done = end = 0
    with open(output, "r+b") as file:
        for line in file:
            row = rows[done][0] if done < len(rows) else None
            head = output_line(row, "")[:-3] if isinstance(row, dict) else b"\n"  # up to where the prediction begins
            whole = line.endswith(b"\n")
            if line[: len(head)] != (head if whole else head[: len(line)]) or (whole and not line.endswith(b'"}\n')):
                raise InputError(f"{output} line {done + 1} is not the answer to {rows.paths[0]} row {done + 1}: "
                                 "it comes from another --input; name another --output, or remove it")
            if whole:
                done, end = done + 1, end + len(line)
        file.truncate(end)
    return done


def append(output: str, line: bytes) -> None:
    """Adds to the file. Raises InputError."""
    try:
        with open(output, "ab") as file:
            file.write(line)
    except OSError as e:
        raise InputError(f"{output}: {e.strerror}; with that mended, the same command goes on where this one "
                         "ended") from e


def answer_rows(args: argparse.Namespace, answer: Answerer) -> None:
    """Answers --input into --output, a line for each row; a bad row ends it after the rows before it are answered."""
    rows = data.RowDataset([args.input], args.dataset_dir)
    done = resume(Path(args.output), rows)
    if done == len(rows):
        print(f"{args.output} already has the answers to all {done} rows", file=sys.stderr)
        return
    append(args.output, b"")  # what cannot be written is told before the weights are read
    with tqdm(total=len(rows), initial=done, desc="answering", unit="row") as bar:
        while done < len(rows):
            todo, samples, mistake = [], [], None
            for i in range(done, min(done + args.batch_size, len(rows))):
                try:
                    row, source, media_dir = rows[i]
                    samples.append(answer.processor.encode(
                        row, media_dir=media_dir, source=source, options=FOR_GENERATION))
                except InputError as e:
                    mistake = e
                    break
                todo.append(row)
            for row, ids in zip(todo, answer(samples, done) if samples else (), strict=True):
                append(args.output, output_line(row, answer.processor.decode(ids)))
                bar.update()
            if mistake:
                raise mistake
            done += len(todo)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line, checked as far as it can be without reading a file. Raises UsageError."""
    p = Parser(prog="infer.py", description=__doc__.split("\n\n")[0])
    count = number(int, 1)

    g = p.add_argument_group("model")
    g.add_argument("--model", required=True, metavar="DIR", help="Hugging Face directory")
    g.add_argument("--load", metavar="ITER_DIR", help="take the weights from this DCP checkpoint, all else from "
                   "--model")
    g.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights and the computation "
                   "(default: the configuration's on an accelerator, float32 on a CPU)")
    g.add_argument("--device", choices=kernels_npu.DEVICES, default="auto", help="where to run")
    g.add_argument("--text-attn-implementation", choices=kernels_npu.ATTENTION, help="attention of the text decoder on "
                   "the prompt; new tokens use sdpa with the cache (default: the device's fastest)")
    g.add_argument("--vision-attn-implementation", choices=kernels_npu.ATTENTION, help="attention of the vision "
                   "encoder (default: the device's fastest)")

    g = p.add_argument_group("one question, or a conversation")
    g.add_argument("--prompt", metavar="TEXT", help="the question; <image> and <video> place the media, else they come "
                   "first")
    g.add_argument("--image", action="append", metavar="FILE", default=[], help="a picture; can be given several times")
    g.add_argument("--video", action="append", metavar="FILE", default=[], help="a video, or a folder of frames; can "
                   "be given several times")
    g.add_argument("--system", metavar="TEXT", help="system turn (default: none)")
    g.add_argument("--chat", action="store_true", help="answer each line of standard input, turn after turn; the media "
                   "belong to the first turn")

    g = p.add_argument_group("a file of questions")
    g.add_argument("--input", metavar="FILE", help="rows, JSON or JSON lines; a last answer is left out")
    g.add_argument("--output", metavar="FILE", help="gets the rows with `prediction` added, as JSON lines; answers "
                   "that it holds already are kept")
    g.add_argument("--dataset-dir", metavar="DIR", help="the rows' media paths are relative to it (default: the file's "
                   "own folder)")
    g.add_argument("--batch-size", type=count, metavar="N", help="rows answered at a time (default: 1)")

    g = p.add_argument_group("answers")
    g.add_argument("--max-new-tokens", type=count, default=128, metavar="N", help="longest answer")
    g.add_argument("--temperature", type=number(float, 0), default=0.0, metavar="X", help="0: always the likeliest "
                   "token; above: draw, more freely the higher")
    g.add_argument("--top-k", type=number(int, 0), default=0, metavar="N", help="draw from the N likeliest tokens "
                   "only; 0: all")
    g.add_argument("--top-p", type=number(float, 0, 1, above=True), default=1.0, metavar="X", help="draw from the "
                   "fewest tokens that have this share of the probability; 1: all")
    g.add_argument("--seed", type=number(int, 0), default=42, metavar="N", help="of the draws")

    data.add_media_flags(p.add_argument_group("pictures and videos"))

    p.add_argument("--verbose", action="store_true", help="figures on standard error")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = p.parse_args(argv)

    if args.input is None:
        if args.prompt is None and not args.chat:
            raise UsageError("nothing to answer: give --prompt, --chat or --input")
        useless = ("output", "dataset_dir", "batch_size")
    else:
        if args.output is None:
            raise UsageError("--input needs --output: give the file that gets the answers")
        useless = ("prompt", "image", "video", "system", "chat")
    for name in useless:
        if getattr(args, name):
            have = "without --input" if args.input is None else "with --input, whose rows bring their own"
            raise UsageError(f"--{name.replace('_', '-')} has no effect {have}: leave it out")
    data.media_limits(args)  # a minimum above its maximum is told now
    args.batch_size = args.batch_size or 1
    return args


def main(argv: list[str]) -> None:
    """The command line: see the module's docstring."""
    args = parse_args(argv)
    sys.stdout.reconfigure(encoding="utf-8")
    if args.chat:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # answers come before a bad line
    kernels_npu.select(args.device, getattr(torch, args.dtype) if args.dtype else None)
    (answer_questions if args.input is None else answer_rows)(args, Answerer(args))


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGPIPE):  # end quietly: every finished line is on disk
        signal.signal(ending, signal.SIG_DFL)
    sys.exit(run_program(main, sys.argv[1:]))
