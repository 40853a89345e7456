"""Accuracy of several networks on one part of a data folder, for the prune command."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared_core.for_torch.distributed import World
from torch_cls_zoo.dataloader.folders import check_classes, open_data, part
from torch_cls_zoo.dataloader.loaders import InputSettings, eval_loader


def accuracies(
    models: Sequence[nn.Module],
    args: argparse.Namespace,
    facts: dict[str, Any],
    size: tuple[int, int],
) -> list[float]:
    """Top-1 accuracy of each, fractions in [0, 1], on ``--part`` of ``--data``.

    The data are split as ``main.py`` does with the same ``--seed``.

    Raises:
        FileNotFoundError, DatasetError, ValueError: no data, or other classes than the network's.
    """
    world = World(0, 1, 0, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        data = open_data(
            args.data,
            Path(scratch),
            num_classes=len(facts["class_names"]),
            seed=args.seed,
            image_side=min(size),
        )
        check_classes(data.classes, facts["class_names"], str(args.resume))
        chosen = part(data, args.part)
        mean, std = facts.get("mean"), facts.get("std")
        settings = InputSettings(size, tuple(mean), tuple(std)) if mean else InputSettings(size)
        loader = eval_loader(
            chosen.images, settings, batch_size=args.batch_size, world=world, threads=1
        )
        right = [0 for _model in models]
        total = 0
        with torch.no_grad():
            for batch in loader:
                total += len(batch.labels)
                for number, model in enumerate(models):
                    found = model.eval()(batch.images).argmax(1)
                    right[number] += int((found == batch.labels).sum())
    if not total:
        raise ValueError(f"--data {args.data}: no image of {args.part} can be read")
    return [count / total for count in right]
