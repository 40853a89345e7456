"""The warm-up's patience, driven by made-up accuracies."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gfnet_dynn.train.warmup import WarmUp, warmup_loss, warmup_weights


def make_heads(count=3):
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(count))


def write_epoch(heads, epoch):
    """Weights that say which epoch they come from."""
    for index, head in enumerate(heads):
        with torch.no_grad():
            head.weight.fill_(epoch + 100 * index)


def drive(warm_up, heads, sequences, *, start=0, honour_freezing=True):
    """Run epochs of made-up accuracies; frozen heads are not written to."""
    epoch = start
    while not warm_up.done:
        frozen = warm_up.frozen_exits if honour_freezing else ()
        for index, head in enumerate(heads):
            if index not in frozen:
                with torch.no_grad():
                    head.weight.fill_(epoch + 100 * index)
        warm_up.update(heads, [s[epoch] for s in sequences])
        epoch += 1
    return epoch


def weights_of(heads):
    return [head.weight[0, 0].item() for head in heads]


def test_each_exit_is_frozen_at_its_own_best_and_all_frozen_ends_it():
    heads = make_heads()
    warm_up = WarmUp([3, 5, 7], max_epochs=20)
    sequences = [
        [0.5, 0.4, 0.5] + [0.9] * 9,  # best at epoch 0: an equal value is no improvement
        [0.1, 0.2, 0.3, 0.2, 0.1] + [0.9] * 9,  # best at 2
        [0.1, 0.0, 0.2, 0.1, 0.3, 0.2, 0.2] + [0.9] * 9,  # the counter starts anew; best at 4
    ]
    assert drive(warm_up, heads, sequences) == 7
    assert warm_up.all_frozen and warm_up.frozen_exits == (0, 1, 2)
    assert weights_of(heads) == [0.0, 102.0, 204.0]
    assert warm_up.best_epoch == [0, 2, 4] and warm_up.best_accuracy == [0.5, 0.3, 0.3]


def simulate(sequence, patience, max_epochs):
    """Independent account of one exit: (epoch of the best weights, epoch it froze at or None)."""
    best, best_epoch, since = -1.0, None, 0
    for epoch in range(max_epochs):
        if sequence[epoch] > best:
            best, best_epoch, since = sequence[epoch], epoch, 0
        else:
            since += 1
            if since == patience:
                return best_epoch, epoch
    return best_epoch, None


@pytest.mark.parametrize("seed", range(6))
def test_random_sequences_against_a_simulation(seed):
    rng = np.random.default_rng(seed)
    sequences = np.round(rng.uniform(size=(3, 30)), 1).tolist()
    patience, cap = int(rng.integers(1, 4)), int(rng.integers(1, 12))
    heads = make_heads()
    warm_up = WarmUp([1, 2, 4], patience=patience, max_epochs=cap)
    epochs = drive(warm_up, heads, sequences)
    expected = [simulate(s, patience, cap) for s in sequences]
    assert weights_of(heads) == [best + 100 * i for i, (best, _) in enumerate(expected)]
    froze = [at for _, at in expected]
    assert warm_up.frozen_exits == tuple(i for i, at in enumerate(froze) if at is not None)
    assert epochs == (cap if None in froze else max(froze) + 1)


def test_at_the_cap_the_best_weights_come_back():
    heads = make_heads(1)
    warm_up = WarmUp([3], max_epochs=3, patience=5)
    drive(warm_up, heads, [[0.2, 0.6, 0.4]])
    assert warm_up.done and not warm_up.all_frozen
    assert weights_of(heads) == [1.0]


def test_files_hold_the_best_weights(tmp_path):
    folder = tmp_path / "check point"
    heads = make_heads(2)
    warm_up = WarmUp([3, 5], max_epochs=4, folder=folder)
    drive(warm_up, heads, [[0.1, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
    assert sorted(p.name for p in folder.iterdir()) == ["3.pth", "5.pth"]
    for index, (name, epoch, accuracy) in enumerate([("3.pth", 1, 0.3), ("5.pth", 3, 0.4)]):
        content = torch.load(folder / name, weights_only=True)
        assert set(content) == {"state", "acc", "epoch"}
        assert content["epoch"] == epoch and content["acc"] == accuracy
        for key, value in heads[index].state_dict().items():
            assert torch.equal(content["state"][key], value)


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_it_goes_on_exactly_where_it_was_stopped(stop):
    sequences = [
        [0.5, 0.4, 0.5, 0.9, 0.9, 0.9, 0.9],
        [0.1, 0.2, 0.3, 0.2, 0.1, 0.9, 0.9],
        [0.1, 0.0, 0.2, 0.1, 0.3, 0.2, 0.2],
    ]
    whole_heads, whole = make_heads(), WarmUp([3, 5, 7])
    drive(whole, whole_heads, sequences)
    heads, first = make_heads(), WarmUp([3, 5, 7])
    for epoch in range(stop):
        for index, head in enumerate(heads):
            if index not in first.frozen_exits:
                with torch.no_grad():
                    head.weight.fill_(epoch + 100 * index)
        first.update(heads, [s[epoch] for s in sequences])
    state = first.state_dict()
    second = WarmUp([3, 5, 7])
    second.load_state_dict(state)
    drive(second, heads, sequences, start=stop)
    assert weights_of(heads) == weights_of(whole_heads)
    assert second.epoch == whole.epoch and second.best_epoch == whole.best_epoch


def test_a_saved_state_does_not_change_later():
    heads, warm_up = make_heads(1), WarmUp([3])
    write_epoch(heads, 1)
    warm_up.update(heads, [0.5])
    state = warm_up.state_dict()
    write_epoch(heads, 2)
    warm_up.update(heads, [0.6])
    assert state["best_state"][0]["weight"][0, 0] == 1.0 and state["best_accuracy"] == [0.5]


def test_put_back_weights_have_no_momentum():
    heads = make_heads(1)
    optimizer = torch.optim.SGD(heads.parameters(), lr=0.1, momentum=0.9)
    heads[0].weight.grad = torch.ones(2, 2)
    optimizer.step()
    warm_up = WarmUp([3], patience=1)
    warm_up.update(heads, [0.5], optimizer=optimizer)
    assert heads[0].weight in optimizer.state
    warm_up.update(heads, [0.4], optimizer=optimizer)
    assert heads[0].weight not in optimizer.state


def test_no_epochs_means_no_warm_up():
    assert WarmUp([3], max_epochs=0).done


def test_accuracies_that_are_no_numbers_freeze_without_weights():
    heads, warm_up = make_heads(1), WarmUp([3], patience=1)
    before = heads[0].weight.clone()
    assert warm_up.update(heads, [float("nan")]) == [0]
    assert torch.equal(heads[0].weight, before)


def test_loss_is_five_four_three_two_one():
    assert warmup_weights(4) == [5.0, 4.0, 3.0, 2.0]
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(5, 12, 6)))
    labels = torch.tensor(rng.integers(0, 6, 12))
    want = sum(
        w * F.cross_entropy(z, labels).item() for w, z in zip([5, 4, 3, 2, 1], logits, strict=True)
    )
    assert warmup_loss(list(logits), labels).item() == pytest.approx(want, rel=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="patience of the warm-up is 0"):
        WarmUp([3], patience=0)
    with pytest.raises(ValueError, match="max_warmup_epoch is -1"):
        WarmUp([3], max_epochs=-1)
    with pytest.raises(ValueError, match="no exits"):
        WarmUp([])
    with pytest.raises(ValueError, match="2 heads and 1 accuracies"):
        WarmUp([3]).update(make_heads(2), [0.5])
    with pytest.raises(ValueError, match=r"exits \[3\]; expected \[5\]"):
        WarmUp([5]).load_state_dict(WarmUp([3]).state_dict())
    ended = WarmUp([3], max_epochs=0)
    with pytest.raises(ValueError, match="ended"):
        ended.update(make_heads(1), [0.5])
