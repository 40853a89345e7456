"""The pictures of an analysis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gfnet_dynn.decide.thresholds import Sweep
from gfnet_dynn.report.run_plots import COLOURS, save_figure


def rules(folder: Path, result: Mapping[str, Any], curves: Mapping[str, Sweep]) -> Path:
    """Test accuracy against mean cost for every rule, each exit alone, and the balanced choices."""
    full = result["full_cost"]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for colour, (kind, curve) in zip(COLOURS, curves.items(), strict=False):
            wide = 2.2 if kind == result["kind"] else 1
            style = "." if kind == "patience" else "-"
            axis.plot(
                curve.cost / full,
                curve.accuracy,
                style,
                ms=9,
                color=colour,
                lw=wide,
                label=f"{kind}, used" if wide > 2 else kind,
            )
            point = result["wishes"][kind]["balanced"]["test"]
            axis.plot(point["cost_fraction"], point["accuracy"], "s", ms=7, color=colour)
        alone = result["exits"]
        axis.plot(
            [row["cost_fraction"] for row in alone],
            [row["test_accuracy"] for row in alone],
            "x--",
            color="#888888",
            label="everybody leaves at one exit",
        )
        axis.plot([], [], "s", color="#444444", label="balanced threshold (calibration data)")
        axis.set(
            xlabel="mean cost, share of a full run's MACs", ylabel="test accuracy", xlim=(0, 1.02)
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)

    return save_figure(folder, "rules", draw, size=(7.5, 4.8))


def budget_curves(folder: Path, result: Mapping[str, Any]) -> Path:
    """Budgets asked and spent, and the accuracy that three ways of spending give."""

    def draw(figure: Any) -> None:
        spent, got = figure.subplots(1, 2)
        _asked_and_spent(spent, result)
        _accuracy_for_cost(got, result)
        for axis in (spent, got):
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)

    return save_figure(folder, "budgets", draw, size=(10.5, 4.4))


def _solved(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in result["budgets"] if row["threshold"] is not None]


def _asked_and_spent(spent: Any, result: Mapping[str, Any]) -> None:
    """Of every rule."""
    for colour, name in zip(COLOURS, result["sweeps"], strict=False):
        rows = [row for row in _solved(result) if row["kind"] == name]
        spent.plot(
            [row["budget"] for row in rows],
            [row["test"]["cost_fraction"] for row in rows],
            "o-",
            ms=4,
            lw=2 if name == result["kind"] else 0.8,
            color=colour,
            label=name,
        )
    limits = [row["budget"] for row in result["budgets"]]
    spent.plot([0, max(limits)], [0, max(limits)], "--", color="#888888", lw=1, zorder=0)
    spent.set(
        title="solver: asked and spent",
        xlabel="mean cost allowed, calibration data",
        ylabel="mean cost on the test split",
    )


def _accuracy_for_cost(got: Any, result: Mapping[str, Any]) -> None:
    """Of the run's own rule."""
    kind, full = result["kind"], result["full_cost"]
    batch = sorted(result["budgeted_batch"][kind], key=lambda row: row["cost"])
    got.plot(
        [row["cost"] / full for row in batch],
        [row["accuracy"] for row in batch],
        "-",
        color=COLOURS[6],
        label="budgeted batch, thresholds by exit",
    )
    mine = [row["test"] for row in _solved(result) if row["kind"] == kind]
    got.plot(
        [row["cost_fraction"] for row in mine],
        [row["accuracy"] for row in mine],
        "o",
        color=COLOURS[0],
        label="one threshold, solved for the cost",
    )
    if result["placement"]:
        most = max(row["max_exits"] for row in result["placement"])
        best = [
            row["test"]
            for row in result["placement"]
            if row["blocks"] is not None and row["max_exits"] == most
        ]
        got.plot(
            [row["cost_fraction"] for row in best],
            [row["accuracy"] for row in best],
            "^",
            fillstyle="none",
            ms=9,
            color=COLOURS[1],
            label="useful exits only",
        )
    got.set(title=f"rule: {kind}", xlabel="mean cost on the test split", ylabel="test accuracy")


def conformal_sets(folder: Path, result: Mapping[str, Any]) -> Path:
    """Coverage against its promise and mean set size, by family and alpha, on the test split."""
    alphas = sorted({row["alpha"] for row in result["conformal"]})
    families = list(dict.fromkeys(row["family"] for row in result["conformal"]))
    by_place = {(row["alpha"], row["family"]): row for row in result["conformal"]}

    def draw(figure: Any) -> None:
        covered, size = figure.subplots(1, 2)
        width = 0.8 / len(families)
        x = np.arange(len(alphas))
        for number, (colour, family) in enumerate(zip(COLOURS, families, strict=False)):
            rows = [by_place[alpha, family] for alpha in alphas]
            place = x + (number - (len(families) - 1) / 2) * width
            covered.bar(place, [row["coverage"] for row in rows], width, color=colour, label=family)
            size.bar(place, [row["mean_set_size"] for row in rows], width, color=colour)
        for place, alpha in zip(x, alphas, strict=True):
            covered.plot([place - 0.45, place + 0.45], [1 - alpha] * 2, "--", color="#222222")
        covered.plot([], [], "--", color="#222222", label="promised")
        low = min([row["coverage"] for row in result["conformal"]] + [1 - max(alphas)])
        covered.set(title="coverage on the test split", ylim=(max(0, low - 0.08), 1.005))
        size.set(title=f"mean set size, of {result['num_classes']} classes")
        for axis in (covered, size):
            axis.set_xticks(x, [f"alpha {alpha:g}" for alpha in alphas])
            axis.grid(alpha=0.3, axis="y")
        figure.legend(loc="outside lower center", ncols=len(families) + 1, fontsize=8)

    return save_figure(folder, "conformal", draw, size=(10, 4))


def risk_control(folder: Path, result: Mapping[str, Any], *, confidence: float) -> Path:
    """Risk taken and MACs spent at each promised level, by rule, on the test split."""
    rows = result["risk"]
    levels = sorted({row["level"] for row in rows})
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    by_place = {(row["level"], row["kind"]): row for row in rows}

    def draw(figure: Any) -> None:
        taken, cost = figure.subplots(1, 2)
        width = 0.8 / len(kinds)
        x = np.arange(len(levels))
        for number, (colour, kind) in enumerate(zip(COLOURS, kinds, strict=False)):
            place = x + (number - (len(kinds) - 1) / 2) * width
            chosen = [by_place[level, kind] for level in levels]
            taken.bar(place, [row["test_risk"] for row in chosen], width, color=colour, label=kind)
            cost.bar(place, [row["test"]["cost_fraction"] for row in chosen], width, color=colour)
        for place, level in zip(x, levels, strict=True):
            taken.plot([place - 0.45, place + 0.45], [level] * 2, "--", color="#222222")
        taken.plot([], [], "--", color="#222222", label=f"allowed ({confidence:g} sure)")
        taken.set(title="right answers lost by leaving, test split")
        cost.set(title="mean cost, share of a full run", ylim=(0, 1.05))
        for axis in (taken, cost):
            axis.set_xticks(x, [f"level {level:g}" for level in levels])
            axis.grid(alpha=0.3, axis="y")
        figure.legend(loc="outside lower center", ncols=len(kinds) + 1, fontsize=8)

    return save_figure(folder, "risk", draw, size=(10, 4))
