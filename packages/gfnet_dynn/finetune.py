"""Fine-tune a GFNet: AdamW with warm-up and cosine, mixup or cutmix, EMA, exact resume.

The same loop trains the backbone (cross-entropy) and the student (distillation): only the
function that turns a batch into losses differs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gfnet_dynn.parallel import ALONE, SharedState, average_gradients, gather_count
from gfnet_dynn.run_log import RunLog
from shared_core.datasets.views.mixing import Mix, draw_cutmix, draw_mixup
from shared_core.for_torch.data import TorchLoader
from shared_core.for_torch.distributed import World
from shared_core.for_torch.ema import Ema
from shared_core.for_torch.losses import soft_cross_entropy
from shared_core.for_torch.mixing import cutmix, mix_targets, mixup, one_hot
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.run_state import Best, StageState
from shared_core.for_torch.seeds import seed_all
from shared_core.runs import derive_seed, progress

BARELY_TRAIN = 21  # batches of an epoch under --barely_train

# (images, targets, epoch from 1) -> named losses, "loss" among them
Losses = Callable[[Tensor, Tensor, float], dict[str, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: a straight rise, then a cosine to a hundredth."""

    base: float
    total_steps: int
    warmup_steps: int

    def at(self, step: int) -> float:
        """Rate of the step with number ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.base * (step + 1) / self.warmup_steps
        share = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        floor = self.base / 100
        return floor + (self.base - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def parameter_groups(*modules: nn.Module, weight_decay: float) -> list[dict]:
    """Decay matrices and filters, not biases, norms and positions (``pos_embed``)."""
    decay, plain = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            flat = parameter.ndim <= 1 or name.endswith("pos_embed")
            (plain if flat else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}]
    return [*groups, {"params": plain, "weight_decay": 0.0}] if plain else groups


def draw_mix(
    args: argparse.Namespace, *, stage: str, step: int, batch: int, size: int
) -> Mix | None:
    """Mixup or cutmix of one step, half of the steps each when both are on; None without."""
    if not args.mixup and not args.cutmix:
        return None
    rng = np.random.default_rng(derive_seed(args.seed, stage, "mix", step))
    if args.cutmix and (not args.mixup or rng.random() < 0.5):
        return draw_cutmix(rng, batch, alpha=args.cutmix, height=size, width=size)
    return draw_mixup(rng, batch, alpha=args.mixup)


def apply_mix(
    mix: Mix | None, images: Tensor, labels: Tensor, *, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Mixed images, and targets: class numbers without a mix, class shares ``(N, K)`` with one."""
    if mix is None:
        return images, labels
    shares = mix_targets(
        one_hot(labels, num_classes=num_classes), lam=mix.lam, permutation=mix.permutation
    )
    if mix.box is None:
        return mixup(images, lam=mix.lam, permutation=mix.permutation), shares
    return cutmix(images, box=mix.box, permutation=mix.permutation), shares


def cross_entropy_losses(model: nn.Module, *, smoothing: float) -> Losses:
    """Plain training: cross-entropy with label smoothing against numbers or class shares."""

    def losses(images: Tensor, targets: Tensor, epoch: float) -> dict[str, Tensor]:
        logits = model(images).float()
        if targets.ndim == 2:
            soft = targets * (1 - smoothing) + smoothing / targets.shape[1]
            return {"loss": soft_cross_entropy(logits, soft)}
        return {"loss": nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)}

    return losses


@torch.no_grad()
def accuracy(
    model: nn.Module, loader: TorchLoader, precision: Precision, world: World = ALONE
) -> float:
    """Top-1 accuracy over the shares of all processes, in [0, 1]; the model's mode is put back."""
    was_training = model.training
    model.eval()
    right = total = 0
    for batch in loader:
        with precision.autocast():
            logits = model(batch.images)
        right += int((logits.argmax(dim=1) == batch.labels).sum())
        total += len(batch.labels)
    model.train(was_training)
    right, total = gather_count(right, total, world)
    return right / total


def fine_tune(
    stage: str,
    model: nn.Module,
    losses: Losses,
    *,
    loader: TorchLoader,
    validation: TorchLoader,
    num_classes: int,
    image_size: int,
    epochs: int,
    base_lr: float,
    precision: Precision,
    args: argparse.Namespace,
    log: RunLog,
    helper: nn.Module | None = None,
    world: World = ALONE,
) -> tuple[Best, StageState]:
    """Train ``model`` for ``epochs`` and keep the weights that do best on ``validation``.

    Args:
        stage: its name in logs, seeds and the state file.
        losses: see :data:`Losses`; the model is in training mode when it is called.
        helper: what learns with the model and is not part of it (a projector).
        world: the processes that train together; metrics of the training are of this one's share.

    Returns:
        The best weights, with accuracy and epoch, and the stage's state for its clock.
    """
    modules = [model] if helper is None else [model, helper]
    for module in modules:
        average_gradients(module, world)
    if world.rank:  # all began with the same weights; from here on each draws its own noise
        seed_all(derive_seed(args.seed, stage, "rank", world.rank) % 2**32)
    groups = parameter_groups(*modules, weight_decay=args.finetune_wd)
    optimizer = torch.optim.AdamW(groups, lr=base_lr)
    ema = Ema(model, decay=args.ema) if args.ema else None
    best = Best()
    parts = {
        "model": model,
        "optimizer": optimizer,
        "precision": precision,
        "loader": loader,
        "best": best,
    }
    if helper is not None:
        parts["helper"] = helper
    if ema is not None:
        parts["ema"] = ema
    state = SharedState(stage, parts, log, world)
    steps_per_epoch = min(len(loader), BARELY_TRAIN) if args.barely_train else len(loader)
    schedule = Schedule(
        base_lr, epochs * steps_per_epoch, min(args.finetune_warmup, epochs - 1) * steps_per_epoch
    )
    first, step, sums = 0, 0, {}
    if state.restore():
        first, step, sums = (state.counters[key] for key in ("epoch", "step", "sums"))
        log.say(f"{stage}: resumed at epoch {first + 1}, step {step}")
    else:
        state.save(epoch=0, step=0, sums={})

    for epoch in range(first, epochs):
        for module in modules:
            module.train()
        done = step - epoch * steps_per_epoch
        batches = progress(
            loader, total=steps_per_epoch, done=done, label=f"{stage} epoch {epoch + 1}/{epochs}"
        )
        for batch in batches:
            rate = schedule.at(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            mix = draw_mix(args, stage=stage, step=step, batch=len(batch.labels), size=image_size)
            images, targets = apply_mix(mix, batch.images, batch.labels, num_classes=num_classes)
            with precision.autocast():
                parted = losses(images, targets, epoch + 1)
            precision.backward_step(parted["loss"], optimizer, clip=args.clip_grad or None)
            if ema is not None:
                ema.update(model)
            for name, value in parted.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach())
            step += 1
            done += 1
            if not math.isfinite(sums["loss"]):
                raise ValueError(
                    f"{stage}: the loss is not finite at step {step}, epoch {epoch + 1}; "
                    "a lower learning rate or --amp fp32 may help"
                )
            if done == steps_per_epoch:
                if done < len(loader):
                    break
            elif args.save_every and step % args.save_every == 0:
                state.save(epoch=epoch, step=step, sums=sums)
        if loader.loader.order.epoch == epoch:  # the last batches were left out
            loader.loader.order.set_epoch(epoch + 1)
        means = {name: value / steps_per_epoch for name, value in sums.items()}
        log.write(stage, "train", epoch, {**means, "lr": rate})
        if ema is None:
            found = accuracy(model, validation, precision, world)
            best.offer(model, found, epoch)
        else:
            with ema.applied(model):
                found = accuracy(model, validation, precision, world)
                best.offer(model, found, epoch)
        log.write(stage, "val", epoch, {"acc": found})
        log.say(
            f"{stage}: epoch {epoch + 1}/{epochs}, loss {means['loss']:.4f}, "
            f"calibration accuracy {found:.4f} (best {best.accuracy:.4f})"
        )
        sums = {}
        state.save(epoch=epoch + 1, step=step, sums=sums)
    return best, state
