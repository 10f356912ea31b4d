#!/usr/bin/env bash
# Qwen3-VL-30B-A3B on 16 devices: one node of 16 by default, or two of 8 with NNODES=2 NPUS_PER_NODE=8.
# env.sh lists the variables that can be set outside. Arguments are passed to train.py.
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NNODES=${NNODES:-1} NPUS_PER_NODE=${NPUS_PER_NODE:-16}
CKPT=${CKPT:-$root/ckpt/Qwen3-VL-30B-A3B-Instruct} SAVE=${SAVE:-$root/save/30b_a3b}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-16}
# Without expert parallelism each rank gathers all 128 experts of a layer, 1.2 GB in bf16, for its 1024 tokens. With
# size 8 it gathers 16 of them and exchanges its tokens with the other ranks: 34 MB each way, within one node.
EP=${EP:-8}

# shellcheck source=examples/env.sh
source "$root/examples/env.sh" "$@"

# At 16 bytes per trained parameter a device holds 31 GB, so offload is not needed. The fused experts and the meta
# device are defaults of train.py; a model of this size needs the meta device.
launch --freeze-vision-encoder --freeze-vision-projector --seq-length 1024 --recompute full \
    --save-interval 2000 --save-retain 2 "$@"
