"""Features on disk: order, length, resuming after a kill, unreadable images, stores."""

import json
import os
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest

from landmark_distill.gallery import features as features_module
from landmark_distill.gallery.features import (
    extract_features,
    load_features,
    open_store,
    unit_rows,
    write_names,
)
from landmark_distill.images.views import whole_view
from landmark_distill.judging.pictures import (
    FRAME,
    GAP,
    GREEN,
    RED,
    Tile,
    contact_sheet,
    write_sheet,
)
from shared_core.datasets import ImageSet
from shared_core.deploy.facts import ModelFacts
from shared_core.deploy.predictor import NetworkPredictor
from shared_core.for_torch.data import IMAGENET_MEAN, IMAGENET_STD

REPO = Path(__file__).resolve().parents[2]


def _flat(run=None, *, bgr=False, weights="w", width=12):
    """A network whose feature is the beginning of the normalised image, or what ``run`` makes."""
    facts = ModelFacts(
        project="test", architecture="flat", class_names=(), input_size=(8, 8),
        view=whole_view(8, "linear").settings(), mean=IMAGENET_MEAN, std=IMAGENET_STD,
        task="embed", activation="none", bgr=bgr, more={"feature_dim": width},
        provenance={"checkpoint_sha256": weights},
    )  # fmt: skip

    def flat(images):
        pixels = facts.normalise(images).reshape(len(images), -1)[:, :12]
        return pixels if run is None else run(pixels)

    return NetworkPredictor(facts, flat, runtime="test", name="flat")


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


def _run(paths, out, network=None, **more):
    words = {"batch_size": 2, "threads": 0, **more}
    return extract_features(network or _flat(), ImageSet(paths, [0] * len(paths)), out, **words)


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
    done = _run(paths, tmp_path / "opensetFeat.npy", _flat(bgr=bgr), dtype=dtype)
    rows = load_features(done.path)
    assert rows.dtype == dtype and rows.shape == (11, 12) and done.bad == ()
    tolerance = 1e-3 if dtype == "float16" else 1e-5
    np.testing.assert_allclose(rows, _expected(paths, bgr), atol=tolerance)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["i", "opensetFeat.npy"]


def test_stopped_and_called_again_it_embeds_the_rest_only(tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "SAVE_EVERY", 1)
    paths = _files(tmp_path / "i", bad=(1, 2, 3, 7))
    seen = []

    def stops(rows):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(len(rows))
        return rows

    with pytest.raises(KeyboardInterrupt):
        _run(paths, tmp_path / "f.npy", _flat(stops), on_error="skip")
    assert not (tmp_path / "f.npy").exists()
    calls = []

    def counts(rows):
        calls.append(len(rows))
        return rows

    done = _run(paths, tmp_path / "f.npy", _flat(counts), on_error="skip")
    assert sum(seen) + sum(calls) == 7 + 0 and calls
    assert done.kept.tolist() == [0, 4, 5, 6, 8, 9, 10]
    assert [index for index, _ in done.bad] == [1, 2, 3, 7]
    whole = _run(paths, tmp_path / "whole.npy", on_error="skip")
    assert done.path.read_bytes() == whole.path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.npy", "i", "whole.npy"]


@pytest.mark.parametrize("change", ["weights", "batch_size", "image", "view"])
def test_what_changed_is_not_resumed(tmp_path, monkeypatch, change):
    monkeypatch.setattr(features_module, "SAVE_EVERY", 1)
    paths = _files(tmp_path / "i")

    def stops(rows):
        if (tmp_path / "f.npy.progress.json").exists():
            raise KeyboardInterrupt
        return rows

    with pytest.raises(KeyboardInterrupt):
        _run(paths, tmp_path / "f.npy", _flat(stops))
    more, network = {}, {}
    if change == "image":
        cv2.imwrite(str(paths[0]), np.zeros((8, 9, 3), np.uint8) + 77)
    elif change == "batch_size":
        more["batch_size"] = 3
    else:
        network = {"weights": "v"} if change == "weights" else {"bgr": True}
    got = _run(paths, tmp_path / "f.npy", _flat(**network), **more)
    new = _run(paths, tmp_path / "g.npy", _flat(**network), **more)
    assert got.path.read_bytes() == new.path.read_bytes()


def test_killed_and_started_again_the_file_is_the_same_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "SAVE_EVERY", 1)
    paths = _files(tmp_path / "i")
    calls = []

    def dies(rows):
        calls.append(len(rows))
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows

    pid = os.fork()
    if pid == 0:
        _run(paths, tmp_path / "f.npy", _flat(dies))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    def counts(rows):
        calls.append(len(rows))
        return rows

    _run(paths, tmp_path / "f.npy", _flat(counts))
    assert len(calls) == 3  # of six batches three were done
    truth = _run(paths, tmp_path / "whole.npy")
    assert (tmp_path / "f.npy").read_bytes() == truth.path.read_bytes()


def test_features_that_are_no_features_are_refused(tmp_path):
    paths = _files(tmp_path / "i", count=3)
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        _run(paths, tmp_path / "f.npy", dtype="int8")
    with pytest.raises(ValueError, match="no images"):
        _run([], tmp_path / "f.npy")
    with pytest.raises(ValueError, match="not finite"):
        _run(paths, tmp_path / "f.npy", _flat(lambda rows: rows * np.nan))
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
