"""Lists with offsets and maps, two-level folders, what is held out, channels and lighting."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from landmark_distill.config import DrawnScenes, HoldOut
from landmark_distill.images.file_lists import joined_labels, label_offsets, read_list, read_remap
from landmark_distill.images.landmark_scenes import is_drawn, make_landmark_scenes
from landmark_distill.images.two_level import (
    assign_groups,
    part_of,
    scan_levels,
    split_levels,
)
from landmark_distill.images.views import (
    EIGENVALUES,
    EIGENVECTORS,
    eval_loader,
    lighting_shift,
    train_loader,
    view_settings,
)
from shared_core.datasets import DatasetError, ImageSet
from shared_core.datasets.finding.fingerprint import content_key

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def write_list(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


# -- lists ----------------------------------------------------------------------------------------


def test_a_list_is_read_column_by_column(tmp_path):
    path = write_list(tmp_path / "l.txt", "a/1 x.jpg\t东京\t1", "", "b.jpg\t\t0\r")
    found = read_list(path, "/images")
    assert found.names == ("a/1 x.jpg", "b.jpg") and found.root == Path("/images")
    assert found.labels.tolist() == [1, 0] and found.notes == ()


@pytest.mark.parametrize(
    ("name", "written", "encoding"),
    [
        ("a/é x.jpg", "a\\é x.jpg", "utf-8-sig"),  # Notepad's mark, Windows' slashes
        ("东京/1.jpg", "东京/1.jpg", "gb18030"),
        ("e\u0301.jpg", "é.jpg", "utf-8"),  # a Mac's decomposed accent
        ("b.jpg", "./b.jpg", "utf-16"),
    ],
)
def test_a_list_of_any_editor_finds_its_files(tmp_path, name, written, encoding):
    file = tmp_path / "images" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    (tmp_path / "l.txt").write_bytes(f"{written}\tx\t0\r\n\r\n".encode(encoding))
    found = read_list(tmp_path / "l.txt", tmp_path / "images")
    assert found.files() == [file]
    assert bool(found.notes) == (encoding == "gb18030")


def test_entries_that_match_nothing_are_counted_and_named(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    path = write_list(tmp_path / "l.txt", "a.jpg\tx\t0", "b.jpg\tx\t0", "c/d.jpg\tx\t1")
    with pytest.raises(DatasetError, match="2 of 3 entries of .*b.jpg, c/d.jpg"):
        read_list(path, tmp_path).files()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("a.jpg\t1", "2 columns"),
        ("a.jpg x 1", "1 columns"),
        ("a\tb\tc\td", "4 columns"),
        ("\tb\t1", "3 columns"),
        ("a\tb\t-1", "label '-1'"),
        ("a\tb\t1.0", "label '1.0'"),
        ("a\tb\t", "label ''"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, named):
    path = write_list(tmp_path / "l.txt", "a.jpg\tx\t0", line)
    with pytest.raises(DatasetError, match="line 2") as caught:
        read_list(path, ".")
    assert named in str(caught.value) and str(path) in str(caught.value)


def test_bad_list_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_list(tmp_path / "none.txt", ".")
    (tmp_path / "null.txt").write_bytes(b"a\tb\t0\n\0")
    with pytest.raises(DatasetError, match="null characters"):
        read_list(tmp_path / "null.txt", ".")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DatasetError, match="no lines"):
        read_list(tmp_path / "empty.txt", ".")


def test_offsets_and_map_by_hand(tmp_path):
    first = write_list(tmp_path / "1", "a\tx\t0", "b\tx\t2", "c\tx\t1", "d\tx\t2")
    second = write_list(tmp_path / "2", "e\tx\t1", "f\tx\t0")
    third = write_list(tmp_path / "3", "g\tx\t0")
    lists = [read_list(path, ".") for path in (first, second, third)]
    assert label_offsets(lists) == [0, 3, 5]
    labels, classes = joined_labels(lists)
    assert labels.tolist() == [0, 2, 1, 2, 4, 3, 5] and classes == 6
    # 4 is the same place as 1, and 5 becomes 3; others stay.
    labels, classes = joined_labels(lists, remap={4: 1, 5: 3, 17: 2})
    assert labels.tolist() == [0, 2, 1, 2, 1, 3, 3] and classes == 4


def test_gaps_in_a_list_would_make_labels_collide(tmp_path):
    one = read_list(write_list(tmp_path / "1", "a\tx\t0", "b\tx\t2"), ".")
    with pytest.raises(DatasetError, match="none is 1"):
        label_offsets([one])


def test_maps_of_both_kinds(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"4": 1, "5": [3, 0.9]}))
    assert read_remap(tmp_path / "m.json") == {4: 1, 5: 3}
    torch.save({4: (1, 0.5), 5: (3, 0.25)}, tmp_path / "m.pth")
    assert read_remap(tmp_path / "m.pth") == {4: 1, 5: 3}


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/landmark-hostile"),))


def test_bad_maps(tmp_path):
    for content, named in (
        ({"a": 1}, "'a' -> 1"),
        ({"1": -1}, "-1"),
        ({"1": 2.5}, "2.5"),
        ([], ""),
    ):
        (tmp_path / "m.json").write_text(json.dumps(content))
        with pytest.raises(DatasetError) as caught:
            read_remap(tmp_path / "m.json")
        assert named in str(caught.value)
    torch.save(Hostile(), tmp_path / "m.pth")
    with pytest.raises(DatasetError, match="plain numbers"):
        read_remap(tmp_path / "m.pth")
    assert not Path("/tmp/landmark-hostile").exists()


# -- folders --------------------------------------------------------------------------------------


def test_levels_are_told_apart(tmp_path, landmark_images):
    root = landmark_images(tmp_path / "two", ("x", "y"))
    listing, coarse = scan_levels(root)
    assert listing.classes == ("x/fine0", "x/fine1", "y/fine0", "y/fine1")
    assert coarse == ("x", "x", "y", "y")
    flat, same = scan_levels(root, layout="class")
    assert flat.classes == same == ("x", "y")
    shutil.copy(root / "x" / "fine0" / "0.png", root / "x" / "0.png")
    assert scan_levels(root)[0].classes == ("x", "y")
    with pytest.raises(DatasetError, match="x/0.png lies in one folder"):
        scan_levels(root, layout="two-level")


def test_whole_groups_are_held_out():
    coarse = [
        name for name, count in (("a", 4), ("b", 3), ("c", 5), ("d", 2)) for _ in range(count)
    ]
    parts = assign_groups(coarse, HoldOut(test=0.3, validation=0.2))
    count = {
        part: sum(parts[c] == part for c in coarse) for part in ("train", "test", "validation")
    }
    assert count["test"] >= 0.3 * 14 and count["validation"] >= 0.2 * 14 and count["train"] > 0
    assert parts == assign_groups(list(reversed(coarse)), HoldOut(test=0.3, validation=0.2))
    others = [assign_groups(coarse, HoldOut(test=0.3, seed=seed)) for seed in range(8)]
    assert len({tuple(sorted(p.items())) for p in others}) > 1
    few = assign_groups(["a", "b", "c"], HoldOut(test=0.25, validation=0.15))
    assert sorted(few.values()) == ["test", "train", "train"]  # nobody learns from one class
    named = assign_groups(coarse, HoldOut(test_groups=("b",), validation_groups=("d",)))
    assert named == {"a": "train", "b": "test", "c": "train", "d": "validation"}
    for hold_out, message in (
        (HoldOut(test_groups=("z",)), "'z' is not among"),
        (HoldOut(test_groups=("a",), validation_groups=("a",)), "twice"),
        (HoldOut(test=1.0), "none to learn from"),
    ):
        with pytest.raises(DatasetError, match=message):
            assign_groups(coarse, hold_out)


def make_split(root: Path, **hold_out):
    listing, coarse = scan_levels(root)
    keys = {listing.relative(s): content_key(s.path) for s in listing.samples}
    groups = dict(zip(listing.classes, coarse, strict=True))
    return split_levels(listing, coarse, keys=keys, hold_out=HoldOut(**hold_out)), groups


def test_test_classes_are_never_learned(tmp_path, landmark_images):
    root = landmark_images(tmp_path / "d")
    manifest, groups = make_split(root, test=0.25, validation=0.25, calibration=0.2)
    by_part: dict[str, set] = {}
    for entry in manifest.entries:
        by_part.setdefault(entry.split, set()).add(groups[manifest.classes[entry.label]])
    assert by_part["train"] == by_part["calibration"]
    held = by_part["test"] | by_part["validation"]
    assert not held & by_part["train"] and not by_part["test"] & by_part["validation"]
    counts = manifest.counts()
    for label in range(len(manifest.classes)):
        if counts["train"][label]:
            assert counts["calibration"][label] == 1  # 0.2 of 6 images
    again, _ = make_split(root, test=0.25, validation=0.25, calibration=0.2)
    assert again.hash == manifest.hash


def test_a_folders_own_parts_are_joined(tmp_path, landmark_images):
    """Whoever set images apart, classes that nobody has seen are set apart here."""
    root = landmark_images(tmp_path / "i")
    whole, coarse = scan_levels(root)
    for n, path in enumerate(sorted(root.rglob("*.png"))):
        part = ("train", "val", "test")[n % 3]
        target = tmp_path / "parts" / part / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    listing, groups = scan_levels(tmp_path / "parts")
    assert (listing.classes, groups) == (whole.classes, coarse)
    assert listing.counts() == whole.counts()
    manifest, _ = make_split(tmp_path / "parts", test=0.25)
    assert any("joined" in note for note in manifest.notes)


def test_adding_an_image_moves_no_other(tmp_path, landmark_images):
    root = landmark_images(tmp_path / "d", images=20)
    before, _ = make_split(root, calibration=0.1)
    source = cv2.imread(str(root / "a" / "fine0" / "0.png"))
    cv2.imwrite(str(root / "b" / "fine0" / "new.png"), 255 - source)
    after, _ = make_split(root, calibration=0.1)
    old = {e.path: e.split for e in before.entries}
    new = {e.path: e.split for e in after.entries}
    moved = [path for path in old if old[path] != new[path]]
    assert len(moved) <= 1  # at most the one whose place the new image took


def test_copies_stay_in_the_part_that_is_looked_at_last(tmp_path, landmark_images):
    root = landmark_images(tmp_path / "d")
    manifest, _ = make_split(root, test_groups=("a",), calibration=0.0)
    assert not manifest.quarantined
    shutil.copy(root / "a" / "fine0" / "0.png", root / "b" / "fine1" / "copy.png")
    manifest, _ = make_split(root, test_groups=("a",), calibration=0.0)
    assert list(manifest.quarantined) == ["b/fine1/copy.png"]
    assert all(e.path != "b/fine1/copy.png" for e in manifest.entries)


def test_labels_of_a_part(tmp_path, landmark_images):
    root = landmark_images(tmp_path / "d", ("a", "b"))
    manifest, groups = make_split(root, test_groups=("a",), calibration=0.2)
    learned = ("b/fine0", "b/fine1")
    train = part_of(manifest, root, "train", coarse_of=groups.get, classes=learned)
    assert sorted(set(train.images.labels.tolist())) == [0, 1]
    names = [learned[label] for label in train.images.labels]
    assert [Path(p).parent.relative_to(root).as_posix() for p in train.images.paths] == names
    test = part_of(manifest, root, "test", coarse_of=groups.get)
    assert len(set(test.fine.tolist())) == 2 and len(set(test.coarse.tolist())) == 1
    with pytest.raises(DatasetError, match="validation part is empty"):
        part_of(manifest, root, "validation", coarse_of=groups.get)
    with pytest.raises(DatasetError, match="'a/fine0' is not among"):
        part_of(manifest, root, "test", coarse_of=groups.get, classes=learned)


def test_drawn_scenes(tmp_path):
    settings = DrawnScenes(num_classes=6, image_size=24, images_per_class=2, seed=3)
    root = make_landmark_scenes(tmp_path / "s", settings)
    listing, coarse = scan_levels(root)
    assert len(listing.classes) == 6 and len(listing.samples) == 12 and is_drawn(root)
    assert all(
        name == f"{group}/{group}_{name.split('_')[-1]}"
        for name, group in zip(listing.classes, coarse, strict=True)
    )
    first = {s.path: s.path.read_bytes() for s in listing.samples}
    assert make_landmark_scenes(root, settings) == root
    assert {p: p.read_bytes() for p in first} == first
    with pytest.raises(DatasetError, match="other files"):
        make_landmark_scenes(root, replace(settings, seed=4))
    assert not is_drawn(tmp_path)


# -- views ----------------------------------------------------------------------------------------


def arrays(count: int = 5, size: int = 20) -> ImageSet:
    pixels = np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    keys = [f"{i:032x}" for i in range(count)]
    return ImageSet(None, list(range(count)), keys, source=pixels)


def test_blue_comes_first_with_its_own_mean_and_deviation():
    images = arrays(3, 16)
    for bgr in (False, True):
        batches = eval_loader(images, image_size=16, batch_size=2, device="cpu", threads=0, bgr=bgr)
        found = torch.cat([batch.images for batch in batches]).numpy()
        assert images.array is not None
        expected = ((images.array / 255.0 - MEAN) / STD).transpose(0, 3, 1, 2)
        if bgr:  # mean (.406, .456, .485), deviation (.225, .224, .229)
            blue_first = images.array[..., ::-1] / 255.0
            expected = ((blue_first - MEAN[::-1]) / STD[::-1]).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_lighting_is_a_draw_of_the_principal_components():
    keys = [str(i) for i in range(4000)]
    shift = lighting_shift(keys, 0, std=0.1, seed=0).astype(np.float64)
    vectors, values = np.array(EIGENVECTORS), np.array(EIGENVALUES)
    covariance = 0.01 * vectors @ np.diag(values**2) @ vectors.T
    np.testing.assert_allclose(np.cov(shift.T), covariance, atol=6e-5)
    assert np.allclose(lighting_shift(keys[7:8], 0, std=0.1, seed=0), shift[7])  # by key alone
    assert not np.allclose(lighting_shift(keys[7:8], 1, std=0.1, seed=0), shift[7])


def loader_of(images, **more):
    view = view_settings(16, augment=True, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0)
    return train_loader(images, view=view, batch_size=5, seed=0, device="cpu", threads=0, **more)


def test_lighting_order_right_and_as_the_original_had_it():
    images = arrays(5, 16)
    found = {}
    for name, more in {
        "plain": dict(bgr=True),
        "right": dict(bgr=True, lighting=0.1),
        "original": dict(bgr=True, lighting=0.1, lighting_order="original"),
        "rgb": dict(lighting=0.1),
        "rgb plain": {},
    }.items():
        (batch,) = list(loader_of(images, **more))
        found[name] = batch.images.double().numpy()[np.argsort(batch.indices.numpy())]
    shift = lighting_shift(list(images.keys), 0, std=0.1, seed=0)  # RGB, in [0, 1]
    added = (found["rgb"] - found["rgb plain"])[:, :, 0, 0] * STD
    np.testing.assert_allclose(added, shift, atol=1e-6)
    added = (found["right"] - found["plain"])[:, :, 0, 0] * STD[::-1]
    np.testing.assert_allclose(added, shift[:, ::-1], atol=1e-6)
    added = (found["original"] - found["plain"])[:, :, 0, 0] * STD[::-1]
    np.testing.assert_allclose(added, shift, atol=1e-6)  # red's noise on blue


def test_views_repeat_after_as_many_as_asked_for():
    images = arrays(5, 40)
    view = view_settings(16, augment=True)
    loader = train_loader(
        images, view=view, batch_size=5, seed=0, device="cpu", threads=0, views=2, lighting=0.1
    )
    epochs = []
    for _ in range(3):
        (batch,) = list(loader)
        epochs.append((batch.view_id, batch.images[batch.indices.argsort()]))
    assert [view for view, _ in epochs] == [0, 1, 0]
    assert torch.equal(epochs[0][1], epochs[2][1])
    assert not torch.equal(epochs[0][1], epochs[1][1])


def test_two_ranks_share_the_batch_of_one():
    images = arrays(6, 16)
    view = view_settings(16, augment=False)
    words = dict(view=view, seed=0, device="cpu", threads=0)
    (whole,) = list(train_loader(images, batch_size=6, **words))
    parts = [
        list(train_loader(images, batch_size=3, rank=rank, world_size=2, **words))[0]
        for rank in (0, 1)
    ]
    together = torch.stack([part.indices for part in parts], dim=1).reshape(-1)
    assert torch.equal(together, whole.indices)


def test_a_last_batch_of_one_image_is_left_out():
    loader = train_loader(
        arrays(5), view=view_settings(16, augment=False), batch_size=2, seed=0, device="cpu",
        threads=0,
    )  # fmt: skip
    assert [len(batch.labels) for batch in loader] == [2, 2]
