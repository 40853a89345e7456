"""What people put beside, into and under a folder of classes; each row is a kind of fault."""

import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from shared_core.datasets import DatasetError, scan
from shared_core.datasets.finding.scan import part_of
from shared_core.datasets.splitting.prepared import prepare_data


def picture(seed: int, size: int = 24) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)


def fill(root: Path, *names: str) -> Path:
    """One picture of its own under each name."""
    for name in names:
        number = zlib.crc32(name.encode("utf-8", "surrogateescape"))
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(path.suffix, picture(number))[1].tobytes())
    return root


def parts(listing) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for sample in listing.samples:
        found.setdefault(str(sample.split), set()).add(listing.classes[sample.label])
    return found


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train", "train"), ("Training", "train"), ("TRAIN_SET", "train"), ("trainset", "train"),
        ("train-images", "train"), ("val", "val"), ("Valid", "val"), ("validation data", "val"),
        ("dev", "val"), ("eval", "val"), ("Evaluation", "val"), ("test", "test"),
        ("testing_set", "test"), ("hold-out", "test"), ("trains", None), ("testimony", None),
        ("cat", None), ("set", None), ("value", None),
    ],
)  # fmt: skip
def test_a_part_is_known_by_any_usual_spelling(name, part):
    assert part_of(name) == part


@pytest.mark.parametrize(
    ("train", "judge", "stray"),
    [
        ("train", "eval", None),
        ("Train", "DEV", None),
        ("train", "test", "unlabeled/x.jpg"),
        ("training_set", "valid", "out/report/plot.png"),
        ("train", "test", "extra/deep/er/x.jpg"),
    ],
)
def test_parts_stay_parts_whatever_stands_beside_them(tmp_path, train, judge, stray):
    names = [f"{top}/{c}/{n}.jpg" for top in (train, judge) for c in "ab" for n in range(2)]
    fill(tmp_path, *names, *([stray] if stray else []))
    listing = scan(tmp_path)
    assert listing.layout == "split" and listing.classes == ("a", "b")
    judged = part_of(judge)
    assert parts(listing) == {"train": {"a", "b"}, judged: {"a", "b"}}
    assert listing.stray == ((stray,) if stray else ())
    assert len(listing.notes()) == bool(stray)
    if stray:
        assert stray in listing.notes()[0] and stray.split("/")[0] in listing.notes()[0]


@pytest.mark.parametrize("strange", ["unlabeled", "masks", "Annotations"])
def test_one_part_beside_what_is_no_class_is_refused(tmp_path, strange):
    fill(tmp_path, "train/a/1.jpg", "train/b/1.jpg", f"{strange}/1.jpg")
    with pytest.raises(DatasetError, match=f"holds train beside {strange}"):
        scan(tmp_path)


def test_images_beside_masks_are_no_classes(tmp_path):
    fill(tmp_path, "images/1.jpg", "masks/1.png")
    with pytest.raises(DatasetError, match="images and masks, which are no classes"):
        scan(tmp_path)


def test_a_class_called_train_stays_a_class(tmp_path):
    fill(tmp_path, "train/steam/1.jpg", "car/1.jpg", "bike/old/1.jpg")
    assert scan(tmp_path).classes == ("bike", "car", "train")


def test_names_that_look_equal_are_refused_and_letters_of_an_alphabet_are_not(tmp_path):
    fill(tmp_path / "a", "caf\u00e9/1.jpg", "cafe\u0301/1.jpg")
    with pytest.raises(DatasetError, match="look alike"):
        scan(tmp_path / "a")
    fill(tmp_path / "b", "train/Cat/1.jpg", "train/dog/1.jpg", "test/cat/1.jpg", "test/dog/1.jpg")
    with pytest.raises(DatasetError, match="'Cat' and 'cat'.*look alike"):
        scan(tmp_path / "b")
    fill(tmp_path / "c", "a/1.jpg", "A/1.jpg")
    assert scan(tmp_path / "c").classes == ("A", "a")


def test_a_class_folder_that_is_no_utf8_is_refused_before_anything_is_trained(tmp_path):
    fill(tmp_path, "a/1.jpg", "b\udce9/1.jpg")
    with pytest.raises(DatasetError, match=r"b'b\\xe9'.*not UTF-8"):
        scan(tmp_path)


def test_system_folders_are_passed_over_and_other_endings_counted(tmp_path):
    fill(
        tmp_path, "a/1.jpg", "b/1.jfif.jpg", "a/@eaDir/1.jpg/thumb.jpg", "#recycle/1.jpg",
        "$RECYCLE.BIN/2.jpg", "System Volume Information/3.jpg", "__MACOSX/a/1.jpg",
        "lost+found/1.jpg", "a/.hidden.jpg",
    )  # fmt: skip
    for name in ("a/1.heic", "a/2.HEIC", "b/3.psd", "b/Thumbs.db", "a/notes"):
        (tmp_path / name).write_bytes(b"x")
    listing = scan(tmp_path)
    assert listing.classes == ("a", "b") and len(listing.samples) == 2
    assert listing.ignored == {".heic": 2, ".psd": 1, "without an ending": 1}
    assert "2 .heic, 1 .psd" in listing.notes()[0]


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".JPEG"])
def test_other_endings_of_jpeg_are_read(tmp_path, ending):
    fill(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "a/1.jpg").rename(tmp_path / f"a/1{ending}")
    data = [s.path.name for s in scan(tmp_path).samples]
    assert data == [f"1{ending}", "1.jpg"]


# -- what becomes of it -----------------------------------------------------------------------


def test_a_fixed_camera_can_be_trained(tmp_path):
    """180 pictures of one part, nearly alike: every part of the split gets every class."""
    base = picture(1, 48)
    for k, name in enumerate(("ok", "scratch", "hole")):
        for number in range(60):
            image = base.copy()
            rng = np.random.default_rng(1000 * k + number)
            image = np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
            cv2.circle(image, tuple(int(v) for v in rng.integers(8, 40, 2)), k, (0, 0, 0), -1)
            (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / "set" / name / f"{number}.png"), image)
    data = prepare_data(tmp_path / "out", root=tmp_path / "set")
    for split in ("train", "calibration", "test"):
        assert set(data.image_set(split).labels) == {0, 1, 2}
    assert any("look nearly alike" in note for note in data.facts(48)["notes"])
    exact = prepare_data(tmp_path / "exact", root=tmp_path / "set", group_by="exact")
    assert not any("nearly alike" in note for note in exact.notes)


def given_parts(root: Path) -> Path:
    names = [
        f"{top}/{c}/{n}.png" for top in ("train", "val", "test") for c in "ab" for n in range(6)
    ]
    return fill(root, *names)


def test_leaks_of_given_parts_are_named_and_left_out_on_request(tmp_path):
    root = given_parts(tmp_path / "set")
    for number in range(3):
        source = root / f"test/a/{number}.png"
        (root / f"train/a/copy{number}.png").write_bytes(source.read_bytes())
    image = cv2.imread(str(root / "test/b/0.png"))
    cv2.imwrite(str(root / "train/b/near.jpg"), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
    kept = prepare_data(tmp_path / "kept", root=root)
    notes = " | ".join(kept.facts(24)["notes"])
    assert "3 files have an exact copy in a later part; kept" in notes
    assert "1 files of train have a near copy" in notes
    dropped = prepare_data(tmp_path / "dropped", root=root, drop_leaks=True)
    assert len(dropped.image_set("train")) == len(kept.image_set("train")) - 3
    assert "left out" in " | ".join(dropped.facts(24)["notes"])


def test_a_class_without_training_images_is_refused_one_without_others_is_noted(tmp_path):
    root = given_parts(tmp_path / "set")
    fill(root, "val/c/1.png", "test/c/1.png")
    with pytest.raises(DatasetError, match="class 'c' has no usable image in the training part"):
        prepare_data(tmp_path / "out", root=root)
    fill(root, *(f"train/c/{n}.png" for n in range(3)))
    for path in (root / "val/c").iterdir():
        path.unlink()
    (root / "val/c").rmdir()
    data = prepare_data(tmp_path / "out2", root=root)
    assert "calibration has no image of c" in data.notes


def test_data_that_changed_before_a_resume_are_said_or_refused(tmp_path):
    root = fill(tmp_path / "set", *(f"{c}/{n}.png" for c in "ab" for n in range(20)))
    first = prepare_data(tmp_path / "out", root=root)
    cv2.imwrite(str(root / "a/new.png"), picture(999))
    again = prepare_data(tmp_path / "out", root=root)
    assert again.manifest.hash == first.manifest.hash
    assert any("1 images were added" in note and "a/new.png" in note for note in again.notes)
    fill(root, "c/1.png")
    with pytest.raises(DatasetError, match=r"other classes than when .* was begun \(c\)"):
        prepare_data(tmp_path / "out", root=root)
