"""The package: requirements are those of pyproject, every file that is no Python is packed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "packages" / "visiondistill_gc"


def table(path):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    return tomllib.loads(path.read_text(encoding="utf-8"))


def test_requirements_are_pyprojects():
    wanted = {}
    for path in (PACKAGE / "pyproject.toml", REPOSITORY / "shared" / "pyproject.toml"):
        for name, version in table(path)["tool"]["poetry"]["dependencies"].items():
            if name != "shared-core":
                wanted[name] = version
    lines = (PACKAGE / "requirements.txt").read_text().splitlines()
    found = dict(
        re.fullmatch(r"([a-z0-9-]+)(.+)", line).groups() for line in lines if line[0] != "#"
    )
    assert found == wanted


def test_every_data_file_is_packed():
    packed = {
        entry["include"].split("/", 1)[1]
        for entry in table(PACKAGE / "pyproject.toml")["tool"]["poetry"]["packages"]
    } - {"**/*.py"}
    kept = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".toml")
    }
    assert packed == kept - {"README.md", "LICENSE"}


def test_no_torch():
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"^\s*(import|from) torch\b", path.read_text(), re.M), path
