#!/usr/bin/env bash
# Write what the best weights say of the training images, then train a student from it.
source "$(dirname "$0")/common.sh"
need_weights
main --knowledge train --resume "$BEST" --output "$OUT/knowledge"
main --train --distill --arch "${STUDENT:-$ARCH}" --image_size $SIZE --epochs "$EPOCHS" --aug \
  --output "$OUT/distilled" "$@"
