"""Which parameters learn in which phase, and when the phases of phase 2 alternate."""

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum

import torch
from torch import nn


class Phase(str, Enum):
    """What one training step changes; everything else keeps its bits."""

    WARMUP = "warmup"  # the exit heads, on the weighted sum of their losses
    GATE = "gate"  # the gates
    CLASSIFIER = "classifier"  # the exit heads, on the losses weighted by exit probability
    BACKBONE = "backbone"  # the backbone with its final norm and final head
    JOINT = "joint"  # all of it

    def __str__(self) -> str:
        return self.value


#: The parts of a model (see :func:`named_parts`) that learn in a phase.
TRAINED: dict[Phase, frozenset[str]] = {
    Phase.WARMUP: frozenset({"heads"}),
    Phase.GATE: frozenset({"gates"}),
    Phase.CLASSIFIER: frozenset({"heads"}),
    Phase.BACKBONE: frozenset({"backbone"}),
    Phase.JOINT: frozenset({"backbone", "heads", "gates"}),
}

#: By ``--phase2``: the phases that take turns after the warm-up.
TURNS: dict[str, tuple[Phase, ...]] = {
    "exits": (Phase.GATE, Phase.CLASSIFIER),
    "backbone": (Phase.GATE, Phase.BACKBONE),
    "joint": (Phase.JOINT,),
}


def phases_of(phase2: str) -> tuple[Phase, ...]:
    """The phases that take turns for a value of ``--phase2``.

    ``exits`` alternates gates and exit heads under a frozen backbone (what the original's code
    did, and JEI-DNN: arXiv 2310.09163). ``backbone`` keeps the exit heads fixed and trains the
    backbone with its final head (what the original's README said); the gates take turns with it
    there, because a gate that never learns decides nothing. ``joint`` trains all at every step.
    """
    if phase2 not in TURNS:
        raise ValueError(f"unknown phase2 {phase2!r}; expected one of {', '.join(TURNS)}")
    return TURNS[phase2]


def phases_with_parameters(
    model: nn.Module, phases: Iterable[Phase], *, frozen_exits: Iterable[int] = ()
) -> tuple[Phase, ...]:
    """Those of ``phases`` in which something can learn.

    With frozen heads only the gates are left; gates without parameters have no phase of their own.
    """
    frozen = tuple(f"exit_heads.{int(index)}." for index in frozen_exits)
    present = {part for part, name, _ in named_parts(model) if not name.startswith(frozen)}
    return tuple(phase for phase in phases if TRAINED[phase] & present)


def named_parts(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield ``(part, name, parameter)``; part is ``heads``, ``gates`` or ``backbone``.

    Raises:
        ValueError: a parameter belongs to none of the three.
    """
    prefixes = {"exit_heads.": "heads", "gates.": "gates", "backbone.": "backbone"}
    for name, parameter in model.named_parameters():
        for prefix, part in prefixes.items():
            if name.startswith(prefix):
                yield part, name, parameter
                break
        else:
            raise ValueError(
                f"parameter {name!r} is in no part of the model; expected a name that starts "
                f"with one of {', '.join(prefixes)}"
            )


def set_phase(
    model: nn.Module, phase: Phase, *, frozen_exits: Iterable[int] = ()
) -> list[nn.Parameter]:
    """Let exactly the parameters of ``phase`` learn.

    Every gradient is dropped (``None``, not zero): an optimizer skips a parameter without a
    gradient altogether, weight decay and momentum included, so what does not learn stays
    bit-identical. The model goes to ``eval()``, the backbone to ``train()`` where it learns.

    Args:
        model: with ``backbone``, ``exit_heads`` and ``gates``.
        frozen_exits: numbers ``0..G-1`` of exit heads that do not learn in any phase.

    Returns:
        The parameters that learn now, in the order of ``model.named_parameters()``.
    """
    frozen = tuple(f"exit_heads.{int(index)}." for index in frozen_exits)
    trained = []
    for part, name, parameter in named_parts(model):
        learns = part in TRAINED[phase] and not name.startswith(frozen)
        parameter.requires_grad_(learns)
        parameter.grad = None
        if learns:
            trained.append(parameter)
    model.eval()
    if "backbone" in TRAINED[phase]:
        model.backbone.train()
    return trained


def optimizer_groups(model: nn.Module, *, lr: float, gate_lr: float | None = None) -> list[dict]:
    """Parameter groups with a learning rate of their own for the gates.

    A gate has five parameters: in a short run it needs larger steps than a head to get anywhere.

    Args:
        gate_lr: learning rate of the gates; ``lr`` if None.
    """
    parts: dict[str, list[nn.Parameter]] = {"backbone": [], "heads": [], "gates": []}
    for part, _, parameter in named_parts(model):
        parts[part].append(parameter)
    rates = {"gates": lr if gate_lr is None else gate_lr}
    return [
        {"params": parameters, "lr": rates.get(part, lr), "name": part}
        for part, parameters in parts.items()
        if parameters
    ]


def forget_momentum(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Drop what ``optimizer`` remembers of ``parameters``, for weights that were put back."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


class Alternation:
    """The phase of every step of phase 2, from one counter that runs over all epochs.

    Each phase lasts ``bilevel_batch_count`` steps, the first of ``phases`` begins. The counter
    is global on purpose: when it restarts with every epoch, a loader that is shorter than one
    turn never leaves the first phase.

    Args:
        bilevel_batch_count: steps in one turn, at least 1.
        phases: one or more phases, in the order of their turns.
    """

    def __init__(
        self,
        bilevel_batch_count: int,
        *,
        phases: Sequence[Phase] = TURNS["exits"],
    ):
        if bilevel_batch_count < 1:
            raise ValueError(f"bilevel_batch_count is {bilevel_batch_count}; expected 1 or more")
        if not phases:
            raise ValueError("no phases to alternate; expected one or more")
        self.bilevel_batch_count = int(bilevel_batch_count)
        self.phases = tuple(Phase(phase) for phase in phases)
        self.step = 0  # steps finished

    def phase_at(self, step: int) -> Phase:
        """The phase of the step with number ``step``, counted from 0."""
        return self.phases[(step // self.bilevel_batch_count) % len(self.phases)]

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return self.phase_at(self.step)

    def advance(self) -> None:
        """One step is finished."""
        self.step += 1

    def state_dict(self) -> dict:
        """Plain JSON, enough to go on exactly here."""
        return {
            "step": self.step,
            "bilevel_batch_count": self.bilevel_batch_count,
            "phases": [phase.value for phase in self.phases],
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where ``state`` was taken.

        Raises:
            ValueError: the state is that of another schedule.
        """
        mine = self.state_dict()
        for key in ("bilevel_batch_count", "phases"):
            if state[key] != mine[key]:
                raise ValueError(
                    f"the saved alternation has {key} {state[key]!r}; expected {mine[key]!r}"
                )
        self.step = int(state["step"])
