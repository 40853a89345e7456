"""Names of run folders, the lines of ``record.txt``, and accuracy with its interval."""

from __future__ import annotations

import math
import os
from pathlib import Path

from landmark_distill.config import (
    AUTO,
    NONE,
    DataConfig,
    DistillConfig,
    NetworkConfig,
    TrainConfig,
    ViewConfig,
)

RECORD = "record.txt"
BEST = "max_acc.pth"
STATE = "checkpoint.pth.tar"


def run_folder(
    save_dir: Path,
    suffix: str,
    *,
    network: NetworkConfig,
    views: ViewConfig,
    data: DataConfig,
    distill: DistillConfig | None,
    train: TrainConfig,
) -> Path:
    """``save_dir/<task>/<settings>``, as the original names them.

    The task names data, network and distillation, the settings what the optimizer does. Rates are
    written with two digits, so two runs can have one name: the second is refused, and
    ``--suffix`` tells them apart.
    """
    task = f"{data.name}-{network.name.replace('/', '-')}"
    task += f"-{distill.loss}-{distill.weight}" if distill else "-no_distill"
    if train.init not in (AUTO, NONE):
        task += "-Pre"
    if not views.augment:
        task += "-NoAug"
    rate = train.schedule
    scheduler = rate.kind
    if scheduler != "cosine":  # the original meant to, and compared the wrong variable
        scheduler += f"{','.join(map(str, rate.steps))}_gamma{rate.gamma:g}"
    settings = (
        f"lr{rate.lr:.2g}_{train.optimizer}_{scheduler}_epoch{rate.max_epoch}"
        f"_warmup{rate.warmup}_bs{train.batch_size}"
    )
    if distill is not None and distill.head_fixed:
        settings += "-head_fixed"
    return save_dir / task / (settings + suffix)


class Record:
    """``record.txt``: lines for people, appended, and cut back to where a resumed run stood."""

    def __init__(self, folder: Path, *, quiet: bool = False) -> None:
        self.path, self.quiet = folder / RECORD, quiet

    def write(self, line: str) -> None:
        """Append a line and say it; it is on the disk when this returns."""
        print(line, flush=True)
        if self.quiet:
            return
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def position(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def cut(self, position: int) -> None:
        """Drop what was written after ``position``; a file that is shorter stays as it is."""
        if self.path.exists() and self.path.stat().st_size > position:
            os.truncate(self.path, position)


def parameters_line(student: tuple[int, int], teacher: tuple[int, int] | None) -> str:
    """The line that counts weights: those that learn and all, of student and teacher."""
    learned, total = student
    line = f"student para trainable/sum {learned}/{total}; "
    frozen = teacher or (0, 0)
    return line + f"teacher para trainable/sum {frozen[0]}/{frozen[1]}"


def interval(accuracy: float, count: int) -> float:
    """Half of the 95 % interval of a share of ``count`` samples (normal approximation).

    The original took the deviation over batches, which depends on how the data are cut.
    """
    return 1.96 * math.sqrt(max(accuracy * (1 - accuracy), 0.0) / max(count, 1))


def epoch_line(
    epoch: int,
    lr: float,
    *,
    train_acc: float,
    eval_loss: float,
    eval_acc: float,
    eval_count: int,
    ce_loss: float,
    kd_loss: float,
) -> str:
    """An epoch's line; accuracies come as fractions and stand there in percent.

    Args:
        epoch: from 1.
        lr: of its last step.
        eval_count: samples that ``eval_acc`` was measured on.
        ce_loss, kd_loss: means over the epoch, nats or what the loss has.
    """
    spread = 100 * interval(eval_acc, eval_count)
    return (
        f"epoch {epoch}  lr {lr}: train_acc={100 * train_acc:.4f}, eval_loss={eval_loss:.4f}, "
        f"eval_acc={100 * eval_acc:.4f}+{spread:.4f}, avg_ce_loss={ce_loss:.4f}, "
        f"avg_kd_loss={kd_loss:.4f}"
    )
