"""What the tests of landmark_distill share: tiny runs, folders of images, killed processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from command_tools import Done, run_main

REPOSITORY = Path(__file__).resolve().parents[2]
# A run of a second or two: small images, narrow nets, one thread (so that runs round alike).
LANDMARK_TINY = (
    *("--image_size", "32", "--feature_dim", "16", "--batch_size", "16", "--max_epoch", "2"),
    *("--lr", "0.05", "--num_workers", "0", "--threads", "1", "--device", "cpu"),
    *("--builtin_classes", "8", "--builtin_images", "8", "--test_share", "0.3"),
)


@pytest.fixture(scope="session")
def landmark_tiny() -> Callable[..., list[str]]:
    """The words of a tiny run into a folder; more words may follow."""

    def words(save_dir: Path, *more: str | Path) -> list[str]:
        return [*LANDMARK_TINY, "--save_dir", str(save_dir), *map(str, more)]

    return words


@pytest.fixture(scope="session")
def landmark() -> Callable[..., Done]:
    """Run ``main.py`` (or ``reproduce.py``) in this process as a shell would see it."""
    from landmark_distill import main, reproduce

    def call(*words: str | Path, entry: str = "main") -> Done:
        return run_main((main if entry == "main" else reproduce).main, words)

    return call


@pytest.fixture(scope="session")
def landmark_process() -> Callable[..., subprocess.Popen[str]]:
    """Start ``main.py`` in a process of its own, which may be killed."""

    def start(words: Sequence[str | Path], *launcher: str) -> subprocess.Popen[str]:
        script = str(REPOSITORY / "packages" / "landmark_distill" / "main.py")
        return subprocess.Popen(
            [sys.executable, *launcher, script, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return start


def only(folder: Path, name: str) -> Path:
    """The one file of this name below a folder."""
    (found,) = folder.rglob(name)
    return found


@pytest.fixture(scope="session")
def file_of() -> Callable[[Path, str], Path]:
    """The one file of a name below a run's ``--save_dir``."""
    return only


@pytest.fixture(scope="session")
def landmark_images() -> Callable[..., Path]:
    """Write ``coarse/fine/*.png``: a fine class is a colour, noise tells its images apart."""

    def make(
        root: Path, groups: Sequence[str] = ("a", "b", "c", "d"), *, fine: int = 2, images: int = 6
    ) -> Path:
        rng = np.random.default_rng(0)
        for group in groups:
            for number in range(fine):
                folder = root / group / f"fine{number}"
                folder.mkdir(parents=True)
                colour = rng.integers(30, 220, 3)
                for index in range(images):
                    noise = rng.integers(-25, 25, (24, 24, 3))
                    pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
                    data = cv2.imencode(".png", pixels)[1].tobytes()
                    (folder / f"{index}.png").write_bytes(data)
        return root

    return make


@pytest.fixture(scope="session")
def landmark_teacher(tmp_path_factory, landmark, landmark_tiny) -> Path:
    """A teacher's file: a tiny ResNet12 of two epochs with a head of its own."""
    folder = tmp_path_factory.mktemp("teacher")
    done = landmark(*landmark_tiny(folder))
    assert done.code == 0, done.err
    return only(folder, "max_acc.pth")


@pytest.fixture(scope="session")
def finished_run(landmark_teacher) -> Path:
    """The folder of a finished run: that of the teacher."""
    return landmark_teacher.parent
