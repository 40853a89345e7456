"""NumPy float64 truth for every function that the two adapters share, and what to call it with.

``CASES`` is plain data: both frameworks get the same arrays from one ``.npz`` file, and
``reference`` computes value and gradient here, the gradient by central differences.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

RNG = np.random.default_rng(20)
N, C = 6, 5
LOGITS, TEACHER = 2 * RNG.normal(size=(2, N, C))
SOFT = RNG.dirichlet(np.ones(C), size=N)
LABELS = RNG.integers(C, size=N)
CLASS_WEIGHTS = RNG.uniform(0.5, 2.0, size=C)
IMAGES = RNG.normal(size=(4, 3, 5, 6))
PERMUTATION = np.array([2, 0, 3, 1])
PIXELS = RNG.integers(256, size=(2, 4, 5, 3), dtype=np.uint8)


def log_softmax(x):
    shifted = x - x.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def kd_kl(student, teacher, *, temperature):
    log_p, log_q = log_softmax(student / temperature), log_softmax(teacher / temperature)
    return temperature**2 * np.mean(np.sum(np.exp(log_q) * (log_q - log_p), axis=1))


def soft_cross_entropy(logits, targets):
    return -np.mean(np.sum(targets * log_softmax(logits), axis=1))


def mse_logits(student, teacher):
    return np.mean((student - teacher) ** 2)


def js_divergence(student, teacher):
    p, q = np.exp(log_softmax(student)), np.exp(log_softmax(teacher))
    m = (p + q) / 2
    return np.mean(np.sum(p * np.log(p / m) + q * np.log(q / m), axis=1)) / 2


def label_smoothing_cross_entropy(logits, labels, *, smoothing):
    targets = (1 - smoothing) * np.eye(C)[labels] + smoothing / C
    return soft_cross_entropy(logits, targets)


def cross_entropy(logits, labels, *, class_weights=None):
    losses = -log_softmax(logits)[np.arange(len(labels)), labels]
    weights = np.ones(C) if class_weights is None else class_weights
    return np.average(losses, weights=weights[labels])


def one_hot(labels, *, num_classes, smoothing=0.0):
    return (1 - smoothing) * np.eye(num_classes)[labels] + smoothing / num_classes


def mix(values, *, lam, permutation):
    return lam * values + (1 - lam) * values[permutation]


def cutmix(images, *, box, permutation):
    top, left, bottom, right = box
    out = images.copy()
    out[:, :, top:bottom, left:right] = images[permutation][:, :, top:bottom, left:right]
    return out


def normalise(pixels, *, mean, std):
    return ((pixels / 255.0 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)


@dataclass(frozen=True)
class Case:
    """One call: ``module.function(*args, **kwargs)``; arrays in ``kwargs`` become tensors."""

    function: str
    truth: Any
    args: tuple[np.ndarray, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    construct: bool = False  # a class: kwargs make the object, args call it

    @property
    def differentiable(self) -> bool:
        return self.args[0].dtype.kind == "f"


def cases() -> dict[str, Case]:
    """All calls, by a name that is a valid ``.npz`` key."""
    pair, mixed = (LOGITS, TEACHER), {"lam": 0.3, "permutation": PERMUTATION}
    table = [
        *(Case("losses.kd_kl", kd_kl, pair, {"temperature": t}) for t in (1.0, 4.0, 20.0)),
        Case("losses.kd_kl", kd_kl, (10 * LOGITS, 10 * TEACHER), {"temperature": 1.0}),
        Case("losses.soft_cross_entropy", soft_cross_entropy, (LOGITS, SOFT)),
        Case("losses.mse_logits", mse_logits, pair),
        Case("losses.js_divergence", js_divergence, pair),
        *(
            Case(
                "losses.label_smoothing_cross_entropy",
                label_smoothing_cross_entropy,
                (LOGITS, LABELS),
                {"smoothing": s},
            )
            for s in (0.0, 0.1)
        ),
        Case("losses.cross_entropy", cross_entropy, (LOGITS, LABELS)),
        Case(
            "losses.cross_entropy",
            cross_entropy,
            (LOGITS, LABELS),
            {"class_weights": CLASS_WEIGHTS},
        ),
        Case("mixing.one_hot", one_hot, (LABELS,), {"num_classes": C, "smoothing": 0.1}),
        Case("mixing.mix_targets", mix, (SOFT[:4],), mixed),
        Case("mixing.mixup", mix, (IMAGES,), mixed),
        Case("mixing.cutmix", cutmix, (IMAGES,), {"box": (1, 2, 4, 6), "permutation": PERMUTATION}),
        Case(
            "data.Normalizer",
            normalise,
            (PIXELS,),
            {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
            construct=True,
        ),
    ]
    return {f"{number}-{case.function}": case for number, case in enumerate(table)}


def weights_like(value: np.ndarray) -> np.ndarray:
    """Fixed weights that make a number of an array, so that it has one gradient."""
    return np.cos(np.arange(value.size)).reshape(value.shape)


def reference(case: Case) -> tuple[np.ndarray, np.ndarray | None]:
    """Value, and gradient of the (weighted) sum with respect to the first argument."""
    value = np.asarray(case.truth(*case.args, **case.kwargs))
    if not case.differentiable:
        return value, None
    weights = weights_like(value) if value.ndim else 1.0
    first = case.args[0]
    gradient = np.zeros_like(first)
    for place in np.ndindex(first.shape):
        ends = []
        for sign in (1, -1):
            moved = first.copy()
            moved[place] += sign * 1e-5
            ends.append(np.sum(weights * case.truth(moved, *case.args[1:], **case.kwargs)))
        gradient[place] = (ends[0] - ends[1]) / 2e-5
    return value, gradient
