"""The folder of a run while it is open: locking, looking, comparing, emptying, undoing.

The lock comes before anything is read, compared or removed. What the run depends on stands in
``config.json``; a resumed run must say the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from shared_core.runs.command import UsageError
from shared_core.runs.json_files import as_plain, read_object, write_json
from shared_core.runs.lock import LOCK_FILE, RunLock
from shared_core.runs.stage_log import STAGES_FILE

CONFIG_FILE = "config.json"
Start = Literal["new", "resume", "continue", "fresh"]
# Files that took long to make: where a failed first run left one, the run stays to be resumed.
DURABLE = (
    "*.pth", "*.pth.tar", "*.pt", "*.pdparams", "*.pdopt", "*.safetensors", "*.onnx", "*.npy",
    "*.npz", "values.bin", "cell.json",
)  # fmt: skip
QUICK_STAGES = ("prepare",)  # finished in a moment: alone they are no reason to keep a run
SHARED_WAIT_S = 10.0  # what another process may take to write the configuration
_LEAVING = ".fresh"  # the configuration of a run that is being removed


def is_durable(path: Path) -> bool:
    """Whether a file, or one in a folder, took long to make; see :data:`DURABLE`."""
    if path.is_file():
        return any(path.match(pattern) for pattern in DURABLE)
    return any(next(path.rglob(pattern), None) is not None for pattern in DURABLE)


def remove(path: Path) -> None:
    """Take away a file, or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_run(folder: Path, keys: Collection[str]) -> bool:
    """Whether a folder holds a run whose configuration has ``keys``."""
    try:
        return set(keys) <= read_object(folder / CONFIG_FILE).keys()
    except (OSError, ValueError):
        return False


def check_same(
    folder: Path,
    stored: Mapping[str, Any],
    plain: Mapping[str, Any],
    *,
    may_differ: Collection[str] = (),
) -> None:
    """Refuse to go on with a run under other settings.

    Raises:
        ValueError: a key differs; the first one is named.
    """
    for key in sorted(stored.keys() | plain.keys()):
        if key not in may_differ and stored.get(key) != plain.get(key):
            raise ValueError(
                f"cannot resume {folder}: it was started with {key}={stored.get(key)!r}, "
                f"this command says {plain.get(key)!r}"
            )


class Place:
    """The folder while it is open, and what was there before."""

    def __init__(self, folder: Path, *, keys: Collection[str], shared: bool) -> None:
        self.folder, self.keys, self.config_file = folder, keys, folder / CONFIG_FILE
        self._may_share = shared
        self._lock: RunLock | None = None
        self._missing: list[Path] = []
        self._before: set[str] | None = None  # of a run that begins here

    def open(
        self,
        config: Mapping[str, Any],
        start: Start,
        *,
        may_differ: Collection[str],
        kept: Collection[str],
        usual: Mapping[str, Any],
    ) -> tuple[tuple[dict[str, Any], dict[str, Any], bool], dict[str, dict[str, Any]]]:
        """Lock, look, compare, write. Returns what an :class:`OpenRun` holds, and the stages."""
        self._enter(alone=not self._may_share or start == "fresh")
        if (self.folder / _LEAVING).exists():  # an earlier --fresh was killed at it
            self._empty()
        stored = self._stored(start)
        known = {**usual, **stored}
        plain: dict[str, Any] = as_plain(dict(config))
        for key in kept:
            if plain.get(key) is None and known.get(key) is not None:
                plain[key] = known[key]
        if stored:
            check_same(self.folder, stored, plain, may_differ=may_differ)
        else:
            self._before = self._names()
            write_json(self.config_file, plain, sort_keys=True)
        stages_file = self.folder / STAGES_FILE
        stages = read_object(stages_file) if stored and stages_file.exists() else {}
        if self._may_share and self._lock is not None:
            self._lock.share()
        return (plain, stored, bool(stored)), stages

    def _enter(self, *, alone: bool) -> None:
        """Make the folder and lock it; not ``alone`` if others have got it going already."""
        self._missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        while self._lock is None:
            try:
                self._lock = RunLock(self.folder).__enter__()
            except ValueError:
                if alone:
                    raise
                self._join()

    def _join(self) -> None:
        lock = RunLock(self.folder, shared=True, wait=SHARED_WAIT_S).__enter__()
        if self.config_file.exists():
            self._lock = lock
        else:  # the first one has failed
            lock.__exit__(None, None, None)

    def _names(self) -> set[str]:
        """Names of what lies in the folder, without our own scratch files."""
        ours = (LOCK_FILE, f".{CONFIG_FILE}.tmp-")
        return {p.name for p in self.folder.iterdir() if not p.name.startswith(ours)}

    def _stored(self, start: Start) -> dict[str, Any]:
        """The configuration to go on with; empty for a run that begins."""
        there = self.config_file.exists()
        if start == "fresh":
            if self._names() and not is_run(self.folder, self.keys):
                raise UsageError(
                    f"--fresh: {self.folder} holds no run, expected one to replace; nothing deleted"
                )
            self._empty()
            return {}
        if start == "resume" and not there:
            raise FileNotFoundError(f"nothing to resume: {self.folder} holds no run")
        if start == "new" and there:
            raise FileExistsError(
                f"{self.folder} already holds a run: add --resume to continue it, "
                "--fresh to replace it, or name another folder"
            )
        if not there:
            return {}
        if not is_run(self.folder, self.keys):
            raise ValueError(
                f"cannot resume {self.folder}: its {CONFIG_FILE} is of another command, "
                f"expected {', '.join(sorted(self.keys))} in it"
            )
        return read_object(self.config_file)

    def _empty(self) -> None:
        """Take away everything but the lock; when it is killed, the next start goes on with it."""
        leaving = self.folder / _LEAVING
        if self.config_file.exists():
            os.replace(self.config_file, leaving)
        for name in self._names() - {_LEAVING}:
            remove(self.folder / name)
        leaving.unlink(missing_ok=True)

    def undo(self) -> None:
        """The run failed: leave nothing of it, if it has just begun and made nothing of worth."""
        if self._lock is None or self._before is None or self._has_durable(self._before):
            return
        if not self._lock.alone():
            return
        for name in sorted(self._names() - self._before, key=lambda name: name == CONFIG_FILE):
            remove(self.folder / name)

    def _has_durable(self, before: set[str]) -> bool:
        stages_file = self.folder / STAGES_FILE
        if stages_file.exists() and read_object(stages_file).keys() - set(QUICK_STAGES):
            return True
        return any(is_durable(self.folder / name) for name in self._names() - before)

    def leave(self) -> None:
        """Open the lock, and remove folders that were made and are empty."""
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None
            with suppress(OSError):
                for path in self._missing:
                    path.rmdir()
