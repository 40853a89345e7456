"""From chosen bits to a quantized network: calibrate only, reconstruct, or train on.

Three ways, by name. ``ptq`` needs images, ``brecq`` images and time, ``qat`` something that trains.
A search and the uniform bits it is compared with go through the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mpkd.quant.brecq import Reconstruction, learn_input_scales, reconstruct
from mpkd.quant.budget import BitPlan
from mpkd.quant.companion import BinPull, Companion
from mpkd.quant.layers import BATCH, FLOAT, quantize_trained
from mpkd.quant.settings import FINISHES, QuantSettings
from mpkd.quant.shipped import plain

BRECQ_RATE, BRECQ_STRENGTH, BRECQ_STEPS = 1e-3, 0.01, 20_000  # as published


def silent(_text: str) -> None:
    """Says nothing."""


class Learn(Protocol):
    """What trains a network in place by the run's objective, and goes on after a kill."""

    def __call__(
        self, name: str, net: nn.Module, *, epochs: int, companion: Companion | None = None
    ) -> None:
        """Train ``net``; ``name`` tells this training from others of the same run."""
        ...


@dataclass(frozen=True)
class Material:
    """What the stage works with, the same for every plan.

    Attributes:
        calibration: normalised images ``(N, 3, S, S)`` on the student's device.
        evaluate: a network's accuracy in ``[0, 1]`` on the images that choose.
        learn: trains; None where nothing can be trained.
        latencies: seconds by layer and bits for these candidates, where they can be measured.
        cache: a JSON file of the accuracies that a search measured; None keeps nothing.
        log: says a line.
    """

    calibration: Tensor
    evaluate: Callable[[nn.Module], float]
    learn: Learn | None = None
    latencies: Callable[[Sequence[int]], Mapping[str, Mapping[int, float]]] | None = None
    cache: Path | None = None
    log: Callable[[str], None] = silent

    def trainer(self) -> Learn:
        """``learn``.

        Raises:
            ValueError: there is none.
        """
        if self.learn is None:
            raise ValueError("no training images, expected some: this way of quantizing trains")
        return self.learn


def finish(
    net: nn.Module,
    plan: BitPlan,
    how: str,
    material: Material,
    settings: QuantSettings,
    *,
    name: str,
    more_epochs: int = 0,
) -> nn.Module:
    """A quantized copy of ``net`` with the plan's bits, in evaluation mode.

    Args:
        net: trained, plain.
        how: one of ``FINISHES``.
        name: of the training and in the log.
        more_epochs: a training that goes on for so many longer.

    Raises:
        ValueError: an unknown way, or ``qat`` where nothing trains.
    """
    if how not in FINISHES:
        raise ValueError(f"finish {how!r}: expected one of {', '.join(FINISHES)}")
    options: dict[str, Any] = {"calibration": material.calibration, "method": settings.ranges}
    if how == "brecq":
        made = quantize_trained(net, plan.w, plan.a, symmetric=False, **options)
        _reconstruct(made, plan, material, settings, name)
        return made.eval()
    if how == "ptq":
        return quantize_trained(net, plan.w, plan.a, symmetric=settings.symmetric, **options)
    learn = material.trainer()
    made = quantize_trained(
        net, plan.w, plan.a, symmetric=settings.symmetric, learned=settings.learned, fold=False,
        **options,
    )  # fmt: skip
    pulls = settings.method == "sdq" and any(bits != FLOAT for bits in plan.w.values())
    pull = BinPull(settings.bin_strength) if pulls else None
    learn(name, made, epochs=settings.epochs + more_epochs, companion=pull)
    return made.eval()


def _reconstruct(
    net: nn.Module, plan: BitPlan, material: Material, settings: QuantSettings, name: str
) -> None:
    """Learn rounding, then the inputs' scales.

    Fewer steps than the published ones go with a higher rate and a stronger regulariser: weights
    that it leaves undecided are rounded anyhow.
    """
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    original, generator = plain(net), torch.Generator().manual_seed(settings.seed)
    batches, steps = material.calibration.split(BATCH), settings.brecq_steps
    fewer = max(1.0, BRECQ_STEPS / steps)

    def report(found: Reconstruction) -> None:
        material.log(f"{name}: {found.name}: error {found.before:.3g} -> {found.after:.3g}")

    reconstruct(
        net, original, batches, steps=steps, generator=generator, report=report,
        learning_rate=settings.brecq_learning_rate or min(0.1, BRECQ_RATE * fewer),
        strength=min(0.1, BRECQ_STRENGTH * fewer),
    )  # fmt: skip
    if any(bits != FLOAT for bits in plan.a.values()):
        learn_input_scales(net, original, batches, steps=max(1, steps // 4), generator=generator)
