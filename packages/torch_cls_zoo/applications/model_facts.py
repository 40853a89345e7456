"""What a finished network of the zoo says of itself, as the core's model facts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared_core.datasets.views.evaluation import LetterboxView
from shared_core.deploy.facts import SCHEMA, ModelError, ModelFacts, facts_from_text

PROJECT = "torch_cls_zoo"
FACTS = "facts.json"  # name of the facts inside a TorchScript or torch.export file
NEEDED = ("class_names", "input_size")


def model_facts(
    *,
    arch: str,
    class_names: Sequence[str],
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    family: str = "softmax",
    **more: Any,
) -> ModelFacts:
    """The facts of a network that the zoo trained: its letterboxed view among them.

    Args:
        image_size: height and width in pixels.
        mean, std: of the RGB channels, fractions of 255.
        family: ``softmax`` or ``bce`` (``sigmoid``): what turns logits into probabilities.
        more: further entries of :class:`ModelFacts`.

    Raises:
        ModelError: a value that makes no sense.
    """
    return ModelFacts(
        project=PROJECT,
        architecture=arch,
        class_names=tuple(class_names),
        input_size=image_size,
        view=LetterboxView(image_size).settings(),
        mean=tuple(float(value) for value in mean),  # type: ignore[arg-type]
        std=tuple(float(value) for value in std),  # type: ignore[arg-type]
        activation="sigmoid" if family in ("bce", "sigmoid") else "softmax",
        **more,
    )


def facts_of_checkpoint(facts: Mapping[str, Any], *, where: str | Path) -> ModelFacts:
    """Those of a checkpoint of this zoo, or of an exported file of its first versions.

    Raises:
        ModelError: something is missing.
    """
    if missing := [name for name in NEEDED if not facts.get(name)]:
        raise ModelError(f"{where}: does not say its {missing[0]}, expected a model of this zoo")
    config, mean, std = facts.get("config") or {}, facts.get("mean"), facts.get("std")
    if not mean or not std:
        from shared_core.for_torch.data import IMAGENET_MEAN, IMAGENET_STD

        mean, std = IMAGENET_MEAN, IMAGENET_STD
    return model_facts(
        arch=str(facts.get("architecture") or "unknown"),
        class_names=facts["class_names"],
        image_size=(int(facts["input_size"][1]), int(facts["input_size"][2])),
        mean=mean,
        std=std,
        family=str(facts.get("criterion") or config.get("criterion") or "softmax"),
    )


def facts_from_file(text: str | bytes, *, where: str | Path) -> ModelFacts:
    """What an exported file carries: the core's facts, or those of the first versions.

    Raises:
        ModelError: neither.
    """
    try:
        values = json.loads(text or "{}")
    except ValueError:
        values = {}
    if isinstance(values, dict) and values.get("schema") == SCHEMA:
        return facts_from_text(text, where=where)
    return facts_of_checkpoint(values if isinstance(values, dict) else {}, where=where)
