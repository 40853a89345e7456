"""One process works in a run folder; a second one is refused, a dead one's lock is taken over."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

LOCK_FILE = ".lock"


class RunLock:
    """A file in the run folder that the operating system holds locked while this process lives.

    The lock goes with the process, however it ends: what a killed one leaves behind is an unlocked
    file, and the next process takes it over. Where the system has no such locks (Windows), nothing
    is locked.

    Raises (on entering):
        ValueError: another process holds the lock.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / LOCK_FILE
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        try:
            import fcntl
        except ImportError:
            return self
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                owner = os.read(descriptor, 100).decode(errors="replace").strip() or "another one"
                os.close(descriptor)
                raise ValueError(
                    f"{self.path.parent} is in use by process {owner}: expected it to end first, "
                    "or another --output"
                ) from None
            if self._is_current(descriptor):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                self._descriptor = descriptor
            else:  # its owner removed it between our opening and our locking
                os.close(descriptor)
        return self

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
