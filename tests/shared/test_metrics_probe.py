"""The linear probe against scikit-learn's own pipeline, and the floor of trained features."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from shared_core.datasets import ImageSet, make_scenes
from shared_core.metrics.intervals import wilson_interval
from shared_core.metrics.probe import fit_probe
from shared_core.metrics.trained_floor import image_features, trained_floor


def cloud(seed=0, classes=3, n=240, width=6):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(99).normal(0, 1.5, (classes, width))
    scale = np.array([1, 3, 0.3, 2, 1, 0])[:width]  # the last feature is constant
    return ((centres[labels] + rng.normal(0, 1, (n, width))) * scale + 5).astype(np.float32), labels


@pytest.mark.parametrize("classes", [2, 3])
def test_the_folded_weights_are_those_of_scikit_learns_pipeline(classes):
    features, labels = cloud(classes=classes)
    probe = fit_probe(features, labels, num_classes=classes, strengths=(0.1,))
    truth = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300, tol=1e-6))
    truth.fit(features.astype(np.float64), labels)
    other, other_labels = cloud(seed=1, classes=classes)
    logits = probe.logits(other).astype(np.float64)
    got = np.exp(logits - logits.max(axis=1, keepdims=True))
    got /= got.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got, truth.predict_proba(other), atol=5e-3)
    assert probe.accuracy(other, other_labels) == pytest.approx(
        truth.score(other, other_labels), abs=0.01
    )


def test_a_feature_that_hardly_varies_has_no_say():
    features, labels = cloud()
    rare = np.where(np.arange(len(labels)) == 0, 1e-3, 0.0)[:, None]  # telling, if it were scaled
    probe = fit_probe(np.hstack([features, rare, np.ones_like(rare)]), labels, num_classes=3)
    assert (probe.weight[:, -2:] == 0).all()
    np.testing.assert_allclose(
        probe.weight[:, :-2], fit_probe(features, labels, num_classes=3).weight, atol=1e-5
    )


def test_validation_decides_the_strength_and_a_missing_class_is_never_said():
    features, labels = cloud()
    noise = np.random.default_rng(0).permutation(labels)
    honest = fit_probe(features, labels, num_classes=5, validation=cloud(seed=2))
    fooled = fit_probe(features, labels, num_classes=5, validation=(features, noise))
    assert honest.strength == 0.3 and fooled.strength == 0.003
    assert set(honest.logits(cloud(seed=3)[0]).argmax(axis=1)) <= {0, 1, 2}
    with pytest.raises(ValueError, match="labels of 1 classes"):
        fit_probe(features, 0 * labels, num_classes=5)
    with pytest.raises(ValueError, match="expected two or more classes below 2"):
        fit_probe(features, labels, num_classes=2)


def test_the_floor_fits_chooses_and_judges_on_its_own_part(tmp_path):
    listing = make_scenes(tmp_path, num_classes=3, image_size=16, images_per_class=20, seed=0)
    paths = [tmp_path / sample.path for sample in listing.samples]
    labels = [sample.label for sample in listing.samples]

    def part(start):
        chosen = [i for i in range(60) if i % 4 in start]
        return ImageSet([paths[i] for i in chosen], [labels[i] for i in chosen])

    seen = []

    def features(views):
        seen.append(views.shape)
        return views.reshape(len(views), -1)[:, ::7].astype(np.float32)

    parts = [part((0, 1)), part((2,)), part((3,))]
    floor, probe = trained_floor(
        features, parts, num_classes=3, network="net", input_size=8, threads=0
    )
    assert seen == [(30, 8, 8, 3), (15, 8, 8, 3), (15, 8, 8, 3)]
    values = [image_features(features, one, input_size=8, threads=0) for one in parts]
    right = (probe.logits(values[2]).argmax(1) == parts[2].labels).mean()
    assert floor.accuracy == pytest.approx(right) and floor.images == 15
    assert (floor.low, floor.high) == wilson_interval(round(right * 15), 15)
    expected = fit_probe(
        values[0], parts[0].labels, num_classes=3, validation=(values[1], parts[1].labels)
    )
    np.testing.assert_array_equal(expected.weight, probe.weight)
    assert floor.facts()["network"] == "net" and floor.facts()["strength"] == probe.strength
