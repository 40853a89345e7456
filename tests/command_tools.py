"""Commands as a shell sees them: in this process, or in one of their own that may be killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join([str(REPOSITORY / "packages"), str(REPOSITORY / "shared")])

# Forks a process for each line of its input, so that a framework is imported once. What is put
# between the halves imports ``main`` and may define ``prepare`` anew.
BEFORE = """
import json, os, sys
from shared_core.runs import run_command
def prepare(job):
    pass
"""
AFTER = """
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        out = os.open(job["out"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        prepare(job)
        os._exit(run_command(main.main, job["argv"]))
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def without(words: Sequence[str], *flags: str) -> list[str]:
    """``words`` less these flags and the value behind each."""
    left = list(words)
    for flag in flags:
        at = left.index(flag)
        del left[at : at + 2]
    return left


@dataclass
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str


def in_process(call: Callable[[list[str]], int], words: Sequence[object]) -> Done:
    """``call(words)`` with what it prints; argparse's own exits are exit codes."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = call([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def run_main(main: Callable[..., Any], words: Sequence[object]) -> Done:
    """``main`` of an entry script as the script runs it."""
    from shared_core.runs import run_command

    return in_process(lambda argv: run_command(main, argv), words)


class Server:
    """Starts runs of a command in processes of their own.

    Args:
        setup: Python that imports ``main`` of the project, and whatever takes long to import.
        env: further variables of the environment.
    """

    def __init__(self, setup: str, *, env: Mapping[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEFORE + setup + AFTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": PYTHONPATH, **(env or {})},
        )

    def run(
        self,
        argv: Sequence[object],
        *,
        out: Path,
        kill: Callable[[float], bool] | None = None,
        **job: Any,
    ) -> int:
        """Exit code, or -9 when ``kill(seconds since the start)`` said so and it was killed.

        Args:
            out: file for what it prints.
            job: plain values for ``prepare``.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        line = json.dumps({"argv": [str(word) for word in argv], "out": str(out), **job})
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        pid, start = int(self.process.stdout.readline()), time.monotonic()
        while kill is not None and alive(pid):
            if kill(time.monotonic() - start):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def close(self) -> None:
        """No more runs."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
