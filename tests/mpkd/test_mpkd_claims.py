"""The trials of the claims: what is said against hand-made numbers, stop and go on, refusals."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from mpkd import claims
from mpkd.experiments import bench, claims_page
from mpkd.experiments.claim_arms import ARMS, CLAIMS, DECIDED, EQUAL, FP32, Claim, Pair, arms_of
from mpkd.experiments.claims_page import judge, summarise_claims
from mpkd.experiments.recipes import Setting
from mpkd.quant.settings import QuantSettings
from mpkd.utils.common import load_net
from mpkd.utils.config import load_config
from shared_core.runs import read_result
from shared_core.trials import Cell, Trials

T_OF_TWO = 4.302652729911275  # 97.5 % of Student's t with 2 degrees of freedom, from a table
TINY = {
    "dataset.name": "digits", "dataset.image_size": 8, "dataset.max_images": 160,
    "dataset.workers": 0, "experiment.epochs": 1, "experiment.batch_size": 32,
    "model.student_widths": [8, 16, 16], "model.teacher_model": "simple_cnn", "teacher.epochs": 4,
    "teacher.learning_rate": 0.01, "distillation.views": 1, "quantization.epochs": 1,
    "quantization.calib_samples": 64, "quantization.candidates": [2, 3, 4],
    "logging.log_interval": 0,
}  # fmt: skip


def trials_of(accuracies: dict[str, list[float]]) -> Trials:
    cells = [Cell(n, {}, s) for n, values in accuracies.items() for s in range(len(values))]
    results = {
        (name, seed): {"test_accuracy": value, "agreement": 1.0}
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    }
    return Trials(tuple(cells), results, 0.0)


def one(a: list[float], b: list[float], *, least: float = 0.0, **more) -> dict:
    """The verdict on a single pair."""
    trials = trials_of({"a": a, "b": b, FP32: [1.0] * len(a)})
    return judge(trials, Claim("says", "source", (Pair("a", "b", least=least),), **more))


def test_a_paired_difference_is_the_hand_made_one():
    found = one([0.7, 0.9, 0.8], [0.6, 0.6, 0.6])["pairs"]["a - b"]
    reach = T_OF_TWO * 0.1 / math.sqrt(3)
    assert found["mean"] == pytest.approx(0.2)
    assert found["values"] == pytest.approx([0.1, 0.3, 0.2])
    assert found["interval"]["low"] == pytest.approx(0.2 - reach)
    assert found["interval"]["high"] == pytest.approx(0.2 + reach)
    assert found["interval"]["wins"] == 3
    assert found["text"].startswith("+20.0 points (95 % interval -4.8 to +44.8, 3 of 3 seeds)")
    assert found["verdict"] == "not shown"  # the interval holds 0


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([0.8, 0.81, 0.8], [0.6, 0.6, 0.6], "holds"),
        ([0.6, 0.6, 0.6], [0.8, 0.81, 0.8], "contradicted"),
        ([0.8, 0.6, 0.7], [0.7, 0.7, 0.7], "not shown"),
        ([0.8], [0.6], "one seed only"),
        ([0.8, 0.7], [0.8, 0.7], "no difference"),
    ],
)
def test_a_claim_holds_only_beyond_its_interval(a, b, verdict):
    assert one(a, b)["verdict"] == verdict


def test_tens_of_points_means_tens_of_points():
    a, b = [0.65, 0.66, 0.65], [0.6, 0.6, 0.6]
    assert one(a, b)["verdict"] == "holds"
    assert one(a, b, least=0.1)["verdict"] == "less than claimed"


def test_equal_means_an_interval_that_is_narrow_enough():
    level = [0.9, 0.9, 0.9]
    assert one([0.9, 0.905, 0.9], level, equal=True)["verdict"] == "holds"
    assert one([0.9, 0.95, 0.85], level, equal=True)["verdict"] == "not shown"
    worse = [value - EQUAL - 0.05 for value in level]
    assert one(worse, level, equal=True)["verdict"] == "contradicted"


def test_the_closed_share_of_a_gap():
    found = one([0.95, 0.96, 0.97], [0.8, 0.8, 0.8], gap=True)["pairs"]["a - b"]
    assert found["gap"] == pytest.approx(0.2) and found["closed"] == pytest.approx(0.8)
    assert found["verdict"] == "holds" and "of which 80 % are closed" in found["text"]
    less = one([0.85, 0.86, 0.85], [0.8, 0.8, 0.8], gap=True)
    assert less["verdict"] == "less than claimed"
    none = one([0.999, 1.0, 0.999], [0.998, 0.998, 0.998], gap=True)
    assert none["verdict"] == "no gap to close"


def test_the_whole_is_no_more_than_its_parts_and_controls_do_not_count():
    rows = trials_of({"up": [0.8, 0.81, 0.8], "down": [0.4, 0.41, 0.4], "level": [0.6] * 3})
    up, down = Pair("up", "level"), Pair("down", "level")
    assert judge(rows, Claim("", "", (up, down)))["verdict"] == "holds in part"
    assert judge(rows, Claim("", "", (up, Pair("down", "level", claimed=False))))["verdict"] == (
        "holds"
    )
    assert judge(rows, Claim("", "", (down,)))["verdict"] == "contradicted"


def test_every_arm_is_a_sound_configuration_and_every_claim_has_its_arms():
    known = load_config()
    for name, arm in ARMS.items():
        assert arm.kind in ("train", "scratch", "quantize"), name
        assert set(arm.changes) <= set(known), name
        changes = {k: v for k, v in arm.changes.items() if k != "quantization.epochs"}
        load_config(None, (), overrides=changes)  # every value is of the right type
    assert {k.partition(".")[2] for k in DECIDED if k.startswith("quantization.")} <= set(
        QuantSettings.__dataclass_fields__
    )
    for claim in CLAIMS.values():
        assert set(claim.arms()) <= set(ARMS)
    assert arms_of(["precision"]) == [FP32, "bf16", "fp16"]
    assert set(arms_of(list(CLAIMS))) == set(ARMS)  # none is made for nothing
    assert "quantization.w_bits" in DECIDED


@pytest.fixture
def asked(monkeypatch):
    """What the sweep would be asked for."""
    seen = []
    monkeypatch.setattr(claims_page, "run_sweep", lambda options, **_: seen.append(options) or 0)
    return seen


def test_a_data_set_takes_the_place_of_the_digits(tmp_path, asked, command):
    assert command("--data-path", tmp_path, "--what", "brecq", entry=claims.main).code == 0
    config = asked[0].config
    assert config["dataset.name"] == "cifar10" and asked[0].data_root is None
    assert config["dataset.data_dir_cifar10"] == str(tmp_path)
    assert config["dataset.max_images"] == 5_000  # the record will say "subset"
    assert str(asked[0].output).endswith("claims-cifar10")
    assert command(entry=claims.main).code == 0
    assert asked[1].config["dataset.name"] == "digits" and asked[1].start == "continue"
    assert asked[1].threads == 1 and asked[1].seeds == (0, 1, 2)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(claims, "CLAIMS_DIGITS", Setting(TINY))


def test_trials_are_stopped_and_go_on_and_the_record_is_of_the_files(
    tmp_path, tiny, monkeypatch, command
):
    folder = tmp_path / "trials with space"
    words = ("--output", folder, "--what", "precision", "apprentice", "haq", "--seeds", 0, 1)
    measure, made = bench.Bench.measure, []

    def stopping(self, cell, work):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append((cell.name, cell.seed))
        return measure(self, cell, work)

    with monkeypatch.context() as patch:
        patch.setattr(bench.Bench, "measure", stopping)
        assert command(*words, entry=claims.main).code == 130

    def cells():
        return {p.parent.name: p.read_text() for p in folder.glob("cells/*/cell.json")}

    before = cells()
    done = command(*words, entry=claims.main)
    assert done.code == 0, done.err
    after = cells()
    assert len(before) == 5 and {k: after[k] for k in before} == before  # nothing made twice
    record = read_result(folder / "result.json")
    assert record["scale"] == "rehearsal" and record["data"]["kind"] == "built-in"
    assert record["seeds"] == [0, 1]
    measured = record["measured"]
    for arm, said in measured["arms"].items():
        name = Cell(arm, {}, 0).folder_name.removesuffix("-s0")
        runs = [json.loads(after[f"{name}-s{s}"])["result"]["test_accuracy"] for s in (0, 1)]
        assert said["accuracy"]["values"] == runs
        assert said["accuracy"]["std"] == pytest.approx(statistics.stdev(runs))
    assert set(measured["claims"]) == {"precision", "apprentice", "haq"}
    for arm in ("uniform 3 bits, PTQ", "HAQ, PTQ", "HAQ, QAT"):
        assert max(measured["arms"][arm]["mean_bits"]["values"]) <= 3.0  # equal cost
    ends = measured["arms"]["QAT W2A4, labels"]["w_bits"][0]
    assert set(ends.values()) == {2, 8}  # the ends have 8
    assert set(measured["arms"]["QAT W2A4, labels"]["w_levels"][0].values()) == {3, 255}
    own = folder / "cells" / "fp32-s1" / "run" / "checkpoints"
    _, facts = load_net(own / "student.pth")
    assert facts["metrics"]["test_accuracy"] == measured["arms"][FP32]["accuracy"]["values"][1]
    scheme = folder / "cells" / "scheme-A-W2A4-s0" / "run" / "checkpoints"
    assert (scheme / "teacher.pth").exists()  # scheme A's teacher is not the shared one
    text = (folder / "report.md").read_text()
    assert "REHEARSAL" in text and "HAQ, PTQ - uniform 3 bits, PTQ" in text
    assert (folder / "claims.png").stat().st_size > 10_000
    assert done.out.splitlines()[-1].startswith("REHEARSAL")
    wider = command(*words[:2], "--what", "precision", "--seeds", 0, 1, entry=claims.main)
    assert wider.code == 0, wider.err  # other claims of the same folder: its cells are used
    assert cells() == after
    other = command(*words, "--set", "experiment.epochs=2", entry=claims.main)
    assert other.code == 1 and "experiment.epochs" in other.err


def test_one_seed_has_no_deviation_and_no_interval():
    found = summarise_claims(
        trials_of({name: [0.9] for name in CLAIMS["precision"].arms()}), ["precision"]
    )
    assert found["arms"][FP32]["accuracy"]["std"] is None
    assert found["claims"]["precision"]["pairs"]["bf16 - fp32"]["interval"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--what", "magic"], 2, "invalid choice"),
        (["--seeds", "1", "1"], 2, "different numbers"),
        (["--seeds", "-1"], 2, "--seeds"),
        (["--threads", "0"], 2, "--threads"),
        (["--shard", "1/2", "--fresh"], 2, "no --shard"),
        (["--data-path", "none"], 1, "there is nothing"),
        (["--data-root", "none"], 1, "there is nothing"),
        (["--data-root", ".", "--data-path", "."], 2, "expected one of them"),
        (["--set", "quantization.w_bits=3"], 2, "the arms of the claims decide"),
        (["--set", "experiment.epoch=1"], 2, "perhaps experiment.epochs"),
        (["--data-root", "."], 1, "CIFAR-10 is not at"),
        (["--device", "abacus"], 2, "abacus"),
    ],
)
def test_bad_input(tmp_path, monkeypatch, command, argv, code, said):
    monkeypatch.chdir(tmp_path)
    done = command(*argv, entry=claims.main)
    assert done.code == code and said in done.err
    assert "Traceback" not in done.err
