#!/usr/bin/env bash
# Qwen3-VL-32B: 16 devices, by default one node of 16 (NNODES=2 NPUS_PER_NODE=8 for two of 8).
# env.sh says what can be set from outside; arguments go to train.py.
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NNODES=${NNODES:-1} NPUS_PER_NODE=${NPUS_PER_NODE:-16}
CKPT=${CKPT:-$root/ckpt/Qwen3-VL-32B-Instruct} SAVE=${SAVE:-$root/save/32b}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-16}

# shellcheck source=examples/env.sh
source "$root/examples/env.sh" "$@"

# 16 bytes for each trained parameter are 33 GB a device on 16 devices: it fits 64 GB with recompute, without offload.
# A checkpoint with the optimizer takes 400 GB: the interval weighs its time against the steps that a crash would lose.
launch --freeze-vision-encoder --freeze-vision-projector --seq-length 1024 --recompute full \
    --save-interval 2000 --save-retain 2 "$@"
