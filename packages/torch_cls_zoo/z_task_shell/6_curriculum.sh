#!/usr/bin/env bash
# Weigh each training image by how sure the best weights are of it, then train with these weights.
source "$(dirname "$0")/common.sh"
need_weights
main --make_curriculum train --curriculum_thresholds 0.7 0.5 0.3 0.0 \
  --curriculum_weights 1 0.7 0.4 0.1 --resume "$BEST" --output "$OUT/make_curriculum"
main --train --curriculum_learning --arch "$ARCH" --image_size $SIZE --epochs "$EPOCHS" --aug \
  --output "$OUT/curriculum" "$@"
