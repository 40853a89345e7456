"""The frozen teacher: asked live, or once, its answers kept in a knowledge store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from landmark_distill.head_kd import KDSettings
from landmark_distill.model import EmbeddingModel
from landmark_distill.streamed_head import EXTRA, SoftLabels, soft_labels
from shared_core.for_torch.checkpoints import weights_sha256
from shared_core.for_torch.data import TorchBatch
from shared_core.for_torch.precision import Precision
from shared_core.knowledge import KnowledgeError, KnowledgeStore


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
    """

    def __init__(self, model: EmbeddingModel, precision: Precision) -> None:
        if model.head is None:
            raise ValueError("the teacher has no head, expected one to teach with")
        self.model, self.precision = model.eval().requires_grad_(False), precision

    @property
    def head(self) -> Any:
        """The frozen head; in eval mode, so without margin."""
        return self.model.head

    def features(self, images: Tensor) -> Tensor:
        """``(N, D)`` float32."""
        with torch.no_grad(), self.precision.autocast():
            return self.model.embed(images).float()

    def digest(self, *, head: bool) -> str:
        """sha256 of the weights, of the encoder alone or with the head."""
        weights = self.model.state_dict()
        return weights_sha256({k: v for k, v in weights.items() if head or k[:5] != "head."})


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
            (:class:`landmark_distill.streamed_head.SoftLabels`); ``topk``: the largest logits and
            the weight of the rest, which is exact at temperature 1 only.
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
