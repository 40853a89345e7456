"""The pass in which samples leave equals the full pass at the chosen exit, and does less work."""

import numpy as np
import pytest
import torch

from gfnet_dynn.choices import RULES
from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    backbone = GFNet(img_size=32, patch_size=8, num_classes=5, embed_dim=16, depth=6)
    model = GFNetDynn(backbone, (0, 2, 3), gate_init="torch")
    with torch.no_grad():
        for p in model.parameters():  # spread the logits, so that scores differ
            p.add_(0.15 * torch.randn_like(p))
        for head in model.exit_heads:
            head.weight.mul_(4)
    return model.eval()


def images(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 32, 32, generator=generator) * 2


def quantile_policy(kind, scores, q):
    return ExitPolicy(kind, scores.double().quantile(q, dim=0).tolist())


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_equal_to_the_full_pass_at_the_chosen_exit(model, kind, n):
    x = images(n)
    with torch.no_grad():
        full = model(x)
        pool = model(images(64, seed=1))
    for q in (0.0, 0.3, 0.6, 0.9):
        policy = (
            ExitPolicy(kind, int(4 * q))
            if kind == "patience"
            else quantile_policy(kind, ExitPolicy(kind).scores(pool.logits, pool.gate_logits), q)
        )
        chosen = policy.select(full.logits, full.gate_logits)
        expected = torch.stack(full.logits)[chosen, torch.arange(n)]
        got = model.early_exit(x, policy)
        assert torch.equal(got.exit_index, chosen)  # order kept
        assert got.logits.shape == (n, 5)
        assert (got.logits - expected).abs().max() < 1e-5


def test_the_mix_above_really_uses_every_exit(model):
    with torch.no_grad():
        out = model(images(64))
    scores = ExitPolicy("max_prob").scores(out.logits)
    chosen = model.early_exit(images(64), quantile_policy("max_prob", scores, 0.6)).exit_index
    assert set(chosen.tolist()) == {0, 1, 2, 3}


class Forced:
    """Sends each sample, known by its place, out where a table says."""

    needs_gates = True

    def __init__(self, table):
        self.rows, self.table = torch.arange(len(table)), torch.tensor(table)

    def check(self, num_gates):
        pass

    def leave(self, exit_index, logits, gate_logit, state):
        rows = state.setdefault("rows", self.rows)
        assert len(rows) == len(logits) == len(gate_logit)
        return self.table[rows] == exit_index


@pytest.mark.parametrize(
    "table",
    [[0], [1], [3], [0] * 6, [3] * 6, [2] * 6, [3, 0, 3, 0], [2, 1, 0, 3, 1, 2, 0], [1, 1, 3], []],
    ids=str,
)
def test_empty_exits_all_at_once_and_the_final_head(model, table):
    x = images(len(table))
    got = model.early_exit(x, Forced(table))
    assert got.exit_index.tolist() == table
    assert got.logits.shape == (len(table), 5)
    if table:
        with torch.no_grad():
            full = torch.stack(model(x).logits)
        expected = full[torch.tensor(table), torch.arange(len(table))]
        assert (got.logits - expected).abs().max() < 1e-5


def count_rows(model, monkeypatch):
    """Rows that each block, head and gate gets to see."""
    seen = {}

    def watch(name, module):
        def hook(_, inputs):
            seen[name] = seen.get(name, 0) + inputs[0].shape[0]

        return module.register_forward_pre_hook(hook)

    handles = [watch(f"block{i}", b) for i, b in enumerate(model.backbone.blocks)]
    handles += [watch(f"head{i}", h) for i, h in enumerate(model.exit_heads)]
    handles += [watch("head3", model.backbone.head)]
    handles += [watch(f"gate{i}", g) for i, g in enumerate(model.gates)]
    return seen, handles


def test_later_blocks_heads_and_gates_see_only_who_is_left(model, monkeypatch):
    table = [0, 0, 0, 1, 1, 3, 3]  # exits sit after blocks 0, 2, 3 of 6
    seen, handles = count_rows(model, monkeypatch)
    model.early_exit(images(7), Forced(table))
    for handle in handles:
        handle.remove()
    rows = {"block0": 7, "block1": 4, "block2": 4, "block3": 2, "block4": 2, "block5": 2}
    rows |= {"head0": 7, "head1": 4, "head2": 2, "head3": 2, "gate0": 7, "gate1": 4, "gate2": 2}
    assert seen == rows


def test_nothing_runs_after_the_last_sample_left_and_no_gate_that_is_not_asked(model, monkeypatch):
    seen, handles = count_rows(model, monkeypatch)
    model.early_exit(images(4), ExitPolicy("max_prob", 0.0))
    for handle in handles:
        handle.remove()
    assert seen == {"block0": 4, "head0": 4}


def test_expected_cost_is_the_work_done(model):
    # Rows through each layer times that layer's MACs = sum of rate times cost.
    table = [0, 0, 1, 3, 3, 2, 0, 1]
    costs = model.exit_costs()
    total = sum(costs[e] for e in table)
    from gfnet_dynn.models.op_counter import layer_costs

    block = sum(
        c.macs + c.elementwise for c in layer_costs(model.backbone) if c.name.startswith("blocks.0")
    )
    patch = next(c.macs for c in layer_costs(model.backbone) if c.name == "patch_embed")
    norm = 5 * 16 * 16
    seen, handles = count_rows(model, None)
    model.early_exit(images(8), Forced(table))
    for handle in handles:
        handle.remove()
    work = 8 * patch
    for name, rows in seen.items():
        if name.startswith("block"):
            work += rows * block
        elif name.startswith("head"):
            work += rows * (norm + 16 * 5)
        else:
            work += rows * 4
    assert work == total


def test_labels_cannot_matter_and_neighbours_do_not(model):
    # A sample's answer depends on the sample alone: shuffle the batch, or run it one by one.
    x = images(16, seed=3)
    with torch.no_grad():
        out = model(x)
    policy = quantile_policy("jei", ExitPolicy("jei").scores(*out), 0.5)
    together = model.early_exit(x, policy)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    shuffled = model.early_exit(x[order], policy)
    assert torch.equal(shuffled.exit_index, together.exit_index[order])
    assert torch.allclose(shuffled.logits, together.logits[order], atol=1e-5)
    singles = [model.early_exit(x[i : i + 1], policy) for i in range(16)]
    assert [int(s.exit_index) for s in singles] == together.exit_index.tolist()
    assert torch.allclose(torch.cat([s.logits for s in singles]), together.logits, atol=1e-5)


def test_one_sync_an_exit(model, monkeypatch):
    counts = {"item": 0, "int": 0}
    original = torch.Tensor.__int__

    def counting(self):
        counts["int"] += 1
        return original(self)

    def item(self):
        counts["item"] += 1
        return original_item(self)

    original_item = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "__int__", counting)
    monkeypatch.setattr(torch.Tensor, "item", item)
    for name in ("nonzero", "tolist", "cpu", "numpy", "__bool__"):

        def refuse(self, *args, name=name, **kwargs):
            raise AssertionError(f"Tensor.{name} was called")

        monkeypatch.setattr(torch.Tensor, name, refuse)
    for n in (1, 5):
        counts.update(item=0, int=0)
        model.early_exit(images(n), ExitPolicy("gate", 2.0))
        assert counts["item"] + counts["int"] == 3


def test_no_gradient_and_bad_policies(model):
    got = model.early_exit(images(2), ExitPolicy("gate", 0.5))
    assert not got.logits.requires_grad and got.exit_index.dtype == torch.int64
    with pytest.raises(ValueError, match="got 2 thresholds"):
        model.early_exit(images(2), ExitPolicy("gate", [0.5, 0.5]))


def test_no_exits_at_all():
    torch.manual_seed(0)
    plain = GFNet(img_size=16, patch_size=8, num_classes=3, embed_dim=8, depth=2).eval()
    x = torch.randn(3, 3, 16, 16)
    got = GFNetDynn(plain, ()).early_exit(x, ExitPolicy("max_prob", 0.0))
    assert torch.equal(got.logits, plain(x)) and got.exit_index.tolist() == [0, 0, 0]
    assert np.allclose(GFNetDynn(plain, ()).exit_costs().shape, 1)
