"""Folds: each sample validated once, classes even, copies together, decided by content and seed."""

from __future__ import annotations

import numpy as np
import pytest

from shared_core.datasets import DatasetError
from shared_core.datasets.splitting.manifest import Entry
from visiondistill_gc.utils.folds import group_matcher, group_names, make_folds


def entry(path, label=0, key=None):
    return Entry(path, label, key or f"{abs(hash(path)):032x}"[:32], "train")


def test_each_class_is_spread_evenly():
    labels = np.repeat([0, 1, 2], [50, 23, 7])
    groups = [f"g{n}" for n in range(80)]
    folds = make_folds(labels, groups, folds=5, seed=1)
    table = np.array([[((folds == f) & (labels == c)).sum() for c in range(3)] for f in range(5)])
    assert (table.max(axis=0) - table.min(axis=0) <= 1).all()
    assert table.sum() == 80


@pytest.mark.parametrize("kind", ["stratified", "plain"])
def test_groups_stay_together(kind):
    rng = np.random.default_rng(0)
    groups = [f"photo{n}" for n in rng.integers(0, 40, 300)]
    labels = np.array([int(g[5:]) % 4 for g in groups])
    folds = make_folds(labels, groups, folds=4, seed=3, kind=kind)
    for group in set(groups):
        assert len({int(f) for f, g in zip(folds, groups, strict=True) if g == group}) == 1
    assert set(folds.tolist()) == {0, 1, 2, 3}


def test_decided_by_seed_and_name_not_by_order():
    labels = np.arange(60) % 3
    groups = [f"k{n}" for n in range(60)]
    first = make_folds(labels, groups, folds=5, seed=7)
    turned = make_folds(labels[::-1], groups[::-1], folds=5, seed=7)
    assert np.array_equal(first, turned[::-1])
    assert not np.array_equal(first, make_folds(labels, groups, folds=5, seed=8))


def test_plain_folds_do_not_move_when_a_file_comes():
    groups = [f"k{n}" for n in range(90)]
    labels = np.zeros(90, int)
    all_of_them = make_folds(labels, groups, folds=3, seed=0, kind="plain")
    fewer = make_folds(labels[1:], groups[1:], folds=3, seed=0, kind="plain")
    assert np.array_equal(all_of_them[1:], fewer)


def test_group_names(tmp_path):
    entries = [
        entry("a/cup_1.jpg", key="0" * 32),
        entry("a/cup_2.jpg"),
        entry("a/other.jpg", key="0" * 32),  # a copy of the first
        entry("a/plate_1.jpg"),
        entry("b/cup_3.jpg", 1),  # another class
        entry("b/near.jpg", 1),
    ]
    alone = group_names(entries, root=tmp_path)
    assert alone[0] == alone[2] and len(set(alone)) == 5
    near = group_names(entries, root=tmp_path, near=[("b/cup_3.jpg", "b/near.jpg", "gone.jpg")])
    assert near[4] == near[5] and len(set(near)) == 4
    named = group_names(entries, root=tmp_path, matcher=group_matcher(r"^([a-z]+)_\d+$"))
    assert named[0] == named[1] == named[2] and named[4] != named[0] and len(set(named)) == 4


def test_near_copies_never_swallow_a_class(tmp_path):
    """Pictures of a fixed camera all look alike; bound together they would be one fold."""
    entries = [entry(f"a/{n}.jpg") for n in range(20)]
    camera = [e.path for e in entries[:8]]
    assert len(set(group_names(entries, root=tmp_path, near=[camera]))) == 20
    assert len(set(group_names(entries, root=tmp_path, near=[camera[:3]]))) == 18


def test_the_class_of_a_group_is_its_folder():
    match = group_matcher(r"^(\w+?)_")
    assert match("Kitchen/cup_1.jpg") == "Kitchen/cup" != match("Other/cup_1.jpg")
    assert match("train/Kitchen/cup_1.jpg") == match("val/Kitchen/cup_2.jpg") == "Kitchen/cup"
    assert match("Kitchen/none.jpg") is None


@pytest.mark.parametrize(
    ("words", "said"),
    [({"folds": 1}, "expected 2 or more"), ({"folds": 9}, "take fewer folds")],
)
def test_bad_folds(words, said):
    with pytest.raises(DatasetError, match=said):
        make_folds([0, 1, 0], ["a", "b", "c"], seed=0, **words)


def test_bad_pattern():
    with pytest.raises(DatasetError, match="regular expression"):
        group_matcher("(")
