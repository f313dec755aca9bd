#!/bin/sh
# Qwen2.5-14B as in the article, on one node: GPUS processes share both models (FSDP2).
set -eu
MODEL=${MODEL:-Qwen/Qwen2.5-14B}
OUT=${OUT:-qwen2.5-14b}
GPUS=${GPUS:-8}
PRICE=${PRICE:-25}
HERE=$(dirname "$0")

[ -d "$OUT-exact" ] || mlakit convert "$MODEL" -o "$OUT-exact" --equal-cache

set -- "$OUT-exact" --teacher "$MODEL" -o "$OUT-healed" --recipe article --control \
  --micro-batch 1 --checkpointing --device cuda --price-per-hour "$PRICE"
LAUNCH="accelerate launch --config_file $HERE/fsdp.yaml --num_processes $GPUS -m mlakit"
$LAUNCH heal "$@" --dry-run
$LAUNCH heal "$@"

mlakit eval "$MODEL" "$OUT-healed" -o "$OUT-report" --tasks gsm8k --device cuda
