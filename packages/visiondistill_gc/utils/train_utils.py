"""The training loop of teacher and student: mixed batches, schedule, early stop, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from shared_core.checkpoints import weights_sha256
from shared_core.datasets import BatchLoader, ImageSet
from shared_core.datasets.views.mixing import Mix, draw_mixup
from shared_core.for_paddle.checkpoints import load_run_state, save_run_state, to_numpy, unwrap
from shared_core.for_paddle.data import Normalizer
from shared_core.for_paddle.distributed import World, gather_objects, main_writes, wrap
from shared_core.for_paddle.ema import Ema
from shared_core.for_paddle.mixing import mix_targets, mixup, one_hot
from shared_core.for_paddle.precision import Precision
from shared_core.for_paddle.seeds import capture_rng
from shared_core.runs import StageLog, derive_seed, progress
from visiondistill_gc.options import SCHEDULES, TrainingOptions
from visiondistill_gc.utils.loss import DistillationLoss
from visiondistill_gc.utils.teaching import Teacher
from visiondistill_gc.utils.visual_log import VisualLog


@dataclass(frozen=True)
class Plan:
    """How one network is trained, beyond the options of its training."""

    how: TrainingOptions
    seed: int = 0
    keep: str = "best"  # "best" by validation accuracy, or "last": nothing is chosen there


def learning_rate(
    epoch: float, *, base: float, epochs: int, warmup: int, kind: str = "epoch"
) -> float:
    """The rate at a time of the run.

    ``epoch``: ``base * (e + 1) / warmup`` while the epoch ``e`` (from 0) is below ``warmup``, then
    ``base / 2 * (1 + cos(pi * (e - warmup) / (epochs - warmup)))``; constant within an epoch. It is
    the original's rule. ``step``: the same with the epoch as a fraction, and a rise from
    ``base * t / warmup``, so that short runs have no jumps.

    Args:
        epoch: epochs done, a fraction within one.
        base: highest rate, above 0.
        epochs: of the whole run.
        warmup: epochs of rising rate, below ``epochs``.
        kind: ``epoch`` or ``step``.

    Raises:
        ValueError: a value out of range.
    """
    if not base > 0 or not 0 <= warmup < epochs or kind not in SCHEDULES:
        raise ValueError(
            f"base {base}, warm-up {warmup} of {epochs} epochs by {kind!r}: expected a rate above "
            "0, a warm-up shorter than the run, by epoch or step"
        )
    if kind == "epoch":
        epoch = math.floor(epoch)
        if epoch < warmup:
            return base * (epoch + 1) / warmup
    elif epoch < warmup:
        return base * epoch / warmup
    return base / 2 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


class Best:
    """The weights to keep, and the validation accuracy they had."""

    def __init__(self) -> None:
        self.accuracy = -1.0  # fraction in [0, 1]; -1: none yet
        self.epoch = -1
        self.weights: dict[str, Any] = {}

    def keep(self, net: nn.Layer, accuracy: float, epoch: int) -> None:
        """Keep a copy of the weights whatever the accuracy."""
        self.accuracy, self.epoch = float(accuracy), int(epoch)
        self.weights = {k: v.detach().clone() for k, v in net.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {"accuracy": self.accuracy, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``."""
        self.accuracy, self.epoch = float(state["accuracy"]), int(state["epoch"])
        self.weights = {k: paddle.to_tensor(v) for k, v in state["weights"].items()}


class StageState:
    """Saves and restores the parts of one stage with its counters, log position and clock."""

    def __init__(self, stage: str, parts: Mapping[str, Any], log: StageLog, world: World) -> None:
        self.path = log.folder / "state" / f"{stage}.pdparams"
        self.parts, self.log, self.world = parts, log, world
        self._seconds, self._since = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Wall time of the stage, that of earlier processes up to their last save included."""
        return self._seconds + time.monotonic() - self._since

    def restore(self) -> dict[str, Any] | None:
        """Go on from the saved state: its counters; None when there is none."""
        if not self.path.exists():
            return None
        counters = load_run_state(self.path, self.parts, rank=self.world.rank)
        position, seconds = counters.pop("log_position"), counters.pop("seconds")
        if self.world.is_main:
            self.log.metrics.cut(position)
        self._seconds, self._since = seconds, time.monotonic()
        return counters

    def save(self, **counters: Any) -> None:
        """Write everything; ``counters`` are plain numbers, strings and lists."""
        rng = gather_objects(capture_rng(), self.world)
        if not self.world.is_main:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        told = {"log_position": self.log.metrics.position(), "seconds": self.seconds}
        save_run_state(self.path, self.parts, counters={**counters, **told}, rng=rng)


def draw_mix(plan: Plan, *, epoch: int, batch: int, size: int, rank: int = 0) -> Mix | None:
    """How a batch is mixed, decided by the seed and its place in the run; None where it is not."""
    if not plan.how.mixup or epoch < plan.how.mixup_start:
        return None
    rng = np.random.default_rng(derive_seed(plan.seed, "mixup", epoch, batch, rank))
    return draw_mixup(rng, size, alpha=plan.how.mixup)


def train_step(
    net: nn.Layer,
    images: Tensor,
    targets: Tensor,
    *,
    optimizer: Any,
    loss: DistillationLoss,
    precision: Precision,
    teacher: Teacher | None = None,
    keys: Sequence[str] = (),
    view: int = 0,
    mix: Mix | None = None,
    clip: float = 0.0,
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Forward, losses, update. Teacher and student see the same images, mixed ones too.

    Args:
        net: in training mode.
        images: float32 ``(N, 3, H, W)``, not mixed yet.
        targets: ``(N, C)``, not mixed yet.
        teacher: None where the loss needs none.
        keys, view: what the images are called in a store.
        mix: how to mix the batch; None leaves it.
        clip: largest norm of the gradient; 0 for none.

    Returns:
        The losses, the student's logits, the (mixed) targets.
    """
    if mix is not None:
        images = mixup(images, lam=mix.lam, permutation=mix.permutation)
        targets = mix_targets(targets, lam=mix.lam, permutation=mix.permutation)
    with precision.autocast():
        answers = None
        if teacher is not None:
            answers = teacher(images, keys=keys, view=view, mix=mix).astype("float32")
        logits = net(images)
        losses = loss(logits.astype("float32"), targets, answers)
    precision.backward_step(losses["loss"], optimizer, clip=clip or None)
    return {name: value.item() for name, value in losses.items()}, logits.detach(), targets


@dataclass
class Training:
    """Everything that one network's training touches."""

    stage: str  # names its files and its lines in the log
    net: nn.Layer
    optimizer: Any
    loss: DistillationLoss
    teacher: Teacher | None
    images: ImageSet
    loader: BatchLoader
    validate: Callable[[nn.Layer], dict[str, float]]  # net in eval mode -> loss, accuracy; or {}
    num_classes: int
    normalizer: Normalizer
    precision: Precision
    plan: Plan
    log: StageLog
    world: World
    visual: VisualLog


def fit(training: Training) -> tuple[Best, StageState]:
    """Train, and return the weights to keep; they are also put into the network.

    The state is saved after every epoch (and every ``save_every`` steps); a killed run goes on from
    there, bit for bit on a CPU.

    Raises:
        RuntimeError: the processes of a distributed run ended with different weights.
    """
    how, world, log = training.plan.how, training.world, training.log
    plain, best = unwrap(training.net), Best()
    parts: dict[str, Any] = {
        "net": plain,
        "optimizer": training.optimizer,
        "loader": training.loader,
        "best": best,
        "precision": training.precision,
    }
    ema = Ema(plain, decay=how.ema) if how.ema else None
    if ema is not None:
        parts["ema"] = ema
    state = StageState(training.stage, parts, log, world)
    counters = state.restore()
    if counters is None:
        counters = {"epoch": 0, "batch": 0, "waited": 0, "sums": {}}
    else:
        log.say(f"{training.stage}: resumed at epoch {counters['epoch'] + 1}")
    training.visual.begin(training.stage, log)
    net = wrap(training.net, world)
    while counters["epoch"] < how.epochs and not 0 < how.patience <= counters["waited"]:
        _train_epoch(training, net, counters, state, ema)
        _end_epoch(training, plain, counters, best, ema)
        state.save(**counters)
    if 0 < how.patience <= counters["waited"] and counters["epoch"] < how.epochs:
        log.say(f"{training.stage}: no better epoch for {how.patience}, stopped early")
    if world.world_size > 1:
        _check_same_weights(plain, world)
    plain.set_state_dict(best.weights)
    plain.eval()
    return best, state


def training_mode(net: nn.Layer) -> None:
    """Training mode; a net that has ``keep_norms`` keeps all its batch norms' statistics."""
    net.train()
    for layer in net.sublayers() if getattr(net, "keep_norms", False) else ():
        if "BatchNorm" in type(layer).__name__:
            layer.eval()


def _train_epoch(
    training: Training,
    net: nn.Layer,
    counters: dict[str, Any],
    state: StageState,
    ema: Ema | None,
) -> None:
    """The rest of the current epoch; ``counters`` are moved along."""
    plan, how = training.plan, training.plan.how
    plain, epoch, steps = unwrap(net), counters["epoch"], len(training.loader)
    training_mode(plain)
    rest = progress(
        training.loader,
        total=steps,
        done=counters["batch"],
        label=f"{training.stage} epoch {epoch + 1}/{how.epochs}",
    )
    for batch in rest:
        number = counters["batch"]
        now = epoch + (number + 1) / (steps + 1)
        training.optimizer.set_lr(
            learning_rate(
                now, base=how.lr, epochs=how.epochs, warmup=how.warmup_epochs, kind=how.schedule
            )
        )
        losses, logits, targets = train_step(
            net,
            training.normalizer(batch.images),
            one_hot(
                paddle.to_tensor(batch.labels),
                num_classes=training.num_classes,
                smoothing=how.label_smoothing,
            ),
            optimizer=training.optimizer,
            loss=training.loss,
            precision=training.precision,
            teacher=training.teacher,
            keys=[training.images.keys[i] for i in batch.indices],
            view=batch.view_id,
            mix=draw_mix(plan, epoch=epoch, batch=number, size=len(batch), rank=state.world.rank),
            clip=how.clip_grad,
        )
        if ema is not None:
            ema.update(plain)
        _add_up(counters["sums"], losses, logits, targets)
        counters["batch"] = number + 1
        if how.save_every and counters["batch"] % how.save_every == 0 < steps - number - 1:
            state.save(**counters)


def _add_up(
    sums: dict[str, float], losses: dict[str, float], logits: Tensor, targets: Tensor
) -> None:
    """Losses and accuracy of a batch to the epoch's; both labels of a mixture count by weight."""
    n = logits.shape[0]
    chosen = logits.astype("float32").numpy().argmax(axis=1)
    right = float(targets.numpy()[np.arange(n), chosen].sum())
    for name, value in (*losses.items(), ("acc", right / n), ("n", 1.0)):
        sums[name] = sums.get(name, 0.0) + value * n


def _end_epoch(
    training: Training, plain: nn.Layer, counters: dict[str, Any], best: Best, ema: Ema | None
) -> None:
    """Validate, keep what is better (or last), write the numbers down, move to the next epoch."""
    plan, how, world, log = training.plan, training.plan.how, training.world, training.log
    epoch = counters["epoch"]
    parts = gather_objects(counters["sums"], world)
    sums = {name: sum(part[name] for part in parts) for name in counters["sums"]}
    trained = {name: value / sums["n"] for name, value in sums.items() if name != "n"}
    trained["lr"] = training.optimizer.get_lr()
    plain.eval()
    with ema.applied(plain) if ema is not None else nullcontext():
        found = main_writes(lambda: training.validate(plain), world)
        better = plan.keep == "last" or found["acc"] > best.accuracy
        if better:
            best.keep(plain, found.get("acc", -1.0), epoch)
    waited = 0 if better else counters["waited"] + 1
    counters.update(epoch=epoch + 1, batch=0, sums={}, waited=waited)
    log.write(training.stage, "train", epoch, trained)
    if found:
        log.write(training.stage, "val", epoch, found)
    training.visual.epoch(epoch, trained, found)
    log.say(
        f"{training.stage}: epoch {epoch + 1}/{how.epochs}, train loss {trained['loss']:.4f} "
        f"acc {trained['acc']:.4f}"
        + (f", val loss {found['loss']:.4f} acc {found['acc']:.4f}" if found else "")
        + (" (best)" if better and plan.keep == "best" else "")
    )


def _check_same_weights(net: nn.Layer, world: World) -> None:
    """Averaged gradients keep the processes equal; statistics of batch norm are each one's own."""
    learned = {name: p for name, p in net.named_parameters() if not p.stop_gradient}
    found = gather_objects(weights_sha256(to_numpy(learned)), world)
    if len(set(found)) > 1:
        raise RuntimeError(f"{world.world_size} processes ended with different weights: {found}")
