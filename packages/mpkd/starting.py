"""What a network starts from: nothing, a file, trained weights; its head from a linear probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mpkd.analysis.verdicts import PLAIN_FLOOR
from mpkd.dataset.data_utils import CALIBRATION, TEST, TRAIN, evaluation_loader
from mpkd.model.networks import OWN, build_net, sight_of
from mpkd.run_context import Run
from mpkd.utils.common import PROJECT, describe_net, load_net, starts_trained
from shared_core.checkpoints import CheckpointError
from shared_core.datasets import ImageSet
from shared_core.for_torch.checkpoints import Weights, from_numpy, load_checkpoint
from shared_core.for_torch.features import head_inputs
from shared_core.for_torch.networks import find_network, head_keys, head_names
from shared_core.for_torch.pretrained import library_weights, load_body
from shared_core.metrics.floor import plain_features
from shared_core.metrics.intervals import wilson_interval
from shared_core.metrics.probe import LinearProbe, fit_probe
from shared_core.metrics.trained_floor import TrainedFloor
from shared_core.runs import UsageError, progress
from shared_core.weights.finding import TRAINED, find_weights
from shared_core.weights.reading import read_weights

LARGEST = 20_000  # training images for which floors and probes are measured


@dataclass(frozen=True)
class Started:
    """A network before its training.

    Attributes:
        net: on the run's device.
        about: what rebuilds it.
        source: where its weights are from, for the record; empty: random.
        new_head: its head is random.
        ours: a file of this project with the same classes.
    """

    net: nn.Module
    about: dict[str, Any]
    source: dict[str, Any] = field(default_factory=dict)
    new_head: bool = True
    ours: bool = False


def start_net(run: Run, role: str) -> Started:
    """The ``teacher`` or ``student`` with the weights that ``model.<role>_ckpt`` means.

    Raises:
        UsageError, ValueError: no such weights, or weights of another network.
    """
    config, count = run.config, len(run.data.classes)
    init = config[f"model.{role}_ckpt"]
    about = describe_net(role, config, image_size=run.data.image_size, whole=run.data.whole)
    if not starts_trained(config, role):
        if init == TRAINED and about["name"] == OWN:
            run.log.say(f"{role}: no trained weights of {OWN} exist, so it starts from nothing")
        return Started(build_net(about, num_classes=count).to(run.device), about)
    if Path(init).is_file():
        own = _own_file(run, role, init, about)
        if own is not None:
            return own
    weights, source = trained_weights(about, init)
    if config["model.stem"] == "auto" and "conv1.weight" in weights:
        about["stem"] = "small" if weights["conv1.weight"].shape[-1] == 3 else "standard"
    net = build_net(about, num_classes=count)
    own_weights, side = net.state_dict(), int(about["image_size"])
    keys = head_keys(head_names(net, count), list(own_weights))
    new_head = any(k not in weights or weights[k].shape != own_weights[k].shape for k in keys)
    notes = load_body(net, weights, origin=init, num_classes=count, image_size=(side, side))
    for note in [f"starts from {source['name']}", *notes]:
        run.log.say(f"{role}: {note}")
    return Started(net.to(run.device), about, source, new_head)


def trained_weights(about: Mapping[str, Any], init: str) -> tuple[Weights, dict[str, Any]]:
    """Weights for the network of ``about``, and where they are from.

    Raises:
        UsageError, CheckpointError: see :func:`shared_core.weights.finding.find_weights`.
    """
    found = None if about["name"] == OWN else find_network(about["name"])
    core = found is not None and found.library == "core"
    file = find_weights(init, architecture=found.name if found is not None and core else "")
    if file is not None or found is None:
        if file is None:
            raise UsageError(f"no trained weights of {about['name']} exist: expected none")
        return from_numpy(read_weights(file.path)), dict(file.facts())
    side = int(about["image_size"])
    weights, word = library_weights(found, (side, side))
    return weights, {"name": word, "licence": "as the library says"}


def _own_file(run: Run, role: str, path: str, about: dict[str, Any]) -> Started | None:
    """A checkpoint of this project; None for any other file."""
    try:
        facts = load_checkpoint(path)[1]
    except CheckpointError as error:
        if "no facts" in str(error) or "schema" in str(error):
            return None
        raise
    if facts["project"] != PROJECT:
        return None
    same = tuple(facts["class_names"]) == run.data.classes
    if facts["net"]["name"] != about["name"] or not same:
        raise UsageError(
            f"model.{role}_ckpt {path}: a {facts['net']['name']} of {len(facts['class_names'])} "
            f"classes, expected {about['name']} of this data's {len(run.data.classes)}"
        )
    if facts.get("quantization"):
        raise UsageError(f"model.{role}_ckpt {path}: it has few bits, expected a plain network")
    net, facts = load_net(path)
    seen, asked = int(facts["net"]["image_size"]), run.config["model.teacher_size"]
    if role == "teacher" and seen > run.data.image_size and not asked:  # as it was trained
        about |= {"image_size": seen, "side": seen, "whole": True}
    sides = {name: about[name] for name in ("role", "image_size", "side", "whole")}
    net.sight = replace(sight_of(net), side=about["side"])  # type: ignore[assignment]
    source = {"name": Path(path).name, "sha256": facts["sha256"]}
    about = {**facts["net"], **sides}
    return Started(net.to(run.device), about, source, new_head=False, ours=True)


# -- probes and floors ----------------------------------------------------------------------------


def features_of(run: Run, net: nn.Module, images: ImageSet, what: str) -> npt.NDArray[np.float32]:
    """What the head sees of images as evaluation shows them: ``(N, D)``."""
    loader = evaluation_loader(
        run.data, images, batch_size=64, device=run.device, threads=run.config["dataset.workers"],
        sight=sight_of(net),
    )  # fmt: skip
    precision, training = run.precision(net), net.training
    net.eval()
    found = []
    for batch in progress(loader, total=len(loader), label=f"features, {what} images"):
        with precision.autocast():
            seen = head_inputs(net, batch.images, num_classes=len(run.data.classes))
        found.append(seen.float().cpu().numpy())
    net.train(training)
    return np.concatenate(found)


def start_head(
    run: Run, started: Started, role: str, *, labels: npt.NDArray[np.int64] | None = None
) -> dict[str, Any]:
    """Put a linear classifier of the network's own features into its new head.

    It is fitted on the training images, its strength chosen on the calibration images.

    Args:
        labels: of the training images, where a teacher says them; the true ones of the
            calibration images are not read then.

    Returns:
        What the classifier is worth on the test images (which chose nothing), for the record; with
        labels of a teacher, or where there is nothing to do, nothing.
    """
    data, net = run.data, started.net
    heads = head_names(net, len(data.classes))
    head = net.get_submodule(heads[0])
    wanted = run.config["finetune.probe"] and started.source and started.new_head
    if not wanted or len(heads) > 1 or not isinstance(head, nn.Linear):
        return {}
    if len(data.sets[TRAIN]) > LARGEST:
        run.log.say(f"{role}: no probe of more than {LARGEST:,} images, the head starts anew")
        return {}

    def fit() -> tuple[LinearProbe, dict[str, Any]]:
        train, other = data.sets[TRAIN], data.sets[CALIBRATION]
        seen = features_of(run, net, train, "training")
        chosen = None
        if labels is None:
            chosen = (features_of(run, net, other, "calibration"), other.labels)
        truth = train.labels if labels is None else labels
        probe = fit_probe(seen, truth, num_classes=len(data.classes), validation=chosen)
        if labels is not None:
            return probe, {}
        test = data.sets[TEST]
        right = probe.accuracy(features_of(run, net, test, "test"), test.labels)
        return probe, _floor(right, len(test), started.about, probe)

    probe, floor = run.from_main(fit)
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(probe.weight))
        if head.bias is not None:  # a class without images has a bias of -1e4
            head.bias.copy_(torch.from_numpy(probe.bias).clamp(min=-10))
    said = "what the teacher says" if labels is not None else "labels"
    run.log.say(f"{role}: the head starts from a linear probe of {said}")
    return floor


def _floor(
    right: float, count: int, about: Mapping[str, Any], probe: LinearProbe
) -> dict[str, Any]:
    low, high = wilson_interval(round(right * count), count)
    name, side = str(about["name"]), int(about["image_size"])
    return asdict(TrainedFloor(right, low, high, count, name, side, probe.strength))


def plain_floor(run: Run) -> dict[str, Any]:
    """What plain features and a line reach on the test images; empty for too many images."""
    if len(run.data.sets[TRAIN]) > LARGEST:
        return {}

    def seen(part: str) -> npt.NDArray[np.float32]:
        loader = run.evaluation_loader(part, shared=False).loader
        return np.stack([plain_features(image) for batch in loader for image in batch.images])

    train, other, test = (run.data.sets[part] for part in (TRAIN, CALIBRATION, TEST))
    probe = fit_probe(
        seen(TRAIN), train.labels, num_classes=len(run.data.classes),
        validation=(seen(CALIBRATION), other.labels),
    )  # fmt: skip
    right = probe.accuracy(seen(TEST), test.labels)
    return _floor(right, len(test), {"name": PLAIN_FLOOR, "image_size": run.data.image_size}, probe)
