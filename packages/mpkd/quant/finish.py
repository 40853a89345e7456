"""From chosen bits to a quantized network: calibrate only, reconstruct, or train on.

Three ways, by name. ``ptq`` needs images, ``brecq`` images and time, ``qat`` batches to train on.
A search and the uniform bits it is compared with go through the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpkd.quant.brecq import Reconstruction, learn_input_scales, reconstruct
from mpkd.quant.budget import BitPlan
from mpkd.quant.layers import FLOAT
from mpkd.quant.ptq import BATCH, quantize_trained
from mpkd.quant.qat import Batches, QatLoss, QatRun, Saved, train
from mpkd.quant.search.bin_regulariser import bin_regulariser

BRECQ_RATE, BRECQ_STRENGTH, BRECQ_STEPS = 1e-3, 0.01, 20_000  # as published
FINISHES = ("ptq", "brecq", "qat")
StateFactory = Callable[[str, Mapping[str, Any]], Saved]


def silent(_text: str) -> None:
    """Says nothing."""


@dataclass
class Material:
    """What finishing needs, the same for every plan.

    Attributes:
        calibration: normalised images ``(N, 3, H, W)``.
        batches: training batches by epoch; None where nothing is trained.
        steps_an_epoch: batches in an epoch.
        teacher: images to logits.
        state: makes the place where a training keeps its state, by its name; None keeps nothing.
        log: says a line.
        kept: the states of this run, removed by :meth:`clear` when all is done.
    """

    calibration: Tensor
    batches: Batches | None = None
    steps_an_epoch: int = 0
    teacher: nn.Module | None = None
    state: StateFactory | None = None
    log: Callable[[str], None] = silent
    kept: list[Saved] = field(default_factory=list)

    def saved(self, name: str, run: Any) -> Saved | None:
        """Where ``run`` keeps its state."""
        if self.state is None:
            return None
        self.kept.append(self.state(name, {"run": run}))
        return self.kept[-1]

    def clear(self) -> None:
        """Everything is finished: no state is needed any more."""
        for saved in self.kept:
            saved.remove()
        self.kept.clear()


@dataclass(frozen=True)
class FinishOptions:
    """How to finish.

    Attributes:
        epochs, learning_rate, weight_decay: of the training.
        loss: what it minimises.
        bins: strength of the bin regulariser; 0 = none.
        brecq_steps, brecq_rate: of the reconstruction, a block. A rate of 0 is ``20 / steps``, at
            most 0.1: the paper's 1e-3 at its 20,000 steps, and as far a way in fewer. The
            regulariser grows alike: weights that it leaves undecided are rounded anyhow.
        seed: of the reconstruction's choice of images.
        symmetric: of the weights' grids in ``ptq``.
        ranges: how ranges are found, ``mse`` or ``minmax``.
        learned: ``qat`` learns scales and offsets too, else they stay as they were found.
    """

    epochs: int
    learning_rate: float
    loss: QatLoss
    weight_decay: float = 0.0
    bins: float = 0.0
    brecq_steps: int = 2000
    brecq_rate: float = 0.0
    seed: int = 0
    symmetric: bool = True
    ranges: str = "mse"
    learned: bool = True


def finish(
    net: nn.Module,
    plan: BitPlan,
    how: str,
    material: Material,
    options: FinishOptions,
    *,
    name: str,
) -> nn.Module:
    """A quantized copy of ``net`` with the plan's bits, in evaluation mode.

    Args:
        net: trained, plain.
        how: one of ``FINISHES``.
        name: of the state and in the log.

    Raises:
        ValueError: an unknown way, or ``qat`` without batches.
    """
    if how not in FINISHES:
        raise ValueError(f"finish {how!r}: expected one of {', '.join(FINISHES)}")
    if how == "ptq":
        return quantize_trained(
            net, plan.w, plan.a, calibration=material.calibration,
            symmetric=options.symmetric, method=options.ranges,
        )  # fmt: skip
    if how == "brecq":
        return _reconstructed(net, plan, material, options, name)
    return _trained(net, plan, material, options, name)


def _reconstructed(
    net: nn.Module, plan: BitPlan, material: Material, options: FinishOptions, name: str
) -> nn.Module:
    quantized = quantize_trained(
        net, plan.w, plan.a, calibration=material.calibration, symmetric=False,
        method=options.ranges,
    )  # fmt: skip
    for parameter in quantized.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(options.seed)
    batches = material.calibration.split(BATCH)

    def report(found: Reconstruction) -> None:
        material.log(f"{name}: block {found.name}: error {found.before:.3g} -> {found.after:.3g}")

    fewer = max(1.0, BRECQ_STEPS / options.brecq_steps)
    rate = options.brecq_rate or min(0.1, BRECQ_RATE * fewer)
    reconstruct(
        quantized, batches, steps=options.brecq_steps, learning_rate=rate,
        strength=min(0.1, BRECQ_STRENGTH * fewer), generator=generator, report=report,
    )  # fmt: skip
    if any(bits != FLOAT for bits in plan.a.values()):
        learn_input_scales(
            quantized, batches, steps=max(1, options.brecq_steps // 4), generator=generator
        )
    return quantized.eval()


def _trained(
    net: nn.Module, plan: BitPlan, material: Material, options: FinishOptions, name: str
) -> nn.Module:
    if material.batches is None:
        raise ValueError("no training batches, expected some: quantization-aware training")
    quantized = quantize_trained(
        net, plan.w, plan.a, calibration=material.calibration, learned=options.learned,
        fold=False, method=options.ranges,
    )  # fmt: skip
    for name_of, parameter in quantized.named_parameters():
        parameter.requires_grad_(options.learned or "_quantizer." not in name_of)
    if options.learned:
        _fix_unused_offsets(quantized)
    quantizes = any(bits != FLOAT for bits in plan.w.values())
    run = QatRun(
        quantized, options.loss, steps=options.epochs * material.steps_an_epoch,
        learning_rate=options.learning_rate, weight_decay=options.weight_decay,
        teacher=material.teacher,
        extra=(lambda net: bin_regulariser(net, strength=options.bins))
        if options.bins and quantizes
        else None,
    )  # fmt: skip

    def after(epoch: int, means: dict[str, float]) -> None:
        material.log(f"{name}: epoch {epoch + 1}/{options.epochs}: loss {means['loss']:.4f}")

    train(
        run, material.batches, epochs=options.epochs, steps_an_epoch=material.steps_an_epoch,
        saved=material.saved(name, run), after=after,
    )  # fmt: skip
    return run.net.eval()


def _fix_unused_offsets(net: nn.Module) -> None:
    """Offsets of grids that have none get no gradient, and need none."""
    for module in net.modules():
        if hasattr(module, "offset") and hasattr(module, "zero_point"):
            module.zero_point.requires_grad_(bool(module.offset))
