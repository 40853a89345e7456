"""Making a candidate: its project's commands, one after another, into a model folder.

A candidate that is done, has failed or was skipped has a ``job.json`` and is not touched again.
One that was stopped goes on: each command is called again, and itself knows how far it was.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from compare.candidates import MAKERS, REPO, WORK, Place
from compare.contract import (
    CANDIDATES,
    JOB_FILE,
    LOG_FILE,
    DataCheck,
    Job,
    Plan,
    Planned,
    read,
    write,
)
from compare.progress import Watch, last_line
from shared_core.deploy.facts import FACTS_FILE, ModelError, read_facts
from shared_core.runs.progress import format_seconds

MODEL = "model"
PATIENCE = 1.2  # a candidate may begin if the minutes that are left, times this, suffice
_TOLD = re.compile(r"floor|distillation (?:helped|did not)", re.IGNORECASE)
_PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h


def make_all(
    plan: Plan, check: DataCheck, folder: Path, *, spent: Callable[[], float],
    say: Callable[[str], None], tick: Callable[[], None] = lambda: None,
) -> list[Job]:  # fmt: skip
    """Make every candidate of the plan that has no job yet, in order.

    Args:
        folder: the run's.
        spent: seconds that the run has taken so far, earlier tries included.
        say: where lines go.
        tick: called now and then.
    """
    wanted = [one for one in plan.candidates if one.included]
    jobs: dict[str, Job] = {}
    slow, took, expected = 1.0, 0.0, 0.0  # how much longer candidates took than planned
    for number, one in enumerate(wanted, start=1):
        after = 60 * slow * sum(x.minutes for x in wanted[number:])
        label = f"{one.name} ({number} of {len(wanted)})"
        file = folder / CANDIDATES / one.name / JOB_FILE
        if file.is_file():
            jobs[one.name] = read(file, Job)
            say(f"{label}: {jobs[one.name].state} before")
            continue
        begun = number == 1 or (file.parent / WORK).is_dir()  # what was begun is finished
        reason = _why_not(one, jobs, 60 * plan.minutes - spent(), slow, begun=begun)
        if reason:
            jobs[one.name] = _kept(file, Job(one.name, "skipped", reason))
        else:
            watch = Watch(label, 60 * one.minutes * slow, after, file.with_name(LOG_FILE))
            say(f"{label}: {one.title}")
            job = make(Place(one, check, folder, plan.threads), watch, tick)
            jobs[one.name] = job
            if job.state == "done":
                took, expected = took + job.seconds, expected + 60 * one.minutes
                slow = max(1.0, took / max(expected, 1e-9))
        say(f"{label}: {_outcome(jobs[one.name])}")
    return [jobs[one.name] for one in wanted]


def make(place: Place, watch: Watch, tick: Callable[[], None] = lambda: None) -> Job:
    """Run the commands of a candidate and keep its model folder. A failure is a job, no error."""
    room = place.work.parent
    room.mkdir(parents=True, exist_ok=True)
    maker, begun = MAKERS[place.planned.maker], time.monotonic()
    count, typed, reason = len(maker.commands(place)), [], ""

    def pulse() -> None:
        watch.tick()
        tick()

    with (room / LOG_FILE).open("ab") as log:
        for number in range(count):
            words = maker.commands(place)[number]  # anew: it may name a file of the one before
            typed.append(shlex.join(["python", *words]))
            code = run_words(words, log, pulse)
            refused = code == 1 and maker.refuses and number == count - 1
            if code and not (refused and (place.work / maker.model).is_dir()):
                reason = _reason(room / LOG_FILE, code)
                break
    watch.close()
    if not reason:
        reason = _keep_model(place.work / maker.model, room / MODEL)
    seconds = round(time.monotonic() - begun, 1)
    state = "failed" if reason else "done"
    notes = () if reason else _told(room / LOG_FILE)
    return _kept(
        room / JOB_FILE, Job(place.planned.name, state, reason, seconds, tuple(typed), notes)
    )


def run_words(words: Sequence[str], log: BinaryIO, tick: Callable[[], None]) -> int:
    """A script of this repository with its words, in a process of its own; its exit code.

    The process ends with this one, however that ends (on Linux).
    """
    log.write(f"\n$ python {shlex.join(words)}\n".encode("utf-8", "replace"))
    log.flush()
    process = subprocess.Popen(
        [sys.executable, str(REPO / words[0]), *words[1:]],
        stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1"}, preexec_fn=_dying_together(),
    )  # fmt: skip
    try:
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                tick()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def _dying_together() -> Callable[[], None] | None:
    """What a child does first: ask Linux to be killed when its parent dies."""
    if not sys.platform.startswith("linux"):
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os._exit(1)

    return ask


def _why_not(
    one: Planned, jobs: dict[str, Job], left: float, slow: float, *, begun: bool
) -> str:  # fmt: skip
    """Why a candidate is not begun, or an empty text."""
    if one.teacher and jobs[one.teacher].state != "done":
        return f"its teacher has {jobs[one.teacher].state}"
    needs = 60 * one.minutes * slow
    if not begun and needs > PATIENCE * max(left, 0):
        return f"needs {format_seconds(needs)}, {format_seconds(max(left, 0))} are left"
    return ""


def _keep_model(made: Path, target: Path) -> str:
    """Move the model folder to its place. Returns what is wrong with it, or an empty text."""
    if made.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        os.replace(made, target)
    if not (target / FACTS_FILE).is_file():
        return f"the commands ended well but left no {made.name}/{FACTS_FILE}"
    try:
        read_facts(target)
    except (ModelError, OSError) as error:
        return " ".join(str(error).split())
    return ""


def _kept(file: Path, job: Job) -> Job:
    write(file, job)
    return job


def _reason(log: Path, code: int) -> str:
    """The line that a command ended with."""
    end = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    line = last_line(log)
    return f"{line.removeprefix('error: ')} ({end})"


def _told(log: Path) -> tuple[str, ...]:
    """What the projects themselves say of floors and of distillation, the last lines of it."""
    text = log.read_text("utf-8", "replace").replace("\r", "\n")
    lines = [one.strip() for one in text.splitlines() if not one.startswith("$")]
    return tuple(dict.fromkeys(one for one in lines if _TOLD.search(one)))[-2:]


def _outcome(job: Job) -> str:
    end = f": {job.reason}" if job.reason else f" in {format_seconds(job.seconds)}"
    return f"{job.state}{end}"
