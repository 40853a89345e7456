"""From a folder to three splits: what is counted, what it is called, what the loaders give."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from gfnet_dynn.config import parse
from gfnet_dynn.data_loader_helper import Data, Loaders, prepare_data
from gfnet_dynn.settings import Settings
from shared_core import datasets

CPU = torch.device("cpu")


def options(*words: object) -> Settings:
    fixed = "--scale rehearsal --num_workers 1 --patch-size 4 --input-size 16".split()
    words = [*fixed, *(str(word) for word in words)]
    return Settings.of(parse(words, prog="main.py", scale=None).values)


def prepared(output: Path, *words: object) -> Data:
    settings = options(*words)
    return prepare_data(settings.source, output, seed=settings.seed)


def loaders(data: Data, *words: object) -> Loaders:
    settings = options("--data-path", data.root, *words)
    workers = settings.source.num_workers
    return Loaders(data, settings.views, settings.seed, workers, CPU)


@pytest.fixture(scope="module")
def images(tmp_path_factory, folder_of_images) -> Path:
    return folder_of_images(tmp_path_factory.mktemp("images") / "set", images=60)


@pytest.fixture(scope="module")
def data(tmp_path_factory, images):
    return prepared(tmp_path_factory.mktemp("out"), "--data-path", images)


def test_three_splits_without_overlap(data, images):
    parts = {s: data.image_set(s) for s in ("train", "calibration", "test")}
    paths = [str(path) for part in parts.values() for path in part.paths]
    assert sorted(paths) == sorted(str(path) for path in images.rglob("*.png"))
    facts = data.facts()
    assert facts["splits"] == {name: len(part) for name, part in parts.items()}
    assert (facts["kind"], facts["images"], facts["pixels"]) == ("real", 180, 16)
    # 0.8, 0.1, 0.1 of 180, within four standard deviations of a draw by hash.
    for name, share in (("train", 0.8), ("calibration", 0.1), ("test", 0.1)):
        assert abs(len(parts[name]) - 180 * share) < 4 * (180 * share * (1 - share)) ** 0.5
    for part in parts.values():
        assert set(part.labels.tolist()) == {0, 1, 2}
        for path, label in zip(part.paths, part.labels, strict=True):
            assert Path(path).parent.name == data.classes[label]


def test_split_ratio_and_seed_act(tmp_path, images, data):
    half = prepared(tmp_path / "a", "--data-path", images, "--split_ratio", 0.5)
    assert 65 < half.facts()["splits"]["train"] < 115
    other = prepared(tmp_path / "b", "--data-path", images, "--split-seed", 5)
    assert other.manifest.hash != data.manifest.hash
    again = prepared(tmp_path / "c", "--data-path", images)
    assert again.manifest.hash == data.manifest.hash


def test_near_copies_stay_together_unless_exact_is_asked(tmp_path, folder_of_images):
    """Each image has a copy that is a little brighter."""
    root = folder_of_images(tmp_path / "set", images=20, size=64)
    for path in list(root.rglob("*.png")):
        image = cv2.imread(str(path))
        cv2.imwrite(str(path.with_suffix(".copy.png")), cv2.add(image, np.full(3, 2.0)))

    def torn(*words: str) -> int:
        data = prepared(tmp_path / f"out{len(words)}", "--data-path", root, *words)
        lies = {entry.path: entry.split for entry in data.manifest.entries}
        return sum(
            split != lies[path.replace(".png", ".copy.png")]
            for path, split in lies.items()
            if ".copy" not in path
        )

    assert torn() == 0 < torn("--group-by", "exact")


def test_a_manifest_decides_who_learns_and_who_tests(tmp_path, images, data):
    given = tmp_path / "given.json"
    other = prepared(tmp_path / "a", "--data-path", images, "--split-seed", 5)
    shutil.copy(tmp_path / "a" / "split.json", given)
    taken = prepared(tmp_path / "b", "--data-path", images, "--split", given)
    assert taken.manifest.hash == other.manifest.hash != data.manifest.hash


def test_split_on_disk_is_kept(tmp_path, images):
    copy = tmp_path / "set"
    shutil.copytree(images, copy)
    first = prepared(tmp_path / "out", "--data-path", copy)
    (copy / "a/new.png").write_bytes(
        cv2.imencode(".png", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    )
    later = prepared(tmp_path / "out", "--data-path", copy)
    assert later.manifest.hash == first.manifest.hash
    (copy / "a/000.png").unlink()
    with pytest.raises(datasets.DatasetError, match="000.png"):
        prepared(tmp_path / "out", "--data-path", copy)


def test_folders_of_splits_are_kept_as_given(tmp_path, images):
    root = tmp_path / "split"
    for index, path in enumerate(sorted(images.rglob("*.png"))):
        part = "train" if index % 3 else "test" if index % 2 else "val"
        target = root / part / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copy(next((root / "test/a").glob("*.png")), root / "train/a/copy.png")
    data = prepared(tmp_path / "out", "--data-path", root)
    cleaned = prepared(tmp_path / "cleaned", "--data-path", root, "--drop-leaks")
    assert len(cleaned.image_set("train")) == len(data.image_set("train")) - 1
    for name, folder in (("train", "train"), ("calibration", "val"), ("test", "test")):
        tops = {Path(path).relative_to(root).parts[0] for path in data.image_set(name).paths}
        assert tops == {folder}


def test_fewer_images_of_a_known_set_are_a_subset(tmp_path, folder_of_images):
    """AID's classes at 128 pixels, four images each: said to be part of AID, at 128."""
    spec = datasets.get("AID")
    names = spec.class_names or [f"class {n:02d}" for n in range(spec.num_classes)]
    root = folder_of_images(tmp_path / "AID", names, images=4, size=128)
    data = prepared(tmp_path / "out", "--data-set", "AID", "--data-path", root, "--input-size", 128)
    facts = data.facts()
    assert (facts["name"], facts["kind"], facts["pixels"]) == ("AID", "subset", 128)
    notes = " ".join(facts["notes"])
    assert "120 images, AID has 10,000" in notes and "600 x 600" in notes


def test_built_in_scenes(tmp_path):
    words = ("--builtin-classes", 3, "--builtin-images", 20, "--input-size", 16)
    data = prepared(tmp_path / "a", *words)
    assert (data.kind, data.name, len(data.manifest.entries)) == ("built-in", "built-in scenes", 60)
    assert data.root == tmp_path / "a/data/scenes" and data.input_size == 16
    same = prepared(tmp_path / "b", *words)
    other = prepared(tmp_path / "c", *words, "--seed", 1)
    assert same.manifest.hash == data.manifest.hash != other.manifest.hash


def first_batch(data, *words: object, stage="backbone", epoch=0):
    loader = loaders(data, *words).train(stage, batch_size=16)
    loader.loader.order.set_epoch(epoch)
    return next(iter(loader))


def test_training_views_are_a_matter_of_seed_stage_and_epoch(data):
    first = first_batch(data)
    again = first_batch(data)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    for change in ({"epoch": 1}, {"stage": "distil"}):
        other = first_batch(data, **change)
        assert not torch.equal(first.images, other.images)
    assert not torch.equal(first.images, first_batch(data, "--seed", 1).images)
    threads = first_batch(data, "--num_workers", 3)
    assert torch.equal(first.images, threads.images)


@pytest.mark.parametrize(
    "words",
    [
        ("--reprob", 1.0),
        ("--reprob", 1.0, "--remode", "const"),
        ("--reprob", 1.0, "--recount", 3),
        ("--aa", "rand-m9-mstd0.5-inc1"),
        ("--color-jitter", 0.4),
        ("--crop-scale", 0.1, 0.2),
        ("--vflip", "false"),
        ("--train-interpolation", "bilinear"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_augmentation_flags_change_the_batch(data, words):
    base = ("--reprob", 1.0) if "--remode" in words or "--recount" in words else ()
    plain, changed = first_batch(data, *base), first_batch(data, *words)
    assert torch.equal(plain.indices, changed.indices)  # the same images in the same order
    assert not torch.equal(plain.images, changed.images)


def test_evaluation_sees_every_image_once_in_order(data):
    batches = list(loaders(data).held("test"))
    indices = torch.cat([batch.indices for batch in batches])
    assert indices.tolist() == list(range(len(data.image_set("test"))))
    # crop_pct 1: the stored pixels, normalised by ImageNet's mean and deviation.
    path = data.image_set("test").paths[0]
    pixels = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB) / 255.0
    wanted = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(batches[0].images[0].permute(1, 2, 0), wanted, atol=1e-5)
    smaller = next(iter(loaders(data, "--crop-pct", 0.5).held("test")))
    assert not torch.equal(smaller.images, batches[0].images)
    few = next(iter(loaders(data).held("test", rows=np.array([3, 1]))))
    assert torch.equal(few.images, batches[0].images[[3, 1]])
    assert few.labels.tolist() == batches[0].labels[[3, 1]].tolist()
