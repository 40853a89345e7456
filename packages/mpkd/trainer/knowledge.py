"""A teacher's outputs for every image and view, computed once and replayed from disk.

Views are drawn from a generator keyed by (seed, image, view number), so that epoch ``e`` can see
view ``e mod K`` again, with the teacher's answer to exactly these pixels. Outputs are stored in
batches of a fixed order: a run that was killed computes the batches that are missing, and only
those.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpkd.dataset.data_utils import Data, SightLoader, training_loader
from mpkd.model.networks import sight_of
from shared_core.datasets import ImageSet
from shared_core.for_torch.precision import Precision
from shared_core.knowledge import KnowledgeError, KnowledgeStore
from shared_core.runs import progress

FULL_PRECISION_CLASSES = 100  # float32 up to here; float16 for a thousand classes


def view_description(loader: SightLoader) -> dict[str, Any]:
    """What the teacher saw, as plain JSON: pixels and normalisation."""
    sight = loader.sight
    enlarged = {"enlarged": sight.side} if sight.side else {}
    view = loader.loader.view.settings()
    return {**view, "mean": list(sight.mean), "std": list(sight.std), **enlarged}


@torch.no_grad()
def store_outputs(
    folder: str | Path,
    teacher: nn.Module,
    data: Data,
    images: ImageSet,
    *,
    views: int,
    teacher_hash: str,
    augment: bool,
    batch_size: int,
    seed: int,
    device: torch.device,
    threads: int,
    precision: Precision,
) -> None:
    """Fill a store with the teacher's logits for ``views`` views of every image.

    Args:
        folder: of the store; one of another teacher or view is replaced.
        teacher: in evaluation mode.
        teacher_hash: sha256 of its weights.
        seed: decides the views; the student's loader must have the same.
        precision: what the teacher computes in.
    """  # fmt: skip
    teacher.eval()
    loader = training_loader(
        data, images, batch_size=batch_size, augment=augment, seed=seed, purpose="knowledge",
        device=device, threads=threads, shuffle=False, sight=sight_of(teacher),
    )  # fmt: skip
    about = {
        "teacher_hash": teacher_hash, "classes": list(data.classes),
        "view": view_description(loader),
    }  # fmt: skip
    dtype = "float32" if len(data.classes) <= FULL_PRECISION_CLASSES else "float16"
    total = views * len(loader)
    with _writable(Path(folder), about, dtype=dtype, samples=len(images)) as store:
        order = loader.loader.order
        keys = [str(key) for key in images.keys]

        def all_batches() -> Any:
            for view in range(views):
                if not store.missing(keys, view):
                    continue
                order.set_epoch(view)  # views are numbered like epochs
                yield from loader

        for batch in progress(all_batches(), total=total, label="teacher's outputs"):
            wanted = [keys[n] for n in batch.indices.tolist()]
            if store.missing(wanted, batch.view_id):
                with precision.autocast():
                    logits = teacher(batch.images)
                store.put(wanted, batch.view_id, logits.float().cpu().numpy())


def _writable(folder: Path, about: dict[str, Any], *, dtype: str, samples: int) -> KnowledgeStore:
    """The store to go on with; a stale one is thrown away first."""
    options = {**about, "dtype": dtype, "num_samples": samples}
    try:
        return KnowledgeStore.create(folder, **options)
    except KnowledgeError:
        if not (folder / "store.json").is_file():
            raise
        shutil.rmtree(folder)
        return KnowledgeStore.create(folder, **options)
