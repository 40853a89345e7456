"""The result of a verification: what was found, how bad it is, as text, JSON and a page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from shared_core.datasets.finding.quarantine import write_text
from shared_core.runs.report import Report
from shared_core.texts import printable

# A set with one of these is not fit for use before the files are mended or quarantined.
ERRORS = {
    "missing": "cannot be read",
    "empty": "no bytes",
    "not_an_image": "no image format that is known",
    "not_a_file": "a pipe, a socket or a device",
    "truncated": "cut off or damaged",
    "unsupported": "whole, but of a kind or size that is not read",
    "copy_in_other_class": "same bytes under two labels",
    "wrong_classes": "the classes are not those of the spec",
}
# These are worth knowing; a set can be used with them.
WARNINGS = {
    "wrong_extension": "the name says another format than the bytes",
    "extra_band": "a band that nothing declares as alpha, left out",
    "dim": "16 bits that hold far fewer: nearly black",
    "copy": "same bytes twice in one class",
    "copy_in_other_split": "same bytes in two splits of the folder: a leak if kept as given",
    "stray": "an image in no class folder",
    "class_missing": "a split without images of a class",
}
BECAME = {
    "used": "used",
    "duplicate": "used; same bytes as another file of its class",
    "leak": "used as the folder gives it; same bytes in another part",
    "unreadable": "left out: no image, damaged, or of a kind that is not read",
    "quarantined": "left out: listed in quarantine.txt, or same bytes under two labels",
    "stray": "left out: in no class folder",
    "ignored": "left out: not named like an image",
}
_UNREADABLE = ("missing", "empty", "not_an_image", "not_a_file", "truncated", "unsupported")
_OUTCOMES = {
    **dict.fromkeys(_UNREADABLE, "unreadable"),
    "copy_in_other_class": "quarantined",
    "copy_in_other_split": "leak",
    "copy": "duplicate",
    "stray": "stray",
}
_SHOWN = 50  # lines of a kind in the Markdown; the JSON has all


@dataclass(frozen=True)
class Problem:
    """One finding: a path below the root, its kind (a key of ERRORS or WARNINGS), a detail."""

    path: str
    kind: str
    detail: str

    @property
    def is_error(self) -> bool:
        """Whether the file cannot be used."""
        return self.kind in ERRORS


@dataclass(frozen=True)
class VerifyReport:
    """All that one pass over the files found.

    Attributes:
        root: the folder.
        layout: "single" or "split".
        counts: images a class.
        sizes: images a pixel size, "height x width", most frequent first.
        problems: sorted by path.
        duplicates_exact: groups of paths with the same bytes.
        duplicates_near: groups of paths of nearly the same picture (they hold exact copies too).
        near_checked: whether near duplicates were looked for.
        keys: content key of each readable file; ``make_split(keys=...)`` need not read them again.
        spec: name of the dataset that was compared with, or None.
        differences: what is other than the spec says; facts, not errors.
        ignored: files that are not named like images, by ending.
        listed: paths that the folder's own ``quarantine.txt`` leaves out.
    """

    root: str
    layout: str
    counts: dict[str, int]
    sizes: dict[str, int]
    problems: tuple[Problem, ...]
    duplicates_exact: tuple[tuple[str, ...], ...]
    duplicates_near: tuple[tuple[str, ...], ...]
    near_checked: bool
    keys: dict[str, str]
    spec: str | None
    differences: tuple[str, ...]
    ignored: Mapping[str, int] = field(default_factory=dict)
    listed: tuple[str, ...] = ()

    def became(self) -> dict[str, str]:
        """What became of each image file that is not simply used: a key of ``BECAME``.

        Of several reasons the first of: unreadable, quarantined, leak, duplicate, stray.
        """
        reasons: dict[str, set[str]] = {}
        for problem in self.problems:
            if (outcome := _OUTCOMES.get(problem.kind)) is not None:
                reasons.setdefault(problem.path, set()).add(outcome)
        for path in self.listed:
            reasons.setdefault(path, set()).add("quarantined")
        order = ("unreadable", "quarantined", "leak", "duplicate", "stray")
        return {path: next(o for o in order if o in found) for path, found in reasons.items()}

    def outcomes(self) -> dict[str, int]:
        """Number of files by what became of them; every visible file is counted once."""
        became = Counter(self.became().values())
        inside = sum(became.values()) - became["stray"]  # of the images in class folders
        numbers = {"used": sum(self.counts.values()) - inside, **became}
        numbers["ignored"] = sum(self.ignored.values())
        return {name: numbers.get(name, 0) for name in BECAME}

    def files_line(self) -> str:
        """The outcomes on one line, with the endings of what was ignored."""
        parts = [f"{n:,} {name}" for name, n in self.outcomes().items() if n or name == "used"]
        if self.ignored:
            ignored = ", ".join(f"{n} {printable(e)}" for e, n in list(self.ignored.items())[:8])
            parts[-1] += f" by ending ({ignored})"
        return "files: " + ", ".join(parts)

    @property
    def ok(self) -> bool:
        """Whether every file can be used as it is (an exit code can be made of it)."""
        return not any(problem.is_error for problem in self.problems)

    @property
    def duplicates(self) -> tuple[tuple[str, ...], ...]:
        """Exact and near groups together, as ``make_split(duplicates=...)`` takes them."""
        return self.duplicates_exact + self.duplicates_near

    def quarantine(self) -> dict[str, str]:
        """The files that cannot be used, with reasons; both copies of one under two labels."""
        reasons: dict[str, str] = {}
        for problem in self.problems:
            if problem.is_error and problem.kind != "wrong_classes":
                reasons.setdefault(problem.path, f"{problem.kind}: {problem.detail}")
        return reasons

    def notes(self) -> tuple[str, ...]:
        """One line for each kind of image that is used, but not as somebody may expect."""
        lines = []
        for kind in ("extra_band", "dim"):
            of_kind = [problem for problem in self.problems if problem.kind == kind]
            if of_kind:
                first = of_kind[0]
                lines.append(f"{len(of_kind)} images like {printable(first.path)}: {first.detail}")
        return tuple(lines)

    def summary(self) -> str:
        """A few lines for a terminal."""
        found = Counter(problem.kind for problem in self.problems)
        lines = [
            f"{printable(self.root)}: {sum(self.counts.values()):,} images, "
            f"{len(self.counts)} classes, {'usable' if self.ok else 'NOT usable as it is'}"
        ]
        lines.append(f"  {self.files_line()}")
        for kind, meaning in (*ERRORS.items(), *WARNINGS.items()):
            if found[kind]:
                first = next(p for p in self.problems if p.kind == kind)
                level = "error" if kind in ERRORS else "note"
                example = printable(f"first {first.path}: {first.detail}")
                lines.append(f"  {level}: {found[kind]} {kind} ({meaning}), {example}")
        lines.append(
            f"  exact copies: {len(self.duplicates_exact)} groups; near copies: "
            + (f"{len(self.duplicates_near)} groups" if self.near_checked else "not looked for")
        )
        lines += [f"  differs: {line}" for line in self.differences]
        return "\n".join(lines)

    def page(self) -> Report:
        """The report as a page; names are escaped."""
        page = Report("Dataset check")
        sizes = ", ".join(f"{size} ({n:,})" for size, n in list(self.sizes.items())[:8])
        page.table(
            ["fact", "value"],
            [
                ["folder", f"{printable(self.root)} ({self.layout} layout)"],
                ["images", f"{sum(self.counts.values()):,} in {len(self.counts)} classes"],
                ["pixel sizes (height x width)", sizes or "none readable"],
                ["usable as it is", "yes" if self.ok else "no"],
            ],
        )
        page.heading("What became of every file")
        page.table(
            ["files", "number", "meaning"],
            [[name, n, BECAME[name]] for name, n in self.outcomes().items()],
        )
        if self.ignored:
            rows = [[printable(ending), n] for ending, n in self.ignored.items()]
            page.table(["ending that was ignored", "files"], rows)
        if self.spec is not None:
            page.heading(f"Against the facts of {self.spec}")
            for line in self.differences or ("all facts met",):
                page.text(line)
        for kind, meaning in (*ERRORS.items(), *WARNINGS.items()):
            found = [
                [printable(p.path), printable(p.detail)] for p in self.problems if p.kind == kind
            ]
            _listed(page, f"{kind}: {meaning} ({len(found)})", ["file", "detail"], found)
        for title, groups in (
            ("Exact copies", self.duplicates_exact),
            ("Near copies", self.duplicates_near),
        ):
            found = [[", ".join(map(printable, group))] for group in groups]
            _listed(page, f"{title} ({len(groups)} groups)", ["files"], found)
        page.heading("Images a class")
        page.table(["class", "images"], [[printable(name), n] for name, n in self.counts.items()])
        return page

    def write(self, path: str | Path) -> tuple[Path, Path]:
        """Write ``path`` with the suffixes .json, .md and .html; returns the first two paths."""
        base = Path(path)
        if base.suffix.lower() not in (".json", ".md", ".html"):
            base = base.with_name(base.name + ".json")
        json_path = base.with_suffix(".json")
        content = {
            "schema": "shared-core.verify/1", "ok": self.ok, "files": self.outcomes(),
            "became": self.became(), **asdict(self),
        }  # fmt: skip
        write_text(json_path, json.dumps(content, indent=1) + "\n")
        return json_path, self.page().write(base.parent, name=base.stem)[0]


def _listed(page: Report, title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A section with a table of the first rows, if there are any."""
    if rows:
        page.heading(title)
        page.table(columns, rows[:_SHOWN])
        if len(rows) > _SHOWN:
            page.text(f"... {len(rows) - _SHOWN} more in the JSON file")
