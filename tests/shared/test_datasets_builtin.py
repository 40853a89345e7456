"""Built-in data: deterministic, graded, beyond a linear model, within a small net's reach."""

import json

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from shared_core.datasets.builtin import sources as builtin
from shared_core.datasets.builtin.scenes import ARRANGEMENTS, CLASSES, FORMS, OBJECTS
from shared_core.datasets.errors import DatasetError
from shared_core.datasets.finding.scan import scan


def test_the_grammar_has_45_classes():
    words = {f"{o}_{a}" for o in OBJECTS for a in ARRANGEMENTS}
    words |= {f"{theme}_{form}" for theme, forms in FORMS.items() for form in forms}
    assert len(CLASSES) == builtin.MAX_CLASSES == 45 and set(CLASSES) == words
    assert builtin.scene_class_names() == tuple(sorted(words))
    assert set(builtin.scene_class_names(10)) < set(builtin.scene_class_names(20))
    assert len({builtin.scene_coarse_name(name) for name in words}) == 9


def test_scenes_are_deterministic_and_all_different():
    pixels = {}
    for name in CLASSES:
        for index in (0, 1):
            image, level = builtin.render_scene(name, index, size=32, seed=5)
            again, same = builtin.render_scene(name, index, size=32, seed=5)
            assert image.dtype == np.uint8 and image.shape == (32, 32, 3)
            assert np.array_equal(image, again) and level == same
            pixels[image.tobytes()] = name
    assert len(pixels) == 90
    other = builtin.render_scene("tanks_grid", 0, size=32, seed=6)[0]
    assert not np.array_equal(other, builtin.render_scene("tanks_grid", 0, size=32, seed=5)[0])


def test_global_random_state_is_neither_used_nor_changed():
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    first = builtin.render_scene("texture_ridges", 3, size=24, seed=0)[0]
    assert np.random.get_state()[1].tolist() == before
    np.random.seed(2)
    assert np.array_equal(first, builtin.render_scene("texture_ridges", 3, size=24, seed=0)[0])


def test_difficulty_is_uniform_by_default_and_lowers_what_is_to_be_seen():
    levels = [builtin.render_scene("water_lake", i, size=16, seed=0)[1] for i in range(300)]
    assert min(levels) < 0.05 and max(levels) > 0.95 and abs(np.mean(levels) - 0.5) < 0.06

    def signal_to_noise(level):
        """Variance that survives a blur against the variance that does not."""
        ratios = []
        for i in range(24):
            image, used = builtin.render_scene(CLASSES[i], i, size=64, seed=0, difficulty=level)
            assert used == level
            smooth = cv2.GaussianBlur(image.astype(np.float64), (0, 0), 1.2)
            ratios.append(smooth.var() / (image - smooth).var())
        return float(np.median(ratios))

    easy, middle, hard = (signal_to_noise(level) for level in (0.0, 0.5, 1.0))
    assert easy > 1.5 * middle > 1.5 * hard


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "tank"}, "unknown scene class 'tank'"),
        ({"size": 8}, "size is 8, expected at least 16"),
        ({"index": -1}, "index is -1"),
        ({"difficulty": 1.5}, "difficulty is 1.5"),
    ],
)
def test_render_refuses_bad_arguments(arguments, message):
    good = {"name": "tanks_grid", "index": 0, "size": 32, "seed": 0, **arguments}
    with pytest.raises(DatasetError, match=message):
        builtin.render_scene(good.pop("name"), good.pop("index"), **good)


def test_make_scenes_writes_the_true_layout(tmp_path):
    settings = {"num_classes": 5, "image_size": 24, "images_per_class": 4, "seed": 2}
    listing = builtin.make_scenes(tmp_path / "scenes", file_format="png", **settings)
    assert listing.classes == builtin.scene_class_names(5) == scan(tmp_path / "scenes").classes
    assert listing.counts() == dict.fromkeys(listing.classes, 4)
    images, labels, levels = builtin.scene_arrays(**settings)
    recorded = builtin.scene_difficulty(tmp_path / "scenes")
    for position, sample in enumerate(listing.samples):
        assert np.array_equal(cv2.imread(str(sample.path))[:, :, ::-1], images[position])
        assert sample.label == labels[position]
        assert recorded[listing.relative(sample)] == pytest.approx(levels[position], abs=1e-6)
    assert images.shape == (20, 24, 24, 3) and labels.dtype == np.int64
    jpegs = builtin.make_scenes(tmp_path / "jpeg", **settings)
    assert all(sample.path.suffix == ".jpg" for sample in jpegs.samples)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["jpeg", "scenes"]


def test_make_scenes_uses_what_is_there_and_spares_other_files(tmp_path, monkeypatch):
    root = tmp_path / "scenes"
    settings = {"num_classes": 3, "image_size": 16, "images_per_class": 2}
    first = builtin.make_scenes(root, **settings)
    monkeypatch.setattr(builtin, "render_scene", lambda *a, **k: pytest.fail("drawn again"))
    assert builtin.make_scenes(root, **settings) == first
    (tmp_path / "empty").mkdir()
    monkeypatch.undo()
    assert builtin.make_scenes(tmp_path / "empty", **settings).counts() == first.counts()
    with pytest.raises(DatasetError, match="made with other settings"):
        builtin.make_scenes(root, **{**settings, "seed": 1})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DatasetError, match="holds other files"):
        builtin.make_scenes(tmp_path / "mine", **settings)
    with pytest.raises(DatasetError, match="has no scenes.json"):
        builtin.scene_difficulty(tmp_path / "mine")


def test_make_scenes_killed_halfway_leaves_no_set(tmp_path, monkeypatch):
    real = builtin.render_scene

    def killed(name, index, **rest):
        if index == 1:
            raise KeyboardInterrupt
        return real(name, index, **rest)

    monkeypatch.setattr(builtin, "render_scene", killed)
    with pytest.raises(KeyboardInterrupt):
        builtin.make_scenes(tmp_path / "s", num_classes=2, image_size=16, images_per_class=2)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 46}, "num_classes is 46, expected 2 to 45"),
        ({"num_classes": 1}, "num_classes is 1"),
        ({"images_per_class": 0}, "images_per_class is 0"),
        ({"file_format": "gif"}, "file_format is 'gif'"),
    ],
)
def test_make_scenes_refuses_bad_settings(tmp_path, settings, message):
    with pytest.raises(DatasetError, match=message):
        builtin.make_scenes(tmp_path / "s", **settings)


def test_digits_are_scikit_learns():
    images, labels = builtin.digits()
    truth = load_digits()
    assert images.shape == (1797, 8, 8, 3) and np.array_equal(labels, truth.target)
    for channel in range(3):
        assert np.abs(images[:, :, :, channel] - truth.images * 255 / 16).max() <= 0.5
    large, same = builtin.digits(size=32)
    assert large.shape == (1797, 32, 32, 3) and np.array_equal(same, labels)
    at = (np.arange(32) + 0.5) / 4 - 0.5  # bilinear: pixel centres, clamped at the border
    weights = np.stack([np.interp(at, np.arange(8), row) for row in np.eye(8)], axis=1)
    grey = images[:50, :, :, 0].astype(np.float64)
    assert np.abs(large[:50, :, :, 0] - weights @ grey @ weights.T).max() <= 1
    with pytest.raises(DatasetError, match="size is 4"):
        builtin.digits(size=4)


def test_digits_as_class_folders(tmp_path):
    listing = builtin.make_digits(tmp_path / "digits", size=8)
    assert listing.classes == tuple("0123456789") and len(listing.samples) == 1797
    _, labels = builtin.digits()
    assert list(listing.counts().values()) == np.bincount(labels).tolist()
    assert builtin.make_digits(tmp_path / "digits", size=8) == listing
    assert json.loads((tmp_path / "digits" / "scenes.json").read_text())["settings"]["size"] == 8


@pytest.mark.slow
def test_a_small_net_sees_what_a_linear_model_does_not():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    images, labels, levels = builtin.scene_arrays(
        num_classes=10, image_size=32, images_per_class=130, seed=0
    )
    held_out = np.arange(len(labels)) % 130 >= 95
    flat = images.reshape(len(images), -1) / 255 - 0.5
    linear = LogisticRegression(C=0.01, max_iter=40).fit(flat[~held_out], labels[~held_out])
    linear_score = linear.score(flat[held_out], labels[held_out])

    def block(inputs, outputs):
        convolution = torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, torch.nn.BatchNorm2d(outputs), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            *block(3, 16),
            *block(16, 24),
            *block(24, 48),
            torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(),
            torch.nn.Linear(48, 10),
        )
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        y = torch.from_numpy(labels)
        train = torch.from_numpy(np.nonzero(~held_out)[0])
        epochs, batch = 7, 50
        optimizer = torch.optim.AdamW(net.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 8e-3, epochs * (len(train) // batch)
        )
        for _ in range(epochs):
            for chosen in train[torch.randperm(len(train))].split(batch):
                loss = functional.cross_entropy(net(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    net.eval()
    with torch.no_grad():
        right = (net(x[held_out]).argmax(1) == y[held_out]).numpy()
    level = levels[held_out]
    assert linear_score < 0.3
    assert right.mean() > linear_score + 0.25
    assert right[level < 0.33].mean() > right[level > 0.66].mean() + 0.1
