"""Splits: nothing else moves, copies stay together, shares are met, the file tells the truth."""

import hashlib
import json
import warnings

import numpy as np
import pytest
from scipy import stats

from shared_core.datasets.errors import DatasetError, DatasetNotFoundError
from shared_core.datasets.finding.scan import Listing, Sample, scan
from shared_core.datasets.splitting.manifest import Manifest, canonical_json
from shared_core.datasets.splitting.split import from_layout, make_kfold, make_split, place

THREE = (("train", 0.7), ("calibration", 0.1), ("test", 0.2))


def listing_of(tmp_path, names, classes=("a", "b"), layout="single"):
    """A listing that need not exist: keys are given to the split."""
    samples = []
    for name in sorted(names):
        parts = name.split("/")
        split = parts[0] if layout == "split" else None
        samples.append(Sample(tmp_path / name, classes.index(parts[-2]), split))
    return Listing(tmp_path, classes, tuple(samples), layout)


def many(count, classes="ab"):
    return [f"{c}/{i:04d}.jpg" for c in classes for i in range(count)]


def keys_of(names):
    return {name: f"key of {name}" for name in names}


def where(manifest):
    return {entry.path: entry.split for entry in manifest.entries}


def test_adding_and_removing_files_moves_no_other(tmp_path):
    names = many(300)
    extra = many(340)
    small = make_split(listing_of(tmp_path, names), seed=4, keys=keys_of(names))
    large = make_split(listing_of(tmp_path, extra), seed=4, keys=keys_of(extra))
    assert len(large.entries) == 680
    assert all(where(large)[name] == split for name, split in where(small).items())


def test_renaming_and_moving_a_file_does_not_move_its_content(tmp_path):
    names = many(100)
    keys = keys_of(names)
    renamed = {name.replace("/", "/new_"): key for name, key in keys.items()}
    first = make_split(listing_of(tmp_path / "x", names), seed=1, keys=keys)
    second = make_split(listing_of(tmp_path / "y", renamed), seed=1, keys=renamed)
    assert {e.key: e.split for e in first.entries} == {e.key: e.split for e in second.entries}


def test_the_rule_is_a_documented_hash(tmp_path):
    """Written out once more, so that a split made today is made again in years."""

    def position(key):
        digest = hashlib.sha256(f"4\x1fsplit\x1fkey:{key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    names = many(50)
    manifest = make_split(listing_of(tmp_path, names), seed=4, keys=keys_of(names))
    for entry in manifest.entries:
        u = position(entry.key)
        assert entry.split == ("train" if u < 0.7 else "calibration" if u < 0.8 else "test")


def test_places_are_uniform_and_seeds_independent():
    first = np.array([place(0, "split", f"n{i}") for i in range(4000)])
    second = np.array([place(1, "split", f"n{i}") for i in range(4000)])
    assert stats.kstest(first, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
    assert first.min() >= 0 and first.max() < 1


def test_shares_are_met_in_expectation_in_every_class(tmp_path):
    names = many(2000, "abc")
    manifest = make_split(
        listing_of(tmp_path, names, ("a", "b", "c")), seed=0, fractions=THREE, keys=keys_of(names)
    )
    shares = manifest.shares()
    for name, wanted in THREE:
        deviation = np.sqrt(wanted * (1 - wanted) / 2000)
        assert np.all(np.abs(np.array(shares[name]) - wanted) < 4 * deviation)
    assert sum(len(manifest.subset(name)) for name, _ in THREE) == 6000
    assert "wanted 0.100" in manifest.summary()


def test_copies_never_straddle(tmp_path):
    names = many(200)
    keys = keys_of(names)
    for i in range(0, 200, 2):  # pairs of exact copies, one in each class
        keys[f"b/{i:04d}.jpg"] = keys[f"a/{i:04d}.jpg"]
    near = [(f"a/{i:04d}.jpg", f"a/{i + 1:04d}.jpg") for i in range(0, 200, 4)]
    place_of = where(make_split(listing_of(tmp_path, names), seed=2, keys=keys, duplicates=near))
    for i in range(0, 200, 2):
        assert place_of[f"a/{i:04d}.jpg"] == place_of[f"b/{i:04d}.jpg"]
    for first, second in near:
        assert place_of[first] == place_of[second]
    folds = make_kfold(listing_of(tmp_path, names), folds=4, seed=2, keys=keys, duplicates=near)
    for manifest in folds:
        place_of = where(manifest)
        assert all(place_of[first] == place_of[second] for first, second in near)


def test_groups_stay_together_and_chain_through_copies(tmp_path):
    names = many(120)
    keys = keys_of(names)
    keys["a/0000.jpg"] = keys["a/0119.jpg"]  # the same picture in the first and last group

    def group(name):
        return f"site {int(name[2:6]) // 10}"

    place_of = where(make_split(listing_of(tmp_path, names), seed=3, keys=keys, groups=group))
    for site in range(12):
        assert len({s for n, s in place_of.items() if group(n) == f"site {site}"}) == 1
    assert place_of["a/0005.jpg"] == place_of["b/0115.jpg"]
    some = {"a/0001.jpg": "g", "b/0001.jpg": "g"}
    split = make_split(listing_of(tmp_path, names), seed=0, keys=keys_of(names), groups=some)
    alone = make_split(listing_of(tmp_path, names), seed=0, keys=keys_of(names))
    moved = {n for n in names if where(split)[n] != where(alone)[n]}
    assert moved <= set(some) and where(split)["a/0001.jpg"] == where(split)["b/0001.jpg"]


def test_gaps_are_named_refused_or_filled(tmp_path):
    names = many(8, "a") + many(400, "b")
    keys = keys_of(names)
    listing = listing_of(tmp_path, names)

    def gap_of(seed):
        return make_split(listing, seed=seed, keys=keys, gaps="ignore").gaps()

    seed = next(s for s in range(50) if gap_of(s))
    (name, part), *_ = gap_of(seed)
    assert name == "a"
    with pytest.warns(UserWarning, match=f"class 'a' has no sample in part '{part}'"):
        warned = make_split(listing, seed=seed, keys=keys)
    assert part in warned.notes[0]
    with pytest.raises(DatasetError, match="class 'a' has no sample"):
        make_split(listing, seed=seed, keys=keys, gaps="error")
    filled = make_split(listing, seed=seed, keys=keys, gaps="fill")
    assert filled.gaps() == []
    moved = [n for n in names if where(filled)[n] != where(warned)[n]]
    assert len(moved) == len(gap_of(seed)) and all(n.startswith("a/") for n in moved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = next(s for s in range(500) if not gap_of(s))
        assert make_split(listing, seed=full, keys=keys, gaps="fill") == make_split(
            listing, seed=full, keys=keys
        )


def test_filling_works_for_every_small_class(tmp_path):
    classes = tuple(f"c{i:02d}" for i in range(40))
    names = [f"{c}/{i}.jpg" for c in classes for i in range(3)]
    listing = listing_of(tmp_path, names, classes)
    manifest = make_split(listing, seed=0, keys=keys_of(names), gaps="fill")
    assert all(count == 1 for row in manifest.counts().values() for count in row)


def test_kfold_tests_each_sample_once(tmp_path):
    names = many(100)
    listing = listing_of(tmp_path, names)
    folds = make_kfold(listing, folds=5, seed=0, keys=keys_of(names))
    tested = [item.path for manifest in folds for item in manifest.subset("test")]
    assert sorted(tested) == sorted(names)
    assert [m.fold for m in folds] == [(i, 5) for i in range(5)]
    assert len({m.hash for m in folds}) == 5
    for manifest in folds:
        train = {item.path for item in manifest.subset("train")}
        assert not train & {item.path for item in manifest.subset("test")}
    with_calibration = make_kfold(listing, folds=5, seed=0, keys=keys_of(names), calibration=True)
    for i, manifest in enumerate(with_calibration):
        assert manifest.subset("test") == folds[i].subset("test")
        assert manifest.subset("calibration") == folds[(i + 1) % 5].subset("test")
        assert dict(manifest.fractions) == pytest.approx(
            {"train": 0.6, "calibration": 0.2, "test": 0.2}
        )
    more = many(110)
    again = make_kfold(listing_of(tmp_path, more), folds=5, seed=0, keys=keys_of(more))
    for old, new in zip(folds, again, strict=True):
        assert all(where(new)[n] == s for n, s in where(old).items())


def test_quarantined_files_are_left_out_and_listed(tmp_path):
    names = many(20)
    listing = listing_of(tmp_path, names)
    keys = keys_of(names)
    manifest = make_split(
        listing,
        seed=0,
        keys=keys,
        quarantine={"a/0003.jpg": "empty", "x/y.jpg": "?"},
        gaps="ignore",
    )
    assert "a/0003.jpg" not in where(manifest) and len(manifest.entries) == 39
    assert manifest.quarantined == {"a/0003.jpg": "empty"}
    (tmp_path / "quarantine.txt").write_text("b/0001.jpg\ttruncated\n")
    by_default = make_split(listing, seed=0, keys=keys, gaps="ignore")
    assert by_default.quarantined == {"b/0001.jpg": "truncated"}
    with pytest.raises(DatasetError, match="all are quarantined"):
        make_split(listing, seed=0, keys=keys, quarantine=dict.fromkeys(names, "x"))


@pytest.fixture
def on_disk(tmp_path):
    root = tmp_path / "set"
    for name in [*many(30, "a"), *many(30, "b"), "b/ü \U0001f6f0.jpg"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_manifest_round_trip_and_hash(on_disk, tmp_path):
    manifest = make_split(scan(on_disk), seed=5, gaps="ignore")
    path = manifest.write(tmp_path / "split.json")
    back = Manifest.read(path, root=on_disk)
    assert back == manifest and back.hash == manifest.hash
    assert back.subset("test") == manifest.subset("test")
    other_seed = make_split(scan(on_disk), seed=6, gaps="ignore")
    assert other_seed.hash != manifest.hash
    assert json.loads(path.read_text())["hash"] == manifest.hash
    assert manifest.entries[0].key == hashlib.sha256(b"a/0000.jpg").hexdigest()[:32]
    assert canonical_json({"b": 1, "a": [0.1, "ü"]}) == b'{"a":[0.1,"\\u00fc"],"b":1}'
    with pytest.raises(DatasetError, match="no part 'val' in the split; it has train, calibration"):
        manifest.subset("val")


def test_manifest_refuses_changes_and_missing_files(on_disk, tmp_path):
    path = make_split(scan(on_disk), seed=5, gaps="ignore").write(tmp_path / "split.json")
    text = path.read_text()
    path.write_text(text.replace('"test"]', '"train"]', 1))
    with pytest.raises(DatasetError, match="was changed"):
        Manifest.read(path)
    path.write_text(text)
    (on_disk / "a" / "0007.jpg").unlink()
    assert Manifest.read(path)  # without a root, files are not looked for
    with pytest.raises(DatasetNotFoundError, match=r"a/0007.jpg of the split is missing \(1 of 61"):
        Manifest.read(path, root=on_disk)
    with pytest.raises(DatasetNotFoundError, match="no split manifest at"):
        Manifest.read(tmp_path / "no.json")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": "other/1"}', '{"schema": "shared-core.split/1"}', "\x00"]
)
def test_manifest_refuses_other_files(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DatasetError, match="x.json") as caught:
        Manifest.read(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", ["../outside.jpg", "/etc/passwd"])
def test_manifest_refuses_paths_outside(tmp_path, bad):
    names = ["a/0001.jpg", "b/0001.jpg"]
    manifest = make_split(listing_of(tmp_path, names), seed=0, keys=keys_of(names), gaps="ignore")
    entries = tuple(e._replace(path=bad) if e.label else e for e in manifest.entries)
    path = Manifest(**{**manifest.__dict__, "entries": entries}).write(tmp_path / "s.json")
    with pytest.raises(DatasetError, match="is not below"):
        Manifest.read(path)


@pytest.mark.parametrize(
    "fractions",
    [
        (),
        (("a", 0.5), ("a", 0.5)),
        (("a", 0.5), ("b", 0.6)),
        (("a", 1.2), ("b", -0.2)),
        (("a", 0),),
    ],
)
def test_bad_fractions(tmp_path, fractions):
    names = many(3)
    with pytest.raises(DatasetError, match="fractions are"):
        make_split(listing_of(tmp_path, names), seed=0, keys=keys_of(names), fractions=fractions)


def test_bad_folds(tmp_path):
    listing = listing_of(tmp_path, many(3))
    for arguments, message in (
        ({"folds": 1}, "folds is 1, expected at least 2"),
        ({"folds": 2, "calibration": True}, "expected at least 3"),
        ({"folds": 2, "gaps": "fill"}, "folds cannot lend"),
    ):
        with pytest.raises(DatasetError, match=message):
            make_kfold(listing, seed=0, keys=keys_of(many(3)), **arguments)


def layout(tmp_path, **counts):
    names = [f"{s}/{c}/{i:04d}.jpg" for s, n in counts.items() for c in "ab" for i in range(n)]
    return listing_of(tmp_path, names, layout="split"), keys_of(names)


def test_from_layout_keeps_folders(tmp_path):
    listing, keys = layout(tmp_path, train=30, val=5, test=10)
    manifest = from_layout(listing, keys=keys)
    assert {k: sum(v) for k, v in manifest.counts().items()} == {
        "train": 60,
        "calibration": 10,
        "test": 20,
    }
    assert all(e.path.startswith("val/") for e in manifest.entries if e.split == "calibration")
    assert manifest.notes == () and manifest.kind == "layout"


def test_from_layout_without_test_or_val(tmp_path):
    listing, keys = layout(tmp_path, train=30, val=200)
    manifest = from_layout(listing, keys=keys)
    assert {e.split for e in manifest.entries if e.path.startswith("val/")} == {
        "calibration",
        "test",
    }
    assert {e.split for e in manifest.entries if e.path.startswith("train/")} == {"train"}
    assert 150 < sum(manifest.counts()["test"]) < 250
    assert "no test folder" in manifest.notes[0]
    assert set(from_layout(listing, keys=keys, missing="leave").splits) == {"train", "calibration"}
    with pytest.raises(DatasetError, match="has no test folder"):
        from_layout(listing, keys=keys, missing="error")
    listing, keys = layout(tmp_path, train=400, test=10)
    manifest = from_layout(listing, keys=keys)
    assert 50 < sum(manifest.counts()["calibration"]) < 110
    assert sum(manifest.counts()["test"]) == 20


def test_from_layout_notes_and_drops_leaks(tmp_path):
    listing, keys = layout(tmp_path, train=10, val=5, test=5)
    keys["train/a/0001.jpg"] = keys["test/a/0001.jpg"]
    keys["val/b/0001.jpg"] = keys["test/b/0001.jpg"]
    keys["train/a/0002.jpg"] = keys["train/a/0003.jpg"]  # no leak
    assert from_layout(listing, keys=keys).notes == (
        "2 files have an exact copy in a later part; kept",
    )
    manifest = from_layout(listing, keys=keys, drop_leaks=True)
    assert manifest.quarantined == {
        "train/a/0001.jpg": "copy of a file in test",
        "val/b/0001.jpg": "copy of a file in test",
    }
    assert len(manifest.entries) == 38


def test_from_layout_errors(tmp_path):
    with pytest.raises(DatasetError, match="has no train/val/test folders; use make_split"):
        from_layout(listing_of(tmp_path, many(3)), keys=keys_of(many(3)))
    listing, keys = layout(tmp_path, train=3)
    with pytest.raises(DatasetError, match=r"split folders \['train'\]"):
        from_layout(listing, keys=keys)
    listing, keys = layout(tmp_path, train=3, val=3)
    with pytest.raises(DatasetError, match="share is 1"):
        from_layout(listing, keys=keys, share=1)
