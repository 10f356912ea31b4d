#!/usr/bin/env bash
# Qwen3-VL-30B-A3B: 16 devices, by default one node of 16 (NNODES=2 NPUS_PER_NODE=8 for two of 8).
# env.sh says what can be set from outside; arguments go to train.py.
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NNODES=${NNODES:-1} NPUS_PER_NODE=${NPUS_PER_NODE:-16}
CKPT=${CKPT:-$root/ckpt/Qwen3-VL-30B-A3B-Instruct} SAVE=${SAVE:-$root/save/30b_a3b}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-16}
# Without expert parallelism each rank gathers all 128 experts of a layer, 1.2 GB in bf16, for its 1024 tokens. With 8
# it gathers 16 of them, and sends its tokens to the others instead: 34 MB each way. 8 neighbours are within one node.
EP=${EP:-8}

# shellcheck source=examples/env.sh
source "$root/examples/env.sh" "$@"

# 16 bytes for each trained parameter are 31 GB a device on 16 devices, so no offload. The fused experts are the
# device's default. The model starts on the meta device, which is the default, too: it is needed at this size.
launch --freeze-vision-encoder --freeze-vision-projector --seq-length 1024 --recompute full \
    --save-interval 2000 --save-retain 2 "$@"
