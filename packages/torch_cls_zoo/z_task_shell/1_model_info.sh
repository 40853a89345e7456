#!/usr/bin/env bash
# The layers of a network with their parameters and MACs. Needs no data.
HERE="$(cd "$(dirname "$0")/.." && pwd)"
"${PYTHON:-python}" "$HERE/main.py" --arch "${ARCH:-resnet18}" --image_size ${SIZE:-224 224} \
  --num_classes "${CLASSES:-6}" "$@"
