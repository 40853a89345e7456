"""One cell of a table: a row trained with a seed, in its own folder, resumed after a kill."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_core.checkpoints import atomic_write
from shared_core.datasets.splitting.prepared import PreparedData
from shared_core.for_torch.distributed import World, start
from shared_core.runs import derive_seed
from torch_cls_zoo.applications.dispatch import run
from torch_cls_zoo.config import parse
from torch_cls_zoo.dataloader.curriculum_files import CURRICULUM_FILE
from torch_cls_zoo.dataloader.knowledge_files import LABEL_FILE
from torch_cls_zoo.dataloader.sample_files import read_sample_file, write_sample_file
from torch_cls_zoo.experiments.recipes import Recipe
from torch_cls_zoo.experiments.rows import MATRICES, Row

# The true class's term counts twice, every other once.
MATRICES_TEXT = "weights: {diagonal: 2, other: 1}\n"


class Bench:
    """Runs cells of one experiment below ``folder``.

    Args:
        folder: of the experiment.
        experiment: its name.
        recipe: what all rows share.
        data: the images.
        extra: further options of every row.
    """

    def __init__(
        self,
        folder: Path,
        experiment: str,
        recipe: Recipe,
        data: PreparedData,
        *,
        extra: Sequence[str] = (),
    ) -> None:
        self.folder, self.experiment, self.recipe, self.data = folder, experiment, recipe, data
        self.extra = list(extra)
        self._world: World | None = None

    def files_of(self, row: str, seed: int) -> Path:
        """Where a row's knowledge or curriculum lies."""
        return self.folder / "files" / f"{row}-s{seed}"

    def words(self, row: Row, seed: int) -> list[str]:
        """The command of one cell."""
        words = [*self.recipe.words(), *self.extra]
        if "--pretrained" in row.without:
            words = _without(words, "--pretrained")
        if "--aug" in row.without:
            words = [word for word in words if word != "--aug"]
        own = [self.recipe.larger if word == "LARGER" else word for word in row.words]
        own = [str(self._matrices()) if word == MATRICES else word for word in own]
        words += ["--train", *own, "--seed", str(seed), "--output", str(self.place(row, seed))]
        if row.writes:
            flag = "--knowledge" if row.writes == "knowledge" else "--make_curriculum"
            words += [flag, "train", "--knowledge_dir", str(self.files_of(row.label, seed))]
        elif row.learns_from:
            words += ["--knowledge_dir", str(self._sources(row, seed))]
        return words

    def place(self, row: Row, seed: int) -> Path:
        """The folder of a cell's run."""
        return self.folder / "cells" / f"{row.label}-s{seed}"

    def _matrices(self) -> Path:
        path = self.folder / "class_matrices.yaml"
        if not path.exists():
            atomic_write(path, lambda scratch: scratch.write_text(MATRICES_TEXT, encoding="utf-8"))
        return path

    def _sources(self, row: Row, seed: int) -> Path:
        """A folder with the files that ``row`` learns from, gathered from the rows before."""
        target = self.files_of(row.label, seed)
        target.mkdir(parents=True, exist_ok=True)
        for number, source in enumerate(row.learns_from):
            labels = source.endswith(":labels")
            folder = self.files_of(Row(source.removesuffix(":labels")).label, seed)
            if (folder / CURRICULUM_FILE).exists():
                _copy_curriculum(folder, target, seed if row.shuffled else None)
            else:
                file = folder / (LABEL_FILE if labels else "distill.txt")
                shutil.copyfile(file, target / f"distill_{number}.txt")
        return target

    def run(self, row: Row, seed: int) -> dict[str, Any]:
        """Train and test one cell; a run that was killed goes on exactly.

        Returns:
            ``accuracy``, ``macro_f1``, ``loss`` on test, ``val_accuracy``, ``best_epoch``,
            ``parameters``, ``seconds``.
        """
        place = self.place(row, seed)
        words = self.words(row, seed)
        if (place / "config.json").exists():
            words.append("--resume")
        args = parse(words)
        args.command = "experiments/" + row.label
        args.histograms = False
        if self._world is None:
            self._world = start(device="cpu" if args.cuda is False else "auto")
        place.parent.mkdir(parents=True, exist_ok=True)
        with (self.folder / "cells" / f"{row.label}-s{seed}.log").open("a") as said:
            with contextlib.redirect_stdout(said):
                result = run(args, self._world, data=self.data)
        test, training = result["test"], result["training"]
        return {
            "accuracy": test["accuracy"],
            "macro_f1": test["macro_f1"],
            "loss": test["loss"],
            "val_accuracy": training["val_accuracy"],
            "best_epoch": training["best_epoch"],
            "parameters": training["parameters"],
            "seconds": training["seconds"],
        }

    def clean(self, row: Row, seed: int) -> None:
        """Take away what is large of a finished cell; its log and report stay."""
        for name in ("state", "checkpoints"):
            shutil.rmtree(self.place(row, seed) / name, ignore_errors=True)


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
