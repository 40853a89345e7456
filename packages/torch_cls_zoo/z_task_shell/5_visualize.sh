#!/usr/bin/env bash
# Class activation maps of test images: CAM, Grad-CAM and Grad-CAM++ side by side.
source "$(dirname "$0")/common.sh"
need_weights
main --visual_data test --visual_method all --resume "$BEST" --output "$OUT/visual" "$@"
