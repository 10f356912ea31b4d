#!/usr/bin/env bash
# Qwen3-VL-235B-A22B: 256 devices, 16 nodes of 16. On each node, with its number:
#     MASTER_ADDR=10.0.0.1 NODE_RANK=3 NODE_ADDR=10.0.0.4 bash examples/finetune_235b_a22b.sh
# env.sh says what can be set from outside; arguments go to train.py.
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NNODES=${NNODES:-16} NPUS_PER_NODE=${NPUS_PER_NODE:-16}
CKPT=${CKPT:-$root/ckpt/Qwen3-VL-235B-A22B-Instruct} SAVE=${SAVE:-$root/save/235b_a22b}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256}
# Without expert parallelism each rank gathers all 128 experts of a layer from all nodes, 4.8 GB in bf16, the next
# layer's ahead of them, and reduces 9.7 GB of float32 gradients. 16 neighbours, one node, hold 8 each: 0.3 and 0.6 GB
# go between the nodes, and the 1 GB of tokens that each rank sends and gets back stays on the node's own links.
EP=${EP:-16}
CP=${CP:-1}  # 16384 tokens fit one device, see below; above that, 2, 4, ...
TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-1}  # level 2 takes memory that this model needs
MULTI_STREAM_MEMORY_REUSE=${MULTI_STREAM_MEMORY_REUSE:-2}  # lets go of a collective's memory sooner

# shellcheck source=examples/env.sh
source "$root/examples/env.sh" "$@"

# 16 bytes for each trained parameter are 15 GB a device. The inputs of 94 layers, 12.6 GB at 16384 tokens, wait on the
# host (200 GB of its memory for 16 devices). The fused experts and the meta device are the defaults; both are needed.
# A checkpoint with the optimizer takes 2.8 TB: few of them, and ranks that wait for the slowest writer for longer.
launch --freeze-vision-encoder --freeze-vision-projector --seq-length 16384 --recompute full --activation-offload \
    --save-interval 5000 --save-retain 1 --distributed-timeout-minutes 30 "$@"
