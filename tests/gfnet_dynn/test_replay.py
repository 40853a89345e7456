"""Embeddings that are recorded once: equal to the network's, bit for bit, and refused elsewhere."""

from __future__ import annotations

import pytest
import torch

from gfnet_dynn.models.build import build_gfnet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.train.replay import LIMIT, Replay
from shared_core.for_torch.precision import Precision

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return build_gfnet("gfnet-xs", img_size=16, patch_size=4, num_classes=3, embed_dim=8, depth=4)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 16, 16, generator=generator), torch.arange(n)) for n in (5, 2)]


def pass_over(replay, epoch, images, model, precision="fp32", network="a"):
    return list(
        replay.batches(epoch, images, model, network=network, precision=Precision(CPU, precision))
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_and_replayed_are_what_the_network_says(backbone, batches, precision):
    few, every = GFNetDynn(backbone, (1,)).eval(), GFNetDynn(backbone, (0, 1, 2)).eval()
    replay = Replay((0, 1, 2), network="a")
    for model, source in ((few, batches), (every, None), (few, None)):
        found = pass_over(replay, 0, source, model, precision)
        assert [labels.tolist() for _, labels in found] == [[0, 1, 2, 3, 4], [0, 1]]
        for (embeddings, _), (images, _) in zip(found, batches, strict=True):
            with torch.no_grad(), Precision(CPU, precision).autocast():
                wanted = model.exit_features(images)
                outputs, replayed = model(images), model(embeddings)
            assert len(embeddings) == len(wanted) == model.num_gates + 1
            assert all(torch.equal(a, b) for a, b in zip(embeddings, wanted, strict=True))
            assert torch.equal(outputs.gate_logits, replayed.gate_logits)
            assert torch.equal(outputs.logits[-1], replayed.logits[-1])


def test_heads_learn_on_embeddings(backbone, batches):
    model = GFNetDynn(backbone, (1,)).eval()
    model.backbone.requires_grad_(False)
    ((embeddings, labels), _) = pass_over(Replay((1,), network="a"), 0, batches, model)
    loss = torch.nn.functional.cross_entropy(model(embeddings).logits[0], labels % 3)
    loss.backward()
    assert model.exit_heads[0].weight.grad.abs().sum() > 0


def test_labels_outlive_a_loader_that_uses_its_buffer_again(backbone, batches):
    model, labels = GFNetDynn(backbone, (1,)).eval(), torch.zeros(1, dtype=torch.int64)

    def loader():
        for number in (3, 4):
            yield batches[0][0][:1], labels.fill_(number)

    replay = Replay((1,), network="a")
    pass_over(replay, 0, loader(), model)
    assert [kept.item() for _, kept in pass_over(replay, 0, None, model)] == [3, 4]


def test_an_epoch_that_was_left_early_is_not_kept(backbone, batches):
    model, replay = GFNetDynn(backbone, (1,)).eval(), Replay((1,), network="a")
    next(replay.batches(0, batches, model, network="a", precision=Precision(CPU)))
    assert len(pass_over(replay, 0, batches, model)) == 2
    assert len(pass_over(replay, 0, [], model)) == 2  # now it is


def test_another_network_or_exit_is_refused(backbone, batches):
    model, replay = GFNetDynn(backbone, (0, 1)).eval(), Replay((1,), network="a")
    with pytest.raises(ValueError, match="got network b, recorded is a"):
        pass_over(replay, 0, batches, model, network="b")
    with pytest.raises(ValueError, match=r"blocks \[0\] are not in \[1\]"):
        pass_over(replay, 0, batches, model)


def test_limit_counts_every_block_and_the_last():
    images = LIMIT // (4 * 3 * 16)
    assert Replay.fits(images, 2, 16) and not Replay.fits(images + 1, 2, 16)
