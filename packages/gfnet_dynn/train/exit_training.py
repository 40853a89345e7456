"""Training the exits: one step function, an epoch of it, and the evaluation in between."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from gfnet_dynn.decide.exit_outputs import ExitLogits, collect, exit_metrics, take_exit
from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gates import uncertainty
from gfnet_dynn.train.exit_losses import (
    LEAVE_AT,
    classifier_loss,
    gate_loss,
    gate_targets,
    level_losses,
    normalised_costs,
    pos_weights,
    target_exits,
)
from gfnet_dynn.train.parallel import ALONE
from gfnet_dynn.train.phases import Alternation, Phase, set_phase
from gfnet_dynn.train.warmup import WarmUp, warmup_loss
from shared_core.for_torch.distributed import World, wrap
from shared_core.for_torch.precision import Precision

#: The policy that the classifier losses assume: JEI-DNN, arXiv 2310.09163.
TRAINING_POLICY = ExitPolicy("jei", LEAVE_AT)

Gather = Callable[[ExitLogits], ExitLogits]


class ExitTraining:
    """State of the training of the exits; :meth:`step` is the step function.

    Args:
        model: a GFNetDynn.
        optimizer: over all of its parameters; those without a gradient are left alone.
        tradeoff: lambda of the gates' level losses, 0 or more.
        objective: ``ce``, ``zeroOne`` or ``prob``.
        classifier_mode: ``single``, ``weighted``, ``boosted`` or ``legacy``.
        precision: fp32 on the model's device if None.
        world: the processes that average their gradients.

    Attributes:
        weights: ``(G,)`` weights of the gates' positives, from :meth:`set_from_validation`; 1 at
            first.
        frozen_exits: numbers of the heads that do not learn.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        tradeoff: float = 0.75,
        objective: str = "ce",
        classifier_mode: str = "boosted",
        precision: Precision | None = None,
        world: World = ALONE,
    ) -> None:
        self.model, self.optimizer, self.world = model, optimizer, world
        self.tradeoff, self.objective = tradeoff, objective
        self.classifier_mode = classifier_mode
        self.precision = precision or Precision(next(model.parameters()).device)
        self.costs = normalised_costs(model.exit_costs())
        self.weights = torch.ones(len(model.exits))
        self.frozen_exits: tuple[int, ...] = ()
        self._entered: tuple[Phase, tuple[int, ...]] | None = None
        # Gradients are averaged for what learns and for nothing else: a wrapper for each phase.
        self._learners: dict[tuple[Phase, tuple[int, ...]], nn.Module] = {}

    def enter(self, phase: Phase) -> nn.Module:
        """Let the parameters of ``phase`` learn. Returns what to call instead of the model."""
        wanted = (phase, tuple(self.frozen_exits))
        if self._entered != wanted:
            set_phase(self.model, phase, frozen_exits=self.frozen_exits)
            self._entered = wanted
        backbone_learns = phase in (Phase.BACKBONE, Phase.JOINT)
        if self.model.backbone.training != backbone_learns:  # an evaluation changed the mode
            self.model.backbone.train(backbone_learns)
        if wanted not in self._learners:
            learns = any(p.requires_grad for p in self.model.parameters())
            self._learners[wanted] = wrap(self.model, self.world) if learns else self.model
        return self._learners[wanted]

    def losses(
        self, phase: Phase, logits: Sequence[Tensor], gate_logits: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """The losses of a phase, in nats; ``loss`` is the one to minimise."""
        if phase is Phase.WARMUP:
            return {"loss": warmup_loss(logits, labels)}
        parts: dict[str, Tensor] = {}
        if phase in (Phase.CLASSIFIER, Phase.BACKBONE, Phase.JOINT):
            parts["classifier_loss"] = classifier_loss(
                logits,
                labels,
                gate_logits,
                mode=self.classifier_mode,
                include_final=phase is not Phase.CLASSIFIER,
            )
        if phase in (Phase.GATE, Phase.JOINT):
            parts["gate_loss"], target = self.gate_part(logits, gate_logits, labels)
            return {"loss": sum(parts.values()), **parts, "target_exit": target}
        return {"loss": parts["classifier_loss"], **parts}

    def level_losses(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        """What leaving at each exit costs a sample, loss and price of compute: ``(N, G+1)``."""
        return level_losses(
            logits, labels, costs=self.costs, tradeoff=self.tradeoff, objective=self.objective
        )

    def gate_part(
        self, logits: Sequence[Tensor], gate_logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gates' loss and the target exits ``(N,)``."""
        target = target_exits(self.level_losses(logits, labels))
        wanted = gate_targets(target, gate_logits.shape[1])
        return gate_loss(gate_logits, wanted, self.weights), target

    def step(self, phase: Phase, images: Tensor | list[Tensor], labels: Tensor) -> dict:
        """One update in ``phase``: forward, losses, update.

        Args:
            images: ``(N, 3, H, W)``, normalised, on the model's device; or their embeddings.
            labels: int64 ``(N,)``, same device.

        Returns:
            The losses as tensors without gradient, and ``outputs`` (detached) for the metrics.
        """
        learner = self.enter(phase)
        with self.precision.autocast():
            logits, gate_logits = learner(images)
        losses = self.losses(phase, logits, gate_logits, labels)
        # Mode ``single`` may send a whole batch to a head that does not learn, and a model whose
        # gates have no parameters has nothing to learn in GATE.
        if losses["loss"].requires_grad:
            self.precision.backward_step(losses["loss"], self.optimizer)
        return {
            **{name: value.detach() for name, value in losses.items()},
            "outputs": ([z.detach() for z in logits], gate_logits.detach()),
        }

    def set_from_validation(self, outputs: ExitLogits) -> None:
        """New weights of the gates' positives, from the cumulative targets of a split."""
        target = target_exits(self.level_losses(*tensors_of(outputs)))
        counts = gate_targets(target, outputs.num_gates).sum(dim=0)
        self.weights = pos_weights(counts, len(outputs.labels))

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


def tensors_of(outputs: ExitLogits) -> tuple[list[Tensor], Tensor]:
    """Logits, G+1 of ``(N, K)``, and labels ``(N,)``."""
    return list(torch.from_numpy(outputs.logits)), torch.from_numpy(outputs.labels)


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
    batches: Iterable[tuple[Tensor | list[Tensor], Tensor]],
    *,
    alternation: Alternation | None = None,
    max_batches: int | None = None,
) -> dict[Phase, dict[str, float]]:
    """One epoch: of warm-up without ``alternation``, of phase 2 with it.

    Args:
        batches: ``(images, labels)`` on the model's device.
        alternation: decides the phase of every step, and counts them.
        max_batches: stop after so many.

    Returns:
        The running means of each phase that occurred, of its last turn.
    """
    if alternation is None:
        alternation = Alternation(1, phases=(Phase.WARMUP,))
    found: dict[Phase, RunningMetrics] = {}
    current: Phase | None = None
    for images, labels in islice(batches, max_batches):
        phase = alternation.phase
        if phase is not current:
            found[phase], current = RunningMetrics(training.model.exits), phase
        step = training.step(phase, images, labels)
        alternation.advance()
        found[phase].update(step, labels)
    return {phase: running.result() for phase, running in found.items()}


def evaluate(
    training: ExitTraining,
    batches: Iterable[tuple[Tensor | list[Tensor], Tensor]],
    *,
    policy: ExitPolicy = TRAINING_POLICY,
    split: str = "calibration",
    split_hash: str = "",
    max_batches: int | None = None,
    gather: Gather | None = None,
) -> tuple[dict[str, float], ExitLogits]:
    """All metrics of a split under the original's names, on their true scale, without prefix.

    See :func:`gfnet_dynn.decide.exit_outputs.exit_metrics`; beside these ``test_acc`` (equal to
    ``gated_acc``), ``level_loss`` (mean loss plus price of compute at the exits that the policy
    takes, what phase 2 chooses its epoch by), ``gate_loss``, ``classifier_loss`` and ``loss``, the
    mean of the last two. The same weights give the same numbers, whatever batch size divides the
    split (up to float32 rounding), and nothing random is drawn.

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
    metrics = exit_metrics(outputs, policy)
    logits, labels = tensors_of(outputs)
    gate_logits = torch.from_numpy(outputs.gate_logits)
    levels = training.level_losses(logits, labels).T.numpy()  # (G+1, N)
    with torch.no_grad():
        gate, _ = training.gate_part(logits, gate_logits, labels)
        classifier = classifier_loss(logits, labels, gate_logits, mode=training.classifier_mode)
    metrics["level_loss"] = float(
        take_exit(levels, outputs.select(policy)).astype(np.float64).mean()
    )
    metrics["gate_loss"], metrics["classifier_loss"] = float(gate), float(classifier)
    metrics["loss"] = (metrics["gate_loss"] + metrics["classifier_loss"]) / 2
    metrics["test_acc"] = metrics["gated_acc"]
    return metrics, outputs


def warm_up_epoch(
    training: ExitTraining,
    warm_up: WarmUp,
    train_batches: Iterable[tuple[Tensor | list[Tensor], Tensor]],
    validation_batches: Iterable[tuple[Tensor | list[Tensor], Tensor]],
    *,
    max_batches: int | None = None,
    max_validation_batches: int | None = None,
    split_hash: str = "",
    gather: Gather | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """One epoch of warm-up: train, evaluate on validation data, let patience decide.

    Returns:
        Metrics of the training and of the validation split.
    """
    training.frozen_exits = warm_up.frozen_exits
    trained = train_single_epoch(training, train_batches, max_batches=max_batches)
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
