#!/usr/bin/env bash
# Train exits on one data set with the values of the original: the first command of main_dynn.txt for it.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: main_dynn.bash {NaSC|NWPU|AID|PatternNet|UCM} [more options of main_dynn.py]

Runs from any folder. Options given here win over those of main_dynn.txt:
  main_dynn.bash AID --img_size 128          other size
  main_dynn.bash NaSC --resume               go on with a run that was stopped
  main_dynn.bash NaSC --resume --eval        only evaluate
Variables: DATA_ROOT (folder of the data sets), PYTHON (which Python).
TEXT
}

fail() { printf 'error: %s\n' "$2" >&2; exit "$1"; }

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
checkout=$(dirname -- "$(dirname -- "$here")")
# Data, results and the environment belong to the checkout; an installed copy works in the current folder.
[ -f "$checkout/Makefile" ] && home=$checkout || home=$PWD

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  '') usage >&2; fail 2 "no data set named" ;;
esac

wanted=$(printf '%s' "$1" | tr '[:upper:]' '[:lower:]')
case "$wanted" in
  nasc) name=NaSC ;;
  nwpu) name=NWPU ;;
  aid) name=AID ;;
  patternnet) name=PatternNet ;;
  ucm) name=UCM ;;
  *) fail 2 "unknown data set '$1': expected NaSC, NWPU, AID, PatternNet or UCM" ;;
esac
shift

python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x "$home/.venv/bin/python" ]; then python=$home/.venv/bin/python; else python=python3; fi
fi
command -v -- "$python" >/dev/null || fail 1 "no Python at '$python': run make setup, or set PYTHON"
[ -f "$here/main_dynn.txt" ] || fail 1 "no $here/main_dynn.txt: expected the commands there"

line=$(grep -m 1 -E "^[^#]*main_dynn\.py --data-set $name " "$here/main_dynn.txt") ||
  fail 1 "main_dynn.txt holds no command for $name"
read -ra words <<<"${line#*main_dynn.py }"

exec "$python" "$here/main_dynn.py" "${words[@]}" \
  --data-root "${DATA_ROOT:-$home/data}" --output "$home/runs/gfnet_dynn/$wanted-dynn" "$@"
