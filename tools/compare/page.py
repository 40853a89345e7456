"""The report of a comparison: one page without outside parts, its Markdown, and the record.

Only what the JSON files of the run hold is shown; pictures of mistakes are read from the images.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from compare.chart import Point, draw
from compare.contract import (
    CANDIDATES,
    CHECK_FILE,
    CHOICE_FILE,
    FINDINGS,
    FLOORS_FILE,
    FORMS,
    JOB_FILE,
    JUDGED_FILE,
    PLAN_FILE,
    Choice,
    ClassRow,
    DataCheck,
    Floors,
    Job,
    Judged,
    Limit,
    Plan,
    Value,
    read,
    read_rows,
)
from compare.page_style import STYLE
from compare.pictures import encode, small_picture
from shared_core.metrics.intervals import wilson_interval
from shared_core.runs import Report, write_result
from shared_core.runs.json_files import write_text
from shared_core.runs.progress import format_seconds
from shared_core.texts import printable

MATRIX = 20  # classes that a matrix shows
OPEN_ROWS = 20  # a longer table is folded
PICTURE = 132  # pixels of a mistake
UNITS = {"ms": "ms", "mb": "MB", "memory": "MB of memory"}


@dataclass(frozen=True)
class Run:
    """All that the page tells; the winner's row is the first of ``rows``, the rest by accuracy."""

    check: DataCheck
    plan: Plan
    rows: tuple[Judged, ...]
    choice: Choice
    floors: Floors | None
    jobs: dict[str, Job]
    folder: Path

    @property
    def winner(self) -> Judged:
        """The row of the winner, or of the nearest one."""
        return self.rows[0]


def write_report(folder: Path, *, command: str, started: datetime, wall_seconds: float) -> None:
    """Write ``report.html``, ``report.md`` and ``result.json`` of a run whose choice is made.

    Args:
        command: as it was typed.
        started: when, with a time zone.
        wall_seconds: that it took, resumed parts together.

    Raises:
        FileNotFoundError, ValueError: a part of the run is missing or damaged.
    """
    run = read_run(folder)
    record = write_result(
        folder / "result.json",
        task=f"compare/{run.check.name}",
        command=command,
        scale="rehearsal" if run.check.kind == "built-in" else "full",
        data=_data_facts(run),
        seeds=sorted({one.seed for one in run.plan.candidates if one.included} or {run.plan.seed}),
        measured=_measured(run),
        started=started,
        wall_seconds=wall_seconds,
    )
    _markdown(run, record).write(folder)
    write_text(folder / "report.html", page(run, record))


def read_run(folder: Path) -> Run:
    """Read the JSON files of a run.

    Raises:
        FileNotFoundError, ValueError: one is missing or damaged, or the choice names no row.
    """
    choice = read(folder / CHOICE_FILE, Choice)
    rows = read_rows(folder / JUDGED_FILE, Judged)
    first = [row for row in rows if (row.candidate, row.form) == (choice.candidate, choice.form)]
    if not first:
        raise ValueError(f"{folder / CHOICE_FILE} names {choice.candidate}, which was not judged")
    rest = [row for row in rows if row is not first[0]]
    rest.sort(key=lambda row: (-row.accuracy.value, row.bytes, row.candidate, row.form))
    floors = folder / FLOORS_FILE
    files = sorted((folder / CANDIDATES).glob(f"*/{JOB_FILE}"))
    return Run(
        check=read(folder / CHECK_FILE, DataCheck),
        plan=read(folder / PLAN_FILE, Plan),
        rows=(first[0], *rest),
        choice=choice,
        floors=read(floors, Floors) if floors.is_file() else None,
        jobs={job.name: job for job in (read(file, Job) for file in files)},
        folder=folder,
    )


def _data_facts(run: Run) -> dict[str, Any]:
    check = run.check
    return {
        "name": check.name,
        "kind": check.kind,
        "images": sum(check.images(part) for part in check.counts),
        "pixels": check.pixels,
        "split_hash": check.split_hash,
        "splits": {part: check.images(part) for part in check.counts},
        "notes": list(check.notes),
    }


def _measured(run: Run) -> dict[str, Any]:
    """What the record keeps: all rows without their long lists."""
    long = ("per_class", "confusions", "mistakes", "notes", "title")
    rows = [{k: v for k, v in asdict(row).items() if k not in long} for row in run.rows]
    return {
        "winner": run.winner.name,
        "meets_the_budget": run.choice.meets,
        "budget": [limit.text for limit in run.plan.budget],
        "at_least": run.choice.at_least,
        "floors": asdict(run.floors) if run.floors else None,
        "files": rows,
    }


# Numbers, as the page and the Markdown write them.
def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _ends(value: Value, *, sign: str = "") -> str:
    return f"{value.low:{sign}.4f} to {value.high:{sign}.4f}"


def _ms(row: Judged, batch: int, which: str = "p50") -> str:
    found = row.latency.get(str(batch), {}).get(which)
    return "–" if found is None else f"{found:.2f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f}"


def _macs(row: Judged) -> str:
    return "–" if row.macs is None else f"{row.macs / 1e6:.1f}"


def _form(row: Judged) -> str:
    return FORMS.get(row.form, row.form)


def _title(row: Judged) -> str:
    return printable(f"{row.title or row.candidate} {_form(row)}")


def _headline(run: Run) -> str:
    """The winner's name, or that none meets the budget."""
    return _title(run.winner) if run.choice.meets else f"None meets it; {_title(run.winner)}"


def _promise(run: Run) -> str:
    if run.choice.at_least is None:
        return ""
    return (
        f"At least {run.choice.at_least:.4f} accurate with confidence 95 %, on images like the "
        f"{run.check.images('test'):,} of the test split, which chose nothing."
    )


def _misses(run: Run, row: Judged, limit: Limit) -> str:
    """How a row misses one wish of the budget; "" if it keeps it."""
    values = {
        "ms": row.latency.get(str(run.plan.batch), {}).get("p50"),
        "mb": row.bytes / 1e6,
        "accuracy": row.calibration_accuracy,
        "macs": row.macs,
        "memory": row.memory_mb,
    }
    value = values[limit.what]
    if value is None:
        return f"{limit.what} is not known"
    if value >= limit.value if limit.least else value <= limit.value:
        return ""
    if limit.least:
        return f"accuracy {value:.4f} on calibration, below {limit.value:g}"
    scale, unit = (1e6, "M MACs") if limit.what == "macs" else (1.0, UNITS[limit.what])
    return f"{value / scale:.4g} {unit}, above {limit.value / scale:g}"


def why_not(run: Run, row: Judged) -> str:
    """Why a row did not win, from its numbers and the budget."""
    if row is run.winner:
        return "winner" if run.choice.meets else "the nearest"
    missed = [text for limit in run.plan.budget if (text := _misses(run, row, limit))]
    if missed:
        return "; ".join(missed)
    won, batch = run.winner, str(run.plan.batch)
    words = []
    if row.form == "paddle":
        words.append("needs Paddle, not shipped")
    if row.calibration_accuracy < won.calibration_accuracy:
        words.append(f"accuracy {row.calibration_accuracy:.4f} on calibration")
    if row.bytes > won.bytes:
        words.append("larger")
    if batch in row.latency and row.latency[batch]["p50"] > won.latency[batch]["p50"]:
        words.append("slower")
    return ", ".join(words) or "as good; the simpler one is taken"


# The page, section by section.
Cell = str | tuple[str, str]  # text, or text and a quieter line below it


def page(run: Run, record: dict[str, Any]) -> str:
    """The whole page as HTML."""
    sections: list[Iterator[str]] = [
        _top(run), _table(run), _confusions(run), _mistakes(run), _classes(run), _data(run),
        _plan(run), _lines(run), _origin(run, record),
    ]  # fmt: skip
    title = escape(printable(f"{run.check.name}: {_headline(run)}"))
    body = "\n".join(part for section in sections for part in section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _text(value: str) -> str:
    return escape(printable(value))


def _cells(
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    left: int = 1,
    wide: Sequence[int] = (),
    winner: int | None = None,
) -> str:
    """A table in a box of its own that scrolls.

    Args:
        columns: headings; the first ``left`` are words, the others numbers.
        wide: numbers of the columns whose text may wrap.
        winner: number of the row that is marked.
    """
    sides = ['class="l"' if n < left else "" for n in range(len(columns))]
    for n in wide:
        sides[n] = 'class="l w"'
    head = "".join(
        f"<th {side}>{_text(name)}</th>" for side, name in zip(sides, columns, strict=True)
    )
    body = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td {side}>{_cell(c)}</td>" for side, c in zip(sides, row, strict=True))
        body.append(f"<tr{' class=winner' if number == winner else ''}>{cells}</tr>")
    top = f"<tr>{head}</tr>" if any(columns) else ""
    return f'<div class="box"><table>{top}{"".join(body)}</table></div>'


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return _text(cell)
    return f"{_text(cell[0])}<i>{_text(cell[1])}</i>"


def _folded(table: str, rows: int, what: str) -> str:
    """The table, behind a line to open it where it is long."""
    if rows <= OPEN_ROWS:
        return table
    return f"<details><summary>all {rows:,} {_text(what)}</summary>{table}</details>"


def _top(run: Run) -> Iterator[str]:
    """The winner with its promise and numbers, beside the Pareto picture."""
    row, check = run.winner, run.check
    images = sum(check.images(part) for part in check.counts)
    yield (
        f"<h1>{_text(check.name)}: {images:,} images, {len(check.classes):,} classes, "
        f"{len(run.rows)} files of {len({one.candidate for one in run.rows})} candidates measured"
        "</h1>"
    )
    if check.kind == "built-in":
        yield '<p class="note">A rehearsal on scenes drawn by the program: no result.</p>'
    budget = " ".join(limit.text for limit in run.plan.budget) or "none was given"
    numbers = [
        (_share(row.accuracy.value), f"accuracy, 95 %: {_ends(row.accuracy)}"),
        (f"{_ms(row, 1)} ms", "an image, batch 1"),
        (f"{_mb(row.bytes)} MB", "on disk"),
        (f"{_ms(row, 16)} ms", "an image, batch 16"),
        (_share(row.agreement), "answers as the trained network"),
        (_share(row.macro_f1), "macro F1"),
    ]
    cards = "".join(f"<div><b>{_text(a)}</b><span>{_text(b)}</span></div>" for a, b in numbers)
    verdicts = "".join(f"<p>{_text(line)}</p>" for line in run.plan.notes)
    head = "Winner" if run.choice.meets else "No file meets the budget; the nearest is"
    yield (
        f'<div class="top"><section class="win{"" if run.choice.meets else " none"}">'
        f'<span class="small">{head}</span><div class="name">{_title_html(row)}</div>'
        f"<p>{_text(run.choice.sentence)}</p><p><b>{_text(_promise(run))}</b></p>"
        f"{verdicts}"
        f'<div class="cards">{cards}</div><p class="small">Budget: {_text(budget)}. '
        f"{_text(_floor_line(run))}</p></section><section>{_chart(run)}</section></div>"
    )


def _title_html(row: Judged) -> str:
    return escape(_title(row))


def _floor_line(run: Run) -> str:
    floors = run.floors
    if floors is None:
        return ""
    known = [("most frequent class", floors.majority), ("plain features, linear", floors.plain),
             ("engineered features, linear", floors.engineered)]  # fmt: skip
    told = ", ".join(f"{name} {_share(value)}" for name, value in known if value is not None)
    best = max(value for _, value in known if value is not None)
    below = " The winner is below a floor." if run.winner.accuracy.value < best else ""
    return f"Floors without a network: {told}.{' ' + floors.note if floors.note else ''}{below}"


def _projects(run: Run) -> list[str]:
    return sorted({row.project for row in run.rows})


def _chart(run: Run) -> str:
    """The picture with its legend below, where it covers nothing."""
    batch, projects = run.plan.batch, _projects(run)
    front = set(run.choice.front)
    points = [
        Point(
            number=number, title=f"{_title(row)}: {_share(row.accuracy.value)}, "
            f"{_ms(row, batch)} ms, {_mb(row.bytes)} MB", ms=row.latency[str(batch)]["p50"],
            accuracy=row.accuracy.value, low=row.accuracy.low, high=row.accuracy.high,
            bytes=row.bytes, group=projects.index(row.project) % 6, square="int8" in row.form,
            front=(row.candidate, row.form) in front, winner=number == 1,
        )
        for number, row in enumerate(run.rows, start=1)
        if row.latency.get(str(batch), {}).get("p50", 0) > 0
    ]  # fmt: skip
    if not points:
        return "<p>No latency was measured.</p>"
    limits = {limit.what: limit.value for limit in run.plan.budget}
    label = f"milliseconds an image at batch {batch}, {run.plan.threads} " + (
        "thread" if run.plan.threads == 1 else "threads"
    )
    picture = draw(
        points,
        label=label,
        mark="winner" if run.choice.meets else "nearest",
        ms=limits.get("ms"),
        accuracy=limits.get("accuracy"),
    )
    colours = "".join(
        f'<span><b class="g{n % 6}"></b>{_text(name)}</span>' for n, name in enumerate(projects)
    )
    return (
        f'{picture}<div class="legend">{colours}<span><b class="plain"></b>float</span>'
        '<span><b class="plain square"></b>int8</span><span>area: bytes on disk</span>'
        "<span>bar: 95 % interval</span><span>numbers: rows of the table</span>"
        + ("<span>dashed red: the budget</span>" if {"ms", "accuracy"} & set(limits) else "")
        + "</div>"
    )


COLUMNS = (
    "", "candidate", "form", "accuracy", "to the best", "ms, batch 1", "ms, batch 16",
    "MB", "M MACs", "agreement", "why not the winner",
)  # fmt: skip


def _main_row(run: Run, number: int, row: Judged) -> list[Cell]:
    difference: Cell = "best"
    if row.difference is not None:
        difference = (f"{row.difference.value:+.4f}", _ends(row.difference, sign="+"))
    return [
        str(number),
        (
            printable(row.title or row.candidate),
            f"{row.project}, {'x'.join(map(str, row.input_size))}",
        ),
        _form(row),
        (_share(row.accuracy.value), _ends(row.accuracy)),
        difference,
        (_ms(row, 1), f"p95 {_ms(row, 1, 'p95')}"),
        (_ms(row, 16), f"p95 {_ms(row, 16, 'p95')}"),
        _mb(row.bytes),
        _macs(row),
        _share(row.agreement),
        why_not(run, row),
    ]


def _table(run: Run) -> Iterator[str]:
    rows = [_main_row(run, number, row) for number, row in enumerate(run.rows, start=1)]
    yield _cells(COLUMNS, rows, left=3, wide=(1, len(COLUMNS) - 1), winner=0)
    yield (
        '<p class="small">Every number is of the shipped file, on this machine. Chosen on the '
        "calibration split, reported on the test split. Intervals are 95 %; differences are paired "
        "on the same images.</p>"
    )
    more = [
        [
            str(number), _title(row), _share(row.calibration_accuracy), _share(row.macro_f1),
            _share(row.ece), f"{row.throughput:.1f}",
            "–" if row.memory_mb is None else f"{row.memory_mb:.1f}", *_unknown(row), str(row.seed),
            "; ".join(row.notes),
        ]
        for number, row in enumerate(run.rows, start=1)
    ]  # fmt: skip
    columns = [
        "", "file", "accuracy, calibration", "macro F1", "ECE", "images/s", "peak MB of memory",
        "none-of-these threshold", "false accepts", "known kept", "seed", "notes",
    ]  # fmt: skip
    yield "<details><summary>more numbers of each file</summary>"
    yield _cells(columns, more, left=2, wide=(1, len(columns) - 1), winner=0)
    if source := run.winner.unknown.get("source"):
        yield f'<p class="small">None-of-these was tried on {_text(str(source))}</p>'
    yield "</details>"


def _unknown(row: Judged) -> list[Cell]:
    """Threshold, false-accept rate and share of known images kept of "none of these"."""
    found = [row.unknown.get(name) for name in ("threshold", "false_accepts", "kept")]
    cells: list[Cell] = [_share(value) for value in found]
    if kinds := row.unknown.get("by_kind"):
        cells[1] = (_share(found[1]), ", ".join(f"{kind} {n:.2f}" for kind, n in kinds.items()))
    return cells


def _confusions(run: Run) -> Iterator[str]:
    row = run.winner
    if not row.confusions:
        return
    yield '<h2>What the winner confuses</h2><div class="pair"><section>'
    support = {one.name: one.support for one in row.per_class}
    pairs = [
        [true, given, f"{n:,}", f"{support[true]:,}" if true in support else "–"]
        for true, given, n in row.confusions[:OPEN_ROWS]
    ]
    yield _cells(["class", "answered as", "images", "images of the class"], pairs, left=2)
    yield "</section><section>"
    matrix = confusion_matrix(row)
    if matrix is not None and len(matrix) <= MATRIX:
        yield "<h3>Every answer: rows are the classes, columns the answers</h3>"
        yield _heat([one.name for one in row.per_class], matrix)
    yield "</section></div>"


def confusion_matrix(row: Judged) -> np.ndarray | None:
    """Counts ``(true, given)`` where the row lists all confusions, else None.

    The diagonal is support times recall; the list is whole when it explains every error.
    """
    names = [one.name for one in row.per_class]
    matrix = np.zeros((len(names), len(names)), np.int64)
    for n, one in enumerate(row.per_class):
        matrix[n, n] = round((one.recall or 0.0) * one.support)
    for true, given, count in row.confusions:
        if true not in names or given not in names:
            return None
        matrix[names.index(true), names.index(given)] = count
    whole = all(matrix[n].sum() == one.support for n, one in enumerate(row.per_class))
    return matrix if whole and names else None


def _heat(names: Sequence[str], matrix: np.ndarray) -> str:
    most = np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    share = matrix / most
    head = "".join(f'<th class="heat">{n}</th>' for n in range(1, len(names) + 1))
    rows = []
    for n, name in enumerate(names):
        cells = "".join(
            f'<td class="heat" style="background: rgba(var(--heat), {0.75 * s:.2f})">{c or ""}</td>'
            for c, s in zip(matrix[n], share[n], strict=True)
        )
        rows.append(f'<tr><td class="l">{n + 1} {_text(name)}</td>{cells}</tr>')
    return f'<div class="box"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _mistakes(run: Run) -> Iterator[str]:
    mistakes = run.winner.mistakes
    if not mistakes:
        return
    yield "<h2>The surest wrong answers of the winner</h2><div class=mistakes>"
    for one in mistakes[:24]:
        picture = encode(small_picture(Path(run.check.root, one.path), PICTURE))
        data = base64.b64encode(picture).decode("ascii")
        yield (
            f'<figure><img alt="{_text(one.path)}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption><b>{_text(one.true)}</b><br>answered {_text(one.given)}, "
            f"{one.probability:.4f}<br>{_text(Path(one.path).name)}</figcaption></figure>"
        )
    yield "</div>"


def _classes(run: Run) -> Iterator[str]:
    rows = run.winner.per_class
    if not rows:
        return
    yield "<h2>Class by class</h2>"
    columns = ["class", "recall", "precision", "F1", "images"]
    if len(rows) > OPEN_ROWS:
        worst = sorted(rows, key=lambda one: (one.recall is None, one.recall or 0.0))[:10]
        yield "<h3>The ten with the lowest recall</h3>"
        yield _cells(columns, [_class_row(one) for one in worst])
    yield _folded(_cells(columns, [_class_row(one) for one in rows]), len(rows), "classes")


def _class_row(one: ClassRow) -> list[Cell]:
    recall: Cell = "–"
    if one.recall is not None and one.support:
        ends = wilson_interval(round(one.recall * one.support), one.support)
        recall = (_share(one.recall), f"{ends[0]:.4f} to {ends[1]:.4f}")
    return [one.name, recall, _share(one.precision), _share(one.f1), f"{one.support:,}"]


def _data(run: Run) -> Iterator[str]:
    check = run.check
    yield "<h2>The images</h2>"
    parts = {part: check.images(part) for part in check.counts}
    facts = [
        ["files", _counted(check.files)],
        ["passed over by ending", _counted(check.ignored)],
        ["parts, " + ("as given" if check.given else "decided by content"), _counted(parts)],
        ["largest class over smallest", f"{check.imbalance:g}"],
        ["pixels (height x width)", _counted(dict(list(check.sizes.items())[:5]))],
        *([kind, f"{n:,}"] for kind, n in _found(check)),
    ]
    if check.labels:
        facts.append(
            ["labels that agree with their neighbours", f"{check.labels['agree']:.4f} "
             f"({check.labels['asked']} neighbours in features of {check.labels['network']})"]
        )  # fmt: skip
    yield _cells(["", ""], facts, left=1, wide=(1,))
    for note in check.notes:
        yield f'<p class="note">{_text(note)}</p>'
    for name, caption in check.pictures:
        file = (run.folder / CHECK_FILE).parent / name
        if file.is_file():
            data = base64.b64encode(file.read_bytes()).decode("ascii")
            yield (
                f"<details><summary>{_text(caption)}</summary><figure>"
                f'<img class="sheet" alt="{_text(caption)}" src="data:image/jpeg;base64,{data}">'
                "</figure></details>"
            )
    if check.findings:
        rows = [[one.kind, ", ".join(one.paths), one.text] for one in check.findings]
        table = _cells(["kind", "files", "what"], rows, left=3, wide=(1,))
        yield f"<details><summary>{len(rows):,} findings</summary>{table}</details>"
    counts = [
        [name, *(f"{check.counts[part][n]:,}" for part in check.counts)]
        for n, name in enumerate(check.classes)
    ]
    table = _cells(["class", *check.counts], counts)
    yield f"<details><summary>images of each class</summary>{table}</details>"


def _counted(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in numbers.items()) or "–"


def _found(check: DataCheck) -> list[tuple[str, int]]:
    return [(FINDINGS.get(kind, kind), n) for kind, n in check.found.items()]


def _plan(run: Run) -> Iterator[str]:
    plan = run.plan
    yield "<h2>What was made, and what was not</h2>"
    yield f"<p>{plan.minutes:g} minutes were given, {plan.expected:.1f} were expected.</p>"
    rows, fallen = [], []
    for one in plan.candidates:
        job = run.jobs.get(one.name)
        state = job.state if job else ("not made" if one.included else "left out")
        reason = (job.reason if job else "") or one.reason
        seconds = "–" if job is None else f"{job.seconds / 60:.1f}"
        notes = "; ".join(job.notes) if job else ""
        rows.append([one.title or one.name, one.project, state, f"{one.minutes:.1f}", seconds,
                     "; ".join(text for text in (reason, notes) if text)])  # fmt: skip
        if state == "failed":
            fallen.append(f"{one.title or one.name} failed: {reason}")
    for line in fallen:
        yield f'<p class="note">{_text(line)}</p>'
    columns = [
        "candidate",
        "project",
        "state",
        "minutes expected",
        "minutes taken",
        "why, and notes",
    ]
    yield _cells(columns, rows, left=3, wide=(0, 5))
    if plan.steps:
        steps = ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in plan.steps.items())
        yield f'<p class="small">Measured here, an image of training: {_text(steps)}.</p>'


def _lines(run: Run) -> Iterator[str]:
    if run.choice.lines:
        yield "<h2>To use the winner</h2>"
        yield f"<pre>{escape(chr(10).join(map(str, run.choice.lines)))}</pre>"


def _origin(run: Run, record: dict[str, Any]) -> Iterator[str]:
    here, check = record["environment"], run.check
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    commands = [line for job in run.jobs.values() for line in job.commands]
    yield "<h2>Where the numbers come from</h2>"
    facts = [
        ["command", record["command"]],
        ["images", f"{check.name} ({check.kind}), split {check.split_hash[:12]}"],
        ["begun", f"{record['started']}, took {format_seconds(record['wall_seconds'])}"],
        ["seed", str(run.plan.seed)],
        ["machine", f"{here['cpu']}, {here['cores']} cores, {here['system']}"],
        ["versions", f"Python {here['python']}, {packages}"],
        ["commit", str(here["commit"] or "–")],
    ]
    yield _cells(["", ""], facts, left=1, wide=(1,))
    if commands:
        text = escape("\n".join(map(printable, commands)))
        yield f"<details><summary>commands of the candidates</summary><pre>{text}</pre></details>"


def _markdown(run: Run, record: dict[str, Any]) -> Report:
    """The short report for a terminal or a repository."""
    report = Report(f"{printable(run.check.name)}: {_headline(run)}")
    report.text(printable(run.choice.sentence))
    for line in (_promise(run), *run.plan.notes, _floor_line(run)):
        if line:
            report.text(line)
    rows = [
        [text if isinstance(text, str) else f"{text[0]} ({text[1]})" for text in cells]
        for cells in (_main_row(run, n, row) for n, row in enumerate(run.rows, start=1))
    ]
    report.table(COLUMNS, rows)
    report.heading("The images")
    for kind, n in _found(run.check):
        report.text(f"{n:,} {kind}")
    for note in run.check.notes:
        report.note(printable(note))
    report.text(f"Command: {printable(record['command'])}")
    return report
