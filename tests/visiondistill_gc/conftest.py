"""What the tests of the training half share: a tiny run, and processes that may be killed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join([str(REPOSITORY / "packages"), str(REPOSITORY / "shared")])
# Two classes, 32 pixels, the narrowest nets: every stage in a few seconds. The learning rate of the
# teacher is not what makes these runs pass: nobody asks here how good it is.
TINY = (
    *("--scale", "rehearsal", "--builtin-classes", "2", "--builtin-images", "24"),
    *("--input-size", "32", "--n-splits", "2", "--teacher", "shufflenet_v2_x0_25"),
    *("--teacher-epochs", "1", "--teacher-batch-size", "8", "--epochs", "2", "--batch-size", "8"),
    *("--student-scale", "0.1", "--hidden", "16", "--mixup-start", "1", "--warmup-epochs", "1"),
    *("--num-workers", "1", "--device", "cpu", "--threads", "1", "--no-floor"),
    *("--allow-untrained-teacher", "--compare-seeds"),
)

# Forks a process for each line of its input, so that Paddle is imported once.
SERVER = """
import json, os, sys
import matplotlib.backends.backend_agg, matplotlib.figure, visualdl
from visiondistill_gc import main, pipeline
from shared_core.runs import run_command
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        out = os.open(job["out"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        pipeline.write_report = lambda *words: None
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
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": PATH},
        )

    def run(
        self, argv: Sequence[str], *, out: Path, kill: Callable[[float], bool] | None = None
    ) -> int:
        """Exit code, or -9 when ``kill(seconds since the start)`` said so and it was killed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"argv": list(argv), "out": str(out)}) + "\n")
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
    """Run ``main.py`` in this process as a shell would see it."""
    from shared_core.runs import run_command
    from visiondistill_gc import main

    def call(*words: str | Path) -> Done:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = run_command(main.main, [str(word) for word in words])
            except SystemExit as stop:  # argparse
                code = int(stop.code or 0)
        return Done(code, out.getvalue(), err.getvalue())

    return call


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
