"""The frozen teacher: its rows found by name, asked live, or once with answers in a store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from landmark_distill.config import DistillConfig
from landmark_distill.head.distillation import KDSettings
from landmark_distill.head.streamed_loss import EXTRA, SoftLabels, soft_labels
from landmark_distill.images.landmark_data import LandmarkData
from landmark_distill.images.views import ViewLoader
from landmark_distill.model import EmbeddingModel
from shared_core.for_torch.checkpoints import weights_sha256
from shared_core.for_torch.data import TorchBatch
from shared_core.for_torch.precision import Precision
from shared_core.knowledge import KnowledgeError, KnowledgeStore
from shared_core.runs import progress


class TeacherOutputs(NamedTuple):
    """What the teacher says of a batch; what is not there is None."""

    features: Tensor | None = None  # (N, D) float32
    soft: SoftLabels | None = None
    logits: Tensor | None = None  # (N, C) float32, without margin; of a store that keeps the top


class Teacher:
    """A network whose weights never change: no gradient, always in eval mode, so no drop-path.

    Args:
        model: with its head.
        precision: of its forward passes.
        class_names: of the head's rows; empty where its file names none.
        change: factor and summand, ``(3, 1, 1)``, that turn the student's normalised pixels into
            those that it is used to; None where they are the same.
        start: where its own first weights came from, for records.
    """

    def __init__(
        self,
        model: EmbeddingModel,
        precision: Precision,
        *,
        class_names: Sequence[str] = (),
        change: tuple[Tensor, Tensor] | None = None,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        if model.head is None:
            raise ValueError("the teacher has no head, expected one to teach with")
        self.model, self.precision = model.eval().requires_grad_(False), precision
        self.class_names, self.start = tuple(class_names), dict(start or {})
        self.change = change and tuple(one.to(precision.device) for one in change)

    @property
    def head(self) -> Any:
        """The frozen head; in eval mode, so without margin."""
        return self.model.head

    def features(self, images: Tensor) -> Tensor:
        """``(N, D)`` float32."""
        with torch.no_grad(), self.precision.autocast():
            if self.change is not None:
                images = images * self.change[0] + self.change[1]
            return self.model.embed(images).float()

    def digest(self, *, head: bool) -> str:
        """sha256 of the weights, of the encoder alone or with the head."""
        weights = self.model.state_dict()
        return weights_sha256({k: v for k, v in weights.items() if head or k[:5] != "head."})


def in_the_teachers_rows(
    data: LandmarkData, teacher: Teacher, asked: DistillConfig
) -> tuple[LandmarkData, dict[str, Any]]:
    """The data with the teacher's class numbers, and what the record must say of the teacher.

    A student that is compared through the teacher's head, or takes it over, must mean the same
    class by the same row. Rows are found by the classes' names.

    Raises:
        ValueError: a class that the teacher's head does not know, no names to find rows by, a
            head with too few rows or another number of them than was asked for, or a teacher that
            has learned classes of the test.
    """
    notes: dict[str, Any] = {}
    known = sorted(set(data.unseen) & set(teacher.class_names))
    if known and not asked.may_know_test:
        raise ValueError(
            f"{asked.weights} has learned {len(known)} classes of the test ({known[0]!r}), which "
            "nobody may have seen: expected a teacher of this split, or --teacher_may_know_test"
        )
    if known:
        notes["teacher_knows_test_classes"] = len(known)
    if not asked.head_fixed and asked.loss != "KD":
        return data, notes  # only features are compared
    count = teacher.head.num_classes
    if data.asked_classes not in (None, count) and not asked.head_fixed:
        raise ValueError(
            f"--num_classes {data.asked_classes}: {asked.weights} has a head of {count} rows, "
            "expected as many to compare predictions"
        )
    names = () if asked.by_number else (data.class_names, teacher.class_names)
    if not any(names):
        if count < data.num_classes:
            raise ValueError(
                f"the teacher's head knows {count} classes, the data have {data.num_classes}: "
                "expected at least as many"
            )
        return data.with_rows(None, count), notes
    if not all(names):
        who = "the data have" if data.class_names else f"{asked.weights} has"
        raise ValueError(
            f"of data and teacher only {who} names of classes, so rows cannot be found by name: "
            "expected both, or --teacher_classes by-number, which takes row i for class i"
        )
    place = {name: row for row, name in enumerate(teacher.class_names)}
    unknown = [name for name in data.class_names if name not in place]
    if unknown:
        raise ValueError(
            f"the teacher's head does not know {len(unknown)} classes of the data "
            f"({unknown[0]!r}): expected a teacher that has learned them"
        )
    rows = [place[name] for name in data.class_names]
    return data.with_rows(rows, count, class_names=teacher.class_names), notes


class Live:
    """Asks the teacher for each batch."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def outputs(self, batch: TorchBatch) -> TeacherOutputs:
        """Its features."""
        return TeacherOutputs(features=self.teacher.features(batch.images))

    def close(self) -> None:
        """Nothing is open."""


class Stored:
    """Reads the teacher's answers; asks it only for images and views that nobody asked for.

    What was just computed is read back from the store, so that a run does not depend on whether
    its answers were there before.

    Args:
        folder: of the store; each kind has a folder of its own in it.
        teacher: whose answers they are.
        kind: ``features``: the teacher's features; ``soft``: what a shared head makes of them
            (:class:`SoftLabels`); ``topk``: the largest logits and the weight of the rest, which
            is exact at temperature 1 only.
        keys: content keys of the training images, by index.
        view: what the images' views are decided by.
        kd: of ``soft``, which depends on it.
        top_k: logits kept, for ``topk``.
        writable: False for a run of several processes, which cannot write one store together.
    """

    def __init__(
        self,
        folder: Path,
        teacher: Teacher,
        *,
        kind: str,
        keys: list[str],
        view: Mapping[str, Any],
        kd: KDSettings | None = None,
        top_k: int = 16,
        writable: bool = True,
    ) -> None:
        self.teacher, self.kind, self.keys = teacher, kind, keys
        self.kd = kd or KDSettings()
        head = teacher.head
        width = {
            "features": head.feature_dim,
            "soft": head.feature_dim + EXTRA,
            "topk": head.num_classes,
        }[kind]
        seen = {**view, **(self.kd.facts(head) if kind == "soft" else {})}
        about = {"teacher_hash": teacher.digest(head=kind != "features"), "classes": width}
        self.folder = folder / kind
        self._made_with: dict[str, Any] = {
            **about,
            "view": seen,
            "kind": "logits" if kind == "topk" else "features",
            "top_k": max(1, min(top_k, width - 1)) if kind == "topk" else None,
            "num_samples": len(set(keys)),
        }
        self.writable, self._writing = writable, False
        self.asked = 0  # views that the teacher had to look at
        if writable and not (self.folder / "store.json").exists():
            self._write()
        else:  # several runs may read a store that is full
            self.store = KnowledgeStore.open(self.folder, **about, view=seen)

    def _write(self) -> None:
        """Open the store for writing, which one run at a time may."""
        self.store = KnowledgeStore.create(self.folder, **self._made_with)
        self._writing = True

    def close(self) -> None:
        """Let others write."""
        self.store.close()
        self._writing = False

    def outputs(self, batch: TorchBatch) -> TeacherOutputs:
        """What is stored for the batch's views, computed and stored where it was not."""
        self.fill(batch)
        keys = [self.keys[index] for index in batch.indices.tolist()]
        values = self.store.get(keys, batch.view_id)
        device = batch.images.device
        if self.kind == "soft":
            return TeacherOutputs(soft=SoftLabels.unpack(values, device=device))
        tensor = torch.from_numpy(values).to(device)
        if self.kind == "topk":
            return TeacherOutputs(logits=tensor)
        return TeacherOutputs(features=tensor)

    def fill(self, batch: TorchBatch) -> None:
        """Store what is not there of a batch.

        Raises:
            KnowledgeError: something is missing, and this run may not write.
        """
        keys = [self.keys[index] for index in batch.indices.tolist()]
        missing = set(self.store.missing(keys, batch.view_id))
        if not missing:
            return
        if not self.writable:
            raise KnowledgeError(
                f"{self.folder}: {len(missing)} views of a batch are not stored, and several "
                "processes cannot store them: run --fill_knowledge in one process first"
            )
        if not self._writing:
            self._write()
            return self.fill(batch)  # another run may have stored them meanwhile
        rows = [i for i, key in enumerate(keys) if key in missing]
        features = self.teacher.features(batch.images[rows])
        self.asked += len(rows)
        with torch.no_grad():
            if self.kind == "soft":
                labels = batch.labels[rows]
                soft = soft_labels(features, self.teacher.head, labels=labels, kd=self.kd)
                values = soft.pack()
            elif self.kind == "topk":
                values = self.teacher.head(features).float().cpu().numpy()
            else:
                values = features.cpu().numpy()
        self.store.put([keys[i] for i in rows], batch.view_id, values)


def fill_store(source: Stored, loader: ViewLoader, *, views: int) -> int:
    """Store the teacher's outputs for every image in views ``0`` to ``views - 1``.

    Returns:
        How many the teacher had to look at; the others were stored before.
    """
    for view in range(views):
        loader.loader.order.set_epoch(view)
        label = f"teacher outputs, view {view + 1}/{views}"
        for batch in progress(loader, total=len(loader), label=label):
            source.fill(batch)
    loader.loader.order.set_epoch(0)
    source.close()
    return source.asked
