"""Data that need no download: procedural scenes of graded difficulty, and scikit-learn's digits."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from shared_core.datasets.builtin import scenes
from shared_core.datasets.errors import DatasetError
from shared_core.datasets.finding.scan import Listing, scan

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

RECORD = "scenes.json"  # beside the class folders: the settings, and each file's difficulty
SCHEMA = "shared-core.scenes/1"
MAX_CLASSES = len(scenes.CLASSES)


def scene_class_names(num_classes: int = MAX_CLASSES) -> tuple[str, ...]:
    """The class names of a set of ``num_classes`` scenes, sorted: labels index them.

    A name is ``theme_form``. Smaller sets hold the classes that differ most.

    Raises:
        DatasetError: ``num_classes`` is not 2 to 45.
    """
    if not 2 <= num_classes <= MAX_CLASSES:
        raise DatasetError(f"num_classes is {num_classes}, expected 2 to {MAX_CLASSES}")
    return tuple(sorted(scenes.CLASSES[:num_classes]))


def scene_coarse_name(name: str) -> str:
    """The theme of a class, the coarse one of its two levels: ``tanks`` of ``tanks_ring``."""
    return name.partition("_")[0]


def render_scene(
    name: str, index: int, *, size: int, seed: int, difficulty: float | None = None
) -> tuple[Pixels, float]:
    """Draw scene ``index`` of class ``name``.

    The same arguments give the same pixels, bit for bit, with the same versions of NumPy and
    OpenCV.

    Args:
        name: one of ``scene_class_names()``.
        index: which of the class's scenes, from 0.
        size: height and width in pixels, at least 16.
        seed: of the set.
        difficulty: in [0, 1]; None draws it from the uniform distribution.

    Returns:
        RGB uint8 ``(size, size, 3)`` and the difficulty.

    Raises:
        DatasetError: an argument out of range.
    """
    if name not in scenes.CLASSES:
        raise DatasetError(f"unknown scene class {name!r}; see scene_class_names()")
    if size < 16:
        raise DatasetError(f"size is {size}, expected at least 16 pixels")
    if index < 0:
        raise DatasetError(f"index is {index}, expected 0 or more")
    if difficulty is not None and not 0 <= difficulty <= 1:
        raise DatasetError(f"difficulty is {difficulty}, expected 0 to 1")
    rng = scenes.scene_rng(seed, name, index)
    drawn = float(rng.random())  # drawn always: a given difficulty changes nothing but itself
    level = drawn if difficulty is None else float(difficulty)
    return scenes.draw(name, rng, size=size, difficulty=level), level


def scene_arrays(
    *, num_classes: int, image_size: int, images_per_class: int, seed: int
) -> tuple[Pixels, Labels, NDArray[np.float64]]:
    """The scenes of ``make_scenes`` as arrays, before JPEG: images, labels, difficulties.

    Returns:
        uint8 ``(N, image_size, image_size, 3)``, int64 ``(N,)``, float64 ``(N,)`` in [0, 1];
        N = num_classes * images_per_class, class by class.
    """
    names = scene_class_names(num_classes)
    rendered = [
        render_scene(name, index, size=image_size, seed=seed)
        for name in names
        for index in range(images_per_class)
    ]
    images = np.stack([image for image, _ in rendered])
    labels = np.repeat(np.arange(num_classes, dtype=np.int64), images_per_class)
    return images, labels, np.array([level for _, level in rendered])


def make_scenes(
    root: str | Path,
    *,
    num_classes: int = 10,
    image_size: int = 64,
    images_per_class: int = 100,
    seed: int = 0,
    file_format: Literal["jpg", "png"] = "jpg",
) -> Listing:
    """Write scenes as class folders ``root/<class>/<index>.jpg`` and list them.

    ``root/scenes.json`` records the settings and the difficulty of each file. A folder that holds
    exactly this set already is used as it is; it appears at once, whole, or not at all.

    Raises:
        DatasetError: bad settings, or ``root`` holds something else.
    """
    root = Path(root)
    names = scene_class_names(num_classes)
    if images_per_class < 1:
        raise DatasetError(f"images_per_class is {images_per_class}, expected at least 1")
    if file_format not in ("jpg", "png"):
        raise DatasetError(f"file_format is {file_format!r}, expected 'jpg' or 'png'")
    settings = {
        "schema": SCHEMA,
        "num_classes": num_classes,
        "image_size": image_size,
        "images_per_class": images_per_class,
        "seed": seed,
        "file_format": file_format,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
    }
    if _occupied(root, settings):
        return scan(root, classes=names)
    scratch = _scratch(root)
    levels: dict[str, float] = {}
    for name in names:
        for index in range(images_per_class):
            image, level = render_scene(name, index, size=image_size, seed=seed)
            path = f"{name}/{index:05d}.{file_format}"
            _write_image(scratch / path, image)
            levels[path] = round(level, 6)
    text = json.dumps({"settings": settings, "difficulty": levels}, indent=0)
    (scratch / RECORD).write_text(text + "\n", encoding="utf-8")
    _publish(scratch, root)
    return scan(root, classes=names)


def scene_difficulty(root: str | Path) -> dict[str, float]:
    """Difficulty in [0, 1] of each file (path below root) of a folder made by ``make_scenes``.

    Raises:
        DatasetError: ``root`` has no readable record of scenes.
    """
    record = _read_record(Path(root))
    if record is None:
        raise DatasetError(f"{root} has no {RECORD}; expected a folder made by make_scenes")
    return {str(path): float(level) for path, level in record["difficulty"].items()}


def digits(*, size: int = 8) -> tuple[Pixels, Labels]:
    """The 1,797 handwritten digits that scikit-learn brings along: real data, 10 classes.

    Args:
        size: pixels; 8 is as stored, more is scaled up by bilinear interpolation.

    Returns:
        RGB uint8 ``(1797, size, size, 3)`` with white (255) ink on black, and int64 ``(1797,)``.

    Raises:
        DatasetError: ``size`` below 8.

    Source: Alpaydin and Kaynak 1998, UCI "Optical Recognition of Handwritten Digits" (test part).
    """
    if size < 8:
        raise DatasetError(f"size is {size}, expected at least 8 pixels")
    from sklearn.datasets import load_digits  # an optional library, needed here only

    data = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)
    if size > 8:
        grey = np.stack([cv2.resize(g, (size, size), interpolation=cv2.INTER_LINEAR) for g in grey])
    images = np.repeat(grey[:, :, :, None], 3, axis=3)
    return images, np.asarray(data.target, dtype=np.int64)


def make_digits(root: str | Path, *, size: int = 32) -> Listing:
    """Write the digits as PNG class folders ``root/<digit>/<index>.png`` and list them.

    Raises:
        DatasetError: ``size`` below 8, or ``root`` holds something else.
    """
    root = Path(root)
    settings = {"schema": "shared-core.digits/1", "size": size, "opencv": cv2.__version__}
    names = tuple(str(digit) for digit in range(10))
    if _occupied(root, settings):
        return scan(root, classes=names)
    images, labels = digits(size=size)
    scratch = _scratch(root)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        _write_image(scratch / f"{label}/{index:04d}.png", image)
    text = json.dumps({"settings": settings, "difficulty": {}})
    (scratch / RECORD).write_text(text + "\n", encoding="utf-8")
    _publish(scratch, root)
    return scan(root, classes=names)


def _read_record(root: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((root / RECORD).read_text(encoding="utf-8"))
        return record if isinstance(record["difficulty"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _occupied(root: Path, settings: dict[str, object]) -> bool:
    """True: root holds just this set. False: root is free.

    Raises:
        DatasetError: root holds something else.
    """
    if not root.exists():
        return False
    record = _read_record(root)
    if record is not None and record.get("settings") == settings:
        return True
    if not root.is_dir() or any(root.iterdir()):
        what = "a set made with other settings" if record is not None else "other files"
        raise DatasetError(f"{root} holds {what}; take it away, or name another folder")
    return False


def _scratch(root: Path) -> Path:
    scratch = root.absolute().parent / f".{root.name}.making-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    return scratch


def _publish(scratch: Path, root: Path) -> None:
    if root.exists():
        root.rmdir()  # empty, as checked
    os.rename(scratch, root)


def _write_image(path: Path, image: Pixels) -> None:
    path.parent.mkdir(exist_ok=True)
    options = [cv2.IMWRITE_JPEG_QUALITY, 95] if path.suffix == ".jpg" else []
    done, data = cv2.imencode(path.suffix, image[:, :, ::-1], options)
    if not done:
        raise DatasetError(f"cannot encode {path}")
    path.write_bytes(data.tobytes())
