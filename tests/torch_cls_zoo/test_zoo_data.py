"""What the network sees: the letterbox, loaders, mixing and scaling of batches, the checks."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from shared_core.datasets.views.evaluation import LetterboxView
from shared_core.for_torch.distributed import World
from torch_cls_zoo.dataloader.batch_ops import BatchOps, mixed_targets, permuted, scaled_size
from torch_cls_zoo.dataloader.folders import check_classes, open_data, part
from torch_cls_zoo.dataloader.loaders import InputSettings, eval_loader, train_loader

WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("height", [1, 7, 32, 33, 225])
@pytest.mark.parametrize("width", [1, 8, 31, 64])
def test_the_letterbox_has_exactly_the_size_and_keeps_the_shape(height, width):
    for target in ((33, 47), (32, 32), (225, 225), (1, 1), (5, 64)):
        white = np.full((height, width, 3), 255, np.uint8)
        out = LetterboxView(target)(white)
        assert out.shape == (*target, 3)
        rows, columns = np.flatnonzero(out[..., 0].any(1)), np.flatnonzero(out[..., 0].any(0))
        filled = (len(rows), len(columns))
        scale = min(target[0] / height, target[1] / width)
        ideal = (height * scale, width * scale)
        for got, want, most in zip(filled, ideal, target, strict=True):
            assert abs(got - max(want, 1)) <= 0.5 + 1e-9 and got <= most
        # Centred: the margins differ by one pixel at most.
        assert abs((target[0] - 1 - rows[-1]) - rows[0]) <= 1
        assert abs((target[1] - 1 - columns[-1]) - columns[0]) <= 1
        assert (out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] == 255).all()


def test_the_input_is_the_formula_in_float64():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    for mean, std in (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)):
        want = (image / 255.0 - np.array(mean)) / np.array(std)
        got = InputSettings((24, 24), mean, std).normalizer("cpu")(image[None])
        np.testing.assert_allclose(got[0].numpy(), want.transpose(2, 0, 1), atol=2e-6)


def test_the_parts_keep_the_folders_as_they_are(zoo_data, tmp_path):
    data = open_data(str(zoo_data), tmp_path, num_classes=3)
    assert data.classes == ("blue", "green", "red")
    for name, number in (("train", 24), ("val", 15), ("test", 15)):
        found = part(data, name)
        assert len(found) == number
        assert all(path.startswith(f"{name}/") for path in found.paths)
        for path, label in zip(found.paths, found.images.labels, strict=True):
            assert path.split("/")[1] == data.classes[label]


def test_a_folder_of_classes_is_split_by_hash(zoo_data, tmp_path):
    data = open_data(str(zoo_data / "train"), tmp_path)
    assert sum(len(part(data, name)) for name in ("train", "val", "test")) == 24
    again = open_data(str(zoo_data / "train"), tmp_path / "other")
    assert again.manifest.hash == data.manifest.hash


def test_classes_are_compared_by_name():
    check_classes(["a", "b"], ["a", "b"], "x")
    with pytest.raises(ValueError, match="class 1 is 'b' in the data, 'c' in x"):
        check_classes(["a", "b"], ["a", "c"], "x")


def test_evaluation_gives_each_image_once_in_order(zoo_data, tmp_path):
    data = open_data(str(zoo_data), tmp_path)
    images = part(data, "test").images
    settings = InputSettings((9, 9))
    for world_size in (1, 2, 4):
        seen = []
        for rank in range(world_size):
            world = World(rank, world_size, 0, torch.device("cpu"))
            loader = eval_loader(images, settings, batch_size=4, world=world, threads=0)
            seen += [int(i) for batch in loader for i in batch.indices]
        assert sorted(seen) == list(range(15))


def test_training_batches_are_equal_in_number_and_size_on_all_ranks(zoo_data, tmp_path):
    images = part(open_data(str(zoo_data), tmp_path), "train").images
    images = images.subset(list(range(23)))
    sizes = []
    for rank in range(3):
        world = World(rank, 3, 0, torch.device("cpu"))
        loader = train_loader(
            images, InputSettings((9, 9)), batch_size=3, policy=None, seed=0, world=world, threads=0
        )
        sizes.append([len(batch.labels) for batch in loader])
    assert sizes[0] == sizes[1] == sizes[2] == [3, 3, 2]


def test_a_last_batch_of_one_is_left_out(zoo_data, tmp_path):
    images = part(open_data(str(zoo_data), tmp_path), "train").images.subset(list(range(9)))
    loader = train_loader(
        images, InputSettings((9, 9)), batch_size=4, policy=None, seed=0, world=WORLD, threads=0
    )
    assert [len(batch.labels) for batch in loader] == [4, 4] and len(loader) == 2


def test_a_view_can_be_replayed_with_any_number_of_threads(zoo_data, tmp_path):
    images = part(open_data(str(zoo_data), tmp_path), "train").images

    def epoch(threads: int, batch_size: int) -> dict[int, np.ndarray]:
        loader = train_loader(
            images, InputSettings((17, 13)), batch_size=batch_size, policy="my", seed=3,
            world=WORLD, threads=threads,
        )  # fmt: skip
        return {int(i): image.numpy().copy() for batch in loader
                for i, image in zip(batch.indices, batch.images, strict=True)}  # fmt: skip

    one, other = epoch(0, 5), epoch(3, 6)
    assert sorted(one) == list(range(24))
    for index, image in one.items():
        np.testing.assert_array_equal(image, other[index])


def test_a_small_jpeg_decode_is_nearly_the_whole_one(tmp_path):
    rng = np.random.default_rng(1)
    smooth = cv2.resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (256, 192))
    (tmp_path / "a.jpg").write_bytes(cv2.imencode(".jpg", smooth)[1].tobytes())
    from shared_core.datasets import BatchLoader, ImageSet

    images = ImageSet([tmp_path / "a.jpg"], [0])
    views = [LetterboxView((32, 32), dct_scaled=scaled) for scaled in (True, False)]
    small, whole = (
        next(iter(BatchLoader(images, view=view, batch_size=1, threads=0))).images for view in views
    )
    assert np.abs(small.astype(int) - whole.astype(int)).mean() < 2


def test_mixup_is_the_papers_algebra():
    ops = BatchOps((6, 6), mixup=True, ratio=1.0, seed=5)
    images = torch.rand(7, 3, 6, 6)
    plan = ops.draw(11, 7)
    lam, order = plan.mix.lam, plan.mix.permutation
    want = lam * images.double() + (1 - lam) * images.double()[order]
    torch.testing.assert_close(ops.apply(images, plan).double(), want, atol=1e-6, rtol=1e-6)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    soft = mixed_targets(labels, plan.mix, num_classes=3)
    hot = torch.eye(3)[labels]
    torch.testing.assert_close(soft, lam * hot + (1 - lam) * hot[order])
    assert permuted(labels, plan.mix).tolist() == labels[order].tolist()


def test_cutmix_pastes_the_box_and_keeps_its_share():
    ops = BatchOps((9, 8), cutmix=True, ratio=1.0, seed=2)
    images = torch.rand(4, 3, 9, 8)
    plan = ops.draw(3, 4)
    top, left, bottom, right = plan.mix.box
    want = images.clone()
    want[:, :, top:bottom, left:right] = images[plan.mix.permutation][:, :, top:bottom, left:right]
    assert torch.equal(ops.apply(images, plan), want)
    assert plan.mix.lam == pytest.approx(1 - (bottom - top) * (right - left) / 72)


def test_draws_depend_on_seed_and_step_alone_and_follow_the_ratio():
    ops = BatchOps((8, 8), mixup=True, cutmix=True, ratio=0.3, multi_scale=True, seed=1)
    plans = [ops.draw(step, 4) for step in range(400)]
    again = BatchOps((8, 8), mixup=True, cutmix=True, ratio=0.3, multi_scale=True, seed=1)
    assert [p.size for p in plans] == [again.draw(step, 4).size for step in range(400)]
    mixed = [p for p in plans if p.mix is not None]
    assert 0.2 < len(mixed) / 400 < 0.4
    boxes = sum(p.mix.box is not None for p in mixed)
    assert 0.3 < boxes / len(mixed) < 0.7
    # All processes scale alike, but mix by their own draws.
    other = [ops.draw(step, 4, rank=1) for step in range(400)]
    assert [p.size for p in other] == [p.size for p in plans]
    assert [p.mix is None for p in other] != [p.mix is None for p in plans]


def test_sizes_stay_within_15_percent_and_keep_the_shape():
    rng = np.random.default_rng(0)
    sizes = np.array([scaled_size((120, 200), rng) for _ in range(3000)])
    assert sizes[:, 1].min() >= 170 and sizes[:, 1].max() <= 230
    assert np.abs(sizes[:, 0] - sizes[:, 1] * 0.6).max() <= 0.5
    # A normal of deviation 15, cut at two: its deviation is 0.8796 of that (scipy.stats.truncnorm).
    from scipy import stats

    assert sizes[:, 1].std() == pytest.approx(15 * stats.truncnorm(-2, 2).std(), rel=0.06)
    assert len(set(sizes[:, 1].tolist())) > 40


def test_a_scaled_batch_has_the_drawn_size():
    ops = BatchOps((20, 30), multi_scale=True, seed=0)
    plans = [ops.draw(step, 2) for step in range(20)]
    assert len({plan.size for plan in plans}) > 3
    for plan in plans:
        assert ops.apply(torch.ones(2, 3, 20, 30), plan).shape == (2, 3, *plan.size)


@pytest.mark.parametrize("bad", [{"ratio": 1.5}, {"mixup_alpha": 0.0}, {"cutmix_alpha": -1.0}])
def test_bad_settings_of_batches_are_refused(bad):
    with pytest.raises(ValueError, match="expected"):
        BatchOps((8, 8), mixup=True, **bad)


def test_check_images_names_what_is_broken(zoo_folder, tmp_path, capsys):
    from shared_core.runs import run_command
    from torch_cls_zoo.utils import check_images

    data = zoo_folder(tmp_path / "data")
    assert run_command(check_images.main, [str(data)]) == 0
    whole = cv2.imencode(".jpg", np.zeros((40, 40, 3), np.uint8))[1].tobytes()
    (data / "train" / "red" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "val" / "red" / "text.png").write_text("no image")
    capsys.readouterr()
    assert run_command(check_images.main, [str(data), "--quarantine"]) == 1
    said = capsys.readouterr().out
    assert "train/red/cut.jpg" in said and "val/red/text.png" in said
    listed = (data / "quarantine.txt").read_text()
    assert "train/red/cut.jpg" in listed and "val/red/text.png" in listed
    opened = open_data(str(data), tmp_path / "o")  # what is listed is left out
    assert len(part(opened, "train")) == 24 and len(part(opened, "val")) == 15


def test_builtin_folder_is_written_whole_and_not_over_others(tmp_path, capsys):
    from shared_core.runs import run_command
    from torch_cls_zoo.utils import builtin_data

    words = [str(tmp_path / "d"), "--classes", "2", "--images", "10", "--size", "16"]
    assert run_command(builtin_data.main, words) == 0
    counts = {p: len(list((tmp_path / "d" / p).rglob("*.jpg"))) for p in ("train", "val", "test")}
    assert counts == {"train": 12, "val": 4, "test": 4}
    assert run_command(builtin_data.main, words) == 2
    assert "is there already" in capsys.readouterr().err
