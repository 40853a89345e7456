#!/usr/bin/env bash
# LR-range test: which learning rates make the loss fall; see lr_range.png.
source "$(dirname "$0")/common.sh"
main --find_lr "${STEPS:-100}" --arch "$ARCH" --image_size $SIZE --opt sgd --aug \
  --output "$OUT/lr_range" "$@"
