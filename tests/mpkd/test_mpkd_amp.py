"""One path for fp32, bf16 and fp16: closeness, the halved scale, the skipped step, the record."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpkd.model.student import SimpleCNN
from mpkd.trainer.metrics_logger import MetricsLogger, read_metrics_csv
from mpkd.trainer.objectives import make_objective
from mpkd.trainer.settings import Settings, precision_from
from mpkd.trainer.trainer import Job, Trainer
from mpkd.utils.config import load_config
from shared_core.datasets import BatchLoader, EpochOrder, ImageSet, SmallView
from shared_core.for_torch.data import Normalizer, TorchLoader
from shared_core.for_torch.precision import Precision, computes_bf16
from shared_core.runs import StageLog


def loader(images: int = 64, *, shuffle: bool = True) -> TorchLoader:
    rng = np.random.default_rng(0)
    labels = np.arange(images) % 4
    array = rng.integers(0, 60, (images, 8, 8, 3)) + 50 * labels[:, None, None, None]
    made = ImageSet(None, labels, source=array.astype(np.uint8))
    order = EpochOrder(images, shuffle=shuffle)
    view = SmallView(8, pad=0, hflip=0.0)
    batches = BatchLoader(made, view=view, batch_size=16, order=order, threads=0)
    return TorchLoader(batches, Normalizer())


def train(folder, precision: Precision, *, objective=None, **settings):
    torch.manual_seed(3)
    net = SimpleCNN(4, widths=(4, 8))
    made = Settings(epochs=2, batch_size=16, learning_rate=5e-3, **settings)
    job = Job(
        "t", net, objective or make_objective({"distillation.mode": "labels"}, None), loader(),
        loader(shuffle=False), made, precision, StageLog(folder),
        MetricsLogger(folder / "t.csv", run_id="t"),
    )  # fmt: skip
    trainer = Trainer(job)
    trainer.run()
    return net, read_metrics_csv(folder / "t.csv"), trainer


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_losses_are_close_to_fp32(tmp_path, dtype):
    _, wanted, _ = train(tmp_path / "a", Precision("cpu", "fp32"))
    net, found, _ = train(tmp_path / "b", Precision("cpu", dtype, init_scale=1024.0))
    for a, b in zip(wanted, found, strict=True):
        assert abs(a["train_loss"] - b["train_loss"]) < 0.05 * a["train_loss"]
    assert all(p.dtype == torch.float32 for p in net.parameters())  # master weights
    assert found[-1]["loss_scale"] == (1024.0 if dtype == "fp16" else None)


def test_a_planted_overflow_skips_one_step_and_halves_the_scale(tmp_path):
    labels = make_objective({"distillation.mode": "labels"}, None)
    calls = []

    def planted(batch, logits):
        calls.append(1)
        loss = labels(batch, logits)
        return loss * float("inf") if len(calls) == 3 else loss

    precision = Precision("cpu", "fp16", init_scale=256.0)
    net, rows, trainer = train(tmp_path, precision, objective=planted, ema=0.5, clip=1.0)
    assert precision.skipped_steps == 1 and len(calls) == 8
    assert [r["skipped_steps"] for r in rows] == [1, 1]
    assert [r["loss_scale"] for r in rows] == [128.0, 128.0]
    assert trainer.ema.step == 7  # a skipped step is not averaged
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_the_scale_grows_after_good_steps(tmp_path):
    precision = Precision("cpu", "fp16", init_scale=4.0, growth_interval=3)
    _, rows, _ = train(tmp_path, precision)
    assert rows[-1]["loss_scale"] == 16.0  # eight good steps: twice three


def test_the_configuration_decides():
    keys = {"mixed_precision.enabled": True, "mixed_precision.dtype": "fp16"}
    keys |= {"mixed_precision.init_scale": 8.0, "mixed_precision.growth_interval": 5}
    made = precision_from(load_config(None, (), overrides=keys), torch.device("cpu"))
    assert (made.dtype, made.scaler.get_scale()) == ("fp16", 8.0)
    assert made.scaler.get_growth_interval() == 5
    here = torch.device("cpu")  # auto: where the hardware computes it, and maps are no single pixel
    assert precision_from(load_config(), here, side=32).dtype == "fp32"
    assert (precision_from(load_config(), here, side=64).dtype == "bf16") == computes_bf16(here)
