"""The run folder: a new run never writes over an old one, a resumed run continues in its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from shared_core.checkpoints.atomic import atomic_write
from shared_core.runs.command import UsageError
from shared_core.runs.lock import RunLock

CONFIG_FILE = "config.json"


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
        plain = json.loads(json.dumps(config))
        if config_file.exists():
            if not resume:
                raise FileExistsError(
                    f"{folder.path} already holds a run: "
                    "add --resume to continue it, or name another folder"
                )
            stored = json.loads(config_file.read_text(encoding="utf-8"))
            for key in sorted(stored.keys() | plain.keys()):
                if key not in may_differ and stored.get(key) != plain.get(key):
                    raise ValueError(
                        f"cannot resume {folder.path}: it was started with {key}="
                        f"{stored.get(key)!r}, this command says {plain.get(key)!r}"
                    )
        else:
            text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
            atomic_write(config_file, lambda path: path.write_text(text, encoding="utf-8"))
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
    if any(folder.iterdir()) and not _is_run(folder, keys):
        raise UsageError(
            f"--fresh: {folder} holds no run, expected one to replace; nothing deleted"
        )
    with RunLock(folder):
        shutil.rmtree(folder)


def _is_run(folder: Path, keys: Collection[str]) -> bool:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and set(keys) <= config.keys()
