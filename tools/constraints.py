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

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

REPO = Path(__file__).resolve().parents[1]
# Extras that pin old versions of what the others need: installed in an environment of their own.
ALONE = {"paddleclas"}
HEADER = """\
# The set of versions that is tested together, for Python 3.10 to 3.13. Made by `make constraints`.
# Not listed: the packages of this repository.
"""


def requirement(project: Path) -> str:
    """A project with all its extras, but those of ``ALONE``, as a requirement."""
    settings = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    extras = sorted(set(settings.get("optional-dependencies", {})) - ALONE)
    named = f"[{','.join(extras)}]" if extras else ""
    return f"{settings['name']}{named} @ {project.parent.as_uri()}"


def main() -> int:
    """Resolve, leave out this repository's own packages, and write the file."""
    projects = sorted((REPO / "packages").glob("*/pyproject.toml"))
    with tempfile.TemporaryDirectory() as folder:
        resolved, wanted = Path(folder) / "constraints.txt", Path(folder) / "projects.in"
        wanted.write_text("".join(f"{requirement(path)}\n" for path in projects), "utf-8")
        command = [
            sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal",
            "--python-version", "3.10", "--no-header", "--no-annotate",
            "--constraint", str(REPO / "tools" / "pins.in"), "--output-file", str(resolved),
            str(REPO / "tools" / "requirements-dev.in"), str(wanted),
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
