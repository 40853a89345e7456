"""What is tried of the method's claims: settings on what a finished run has learned, with seeds.

Each trial is a run folder of its own. The backbone is the finished run's own in all of them, and
the student, too, unless the seeds vary it: the record says which.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gfnet_dynn.choices import ALL
from gfnet_dynn.data_loader_helper import Data, prepare_data
from gfnet_dynn.decide.exit_outputs import collect, summarise
from gfnet_dynn.decide.findings import BUDGETS
from gfnet_dynn.decide.thresholds import calibrated_policy, solve_for_cost, three_policies
from gfnet_dynn.judge.timing import timed_images, times_of
from gfnet_dynn.model_files import choose_device, choose_precision, load_model
from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.op_counter import model_macs
from gfnet_dynn.options import build_parser
from gfnet_dynn.our_train_helper import best_file, train_exits
from gfnet_dynn.run import Run, pairs
from gfnet_dynn.settings import Settings
from gfnet_dynn.tracking import RunLog
from gfnet_dynn.train.networks import distil_student
from gfnet_dynn.train.parallel import ALONE
from gfnet_dynn.train.replay import Replay
from shared_core.datasets.splitting.prepared import SPLIT_FILE
from shared_core.for_torch.accuracy import answers_of
from shared_core.runs import UsageError
from shared_core.runs.json_files import as_plain, read_object
from shared_core.runs.opening import CONFIG_FILE
from shared_core.runs.stage_log import STAGES_FILE
from shared_core.trials import Cell

TEACHING = ("kd_weight", "nd_weight", "spectrum_weight")
FROM_SCRATCH = {**dict.fromkeys(TEACHING, 0.0), "label_weight": 1.0}


@dataclass(frozen=True)
class Setting:
    """One column of the grid: its name, which of the run's options it changes, what is measured."""

    name: str
    changes: Mapping[str, Any]
    stage: str  # exits, or distil: the student is what is measured


@dataclass(frozen=True)
class FinishedRun:
    """What the trials stand on."""

    folder: Path
    config: dict[str, Any]
    student: dict[str, str]  # file, sha256 and split hash: what names the run in records

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        """Look into a run's folder.

        Raises:
            FileNotFoundError, UsageError: no run, or one without a student.
        """
        if not (folder / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{folder} holds no run: expected a folder that main.py wrote")
        usual = vars(build_parser("main.py").parse_args([]))  # what an older run did not know
        config = {**as_plain(usual), **read_object(folder / CONFIG_FILE)}
        config["exits"] = config["exits"] or ALL  # as older runs wrote it
        done = read_object(folder / STAGES_FILE)
        if config.get("no_distil") or "distil" not in done:
            raise UsageError(f"{folder} has no student: expected a run whose distil stage is done")
        files = sorted((folder / "checkpoint").glob("student_*.pth"))
        if not files:
            raise FileNotFoundError(f"{folder / 'checkpoint'} holds no student_*.pth, expected one")
        _, facts = load_model(files[0])
        named = {"sha256": facts["sha256"], "split_hash": facts["split_hash"]}
        return cls(folder, config, {"student": files[0].name, **named})


def settings_of(
    what: Sequence[str], tradeoffs: Sequence[float], config: Mapping[str, Any]
) -> list[Setting]:
    """The settings to try, each once.

    Raises:
        UsageError: few exits are to be compared with all, and the run has no few.
    """
    found: dict[str, Setting] = {}
    if "tradeoff" in what:
        for value in sorted(set(tradeoffs)):
            name = f"lambda-{value:g}"
            found[name] = Setting(name, {"ce_ic_tradeoff": float(value)}, "exits")
    if "exits" in what:
        if config["exits"] == ALL:
            raise UsageError(
                "the run has an exit after every block: expected a run with a few of them, or "
                "--what without exits"
            )
        found["few-exits"] = Setting("few-exits", {"exits": config["exits"]}, "exits")
        found["all-exits"] = Setting("all-exits", {"exits": ALL}, "exits")
    if "distil" in what:
        found["distilled"] = Setting("distilled", {}, "distil")
        found["from-scratch"] = Setting("from-scratch", dict(FROM_SCRATCH), "distil")
    return list(found.values())


def cell_name(setting: Setting, config: Mapping[str, Any]) -> str:
    """Equal for settings that train the same: such are tried once."""
    values = {**config, **setting.changes}
    if setting.stage == "distil":
        taught = any(values[name] for name in TEACHING)
        return "student distilled" if taught else "student from scratch"
    exits = values["exits"] if values["exits"] == ALL else ".".join(map(str, values["exits"]))
    return f"exits {exits} lambda {values['ce_ic_tradeoff']:g}"


def cells_of(
    settings: Sequence[Setting], run: FinishedRun, *, seeds: Sequence[int], vary: str
) -> list[Cell]:
    """The trials: all settings of a seed, then the next, so that a stop leaves whole seeds."""
    own = vary == "student"
    wanted = [*settings]
    if own and any(one.stage == "exits" for one in settings):  # they stand on the seed's student
        wanted = [Setting("distilled", {}, "distil"), *settings]
    cells: dict[tuple[str, int], Cell] = {}
    for seed in seeds:
        for setting in wanted:
            name = cell_name(setting, run.config)
            changes = {"changes": dict(setting.changes), "stage": setting.stage, "own": own}
            needs = ("student distilled",) if own and setting.stage == "exits" else ()
            kept = {**_what_matters(changes, run.config), "student": run.student["sha256"]}
            cells.setdefault((name, seed), Cell(name, kept, seed, needs))
    return list(cells.values())


def _what_matters(found: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """A setting's changes without those that change nothing: two names of one trial are equal."""
    changes = {key: value for key, value in found["changes"].items() if config[key] != value}
    return {**found, "changes": changes}


@dataclass
class Trying:
    """Makes and measures trials; what frozen students said of the images is kept for a seed.

    Attributes:
        home: folder of the trials.
        cells: all of them, to know which blocks will be asked for.
    """

    run: FinishedRun
    home: Path
    cells: Sequence[Cell]
    data_path: Path | None
    threads: int
    device: str
    _replays: dict[tuple[int, str], Replay | None] = field(default_factory=dict)

    def __call__(self, cell: Cell, work: Path) -> dict[str, Any]:
        """Train and measure one trial in ``work``. Returns plain JSON."""
        run, stage = self._prepare(cell, work), cell.settings["stage"]
        if stage == "distil":
            if run.log.done("distil") is None:
                run.log.finish("distil", distil_student(run))
            found: dict[str, Any] = {"student": measure_student(run)}
        else:
            if run.log.done("exits") is None:
                run.log.finish("exits", train_exits(run, self._replay(run, cell)))
            found = measure_exits(run)
        return {**found, "data": run.data.facts()}

    def _prepare(self, cell: Cell, work: Path) -> Run:
        """The trial's folder with what the finished run left, and its settings."""
        values = {**self.run.config, **cell.settings["changes"], "seed": cell.seed}
        values |= {"checkpoint": None, "teacher": None, "threads": self.threads}
        if self.data_path is not None:
            values["data_path"] = str(self.data_path)
        settings = Settings.of(values)
        (work / "checkpoint").mkdir(parents=True, exist_ok=True)
        _copy(self.run.folder / SPLIT_FILE, work / SPLIT_FILE)
        data = self._data(settings, work)
        device = choose_device(self.device)
        precision = choose_precision(values["amp"], device)
        run = Run(settings, values, data, RunLog(work), device, precision, ALONE)
        _copy(self.run.folder / "checkpoint" / run.file("backbone").name, run.file("backbone"))
        answers = self.run.folder / "knowledge"
        if answers.exists() and not (work / "knowledge").exists():
            shutil.copytree(answers, work / "knowledge")
        if cell.settings["stage"] == "exits":
            theirs = self.run.folder
            if cell.settings["own"]:
                theirs = self.home / "cells" / Cell("student distilled", {}, cell.seed).folder_name
                theirs = theirs / "run"
            _copy(theirs / "checkpoint" / run.file("student").name, run.file("student"))
        return run

    def _data(self, settings: Settings, work: Path) -> Data:
        """The finished run's split, on its images; built-in ones are where that run drew them."""
        seed = int(self.run.config["seed"])
        real = settings.source.data_path is not None
        return prepare_data(settings.source, work if real else self.run.folder, seed=seed)

    def _replay(self, run: Run, cell: Cell) -> Replay | None:
        """What the trial's student said in other trials of the seed; None where it learns with the
        exits, or would say too much."""
        if run.settings.exits.phase2 != "exits":
            return None
        student, facts = load_model(run.file("student"))
        key = (cell.seed, facts["sha256"])
        if key not in self._replays:
            mine = [one.settings["changes"] for one in self.cells if one.seed == cell.seed]
            config = self.run.config
            lists = [Settings.of({**config, **one}).exits.blocks(student.depth) for one in mine]
            blocks = sorted({block for blocks in lists for block in blocks})
            seen = len(run.data.image_set("train")) * run.settings.exits.num_epoch
            seen += len(run.data.image_set("calibration"))
            fits = Replay.fits(seen, len(blocks), student.embed_dim)
            self._replays = {key: Replay(blocks, network=facts["sha256"]) if fits else None}
        return self._replays[key]


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        shutil.copyfile(source, target)


def measure_student(run: Run) -> dict[str, float]:
    """Accuracies of the student on both held-out splits."""
    model, facts = load_model(run.file("student"))
    return {
        "accuracy": answers_of(model.to(run.device), run.loaders().held("test"), ALONE).accuracy,
        "calibration_accuracy": facts["metrics"]["calibration_accuracy"],
    }


def measure_exits(run: Run) -> dict[str, Any]:
    """What the trained exits do on the test split, thresholds from the calibration split.

    ``fixed`` uses threshold 0.5 without temperatures: the rule that lambda has trained. Costs are
    shares of the plain student's MACs, so that settings with other exits can be compared.
    """
    model, _ = load_model(best_file(run, str((run.log.done("exits") or {})["file"])))
    model = model.to(run.device)
    calibration, test = (
        collect(model, pairs(run.loaders().held(split), split), split=split)
        for split in ("calibration", "test")
    )
    plain = float(model_macs(model.backbone))

    def short(policy: ExitPolicy) -> dict[str, float]:
        found = summarise(test, policy)
        return {"accuracy": found["accuracy"], "macs_fraction": found["cost"] / plain}

    judging = run.settings.judging
    policy = calibrated_policy(ExitPolicy(judging.policy, 0.5), calibration)
    points = three_policies(policy, calibration, max_loss=judging.max_accuracy_loss)
    budgets = {
        f"{share:g}": short(solve_for_cost(policy, calibration, mean_cost=share * plain).policy)
        for share in BUDGETS
        if share * plain >= calibration.costs[0]
    }
    calls: dict[str, Any] = {"plain": model.backbone}
    for name, point in points.items():
        calls[name] = lambda batch, p=point: model.early_exit(batch, p)
    times = times_of(calls, timed_images(run))
    return {
        "exits": list(model.exits),
        "policy": judging.policy,
        "final_accuracy": float(test.correct[-1].mean()),
        "fixed": short(ExitPolicy(judging.policy, 0.5)),
        "points": {
            name: {
                **short(point),
                "speed_up": {label: row["plain"] / row[name] for label, row in times.items()},
            }
            for name, point in points.items()
        },
        "budgets": budgets,
    }
