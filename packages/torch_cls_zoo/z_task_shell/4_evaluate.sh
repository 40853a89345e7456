#!/usr/bin/env bash
# Measure the best weights of 2_train.sh on the test part.
source "$(dirname "$0")/common.sh"
need_weights
main --evaluate --resume "$BEST" --output "$OUT/evaluate" "$@"
