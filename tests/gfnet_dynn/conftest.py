"""What the tests of the main job share: a tiny run, and processes that may be killed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# Three classes, 16 pixels, four blocks: every stage in a few seconds.
SIZES = (
    *("--scale", "rehearsal", "--builtin-classes", "3", "--builtin-images", "40"),
    *("--input-size", "16", "--patch-size", "4", "--depth", "4", "--exits", "0,1,2"),
    *("--backbone-dim", "16", "--student-dim", "12", "--backbone-epochs", "2"),
    *("--student-epochs", "2", "--num_epoch", "4", "--max_warmup_epoch", "2"),
    *("--finetune-batch", "16", "--batch", "16", "--bilevel_batch_count", "2"),
    *("--num_workers", "1", "--device", "cpu"),
)
# One thread: runs in this process and in forked ones must round alike.
TINY = (*SIZES, "--use_mlflow", "false", "--threads", "1")

# Forks a process for each line of its input, so that torch is imported once.
SERVER = """
import json, os, sys
import matplotlib.backends.backend_agg, matplotlib.figure, sklearn.linear_model
from gfnet_dynn import main, main_dynn
from gfnet_dynn import pipeline
from shared_core.runs import run_command
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        out = os.open(job["out"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        if not job["figures"]:
            pipeline.write_report = lambda *words: None
        if job["file_limit"]:
            import resource, signal
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
        os._exit(run_command(main.main, job["argv"]))
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@dataclass
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str


class Server:
    """Starts runs in processes of their own."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(REPOSITORY / "packages"), str(REPOSITORY / "shared")])
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        out: Path,
        kill: Callable[[float], bool] | None = None,
        file_limit: int = 0,
        figures: bool = True,
    ) -> int:
        """Exit code, or -9 when ``kill(seconds since the start)`` said so and it was killed."""
        job = {"argv": list(argv), "out": str(out), "file_limit": file_limit}
        job["figures"] = figures
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid, start = int(self.process.stdout.readline()), time.monotonic()
        while kill is not None and _alive(pid):
            if kill(time.monotonic() - start):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc")
    started = Server()
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
    """Run ``main.py`` (or ``main_dynn.py``) in this process as a shell would see it."""
    from gfnet_dynn import main, main_dynn
    from shared_core.runs import run_command

    def call(*words: str | Path, entry: str = "main") -> Done:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                which = main if entry == "main" else main_dynn
                code = run_command(which.main, [str(word) for word in words])
            except SystemExit as stop:  # argparse
                code = int(stop.code or 0)
        return Done(code, out.getvalue(), err.getvalue())

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
