"""Lists of PaddleClas users: their images, classes and parts become those of the run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import vgc_tools as tools

from shared_core.datasets import DatasetError
from visiondistill_gc.config import parse
from visiondistill_gc.utils import listed
from visiondistill_gc.utils.data_utils import prepare


@pytest.fixture
def flowers(tmp_path):
    """Images in one folder, in two lists of other encodings, as people have them."""
    root = tmp_path / "flowers"
    (root / "jpg").mkdir(parents=True)
    for number, pixels in enumerate(tools.make_pixels(40)):
        (root / "jpg" / f"{number} a.png").write_bytes(tools.encode(pixels))
    lines = [f"jpg/{n} a.png {n % 3}" for n in range(40)]
    (root / "train_list.txt").write_bytes("\r\n".join(lines[:30]).encode("utf-8-sig"))
    (root / "val_list.txt").write_text("\n".join(line.replace("/", "\\") for line in lines[30:]))
    (root / "labels.txt").write_bytes("0 rose\n1 玫瑰\n2 pink primrose\n".encode("gb18030"))
    return root


def test_parts_and_classes_are_the_lists(flowers, tmp_path):
    words = ["--train-list", str(flowers / "train_list.txt"),
             "--val-list", str(flowers / "val_list.txt"), "--n-splits", "1", "--no-decoded-cache",
             "--label-list", str(flowers / "labels.txt")]  # fmt: skip
    settings = parse(words, prog="main.py")
    assert settings.run.scale == "short"  # as any folder of one's own
    data = prepare(settings, tmp_path / "run")
    assert sorted(data.classes) == ["pink primrose", "rose", "玫瑰"]
    names = {0: "rose", 1: "玫瑰", 2: "pink primrose"}
    samples = json.loads((tmp_path / "run" / "split.json").read_text())["samples"]
    for path, label, _, part in samples:
        number = int(path.rsplit("/", 1)[1].split()[0])
        assert data.classes[label] == names[number % 3]
        assert (part == "train") == (number < 30)
    image = data.images.image(0)
    number = int(data.entries[0].path.rsplit("/", 1)[1].split()[0])
    assert np.array_equal(image, tools.make_pixels(40)[number])


def test_a_single_list_is_split_here(flowers, tmp_path):
    words = ["--train-list", str(flowers / "train_list.txt"), "--workers", "0"]
    data = prepare(parse([*words, "--test-share", "0.3"], prog="main.py"), tmp_path / "run")
    assert data.classes == ("0", "1", "2") and data.test is not None
    assert len(data.images) + len(data.test) == 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jpg/0 a.png", "line 1"),
        ("jpg/0 a.png 0\njpg/1.png one", "line 2"),
        ("", "names no image"),
        ("jpg/none.png 0\njpg/0 a.png 1", "1 images of the lists are not below"),
    ],
)
def test_bad_lists(flowers, tmp_path, text, said):
    (flowers / "bad.txt").write_text(text)
    with pytest.raises(DatasetError, match=said):
        listed.lay_out({"train": flowers / "bad.txt"}, None, flowers, tmp_path / "l")


@pytest.mark.parametrize(
    ("text", "said"),
    [("0 a\n1 b", "no name for class 2"), ("0 a\n1 a\n2 b", "two classes 'a'"), ("a", "line 1")],
)
def test_bad_names(tmp_path, text, said):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(DatasetError, match=said):
        listed.class_names(tmp_path / "names.txt", 3)
    assert listed.class_names(None, 11)[:2] == ["00", "01"]


def test_lists_without_the_first_have_no_effect(tmp_path, flowers, command):
    done = command("--val-list", flowers / "val_list.txt", "--output", tmp_path / "run")
    assert done.code == 2 and "expected --train-list" in done.err
