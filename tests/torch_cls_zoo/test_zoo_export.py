"""Exported files: each gives the network's numbers at any batch size, and carries its facts."""

import numpy as np
import pytest
import torch
from torch import nn

from shared_core.datasets.views.evaluation import LetterboxView
from shared_core.deploy.facts import ModelFacts
from shared_core.deploy.predictor import Outputs
from shared_core.deploy.session import open_session as open_onnx
from shared_core.for_torch.distributed import World
from shared_core.for_torch.export import ExportError
from torch_cls_zoo.applications import convert
from torch_cls_zoo.applications.export_files import export_all
from torch_cls_zoo.applications.model_facts import model_facts
from torch_cls_zoo.applications.session import open_session
from torch_cls_zoo.config import parse
from torch_cls_zoo.dataloader.folders import part

SIZE = (48, 33)


def _facts(classes: int = 3) -> ModelFacts:
    return model_facts(
        arch="net", class_names=[f"c{i}" for i in range(classes)], image_size=SIZE,
        mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7), family="bce",
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.Hardswish(), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).train()  # fmt: skip
    model[1].running_var.fill_(3.0)
    folder = tmp_path_factory.mktemp("files")
    return (model, folder, export_all(model, folder, arch="timm/net", facts=_facts()))


def test_all_three_give_the_numbers_of_the_network(written) -> None:
    model, folder, done = written
    assert model.training
    assert {k: v["file"] for k, v in done.items()} == {
        "jit": "jit_timm_net.pt", "onnx": "timm_net.onnx", "export": "timm_net.pt2",
    }  # fmt: skip
    images = torch.randn(5, 3, *SIZE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model.eval()(images).numpy()
        model.train()
        jit = torch.jit.load(str(folder / "jit_timm_net.pt"))(images).numpy()
        exported = torch.export.load(str(folder / "timm_net.pt2")).module()(images).numpy()
    session = open_onnx(folder / "timm_net.onnx")
    onnx = session.run(None, {"image": images.numpy()})[0]
    for got in (jit, exported, onnx):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert all(v["max_rel"] < 1e-5 and v["bytes"] > 500 for v in done.values())
    assert not [path for path in folder.iterdir() if "tmp" in path.name]


def _small() -> ModelFacts:
    return _facts().replaced(input_size=(4, 4), view=LetterboxView((4, 4)).settings())


class Fickle(nn.Module):
    """Its trace holds another number than it gives the next time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.calls = 0.0

    def forward(self, x):
        self.calls += 1.0
        return self.fc(x.mean((2, 3))) + self.calls


def test_a_file_that_differs_is_not_left(tmp_path) -> None:
    with pytest.raises(ExportError, match="differs by"):
        export_all(Fickle(), tmp_path, arch="x", facts=_small(), formats=["jit"])
    assert list(tmp_path.iterdir()) == []


class Refusing(nn.Module):
    def forward(self, x):
        if float(x.sum()) > 1e9:
            raise RuntimeError("no")
        return x.mean((2, 3))


def test_what_cannot_be_written_is_one_line(tmp_path) -> None:
    with pytest.raises(ExportError, match="cannot be written as export") as caught:
        export_all(Refusing(), tmp_path, arch="x", facts=_small(), formats=["export"])
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="export format 'coreml'"):
        export_all(Refusing(), tmp_path, arch="x", facts=_small(), formats=["coreml"])


@pytest.fixture(scope="module")
def session(zoo_best, zoo_data, tmp_path_factory):
    """The finished training's network, as ``--jit`` opens it."""
    words = ["--jit", "--data", zoo_data, "--resume", zoo_best, "--no-cuda", "--int8", "no",
             "--output", tmp_path_factory.mktemp("session")]  # fmt: skip
    config = parse([str(word) for word in words])
    return open_session(config, World(0, 1, 0, torch.device("cpu")))


def test_int8_is_calibrated_on_validation_and_judged_on_test(session) -> None:
    def views_of(split: str) -> dict[bytes, int]:
        found = part(session.data, split)
        view = LetterboxView(session.settings.size)
        return {view(found.images.image(n)).tobytes(): int(found.images.labels[n])
                for n in range(len(found))}  # fmt: skip

    given = convert.calibration_of(session)
    assert {i.tobytes(): int(k) for i, k in zip(given.images, given.labels, strict=True)} == (
        views_of("val")
    )
    test = [(i.tobytes(), int(k)) for images, labels in convert.views(session, "test")
            for i, k in zip(images, labels, strict=True)]  # fmt: skip
    assert dict(test) == views_of("test") and len(test) == 15


def test_a_file_that_answers_otherwise_ends_the_export(session, monkeypatch) -> None:
    real = convert.open_model

    def swapped(path, **how):
        predictor = real(path, **how)
        asked = predictor.outputs
        predictor.outputs = lambda images: Outputs(asked(images).values[:, ::-1], None)
        return predictor

    monkeypatch.setattr(convert, "open_model", swapped)
    with pytest.raises(ExportError, match="does not answer as its network"):
        convert.convert(session)
    assert not (session.output / "model").exists()
