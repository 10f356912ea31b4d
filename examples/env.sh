# The part that all launch scripts share: settings, environment variables, checks and the torchrun command.
# A launch script sources this file with its own arguments. A variable set outside wins over the launch script, and the
# launch script wins over the defaults below:
#
#     CKPT=/data/Qwen3-VL-8B-Instruct DATASET=rows.json SAVE=/data/out bash examples/finetune_8b.sh --train-iters 500
#     DRY=1 bash examples/finetune_8b.sh      # check, print the command and exit
#
# Several nodes: run the same command on each, with NNODES, NODE_RANK, MASTER_ADDR and, if a node has several addresses,
# NODE_ADDR. CKPT, DATASET and SAVE must name the same files on every node.
# A wrong value ends the script with exit status 2 and one line, before Python starts.
# shellcheck shell=bash

fail() {  # NAME WHAT: report that the variable NAME must be WHAT, and exit
    echo "error: $1=${!1}: must be $2" >&2
    exit 2
}

require_integer() {  # NAME LOW HIGH: fail unless the variable is an integer from LOW to HIGH
    if [[ ! ${!1} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((${!1} < $2 || ${!1} > $3)); then
        fail "$1" "a whole number in $2..$3"
    fi
}

require_one_of() {  # NAME VALUE...: fail unless the variable has one of the values
    local name=$1 value
    shift
    for value; do
        [[ ${!name} != "$value" ]] || return 0
    done
    fail "$name" "one of $*"
}

has_flag() {  # FLAG ARGUMENT...: succeed if the arguments contain the flag, or an @FILE that may contain it
    local flag=$1 argument
    shift
    for argument; do
        [[ $argument != "$flag" && $argument != "$flag="* && $argument != @* ]] || return 0
    done
    return 1
}

# ---- settings -----------------------------------------------------------------------------------------------------

ROOT=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NNODES=${NNODES:-1}                       # number of nodes
NODE_RANK=${NODE_RANK:-0}                 # number of this node, 0..NNODES-1
NPUS_PER_NODE=${NPUS_PER_NODE:-8}         # devices of a node (NPU, GPU or CPU); each gets one process
MASTER_ADDR=${MASTER_ADDR:-localhost}     # address of node 0 that every node can reach
MASTER_PORT=${MASTER_PORT:-29501}         # a free port on node 0, 1024..65535
NODE_ADDR=${NODE_ADDR:-}                  # this node's own address; if empty, torchrun finds it

CKPT=${CKPT:-$ROOT/ckpt/model}            # Hugging Face directory: config.json, tokenizer.json, safetensors
DATASET=${DATASET:-$ROOT/data/rows.json}  # files of rows, comma-separated, no spaces
SAVE=${SAVE:-$ROOT/save}                  # checkpoints and metrics.jsonl; must be shared by all nodes

EP=${EP:-1}                               # expert-parallel size: ranks that share the experts of a layer
LORA_RANK=${LORA_RANK:-0}                 # rank of LoRA adapters, which then are trained in place of weights; 0: none
CP=${CP:-1}                               # context-parallel size: ranks that share a sequence
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}   # samples of one forward on one rank
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-8} # samples of an optimizer step

# ---- environment --------------------------------------------------------------------------------------------------
# CUDA and CPU ignore the variables of Ascend.

# print CANN's log on the screen: 0 off, 1 on
export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
# level of CANN's log: 0 DEBUG, 1 INFO, 2 WARNING, 3 ERROR, 4 nothing
export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}
# dispatch operators through a queue: 0 off, 1 level 1, 2 level 2 (faster, needs more memory)
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
# fuse two successive operators on non-contiguous input: 0 off, 1 on
export COMBINED_ENABLE=${COMBINED_ENABLE:-1}
# bind dispatch threads to cores: 0 off, 1 coarse, 2 fine
export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
# seconds in which devices must connect to each other: 120..7200; CANN's default of 120 is short for many nodes
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}
# seconds that a device waits for the others in a collective: 68..17340; see also --distributed-timeout-minutes
export HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-1800}
# caching allocator: expandable_segments:True (less fragmentation) or expandable_segments:False
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
# entries of the host's operator cache, one for each shape: 1..10000000; CANN's default is 10000, but lengths vary
export ACLNN_CACHE_LIMIT=${ACLNN_CACHE_LIMIT:-100000}
# let the tokenizer use threads beside the data loader's processes: False or True
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-False}
# reuse the memory of a collective: 0 late, 1 after waiting for it, 2 the same by holding its tensors
export MULTI_STREAM_MEMORY_REUSE=${MULTI_STREAM_MEMORY_REUSE:-1}
# detect abnormal values: 0 off, 1 log them, 2 raise an alert, 3 also record them on the device
export NPU_ASD_ENABLE=${NPU_ASD_ENABLE:-0}
# 0 asynchronous operators; 1 synchronous operators: slow, but an error names its operator
export ASCEND_LAUNCH_BLOCKING=${ASCEND_LAUNCH_BLOCKING:-0}
# hardware queues of a device: 2..32; with 1, FSDP2 cannot overlap communication and computation
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-2}
# seconds from a signal until torchrun kills its workers, which save a checkpoint meanwhile: 30..86400. A process that
# does not respond delays the end of a failed run by as much. torch 2.7.1 ignores the variable and waits 30 seconds.
export TORCHELASTIC_SHUTDOWN_TIMEOUT=${TORCHELASTIC_SHUTDOWN_TIMEOUT:-1200}

# ---- checks -------------------------------------------------------------------------------------------------------

require_integer NNODES 1 65536
require_integer NPUS_PER_NODE 1 64
require_integer NODE_RANK 0 $((NNODES - 1))
require_integer MASTER_PORT 1024 65535
[[ $MASTER_ADDR =~ ^[A-Za-z0-9._:-]+$ ]] || fail MASTER_ADDR "a host's name or address"
[[ $NODE_ADDR =~ ^[A-Za-z0-9._:-]*$ ]] || fail NODE_ADDR "a host's name or address"
((NNODES == 1)) || [[ $MASTER_ADDR != localhost ]] || fail MASTER_ADDR "the address of node 0 with NNODES=$NNODES"

require_integer EP 1 65536
require_integer CP 1 65536
require_integer LORA_RANK 0 65536
require_integer MICRO_BATCH_SIZE 1 1000000
require_integer GLOBAL_BATCH_SIZE 1 1000000
WORLD=$((NNODES * NPUS_PER_NODE))
devices="NNODES x NPUS_PER_NODE = $WORLD devices"
has_flag --expert-parallel-size "$@" || ((WORLD % EP == 0)) || fail EP "a divisor of $devices"
if ! has_flag --context-parallel-size "$@"; then
    ((WORLD % CP == 0)) || fail CP "a divisor of $devices"
    has_flag --micro-batch-size "$@" || has_flag --global-batch-size "$@" ||
        ((GLOBAL_BATCH_SIZE % (MICRO_BATCH_SIZE * WORLD / CP) == 0)) ||
        fail GLOBAL_BATCH_SIZE "a multiple of $((MICRO_BATCH_SIZE * WORLD / CP)), MICRO_BATCH_SIZE x $WORLD / CP"
fi

require_one_of ASCEND_SLOG_PRINT_TO_STDOUT 0 1
require_one_of ASCEND_GLOBAL_LOG_LEVEL 0 1 2 3 4
require_one_of TASK_QUEUE_ENABLE 0 1 2
require_one_of COMBINED_ENABLE 0 1
require_one_of CPU_AFFINITY_CONF 0 1 2
require_integer HCCL_CONNECT_TIMEOUT 120 7200
require_integer HCCL_EXEC_TIMEOUT 68 17340
require_one_of PYTORCH_NPU_ALLOC_CONF expandable_segments:True expandable_segments:False
require_integer ACLNN_CACHE_LIMIT 1 10000000
require_one_of TOKENIZERS_PARALLELISM False True false true
require_one_of MULTI_STREAM_MEMORY_REUSE 0 1 2
require_one_of NPU_ASD_ENABLE 0 1 2 3
require_one_of ASCEND_LAUNCH_BLOCKING 0 1
require_integer CUDA_DEVICE_MAX_CONNECTIONS 2 32
require_integer TORCHELASTIC_SHUTDOWN_TIMEOUT 30 86400

has_flag --init-from-hf-path "$@" || [[ -f $CKPT/config.json ]] ||
    fail CKPT "a Hugging Face directory (with config.json)"
if ! has_flag --dataset "$@"; then
    IFS=, read -r -a files <<< "$DATASET"
    for file in "${files[@]}"; do
        [[ -f $file ]] || fail DATASET "files of rows, comma-separated: there is no ${file:-file without a name}"
    done
fi

# ---- CANN ---------------------------------------------------------------------------------------------------------
# Source CANN's set_env.sh: the file ASCEND_SET_ENV, or the one of ASCEND_TOOLKIT_HOME, or the one in the installer's
# default directory. A machine without NPUs has none and needs none.

if [[ -n ${ASCEND_SET_ENV:-} ]]; then
    candidates=("$ASCEND_SET_ENV")
    [[ -f $ASCEND_SET_ENV ]] || fail ASCEND_SET_ENV "CANN's set_env.sh"
elif [[ -n ${ASCEND_TOOLKIT_HOME:-} ]]; then  # set_env.sh sets it to the directory `latest` beside itself
    candidates=("$ASCEND_TOOLKIT_HOME/set_env.sh" "$ASCEND_TOOLKIT_HOME/../set_env.sh")
    [[ -f ${candidates[0]} || -f ${candidates[1]} ]] || fail ASCEND_TOOLKIT_HOME "the directory of CANN's set_env.sh"
else
    candidates=(/usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/cann/set_env.sh)
    if [[ -e /dev/davinci_manager && ! -f ${candidates[0]} && ! -f ${candidates[1]} ]]; then
        echo "error: this machine has NPUs, but no ${candidates[0]}: name CANN's set_env.sh in ASCEND_SET_ENV" >&2
        exit 2
    fi
fi
for file in "${candidates[@]}"; do
    if [[ -f $file ]]; then
        set +eu  # set_env.sh reads unset variables and may return an error
        # shellcheck disable=SC1090
        source "$file"
        set -eu
        break
    fi
done

# ---- command ------------------------------------------------------------------------------------------------------

forward() {  # SIGNAL: send it to the training processes, which save and exit; torchrun would kill them after its delay
    pkill "-$1" -P "$torchrun_pid" || [[ $1 == USR1 ]] || kill "-$1" "$torchrun_pid"
}

launch() {  # FLAG...: train with torchrun on this node; if a flag is given twice, the last one counts
    local torchrun length="--train-iters 10000" warmup="--lr-warmup-fraction 0.1" lr=1e-5
    torchrun=$(command -v torchrun || echo "$ROOT/.venv/bin/torchrun")  # of the active environment, or of make
    # --train-epochs excludes --train-iters, and --lr-warmup-iters excludes --lr-warmup-fraction. If an argument is an
    # @FILE, that file must give the length of the training.
    ! has_flag --train-epochs "$@" || length=""
    ! has_flag --lr-warmup-iters "$@" || warmup=""
    ((LORA_RANK == 0)) || lr=1e-4
    # shellcheck disable=SC2206
    local command=(
        "$torchrun" --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPUS_PER_NODE"
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" ${NODE_ADDR:+--local-addr "$NODE_ADDR"}
        "$ROOT/train.py" --init-from-hf-path "$CKPT" --dataset "$DATASET" --save "$SAVE"
        --context-parallel-size "$CP" --expert-parallel-size "$EP"
        --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" $length
        --lora-rank "$LORA_RANK" --lr "$lr" --lr-decay-style cosine $warmup --weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.999 --clip-grad 0
        --seed 42 --num-workers 8
        --image-max-pixels 262144  # 512 x 512: 256 tokens, so that a sequence holds several images
        "$@"
    )
    if [[ ${DRY:-0} != 0 ]]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    if [[ ! -x $torchrun ]]; then
        echo "error: torchrun is neither on the PATH nor in $ROOT/.venv: activate the environment that has torch" >&2
        exit 2
    fi
    set -m  # torchrun gets its own process group: Ctrl-C reaches only this script, which forwards it
    "${command[@]}" &
    torchrun_pid=$!
    trap 'forward TERM' TERM HUP
    trap 'forward INT' INT
    trap 'forward USR1' USR1
    while kill -0 "$torchrun_pid" 2>/dev/null; do
        wait "$torchrun_pid" || true  # a signal interrupts `wait`
    done
    wait "$torchrun_pid"  # return its exit status
}
