"""VisualDL's log of one training: always flushed, and written again when a run is resumed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from paddle import nn

from shared_core.runs import StageLog, read_metrics


class VisualLog:
    """Scalars, images, precision-recall curves and histograms below one folder.

    VisualDL writes nothing unless it is flushed, so every method flushes. A resumed run deletes
    what a killed one left and writes the epochs so far again, from the metric log.

    Args:
        folder: of this training; None logs nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._writer: Any = None

    def begin(self, stage: str, log: StageLog) -> None:
        """Start the log of a stage with its epochs so far.

        Raises:
            ImportError: visualdl is not installed.
        """
        if self.folder is None:
            return
        try:
            from visualdl import LogWriter
        except ImportError as error:
            raise ImportError(
                "visualdl is not installed: pip install visualdl, or add --no-visualdl"
            ) from error
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self._writer = LogWriter(logdir=str(self.folder))
        path = log.metrics.path
        for line in read_metrics(path) if path.exists() else []:
            if line.get("stage") == stage:
                self._scalars(line["split"], line["step"], line)
        self._writer.flush()

    def _scalars(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name not in ("stage", "split", "step") and value is not None:
                self._writer.add_scalar(tag=f"{split}/{name}", value=float(value), step=step)

    def epoch(self, step: int, trained: Mapping[str, float], found: Mapping[str, float]) -> None:
        """``train/*`` and ``val/*`` of an epoch."""
        if self._writer is None:
            return
        self._scalars("train", step, trained)
        self._scalars("val", step, found)
        self._writer.flush()

    def image(self, tag: str, image: np.ndarray, *, step: int = 0) -> None:
        """A picture, uint8 RGB ``(H, W, 3)``."""
        if self._writer is not None:
            self._writer.add_image(tag=tag, img=image, step=step)
            self._writer.flush()

    def pr_curves(
        self, probs: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, step: int
    ) -> None:
        """Precision and recall of each class against the rest; ``probs`` is ``(N, C)``."""
        if self._writer is None:
            return
        # VisualDL's own add_pr_curve (2.5.3) needs a NumPy before 1.24; it packs the same record.
        from visualdl.component.base_component import pr_curve_raw

        for index, name in enumerate(classes):
            record = pr_curve_raw(
                tag=f"pr/{name}",
                step=step,
                walltime=round(time.time() * 1000),
                **precision_recall_points(labels == index, probs[:, index]),
            )
            self._writer._get_file_writer().add_record(record)
        self._writer.flush()

    def histograms(self, net: nn.Layer, *, step: int) -> None:
        """Values of every matrix and kernel that learns."""
        if self._writer is None:
            return
        for name, parameter in net.named_parameters():
            if parameter.ndim > 1 and not parameter.stop_gradient:
                values = parameter.astype("float32").numpy().ravel()
                self._writer.add_histogram(tag=f"weights/{name}", values=values, step=step)
        self._writer.flush()

    def close(self) -> None:
        """End the log."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def precision_recall_points(
    positive: np.ndarray, scores: np.ndarray, *, points: int = 101
) -> dict[str, list[Any]]:
    """Counts, precision and recall at thresholds 0, 1/(points-1), ..., 1: right is ``>=``.

    Args:
        positive: booleans ``(N,)``.
        scores: fractions in [0, 1], ``(N,)``.

    Returns:
        ``tp``, ``fp``, ``tn``, ``fn``, ``precision`` (0 where nothing is said), ``recall``.
    """
    said = scores[None, :] >= np.linspace(0.0, 1.0, points)[:, None]
    tp, fp = (said & positive).sum(axis=1), (said & ~positive).sum(axis=1)
    fn, tn = positive.sum() - tp, (~positive).sum() - fp
    found = {"tp": tp, "fp": fp, "tn": tn, "fn": fn}
    found["precision"] = tp / np.maximum(tp + fp, 1)
    found["recall"] = tp / np.maximum(tp + fn, 1)
    return {name: values.tolist() for name, values in found.items()}
