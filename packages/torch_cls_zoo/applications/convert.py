"""``--export`` and ``--jit``: the network for use elsewhere, each file checked on the test part.

``model/`` is the model folder that every command of the repository opens. With ``--jit``,
``checkpoints/`` also gets TorchScript, ONNX and torch.export files that take normalised images and
give logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from shared_core.deploy.check import Agreement, compare_answers
from shared_core.deploy.facts import ModelFacts
from shared_core.deploy.predictor import NetworkPredictor, Predictor, logits_to_run, open_model
from shared_core.deploy.staging import check_export_folder
from shared_core.deploy.write import Calibration, Int8Wish, write_model_folder
from shared_core.for_torch.checkpoints import unwrap, weights_sha256
from shared_core.for_torch.distributed import World
from torch_cls_zoo.applications.export_files import export_all
from torch_cls_zoo.applications.model_facts import model_facts
from torch_cls_zoo.applications.openers import OPENERS
from torch_cls_zoo.applications.session import Session
from torch_cls_zoo.dataloader.folders import part
from torch_cls_zoo.dataloader.loaders import eval_loader
from torch_cls_zoo.models.summary import summarize

FOLDER = "model"
BATCH = 16
MOST_CALIBRATION = 512  # images
Views = Iterator[tuple[np.ndarray, np.ndarray]]  # uint8 (N, H, W, 3), labels (N,)


def convert(session: Session) -> dict[str, dict[str, Any]]:
    """Write the files.

    Returns:
        By format of ``--jit`` the file, its size, and how far its answers lie from the network's.

    Raises:
        ExportError: a file does not answer as the network.
        UsageError: the model folder holds something else.
    """

    def write() -> dict[str, dict[str, Any]]:
        check_export_folder(session.output / FOLDER)
        plain = unwrap(session.model)
        place = next(plain.parameters()).device
        plain.to("cpu").eval()
        try:
            return _written(session, plain)
        finally:
            plain.to(place)

    return session.only_main(write)


def _written(session: Session, model: nn.Module) -> dict[str, dict[str, Any]]:
    facts, arch = facts_of_session(session, model), session.arch.replace("/", "_")
    network, files = predictor_of(model, facts), {}
    with TemporaryDirectory() as scratch:
        if "jit" in session.config.run.modes:
            folder = session.output / "checkpoints"
            files = export_all(model, folder, arch=arch, facts=facts)
            _check_files(session, files, folder, network)
            source = folder / files["onnx"]["file"]
        else:
            made = export_all(model, scratch, arch=arch, facts=facts, formats=("onnx",))
            source = Path(scratch, made["onnx"]["file"])
        written = write_model_folder(
            session.output / FOLDER,
            facts=facts,
            network=network,
            sources=[source],
            test=views(session, "test"),
            calibration=calibration_of(session),
            int8=Int8Wish(session.config.run.int8, session.config.run.max_accuracy_loss),
        )
    for line in written.lines:
        session.say(line)
    return files


def _check_files(
    session: Session, files: dict[str, dict[str, Any]], folder: Path, network: NetworkPredictor
) -> None:
    """Ask each file all test images; what they say of it is added to ``files``."""
    facts = network.facts
    for name, about in files.items():
        opened = _opened(folder / about["file"], facts)
        agreement = agreement_of(network, opened, views(session, "test"))
        agreement.check(name=about["file"])
        about.update(agreement.as_dict())
        session.say(
            f"{name}: {about['file']}, {about['bytes']:,} bytes, differs by at most "
            f"{about['max_abs']:.1e}; the same class for {about['same_class']:.2%} of "
            f"{about['images']} test images"
        )


def _opened(path: Path, facts: ModelFacts) -> Predictor:
    """A file that was written here, to be asked."""
    if path.suffix == ".pt2":  # one of somebody else's might run code
        return predictor_of(torch.export.load(str(path)).module(), facts)
    return open_model(path, openers=OPENERS)


def facts_of_session(session: Session, model: nn.Module) -> ModelFacts:
    """What the network is, where it comes from and what it costs."""
    summary, values = summarize(model, session.settings.size), session.config.values
    config = session.facts.get("config") or values
    start = session.start or session.facts.get("started_from") or {"name": "none"}
    return model_facts(
        arch=session.arch,
        class_names=session.classes,
        image_size=session.settings.size,
        mean=session.settings.mean,
        std=session.settings.std,
        family=session.family,
        costs={"macs": summary.macs, "parameters": summary.params},
        provenance={
            "data": session.data.name,
            "images": len(session.data.manifest.entries),
            "split_hash": session.data.manifest.hash,
            "initial_weights": start,
            "learned_from": "knowledge files" if config.get("distill") else "labels",
            "checkpoint": str(session.config.network.resume or "this training's best"),
            "weights_sha256": weights_sha256(model.state_dict()),
            "command": session.config.run.command,
        },
    )


def predictor_of(model: nn.Module, facts: ModelFacts) -> NetworkPredictor:
    """The network itself, asked as its files are."""

    def network(batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            answer: np.ndarray = model(torch.from_numpy(batch)).numpy()
        return answer

    run = logits_to_run(facts, network)
    return NetworkPredictor(facts, run, runtime="torch", name=facts.architecture)


def views(session: Session, split: str) -> Views:
    """The views of a part, in order, as bytes with their labels."""
    loader = eval_loader(
        part(session.data, split).images,
        session.settings,
        batch_size=BATCH,
        world=World(0, 1, 0, torch.device("cpu")),  # the main process has them all
        threads=session.config.data.workers,
    )
    for batch in loader.loader:
        yield batch.images, batch.labels


def calibration_of(session: Session) -> Calibration:
    """Images of the validation part, mixed: they fix the ranges of int8 and judge it."""
    images, labels = (np.concatenate(rows) for rows in zip(*views(session, "val"), strict=True))
    chosen = np.random.default_rng(0).permutation(len(images))[:MOST_CALIBRATION]
    return Calibration(images[chosen], labels[chosen])


def agreement_of(network: Predictor, other: Predictor, images: Views) -> Agreement:
    """How the answers of two agree over all images."""
    found = Agreement()
    for batch, _labels in images:
        truth, got = network.probabilities(batch), other.probabilities(batch)
        found += compare_answers(truth, got, name=other.name)
    return found
