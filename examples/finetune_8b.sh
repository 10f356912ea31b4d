#!/usr/bin/env bash
# Qwen3-VL-8B: one node of 8 devices. env.sh says what can be set from outside; arguments go to train.py.
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NNODES=${NNODES:-1} NPUS_PER_NODE=${NPUS_PER_NODE:-8}
CKPT=${CKPT:-$root/ckpt/Qwen3-VL-8B-Instruct} SAVE=${SAVE:-$root/save/8b}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-8}  # one sample for each device; fewer devices accumulate

# shellcheck source=examples/env.sh
source "$root/examples/env.sh" "$@"

# float32 parameters, gradients and AdamW's two moments are 16 bytes for each trained parameter: 17 GB a device on 8
# devices. Sequences of 1024 fit beside them with recompute, and offload would only cost time.
launch --freeze-vision-encoder --freeze-vision-projector --seq-length 1024 --recompute full \
    --save-interval 2000 --save-retain 2 "$@"
