"""Fine-tune Qwen3-VL, or train it from scratch: `python train.py --help` lists the flags.

    torchrun --nproc-per-node 8 train.py --init-from-hf-path DIR --dataset rows.json --save OUT --train-iters 1000

`main` parses the flags, `setup` makes everything that training needs, `train_loop` repeats `train_step`.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import json
import logging
import math
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch.optim import Optimizer

import common
import convert
import data
import kernels_npu
import parallel
from common import InputError, Parser, UsageError, number
from convert import AdaptedWeights, CheckpointWeights, HuggingFaceWeights, Source
from model import (
    COMPONENTS,
    Qwen3VL,
    Qwen3VLConfig,
    build_model,
    component_of,
    parameter_table,
    step_flops,
    trainable_components,
    weighted_cross_entropy,
)
from parallel import ParallelState

log = logging.getLogger("train")

# ---- flags ----------------------------------------------------------------------------------------------------------


def make_parser() -> Parser:
    """Return the parser of all flags, by group."""
    p = Parser(prog="train.py", description=__doc__.split("\n\n")[0])
    positive_int, non_negative_int = number(int, 1), number(int, 0)
    positive, non_negative = number(float, 0, above=True), number(float, 0)
    fraction, beta, weight = number(float, 0, 1), number(float, 0, 1, below=True), number(float, 0, 1000)
    switch = argparse.BooleanOptionalAction

    add = p.add_argument_group("model").add_argument
    add("--init-from-hf-path", required=True, metavar="DIR", help="Hugging Face directory with the configuration, "
        "tokenizer and preprocessors, and the weights unless --init random or --load is given")
    add("--init", choices=("weights", "random"), default="weights",
        help="start from the directory's weights, or from random weights (training from scratch)")
    add("--init-model-with-meta-device", action=switch, default=True, help="allocate only this rank's shards; "
        "switched off, the full model is built in host memory first (up to 10B parameters)")
    add("--text-attn-implementation", choices=kernels_npu.ATTENTION,
        help="attention implementation of the text decoder (default: the device's fastest)")
    add("--vision-attn-implementation", choices=kernels_npu.ATTENTION,
        help="attention implementation of the vision encoder (default: the device's fastest)")
    add("--use-npu-fused-moe", action=switch,
        help="use torch_npu's fused mixture-of-experts operations (default: where the device has them)")
    add("--freeze-vision-encoder", action=switch, default=False, help="do not train the vision encoder")
    add("--freeze-vision-projector", action=switch, default=False,
        help="do not train the vision projector (the merger and the DeepStack mergers)")
    add("--freeze-text-decoder", action=switch, default=False, help="do not train the text decoder")

    add = p.add_argument_group("adapters").add_argument
    add("--lora-rank", type=non_negative_int, default=0, metavar="N", help="train low-rank adapters (LoRA) and freeze "
        "the weights of the components that have some; 0: none. The usual --lr is 1e-4")
    add("--lora-alpha", type=positive, metavar="X", help="scale the adapters by X / rank (default: 2 x rank)")
    add("--lora-target-modules", metavar="A,B", help="layers that get adapters, by the end of their names; qkv, proj, "
        "linear_fc1 and linear_fc2 are the vision encoder's and projector's, experts are the matrices of all experts "
        f"(default: {','.join(parallel.DEFAULT_TARGETS)}, where the model has them)")
    add("--lora-dropout", type=number(float, 0, 1, below=True), default=0.0, metavar="X",
        help="probability with which an adapter's inputs are dropped in training")
    add("--lora-init", metavar="DIR", help="PEFT directory with the adapters to start from; it also supplies rank, "
        "alpha and target modules, and flags that are given must equal them")

    group = p.add_argument_group("data")
    add = group.add_argument
    add("--dataset", metavar="A.json,B.jsonl", help="files of rows, separated by commas")
    add("--dataset-weights", type=lambda text: [weight(part) for part in text.split(",")], metavar="X,Y",
        help="how many times the rows of each dataset enter an epoch; a fraction is a random share of them, another "
        "one in each epoch (default: 1 for each)")
    add("--dataset-dir", metavar="DIR",
        help="directory that media paths are relative to (default: the dataset file's own)")
    add("--cache-dir", metavar="DIR",
        help="directory that keeps the index of each dataset, for a faster start of the next run")
    add("--max-samples", type=positive_int, metavar="N", help="use only the first N rows of each dataset")
    add("--seq-length", type=positive_int, default=4096, metavar="N",
        help="maximum number of tokens of a sample, or of a packed row with --packing; longer samples are cut")
    add("--packing", action=switch, default=False,
        help="pack as many samples as fit into each row of --seq-length tokens; the batch sizes then count packed rows")
    add("--streaming", action=switch, default=False,
        help="read the datasets while training, without an index of their rows")
    add("--shuffle-buffer", type=positive_int, metavar="N",
        help="number of consecutive rows to shuffle among themselves with --streaming (default: 1000)")
    add("--num-workers", type=number(int, 0, 1024), default=2, metavar="N",
        help="number of data loader processes per rank, and of further ones that only read texts and headers; 0 loads "
        "in the training process")
    add("--shuffle", action=switch, default=True, help="shuffle the rows anew in each epoch")
    data.add_media_flags(group)
    data.add_row_flags(group)
    add("--on-bad-sample", choices=("error", "skip"), default="error",
        help="end the run at a row that cannot be used, or leave the row out, log it and count it")

    group = p.add_argument_group("optimization")
    add = group.add_argument
    length = group.add_mutually_exclusive_group()
    length.add_argument("--train-iters", type=positive_int, metavar="N", help="number of optimizer steps")
    length.add_argument("--train-epochs", type=number(float, 0, 1e6, above=True), metavar="X",
                        help="number of passes over the data, in place of --train-iters")
    add("--micro-batch-size", type=positive_int, default=1, metavar="N",
        help="number of samples (packed rows with --packing) in one forward pass")
    add("--global-batch-size", type=positive_int, metavar="N", help="number of samples or packed rows in one "
        "optimizer step; gradients are accumulated as needed (default: micro-batch size times data-parallel size)")
    add("--lr", type=non_negative, default=1e-5, help="peak learning rate")
    add("--min-lr", type=non_negative, default=0.0, metavar="LR", help="learning rate at the end of the decay")
    add("--vision-lr", type=non_negative, metavar="LR", help="peak learning rate of the vision encoder (default: --lr)")
    add("--projector-lr", type=non_negative, metavar="LR",
        help="peak learning rate of the vision projector (default: --lr)")
    add("--lr-decay-style", choices=("constant", "linear", "cosine"), default="cosine",
        help="shape of the learning rate's decay after the warm-up")
    warmup = group.add_mutually_exclusive_group()
    warmup.add_argument("--lr-warmup-iters", type=non_negative_int, default=0, metavar="N",
                        help="number of steps in which the learning rate rises linearly from 0")
    warmup.add_argument("--lr-warmup-fraction", type=fraction, metavar="X",
                        help="length of the warm-up as a fraction of all steps")
    add("--weight-decay", type=non_negative, default=0.0,
        help="AdamW's weight decay, for all parameters but vectors (biases and the weights of norms)")
    add("--adam-beta1", type=beta, default=0.9, help="decay rate of AdamW's first moment")
    add("--adam-beta2", type=beta, default=0.999, help="decay rate of AdamW's second moment")
    add("--adam-eps", type=positive, default=1e-8, help="term added to the denominator of AdamW's update")
    add("--clip-grad", type=non_negative, default=1.0, metavar="X", help="maximum gradient norm; 0 disables clipping")
    add("--deterministic", action=switch, default=False, help="use only deterministic algorithms: equal runs on equal "
        "devices have equal bits; some operations become slower")
    add("--bf16", dest="compute_dtype", action="store_const", const=torch.bfloat16,
        help="compute in bfloat16 (default on an accelerator)")
    add("--fp32", dest="compute_dtype", action="store_const", const=torch.float32,
        help="compute in float32 (default on a CPU); parameters are float32 in any case")
    add("--seed", type=number(int, 0, 2**32 - 1), default=42,
        help="seed of the random weights, of the order of the data and of all random number generators")

    add = p.add_argument_group("loss").add_argument
    add("--loss-type", choices=("default", "per_sample", "per_token"), default="default",
        help="average the loss over the tokens of each micro-batch, of each sample, or of the global batch")
    add("--loss-chunk-size", type=non_negative_int, default=1024, metavar="N",
        help="number of tokens whose logits are in memory at a time; 0 takes all at once")
    add("--router-aux-loss-coef", type=non_negative, default=0.0, metavar="X",
        help="coefficient of the auxiliary loss that balances the load of the experts")

    add = p.add_argument_group("checkpoints").add_argument
    add("--load", metavar="DIR", help="DCP checkpoint to start from: a save directory, one of its iterations, or the "
        "output of convert.py hf_to_dcp")
    add("--save", metavar="DIR", help="directory to write checkpoints, metrics.jsonl and args.json to")
    add("--save-interval", type=non_negative_int, default=0, metavar="N",
        help="save every N iterations; 0 saves only the last one")
    add("--async-save", action=switch, default=False,
        help="write checkpoints in the background, from a copy in host memory")
    add("--save-hf", metavar="DIR", help="new directory for the last checkpoint in Hugging Face's format, written when "
        "the run is complete, as convert.py dcp_to_hf does")
    add("--save-retain", type=positive_int, metavar="N", help="keep only the newest N checkpoints (default: all)")
    add("--no-load-optim", action="store_true", help="do not load the optimizer's state")
    add("--no-load-rng", action="store_true", help="do not load the state of the random number generators")
    add("--no-save-optim", action="store_true", help="do not save the optimizer's state")
    add("--no-save-rng", action="store_true", help="do not save the state of the random number generators")
    add("--finetune", action=switch, default=False, help="load only the weights and start at iteration 0")

    add = p.add_argument_group("evaluation and logging").add_argument
    add("--eval-dataset", metavar="FILES", help="files of held-out rows, separated by commas")
    add("--eval-interval", type=positive_int, metavar="N",
        help="evaluate every N iterations and after the last (default: only after the last)")
    add("--eval-iters", type=positive_int, metavar="N",
        help="number of micro-batches of each held-out file per rank in an evaluation (default: all rows)")
    add("--log-interval", type=positive_int, default=1, metavar="N", help="iterations between log lines")
    add("--tensorboard-dir", metavar="DIR", help="directory to write TensorBoard scalars to")
    add("--profile-dir", metavar="DIR", help="directory to write a profiler's trace of rank 0 to")
    add("--profile-step-start", type=positive_int, default=3, metavar="N", help="first profiled iteration")
    add("--profile-step-end", type=positive_int, default=5, metavar="N", help="last profiled iteration")
    add("--debug", action="store_true", help="print a traceback with each error")

    add = p.add_argument_group("devices").add_argument
    add("--device", choices=kernels_npu.DEVICES, default="auto",
        help="device to train on; auto takes the first that is available")
    add("--recompute", choices=("none", "full"),
        help="recompute each block in backward instead of keeping its activations (default: full on an accelerator)")
    add("--activation-offload", action=switch, default=False,
        help="with recompute, keep each block's input in host memory until backward")
    add("--cpu-offload", action=switch, default=False, help="keep parameters, gradients and optimizer state in host "
        "memory; a block's parameters are on the device while it runs. AdamW runs on the host with OMP_NUM_THREADS "
        "threads, which torchrun sets to 1 unless you do")
    add("--synchronize-per-layer", action=switch, default=False,
        help="wait for the device before each block: slower, but an NPU that runs out of memory may then need less")
    add("--context-parallel-size", type=positive_int, default=1, metavar="N",
        help="number of ranks that share the tokens of each sample (Ulysses)")
    add("--expert-parallel-size", type=positive_int, default=1, metavar="N",
        help="number of ranks that share the experts of each layer")
    add("--fsdp-size", type=positive_int, metavar="N",
        help="number of ranks that parameters are sharded over; the other ranks hold replicas (default: all)")
    add("--compile", action=switch, default=False, help="compile each block with torch.compile")
    add("--distributed-timeout-minutes", type=number(float, 0.05, 1e6), default=10, metavar="N",
        help="time that a rank waits for the others in a collective")
    add("--exit-duration-in-mins", type=positive, metavar="N", help="save and exit this many minutes after the start")

    add = p.add_argument_group("dry run").add_argument
    add("--dry-run", action=switch, default=False, help="train nothing: predict a rank's memory, traffic and FLOPs in "
        "one process, from config.json alone; with --save, also write dry_run.json")
    add("--world-size", type=positive_int, metavar="N", help="number of ranks that a dry run assumes")
    add("--device-memory", type=positive, metavar="GIB",
        help="memory of a device; a dry run that needs more exits with status 1")
    add("--plan", action=switch, default=False, help="with --dry-run: try all layouts (context, expert and FSDP sizes, "
        "micro-batch size, recompute, offload) and list the fastest that fit the memory; with --save, write plan.json")
    add("--assume-device", metavar="NAME",
        help="device whose speed a dry run predicts, one of the table in docs/planner.md (default: its first)")
    add("--device-figures", metavar="NAME=X,...", help="figures that replace the assumed device's, such as "
        "tflops=300,link_gbs=150; docs/planner.md has the others")
    return p


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Parse the command line and check all that needs no file. Raises UsageError."""
    args = make_parser().parse_args(argv)
    same_directory = args.load and args.save and Path(args.load).resolve() == Path(args.save).resolve()
    no_length = args.train_iters is None and args.train_epochs is None
    weights, num_datasets = args.dataset_weights or [], len((args.dataset or "").split(","))
    problems = [
        (args.dry_run and not args.world_size,
         "--dry-run needs --world-size: give the number of ranks to assume"),
        (not args.dry_run and args.world_size, "--world-size belongs to --dry-run: add that, or leave this out"),
        *((not args.dry_run and getattr(args, flag[2:].replace("-", "_")),
           f"{flag} belongs to --dry-run: add that, or leave this out")
          for flag in ("--device-memory", "--plan", "--assume-device", "--device-figures")),
        (not args.dry_run and args.dataset is None, "--dataset is missing: give it, or --dry-run"),
        (not args.dry_run and no_length, "--train-iters or --train-epochs is missing: give one, or --dry-run"),
        (weights and args.dataset and len(weights) != num_datasets,
         f"--dataset-weights has {len(weights)} number(s), --dataset {num_datasets} file(s): give one number for each"),
        (weights and not any(weights), "--dataset-weights leaves out every dataset: give a number above 0"),
        (weights and args.streaming, "--dataset-weights needs to know the number of rows, which --streaming does not: "
         "leave one of them out"),
        (args.shuffle_buffer and not (args.streaming and args.shuffle),
         "--shuffle-buffer shuffles a stream: give --streaming, or leave it out"),
        (args.cache_dir and args.streaming and not args.eval_dataset,
         "--cache-dir keeps an index, which --streaming does not use: leave one of them out"),
        (args.async_save and not args.save, "--async-save needs --save: give the directory, or leave it out"),
        (args.save_hf and not args.save, "--save-hf needs --save: give the directory, or leave it out"),
        (args.save_hf and args.save and Path(args.save_hf).resolve() == Path(args.save).resolve(),
         "--save-hf and --save are the same directory: give another --save-hf"),
        (args.activation_offload and args.recompute == "none",
         "--activation-offload needs recompute: give --recompute full, or leave both out"),
        (args.min_lr > args.lr, f"--min-lr {args.min_lr:g} is above --lr {args.lr:g}: give a smaller one"),
        (args.profile_step_end < args.profile_step_start,
         "--profile-step-end is before --profile-step-start: give a later one"),
        ((args.eval_interval or args.eval_iters) and not args.eval_dataset,
         "--eval-interval and --eval-iters need --eval-dataset: give the held-out rows"),
        (args.lora_init is None and not args.lora_rank
         and (args.lora_alpha or args.lora_target_modules or args.lora_dropout),
         "--lora-alpha, --lora-target-modules and --lora-dropout describe adapters: give --lora-rank too"),
        ((args.lora_rank or args.lora_init) and args.init == "random" and not args.load,
         "adapters need trained weights: leave out --init random, or --lora-rank and --lora-init"),
        (args.finetune and same_directory, "--finetune starts a new run: give another --save than --load"),
    ]
    for name in ("dataset_dir", "cache_dir", "load", "save", "save_hf", "eval_dataset", "tensorboard_dir",
                 "profile_dir", "lora_init"):
        flag = "--" + name.replace("_", "-")
        problems.append((getattr(args, name) == "", f"{flag} is empty: give a path, or leave it out"))
    for is_wrong, message in problems:
        if is_wrong:
            raise UsageError(message)
    data.encode_options(args)  # raises for flags that exclude each other
    data.media_limits(args)  # raises for a minimum above its maximum
    return args


def batch_sizes(micro_batch_size: int, global_batch_size: int | None, dp_size: int) -> tuple[int, int]:
    """Return (samples of a step, micro-batches of a step on each rank). Raises UsageError if they do not divide."""
    samples = micro_batch_size * dp_size  # in one micro-batch of every rank
    size = global_batch_size or samples
    if size % samples:
        nearest = [n for n in (size // samples * samples, (size // samples + 1) * samples) if n]
        raise UsageError(f"--global-batch-size {size} is not a multiple of --micro-batch-size {micro_batch_size} times "
                         f"data-parallel size {dp_size}: the nearest that are: {' or '.join(map(str, nearest))}")
    return size, size // samples


def freezing_predicate(args: argparse.Namespace) -> Callable[[str], bool]:
    """Return `build_model`'s is_frozen(parameter name), as the --freeze flags describe it."""
    is_frozen = {
        "vision encoder": args.freeze_vision_encoder,
        "vision projector": args.freeze_vision_projector,
        "text decoder": args.freeze_text_decoder,
    }
    return lambda name: is_frozen[component_of(name)]


def build_trainable_model(args: argparse.Namespace, config: Qwen3VLConfig) -> tuple[Qwen3VL, dict | None]:
    """Build the model that the flags describe on the meta device; return it and its adapters' settings, if any."""
    model = build_model(config, freezing_predicate(args))
    settings = {
        "rank": args.lora_rank, "alpha": args.lora_alpha, "dropout": args.lora_dropout,
        "target_modules": args.lora_target_modules and args.lora_target_modules.split(","),
    }
    if args.lora_init:
        for key, value in convert.read_peft_settings(args.lora_init).items():
            settings[key] = settings[key] or value
            if key != "target_modules" and settings[key] != value:
                raise UsageError(f"--lora-{key} {settings[key]:g}: --lora-init has {value:g}: leave the flag out")
    if not settings["rank"]:
        return model, None
    settings["alpha"] = settings["alpha"] or 2.0 * settings["rank"]
    return model, parallel.add_adapters(model, settings)


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that `configure_model` takes. Some defaults depend on the device."""
    recompute = kernels_npu.ops.is_accelerator or args.activation_offload
    if args.recompute:
        recompute = args.recompute == "full"
    return {
        "text_attention": args.text_attn_implementation,
        "vision_attention": args.vision_attn_implementation,
        "loss_chunk_size": args.loss_chunk_size,
        "router_aux_loss_coef": args.router_aux_loss_coef,
        "loss_fn": weighted_cross_entropy,
        "compute_dtype": args.compute_dtype or kernels_npu.ops.compute_dtype,
        "recompute": recompute,
        "offload": args.activation_offload,
        "compile": args.compile,
        "cpu_offload": args.cpu_offload,
        "synchronize_per_layer": args.synchronize_per_layer,
    }


def optimizer_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that `make_optimizer` takes."""
    return {
        "lr": args.lr,
        "component_lrs": {"vision encoder": args.vision_lr, "vision projector": args.projector_lr},
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_eps,
        "weight_decay": args.weight_decay,
    }


# ---- model, optimizer and initial state -----------------------------------------------------------------------------


def configure_model(
    model: Qwen3VL, state: ParallelState, *, text_attention: str | None, vision_attention: str | None,
    loss_chunk_size: int, router_aux_loss_coef: float, loss_fn: Callable, **parallel_settings,
) -> None:
    """Prepare a model that has no memory yet for training. `parallel.parallelize` takes the other settings."""
    model.set_attention(text_attention, vision_attention)
    model.loss_chunk_size = loss_chunk_size
    model.router_aux_loss_coef = router_aux_loss_coef
    model.lm_head.loss_fn = loss_fn
    parallel.parallelize(model, state, **parallel_settings)


OPTIMIZER_STATES = 2  # float32 tensors per parameter that `make_optimizer`'s optimizer keeps, for the free-space check


def make_optimizer(
    model: Qwen3VL, *, lr: float, component_lrs: dict[str, float | None], betas: tuple[float, float], eps: float,
    weight_decay: float,
) -> Optimizer:
    """Return AdamW over the trainable parameters. To train with another optimizer, change this function.

    `set_learning_rates` scales a group's peak learning rate, `max_lr`. The learning rate of the last group is logged.
    Vectors, which are biases and the weights of norms, have no weight decay.
    """
    groups = []
    for component in COMPONENTS:
        component_lr = component_lrs.get(component)
        max_lr = lr if component_lr is None else component_lr
        groups_of_component: dict[tuple, dict] = {}
        for name, p in model.named_parameters():
            if p.requires_grad and component_of(name) == component:
                decay = weight_decay if p.ndim > 1 else 0.0
                key = decay, getattr(p, "device_mesh", None)  # torch 2.7.1's fused AdamW accepts one mesh per group
                group = groups_of_component.setdefault(key, {"params": [], "max_lr": max_lr, "weight_decay": decay})
                group["params"].append(p)
        groups += groups_of_component.values()
    if not groups:
        raise UsageError("every component is frozen: leave out one of the --freeze flags")
    return kernels_npu.ops.adamw(groups, lr=lr, betas=betas, eps=eps)


def set_learning_rates(
    optimizer: Optimizer, iteration: int, *, train_iters: int, warmup_iters: int, decay_style: str, min_lr: float
) -> None:
    """Set the learning rates of an iteration, counted from 0: a linear warm-up from 0, then the decay to `min_lr`."""
    warmup, decay = 1.0, 1.0
    if iteration < warmup_iters:
        warmup = iteration / warmup_iters
    else:
        progress = (iteration - warmup_iters) / max(1, train_iters - warmup_iters)
        if decay_style == "linear":
            decay = 1 - progress
        elif decay_style == "cosine":
            decay = 0.5 * (1 + math.cos(math.pi * progress))
    for group in optimizer.param_groups:
        low = min(min_lr, group["max_lr"])
        group["lr"] = warmup * (low + decay * (group["max_lr"] - low))


def open_source(
    hf_dir: str, init: str, load: str | None, model: Qwen3VL, adapters: dict | None = None, lora_init: str | None = None
) -> Source | None:
    """Open the weights to start from and check that they fit the model; return None for random weights.

    With the settings of `adapters`, the checkpoint is that of a run with the same settings, or it has the weights that
    new adapters, or those of the PEFT directory `lora_init`, are added to.
    """
    if load:
        source = convert.open_checkpoint(load, hf_dir)
        if isinstance(source, AdaptedWeights):
            check_adapters(source, adapters, model)
            return source.check_compatible(model)
    elif init == "random":
        return None
    elif convert.hf_has_weights(hf_dir):
        source = HuggingFaceWeights(hf_dir)
    else:
        raise InputError(f"{hf_dir}: holds no safetensors: give a directory with weights, --init random to train from "
                         "scratch, or --load")
    if adapters:
        trained = convert.open_peft(lora_init, model) if lora_init else None
        source = AdaptedWeights(source, trained, {**adapters, "base": str(source.path.resolve()) if load else None})
    return source.check_compatible(model)


def check_adapters(source: AdaptedWeights, adapters: dict | None, model: Qwen3VL) -> None:
    """Raise InputError unless this run has the adapters of a checkpoint and trains the same components."""
    def flags(settings: dict) -> list[str]:
        return [f"--lora-rank {settings['rank']}", f"--lora-alpha {settings['alpha']:g}",
                f"--lora-dropout {settings['dropout']:g}",
                f"--lora-target-modules {','.join(settings['target_modules'])}"]

    theirs, ours = flags(source.settings), flags(adapters) if adapters else ["--lora-rank 0"]
    if theirs != ours:
        raise InputError(f"{source.path}: has other adapters than this run: "
                         f"give {' '.join(flag for flag in theirs if flag not in ours)}, "
                         f"not {' '.join(flag for flag in ours if flag not in theirs)}")
    for name, p in model.named_parameters():
        if p.requires_grad != (name in source.trained.tensors):
            raise InputError(f"{source.path}: only one of its run and this one trains the {component_of(name)}: give "
                             "the same --freeze flags")


def load_initial_state(
    model: Qwen3VL, optimizer: Optimizer, source: Source | None, state: ParallelState, *, seed: int, finetune: bool,
    load_optim: bool, load_rng: bool, media_limits: dict[str, float],
) -> tuple[int, dict | list[dict] | None]:
    """Fill the model and, to resume a run, the optimizer and the random number generators: all loading happens here.

    Return (completed iterations, position in the data). If the data was packed for other ranks, the positions of all
    those ranks are returned. `finetune` loads the weights only. Log a warning if a resumed run had other
    `media_limits`.
    """
    convert.load_weights(model, source, seed)
    if isinstance(source, AdaptedWeights):
        source = source.trained
    if finetune or not isinstance(source, CheckpointWeights):
        return 0, None
    trainer_state = convert.load_trainer_state(source.path, state.rank)
    if trainer_state is None:  # a converted checkpoint
        return 0, None
    stored_limits = convert.read_settings(source.path).get("media_limits", media_limits)
    if stored_limits != media_limits and state.rank == 0:
        theirs, ours = (data.describe_limits(limits) or "no such flags" for limits in (stored_limits, media_limits))
        log.warning("%s: was saved with %s, but this run has %s: the same media have other tokens now", source.path,
                    theirs, ours)
    if load_optim:
        saved_with = trainer_state.get("optimizer")
        if saved_with not in (None, type(optimizer).__name__):
            raise InputError(f"{source.path}: has the state of {saved_with}, but this run's optimizer is "
                             f"{type(optimizer).__name__}: give --no-load-optim")
        convert.load_optimizer(source, model, optimizer)
    rng = trainer_state.get("rng")
    if rng and load_rng and trainer_state.get("world") == state.world_size:
        torch.set_rng_state(rng["torch"])
        random.setstate((3, tuple(rng["python"]), None))
        np.random.set_state(("MT19937", np.array(rng["numpy"], np.uint32), 624))
        if rng["device"] is not None:
            kernels_npu.ops.set_rng_state(rng["device"])
    position = trainer_state["data"]
    this_rank = [state.dp_rank, state.dp_size]
    if position.get("rank_layout", this_rank) != this_rank:
        position = convert.load_data_positions(source.path)
    return trainer_state["iteration"], position


# ---- the save directory ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claim_save_directory(save: Path, load: str | None, settings: dict) -> Iterator[None]:
    """Create --save, lock it and write args.json. Raises UsageError if it holds a run that --load does not name."""
    load = Path(load).resolve() if load else None
    loaded_run = load.parent if load and (load / ".metadata").exists() else load
    is_resume = save.resolve() == loaded_run
    with contextlib.ExitStack() as stack:
        try:
            save.mkdir(parents=True, exist_ok=True)
            stack.enter_context(common.lock_directory(save))
            metrics = save / "metrics.jsonl"
            has_metrics = metrics.exists() and metrics.stat().st_size > 0
            has_checkpoint = (save / convert.TRACKER).exists() or any(save.glob("iter_*"))
            is_iteration = (save / ".metadata").exists()
            if not is_resume and (has_checkpoint or is_iteration):
                raise UsageError(f"--save {save} holds another run: give --load {save} to resume it, or another "
                                 "directory")
            if not is_resume and has_metrics:
                raise UsageError(f"--save {save} holds the metrics.jsonl of a run that saved no checkpoint: remove it, "
                                 "or give another directory")
            (save / "args.json").write_text(json.dumps(settings, indent=1, default=str) + "\n")
        except OSError as e:
            raise InputError(f"--save {save}: {e.filename or save} cannot be written ({e.strerror})") from e
        yield


def check_save_directory(save: Path, model: Qwen3VL, saves_optimizer: bool) -> None:
    """Raise InputError if this rank cannot write to --save, or its disk has no space for one checkpoint."""
    if not (save / common.LOCK_FILE).exists() or not os.access(save, os.W_OK):
        raise InputError(f"--save {save}: {socket.gethostname()} does not see what rank 0 wrote there, or cannot "
                         "write: give a directory that all nodes share")
    nbytes = 0
    for tensor in convert.saved_tensors(model).values():
        states = OPTIMIZER_STATES if saves_optimizer and tensor.requires_grad else 0
        nbytes += 4 * tensor.numel() * (1 + states)
    free = shutil.disk_usage(save).free
    if free < nbytes:
        raise InputError(f"--save {save}: a checkpoint takes {nbytes / 1e9:.3g} GB, but {free / 1e9:.3g} GB are free: "
                         "free some space, or give another directory")


def save_iteration(
    iteration: int, resume_state: dict, *, writer: convert.CheckpointWriter, directory: str, model: Qwen3VL,
    optimizer: Optimizer | None, state: ParallelState, save_rng: bool, retain: int | None, settings: dict,
) -> None:
    """Save all that an exact resume needs: weights, optimizer, random number generators, the position in the data.

    `settings` are those that conversion and inference need (see `convert.read_settings`).
    """
    trainer_state = {
        "iteration": iteration,
        "data": resume_state,
        "world": state.world_size,
        "optimizer": type(optimizer).__name__ if optimizer else None,
    }
    if save_rng:
        trainer_state["rng"] = {
            "torch": torch.get_rng_state(),
            "device": kernels_npu.ops.get_rng_state(),
            "python": list(random.getstate()[1]),
            "numpy": np.random.get_state()[1].tolist(),
        }
    writer.save(directory, iteration, model, optimizer, trainer_state, retain, settings)


# ---- the loss's weights ---------------------------------------------------------------------------------------------


class StepStats(NamedTuple):
    """Counts of one step's batches, summed over all ranks."""

    flops: float
    tokens: int
    samples: int
    supervised_tokens: int
    media: int  # images and videos
    truncated: int  # samples cut to the sequence length
    rows_read: list[int]  # for each file of the dataset
    rows_bad: list[int]  # for each file, how many of them were left out

    @classmethod
    def from_sums(cls, flops: float, *sums: float) -> StepStats:
        """Take the sums of `count_batch` over micro-batches and ranks."""
        counts = [int(value) for value in sums]
        files = len(counts[5:]) // 2
        return cls(flops, *counts[:5], rows_read=counts[5 : 5 + files], rows_bad=counts[5 + files :])


def count_batch(batch: data.Batch, flops_of: Callable[[data.Batch], float]) -> list[float]:
    """Return a micro-batch's part of each number of StepStats, in the same order."""
    m = batch.measure()
    return [flops_of(batch), m.length, len(m.sources), sum(m.supervised), m.media, batch.truncated,
            *batch.rows_read, *batch.rows_bad]


def loss_divisor(loss_type: str, supervised: list[int]) -> int:
    """Return a micro-batch's part of the number that `set_loss_weights` divides all weights of a step by.

    `supervised` has the supervised tokens of each sample. A sample without any does not count.
    """
    if loss_type == "default":
        return 1
    return sum(supervised) if loss_type == "per_token" else sum(n > 0 for n in supervised)


def flops_counter(model: Qwen3VL) -> Callable[[data.Batch], float]:
    """Return a function that counts a batch's floating point operations, in forward and backward.

    Call this once, because the search for trainable parameters takes milliseconds in a large model.
    """
    trainable, adapters = trainable_components(model), parallel.adapter_flops(model)
    return lambda batch: step_flops(model.config, batch.cu_seqlens, batch.grid_thw, len(batch.supervised_index),
                                    trainable, adapters)


def set_loss_weights(
    batch: data.Batch, loss_type: str, micro_batches: float, divisor: float, state: ParallelState
) -> None:
    """Set the weight of every token in loss = sum_i weight_i * nll_i, over all micro-batches of all ranks of one step.

    default     1 / (micro-batches x supervised tokens of its micro-batch)
    per_sample  1 / (samples x supervised tokens of its sample)
    per_token   1 / (supervised tokens of the global batch)

    `divisor` is the sum of `loss_divisor` over the micro-batches of all ranks. The weights also carry the factor that
    `parallel._sum_gradients` explains.
    """
    counts, scale = batch.measure().supervised, float(state.world_size)
    if loss_type == "default":
        denominators = [divisor * sum(counts)] * len(counts)
    elif loss_type == "per_sample":
        denominators = [divisor * n for n in counts]
    else:
        denominators = [divisor] * len(counts)
    weights = torch.tensor([scale / max(1, n) for n in denominators], dtype=torch.float32)
    batch.loss_weights = weights[batch.sample_ids]
    batch.aux_weight = scale / micro_batches


# ---- logging --------------------------------------------------------------------------------------------------------


class MetricsLog:
    """Write rank 0's log lines, metrics.jsonl and TensorBoard scalars; on other ranks do nothing."""

    def __init__(
        self, state: ParallelState, start: int, *, save: str | None, tensorboard_dir: str | None, log_interval: int,
        train_iters: int, global_batch_size: int, packed_length: int | None, loss_name: str,
    ):
        """start: completed iterations of a resumed run; packed_length: tokens of a packed row, None without packing."""
        self.is_main, self.world_size = state.rank == 0, state.world_size
        self.save, self.log_interval, self.train_iters = save, log_interval, train_iters
        self.global_batch_size, self.packed_length, self.loss_name = global_batch_size, packed_length, loss_name
        self.metrics: dict[str, Any] = {}  # of the latest iteration, as in metrics.jsonl
        self.consumed_samples = 0
        self.line_start = 0  # byte offset of that iteration's line in metrics.jsonl
        self.sums = Counter()  # over the iterations since the last log line
        self.file = self.board = None
        if not self.is_main:
            return
        if save:
            self.file = open_metrics(Path(save) / "metrics.jsonl", start)
        if tensorboard_dir:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as e:
                raise InputError("--tensorboard-dir needs TensorBoard: pip install tensorboard") from e
            self.board = SummaryWriter(tensorboard_dir, purge_step=start + 1)

    def write(self, consumed_samples: int, **metrics) -> None:
        """Write one iteration's metrics, and those of speed and memory. None means that a metric does not apply.

        A new argument becomes a new metric.
        """
        if not self.is_main:
            return
        self.consumed_samples = consumed_samples
        device_seconds = metrics["step_time_s"] * self.world_size
        peak_flops = kernels_npu.ops.peak_flops()
        metrics["tokens_per_s"] = metrics["tokens"] / metrics["step_time_s"]
        metrics["mfu"] = metrics["model_flops"] / (device_seconds * peak_flops) if peak_flops else None
        metrics["memory_allocated"], metrics["memory_reserved"] = kernels_npu.ops.memory()
        metrics["eval_loss"] = metrics["eval_losses"] = None
        self.metrics = metrics
        self.sums.update(
            iterations=1, seconds=metrics["step_time_s"], tokens=metrics["tokens"], samples=metrics["samples"],
            flops=metrics["model_flops"], skipped_samples=metrics["skipped_samples"],
        )
        if not metrics["skipped_iterations"]:
            self.sums.update(applied_steps=1, loss=metrics["loss"], aux_loss=metrics["aux_loss"] or 0.0)
        if self.file:
            self.line_start = self.file.tell()
            self._write_line()

    def finish(self, eval_loss: float | None, eval_losses: dict[str, float | None] | None = None) -> None:
        """End an iteration: add the evaluation that followed it, and print a log line if one is due."""
        if not self.is_main:
            return
        self.metrics["eval_loss"], self.metrics["eval_losses"] = eval_loss, eval_losses
        if self.file and eval_loss is not None:
            self._write_line()
        if self.board:
            for key, metric in self.metrics.items():
                per_file = isinstance(metric, dict)
                values = {f"{key}/{path}": value for path, value in metric.items()} if per_file else {key: metric}
                for name, value in values.items():
                    if name != "iteration" and value is not None:
                        self.board.add_scalar(name, value, self.metrics["iteration"])
        if self.metrics["iteration"] % self.log_interval == 0 or eval_loss is not None:
            common.print_line(self._log_line())
            self.sums.clear()

    def _write_line(self) -> None:
        """Write the latest iteration's line of metrics.jsonl, or write it again in place."""
        try:
            self.file.seek(self.line_start)
            self.file.write(json.dumps(_without_nan(self.metrics)).encode() + b"\n")
            self.file.truncate()
            self.file.flush()
        except OSError as e:
            raise InputError(f"{self.file.name}: cannot be written ({e.strerror})") from e

    def _log_line(self) -> str:
        """Return a line in the format of Megatron's logs. Losses, times and rates are means since the last line.

        Scripts split the line at colons, those of the time stamp included. The order of its first values must stay.
        """
        m, sums, nan = self.metrics, self.sums, math.nan
        device_seconds = sums["seconds"] * self.world_size
        row_tokens = sums["iterations"] * self.global_batch_size * (self.packed_length or nan)
        aux_loss = nan if m["aux_loss"] is None else sums["aux_loss"]
        values = [
            ("consumed samples", self.consumed_samples, "12d"),
            ("elapsed time per iteration (ms)", 1000 * sums["seconds"] / sums["iterations"], ".1f"),
            ("learning rate", m["lr"], ".6E"),
            ("global batch size", self.global_batch_size, "5d"),
            (self.loss_name, sums["loss"] / (sums["applied_steps"] or nan), ".6E"),
            ("loss scale", 1.0, ".1f"),
            ("grad norm", m["grad_norm"], ".3f"),
            ("tokens per sample", sums["tokens"] / (sums["samples"] or nan), ".1f"),
            ("tokens per second per device", sums["tokens"] / device_seconds, ".0f"),
            ("MFU", sums["flops"] / (device_seconds * (kernels_npu.ops.peak_flops() or nan)), ".2f"),
            ("rows filled (%)", 100 * sums["tokens"] / row_tokens, ".1f"),
            ("load balancing loss", aux_loss / (sums["applied_steps"] or nan), ".4f"),
            ("eval loss", nan if m["eval_loss"] is None else m["eval_loss"], ".6E"),
            ("skipped samples", sums["skipped_samples"], "d"),
            ("number of skipped iterations", sums["iterations"] - sums["applied_steps"], "d"),
        ]
        parts = [time.strftime("[%Y-%m-%d %H:%M:%S]") + f" iteration {m['iteration']:8d}/{self.train_iters:8d}"]
        parts += [f"{name}: {value:{form}}" for name, value, form in values if math.isfinite(value)]
        return " " + " | ".join(parts) + " |"

    def close(self, iteration: int) -> None:
        """Print how far the run came, where its checkpoint is, and how to resume it."""
        if not self.is_main:
            return
        is_early = iteration < self.train_iters
        text = f"stopped at iteration {iteration} of {self.train_iters}" if is_early else "done"
        text += f": the checkpoint is in {self.save}" if self.save else ": nothing was saved, because --save is missing"
        if is_early and self.save:
            text += f"; resume with --load {self.save}"
        print(text, flush=True)
        if self.board:
            self.board.close()


def _without_nan(value: Any) -> Any:
    """Return a JSON value with None for each number that is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_metrics(path: Path, start: int) -> BinaryIO:
    """Open metrics.jsonl behind the line of iteration `start`, cutting off later lines: a resumed run repeats them."""
    path.touch()
    file = open(path, "rb+")
    end = 0
    try:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["iteration"] > start:
                break
            end += len(line)
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: is damaged ({e!r}): move it away, and the run starts a new one") from e
    file.seek(end)
    file.truncate()
    return file


def make_profiler(directory: str | None, first: int, last: int):
    """Return the device's profiler, which writes a trace of iterations `first` to `last`, if there is a directory."""
    if not directory:
        return contextlib.nullcontext()
    profiler, warmup = kernels_npu.ops.profiler, min(1, first - 1)
    return profiler.profile(
        schedule=profiler.schedule(wait=first - 1 - warmup, warmup=warmup, active=last - first + 1, repeat=1),
        on_trace_ready=profiler.tensorboard_trace_handler(directory),
        record_shapes=True,
        profile_memory=True,
    )


# ---- the step and the loop ------------------------------------------------------------------------------------------


class StepResult(NamedTuple):
    """The outcome of one optimizer step, the same on all ranks."""

    stats: StepStats
    loss: float
    aux_loss: float
    grad_norm: float  # before clipping
    is_finite: bool  # otherwise the step was not applied
    flags: list[bool]  # for each flag, whether any rank has set it


def train_step(
    model: Qwen3VL, optimizer: Optimizer, measured: list[data.Measurement], batches: Iterable[data.Batch],
    state: ParallelState, *, loss_type: str, flops_of: Callable[[data.Batch], float], clip_grad: float,
    error: Exception | None, read_flags: Callable[[], tuple[bool, ...]],
) -> StepResult:
    """Do one optimizer step with this rank's micro-batches, which are measured before the first is loaded.

    The ranks exchange host values twice: first the counts for the loss weights, and whether a rank has an `error`, such
    as a bad row; then what was used, the losses, the gradient norm and the flags that `read_flags` returns on each
    rank. If any rank has an `error`, every rank raises. `flops_of` is the result of `flops_counter`.
    """
    failed, micro_batches, divisor, media = state.sum_over_dp(
        error is not None, len(measured), sum(loss_divisor(loss_type, m.supervised) for m in measured),
        sum(m.media for m in measured),
    )
    if failed:
        raise_together(error, state)
    losses, used = [], []
    for batch in batches:
        set_loss_weights(batch, loss_type, micro_batches, divisor, state)
        used.append([loss_divisor(loss_type, batch.measure().supervised), *count_batch(batch, flops_of)])
        state.current_sources = batch.sources
        loss, aux_loss = model(parallel.local_batch(batch, state))
        if loss.requires_grad:  # false for a batch of text alone when the text decoder is frozen
            loss.backward()
        losses.append(torch.stack((loss.detach(), aux_loss)))
        del batch  # frees its pixels before the next ones are decoded
    if not media:  # before the norm, as zeros would change its rounding
        clear_gradients(model.model.visual)

    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    loss, aux_loss = torch.stack(losses).sum(0) / state.world_size  # the loss weights carry this factor
    square_sum = parallel.grad_square_sum(trainable, state)
    flags = read_flags()
    loss, aux_loss, square_sum, *sums = state.sum(
        loss, aux_loss, square_sum, *flags, *map(sum, zip(*used, strict=True)))
    flags, sums = sums[: len(flags)], [value / state.cp_size for value in sums[len(flags) :]]  # as in sum_over_dp
    used_divisor, stats = sums[0], StepStats.from_sums(*sums[1:])

    # `divisor` counted rows that turned out bad when their pixels were decoded. The auxiliary loss does not depend on
    # it, but the gradient of that loss can no longer be separated and is corrected with the rest.
    correction = divisor / used_divisor if used_divisor else 1.0
    auxiliary = model.router_aux_loss_coef * aux_loss
    loss, grad_norm = (loss - auxiliary) * correction + auxiliary, math.sqrt(square_sum) * correction
    if not stats.media:  # all of the step's images turned out bad
        clear_gradients(model.model.visual)

    is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if is_finite:
        parallel.clip_gradients(trainable, grad_norm, clip_grad, correction)
        optimizer.step()
    optimizer.zero_grad()
    return StepResult(stats, loss, aux_loss, grad_norm, is_finite, [count > 0 for count in flags])


def clear_gradients(visual: torch.nn.Module) -> None:
    """Remove the zero gradients of a dummy image: they would let the optimizer decay and move the vision encoder."""
    for p in visual.parameters():
        p.grad = None


def train_loop(
    model: Qwen3VL, optimizer: Optimizer, loader: data.Loader, state: ParallelState, metrics_log: MetricsLog,
    writer: convert.CheckpointWriter, *, iterations: range, accumulation: int, loss_type: str, clip_grad: float,
    schedule: Callable[[int], None], save_fn: Callable[[int, dict], None] | None, save_interval: int,
    eval_fn: Callable[[], tuple] | None, eval_interval: int | None, profiler: contextlib.AbstractContextManager,
    signals: common.StopSignals, start_time: float,
) -> bool:
    """Train for `iterations`, which count from 1, with `accumulation` micro-batches per step and rank.

    Return whether all of them were done: a signal may have stopped the run.

    `schedule`, `save_fn` and `eval_fn` are `set_learning_rates`, `save_iteration` and `evaluate_files` with their
    settings. `start_time` is the time.monotonic() of the program's start.
    """
    bad_rows = None  # this rank's error about the latest step, which the next exchange reports to the other ranks
    nonfinite_steps = 0  # consecutive ones
    flops_of = flops_counter(model)
    feed = Feed(loader, state.cp_size)
    # `closing` ends the loader's worker processes, whatever happens here
    with writer, profiler as profile, contextlib.closing(feed), manual_garbage_collection():
        for iteration in iterations:
            if iteration % GARBAGE_INTERVAL == 0:
                gc.collect()
            start = time.perf_counter()
            measured = feed.measure(accumulation)
            schedule(iteration - 1)
            step = train_step(
                model, optimizer, measured, feed.load(accumulation), state, loss_type=loss_type, flops_of=flops_of,
                clip_grad=clip_grad, error=bad_rows or feed.error,
                read_flags=lambda: (*signals.poll(), writer.failed(), feed.error is not None),
            )
            step_time = time.perf_counter() - start
            stop, save_requested, save_failed, load_failed = step.flags
            if load_failed:
                raise_together(feed.error, state)
            stats, resume_state = step.stats, measured[-1].resume_state
            if iteration == iterations.start and state.rank == 0:
                log.info("first step done %.1f s after the start", time.monotonic() - start_time)
            if save_failed:
                writer.wait()  # raises on every rank
            nonfinite_steps = 0 if step.is_finite else nonfinite_steps + 1
            if nonfinite_steps:
                report_nonfinite_step(iteration, step, measured, nonfinite_steps)
            _, bad_rows = attempt(loader.check_bad_row_rate, stats.rows_read, stats.rows_bad, resume_state["epoch"])
            rows_read = Counter()
            for path, rows in zip(loader.dataset.paths, stats.rows_read, strict=True):
                rows_read[path] += rows  # the same file may be given twice

            # The metrics are written before the checkpoint, so that every saved iteration has its line.
            metrics_log.write(
                resume_state["consumed"], iteration=iteration, loss=step.loss,
                aux_loss=step.aux_loss if model.config.text.num_experts else None, grad_norm=step.grad_norm,
                lr=optimizer.param_groups[-1]["lr"], samples=stats.samples, tokens=stats.tokens,
                supervised_tokens=stats.supervised_tokens, step_time_s=step_time, data_time_s=feed.seconds,
                model_flops=stats.flops, skipped_samples=sum(stats.rows_bad), truncated_samples=stats.truncated,
                skipped_iterations=int(not step.is_finite), rows_read=rows_read,
            )
            if profile:
                profile.step()
            is_last = iteration == iterations[-1]
            should_save = is_last or stop or save_requested or save_interval and iteration % save_interval == 0
            should_evaluate = is_last or eval_interval and iteration % eval_interval == 0
            if save_fn and should_save:
                save_fn(iteration, resume_state)
                signals.save = False  # this save also answers a signal that came after the exchange
            eval_loss = eval_losses = None
            if eval_fn and should_evaluate and not stop:
                try:
                    eval_loss, eval_losses = eval_fn()
                except (*common.USER_ERRORS, common.PeerError):  # every rank raises: a held-out row cannot be used
                    if save_fn and not should_save:
                        save_fn(iteration, resume_state)
                    raise
            metrics_log.finish(eval_loss, eval_losses)
            if stop:
                break
    raise_together(bad_rows, state)
    metrics_log.close(iteration)
    return iteration == iterations[-1]


GARBAGE_INTERVAL = 50  # iterations


@contextlib.contextmanager
def manual_garbage_collection() -> Iterator[None]:
    """Switch Python's automatic collector off in this context.

    It runs on each rank at another time, and all ranks of a step wait for the slowest. Objects that exist at the start
    are never searched.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def attempt(action: Callable, *args) -> tuple[Any, Exception | None]:
    """Return (the result of action(*args), None), or (None, the exception that it raised)."""
    try:
        return action(*args), None
    except Exception as e:
        return None, e


def raise_together(error: Exception | None, state: ParallelState) -> None:
    """Raise on every rank if any rank has an error: the first such rank its own, the others PeerError."""

    def raise_error() -> None:
        if error is not None:
            raise error

    state.run_synced(raise_error)


class Feed:
    """Fetch the measurements of a step's micro-batches, then the micro-batches one at a time.

    `seconds` is the time that the step has waited for them, and `error` the first exception. After an error the step's
    other micro-batches are empty. So this rank joins all collectives up to the exchange that reports the error.
    """

    def __init__(self, loader: data.Loader, cp_size: int):
        self.measured, self.batches = loader.stages()
        self.no_rows = [0] * len(loader.dataset.paths)
        self.cp_size, self.seconds = cp_size, 0.0
        self.error: Exception | None = None

    def measure(self, count: int) -> list[data.Measurement]:
        self.seconds = 0.0
        return self._fetch(lambda: [next(self.measured) for _ in range(count)]) or []

    def load(self, count: int) -> Iterator[data.Batch]:
        for _ in range(count):
            yield self._fetch(next, self.batches) or self._empty_batch()

    def _empty_batch(self) -> data.Batch:
        if self.cp_size > 1 and not isinstance(self.error, InputError):  # a bad row is one on all ranks that share it
            raise self.error  # those ranks have the full micro-batch: collectives with an empty one would not match
        return data.collate([], rows_read=self.no_rows, rows_bad=self.no_rows)

    def _fetch(self, action: Callable, *args) -> Any:
        start, result = time.perf_counter(), None
        if self.error is None:
            result, self.error = attempt(action, *args)
        self.seconds += time.perf_counter() - start
        return result

    def close(self) -> None:
        """End the worker processes."""
        self.measured.close()
        self.batches.close()


def report_nonfinite_step(
    iteration: int, step: StepResult, measured: list[data.Measurement], in_a_row: int
) -> None:
    """Log a step that was not applied; raise InputError for the tenth in a row."""
    sources = "; ".join(source for m in measured for source in m.sources[:8])
    message = (f"iteration {iteration}: loss {step.loss}, gradient norm {step.grad_norm}, not applied; this rank's "
               f"rows: {sources}")
    log.warning(message)
    if in_a_row >= 10:
        raise InputError(f"ten steps in a row were not finite, the last at {message}")


@torch.no_grad()
def evaluate(
    model: Qwen3VL, loader: data.Loader, state: ParallelState, max_batches: int | None
) -> tuple[float, float] | None:
    """Return (sum of the negative log-likelihoods, number of tokens) of the supervised held-out tokens of `loader`.

    Return None if a signal asks to stop. Each rank evaluates `max_batches` micro-batches (None: all). A row that cannot
    be used, or too many skipped ones, raise on every rank.
    """
    total, count = torch.zeros((), device=state.device), 0
    rows = np.zeros((2, len(loader.dataset.paths)))  # read and bad ones of each file
    stream = itertools.islice(loader, max_batches)
    model.eval()  # without dropout
    while True:
        batch, error = attempt(next, stream, None)
        failed, ended, stop = state.sum(error is not None, batch is None, common.stop_requested.is_set())
        if failed:
            raise_together(error, state)
        if ended or stop:
            break
        rows += batch.rows_read, batch.rows_bad
        batch.loss_weights = torch.ones(len(batch.input_ids))  # and its aux_weight is 0
        state.current_sources = batch.sources
        batch = parallel.local_batch(batch, state)
        total += model(batch)[0]
        count += len(batch.supervised_index)
    parallel.reshard(model)
    model.train()
    if stop:
        return None
    rows_of_ranks = np.reshape(state.sum_over_dp(*rows.flat), rows.shape).astype(int)
    loader.check_bad_row_rate(*rows_of_ranks.tolist(), epoch=0)
    nll, tokens = state.sum(total, count)
    return nll, tokens


def evaluate_files(
    model: Qwen3VL, loaders: list[data.Loader], state: ParallelState, max_batches: int | None
) -> tuple[float | None, dict[str, float | None] | None]:
    """Return the mean negative log-likelihood of the supervised tokens of all held-out files, and of each by its path.

    A mean is None if there are no such tokens. If a signal asks to stop, return (None, None). See `evaluate`.
    """
    sums = []
    for loader in loaders:
        nll_and_tokens = evaluate(model, loader, state, max_batches)
        if nll_and_tokens is None:
            return None, None
        sums.append(nll_and_tokens)
    sums.append(tuple(map(sum, zip(*sums, strict=True))))
    *means, mean = [nll / tokens if tokens else None for nll, tokens in sums]
    if mean is None and state.rank == 0:
        log.warning("--eval-dataset: the rows that were read have no supervised token, so that there is no eval_loss; "
                    "check the rows with data.py check, or give more --eval-iters")
    return mean, dict(zip((loader.dataset.paths[0] for loader in loaders), means, strict=True))


# ---- from the command line to the loop ------------------------------------------------------------------------------


def setup_data(args: argparse.Namespace, state: ParallelState) -> tuple[data.Loader, list[data.Loader]]:
    """Return the loader of the training rows and those of each file of held-out rows."""
    limits = data.media_limits(args)
    processor = data.Processor(args.init_from_hf_path, enable_thinking=args.enable_thinking, **limits)
    settings = {
        "micro_batch_size": args.micro_batch_size, "dp_rank": state.dp_rank, "dp_size": state.dp_size,
        "num_workers": args.num_workers, "on_bad_sample": args.on_bad_sample, "options": data.encode_options(args),
        "pin_memory": kernels_npu.ops.is_accelerator, "pixel_dtype": kernels_npu.ops.compute_dtype,
    }
    paths = args.dataset.split(",")
    if args.streaming:
        dataset = data.RowStream(paths, args.dataset_dir, args.max_samples, args.shuffle_buffer or 1000)
    else:
        dataset = data.RowDataset(paths, args.dataset_dir, args.cache_dir, args.max_samples, args.dataset_weights)
    loader = data.Loader(dataset, processor, seed=args.seed if args.shuffle else None, packing=args.packing, **settings)
    held_out = [data.RowDataset([path], args.dataset_dir, args.cache_dir)
                for path in (args.eval_dataset.split(",") if args.eval_dataset else ())]
    return loader, [data.Loader(rows, processor, seed=None, num_samples=len(rows), **settings) for rows in held_out]


def setup_model(args: argparse.Namespace, config: Qwen3VLConfig, state: ParallelState) -> tuple[Qwen3VL, Source | None]:
    """Return the model, sharded and allocated but not yet filled, and the weights to fill it with (None: random)."""
    model, adapters = state.run_synced(lambda: build_trainable_model(args, config))
    if args.save:
        state.run_synced(lambda: check_save_directory(Path(args.save), model, not args.no_save_optim))
    source = state.run_synced(lambda: open_source(
        args.init_from_hf_path, args.init, args.load, model, adapters, args.lora_init
    ))
    base = source.settings["base"] if isinstance(source, AdaptedWeights) else None
    if base and args.save and Path(args.save).resolve() in Path(base).parents:
        raise UsageError("--lora-rank starts a new run on the weights of --load: give another --save than --load")
    size = sum(p.numel() for p in model.parameters())
    if not args.init_model_with_meta_device:
        if size > 10e9:
            raise UsageError(f"--no-init-model-with-meta-device: each process would hold all {size / 1e9:.0f}B "
                             "parameters of the model; leave the flag out above 10B")
        model.to_empty(device="cpu")
    configure_model(model, state, **model_settings(args))
    device = "cpu" if args.cpu_offload else state.device
    if args.init_model_with_meta_device:
        model.to_empty(device=device)
    else:
        model.to(device)
    return model, source


def setup(
    args: argparse.Namespace, state: ParallelState, accumulation: int, start_time: float
) -> Callable[[], bool] | None:
    """Make everything that training needs; return `train_loop` with its arguments, or None if nothing is left to do."""
    ops, log_rank0 = kernels_npu.ops, log.info if state.rank == 0 else (lambda *_: None)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed + state.rank)  # for dropout; the weights have generators of their own

    config = Qwen3VLConfig.from_json(args.init_from_hf_path)
    loader, eval_loaders = setup_data(args, state)
    train_iters = args.train_iters
    if train_iters is None:
        steps = args.train_epochs * loader.epoch_size() / args.global_batch_size
        train_iters = max(1, math.ceil(round(steps, 6)))
    log_rank0(f"device: {ops.device}, {state.world_size} rank(s) over {ops.distributed_backend}, compute in "
              f"{args.compute_dtype or ops.compute_dtype}")
    log_rank0("operations: " + ", ".join(f"{name} {owner}" for name, owner in ops.implementations().items())
              + f"; attention: text {args.text_attn_implementation or ops.default_attention}, "
              f"vision {args.vision_attn_implementation or ops.default_attention}"
              + "".join(f"; {name} {value}" for name, value in ops.settings.items()))

    model, source = setup_model(args, config, state)
    for component, (total, trainable) in parameter_table(model.named_parameters()).items():
        log_rank0(f"{component:17} {total:15,d} parameters, {trainable:15,d} trainable")
    optimizer = make_optimizer(model, **optimizer_settings(args))
    # synced, because damage may lie in one rank's slices only
    start, loader.resume_state = state.run_synced(lambda: load_initial_state(
        model, optimizer, source, state, seed=args.seed, finetune=args.finetune, load_optim=not args.no_load_optim,
        load_rng=not args.no_load_rng, media_limits=data.media_limits(args),
    ))
    if start >= train_iters:
        log_rank0(f"{args.load} is at iteration {start} of {train_iters}: nothing to do")
        return None
    if start and args.save and state.rank == 0 and (Path(args.save) / f"iter_{start:07d}").exists():
        # The run may resume from an earlier iteration than its latest. If it dies before it saves, the next resume must
        # not continue from the abandoned iterations.
        convert.write_tracker(Path(args.save), str(start))

    warmup_iters = args.lr_warmup_iters
    if args.lr_warmup_fraction is not None:
        warmup_iters = round(args.lr_warmup_fraction * train_iters)
    writer = convert.CheckpointWriter(args.async_save, state.timeout)
    save_fn = eval_fn = None
    settings = {"media_limits": data.media_limits(args)}
    if isinstance(source, AdaptedWeights):
        settings["adapters"] = source.settings
    if args.save:
        save_fn = functools.partial(
            save_iteration, writer=writer, directory=args.save, model=model, state=state, save_rng=not args.no_save_rng,
            optimizer=None if args.no_save_optim else optimizer, retain=args.save_retain,
            settings=settings,
        )
    if eval_loaders:
        eval_fn = functools.partial(evaluate_files, model, eval_loaders, state, args.eval_iters)
    metrics_log = MetricsLog(
        state, start, save=args.save, tensorboard_dir=args.tensorboard_dir, log_interval=args.log_interval,
        train_iters=train_iters, global_batch_size=args.global_batch_size,
        packed_length=args.seq_length if args.packing else None,
        loss_name=getattr(model.lm_head.loss_fn, "log_name", "lm loss"),  # another loss function may have a name
    )
    log_rank0(f"{train_iters} iterations of {args.global_batch_size} {'packed rows' if args.packing else 'samples'}, "
              f"{accumulation} micro-batch(es) per rank, loss {args.loss_type}")
    schedule = functools.partial(
        set_learning_rates, optimizer, train_iters=train_iters, warmup_iters=warmup_iters,
        decay_style=args.lr_decay_style, min_lr=args.min_lr,
    )
    profiler = make_profiler(
        args.profile_dir if state.rank == 0 else None, args.profile_step_start, args.profile_step_end
    )
    return functools.partial(
        train_loop, model, optimizer, loader, state, metrics_log, writer, iterations=range(start + 1, train_iters + 1),
        accumulation=accumulation, loss_type=args.loss_type, clip_grad=args.clip_grad, schedule=schedule,
        save_fn=save_fn, save_interval=args.save_interval, eval_fn=eval_fn, eval_interval=args.eval_interval,
        profiler=profiler, start_time=start_time,
        signals=common.StopSignals(start_time + 60 * (args.exit_duration_in_mins or math.inf)),
    )


def main(argv: list[str]) -> None:
    start_time = time.monotonic()
    args = parse_args(argv)
    if args.dry_run:
        from tools.dry_run import dry_run  # which imports this file, a second time if it runs as __main__

        return dry_run(args)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to save
    ops = kernels_npu.select(args.device, args.compute_dtype, args.use_npu_fused_moe, args.deterministic)
    state = ParallelState(ops, args.distributed_timeout_minutes, cp=args.context_parallel_size,
                          ep=args.expert_parallel_size, fsdp=args.fsdp_size)
    args.global_batch_size, accumulation = batch_sizes(args.micro_batch_size, args.global_batch_size, state.dp_size)

    def prepare_directories() -> None:
        """Create the output directories on rank 0, and hold the lock on --save until the run ends."""
        if state.rank > 0:
            return
        for directory in (args.profile_dir, args.tensorboard_dir, args.save_hf and Path(args.save_hf).parent):
            if directory:
                Path(directory).mkdir(parents=True, exist_ok=True)
        if args.save_hf and Path(args.save_hf).exists():
            raise UsageError(f"--save-hf {args.save_hf} exists: give a new directory")
        if args.save:
            stack.enter_context(claim_save_directory(Path(args.save), args.load, vars(args)))

    with common.explain_errors(state), contextlib.ExitStack() as stack:
        state.run_synced(prepare_directories)
        train = setup(args, state, accumulation, start_time)
        is_complete = train is None or train()
    state.close()
    if args.save_hf and is_complete and state.rank == 0:  # the other ranks need not wait
        convert.dcp_to_hf(args.save if train else args.load, args.save_hf, args.init_from_hf_path)


if __name__ == "__main__":
    status = common.run_program(main, sys.argv[1:])
    sys.stdout.flush()
    if status == 0:
        os._exit(0)  # everything is written; gloo's threads sometimes abort a process that exits normally
    sys.exit(status)
