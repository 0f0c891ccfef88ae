#!/usr/bin/env bash
# Every measurement of this project that needs a GPU, in at most eight minutes, into one folder of JSON.
#
#   benchmarks/gpu.sh [FOLDER]
#   DEVICE=cpu SIZE=tiny SCENARIO=smoke MODEL=FOLDER KERNELS="--rows 256 --vocabs 8192 --no-compile" \
#       benchmarks/gpu.sh /tmp/check                  # a check on a CPU, three minutes
#
# Nothing is installed: PYTHON (python3) has the project's packages. Each part has its own limit, and one that fails or
# runs into it is named at the end and does not keep the others from running. Exit status 1 says that one did.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=$(realpath -m "${1:-benchmarks/results/gpu}")
PYTHON=${PYTHON:-python3} DEVICE=${DEVICE:-cuda} SIZE=${SIZE:-8b} SCENARIO=${SCENARIO:-gpu} MODEL=${MODEL:-smollm2}
REPEATS=${REPEATS:-7} SLOTS=${SLOTS:-1,8,16,32} CONTEXT=${CONTEXT:-1024}
TEXTS=${TEXTS:-2048,8192,32768} NODES=${NODES:-16,64}
KERNELS=${KERNELS:---dtype bfloat16 --width 4096 --rows 8192 --vocabs 152064 --divergences forward_kl}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
mkdir -p "$OUT"
failed=""

part() {  # name, seconds, command
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    if timeout "$limit" "$@" > "$OUT/$name.log" 2>&1; then
        echo "$name: $((SECONDS - began)) s"
    else
        echo "$name: failed after $((SECONDS - began)) s; the end of $OUT/$name.log:"
        tail -n 5 "$OUT/$name.log"
        failed="$failed $name"
    fi
}

# What a round costs at a size that is worth serving, whatever the weights say.
part rounds 100 "$PYTHON" benchmarks/rounds.py --device "$DEVICE" --size "$SIZE" --slots "$SLOTS" --context "$CONTEXT" \
    --repeats "$REPEATS" --out "$OUT"
# Attention of trees alone, against its peers and against the bandwidth of this GPU.
part tree_attention 70 "$PYTHON" benchmarks/tree_attention.py --device "$DEVICE" --slots 1,8 --nodes "$NODES" \
    --texts "$TEXTS" --repeats $((REPEATS * 5)) --out "$OUT"
# The drafter's loss through both heads, and its row kernel.
part kernels 110 "$PYTHON" benchmarks/kernels.py --device "$DEVICE" $KERNELS --repeats "$REPEATS" --out "$OUT"
# Day 0, a shift, and the paper's table by number of slots, on a target that says something.
part adaptation 200 "$PYTHON" -m aurora_rl.cli.main bench adaptation --scenario "$SCENARIO" --out "$OUT/adaptation" \
    model="$MODEL" device="$DEVICE"
cp -f "$OUT/adaptation/results.json" "$OUT/adaptation.json" 2> /dev/null || true
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
