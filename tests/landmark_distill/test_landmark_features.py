"""Features on disk: order, length, resuming after a kill, unreadable images, stores."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from landmark_distill import features as features_module
from landmark_distill.contact_sheet import FRAME, GAP, GREEN, RED, Tile, contact_sheet, write_sheet
from landmark_distill.feature_store import open_store, write_names
from landmark_distill.features import Sight, extract_features, load_features, unit_rows
from shared_core.datasets import ImageSet

REPO = Path(__file__).resolve().parents[2]
SIGHT = Sight(size=8)


def _files(folder, count=11, bad=()):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for n in range(count):
        path = folder / f"{n:02d}.png"
        if n in bad:
            path.write_bytes(b"no image")
        else:
            cv2.imwrite(str(path), rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        paths.append(path)
    return paths


def _flat(images):
    return images.flatten(1)[:, :12]


def _run(paths, out, **more):
    words = {"sight": SIGHT, "width": 12, "weights": "w", "batch_size": 2, "threads": 0, **more}
    return extract_features(_flat, ImageSet(paths, [0] * len(paths)), out, **words)


def _expected(paths, bgr=False):
    """Pixels by OpenCV, normalised with ImageNet's numbers in float64, channels first."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    rows = []
    for path in paths:
        image = (cv2.imread(str(path))[..., ::-1] / 255 - mean) / std
        flat = (image[..., ::-1] if bgr else image).transpose(2, 0, 1).reshape(-1)[:12]
        rows.append(flat / np.linalg.norm(flat))
    return np.array(rows)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("bgr", [False, True])
def test_rows_are_in_order_and_of_unit_length(tmp_path, dtype, bgr):
    paths = _files(tmp_path / "i")
    done = _run(paths, tmp_path / "opensetFeat.npy", dtype=dtype, sight=Sight(8, bgr=bgr))
    rows = load_features(done.path)
    assert rows.dtype == dtype and rows.shape == (11, 12) and done.bad == ()
    tolerance = 1e-3 if dtype == "float16" else 1e-5
    np.testing.assert_allclose(rows, _expected(paths, bgr), atol=tolerance)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i", "opensetFeat.npy"]


def test_stopped_and_called_again_it_embeds_the_rest_only(tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "SAVE_EVERY", 1)
    paths = _files(tmp_path / "i", bad=(1, 2, 3, 7))
    seen = []

    def stops(images):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(images))
        return _flat(images)

    images = ImageSet(paths, [0] * 11)
    words = {"sight": SIGHT, "width": 12, "weights": "w", "batch_size": 2, "threads": 0}
    words["on_error"] = "skip"
    with pytest.raises(KeyboardInterrupt):
        extract_features(stops, images, tmp_path / "f.npy", **words)
    assert not (tmp_path / "f.npy").exists()
    calls = []

    def counts(images):
        calls.append(len(images))
        return _flat(images)

    done = extract_features(counts, images, tmp_path / "f.npy", **words)
    assert sum(seen) + sum(calls) == 7 + 0 and calls
    assert done.kept.tolist() == [0, 4, 5, 6, 8, 9, 10]
    assert [index for index, _ in done.bad] == [1, 2, 3, 7]
    whole = extract_features(_flat, images, tmp_path / "whole.npy", **words)
    assert done.path.read_bytes() == whole.path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npy", "i", "whole.npy"]


@pytest.mark.parametrize("change", ["weights", "batch_size", "image", "sight"])
def test_what_changed_is_not_resumed(tmp_path, monkeypatch, change):
    monkeypatch.setattr(features_module, "SAVE_EVERY", 1)
    paths = _files(tmp_path / "i")

    def stops(images):
        if (tmp_path / "f.npy.progress.json").exists():
            raise KeyboardInterrupt
        return _flat(images)

    words = {"sight": SIGHT, "width": 12, "weights": "w", "batch_size": 2, "threads": 0}
    with pytest.raises(KeyboardInterrupt):
        extract_features(stops, ImageSet(paths, [0] * 11), tmp_path / "f.npy", **words)
    if change == "image":
        cv2.imwrite(str(paths[0]), np.zeros((8, 9, 3), np.uint8) + 77)
    else:
        words[change] = {"weights": "v", "batch_size": 3, "sight": Sight(8, bgr=True)}[change]
    got = extract_features(_flat, ImageSet(paths, [0] * 11), tmp_path / "f.npy", **words)
    new = extract_features(_flat, ImageSet(paths, [0] * 11), tmp_path / "g.npy", **words)
    assert got.path.read_bytes() == new.path.read_bytes()


KILLED = """
import sys
sys.path[:0] = [{packages!r}, {shared!r}]
import os, signal
from pathlib import Path
from landmark_distill import features
from landmark_distill.features import Sight, extract_features
from shared_core.datasets import ImageSet
features.SAVE_EVERY = 1
paths = sorted(Path({folder!r}).iterdir())
calls = 0
def embed(images):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return images.flatten(1)[:, :12]
extract_features(embed, ImageSet(paths, [0] * len(paths)), {out!r}, sight=Sight(size=8),
                 width=12, weights="w", batch_size=2, threads=0)
print(calls)
"""


def test_killed_and_started_again_the_file_is_the_same_bit_for_bit(tmp_path):
    paths = _files(tmp_path / "i")

    def start(at):
        code = KILLED.format(
            packages=str(REPO / "packages"), shared=str(REPO / "shared"),
            folder=str(tmp_path / "i"), out=str(tmp_path / "f.npy"), at=at,
        )  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment
        )

    assert start(4).returncode == -signal.SIGKILL
    again = start(0)
    assert again.returncode == 0, again.stderr
    assert int(again.stdout) == 3  # of six batches three were done
    truth = _run(paths, tmp_path / "whole.npy")
    assert (tmp_path / "f.npy").read_bytes() == truth.path.read_bytes()


def test_features_that_are_no_features_are_refused(tmp_path):
    paths = _files(tmp_path / "i", count=3)
    with pytest.raises(ValueError, match=r"expected \(2, 5\)"):
        _run(paths, tmp_path / "f.npy", width=5)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        _run(paths, tmp_path / "f.npy", dtype="int8")
    with pytest.raises(ValueError, match="no images"):
        _run([], tmp_path / "f.npy")
    broken = lambda images: torch.full((len(images), 12), torch.nan)  # noqa: E731
    with pytest.raises(ValueError, match="not finite"):
        extract_features(
            broken, ImageSet(paths, [0] * 3), tmp_path / "f.npy", sight=SIGHT, width=12, weights=""
        )
    bad = _files(tmp_path / "bad", count=2, bad=(0, 1))
    with pytest.raises(ValueError, match="none of 2 images can be read"):
        _run(bad, tmp_path / "f.npy", on_error="skip")
    np.testing.assert_array_equal(unit_rows(np.zeros((1, 3))), 0)


def test_a_store_knows_its_paths(tmp_path):
    np.save(tmp_path / "g.npy", np.eye(2, dtype=np.float32))
    assert open_store(tmp_path / "g.npy").paths == ("0", "1")
    _files(tmp_path / "i", count=1)
    write_names(tmp_path / "g.npy", ["00.png", "gone é.png"], {"root": str(tmp_path / "i")})
    store = open_store(tmp_path / "g.npy")
    assert store.paths == ("00.png", "gone é.png")
    assert store.image(0) == tmp_path / "i" / "00.png" and store.image(1) is None
    (tmp_path / "g.paths.txt").write_text("one\n")
    with pytest.raises(ValueError, match="1 lines for 2 features"):
        open_store(tmp_path / "g.npy")
    (tmp_path / "g.paths.txt").unlink()
    (tmp_path / "g.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        open_store(tmp_path / "g.npy")
    with pytest.raises(FileNotFoundError, match="expected features"):
        open_store(tmp_path / "none.npy")
    np.save(tmp_path / "i.npy", np.eye(2, dtype=np.int64))
    with pytest.raises(ValueError, match="expected features: float"):
        load_features(tmp_path / "i.npy")


# -- the picture ----------------------------------------------------------------------------------


def test_the_sheet_shows_images_and_frames_where_they_belong(tmp_path):
    paths = _files(tmp_path / "i", count=2, bad=(1,))
    plain = np.full((4, 4, 3), (10, 200, 30), np.uint8)
    rows = [
        [Tile(plain, "query"), Tile(plain, "0.9", True), Tile(paths[0], "0.5", False)],
        [Tile(None), Tile(paths[1], "a very long name indeed.jpg")],
    ]
    sheet = contact_sheet(rows, size=32)
    cell = 32 + 2 * FRAME
    middle = GAP + cell // 2
    assert tuple(sheet[middle, GAP + cell // 2]) == (10, 200, 30)
    second = GAP + (cell + GAP) + GAP
    assert tuple(sheet[middle, second + 1]) == GREEN
    assert tuple(sheet[middle, second + cell // 2]) == (10, 200, 30)
    assert tuple(sheet[middle, second + cell + GAP + 1]) == RED
    write_sheet(tmp_path / "s.png", rows, size=32)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "s.png"))[..., ::-1], sheet)
    with pytest.raises(ValueError, match="no tiles"):
        contact_sheet([])
    with pytest.raises(ValueError, match="at least 16"):
        contact_sheet(rows, size=4)
    assert json.dumps(sheet.shape)
