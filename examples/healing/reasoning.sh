#!/bin/sh
# A compressed model learns from the reasoning traces that DeepSeek-R1 wrote (the recipe r1), or
# from your own: DATA as JSONL rows {"messages": [...]} or {"prompt": ..., "completion": ...}.
set -eu
STUDENT=${STUDENT:?folder that mlakit convert has written}
TEACHER=${TEACHER:?its original}
OUT=${OUT:?folder for the result}
PRICE=${PRICE:-3}

set -- "$STUDENT" --teacher "$TEACHER" -o "$OUT" --recipe r1 ${DATA:+--data "$DATA"} \
  --kl-weight 0.5 --micro-batch 1 --checkpointing --control --device cuda \
  --price-per-hour "$PRICE"
mlakit heal "$@" --dry-run
mlakit heal "$@"
