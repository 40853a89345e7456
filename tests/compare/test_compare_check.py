"""The data check: counts by hand, planted copies, leaks and labels, what is refused, going on."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from compare import check_data, labels
from compare.check_data import SMALL_SHARES, evened
from compare.contract import CHECK_FILE, SPLIT_FILE, DataCheck, read
from compare.pictures import GAP, LINE, SIDE, Tile, write_sheet, write_text
from shared_core.datasets import DatasetError, ImageSet, Manifest
from shared_core.datasets.splitting.manifest import Entry
from shared_core.weights.catalogue import CATALOGUE
from shared_core.weights.finding import installed_file

needs_weights = pytest.mark.skipif(
    installed_file(CATALOGUE[0]) is None, reason="lite0's package is not installed"
)


def picture(seed: int, side: int = 48) -> np.ndarray:
    """Blocks of colours: another seed is another structure, no near copy."""
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 6, 3)).astype(np.uint8)
    return cv2.resize(blocks, (side, side), interpolation=cv2.INTER_NEAREST)


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def folder_of(root: Path, counts: dict[str, int], *, first: int = 0) -> Path:
    seed = first
    for name, count in counts.items():
        for n in range(count):
            save(root / name / f"{n:02}.png", picture(seed))
            seed += 1
    return root


def mean_colours(views: np.ndarray) -> np.ndarray:
    return views.mean(axis=(1, 2)).astype(np.float32)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean colours instead of a network's features."""
    monkeypatch.setattr(check_data, "trained_features", lambda *, threads: mean_colours)


def run(root: Path | None, folder: Path, **settings: object) -> DataCheck:
    return check_data.check(root, folder, say=lambda line: None, **settings)


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataCheck, Path]:
    """Two classes of eight, with a broken file, a text, an exact copy and a rescaled one."""
    root = folder_of(tmp_path_factory.mktemp("messy"), {"cat": 8, "狗 <b>": 8})
    (root / "cat" / "broken.png").write_bytes((root / "cat" / "00.png").read_bytes()[:60])
    (root / "cat" / "notes.txt").write_text("not an image")
    (root / "cat" / "copy.png").write_bytes((root / "cat" / "01.png").read_bytes())
    other = cv2.imread(str(root / "狗 <b>" / "02.png"))
    save(root / "狗 <b>" / "rescaled.png", cv2.resize(other, (90, 90), interpolation=1))
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_data, "trained_features", lambda *, threads: mean_colours)
        return run(root, folder), folder


def test_every_file_is_counted_by_hand(messy: tuple[DataCheck, Path]) -> None:
    found, _ = messy
    assert found.classes == ("cat", "狗 <b>")
    assert found.files == {"used": 17, "duplicate": 1, "unreadable": 1, "ignored": 1}
    assert found.ignored == {".txt": 1}
    assert found.sizes == {"48x48": 17, "90x90": 1} and found.pixels == 48
    assert [sum(n) for n in zip(*found.counts.values(), strict=True)] == [9, 9]
    wanted = {"left_out": 1, "copy_exact": 1, "copy_near": 1, "tiny_class": 2}
    assert {kind: n for kind, n in found.found.items() if kind != "label"} == wanted
    by_kind = {one.kind: one for one in found.findings}
    assert by_kind["left_out"].paths == ("cat/broken.png",)
    assert set(by_kind["copy_exact"].paths) == {"cat/01.png", "cat/copy.png"}
    assert set(by_kind["copy_near"].paths) == {"狗 <b>/02.png", "狗 <b>/rescaled.png"}


def test_small_classes_are_in_every_part_and_copies_on_one_side(
    messy: tuple[DataCheck, Path],
) -> None:
    found, folder = messy
    assert {part: len(n) for part, n in found.counts.items()} == dict.fromkeys(found.counts, 2)
    assert min(min(n) for n in found.counts.values()) >= 1
    assert min(found.counts["train"]) >= 4
    manifest = Manifest.read(folder / SPLIT_FILE, root=found.root)
    part = {entry.path: entry.split for entry in manifest.entries}
    assert part["cat/01.png"] == part["cat/copy.png"]
    assert part["狗 <b>/02.png"] == part["狗 <b>/rescaled.png"]
    assert manifest.hash == found.split_hash
    assert check_data.prepared(folder).manifest.hash == found.split_hash


def test_features_belong_to_their_keys(messy: tuple[DataCheck, Path]) -> None:
    found, folder = messy
    rows, place = check_data.features(folder)
    entries = {entry.key: entry.path for entry in check_data.prepared(folder).manifest.entries}
    assert set(place) == set(entries) and len(rows) == 17  # the copy counts once
    for key, path in entries.items():
        colour = cv2.imread(str(Path(found.root, path)))[..., ::-1].mean(axis=(0, 1))
        np.testing.assert_allclose(rows[place[key]], colour, atol=1.5)


def test_a_finished_check_is_read_back_and_one_begun_is_not(tmp_path: Path, cheap: None) -> None:
    root = folder_of(tmp_path / "images", {"a": 6, "b": 6})
    first = run(root, tmp_path / "run")
    folder_of(root, {"a": 7}, first=500)
    assert run(root, tmp_path / "run") == first == read(tmp_path / "run" / CHECK_FILE, DataCheck)
    (tmp_path / "run" / CHECK_FILE).unlink()  # as a kill before the end leaves it
    assert sum(run(root, tmp_path / "run").images(part) for part in first.counts) == 13


def test_given_parts_are_kept_and_leaks_leave_training(tmp_path: Path, cheap: None) -> None:
    root = tmp_path / "images"
    for number, part in enumerate(("train", "val", "test")):
        folder_of(root / part, {"a": 8, "b": 8}, first=100 * number)
    (root / "train" / "a" / "leak.png").write_bytes((root / "test/a/03.png").read_bytes())
    near = cv2.imread(str(root / "val" / "b" / "02.png"))
    save(root / "train" / "b" / "near.png", cv2.resize(near, (96, 96), interpolation=0))
    found = run(root, tmp_path / "run")
    assert found.given
    assert found.counts == {"train": (8, 9), "calibration": (8, 8), "test": (8, 8)}
    leaks = {one.paths[0]: one.text for one in found.findings if one.kind == "leak"}
    assert leaks == {
        "train/a/leak.png": "left out: copy of a file in test",
        "train/b/near.png": "a near copy of it is in calibration",
    }
    assert found.found["leak"] == 2


def test_a_manifest_of_somebody_decides(tmp_path: Path, cheap: None) -> None:
    root = folder_of(tmp_path / "images", {"a": 9, "b": 9})
    run(root, tmp_path / "one", seed=7)
    given = tmp_path / "one" / SPLIT_FILE
    found = run(root, tmp_path / "two", seed=0, split=given)
    assert found.given and found.split_hash == Manifest.read(given).hash
    assert found.split_hash != run(root, tmp_path / "three", seed=0).split_hash


def test_an_archive_is_unpacked_and_gives_its_name(tmp_path: Path, cheap: None) -> None:
    root = folder_of(tmp_path / "images", {"a": 6, "b": 6})
    shutil.make_archive(str(tmp_path / "pets"), "zip", root)
    found = run(tmp_path / "pets.zip", tmp_path / "run")
    assert found.name == "pets" and found.files == {"used": 12}
    assert found.split_hash == run(root, tmp_path / "other").split_hash


@pytest.mark.parametrize(
    ("counts", "copies", "line"),
    [
        ({"a": 9}, 0, "has one class, 'a'"),
        ({"a": 9, "b": 2}, 0, "class 'b' has 2 different images: expected at least 3"),
        ({"a": 9, "b": 1}, 6, "class 'b' has 1 different images (7 files; copies count once)"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_and_blocks_nothing(
    counts: dict[str, int], copies: int, line: str, tmp_path: Path, cheap: None
) -> None:
    root = folder_of(tmp_path / "images", counts)
    for n in range(copies):
        (root / "b" / f"copy{n}.png").write_bytes((root / "b" / "00.png").read_bytes())
    with pytest.raises(DatasetError) as error:
        run(root, tmp_path / "run")
    assert line in str(error.value) and "\n" not in str(error.value)
    folder_of(root, {"a": 9, "b": 9}, first=300)
    assert run(root, tmp_path / "run").counts["train"] >= (3, 3)


def test_a_manifest_without_a_part_is_refused(tmp_path: Path, cheap: None) -> None:
    root = folder_of(tmp_path / "images", {"a": 6, "b": 6})
    run(root, tmp_path / "one")
    manifest = Manifest.read(tmp_path / "one" / SPLIT_FILE)
    entries = tuple(e._replace(split="train") for e in manifest.entries if e.split != "test")
    Manifest("layout", manifest.classes, (), 0, entries).write(tmp_path / "two.json")
    with pytest.raises(DatasetError, match="no part 'calibration'"):
        run(root, tmp_path / "run", split=tmp_path / "two.json")


def made(counts: dict[str, int]) -> Manifest:
    entries = tuple(
        Entry(f"{name}/{n}", label, f"{label:02}{n:030}", "train")
        for label, (name, count) in enumerate(counts.items())
        for n in range(count)
    )
    parts = (("train", 0.7), ("calibration", 0.1), ("test", 0.2))
    return Manifest("random", tuple(counts), parts, 0, entries)


def test_small_classes_are_dealt_out_exactly_and_large_ones_not_at_all() -> None:
    manifest = made({"three": 3, "eight": 8, "twenty": 20, "hundred": 100})
    groups = {entry.path: n for n, entry in enumerate(manifest.entries)}
    done = evened(manifest, groups, seed=0)
    assert done.counts() == {  # 60/15/25, rounded, at least one
        "train": [1, 5, 12, 100], "calibration": [1, 1, 3, 0], "test": [1, 2, 5, 0],
    }  # fmt: skip
    assert dict(SMALL_SHARES) == {"train": 0.6, "calibration": 0.15, "test": 0.25}
    assert evened(manifest, groups, seed=0) == done
    assert evened(manifest, groups, seed=1).entries != done.entries
    grouped = {path: n // 3 for path, n in groups.items()}
    pairs = evened(manifest, grouped, seed=0)
    parts = {}
    for entry in pairs.entries:
        parts.setdefault(grouped[entry.path], set()).add(entry.split)
    assert all(len(found) == 1 for group, found in parts.items() if group != 1)
    assert min(pairs.counts()["test"][1], pairs.counts()["calibration"][1]) >= 1


def test_features_go_on_where_they_were_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "BATCH", 2)
    monkeypatch.setattr(labels, "CHUNK", 2)
    images = ImageSet(None, [0] * 13, [f"k{n}" for n in range(13)],
                      source=np.stack([picture(n, 32) for n in range(13)]))  # fmt: skip
    seen: list[int] = []

    def stops(views: np.ndarray) -> np.ndarray:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(len(views))
        return mean_colours(views)

    file = tmp_path / "features.npy"
    settings = {"input_size": 32, "threads": 0}
    with pytest.raises(KeyboardInterrupt):
        labels.store_features(stops, images, file, **settings)
    with pytest.raises(ValueError, match="8 of 13"):
        labels.read_features(file)
    asked: list[int] = []

    def counts(views: np.ndarray) -> np.ndarray:
        asked.append(len(views))
        return mean_colours(views)

    stored = labels.store_features(counts, images, file, **settings)
    assert asked == [2, 2, 1]  # eight were done
    whole = labels.store_features(mean_colours, images, tmp_path / "whole.npy", **settings)
    np.testing.assert_array_equal(stored.rows(), whole.rows())
    assert labels.read_features(file) == stored
    # Other images, or another size: nothing of it is taken over.
    asked.clear()
    labels.store_features(counts, images.subset(range(6)), file, **settings)
    assert asked == [2, 2, 2]


def test_neighbours_agree_with_a_search_by_hand() -> None:
    rng = np.random.default_rng(0)
    centres = 8 * rng.standard_normal((4, 16))
    given = np.repeat(np.arange(4), 30)
    rows = centres[given] + rng.standard_normal((120, 16))
    told = given.copy()
    flipped = np.array([3, 40, 70, 100])
    told[flipped] = (given[flipped] + 1) % 4
    found = labels.check_labels(rows, told, num_classes=4)
    assert {one.row for one in found.suspicious} == set(flipped)
    assert all(one.likely == given[one.row] for one in found.suspicious)
    unit = rows - rows.mean(axis=0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    agree = 0
    for n in range(120):
        order = [m for m in np.argsort(-(unit @ unit[n])) if m != n][:10]
        votes = np.bincount(told[order], weights=unit[order] @ unit[n], minlength=4)
        agree += votes.argmax() == told[n]
    assert found.agree == pytest.approx(agree / 120) and found.neighbours == 10
    doubts = [one.doubt for one in found.suspicious]
    assert doubts == sorted(doubts, reverse=True)


def test_copies_have_no_vote_on_one_another() -> None:
    """Eleven copies of one picture, all under one wrong label, would vouch for themselves."""
    rng = np.random.default_rng(1)
    centres = 8 * rng.standard_normal((2, 16))
    given = np.repeat([0, 1], 30)
    rows = centres[given] + rng.standard_normal((60, 16))
    told, groups = given.copy(), np.arange(60)
    rows[:11], told[:11], groups[:11] = rows[0], 1, 0
    alone = labels.check_labels(rows, told, num_classes=2)
    assert not {one.row for one in alone.suspicious} & set(range(11))
    found = labels.check_labels(rows, told, num_classes=2, groups=groups)
    assert set(range(11)) <= {one.row for one in found.suspicious}


def test_copies_do_not_vouch_in_the_check(tmp_path: Path, cheap: None) -> None:
    """Five near copies of a green picture lie among the red ones, as do four red pictures."""
    root, rng = tmp_path / "images", np.random.default_rng(0)
    for n in range(9):
        for name, channel in (("green", 1), ("red", 2)):
            image = picture(40 * channel + n) // 4
            image[..., channel] += 150
            save(root / name / f"{n}.png", image)
    lost = picture(900) // 4
    lost[..., 1] += 150
    for n in range(4):  # the same but for a little noise
        noisy = lost + rng.integers(0, 3, lost.shape).astype(np.uint8)
        save(root / "red" / f"lost{n}.png", noisy)
    found = run(root, tmp_path / "run")
    doubted = {path for one in found.findings if one.kind == "label" for path in one.paths}
    assert doubted == {f"red/lost{n}.png" for n in range(4)}
    assert found.pictures[0][0] == "suspicious.jpg"
    assert (tmp_path / "run" / "data" / "suspicious.jpg").is_file()


def test_many_images_are_compared_in_fewer_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).standard_normal((300, 600)).astype(np.float16)
    plain = labels.unit_rows(rows)
    monkeypatch.setattr(labels, "PROJECT_ABOVE", 299)
    less = labels.unit_rows(rows)
    assert less.shape == (300, 256)
    np.testing.assert_allclose(np.linalg.norm(less, axis=1), 1, atol=1e-5)
    assert np.abs(less @ less.T - plain @ plain.T).max() < 0.35  # 1 / sqrt(256) is 0.06


@pytest.mark.parametrize(
    ("images", "side", "size"),
    [(500, 400, 224), (500, 128, 224), (500, 32, 96), (8000, 400, 160), (100_000, 400, 96)],
)
def test_the_size_of_features(images: int, side: int, size: int) -> None:
    assert labels.feature_size(images, side) == size


@needs_weights
def test_planted_labels_are_found_among_built_in_scenes(tmp_path: Path) -> None:
    """Five of a hundred labels are wrong; what is flagged is mostly them, and most of them."""
    drawn = run(None, tmp_path / "drawn")
    assert drawn.kind == "built-in" and len(drawn.classes) == 4
    rows, place = check_data.features(tmp_path / "drawn")
    entries = check_data.prepared(tmp_path / "drawn").manifest.entries
    given = np.array([entry.label for entry in entries])
    rows = rows[[place[entry.key] for entry in entries]]
    wrong = np.random.default_rng(0).choice(len(given), round(0.05 * len(given)), replace=False)
    told = given.copy()
    told[wrong] = (given[wrong] + 1) % 4
    flagged = {one.row for one in labels.check_labels(rows, told, num_classes=4).suspicious}
    hits = len(flagged & set(wrong.tolist()))
    assert hits / len(flagged) >= 0.8 and hits / len(wrong) >= 0.8


def test_without_weights_the_check_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared_core.runs.command import UsageError

    def none(*, threads: int) -> None:
        raise UsageError("get them by pip")

    monkeypatch.setattr(check_data, "trained_features", none)
    lines: list[str] = []
    root = folder_of(tmp_path / "images", {"a": 6, "b": 6})
    found = check_data.check(root, tmp_path / "run", say=lines.append)
    assert found.labels == {} and "get them by pip" in found.notes[-1]
    assert any("get them by pip" in line for line in lines)
    with pytest.raises(FileNotFoundError):
        check_data.features(tmp_path / "run")


def test_a_sheet_shows_each_picture_above_its_words(tmp_path: Path) -> None:
    red = save(tmp_path / "红.png", np.full((40, 40, 3), (0, 0, 255), np.uint8))
    blue = save(tmp_path / "b.png", np.full((20, 40, 3), (255, 0, 0), np.uint8))
    tiles = [Tile(red, ("猫",)), Tile(blue, ("a very long name " * 9,)), Tile(tmp_path / "no", ())]
    sheet = cv2.imread(str(write_sheet(tmp_path / "s.jpg", tiles, columns=2)))
    assert sheet.shape == (2 * (SIDE + LINE + GAP) + GAP, 2 * (SIDE + GAP) + GAP, 3)
    middle, next_column = GAP + SIDE // 2, SIDE + GAP
    np.testing.assert_allclose(sheet[middle, middle], (0, 0, 255), atol=6)
    np.testing.assert_allclose(sheet[middle, middle + next_column], (255, 0, 0), atol=6)
    words = slice(GAP + SIDE, GAP + SIDE + LINE)
    assert sheet[words, :next_column].min() < 130  # the sign is there
    assert sheet[words, next_column + GAP + SIDE + 4 :].min() > 200  # the long name was cut


def test_chinese_words_are_drawn_and_not_replaced() -> None:
    if not hasattr(cv2, "FontFace"):
        pytest.skip("OpenCV before 5 has Latin letters only")
    drawn = []
    for text in ("猫", "狗", "??"):
        sheet = np.full((30, 80, 3), 255, np.uint8)
        write_text(sheet, text, (4, 22), (0, 0, 0), width=70)
        drawn.append(sheet)
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
