"""Evaluation: every number by hand or by scikit-learn, and the wiring of every option."""

import json
import shutil

import numpy as np
import pytest
import tiny_models as tiny
from scipy import stats

from shared_core import smallvision
from shared_core.datasets import make_split, scan
from shared_core.deploy import evaluate as evaluate_module
from shared_core.deploy.evaluate import nearest_neighbours
from shared_core.metrics.intervals import wilson_interval
from shared_core.runs import run_command

pytest.importorskip("onnxruntime")
COUNT = 60


@pytest.fixture(scope="module")
def images():
    return tiny.make_images(COUNT)


@pytest.fixture(scope="module")
def labels(images):
    """What the model says, but every fourth image is called otherwise."""
    best = tiny.probabilities_by_hand(images).argmax(axis=1)
    wrong = np.arange(COUNT) % 4 == 0
    return np.where(wrong, (best + 1 + np.arange(COUNT) % 3) % 4, best)


@pytest.fixture(scope="module")
def data(tmp_path_factory, images, labels):
    """Class folders; files are named by their number."""
    root = tmp_path_factory.mktemp("labelled")
    for n, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = root / tiny.CLASSES[label] / f"{n:03d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tiny.encode(image))
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return tiny.save_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def run(capsys, tmp_path):
    """The command: exit code, its JSON (or None), output, errors."""

    def call(*words):
        target = tmp_path / "numbers.json"
        target.unlink(missing_ok=True)
        code = run_command(smallvision.main, ["evaluate", *map(str, words), "--json", str(target)])
        done = capsys.readouterr()
        found = json.loads(target.read_text()) if target.is_file() else None
        return code, found, done.out, done.err

    return call


def test_wilson_is_scipy_s():
    for successes, total in ((0, 5), (5, 5), (3, 7), (40, 320), (319, 320)):
        truth = stats.binomtest(successes, total).proportion_ci(0.95, method="wilson")
        assert wilson_interval(successes, total) == pytest.approx((truth.low, truth.high))
    for wrong in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="expected a count"):
            wilson_interval(*wrong)


def test_numbers_are_scikit_learn_s(run, plain, data, images, labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    p = tiny.probabilities_by_hand(images)
    answers = p.argmax(axis=1)
    code, found, out, _ = run(plain, data)
    assert code == 0
    assert found["accuracy"]["value"] == pytest.approx(sklearn.accuracy_score(labels, answers))
    low, high = wilson_interval(int((labels == answers).sum()), COUNT)
    assert (found["accuracy"]["low"], found["accuracy"]["high"]) == pytest.approx((low, high))
    precision, recall, f1, support = sklearn.precision_recall_fscore_support(
        labels, answers, labels=range(4), zero_division=0
    )
    for k, row in enumerate(found["per_class"]):
        assert row["class"] == tiny.CLASSES[k] and row["recall"]["images"] == support[k]
        assert row["recall"]["value"] == pytest.approx(recall[k])
        assert (row["precision"], row["f1"]) == pytest.approx((precision[k], f1[k]))
        ends = wilson_interval(int(round(recall[k] * support[k])), int(support[k]))
        assert (row["recall"]["low"], row["recall"]["high"]) == pytest.approx(ends)
    assert found["macro"]["recall"] == pytest.approx(
        sklearn.balanced_accuracy_score(labels, answers)
    )
    assert found["macro"]["f1"] == pytest.approx(sklearn.f1_score(labels, answers, average="macro"))
    assert found["confusion"] == sklearn.confusion_matrix(labels, answers).tolist()
    # ECE by its definition, 15 bins of equal width.
    sure, right = p.max(axis=1), labels == answers
    where = np.ceil(sure * 15).astype(int)
    parts = [
        (where == b).mean() * abs(right[where == b].mean() - sure[where == b].mean())
        for b in set(where)
    ]
    assert found["ece"] == pytest.approx(sum(parts), abs=1e-5)
    assert found["data"] == {
        "part": None, "split_hash": None, "images": COUNT, "unreadable": [],
    }  # fmt: skip
    assert f"accuracy: {found['accuracy']['value']:.4f} (95 %: " in out
    assert all(f"  {name}" in out for name in tiny.CLASSES)


def test_exits_shares_and_costs(run, chain, data, images, labels):
    order = np.argsort([f"{tiny.CLASSES[k]}/{n:03d}" for n, k in enumerate(labels)])
    left, p = tiny.exits_by_hand(images[order])
    right = p.argmax(axis=1) == labels[order]
    _, found, out, _ = run(chain, data)
    for n, row in enumerate(found["exits"]["at"]):
        assert row["exit"] == ("block 2", "block 5", "final")[n] and row["macs"] == tiny.MACS[n]
        assert row["share"] == pytest.approx((left == n).mean())
        assert row["accuracy"]["images"] == (left == n).sum() > 0
        assert row["accuracy"]["value"] == pytest.approx(right[left == n].mean())
    mean = np.mean([tiny.MACS[n] for n in left])
    assert found["exits"]["mean_macs"] == pytest.approx(mean)
    assert found["exits"]["macs_fraction"] == pytest.approx(mean / 700)
    assert f"{100 * mean / 700:.1f} % of a full run" in out
    _, found, _, _ = run(chain, data, "--no-exits")
    assert [row["share"] for row in found["exits"]["at"]] == [0, 0, 1]


def test_a_manifest_says_which_images_are_judged(run, plain, data, tmp_path):
    manifest = make_split(scan(data), fractions=(("train", 0.5), ("test", 0.5)), seed=1)
    split = manifest.write(tmp_path / "split.json")
    counts = {}
    for part in ("train", "test"):
        _, found, _, _ = run(plain, data, "--split", split, "--part", part)
        counts[part] = found["data"]["images"]
        assert found["data"]["split_hash"] == manifest.hash and found["data"]["part"] == part
        assert found["data"]["images"] == len(manifest.subset(part))
        numbers = [int(item.path[-7:-4]) for item in manifest.subset(part)]
        wrong = np.mean([n % 4 == 0 for n in numbers])
        assert found["accuracy"]["value"] == pytest.approx(1 - wrong)
    assert sum(counts.values()) == COUNT
    assert manifest.classes != tiny.CLASSES  # another order, the same names
    code, _, _, err = run(plain, data, "--split", split, "--part", "dev")
    assert code == 1 and "no part 'dev'" in err


def test_a_set_with_a_test_folder_is_judged_on_it(run, plain, data, tmp_path):
    for part, taken in (("train", "*0.png"), ("val", "*1.png"), ("test", "*[2-9].png")):
        for path in data.glob(f"*/{taken}"):
            target = tmp_path / "set" / part / path.relative_to(data)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    _, found, _, _ = run(plain, tmp_path / "set")
    assert found["data"]["part"] == "test" and found["data"]["images"] == 48
    _, found, _, _ = run(plain, tmp_path / "set", "--part", "val")
    assert found["data"]["images"] == 6
    code, _, _, err = run(plain, tmp_path / "set", "--part", "dev")
    assert code == 2 and "--part dev: " in err and "has test, train, val" in err


def test_other_classes_than_the_model_s_are_refused(run, plain, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    (other / "red").rename(other / "pink")
    code, _, _, err = run(plain, other)
    assert code == 1 and "class folder 'pink'" in err and err.count("\n") == 1
    split = make_split(scan(other), seed=0).write(tmp_path / "s.json")
    code, _, _, err = run(plain, other, "--split", split)
    assert code == 1 and "other classes than" in err
    shutil.rmtree(other / "pink")  # a class without images is none to judge
    _, found, _, _ = run(plain, other)
    assert found["macro"]["classes"] == 3 and found["per_class"][2]["recall"]["value"] is None


def test_against_another_model(run, plain, chain, data, images, labels):
    _, found, out, _ = run(chain, data, "--against", plain)
    ours, theirs = tiny.exits_by_hand(images)[1], tiny.probabilities_by_hand(images)
    a, b = ours.argmax(axis=1), theirs.argmax(axis=1)
    against = found["against"]
    assert against["same_class"]["value"] == pytest.approx((a == b).mean())
    assert against["accuracy"]["value"] == pytest.approx((b == labels).mean())
    assert against["only_model_right"] == ((a == labels) & (b != labels)).sum()
    assert against["only_other_right"] == ((a != labels) & (b == labels)).sum()
    assert against["largest_difference"] == pytest.approx(np.abs(ours - theirs).max(), abs=1e-5)
    assert against["model"] == str(plain) and f"against {plain}" in out
    assert set(found["latency"]) == {"model", "against"}


def test_against_disagreement_is_counted(run, plain, data, images, labels, tmp_path):
    turned = tiny.WEIGHTS[[1, 2, 0]]
    other = tiny.save_model(tmp_path / "m", weights=turned)
    _, found, _, _ = run(plain, data, "--against", other)
    means = images.astype(np.float64).mean(axis=(1, 2)) / 255
    b = (means @ turned + tiny.BIAS).argmax(axis=1)
    a = tiny.probabilities_by_hand(images).argmax(axis=1)
    assert 0 < (a == b).sum() < COUNT
    assert found["against"]["same_class"]["value"] == pytest.approx((a == b).mean())
    assert found["against"]["only_model_right"] == ((a == labels) & (b != labels)).sum() > 0
    assert found["against"]["only_other_right"] == ((a != labels) & (b == labels)).sum() > 0
    names = tiny.save_model(tmp_path / "n", tiny.make_facts(class_names=("a", "b", "c", "d")))
    code, _, _, err = run(plain, data, "--against", names)
    assert code == 1 and "other classes than" in err


def test_time_is_measured_for_the_batches_asked(run, plain, data):
    _, found, out, _ = run(plain, data, "--latency-batches", "1", "8", "--threads", "2")
    assert found["threads"] == 2
    assert list(found["latency"]["model"]) == ["1", "8"] and "at batch 8" in out
    assert all(one["cpu_ms"] > 0 for one in found["latency"]["model"].values())
    _, found, _, _ = run(plain, data, "--latency-batches")
    assert "latency" not in found


def test_unknown_answers_are_counted(run, data, images, labels, tmp_path):
    p = tiny.probabilities_by_hand(images)
    limit = float(np.sort(p.max(axis=1))[20:22].mean())
    model = tiny.save_model(tmp_path / "m", tiny.make_facts(unknown_threshold=limit))
    _, found, _, _ = run(model, data)
    known = p.max(axis=1) >= limit
    assert found["unknown"]["answered"]["value"] == pytest.approx(known.mean())
    right = (p.argmax(axis=1) == labels)[known].mean()
    assert found["unknown"]["accuracy_of_answered"]["value"] == pytest.approx(right)


def test_bad_files_are_left_out_named_and_counted(run, plain, data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "set")
    victims = sorted(copy.glob("*/*1.png"))
    for victim in victims:
        victim.write_bytes(b"damaged")
    code, found, _, err = run(plain, copy, "--batch-size", "1", "--report", tmp_path / "page")
    assert code == 1 and err.count("unreadable: ") == len(victims) == 6
    assert found["data"]["images"] == COUNT - 6
    assert {one["path"] for one in found["data"]["unreadable"]} == set(map(str, victims))
    assert found["accuracy"]["value"] == pytest.approx(1 - 15 / 54)  # labels stay with their files
    assert "6 images could not be read" in (tmp_path / "page" / "report.md").read_text()
    for victim in copy.glob("*/*.png"):
        victim.write_bytes(b"")
    code, found, _, err = run(plain, copy)
    assert code == 1 and found is None and "none of the 60 images can be read" in err


def test_the_report_holds_the_numbers(run, chain, data, tmp_path):
    _, found, _, _ = run(chain, data, "--report", tmp_path / "page")
    written = json.loads((tmp_path / "page" / "evaluation.json").read_text())
    assert written["accuracy"] == found["accuracy"] and written["exits"] == found["exits"]
    text = (tmp_path / "page" / "report.md").read_text()
    assert f"{found['accuracy']['value']:.4f}" in text and "## Exits" in text
    top = sorted(
        (
            (n, a, b)
            for a, row in enumerate(found["confusion"])
            for b, n in enumerate(row)
            if a != b
        ),
        reverse=True,
    )[0]
    assert f"| {tiny.CLASSES[top[1]]} | {tiny.CLASSES[top[2]]} | {top[0]} |" in text
    page = (tmp_path / "page" / "report.html").read_text()
    assert "grey &lt;b&gt;" in page and "grey <b>" not in page


def test_an_embedder_is_judged_by_nearest_neighbours(run, data, tmp_path):
    facts = tiny.make_facts(task="embed", activation="none", class_names=())
    model = tiny.save_model(tmp_path / "m", facts)
    code, found, out, _ = run(model, data, "--against", model)
    assert code == 0 and 0 < found["nearest"]["value"] < 1 and "recall@1: " in out
    assert found["nearest"]["images"] == COUNT and "per_class" not in found
    assert found["against"]["smallest_cosine"] == pytest.approx(1)


def test_nearest_neighbours_by_hand(monkeypatch):
    monkeypatch.setattr(evaluate_module, "_FEATURES", 3)  # blocks
    rng = np.random.default_rng(0)
    features = rng.normal(size=(20, 5)) * rng.uniform(1, 9, (20, 1))
    labels = np.array([0] * 8 + [1] * 8 + [2] * 3 + [3])  # the last has nobody of its class
    hits = []
    for n in range(20):
        cosine = [
            -2 if m == n else features[n] @ features[m] / np.linalg.norm(features[m])
            for m in range(20)
        ]
        cosine[n] = -np.inf
        hits.append(labels[int(np.argmax(cosine))] == labels[n])
    found = nearest_neighbours(features, labels)
    assert found["nearest"]["value"] == pytest.approx(np.mean(hits)) and not hits[-1]
    assert found["recall_at_1"]["value"] == pytest.approx(np.mean(hits[:-1]))
    assert found["recall_at_1"]["images"] == 19
    with pytest.raises(ValueError, match="at least two"):
        nearest_neighbours(features[:1], labels[:1])
