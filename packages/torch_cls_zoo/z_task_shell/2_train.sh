#!/usr/bin/env bash
# Train with augmentation, then test the best weights.
source "$(dirname "$0")/common.sh"
main --train --arch "$ARCH" --image_size $SIZE --epochs "$EPOCHS" --aug --output "$OUT/train" "$@"
