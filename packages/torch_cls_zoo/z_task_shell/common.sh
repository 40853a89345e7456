# What the scripts share: where things lie, and a data folder to try them on when there is none.
# Set DATA to your folder (train/, val/ and test/ with one folder a class), OUT for the results,
# PYTHON for the interpreter; whatever follows a script's name goes to main.py as well.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python}"
DATA="${DATA:-data}"
OUT="${OUT:-runs/torch_cls_zoo}"
ARCH="${ARCH:-resnet18}"
SIZE="${SIZE:-224 224}"
EPOCHS="${EPOCHS:-85}"
if [ ! -d "$DATA" ]; then
  echo "$DATA is not there: drawing scenes into it"
  "$PYTHON" "$HERE/utils/builtin_data.py" "$DATA"
fi
BEST="$OUT/train/checkpoints/model_best_$ARCH.pth"
need_weights() {
  [ -f "$BEST" ] || { echo "error: $BEST is not there: run 2_train.sh first" >&2; exit 1; }
}
main() { "$PYTHON" "$HERE/main.py" --data "$DATA" "$@"; }
