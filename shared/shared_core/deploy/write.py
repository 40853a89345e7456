"""Writes a model folder: wrapped, checked against its network, quantized, measured, described."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from shared_core.deploy.contract import Int8Result
from shared_core.deploy.facts import ModelFacts, write_facts
from shared_core.deploy.making import Answers, Calibration, Form, Images, Int8Wish, Labels, Making
from shared_core.deploy.model_card import model_card
from shared_core.deploy.predictor import NetworkPredictor, Predictor
from shared_core.deploy.staging import CARD_FILE, staged
from shared_core.runs.progress import progress

__all__ = ["Calibration", "Form", "Int8Wish", "Written", "generated_images", "write_model_folder"]

GENERATED = 64


@dataclass(frozen=True)
class Written:
    """A finished model folder.

    Attributes:
        folder: where it is.
        facts: as in its ``model.json``.
        int8: what became of int8; None if it was not asked for.
        lines: what there is to say, for a terminal.
    """

    folder: Path
    facts: ModelFacts
    int8: Int8Result | None
    lines: tuple[str, ...]


def write_model_folder(
    folder: str | Path,
    *,
    facts: ModelFacts,
    network: Predictor | Answers,
    sources: Sequence[str | Path | Any] = (),
    forms: Mapping[str, Form] | None = None,
    test: Iterable[tuple[Images, Labels | None]] | None = None,
    judged_on: str = "test",
    calibration: Calibration | None = None,
    int8: Int8Wish | None = None,
    min_same: float = 0.999,
    max_distance: float = 1e-3,
    batches: Sequence[int] = (1, 16),
) -> Written:
    """Write a model folder: the network's files, ``model.json`` and ``README.md``.

    The files are ``model.onnx`` or the segments of a chain, ``model.int8.onnx``, and other forms.

    Every file is asked all images of ``test``; one that does not answer as the network ends the
    export, and an earlier export stays as it was. Only an earlier export is ever replaced.

    Args:
        facts: of the network; what is measured here is added.
        network: what the files must answer like: a project's predictor, or a function of uint8
            views ``(N, H, W, 3)``. A network with exits is an ``ExitPredictor``.
        sources: ONNX files (or models) of the float network, see ``wrap_network``: one, or the
            segments of a chain; none if only ``forms`` are wanted.
        forms: by runtime, file forms that only the project opens.
        test: views in batches with their labels (None where nobody knows them); None: pictures are
            generated, and the facts say that accuracy was not measured.
        judged_on: what the images of ``test`` are, for the record.
        calibration: images of another split, for int8.
        int8: None and ``Int8Wish("no")``: no int8 file.
        min_same: least fraction of images that must get the network's class (one may always
            differ).
        max_distance: most that two probabilities may differ by.
        batches: sizes to time.

    Raises:
        UsageError: the folder holds what no export wrote.
        ExportError: a file does not answer as the network.
        ValueError: int8 without calibration images, or nothing to write.
    """
    wish = Int8Wish() if int8 is None else int8
    if wish.mode != "no" and (calibration is None or len(calibration.images) < 2):
        raise ValueError("int8 needs calibration images, expected at least two")
    if not sources and not forms:
        raise ValueError("nothing to write: expected a network's ONNX file, or another form")
    if not isinstance(network, Predictor):
        network = NetworkPredictor(facts, network, runtime="network", name="the network")
    folder = Path(folder)
    with staged(folder) as scratch:
        made = Making(scratch, facts, network)
        if sources:
            made.write_onnx(sources)
        for runtime, form in (forms or {}).items():
            made.write_form(runtime, form)
        result = None
        if wish.mode != "no" and calibration is not None:
            result = made.write_int8(calibration, wish, batches)
        asked = _generated(facts.input_size) if test is None else test
        if isinstance(asked, Sized):  # a loader or a list says how long it will take
            asked = progress(asked, total=len(asked), label="export: asking the files")
        sample = made.judge(asked)
        made.check(min_same, max_distance)
        if result is not None and result.kept:
            result = made.judged_int8(result, wish)
        final = made.described(
            result, made.latency(sample, batches), judged_on if test is not None else None
        )
        card = model_card(final, name=folder.name)
        (scratch / CARD_FILE).write_text(card, encoding="utf-8")
        write_facts(scratch, final)
    return Written(folder, final, result, tuple(_lines(folder, final, result)))


def generated_images(size: tuple[int, int], count: int = GENERATED) -> Images:
    """Smooth and noisy pictures uint8 ``(count, H, W, 3)`` to check with, always the same."""
    rng = np.random.default_rng(0)
    height, width = size
    coarse = rng.integers(0, 256, (count, 6, 6, 3)).astype(np.uint8)
    smooth = [cv2.resize(one, (width, height), interpolation=cv2.INTER_CUBIC) for one in coarse]
    noise = rng.normal(0, 1, (count, height, width, 3)) * rng.uniform(0, 40, (count, 1, 1, 1))
    return np.clip(np.stack(smooth) + noise, 0, 255).astype(np.uint8)


def _generated(size: tuple[int, int]) -> Iterable[tuple[Images, None]]:
    images = generated_images(size)
    return ((images[i : i + 16], None) for i in range(0, len(images), 16))


def _lines(folder: Path, facts: ModelFacts, int8: Int8Result | None) -> list[str]:
    lines = [f"{folder}: {facts.architecture}, {', '.join(facts.files)}"]
    for runtime, row in facts.measured["files"].items():
        same, times = row["agreement"]["same_class"], row["latency"]
        parts = [] if same is None else [f"the network's class for {100 * same:.2f} %"]
        parts.append(f"answers differ by at most {row['agreement']['max_distance']:.1e}")
        if row["accuracy"] is not None:
            one = row["accuracy"]
            parts.append(f"accuracy {one['value']:.4f} ({one['low']:.4f} to {one['high']:.4f})")
        parts.append(
            "ms an image at batch " + ", ".join(f"{n}: {t['cpu_ms']:.2f}" for n, t in times.items())
        )
        parts.append(f"{sum(row['bytes'].values()) / 1e6:.2f} MB")
        lines.append(f"  {runtime}: " + "; ".join(parts))
    lines.append(f"  on {facts.measured['files'][facts.default]['agreement']['images']} images of "
                 f"{facts.measured['judged_on']}")  # fmt: skip
    return lines if int8 is None else [*lines, "  " + int8.line()]
