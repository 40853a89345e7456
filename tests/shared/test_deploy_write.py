"""A model folder: written from a network, it answers as the network did, or is not written."""

import hashlib
import json
import os
import re
from dataclasses import replace

import cv2
import float_networks as nets
import numpy as np
import pytest

from shared_core.deploy import making, staging
from shared_core.deploy.check import ExportError
from shared_core.deploy.exit_policy import NEVER, ExitPolicy
from shared_core.deploy.facts import Exits, ModelError, read_facts
from shared_core.deploy.predictor import ExitPredictor, open_model
from shared_core.deploy.session import open_session
from shared_core.deploy.staging import check_export_folder
from shared_core.deploy.write import (
    Calibration,
    Form,
    Int8Wish,
    generated_images,
    write_model_folder,
)
from shared_core.runs import UsageError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
WEIGHTS = nets.layers(16, 12, 3, scale=3.0)
TEST = nets.images(90, seed=21)
LABELS = nets.outputs(TEST, WEIGHTS).argmax(axis=1)
LABELS[:9] = (LABELS[:9] + 1) % 3  # accuracy 0.9
CALIBRATION = Calibration(nets.images(60, seed=22))
FACTS = nets.facts(
    temperature=1.5, costs={"macs": 1.5e6, "parameters": 2e6},
    provenance={"data": "noise", "split_hash": "abc", "initial_weights": {"licence": "MIT"}},
)  # fmt: skip


def network(pixels):
    return nets.softmax(nets.outputs(pixels, WEIGHTS), 1.5)


def batches(pixels=TEST, labels=LABELS, size=40):
    for i in range(0, len(pixels), size):
        yield pixels[i : i + size], None if labels is None else labels[i : i + size]


def write(folder, **changes):
    words = {"facts": FACTS, "network": network, "sources": [nets.network(WEIGHTS)],
             "test": batches()}  # fmt: skip
    return write_model_folder(folder, **{**words, **changes})


def timed(runs, images, *, batches=(1, 16), fast="int8"):
    """A clock by which int8 is twice as fast."""
    ms = {name: 1.0 if fast in name else 2.0 for name in runs}
    return {n: {str(b): {"cpu_ms": ms[n], "wall_ms": 9.0} for b in batches} for n in runs}


@pytest.fixture
def int8_is_fast(monkeypatch):
    from shared_core.deploy import contract

    monkeypatch.setattr(contract, "measure_latency", timed)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("export") / "a model")


def test_the_folder_answers_as_the_network(plain):
    names = sorted(path.name for path in plain.folder.iterdir())
    assert names == ["README.md", "model.json", "model.onnx"]
    assert [p.name for p in plain.folder.parent.iterdir()] == ["a model"]  # nothing is left beside
    predictor = open_model(plain.folder)
    np.testing.assert_allclose(predictor.probabilities(TEST), network(TEST), atol=1e-5)
    alone = open_model(plain.folder / "model.onnx")
    np.testing.assert_array_equal(alone.probabilities(TEST), predictor.probabilities(TEST))
    assert alone.facts.temperature == 1.5 and alone.facts.files == {"onnx": ("model.onnx",)}


def test_what_is_recorded_can_be_counted_again(plain):
    facts = read_facts(plain.folder)
    assert facts == plain.facts and facts.default == "onnx"
    file = plain.folder / "model.onnx"
    correct = int((open_model(plain.folder).probabilities(TEST).argmax(axis=1) == LABELS).sum())
    assert correct == 81
    accuracy = facts.measured["accuracy"]
    assert (accuracy["value"], accuracy["images"]) == (0.9, 90)
    z, p, n = 1.959963984540054, 0.9, 90  # Wilson's interval, by its formula
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    np.testing.assert_allclose(
        [accuracy["low"], accuracy["high"]],
        [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)],
    )
    row = facts.measured["files"]["onnx"]
    assert row["agreement"] == {"images": 90, "same_class": 1.0,
                                "max_distance": row["agreement"]["max_distance"]}  # fmt: skip
    assert 0 < row["agreement"]["max_distance"] < 1e-5
    assert row["bytes"] == facts.costs["bytes"] == {"model.onnx": file.stat().st_size}
    assert facts.sha256 == {"model.onnx": hashlib.sha256(file.read_bytes()).hexdigest()}
    assert facts.measured["network_accuracy"] == accuracy
    assert set(row["latency"]) == {"1", "16"} and row["latency"]["1"]["cpu_ms"] > 0
    assert facts.measured["judged_on"] == "test" and facts.measured["hardware"]["cpu"]
    assert facts.provenance == FACTS.provenance and facts.costs["macs"] == 1.5e6
    assert plain.int8 is None and any("accuracy 0.9000" in line for line in plain.lines)


def test_the_card_says_what_a_stranger_asks(plain, monkeypatch):
    card = (plain.folder / "README.md").read_text(encoding="utf-8")
    texts = ("`left`, `middle`, `right`", "90.00 % (95 % interval 82.08 to 94.65)", "noise",
                 "licence: MIT", "smallvision predict a model", "1.5 million multiply",
                 "6 x 4 pixels", "squeezed", "no answer for an image of another class")  # fmt: skip
    assert [text for text in texts if text not in card] == []
    # The lines of Python run.
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    monkeypatch.chdir(plain.folder.parent)
    cv2.imwrite("photo.jpg", TEST[0])
    exec(code, {})
    os.remove("photo.jpg")


WRONG = [
    lambda pixels: nets.softmax(nets.outputs(pixels, WEIGHTS)),  # another temperature
    lambda pixels: network(pixels)[:, [1, 0, 2]],
    lambda pixels: nets.softmax(nets.outputs(pixels[..., ::-1], WEIGHTS), 1.5),
]


@pytest.mark.parametrize("other", WRONG)
def test_a_file_that_answers_otherwise_is_refused_and_the_earlier_export_stays(tmp_path, other):
    before = write(tmp_path / "export")
    with pytest.raises(ExportError, match="model.onnx does not answer as its network"):
        write(tmp_path / "export", network=other)
    assert read_facts(tmp_path / "export") == before.facts
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_every_image_of_the_split_is_asked(tmp_path):
    last = TEST[-1]

    def odd(pixels):
        answers = network(pixels)
        wrong = (pixels == last).all(axis=(1, 2, 3))
        answers[wrong] = np.roll(answers[wrong], 1, axis=1)
        return answers

    write(tmp_path / "export", network=odd, test=batches(TEST[:-1], LABELS[:-1]))
    with pytest.raises(ExportError, match="98.89 % of 90 images"):
        write(tmp_path / "export", network=odd)
    with pytest.raises(ExportError, match="no image to check the files with"):
        write(tmp_path / "export", test=[])
    write(tmp_path / "export", network=odd, max_distance=1.0)  # one image may differ


def test_int8_is_shipped_as_it_was_measured(tmp_path, int8_is_fast):
    dark = Calibration(CALIBRATION.images // 3)  # ranges so narrow that some answers change
    written = write(tmp_path / "export", calibration=dark,
                    int8=Int8Wish("auto", max_accuracy_loss=1.0))  # fmt: skip
    facts = read_facts(tmp_path / "export")
    assert written.int8.kept and facts.default == "onnx-int8"
    assert facts.files == {"onnx": ("model.onnx",), "onnx-int8": ("model.int8.onnx",)}
    got = open_session(tmp_path / "export" / "model.int8.onnx").run(None, {"images": TEST})[0]
    accuracy = float((got.argmax(axis=1) == LABELS).mean())
    assert facts.measured["accuracy"]["value"] == pytest.approx(accuracy)
    assert accuracy != facts.measured["network_accuracy"]["value"] == 0.9
    row = facts.measured["files"]["onnx-int8"]
    truth = network(TEST)
    assert row["agreement"]["max_distance"] == pytest.approx(np.abs(got - truth).max(), rel=1e-6)
    assert row["agreement"]["same_class"] == (got.argmax(1) == truth.argmax(1)).mean()
    assert facts.measured["int8"]["kept"] is True and 1e-4 < row["agreement"]["max_distance"]
    alone = open_model(tmp_path / "export" / "model.int8.onnx")
    assert alone.runtime == "onnx-int8"
    assert open_model(tmp_path / "export").runtime == "onnx-int8"
    assert "int8 kept" in written.lines[-1]
    # The next export without int8 leaves nothing of it.
    write(tmp_path / "export")
    assert not (tmp_path / "export" / "model.int8.onnx").exists()
    assert read_facts(tmp_path / "export").default == "onnx"


def test_half_of_the_calibration_images_judge(tmp_path, monkeypatch, int8_is_fast):
    seen = {}
    real = making.quantize_within

    def spy(sources, targets, images, *, judge, **words):
        seen.update(images=images, score=judge(sources), **words)
        return real(sources, targets, images, judge=judge, **words)

    monkeypatch.setattr(making, "quantize_within", spy)
    pixels = CALIBRATION.images
    labels = nets.outputs(pixels, WEIGHTS).argmax(axis=1)
    labels[::4] = (labels[::4] + 1) % 3  # of every second image every second
    wish = Int8Wish("auto", max_accuracy_loss=0.125, settings={"scheme": "s8s8"})
    write(tmp_path / "a", calibration=Calibration(pixels, labels), int8=wish)
    np.testing.assert_array_equal(seen["images"], pixels[1::2])
    assert seen["score"] == 0.5 and seen["scheme"] == "s8s8"
    assert (seen["max_accuracy_loss"], seen["min_speedup"]) == (0.125, 1.0)
    write(tmp_path / "b", calibration=CALIBRATION, int8=Int8Wish("yes", judge=lambda run: 0.75))
    np.testing.assert_array_equal(seen["images"], pixels)
    assert seen["score"] == 0.75 and seen["min_speedup"] is None


def test_int8_that_loses_on_test_is_refused(tmp_path, int8_is_fast):
    def ruin(run):  # a judge that sees nothing
        return 1.0

    weights = [100 * weight for weight in WEIGHTS]
    weights[1] = weights[1].copy()
    weights[1][:, 0] = np.abs(weights[1][:, 0]) * 1e5
    weights[2] = weights[2].copy()
    weights[2][0] = 0
    labels = nets.outputs(TEST, weights).argmax(axis=1)
    words = {
        "network": lambda pixels: nets.softmax(nets.outputs(pixels, weights), 1.5),
        "sources": [nets.network(weights)], "calibration": CALIBRATION, "max_distance": 1e-2,
    }  # fmt: skip
    written = write(tmp_path / "export", test=batches(TEST, labels),
                    int8=Int8Wish("auto", judge=ruin), **words)  # fmt: skip
    assert not written.int8.kept and "on the 90 test images it loses 0." in written.int8.reason
    assert sorted(p.name for p in written.folder.iterdir()) == ["README.md", "model.json",
                                                                "model.onnx"]  # fmt: skip
    facts = read_facts(written.folder)
    assert facts.default == "onnx" and list(facts.measured["files"]) == ["onnx"]
    assert facts.measured["accuracy"]["value"] == 1.0 and not facts.measured["int8"]["kept"]
    assert "refused: on the 90 test images" in (written.folder / "README.md").read_text()


def test_a_loss_on_test_within_its_interval_chooses_nothing(tmp_path, int8_is_fast):
    pixels = nets.images(300, seed=22)
    labels = nets.outputs(pixels, WEIGHTS).argmax(axis=1)
    wish = Int8Wish("auto", max_accuracy_loss=0.0, judge=lambda run: 1.0)
    written = write(tmp_path / "export", test=batches(pixels, labels), calibration=CALIBRATION,
                    int8=wish)  # fmt: skip
    rows = written.facts.measured["files"]
    assert rows["onnx-int8"]["accuracy"]["value"] < rows["onnx"]["accuracy"]["value"]
    assert written.int8.kept and written.facts.default == "onnx-int8"


def test_slow_int8_is_refused_unless_it_was_asked_for(tmp_path, monkeypatch):
    from shared_core.deploy import contract

    def slow(*args, **words):
        return timed(*args, **words, fast="float")

    monkeypatch.setattr(contract, "measure_latency", slow)
    for mode, kept in (("auto", False), ("yes", True)):
        written = write(tmp_path / mode, calibration=CALIBRATION,
                        int8=Int8Wish(mode, max_accuracy_loss=0.1))  # fmt: skip
        assert written.int8.kept is kept is (written.folder / "model.int8.onnx").exists()
        assert written.facts.default == "onnx"  # which is faster here


def test_without_a_split_accuracy_is_not_said(tmp_path):
    written = write(tmp_path / "export", test=None)
    facts = read_facts(tmp_path / "export")
    assert facts.measured["accuracy"] is facts.measured["network_accuracy"] is None
    assert facts.measured["files"]["onnx"]["agreement"]["images"] == 64
    assert "accuracy was not measured" in facts.measured["judged_on"]
    assert "Accuracy was not measured" in (written.folder / "README.md").read_text()
    with pytest.raises(ExportError):
        write(tmp_path / "export", test=None, network=WRONG[1])
    pictures = generated_images((9, 7))
    assert pictures.shape == (64, 9, 7, 3) and len(np.unique(pictures)) > 200
    np.testing.assert_array_equal(pictures, generated_images((9, 7)))
    # A split without labels: agreement alone.
    assert write(tmp_path / "export", test=batches(labels=None)).facts.measured["accuracy"] is None


def test_features_are_checked_and_judged_by_their_angle(tmp_path, int8_is_fast):
    facts = nets.facts(task="embed", activation="unit", class_names=())

    def features(pixels):
        rows = nets.outputs(pixels, WEIGHTS)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    words = {"facts": facts, "network": features, "calibration": CALIBRATION}
    written = write(tmp_path / "export", int8=Int8Wish("auto"), **words)
    held = CALIBRATION.images[::2]
    got = open_model(written.folder, runtime="onnx-int8").probabilities(held)
    cosine = (got * open_model(written.folder, runtime="onnx").probabilities(held)).sum(1).mean()
    assert written.int8.int8_score == pytest.approx(cosine, abs=1e-4)
    assert written.facts.measured["accuracy"] is None
    assert written.facts.measured["files"]["onnx"]["agreement"]["same_class"] is None
    with pytest.raises(ExportError, match="largest distance"):
        write(tmp_path / "export", **{**words, "network": lambda x: features(x)[:, ::-1]})


def test_a_projects_own_form_is_checked_like_the_rest(tmp_path):
    def form(scale, **words):
        def save(folder):
            (folder / "own.bin").write_bytes(b"weights")
            return ["own.bin"]

        def load(folder):
            assert (folder / "own.bin").read_bytes() == b"weights"
            return lambda pixels: network(pixels) * scale

        return {"own": Form(save, load, **words)}

    written = write(tmp_path / "both", forms=form(1.0))
    assert written.facts.files == {"onnx": ("model.onnx",), "own": ("own.bin",)}
    assert written.facts.measured["files"]["own"]["accuracy"]["value"] == 0.9
    with pytest.raises(ExportError, match="own.bin does not answer"):
        write(tmp_path / "both", forms=form(0.9))
    written = write(tmp_path / "both", forms=form(0.9, exact=False), sources=())
    assert written.facts.default == "own" and written.facts.files == {"own": ("own.bin",)}
    assert "By the commands of `by-hand`" in (written.folder / "README.md").read_text()
    lost = {"own": Form(lambda folder: ["nothing.bin"], lambda folder: network)}
    with pytest.raises(ExportError, match="nothing.bin was not written"):
        write(tmp_path / "both", forms=lost)


def test_only_an_earlier_export_is_replaced(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("my project")
    for name in ("README.md", "notes.txt", "model.onnx"):
        (folder / name).write_text("mine")
        with pytest.raises(UsageError, match=f"holds {name}, which no export wrote"):
            write(folder)
        assert [path.name for path in folder.iterdir()] == [name]
        (folder / name).unlink()
    (folder / "inside").mkdir()
    with pytest.raises(UsageError, match="holds inside"):
        check_export_folder(folder)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is a file, expected a folder"):
        write(tmp_path / "file")
    (folder / "inside").rmdir()
    write(folder)
    (folder / "mine.txt").touch()
    with pytest.raises(UsageError, match="holds mine.txt"):
        write(folder)
    with pytest.raises(ModelError):  # a description alone makes nothing ours
        (folder / "model.json").write_text("{}")
        read_facts(folder)
    with pytest.raises(UsageError):
        check_export_folder(folder)


def test_two_exports_do_not_write_to_one_folder(tmp_path):
    before = write(tmp_path / "export")
    other = tmp_path / "export" / f".export-{os.getppid()}"
    other.mkdir()
    with pytest.raises(UsageError, match="another export is being written to it"):
        write(tmp_path / "export")
    assert other.exists() and read_facts(tmp_path / "export") == before.facts


def test_a_killed_export_is_no_model_and_the_next_one_cleans_up(tmp_path, monkeypatch):
    folder = tmp_path / "export"
    write(folder)
    moves, real = [], os.replace

    def killed(source, target):
        if os.path.dirname(target) == str(folder):
            moves.append(os.path.basename(target))
            if moves[-1] == "model.json":
                raise KeyboardInterrupt  # what is left is what a kill here leaves
        real(source, target)

    form = {
        "own": Form(lambda f: [(f / "own.bin").write_bytes(b"1") and "own.bin"], lambda f: network)
    }
    with monkeypatch.context() as patched:
        patched.setattr(staging.os, "replace", killed)
        patched.setattr(staging.shutil, "rmtree", lambda *a, **k: None)
        with pytest.raises(KeyboardInterrupt):
            write(folder, forms=form)
    assert moves[-1] == "model.json" and len(moves) == 4  # it comes last
    assert not (folder / "model.json").exists() and (folder / "own.bin").exists()
    with pytest.raises((ModelError, FileNotFoundError)):
        open_model(folder)
    left = folder / f".export-{os.getpid()}"
    assert (left / "model.json").exists()
    left.rename(folder / ".export-999999999")  # of a process that is no more
    write(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "model.json", "model.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"sources": ()}, "nothing to write"),
        ({"int8": Int8Wish("auto")}, "int8 needs calibration images"),
        ({"int8": Int8Wish("yes"), "calibration": Calibration(TEST[:1])}, "at least two"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_work(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "export", **words)
    assert not (tmp_path / "export").exists()


def test_wishes_that_make_no_sense():
    for words in ({"mode": "maybe"}, {"max_accuracy_loss": -0.1}):
        with pytest.raises(ValueError, match="expected"):
            Int8Wish(**words)


# -- chains ---------------------------------------------------------------------------------------

BODY = [nets.layers(9, seed=1)[0], nets.layers(9, seed=2)[0][:9, :9].copy()]
HEADS = [nets.layers(3, seed=n)[0][:9] * 9 for n in (3, 12)]
POLICY = ExitPolicy("max_prob", 0.8, (1.0, 2.0))
CHAIN = nets.facts(
    exits=Exits(after=(2,), costs=(1.0, 4.0), plain_cost=3.9, policy=POLICY.state_dict())
)


def heads_by_hand(pixels, heads=HEADS):
    tokens, logits = nets.normalised(pixels).reshape(len(pixels), -1), []
    for body, head in zip(BODY, heads, strict=True):
        tokens = np.maximum(tokens @ body, 0)
        logits.append(tokens @ head)
    return logits


def exit_network(heads=HEADS, facts=CHAIN):
    def classify(pixels, policy):
        first, second = heads_by_hand(pixels, heads)
        leaves = policy.leave(0, first, None, {})
        return np.where(leaves[:, None], first, second), np.where(leaves, 0, 1)

    return ExitPredictor(facts, classify, runtime="by hand", name="network", has_gates=False)


def chain_sources():
    return [nets.segment(BODY[n], HEADS[n].astype(np.float32), first=n == 0, last=n == 1)
            for n in range(2)]  # fmt: skip


def write_chain(folder, **changes):
    answers = exit_network().outputs(TEST)
    words = {"facts": CHAIN, "network": exit_network(), "sources": chain_sources(),
             "test": batches(TEST, answers.values.argmax(axis=1))}  # fmt: skip
    return write_model_folder(folder, **{**words, **changes})


def test_a_chain_decides_and_answers_as_the_network(tmp_path, int8_is_fast):
    written = write_chain(tmp_path / "chain", calibration=CALIBRATION,
                          int8=Int8Wish("auto", max_accuracy_loss=0.2))  # fmt: skip
    names = ["README.md", "model.json", *(f"segment{n}{e}" for n in (0, 1)
                                          for e in (".int8.onnx", ".onnx"))]  # fmt: skip
    assert sorted(path.name for path in written.folder.iterdir()) == names
    truth = exit_network().outputs(TEST)
    assert set(truth.exits) == {0, 1}
    got = open_model(written.folder, runtime="onnx").outputs(TEST)
    np.testing.assert_array_equal(got.exits, truth.exits)
    np.testing.assert_allclose(got.values, truth.values, atol=1e-5)
    rows = written.facts.measured["files"]
    assert rows["onnx"]["accuracy"]["value"] == 1.0 == rows["onnx"]["agreement"]["same_exit"]
    rounded = open_model(written.folder, runtime="onnx-int8").outputs(TEST)
    share = (rounded.exits == truth.exits).mean()
    assert rows["onnx-int8"]["agreement"]["same_exit"] == pytest.approx(share)
    cost = np.array([1.0, 4.0])[truth.exits].mean()
    assert rows["onnx"]["agreement"]["mean_macs"] == pytest.approx(cost)
    assert set(written.facts.sha256) == set(names[2:])
    assert "Early exits cost 25%, 100%" in (written.folder / "README.md").read_text()


def test_every_head_and_decision_of_a_chain_is_checked(tmp_path):
    for wrong in (0, 1):  # a head that seldom or never answers under the policy, too
        heads = [head * (1.05 if n == wrong else 1.0) for n, head in enumerate(HEADS)]
        with pytest.raises(ExportError, match="largest distance"):
            state = ExitPolicy("max_prob", -1.0 if wrong else NEVER).state_dict()
            never = nets.facts(exits=replace(CHAIN.exits, policy=state))
            write_chain(tmp_path / "chain", facts=never, network=exit_network(heads, never))
    lower = ExitPolicy("max_prob", 0.6, (1.0, 2.0)).state_dict()
    other = nets.facts(exits=replace(CHAIN.exits, policy=lower))
    with pytest.raises(ExportError, match="of 90 images leave at another exit"):
        write_chain(tmp_path / "chain", network=exit_network(facts=other), min_same=0.85)
    assert not (tmp_path / "chain").exists()


def test_model_json_is_plain_text_of_one_schema(plain):
    values = json.loads((plain.folder / "model.json").read_text(encoding="utf-8"))
    assert values["schema"] == "smallvision.model/1" and values["project"] == "by-hand"
