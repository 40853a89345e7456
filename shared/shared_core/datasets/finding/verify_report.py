"""The result of a verification: what was found, how bad it is, as text, JSON and Markdown."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from shared_core.datasets.finding.quarantine import write_text
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
            f"{self.root}: {sum(self.counts.values()):,} images, {len(self.counts)} classes, "
            f"{'usable' if self.ok else 'NOT usable as it is'}"
        ]
        for kind, meaning in (*ERRORS.items(), *WARNINGS.items()):
            if found[kind]:
                first = next(p for p in self.problems if p.kind == kind)
                level = "error" if kind in ERRORS else "note"
                example = f"first {first.path}: {first.detail}"
                lines.append(f"  {level}: {found[kind]} {kind} ({meaning}), {example}")
        lines.append(
            f"  exact copies: {len(self.duplicates_exact)} groups; near copies: "
            + (f"{len(self.duplicates_near)} groups" if self.near_checked else "not looked for")
        )
        lines += [f"  differs: {line}" for line in self.differences]
        return "\n".join(lines)

    def markdown(self) -> str:
        """The report as a page."""
        sizes = ", ".join(f"{size} ({n:,})" for size, n in list(self.sizes.items())[:8])
        lines = [
            "# Dataset check",
            "",
            f"- folder: `{self.root}` ({self.layout} layout)",
            f"- images: {sum(self.counts.values()):,} in {len(self.counts)} classes",
            f"- pixel sizes (height x width): {sizes or 'none readable'}",
            f"- usable as it is: {'yes' if self.ok else 'no'}",
        ]
        if self.spec is not None:
            lines += ["", f"## Against the facts of {self.spec}", ""]
            lines += [f"- {line}" for line in self.differences] or ["- all facts met"]
        for kind, meaning in (*ERRORS.items(), *WARNINGS.items()):
            of_kind = [p for p in self.problems if p.kind == kind]
            if of_kind:
                lines += ["", f"## {kind}: {meaning} ({len(of_kind)})", ""]
                lines += [f"- `{p.path}`: {p.detail}" for p in of_kind[:_SHOWN]]
                if len(of_kind) > _SHOWN:
                    lines.append(f"- ... {len(of_kind) - _SHOWN} more in the JSON file")
        for title, groups in (
            ("Exact copies", self.duplicates_exact),
            ("Near copies", self.duplicates_near),
        ):
            if groups:
                lines += ["", f"## {title} ({len(groups)} groups)", ""]
                lines += ["- " + ", ".join(f"`{p}`" for p in group) for group in groups[:_SHOWN]]
                if len(groups) > _SHOWN:
                    lines.append(f"- ... {len(groups) - _SHOWN} more in the JSON file")
        lines += ["", "## Images a class", "", "| class | images |", "|---|---|"]
        lines += [f"| {name} | {count} |" for name, count in self.counts.items()]
        return "\n".join(lines) + "\n"

    def write(self, path: str | Path) -> tuple[Path, Path]:
        """Write ``path`` with the suffixes .json and .md; returns both paths."""
        base = Path(path)
        if base.suffix.lower() not in (".json", ".md"):
            base = base.with_name(base.name + ".json")
        json_path, markdown_path = base.with_suffix(".json"), base.with_suffix(".md")
        content = {"schema": "shared-core.verify/1", "ok": self.ok, **asdict(self)}
        write_text(json_path, json.dumps(content, indent=1) + "\n")
        write_text(markdown_path, self.markdown())
        return json_path, markdown_path
