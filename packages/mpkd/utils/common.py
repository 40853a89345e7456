"""Checkpoints of this project, and the accuracy of a network on a set of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpkd.model.networks import OWN, SMALL_STEM, build_net, sight_of
from mpkd.quant.layers import (
    FLOAT,
    fold_batch_norms,
    quant_layers,
    quantize_net,
    weight_levels,
)
from mpkd.quant.shipped import packed_arrays, unpack_into
from shared_core import checkpoints
from shared_core.checkpoints import CheckpointError
from shared_core.for_torch.checkpoints import fit_into, load_checkpoint, save_checkpoint
from shared_core.for_torch.data import TorchLoader
from shared_core.for_torch.distributed import World, gather_samples
from shared_core.for_torch.precision import Precision
from shared_core.runs import UsageError
from shared_core.weights.finding import NONE, TRAINED

PROJECT = "mpkd"
TEACHER_FACTOR = 4
TEACHER_SIDE = 128  # pixels, of small images for a teacher that starts from trained weights
ALONE = World(0, 1, 0, torch.device("cpu"))


@dataclass(frozen=True)
class Evaluation:
    """A network's answers to a set of images.

    Attributes:
        logits: float32 ``(N, C)``, in the set's order.
        labels: int64 ``(N,)``.
    """

    logits: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """Top-1, in ``[0, 1]``."""
        return float((self.logits.argmax(axis=1) == self.labels).mean())

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        logits = torch.from_numpy(self.logits)
        return float(F.cross_entropy(logits, torch.from_numpy(self.labels)))

    def agreement(self, other: npt.NDArray[np.float32]) -> float:
        """Share of the images on which the largest of ``other``'s logits is the same class."""
        return float((self.logits.argmax(axis=1) == other.argmax(axis=1)).mean())


@torch.no_grad()
def evaluate(
    net: nn.Module,
    loader: TorchLoader,
    *,
    precision: Precision | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Answers in evaluation mode; the network's mode is put back.

    Args:
        loader: every image once, in order; process r of W has images r, r + W, ...
        precision: None computes in fp32.
    """
    training = net.training
    net.eval()
    precision = precision or Precision(loader.normalizer.device, "fp32")
    logits, labels, indices = [], [], []
    for batch in loader:
        with precision.autocast():
            answer = net(batch.images)
        logits.append(answer.float())
        labels.append(batch.labels)
        indices.append(batch.indices)
    net.train(training)
    all_logits, all_labels = torch.cat(logits), torch.cat(labels)
    if world.world_size > 1:
        rows = torch.cat(indices).to(all_logits.device)
        count = len(loader.loader.image_set)
        all_logits = gather_samples(all_logits, rows, world, total=count)
        all_labels = gather_samples(all_labels, rows, world, total=count)
    return Evaluation(all_logits.cpu().numpy(), all_labels.cpu().numpy())


# -- networks and their files ---------------------------------------------------------------------


def starts_trained(config: Mapping[str, Any], role: str) -> bool:
    """Whether the ``teacher`` or ``student`` of a configuration starts from weights."""
    init, name = config[f"model.{role}_ckpt"], config[f"model.{role}_model"]
    if role == "teacher" and config["distillation.mode"] == "apprentice_a":
        return False
    return init not in ("", NONE) and (init, name) != (TRAINED, OWN)


def describe_net(
    role: str, config: Mapping[str, Any], *, image_size: int, whole: bool = False
) -> dict[str, Any]:
    """What rebuilds the ``teacher`` or the ``student`` of a configuration: plain JSON.

    A teacher called ``simple_cnn`` is the student made ``TEACHER_FACTOR`` times as wide: for small
    images on which a ResNet would only cost time. A teacher that starts from trained weights sees
    small images enlarged to ``TEACHER_SIDE`` (one from a file as they are), where
    ``model.teacher_size`` does not say another.

    Args:
        image_size: of the run's images, pixels.
        whole: they are enlarged as they are.

    Raises:
        UsageError: a teacher that is to see fewer pixels than its student.
    """
    name, trained = config[f"model.{role}_model"], starts_trained(config, role)
    factor, side = (TEACHER_FACTOR if role == "teacher" else 1), image_size
    if role == "teacher":
        imagenet = trained and not Path(config["model.teacher_ckpt"]).is_file()
        usual = TEACHER_SIDE if imagenet and image_size <= SMALL_STEM else image_size
        side = config["model.teacher_size"] or usual
        if side < image_size:
            raise UsageError(
                f"model.teacher_size is {side}, expected the student's {image_size} or more"
            )
    widths = [factor * width for width in config["model.student_widths"]]
    stem = "standard" if trained and config["model.stem"] == "auto" else config["model.stem"]
    enlarged = side != image_size
    return {
        "role": role, "name": name, "image_size": side, "side": side if enlarged else 0,
        "whole": whole or enlarged, "stem": stem,
        "options": {"widths": widths} if name == OWN else {},
    }  # fmt: skip


def describe_quantization(net: nn.Module) -> dict[str, Any] | None:
    """What rebuilds the quantized layers of ``net``; None when it has none."""
    layers = quant_layers(net)
    if not layers:
        return None
    norms = nn.modules.batchnorm._BatchNorm
    weights = [q.weight_quantizer for q in layers.values() if q.weight_quantizer is not None]
    return {
        "folded": not any(isinstance(module, norms) for module in net.modules()),
        "symmetric": all(one.symmetric for one in weights),
        "w_bits": {name: layer.w_bits for name, layer in layers.items()},
        "a_bits": {name: layer.a_bits for name, layer in layers.items()},
        "w_levels": weight_levels(net),
    }


def rebuild_quantized(net: nn.Module, about: Mapping[str, Any]) -> nn.Module:
    """``net`` with the layers that :func:`describe_quantization` describes, ranges not yet set."""
    if about["folded"]:
        net = fold_batch_norms(net)
    w_bits = {name: int(bits) for name, bits in about["w_bits"].items()}
    a_bits = {name: int(bits) for name, bits in about["a_bits"].items()}
    bits = {n: a for n, a in a_bits.items() if a != FLOAT}
    return quantize_net(net, w_bits, bits, symmetric=about["symmetric"], method="minmax")


def save_net(
    path: str | Path,
    weights: Mapping[str, Tensor],
    about: Mapping[str, Any],
    *,
    classes: tuple[str, ...],
    split_hash: str,
    epoch: int,
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    quantization: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write weights with everything that is needed to use them alone. Returns the facts."""
    size = about["image_size"]
    with torch.device("meta"):
        sight = sight_of(build_net(about, num_classes=len(classes)))
    facts = checkpoints.make_facts(
        project=PROJECT, architecture=about["name"], class_names=classes, framework="torch",
        input_size=(3, size, size), mean=sight.mean, std=sight.std, epoch=epoch, metrics=metrics,
        split_hash=split_hash, config=config, net=dict(about),
        quantization=None if quantization is None else dict(quantization),
    )  # fmt: skip
    return save_checkpoint(path, weights, facts)


def save_packed(path: str | Path, net: nn.Module, facts: Mapping[str, Any]) -> int:
    """Write a shipped network with its weights packed to their bits; the file's size in bytes.

    Args:
        facts: of the student that it was made from; the run's configuration is left out.
    """
    arrays = packed_arrays(net)
    kept = {
        **facts, "framework": "numpy", "config": {}, "metrics": {}, "packed": True,
        "quantization": describe_quantization(net),
    }  # fmt: skip
    checkpoints.neutral.write(path, arrays, kept)
    return Path(path).stat().st_size


def load_net(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a file of this project, in evaluation mode, and the file's facts.

    Raises:
        FileNotFoundError: nothing is there.
        CheckpointError, ValueError: of another project, damaged, or it does not fit.
    """
    weights, facts = load_checkpoint(path, project=PROJECT)
    net = build_net(facts["net"], num_classes=len(facts["class_names"]))
    if facts.get("quantization"):
        net = rebuild_quantized(net, facts["quantization"])
    if not facts.get("packed"):
        # Earlier versions wrote a flag that never was set.
        kept = {k: v for k, v in weights.items() if not k.endswith("input_quantizer.signed")}
        fit_into(net, kept, path=path)
        return net.eval(), facts
    try:
        unpack_into(net, weights)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: its packed weights do not fit: {reason}") from error
    return net.eval(), facts
