"""The loop against independent truths: accumulation, rates, labels, views, the CSV."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from mpkd.dataset.sources import load_data
from mpkd.model.student import SimpleCNN
from mpkd.quant.layers import quantizable, quantize_net
from mpkd.run_context import Run
from mpkd.trainer.metrics_logger import COLUMNS, MetricsLogger, read_metrics_csv
from mpkd.trainer.objectives import LiveTeacher, make_objective
from mpkd.trainer.settings import Settings, settings_from
from mpkd.trainer.trainer import Job, Trainer, groups_of
from mpkd.utils.common import ALONE
from mpkd.utils.config import check_config, load_config
from shared_core.datasets import ImageSet
from shared_core.for_torch.data import TorchBatch
from shared_core.for_torch.precision import Precision
from shared_core.knowledge import KnowledgeStore
from shared_core.runs import StageLog, UsageError


def make_run(folder, **changes) -> Run:
    keys = {
        "dataset.name": "digits", "dataset.image_size": 8, "dataset.max_images": 96,
        "dataset.workers": 0, "experiment.batch_size": 16, "model.student_widths": [4, 8],
        "experiment.epochs": 2, "distillation.views": 2,
    } | {k.replace("__", "."): v for k, v in changes.items()}  # fmt: skip
    config = load_config(None, (), overrides=keys)
    data = load_data(config, folder, data_root=None)
    csv = MetricsLogger(folder / "logs" / "t.csv", run_id="t")
    return Run(config, data, folder, StageLog(folder), csv, torch.device("cpu"), scale="rehearsal")


def student(seed: int = 0, *, norm: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    if norm:
        return SimpleCNN(10, widths=(4, 8))
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.Tanh(), nn.Linear(12, 10))


def make_trainer(
    folder, net, *, precision="fp32", objective=None, world=ALONE, helper=None, companion=None,
    **settings,
) -> Trainer:  # fmt: skip
    run = make_run(folder)
    made = Settings(epochs=1, batch_size=16, learning_rate=1e-2, **settings)
    job = Job(
        "t", net, objective or make_objective({"distillation.mode": "labels"}, None),
        run.training_loader("t"), run.evaluation_loader(), made, Precision("cpu", precision),
        run.log, run.csv, world, helper, companion,
    )  # fmt: skip
    return Trainer(job)


def batches_of(count: int, sizes=(16, 16, 9)) -> list[TorchBatch]:
    generator = torch.Generator().manual_seed(count)
    return [
        TorchBatch(
            torch.randn(n, 3, 8, 8, generator=generator),
            torch.randint(10, (n,), generator=generator), torch.arange(n), 0,
        )
        for n in sizes
    ]  # fmt: skip


def joined(parts: list[TorchBatch]) -> TorchBatch:
    return TorchBatch(
        torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]),
        torch.cat([p.indices for p in parts]), 0,
    )  # fmt: skip


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_accumulated_batches_are_one_large_batch(tmp_path, clip):
    many, one = student(norm=False), student(norm=False)
    parts = batches_of(3)
    a = make_trainer(tmp_path / "a", many, clip=clip, accumulation=3)
    b = make_trainer(tmp_path / "b", one, clip=clip)
    for _ in range(3):
        first, second = a.step(parts, 1e-2), b.step([joined(parts)], 1e-2)
    assert first["seen"] == second["seen"] == 41 and first["right"] == second["right"]
    assert math.isclose(first["loss"], second["loss"], rel_tol=1e-5)
    for p, q in zip(many.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_step_is_adamw_by_hand(tmp_path):
    net = student(norm=False)
    before = {n: p.detach().double().clone() for n, p in net.named_parameters()}
    part = batches_of(1, (16,))[0]
    twin = student(norm=False).double()
    nn.functional.cross_entropy(twin(part.images.double()), part.labels).backward()
    make_trainer(tmp_path, net, weight_decay=0.1).step([part], 1e-2)
    for name, gradient in ((n, p.grad) for n, p in twin.named_parameters()):
        decay = 0.1 if gradient.ndim > 1 else 0.0  # biases are not pulled to zero
        wanted = before[name] * (1 - 1e-2 * decay) - 1e-2 * gradient / (gradient.abs() + 1e-8)
        found = dict(net.named_parameters())[name].detach().double()
        rows = gradient.abs() > 1e-5  # where float32 knows the sign
        torch.testing.assert_close(found[rows], wanted[rows], rtol=1e-3, atol=1e-5)


def test_learned_scales_move_by_a_share_of_their_size(tmp_path):
    """A step of Adam is about the rate, which is more than a whole scale of 8 bits."""
    net = student()
    quantize_net(net, dict.fromkeys(quantizable(net), 8), learned=True)
    before = {n: p.detach().clone() for n, p in net.named_parameters() if n.endswith(".scale")}
    assert len(before) == 3 and all(float(p.max()) < 1e-2 for p in before.values())
    trainer = make_trainer(tmp_path, net)
    for _ in range(20):
        trainer.step(batches_of(1, (16,)), 1e-2)
    moved = 0
    for name, old in before.items():
        new = dict(net.named_parameters())[name].detach()
        assert float((new - old).abs().max()) <= 20 * 1.2e-2 * float(old.mean())
        assert float(new.min()) > 0
        moved += not torch.equal(new, old)
    assert moved == 3


def test_groups_keep_the_order_and_the_rest():
    assert [len(g) for g in groups_of(iter(range(7)), 3)] == [3, 3, 1]
    assert sum(groups_of(iter(range(7)), 3), []) == list(range(7))


def test_rates_by_hand():
    s = Settings(epochs=10, batch_size=1, learning_rate=1.0, warmup_steps=4)
    rates = [s.rate(n, total=104, steps_per_epoch=10) for n in range(104)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert math.isclose(rates[54], 0.5, abs_tol=1e-12) and 0 < rates[-1] < 1e-3
    steps = Settings(10, 1, 1.0, scheduler="step", step_size=2, gamma=0.1)
    found = [steps.rate(n, total=100, steps_per_epoch=10) for n in (0, 19, 20, 39, 40)]
    assert np.allclose(found, [1, 1, 0.1, 0.1, 0.01])
    assert Settings(1, 1, 0.3, scheduler="constant").rate(7, total=9, steps_per_epoch=3) == 0.3
    limited = Settings(epochs=5, batch_size=1, learning_rate=1.0, accumulation=4, max_steps=7)
    assert limited.total_steps(10) == 7
    assert Settings(epochs=5, batch_size=1, learning_rate=1.0, accumulation=4).total_steps(10) == 15


def fit(run: Run, net: nn.Module, objective, **more):
    settings = settings_from(run.config)
    best, trainer = run.fit(
        "distil", net, objective, settings=settings, loader=run.training_loader("s", replayed=2),
        **more,
    )  # fmt: skip
    return best, trainer


def permuted(run: Run) -> Run:
    """The same images under other labels, in training and in validation."""
    rng = np.random.default_rng(5)
    sets = {
        part: ImageSet(None, rng.permutation(own.labels), own.keys, source=own.array)
        for part, own in run.data.sets.items()
    }
    object.__setattr__(run.data, "sets", sets)
    return run


@pytest.mark.parametrize("live", [True, False])
def test_teacher_only_never_sees_a_label(tmp_path, live):
    torch.manual_seed(9)
    teacher = SimpleCNN(10, widths=(8, 16)).eval()
    weights = []
    for name in ("given", "permuted"):
        run = make_run(tmp_path / name, distillation__cache_teacher_logits=not live)
        assert run.config["distillation.mode"] == "teacher_only"
        run = permuted(run) if name == "permuted" else run
        source, _ = run.teacher_source(teacher, "0" * 64, run.data.sets["train"])
        net = student()
        best, _ = fit(
            run, net, make_objective(run.config, source), reference=run.reference(teacher),
            choose_by="agreement",
        )  # fmt: skip
        weights.append(best.weights)
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_labels_do_matter_where_they_are_asked_for(tmp_path):
    weights = []
    for name in ("given", "permuted"):
        run = make_run(tmp_path / name, distillation__mode="labels")
        run = permuted(run) if name == "permuted" else run
        best, _ = fit(run, student(), make_objective(run.config, None))
        weights.append(best.weights)
    assert any(not torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def test_replayed_outputs_are_the_live_teachers(tmp_path):
    torch.manual_seed(9)
    teacher = SimpleCNN(10, widths=(8, 16)).eval()
    run = make_run(tmp_path)
    source, views = run.teacher_source(teacher, "a" * 64, run.data.sets["train"])
    live = LiveTeacher(teacher, autocast=Precision("cpu", "fp32").autocast)
    loader = run.training_loader("s", replayed=views)
    seen = []
    for _ in range(3):
        for batch in loader:
            assert (source(batch) - live(batch)).abs().max() < 1e-5
            seen.append(batch.view_id)
    assert views == 2 and sorted(set(seen)) == [0, 1]
    assert seen[0] == seen[-1] == 0  # the third epoch shows the first one's views again
    store = KnowledgeStore.open(tmp_path / "knowledge")
    assert store.count(0) == store.count(1) == len(set(run.data.sets["train"].keys))


def test_outputs_of_another_teacher_are_thrown_away(tmp_path):
    torch.manual_seed(9)
    first, second = (SimpleCNN(10, widths=(8, 16)).eval() for _ in range(2))
    run = make_run(tmp_path)
    images = run.data.sets["train"]
    a, _ = run.teacher_source(first, "a" * 64, images)
    b, _ = run.teacher_source(second, "b" * 64, images)
    batch = next(iter(run.training_loader("s", replayed=2)))
    assert (b(batch) - second(batch.images)).abs().max() < 1e-5
    assert (b(batch) - first(batch.images)).abs().max() > 1e-3


def test_max_steps_stop_and_the_best_epoch_is_kept(tmp_path):
    run = make_run(
        tmp_path, distillation__mode="labels", training__max_train_steps=9, experiment__epochs=9
    )
    best, trainer = fit(run, student(), make_objective(run.config, None))
    rows = read_metrics_csv(run.csv.path)
    assert rows[-1]["step"] == 9 and [r["epoch"] for r in rows] == [1, 2]
    assert best.accuracy == pytest.approx(max(r["val_acc"] for r in rows), abs=1e-7)
    assert all(r["run_id"] == "t" and r["loss_scale"] is None for r in rows)


def test_the_average_is_evaluated_and_kept(tmp_path):
    run = make_run(tmp_path, distillation__mode="labels", training__ema=0.5)
    net = student()
    best, trainer = fit(run, net, make_objective(run.config, None))
    assert trainer.ema is not None and trainer.ema.step == 14
    if best.epoch == 2:
        assert all(torch.equal(best.weights[n], v) for n, v in trainer.ema.weights.items())
    assert all(torch.equal(best.weights[n], v) for n, v in net.state_dict().items())


def test_memory_layout_changes_the_numbers_only_by_rounding(tmp_path):
    parts = batches_of(1, (16,))
    found = []
    for last in (True, False):
        net = student()
        trainer = make_trainer(tmp_path / str(last), net, channels_last=last)
        trainer.step(parts, 1e-3)
        found.append(net)
        assert net.features[0][0].weight.is_contiguous(
            memory_format=torch.channels_last if last else torch.contiguous_format
        )
    for p, q in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=2.5e-3)  # Adam: one step is +-1e-3


def test_compile_is_asked_for_and_its_failure_is_one_line(tmp_path, monkeypatch):
    asked = []

    def fake(net):
        asked.append(net)
        return net

    monkeypatch.setattr(torch, "compile", fake)
    run = make_run(tmp_path / "a", distillation__mode="labels", training__compile=True)
    fit(run, student(), make_objective(run.config, None))
    assert len(asked) == 1

    def broken(net):
        raise RuntimeError("no\nC++ compiler")

    monkeypatch.setattr(torch, "compile", lambda net: broken)
    run = make_run(tmp_path / "b", distillation__mode="labels", training__compile=True)
    with pytest.raises(ValueError, match="cannot compile") as caught:
        fit(run, student(), make_objective(run.config, None))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset.unlabelled": ["x"], "distillation.mode": "mixed"}, "reads labels"),
        ({"distillation.loss": "mse_logits"}, "expected 1"),
        (
            {"distillation.loss": "dist", "training.gradient_accumulation_steps": 2},
            "dist compares the images",
        ),
        ({"dataset.split": "split.json"}, "expected dataset.name=folder"),
    ],
)
def test_contradictions_are_refused(changes, said):
    with pytest.raises(UsageError, match=said):
        check_config(load_config(None, (), overrides=changes))


def test_the_csv_is_cut_and_read_back(tmp_path):
    log = MetricsLogger(tmp_path / "m.csv", run_id="r")
    log.write({"stage": "s", "epoch": 1, "step": 3, "train_loss": 0.1 + 0.2, "val_acc": None})
    position = log.position()
    log.write({"stage": "s", "epoch": 2, "step": 6})
    log.cut(position)
    (row,) = read_metrics_csv(log.path)
    assert row["train_loss"] == pytest.approx(0.3) and row["val_acc"] is None and row["step"] == 3
    assert tuple(row) == COLUMNS
    with (tmp_path / "m.csv").open("a") as stream:
        stream.write("r,s,3")  # a crash
    assert len(read_metrics_csv(log.path)) == 1
    with pytest.raises(ValueError, match="no column 'colour'"):
        log.write({"colour": 1})
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="expected run_id"):
        read_metrics_csv(tmp_path / "other.csv")
