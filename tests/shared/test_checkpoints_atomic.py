"""Atomic writes: the old file or the new one, whatever happens in between."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared_core.checkpoints import atomic_write

SHARED = Path(__file__).resolve().parents[2] / "shared"


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_writes_and_replaces(tmp_path):
    path = tmp_path / "new" / "a.bin"
    atomic_write(path, lambda p: p.write_bytes(b"one"))
    atomic_write(path, lambda p: p.write_bytes(b"two"))
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")])
def test_a_failing_writer_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def writer(scratch):
        scratch.write_bytes(b"half")
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, writer)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_full_disk_names_the_file_and_keeps_its_kind(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def writer(scratch):
        scratch.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", "scratch")

    with pytest.raises(OSError, match=f"cannot write {path}: No space left on device") as caught:
        atomic_write(path, writer)
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_folder_in_the_way_is_an_error(tmp_path):
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(OSError, match="cannot write"):
        atomic_write(tmp_path / "a.bin", lambda p: p.write_bytes(b"x"))
    assert names(tmp_path) == ["a.bin"]


def test_a_link_stays_a_link(tmp_path):
    real, link = tmp_path / "real.bin", tmp_path / "link.bin"
    real.write_bytes(b"old")
    link.symlink_to(real)
    atomic_write(link, lambda p: p.write_bytes(b"new"))
    assert link.is_symlink()
    assert real.read_bytes() == b"new"


def test_a_writer_of_somebody_else_is_alive(tmp_path, monkeypatch):
    def not_permitted(pid, number):
        raise PermissionError(1, "Operation not permitted")

    other = tmp_path / ".a.bin.tmp-12345"
    other.write_bytes(b"")
    monkeypatch.setattr(os, "kill", not_permitted)
    atomic_write(tmp_path / "a.bin", lambda p: p.write_bytes(b"new"))
    assert other.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from shared_core.checkpoints import atomic_write
def writer(scratch):
    scratch.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
atomic_write(Path(sys.argv[2]), writer)
"""


def test_kill_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(SHARED), str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2  # the half-written scratch file of the killed process
    other = tmp_path / f".a.bin.tmp-{os.getppid()}"  # a writer that lives: not ours to remove
    other.write_bytes(b"")
    atomic_write(path, lambda p: p.write_bytes(b"new"))
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == [other.name, "a.bin"]
