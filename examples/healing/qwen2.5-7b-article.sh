#!/bin/sh
# Qwen2.5-7B at equal cache, trained as in the TransMLA article (arXiv 2502.07864): the key/value
# path alone, on SmolTalk's maths and code, batch 16, learning rate 2e-5, 2 epochs.
# One GPU with 80 GB. PRICE is that of the machine per hour.
set -eu
MODEL=${MODEL:-Qwen/Qwen2.5-7B}
OUT=${OUT:-qwen2.5-7b}
PRICE=${PRICE:-3}

[ -d "$OUT-exact" ] || mlakit convert "$MODEL" -o "$OUT-exact" --equal-cache

set -- "$OUT-exact" --teacher "$MODEL" -o "$OUT-healed" --recipe article --control \
  --micro-batch 2 --checkpointing --device cuda --price-per-hour "$PRICE"
mlakit heal "$@" --dry-run
mlakit heal "$@"

# The article's tasks, for the original and for the healed model.
mlakit eval "$MODEL" "$OUT-healed" -o "$OUT-report" --tasks gsm8k --device cuda
