"""What the tests of the main job share: a tiny run, and processes that may be killed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from command_tools import Done, Server, run_main

# Three classes, 16 pixels, four blocks: every stage in a few seconds.
EXITS = (
    *("--scale", "rehearsal", "--builtin-classes", "3", "--builtin-images", "40"),
    *("--input-size", "16", "--exits", "0,1,2", "--num_epoch", "4", "--max_warmup_epoch", "2"),
    *("--batch", "16", "--bilevel_batch_count", "2", "--num_workers", "1", "--device", "cpu"),
)
NETWORKS = (
    *("--patch-size", "4", "--depth", "4", "--backbone-dim", "16", "--student-dim", "12"),
    *("--backbone-epochs", "2", "--student-epochs", "2", "--finetune-batch", "16"),
)
SIZES = (*EXITS, *NETWORKS)
# One thread: runs in this process and in forked ones must round alike.
ALONE = ("--use_mlflow", "false", "--threads", "1")
TINY = (*SIZES, *ALONE)

SETUP = """
import matplotlib.backends.backend_agg, matplotlib.figure, sklearn.linear_model
from gfnet_dynn import main, main_dynn, pipeline
def prepare(job):
    if not job.get("figures", True):
        pipeline.write_report = lambda *words: None
    if job.get("file_limit"):
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
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
def tiny_on_file() -> Callable[..., list[str]]:
    """The same on a model file: without the words that the file stands for."""

    def words(output: Path, *more: str) -> list[str]:
        return [*EXITS, *ALONE, "--output", str(output), *more]

    return words


@pytest.fixture(scope="session")
def command() -> Callable[..., Done]:
    """Run ``main.py`` (or ``main_dynn.py``) in this process as a shell would see it."""
    from gfnet_dynn import main, main_dynn

    def call(*words: str | Path, entry: str = "main") -> Done:
        return run_main((main if entry == "main" else main_dynn).main, words)

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory, tiny, command) -> tuple[Path, Done]:
    """A whole tiny run, and what it said."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    done = command(*tiny(folder))
    assert done.code == 0, done.err
    return folder, done


@pytest.fixture(scope="session")
def folder_of_images() -> Callable[..., Path]:
    """Write a folder of class folders; a class's images share a colour, noise tells them apart."""

    def make(
        root: Path, classes: Sequence[str] = ("a", "b", "c"), *, images: int = 40, size: int = 16
    ) -> Path:
        rng = np.random.default_rng(0)
        for label, name in enumerate(classes):
            (root / name).mkdir(parents=True)
            hue = np.zeros((1, 1, 3), np.uint8)
            hue[0, 0] = (int(180 * label / len(classes)), 200, 160)
            colour = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].astype(int)
            for index in range(images):
                noise = rng.integers(-40, 40, (size, size, 3))
                pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
                (root / name / f"{index:03d}.png").write_bytes(
                    cv2.imencode(".png", pixels)[1].tobytes()
                )
        return root

    return make


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Runs in this process write no report: drawing is half of a tiny run's time."""
    from gfnet_dynn import pipeline

    def write_nothing(run, record, drawn) -> None:
        for name in ("report.md", "report.html"):
            (run.folder / name).write_text("")

    monkeypatch.setattr(pipeline, "write_report", write_nothing)


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """sha256 of every model file of a run, by its path in the run."""

    def of(folder: Path) -> dict[str, str]:
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / "checkpoint").rglob("*.pth"))
        }

    return of


@pytest.fixture(scope="session")
def without_times() -> Callable[[object], object]:
    """A record's measured part without what a clock decided."""

    def strip(value: object) -> object:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if not k.startswith("ms_per_image")}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return strip


@pytest.fixture(scope="session")
def copy_of(finished) -> Callable[[Path], Path]:
    """A copy of the finished run, for tests that change it."""

    def copy(target: Path) -> Path:
        shutil.copytree(finished[0], target)
        return target

    return copy
