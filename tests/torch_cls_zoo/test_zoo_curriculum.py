"""Curriculum: thresholds to weights, the file, and that weight 0 takes an image out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from shared_core.for_torch.data import TorchBatch
from shared_core.for_torch.distributed import World
from shared_core.for_torch.precision import Precision
from torch_cls_zoo.applications.learn import Learner, Targets
from torch_cls_zoo.criterions import build_criterion
from torch_cls_zoo.dataloader.batch_ops import BatchOps
from torch_cls_zoo.dataloader.curriculum_files import (
    curriculum_weights,
    read_curriculum,
    write_curriculum,
)
from torch_cls_zoo.dataloader.sample_files import read_sample_file

PATHS = [f"train/a/{n}.jpg" for n in range(6)]


def test_the_first_threshold_that_is_passed_decides():
    chances = np.array([0.95, 0.7, 0.51, 0.3, 0.01, 0.0])
    got = curriculum_weights(chances, [0.7, 0.5, 0.3, 0.0], [1.0, 0.7, 0.4, 0.1])
    # 0.7 is not above 0.7, 0.3 not above 0.3, 0 not above 0: by hand.
    np.testing.assert_array_equal(got, [1.0, 0.7, 0.7, 0.1, 0.1, np.nan])


@pytest.mark.parametrize(
    ("thresholds", "weights", "message"),
    [
        ([0.5, 0.7], [1, 1], "to fall"),
        ([0.5], [1, 2], "as many"),
        ([], [], "at least one"),
        ([0.5], [-1], "at least 0"),
    ],
)
def test_bad_thresholds_are_refused(thresholds, weights, message):
    with pytest.raises(ValueError, match=message):
        curriculum_weights(np.array([0.5]), thresholds, weights)


def test_absent_images_get_weight_0(tmp_path):
    weights = np.array([1.0, 0.7, np.nan, 0.1, np.nan, 0.4])
    path = write_curriculum(tmp_path, PATHS, weights, about={"split": "train"})
    assert len(read_sample_file(path).names) == 4
    got = read_curriculum(tmp_path, PATHS)
    np.testing.assert_allclose(got, [1.0, 0.7, 0.0, 0.1, 0.0, 0.4])


def test_files_without_use_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="--make_curriculum train"):
        read_curriculum(tmp_path, PATHS)
    with pytest.raises(ValueError, match="no image is above"):
        write_curriculum(tmp_path, PATHS, np.full(6, np.nan), about={})
    write_curriculum(tmp_path, ["other/x.jpg"], np.ones(1), about={})
    with pytest.raises(ValueError, match="none of the 6 training images"):
        read_curriculum(tmp_path, PATHS)
    (tmp_path / "curriculum.txt").write_text("train/a/0.jpg,-1\n")
    with pytest.raises(ValueError, match="at least 0"):
        read_curriculum(tmp_path, PATHS)


def gradient(weights: list[float] | None, images: torch.Tensor, labels: torch.Tensor):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    learner = Learner(
        model,
        build_criterion(family="softmax", num_classes=3),
        optimizer,
        Precision("cpu"),
        BatchOps((2, 2)),
        Targets(weights=None if weights is None else torch.tensor(weights)),
        World(0, 1, 0, torch.device("cpu")),
        3,
    )
    before = model[1].weight.detach().clone()
    learner.step(TorchBatch(images, labels, torch.arange(len(labels)), 0), 0)
    return before - model[1].weight.detach()


def test_weight_0_removes_an_image_s_gradient_and_weights_scale_it():
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 1])
    single = [gradient([1.0 if n == i else 0.0 for n in range(4)], images, labels)
              for i in range(4)]  # fmt: skip
    changed = images.clone()
    changed[2] = 100.0  # an image of weight 0 may be anything
    torch.testing.assert_close(
        gradient([1.0, 0.5, 0.0, 0.1], images, labels),
        gradient([1.0, 0.5, 0.0, 0.1], changed, labels),
    )
    torch.testing.assert_close(
        gradient([1.0, 0.5, 0.0, 0.1], images, labels),
        single[0] + 0.5 * single[1] + 0.1 * single[3],
    )
    torch.testing.assert_close(gradient(None, images, labels), sum(single))


def test_the_command_makes_a_curriculum_and_learns_by_it(
    zoo_data, zoo_best, zoo_command, zoo_words, tmp_path
):
    done = zoo_command("--make_curriculum", "train", "--data", zoo_data, "--resume", zoo_best,
                       "--curriculum_thresholds", 0.9, 0.2, "--curriculum_weights", 1, 0.5,
                       "--knowledge_dir", tmp_path, "--no-cuda", "--output",
                       tmp_path / "o")  # fmt: skip
    assert done.code == 0, done.err
    file = read_sample_file(tmp_path / "curriculum.txt", columns=1)
    assert set(file.values[:, 0]) <= {1.0, 0.5} and file.about["thresholds"] == [0.9, 0.2]
    run = tmp_path / "run"
    words = zoo_words(run, "--curriculum_learning", "--knowledge_dir", tmp_path, "--epochs", 2)
    done = zoo_command(*words)
    assert done.code == 0, done.err
    assert f"curriculum: {len(file.names)} of 24 images" in done.out
