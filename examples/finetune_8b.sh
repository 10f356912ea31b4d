#!/usr/bin/env bash
# Qwen3-VL-8B on one node of 8 devices.
# env.sh lists the variables that can be set outside. Arguments are passed to train.py.
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NNODES=${NNODES:-1} NPUS_PER_NODE=${NPUS_PER_NODE:-8}
CKPT=${CKPT:-$root/ckpt/Qwen3-VL-8B-Instruct} SAVE=${SAVE:-$root/save/8b}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-8}  # one sample per device; with fewer devices, gradients accumulate

# shellcheck source=examples/env.sh
source "$root/examples/env.sh" "$@"

# A trained parameter takes 16 bytes (parameter, gradient and AdamW's two moments, in float32): 17 GB per device on 8
# devices. With recompute, sequences of 1024 tokens fit in the rest; offload would only cost time.
launch --freeze-vision-encoder --freeze-vision-projector --seq-length 1024 --recompute full \
    --save-interval 2000 --save-retain 2 "$@"
