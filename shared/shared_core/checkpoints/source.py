"""Look at a path before it is read: is there a file at all, and is anything in it?"""

from pathlib import Path

from shared_core.checkpoints.errors import CheckpointError


def readable_file(path: str | Path) -> Path:
    """``path`` when it names a file with content.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError: it is a folder, something special (a device, a pipe), or empty.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected a checkpoint file")
    if not path.is_file():
        raise CheckpointError(f"{path} is no regular file, expected a checkpoint file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty, expected a checkpoint file")
    return path
