"""``--knowledge`` and ``--make_curriculum``: what a trained network says of each image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from shared_core.datasets.views.evaluation import LetterboxView
from shared_core.for_torch.checkpoints import unwrap, weights_sha256
from shared_core.knowledge import KnowledgeStore
from torch_cls_zoo.applications.session import Session
from torch_cls_zoo.applications.test import Outputs, outputs_of, plain_criterion, probabilities_of
from torch_cls_zoo.dataloader.curriculum_files import curriculum_weights, write_curriculum
from torch_cls_zoo.dataloader.folders import part
from torch_cls_zoo.dataloader.knowledge_files import write_knowledge


def knowledge_folder(session: Session) -> Path:
    """Where knowledge and curriculum files lie."""
    return session.config.teaching.knowledge_dir or session.data.root


def make_knowledge(session: Session, split: str) -> dict[str, Any]:
    """Write ``distill*.txt``, ``label.txt`` and the knowledge store of a part.

    Returns:
        What was written: paths and the number of images.

    Raises:
        ValueError: images of the part that cannot be read.
    """
    outputs = outputs_of(session, part(session.data, split))
    _all_readable(outputs)
    probabilities = probabilities_of(outputs, plain_criterion(session))
    about = _about(session, split)
    folder = knowledge_folder(session)

    def write() -> dict[str, Any]:
        soft, hard = write_knowledge(
            folder,
            outputs.paths,
            probabilities,
            outputs.labels,
            name=session.config.teaching.knowledge_name,
            about=about,
        )
        store = folder / "knowledge" / f"{split}-{about['teacher'][:12]}"
        with KnowledgeStore.create(
            store,
            teacher_hash=about["teacher"],
            classes=session.classes,
            view=LetterboxView(session.settings.size).settings(),
            kind="logits",
            dtype="float32",
        ) as file:
            # Copies of one image share a key; the store keeps the first of them.
            file.put(outputs.keys, 0, outputs.logits)
        return {"file": str(soft), "labels": str(hard), "store": str(store)}

    written = session.only_main(write)
    session.say(
        f"knowledge of {len(outputs.rows)} {split} images: {written['file']}, "
        f"{written['labels']}, {written['store']}"
    )
    return {**written, "images": len(outputs.rows)}


def make_curriculum(session: Session, split: str) -> dict[str, Any]:
    """Write ``curriculum.txt``: each image's weight by the probability of its class."""
    asked = session.config.teaching
    outputs = outputs_of(session, part(session.data, split))
    probabilities = probabilities_of(outputs, plain_criterion(session))
    own = probabilities[np.arange(len(outputs.labels)), outputs.labels]
    weights = curriculum_weights(own, asked.curriculum_thresholds, asked.curriculum_weights)
    about = {
        **_about(session, split),
        "thresholds": asked.curriculum_thresholds,
        "weights": asked.curriculum_weights,
    }
    path = session.only_main(
        lambda: write_curriculum(knowledge_folder(session), outputs.paths, weights, about=about)
    )
    counts = {f"{w:g}": int((weights == w).sum()) for w in asked.curriculum_weights}
    left_out = int(np.isnan(weights).sum())
    session.say(
        f"curriculum of {len(weights)} {split} images: "
        + ", ".join(f"{count} of weight {weight}" for weight, count in counts.items())
        + f", {left_out} left out: {path}"
    )
    return {"file": str(path), "counts": counts, "left_out": left_out}


def _about(session: Session, split: str) -> dict[str, Any]:
    """Who the teacher is."""
    return {
        "teacher": weights_sha256(unwrap(session.model).state_dict()),
        "arch": session.arch,
        "criterion": session.family,
        "image_size": list(session.settings.size),
        "classes": list(session.classes),
        "split": split,
    }


def _all_readable(outputs: Outputs) -> None:
    if outputs.unreadable:
        raise ValueError(
            f"{len(outputs.unreadable)} images of {outputs.part.name} cannot be read, the first "
            f"is {outputs.unreadable[0]}; list them by utils/check_images.py --quarantine"
        )
