"""What a model folder says of its network: read as written, refused when it makes no sense."""

import json
import re

import float_networks as nets
import numpy as np
import pytest

from shared_core.datasets import EvalView
from shared_core.datasets.views.evaluation import LetterboxView, rebuild_view
from shared_core.deploy.facts import Exits, ModelError, ModelFacts, read_facts, write_facts

STATE = {"version": 1, "kind": "gate", "thresholds": [0.5, 0.4], "temperatures": [1.0, 1.0, 2.0]}
EXITS = Exits(
    after=(1, 4), costs=(1.0, 2.0, 3.0), plain_cost=2.5, learned_gates=True, policy=STATE,
    points={"fast": STATE}, rules={"gate": STATE},
)  # fmt: skip
SEGMENTS = {"onnx": ("a.onnx", "b.onnx", "c.onnx")}


def test_what_is_written_is_read(tmp_path):
    facts = nets.facts(
        exits=EXITS, files={**SEGMENTS, "own": ("x.bin",)}, default="own", temperature=1.5,
        sha256={"x.bin": "0f" * 32}, unknown_threshold=np.float32(0.25), bgr=True,
        activation="sigmoid", costs={"macs": np.int64(7)}, more={"nested": {"list": [1, "é"]}},
    )  # fmt: skip
    write_facts(tmp_path, facts)
    assert read_facts(tmp_path) == read_facts(tmp_path / "model.json")
    read = read_facts(tmp_path)
    assert read == ModelFacts.from_dict(facts.as_dict())
    assert read.exits == EXITS and read.files == facts.files and read.class_names == nets.CLASSES
    assert (read.temperature, read.bgr, read.unknown_threshold) == (1.5, True, 0.25)
    assert read.costs["macs"] == 7 and read.more == {"nested": {"list": [1, "é"]}}
    stored = json.loads((tmp_path / "model.json").read_text(encoding="utf-8"))
    assert stored["schema"] == "smallvision.model/1"


@pytest.mark.parametrize(
    "view",
    [
        EvalView((8, 6), resize_ratio=1 / 0.875, method="cubic"),
        EvalView(8, resize_ratio=None, method="area", dct_scaled=False),
        LetterboxView((8, 6), fill=114, method="linear"),
        LetterboxView(8),
    ],
)
def test_a_predictor_gets_the_pixels_of_evaluation(view):
    image = nets.images(1, (37, 23))[0]
    facts = nets.facts(input_size=view.size, view=view.settings())
    again = ModelFacts.from_dict(json.loads(json.dumps(facts.as_dict()))).make_view()
    np.testing.assert_array_equal(again(image), view(image))
    assert again.settings() == view.settings()


def test_a_letterbox_keeps_the_whole_image_in_the_middle():
    image = np.full((10, 20, 3), 200, np.uint8)
    seen = LetterboxView((8, 8), fill=9)(image)
    assert (seen[2:6] == 200).all() and (seen[:2] == 9).all() and (seen[6:] == 9).all()
    for words in ({"fill": 256}, {"method": "best"}, {"size": 0}):
        with pytest.raises(ValueError):
            LetterboxView(**{"size": 8, **words})


BROKEN = [
    ({"schema": "smallvision.model/2"}, "has the schema 'smallvision.model/2'"),
    ({"project": ""}, "project is ''"),
    ({"task": "segment"}, "task is 'segment', expected one of classify, embed"),
    ({"class_names": ["a", "a"]}, "class_names holds 'a' twice"),
    ({"class_names": ["a", 3]}, "something that is no name"),
    ({"class_names": []}, "0 for task classify, expected at least one"),
    ({"task": "embed", "activation": "unit"}, "3 for task embed, expected none"),
    ({"class_names": "abc"}, "class_names is 'abc', expected a list"),
    ({"input_size": [6, 4, 3]}, "expected height and width"),
    ({"input_size": [6, True]}, "input_size holds True"),
    ({"input_size": [4, 6]}, "view makes (6, 4), expected input_size (4, 6)"),
    ({"std": [0.1, 0, 0.1]}, "std above 0"),
    ({"mean": [0.1, "x", 0.1]}, "mean holds 'x'"),
    ({"view": {"view": "train", "size": [6, 4]}}, "view 'train', expected one of eval, letterbox"),
    ({"view": {"view": "eval", "size": [6, 4], "ratio": 1}}, "unexpected keyword argument 'ratio'"),
    ({"view": {"view": "eval", "size": [6, 4]}}, "view 'eval' lacks 'dct_scaled'"),
    ({"view": []}, "view is list, expected an object"),
    ({"activation": "unit"}, "expected softmax or sigmoid for task classify"),
    ({"temperature": 0}, "temperature is 0, expected more than 0"),
    ({"temperature": None}, "temperature holds None"),
    ({"bgr": 1}, "bgr is 1, expected true or false"),
    ({"unknown_threshold": 1.5}, "unknown_threshold is 1.5"),
    ({"files": {"onnx": ["../model.onnx"]}}, "'../model.onnx', expected a file's name"),
    ({"files": {"onnx": ["C:\\model.onnx"]}}, "expected a file's name"),
    ({"files": {"onnx": [".."]}}, "expected a file's name"),
    ({"files": {"onnx": ["a.onnx", "b.onnx"]}}, "files.onnx names 2 files, expected 1"),
    ({"files": {"onnx": []}}, "files.onnx names 0 files"),
    ({"default": "tpu"}, "default is 'tpu', expected one of onnx"),
    ({"sha256": {"model.onnx": "12"}}, "expected 64 hexadecimal digits"),
    ({"exits": {"after": [1]}}, "lacks exits.costs"),
    ({"surprise": 1}, "holds surprise, which this version does not know"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_description_that_makes_no_sense_is_refused_in_one_line(tmp_path, change, message):
    values = {**nets.facts(files={"onnx": ("model.onnx",)}).as_dict(), **change}
    (tmp_path / "model.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=re.escape(message)) as caught:
        read_facts(tmp_path)
    assert str(tmp_path / "model.json") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"after": (4, 1)}, "increasing blocks"),
        ({"costs": (1.0, 2.0)}, "one cost more than there are exits"),
        ({"policy": {**STATE, "thresholds": [0.5] * 3}}, "exits.policy: exit policy: got 3"),
        ({"points": {"fast": {**STATE, "kind": "luck"}}}, "exits.points.fast: exit policy"),
        ({"learned_gates": 1}, "learned_gates is 1"),
    ],
)
def test_exits_that_make_no_sense_are_refused(change, message):
    values = {name: getattr(EXITS, name) for name in EXITS.__dataclass_fields__}
    with pytest.raises(ModelError, match=re.escape(message)):
        Exits(**{**values, **change})


def test_missing_entries_and_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder that an export wrote"):
        read_facts(tmp_path)
    for text, message in (("{", "no JSON"), ("[]", "schema 'list'"), ("\xff", "no JSON")):
        (tmp_path / "model.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ModelError, match=message):
            read_facts(tmp_path)
    values = nets.facts().as_dict()
    del values["mean"]
    with pytest.raises(ModelError, match="lacks mean"):
        ModelFacts.from_dict(values)
    with pytest.raises(ModelError, match="JSON cannot hold"):
        nets.facts(measured={"loss": float("nan")}).as_dict()


def test_classes_are_compared_by_name_and_order():
    facts = nets.facts()
    facts.check_class_names(list(nets.CLASSES), who="the data")
    for names, message in (
        (("left", "right", "middle"), "class 1 is 'middle' against 'right'"),
        (("left", "middle", "up"), "class 2 is 'right' against 'up'"),
        (("left", "middle"), "3 classes against 2, 'right' is in one alone"),
    ):
        with pytest.raises(ModelError, match=f"other classes than the data: {message}"):
            facts.check_class_names(names, who="the data")


@pytest.mark.parametrize("bgr", [False, True])
def test_normalisation_is_the_formula(bgr):
    pixels = nets.images(2)
    got = nets.facts(bgr=bgr).normalise(pixels)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    np.testing.assert_allclose(got, nets.normalised(pixels, bgr=bgr), atol=1e-6)


def test_rebuilding_wants_a_size():
    with pytest.raises(ValueError, match="expected height and width"):
        rebuild_view({"view": "eval", "size": 6})
