# What the launch scripts share: where and on how many devices to train, the environment, the checks, the command.
# Sourced, with the arguments of the script. What is set outside counts, then what the script sets, then what is here:
#
#     CKPT=/data/Qwen3-VL-8B-Instruct DATASET=rows.json SAVE=/data/out bash examples/finetune_8b.sh --train-iters 500
#     DRY=1 bash examples/finetune_8b.sh      # checks, prints the command and ends
#
# Many nodes: the same command on each, with NNODES, NODE_RANK, MASTER_ADDR and, where a node has several addresses,
# NODE_ADDR; CKPT, DATASET and SAVE have to be the same files everywhere.
# A value that cannot work ends the script with status 2 and one line, before Python starts.
# shellcheck shell=bash

fail() {  # NAME WHAT: the variable NAME must be WHAT
    echo "error: $1=${!1}: must be $2" >&2
    exit 2
}

whole() {  # NAME LOW HIGH
    if [[ ! ${!1} =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((${!1} < $2 || ${!1} > $3)); then
        fail "$1" "a whole number in $2..$3"
    fi
}

one_of() {  # NAME VALUE...
    local name=$1 value
    shift
    for value; do
        [[ ${!name} != "$value" ]] || return 0
    done
    fail "$name" "one of $*"
}

given() {  # FLAG ARGUMENT...: whether the arguments hold the flag, or a file of flags that may
    local flag=$1 argument
    shift
    for argument; do
        [[ $argument != "$flag" && $argument != "$flag="* && $argument != @* ]] || return 0
    done
    return 1
}

# ---- where --------------------------------------------------------------------------------------------------------

ROOT=$(CDPATH="" cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

NNODES=${NNODES:-1}                       # how many nodes
NODE_RANK=${NODE_RANK:-0}                 # this node's number, 0..NNODES-1
NPUS_PER_NODE=${NPUS_PER_NODE:-8}         # devices of a node, of whatever kind: one process for each
MASTER_ADDR=${MASTER_ADDR:-localhost}     # address of node 0, as every node can reach it
MASTER_PORT=${MASTER_PORT:-29501}         # a free port there, 1024..65535
NODE_ADDR=${NODE_ADDR:-}                  # this node's own address; empty: torchrun looks it up

CKPT=${CKPT:-$ROOT/ckpt/model}            # Hugging Face directory: config.json, tokenizer.json, safetensors
DATASET=${DATASET:-$ROOT/data/rows.json}  # files of rows, comma-separated, no spaces
SAVE=${SAVE:-$ROOT/save}                  # checkpoints, metrics.jsonl; on many nodes a directory that all of them share

EP=${EP:-1}                               # ranks that share the experts of a layer
CP=${CP:-1}                               # ranks that share a sequence (Ulysses)
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}   # samples of one forward
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-8} # samples of an optimizer step

# ---- the environment ----------------------------------------------------------------------------------------------
# Ascend's variables mean nothing to CUDA and CPU.

# CANN's log on the screen: 0 off, 1 on
export ASCEND_SLOG_PRINT_TO_STDOUT=${ASCEND_SLOG_PRINT_TO_STDOUT:-0}
# what CANN logs: 0 DEBUG, 1 INFO, 2 WARNING, 3 ERROR, 4 nothing
export ASCEND_GLOBAL_LOG_LEVEL=${ASCEND_GLOBAL_LOG_LEVEL:-3}
# operators are dispatched through a queue: 0 off, 1 level 1, 2 level 2 (faster, takes more memory)
export TASK_QUEUE_ENABLE=${TASK_QUEUE_ENABLE:-2}
# two operators in a row on non-contiguous input become one: 0 off, 1 on
export COMBINED_ENABLE=${COMBINED_ENABLE:-1}
# dispatch threads are bound to cores: 0 off, 1 coarse, 2 fine
export CPU_AFFINITY_CONF=${CPU_AFFINITY_CONF:-1}
# seconds that devices may take to connect to each other: 120..7200; CANN's 120 is short for many nodes
export HCCL_CONNECT_TIMEOUT=${HCCL_CONNECT_TIMEOUT:-1200}
# seconds that a device waits for the others at a collective: 68..17340; see also --distributed-timeout-minutes
export HCCL_EXEC_TIMEOUT=${HCCL_EXEC_TIMEOUT:-1800}
# the caching allocator: expandable_segments:True (fewer holes in memory) or expandable_segments:False
export PYTORCH_NPU_ALLOC_CONF=${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}
# operators remembered on the host, for each shape, and lengths vary: 1..10000000; CANN's own is 10000
export ACLNN_CACHE_LIMIT=${ACLNN_CACHE_LIMIT:-100000}
# threads of the tokenizer, beside the loader's processes: False or True
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-False}
# memory of a collective is used again: 0 late, 1 once it has been waited for, 2 the same by holding its tensors
export MULTI_STREAM_MEMORY_REUSE=${MULTI_STREAM_MEMORY_REUSE:-1}
# abnormal values are looked for: 0 off, 1 logged, 2 alerted, 3 alerted and recorded on the device
export NPU_ASD_ENABLE=${NPU_ASD_ENABLE:-0}
# 0 asynchronous operators; 1 synchronous: slow, but an error shows where it happened
export ASCEND_LAUNCH_BLOCKING=${ASCEND_LAUNCH_BLOCKING:-0}
# hardware queues of a device: 2..32; with 1, FSDP2 could not communicate while it computes
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-2}
# seconds from a signal until torchrun kills, in which to save (a stopped process holds up the end of a failed run so
# long): 30..86400; torch 2.7.1 always takes 30
export TORCHELASTIC_SHUTDOWN_TIMEOUT=${TORCHELASTIC_SHUTDOWN_TIMEOUT:-1200}

# ---- the checks ---------------------------------------------------------------------------------------------------

whole NNODES 1 65536
whole NPUS_PER_NODE 1 64
whole NODE_RANK 0 $((NNODES - 1))  # below NNODES
whole MASTER_PORT 1024 65535
[[ $MASTER_ADDR =~ ^[A-Za-z0-9._:-]+$ ]] || fail MASTER_ADDR "a host's name or address"
[[ $NODE_ADDR =~ ^[A-Za-z0-9._:-]*$ ]] || fail NODE_ADDR "a host's name or address"
((NNODES == 1)) || [[ $MASTER_ADDR != localhost ]] || fail MASTER_ADDR "the address of node 0 with NNODES=$NNODES"

whole EP 1 65536
whole CP 1 65536
whole MICRO_BATCH_SIZE 1 1000000
whole GLOBAL_BATCH_SIZE 1 1000000
WORLD=$((NNODES * NPUS_PER_NODE))
devices="NNODES x NPUS_PER_NODE = $WORLD devices"
given --expert-parallel-size "$@" || ((WORLD % EP == 0)) || fail EP "a divisor of $devices"
if ! given --context-parallel-size "$@"; then
    ((WORLD % CP == 0)) || fail CP "a divisor of $devices"
    given --micro-batch-size "$@" || given --global-batch-size "$@" ||
        ((GLOBAL_BATCH_SIZE % (MICRO_BATCH_SIZE * WORLD / CP) == 0)) ||
        fail GLOBAL_BATCH_SIZE "a multiple of $((MICRO_BATCH_SIZE * WORLD / CP)), MICRO_BATCH_SIZE x $WORLD / CP"
fi

one_of ASCEND_SLOG_PRINT_TO_STDOUT 0 1
one_of ASCEND_GLOBAL_LOG_LEVEL 0 1 2 3 4
one_of TASK_QUEUE_ENABLE 0 1 2
one_of COMBINED_ENABLE 0 1
one_of CPU_AFFINITY_CONF 0 1 2
whole HCCL_CONNECT_TIMEOUT 120 7200
whole HCCL_EXEC_TIMEOUT 68 17340
one_of PYTORCH_NPU_ALLOC_CONF expandable_segments:True expandable_segments:False
whole ACLNN_CACHE_LIMIT 1 10000000
one_of TOKENIZERS_PARALLELISM False True false true
one_of MULTI_STREAM_MEMORY_REUSE 0 1 2
one_of NPU_ASD_ENABLE 0 1 2 3
one_of ASCEND_LAUNCH_BLOCKING 0 1
whole CUDA_DEVICE_MAX_CONNECTIONS 2 32
whole TORCHELASTIC_SHUTDOWN_TIMEOUT 30 86400

given --init-from-hf-path "$@" || [[ -f $CKPT/config.json ]] || fail CKPT "a Hugging Face directory (with config.json)"
if ! given --dataset "$@"; then
    IFS=, read -r -a files <<< "$DATASET"
    for file in "${files[@]}"; do
        [[ -f $file ]] || fail DATASET "files of rows, comma-separated: there is no ${file:-file without a name}"
    done
fi

# ---- CANN ---------------------------------------------------------------------------------------------------------
# Its set_env.sh: ASCEND_SET_ENV, else that of ASCEND_TOOLKIT_HOME, else where CANN's installer puts it. Without NPUs
# there is none, and none is needed.

if [[ -n ${ASCEND_SET_ENV:-} ]]; then
    candidates=("$ASCEND_SET_ENV")
    [[ -f $ASCEND_SET_ENV ]] || fail ASCEND_SET_ENV "CANN's set_env.sh"
elif [[ -n ${ASCEND_TOOLKIT_HOME:-} ]]; then  # set_env.sh itself sets it, to the directory `latest` beside it
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
        set +eu  # it reads variables that need not be there
        # shellcheck disable=SC1090
        source "$file"
        set -eu
        break
    fi
done

# ---- the command --------------------------------------------------------------------------------------------------

forward() {  # SIGNAL: to the training processes, which save and end; torchrun would kill them after its own delay
    pkill "-$1" -P "$torchrun_pid" || [[ $1 == USR1 ]] || kill "-$1" "$torchrun_pid"
}

launch() {  # FLAG...: trains with torchrun on this node; of a flag given twice the last one counts
    local torchrun length="--train-iters 10000" warmup="--lr-warmup-fraction 0.1"
    torchrun=$(command -v torchrun || echo "$ROOT/.venv/bin/torchrun")  # the active environment's, or make's
    ! given --train-epochs "$@" || length=""  # these two exclude each other, and the next two; a file of flags among
    ! given --lr-warmup-iters "$@" || warmup=""  # the arguments has to say how long to train
    # shellcheck disable=SC2206
    local command=(
        "$torchrun" --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPUS_PER_NODE"
        --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" ${NODE_ADDR:+--local-addr "$NODE_ADDR"}
        "$ROOT/train.py" --init-from-hf-path "$CKPT" --dataset "$DATASET" --save "$SAVE"
        --context-parallel-size "$CP" --expert-parallel-size "$EP"
        --micro-batch-size "$MICRO_BATCH_SIZE" --global-batch-size "$GLOBAL_BATCH_SIZE" $length
        --lr 1e-5 --lr-decay-style cosine $warmup --weight-decay 0 --adam-beta1 0.9 --adam-beta2 0.999 --clip-grad 0
        --seed 42 --num-workers 8
        --image-max-pixels 262144  # 512 x 512: 256 tokens, so that a few pictures fit in a sequence
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
    set -m  # torchrun gets a process group of its own: Ctrl-C reaches this script alone, which forwards it
    "${command[@]}" &
    torchrun_pid=$!
    trap 'forward TERM' TERM HUP
    trap 'forward INT' INT
    trap 'forward USR1' USR1
    while kill -0 "$torchrun_pid" 2>/dev/null; do
        wait "$torchrun_pid" || true  # a signal interrupts it
    done
    wait "$torchrun_pid"  # its status
}
