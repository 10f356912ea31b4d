"""Answer questions about images and videos with a Hugging Face directory or a training run's checkpoint.

    python infer.py --model DIR --image a.jpg --prompt "What is this?"
    python infer.py --model DIR --input questions.jsonl --output answers.jsonl --batch-size 8
    python infer.py --model DIR --image a.jpg --chat

Other programs can use `Generator`: packed prompts in, token ids out. Standard output gets only the answers; they are
streamed, and a newline ends each.

Shapes: B alive sequences, L cached tokens, H heads, K key-value heads, d head size, D hidden size, V vocabulary.
"""
from __future__ import annotations

import argparse
import functools
import itertools
import json
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
from common import InputError, Parser, UsageError, number, read_json, run_program
from model import Qwen3VL, Qwen3VLConfig, TextModel, build_model

# ---- generation ----------------------------------------------------------------------------------------------------


class KVCache:
    """Hold the keys and values [B, K, L, d] of every text layer. A `with` block replaces the layers' `attention` seam.

    All sequences end in the same column, and shorter sequences begin later. So the next tokens of all sequences fill
    one column, and a mask hides the columns before each sequence's start. The longest sequences come first. Attention
    takes one call for each group of similar lengths, so that a long sequence does not slow down short ones.
    """

    def __init__(self, decoder: TextModel, cu_seqlens: list[int], position_ids: Tensor, reserve: int):
        """Take the prompts' `cu_seqlens` and position_ids [3, T]; reserve columns for that many new tokens."""
        self.decoder, self.layers = decoder, [layer.self_attn for layer in decoder.layers]
        lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
        self.length = max(lengths)  # columns in use
        self.order = sorted(range(len(lengths)), key=lambda b: -lengths[b])  # the prompt of each sequence
        self.starts = [self.length - lengths[b] for b in self.order]
        # a new token's position is one above the largest so far, the same on all three axes
        largest = [p.max() for p in position_ids.split(lengths, dim=1)]
        self.positions = torch.stack(largest)[self.order] + 1  # [B], the next token's
        self.keys: list[Tensor] = [position_ids.new_empty(0)] * len(self.layers)
        self.values = list(self.keys)
        self.resize(self.length + reserve)

    def __enter__(self) -> KVCache:
        self.defaults = [layer.attention for layer in self.layers]
        for i, (layer, attention) in enumerate(zip(self.layers, self.defaults, strict=True)):
            layer.attention = functools.partial(self.prefill, i, attention)
        return self

    def __exit__(self, *exception) -> None:
        for layer, attention in zip(self.layers, self.defaults, strict=True):
            layer.attention = attention

    def resize(self, capacity: int) -> None:
        """Grow to `capacity` columns."""
        self.capacity = capacity
        for buffers in (self.keys, self.values):
            for i, old in enumerate(buffers):
                if old.numel():  # empty before the prompts have passed
                    buffers[i] = F.pad(old, (0, 0, 0, capacity - old.shape[2]))
        columns = torch.arange(capacity, device=self.positions.device)
        # a position is never above its column, as an image adds no more to the positions than it has tokens
        dtype = self.decoder.norm.weight.dtype
        self.tables = [t.to(dtype) for t in self.decoder.rotary_tables(columns.expand(3, -1))]
        self.regroup()

    def regroup(self) -> None:
        """Divide the sequences into groups of similar lengths: their slice, first column, and mask or None.

        A mask [B, 1, 1, L] begins in the group's first column, so that its memory stays aligned for fused attention.
        """
        lengths = [self.length - start for start in self.starts]
        firsts = [0]
        for b, n in enumerate(lengths):
            if lengths[firsts[-1]] > 2 * n + 256:  # for less, a second call takes longer than the columns
                firsts.append(b)
        self.groups: list[tuple[slice, int, Tensor | None]] = []
        for first, end in itertools.pairwise([*firsts, len(lengths)]):
            column, mask = self.starts[first], None
            if self.starts[end - 1] > column:
                starts = torch.tensor(self.starts[first:end], device=self.positions.device)
                columns = torch.arange(column, self.capacity, device=starts.device)
                mask = self.decoder.norm.weight.new_zeros(len(starts), 1, 1, len(columns))
                mask.masked_fill_((columns < starts[:, None])[:, None, None], float("-inf"))
            self.groups.append((slice(first, end), column, mask))

    def prefill(
        self, i: int, attention: Callable, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: list[int], causal: bool
    ) -> Tensor:
        """Store the prompts' k and v [T, K, d] of layer i and compute their attention; then use `decode`."""
        for buffers, new in ((self.keys, k), (self.values, v)):
            # zeros, because a masked weight of 0 times a NaN in uninitialised memory is NaN
            buffers[i] = new.new_zeros(len(self.starts), new.shape[1], self.capacity, new.shape[2])
            for b, prompt in enumerate(self.order):
                start, end = cu_seqlens[prompt : prompt + 2]
                buffers[i][b, :, self.starts[b] : self.length] = new[start:end].transpose(0, 1)
        self.layers[i].attention = functools.partial(self.decode, i)
        return attention(q, k, v, cu_seqlens, causal=causal)

    def decode(self, i: int, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: None, causal: bool) -> Tensor:
        """Compute the attention of layer i for one token of each sequence, q [B, H, d], on all tokens so far."""
        keys, values = (buffers[i][:, :, : self.length] for buffers in (self.keys, self.values))
        keys[:, :, -1], values[:, :, -1] = k, v
        # Query heads that share a key-value head become its queries, so that no key or value is repeated.
        q = q.unflatten(1, (k.shape[1], -1))
        out = []
        for rows, column, mask in self.groups:
            mask = mask if mask is None else mask[..., : self.length - column]
            out.append(F.scaled_dot_product_attention(
                q[rows], keys[rows, :, column:], values[rows, :, column:], attn_mask=mask))
        return (torch.cat(out) if len(out) > 1 else out[0]).flatten(1, 2)

    def step(self, token_ids: Tensor) -> Tensor:
        """Append a token to each sequence: token_ids [B] -> hidden states [B, D] after the last norm."""
        if self.length == self.capacity:
            self.resize(2 * self.capacity)
        self.length += 1
        cos, sin = (table[self.positions] for table in self.tables)
        x = self.decoder.embed_tokens(token_ids)
        for layer in self.decoder.layers:
            x, _ = layer(x, cos, sin, None)
        self.positions += 1
        return self.decoder.norm(x)

    def select(self, sequences: list[int]) -> None:
        """Keep these sequences, in rising order; drop the others and the columns that only they used."""
        index = torch.tensor(sequences, device=self.positions.device)
        self.positions = self.positions[index]
        unused = self.starts[sequences[0]]
        self.starts = [self.starts[b] - unused for b in sequences]
        self.length -= unused
        for buffers in (self.keys, self.values):
            buffers[:] = [old[index, :, unused:] for old in buffers]
        self.capacity -= unused
        self.regroup()


# type of the flag, default of the flag, and transformers' default for a generation_config.json that does not have it
SAMPLING: dict[str, tuple[Callable[[str], float], float, float]] = {
    "temperature": (number(float, 0), 0.0, 1.0),
    "top_k": (number(int, 0), 0, 50),
    "top_p": (number(float, 0, 1, above=True), 1.0, 1.0),
    "repetition_penalty": (number(float, 0, above=True), 1.0, 1.0),
    "presence_penalty": (number(float, -2, 2), 0.0, 0.0),
}

# settings of generation_config.json that are not supported, with the value that has no effect
UNSUPPORTED = {"min_p": 0, "typical_p": 1, "frequency_penalty": 0, "no_repeat_ngram_size": 0, "num_beams": 1}


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Draw a token for each row of logits [B, V], given uniform random numbers [B] in (0, 1] -> [B].

    The order is that of transformers: temperature, then the `top_k` likeliest tokens (0: all), then the fewest of them
    whose probabilities reach `top_p` (nucleus sampling, arXiv:1904.09751).
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


PROMPT, ANSWER = 1, 2  # the values of `used` below; 0 for a token that has not occurred


def penalise(logits: Tensor, used: Tensor, repetition: float, presence: float) -> Tensor:
    """Penalise the tokens that a sequence has used: logits [B, V], used [B, V] int8 -> float32 [B, V].

    As in transformers, the logits of all used tokens are divided by `repetition` if positive, else multiplied by it
    (arXiv:1909.05858). Then, as in vLLM, `presence` is subtracted from the logits of tokens in the answer.
    """
    logits = logits.float()
    scaled = torch.where(logits < 0, logits * repetition, logits / repetition)
    return torch.where(used > 0, scaled, logits) - presence * (used == ANSWER)


class Generator:
    """Generate answers: one forward over the packed prompts, then one token of each sequence at a time.

    A sequence that has ended leaves the batch.
    """

    def __init__(self, model: Qwen3VL, end_token_ids: Collection[int]):
        self.model, self.end_token_ids = model, frozenset(end_token_ids)

    @torch.inference_mode()
    def generate(
        self, batch, *, max_new_tokens: int = 128, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
        repetition_penalty: float = 1.0, presence_penalty: float = 0.0, seed: int = 42, first_row: int = 0,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Return the new token ids of each prompt, without the end token.

        batch: a `data.Batch` on the model's device, encoded with `for_generation`.
        temperature: 0 is greedy. `sample` and `penalise` describe the other settings.
        seed, first_row: sequence b draws random numbers from (seed, first_row + b), however it is batched.
        on_token: called with (sequence, token id) as soon as a token is known.
        """
        decoder, count = self.model.model.language_model, len(batch.cu_seqlens) - 1
        answers: list[list[int]] = [[] for _ in range(count)]
        random = [np.random.default_rng([seed, first_row + b]) for b in range(count)]
        has_penalty = repetition_penalty != 1 or presence_penalty != 0
        if has_penalty:
            used = batch.input_ids.new_zeros(count, self.model.lm_head.out_features, dtype=torch.int8)
            used[batch.sample_ids, batch.input_ids] = PROMPT
        with KVCache(decoder, batch.cu_seqlens, batch.position_ids, reserve=min(max_new_tokens, 256)) as cache:
            x, _ = self.model.hidden_states(batch)
            alive = list(cache.order)
            x = x[[batch.cu_seqlens[b + 1] - 1 for b in alive]]
            if has_penalty:
                used = used[alive]
            for remaining in reversed(range(max_new_tokens)):
                logits = self.model.lm_head(x)
                if has_penalty:
                    logits = penalise(logits, used, repetition_penalty, presence_penalty)
                token_ids = kernels_npu.ops.argmax(logits)  # a NaN if there is one
                if not logits.gather(1, token_ids[:, None]).isfinite().all():
                    raise InputError("the logits are not finite: check the weights, or give another --dtype")
                if temperature > 0:
                    uniform = torch.tensor([1 - random[s].random() for s in alive], device=logits.device)
                    token_ids = sample(logits, uniform, temperature, top_k, top_p)
                still_alive = []
                for b, token in enumerate(token_ids.tolist()):
                    if token not in self.end_token_ids:
                        still_alive.append(b)
                        answers[alive[b]].append(token)
                        if on_token:
                            on_token(alive[b], token)
                if not still_alive or not remaining:
                    return answers
                if len(still_alive) < len(alive):
                    alive = [alive[b] for b in still_alive]
                    token_ids = token_ids[still_alive]
                    cache.select(still_alive)
                    if has_penalty:
                        used = used[still_alive]
                if has_penalty:
                    used.scatter_(1, token_ids[:, None], ANSWER)
                x = cache.step(token_ids)
        return answers


# ---- loading -------------------------------------------------------------------------------------------------------


def load_model(hf_dir: str | Path, load: str | Path | None = None, dtype: str | None = None) -> Qwen3VL:
    """Load a Hugging Face directory onto `kernels_npu.ops`'s device; `load` names a DCP checkpoint with the weights.

    The adapters of a checkpoint are merged into the weights.

    `dtype` ('bfloat16', ...) defaults to config.json's on an accelerator, to float32 on a CPU. Raises InputError.
    """
    config, ops = Qwen3VLConfig.from_json(hf_dir), kernels_npu.ops
    if dtype is None and ops.is_accelerator:
        dtype = config.dtype or str(ops.compute_dtype).removeprefix("torch.")
    dtype = dtype or "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"{Path(hf_dir) / 'config.json'}: dtype {dtype!r} is not supported: give --dtype")
    source = convert.open_checkpoint(load, hf_dir) if load else convert.HuggingFaceWeights(hf_dir)
    model = build_model(config, is_frozen=lambda name: True)
    for p in model.parameters():
        p.data = p.data.to(getattr(torch, dtype))  # buffers keep their own type
    ops.compute_dtype = getattr(torch, dtype)  # the default attention depends on it
    source.check_compatible(model)  # before memory is allocated
    model.to_empty(device=ops.device)
    convert.load_weights(model, source)
    ops.prepare_for_decoding(model)
    return model


def sampling_settings(args: argparse.Namespace) -> dict[str, float]:
    """Return the SAMPLING arguments of `Generator.generate`: a flag's, the generation_config.json's, or the default.

    The file counts with --use-generation-config only, and is read as transformers does. Raises InputError.
    """
    settings = {name: default for name, (_, default, _) in SAMPLING.items()}
    if args.use_generation_config:
        path = Path(args.model, "generation_config.json")
        config = read_json(path)
        for name, (parse, _, assumed) in SAMPLING.items():
            value = config.get(name)
            try:
                settings[name] = assumed if value is None else parse(str(value))
            except argparse.ArgumentTypeError as e:
                raise InputError(f"{path}: {name}: {e}") from e
        for name, neutral in UNSUPPORTED.items():
            if config.get(name, neutral) not in (None, neutral):
                raise InputError(f"{path}: {name} is not supported: remove it, or leave out --use-generation-config")
        if not config.get("do_sample"):
            settings["temperature"] = 0.0
    return settings | {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}


class TextStream:
    """Decode an answer token by token into whole characters, as a token may end within a character."""

    def __init__(self, processor: data.Processor):
        self.processor, self.pending = processor, []

    def push(self, token_id: int) -> str:
        """Return the text that is complete after this token; it is empty while the last character may be incomplete."""
        self.pending.append(token_id)
        return "" if self.processor.decode(self.pending).endswith("\ufffd") else self.flush()

    def flush(self) -> str:
        """Return the text of the pending tokens."""
        text, self.pending = self.processor.decode(self.pending), []
        return text


# ---- the program ---------------------------------------------------------------------------------------------------


class Answerer:
    """Hold the processor and the model of the command line. The first answer loads the model."""

    def __init__(self, args: argparse.Namespace):
        Qwen3VLConfig.from_json(args.model)  # report its errors first
        self.args, self.sampling = args, sampling_settings(args)
        stored = convert.read_settings(convert.find_checkpoint(args.load)).get("media_limits", {}) if args.load else {}
        given = data.media_limits(args)
        inherited = {name: value for name, value in stored.items() if name not in given}
        if inherited:
            print(f"as in the training run of {args.load}: {data.describe_limits(inherited)}", file=sys.stderr)
        self.processor = data.Processor(args.model, enable_thinking=args.enable_thinking, **inherited, **given)
        self.generator: Generator | None = None

    def encode(self, row: dict, media_dir: str | Path, source: str = "") -> data.Sample:
        options = data.EncodeOptions(for_generation=True)
        return self.processor.encode(row, media_dir=media_dir, source=source, options=options)

    def load(self) -> None:
        args, start = self.args, time.perf_counter()
        model = load_model(args.model, args.load, args.dtype)
        model.set_attention(args.text_attn_implementation, args.vision_attn_implementation)
        self.generator = Generator(model, self.processor.end_token_ids)
        if args.verbose:
            print(f"load time: {time.perf_counter() - start:.2f} s", file=sys.stderr)

    def answer(
        self, samples: list[data.Sample], first_row: int, on_token: Callable[[int, int], None] | None = None
    ) -> list[list[int]]:
        """Return the answers' token ids (see `Generator.generate`). With --verbose, print the figures."""
        if self.generator is None:
            self.load()
        args, times = self.args, []

        def record(sequence: int, token: int) -> None:
            times.append(time.perf_counter())
            if on_token:
                on_token(sequence, token)

        start = time.perf_counter()
        answers = self.generator.generate(
            data.collate(samples).to(kernels_npu.ops.device), max_new_tokens=args.max_new_tokens, seed=args.seed,
            **self.sampling, first_row=first_row, on_token=record)
        if args.verbose:
            prompt = sum(len(s.input_ids) for s in samples)
            first = (times[0] if times else time.perf_counter()) - start
            later = len(times) - len(samples)  # tokens after the first of each answer
            rate = f"{later / (times[-1] - times[0]):.1f}" if later > 0 else "-"
            tqdm.write(f"prompt tokens: {prompt} | time to first token: {first:.3f} s | new tokens: {len(times)} | "
                       f"tokens per second: {rate}", file=sys.stderr)
        return answers


def stream_answer(answerer: Answerer, sample: data.Sample, turn: int) -> str:
    """Print the answer as it is generated, and return it."""
    stream, parts = TextStream(answerer.processor), []

    def show(text: str) -> None:
        parts.append(text)
        print(text, end="", flush=True)

    answerer.answer([sample], turn, lambda _, token: show(stream.push(token)))
    show(stream.flush())
    print(flush=True)
    return "".join(parts)


def questions(args: argparse.Namespace) -> Iterator[str]:
    """Yield --prompt, then, with --chat, the lines of standard input that are not empty."""
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


def answer_questions(args: argparse.Namespace, answerer: Answerer) -> None:
    """Answer --prompt and the turns of --chat, each with the conversation so far."""
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    for turn, question in enumerate(questions(args)):
        messages.append({"role": "user", "content": question})
        sample = answerer.encode({"messages": messages, "images": args.image, "videos": args.video}, media_dir=".")
        answer = stream_answer(answerer, sample, turn)
        if answerer.processor.template.answer_prefix.endswith("<think>\n") and "</think>" not in answer:
            answer += "</think>"  # the thought was cut off: the next prompt must not hold it as an answer
        messages.append({"role": "assistant", "content": answer})


def output_line(row: object, key: str, text: str) -> bytes:
    """Return the row's line, with `key` ("prediction" or "error") as its last; a row that is no object has no other."""
    items = row.items() if isinstance(row, dict) else ()
    row = {name: value for name, value in items if name not in ("prediction", "error")} | {key: text}
    # JSON allows half of a surrogate pair, UTF-8 does not: the half stays escaped
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def line_starts(rows: data.RowDataset, number: int) -> tuple[bytes, ...]:
    """Return how a row's line can start: up to the text of its prediction or error. There is no row after the last."""
    if number >= len(rows):
        return ()
    try:
        row = rows[number][0]
    except InputError:
        row = None
    return tuple(output_line(row, key, "")[:-3] for key in ("prediction", "error"))


def resume(output: Path, rows: data.RowDataset) -> int:
    """Return how many rows an earlier run has answered, and cut off a half-written last line.

    Raises InputError if a line is not the answer to its row.
    """
    if not output.is_file():
        return 0
    answered = end = 0
    with open(output, "r+b") as file:
        for number, line in enumerate(file):
            is_complete = line.endswith(b"\n")
            starts = line_starts(rows, number)
            if not line.startswith(starts) and (is_complete or not any(start.startswith(line) for start in starts)):
                raise InputError(f"{output} line {number + 1} is not the answer to {rows.paths[0]} row {number + 1}: "
                                 "give another --output, or remove the file")
            if is_complete:
                answered, end = number + 1, end + len(line)
        file.truncate(end)
    return answered


def append(output: str, line: bytes) -> None:
    """Append a line to the file. Raises InputError."""
    try:
        with open(output, "ab") as file:
            file.write(line)
    except OSError as e:
        raise InputError(f"{output}: {e.strerror}: once this is fixed, the same command resumes") from e


def answer_rows(args: argparse.Namespace, answerer: Answerer) -> None:
    """Answer --input into --output, one line per row.

    A bad row ends its batch, so that the numbers of a batch's rows are consecutive. Its error is then raised, or
    written with --on-bad-sample skip.
    """
    rows = data.RowDataset([args.input], args.dataset_dir)
    done = resume(Path(args.output), rows)
    if done == len(rows):
        print(f"{args.output} already has the answers to all {done} rows", file=sys.stderr)
        return
    skipped = 0
    append(args.output, b"")  # fail before the weights are loaded if the file cannot be written
    with tqdm(total=len(rows), initial=done, desc="answering", unit="row") as bar:
        while done < len(rows):
            batch_rows, samples, error = [], [], None
            for i in range(done, min(done + args.batch_size, len(rows))):
                row = None
                try:
                    row, source, media_dir = rows[i]
                    samples.append(answerer.encode(row, media_dir, source))
                except InputError as e:
                    error = e
                    break
                batch_rows.append(row)
            answers = answerer.answer(samples, done) if samples else []
            for answered_row, ids in zip(batch_rows, answers, strict=True):
                append(args.output, output_line(answered_row, "prediction", answerer.processor.decode(ids)))
                bar.update()
            done += len(batch_rows)
            if error and args.on_bad_sample != "skip":
                raise error
            if error:
                append(args.output, output_line(row, "error", str(error)))
                bar.update()
                done, skipped = done + 1, skipped + 1
    if skipped:
        print(f"{skipped} rows were skipped: their lines in {args.output} have `error` in place of `prediction`",
              file=sys.stderr)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line and check what needs no file. Raises UsageError."""
    p = Parser(prog="infer.py", description=__doc__.split("\n\n")[0])
    positive = number(int, 1)

    g = p.add_argument_group("model")
    g.add_argument("--model", required=True, metavar="DIR", help="Hugging Face directory")
    g.add_argument("--load", metavar="ITER_DIR", help="DCP checkpoint to load the weights from; --model gives the "
                   "configuration and the tokenizer")
    g.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="type of weights and computation "
                   "(default: the configuration's on an accelerator, float32 on a CPU)")
    g.add_argument("--device", choices=kernels_npu.DEVICES, default="auto", help="device to run on")
    g.add_argument("--text-attn-implementation", choices=kernels_npu.ATTENTION, help="attention of the text decoder on "
                   "the prompt; new tokens use sdpa with the cache (default: the device's fastest)")
    g.add_argument("--vision-attn-implementation", choices=kernels_npu.ATTENTION, help="attention of the vision "
                   "encoder (default: the device's fastest)")

    g = p.add_argument_group("one question, or a conversation")
    g.add_argument("--prompt", metavar="TEXT", help="question; <image> and <video> place the media, which otherwise "
                   "come first")
    g.add_argument("--image", action="append", metavar="FILE", default=[], help="image; can be repeated")
    g.add_argument("--video", action="append", metavar="FILE", default=[], help="video or folder of frames; can be "
                   "repeated")
    g.add_argument("--system", metavar="TEXT", help="system message (default: none)")
    g.add_argument("--chat", action="store_true", help="answer each line of standard input as the next turn; the media "
                   "belong to the first turn")

    g = p.add_argument_group("a file of questions")
    g.add_argument("--input", metavar="FILE", help="rows to answer, JSON or JSON lines; a last answer is left out")
    g.add_argument("--output", metavar="FILE", help="file for the rows with their `prediction`, JSON lines; rows "
                   "that it already holds are not answered again")
    g.add_argument("--dataset-dir", metavar="DIR", help="directory of the rows' media paths (default: that of --input)")
    g.add_argument("--batch-size", type=positive, metavar="N", help="number of rows answered at a time (default: 1)")
    g.add_argument("--on-bad-sample", choices=("error", "skip"), help="a row that cannot be used ends the program, or "
                   "is skipped: its line in --output gets the key `error` (default: error)")

    g = p.add_argument_group("answers")
    g.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="maximum length of an answer")
    for name, text in (
        ("temperature", "sampling temperature; 0 is greedy"),
        ("top_k", "sample from the N likeliest tokens; 0: from all"),
        ("top_p", "sample from the fewest tokens whose probabilities reach X; 1: from all"),
        ("repetition_penalty", "divide the positive logits of tokens in the prompt or the answer by X, and multiply "
                               "their negative logits by X"),
        ("presence_penalty", "subtract X from the logits of tokens in the answer"),
    ):
        parse, default, _ = SAMPLING[name]
        g.add_argument(f"--{name.replace('_', '-')}", type=parse, metavar="N" if name == "top_k" else "X",
                       help=f"{text} (default: {default})")
    g.add_argument("--use-generation-config", action="store_true", help="take these five settings from the model's "
                   "generation_config.json where their flags are not given; without this flag, only its end tokens are "
                   "used")
    g.add_argument("--seed", type=number(int, 0), default=42, metavar="N", help="seed of the sampling")

    data.add_thinking_flag(g)

    data.add_media_flags(p.add_argument_group("images and videos"))

    p.add_argument("--verbose", action="store_true", help="print times and token counts to standard error")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = p.parse_args(argv)

    if args.input is None:
        if args.prompt is None and not args.chat:
            raise UsageError("nothing to answer: give --prompt, --chat or --input")
        unused = ("output", "dataset_dir", "batch_size", "on_bad_sample")
    else:
        if args.output is None:
            raise UsageError("--input needs --output: give the file that gets the answers")
        unused = ("prompt", "image", "video", "system", "chat")
    for name in unused:
        if getattr(args, name):
            reason = "without --input" if args.input is None else "with --input, whose rows have their own"
            raise UsageError(f"--{name.replace('_', '-')} has no effect {reason}: leave it out")
    data.media_limits(args)  # raises if a minimum is above its maximum
    args.batch_size = args.batch_size or 1
    return args


def main(argv: list[str]) -> None:
    """Run the command line (see the module's docstring)."""
    args = parse_args(argv)
    sys.stdout.reconfigure(encoding="utf-8")
    if args.chat:  # a line that is not UTF-8 raises when it is encoded, after the answers to the lines before it
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    ops = kernels_npu.select(args.device, getattr(torch, args.dtype) if args.dtype else None)
    for implementation in (args.text_attn_implementation, args.vision_attn_implementation):
        ops.attention_implementation(implementation)  # raises before the weights are loaded
    answerer = Answerer(args)
    if args.input is None:
        answer_questions(args, answerer)
    else:
        answer_rows(args, answerer)


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGPIPE):  # end without a traceback; every finished line is on disk
        signal.signal(ending, signal.SIG_DFL)
    sys.exit(run_program(main, sys.argv[1:]))
