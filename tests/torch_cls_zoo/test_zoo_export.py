"""Exported files: each gives the network's numbers at any batch size, and carries its facts."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from shared_core.for_torch.export import ExportError
from torch_cls_zoo.applications.export_files import FACTS, ONNX_KEY, demo_facts, export_all

SIZE = (48, 33)


def _facts(classes: int = 3) -> dict:
    return demo_facts(
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
    return (
        model,
        folder,
        export_all(model, folder, arch="timm/net", image_size=SIZE, facts=_facts()),
    )


@pytest.mark.slow
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
        extra = {FACTS: ""}
        jit = torch.jit.load(str(folder / "jit_timm_net.pt"), _extra_files=extra)(images).numpy()
        saved = {FACTS: ""}
        program = torch.export.load(str(folder / "timm_net.pt2"), extra_files=saved).module()
        exported = program(images).numpy()
    session = onnxruntime.InferenceSession(str(folder / "timm_net.onnx"))
    onnx = session.run(None, {"image": images.numpy()})[0]
    for got in (jit, exported, onnx):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    told = session.get_modelmeta().custom_metadata_map[ONNX_KEY]
    for text in (extra[FACTS], saved[FACTS], told):
        assert json.loads(text) == _facts()
    assert all(v["max_rel"] < 1e-5 and v["bytes"] > 500 for v in done.values())
    assert not [path for path in folder.iterdir() if "tmp" in path.name]


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
        export_all(Fickle(), tmp_path, arch="x", image_size=(4, 4), facts={}, formats=["jit"])
    assert list(tmp_path.iterdir()) == []


class Refusing(nn.Module):
    def forward(self, x):
        if float(x.sum()) > 1e9:
            raise RuntimeError("no")
        return x.mean((2, 3))


def test_what_cannot_be_written_is_one_line(tmp_path) -> None:
    with pytest.raises(ExportError, match="cannot be written as export") as caught:
        export_all(Refusing(), tmp_path, arch="x", image_size=(4, 4), facts={}, formats=["export"])
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="export format 'coreml'"):
        export_all(Refusing(), tmp_path, arch="x", image_size=(4, 4), facts={}, formats=["coreml"])
