"""From a folder to a split that is written down: what is left out, kept together, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from shared_core import datasets
from shared_core.datasets.splitting.prepared import QUARANTINE_FILE, SPLIT_FILE, prepare_data

SCENES = {"num_classes": 3, "image_size": 24, "images_per_class": 30, "seed": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images") / "set"
    datasets.make_scenes(root, **SCENES)
    return root


def test_every_image_is_in_one_split_with_its_folder_as_class(tmp_path, folder):
    data = prepare_data(tmp_path, root=folder)
    seen = []
    for split in ("train", "calibration", "test"):
        images = data.image_set(split)
        seen += [str(path) for path in images.paths]
        for path, label in zip(images.paths, images.labels, strict=True):
            assert Path(path).parent.name == data.classes[label]
    on_disk = [str(path) for path in folder.rglob("*") if path.suffix in (".jpg", ".png")]
    assert sorted(seen) == sorted(on_disk) and len(seen) == 90
    assert (data.name, data.kind, data.image_side(), data.rehearsal) == ("set", "real", 24, False)
    facts = data.facts(48)
    assert (facts["pixels"], facts["images"], facts["split_hash"]) == (48, 90, data.manifest.hash)
    assert sum(facts["splits"].values()) == 90


def test_the_written_split_comes_before_the_arguments(tmp_path, folder):
    first = prepare_data(tmp_path / "a", root=folder)
    again = prepare_data(tmp_path / "a", root=folder, split_seed=9)
    other = prepare_data(tmp_path / "b", root=folder, split_seed=9)
    assert again.manifest.hash == first.manifest.hash != other.manifest.hash


def test_two_parts_are_enough(tmp_path, folder):
    data = prepare_data(tmp_path, root=folder, fractions=(("train", 0.7), ("test", 0.3)))
    assert data.manifest.splits == ("train", "test")
    assert len(data.image_set("train")) + len(data.image_set("test")) == 90
    with pytest.raises(datasets.DatasetError, match="no part 'calibration'"):
        data.image_set("calibration")


def test_scenes_are_drawn_into_the_output(tmp_path):
    data = prepare_data(tmp_path, root=None, scenes=SCENES)
    assert data.rehearsal and data.name == "built-in scenes"
    assert data.root == tmp_path / "data" / "scenes" and len(data.manifest.entries) == 90


def test_unreadable_files_are_left_out_and_listed(tmp_path, folder, capsys):
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    name = data_class = sorted(path.name for path in root.iterdir())[0]
    (root / data_class / "broken.jpg").write_bytes(b"no image")
    data = prepare_data(tmp_path / "out", root=root)
    assert len(data.manifest.entries) == 90
    assert f"{name}/broken.jpg" in (tmp_path / "out" / QUARANTINE_FILE).read_text()
    assert "left out 1 files" in capsys.readouterr().err


def test_copies_stay_together(tmp_path, folder):
    root = tmp_path / "set"
    shutil.copytree(folder, root)
    originals = sorted(path for path in root.rglob("*") if path.suffix in (".jpg", ".png"))
    for path in originals:
        shutil.copy(path, path.with_name("copy-" + path.name))
    data = prepare_data(tmp_path / "out", root=root)
    place = {Path(entry.path).name: entry.split for entry in data.manifest.entries}
    pairs = [(name, "copy-" + name) for name in place if "copy-" + name in place]
    assert len(pairs) > 10 and all(place[one] == place[two] for one, two in pairs)


def test_a_known_set_is_checked(tmp_path):
    spec = datasets.get("UCM")
    few = tmp_path / "few"
    few.mkdir()
    for name in ("a", "b"):
        (few / name).mkdir()
        pixels = np.full((8, 8, 3), 9, np.uint8)
        (few / name / "0.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    with pytest.raises(datasets.DatasetError, match="2 class folders, .* has 21"):
        prepare_data(tmp_path / "out", root=few, spec=spec)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_classes": 5}, "3 classes, --num_classes says 5"),
        ({"root": None}, "no scenes"),
        ({"quarantine": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_bad_arguments_are_named(tmp_path, folder, change, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        prepare_data(tmp_path, **({"root": folder} | change))


def test_one_class_is_no_classification(tmp_path, folder):
    root = tmp_path / "one"
    first = sorted(path for path in folder.iterdir() if path.is_dir())[0]
    shutil.copytree(first, root / first.name)
    with pytest.raises(datasets.DatasetError, match="one class"):
        prepare_data(tmp_path / "out", root=root)


def test_findings_are_written(tmp_path, folder):
    prepare_data(tmp_path, root=folder)
    assert json.loads((tmp_path / "verify.json").read_text())
    assert (tmp_path / "split.json").exists()


def test_a_given_manifest_decides_and_its_classes_are_held_to_the_folders(tmp_path, folder):
    first = prepare_data(tmp_path / "a", root=folder, split_seed=9)
    split = tmp_path / "a" / SPLIT_FILE
    given = prepare_data(tmp_path / "b", root=folder, split=split)
    assert given.manifest.hash == first.manifest.hash
    assert prepare_data(tmp_path / "b", root=folder, split=split).manifest == given.manifest
    prepare_data(tmp_path / "c", root=folder)
    with pytest.raises(datasets.DatasetError, match="begun with another split"):
        prepare_data(tmp_path / "c", root=folder, split=split)
    more = tmp_path / "more"
    shutil.copytree(folder, more)
    shutil.copytree(more / first.classes[0], more / "zebra")
    with pytest.raises(datasets.DatasetError, match=r"other classes .*zebra"):
        prepare_data(tmp_path / "d", root=more, split=split)


def test_a_group_stays_on_one_side(tmp_path, folder):
    data = prepare_data(tmp_path, root=folder, groups=lambda path: path.split("/")[0][0] + path[-5])
    sides = {}
    for entry in data.manifest.entries:
        sides.setdefault(entry.path.split("/")[0][0] + entry.path[-5], set()).add(entry.split)
    assert all(len(side) == 1 for side in sides.values())
    assert len({side for one in sides.values() for side in one}) == 3
