"""What the tests of the training half share: a tiny run, and processes that may be killed."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from command_tools import Done, Server, run_main

# What the tests of the deploy half share is imported by name: there is no package here.
_spec = importlib.util.spec_from_file_location(
    "vgc_tools", Path(__file__).with_name("vgc_tools.py")
)
sys.modules["vgc_tools"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["vgc_tools"])

# Two classes, 32 pixels, the narrowest nets: every stage in a few seconds. The learning rate of the
# teacher is not what makes these runs pass: nobody asks here how good it is.
TINY = (
    *("--scale", "rehearsal", "--builtin-classes", "2", "--builtin-images", "24"),
    *("--init", "none", "--student", "mobilenet_v2"),
    *("--input-size", "32", "--n-splits", "2", "--teacher", "shufflenet_v2_x0_25"),
    *("--teacher-epochs", "1", "--teacher-batch-size", "8", "--epochs", "2", "--batch-size", "8"),
    *("--student-scale", "0.1", "--hidden", "16", "--mixup-start", "1", "--warmup-epochs", "1"),
    *("--num-workers", "1", "--device", "cpu", "--threads", "1", "--no-floor"),
    *("--allow-untrained-teacher", "--compare-seeds"),
)

# Forks a process for each line of its input, so that Paddle is imported once.
SETUP = """
import matplotlib.backends.backend_agg, matplotlib.figure, visualdl
from visiondistill_gc import main
from visiondistill_gc.run import pipeline
def prepare(job):
    pipeline.write_report = lambda *words: None
"""


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    started = Server(SETUP)
    yield started
    started.close()


@pytest.fixture(scope="session")
def tiny() -> Callable[..., list[str]]:
    """The words of a tiny run into a folder; more words may follow."""

    def words(output: Path, *more: str) -> list[str]:
        return [*TINY, "--output", str(output), *more]

    return words


@pytest.fixture(scope="session")
def command() -> Callable[..., Done]:
    """Run ``main.py`` in this process as a shell would see it."""
    from visiondistill_gc import main

    return lambda *words: run_main(main.main, words)


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """sha256 of every model file and prediction of a run, by its path in the run."""

    def of(folder: Path) -> dict[str, str]:
        files = [*folder.glob("models_saved/*"), *folder.glob("tables/*")]
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(files)
        }

    return of
