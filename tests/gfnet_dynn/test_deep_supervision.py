"""Losses at the exits while the network learns: by hand, where gradients go, in the command."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.settings import DeepLosses
from gfnet_dynn.train.deep_supervision import DeepTask
from gfnet_dynn.train.finetune import PlainTask
from shared_core.runs import read_metrics


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GFNet(img_size=16, patch_size=4, num_classes=3, embed_dim=8, depth=4)


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("soft", [False, True])
def test_the_term_by_hand(model, soft):
    inner = PlainTask(model, smoothing=0.1)
    deep = DeepTask(inner, (0, 2), DeepLosses(0.7, 0.4, 2.0), smoothing=0.1)
    images = torch.randn(5, 3, 16, 16)
    labels = torch.tensor([0, 1, 2, 1, 0])
    shares = np.eye(3)[labels.numpy()]
    if soft:
        shares = 0.6 * shares + 0.4 * np.roll(shares, 1, axis=0)
    targets = torch.from_numpy(shares).float() if soft else labels
    parts = deep(images, targets, 1)

    with_exits = GFNetDynn(model, (0, 2))
    with torch.no_grad():
        features = [f.numpy().astype(np.float64) for f in with_exits.exit_features(images)]
    weights = [
        (h.weight.detach().numpy().astype(np.float64), h.bias.detach().numpy().astype(np.float64))
        for h in (*deep.heads, model.head)
    ]
    logits = [f @ w.T + b for f, (w, b) in zip(features, weights, strict=True)]
    wanted = 0.9 * shares + 0.1 / 3

    def cross_entropy(z):
        return -(wanted * np.log(softmax(z))).sum(axis=1).mean()

    def kl(z):
        p, q = softmax(logits[-1] / 2), softmax(z / 2)
        return 4 * (p * np.log(p / q)).sum(axis=1).mean()

    term = 0.7 * np.mean([cross_entropy(z) + 0.4 * kl(z) for z in logits[:2]])
    assert parts["deep"].item() == pytest.approx(term, rel=1e-5)
    total = cross_entropy(logits[-1]) + term
    assert parts["loss"].item() == pytest.approx(total, rel=1e-5)


def test_the_final_head_teaches_and_is_not_taught(model):
    deep = DeepTask(PlainTask(model, smoothing=0.0), (1,), DeepLosses(1.0, 1.0, 3.0))
    images, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    parts = deep(images, labels, 1)
    parts["deep"].backward()
    assert model.head.weight.grad is None  # its answer is detached
    for block in model.blocks[2:]:  # behind the exit nothing learns from it
        assert all(p.grad is None or not p.grad.any() for p in block.parameters())
    for block in model.blocks[:2]:
        assert block.mlp.fc1.weight.grad.abs().max() > 0
    assert deep.heads[0].weight.grad.abs().max() > 0
    assert all(not block._forward_hooks for block in model.blocks)


def test_what_it_refuses(model):
    for exits, weight in (((1,), 0.0), ((), 1.0)):
        with pytest.raises(ValueError, match="deep supervision of exits"):
            DeepTask(PlainTask(model, smoothing=0.0), exits, DeepLosses(weight, 1.0, 3.0))


def test_in_the_command_and_not_in_the_file(tiny, command, tmp_path, finished, no_figures):
    for number, words in enumerate(
        (("--deep-supervision", "0.5"), ("--deep-supervision", "0.5", "--no-distil"))
    ):
        folder = tmp_path / f"run{number}"
        words = tiny(folder, *words)
        if number:
            for flag in ("--student-dim", "--student-epochs"):
                at = words.index(flag)
                del words[at : at + 2]
        done = command(*words)
        assert done.code == 0, done.err
        rows = read_metrics(folder / "metrics.jsonl")
        stages = {row["stage"] for row in rows if "deep" in row}
        assert stages == ({"distil"} if not number else {"backbone"})
    name = "checkpoint/student_built-in-scenes.pth"
    plain, deep = (
        torch.load(one / name, weights_only=True)["model"]
        for one in (finished[0], tmp_path / "run0")
    )
    assert list(plain) == list(deep)  # the plain student, without heads of the training
