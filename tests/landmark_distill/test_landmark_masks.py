"""Masks and labels: forms, order of pairs, and what is refused."""

import numpy as np
import pytest

from landmark_distill.images.truths import PairMask, PairTruth, folder_labels, read_mask, read_truth


def test_a_mask_has_the_order_of_triu_indices_and_stays_in_its_file(tmp_path):
    labels = np.random.default_rng(0).integers(0, 5, 41)
    i, j = np.triu_indices(41, 1)
    np.save(tmp_path / "m.npy", (labels[i] == labels[j]).astype(np.uint8))
    mask = read_mask(tmp_path / "m.npy", 41)
    assert mask.values.dtype == np.uint8 and isinstance(mask.values, np.memmap)
    cells = PairTruth("m", mask, 41).block(slice(0, 20), slice(20, 41))
    np.testing.assert_array_equal(cells, labels[:20, None] == labels[None, 20:])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_a_mask_of_any_number_type_is_read(tmp_path, dtype):
    values = np.array([1, 0, 0, 1, 0, 1])
    np.save(tmp_path / "m.npy", values.astype(dtype))
    got = read_truth(tmp_path / "m.npy", 4)
    assert isinstance(got, PairMask)
    np.testing.assert_array_equal(np.asarray(got.values) != 0, values != 0)


def test_labels_by_file_form(tmp_path):
    np.save(tmp_path / "l.npy", np.array([3, 3, 0], np.int32))
    np.testing.assert_array_equal(read_truth(tmp_path / "l.npy", 3), [3, 3, 0])
    (tmp_path / "l.txt").write_text("tower\n\nbridge\ntower\n", encoding="utf-8")
    np.testing.assert_array_equal(read_truth(tmp_path / "l.txt", 3), [1, 0, 1])
    (tmp_path / "list.txt").write_text("a.jpg\tx\t7\nb.jpg\tx\t2\n", encoding="utf-8")
    np.testing.assert_array_equal(read_truth(tmp_path / "list.txt", 2), [7, 2])


def test_folders_give_coarse_and_fine():
    got = folder_labels(["b/2/x.jpg", "a/1/x.jpg", "b/1/x.jpg", "b/2/y.jpg"])
    assert got["coarse"].tolist() == [1, 0, 1, 1] and got["fine"].tolist() == [2, 0, 1, 2]
    with pytest.raises(ValueError, match=r"x\.jpg lies in no folder"):
        folder_labels(["a/x.jpg", "x.jpg"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([1, 0, 2]), "entry 2 is 2, expected 0 or 1"),
        (np.array([1, 0]), r"expected \(3,\)"),
        (np.array([[1, 0, 1]]), r"expected \(3,\)"),
        (np.array(["a", "b", "c", "d", "e"]), r"expected \(3,\)"),
    ],
)
def test_a_wrong_mask_is_refused(tmp_path, values, message):
    np.save(tmp_path / "m.npy", values)
    with pytest.raises(ValueError, match=message):
        read_mask(tmp_path / "m.npy", 3)


def test_other_wrong_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_truth(tmp_path / "none.npy", 3)
    (tmp_path / "t.npy").write_text("text")
    with pytest.raises(ValueError, match="is no .npy file"):
        read_truth(tmp_path / "t.npy", 3)
    np.save(tmp_path / "n.npy", np.array([-1, 0, 0, 0]))
    with pytest.raises(ValueError, match="expected whole numbers from 0"):
        read_truth(tmp_path / "n.npy", 4)
    (tmp_path / "t.txt").write_bytes(b"a\0b")
    with pytest.raises(ValueError, match="null characters"):
        read_truth(tmp_path / "t.txt", 3)
    (tmp_path / "t.txt").write_bytes("é\r\n\r\nb\r\né\r\n".encode("utf-8-sig"))
    assert read_truth(tmp_path / "t.txt", 3).tolist() == [1, 0, 1]
