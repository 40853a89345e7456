"""The knobs of one training, taken from the configuration once and checked against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from shared_core.for_torch.precision import Precision, computes_bf16
from shared_core.for_torch.pretrained import parameter_groups as split_rates

SMALLEST_BF16 = 64  # pixels


@dataclass(frozen=True)
class Settings:
    """How one network is trained.

    Attributes:
        epochs: over the training images.
        batch_size: images a process computes at once.
        learning_rate: after the warm-up.
        weight_decay: of matrices and filters (AdamW).
        accumulation: batches whose gradients make one step.
        clip: largest gradient norm; 0 = no limit.
        scheduler: ``constant``, ``cosine`` or ``step``; by steps, not by epochs.
        step_size, gamma: of ``step``: epochs between, and factor.
        warmup_steps: of a straight rise from 0.
        max_steps: stop there; 0 = never.
        ema: decay of averaged weights; 0 = none.
        channels_last: memory layout of network and images.
        compile: torch.compile the network.
        log_interval: steps between lines; 0 = epochs only.
        save_seconds: least time between two states within an epoch.
        classes: outputs of a head that learns at the whole rate while the body takes its share; 0:
            all learn at one rate.
        body_rate, layer_decay: the share of the body's last layers, and the factor from one depth
            to the one below; see :func:`shared_core.for_torch.pretrained.parameter_groups`.
        warmup_share: of all steps, where ``warmup_steps`` is 0.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 1e-4
    accumulation: int = 1
    clip: float = 0.0
    scheduler: str = "cosine"
    step_size: int = 10
    gamma: float = 0.1
    warmup_steps: int = 0
    max_steps: int = 0
    ema: float = 0.0
    channels_last: bool = False
    compile: bool = False
    log_interval: int = 0
    save_seconds: float = 60.0
    classes: int = 0
    body_rate: float = 1.0
    layer_decay: float = 1.0
    warmup_share: float = 0.0

    def total_steps(self, batches: int) -> int:
        """Optimizer steps of the whole training, for ``batches`` batches an epoch."""
        steps = self.epochs * -(-batches // self.accumulation)
        return min(steps, self.max_steps) if self.max_steps else steps

    def rate(self, step: int, *, total: int, steps_per_epoch: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        warmup = self.warmup_steps or round(self.warmup_share * total)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.scheduler == "cosine":
            share = (step - warmup) / max(1, total - warmup)
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
        if self.scheduler == "step":
            return self.learning_rate * self.gamma ** (step // steps_per_epoch // self.step_size)
        return self.learning_rate


def settings_from(config: Mapping[str, Any], **changes: Any) -> Settings:
    """The student's settings; ``changes`` are those of another training (the teacher's)."""
    made = Settings(
        epochs=config["experiment.epochs"],
        batch_size=config["experiment.batch_size"],
        learning_rate=config["experiment.learning_rate"],
        weight_decay=config["experiment.weight_decay"],
        accumulation=config["training.gradient_accumulation_steps"],
        clip=config["training.clip"],
        scheduler=config["training.lr_scheduler"],
        step_size=config["training.lr_step_size"],
        gamma=config["training.lr_gamma"],
        warmup_steps=int(config["training.lr_warmup_steps"]),
        max_steps=int(config["training.max_train_steps"]),
        ema=config["training.ema"],
        channels_last=config["training.channels_last"],
        compile=config["training.compile"],
        log_interval=int(config["logging.log_interval"]),
    )
    return replace(made, **changes)


def bits_settings(config: Mapping[str, Any], *, epochs: int | None = None) -> Settings:
    """Settings of a trained network that learns on with few bits, for ``quantization.epochs``.

    It warms up for the same share of its steps as the student did.
    """
    chosen = config["quantization.epochs"] if epochs is None else epochs
    share = chosen / config["experiment.epochs"]
    return settings_from(
        config, epochs=chosen, learning_rate=config["quantization.learning_rate"],
        warmup_steps=round(min(1.0, share) * config["training.lr_warmup_steps"]),
    )  # fmt: skip


def finetuned(settings: Settings, config: Mapping[str, Any], *, classes: int) -> Settings:
    """The same for a network that starts from trained weights, by ``finetune.*``."""
    return replace(
        settings, classes=classes, body_rate=config["finetune.body_rate"],
        layer_decay=config["finetune.layer_decay"], weight_decay=config["finetune.weight_decay"],
        warmup_share=config["finetune.warmup"],
    )  # fmt: skip


def precision_from(
    config: Mapping[str, Any], device: torch.device, *, side: int = SMALLEST_BF16
) -> Precision:
    """fp32, bf16 or fp16 as ``mixed_precision.*`` says.

    ``auto`` is bf16 where the hardware computes it and images have ``side`` 64 pixels or more
    (maps of one pixel can give NaN on a processor), else fp32.
    """
    dtype = config["mixed_precision.dtype"]
    if dtype == "auto":
        dtype = "bf16" if side >= SMALLEST_BF16 and computes_bf16(device) else "fp32"
    return Precision(
        device,
        dtype,
        enabled=config["mixed_precision.enabled"],
        init_scale=config["mixed_precision.init_scale"],
        growth_interval=int(config["mixed_precision.growth_interval"]),
    )


def body_and_head(net: nn.Module, s: Settings) -> list[dict[str, Any]]:
    """The groups of a network that starts from trained weights; ``relative`` to the rate."""
    groups = split_rates(
        net, num_classes=s.classes, body_lr=s.body_rate, head_lr=1.0,
        weight_decay=s.weight_decay, layer_decay=s.layer_decay,
    )  # fmt: skip
    return [{**group, "relative": group.pop("lr")} for group in groups]


def parameter_groups(*nets: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices and filters, not biases, norms, scales and offsets.

    What a module names in ``learning_units`` (scales and offsets of quantisers) are groups of their
    own whose learning rate is ``relative`` to their size: Adam moves every number by about the
    rate, and the scales of 8 bits are smaller than that.
    """
    units: dict[nn.Parameter, float] = {}
    for net in nets:
        for module in net.modules():
            find = getattr(module, "learning_units", None)
            units.update(find() if find is not None else ())
    free = [p for net in nets for p in net.parameters() if p.requires_grad and p not in units]
    decay, rest = [p for p in free if p.ndim > 1], [p for p in free if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decay, "weight_decay": weight_decay}]
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0})
    return groups + [
        {"params": [parameter], "weight_decay": 0.0, "relative": unit}
        for parameter, unit in units.items()
    ]


def compiled(net: nn.Module, *, example: torch.Tensor) -> nn.Module:
    """``torch.compile`` of ``net``, tried once on ``example``.

    Raises:
        ValueError: this machine cannot compile (no C++ compiler, say).
    """
    made = torch.compile(net)
    training = net.training
    try:
        made.eval()
        with torch.no_grad():
            made(example)
    except Exception as error:  # compilers and their backends raise what they like
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"training.compile: this machine cannot compile: {reason}") from error
    finally:
        net.train(training)
    return made
