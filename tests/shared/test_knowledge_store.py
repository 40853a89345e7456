"""Teacher outputs on disk: right rows, no stale ones, no half-written batch."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from shared_core.knowledge import KnowledgeError, KnowledgeStore, index, topk

SHARED = Path(__file__).resolve().parents[2] / "shared"
VIEW = {"size": 32, "crop": [1, 2], "seed": 0}


def key(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()[:32]


def keys(*numbers: int) -> list[str]:
    return [key(i) for i in numbers]


def create(folder, **changes):
    settings = {"teacher_hash": "t1", "classes": ["a", "b", "c"], "view": VIEW, "dtype": "float32"}
    return KnowledgeStore.create(folder, **(settings | changes))


def values(n: int, c: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, c)).astype(np.float32)


def test_rows_come_back_in_the_order_asked_for(tmp_path):
    truth = {}
    with create(tmp_path / "s") as store:
        for batch in range(4):
            for view in (0, 5, -1):
                numbers = range(batch * 7, batch * 7 + 7)
                rows = values(7, seed=100 * batch + view + 1)
                assert store.put(keys(*numbers), view, rows) == 7
                truth |= {(i, view): row for i, row in zip(numbers, rows, strict=True)}
        check = np.random.default_rng(1).integers(28, size=50).tolist()
        assert np.array_equal(store.get(keys(*check), 5), [truth[i, 5] for i in check])
    store = KnowledgeStore.open(
        tmp_path / "s", teacher_hash="t1", view=VIEW, classes=["a", "b", "c"]
    )
    assert (len(store), store.views, store.count(5), store.verify()) == (84, (-1, 0, 5), 28, 84)
    for view in (0, 5, -1):
        check = np.random.default_rng(2).permutation(28).tolist()
        got = store.get(keys(*check), view)
        assert got.dtype == np.float32
        assert np.array_equal(got, [truth[i, view] for i in check])
    assert store.get([], 0).shape == (0, 3)


def test_lookup_is_right_while_the_recent_table_is_merged(tmp_path, monkeypatch):
    """Against a plain dict, over many batches, across merges of the two tables."""
    lookup, truth = index.Lookup([]), {}
    rng = np.random.default_rng(0)
    for number in range(40):
        records = np.zeros(500, dtype=index.RECORD)
        records["key"] = index.key_bytes([key(number * 500 + i) for i in range(500)])
        records["view"] = rng.integers(2)
        lookup.add(index.Batch(number * 500, 0, records))
        truth |= {
            (key(number * 500 + i), int(records["view"][0])): number * 500 + i for i in range(500)
        }
    asked = [key(int(i)) for i in rng.integers(25000, size=3000)]
    for view in (0, 1, 2):
        got = lookup.rows(index.key_bytes(asked), view)
        assert got.tolist() == [truth.get((k, view), -1) for k in asked]
    assert lookup.count(0) + lookup.count(1) == 20000
    assert lookup._num_recent < 20000  # a merge happened


def test_float16_is_numpys_rounding_and_overflow_is_refused(tmp_path):
    rows = values(4) * 100
    with create(tmp_path / "s", dtype="float16") as store:
        store.put(keys(0, 1, 2, 3), 0, rows)
        assert np.array_equal(store.get(keys(0, 1, 2, 3), 0), rows.astype(np.float16))
        with pytest.raises(
            KnowledgeError, match=f"outputs of sample {key(9)} are not finite in fl"
        ):
            store.put(keys(8, 9), 0, np.array([[1, 2, 3], [70000.0, 0, 0]]))
        assert store.missing(keys(8, 9), 0) == keys(8, 9)  # nothing of the batch was stored
    with create(tmp_path / "f") as store, pytest.raises(KnowledgeError, match="not finite"):
        store.put(keys(1), 0, np.array([[np.nan, 0, 0]]))


def test_stale_teacher_view_and_classes_name_both_values(tmp_path):
    create(tmp_path / "s").close()
    for changes, message in [
        ({"teacher_hash": "t2"}, "stored teacher_hash is 't1', wanted 't2'"),
        ({"view": VIEW | {"size": 64}}, r'stored view is .*"size": 32.*, wanted .*"size": 64'),
        ({"classes": ["a", "c", "b"]}, "stored classes is .*, wanted "),
    ]:
        with pytest.raises(KnowledgeError, match=message):
            KnowledgeStore.open(tmp_path / "s", **changes)
        with pytest.raises(KnowledgeError, match=message):
            create(tmp_path / "s", **changes)
    with pytest.raises(KnowledgeError, match="stored dtype is 'float32', wanted 'float16'"):
        create(tmp_path / "s", dtype="float16")


def test_missing_samples_are_counted_and_the_first_is_named(tmp_path):
    with create(tmp_path / "s") as store:
        store.put(keys(0, 1), 0, values(2))
        with pytest.raises(
            KnowledgeError, match=f"2 of 3 samples .* view 0, the first is {key(7)}"
        ):
            store.get(keys(1, 7, 8), 0)
        with pytest.raises(
            KnowledgeError, match="2 of 2 samples have no stored outputs for view 1"
        ):
            store.get(keys(0, 1), 1)
        assert store.missing(keys(1, 8, 0, 7), 0) == keys(8, 7)


def test_a_sample_keeps_its_row_and_copies_share_one(tmp_path):
    with create(tmp_path / "s") as store:
        first, second = values(2), values(3, seed=1)
        assert store.put(keys(0, 1), 0, first) == 2
        assert store.put(keys(1, 2, 2), 0, second) == 1
        assert np.array_equal(store.get(keys(0, 1, 2), 0), [first[0], first[1], second[1]])
        assert store.put(keys(0, 1), 0, first) == 0
        assert len(store) == 3


@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_top_k_keeps_the_largest_and_the_mass_of_the_rest(tmp_path, kind):
    logits = values(20, 10).astype(np.float64) * 3
    outputs = logits if kind == "logits" else softmax(logits, axis=1)
    with create(tmp_path / "s", classes=10, top_k=3, kind=kind) as store:
        store.put(keys(*range(20)), 0, outputs)
        top, places, _ = store.get_top(keys(*range(20)), 0)
        dense = store.get(keys(*range(20)), 0)
    order = np.argsort(-outputs, axis=1)[:, :3]
    assert np.array_equal(places, order)
    np.testing.assert_allclose(top, np.take_along_axis(outputs, order, 1), rtol=1e-6)
    got = softmax(dense.astype(np.float64), axis=1) if kind == "logits" else dense
    true = softmax(logits, axis=1)
    np.testing.assert_allclose(
        np.take_along_axis(got, order, 1), np.take_along_axis(true, order, 1), rtol=1e-5
    )
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-5)
    rest = np.argsort(-outputs, axis=1)[:, 3:]
    shares = np.take_along_axis(got, rest, 1)
    np.testing.assert_allclose(shares, shares[:, :1] * np.ones((1, 7)), rtol=1e-6)  # equal


def test_top_k_of_huge_logits_is_finite():
    top, places, tail = topk.compress(np.array([[800.0, 790.0, -800.0]]), 1, kind="logits")
    dense = topk.expand(top, places, tail, classes=3, kind="logits")
    np.testing.assert_allclose(log_softmax(dense[0].astype(np.float64))[0], 0, atol=1e-4)


def test_get_top_needs_top_k(tmp_path):
    with create(tmp_path / "s") as store, pytest.raises(KnowledgeError, match="without top_k"):
        store.get_top([], 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"kind": "x"}, "kind is 'x'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"top_k": 3}, "top_k is 3, expected 1 to 2"),
        ({"kind": "features", "top_k": 1}, "no features"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(KnowledgeError, match=message):
        create(tmp_path / "s", **changes)
    assert not (tmp_path / "s").exists()


def test_bad_batches(tmp_path):
    with create(tmp_path / "s") as store:
        with pytest.raises(KnowledgeError, match=r"shape \(2, 3\), expected \(1, 3\)"):
            store.put(keys(0), 0, values(2))
        for bad in ("short", "g" * 32, key(0)[:-2] + " 1", key(0) + key(1)):
            with pytest.raises(KnowledgeError, match="is no content key"):
                store.put([key(5), bad], 0, values(2))
    reader = KnowledgeStore.open(tmp_path / "s")
    with pytest.raises(KnowledgeError, match="was opened for reading"):
        reader.put(keys(0), 0, values(1))


def test_every_cut_of_the_index_leaves_only_whole_batches(tmp_path):
    folder = tmp_path / "s"
    with create(folder) as store:
        for batch in range(3):
            store.put(keys(*range(batch * 4, batch * 4 + 4)), 0, values(4, seed=batch))
    log = (folder / "index.bin").read_bytes()
    size = len(log) // 3
    for length in range(len(log) + 1):
        (folder / "index.bin").write_bytes(log[:length])
        assert len(KnowledgeStore.open(folder)) == 4 * (length // size)
    for place in range(0, len(log), 5):  # a bit that flipped ends the log there
        (folder / "index.bin").write_bytes(log[:place] + bytes([log[place] ^ 4]) + log[place + 1 :])
        assert len(KnowledgeStore.open(folder)) == 4 * (place // size)


def test_rows_that_are_not_there_do_not_count_and_writing_goes_on(tmp_path):
    folder = tmp_path / "s"
    with create(folder) as store:
        store.put(keys(0, 1), 0, values(2))
        store.put(keys(2, 3), 0, values(2, seed=1))
    rows = (folder / "values.bin").read_bytes()
    (folder / "values.bin").write_bytes(rows[:-3])  # the second batch was not written out whole
    with create(folder) as store:
        assert (len(store), store.missing(keys(0, 1, 2, 3), 0)) == (2, keys(2, 3))
        store.put(keys(2, 3), 0, values(2, seed=1))
    assert (folder / "values.bin").read_bytes() == rows
    assert KnowledgeStore.open(folder).verify() == 4


def test_verify_finds_a_changed_row(tmp_path):
    folder = tmp_path / "s"
    with create(folder) as store:
        store.put(keys(0, 1), 0, values(2))
        store.put(keys(2, 3), 0, values(2))
    rows = bytearray((folder / "values.bin").read_bytes())
    rows[-1] ^= 1
    (folder / "values.bin").write_bytes(rows)
    with pytest.raises(KnowledgeError, match="rows 2 to 3 are damaged"):
        KnowledgeStore.open(folder).verify()


WRITER = """
import hashlib, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from shared_core.knowledge import KnowledgeStore
store = KnowledgeStore.create(sys.argv[2], teacher_hash="t", classes=50, view="v", dtype="float32")
for batch in range(100000):
    numbers = range(batch * 8, batch * 8 + 8)
    keys = [hashlib.sha256(str(i).encode()).hexdigest()[:32] for i in numbers]
    store.put(keys, 0, np.array(numbers)[:, None] + np.zeros(50))
    print(batch, flush=True)
"""


def test_a_killed_writer_leaves_whole_batches_with_their_own_values(tmp_path):
    command = [sys.executable, "-c", WRITER, str(SHARED), str(tmp_path / "s")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for _ in range(20):
        last = int(process.stdout.readline())
    with pytest.raises(KnowledgeError, match="another process is writing"):
        KnowledgeStore.create(
            tmp_path / "s", teacher_hash="t", classes=50, view="v", dtype="float32"
        )
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = KnowledgeStore.open(tmp_path / "s")
    assert len(store) % 8 == 0
    assert len(store) >= (last + 1) * 8  # everything that put said it had stored
    got = store.get(keys(*range(len(store))), 0)
    assert np.array_equal(got, np.arange(len(store))[:, None] + np.zeros(50))
    store.verify()


def test_a_full_disk_leaves_what_was_whole(tmp_path, monkeypatch):
    folder = tmp_path / "s"
    store = create(folder)
    store.put(keys(0, 1), 0, values(2))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=f"cannot write {folder}: No space left on device"):
            store.put(keys(2, 3), 0, values(2))
    assert len(KnowledgeStore.open(folder)) == 2
    with create(folder) as again:
        again.put(keys(2, 3), 0, values(2, seed=1))
        assert np.array_equal(again.get(keys(2, 3), 0), values(2, seed=1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "schema is 'list'"),
        (json.dumps({"schema": "other"}), "schema is 'other'"),
        (json.dumps({"schema": "smallvision-knowledge/1", "kind": "x"}), "kind or dtype"),
    ],
)
def test_a_bad_store_file(tmp_path, text, message):
    create(tmp_path / "s").close()
    (tmp_path / "s" / "store.json").write_text(text)
    with pytest.raises(KnowledgeError, match=message):
        KnowledgeStore.open(tmp_path / "s")


def test_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="no knowledge store at"):
        KnowledgeStore.open(tmp_path)
