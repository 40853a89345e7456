#!/usr/bin/env bash
# TorchScript, ONNX and torch.export files of the best weights; demos/classifier.py runs them.
source "$(dirname "$0")/common.sh"
need_weights
main --jit --resume "$BEST" --output "$OUT/deploy" "$@"
