"""Training the exits: one step function, an epoch of it, and the evaluation in between."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from gfnet_dynn.classifier_training_helper import LEAVE_AT, classifier_loss
from gfnet_dynn.exit_evaluation import ExitLogits, collect, exit_metrics
from gfnet_dynn.gate_training_helper import (
    OBJECTIVES,
    gate_loss,
    gate_targets,
    level_losses,
    normalised_costs,
    pos_weights,
    target_exits,
)
from gfnet_dynn.learning_helper import Alternation, Phase, set_phase
from gfnet_dynn.models.custom_modules.exit_policy import ExitPolicy
from gfnet_dynn.models.custom_modules.uncertainty import uncertainty
from gfnet_dynn.warmup import WarmUp, warmup_loss
from shared_core.for_torch.precision import Precision

#: The policy that the classifier losses assume: JEI-DNN, arXiv 2310.09163.
TRAINING_POLICY = ExitPolicy("jei", LEAVE_AT)
BARELY_TRAIN, BARELY_EVALUATE = 21, 51  # batches under --barely_train

Gather = Callable[[ExitLogits], ExitLogits]


@dataclass
class ExitTraining:
    """State of the training of the exits; :meth:`step` is the step function.

    Attributes:
        model: a GFNetDynn.
        optimizer: over all of its parameters; those without a gradient are left alone.
        tradeoff: lambda of the gates' level losses, 0 or more.
        objective: ``ce``, ``zeroOne`` or ``prob``.
        classifier_mode: ``single``, ``weighted``, ``boosted`` or ``legacy``.
        weights: ``(G,)`` weights of the gates' positives, from :meth:`set_from_validation`; 1 at
            first.
        frozen_exits: numbers of the heads that do not learn.
        precision: fp32 on the model's device if None.
        clip_norm: largest 2-norm of the gradient; None or 0 does not clip.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    tradeoff: float = 0.75
    objective: str = "ce"
    classifier_mode: str = "boosted"
    precision: Precision | None = None
    clip_norm: float | None = None
    frozen_exits: tuple[int, ...] = ()
    weights: Tensor = field(init=False)
    costs: np.ndarray = field(init=False)
    _entered: tuple | None = field(init=False, default=None)

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"unknown gate objective {self.objective!r}; "
                f"expected one of {', '.join(OBJECTIVES)}"
            )
        if self.precision is None:
            self.precision = Precision(next(self.model.parameters()).device)
        self.costs = normalised_costs(self.model.exit_costs())
        self.weights = torch.ones(len(self.model.exits))

    def enter(self, phase: Phase) -> None:
        """Let the parameters of ``phase`` learn; nothing happens while it lasts."""
        wanted = (phase, tuple(self.frozen_exits))
        if self._entered != wanted:
            set_phase(self.model, phase, frozen_exits=self.frozen_exits)
            self._entered = wanted
        backbone_learns = phase in (Phase.BACKBONE, Phase.JOINT)
        if self.model.backbone.training != backbone_learns:  # an evaluation changed the mode
            self.model.backbone.train(backbone_learns)

    def losses(self, phase: Phase, outputs, labels: Tensor) -> dict[str, Tensor]:
        """The losses of a phase, in nats; ``loss`` is the one to minimise."""
        logits, gate_logits = outputs
        if phase is Phase.WARMUP:
            return {"loss": warmup_loss(logits, labels)}
        if phase is Phase.CLASSIFIER:
            loss = classifier_loss(logits, labels, gate_logits, mode=self.classifier_mode)
            return {"loss": loss, "classifier_loss": loss}
        if phase is Phase.GATE:
            loss, target = self.gate_part(logits, gate_logits, labels)
            return {"loss": loss, "gate_loss": loss, "target_exit": target}
        classifier = classifier_loss(
            logits, labels, gate_logits, mode=self.classifier_mode, include_final=True
        )
        if phase is Phase.BACKBONE:
            return {"loss": classifier, "classifier_loss": classifier}
        gate, target = self.gate_part(logits, gate_logits, labels)
        return {
            "loss": classifier + gate,
            "classifier_loss": classifier,
            "gate_loss": gate,
            "target_exit": target,
        }

    def gate_part(
        self, logits: Sequence[Tensor], gate_logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gates' loss and the target exits ``(N,)``."""
        target = target_exits(
            level_losses(
                logits,
                labels,
                costs=self.costs,
                tradeoff=self.tradeoff,
                objective=self.objective,
            )
        )
        wanted = gate_targets(target, gate_logits.shape[1])
        return gate_loss(gate_logits, wanted, self.weights), target

    def step(self, phase: Phase, images: Tensor, labels: Tensor) -> dict:
        """One update in ``phase``: forward, losses, update.

        Args:
            images: ``(N, 3, H, W)``, normalised, on the model's device.
            labels: int64 ``(N,)``, same device.

        Returns:
            The losses as tensors without gradient, and ``outputs`` (detached) for the metrics.
        """
        self.enter(phase)
        with self.precision.autocast():
            outputs = self.model(images)
        losses = self.losses(phase, outputs, labels)
        # Mode ``single`` may send a whole batch to a head that does not learn, and a model whose
        # gates have no parameters has nothing to learn in GATE.
        if losses["loss"].requires_grad:
            self.precision.backward_step(
                losses["loss"], self.optimizer, clip=self.clip_norm or None
            )
        return {
            **{name: value.detach() for name, value in losses.items()},
            "outputs": ([z.detach() for z in outputs[0]], outputs[1].detach()),
        }

    def set_from_validation(self, outputs: ExitLogits) -> None:
        """New weights of the gates' positives, from the cumulative targets of a split."""
        target = self.targets_of(outputs)
        counts = gate_targets(target, outputs.num_gates).sum(dim=0)
        self.weights = pos_weights(counts, len(outputs.labels))

    def targets_of(self, outputs: ExitLogits) -> Tensor:
        """Target exits ``(N,)`` of a split."""
        return target_exits(
            level_losses(
                list(torch.from_numpy(outputs.logits)),
                torch.from_numpy(outputs.labels),
                costs=self.costs,
                tradeoff=self.tradeoff,
                objective=self.objective,
            )
        )

    def state_dict(self) -> dict:
        """What :meth:`step` depends on beside model and optimizer."""
        return {"weights": self.weights.tolist(), "frozen_exits": list(self.frozen_exits)}

    def load_state_dict(self, state: dict) -> None:
        """Go on where ``state`` was taken."""
        if len(state["weights"]) != len(self.model.exits):
            raise ValueError(
                f"the saved state has {len(state['weights'])} gate weights; "
                f"expected {len(self.model.exits)}"
            )
        self.weights = torch.tensor(state["weights"])
        self.frozen_exits = tuple(state["frozen_exits"])


class RunningMetrics:
    """Means over the batches of one phase; sums stay on the device until :meth:`result`."""

    def __init__(self, exits: Sequence[int]):
        self.exits = tuple(exits)
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def _add(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    @torch.no_grad()
    def update(self, step: dict, labels: Tensor) -> None:
        """Add the result of one :meth:`ExitTraining.step`."""
        logits, gate_logits = step["outputs"]
        n, num_gates = gate_logits.shape
        self.count += n
        for name in ("loss", "classifier_loss", "gate_loss"):
            if name in step:
                self._add(name, step[name] * n)
        stacked = torch.stack([z.float() for z in logits])  # (G+1, N, K)
        self._add("acc", (stacked.argmax(dim=2) == labels).sum(dim=1))
        self._add("features", uncertainty(stacked).sum(dim=1))  # (G+1, 4)
        chosen = TRAINING_POLICY.select(logits, gate_logits)
        right = stacked[chosen, torch.arange(n, device=chosen.device)].argmax(dim=1) == labels
        self._add("gated_acc", right.sum())
        exits = torch.arange(num_gates + 1, device=chosen.device)
        self._add("percent_exit", (chosen[:, None] == exits).sum(dim=0))
        if "target_exit" in step:
            target = step["target_exit"]
            self._add("acc_exit", (chosen == target).sum())
            self._add("exit_optimal_gate", (target[:, None] == exits).sum(dim=0))

    def result(self) -> dict[str, float]:
        """The original's metric names without prefix, means over the samples, true scale.

        ``acc_exit``: fraction of the samples whose exit is the target exit;
        ``exit_optimal_gate{l}``: fraction whose target exit is l (``final`` for the last head).
        Empty before any batch.
        """
        if not self.count:
            return {}
        means = {name: (value / self.count).cpu().numpy() for name, value in self.sums.items()}
        result = {}
        for name in ("loss", "classifier_loss", "gate_loss", "gated_acc", "acc_exit"):
            if name in means:
                result[name] = float(means[name])
        for index, block in enumerate((*self.exits, None)):
            final = block is None
            result["acc_final" if final else f"acc{block}"] = float(means["acc"][index])
            for column, name in enumerate(("p_max", "entropy", "margins")):
                key = f"final_{name}" if final else f"{name}{block}"
                result[key] = float(means["features"][index, column])
            tail = "final" if final else str(block)
            for name in ("percent_exit", "exit_optimal_gate"):
                if name in means:
                    result[f"{name}{tail}"] = float(means[name][index])
        return result


def train_single_epoch(
    training: ExitTraining,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    alternation: Alternation | None = None,
    max_batches: int | None = None,
    after_step: Callable[[Phase, dict], None] | None = None,
    log: Callable[[Phase, dict[str, float]], None] | None = None,
) -> dict[Phase, dict[str, float]]:
    """One epoch: of warm-up without ``alternation``, of phase 2 with it.

    Args:
        batches: ``(images, labels)`` on the model's device; what is left of the epoch, when a run
            goes on in its middle.
        alternation: decides the phase of every step, and counts them.
        max_batches: stop after so many.
        after_step: called after each step with its phase and losses; may save the run.
        log: called with the running means when a turn ends, and at the end of the epoch.

    Returns:
        The last running means of each phase that occurred.
    """
    if alternation is None:
        alternation = Alternation(1, phases=(Phase.WARMUP,))
    results: dict[Phase, dict[str, float]] = {}
    running, current = RunningMetrics(training.model.exits), alternation.phase

    def close() -> None:
        means = running.result()
        if means:
            results[current] = means
            if log is not None:
                log(current, means)

    for images, labels in islice(batches, max_batches):
        phase = alternation.phase
        if phase is not current:
            close()
            running, current = RunningMetrics(training.model.exits), phase
        step = training.step(phase, images, labels)
        alternation.advance()
        running.update(step, labels)
        if after_step is not None:
            after_step(phase, step)
    close()
    return results


def evaluate(
    training: ExitTraining,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    policy: ExitPolicy = TRAINING_POLICY,
    split: str = "calibration",
    split_hash: str = "",
    max_batches: int | None = None,
    ece_scheme: str = "mass",
    gather: Gather | None = None,
) -> tuple[dict[str, float], ExitLogits]:
    """All metrics of a split under the original's names, on their true scale, without prefix.

    See :func:`gfnet_dynn.exit_evaluation.exit_metrics`; beside these ``test_acc`` (equal to
    ``gated_acc``), ``gate_loss``, ``classifier_loss`` and ``loss``, the mean of the two. The same
    weights give the same numbers, whatever the batch size of ``batches`` divides the split into
    (up to float32 rounding), and nothing random is drawn.

    Args:
        gather: turns the outputs of this process' share into those of the whole split.

    Returns:
        The metrics, and the outputs that they were computed from.
    """
    outputs = collect(
        training.model,
        batches,
        split=split,
        split_hash=split_hash,
        max_batches=max_batches,
        precision=training.precision,
    )
    if gather is not None:
        outputs = gather(outputs)
    metrics = exit_metrics(outputs, policy, ece_scheme=ece_scheme)
    logits = list(torch.from_numpy(outputs.logits))
    gate_logits, labels = torch.from_numpy(outputs.gate_logits), torch.from_numpy(outputs.labels)
    with torch.no_grad():
        gate, _ = training.gate_part(logits, gate_logits, labels)
        classifier = classifier_loss(logits, labels, gate_logits, mode=training.classifier_mode)
    metrics["gate_loss"], metrics["classifier_loss"] = float(gate), float(classifier)
    metrics["loss"] = (metrics["gate_loss"] + metrics["classifier_loss"]) / 2
    metrics["test_acc"] = metrics["gated_acc"]
    return metrics, outputs


def warm_up_epoch(
    training: ExitTraining,
    warm_up: WarmUp,
    train_batches: Iterable[tuple[Tensor, Tensor]],
    validation_batches: Iterable[tuple[Tensor, Tensor]],
    *,
    max_batches: int | None = None,
    max_validation_batches: int | None = None,
    after_step: Callable[[Phase, dict], None] | None = None,
    split_hash: str = "",
    gather: Gather | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """One epoch of warm-up: train, evaluate on validation data, let patience decide.

    Returns:
        Metrics of the training and of the validation split.
    """
    training.frozen_exits = warm_up.frozen_exits
    trained = train_single_epoch(
        training, train_batches, max_batches=max_batches, after_step=after_step
    )
    validated, outputs = evaluate(
        training,
        validation_batches,
        max_batches=max_validation_batches,
        split_hash=split_hash,
        gather=gather,
    )
    warm_up.update(
        training.model.exit_heads,
        outputs.correct[:-1].mean(axis=1).tolist(),
        optimizer=training.optimizer,
    )
    training.frozen_exits = warm_up.frozen_exits
    return trained.get(Phase.WARMUP, {}), validated
