#!/bin/sh
# Llama-3.1-8B with 28 % of its cache (rank 512 + rope 64 of 2,048 numbers per token and layer, the
# sizes that DeepSeek's kernels take), healed towards the original on DATA. One GPU with 80 GB.
set -eu
MODEL=${MODEL:-meta-llama/Llama-3.1-8B}
DATA=${DATA:-HuggingFaceFW/fineweb-edu:sample-10BT}
OUT=${OUT:-llama-3.1-8b}
PRICE=${PRICE:-3}

mlakit convert "$MODEL" -o "$OUT-28" --kv-lora-rank 512 --qk-rope-head-dim 64 --for vllm \
  --calib "$DATA" --device cuda

set -- "$OUT-28" --teacher "$MODEL" -o "$OUT-healed" --data "$DATA" --train attention \
  --sequence-length 4096 --batch 32 --micro-batch 1 --checkpointing --device cuda \
  --price-per-hour "$PRICE"
mlakit heal "$@" --dry-run
mlakit heal "$@"

mlakit eval "$MODEL" "$OUT-healed" -o "$OUT-report" --device cuda
