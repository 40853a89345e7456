#!/usr/bin/env bash
# Train in several processes. GPUs=2 takes two GPUs; without any, two processes share the CPU.
# On several machines: NODES=2 RANK_OF_NODE=0 INIT=tcp://ADDRESS:10006, the rank of each its own.
# The same under torchrun:
#   torchrun --nproc_per_node 2 main.py --data DATA --train --no-cuda
source "$(dirname "$0")/common.sh"
WHERE=()
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || WHERE=(--no-cuda)
main --train --arch "$ARCH" --image_size $SIZE --epochs "$EPOCHS" --aug \
  --init_method "${INIT:-tcp://127.0.0.1:10006}" --nodes "${NODES:-1}" \
  --rank "${RANK_OF_NODE:-0}" --gpus "${GPUS:-2}" "${WHERE[@]}" --output "$OUT/distributed" "$@"
