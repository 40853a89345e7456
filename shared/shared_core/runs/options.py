"""The options that all five commands share: one spelling, whole sentences, defaults in the help.

A project takes the names it needs, gives its own defaults, and keeps its first README's spellings
as aliases. Nothing here loads more than argparse, because every ``--help`` passes through here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from shared_core.runs.command import UsageError
from shared_core.runs.numbers import COUNT, POSITIVE, SIZE, number
from shared_core.runs.place import Start

T = TypeVar("T")
Table = Mapping[str, Mapping[str, Any]]

SCALES = ("auto", "full", "short", "rehearsal")
PRECISIONS = ("fp32", "bf16", "fp16")
SEED = number(int, 0, 2**32 - 1)

# Name: what argparse needs, and the sentence of the help. Projects may replace either.
COMMON: Table = {
    "data-path": {
        "type": Path, "metavar": "DIR",
        "help": "The folder with the images: one folder a class, or train/, val/ and test/ with "
        "class folders in each.",
    },
    "split": {
        "type": Path, "metavar": "FILE",
        "help": "A manifest that says which image is learned from and which is judged on. Without "
        "it the content of each image and the seed decide.",
    },
    "output": {
        "type": Path, "metavar": "DIR",
        "help": "The folder of the run: its configuration, checkpoints, log, record and report.",
    },
    "input-size": {
        "type": SIZE, "metavar": "PIXELS",
        "help": "The side in pixels of the square image that the network sees.",
    },
    "epochs": {
        "type": SIZE, "metavar": "N",
        "help": "How many times the training goes through all training images.",
    },
    "batch-size": {
        "type": SIZE, "metavar": "N",
        "help": "How many images a step learns from, in each process.",
    },
    "lr": {
        "type": POSITIVE, "metavar": "RATE",
        "help": "The learning rate that the training has after its warm-up.",
    },
    "seed": {
        "type": SEED, "metavar": "N", "default": 0,
        "help": "The number that decides first weights, order of images and augmentation. On a "
        "CPU equal seeds give equal results.",
    },
    "device": {
        "metavar": "NAME", "default": "auto",
        "help": "Where to compute: cpu, cuda, cuda:1, or auto for a GPU where there is one.",
    },
    "amp": {
        "choices": PRECISIONS, "default": "fp32",
        "help": "The precision of the computation. bf16 and fp16 are faster on hardware that "
        "knows them.",
    },
    "workers": {
        "type": COUNT, "metavar": "N",
        "help": "How many threads read and decode images. 0 reads in the main thread.",
    },
    "threads": {
        "type": SIZE, "metavar": "N",
        "help": "How many CPU threads compute. Another number rounds differently, so a resumed "
        "run keeps the one it began with.",
    },
    "resume": {
        "action": "store_true",
        "help": "Go on with the run in the output folder, exactly where it stopped.",
    },
    "continue": {
        "dest": "go_on", "action": "store_true",
        "help": "Go on with the run in the output folder if there is one, or else start it.",
    },
    "fresh": {
        "action": "store_true",
        "help": "Delete the earlier run in the output folder and start anew.",
    },
    "init": {
        "metavar": "WEIGHTS",
        "help": "The weights to start from: a file, a name that `smallvision weights` lists, or "
        "none to train from nothing.",
    },
    "scale": {
        "choices": SCALES, "default": "auto",
        "help": "The size of the recipe. full is the published one, short takes minutes on a CPU, "
        "rehearsal takes built-in images, auto is full where the data set is found and else "
        "a rehearsal.",
    },
}  # fmt: skip


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of every option that has one, unless its sentence tells it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, value = action.help, action.default
        silent = value is None or value is False or value == argparse.SUPPRESS
        if text is None or silent or "default" in text or not action.option_strings:
            return text
        shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        if not shown:
            return text
        if isinstance(action, argparse.BooleanOptionalAction):
            shown = "on"
        return f"{text} (default: {shown.replace('%', '%%')})"


class CommandParser(argparse.ArgumentParser):
    """A parser whose help shows defaults and whose errors are one line."""

    def __init__(self, *args: Any, **more: Any) -> None:
        more.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **more)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and leave with exit code 2."""
        line = " ".join(message.split())
        self.exit(2, f"error: {line}; {self.prog} --help lists the options\n")


def add_options(
    parser: argparse._ActionsContainer,
    table: Table,
    *,
    positional: Sequence[str] = (),
    without: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    aliases: Mapping[str, Sequence[str]] | None = None,
    help: Mapping[str, str] | None = None,
    more: Mapping[str, Mapping[str, Any]] | None = None,
    underscores: bool = False,
) -> None:
    """Add the options of a table to a parser or a group of it.

    Args:
        table: by name, what argparse needs. ``data-path`` becomes ``--data-path``; unless the
            table says ``dest``, the destination is ``data_path``.
        positional: names that are given without a flag. Spellings of one with several values
            become a flag beside it, collected in ``more_<name>``; another with spellings becomes
            a required flag.
        without: names to leave out; their defaults hold.
        defaults, help, more: by name, instead of the table's default, sentence, other words.
        aliases: by name, further spellings of the option with their dashes.
        underscores: also take every flag with underscores for hyphens.

    Raises:
        ValueError: a name that the table does not have.
    """
    aliases, defaults, help, more = aliases or {}, defaults or {}, help or {}, more or {}
    for name in (*without, *defaults, *aliases, *help, *more):
        if name not in table:
            raise ValueError(f"option {name!r}: expected one of {', '.join(table)}")
    changed = (("default", defaults), ("help", help))
    for name, known in table.items():
        dest, words = name.replace("-", "_"), {**known, **more.get(name, {})}
        words.update({key: part[name] for key, part in changed if name in part})
        spellings = aliases.get(name, ())
        if name in without:
            switch = words.get("action") == "store_true"
            parser.set_defaults(**{dest: words.get("default", False if switch else None)})
        elif name not in positional:
            flags = [f"--{name}", *([f"--{dest}"] if underscores and "-" in name else [])]
            parser.add_argument(*flags, *spellings, **{"dest": dest, **words})
        elif "nargs" in words:
            parser.add_argument(dest, **words)
            if spellings:
                parser.add_argument(
                    *spellings, dest=f"more_{dest}", metavar=words["metavar"], action="append",
                    help=f"The same as {words['metavar']}.",
                )  # fmt: skip
        elif spellings:
            parser.add_argument(*spellings, **{**words, "dest": dest, "required": True})
        else:
            parser.add_argument(dest, **words)


def add_common(parser: argparse._ActionsContainer, names: Sequence[str], **how: Any) -> None:
    """Add the options ``names`` of :data:`COMMON`, in this order; see :func:`add_options`.

    Raises:
        ValueError: a name that is no common option, here or in the mappings.
    """
    for name in names:
        if name not in COMMON:
            raise ValueError(f"option {name!r}: expected one of {', '.join(COMMON)}, named once")
    add_options(parser, {name: COMMON[name] for name in names}, **how)


def taken_from(kind: type[T], args: argparse.Namespace) -> T:
    """A dataclass whose fields are the destinations of the same names; lists become tuples."""
    values = {field.name: getattr(args, field.name) for field in fields(cast(Any, kind))}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def options_given(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """Destinations of the options that stand on the command line, defaults told apart."""
    unset = object()  # argparse leaves alone what the namespace holds already
    marks: dict[str, object] = {a.dest: unset for a in parser._actions if a.dest != "help"}
    for action in parser._actions:
        if isinstance(action, argparse._AppendAction):  # would append to the mark
            marks[action.dest] = None
    found = parser.parse_args(argv, argparse.Namespace(**marks))
    return {name for name, mark in marks.items() if getattr(found, name, mark) is not mark}


def start_of(args: argparse.Namespace) -> Start:
    """How ``--resume``, ``--continue`` and ``--fresh`` say that a run starts.

    Raises:
        UsageError: more than one of them.
    """
    chosen: list[tuple[str, Start]] = []
    if getattr(args, "resume", False):
        chosen.append(("--resume", "resume"))
    if getattr(args, "go_on", False):
        chosen.append(("--continue", "continue"))
    if getattr(args, "fresh", False):
        chosen.append(("--fresh", "fresh"))
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(flag for flag, _ in chosen)}: expected one of them")
    return chosen[0][1] if chosen else "new"


def choose_scale(asked: str | None, *, found: bool) -> str:
    """``auto`` (or None): ``full`` where the data set is found, else ``rehearsal``."""
    if asked is None or asked == "auto":
        return "full" if found else "rehearsal"
    return asked


def words_of(argv: Sequence[str] | None) -> list[str]:
    """The words of the command line, as a record writes the command down."""
    return sys.argv[1:] if argv is None else list(argv)
