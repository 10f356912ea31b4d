#!/usr/bin/env bash
# Qwen3-VL-235B-A22B on 256 devices: 16 nodes of 16. Run on each node, with its own NODE_RANK and NODE_ADDR:
#     MASTER_ADDR=10.0.0.1 NODE_RANK=3 NODE_ADDR=10.0.0.4 bash examples/finetune_235b_a22b.sh
# env.sh lists the variables that can be set outside. Arguments are passed to train.py.
set -euo pipefail
root=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NNODES=${NNODES:-16} NPUS_PER_NODE=${NPUS_PER_NODE:-16}
CKPT=${CKPT:-$root/ckpt/Qwen3-VL-235B-A22B-Instruct} SAVE=${SAVE:-$root/save/235b_a22b}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-256}
# Without expert parallelism each rank gathers all 128 experts of a layer from all nodes (4.8 GB in bf16, and the next
# layer's in advance) and reduces 9.7 GB of float32 gradients. With size 16 each rank of a node holds 8 experts: 0.3 GB
# and 0.6 GB cross the nodes. The 1 GB of tokens that a rank sends and receives stays within its node.
EP=${EP:-16}
CP=${CP:-1}  # 16384 tokens fit on one device, see below; for more give 2, 4, ...
TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-1}  # level 2 needs memory that this model does not leave
MULTI_STREAM_MEMORY_REUSE=${MULTI_STREAM_MEMORY_REUSE:-2}  # frees the memory of a collective earlier

# shellcheck source=examples/env.sh
source "$root/examples/env.sh" "$@"

# At 16 bytes per trained parameter a device holds 15 GB. Offload keeps the inputs of the 94 layers (12.6 GB at 16384
# tokens) on the host, 200 GB for 16 devices. The fused experts and the meta device are defaults; this model needs both.
# A checkpoint with the optimizer takes 2.8 TB. So few are kept, and the timeout allows for the slowest writer.
launch --freeze-vision-encoder --freeze-vision-projector --seq-length 16384 --recompute full --activation-offload \
    --save-interval 5000 --save-retain 1 --distributed-timeout-minutes 30 "$@"
