"""Fine-tunes Qwen3-VL, or trains one from scratch: flags, the loop, its log. `python train.py --help`.

    torchrun --nproc-per-node 8 train.py --init-from-hf-path DIR --dataset rows.json --save OUT --train-iters 1000

The loop is `train`, the loss's weights are `set_loss_weights`; everything before the loop is made once by `run`.
"""
from __future__ import annotations

import argparse
import contextlib
import fcntl
import itertools
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import common
import convert
import data
import kernels_npu
import parallel
from common import InputError, Parser, UsageError, number
from model import COMPONENTS, Qwen3VL, Qwen3VLConfig, component_of, parameter_table, step_flops, trainable_components

log = logging.getLogger("train")

# ---- flags ----------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line, checked as far as it can be without reading a file. Raises UsageError."""
    p = Parser(prog="train.py", description=__doc__.split("\n\n")[0])
    count, amount = number(int, 1), number(float, 0)
    share, positive, decay = number(float, 0, 1), number(float, 0, above=True), number(float, 0, 1, below=True)
    switch = argparse.BooleanOptionalAction

    g = p.add_argument_group("model")
    g.add_argument("--init-from-hf-path", required=True, metavar="DIR", help="Hugging Face directory: configuration, "
                   "tokenizer, preprocessors and, unless --init random or --load, the weights")
    g.add_argument("--init", choices=("weights", "random"), default="weights", help="random: train from scratch")
    g.add_argument("--init-model-with-meta-device", action=switch, default=True,
                   help="build without memory, then load each rank's slices; off: build on the CPU first (up to 10B "
                   "parameters)")
    g.add_argument("--text-attn-implementation", choices=kernels_npu.ATTENTION,
                   help="attention of the text decoder (default: the device's fastest)")
    g.add_argument("--vision-attn-implementation", choices=kernels_npu.ATTENTION,
                   help="attention of the vision encoder (default: the device's fastest)")
    g.add_argument("--use-npu-fused-moe", action=switch, help="torch_npu's fused mixture of experts (default: where "
                   "the device has it)")
    for tower in COMPONENTS:
        g.add_argument(f"--freeze-{tower.replace(' ', '-')}", action=switch, default=False,
                       help=f"do not train the {tower}" + " (merger and DeepStack mergers)" * ("projector" in tower))

    g = p.add_argument_group("data")
    g.add_argument("--dataset", metavar="A.json,B.jsonl", help="files of rows, comma-separated")
    g.add_argument("--dataset-dir", metavar="DIR", help="media paths are relative to it (default: the file's folder)")
    g.add_argument("--cache-dir", metavar="DIR", help="keeps the index of each dataset for the next start")
    g.add_argument("--max-samples", type=count, metavar="N", help="the first N rows of each dataset")
    g.add_argument("--seq-length", type=count, default=4096, metavar="N", help="the longest sample, in tokens; with "
                   "--packing, the longest row")
    g.add_argument("--packing", action=switch, default=False, help="fill each row to --seq-length with as many samples "
                   "as fit; batch sizes then count such rows")
    g.add_argument("--streaming", action=switch, default=False, help="read the datasets as training goes on, without "
                   "an index of their rows")
    g.add_argument("--shuffle-buffer", type=count, metavar="N", help="with --streaming, how many rows in a row are "
                   "shuffled among themselves (default: 1000)")
    g.add_argument("--num-workers", type=number(int, 0, 1024), default=2, metavar="N", help="loader processes per rank")
    g.add_argument("--shuffle", action=switch, default=True, help="a new order each epoch, from --seed")
    data.add_media_flags(g)
    data.add_row_flags(g)
    g.add_argument("--on-bad-sample", choices=("error", "skip"), default="error", help="skip: log it, count it, go on")

    g = p.add_argument_group("optimization")
    length = g.add_mutually_exclusive_group()
    length.add_argument("--train-iters", type=count, metavar="N", help="optimizer steps")
    length.add_argument("--train-epochs", type=number(float, 0, 1e6, above=True), metavar="X", help="passes over the "
                        "data")
    g.add_argument("--micro-batch-size", type=count, default=1, metavar="N", help="samples (with --packing, packed "
                   "rows) of one forward on one rank")
    g.add_argument("--global-batch-size", type=count, metavar="N", help="samples or packed rows of one step "
                   "(default: micro-batch size times data-parallel size); gradients are accumulated as needed")
    g.add_argument("--lr", type=amount, default=1e-5, help="peak learning rate")
    g.add_argument("--min-lr", type=amount, default=0.0, help="where the decay ends")
    g.add_argument("--vision-lr", type=amount, metavar="LR", help="peak learning rate of the vision encoder")
    g.add_argument("--projector-lr", type=amount, metavar="LR", help="peak learning rate of the projector")
    g.add_argument("--lr-decay-style", choices=("constant", "linear", "cosine"), default="cosine", help="after warm-up")
    warmup = g.add_mutually_exclusive_group()
    warmup.add_argument("--lr-warmup-iters", type=number(int, 0), default=0, metavar="N",
                        help="steps of linear warm-up")
    warmup.add_argument("--lr-warmup-fraction", type=share, metavar="X", help="the same as a share of all steps")
    g.add_argument("--weight-decay", type=amount, default=0.0, help="of every parameter")
    g.add_argument("--adam-beta1", type=decay, default=0.9, help="decay of the mean of gradients")
    g.add_argument("--adam-beta2", type=decay, default=0.999, help="decay of the mean of their squares")
    g.add_argument("--adam-eps", type=positive, default=1e-8, help="added to the root of the mean of squares")
    g.add_argument("--clip-grad", type=amount, default=1.0, metavar="X", help="largest gradient norm; 0: any")
    g.add_argument("--bf16", dest="compute_dtype", action="store_const", const=torch.bfloat16, help="compute in bf16")
    g.add_argument("--fp32", dest="compute_dtype", action="store_const", const=torch.float32, help="compute in "
                   "float32 (default: bf16 on an accelerator, float32 on a CPU; parameters are always float32)")
    g.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=42, help="of weights, order and random state")

    g = p.add_argument_group("loss")
    g.add_argument("--loss-type", choices=("default", "per_sample", "per_token"), default="default", help="mean over "
                   "each micro-batch's tokens, over each sample's, or over the global batch's")
    g.add_argument("--loss-chunk-size", type=number(int, 0), default=1024, metavar="N", help="tokens whose logits are "
                   "alive at once; 0: all")
    g.add_argument("--router-aux-loss-coef", type=amount, default=0.0, metavar="X", help="load balancing of experts")

    g = p.add_argument_group("checkpoints")
    g.add_argument("--load", metavar="DIR", help="DCP checkpoint: a save directory, one iteration, or a converted one")
    g.add_argument("--save", metavar="DIR", help="where iterations, metrics.jsonl and args.json go")
    g.add_argument("--save-interval", type=number(int, 0), default=0, metavar="N",
                   help="save every N iterations; 0: the last only")
    g.add_argument("--async-save", action=switch, default=False, help="train on while a copy of what is saved, on the "
                   "host, is written")
    g.add_argument("--save-retain", type=count, metavar="N", help="keep the newest N iterations (default: all)")
    for what, text in (("load-optim", "do not load the optimizer"), ("load-rng", "do not load the random state"),
                       ("save-optim", "do not save the optimizer"), ("save-rng", "do not save the random state")):
        g.add_argument(f"--no-{what}", action="store_true", help=text)
    g.add_argument("--finetune", action=switch, default=False, help="load weights only and start at iteration 0")

    g = p.add_argument_group("evaluation and logging")
    g.add_argument("--eval-dataset", metavar="F", help="held-out rows, as --dataset")
    g.add_argument("--eval-interval", type=count, metavar="N", help="evaluate so often (default: at the end)")
    g.add_argument("--eval-iters", type=count, metavar="N", help="micro-batches of a rank to evaluate (default: all)")
    g.add_argument("--log-interval", type=count, default=1, metavar="N", help="iterations between log lines")
    g.add_argument("--tensorboard-dir", metavar="DIR", help="write scalars for TensorBoard")
    g.add_argument("--profile-dir", metavar="DIR", help="write a torch.profiler trace of rank 0")
    g.add_argument("--profile-step-start", type=count, default=3, metavar="N", help="first iteration to profile")
    g.add_argument("--profile-step-end", type=count, default=5, metavar="N", help="last iteration to profile")
    g.add_argument("--debug", action="store_true", help="show a traceback with an error")

    g = p.add_argument_group("devices")
    g.add_argument("--device", choices=kernels_npu.DEVICES, default="auto", help="where to train")
    g.add_argument("--recompute", choices=("none", "full"), help="full: backward runs each block again instead of "
                   "keeping its inside (default: full on an accelerator)")
    g.add_argument("--activation-offload", action=switch, default=False, help="with recompute: each block's input "
                   "waits on the host for backward")
    g.add_argument("--context-parallel-size", type=count, default=1, metavar="N", help="ranks that split each sample's "
                   "tokens (Ulysses)")
    g.add_argument("--expert-parallel-size", type=count, default=1, metavar="N", help="ranks that split the experts")
    g.add_argument("--fsdp-size", type=count, metavar="N", help="ranks that parameters are sharded over, replicated "
                   "over the rest (default: all)")
    g.add_argument("--compile", action=switch, default=False, help="torch.compile each block")
    g.add_argument("--distributed-timeout-minutes", type=number(float, 0.05, 1e6), default=10, metavar="N",
                   help="how long a rank waits for the others")
    g.add_argument("--exit-duration-in-mins", type=positive, metavar="N", help="save and end so long "
                   "after the program's start")

    g = p.add_argument_group("dry run")
    g.add_argument("--dry-run", action=switch, default=False, help="train nothing: predict memory, traffic and FLOPs "
                   "of a rank, in one process, from config.json alone; --save writes dry_run.json")
    g.add_argument("--world-size", type=count, metavar="N", help="ranks that a dry run imagines")
    g.add_argument("--device-memory", type=positive, metavar="GIB", help="exit status 1 if a rank needs more")

    args = p.parse_args(argv)
    if args.dry_run and not args.world_size:
        raise UsageError("--dry-run needs --world-size: give the number of ranks to imagine")
    if not args.dry_run:
        for flag in ("--world-size", "--device-memory"):
            if getattr(args, flag[2:].replace("-", "_")):
                raise UsageError(f"{flag} belongs to --dry-run: add that, or leave this out")
        if args.dataset is None or args.train_iters is args.train_epochs is None:
            missing = "--dataset" if args.dataset is None else "--train-iters or --train-epochs"
            raise UsageError(f"{missing} is missing: give it, or --dry-run")
    if args.shuffle_buffer and not (args.streaming and args.shuffle):
        raise UsageError("--shuffle-buffer shuffles a stream: give --streaming, or leave it out")
    if args.cache_dir and args.streaming and not args.eval_dataset:
        raise UsageError("--cache-dir keeps what --streaming does not need: leave one of them out")
    if args.async_save and not args.save:
        raise UsageError("--async-save needs --save: give the directory, or leave it out")
    data.encode_options(args)  # those that exclude each other are told now
    if args.activation_offload and args.recompute == "none":
        raise UsageError("--activation-offload goes with recompute: give --recompute full, or leave both out")
    if args.min_lr > args.lr:
        raise UsageError(f"--min-lr {args.min_lr:g} is above --lr {args.lr:g}: give a smaller one")
    if args.profile_step_end < args.profile_step_start:
        raise UsageError("--profile-step-end is before --profile-step-start: give a later one")
    if (args.eval_interval or args.eval_iters) and not args.eval_dataset:
        raise UsageError("--eval-interval and --eval-iters need --eval-dataset: give the held-out rows")
    if args.finetune and args.load and args.save and Path(args.load).resolve() == Path(args.save).resolve():
        raise UsageError("--finetune starts a new run: give a --save other than --load")
    for flag in ("dataset_dir", "cache_dir", "load", "save", "eval_dataset", "tensorboard_dir", "profile_dir"):
        if getattr(args, flag) == "":
            raise UsageError(f"--{flag.replace('_', '-')} is empty: give a path, or leave it out")
    data.media_limits(args)  # and a minimum above its maximum
    return args


def batch_sizes(args: argparse.Namespace, dp_size: int) -> tuple[int, int]:
    """(samples of a step, micro-batches of a step on each rank). Raises UsageError if they do not divide."""
    unit = args.micro_batch_size * dp_size
    size = args.global_batch_size or unit
    if size % unit:
        near = " or ".join(str(n) for n in (size // unit * unit, (size // unit + 1) * unit) if n)
        raise UsageError(f"--global-batch-size {size} is not a multiple of --micro-batch-size {args.micro_batch_size} "
                         f"times data-parallel size {dp_size}: the nearest that are: {near}")
    return size, size // unit


# ---- what is made once ----------------------------------------------------------------------------------------------


def open_weights(
    args: argparse.Namespace, model: Qwen3VL
) -> convert.HuggingFaceWeights | convert.CheckpointWeights | None:
    """What --load or the directory holds, found to fit the model before memory is taken; None for --init random."""
    if args.load:
        source = convert.CheckpointWeights(convert.find_checkpoint(args.load))
    elif args.init == "random":
        return None
    elif convert.hf_has_weights(args.init_from_hf_path):
        source = convert.HuggingFaceWeights(args.init_from_hf_path)
    else:
        raise InputError(f"{args.init_from_hf_path}: holds no safetensors: give a directory with weights, "
                         "--init random to train from scratch, or --load")
    return source.check_compatible(convert.shapes_of(model))


def build_model(
    args: argparse.Namespace, model: Qwen3VL, ranks: parallel.ParallelState, dtype: torch.dtype,
    source: convert.HuggingFaceWeights | convert.CheckpointWeights | None,
) -> Qwen3VL:
    """Of the model on the meta device the sharded one with its initial weights: random, or the directory's (those of
    --load come by `resume`)."""
    size = sum(p.numel() for p in model.parameters())
    if not args.init_model_with_meta_device:
        if size > 10e9:
            raise UsageError(f"--no-init-model-with-meta-device: every process would hold all "
                             f"{size / 1e9:.0f}B parameters of the model; leave it out above 10B")
        model.to_empty(device="cpu")
    prepare(args, model, ranks, dtype)
    if args.init_model_with_meta_device:
        model.to_empty(device=ranks.device)
    else:
        model.to(ranks.device)
    if source is None:
        model.init_weights(args.seed, parallel.local_shard_and_offset)
    elif not args.load:
        convert.load_weights(model, source)
    return model


def frozen_components(args: argparse.Namespace) -> set[str]:
    """The towers whose training flags stop."""
    return {tower for tower in COMPONENTS if getattr(args, f"freeze_{tower.replace(' ', '_')}")}


def prepare(args: argparse.Namespace, model: Qwen3VL, ranks: parallel.ParallelState, dtype: torch.dtype) -> None:
    """Everything that the flags ask of a model before it has memory: attention, loss, freezing, parallelism."""
    model.set_attention(args.text_attn_implementation, args.vision_attn_implementation)
    model.loss_chunk_size, model.router_aux_loss_coef = args.loss_chunk_size, args.router_aux_loss_coef
    parallel.freeze(model, frozen_components(args))
    by_default = "full" if kernels_npu.ops.is_accelerator or args.activation_offload else "none"
    parallel.parallelize(
        model, ranks, compute_dtype=dtype, recompute=(args.recompute or by_default) == "full",
        offload=args.activation_offload, compile=args.compile,
    )


def make_optimizer(args: argparse.Namespace, model: Qwen3VL) -> torch.optim.Optimizer:
    """AdamW with groups for each tower that trains, its peak learning rate in `max_lr`."""
    peaks = dict(zip(COMPONENTS, (args.vision_lr, args.projector_lr, None), strict=True))
    groups = []
    for tower in COMPONENTS:
        params = [p for name, p in model.named_parameters() if component_of(name) == tower and p.requires_grad]
        meshes = [getattr(p, "device_mesh", None) for p in params]
        for mesh in dict.fromkeys(meshes):  # torch 2.7.1's fused AdamW takes one mesh at a time
            same = [p for p, its_mesh in zip(params, meshes, strict=True) if its_mesh == mesh]
            groups.append({"params": same, "max_lr": args.lr if peaks[tower] is None else peaks[tower]})
    if not groups:
        raise UsageError("every tower is frozen: leave out one of the --freeze flags")
    return kernels_npu.ops.adamw(
        groups, lr=args.lr, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_eps, weight_decay=args.weight_decay
    )


def set_learning_rates(args: argparse.Namespace, optimizer: torch.optim.Optimizer, iteration: int) -> None:
    """Linear warm-up from 0, then a decay that reaches --min-lr after the last iteration. Iterations count from 0."""
    warmup = args.lr_warmup_iters
    if args.lr_warmup_fraction is not None:
        warmup = round(args.lr_warmup_fraction * args.train_iters)
    if iteration < warmup:
        warm, share = iteration / warmup, 1.0
    else:
        progress = (iteration - warmup) / max(1, args.train_iters - warmup)
        decays = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        warm, share = 1.0, decays[args.lr_decay_style]
    for group in optimizer.param_groups:
        low = min(args.min_lr, group["max_lr"])
        group["lr"] = warm * (low + share * (group["max_lr"] - low))


# ---- the loss's weights ---------------------------------------------------------------------------------------------


class StepStats(NamedTuple):
    """What one step's batches hold, over all ranks."""

    tokens: int
    samples: int
    supervised_tokens: int
    media: int  # pictures and videos
    truncated: int  # samples cut to the sequence length
    rows_read: list[int]  # of each file of the dataset
    rows_bad: list[int]  # and those of them left out
    flops: float


def set_loss_weights(
    batches: list[data.Batch], loss_type: str, config: Qwen3VLConfig, ranks: parallel.ParallelState,
    trained: Collection[str] = COMPONENTS,
) -> StepStats:
    """Gives every token its weight in loss = sum_i weight_i * nll_i, over all micro-batches of all ranks of one step.

    default     1 / (micro-batches x supervised tokens of its micro-batch)
    per_sample  1 / (samples x supervised tokens of its sample)
    per_token   1 / (supervised tokens of the global batch)

    A sample without supervised tokens does not count.
    """
    # supervised tokens of each sample of each micro-batch
    counts = [torch.searchsorted(b.supervised_index, torch.tensor(b.cu_seqlens)).diff().tolist() for b in batches]
    files = len(batches[0].rows_read)
    micro_batches, with_answer, supervised, flops, *others = ranks.sum_over_dp(
        len(batches), sum(n > 0 for each in counts for n in each), sum(map(sum, counts)),
        sum(step_flops(config, b.cu_seqlens, b.grid_thw, len(b.supervised_index), trained) for b in batches),
        sum(b.cu_seqlens[-1] for b in batches), sum(len(b.sources) for b in batches),
        sum(len(b.grid_thw) for b in batches),
        sum(b.truncated for b in batches),
        *map(sum, zip(*(b.rows_read + b.rows_bad for b in batches), strict=True)),
    )
    tokens, samples, media, truncated, *rows = map(int, others)
    # FSDP2 averages gradients over its ranks; the formula wants their sum, so the weights carry the factor.
    scale = float(ranks.world)
    for batch, each in zip(batches, counts, strict=True):
        if loss_type == "default":
            shares = [micro_batches * sum(each)] * len(each)
        elif loss_type == "per_sample":
            shares = [with_answer * n for n in each]
        else:
            shares = [supervised] * len(each)
        weights = torch.tensor([scale / max(1, n) for n in shares], dtype=torch.float32)
        batch.loss_weights = weights.repeat_interleave(torch.tensor(batch.cu_seqlens).diff())
        batch.aux_weight = scale / micro_batches
    return StepStats(tokens, samples, int(supervised), media, truncated, rows[:files], rows[files:], flops)


# ---- logging --------------------------------------------------------------------------------------------------------

METRICS = (
    "iteration", "loss", "aux_loss", "grad_norm", "lr", "samples", "tokens", "supervised_tokens", "step_time_s",
    "data_time_s", "tokens_per_s", "model_flops", "mfu", "memory_allocated", "memory_reserved", "skipped_samples",
    "truncated_samples", "skipped_iterations", "eval_loss",
)


class MetricsLog:
    """Rank 0's records: the log line, metrics.jsonl and TensorBoard. On other ranks it does nothing."""

    def __init__(self, args: argparse.Namespace, ranks: parallel.ParallelState, start: int):
        self.args, self.world = args, ranks.world
        self.main = ranks.rank == 0
        self.file = self.board = None
        self.window: list[dict] = []  # since the last log line
        if not self.main:
            return
        if args.save:
            path = Path(args.save) / "metrics.jsonl"
            if start and (path.parent / f"iter_{start:07d}").exists():
                # else a run that went back, and died, would go on from a later iteration that it has not made
                convert.write_tracker(path.parent, str(start))
            # After a crash the file may be ahead of the checkpoint: those iterations are about to be run again.
            kept = path.read_text(errors="replace").splitlines(keepends=True) if start and path.exists() else []
            try:
                kept = [line for line in kept if line.endswith("\n") and json.loads(line)["iteration"] <= start]
            except (KeyError, TypeError, ValueError) as e:
                raise InputError(f"{path}: is damaged ({e!r}): move it away, and the run starts a new one") from e
            shorter = path.with_name(".tmp_metrics.jsonl")
            shorter.write_text("".join(kept))
            os.replace(shorter, path)
            self.file = open(path, "a")
        if args.tensorboard_dir:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as e:
                raise InputError("--tensorboard-dir needs TensorBoard: pip install tensorboard") from e
            self.board = SummaryWriter(args.tensorboard_dir, purge_step=start + 1)

    def write(self, **metrics) -> None:
        """One iteration's metrics (METRICS; None where one does not apply), those of time and memory added here."""
        if not self.main:
            return
        peak_flops, seconds = kernels_npu.ops.peak_flops(), metrics["step_time_s"] * self.world
        metrics["tokens_per_s"] = metrics["tokens"] / metrics["step_time_s"]
        metrics["mfu"] = metrics["model_flops"] / (seconds * peak_flops) if peak_flops else None
        metrics["memory_allocated"], metrics["memory_reserved"] = kernels_npu.ops.memory()
        if self.file:
            try:
                self.file.write(json.dumps({key: _finite(metrics[key]) for key in METRICS}) + "\n")
                self.file.flush()
            except OSError as e:
                raise InputError(f"{self.file.name}: cannot be written ({e.strerror})") from e
        if self.board:
            for key in METRICS[1:]:
                if metrics[key] is not None:
                    self.board.add_scalar(key, metrics[key], metrics["iteration"])
        self.window.append(metrics)
        if metrics["iteration"] % self.args.log_interval == 0 or metrics["eval_loss"] is not None:
            print(self.line(), flush=True)
            self.window.clear()

    def line(self) -> str:
        """The line that scripts for Megatron's logs read: losses and times are means since the last line."""
        m = dict(self.window[-1], filled=None)
        if self.args.packing:
            m["filled"] = 100 * m["tokens"] / (self.args.global_batch_size * self.args.seq_length)
        for key in ("loss", "step_time_s", "tokens_per_s", "mfu", "aux_loss"):
            # rates are tokens and operations over all the time
            weights = [each["step_time_s"] if key in ("tokens_per_s", "mfu") else 1.0 for each in self.window]
            if m[key] is not None:
                m[key] = sum(w * each[key] for w, each in zip(weights, self.window, strict=True)) / sum(weights)
        parts = [
            f"iteration {m['iteration']:8d}/{self.args.train_iters:8d}",
            f"consumed samples: {m['consumed_samples']:12d}",
            f"elapsed time per iteration (ms): {m['step_time_s'] * 1000:.1f}", f"learning rate: {m['lr']:.6E}",
            f"global batch size: {self.args.global_batch_size:5d}", f"lm loss: {m['loss']:.6E}",
            f"grad norm: {m['grad_norm']:.3f}",
            f"tokens per second per device: {m['tokens_per_s'] / self.world:.0f}",
        ]
        optional = {
            "MFU": ("mfu", ".2f"), "rows filled (%)": ("filled", ".1f"), "load balancing loss": ("aux_loss", ".4f"),
            "eval loss": ("eval_loss", ".6E"), "skipped samples": ("skipped_samples", "d"),
            "number of skipped iterations": ("skipped_iterations", "d"),
        }
        parts += [f"{text}: {m[key]:{form}}" for text, (key, form) in optional.items() if m[key]]
        return " " + " | ".join(parts) + " |"

    def close(self, iteration: int) -> None:
        """The last line: how far it came, where the checkpoint is, how to go on."""
        if not self.main:
            return
        early, save = iteration < self.args.train_iters, self.args.save
        how = f"stopped at iteration {iteration} of {self.args.train_iters}" if early else "done"
        where = f"the checkpoint is in {save}" if save else "nothing was saved: there is no --save"
        print(f"{how}: {where}" + f"; go on with --load {save}" * (early and bool(save)), flush=True)
        if self.board:
            self.board.close()


def _finite(value):
    """JSON has no NaN: a number that is not finite is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Signals:
    """SIGTERM and SIGINT ask for an end after the step in hand, SIGUSR1 for a checkpoint; see `poll`.

    A step can hang, in a collective whose other ranks are gone, and with it Python's handlers: they wait for the main
    thread. What the system itself writes to a pipe wakes a thread, which ends the process if a step in hand does not
    end within `patience` seconds: torchrun would wait for TORCHELASTIC_SHUTDOWN_TIMEOUT.
    """

    def __init__(self, deadline: float, patience: float):
        self.stop = self.save = False
        self.deadline, self.patience = deadline, patience
        self.idle = threading.Event()  # while no step is in hand
        self._wakeup, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(name, self._handle)

    def _handle(self, number: int, frame) -> None:
        self.save = True
        self.stop = self.stop or number != signal.SIGUSR1
        if self.stop:
            common.stop_requested.set()

    def _watch(self) -> None:
        while os.read(self._wakeup, 1)[0] not in (signal.SIGTERM, signal.SIGINT):
            pass
        while self.idle.wait(self.patience):
            time.sleep(1)
        print(f"error: rank {os.environ.get('RANK', 0)}: asked to stop, and the step in hand has not ended in "
              f"{self.patience / 60:g} minutes: look for a rank that died or hangs", file=sys.stderr, flush=True)
        os._exit(1)

    def poll(self) -> tuple[bool, bool]:
        """(end now?, save now?) of this rank since the last call."""
        stop, save = self.stop or time.monotonic() >= self.deadline, self.save
        self.save = False
        return stop, save


# ---- the loop -------------------------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace, model: Qwen3VL, optimizer: torch.optim.Optimizer, loader: data.Loader,
    eval_loader: data.Loader | None, ranks: parallel.ParallelState, accumulation: int, start: int, start_up: StartUp,
) -> None:
    """Runs iterations start + 1 to --train-iters, saving and evaluating on the way."""
    metrics_log = MetricsLog(args, ranks, start)
    trainable = [p for p in model.parameters() if p.requires_grad]
    trained = trainable_components(model)
    minutes = args.exit_duration_in_mins or math.inf
    signals = Signals(start_up.began + 60 * minutes, ranks.timeout.total_seconds())
    saver = convert.CheckpointWriter(args.async_save, ranks.timeout)
    skipped_in_a_row = 0
    # closing: whatever happens here, the loader's worker processes end
    with saver, profiler(args, ranks) as profile, contextlib.closing(iter(loader)) as stream:
        for iteration in range(start + 1, args.train_iters + 1):
            began = time.perf_counter()
            signals.idle.clear()
            batches = ranks.run_synced(lambda: [next(stream) for _ in range(accumulation)])
            data_time = time.perf_counter() - began
            totals = set_loss_weights(batches, args.loss_type, model.config, ranks, trained)
            epoch = batches[-1].resume_state["epoch"]
            ranks.run_synced(lambda: loader.check_bad_row_rate(totals.rows_read, totals.rows_bad, epoch))  # noqa: B023
            set_learning_rates(args, optimizer, iteration - 1)

            losses = []
            for batch in batches:
                loss, aux_loss = model(ranks.take(batch))
                if loss.requires_grad:  # not that of a text where the text decoder is frozen
                    loss.backward()
                losses.append(torch.stack((loss.detach(), aux_loss)))
            if not totals.media:
                model.drop_vision_gradients()
            grad_norm = parallel.clip_grad_norm(trainable, args.clip_grad, ranks)
            loss, aux_loss = torch.stack(losses).sum(0) / ranks.world  # the weights carry the number of ranks
            loss, aux_loss, stop, save, failed = ranks.sum(loss, aux_loss, *signals.poll(), saver.failed())
            signals.idle.set()
            if failed:
                saver.wait()

            good = math.isfinite(loss) and math.isfinite(grad_norm)
            if good:
                optimizer.step()
            optimizer.zero_grad()
            skipped_in_a_row = 0 if good else skipped_in_a_row + 1
            if not good:
                report_bad_step(iteration, loss, grad_norm, batches, skipped_in_a_row)

            kernels_npu.ops.synchronize()
            step_time = time.perf_counter() - began
            last, eval_loss, eval_error = iteration == args.train_iters, None, None
            if eval_loader and not stop and (last or args.eval_interval and iteration % args.eval_interval == 0):
                try:
                    eval_loss = evaluate(model, eval_loader, ranks, args.eval_iters, signals)
                except (UsageError, ValueError, OSError, common.PeerError) as e:
                    eval_error = e  # on every rank: what was trained is saved first
            metrics_log.write(
                iteration=iteration, loss=loss, grad_norm=grad_norm, eval_loss=eval_loss, model_flops=totals.flops,
                aux_loss=aux_loss if model.config.text.num_experts else None, lr=optimizer.param_groups[-1]["lr"],
                consumed_samples=batches[-1].resume_state["consumed"], samples=totals.samples, tokens=totals.tokens,
                supervised_tokens=totals.supervised_tokens, step_time_s=step_time,
                data_time_s=data_time, skipped_samples=sum(totals.rows_bad), truncated_samples=totals.truncated,
                skipped_iterations=int(not good),
            )
            if iteration == start + 1 and ranks.rank == 0:
                start_up.done("first step")
                log.info("first step done %s", start_up)
            if profile:
                profile.step()
            due = last or stop or save or eval_error or args.save_interval and iteration % args.save_interval == 0
            if args.save and due:
                save_iteration(args, iteration, model, optimizer, ranks, batches[-1].resume_state, saver)
                signals.save = False  # one that came to this rank a little later than to others has been answered
            if eval_error:
                raise eval_error
            if stop:
                break
    metrics_log.close(iteration)


def report_bad_step(iteration: int, loss: float, grad_norm: float, batches: list[data.Batch], in_a_row: int) -> None:
    """Logs a step that is not applied; the tenth in a row raises InputError."""
    sources = "; ".join(source for batch in batches for source in batch.sources[:8])
    message = f"iteration {iteration}: loss {loss}, gradient norm {grad_norm}, not applied; this rank's rows: {sources}"
    log.warning(message)
    if in_a_row >= 10:
        raise InputError(f"ten steps in a row were not finite, the last at {message}")


@torch.no_grad()
def evaluate(
    model: Qwen3VL, loader: data.Loader, ranks: parallel.ParallelState, iters: int | None, signals: Signals
) -> float | None:
    """Mean negative log-likelihood of the supervised held-out tokens, of `iters` micro-batches a rank (None: all).
    None if a signal asks for the end meanwhile."""
    total, count = torch.zeros((), device=ranks.device), 0
    stream = itertools.islice(loader, iters)
    while (batch := ranks.run_synced(lambda: next(stream, None))) is not None:
        if ranks.sum(signals.stop) != [0]:
            parallel.reshard(model)
            return None
        batch.loss_weights = torch.ones(len(batch.input_ids))
        batch = ranks.take(batch)
        total += model(batch)[0]  # its aux_weight is 0
        count += len(batch.supervised_index)
    parallel.reshard(model)
    nll, tokens = ranks.sum(total, count)
    return nll / max(1, tokens)


def save_iteration(
    args: argparse.Namespace, iteration: int, model: Qwen3VL, optimizer: torch.optim.Optimizer,
    ranks: parallel.ParallelState, resume_state: dict, saver: convert.CheckpointWriter,
) -> None:
    """Saves everything that an exact resume needs: weights, optimizer, random states, the position in the data."""
    state = {"iteration": iteration, "data": resume_state, "world": ranks.world}
    if not args.no_save_rng:
        state["rng"] = {
            "torch": torch.get_rng_state(), "device": kernels_npu.ops.get_rng_state(),
            "python": list(random.getstate()[1]), "numpy": np.random.get_state()[1].tolist(),
        }
    saver.save(args.save, iteration, model, None if args.no_save_optim else optimizer, state, args.save_retain)


def resume(
    args: argparse.Namespace, source: convert.CheckpointWeights, model: Qwen3VL, optimizer: torch.optim.Optimizer,
    ranks: parallel.ParallelState,
) -> tuple[int, dict | list[dict] | None]:
    """Loads --load, as `open_weights` gave it. Returns (iterations done, position in the data, or the positions of the
    ranks that saved it)."""
    weights_only = args.finetune or args.no_load_optim
    state = convert.load_checkpoint(source, model, None if weights_only else optimizer)
    if state is None or args.finetune:
        return 0, None
    rng, position, mine = state.get("rng"), state["data"], [ranks.dp_rank, ranks.dp_size]
    try:
        if rng and not args.no_load_rng and state.get("world") == ranks.world:
            torch.set_rng_state(rng["torch"])
            random.setstate((3, tuple(rng["python"]), None))
            np.random.set_state(("MT19937", np.array(rng["numpy"], np.uint32), 624))
            if rng["device"] is not None:
                kernels_npu.ops.set_rng_state(rng["device"])
        moved = position.get("dealt", mine) != mine
    except Exception as e:  # each of them says it in its own way
        raise InputError(f"{source.path}: its random state is damaged ({e}): give --no-load-rng, or take another "
                         "checkpoint") from e
    if moved:
        position = convert.load_data_positions(source.path)  # packed rows, dealt to other ranks
    return state["iteration"], position


def profiler(args: argparse.Namespace, ranks: parallel.ParallelState):
    """torch.profiler over the asked iterations, writing a Chrome trace to --profile-dir; without it, nothing."""
    if not args.profile_dir or ranks.rank > 0:
        return contextlib.nullcontext()
    before, active = args.profile_step_start - 1, args.profile_step_end - args.profile_step_start + 1
    warmup = min(1, before)
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=before - warmup, warmup=warmup, active=active, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(args.profile_dir),
        record_shapes=True, profile_memory=True,
    )


# ---- from the command line to the loop ------------------------------------------------------------------------------


class StartUp:
    """Where the time between the launch and the end of the first step goes, for the log."""

    def __init__(self):
        own = _age(os.getpid())
        torchrun = _age(os.getppid()) - own if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self.parts = {"torchrun": torchrun} if torchrun else {}
        self.parts["imports"] = own
        self.last = time.monotonic()
        self.began = self.last - own  # of this process

    def done(self, part: str) -> None:
        """The time since the last call went into this part."""
        now = time.monotonic()
        self.parts[part], self.last = now - self.last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items())
        return f"{sum(self.parts.values()):.1f} s after the launch: {parts}"


def _age(pid: int) -> float:
    """Seconds since a process was started; 0 where the system does not say."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


RUN_LOCK = "run.lock"  # in a save directory; says which process holds it


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Keeps other runs out of a save directory. The lock is the system's own, on a file that stays: it ends with the
    process that holds it, however that ends. Raises InputError while another run lives."""
    with open(directory / RUN_LOCK, "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            file.seek(0)
            raise InputError(f"--save {directory}: another run writes there, {file.read() or 'a process'}: end that "
                             "one, or give another directory") from e
        except OSError as e:
            log.warning("--save %s: its file system has no locks (%s): see that no other run writes there", directory,
                        e.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def prepare_directories(args: argparse.Namespace, ranks: parallel.ParallelState) -> contextlib.AbstractContextManager:
    """Rank 0 makes the directories to write to. --save must not hold another run than the one that --load names.
    Returns the lock on --save, which holds within its `with`."""
    if ranks.rank > 0:
        return contextlib.nullcontext()
    for directory in (args.profile_dir, args.tensorboard_dir):
        if directory:
            Path(directory).mkdir(parents=True, exist_ok=True)
    if not args.save:
        return contextlib.nullcontext()
    save, load = Path(args.save), Path(args.load).resolve() if args.load else None
    goes_on = load and save.resolve() == (load.parent if (load / ".metadata").exists() else load)
    settings = {k: str(v) if isinstance(v, torch.dtype) else v for k, v in vars(args).items()}
    try:
        save.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            for name in (RUN_LOCK, "args.json", "metrics.jsonl", ".tmp_metrics.jsonl"):
                if (save / name).is_symlink() or (save / name).exists() and not (save / name).is_file():
                    raise InputError(f"--save {save}: {name} is no file of its own, and would be written to: remove it")
            stack.enter_context(run_lock(save))  # before the rest: what is said of a living run's directory is not true
            if (save / ".metadata").exists():
                raise UsageError(f"--save {save} is an iteration: give the directory that it is in, or another")
            if not goes_on and (any(save.glob("iter_*")) or (save / convert.TRACKER).exists()):
                raise UsageError(f"--save {save} holds another run: give --load {save} to go on, or another directory")
            log_file = save / "metrics.jsonl"
            if not goes_on and log_file.exists() and log_file.stat().st_size:
                raise UsageError(f"--save {save} holds the log of a run that saved no checkpoint: give another "
                                 "directory, or remove it")
            (save / "args.json").write_text(json.dumps(settings, indent=1) + "\n")
            return stack.pop_all()
    except OSError as e:
        raise InputError(f"--save {save}: {e.filename or save} cannot be written ({e.strerror})") from e


def check_save(args: argparse.Namespace, model: Qwen3VL, ranks: parallel.ParallelState) -> None:
    """Before time goes into loading: whether this rank can write to --save, and there is room for what will be written.
    Raises InputError without room for one checkpoint; with too little for all that will be there at once, warns."""
    if not args.save:
        return
    save = Path(args.save)
    if not (save / RUN_LOCK).exists() or not os.access(save, os.W_OK):
        raise InputError(f"--save {save}: rank {ranks.rank} on {socket.gethostname()} does not see what rank 0 wrote, "
                         "or cannot write there: it must be storage that every node shares")
    if ranks.rank > 0:
        return
    without_state = set(COMPONENTS) if args.no_save_optim else frozen_components(args)
    nbytes = sum(
        4 * p.numel() * (1 if component_of(name) in without_state else 3) for name, p in model.named_parameters())
    planned = math.ceil(args.train_iters / args.save_interval) if args.save_interval else 1
    if args.save_retain:
        planned = min(planned, args.save_retain + 1)  # the oldest goes when the newest is complete
    needed = nbytes * max(1, planned - len(list(save.glob("iter_*"))))
    free = shutil.disk_usage(save).free
    if free < nbytes:
        raise InputError(f"--save {save}: a checkpoint takes {nbytes / 1e9:.3g} GB, {free / 1e9:.3g} GB are free: make "
                         "room, or give another directory")
    if free < needed:
        log.warning("--save %s: the checkpoints will take %.3g GB, %.3g GB are free: make room, or give a smaller "
                    "--save-retain", save, needed / 1e9, free / 1e9)


@contextlib.contextmanager
def explain_errors(ranks: parallel.ParallelState) -> Iterator[None]:
    """Makes one line of what is neither a mistake nor a bug: memory that is out, a worker that was killed, a rank that
    does not answer. A bug's traceback goes with this rank's number and rows."""
    try:
        yield
    except Exception as e:
        text, rows = str(e).strip().partition("\n")[0], "; ".join(ranks.current_sources[:8])
        if common.is_peer_failure(e):
            if not isinstance(e, common.PeerError):
                ranks.report_alive()
            raise
        if isinstance(e, common.USER_ERRORS):
            raise
        at_once = True
        if re.search(r"DataLoader worker.*(is killed|exited unexpectedly)", text):
            problem = f"{text}: if the system ran out of memory, give a smaller --num-workers"
        elif isinstance(e, (MemoryError, torch.OutOfMemoryError)) or re.search("out of memory|n't allocate", text):
            problem = (f"out of memory ({text or type(e).__name__}): give a smaller --micro-batch-size or "
                       f"--seq-length, --recompute full, --activation-offload or more ranks; rows in hand: {rows}")
        elif isinstance(e, RuntimeError) and re.search("[Tt]imed out|[Tt]imeout", text):
            silent, at_once = ", ".join(map(str, ranks.unresponsive_ranks())), False  # all find it at the same time
            problem = (f"a collective waited for {ranks.timeout.total_seconds() / 60:g} minutes "
                       f"(--distributed-timeout-minutes); no sign of life from rank {silent or '(all gave one)'}")
        else:
            log.error("rank %d has failed, with these rows in hand: %s", ranks.rank, rows)
            raise
        mistake = InputError(f"rank {ranks.rank}: {problem}")
        mistake.only_on_this_rank = at_once
        raise mistake from e


def main(argv: list[str]) -> None:
    args = parse_args(argv)
    if args.dry_run:
        from tools.dry_run import dry_run  # which imports this file

        return dry_run(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to save
    start_up = StartUp()
    ops = kernels_npu.select(args.device, args.compute_dtype, args.use_npu_fused_moe)
    ranks = parallel.ParallelState(ops, args.distributed_timeout_minutes, cp=args.context_parallel_size,
                           ep=args.expert_parallel_size, fsdp=args.fsdp_size)
    args.global_batch_size, accumulation = batch_sizes(args, ranks.dp_size)
    start_up.done("ranks")
    with explain_errors(ranks), ranks.run_synced(lambda: prepare_directories(args, ranks)):
        run(args, ranks, accumulation, start_up)
    ranks.close()


def run(args: argparse.Namespace, ranks: parallel.ParallelState, accumulation: int, start_up: StartUp) -> None:
    """Makes everything that training needs, and trains."""
    ops, say = kernels_npu.ops, log.info if ranks.rank == 0 else (lambda *_: None)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)

    config = Qwen3VLConfig.from_json(args.init_from_hf_path)
    processor = data.Processor(args.init_from_hf_path, **data.media_limits(args))
    read = {"dataset_dir": args.dataset_dir, "cache_dir": args.cache_dir}
    paths = args.dataset.split(",")
    if args.streaming:
        dataset = data.RowStream(paths, args.dataset_dir, args.max_samples, args.shuffle_buffer or 1000)
    else:
        dataset = data.RowDataset(paths, max_samples=args.max_samples, **read)
    layout = {"dp_rank": ranks.dp_rank, "dp_size": ranks.dp_size, "seed": args.seed, "num_workers": args.num_workers,
              "on_bad_sample": args.on_bad_sample, "options": data.encode_options(args),
              "micro_batch_size": args.micro_batch_size}
    loader = data.Loader(dataset, processor, shuffle=args.shuffle, global_batch_size=args.global_batch_size,
                         packing=args.packing, **layout)
    if args.train_iters is None:
        args.train_iters = max(1, math.ceil(round(args.train_epochs * loader.epoch_size() / args.global_batch_size, 6)))
    dtype = args.compute_dtype or ops.compute_dtype
    start_up.done("data")

    say(f"device: {ops.device}, {ranks.world} rank(s) over {ops.distributed_backend}, compute in {dtype}")
    say("operations: " + ", ".join(f"{name} {owner}" for name, owner in ops.implementations().items())
        + f"; attention: text {args.text_attn_implementation or ops.default_attention}, "
        f"vision {args.vision_attn_implementation or ops.default_attention}"
        + "".join(f"; {name} {value}" for name, value in ops.settings.items()))
    with torch.device("meta"):
        model = Qwen3VL(config)
    ranks.run_synced(lambda: check_save(args, model, ranks))
    source = ranks.run_synced(lambda: open_weights(args, model))
    model = build_model(args, model, ranks, dtype, source)
    for tower, (total, trainable) in parameter_table(model.named_parameters()).items():
        say(f"{tower:17} {total:15,d} parameters, {trainable:15,d} trainable")
    optimizer = make_optimizer(args, model)
    start, position = 0, None
    if args.load:  # together: damage may lie in one rank's slices
        start, position = ranks.run_synced(lambda: resume(args, source, model, optimizer, ranks))
        if ranks.sum(start) != [ranks.world * start]:
            raise InputError(f"{source.path}: its trainer states are of several iterations: take another checkpoint")
    start_up.done("model and weights")
    if start >= args.train_iters:
        say(f"{args.load} is at iteration {start} of {args.train_iters}: nothing to do")
        return

    loader.resume_state = position
    eval_loader = None
    if args.eval_dataset:
        held_out = data.RowDataset(args.eval_dataset.split(","), **read)
        eval_loader = data.Loader(held_out, processor, shuffle=False, num_samples=len(held_out),
                                  global_batch_size=args.micro_batch_size * ranks.dp_size, **layout)
    say(f"{args.train_iters} iterations of {args.global_batch_size} {'packed rows' if args.packing else 'samples'}, "
        f"{accumulation} micro-batch(es) a rank, loss {args.loss_type}")
    train(args, model, optimizer, loader, eval_loader, ranks, accumulation, start, start_up)


if __name__ == "__main__":
    status = common.run_program(main, sys.argv[1:])
    sys.stdout.flush()
    if status == 0:
        os._exit(0)  # all is written; now and then gloo's threads abort a process that ends the long way
    sys.exit(status)
