"""The cells of a table: a row trained with a seed, in its own folder, resumed after a kill."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared_core.checkpoints import atomic_write
from shared_core.datasets.splitting.prepared import PreparedData
from shared_core.for_torch.distributed import start
from shared_core.runs import derive_seed
from shared_core.trials import Cell
from torch_cls_zoo.applications.dispatch import run
from torch_cls_zoo.config import parse
from torch_cls_zoo.dataloader.curriculum_files import CURRICULUM_FILE
from torch_cls_zoo.dataloader.knowledge_files import LABEL_FILE
from torch_cls_zoo.dataloader.sample_files import read_sample_file, write_sample_file
from torch_cls_zoo.experiments.recipes import Recipe
from torch_cls_zoo.experiments.rows import LABELS, LARGER, MATRICES, Row

# The true class's term counts twice, every other once.
MATRICES_TEXT = "weights: {diagonal: 2, other: 1}\n"
FILES, LOG = "files", "log.txt"  # of a cell: what it writes for others, what it said


def words_of_row(row: Row, settings: Recipe, extra: Sequence[str] = ()) -> list[str]:
    """The options of a row without its seed and folders: what its result depends on.

    Args:
        extra: further options of every row.
    """
    words = [*settings.words(), *extra]
    for flag in row.without:
        words = _without(words, flag)
    return [*words, *(settings.larger if word == LARGER else word for word in row.words)]


def cells_of(
    rows: Sequence[Row],
    seeds: Sequence[int],
    settings: Recipe,
    *,
    extra: Sequence[str] = (),
    split_hash: str,
) -> list[Cell]:
    """A cell for each row and seed, seed by seed, so that a stop leaves whole rows of a seed."""
    return [
        Cell(
            row.name,
            {
                "words": words_of_row(row, settings, extra),
                "learns_from": row.learns_from,
                "shuffled": row.shuffled,
                "split": split_hash,
            },
            seed,
            row.needs,
        )
        for seed in seeds
        for row in rows
    ]


@dataclass(frozen=True)
class Bench:
    """Where cells run and on what.

    Attributes:
        folder: of the experiment.
        data: the images.
        rows: by name.
        further: options that decide no result (``--workers 2``).
    """

    folder: Path
    data: PreparedData
    rows: dict[str, Row]
    further: tuple[str, ...] = ()

    def measure(self, cell: Cell, place: Path) -> dict[str, Any]:
        """Train and test one cell in ``place``; a run that was killed goes on exactly.

        Returns:
            ``accuracy``, ``macro_f1``, ``loss`` on test, ``val_accuracy``, ``best_epoch``,
            ``parameters``, ``seconds``.
        """
        config = parse(self.command(cell, place), prog="main.py")
        world = start(device="cpu" if config.processes.device == "cpu" else "auto")
        with (place / LOG).open("a") as said, contextlib.redirect_stdout(said):
            result = run(config, world, data=self.data)
        for name in ("state", "checkpoints"):  # what is large; log and report stay
            shutil.rmtree(place / "run" / name, ignore_errors=True)
        test, training = result["test"], result["training"]
        return {
            **{key: test[key] for key in ("accuracy", "macro_f1", "loss")},
            **{
                key: training[key]
                for key in ("val_accuracy", "best_epoch", "parameters", "seconds")
            },
        }

    def command(self, cell: Cell, place: Path) -> list[str]:
        """The words of ``main.py`` for a cell in ``place``."""
        row = self.rows[cell.name]
        words = [
            str(self._matrices(place)) if word == MATRICES else word
            for word in cell.settings["words"]
        ]
        words += [
            "--train",
            "--continue",
            "--seed",
            str(cell.seed),
            "--no-histograms",
            "--no-floor",
        ]
        words += ["--output", str(place / "run"), *self.further]
        if row.writes:
            flag = "--knowledge" if row.writes == "knowledge" else "--make_curriculum"
            words += [flag, "train"]
        if row.writes or row.learns_from:
            words += ["--knowledge_dir", str(place / FILES)]
        if row.learns_from:
            self._gather(row, cell.seed, place / FILES)
        return words

    def _matrices(self, place: Path) -> Path:
        path = place / "class_matrices.yaml"
        atomic_write(path, lambda scratch: scratch.write_text(MATRICES_TEXT, encoding="utf-8"))
        return path

    def _gather(self, row: Row, seed: int, target: Path) -> None:
        """Copy the files that ``row`` learns from out of the cells before it."""
        target.mkdir(parents=True, exist_ok=True)
        for number, source in enumerate(row.learns_from):
            name = source.removesuffix(LABELS)
            folder = self.folder / "cells" / Cell(name, {}, seed).folder_name / "run" / FILES
            if (folder / CURRICULUM_FILE).exists():
                _copy_curriculum(folder, target, seed if row.shuffled else None)
            else:
                file = folder / (LABEL_FILE if source != name else "distill.txt")
                shutil.copyfile(file, target / f"distill_{number}.txt")


def _without(words: Sequence[str], flag: str) -> list[str]:
    """Words without a flag and its value."""
    if flag not in words:
        return list(words)
    at = list(words).index(flag)
    value = at + 1 < len(words) and not words[at + 1].startswith("-")
    return [*words[:at], *words[at + 1 + value :]]


def _copy_curriculum(source: Path, target: Path, shuffle_seed: int | None) -> None:
    """The curriculum as it is, or with its weights dealt out to other images."""
    if shuffle_seed is None:
        shutil.copyfile(source / CURRICULUM_FILE, target / CURRICULUM_FILE)
        return
    read = read_sample_file(source / CURRICULUM_FILE, columns=1)
    rng = np.random.default_rng(derive_seed(shuffle_seed, "curriculum control") % 2**32)
    dealt = read.values[rng.permutation(len(read.values))]
    about = {**read.about, "dealt_out_at_random": True}
    write_sample_file(target / CURRICULUM_FILE, read.names, dealt, about=about)
