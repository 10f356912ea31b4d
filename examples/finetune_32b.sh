#!/usr/bin/env bash
# Qwen3-VL-32B on 16 devices: one node of 16 by default, or two of 8 with NNODES=2 NPUS_PER_NODE=8.
# env.sh lists the variables that can be set outside. Arguments are passed to train.py.
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NNODES=${NNODES:-1} NPUS_PER_NODE=${NPUS_PER_NODE:-16}
CKPT=${CKPT:-$root/ckpt/Qwen3-VL-32B-Instruct} SAVE=${SAVE:-$root/save/32b}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-16}

# shellcheck source=examples/env.sh
source "$root/examples/env.sh" "$@"

# At 16 bytes per trained parameter a device holds 33 GB. With recompute that fits in 64 GB without offload.
# A checkpoint with the optimizer takes 400 GB. The save interval trades the time to write it against the steps that a
# crash loses.
launch --freeze-vision-encoder --freeze-vision-projector --seq-length 1024 --recompute full \
    --save-interval 2000 --save-retain 2 "$@"
