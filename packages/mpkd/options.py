"""The command line of main.py, and what it makes of the configuration; nothing heavy is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpkd.experiments.recipes import FOLDER, OVERRIDES, SCALES
from mpkd.utils.config import check_config, load_config
from shared_core.runs.command import UsageError
from shared_core.runs.numbers import FRACTION
from shared_core.runs.opening import Start
from shared_core.runs.options import (
    PRECISIONS,
    CommandParser,
    add_common,
    options_given,
    start_of,
)

STAGES = ("prepare", "teacher", "distil", "quantize", "export", "analyze")
SETS = ("cifar10", "imagenet", "folder")  # with a folder of their own, dataset.data_dir_<set>

# Common options and the key of the configuration that each one sets.
KEYS = {
    "split": "dataset.split",
    "input-size": "dataset.image_size",
    "epochs": "experiment.epochs",
    "batch-size": "experiment.batch_size",
    "lr": "experiment.learning_rate",
    "seed": "experiment.seed",
    "device": "experiment.device",
    "workers": "dataset.workers",
    "threads": "experiment.threads",
}
MORE_KEYS = {"max-accuracy-loss": "export.max_accuracy_loss"}  # of this project's own options
HELP = {
    "data-path": "The folder with the images: class folders, or train/ and test/ with class "
    "folders in each, or CIFAR-10's own files, unpacked or not. It sets dataset.data_dir_<set>.",
    "epochs": "How many times the student goes through all training images.",
    "lr": "The learning rate of the student after the warm-up.",
    "init": "What teacher and student start from: trained (weights of ImageNet), or none. A file "
    "is for the teacher; model.student_ckpt takes one for the student.",
    "amp": "The precision of the trainings. auto is bf16 where this processor or GPU computes it "
    "and images have 64 pixels or more, else fp32.",
}
RUN_HELP = {
    "output": "The folder of the run. Without it experiment.out_dir/experiment.name of the "
    "configuration.",
    "scale": "The size of the recipe: full is the configuration as it stands, short takes minutes "
    "on a CPU, rehearsal takes scikit-learn's digits.",
}


@dataclass(frozen=True)
class MainOptions:
    """What main.py is asked for.

    Attributes:
        config: values by dotted key.
        output: the run's folder.
        start: how the run starts.
        stages: which of ``STAGES``, in order.
        scale: ``full``, ``short`` or ``rehearsal``.
        data_root: a folder that holds data sets by name.
    """

    config: dict[str, Any]
    output: Path
    start: Start
    stages: tuple[str, ...]
    scale: str
    data_root: Path | None


def add_config_options(parser: argparse._ActionsContainer) -> None:
    """Add the common options that stand for a key of the configuration, and ``--set``."""
    usual = load_config()
    shown = {name: usual[key] for name, key in KEYS.items() if usual[key]}
    add_common(
        parser, ("data-path", *KEYS, "init", "amp"), help=HELP,
        defaults={**dict.fromkeys(KEYS), **shown, "seed": usual["experiment.seed"],
                  "init": usual["model.teacher_ckpt"], "amp": usual["mixed_precision.dtype"]},
        more={"amp": {"choices": ("auto", *PRECISIONS)}},
    )  # fmt: skip
    parser.add_argument(
        "--max-accuracy-loss", type=FRACTION, default=usual[MORE_KEYS["max-accuracy-loss"]],
        metavar="SHARE", help="The most that int8 files by calibration may lose of the test "
        "accuracy, a fraction; layers go back to float until it holds, or the file is refused.",
    )  # fmt: skip
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
        help="Set section.key of the configuration, over the file. It may be repeated.",
    )  # fmt: skip
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR",
        help="A folder that holds data sets by name, such as CIFAR10 and ImageNet.",
    )  # fmt: skip


def build_parser() -> CommandParser:
    """The command line; everything else is a key of the configuration."""
    p = CommandParser(
        prog="main.py",
        description="Train a teacher, distil a student, give it few bits, export it, draw what "
        "happened: what config.yaml says. The options below stand for its commonest keys.",
        epilog="Results go to --output: logs/*.csv, checkpoints/, export/, outputs/, result.json.",
    )
    p.add_argument(
        "--config", type=Path, metavar="FILE",
        help="A YAML file that names what differs from the config.yaml of this package.",
    )  # fmt: skip
    p.add_argument(
        "--stage", default="all", choices=("all", *STAGES),
        help="Run one stage, or all that are not done yet.",
    )  # fmt: skip
    add_common(
        p, ("output", "scale", "resume", "continue", "fresh"), help=RUN_HELP,
        defaults={"scale": "full"}, more={"scale": {"choices": SCALES}},
    )  # fmt: skip
    add_config_options(p)
    return p


def config_of(
    args: argparse.Namespace, given: set[str], *, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The configuration of parsed options: the recipe, the file, then options and ``--set``.

    Args:
        given: destinations of the options that the user typed.
        overrides: of the recipe.

    Raises:
        UsageError: one key said twice, or a value that does not fit; see
            :func:`mpkd.utils.config.load_config`.
        FileNotFoundError: ``--config`` or ``--data-path`` is not there.
    """
    named = {text.partition("=")[0].strip() for text in args.settings}
    said: dict[str, Any] = {}

    def put(option: str, key: str, value: object) -> None:
        if key in named:
            raise UsageError(f"--{option} and --set {key}: expected one of them")
        said[key] = str(value) if isinstance(value, Path) else value

    for option, key in {**KEYS, **MORE_KEYS}.items():
        dest = option.replace("-", "_")
        if dest in given:
            put(option, key, getattr(args, dest))
    if "init" in given:
        put("init", "model.teacher_ckpt", args.init)
        if args.init in ("none", "trained"):
            put("init", "model.student_ckpt", args.init)
    if "amp" in given:
        put("amp", "mixed_precision.enabled", args.amp != "fp32")
        if args.amp != "fp32":
            put("amp", "mixed_precision.dtype", args.amp)
    file = getattr(args, "config", None)
    if args.data_path is not None:
        put_data_path(args.data_path, load_config(file, args.settings, overrides=overrides), put,
                      set_is_chosen="dataset.name" in named or file is not None)  # fmt: skip
    config = load_config(file, args.settings, overrides=overrides, last=said)
    if config["dataset.name"] == "folder" and file is None:
        overrides = {**overrides, **FOLDER, "model.teacher_model": teacher_at_hand()}
    config = load_config(file, args.settings, overrides=overrides, last=said)
    check_config(config)
    return config


def put_data_path(
    path: Path, config: Mapping[str, Any], put: Callable[..., None], *, set_is_chosen: bool
) -> None:
    """Turn ``--data-path`` into the keys of the set that it means.

    Where no set was chosen, class folders that are not CIFAR-10's are a set of the user's own.
    """
    name = config["dataset.name"]
    if not path.exists():
        raise FileNotFoundError(f"--data-path {path}: there is nothing")
    if name not in SETS:
        raise UsageError(f"--data-path: dataset.name is {name}, expected {', '.join(SETS)}")
    if name == "cifar10" and not set_is_chosen and not looks_like_cifar10(path):
        name = "folder"
        put("data-path", "dataset.name", name)
    put("data-path", f"dataset.data_dir_{name}", path)


def teacher_at_hand() -> str:
    """The teacher for images of one's own: lite2 where its weights are installed, else lite0."""
    from shared_core.weights.catalogue import entry
    from shared_core.weights.finding import installed_file

    larger = entry("lite2")
    return "lite2" if larger is not None and installed_file(larger) else "lite0"


def looks_like_cifar10(path: Path) -> bool:
    """Whether a path is CIFAR-10's: an archive, its files, or a folder of that name."""
    if path.is_file():
        return True
    if any((folder / "data_batch_1").is_file() for folder in (path, path / "cifar-10-batches-py")):
        return True
    plain = path.resolve().name.lower().replace("-", "").replace("_", "")
    return plain in ("cifar10", "cifar10batchespy")


def parse(argv: Sequence[str] | None) -> MainOptions:
    """The words and the configuration, checked against each other.

    Raises:
        UsageError, FileNotFoundError: see :func:`config_of`.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    given = options_given(parser, argv)
    start = start_of(args)
    config = config_of(args, given, overrides=OVERRIDES[args.scale])
    if args.scale == "rehearsal" and config["dataset.name"] not in ("digits", "builtin"):
        raise UsageError(
            f"--scale rehearsal: dataset.name is {config['dataset.name']}, expected digits or "
            "builtin"
        )
    output = args.output
    if output is None:
        name = config["experiment.name"]
        if not name or "/" in name or name.startswith("."):
            raise UsageError(f"experiment.name is {name!r}, expected a plain word")
        suffix = "" if args.scale == "full" else f"-{args.scale}"
        output = Path(config["experiment.out_dir"]) / f"{name}{suffix}"
    stages = STAGES if args.stage == "all" else (args.stage,)
    return MainOptions(config, output, start, stages, args.scale, args.data_root)
