"""int8 under a contract: faster on this machine, and no less accurate than was allowed.

Layers that int8 harms most go back to float, by measurement, until the accuracy holds; where it
never does, or where the file is not faster here, int8 is refused with the numbers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.checkpoints.errors import first_few
from shared_core.deploy.latency import measure_latency
from shared_core.deploy.quantize import BATCH, Quantizer
from shared_core.deploy.segments import answers_of, full_pass, inputs_of
from shared_core.deploy.session import open_session

Array = npt.NDArray[Any]
Files = Sequence[Path]
Judge = Callable[[list[Path]], float]
PROBES = 32  # images that a layer's sensitivity is measured on


@dataclass(frozen=True)
class Int8Result:
    """What became of int8.

    Attributes:
        kept: whether the file was written.
        reason: why not, a clause with the numbers; empty when it was.
        float_score, int8_score: of the judge, fractions.
        max_accuracy_loss: what the difference may be.
        layers: how many layers compute in int8.
        kept_float: names of those that do not; of a chain with the number of the segment.
        latency: by ``float`` and ``int8`` and batch size, see ``measure_latency``.
        speedup: the least over the batch sizes, on the CPU's clock; above 1 is faster.
        float_bytes, int8_bytes: of the files.
    """

    kept: bool
    reason: str
    float_score: float
    int8_score: float
    max_accuracy_loss: float
    layers: int
    kept_float: tuple[str, ...]
    latency: dict[str, Any] = field(default_factory=dict)
    speedup: float = 0.0
    float_bytes: int = 0
    int8_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "kept_float": list(self.kept_float)}

    def line(self) -> str:
        """For people, on one line."""
        names = first_few(list(self.kept_float))
        text = (
            f"{self.layers} layers"
            + (f", {len(self.kept_float)} stay float ({names})" if names else "")
            + f"; {self.float_bytes / 1e6:.2f} -> {self.int8_bytes / 1e6:.2f} MB, "
            f"{self.speedup:.2f} times as fast here, judged {self.float_score:.4f} -> "
            f"{self.int8_score:.4f}"
        )
        return f"int8 kept: {text}" if self.kept else f"int8 refused: {self.reason} ({text})"


@dataclass(frozen=True)
class _Trial:
    """One way to make the files int8."""

    kept_float: frozenset[tuple[int, str]]  # segment, layer
    glue: bool


class _Candidates:
    """The files in float, and any way to make their layers int8."""

    def __init__(self, sources: Files, images: Array, settings: dict[str, Any]) -> None:
        self.sources = list(sources)
        sessions = [open_session(path) for path in sources]
        feeds: list[list[Array]] = [[] for _ in sources]
        for start in range(0, len(images), BATCH):
            for feed, value in zip(
                feeds, inputs_of(sessions, images[start : start + BATCH]), strict=True
            ):
                feed.append(value)
        self.parts = [
            Quantizer(path, feed, **settings) for path, feed in zip(sources, feeds, strict=True)
        ]
        self.layers = [(n, name) for n, part in enumerate(self.parts) for name in part.layers]

    def write(self, trial: _Trial, targets: Files) -> None:
        for number, (part, target) in enumerate(zip(self.parts, targets, strict=True)):
            kept = [name for n, name in trial.kept_float if n == number]
            part.write(target, keep_float=kept, glue=trial.glue)

    def most_sensitive_first(self, images: Array, folder: Path) -> list[tuple[int, str]]:
        """Layers by how far int8 in them alone moves the answers: total variation, summed."""
        sessions = [open_session(path) for path in self.sources]
        exact = answers_of(full_pass(sessions, images))
        moved = {}
        for number, name in self.layers:
            others = [other for other in self.parts[number].layers if other != name]
            path = folder / "one.onnx"
            self.parts[number].write(path, keep_float=others, glue=False)
            alone = [*sessions[:number], open_session(path), *sessions[number + 1 :]]
            rounded = answers_of(full_pass(alone, images))
            moved[number, name] = float(np.abs(rounded - exact).sum())
        return sorted(self.layers, key=lambda layer: -moved[layer])


def quantize_within(
    sources: str | Path | Files,
    targets: str | Path | Files,
    images: Array,
    *,
    judge: Judge,
    max_accuracy_loss: float = 0.01,
    min_speedup: float | None = 1.0,
    batches: Sequence[int] = (1, 16),
    **settings: Any,
) -> Int8Result:
    """Write int8 files if they keep the contract, else none.

    Args:
        sources: wrapped float ONNX files: one, or the segments of a chain.
        targets: as many files to write.
        images: uint8 ``(N, H, W, 3)`` that fix the ranges; none of what the judge or a test sees.
        judge: files in the order of ``sources`` to a score, higher is better: accuracy on labelled
            images, agreement with the float file, mean cosine.
        max_accuracy_loss: most that the score may fall by.
        min_speedup: how many times as fast the file must be at every batch size, on this machine's
            CPU; above it, not equal. None does not ask.
        batches: sizes to time.
        settings: ``scheme``, ``method``, ``quantize_bias``, ``glue`` of ``Quantizer``.

    Returns:
        What was found; ``kept`` says whether the targets are there.

    Raises:
        ValueError: no images, or no layer that could become int8.
    """
    floats, finals = _paths(sources), _paths(targets)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tried = [folder / f"{number}.onnx" for number in range(len(floats))]
        candidates = _Candidates(floats, np.asarray(images), settings)
        wanted = judge(floats)

        def score(trial: _Trial) -> float:
            candidates.write(trial, tried)
            return judge(tried)

        def holds(value: float) -> bool:
            return wanted - value <= max_accuracy_loss + 1e-12

        best = _Trial(frozenset(), True)
        got = score(best)
        times = _times(floats, tried, images, batches)
        # A file that is too slow with every layer in int8 is no faster with fewer.
        if not holds(got) and _fast(times, min_speedup):
            best, got = _search(candidates, score, holds, images[:PROBES], folder, best, got)
            candidates.write(best, tried)
            times = _times(floats, tried, images, batches)
        speedup = _speedup(times)
        reasons = []
        if not holds(got):
            reasons.append(
                f"it would lose {wanted - got:.4f} of {wanted:.4f}, allowed {max_accuracy_loss:.4f}"
            )
        if not _fast(times, min_speedup):
            reasons.append(
                f"it is {speedup:.2f} times as fast here, expected more than {min_speedup:.2f}"
            )
        result = Int8Result(
            kept=not reasons,
            reason=" and ".join(reasons),
            float_score=wanted,
            int8_score=got,
            max_accuracy_loss=max_accuracy_loss,
            layers=len(candidates.layers) - len(best.kept_float),
            kept_float=tuple(
                layer if len(floats) == 1 else f"{number}:{layer}"
                for number, layer in candidates.layers
                if (number, layer) in best.kept_float
            ),
            latency=times,
            speedup=speedup,
            float_bytes=sum(path.stat().st_size for path in floats),
            int8_bytes=sum(path.stat().st_size for path in tried),
        )
        if result.kept:
            candidates.write(best, finals)
    return result


def _search(
    candidates: _Candidates,
    score: Callable[[_Trial], float],
    holds: Callable[[float], bool],
    probes: Array,
    folder: Path,
    best: _Trial,
    got: float,
) -> tuple[_Trial, float]:
    """The fewest layers in float that hold, at most half of them; else the best that was seen."""
    seen = {best: got}

    def tried(trial: _Trial) -> float:
        if trial not in seen:
            seen[trial] = score(trial)
        return seen[trial]

    glue = True
    if any(part.has_glue for part in candidates.parts):
        bare = _Trial(frozenset(), False)
        if holds(tried(bare)):
            return bare, seen[bare]
        glue = seen[best] >= seen[bare]
    order = candidates.most_sensitive_first(probes, folder)
    most = len(order) // 2
    low, high = 0, 0  # counts that fail, that hold
    count = 1
    while count <= most and not high:
        if holds(tried(_Trial(frozenset(order[:count]), glue))):
            high = count
        else:
            low, count = count, min(2 * count, most) if count < most else most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if holds(tried(_Trial(frozenset(order[:middle]), glue))):
            high = middle
        else:
            low = middle
    found = _Trial(frozenset(order[:high]), glue) if high else max(seen, key=lambda t: seen[t])
    return found, seen[found]


def _paths(files: str | Path | Files) -> list[Path]:
    return [Path(files)] if isinstance(files, str | Path) else [Path(one) for one in files]


def _times(floats: Files, rounded: Files, images: Array, batches: Sequence[int]) -> dict[str, Any]:
    runs = {}
    for name, files in (("float", floats), ("int8", rounded)):
        sessions = [open_session(path) for path in files]
        runs[name] = lambda batch, sessions=sessions: full_pass(sessions, batch)
    return measure_latency(runs, images, batches=batches)


def _speedup(times: dict[str, Any]) -> float:
    both = [
        (times["float"][size]["cpu_ms"], times["int8"][size]["cpu_ms"]) for size in times["int8"]
    ]
    return float(min(slow / max(fast, 1e-9) for slow, fast in both))


def _fast(times: dict[str, Any], least: float | None) -> bool:
    return least is None or _speedup(times) > least
