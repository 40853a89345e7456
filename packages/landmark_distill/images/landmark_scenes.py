"""Drawn scenes in two levels, theme/form, for rehearsals: no download, equal on every machine."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2

from landmark_distill.config import DrawnScenes
from shared_core.datasets import DatasetError, render_scene, scene_class_names
from shared_core.datasets.builtin.sources import scene_coarse_name

MARK = "scenes.json"  # beside the theme folders; it tells drawn images from real ones
SCHEMA = "landmark_distill.scenes/1"


def is_drawn(root: str | Path) -> bool:
    """Whether a folder holds scenes of :func:`make_landmark_scenes`."""
    return _settings_of(Path(root)) is not None


def make_landmark_scenes(root: str | Path, scenes: DrawnScenes) -> Path:
    """Write scenes as ``root/<theme>/<theme_form>/<index>.png``.

    A theme (tanks, roads, water...) is a coarse class, a form of it (ring, grid, row...) a fine
    one. A folder that holds just these scenes is used as it is; it appears whole or not at all.

    Args:
        scenes: 2 to 45 fine classes, at least 16 pixels.

    Raises:
        DatasetError: a number out of range, or ``root`` holds something else.
    """
    root = Path(root)
    settings = {"schema": SCHEMA, **asdict(scenes)}
    if root.exists() and any(root.iterdir()):
        if _settings_of(root) != settings:
            raise DatasetError(f"{root} holds other files; take it away, or name another folder")
        return root
    scratch = root.absolute().parent / f".{root.name}.making-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    for name in scene_class_names(scenes.num_classes):
        folder = scratch / scene_coarse_name(name) / name
        folder.mkdir(parents=True)
        for index in range(scenes.images_per_class):
            image, _ = render_scene(name, index, size=scenes.image_size, seed=scenes.seed)
            done, data = cv2.imencode(".png", image[:, :, ::-1])
            if not done:
                raise DatasetError(f"cannot encode {folder / str(index)}")
            (folder / f"{index:04d}.png").write_bytes(data.tobytes())
    (scratch / MARK).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    if root.exists():
        root.rmdir()
    os.rename(scratch, root)
    return root


def _settings_of(root: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((root / MARK).read_text(encoding="utf-8"))
        return dict(found) if found["schema"] == SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
