"""From the first look at the images to the last line: the stages of a run, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compare import check_data, choose, judge, page, ship
from compare.budget import budget_text
from compare.candidates import LITE0
from compare.contract import (
    CHOICE_FILE,
    FEATURES_FILE,
    JUDGED_FILE,
    PLAN_FILE,
    WINNER,
    Choice,
    DataCheck,
    Judged,
    Plan,
    read,
    read_rows,
    write,
)
from compare.floors import measure_floors
from compare.labels import read_features
from compare.making import make_all
from compare.options import Options
from compare.plan import Asked, make_plan
from compare.retrain import extended_split
from compare.verdicts import verdicts
from shared_core.runs import OpenRun, UsageError, open_run
from shared_core.runs.progress import format_seconds
from shared_core.weights.catalogue import entry
from shared_core.weights.finding import how_to_get, installed_file

RUN_KEYS = {"minutes", "candidates", "seeds", "retrain"}  # tell our runs by
# What is decided anew each time from what was measured.
MAY_DIFFER = ("budget", "batch", "command", "compare_with", "output", "start")


def run_journey(options: Options) -> int:
    """Everything that ``main.py`` does. Returns the exit code."""
    config = {k: v for k, v in asdict(options).items() if k not in ("output", "start")}
    _refuse(options)
    with open_run(
        options.output, config, keys=RUN_KEYS, start=options.start, may_differ=MAY_DIFFER
    ) as run:
        if options.data_path is None:
            run.log.say("no --data-path: drawn scenes, to show the way; the numbers mean nothing")
        check = _checked(options, run)
        plan = _planned(options, run, check)
        rows = _measured(options, run, check, plan)
        told = _told(run, check, plan, rows)
        choice = _chosen(options, run, rows)
        page.write_report(
            run.folder, command=options.command, started=run.started, wall_seconds=run.seconds
        )
        for line in [*told, *_last_lines(options, run, check, choice)]:
            run.log.say(line)
    return 0


def _refuse(options: Options) -> None:
    """What can be known before anything is done.

    Raises:
        UsageError: no trained weights; the run's folder among the images, where its pictures
            would become a class; no GPU.
    """
    network = entry(LITE0)
    assert network is not None, "the catalogue has it"
    if installed_file(network) is None:
        raise UsageError(
            f"trained weights of {LITE0} are not installed, and candidates start from them: "
            f"{how_to_get(network)}"
        )
    data = options.data_path
    if data is not None and data.is_dir() and _lies_in(options.output, data):
        raise UsageError(f"--output {options.output} lies in --data-path: expected another place")
    if options.shape == "cuda" and "CUDAExecutionProvider" not in _providers():
        raise UsageError("--shape cuda: ONNX Runtime has no GPU here: expected --shape cpu")


def _lies_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _providers() -> list[str]:
    import onnxruntime

    return list(onnxruntime.get_available_providers())


def _stage(run: OpenRun, name: str, work: Callable[[], object]) -> None:
    """A stage whose results are files: done once."""

    def done() -> dict[str, Any]:
        work()
        return {}

    run.stage(name, done)


def _checked(options: Options, run: OpenRun) -> DataCheck:
    def work() -> None:
        split = options.split
        if options.retrain is not None and options.data_path is not None:
            split = extended_split(
                options.retrain, options.data_path, run.folder / "data", say=run.log.say
            )
        check_data.check(
            options.data_path, run.folder, split=split, seed=options.seed,
            threads=options.threads, say=run.log.say,
        )  # fmt: skip

    _stage(run, "check", work)
    return check_data.check(
        options.data_path, run.folder, split=options.split, seed=options.seed,
        threads=options.threads, say=run.log.say,
    )  # fmt: skip


def _planned(options: Options, run: OpenRun, check: DataCheck) -> Plan:
    asked = Asked(
        options.minutes, options.budget, options.batch, options.shape, options.threads,
        options.seeds, options.seed, options.candidates, options.teacher,
    )  # fmt: skip
    size = read_features(run.folder / FEATURES_FILE).input_size
    _stage(
        run, "plan",
        lambda: make_plan(check, asked, folder=run.folder, feature_size=size, say=run.log.say),
    )  # fmt: skip
    plan = read(run.folder / PLAN_FILE, Plan)
    now = replace(plan, budget=options.budget, batch=options.batch)
    if now != plan:
        write(run.folder / PLAN_FILE, now)
    return now


def _measured(options: Options, run: OpenRun, check: DataCheck, plan: Plan) -> list[Judged]:
    """Floors, candidates, judgement."""
    _stage(run, "floors", lambda: measure_floors(run.folder, say=run.log.say))

    def make() -> None:
        jobs = make_all(plan, check, run.folder, spent=lambda: run.seconds, say=run.log.say,
                        tick=run.mark)  # fmt: skip
        if not any(job.state == "done" for job in jobs):
            reasons = "; ".join(f"{job.name}: {job.reason}" for job in jobs)
            raise ValueError(f"no candidate could be made ({reasons})")

    _stage(run, "candidates", make)
    _stage(run, "judge", lambda: judge.judge(run.folder, check, plan, say=run.log.say))
    rows = read_rows(run.folder / JUDGED_FILE, Judged)
    if any(str(plan.batch) not in row.latency for row in rows):  # another batch than before
        rows = judge.judge(run.folder, check, plan, say=run.log.say)
    return rows


def _told(run: OpenRun, check: DataCheck, plan: Plan, rows: list[Judged]) -> list[str]:
    """Whether the work paid, for the terminal and the page."""
    lines = verdicts(run.folder, check, plan, rows)
    write(run.folder / PLAN_FILE, replace(plan, notes=tuple(lines)))
    return lines


def _chosen(options: Options, run: OpenRun, rows: list[Judged]) -> Choice:
    choice = choose.choose(rows, options.budget, batch=options.batch)
    front = set(choice.front)
    marked = [replace(one, front=(one.candidate, one.form) in front) for one in rows]
    if marked != rows:
        write(run.folder / JUDGED_FILE, marked)
    choice = ship.ship(run.folder, choice, say=run.log.say)
    write(run.folder / CHOICE_FILE, choice)
    return choice


def _last_lines(options: Options, run: OpenRun, check: DataCheck, choice: Choice) -> list[str]:
    lines = []
    old = options.compare_with
    if old is None and options.retrain is not None and (options.retrain / WINNER).is_dir():
        old = options.retrain / WINNER
    if old is not None:
        lines += judge.compare_with(run.folder, old, choice)
    budget = f"budget {budget_text(options.budget)}: " if options.budget else ""
    lines += [f"{budget}{choice.sentence}", *choice.lines]
    lines += [
        f"{run.folder / 'report.html'}: the whole table; {run.folder / WINNER}: what is shipped "
        f"({format_seconds(run.seconds)} in all)"
    ]
    if check.kind == "built-in":
        lines.append("drawn scenes: give --data-path a folder of yours for numbers that mean much")
    return lines
