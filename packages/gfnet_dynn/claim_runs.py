"""A grid of settings on what a finished run has learned: each cell one setting and one seed.

Every cell is a run folder of its own below the output, so that it can be killed and gone on with.
The backbone is the finished run's own in all of them, and the student, too, unless the seeds vary
it: the record says which.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from gfnet_dynn import options
from gfnet_dynn.claim_measures import measure_exits, measure_student
from gfnet_dynn.claim_report import summarise_claims, write_claims_report
from gfnet_dynn.data_loader_helper import Data, prepare_data
from gfnet_dynn.exit_stage import train_exits
from gfnet_dynn.model_files import choose_device, choose_precision, load_model
from gfnet_dynn.replay import Replay
from gfnet_dynn.run_log import RunLog
from gfnet_dynn.stages import Run, distil_student
from gfnet_dynn.tracking import Tracker
from shared_core.checkpoints import atomic_write
from shared_core.runs import RunFolder, RunLock, UsageError, write_result
from shared_core.runs.folder import CONFIG_FILE

PATHS = ("data_path", "data_root", "checkpoint", "pretrained", "quarantine")
CELL_FILE = "cell.json"
TRADEOFFS = (0.1, 0.75, 2.0)  # lambdas of the sweep
WHAT = ("tradeoff", "exits", "distil")
FROM_SCRATCH = {"kd_weight": 0.0, "nd_weight": 0.0, "spectrum_weight": 0.0}


@dataclass(frozen=True)
class Setting:
    """One column of the grid: its name, and which of the run's options it changes."""

    name: str
    changes: dict[str, Any]
    stage: str  # exits, or distil: the student is what is measured


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="claims.py",
        description="Try what is claimed of the method on a finished run: accuracy falls as lambda "
        "grows, few exits beat all exits, early exit is faster, distilled beats from scratch.",
        epilog="Writes result.json, report.md and report.html to OUTPUT. Start the same command "
        "again to go on after a stop.",
    )
    p.add_argument("run", type=Path, metavar="RUN_FOLDER", help="a run whose student is trained")
    p.add_argument("output", type=Path, metavar="OUTPUT", help="folder of the trials")
    p.add_argument("--what", nargs="+", choices=WHAT, default=["tradeoff", "exits"])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    p.add_argument(
        "--vary",
        choices=("exits", "student"),
        default="exits",
        help="what a seed decides: the exits on the run's one student, or a student of its own "
        "as well (longer)",
    )
    p.add_argument("--tradeoffs", nargs="+", type=float, default=list(TRADEOFFS), metavar="LAMBDA")
    p.add_argument("--data-path", type=Path, help="where the run's images lie now, if elsewhere")
    p.add_argument("--threads", type=int, help="of the CPU that compute (default: the run's)")
    p.add_argument("--device", help="auto, cpu, cuda (default: the run's)")
    return p


def settings_of(args: argparse.Namespace, config: dict[str, Any]) -> list[Setting]:
    """The settings to try, each once."""
    few = list(config["exits"])
    found: dict[str, Setting] = {}
    if "tradeoff" in args.what:
        for value in sorted(set(args.tradeoffs)):
            name = f"lambda-{value:g}"
            found[name] = Setting(name, {"ce_ic_tradeoff": float(value)}, "exits")
    if "exits" in args.what:
        found["few-exits"] = Setting("few-exits", {"exits": few}, "exits")
        found["all-exits"] = Setting("all-exits", {"exits": []}, "exits")
    if "distil" in args.what:
        found["distilled"] = Setting("distilled", {}, "distil")
        found["from-scratch"] = Setting("from-scratch", dict(FROM_SCRATCH), "distil")
    return list(found.values())


def same_as(setting: Setting, config: dict[str, Any]) -> str:
    """Equal for settings that are the same run: what they change, and do change."""
    changes = {k: v for k, v in setting.changes.items() if config[k] != v}
    return json.dumps([setting.stage, changes], sort_keys=True)


def read_config(folder: Path) -> dict[str, Any]:
    """The finished run's options.

    Raises:
        FileNotFoundError, UsageError: no run, or one without a student.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run: expected a folder that main.py wrote")
    config = json.loads(path.read_text(encoding="utf-8"))
    done = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    if config.get("no_distil") or "distil" not in done:
        raise UsageError(f"{folder} has no student: expected a run whose distil stage is done")
    return config


def run_claims(argv: Sequence[str] | None) -> int:
    """Parse, run what is missing, write the record. Returns the exit code."""
    args = build_parser().parse_args(argv)
    words = sys.argv[1:] if argv is None else list(argv)
    started, clock = datetime.now(timezone.utc), time.monotonic()
    config = read_config(args.run)
    if len(set(args.seeds)) != len(args.seeds) or min(args.seeds) < 0:
        raise UsageError(f"--seeds {args.seeds}: expected different numbers from 0")
    if any(not value >= 0 for value in args.tradeoffs):
        raise UsageError(f"--tradeoffs {args.tradeoffs}: expected numbers from 0")
    if args.output.resolve() == args.run.resolve():
        raise UsageError(f"{args.output} is the run itself: expected another folder")
    settings = settings_of(args, config)
    if "exits" in args.what and not config["exits"]:
        raise UsageError(
            f"{args.run} has an exit after every block: expected a run with a few of them, or "
            "--what without exits"
        )
    plan = {"run": _fingerprint(args.run), "vary": args.vary}
    folder = RunFolder.create(args.output, plan, resume=(args.output / CONFIG_FILE).exists())
    if args.threads or config.get("threads"):
        torch.set_num_threads(args.threads or config["threads"])
    with RunLock(folder.path):
        rows: dict[str, list[dict[str, Any]]] = {}
        for seed in args.seeds:  # all settings of a seed, then the next: a stop leaves whole seeds
            known: dict[str, dict[str, Any]] = {}
            replays: dict[str, Replay | None] = {}
            for setting in settings:
                alike = same_as(setting, config)
                if alike not in known:  # one of them may lie there, from a command with less
                    equal = [one for one in settings if same_as(one, config) == alike]
                    done = (one for one in equal if cell_file(args.output, one, seed).is_file())
                    known[alike] = run_cell(args, config, next(done, setting), seed, replays)
                row = known[alike]
                rows.setdefault(setting.name, []).append(row)
        measured = summarise_claims(rows, seeds=args.seeds)
        own_students = args.vary == "student" or all(one.stage == "distil" for one in settings)
        measured["varied_by_seed"] = (
            "student and exits; the backbone is one"
            if own_students
            else "exits; backbone and student are one"
        )
        measured["run"] = plan["run"]
        facts = next(iter(rows.values()))[0]["data"]
        record = write_result(
            folder.path / "result.json",
            task=f"gfnet_dynn/{str(config['data_set']).lower()}-claims",
            command=shlex.join(["packages/gfnet_dynn/claims.py", *words]),
            scale=config["scale"],
            data=facts,
            seeds=args.seeds,
            measured=measured,
            started=started,
            wall_seconds=max(
                time.monotonic() - clock, sum(r["seconds"] for v in rows.values() for r in v)
            ),
        )
        write_claims_report(folder.path, record)
    for claim in record["measured"]["claims"].values():
        print(claim["text"])
    print(f"report: {folder.path / 'report.html'}")
    return 0


def _fingerprint(run: Path) -> dict[str, str]:
    """Which student the trials stand on."""
    files = sorted((run / "checkpoint").glob("student_*.pth"))
    if not files:
        raise FileNotFoundError(f"{run / 'checkpoint'} holds no student_*.pth, expected one")
    _, facts = load_model(files[0])
    return {"student": files[0].name, "sha256": facts["sha256"], "split_hash": facts["split_hash"]}


def cell_file(output: Path, setting: Setting, seed: int) -> Path:
    """Where the result of one setting with one seed is kept."""
    return output / f"seed{seed}" / setting.name / CELL_FILE


def run_cell(
    args: argparse.Namespace,
    config: dict[str, Any],
    setting: Setting,
    seed: int,
    replays: dict[str, Replay | None],
) -> dict[str, Any]:
    """One setting with one seed: from its file when it is there, else trained and measured.

    Args:
        replays: what the seed's students said so far, by the hash of their files; added to.
    """
    file = cell_file(args.output, setting, seed)
    place = file.parent
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    run = _cell_run(args, config, setting, seed, place)
    run.log.say(f"--- {setting.name}, seed {seed}")
    begun = time.monotonic()
    if setting.stage == "distil" or args.vary == "student":
        if run.log.done("distil") is None:
            _train_student(run, args, setting, seed)
    if setting.stage == "distil":
        row: dict[str, Any] = {"student": measure_student(run)}
    else:
        if run.log.done("exits") is None:
            train_exits(run, _replay(run, config, settings_of(args, config), replays))
        row = measure_exits(run)
    row |= {
        "setting": setting.name,
        "changes": setting.changes,
        "seed": seed,
        "seconds": time.monotonic() - begun,
        "data": run.data.facts(),
    }
    text = json.dumps(row, indent=2, allow_nan=False) + "\n"
    atomic_write(file, lambda path: path.write_text(text, encoding="utf-8"))
    return row


def _replay(
    run: Run,
    config: dict[str, Any],
    settings: Sequence[Setting],
    replays: dict[str, Replay | None],
) -> Replay | None:
    """What the cell's student said in other cells of the seed; None where it learns with the exits
    or would say too much."""
    if run.args.phase2 != "exits":
        return None
    student, facts = load_model(run.file("student"))
    if facts["sha256"] not in replays:
        lists = [one.changes.get("exits", config["exits"]) for one in settings]
        every = tuple(range(student.depth - 1))
        blocks = sorted({block for exits in lists for block in exits or every})
        seen = len(run.data.image_set("train")) * run.args.num_epoch
        seen += len(run.data.image_set("calibration"))
        fits = Replay.fits(seen, len(blocks), student.embed_dim)
        replays[facts["sha256"]] = Replay(blocks, network=facts["sha256"]) if fits else None
    return replays[facts["sha256"]]


def _cell_run(
    args: argparse.Namespace, config: dict[str, Any], setting: Setting, seed: int, place: Path
) -> Run:
    """The cell's folder with what the finished run left, and its options."""
    place.mkdir(parents=True, exist_ok=True)
    usual = vars(options.build_parser("main.py").parse_args([]))  # what an older run did not know
    values = {**usual, **config, **setting.changes, "seed": seed}
    for name in PATHS:
        values[name] = None if values.get(name) is None else Path(values[name])
    values["checkpoint"] = None
    values["data_path"] = args.data_path or values["data_path"]
    values["exits"], values["crop_scale"] = tuple(values["exits"]), tuple(values["crop_scale"])
    values["output"] = place
    args_of_run = argparse.Namespace(**values)
    (place / "checkpoint").mkdir(exist_ok=True)
    for name in ("split.json", f"checkpoint/backbone_{_name(config)}.pth"):
        if not (place / name).exists():
            shutil.copyfile(args.run / name, place / name)
    own = setting.stage == "distil" or args.vary == "student"
    student = f"checkpoint/student_{_name(config)}.pth"
    if not own and not (place / student).exists():
        shutil.copyfile(args.run / student, place / student)
    data = _data(args_of_run, args.run)
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in values.items() if k != "output"}
    off = Tracker(place, experiment="claims", run_name=setting.name, enabled=False)
    device = choose_device(args.device or config["device"])
    precision = choose_precision(config["amp"], device)
    return Run(args_of_run, plain, data, RunLog(place, off), device, precision)


def _name(config: dict[str, Any]) -> str:
    """The data set as model files spell it."""
    built_in = config.get("data_path") is None
    return "built-in-scenes" if built_in else str(config["data_set"]).replace(" ", "-")


def _data(args_of_run: argparse.Namespace, run: Path) -> Data:
    """The finished run's split, on its images; built-in ones are read where that run drew them."""
    if args_of_run.data_path is not None:
        return prepare_data(args_of_run, args_of_run.output)
    return prepare_data(argparse.Namespace(**{**vars(args_of_run), "seed": _seed_of(run)}), run)


def _seed_of(run: Path) -> int:
    return int(json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))["seed"])


def _train_student(run: Run, args: argparse.Namespace, setting: Setting, seed: int) -> None:
    """A student of this seed; settings that train it alike share it."""
    if setting.stage == "exits":
        shared = args.output / f"seed{seed}" / "distilled"
        trained = shared / "checkpoint" / run.file("student").name
        if not (shared / "student-done").exists():
            other = _cell_run(
                args, read_config(args.run), Setting("distilled", {}, "distil"), seed, shared
            )
            if other.log.done("distil") is None:
                distil_student(other)
            (shared / "student-done").touch()
        shutil.copyfile(trained, run.file("student"))
        return
    distil_student(run)
