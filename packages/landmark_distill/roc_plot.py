"""The ROC of a verification test: rate against false-accept rate, which spans decades."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from shared_core.checkpoints import atomic_write
from shared_core.metrics import Verification


def plot_roc(
    path: str | Path,
    curves: Mapping[str, Verification],
    *,
    marks: Sequence[float] = (),
    title: str = "Verification",
) -> None:
    """Write the plot as PNG.

    Args:
        curves: name -> rates at many targets; impostors that tie may leave the reached FAR below
            the target, and the reached one is drawn.
        marks: false-accept rates that get a dot.

    Raises:
        ValueError: no curves.
        ImportError: matplotlib is not installed.
    """
    if not curves:
        raise ValueError("ROC: got no curves, expected at least one")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    floor = min(1 / one.impostor for one in curves.values())
    for name, one in curves.items():
        points = sorted(
            (max(float(far), floor / 2), float(rate), target)
            for far, rate, target in zip(one.far, one.rates, one.far_targets, strict=True)
        )
        line = axes.plot([p[0] for p in points], [p[1] for p in points], label=name)[0]
        dots = [p for p in points if any(abs(p[2] - m) <= 1e-9 * m for m in marks)]
        axes.plot([p[0] for p in dots], [p[1] for p in dots], "o", ms=4, color=line.get_color())
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("false accepts / impostor pairs")
    axes.set_ylabel("genuine pairs accepted")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    atomic_write(path, lambda scratch: figure.savefig(scratch, format="png"))
