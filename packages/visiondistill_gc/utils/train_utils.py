"""The training loop of teacher and student: mixed batches, schedule, early stop, exact resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from shared_core.checkpoints import weights_sha256
from shared_core.datasets import BatchLoader, ImageSet
from shared_core.datasets.views.mixing import Mix, draw_mixup
from shared_core.for_paddle.checkpoints import to_numpy, unwrap
from shared_core.for_paddle.data import Normalizer
from shared_core.for_paddle.distributed import World, gather_objects, main_writes, wrap
from shared_core.for_paddle.mixing import mix_targets, mixup, one_hot
from shared_core.runs import StageLog, derive_seed, progress
from visiondistill_gc.utils.ema import Ema
from visiondistill_gc.utils.loss import DistillationLoss
from visiondistill_gc.utils.precision import LeveledPrecision
from visiondistill_gc.utils.run_state import Best, StageState
from visiondistill_gc.utils.schedule import learning_rate
from visiondistill_gc.utils.teaching import Teacher
from visiondistill_gc.utils.visual_log import VisualLog


@dataclass(frozen=True)
class Plan:
    """How one network is trained; rates and weights as in the options."""

    epochs: int
    base_lr: float
    warmup: int = 5  # epochs of rising rate
    schedule: str = "epoch"
    mixup: float = 0.2  # alpha of the Beta distribution; 0 mixes nothing
    mixup_start: int = 5  # first epoch, from 0, whose batches are mixed
    smoothing: float = 0.0
    patience: int = 10  # epochs without a better validation accuracy; 0 never stops early
    keep: str = "best"  # "best" by validation accuracy, or "last": nothing is chosen there
    clip: float = 0.0  # largest norm of the gradient; 0 does not clip
    ema: float = 0.0  # decay of the average of weights; 0 has none
    save_every: int = 0  # steps between saved states; 0 saves after every epoch
    seed: int = 0


def draw_mix(plan: Plan, *, epoch: int, batch: int, size: int, rank: int = 0) -> Mix | None:
    """How a batch is mixed, decided by the seed and its place in the run; None where it is not."""
    if not plan.mixup or epoch < plan.mixup_start:
        return None
    rng = np.random.default_rng(derive_seed(plan.seed, "mixup", epoch, batch, rank))
    return draw_mixup(rng, size, alpha=plan.mixup)


def train_step(
    net: nn.Layer,
    images: Tensor,
    targets: Tensor,
    *,
    optimizer: Any,
    loss: DistillationLoss,
    precision: LeveledPrecision,
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
    validate: Callable[[nn.Layer], dict[str, float]]  # net in eval mode -> loss, accuracy
    num_classes: int
    normalizer: Normalizer
    precision: LeveledPrecision
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
    plan, world, log = training.plan, training.world, training.log
    net, plain = training.net, unwrap(training.net)
    best = Best()
    parts: dict[str, Any] = {
        "net": plain,
        "optimizer": training.optimizer,
        "loader": training.loader,
        "best": best,
        "precision": training.precision,
    }
    ema = Ema(plain, decay=plan.ema) if plan.ema else None
    if ema is not None:
        parts["ema"] = ema
    state = StageState(training.stage, parts, log, world)
    counters = state.restore()
    if counters is None:
        counters = {"epoch": 0, "batch": 0, "waited": 0, "sums": {}}
    else:
        log.say(f"{training.stage}: resumed at epoch {counters['epoch'] + 1}")
    training.visual.begin(training.stage, log)
    net = wrap(net, world)
    while counters["epoch"] < plan.epochs and not 0 < plan.patience <= counters["waited"]:
        epoch = counters["epoch"]
        _train_epoch(training, net, counters, state, ema)
        sums = _gathered(counters["sums"], world)
        trained = {k: v / sums["n"] for k, v in sums.items() if k != "n"}
        trained["lr"] = training.optimizer.get_lr()
        plain.eval()
        found = main_writes(lambda: _validated(training, plain, ema), world)
        if plan.keep == "last":
            _with_average(ema, plain, lambda e=epoch, f=found: best.keep(plain, f["acc"], e))
            better = True
        else:
            better = _with_average(
                ema, plain, lambda e=epoch, f=found: best.offer(plain, f["acc"], e)
            )
        counters.update(
            epoch=epoch + 1, batch=0, sums={}, waited=0 if better else counters["waited"] + 1
        )
        if world.is_main:
            log.write(training.stage, "train", epoch, trained)
            log.write(training.stage, "val", epoch, found)
            training.visual.epoch(epoch, trained, found)
        log.say(
            f"{training.stage}: epoch {epoch + 1}/{plan.epochs}, train loss {trained['loss']:.4f} "
            f"acc {trained['acc']:.4f}, val loss {found['loss']:.4f} acc {found['acc']:.4f}"
            + (" (best)" if better and plan.keep == "best" else "")
        )
        state.save(**counters)
    if 0 < plan.patience <= counters["waited"] and counters["epoch"] < plan.epochs:
        log.say(f"{training.stage}: no better epoch for {plan.patience}, stopped early")
    if world.world_size > 1:
        _check_same_weights(plain, world)
    plain.set_state_dict(best.weights)
    plain.eval()
    return best, state


def _train_epoch(
    training: Training,
    net: nn.Layer,
    counters: dict[str, Any],
    state: StageState,
    ema: Ema | None,
) -> None:
    """The rest of the current epoch; ``counters`` are moved along."""
    plan, optimizer = training.plan, training.optimizer
    plain, epoch = unwrap(net), counters["epoch"]
    plain.train()
    steps = len(training.loader)
    rest = progress(
        training.loader,
        total=steps,
        done=counters["batch"],
        label=f"{training.stage} epoch {epoch + 1}/{plan.epochs}",
    )
    for batch in rest:
        number = counters["batch"]
        optimizer.set_lr(
            learning_rate(
                epoch + (number + 1) / (steps + 1),
                base=plan.base_lr,
                epochs=plan.epochs,
                warmup=plan.warmup,
                kind=plan.schedule,
            )
        )
        targets = one_hot(
            paddle.to_tensor(batch.labels),
            num_classes=training.num_classes,
            smoothing=plan.smoothing,
        )
        losses, logits, mixed = train_step(
            net,
            training.normalizer(batch.images),
            targets,
            optimizer=optimizer,
            loss=training.loss,
            precision=training.precision,
            teacher=training.teacher,
            keys=[training.images.keys[i] for i in batch.indices],
            view=batch.view_id,
            mix=draw_mix(
                plan, epoch=epoch, batch=number, size=len(batch), rank=training.world.rank
            ),
            clip=plan.clip,
        )
        if ema is not None:
            ema.update(plain)
        sums, n = counters["sums"], len(batch)
        chosen = logits.astype("float32").numpy().argmax(axis=1)
        right = float(mixed.numpy()[np.arange(n), chosen].sum())  # both labels of a mixture count
        for name, value in (*losses.items(), ("acc", right / n), ("n", 1.0)):
            sums[name] = sums.get(name, 0.0) + value * n
        counters["batch"] = number + 1
        if plan.save_every and counters["batch"] % plan.save_every == 0 < steps - number - 1:
            state.save(**counters)


def _validated(training: Training, plain: nn.Layer, ema: Ema | None) -> dict[str, float]:
    return _with_average(ema, plain, lambda: training.validate(plain))


def _with_average(ema: Ema | None, net: nn.Layer, work: Callable[[], Any]) -> Any:
    """Do ``work`` while the network holds its averages, if there are any."""
    if ema is None:
        return work()
    with ema.applied(net):
        return work()


def _gathered(sums: dict[str, float], world: World) -> dict[str, float]:
    parts = gather_objects(sums, world)
    return {name: sum(part[name] for part in parts) for name in sums}


def _check_same_weights(net: nn.Layer, world: World) -> None:
    """Averaged gradients keep the processes equal; statistics of batch norm are each one's own."""
    learned = {name: p for name, p in net.named_parameters() if not p.stop_gradient}
    found = gather_objects(weights_sha256(to_numpy(learned)), world)
    if len(set(found)) > 1:
        raise RuntimeError(f"{world.world_size} processes ended with different weights: {found}")
