"""The run folder as projects opened it before ``open_run``; goes when all of them use that."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from shared_core.runs.command import UsageError
from shared_core.runs.json_files import as_plain, read_object, write_json
from shared_core.runs.lock import RunLock
from shared_core.runs.place import CONFIG_FILE, check_same, is_run


class RunFolder:
    """A folder of one run with its configuration in ``config.json``."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: dict[str, Any],
        *,
        resume: bool = False,
        may_differ: tuple[str, ...] = (),
    ) -> RunFolder:
        """Make the folder, or with ``resume`` go on in the one that is there.

        Args:
            path: the run's folder; its parents are made.
            config: everything the run depends on, plain JSON.
            resume: continue; the configuration must be the one the run was started with.
            may_differ: keys that a resumed run may change (the number of threads, say).

        Raises:
            FileExistsError: the folder holds a run and ``resume`` is not set.
            ValueError: a resumed run's configuration differs; the first difference is named.
        """
        folder = cls(path)
        folder.path.mkdir(parents=True, exist_ok=True)
        config_file = folder.file(CONFIG_FILE)
        plain = as_plain(config)
        if not config_file.exists():
            write_json(config_file, plain, sort_keys=True)
        elif resume:
            check_same(folder.path, read_object(config_file), plain, may_differ=may_differ)
        else:
            raise FileExistsError(
                f"{folder.path} already holds a run: "
                "add --resume to continue it, or name another folder"
            )
        return folder

    def file(self, *parts: str) -> Path:
        """A path inside the folder; its parents are made."""
        path = self.path.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def remove_run(path: str | Path, *, keys: Collection[str]) -> None:
    """Delete an earlier run, and nothing that is not one; without a folder nothing happens.

    Args:
        path: the run's folder.
        keys: keys that the run's ``config.json`` must have; many programs write such a file.

    Raises:
        UsageError: the folder holds something else.
        ValueError: another process works in it.
    """
    folder = Path(path)
    if not folder.exists():
        return
    if any(folder.iterdir()) and not is_run(folder, keys):
        raise UsageError(
            f"--fresh: {folder} holds no run, expected one to replace; nothing deleted"
        )
    with RunLock(folder):
        shutil.rmtree(folder)
