"""Each criterion and every combination against plain loops in NumPy, and their limits."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - the name everybody knows

from torch_cls_zoo.criterions import NAMES, Matrices, build_criterion, load_matrices

K = 3
WEIGHTS = np.array([[1, 0.5, 2], [0.5, 1, 2], [2, 2, 1]])
MATRICES = Matrices(WEIGHTS, Matrices.defaults(K).low, Matrices.defaults(K).up)
SUBSETS = [c for n in range(5) for c in itertools.combinations(NAMES, n)]


class Reference:
    """The definitions, one number after the other, in float64; remembers GHM-C's averages."""

    def __init__(self, names, family, *, counts="loss", bins=30, momentum=0.75) -> None:
        self.names, self.family, self.ratio, self.counted_by = names, family, 0.7, counts
        self.bins, self.momentum = bins, momentum
        self.average, self.updates = [0.0] * bins, [0] * bins

    def losses(self, z: np.ndarray, t: np.ndarray, u: np.ndarray | None = None) -> list[float]:
        """Of each sample; those of weight ``u = 0`` are as if they were not there."""
        if u is not None:
            kept = [i for i in range(len(z)) if u[i] > 0]
            some = self.losses(z[kept], t[kept])
            found = dict(zip(kept, some, strict=True))
            return [u[i] * found.get(i, 0.0) for i in range(len(z))]
        n, k = z.shape
        if self.family == "softmax":
            p = [[math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in z]
        else:
            p = [[1 / (1 + math.exp(-v)) for v in row] for row in z]
        g = [[1.0] * k for _ in range(n)]
        hard = [[abs(p[i][c] - t[i][c]) for c in range(k)] for i in range(n)]
        for name in self.names:
            weight = getattr(self, name)(p, t, hard)
            g = [[g[i][c] * weight[i][c] for c in range(k)] for i in range(n)]
        result = []
        for i in range(n):
            total = 0.0
            for c in range(k):
                if self.family == "softmax":
                    term = -t[i][c] * math.log(p[i][c])
                else:
                    term = -t[i][c] * math.log(p[i][c]) - (1 - t[i][c]) * math.log(1 - p[i][c])
                total += g[i][c] * term
            result.append(total)
        return result

    def weighted(self, p, t, hard):
        k = len(t[0])
        return [[sum(row[d] * WEIGHTS[d][c] for d in range(k)) for c in range(k)] for row in t]

    def threshold(self, p, t, hard):
        low, up = MATRICES.low, MATRICES.up
        k = len(t[0])
        result = []
        for i, row in enumerate(t):
            lo = [sum(row[d] * low[d][c] for d in range(k)) for c in range(k)]
            hi = [sum(row[d] * up[d][c] for d in range(k)) for c in range(k)]
            result.append([float(lo[c] < p[i][c] < hi[c]) for c in range(k)])
        return result

    def ohm(self, p, t, hard):
        n, k = len(hard), len(hard[0])
        if self.family == "softmax":
            keep = sorted(range(n), key=lambda i: -max(hard[i]))[: math.ceil(self.ratio * n - 1e-9)]
            return [[float(i in keep)] * k for i in range(n)]
        items = [(i, c) for i in range(n) for c in range(k)]
        items.sort(key=lambda place: -hard[place[0]][place[1]])
        kept = set(items[: math.ceil(self.ratio * n * k - 1e-9)])
        return [[float((i, c) in kept) for c in range(k)] for i in range(n)]

    def ghm(self, p, t, hard):
        which = [[min(int(v * self.bins), self.bins - 1) for v in row] for row in hard]
        counts, whole = [0.0] * self.bins, 0.0
        for row, target in zip(which, t, strict=True):
            for b, share in zip(row, target, strict=True):
                part = share if self.family == "softmax" and self.counted_by == "loss" else 1.0
                counts[b] += part
                whole += part
        filled = [b for b in range(self.bins) if counts[b]]
        for b in filled:
            share = counts[b] / whole
            self.average[b] = self.momentum * self.average[b] + (1 - self.momentum) * share
            self.updates[b] += 1
        density = {b: self.average[b] / (1 - self.momentum ** self.updates[b]) for b in filled}
        # A bin that only terms without a part in the loss fall into decides nothing.
        return [[1 / (density[b] * len(filled)) if b in density else 1.0 for b in row]
                for row in which]  # fmt: skip


def _batch(seed: int, *, n: int = 13, soft: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (n, K))
    t = rng.dirichlet(np.ones(K), n) if soft else np.eye(K)[rng.integers(0, K, n)]
    return z, t


@pytest.mark.parametrize("family", ["softmax", "sigmoid"])
@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("weighed", [False, True], ids=["alike", "curriculum"])
def test_three_steps_are_those_of_the_loop(names, family, soft, weighed) -> None:
    criterion = build_criterion(names, family=family, num_classes=K, matrices=MATRICES).train()
    compare_with_loop(criterion, Reference(names, family), soft=soft, weighed=weighed)


@pytest.mark.parametrize("family", ["softmax", "sigmoid"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
def test_the_original_s_way_to_count_is_that_of_the_loop(family, soft) -> None:
    criterion = build_criterion(
        ["ghm"], family=family, num_classes=K, matrices=MATRICES, ghm_counts="original"
    ).train()
    compare_with_loop(criterion, Reference(["ghm"], family, counts="original"), soft=soft)


def compare_with_loop(criterion, reference, *, soft, weighed=False) -> None:
    for seed in range(3):
        z, t = _batch(seed, soft=soft)
        target = torch.from_numpy(t) if soft else torch.from_numpy(t.argmax(1))
        u = np.random.default_rng(seed).choice([0.0, 0.0, 0.4, 1.0], len(z)) if weighed else None
        weights = None if u is None else torch.from_numpy(u)
        got = criterion.per_sample(torch.from_numpy(z), target, sample_weights=weights)
        expected = reference.losses(z, t, u)
        np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5, atol=1e-6)


def test_ghm_keeps_the_scale_of_a_softmax_loss_of_many_classes() -> None:
    """The original's counting made it half the number of classes times as large."""
    z = np.random.default_rng(0).normal(0, 1, (64, 1000))
    logits, labels = torch.from_numpy(z), torch.arange(64)
    plain = float(build_criterion(num_classes=1000)(logits, labels))
    ours, original = (
        float(build_criterion(["ghm"], num_classes=1000, ghm_counts=how).train()(logits, labels))
        for how in ("loss", "original")
    )
    assert 0.5 < ours / plain < 2 and original / plain > 100


@pytest.mark.parametrize("family", ["softmax", "bce"])
def test_without_weights_it_is_the_plain_loss(family) -> None:
    z, t = _batch(0)
    logits, target = torch.from_numpy(z).float(), torch.from_numpy(t.argmax(1))
    got = build_criterion(family=family, num_classes=K)(logits, target)
    if family == "softmax":
        expected = F.cross_entropy(logits, target)
    else:
        expected = F.binary_cross_entropy_with_logits(logits, torch.from_numpy(t).float()) * K
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


def test_losses_of_different_batch_sizes_compare() -> None:
    z, t = _batch(1)
    logits, target = torch.from_numpy(z), torch.from_numpy(t.argmax(1))
    criterion = build_criterion(["threshold", "weighted"], num_classes=K, matrices=MATRICES)
    once = criterion(logits, target)
    assert criterion(logits.repeat(5, 1), target.repeat(5)).item() == pytest.approx(once.item())


@pytest.mark.parametrize("names", [("ghm",), ("ohm",), ("ghm", "ohm", "threshold", "weighted")])
@pytest.mark.parametrize("family", ["softmax", "sigmoid"])
def test_in_evaluation_a_sample_does_not_depend_on_its_batch(names, family) -> None:
    criterion = build_criterion(names, family=family, num_classes=K, matrices=MATRICES).train()
    for seed in range(4):
        z, t = _batch(seed)
        criterion(torch.from_numpy(z), torch.from_numpy(t))
    before = {k: v.clone() for k, v in criterion.state_dict().items()}
    criterion.eval()
    z, t = _batch(9)
    whole = criterion.per_sample(torch.from_numpy(z), torch.from_numpy(t))
    parts = [
        criterion.per_sample(torch.from_numpy(z[i : i + 1]), torch.from_numpy(t[i : i + 1]))
        for i in range(len(z))
    ]
    assert torch.equal(whole, torch.cat(parts))
    assert all(torch.equal(v, before[k]) for k, v in criterion.state_dict().items())


def test_ohm_keeps_the_hardest() -> None:
    hardness = [0.1, 0.9, 0.5, 0.7]  # 1 - p of the true class
    logits = torch.tensor([[math.log((1 - h) / h), 0.0] for h in hardness])
    criterion = build_criterion(["ohm"], num_classes=2, hard_ratio=0.5).train()
    losses = criterion.per_sample(logits, torch.zeros(4, dtype=torch.int64))
    np.testing.assert_allclose(losses.numpy(), [0, -math.log(0.1), 0, -math.log(0.3)], rtol=1e-5)
    everything = build_criterion(["ohm"], num_classes=2, hard_ratio=1.0).train()
    plain = build_criterion(num_classes=2)
    labels = torch.zeros(4, dtype=torch.int64)
    assert everything(logits, labels).item() == pytest.approx(plain(logits, labels).item())


@pytest.mark.parametrize(
    ("n", "ratio", "kept"), [(10, 0.7, 7), (10, 0.3, 3), (3, 0.5, 2), (5, 0.01, 1)]
)
def test_ohm_keeps_the_stated_share_rounded_up(n, ratio, kept) -> None:
    logits = torch.randn(n, K, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n) % K
    for family, size in (("softmax", n), ("sigmoid", n * K)):
        criterion = build_criterion(["ohm"], family=family, num_classes=K, hard_ratio=ratio).train()
        weight = criterion.term_weights(logits, criterion.soft_targets(labels))
        found = int((weight.amax(1) if family == "softmax" else weight).sum())
        assert found == (kept if family == "softmax" else math.ceil(ratio * size - 1e-9))


def test_ghm_has_mean_weight_one_at_the_first_step_and_near_it_later() -> None:
    criterion = build_criterion(["ghm"], family="sigmoid", num_classes=K).train()
    means = []
    for seed in range(12):
        z, t = _batch(seed, n=200)
        weight = criterion.term_weights(torch.from_numpy(z), torch.from_numpy(t).float())
        means.append(float(weight.mean()))
    assert means[0] == pytest.approx(1.0, rel=1e-6)
    assert all(0.85 < mean < 1.15 for mean in means)


def test_ghm_weighs_a_rare_gradient_as_much_as_all_the_common_ones() -> None:
    # 99 terms in one bin, 1 in another: each bin gets half of the whole weight of 100.
    criterion = build_criterion(["ghm"], family="sigmoid", num_classes=2).train()
    logits = torch.full((50, 2), -4.0)
    logits[0, 0] = 3.0
    weight = criterion.term_weights(logits, torch.zeros(50, 2))
    assert weight[0, 0].item() == pytest.approx(50.0)
    assert weight[0, 1].item() == pytest.approx(50 / 99)


def test_ghm_edges_and_bins_never_met() -> None:
    criterion = build_criterion(["ghm"], family="sigmoid", num_classes=2).train()
    ghm = criterion.weights["ghm"]
    zeros = torch.zeros(1, 2, dtype=torch.float64)
    g = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    assert ghm.bin_of(g, zeros).tolist() == [[0, 29]]
    fresh = build_criterion(["ghm"], num_classes=2).eval()
    logits, labels = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    assert fresh(logits, labels).item() == pytest.approx(F.cross_entropy(logits, labels).item())


def test_ghm_state_survives_saving(tmp_path) -> None:
    first, second = (build_criterion(["ghm"], num_classes=K).train() for _ in range(2))
    for seed in range(3):
        z, t = _batch(seed)
        first(torch.from_numpy(z), torch.from_numpy(t))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    z, t = _batch(7)
    a, b = (c(torch.from_numpy(z), torch.from_numpy(t)) for c in (first, second))
    assert torch.equal(a, b)


def _counts(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # a fork has none of the threads that OpenMP believes in
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    z, t = _batch(0, n=14)
    mine = slice(0, 5) if rank == 0 else slice(5, 14)
    criterion = build_criterion(["ghm"], num_classes=K).train()
    criterion(torch.from_numpy(z[mine]), torch.from_numpy(t[mine]))
    torch.save(criterion.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ghm_of_two_processes_learns_what_one_does(tmp_path) -> None:
    torch.multiprocessing.start_processes(_counts, (str(tmp_path),), nprocs=2, start_method="fork")
    alone = build_criterion(["ghm"], num_classes=K).train()
    z, t = _batch(0, n=14)
    alone(torch.from_numpy(z), torch.from_numpy(t))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(value, found[name]) for name, value in alone.state_dict().items())


def test_threshold_leaves_out_what_is_learned() -> None:
    criterion = build_criterion(["threshold"], family="sigmoid", num_classes=2)
    p = torch.tensor([[0.96, 0.04], [0.94, 0.06]])
    weight = criterion.term_weights(p.logit(), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert weight.tolist() == [[0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("family", ["softmax", "sigmoid"])
def test_a_sample_of_weight_zero_has_no_gradient(family) -> None:
    criterion = build_criterion(["ghm", "ohm"], family=family, num_classes=K).train()
    logits = torch.randn(4, K, requires_grad=True)
    weights = torch.tensor([1.0, 0.0, 0.5, 1.0])
    criterion(logits, torch.tensor([0, 1, 2, 0]), sample_weights=weights).backward()
    assert logits.grad[1].abs().max() == 0 and logits.grad[0].abs().max() > 0


def test_the_weights_have_no_gradient_themselves() -> None:
    # Sigmoid: the gradient is exactly G (p - t) / N, which it would not be were G not detached.
    z, t = _batch(3)
    criterion = build_criterion(["ghm", "weighted"], family="bce", num_classes=K, matrices=MATRICES)
    logits = torch.from_numpy(z).float().requires_grad_()
    target = torch.from_numpy(t).float()
    copy = build_criterion(["ghm", "weighted"], family="bce", num_classes=K, matrices=MATRICES)
    weight = copy.train().term_weights(logits.detach(), target)
    criterion.train()(logits, target).backward()
    expected = weight * (logits.detach().sigmoid() - target) / len(z)
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_extreme_logits_stay_finite() -> None:
    criterion = build_criterion(NAMES, family="softmax", num_classes=2, matrices=_two()).train()
    logits = torch.tensor([[500.0, -500.0], [-500.0, 500.0]], requires_grad=True)
    loss = criterion(logits, torch.tensor([1, 1]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def _two() -> Matrices:
    default = Matrices.defaults(2)
    return Matrices(np.ones((2, 2)), default.low, default.up)


YAML = """
classes: [cat, dog, panda]
weights: [[1, 0.5, 2], [0.5, 1, 3], [2, 4, 1]]
low: {diagonal: -0.2, other: 0.1}
"""


def test_matrices_follow_the_order_of_the_data(tmp_path) -> None:
    (tmp_path / "m.yaml").write_text(YAML)
    found = load_matrices(tmp_path / "m.yaml", num_classes=3, classes=["panda", "cat", "dog"])
    assert found.weights.tolist() == [[1, 2, 4], [2, 1, 0.5], [3, 0.5, 1]]
    assert found.low.tolist() == [[-0.2, 0.1, 0.1], [0.1, -0.2, 0.1], [0.1, 0.1, -0.2]]
    assert found.up.tolist() == [[0.95, 1.1, 1.1], [1.1, 0.95, 1.1], [1.1, 1.1, 0.95]]


@pytest.mark.parametrize("size", [2, 6, 40])
def test_short_forms_fit_any_number_of_classes(tmp_path, size) -> None:
    (tmp_path / "m.yaml").write_text("weights: {diagonal: 2, other: 0.5}\n")
    found = load_matrices(tmp_path / "m.yaml", num_classes=size)
    assert np.array_equal(found.weights, np.full((size, size), 0.5) + 1.5 * np.eye(size))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: [[1, 2], [3, 4]]", "2 x 2, expected 3 x 3 for 3 classes"),
        ("weights: [[1, 2, 3], [3, 4]]", "no matrix of numbers"),
        ("weights: [[1, 2, 3], [1, 1, 1], [1, -1, 1]]", "weights has -1"),
        ("weight: 3", "key 'weight'"),
        ("low: {diagonal: 2, other: 0}", "low 2 is not below up 0.95 in row 1, column 1"),
        ("low: {diag: 2}", "expected numbers diagonal and other"),
        ("classes: [a, b, x]", "are not those of the data"),
        ("weights: [[1, .inf, 2], [1, 1, 1], [1, 1, 1]]", "not finite"),
        ("[", "not YAML"),
        ("", "expected keys"),
    ],
)
def test_a_faulty_matrix_file_is_one_line(tmp_path, text, message) -> None:
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_matrices(tmp_path / "m.yaml", num_classes=3, classes=["a", "b", "c"])
    assert "\n" not in str(caught.value)


def test_a_missing_matrix_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        load_matrices(tmp_path / "none.yaml", num_classes=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ["focal"]}, "criterion 'focal'"),
        ({"names": ["weighted"]}, "needs a class matrix"),
        ({"family": "hinge"}, "criterion family 'hinge'"),
        ({"num_classes": 1}, "num_classes is 1"),
        ({"names": ["ohm"], "hard_ratio": 0.0}, "hard_ratio is 0.0"),
        ({"names": ["ohm"], "hard_ratio": 1.5}, "hard_ratio is 1.5"),
        ({"names": ["ghm"], "bins": 0}, "bins is 0"),
        ({"names": ["ghm"], "momentum": 1.0}, "momentum is 1.0"),
        ({"names": ["threshold"], "matrices": MATRICES, "num_classes": 4}, "3 x 3, expected 4 x 4"),
    ],
)
def test_bad_settings_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_criterion(**{"num_classes": 3, **settings})


def test_shapes_that_do_not_fit_are_refused() -> None:
    criterion = build_criterion(num_classes=3)
    for logits, targets, weights in (
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), None),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), None),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.ones(3)),
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), None),
    ):
        with pytest.raises(ValueError, match="expected"):
            criterion(logits, targets, sample_weights=weights)
