"""The open-set test: published numbers, the original's histogram, masks, curves, the command."""

import json
from pathlib import Path

import numpy as np
import pytest

from command_tools import run_main
from landmark_distill import openset
from landmark_distill.config import FAR_TARGETS
from landmark_distill.gallery.features import write_names
from landmark_distill.images.truths import PairMask, usable_truths
from landmark_distill.judging import judge
from landmark_distill.judging.histogram import histogram_rates
from landmark_distill.judging.judge import openset_test
from shared_core.runs import run_command


def _published():
    """Forty landmarks with ten images each; the project's worked example."""
    state = np.random.RandomState(0)
    centres = state.randn(40, 32)
    features = np.repeat(centres, 10, 0) + state.randn(400, 32)
    return features, np.repeat(np.arange(40), 10)


def _original_dense(features, genuine, targets, bins=2000):
    """All pairs at once and loops, in float64: what the original describes."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    i, j = np.triu_indices(len(unit), 1)
    scores = (unit[i] * unit[j]).sum(1)
    low, high = scores.min(), scores.max()
    step = (high - low) / bins
    starts = [low + step * k - step / 2 + 2e-6 for k in range(1, bins + 1)]
    end = low + step * (bins + 1) - step / 2 + 2e-6
    good, bad = scores[genuine], scores[~genuine]
    rate = [np.mean((good >= s) & (good <= end)) for s in starts]
    far = [np.mean((bad >= s) & (bad <= end)) for s in starts]
    out = []
    for target in targets:
        if far[0] < target:
            out.append(rate[0])
            continue
        k = max(n for n in range(bins) if far[n] >= target)
        if far[k] == target:
            out.append(rate[k])
        elif k == bins - 1 or far[k] / target >= 8:
            out.append(0.0)
        else:
            out.append((rate[k] + rate[k + 1]) / 2)
    return np.round(out, 5)


def _pairs(labels):
    i, j = np.triu_indices(len(labels), 1)
    return labels[i] == labels[j]


def test_the_exact_and_the_original_rates_of_the_worked_example():
    features, labels = _published()
    exact = openset_test(features, {"fine": labels}, ks=())
    np.testing.assert_allclose(
        np.round(exact.rates["fine"], 5)[:5], [0.96278, 0.74556, 0.435, 0.19944, 0.00333], atol=1e-9
    )
    original = openset_test(features, {"fine": labels}, variant="original", ks=())
    assert original.rates["fine"] == [0.96333, 0.74556, 0.43667, 0.19972, 0.00333, 0, 0, 0]


@pytest.mark.parametrize("block", [17, 100, 1000])
def test_the_histogram_in_blocks_equals_all_pairs_at_once(block):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 15, 150)
    features = rng.normal(size=(15, 12))[labels] + rng.normal(size=(150, 12))
    targets = (0.5, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-6)
    mask = rng.random(150 * 149 // 2) < 0.1
    got = histogram_rates(
        features,
        {"labels": labels, "mask": PairMask(mask)},
        far_targets=targets,
        bins=300,
        block=block,
    )
    for name, genuine in (("labels", _pairs(labels)), ("mask", mask)):
        dense = _original_dense(features, genuine, targets, bins=300)
        # float32 scores may move a pair across an edge: one of about 1,100 pairs.
        np.testing.assert_allclose(got[name][0], dense, atol=2e-3)
        assert got[name][1] == (~genuine).sum()


def test_coarse_and_fine_together_and_the_line_of_the_record():
    features, fine = _published()
    coarse = fine // 4
    got = openset_test(features, {"coarse": coarse, "fine": fine}, curve=True, ks=(1,))
    for name, labels in (("coarse", coarse), ("fine", fine)):
        alone = openset_test(features, {name: labels}, ks=())
        assert got.rates[name] == alone.rates[name]
        assert got.curves[name].far_targets[:8] == FAR_TARGETS
    head, _, tail = got.line().partition("--")
    assert head.startswith("test acc: coarsegrained:[") and tail.startswith("finegrained:[0.96278,")
    assert len(tail.split(",")) == 8
    assert got.retrieval["fine"].recall[1] > got.retrieval["fine"].mean_average_precision_at_r


@pytest.mark.parametrize("variant", ["exact", "original"])
def test_a_rate_that_so_few_pairs_cannot_show_is_a_dash(stored, tmp_path, capsys, variant):
    """78,000 impostor pairs allow 0.78 false accepts at 1e-5, and none below."""
    features, labels = _published()
    mask = PairMask(_pairs(labels))
    for truth in (labels, mask):
        got = openset_test(features, {"fine": truth}, variant=variant, ks=())
        assert got.measurable == {"fine": [True] * 4 + [False] * 4}
        assert got.shown("fine")[4:] == ["-"] * 4 and "-" not in got.shown("fine")[:4]
    words = [str(stored), "--fine", str(tmp_path / "fine.npy"), "--variant", variant]
    assert run_command(openset.main, words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] == "-" for line in lines[1:9]] == [False] * 4 + [True] * 4


def test_a_truth_without_pairs_is_left_out_with_a_line():
    one, two = np.zeros(4, np.int64), np.array([0, 0, 1, 1])
    kept, said = usable_truths({"coarse": one, "fine": two}, 4)
    assert list(kept) == ["fine"] and "no impostor pair" in said[0] and "coarse" in said[0]
    with pytest.raises(ValueError, match="can show nothing"):
        usable_truths({"coarse": one, "fine": np.arange(4)}, 4)


def test_a_mask_gives_rates_and_no_retrieval():
    features, labels = _published()
    mask = PairMask(_pairs(labels))
    got = openset_test(features, {"fine": mask})
    assert got.rates == openset_test(features, {"fine": labels}, ks=()).rates
    assert got.retrieval == {}


def test_an_unknown_variant_is_refused():
    features, labels = _published()
    with pytest.raises(ValueError, match="variant is 'best'"):
        openset_test(features, {"fine": labels}, variant="best")


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    features, labels = _published()
    path = tmp_path / "a folder" / "opensetFeat.npy"
    path.parent.mkdir()
    np.save(path, features)
    np.save(tmp_path / "fine.npy", labels)
    (tmp_path / "coarse.txt").write_text("".join(f"group {n // 4}\n" for n in labels))
    return path


def test_the_command_with_label_files_writes_json_and_plots(stored, tmp_path, capsys):
    out = tmp_path / "out"
    truths = ["--fine", str(tmp_path / "fine.npy"), "--coarse", str(tmp_path / "coarse.txt")]
    words = [str(stored), *truths, "--output", str(out), "--roc", "--sheet", "3"]
    code = run_command(openset.main, words)
    assert code == 0
    content = json.loads((out / judge.RESULT_FILE).read_text())
    features, labels = _published()
    truth = openset_test(features, {"fine": labels, "coarse": labels // 4})
    assert content["rates"] == truth.rates and content["images"] == 400
    assert content["retrieval"]["fine"] == truth.retrieval["fine"].as_dict()
    assert content["verification"]["fine"]["genuine_pairs"] == 1800
    for name in (judge.ROC_FILE, judge.SHEET_FILE):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "0.96278" in capsys.readouterr().out


def test_the_command_takes_masks_and_the_original_variant(stored, tmp_path):
    np.save(tmp_path / "mask.npy", _pairs(_published()[1]))
    arguments = [str(stored), "--fine", str(tmp_path / "mask.npy")]
    assert run_command(openset.main, [*arguments, "--variant", "original"]) == 0
    content = json.loads((stored.parent / judge.RESULT_FILE).read_text())
    assert content["rates"]["fine"][:2] == [0.96333, 0.74556] and content["retrieval"] == {}


def test_without_truths_the_folders_tell(stored):
    labels = _published()[1]
    names = [f"town {n // 4}/spot {n}/{i}.jpg" for i, n in enumerate(labels)]
    write_names(stored, names, {"root": "/nowhere", "weights": "x"})
    assert run_command(openset.main, [str(stored), "--no_retrieval"]) == 0
    content = json.loads((stored.parent / judge.RESULT_FILE).read_text())
    features, _ = _published()
    truth = openset_test(features, {"coarse": labels // 4, "fine": labels}, ks=())
    assert content["rates"] == truth.rates


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "no list of paths beside it"),
        (["--fine", "{missing}"], 1, "there is no such file"),
        (["--fine", "{short}"], 1, "3 lines for 400 features"),
        (["--fine", "{short.npy}"], 1, "expected (79800,) of 0 and 1"),
        (["--fine", "{fine}", "--far", "2"], 2, "expected [0, 1]"),
        (["--fine", "{fine}", "--k", "0"], 2, "expected [1"),
        (["--fine", "{fine}", "--sheet", "0"], 2, "expected [1"),
        (["--fine", "{fine}", "--roc", "--variant", "original"], 2, "exact"),
    ],
)
def test_bad_words_are_one_line(stored, tmp_path, words, code, message):
    (tmp_path / "short.txt").write_text("a\nb\nc\n")
    np.save(tmp_path / "short.npy", np.arange(3))
    places = {
        "{missing}": tmp_path / "missing.txt", "{short}": tmp_path / "short.txt",
        "{short.npy}": tmp_path / "short.npy", "{fine}": tmp_path / "fine.npy",
    }  # fmt: skip
    words = [str(places.get(word, word)) for word in words]
    done = run_main(openset.main, [stored, *words])
    assert done.code == code and message in done.err, done.err
    assert done.err.startswith("error: ") and done.err.count("\n") == 1


@pytest.mark.parametrize("content", [b"no array", b""])
def test_a_file_that_is_no_features_is_one_line(tmp_path, capsys, content):
    path = Path(tmp_path / "f.npy")
    path.write_bytes(content)
    assert run_command(openset.main, [str(path)]) == 1
    error = capsys.readouterr().err
    assert "expected features" in error and error.count("\n") == 1
