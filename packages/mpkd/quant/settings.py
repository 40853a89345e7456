"""How a trained student gets few bits: ``quantization.*`` of the configuration, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpkd.quant.budget import BitPlan
from mpkd.quant.cost import LayerFacts
from mpkd.quant.layers import FLOAT, bits_for

PLAIN = ("ptq", "qat", "brecq")
SEARCHES = ("uniform", "sensitivity", "haq", "sdq", "mixquant")
METHODS = ("none", *PLAIN, *SEARCHES)
FINISHES = ("ptq", "brecq", "qat")
PINNED = 8  # bits of the first and the last layer


@dataclass(frozen=True)
class QuantSettings:
    """Everything that decides the bits and how a network is made from them.

    Attributes:
        method: one of ``METHODS``.
        finish: what makes the network of bits that a search chose: ``auto``, or of ``FINISHES``.
        w_bits, a_bits: 2 to 16, or 32 for none.
        candidates: bits that a search may choose.
        budget_kind, budget: what the bits may cost, see :mod:`mpkd.quant.budget`.
        first_last_8bit: the first and the last layer keep 8 bits.
        epochs: of quantization-aware training.
        symmetric: weights have no offset (at 2 bits: three levels); BRECQ's always have one.
        ranges: how they are found, ``mse`` (the least error) or ``minmax``.
        learned: training moves scales and offsets too, else they stay as they were found.
        bin_strength: of SDQ's regulariser of weights in their bins.
        compare_uniform: a search is compared with uniform bits of no higher cost.
        brecq_steps: of Adam for a block; 20,000 in the paper.
        brecq_learning_rate: 0 is ``20 / steps``, at most 0.1: the paper's 1e-3 at its steps, and
            as far a way in fewer.
        haq_episodes: tries of the agent; 600 in the paper.
        sdq_epochs: of SDQ's search; 0 = as ``epochs``.
        seed: of searches and reconstruction.
    """

    method: str
    finish: str
    w_bits: int
    a_bits: int
    candidates: tuple[int, ...]
    budget_kind: str
    budget: float
    first_last_8bit: bool
    epochs: int
    symmetric: bool
    ranges: str
    learned: bool
    bin_strength: float
    compare_uniform: bool
    brecq_steps: int
    brecq_learning_rate: float
    haq_episodes: int
    sdq_epochs: int
    seed: int = 0

    def __post_init__(self) -> None:
        for key, bits in (("w_bits", self.w_bits), ("a_bits", self.a_bits)):
            if bits != FLOAT and not 2 <= bits <= 16:
                raise ValueError(f"quantization.{key} is {bits}, expected 2 to 16, or 32 for none")
        if self.method in PLAIN and self.finish not in ("auto", self.method):
            raise ValueError(
                f"quantization.finish is {self.finish!r} with method {self.method}: expected "
                "auto, or a method that searches"
            )

    @property
    def pin(self) -> int | None:
        """Bits of the first and the last layer; None: as all."""
        return PINNED if self.first_last_8bit else None

    @property
    def how(self) -> str:
        """The way from bits to a network: the method's own, or the one that was asked for."""
        if self.method in ("none", *PLAIN):
            return self.method
        if self.finish != "auto":
            return self.finish
        return "qat" if self.method in ("haq", "sdq") else "ptq"

    @property
    def search_epochs(self) -> int:
        """Epochs of training that the search itself takes."""
        return (self.sdq_epochs or self.epochs) if self.method == "sdq" else 0

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.how == "qat" or self.method == "sdq"

    def plain_plan(self, facts: Sequence[LayerFacts]) -> BitPlan:
        """The same bits for all layers, but the first and the last."""
        names = [one.name for one in facts]

        def spread(bits: int) -> dict[str, int]:
            return bits_for(names, bits, first_last=None if bits == FLOAT else self.pin)

        return BitPlan(spread(self.w_bits), spread(self.a_bits))


def quant_settings(config: Mapping[str, Any]) -> QuantSettings:
    """``quantization.*`` and the seed, from values by dotted key.

    Raises:
        ValueError: values that do not go together.
    """
    names = (name for name in QuantSettings.__dataclass_fields__ if name != "seed")
    values = {name: config[f"quantization.{name}"] for name in names}
    values["candidates"] = tuple(values["candidates"])
    return QuantSettings(**values, seed=config["experiment.seed"])
