"""Draw docs/overview.svg, the picture of the README: the chain, the five projects, the core.

``.venv/bin/python tools/draw_overview.py`` writes it; ``--output x.png`` makes a bitmap to look at.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]

# The links of the chain: title and what each one is.
CHAIN = (
    ("data", "images in\nclass folders"),
    ("teacher", "a large network\nthat knows the task"),
    ("student", "a small network\nthat learns from it"),
    ("exits", "easy images\nleave early"),
    ("record", "what was measured,\non which data"),
)
# Project, framework and subject, the links it covers.
PROJECTS = (
    ("gfnet_dynn", "torch · remote sensing", (0, 1, 2, 3, 4)),
    ("landmark_distill", "torch · landmarks", (0, 1, 2, 4)),
    ("visiondistill_gc", "Paddle · garbage sorting", (0, 1, 2, 4)),
    ("torch_cls_zoo", "torch · many networks", (0, 1, 2, 4)),
    ("mpkd", "torch · low precision", (0, 1, 2, 4)),
)
BUILT = {"gfnet_dynn", "landmark_distill", "visiondistill_gc", "torch_cls_zoo", "mpkd"}
CORE = (
    ("datasets", "scan, check, split, decode"),
    ("knowledge", "teacher outputs on disk"),
    ("checkpoints", "weights and facts, safely"),
    ("metrics", "accuracy, calibration, cost"),
    ("runs", "seeds, logs, records"),
)

INK, SOFT, PALE, BLUE, TINT = "#1c2733", "#5b6875", "#d5dce3", "#1f6f8b", "#e3f0f4"
LEFT, STEP, WIDTH = 2.35, 1.66, 1.38  # inches: names, from column to column, box
SIZE = (10.8, 6.2)  # inches


def draw(output: Path) -> None:
    """Write the picture; its format is that of the file's ending."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    plt.rcParams.update({"font.family": "DejaVu Sans", "svg.hashsalt": "overview"})
    figure = plt.figure(figsize=SIZE)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, SIZE[0]), ylim=(0, SIZE[1]))
    axes.set_axis_off()

    def box(x: float, y: float, width: float, height: float, *, fill: str, edge: str) -> None:
        style = "round,pad=0,rounding_size=0.08"
        axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.2
            )
        )

    def text(x: float, y: float, words: str, **options: object) -> None:
        settings = {"ha": "center", "va": "center", "color": INK, "fontsize": 9, **options}
        axes.text(x, y, words, **settings)

    columns = [LEFT + STEP * index + WIDTH / 2 for index in range(len(CHAIN))]

    # The chain.
    text(0.25, 5.42, "the chain", ha="left", fontsize=11, fontweight="bold", color=BLUE)
    for index, (x, (title, words)) in enumerate(zip(columns, CHAIN, strict=True)):
        box(x - WIDTH / 2, 4.92, WIDTH, 1.0, fill=TINT, edge=BLUE)
        text(x, 5.68, title, fontsize=11.5, fontweight="bold")
        for y, line in zip((5.32, 5.15), words.splitlines(), strict=True):
            text(x, y, line, fontsize=8.2, va="baseline")
        if index:
            start, end = columns[index - 1] + WIDTH / 2 + 0.02, x - WIDTH / 2 - 0.02
            axes.annotate(
                "", xy=(end, 5.42), xytext=(start, 5.42),
                arrowprops={"arrowstyle": "-|>", "color": BLUE, "linewidth": 1.6, "shrinkA": 0,
                            "shrinkB": 0, "mutation_scale": 13},
            )  # fmt: skip

    # The projects: a dot under every link that a project covers.
    top, row = 4.42, 0.5
    for number, (name, words, links) in enumerate(PROJECTS):
        y = top - row * number
        axes.plot([0.25, SIZE[0] - 0.25], [y - row / 2] * 2, color=PALE, linewidth=0.8)
        text(0.25, y + 0.09, name, ha="left", fontsize=10, fontweight="bold")
        text(0.25, y - 0.12, words, ha="left", fontsize=8, color=SOFT)
        for link in links:
            fill = BLUE if name in BUILT else "white"
            axes.plot(columns[link], y, "o", markersize=10, markerfacecolor=fill,
                      markeredgecolor=BLUE, markeredgewidth=1.4)  # fmt: skip
    text(SIZE[0] - 0.25, 1.93, "●  built      ○  planned", ha="right", fontsize=8, color=SOFT)

    # The core, under everything.
    box(0.25, 0.3, SIZE[0] - 0.5, 1.36, fill="#f4f6f8", edge=SOFT)
    text(0.42, 1.12, "shared_core", ha="left", fontsize=11, fontweight="bold")
    text(0.42, 0.86, "numpy, OpenCV,\nsafetensors", ha="left", fontsize=8, color=SOFT)
    for x, (title, words) in zip(columns, CORE, strict=True):
        box(x - WIDTH / 2 - 0.08, 0.86, WIDTH + 0.16, 0.62, fill="white", edge=PALE)
        text(x, 1.3, title, fontsize=9.5, fontweight="bold")
        text(x, 1.04, words, fontsize=7, color=SOFT)
    middle = (columns[0] - WIDTH / 2 + columns[-1] + WIDTH / 2) / 2
    text(
        middle, 0.57, "for_torch · for_paddle: the same names on each framework's side",
        fontsize=8.5, color=INK,
    )  # fmt: skip

    output.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if output.suffix == ".svg" else None
    figure.savefig(output, dpi=150, facecolor="white", metadata=metadata)
    plt.close(figure)
    if output.suffix == ".svg":  # matplotlib leaves blanks at the ends of lines
        lines = [line.rstrip() for line in output.read_text(encoding="utf-8").splitlines()]
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Draw to the place named, or to the one the README shows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=REPO / "docs" / "overview.svg")
    args = parser.parse_args(argv)
    draw(args.output)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
