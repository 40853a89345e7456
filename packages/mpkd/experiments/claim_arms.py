"""What is compared: the ways to a student (arms), and which pairs of them each claim is about.

Every claim is a paper's, tried at a scale that a CPU can do. Two arms of a pair differ in the one
thing that the claim is about: same seed, same start, same images, same cost of the bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FP32 = "fp32"  # the student that the others are compared with, or made from
BUDGET = 3.0  # bits a weight on average, first and last layer counted
EQUAL = 0.02  # accuracies closer than this are called equal
STEPS = 300  # of a block's reconstruction; the paper has 20,000


@dataclass(frozen=True)
class Arm:
    """One way to a student.

    Attributes:
        kind: ``train`` (from scratch, unquantized), ``scratch`` (from scratch, with few bits),
            ``quantize`` (the fp32 student gets few bits).
        changes: keys of the configuration, and of :func:`mpkd.quant.stage.run_quantization`.
    """

    kind: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """``a`` against ``b``.

    Attributes:
        claimed: the claim is about it; else it is a control and only shown.
        least: mean of ``a - b`` that the claim speaks of, beside being more than nothing.
    """

    a: str
    b: str
    claimed: bool = True
    least: float = 0.0


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, and how it is tried.

    Attributes:
        says: the sentence.
        source: where it is from.
        pairs: what is compared.
        equal: the claim is that both arms of a pair are equally good.
        gap: an arm ``b`` falls short of fp32; ``a`` is claimed to close most of that.
    """

    says: str
    source: str
    pairs: tuple[Pair, ...]
    equal: bool = False
    gap: bool = False

    def arms(self) -> list[str]:
        """Names, each once, the fp32 student first."""
        return list(dict.fromkeys([FP32, *(n for pair in self.pairs for n in (pair.b, pair.a))]))


def _amp(dtype: str) -> Arm:
    return Arm("train", {"mixed_precision.enabled": True, "mixed_precision.dtype": dtype})


def _bits(kind: str, method: str, w: int, a: int, **more: Any) -> Arm:
    """An arm with bits for weights and inputs; ``more`` are keys, ``__`` for the point."""
    keys = {"quantization.method": method, "quantization.w_bits": w, "quantization.a_bits": a}
    return Arm(kind, keys | {key.replace("__", "."): value for key, value in more.items()})


def _learns_from(teacher: float | None) -> dict[str, Any]:
    """Labels (None), or the teacher alone at a temperature."""
    if teacher is None:
        return {"distillation__mode": "labels"}
    return {"distillation__mode": "teacher_only", "distillation__temperature": teacher}


def _post_training() -> dict[str, Arm]:
    arms = {}
    for bits, inputs in ((4, 32), (3, 32), (2, 32), (2, 4)):
        name = f"W{bits}A{inputs}"
        arms[f"nearest {name}"] = _bits(
            "quantize", "ptq", bits, inputs, quantization__symmetric=False
        )
        arms[f"BRECQ {name}"] = _bits(
            "quantize", "brecq", bits, inputs, quantization__brecq_steps=STEPS
        )
    return arms


TRIED = {"W2A4": (1.0, 2.0, 4.0, 8.0), "W4A4": (1.0,)}  # temperatures


def _trained_on() -> dict[str, Arm]:
    arms = {}
    for name, w, a in (("W2A2", 2, 2), ("W2A4", 2, 4), ("W4A4", 4, 4), ("W8A8", 8, 8)):
        if name != "W8A8":
            arms[f"QAT {name}, labels"] = _bits("quantize", "qat", w, a, **_learns_from(None))
        for temperature in TRIED.get(name, (1.0, 4.0)):
            arms[f"QAT {name}, teacher at T={temperature:g}"] = _bits(
                "quantize", "qat", w, a, **_learns_from(temperature)
            )
    return arms


def _apprentices() -> dict[str, Arm]:
    found = {"scratch W2A4, labels": _bits("scratch", "qat", 2, 4, **_learns_from(None))}
    for scheme, kind in (("a", "scratch"), ("b", "scratch"), ("c", "quantize")):
        mode = f"apprentice_{scheme}"
        found[f"scheme {scheme.upper()} W2A4"] = _bits(kind, "qat", 2, 4, distillation__mode=mode)
    return found


SEARCHES = ("uniform", "sensitivity", "haq", "sdq", "mixquant")
SHOWN = {"uniform": "uniform 3 bits", "haq": "HAQ", "sdq": "SDQ", "mixquant": "MixQuant"}


def _searched() -> dict[str, Arm]:
    """Bits chosen under one budget, and uniform ones; finished in the same way."""
    arms = {}
    budget = {
        "quantization__budget_kind": "size", "quantization__budget": BUDGET,
        "quantization__first_last_8bit": False, "quantization__compare_uniform": False,
        "quantization__brecq_steps": STEPS, "quantization__haq_episodes": 150,
    }  # fmt: skip
    for method in SEARCHES:
        for finish in ("ptq", "brecq", "qat"):
            if (finish == "brecq" and method not in ("uniform", "mixquant")) or (
                finish != "qat" and method == "sdq"  # its weights are trained anyway
            ):
                continue
            name = f"{SHOWN.get(method, method)}, {finish.upper()}"
            arms[name] = _bits(
                "quantize", method, 3, 8, quantization__finish=finish, **budget,
                **_learns_from(1.0),
            )  # fmt: skip
    # SDQ trains while it searches: uniform bits that were trained as long.
    uniform = arms["uniform 3 bits, QAT"].changes
    arms["uniform 3 bits, QAT twice as long"] = Arm(
        "quantize", {**uniform, "quantization.epochs": 2.0}
    )
    return arms


def _ranges() -> dict[str, Arm]:
    """Every layer with few bits, so that the first one has inputs of both signs (an offset)."""
    arms = {}
    for name, bits in (("W4A4", 4), ("W3A3", 3), ("W2A2", 2)):
        for said, ranges, learned in (
            ("learned", "mse", True),
            ("learned from min-max", "minmax", True),
            ("fixed min-max", "minmax", False),
            ("fixed least error", "mse", False),
        ):
            arms[f"{said} {name}"] = _bits(
                "quantize", "qat", bits, bits, quantization__first_last_8bit=False,
                quantization__ranges=ranges, quantization__learned=learned, **_learns_from(1.0),
            )  # fmt: skip
    return arms


ARMS: dict[str, Arm] = {
    FP32: Arm("train", {"mixed_precision.enabled": False}),
    "bf16": _amp("bf16"),
    "fp16": _amp("fp16"),
    **_post_training(),
    **_trained_on(),
    **_apprentices(),
    **_searched(),
    **_ranges(),
}


def _against(uniform: str, *names: str) -> tuple[Pair, ...]:
    return tuple(Pair(name, f"{uniform}, {name.rpartition(', ')[2]}") for name in names)


CLAIMS: dict[str, Claim] = {
    "precision": Claim(
        "training in mixed precision reaches what fp32 reaches",
        "Mixed Precision Training, arXiv:1710.03740",
        (Pair("bf16", FP32), Pair("fp16", FP32)),
        equal=True,
    ),
    "brecq": Claim(
        "reconstructing blocks keeps at 2 bits what rounding to the nearest loses",
        "BRECQ, arXiv:2102.05426",
        tuple(
            Pair(f"BRECQ {n}", f"nearest {n}", least=0.1 if n.startswith("W2") else 0.0)
            for n in ("W4A32", "W3A32", "W2A32", "W2A4")
        ),
    ),
    "kd": Claim(
        "the teacher closes most of the gap that few bits leave when labels train them",
        "Apprentice, arXiv:1711.05852",
        tuple(
            Pair(f"QAT {n}, teacher at T=1", f"QAT {n}, labels") for n in ("W4A4", "W2A4", "W2A2")
        ),
        gap=True,
    ),
    "apprentice": Claim(
        "each of the schemes A, B and C is better than the few bits alone",
        "Apprentice, arXiv:1711.05852",
        (
            Pair("scheme A W2A4", "scratch W2A4, labels"),
            Pair("scheme B W2A4", "scratch W2A4, labels"),
            Pair("scheme C W2A4", "QAT W2A4, labels"),
        ),
    ),
    "temperature": Claim(
        "a high temperature hurts students of few bits: unsoftened logits work best",
        "Apprentice, arXiv:1711.05852",
        (
            *(
                Pair("QAT W2A4, teacher at T=1", f"QAT W2A4, teacher at T={t}", claimed=t > 2)
                for t in (2, 4, 8)
            ),
            Pair("QAT W2A2, teacher at T=1", "QAT W2A2, teacher at T=4"),
            Pair("QAT W8A8, teacher at T=1", "QAT W8A8, teacher at T=4", claimed=False),
        ),
    ),
    "sensitivity": Claim(
        "bits by sensitivity and integer programme are better than uniform ones of no lower cost",
        "BRECQ, arXiv:2102.05426, section 3.4",
        _against("uniform 3 bits", "sensitivity, PTQ", "sensitivity, QAT"),
    ),
    "haq": Claim(
        "bits that an agent chooses are better than uniform ones of no lower cost",
        "HAQ, arXiv:1811.08886",
        _against("uniform 3 bits", "HAQ, PTQ", "HAQ, QAT"),
    ),
    "sdq": Claim(
        "bits that are learned are better than uniform ones of no lower cost",
        "SDQ, arXiv:2206.04459",
        (Pair("SDQ, QAT", "uniform 3 bits, QAT twice as long"),),
    ),
    "mixquant": Claim(
        "bits by round-off error are better than uniform ones, BRECQ's too",
        "MixQuant, arXiv:2309.17341",
        _against("uniform 3 bits", "MixQuant, PTQ", "MixQuant, BRECQ", "MixQuant, QAT"),
    ),
    "ranges": Claim(
        "learned scales and offsets are better than fixed min-max ranges",
        "LSQ+, arXiv:2004.09576",
        tuple(
            pair
            for n in ("W4A4", "W3A3", "W2A2")
            for pair in (
                Pair(f"learned {n}", f"fixed min-max {n}"),
                Pair(f"learned from min-max {n}", f"fixed min-max {n}"),
                Pair(f"learned {n}", f"fixed least error {n}", claimed=False),
            )
        ),
    ),
}  # fmt: skip

DECIDED = sorted({key for arm in ARMS.values() for key in arm.changes})  # by the arms alone


def arms_of(claims: list[str]) -> list[str]:
    """The arms of these claims, each once, in the order of ``ARMS``: fp32 before its kin."""
    wanted = {name for claim in claims for name in CLAIMS[claim].arms()}
    return [name for name in ARMS if name in wanted]
