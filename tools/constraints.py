"""Renew constraints.txt: one set of versions for Python 3.10 to 3.13, resolved together.

``make constraints`` runs this. Versions that must not move are pinned in ``tools/pins.in`` with the
reason beside each; everything else is the newest that fits.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
HEADER = """\
# The set of versions that is tested together, for Python 3.10 to 3.13. Made by `make constraints`.
# Not listed: the packages of this repository.
"""


def main() -> int:
    """Resolve, leave out this repository's own packages, and write the file."""
    projects = sorted((REPO / "packages").glob("*/pyproject.toml"))
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "constraints.txt"
        command = [
            sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal",
            "--python-version", "3.10", "--no-header", "--no-annotate", "--all-extras",
            "--constraint", str(REPO / "tools" / "pins.in"), "--output-file", str(resolved),
            str(REPO / "tools" / "requirements-dev.in"), *map(str, projects),
        ]  # fmt: skip
        done = subprocess.run(command, cwd=REPO, check=False)
        if done.returncode:
            return done.returncode
        lines = resolved.read_text(encoding="utf-8").splitlines()
    own = {path.parent.name.replace("_", "-") for path in projects} | {"shared-core"}
    kept = []
    for line in lines:
        name = re.split(r"[ =@\[;]", line, maxsplit=1)[0].lower().replace("_", "-")
        if line and name not in own and "file:" not in line and not line.startswith("-e"):
            kept.append(line)
    (REPO / "constraints.txt").write_text(HEADER + "\n".join(kept) + "\n", encoding="utf-8")
    print(f"constraints.txt: {len(kept)} versions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
