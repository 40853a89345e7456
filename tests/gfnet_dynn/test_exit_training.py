"""The training of the exits: what each phase changes, that it learns, resumes and repeats."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gfnet_dynn.decide.exit_outputs import collect
from gfnet_dynn.models.exit_policy import ExitPolicy
from gfnet_dynn.models.gfnet import GFNet
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.train.exit_training import (
    ExitTraining,
    RunningMetrics,
    evaluate,
    train_single_epoch,
    warm_up_epoch,
)
from gfnet_dynn.train.phases import Alternation, Phase, named_parts, phases_of
from gfnet_dynn.train.warmup import WarmUp
from shared_core.for_torch.precision import Precision


def make_model(seed=0, **options):
    torch.manual_seed(seed)
    backbone = GFNet(
        img_size=16, patch_size=4, num_classes=4, embed_dim=16, depth=4, drop_path_rate=0.2
    )
    return GFNetDynn(backbone, [0, 1, 2], **options)


def batches(n=64, size=16, seed=0):
    rng = np.random.default_rng(seed)
    labels = torch.tensor(rng.integers(0, 4, n))
    images = torch.tensor(rng.normal(size=(n, 3, 16, 16)), dtype=torch.float32)
    # A class is a brighter quarter of the picture, some of them faint.
    strength = torch.tensor(rng.uniform(0.2, 2.0, n), dtype=torch.float32)
    for i, y in enumerate(labels.tolist()):
        r, c = 8 * (y // 2), 8 * (y % 2)
        images[i, :, r : r + 8, c : c + 8] += strength[i]
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, n, size)]


def make_training(model=None, *, lr=0.05, **options):
    model = make_model() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.05)
    return ExitTraining(model, optimizer, **options)


def parts_that_changed(model, before):
    return {
        part for part, name, p in named_parts(model) if not torch.equal(p.detach(), before[name])
    }


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


CHANGES = {
    Phase.WARMUP: {"heads"},
    Phase.GATE: {"gates"},
    Phase.CLASSIFIER: {"heads"},
    Phase.BACKBONE: {"backbone"},
    Phase.JOINT: {"backbone", "heads", "gates"},
}


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("mode", ["single", "weighted", "boosted", "legacy"])
def test_a_phase_changes_its_part_and_no_bit_elsewhere(phase, mode):
    """After all parts have gathered momentum, so that weight decay and momentum would show."""
    training = make_training(classifier_mode=mode)
    (images, labels), *_ = batches()
    training.step(Phase.JOINT, images, labels)
    before = snapshot(training.model)
    for _ in range(3):
        training.step(phase, images, labels)
    changed = parts_that_changed(training.model, before)
    if mode == "single" and phase is Phase.CLASSIFIER:
        assert changed <= CHANGES[phase]  # all samples may leave at the final head
    else:
        assert changed == CHANGES[phase]
    for name, value in training.model.named_buffers():
        assert torch.equal(value, before.get(name, value))


@pytest.mark.parametrize("phase", [Phase.BACKBONE, Phase.JOINT])
def test_a_learning_backbone_brings_its_final_head_along(phase):
    training = make_training(lr=0.01)
    training.optimizer.param_groups[0]["weight_decay"] = 0.0  # only its own loss moves the head
    (images, labels), *_ = batches()
    before = snapshot(training.model)
    training.step(phase, images, labels)
    assert not torch.equal(training.model.backbone.head.weight, before["backbone.head.weight"])


def test_frozen_heads_keep_their_bits():
    training = make_training()
    (images, labels), *_ = batches()
    training.step(Phase.JOINT, images, labels)
    training.frozen_exits = (1,)
    before = snapshot(training.model)
    for phase in (Phase.WARMUP, Phase.CLASSIFIER, Phase.JOINT):
        training.step(phase, images, labels)
    after = training.model.state_dict()
    assert torch.equal(after["exit_heads.1.weight"], before["exit_heads.1.weight"])
    for index in (0, 2):
        key = f"exit_heads.{index}.weight"
        assert not torch.equal(after[key], before[key])


def test_the_backbone_is_in_training_mode_only_where_it_learns():
    training = make_training()
    (images, labels), *_ = batches()
    for phase in (Phase.GATE, Phase.BACKBONE, Phase.CLASSIFIER, Phase.JOINT, Phase.WARMUP):
        training.step(phase, images, labels)
        learns = phase in (Phase.BACKBONE, Phase.JOINT)
        assert training.model.backbone.blocks[3].drop_path.training == learns
    # an evaluation by somebody else in between
    training.step(Phase.JOINT, images, labels)
    training.model.eval()
    training.step(Phase.JOINT, images, labels)
    assert training.model.backbone.blocks[3].drop_path.training


def test_gate_step_reports_the_loss_it_minimised():
    training = make_training(tradeoff=0.5)
    (images, labels), *_ = batches()
    training.weights = torch.tensor([3.0, 1.0, 0.5])
    training.model.eval()
    with torch.no_grad():
        logits, gate_logits = training.model(images)
    costs = training.model.exit_costs() / training.model.exit_costs()[-1]
    level = np.stack(
        [F.cross_entropy(z, labels, reduction="none").numpy() + 0.5 * c
         for z, c in zip(logits, costs, strict=True)], axis=1
    )  # fmt: skip
    target = level.argmin(axis=1)
    g = gate_logits.sigmoid().double().numpy()
    y = (target[:, None] <= np.arange(3)).astype(float)
    want = -(np.array([3.0, 1.0, 0.5]) * y * np.log(g) + (1 - y) * np.log(1 - g)).mean()
    step = training.step(Phase.GATE, images, labels)
    assert step["loss"].item() == pytest.approx(want, rel=1e-5)
    assert step["target_exit"].tolist() == target.tolist()
    assert not step["loss"].requires_grad and not step["outputs"][0][0].requires_grad


def test_gates_without_parameters_have_nothing_to_learn():
    training = make_training(make_model(gate="identity"))
    (images, labels), *_ = batches()
    before = snapshot(training.model)
    step = training.step(Phase.GATE, images, labels)
    assert parts_that_changed(training.model, before) == set()
    assert torch.isfinite(step["loss"])


@pytest.mark.parametrize("phase2", ["exits", "backbone", "joint"])
def test_training_lowers_the_loss(phase2):
    training = make_training(lr=0.05)
    data = batches(n=128)
    alternation = Alternation(4, phases=phases_of(phase2))
    first, last = {}, {}
    for _ in range(8):
        for phase, means in train_single_epoch(training, data, alternation=alternation).items():
            first.setdefault(phase, means["loss"])
            last[phase] = means["loss"]
    assert set(last) == set(phases_of(phase2))
    # The gates' targets move while the others learn, so only the last phase must fall for sure.
    learner = phases_of(phase2)[-1]
    assert last[learner] < first[learner]
    assert alternation.step == 64


def test_the_alternation_runs_over_epochs():
    training, alternation = make_training(), Alternation(3)
    seen = [
        list(train_single_epoch(training, batches(n=32), alternation=alternation)) for _ in range(4)
    ]
    gate, heads = Phase.GATE, Phase.CLASSIFIER
    assert seen == [[gate], [gate, heads], [heads], [gate]] and alternation.step == 8


def test_running_metrics_start_anew_at_each_turn():
    data = batches(n=80)  # turns of two batches: the last of the gates is one batch
    results = train_single_epoch(make_training(), data, alternation=Alternation(2))
    again, running = make_training(), RunningMetrics((0, 1, 2))
    for number, (phase, batch) in enumerate(
        zip([Phase.GATE] * 2 + [Phase.CLASSIFIER] * 2 + [Phase.GATE], data, strict=True)
    ):
        step = again.step(phase, *batch)
        if number == 4:
            running.update(step, batch[1])
    assert results[Phase.GATE] == running.result()
    assert "acc_exit" in results[Phase.GATE] and "acc_exit" not in results[Phase.CLASSIFIER]
    assert len(train_single_epoch(make_training(), batches(), max_batches=0)) == 0


def test_running_metrics_are_means_over_samples():
    training = make_training()
    running = RunningMetrics(training.model.exits)
    assert running.result() == {}
    right, chosen, targets, loss, seen = [], [], [], [], []
    data = batches(n=40, size=16)  # the last batch is smaller
    for images, labels in data:
        step = training.step(Phase.GATE, images, labels)
        running.update(step, labels)
        logits = np.stack([z.numpy() for z in step["outputs"][0]])
        chosen += ExitPolicy("jei", 0.5).select(logits, step["outputs"][1].numpy()).tolist()
        right += (logits.argmax(axis=2) == labels.numpy()).T.tolist()
        targets += step["target_exit"].tolist()
        loss.append(step["loss"].item() * len(labels))
        p = np.exp(logits - logits.max(axis=2, keepdims=True))
        seen.append((p / p.sum(axis=2, keepdims=True)).max(axis=2))
    got = running.result()
    assert got["loss"] == pytest.approx(sum(loss) / 40)
    accuracy = np.mean(right, axis=0)
    p_max = np.concatenate(seen, axis=1).mean(axis=1)
    for e, tail in enumerate(("0", "1", "2", "_final")):
        assert got[f"acc{tail}"] == pytest.approx(accuracy[e])
        key = f"p_max{tail}" if e < 3 else "final_p_max"
        assert got[key] == pytest.approx(p_max[e], rel=1e-5)
        name = tail.strip("_")
        assert got[f"percent_exit{name}"] == pytest.approx(chosen.count(e) / 40)
        assert got[f"exit_optimal_gate{name}"] == pytest.approx(targets.count(e) / 40)
    assert got["gated_acc"] == pytest.approx(
        np.mean([row[e] for row, e in zip(right, chosen, strict=True)])
    )
    assert got["acc_exit"] == pytest.approx(np.mean(np.array(chosen) == np.array(targets)))


def test_evaluation_has_all_names_and_changes_nothing():
    training = make_training(tradeoff=0.5)
    data = batches()
    training.step(Phase.JOINT, *data[0])
    before, rng = snapshot(training.model), torch.get_rng_state()
    metrics, outputs = evaluate(training, data, split="calibration", split_hash="x")
    assert all(torch.equal(v, before[k]) for k, v in training.model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and training.model.backbone.training
    assert metrics["test_acc"] == metrics["gated_acc"]
    assert metrics["loss"] == pytest.approx((metrics["gate_loss"] + metrics["classifier_loss"]) / 2)
    exit_index = outputs.select(ExitPolicy("jei", 0.5))
    right = outputs.correct[exit_index, np.arange(64)]
    assert metrics["gated_acc"] == pytest.approx(right.mean())
    assert metrics["total_cost"] == pytest.approx(training.model.exit_costs()[exit_index].mean())
    for e, block in enumerate((0, 1, 2)):
        accuracy = (outputs.logits[e].argmax(axis=1) == outputs.labels).mean()
        assert metrics[f"acc{block}"] == pytest.approx(accuracy)
    z = torch.from_numpy(outputs.logits[exit_index, np.arange(64)]).double()
    loss = F.cross_entropy(z, torch.from_numpy(outputs.labels)).item()
    assert metrics["level_loss"] == pytest.approx(loss + 0.5 * metrics["cost_fraction"], rel=1e-5)
    again, _ = evaluate(training, data)
    assert again == metrics
    other_size, _ = evaluate(training, batches(size=10))
    for name, value in metrics.items():
        assert other_size[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_evaluation_reports_the_policy_it_is_given():
    training = make_training()
    never, _ = evaluate(training, batches(), policy=ExitPolicy.never())
    assert never["percent_exitfinal"] == 1 and never["cost_fraction"] == 1
    at_once, _ = evaluate(training, batches(), policy=ExitPolicy("max_prob", 0.0))
    assert at_once["percent_exit0"] == 1 and at_once["gated_acc"] == at_once["acc0"]


def test_weights_of_the_gates_come_from_cumulative_targets():
    training = make_training(tradeoff=0.3)
    outputs = collect(training.model, batches(n=200))
    training.set_from_validation(outputs)
    costs = training.costs
    counts = np.zeros(3)
    for i in range(200):
        level = [
            F.cross_entropy(
                torch.tensor(outputs.logits[e, i])[None], torch.tensor(outputs.labels[i])[None]
            ).item() + 0.3 * costs[e]
            for e in range(4)
        ]  # fmt: skip
        counts += int(np.argmin(level)) <= np.arange(3)
    want = np.clip((200 - counts) / np.maximum(counts, 0.1), 0.2, 5)
    np.testing.assert_allclose(training.weights, want, rtol=1e-5)


def test_a_higher_price_makes_gates_open_earlier():
    costs = {}
    for tradeoff in (0.0, 1.0, 50.0):
        training = make_training(tradeoff=tradeoff, lr=0.5)
        data = batches(n=64)
        for _ in range(12):
            train_single_epoch(training, data, alternation=Alternation(1, phases=[Phase.GATE]))
        metrics, _ = evaluate(training, data)
        costs[tradeoff] = metrics["total_cost"]
    assert costs[0.0] >= costs[1.0] >= costs[50.0]
    assert costs[50.0] == pytest.approx(training.model.exit_costs()[0])
    assert costs[0.0] > costs[50.0]


def test_warm_up_freezes_and_restores_the_best():
    training = make_training(lr=0.1)
    warm_up = WarmUp(training.model.exits, max_epochs=30)
    train, validation = batches(n=96), batches(n=64, seed=1)
    best, last = [0.0] * 3, [0.0] * 3
    while not warm_up.done:
        frozen = training.frozen_exits
        _, metrics = warm_up_epoch(training, warm_up, train, validation)
        for e in range(3):
            if e not in frozen:
                last[e] = metrics[f"acc{e}"]
                best[e] = max(best[e], last[e])
    assert last != best  # something had to be put back
    metrics, _ = evaluate(training, validation)
    for e in range(3):
        assert metrics[f"acc{e}"] == pytest.approx(best[e])
    assert warm_up.best_accuracy == pytest.approx(best)
    heads = training.model.exit_heads.parameters()
    assert not any(p in training.optimizer.state for p in heads)  # no stale momentum
    assert training.frozen_exits == warm_up.frozen_exits == (0, 1, 2)


def run(steps, *, stop=None):
    """Warm-up of one epoch, then steps of phase 2; saved and taken up again at ``stop``."""
    data = batches(n=64) * 20
    training, alternation = make_training(tradeoff=0.5), Alternation(3)
    training.set_from_validation(collect(training.model, data[:2]))
    for step in range(steps):
        if step == stop:
            saved = copy.deepcopy(
                {
                    "model": training.model.state_dict(),
                    "optimizer": training.optimizer.state_dict(),
                    "training": training.state_dict(),
                    "alternation": alternation.state_dict(),
                }
            )
            training, alternation = make_training(make_model(9), tradeoff=0.5), Alternation(3)
            training.model.load_state_dict(saved["model"])
            training.optimizer.load_state_dict(saved["optimizer"])
            training.load_state_dict(saved["training"])
            alternation.load_state_dict(saved["alternation"])
        training.step(alternation.phase, *data[step])
        alternation.advance()
    return snapshot(training.model)


@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_a_run_that_was_stopped_ends_bit_identical(stop):
    whole, again, stopped = run(10), run(10), run(10, stop=stop)
    for name, value in whole.items():
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, stopped[name]), name


def test_bf16_trains_by_the_same_path():
    model = make_model()
    training = make_training(model, precision=Precision("cpu", "bf16"))
    (images, labels), *_ = batches()
    losses = [training.step(Phase.WARMUP, images, labels)["loss"].item() for _ in range(15)]
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_refusals():
    (images, labels), *_ = batches()
    with pytest.raises(ValueError, match="unknown gate objective 'mse'"):
        make_training(objective="mse").step(Phase.GATE, images, labels)
    training = make_training(classifier_mode="none")
    with pytest.raises(ValueError, match="unknown classifier loss 'none'"):
        training.step(Phase.CLASSIFIER, images, labels)
    with pytest.raises(ValueError, match="2 gate weights; expected 3"):
        training.load_state_dict({"weights": [1.0, 1.0], "frozen_exits": []})
