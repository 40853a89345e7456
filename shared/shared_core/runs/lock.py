"""Who may work in a folder: one process, or several that know of each other; the dead hold none."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType

LOCK_FILE = ".lock"
_PAUSE_S = 0.05


class RunLock:
    """A file in the folder that the operating system holds locked while this process lives.

    The lock goes with the process, however it ends: what a killed one leaves behind is an unlocked
    file, and the next process takes it over. Where the system has no such locks (Windows), nothing
    is locked.

    Args:
        folder: that is worked in; made where it is not there.
        shared: others may hold the lock as well if they, too, say ``shared``.
        wait: seconds to wait for another process; ``math.inf`` for as long as it takes.

    Raises (on entering):
        ValueError: another process holds the lock.
    """

    def __init__(self, folder: str | Path, *, shared: bool = False, wait: float = 0.0) -> None:
        self.path, self.wait = Path(folder) / LOCK_FILE, wait
        self._shared = shared
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        try:
            import fcntl
        except ImportError:
            return self
        kind = fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX
        end = time.monotonic() + self.wait
        while self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # its last owner failed, and has just removed the folder
                continue
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except OSError:
                owner = os.read(descriptor, 100).decode(errors="replace").strip() or "another one"
                os.close(descriptor)
                if time.monotonic() < end:
                    time.sleep(_PAUSE_S)
                    continue
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

    def share(self) -> None:
        """Let others in who say ``shared``; this process goes on holding the lock."""
        if self._descriptor is not None:
            import fcntl

            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        self._shared = True

    def alone(self) -> bool:
        """At the end of the work: whether no other process holds the lock; then none can, now."""
        if self._descriptor is not None and self._shared:
            import fcntl

            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
            self._shared = False
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            if self.alone():
                self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
