"""Write a file so that a crash leaves the old one or the new one, never half of one."""

import os
from collections.abc import Callable
from glob import escape
from pathlib import Path


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists and belongs to somebody else
        return True
    return True


def _remove_leftovers(target: Path) -> None:
    """Remove what earlier writers of ``target`` left behind when they were killed."""
    for leftover in target.parent.glob(f".{escape(target.name)}.tmp-*"):
        pid = leftover.name.rpartition("-")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            leftover.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, writer: Callable[[Path], object]) -> None:
    """Let ``writer`` write a scratch file, then put it in the place of ``path`` at once.

    The scratch file lies in the same folder (a rename across disks is not atomic), and is on the
    disk before the rename, so that a power cut cannot leave an empty file under the final name.
    A symbolic link is followed: its target is replaced, the link stays.

    Args:
        path: the file to create or replace; missing folders are made.
        writer: writes the whole content to the path that it is given.

    Raises:
        OSError: the disk is full, the folder is read-only...; ``path`` is as it was before.
        Exception: whatever ``writer`` raises; ``path`` is as it was before.
    """
    target = Path(os.path.realpath(path))
    scratch = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        writer(scratch)
        _sync(scratch)
        os.replace(scratch, target)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        told = type(error)(f"cannot write {path}: {error.strerror or error}")
        told.errno = error.errno
        raise told from error
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        _sync(target.parent)
