"""The trials of the claims: what is said against hand-made numbers, stop and go on, refusals."""

from __future__ import annotations

import json
import math
import statistics

import pytest

from mpkd import claim_runs, claims
from mpkd.claim_arms import ARMS, CLAIMS, DECIDED, EQUAL, FP32, Claim, Pair, arms_of
from mpkd.claim_report import judge, spread, summarise_claims
from mpkd.recipes import Setting
from mpkd.utils.common import load_net
from mpkd.utils.config import load_config
from shared_core.runs import read_result

T_OF_TWO = 4.302652729911275  # 97.5 % of Student's t with 2 degrees of freedom, from a table
TINY = {
    "dataset.name": "digits", "dataset.image_size": 8, "dataset.max_images": 160,
    "dataset.workers": 0, "experiment.epochs": 1, "experiment.batch_size": 32,
    "model.student_widths": [8, 16, 16], "model.teacher_model": "simple_cnn", "teacher.epochs": 4,
    "teacher.learning_rate": 0.01, "distillation.views": 1, "quantization.epochs": 1,
    "quantization.calib_samples": 64, "quantization.candidates": [2, 3, 4],
    "logging.log_interval": 0,
}  # fmt: skip


def rows_of(**accuracies: list[float]) -> dict[str, list[dict[str, float]]]:
    return {
        name: [{"test_accuracy": value, "agreement": 1.0} for value in values]
        for name, values in accuracies.items()
    }


def one(a: list[float], b: list[float], *, least: float = 0.0, **more) -> dict:
    """The verdict on a single pair."""
    rows = rows_of(a=a, b=b, **{FP32: [1.0] * len(a)})
    return judge(rows, Claim("says", "source", (Pair("a", "b", least=least),), **more))


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
    rows = rows_of(up=[0.8, 0.81, 0.8], down=[0.4, 0.41, 0.4], level=[0.6, 0.6, 0.6])
    up, down = Pair("up", "level"), Pair("down", "level")
    assert judge(rows, Claim("", "", (up, down)))["verdict"] == "holds in part"
    assert judge(rows, Claim("", "", (up, Pair("down", "level", claimed=False))))["verdict"] == (
        "holds"
    )
    assert judge(rows, Claim("", "", (down,)))["verdict"] == "contradicted"


def test_every_arm_is_a_sound_configuration_and_every_claim_has_its_arms():
    known = load_config()
    beyond = {"finish", "symmetric", "ranges", "learned", "brecq_steps", "haq_episodes",
              "compare_uniform"}  # fmt: skip
    for name, arm in ARMS.items():
        assert arm.kind in ("train", "scratch", "quantize"), name
        for key in arm.changes:
            assert key in known or key.removeprefix("quantization.") in beyond, (name, key)
    for claim in CLAIMS.values():
        assert set(claim.arms()) <= set(ARMS)
    assert arms_of(["precision"]) == [FP32, "bf16", "fp16"]
    assert set(arms_of(list(CLAIMS))) == set(ARMS)  # none is made for nothing
    assert "quantization.w_bits" in DECIDED


def test_a_data_set_takes_the_place_of_the_digits(tmp_path):
    args, settings = claim_runs.parse(["--data-path", str(tmp_path), "--what", "brecq"])
    assert settings["dataset.name"] == "cifar10" and args.data_root is None
    assert settings["dataset.data_dir_cifar10"] == str(tmp_path)
    assert settings["dataset.max_images"] == 5_000  # the record will say "subset"
    assert str(args.output).endswith("claims-cifar10")
    args, settings = claim_runs.parse([])
    assert settings["dataset.name"] == "digits" and args.what == list(CLAIMS)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(claim_runs, "CLAIMS_DIGITS", Setting(TINY))


@pytest.mark.slow
def test_trials_are_stopped_and_go_on_and_the_record_is_of_the_files(
    tmp_path, tiny, monkeypatch, command
):
    folder = tmp_path / "trials with space"
    words = ("--output", folder, "--what", "precision", "apprentice", "haq")
    words = (*words, "--seeds", 0, 1)
    cell, made = claim_runs.Trials.cell, []

    def stopping(self, *which):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(which)
        return cell(self, *which)

    with monkeypatch.context() as patch:
        patch.setattr(claim_runs.Trials, "cell", stopping)
        assert command(*words, entry=claims.main).code == 130
    before = json.loads((folder / "stages.json").read_text())
    done = command(*words, entry=claims.main)
    assert done.code == 0, done.err
    after = json.loads((folder / "stages.json").read_text())
    assert len(before) == 6 and {k: after[k] for k in before} == before  # nothing made twice
    record = read_result(folder / "result.json")
    assert record["scale"] == "rehearsal" and record["data"]["kind"] == "built-in"
    assert record["seeds"] == [0, 1]
    measured = record["measured"]
    for arm, said in measured["arms"].items():
        runs = [after[f"{arm} | labels | {seed}"]["test_accuracy"] for seed in (0, 1)]
        assert said["accuracy"]["values"] == runs
        assert said["accuracy"]["std"] == pytest.approx(statistics.stdev(runs))
    assert set(measured["claims"]) == {"precision", "apprentice", "haq"}
    for arm in ("uniform 3 bits, PTQ", "HAQ, PTQ", "HAQ, QAT"):
        assert max(measured["arms"][arm]["mean_bits"]["values"]) <= 3.0  # equal cost
    ends = measured["arms"]["QAT W2A4, labels"]["w_bits"][0]
    assert set(ends.values()) == {2, 8}  # the ends have 8
    _, facts = load_net(folder / "checkpoints" / "fp32-labels-1.pth")
    assert facts["metrics"]["test_accuracy"] == measured["arms"][FP32]["accuracy"]["values"][1]
    own = folder / "cells" / "scheme-A-W2A4---labels---0" / "checkpoints"
    assert (own / "teacher.pth").exists()  # scheme A's teacher is not the shared one
    text = (folder / "report.md").read_text()
    assert "REHEARSAL" in text and "HAQ, PTQ - uniform 3 bits, PTQ" in text
    assert (folder / "claims.png").stat().st_size > 10_000
    assert done.out.splitlines()[-1].startswith("REHEARSAL")
    wider = command(*words[:2], "--what", "precision", "--seeds", 0, 1, entry=claims.main)
    assert wider.code == 0, wider.err  # other claims of the same folder: its cells are used
    assert json.loads((folder / "stages.json").read_text()) == after
    other = command(*words, "--set", "experiment.epochs=2", entry=claims.main)
    assert other.code == 1 and "experiment.epochs" in other.err


def test_one_seed_has_no_deviation_and_no_interval():
    names = CLAIMS["precision"].arms()
    found = summarise_claims({name: rows_of(a=[0.9])["a"] for name in names}, ["precision"])
    assert found["arms"][FP32]["accuracy"] == spread([0.9])
    assert found["arms"][FP32]["accuracy"]["std"] is None
    assert found["claims"]["precision"]["pairs"]["bf16 - fp32"]["interval"] is None
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--what", "magic"], 2, "invalid choice"),
        (["--seeds", "1", "1"], 2, "different numbers"),
        (["--seeds", "-1"], 2, "different numbers"),
        (["--threads", "0"], 2, "1 or more"),
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
