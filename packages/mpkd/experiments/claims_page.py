"""What the trials say of each claim: means, paired differences, a verdict, a plot, a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpkd.analysis import plots
from mpkd.experiments.bench import Bench, student_parameters
from mpkd.experiments.claim_arms import ARMS, CLAIMS, EQUAL, FP32, Claim, Pair, arms_of
from mpkd.experiments.sweep import SweepOptions, run_sweep, settings_shown
from shared_core.runs import Report
from shared_core.trials import Cell, Difference, Trials, compare, spread, verdict

ACCURACY = "test_accuracy"
SMALLEST_GAP = 0.005  # a gap below half a point is none: its closed share would be noise


def summarise_claims(trials: Trials, claims: Sequence[str]) -> dict[str, Any]:
    """All numbers by arm, and by claim what they say.

    Args:
        trials: results with ``test_accuracy``, ``agreement``, and ``mean_bits`` and ``w_bits``
            where there are bits.
        claims: keys of :data:`mpkd.experiments.claim_arms.CLAIMS`.
    """
    arms: dict[str, Any] = {}
    for name in trials.names:
        rows = trials.rows(name)
        arms[name] = {
            "accuracy": spread(trials.values(name, ACCURACY)),
            "agreement": spread(trials.values(name, "agreement")),
        }
        if "w_bits" in rows[0]:
            arms[name]["mean_bits"] = spread(trials.values(name, "mean_bits"))
            arms[name]["w_bits"] = [dict(row["w_bits"]) for row in rows]
            arms[name]["w_levels"] = [dict(row["w_levels"]) for row in rows]
    return {"arms": arms, "claims": {name: judge(trials, CLAIMS[name]) for name in claims}}


def judge(trials: Trials, claim: Claim) -> dict[str, Any]:
    """The paired differences of a claim, a verdict on each, and one for the whole."""
    pairs = {f"{pair.a} - {pair.b}": _compared(trials, pair, claim) for pair in claim.pairs}
    verdicts = [
        pairs[f"{pair.a} - {pair.b}"]["verdict"] for pair in claim.pairs if pair.claimed
    ]  # fmt: skip
    if all(verdict == "holds" for verdict in verdicts):
        whole = "holds"
    elif any(verdict == "holds" for verdict in verdicts):
        whole = "holds in part"
    elif any(verdict == "contradicted" for verdict in verdicts):
        whole = "contradicted"
    else:
        whole = verdicts[0] if len(set(verdicts)) == 1 else "not shown"
    return {
        "says": claim.says,
        "source": claim.source,
        "verdict": whole,
        "pairs": pairs,
        "text": f"{claim.says} ({claim.source}): {whole}. "
        + "; ".join(f"{name}: {found['text']}" for name, found in pairs.items()),
    }


def _compared(trials: Trials, pair: Pair, claim: Claim) -> dict[str, Any]:
    gap = compare(trials, pair.a, pair.b, ACCURACY)
    plain = gap.plain()
    found: dict[str, Any] = {
        "mean": gap.mean, "values": list(gap.values),
        "interval": None if gap.interval is None
        else {key: plain[key] for key in ("mean", "std", "low", "high", "wins", "n")},
    }  # fmt: skip
    said = gap.text
    if claim.gap:
        full, low, own = (
            spread(trials.values(n, ACCURACY))["mean"] for n in (FP32, pair.b, pair.a)
        )
        share = (own - low) / (full - low) if full - low > SMALLEST_GAP else None
        found |= {"gap": full - low, "closed": share}
        said += f", gap to fp32 {100 * (full - low):.1f} points" + (
            "" if share is None else f", of which {100 * share:.0f} % are closed"
        )
    found["verdict"] = _verdict(gap, found, pair, claim)
    found["text"] = f"{said}: {found['verdict']}" if pair.claimed else f"{said} (control)"
    return found


def _verdict(gap: Difference, found: Mapping[str, Any], pair: Pair, claim: Claim) -> str:
    """The core's verdict, and what is particular to the closing of a gap."""
    word = verdict(gap, least=pair.least, equal_within=EQUAL if claim.equal else None)
    if claim.gap and gap.interval is not None:
        if found["closed"] is None:
            return "no gap to close"
        if word == "holds" and found["closed"] <= 0.5:
            return "less than claimed"
    return word


def draw_claims(folder: Path, claims: Mapping[str, Any]) -> Path:
    """Every paired difference with its interval and its single seeds, a colour a claim."""
    rows = [
        (name, number, pair, found)
        for number, (name, claim) in enumerate(claims.items())
        for pair, found in claim["pairs"].items()
    ]
    figure, (axis,) = plots.new_figure(width=10.0, height=0.27 * len(rows) + 1.2)
    for place, (name, number, _, found) in enumerate(rows):
        colour = plots.COLOURS[number % len(plots.COLOURS)]
        first = place == 0 or rows[place - 1][0] != name
        points = [100 * value for value in found["values"]]
        axis.plot(points, [place] * len(points), "|", color=colour, ms=7)
        if found["interval"] is not None:
            ends = [100 * found["interval"][end] for end in ("low", "high")]
            axis.plot(ends, [place, place], "-", color=colour, lw=1)
        axis.plot(
            [100 * found["mean"]], [place], "o", color=colour, ms=5, label=name if first else None
        )
    axis.axvline(0, color="#6b6b6b", lw=0.8)
    axis.set_xscale("symlog", linthresh=5)
    ticks = (-50, -20, -5, -2, 0, 2, 5, 20, 50)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_yticks(range(len(rows)), [row[2] for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("difference of test accuracy in points, paired by seed; 95 % interval")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=7, loc="best")
    return plots.save(figure, folder / "claims.png")


def write_claims_report(folder: Path, record: Mapping[str, Any], *, line: str) -> None:
    """``report.md`` and ``report.html``."""
    measured, environment = record["measured"], record["environment"]
    report = Report("mpkd: what the papers claim, tried small")
    (report.note if record["data"]["kind"] == "built-in" else report.text)(line)
    teacher = measured["teacher"]
    report.text(
        f"Seeds {', '.join(map(str, record['seeds']))} of the students; the teacher is one "
        f"({teacher['name']}, {100 * teacher['test_accuracy']:.1f} % of the test images, "
        f"{teacher['parameters']:,} parameters; student: {measured['student_parameters']:,}). "
        f"Measured on {environment['gpu'] or environment['cpu']} with torch "
        f"{environment['packages'].get('torch')}, {record['wall_seconds'] / 60:.1f} minutes. "
        f"Command: {record['command']}"
    )
    report.heading("The claims")
    report.text(
        f"A claim holds when the 95 % interval of the difference lies above 0 (for equal ones: "
        f"within {100 * EQUAL:.0f} points); it is contradicted when the interval lies on the "
        "other side; in between nothing was shown, with so few seeds."
    )
    report.table(
        ["claim", "source", "here"],
        [[claim["says"], claim["source"], claim["verdict"]]
         for claim in measured["claims"].values()],
    )  # fmt: skip
    report.figure(draw_claims(folder, measured["claims"]), "Every pair: a - b.")
    for name, claim in measured["claims"].items():
        report.heading(name)
        report.text(f"{claim['says']} ({claim['source']}): {claim['verdict']}.")
        report.table(
            ["pair", "by seed, points", "difference", "verdict"],
            [
                [pair, ", ".join(f"{100 * value:+.1f}" for value in found["values"]),
                 found["text"].rpartition(": ")[0] or found["text"],
                 found["verdict"] if ": " in found["text"] else "control"]
                for pair, found in claim["pairs"].items()
            ],
        )  # fmt: skip
    report.heading("The arms: test accuracy, percent")
    report.table(
        ["arm", "mean", "deviation", "by seed", "agreement with the teacher", "bits a weight"],
        [
            [name, f"{100 * arm['accuracy']['mean']:.1f}",
             None if arm["accuracy"]["std"] is None else f"{100 * arm['accuracy']['std']:.1f}",
             ", ".join(f"{100 * value:.1f}" for value in arm["accuracy"]["values"]),
             f"{100 * arm['agreement']['mean']:.1f}",
             f"{arm['mean_bits']['mean']:.2f}" if "mean_bits" in arm else None]
            for name, arm in measured["arms"].items()
        ],
    )  # fmt: skip
    report.write(folder)


def claim_cells(bench: Bench, arms: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Every arm of a seed, then the next; every student but fp32's kin starts from fp32's."""
    cells = []
    for seed in seeds:
        for name in arms:
            arm = ARMS[name]
            changes = dict(arm.changes)
            if "quantization.epochs" in changes:  # so many times as long
                longer = changes["quantization.epochs"] * bench.config["quantization.epochs"]
                changes["quantization.epochs"] = int(longer)
            if arm.kind == "train":
                changes["distillation.mode"] = "labels"
            needs = FP32 if arm.kind == "quantize" else ""
            cells.append(bench.cell(name, arm.kind, changes, seed=seed, needs=needs))
    return cells


def run_claims(options: SweepOptions, *, claims: Sequence[str]) -> int:
    """Make the students that are missing, compare, write. Returns the exit code."""
    arms = arms_of(list(claims))

    def finish(bench: Bench, teacher: dict[str, Any], trials: Trials) -> dict[str, Any]:
        return {
            **summarise_claims(trials, claims), "teacher": teacher,
            "student_parameters": student_parameters(bench),
            "settings": settings_shown(bench.config),
        }  # fmt: skip

    def page(folder: Path, record: Mapping[str, Any], line: str) -> None:
        write_claims_report(folder, record, line=line)
        for name, claim in record["measured"]["claims"].items():
            print(f"{name}: {claim['text']}", flush=True)

    return run_sweep(
        options, cells=lambda bench: claim_cells(bench, arms, options.seeds), finish=finish,
        page=page,
    )  # fmt: skip
