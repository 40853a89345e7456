"""CIFAR-10 in its three forms, ImageNet's layout, folders: pixels, splits, caches, refusals."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from mpkd.dataset import cifar10, data_utils
from mpkd.dataset.data_utils import CALIBRATION, TEST, TRAIN, divide
from mpkd.dataset.imagenet_loader import imagenet_sets
from mpkd.dataset.sources import load_data
from mpkd.dataset.views import open_image
from mpkd.utils.config import load_config
from shared_core.datasets import DatasetError, ImageSet
from shared_core.runs import UsageError

NAMES = ["plane", "car", "bird"]


def fake_arrays(per_file: int = 9):
    rng = np.random.default_rng(1)
    files = [*cifar10.TRAIN_FILES, cifar10.TEST_FILE]
    return {
        name: (
            rng.integers(0, 256, (per_file, 32, 32, 3), dtype=np.uint8),
            [n % 3 for n in range(per_file)],
        )
        for name in files
    }


def write_batches(folder: Path, *, protocol: int = 2, keys=lambda key: key) -> dict:
    """The official layout: rows of 3,072 bytes, colour by colour."""
    folder.mkdir(parents=True)
    arrays = fake_arrays()
    for name, (images, labels) in arrays.items():
        rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)
        content = {"data": rows, "labels": labels, "batch_label": name}
        with (folder / name).open("wb") as file:
            pickle.dump({keys(k): v for k, v in content.items()}, file, protocol=protocol)
    with (folder / cifar10.META_FILE).open("wb") as file:
        pickle.dump({keys("label_names"): NAMES}, file, protocol=protocol)
    return arrays


def python2_batch(data: bytes, labels: list[int], columns: int) -> bytes:
    """What Python 2 writes, spelled out: its texts are bytes (opcodes of pickletools)."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value  # SHORT_BINSTRING

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    big = b"T" + len(data).to_bytes(4, "little") + data  # BINSTRING
    rows = len(labels)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85"
        + text(b"b") + b"\x87R(" + number(1) + number(rows) + number(columns) + b"\x86"
        + b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R(" + number(3)
        + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb\x89" + big + b"tb"
    )  # fmt: skip
    numbers = b"](" + b"".join(number(n) for n in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("keys", [str, lambda key: key.encode()], ids=["text", "bytes"])
def test_batches_give_the_pixels_that_were_written(tmp_path, protocol, keys):
    arrays = write_batches(tmp_path / "b", protocol=protocol, keys=keys)
    found = cifar10.read_batches(tmp_path / "b")
    wanted = np.concatenate([images for images, _ in arrays.values()])
    assert np.array_equal(found.images, wanted)
    assert found.labels.tolist() == [n % 3 for n in range(9)] * 6
    assert found.parts == ("train",) * 45 + ("test",) * 9 and found.classes == tuple(NAMES)


def test_a_file_of_python_2_is_read(tmp_path):
    row = np.arange(3 * 32 * 32, dtype=np.uint64) % 251
    data = np.concatenate([row, 255 - row]).astype(np.uint8)
    path = tmp_path / "data_batch_1"
    path.write_bytes(python2_batch(data.tobytes(), [1, 0], 3072))
    # The standard library agrees that these bytes are such a pickle.
    assert pickle.loads(path.read_bytes(), encoding="bytes")[b"labels"] == [1, 0]
    found = cifar10.read_batch(path)
    assert np.array_equal(found["data"], data.reshape(2, 3072)) and found["labels"] == [1, 0]


class _Evil:
    def __reduce__(self):
        return (open, ("pwned", "w"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"data": _Evil()}, "refused"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, "refused"),
        ({"data": np.zeros((2, 3), np.uint8), "labels": [0, 1]}, "3072 bytes"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "2 numbers"),
        ([1], "not entries"),
    ],
)
def test_other_pickles_are_refused_and_run_nothing(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    write_batches(tmp_path / "b")
    (tmp_path / "b" / "data_batch_2").write_bytes(pickle.dumps(content))
    with pytest.raises(DatasetError, match=said):
        cifar10.read_batches(tmp_path / "b")
    assert not Path("pwned").exists()


def test_a_truncated_or_missing_batch_is_named(tmp_path):
    write_batches(tmp_path / "b")
    path = tmp_path / "b" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DatasetError, match="data_batch_3: no readable batch"):
        cifar10.read_batches(tmp_path / "b")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3"):
        cifar10.read_batches(tmp_path / "b")


def write_folder(root: Path) -> dict[str, np.ndarray]:
    pixels = {}
    for name, (images, labels) in fake_arrays().items():
        part = "test" if name == cifar10.TEST_FILE else "train"
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / part / NAMES[label] / f"{name}_{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode(".png", image[:, :, ::-1])[1].tobytes())
            pixels[f"{part}/{path.name}"] = image
    return pixels


def config(**changes):
    keys = {"dataset.workers": 1, "dataset.val_split": 0.2} | changes
    return load_config(None, (), overrides=keys)


def test_all_forms_of_cifar10_hold_the_same_images(tmp_path):
    write_batches(tmp_path / "one" / "cifar-10-batches-py")
    write_folder(tmp_path / "two" / "CIFAR10")
    (tmp_path / "three").mkdir()
    with zipfile.ZipFile(tmp_path / "three" / "CIFAR10.zip", "w") as archive:
        for path in (tmp_path / "two" / "CIFAR10").rglob("*.png"):
            archive.write(path, Path("CIFAR10") / path.relative_to(tmp_path / "two" / "CIFAR10"))
    found = [
        load_data(config(), tmp_path / f"run{n}", data_root=tmp_path / name)
        for n, name in enumerate(("one", "two", "three"))
    ]
    for data in found:
        assert data.kind == "subset" and data.image_size == 32
        assert [len(data.sets[p]) for p in (TRAIN, CALIBRATION, TEST)] == [36, 9, 9]
        images = np.concatenate([data.sets[p].array for p in (TRAIN, CALIBRATION, TEST)])
        rows = sorted(image.tobytes() for image in images)
        assert rows == sorted(i.tobytes() for a, _ in fake_arrays().values() for i in a)
    assert found[1].split_hash == found[2].split_hash


def test_the_split_is_stratified_kept_and_moved_by_nothing(tmp_path):
    labels = np.repeat(np.arange(4), 50)
    keys = [f"{n:032x}" for n in range(200)]
    given = [TRAIN] * 150 + [TEST] * 50
    some = {"val_split": 0.1, "test_split": 0.2, "seed": 0, "max_images": 0}
    parts = divide(labels, keys, given, **some)
    assert parts.count(TEST) == 50 and parts[150:] == [TEST] * 50
    for label in range(3):
        inside = [p for p, own in zip(parts, labels, strict=True) if own == label]
        assert inside.count(CALIBRATION) == 5
    order = np.random.default_rng(0).permutation(200)
    again = divide(labels[order], [keys[n] for n in order], [given[n] for n in order], **some)
    assert [again[place] for place in np.argsort(order)] == parts
    copies = [*keys[:199], keys[0]]  # the same image twice stays on one side
    parts = divide(np.zeros(200, np.int64), copies, [None] * 200, **some)
    assert parts[0] == parts[199]
    small = divide(labels, keys, given, **{**some, "max_images": 40})
    assert small.count(None) == 135 - small.count(TRAIN) and 38 <= small.count(TRAIN) <= 42


def test_a_changed_image_rebuilds_the_cache_and_is_told_to_a_resumed_run(tmp_path):
    root = tmp_path / "CIFAR10"
    write_folder(root)
    first = load_data(config(), tmp_path / "run", data_root=tmp_path)
    index = tmp_path / "run" / "dataset" / "cache" / "cifar10" / "index.json"
    stamp = index.stat().st_mtime_ns
    again = load_data(config(), tmp_path / "run", data_root=tmp_path)
    assert index.stat().st_mtime_ns == stamp
    assert np.array_equal(first.sets[TRAIN].array, again.sets[TRAIN].array)
    path = next((root / "train" / "car").iterdir())
    white = np.full((32, 32, 3), 255, np.uint8)
    path.write_bytes(cv2.imencode(".png", white)[1].tobytes())
    with pytest.raises(DatasetError, match="the data changed"):
        load_data(config(), tmp_path / "run", data_root=tmp_path)
    assert index.stat().st_mtime_ns != stamp  # rebuilt
    fresh = load_data(config(), tmp_path / "new", data_root=tmp_path)
    images = np.concatenate([s.array for s in fresh.sets.values()])
    assert sum((image == 255).all() for image in images) == 1


def test_cifar10_at_a_size_that_trained_networks_know(tmp_path):
    """What is stored stays at 32 pixels; views enlarge it, and nothing is cut out."""
    write_batches(tmp_path / "CIFAR10" / "cifar-10-batches-py")
    chosen = config(**{"dataset.image_size": 96})
    data = load_data(chosen, tmp_path / "run", data_root=tmp_path)
    test = data.sets[TEST]
    assert test.array.shape[1:] == (32, 32, 3) and data.facts()["pixels"] == 96
    loader = data_utils.evaluation_loader(data, test, batch_size=4, device="cpu", threads=0)
    seen = np.concatenate([batch.images.copy() for batch in loader.loader])
    wanted = [cv2.resize(image, (96, 96), interpolation=cv2.INTER_CUBIC) for image in test.array]
    assert np.array_equal(seen, np.stack(wanted))
    view = data_utils.training_loader(
        data, data.sets[TRAIN], batch_size=4, augment=True, seed=0, purpose="t", device="cpu",
        threads=0,
    ).loader.view  # fmt: skip
    assert view.settings()["scale"] == [chosen["dataset.crop"], 1.0]


def test_a_pickle_that_would_fill_memory_is_refused_before_it_is_loaded(tmp_path):
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"\x80\x04}r\x00\x00\x00\x10.")  # remembered under index 2 ** 28
    with pytest.raises(DatasetError, match="refused, it holds a memory index of 268435456"):
        cifar10.read_batch(path)


def test_imagenet_keeps_its_validation_folder_for_the_test(tmp_path, image_folder):
    image_folder(tmp_path / "train", ("n01", "n02"), images=20, size=80)
    image_folder(tmp_path / "val", ("n01", "n02"), images=3, size=80)
    sets, manifest = imagenet_sets(tmp_path, val_split=0.1, seed=0, max_images=0)
    assert [len(sets[p]) for p in (TRAIN, CALIBRATION, TEST)] == [36, 4, 6]
    assert all("/val/" in path for path in sets[TEST].paths) and manifest.classes == ("n01", "n02")
    chosen = config(**{
        "dataset.name": "imagenet", "dataset.data_dir_imagenet": str(tmp_path),
        "dataset.image_size": 70,
    })  # fmt: skip
    for cache in (True, False):
        data = load_data(
            chosen | {"dataset.cache.enabled": cache}, tmp_path / f"r{cache}", data_root=None
        )
        loader = data_utils.evaluation_loader(
            data, data.sets[TEST], batch_size=4, device="cpu", threads=0
        )
        seen = np.concatenate([batch.images for batch in loader.loader])
        # Validation sees what inference makes of the same files, from the cache or not.
        wanted = [open_image(path, image_size=70) for path in data.sets[TEST].paths]
        assert np.array_equal(seen, np.stack(wanted))
    with pytest.raises(DatasetError, match="val/<class>"):
        imagenet_sets(tmp_path / "train", val_split=0.1, seed=0, max_images=0)


def test_a_folder_of_classes_and_images_without_labels(tmp_path, image_folder):
    root = image_folder(tmp_path / "mine", ("a", "b"), images=20)
    extra = image_folder(tmp_path / "extra", ("deep/er",), images=4, size=15)
    data = load_data(
        config(**{
            "dataset.name": "folder", "dataset.data_dir_folder": str(root),
            "dataset.unlabelled": [str(extra)], "dataset.max_images": 20,
        }),
        tmp_path / "run", data_root=None,
    )  # fmt: skip
    assert data.image_size == 12 and data.kind == "subset" and len(data.sets[TRAIN]) == 20
    both = data.learning_set(unlabelled=True)
    assert len(both) == len(data.sets[TRAIN]) + 4 and both.array.shape[1:] == (12, 12, 3)
    assert len(data.learning_set(unlabelled=False)) == len(data.sets[TRAIN])
    path = sorted(extra.rglob("*.png"))[0]
    assert np.array_equal(both.array[-4], open_image(str(path), image_size=12))


@pytest.mark.parametrize("size", [12, 70])  # in memory, in a cache
def test_unlabelled_copies_of_held_out_images_teach_nothing(tmp_path, image_folder, size):
    root = image_folder(tmp_path / "mine", ("a", "b"), images=20)
    extra = image_folder(tmp_path / "extra", ("x",), images=4, size=15)
    keys = {
        "dataset.name": "folder", "dataset.data_dir_folder": str(root),
        "dataset.image_size": size, "dataset.unlabelled": [str(root), str(extra), str(extra)],
    }  # fmt: skip
    data = load_data(config(**keys), tmp_path / "run", data_root=None)
    assert len(data.unlabelled) == 4  # of 40 + 4; a folder that is named twice counts once
    assert {Path(path).parent.name for path in data.unlabelled.paths} == {"x"}
    assert "40 unlabelled images are copies" in " ".join(data.facts()["notes"])
    keys["dataset.unlabelled"] = [str(root)]
    with pytest.raises(DatasetError, match="all 40 images are copies"):
        load_data(config(**keys), tmp_path / "other", data_root=None)


def test_small_images_in_memory_are_what_inference_sees(tmp_path, image_folder):
    root = image_folder(tmp_path / "mine", ("a",), images=3, size=40)
    paths = sorted(root.rglob("*.png"))
    for cache in (None, tmp_path / "cache"):
        files = ImageSet(paths, [0] * 3, [f"{n:032x}" for n in range(3)])
        array = data_utils.with_pixels(files, image_size=32, cache=cache, threads=1).array
        wanted = np.stack([open_image(str(path), image_size=32) for path in paths])
        assert np.array_equal(array, wanted)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({}, FileNotFoundError, "CIFAR-10 is not at"),
        ({"dataset.name": "imagenet"}, FileNotFoundError, "ImageNet is not at"),
        ({"dataset.name": "folder"}, FileNotFoundError, "dataset.data_dir_folder"),
        ({"dataset.name": "digits", "dataset.image_size": 100}, UsageError, "at most 64"),
        ({"dataset.name": "digits", "model.num_classes": 7}, UsageError, "digits has 10"),
        (
            {"dataset.name": "digits", "dataset.unlabelled": ["nowhere"]},
            FileNotFoundError, "nowhere: no such file or folder",
        ),
    ],
)  # fmt: skip
def test_data_that_are_missing_or_unfit_are_one_line(tmp_path, monkeypatch, changes, error, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=said) as caught:
        load_data(config(**changes), tmp_path / "run", data_root=tmp_path)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_none_is_named(tmp_path):
    write_folder(tmp_path / "CIFAR10")
    shutil.copy(__file__, tmp_path / "CIFAR10" / "train" / "car" / "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png"):
        load_data(config(), tmp_path / "run", data_root=tmp_path)
