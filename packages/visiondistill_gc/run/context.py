"""What every stage of a run needs: settings, data, log, files; and how a network is judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from paddle import nn

from shared_core.datasets import ImageSet
from shared_core.for_paddle.accuracy import Answers, answers_of
from shared_core.for_paddle.checkpoints import unwrap
from shared_core.for_paddle.data import Normalizer, PaddleLoader
from shared_core.for_paddle.distributed import World
from shared_core.for_paddle.precision import Precision
from shared_core.runs import OpenRun, StageLog
from visiondistill_gc.options import Settings
from visiondistill_gc.utils.data_utils import GarbageData, eval_loader
from visiondistill_gc.utils.visual_log import VisualLog


@dataclass(frozen=True)
class Run:
    """What every stage needs."""

    settings: Settings
    opened: OpenRun
    data: GarbageData
    world: World

    @property
    def log(self) -> StageLog:
        """What the run says, and the results of its finished stages."""
        return self.opened.log

    @property
    def folder(self) -> Path:
        """Where the run's files lie."""
        return self.opened.folder

    @property
    def threads(self) -> int:
        """CPU threads that compute."""
        return int(self.opened.config["threads"])

    @property
    def models(self) -> Path:
        """The folder of finished models."""
        return self.settings.run.save_dir or self.folder / "models_saved"

    @property
    def logs(self) -> Path:
        """VisualDL's folder; each training has one below it."""
        return self.settings.run.log_dir or self.folder / "logs"

    @property
    def teacher_runs(self) -> bool:
        """Whether a network teaches: not nobody, and not stored answers."""
        knowledge = self.settings.teacher.teacher_knowledge
        return self.settings.training.alpha != 1 and knowledge is None

    def student_file(self, fold: int | None) -> Path:
        """As the README names it; a student that is the only one, or taught by the folds (None)."""
        alone = fold is None or self.settings.data.n_splits == 1
        return self.models / ("best_model.pdparams" if alone else f"best_model_fold{fold}.pdparams")

    @property
    def validated(self) -> str:
        """What the images are called that validate the students."""
        return "validation" if self.settings.data.n_splits == 1 else "out of fold"

    @property
    def evaluated(self) -> str:
        """What tells apart the evaluations of a run: its folds, and whether they taught one."""
        what = self.settings.run
        return "-".join([*map(str, what.folds), *(["one"] if what.one_student else [])])

    def teacher_file(self, fold: int) -> Path:
        """The teacher that this fold's training part made, or the one that was given."""
        given = self.settings.teacher.teacher_weights
        return given or self.models / f"teacher_fold{fold}.pdparams"

    def visual(self, name: str) -> VisualLog:
        """The log of one training, in the main process only."""
        shown = self.settings.records.visualdl and self.world.is_main
        return VisualLog(self.logs / name if shown else None)

    def precision(self) -> Precision:
        """As ``--amp`` says."""
        dtype, _, level = self.settings.training.amp.partition("-")
        return Precision(self.world.device, dtype, level=level or "O1")


def predict(
    run: Run, net: nn.Layer, images: ImageSet, *, precision: Precision | None = None
) -> Answers:
    """Logits of every image, in order, from this process alone."""
    data = run.settings.data
    batches = eval_loader(images, data.input_size, workers=data.workers)
    alone = replace(run.world, rank=0, world_size=1)
    return answers_of(
        net, PaddleLoader(batches, Normalizer(*unwrap(net).normal)), alone, precision=precision
    )
