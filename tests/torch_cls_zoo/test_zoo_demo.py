"""What the demo opens: every form gives the network's own answers, under the flags of the README.

How pictures are found, shown and written is the core's, and is tested there.
"""

import json

import cv2
import numpy as np
import onnx
import pytest
import torch
from torch import nn

from command_tools import run_main
from shared_core.checkpoints import make_facts
from shared_core.datasets.views.evaluation import LetterboxView
from shared_core.deploy.facts import METADATA_KEY, ModelError
from shared_core.deploy.predictor import open_model
from shared_core.for_torch.checkpoints import save_checkpoint
from shared_core.runs import UsageError
from torch_cls_zoo.applications.export_files import export_all
from torch_cls_zoo.applications.model_facts import FACTS, facts_from_file, model_facts
from torch_cls_zoo.applications.openers import OPENERS
from torch_cls_zoo.demos import classifier
from torch_cls_zoo.models import build_model

CLASSES = ["red", "green", "blue"]
MEAN, STD, SIZE = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), (20, 31)


class Colours(nn.Module):
    """Logits are the mean colours of the picture itself, in units of 1/255."""

    def forward(self, x):
        mean, std = (torch.tensor(v)[None, :, None, None] for v in (MEAN, STD))
        return ((x * std + mean) * 255).mean((2, 3)) / 20


def by_hand(image: np.ndarray, family: str) -> np.ndarray:
    logits = LetterboxView(SIZE)(image).astype(np.float64).mean((0, 1)) / 20
    if family == "bce":
        return 1 / (1 + np.exp(-logits))
    return np.exp(logits) / np.exp(logits).sum()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family, formats in (("softmax", ("jit", "onnx", "export")), ("bce", ("jit",))):
        facts = model_facts(arch="colours", class_names=CLASSES, image_size=SIZE, mean=MEAN,
                            std=STD, family=family)  # fmt: skip
        export_all(Colours(), folder, arch=family, facts=facts, formats=formats)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep").mkdir()
    for number, name in enumerate(CLASSES):
        image = np.random.default_rng(number).integers(0, 60, (40, 50, 3)).astype(np.uint8)
        image[..., number] += 180
        where = folder / ("deep" if number == 2 else "")
        cv2.imwrite(str(where / f"{name}.png"), image[..., ::-1])
    return folder


@pytest.mark.parametrize(
    ("file", "runtime"),
    [("jit_softmax.pt", "torchscript"), ("softmax.onnx", "onnx"),
     ("jit_bce.pt", "torchscript")],
)  # fmt: skip
def test_every_form_gives_probabilities_of_the_picture_itself(models, pictures, file, runtime):
    image = cv2.imread(str(pictures / "red.png"))[..., ::-1]
    predictor = open_model(models / file, openers=OPENERS)
    assert predictor.runtime == runtime
    found = predictor.probabilities(np.stack([predictor.view(image)] * 3))
    want = by_hand(image, "bce" if "bce" in file else "softmax")
    np.testing.assert_allclose(found, np.tile(want, (3, 1)), rtol=1e-4)
    with pytest.raises(UsageError, match="--runtime checkpoint"):
        open_model(models / file, runtime="checkpoint", openers=OPENERS)


def test_a_checkpoint_is_opened_as_it_was_trained(tmp_path, pictures):
    torch.manual_seed(0)
    net = build_model("test_resnet", num_classes=3, image_size=SIZE).model.eval()
    facts = make_facts(project="torch_cls_zoo", architecture="test_resnet", class_names=CLASSES,
                       framework="torch", input_size=(3, *SIZE), mean=MEAN, std=STD,
                       config={"criterion": "bce"})  # fmt: skip
    save_checkpoint(tmp_path / "w.pth", net.state_dict(), facts)
    predictor = open_model(tmp_path / "w.pth", openers=OPENERS)
    view = LetterboxView(SIZE)(cv2.imread(str(pictures / "red.png"))[..., ::-1])
    pixels = ((view / 255 - MEAN) / STD).transpose(2, 0, 1)[None]
    with torch.no_grad():
        want = net(torch.from_numpy(pixels).float()).sigmoid().numpy()
    np.testing.assert_allclose(predictor.probabilities(view[None]), want, rtol=1e-4)


def test_the_readme_s_flags(models, pictures, tmp_path):
    words = [models / "jit_softmax.pt", pictures, "--topk", 2, "--output", tmp_path, "--threads", 1]
    done = run_main(classifier.main, words)
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if ".png: " in line]
    assert len(lines) == 3 and all(line.count(",") == 1 for line in lines)
    for name in CLASSES:
        (line,) = [one for one in lines if f"{name}.png" in one]
        image = cv2.imread(str(next(pictures.rglob(f"{name}.png"))))[..., ::-1]
        assert f": {name} {by_hand(image, 'softmax').max():.3f}"[:-1] in line
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert run_main(classifier.main, [models / "jit_softmax.pt", "--webcam", 93]).code == 1


def test_files_of_the_first_versions_are_read_too():
    old = {"project": "torch_cls_zoo", "architecture": "net", "class_names": CLASSES,
           "input_size": [3, *SIZE], "mean": MEAN, "std": STD, "criterion": "bce"}  # fmt: skip
    facts = facts_from_file(json.dumps(old), where="x")
    assert facts.class_names == tuple(CLASSES) and facts.input_size == SIZE
    assert facts.activation == "sigmoid" and facts.mean == MEAN
    for text in ("", "nonsense", "[1]", "{}"):
        with pytest.raises(ModelError, match="x: does not say its class_names"):
            facts_from_file(text, where="x")


def test_what_is_no_model_of_the_zoo_is_one_line(models, tmp_path):
    (tmp_path / "other.pt").write_bytes(b"nothing")
    (tmp_path / "other.onnx").write_bytes(b"nothing")
    torch.jit.save(torch.jit.trace(nn.Flatten(), torch.zeros(1, 2)), str(tmp_path / "plain.pt"))
    bare = onnx.load(str(models / "softmax.onnx"))
    del bare.metadata_props[:]
    onnx.save(bare, str(tmp_path / "bare.onnx"))
    for name, message in (
        ("none.pt", "does not exist"),
        ("other.pt", "no TorchScript file"),
        (models / "softmax.pt2", "is no model that this command knows"),
        ("other.onnx", "ONNX Runtime cannot open it"),
        ("plain.pt", "does not say its class_names"),
        ("bare.onnx", "does not say its classes"),
    ):
        done = run_main(classifier.main, [tmp_path / name, tmp_path])
        assert done.code == 1 and message in done.err, (name, done.err)
        assert done.err.count("\n") == 1


def test_the_onnx_file_says_what_it_is(models):
    content = onnx.load(str(models / "softmax.onnx"))
    (text,) = [entry.value for entry in content.metadata_props if entry.key == METADATA_KEY]
    assert facts_from_file(text, where="x").class_names == tuple(CLASSES)
    extra = {FACTS: ""}
    torch.export.load(str(models / "softmax.pt2"), extra_files=extra)
    assert facts_from_file(extra[FACTS], where="x").input_size == SIZE
