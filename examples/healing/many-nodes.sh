#!/bin/sh
# The same on NODES machines of GPUS each: run it on every one, with its RANK (0 is the first) and
# the first one's ADDRESS. The conversion STUDENT and the output folder are on a disk that all see.
set -eu
STUDENT=${STUDENT:?folder that mlakit convert has written}
TEACHER=${TEACHER:?its original}
DATA=${DATA:?text to train on}
OUT=${OUT:?folder for the result}
NODES=${NODES:-4}
GPUS=${GPUS:-8}
RANK=${RANK:?number of this machine}
ADDRESS=${ADDRESS:?of machine 0}
PRICE=${PRICE:-100}
HERE=$(dirname "$0")

set -- "$STUDENT" --teacher "$TEACHER" -o "$OUT" --data "$DATA" --train attention \
  --sequence-length 4096 --batch 128 --micro-batch 1 --checkpointing --device cuda \
  --price-per-hour "$PRICE"
LAUNCH="accelerate launch --config_file $HERE/fsdp.yaml --num_machines $NODES \
  --num_processes $((NODES * GPUS)) --machine_rank $RANK --main_process_ip $ADDRESS -m mlakit"
$LAUNCH heal "$@" --dry-run
$LAUNCH heal "$@"
