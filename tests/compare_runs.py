"""Runs of the journey as they lie before judging: images, a split, tiny candidates made by hand."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tiny_models as tiny

from compare.contract import CHECK_FILE, SPLIT_FILE, DataCheck, Job, Plan, Planned, write
from shared_core.datasets import Manifest
from shared_core.datasets.splitting.manifest import Entry, sorted_entries

CLASSES = tuple(sorted(tiny.CLASSES))  # another order than the models'
PER_PART = {"train": 8, "calibration": 60, "test": 80}
WORSE = tiny.WEIGHTS + np.random.default_rng(2).normal(0, 1.5, (3, 4)).astype(np.float32)


def colours(count: int, seed: int) -> np.ndarray:
    """uint8 ``(count, 3)``."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3)).astype(np.uint8)


def labelled(count: int, seed: int, wrong: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    """Colours, and numbers in ``CLASSES`` that the network's own answer mostly agrees with."""
    rng = np.random.default_rng(seed + 1)
    rows = colours(count, seed)
    own = tiny.logits_by_hand(rows[:, None, None, :]).argmax(axis=1)
    names = [tiny.CLASSES[k] for k in own]
    labels = np.array([CLASSES.index(name) for name in names])
    flipped = rng.random(count) < wrong
    labels[flipped] = rng.integers(0, len(CLASSES), flipped.sum())
    return rows, labels


def make_images(root: Path, *, seed: int = 0) -> list[Entry]:
    """PNG files of one colour each, 12 x 10 pixels; their entries."""
    entries = []
    for number, (part, count) in enumerate(PER_PART.items()):
        rows, labels = labelled(count, seed + 10 * number)
        for n, (colour, label) in enumerate(zip(rows, labels, strict=True)):
            path = f"{part}/{n:03d}.png"
            (root / part).mkdir(parents=True, exist_ok=True)
            picture = np.full((10, 12, 3), colour[::-1], np.uint8)
            (root / path).write_bytes(cv2.imencode(".png", picture)[1].tobytes())
            entries.append(Entry(path, int(label), f"{part}{n}", part))
    return entries


def write_split(folder: Path, entries: list[Entry]) -> Manifest:
    """The manifest of a run."""
    fractions = tuple((part, count / sum(PER_PART.values())) for part, count in PER_PART.items())
    manifest = Manifest("random", CLASSES, fractions, 0, sorted_entries(entries))
    (folder / SPLIT_FILE).parent.mkdir(parents=True, exist_ok=True)
    manifest.write(folder / SPLIT_FILE)
    return manifest


def planned(name: str, order: int = 0) -> Planned:
    """A candidate in the plan."""
    return Planned(name, name, "tiny", "tiny", f"Tiny {name}", {}, 0, 0.1, True, "", order)


def make_run(folder: Path, **candidates) -> tuple[DataCheck, Plan]:
    """A run whose candidates are done; each is a function that writes a model folder."""
    entries = make_images(folder / "images")
    manifest = write_split(folder, entries)
    for name, save in candidates.items():
        save(folder / "candidates" / name / "model")
        write(folder / "candidates" / name / "job.json", Job(name, "done"))
    counts = {part: tuple(row) for part, row in manifest.counts().items()}
    check = DataCheck("colours", "real", str(folder / "images"), CLASSES, counts, manifest.hash,
                      False, 10, notes=("one note",))  # fmt: skip
    write(folder / CHECK_FILE, check)
    rows = tuple(planned(name, n) for n, name in enumerate(candidates))
    return check, Plan(1.0, 1.0, (), 1, "cpu", 1, {}, rows)


def save_both(folder: Path) -> Path:
    """A float file, and one whose mean colours pass through 8 bits."""
    files = {"onnx": ("model.onnx",), "onnx-int8": ("model.int8.onnx",)}
    facts = tiny.make_facts(files=files)
    tiny.save_model(folder, facts)
    nodes = [tiny._node(kind, takes, gives, **words) for kind, takes, gives, words in tiny.MEANS]
    nodes += [
        tiny._node("QuantizeLinear", "means scale zero", "bits"),
        tiny._node("DequantizeLinear", "bits scale zero", "rounded"),
        tiny._node("MatMul", "rounded w", "product"),
        tiny._node("Add", "product b", "logits"),
        tiny._node("Softmax", "logits", "answers"),
    ]
    side = tiny.SIDE
    tiny.make_onnx(
        folder / "model.int8.onnx", nodes,
        [tiny._value("images", "UINT8", "N", side, side, 3)],
        [tiny._value("answers", "FLOAT", "N", 4)],
        {"w": tiny.WEIGHTS, "b": tiny.BIAS, "top": np.float32(255), "scale": np.float32(0.05),
         "zero": np.uint8(0)}, facts,
    )  # fmt: skip
    return folder


def swap_labels(folder: Path, part: str) -> Manifest:
    """The same split, but for the labels of one part: each becomes the next class."""
    manifest = Manifest.read(folder / SPLIT_FILE)
    entries = [
        entry._replace(label=(entry.label + 1) % len(CLASSES)) if entry.split == part else entry
        for entry in manifest.entries
    ]
    return write_split(folder, entries)


def answers_by_hand(part: str, folder: Path, weights: np.ndarray = tiny.WEIGHTS):
    """Labels, classes given (numbers of ``CLASSES``) and their probabilities, image by image."""
    manifest = Manifest.read(folder / SPLIT_FILE)
    items = manifest.subset(part)
    colour = np.stack([cv2.imread(str(folder / "images" / item.path))[0, 0, ::-1]
                       for item in items])  # fmt: skip
    logits = colour.astype(np.float64) / 255 @ weights + tiny.BIAS
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = powers / powers.sum(axis=1, keepdims=True)
    given = np.array([CLASSES.index(tiny.CLASSES[k]) for k in p.argmax(axis=1)])
    return np.array([item.label for item in items]), given, p.max(axis=1)
