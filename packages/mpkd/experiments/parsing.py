"""The options of a sweep's command; nothing heavy is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpkd.experiments.recipes import Setting
from mpkd.utils.config import check_config, load_config
from shared_core.runs.options import add_common
from shared_core.trials import add_trial_options, check_trial_options

if TYPE_CHECKING:
    from mpkd.experiments.sweep import SweepOptions


def add_sweep_options(
    parser: argparse.ArgumentParser,
    *,
    root: str | None,
    output: str,
    scale: str | None,
    threads: int | None = None,
) -> None:
    """What the matrix and the claims have in common.

    Args:
        root: default of ``--data-root``.
        output: sentence on the default of ``--output``.
        scale: sentence of ``--scale``; None: there is none.
        threads: default of ``--threads``; None: the scale's.
    """
    usual = "" if threads else " Without it the scale's number."
    names = ["data-path", "output", "device", "threads", "resume", "continue", "fresh"]
    add_common(
        parser, [*names, *(["scale"] if scale else [])],
        help={
            "data-path": "The set's own folder or archive.",
            "output": f"The folder of the sweep. {output}",
            "threads": "How many CPU threads compute. Another number rounds differently, so a "
            f"sweep keeps the one it began with.{usual}",
            **({"scale": scale} if scale else {}),
        },
        defaults={"threads": threads},
    )  # fmt: skip
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", default=None if root is None else Path(root),
        help="A folder that holds data sets by name, such as CIFAR10 and ImageNet.",
    )  # fmt: skip
    add_trial_options(parser)
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
        help="Set section.key of the configuration. It may be repeated.",
    )  # fmt: skip


def sweep_options(
    args: argparse.Namespace,
    *,
    name: str,
    task: str,
    script: str,
    words: Sequence[str],
    setting: Setting,
    scale: str,
    data_key: str,
    about: Mapping[str, Any],
    output: Path,
) -> SweepOptions:
    """The words as a sweep wants them.

    Args:
        data_key: what ``--data-path`` sets.
        output: folder where none is asked for.

    Raises:
        UsageError: options that do not go together.
    """
    from mpkd.experiments.sweep import SweepOptions  # loads torch

    start = check_trial_options(args)
    changes = {**setting.changes, "experiment.device": args.device}
    if args.data_path is not None:
        changes[data_key] = str(args.data_path)
    config = load_config(None, args.settings, overrides=changes)
    check_config(config)
    return SweepOptions(
        name=name, task=task, script=script, words=tuple(words), config=config,
        output=args.output or output, start=start, scale=scale, seeds=tuple(args.seeds),
        shard=args.shard, merge=tuple(args.merge), threads=args.threads,
        usual_threads=setting.threads,
        data_root=None if args.data_path is not None else args.data_root, about=about,
    )  # fmt: skip
