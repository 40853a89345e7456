"""The README's tables as experiments: models, criteria, augment, distill, curriculum."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

from shared_core.runs import run_command
from shared_core.runs.options import CommandParser, add_common, words_of
from shared_core.trials.trial_options import add_trial_options, check_trial_options
from torch_cls_zoo.experiments.recipes import SEEDS
from torch_cls_zoo.experiments.rows import EXPERIMENTS
from torch_cls_zoo.options import NONE, TRAINED


def build_parser() -> CommandParser:
    """The options."""
    parser = CommandParser(
        prog="reproduce.py",
        description="Run one of the README's tables as an experiment: full when the images are "
        "found, else a rehearsal.",
    )
    parser.add_argument("experiment", choices=tuple(EXPERIMENTS))
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR",
        help="The folder that holds data sets, clothing-10 among them.",
    )  # fmt: skip
    add_common(parser, ["data-path", "scale"])
    add_trial_options(parser, seeds=SEEDS)
    parser.add_argument(
        "--rows", nargs="+", metavar="NAME",
        help="Run only these rows, and those they learn from.",
    )  # fmt: skip
    add_common(
        parser,
        ["output", "init", "threads", "workers", "continue", "fresh"],
        aliases={"init": ["--pretrained"], "workers": ["-j"]},
        help={
            "output": "The folder of the experiment; without it "
            "runs/torch_cls_zoo/<experiment>-<scale>.",
            "init": "The weights that every row starts from: a file, a name that `smallvision "
            "weights` lists, trained (also where nothing follows) for the network's own, or none.",
        },
        more={"init": {"nargs": "?", "const": TRAINED, "default": NONE}},
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run an experiment: full when the images are found, rehearsal otherwise."""
    # Threads that hardly spin while they wait: on a busy machine the default is many times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    args = build_parser().parse_args(argv)
    start = check_trial_options(args)
    from torch_cls_zoo.experiments.command import Asked, reproduce

    words = {name: value for name, value in vars(args).items() if name not in ("go_on", "fresh")}
    return reproduce(Asked(**words, start=start, command=words_of(argv)))


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
