"""The linear probe from which a head starts, fitted on what the head sees of the images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared_core.for_torch.features import head_inputs
from shared_core.for_torch.networks import head_names
from shared_core.metrics.probe import fit_probe
from shared_core.runs import UsageError
from shared_core.runs.progress import progress
from torch_cls_zoo.applications.session import Session
from torch_cls_zoo.dataloader.folders import part
from torch_cls_zoo.dataloader.loaders import eval_loader


def start_head(session: Session) -> None:
    """Put a linear classifier into the head: fitted on train, its strength chosen on val.

    Raises:
        UsageError: a head that is no single linear layer.
    """
    classes = len(session.classes)
    head = session.model.get_submodule(head_names(session.model, classes)[0])
    if not isinstance(head, nn.Linear):
        raise UsageError(f"--probe: the head of {session.arch} is no linear layer: say --no-probe")

    def fit() -> tuple[NDArray[np.float32], NDArray[np.float32], str]:
        features, labels = features_of(session, "train")
        validation = features_of(session, "val")
        probe = fit_probe(features, labels, num_classes=classes, validation=validation)
        right = probe.accuracy(*validation)
        said = f"the head starts from a linear probe, val {right:.4f}, strength {probe.strength}"
        return probe.weight, probe.bias, said

    weight, bias, said = session.only_main(fit)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        if head.bias is not None:
            head.bias.copy_(torch.from_numpy(bias).clamp(min=-10))  # a class without images
    session.say(said)


def features_of(session: Session, name: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """What the head sees of a part's images as evaluation shows them: ``(N, D)``, and labels."""
    loader = eval_loader(
        part(session.data, name).images,
        session.settings,
        batch_size=session.batch_size,
        world=replace(session.world, rank=0, world_size=1),
        threads=session.config.data.workers,
    )
    model, was_training = session.model, session.model.training
    model.eval()
    found, labels = [], []
    for batch in progress(loader, total=len(loader), label=f"features, {name} images"):
        seen = head_inputs(model, batch.images, num_classes=len(session.classes))
        found.append(seen.float().cpu().numpy())
        labels.append(batch.labels.cpu().numpy())
    model.train(was_training)
    return np.concatenate(found), np.concatenate(labels)
