"""Scanning folders: order, layouts, odd class names, links, and the errors' wording."""

import os
import random

import cv2
import numpy as np
import pytest

from shared_core.datasets.errors import DatasetError, DatasetNotFoundError
from shared_core.datasets.finding.scan import find, require, scan
from shared_core.datasets.sets import specs
from shared_core.datasets.sets.spec_check import class_mismatch, describe


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


def rows(listing):
    return [(listing.relative(s), listing.classes[s.label], s.split) for s in listing.samples]


def test_single_tree_is_sorted_bytewise_whatever_the_order_of_creation(tmp_path):
    files = [
        "b/1.jpg",
        "a/2.PNG",
        "a/10.jpg",
        "B/x.webp",
        "a/deep/er/0.tif",
        "ä/u.bmp",
        "a-b/3.jpeg",
    ]
    listings = []
    for seed in (0, 1):
        root = tmp_path / str(seed)
        shuffled = files[:]
        random.Random(seed).shuffle(shuffled)
        touch(root, *shuffled)
        listings.append(rows(scan(root)))
    assert listings[0] == listings[1]
    assert [name for name, _, _ in listings[0]] == [
        "B/x.webp",
        "a/10.jpg",
        "a/2.PNG",
        "a/deep/er/0.tif",
        "a-b/3.jpeg",
        "b/1.jpg",
        "ä/u.bmp",
    ]
    assert scan(root).classes == ("B", "a", "a-b", "b", "ä")
    assert {c for name, c, _ in listings[0] if name.startswith("a/")} == {"a"}
    assert scan(root).layout == "single"
    assert scan(root).counts() == {"B": 1, "a": 3, "a-b": 1, "b": 1, "ä": 1}


def test_hidden_files_and_non_images_are_passed_over(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/.2.jpg", "a/._3.jpg", "a/notes.txt", "a/Thumbs.db", "b/1.png")
    touch(tmp_path, ".git/x/1.jpg", "__MACOSX/a/1.jpg", "readme.md", "preview.jpg")
    listing = scan(tmp_path)
    assert [name for name, _, _ in rows(listing)] == ["a/1.jpg", "b/1.png"]
    assert listing.stray == ("preview.jpg",)


@pytest.mark.parametrize("val", ["val", "valid", "Validation"])
def test_split_layout(tmp_path, val):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", f"{val}/a/2.jpg", "test/b/3.jpg")
    listing = scan(tmp_path)
    assert listing.layout == "split"
    assert listing.classes == ("a", "b")
    assert {(name, c, s) for name, c, s in rows(listing)} == {
        ("train/a/1.jpg", "a", "train"),
        ("train/b/1.jpg", "b", "train"),
        (f"{val}/a/2.jpg", "a", "val"),
        ("test/b/3.jpg", "b", "test"),
    }


def test_unlabelled_test_images_beside_class_folders_are_stray(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "test/0001.jpg")
    listing = scan(tmp_path)
    assert listing.layout == "split" and listing.stray == ("test/0001.jpg",)


def test_folders_without_images_do_not_hide_a_split_layout(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "val/a/1.jpg", "train/b/1.jpg", "meta/devkit.txt")
    assert scan(tmp_path).layout == "split"


@pytest.mark.parametrize(
    "files",
    [
        ["train/1.jpg", "bus/1.jpg"],  # a class called train among others
        ["train/steam/1.jpg", "bus/1.jpg"],
        ["train/1.jpg", "test/1.jpg"],  # classes of such names that hold their images themselves
    ],
)
def test_classes_named_like_splits_stay_classes(tmp_path, files):
    touch(tmp_path, *files)
    listing = scan(tmp_path)
    assert listing.layout == "single"
    assert "train" in listing.classes and len(listing.samples) == len(files)
    assert all(s.split is None for s in listing.samples)


def test_given_classes_fix_the_labels(tmp_path):
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    listing = scan(tmp_path, classes=("z", "b", "a"))
    assert [(listing.relative(s), s.label) for s in listing.samples] == [
        ("a/1.jpg", 2),
        ("b/1.jpg", 1),
    ]
    with pytest.raises(DatasetError, match="class folder 'b' .* is not among the 2 classes"):
        scan(tmp_path, classes=("a", "c"))
    with pytest.raises(DatasetError, match="named twice"):
        scan(tmp_path, classes=("a", "b", "a"))


def test_link_loops_end_and_links_are_followed(tmp_path):
    root = tmp_path / "set"
    touch(root, "a/1.jpg", "b/1.jpg")
    touch(tmp_path / "elsewhere", "2.jpg")
    os.symlink(root, root / "a" / "loop")
    os.symlink(root / "a", root / "b" / "to_a")
    os.symlink(tmp_path / "elsewhere", root / "c")
    os.symlink(tmp_path / "gone.jpg", root / "a" / "broken.jpg")
    names = [name for name, _, _ in rows(scan(root))]
    assert "c/2.jpg" in names  # a linked class folder
    assert "a/broken.jpg" in names  # for verify to report
    assert "b/to_a/1.jpg" in names
    assert len(names) == len(set(names)) < 20


def test_errors_are_one_line_and_name_the_thing(tmp_path):
    with pytest.raises(DatasetNotFoundError, match=f"no dataset folder at {tmp_path}/no;"):
        scan(tmp_path / "no")
    with pytest.raises(DatasetError, match="no image in a class folder below"):
        scan(tmp_path)
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "b").mkdir()
    with pytest.raises(DatasetError, match="class folder .*/b holds no image"):
        scan(tmp_path)
    touch(tmp_path, "b/readme.txt")
    with pytest.raises(DatasetError, match="class folder .*/b holds no image") as caught:
        scan(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_wrapping_folder_is_pointed_out(tmp_path):
    touch(tmp_path, "AID/a/1.jpg", "AID/b/1.jpg")
    with pytest.raises(DatasetError, match=f"did you mean {tmp_path}/AID"):
        scan(tmp_path)


def test_find_any_alias_name_first_and_unwraps(tmp_path):
    aid = specs.get("AID")
    assert find(tmp_path, aid) is None
    assert find(tmp_path / "no", aid) is None
    touch(tmp_path, "aid_new/a/1.jpg", "aid_new/b/1.jpg")
    assert find(tmp_path, aid) == tmp_path / "aid_new"
    touch(tmp_path, "Aid/a/1.jpg", "Aid/b/1.jpg")
    assert find(tmp_path, aid) == tmp_path / "Aid"
    touch(tmp_path, "UCMerced_LandUse/Images/river/1.tif", "UCMerced_LandUse/Images/beach/1.tif")
    assert find(tmp_path, specs.get("UCM")) == tmp_path / "UCMerced_LandUse" / "Images"
    touch(tmp_path, "ImageNet/train/n01/1.JPEG", "ImageNet/train/n02/1.JPEG")
    assert find(tmp_path, specs.get("ImageNet-1k")) == tmp_path / "ImageNet"


def test_require_says_where_and_how(tmp_path):
    with pytest.raises(DatasetNotFoundError) as caught:
        require(tmp_path, specs.get("AID"))
    assert str(caught.value) == (
        f"AID not found under {tmp_path}: expected {tmp_path}/AID/<class>/*.jpg; "
        "get it from http://www.captain-whu.com/project/AID/"
    )
    assert isinstance(caught.value, FileNotFoundError) and isinstance(caught.value, ValueError)


def test_describe_reports_a_smaller_edition(tmp_path):
    spec = specs.get("TrashNet")
    for name in spec.class_names:
        touch(tmp_path, f"{name}/1.jpg")
    listing = scan(tmp_path)
    assert class_mismatch(listing, spec) is None
    lines = describe(listing, spec)
    assert lines[0] == "6 images, TrashNet has 2,527"
    assert lines[1].startswith(
        "images differ in 6 of 6 classes: cardboard 1 of 403, glass 1 of 501"
    )

    for name in ("a", "b"):
        (tmp_path / "two" / name).mkdir(parents=True)
        picture = np.full((20, 30, 3), 90, np.uint8)
        cv2.imwrite(str(tmp_path / "two" / name / "1.jpg"), picture)
        cv2.imwrite(str(tmp_path / "two" / name / "2.png"), picture[:, :20])
    two = specs.DatasetSpec(
        "two", 2, 4, 20, sources=dict.fromkeys(("num_classes", "num_images", "image_size"), "x")
    )
    assert describe(scan(tmp_path / "two"), two) == [
        "2 of 4 images looked at are not 20 x 20 pixels as in two (most often 30 x 20: 2)"
    ]
    assert describe(scan(tmp_path / "two"), two, probe=0) == []
    assert "2 classes, AID has 30" in describe(scan(tmp_path / "two"), specs.get("AID"))[0]


def test_describe_split_counts_and_unknown_classes(tmp_path):
    names = specs.get("CIFAR-10").class_names
    touch(tmp_path, *[f"{split}/{n}/1.png" for split in ("train", "test") for n in names])
    lines = describe(scan(tmp_path), specs.get("CIFAR-10"), probe=0)
    assert "10 images in train, CIFAR-10 has 50,000" in lines
    (tmp_path / "train" / "cat").rename(tmp_path / "train" / "lynx")
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "lynx")
    assert class_mismatch(scan(tmp_path), specs.get("CIFAR-10")).startswith("class 'lynx'")
