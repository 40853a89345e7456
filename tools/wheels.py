"""Wheels and sources to hand on: they install anywhere, without this checkout.

In the checkout a project names the core by path, which lands in its metadata as an address of this
machine. Here each distribution is laid out anew in a temporary folder, its package beside its
``pyproject.toml``, the path replaced by ``shared-core==<version>``, and built there: first the
source, then the wheel from that source, so that both are known to work. ``make wheels`` runs this.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
PROJECTS = sorted(path.parent for path in REPO.glob("packages/*/pyproject.toml"))
BUILD = """
import sys
from poetry.core.masonry import api
print(getattr(api, sys.argv[1])(sys.argv[2]))
"""


def version() -> str:
    """The core's version, which is everyone's."""
    text = (REPO / "shared" / "pyproject.toml").read_text(encoding="utf-8")
    return re.findall(r'^version = "([^"]+)"$', text, flags=re.MULTILINE)[0]


def settings_for(text: str, number: str) -> str:
    """A ``pyproject.toml`` whose package lies beside it and that names the core by version."""
    text = re.sub(r"^shared-core = .*$", f'shared-core = "{number}"', text, flags=re.MULTILINE)
    text = text.replace(', from = ".."', "")
    if "path =" in text or ".." in text.replace("...", ""):
        raise SystemExit("error: pyproject.toml still names a path: expected none in a release")
    return text


def lay_out(source: Path, target: Path, number: str) -> None:
    """Copy what git knows of one distribution so that it can be built where it lies."""
    listed = subprocess.run(
        ["git", "-C", str(source), "ls-files", "-z"], capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.split("\0") if name and (source / name).is_file()]
    inside = target if source.name == "shared" else target / source.name
    for name in names:
        place = inside / name
        if name in ("pyproject.toml", "README.md", "LICENSE"):
            place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, place)
    text = (source / "pyproject.toml").read_text(encoding="utf-8")
    (target / "pyproject.toml").write_text(settings_for(text, number), encoding="utf-8")


def build(what: str, folder: Path, output: Path) -> Path:
    """``build_sdist`` or ``build_wheel`` of the distribution in ``folder``."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD, what, str(output)], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"error: {folder.name} {what}: {done.stderr.strip().splitlines()[-1]}")
    return output / done.stdout.strip().splitlines()[-1]


def main(argv: list[str] | None = None) -> int:
    """Build everything into one folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=REPO / "dist", help="folder (default: dist)")
    output = parser.parse_args(argv).output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    number = version()
    for source in (REPO / "shared", *PROJECTS):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / source.name
            lay_out(source, folder, number)
            archive = build("build_sdist", folder, output)
            with tarfile.open(archive) as packed:
                packed.extractall(scratch)  # our own archive of a moment ago
            wheel = build(
                "build_wheel", Path(scratch) / archive.name.removesuffix(".tar.gz"), output
            )
        print(f"{output.name}/{wheel.name}")
    print(f"install them anywhere: pip install --find-links {output.name} gfnet_dynn=={number}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
