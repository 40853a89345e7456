"""Classify files, folders, lines of paths, videos: printed as they come, written when complete."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared_core.checkpoints import atomic_write
from shared_core.datasets import decode
from shared_core.datasets.finding.scan import list_images
from shared_core.deploy.answers import Answer, make_answer, text_line
from shared_core.deploy.inputs import (
    Loaded,
    Source,
    is_video_name,
    load_files,
    load_lines,
    load_video,
    no_images,
)
from shared_core.deploy.options import STDIN, PredictOptions
from shared_core.deploy.predictor import Predictor
from shared_core.deploy.show import Shower, has_display
from shared_core.runs.progress import progress
from shared_core.texts import as_utf8, say


@dataclass
class Summary:
    """How a prediction went; times in seconds, costs in MACs."""

    images: int = 0
    unreadable: int = 0
    seconds: float = 0.0  # decoding included
    network_seconds: float = 0.0
    macs: float = 0.0  # of all images together, as far as the model says so
    full_macs: float | None = None  # of one image that runs to the final head
    bad: list[tuple[str, str]] = field(default_factory=list)  # path and reason

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, with means and rates."""
        found: dict[str, Any] = {"images": self.images, "unreadable": self.unreadable}
        if not self.images:
            return found
        if self.macs:
            found["mean_macs"] = self.macs / self.images
            if self.full_macs:
                found["macs_fraction"] = found["mean_macs"] / self.full_macs
        found["images_per_second"] = self.images / max(self.network_seconds, 1e-9)
        found["images_per_second_with_decoding"] = self.images / max(self.seconds, 1e-9)
        return found


def end_line(summary: Summary) -> str:
    """Counts, mean cost and rates on one line; nothing for a single image."""
    if summary.images + summary.unreadable == 1:
        return ""
    line = f"{summary.images} images"
    if summary.unreadable:
        line += f", {summary.unreadable} that could not be read"
    if not summary.images:
        return line
    facts = summary.as_json()
    if "macs_fraction" in facts:
        line += (
            f"; mean cost {facts['mean_macs'] / 1e6:.3g} M MACs an image, "
            f"{100 * facts['macs_fraction']:.1f} % of a full run"
        )
    return line + (
        f"; {facts['images_per_second']:.1f} images a second, "
        f"{facts['images_per_second_with_decoding']:.1f} with decoding"
    )


def predict(
    predictor: Predictor,
    options: PredictOptions,
    *,
    line: Callable[[Answer], str] = text_line,
    end: Callable[[Summary], str] = end_line,
    lines: Iterable[str | bytes] | None = None,
) -> int:
    """Classify what the options name: print, write, show.

    Args:
        line: an answer as text; a project's README may promise its own.
        end: the last line of the text; empty for none.
        lines: paths, where ``-`` is among the options; standard input by default.

    Returns:
        The exit code: 0, or 1 when an image could not be read (the others are answered all the
        same) or there was none.

    Raises:
        OSError: a video that cannot be opened, a file that cannot be written.
    """
    show = Shower(
        options.show_dir, window=options.show and options.show_dir is None and has_display()
    )
    showing = options.show or options.show_dir is not None
    keep = options.json is not None or options.csv is not None
    full = None if predictor.facts.exits is None else predictor.macs(None)
    summary = Summary(full_macs=full)
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    with show if showing else nullcontext():
        try:
            for answer in _answers(predictor, options, lines, summary):
                if keep and not answer.source.between:
                    rows.append(answer.as_json(every_class=options.every_class))
                if not answer.source.between:
                    _tell(answer, options.format, line)
                if showing and answer.ranked and _shown(show, answer):
                    break
        except KeyboardInterrupt:
            if options.camera is None:
                raise
    summary.seconds = time.perf_counter() - started
    if options.format == "text" and (text := end(summary)):
        say(text)
    if options.json is not None:
        write_json(options.json, rows, _head(predictor, summary))
    if options.csv is not None:
        write_csv(options.csv, rows, predictor.facts.class_names, top=options.top)
    if show.written:
        say(f"wrote {len(show.written)} pictures to {show.folder}", sys.stderr)
    return 1 if summary.unreadable or not summary.images else 0


def _answers(
    predictor: Predictor,
    options: PredictOptions,
    lines: Iterable[str | bytes] | None,
    summary: Summary,
) -> Iterator[Answer]:
    """All answers in order; a frame between two classified ones repeats the answer before."""
    quiet = sys.stdout.isatty() or not sys.stderr.isatty()
    plain = [p for p in options.paths if p != STDIN and not is_video_name(p)]
    found = list_images(plain)
    if ignored := found.ignored_line():
        say(ignored, sys.stderr)
    bad = [Source(str(path), error=" ".join(reason.split())) for path, reason in found.bad]
    loaded = _loaded(
        predictor, options, [Loaded(bad, no_images(predictor.view))], found.files, lines
    )
    if not quiet and len(plain) == len(options.paths) and not options.videos:
        loaded = progress(
            loaded, total=-(-len(found.files) // options.batch_size) + 1, label="predict"
        )
    last = Answer(Source(""))
    for batch in loaded:
        for answer in answer_batch(predictor, batch, top=options.top, summary=summary):
            if answer.source.between:
                answer = Answer(answer.source, last.label, last.ranked)
            elif answer.error is None:
                last = answer
            yield answer


def _loaded(
    predictor: Predictor,
    options: PredictOptions,
    first: Iterable[Loaded],
    files: Sequence[Path],
    lines: Iterable[str | bytes] | None,
) -> Iterator[Loaded]:
    """What the options name, batch by batch: files, then lines, videos, the camera."""
    view, size, workers = predictor.view, options.batch_size, options.workers
    yield from first
    if files:
        predictor.outputs(no_images(view, 1))  # the first pass costs more, and is no measure
        yield from load_files(files, view, batch_size=size, workers=workers)
    if STDIN in options.paths:
        given = getattr(sys.stdin, "buffer", sys.stdin) if lines is None else lines
        yield from load_lines(given, view, batch_size=size, workers=workers)
    videos: list[str | Path | int] = [*filter(is_video_name, options.paths), *options.videos]
    for video in videos if options.camera is None else [*videos, options.camera]:
        yield from load_video(
            video, view, batch_size=size, every=options.every, frames=options.frames,
            between=options.show or options.show_dir is not None,
        )  # fmt: skip


def answer_batch(
    predictor: Predictor, loaded: Loaded, *, top: int, summary: Summary
) -> list[Answer]:
    """An answer for each source of a batch, counted in ``summary``."""
    number = len(loaded.images)
    start = time.perf_counter()
    outputs = predictor.outputs(loaded.images) if number else None
    taken = time.perf_counter() - start
    summary.network_seconds += taken
    answers: list[Answer] = []
    row = 0
    for source in loaded.sources:
        if source.error is not None or source.between or outputs is None:
            answers.append(Answer(source))
        else:
            ms = 1e3 * taken / number
            answers.append(make_answer(predictor, source, outputs, row, top=top, ms=ms))
            row += 1
            summary.images += 1
            summary.macs += answers[-1].macs or 0
        if source.error is not None:
            summary.unreadable += 1
            summary.bad.append((source.path, source.error))
    return answers


def _tell(answer: Answer, form: str, line: Callable[[Answer], str]) -> None:
    if form == "jsonl":
        utf8 = (getattr(sys.stdout, "encoding", "") or "utf-8").lower().replace("-", "") == "utf8"
        say(json.dumps(answer.as_json(), ensure_ascii=not utf8))
    elif answer.error is None:
        say(line(answer))
    if answer.error is not None:
        say(f"unreadable: {answer.name}: {answer.error}", sys.stderr)


def _shown(show: Shower, answer: Answer) -> bool:
    source = answer.source
    picture = decode(Path(source.path)) if source.picture is None else source.picture
    rate = None if source.frame is None else source.rate or 25.0
    return show.show(picture, answer.ranked, name=Path(source.path).name, rate=rate)


def _head(predictor: Predictor, summary: Summary) -> dict[str, Any]:
    return {
        "model": predictor.name,
        "runtime": predictor.runtime,
        "class_names": list(predictor.facts.class_names),
        "policy": predictor.policy_state(),
        "summary": summary.as_json(),
        "bad": [{"path": path, "reason": reason} for path, reason in summary.bad],
    }


def write_json(path: Path, rows: Sequence[dict[str, Any]], head: dict[str, Any]) -> None:
    """All answers as one document, or as JSON lines if the name ends in ``.jsonl``.

    A path that is no UTF-8 keeps its bytes as ``\\udcXX``, as Python's file names do.
    """
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        images = [row for row in rows if "error" not in row]
        text = json.dumps({**head, "images": images}, indent=1, ensure_ascii=False) + "\n"
    _write(path, text)


def write_csv(
    path: Path, rows: Sequence[dict[str, Any]], names: Sequence[str], *, top: int
) -> None:
    """A row an image: path, class, probability, error, then what there is more.

    Quotes, separators and line breaks in names are quoted; bytes that are no UTF-8 are written out
    as ``\\udcXX``.
    """
    every = any("probabilities" in row for row in rows)
    width = max((len(row.get("feature", ())) for row in rows), default=0)
    extra = [key for key in ("frame", "exit", "macs", "ms") if any(key in row for row in rows)]
    best = range(1, min(top, len(names)))
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    header = ["path", "class", "probability", "error", *extra]
    header += [f"{what}_{n + 1}" for n in best for what in ("class", "probability")]
    header += [f"p({name})" for name in names] if every else []
    table.writerow(header + [f"f{n}" for n in range(width)])
    for row in rows:
        ranked = row.get("top", ())
        cells = [row.get(key, "") for key in ("path", "class", "probability", "error", *extra)]
        for n in best:
            cells += [ranked[n]["class"], ranked[n]["probability"]] if ranked else ["", ""]
        if every:
            cells += row.get("probabilities", [""] * len(names))
        table.writerow(cells + list(row.get("feature", [""] * width)))
    _write(path, out.getvalue())


def _write(path: Path, text: str) -> None:
    data = as_utf8(text)
    atomic_write(path, lambda scratch: scratch.write_bytes(data))
