"""A model folder appears whole or not at all, and replaces nothing but an earlier export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared_core.checkpoints.atomic import _is_alive, _sync
from shared_core.deploy.facts import FACTS_FILE, ModelError, read_facts
from shared_core.runs.command import UsageError

CARD_FILE = "README.md"
CARD_MARK = "<!-- smallvision model card -->"  # first line of the card, so that it is known as ours
_SCRATCH = ".export-"  # and the number of the process that writes there
_UNDERWAY = ".export"  # lists what is being moved in


def check_export_folder(folder: str | Path) -> list[Path]:
    """The files of an earlier export that would be replaced; none where the folder is new or empty.

    Raises:
        UsageError: it is a file, holds something that no export wrote, or another process is
            writing an export to it.
    """
    folder = Path(folder)
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, expected a folder")
    present = sorted(folder.iterdir(), key=lambda path: path.name)
    known, ours = _named(folder), []
    for path in present:
        if process := _process_of(path):
            if process != os.getpid() and _is_alive(process):
                raise UsageError(f"{folder}: another export is being written to it")
        elif path.is_dir() or not (path.name in known or _is_card(path)):
            raise UsageError(
                f"{folder} holds {path.name}, which no export wrote: expected a new or empty "
                "folder, or an earlier export"
            )
        else:
            ours.append(path)
    return ours


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """A folder inside ``folder`` to write an export to; its files take their places at the end.

    An error leaves the earlier export as it was. A kill leaves it, or a folder without
    ``model.json``, which nothing opens; the next export cleans up.

    Raises:
        UsageError: see :func:`check_export_folder`.
    """
    folder = Path(folder)
    check_export_folder(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if _process_of(path):  # of a killed export
            shutil.rmtree(path, ignore_errors=True)
    scratch = folder / f"{_SCRATCH}{os.getpid()}"
    scratch.mkdir()
    done = False
    try:
        yield scratch
        _publish(scratch, folder)
        done = True
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if is_new and not done and not any(folder.iterdir()):
            folder.rmdir()


def _publish(scratch: Path, folder: Path) -> None:
    names = sorted(path.name for path in scratch.iterdir())
    for name in names:
        _sync(scratch / name)
    old = check_export_folder(folder)
    (folder / _UNDERWAY).write_text("\n".join(names), encoding="utf-8")
    # The description goes first and comes last: without it nobody takes the folder for a model.
    for path in sorted(old, key=lambda path: path.name != FACTS_FILE):
        path.unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: name == FACTS_FILE):
        os.replace(scratch / name, folder / name)
    (folder / _UNDERWAY).unlink(missing_ok=True)
    _sync(folder)


def _named(folder: Path) -> set[str]:
    """Names of files that an earlier export calls its own, one that was killed as well."""
    underway = folder / _UNDERWAY
    names = {_UNDERWAY}
    if underway.is_file():
        names |= {FACTS_FILE, *underway.read_text(encoding="utf-8").splitlines()}
    try:
        facts = read_facts(folder)
    except (FileNotFoundError, ModelError):
        return names
    return names.union({FACTS_FILE}, facts.sha256, *facts.files.values())


def _is_card(path: Path) -> bool:
    return path.name == CARD_FILE and path.read_bytes().startswith(CARD_MARK.encode())


def _process_of(path: Path) -> int:
    """The process that writes an export to this folder; 0 if it is something else."""
    number = path.name.removeprefix(_SCRATCH)
    return int(number) if number != path.name and number.isdigit() and path.is_dir() else 0
