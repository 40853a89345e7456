"""Trained starts: weights, the head from a probe, the floor, the recipe, what a network sees."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from mpkd.dataset.data_utils import CALIBRATION, TEST, TRAIN
from mpkd.dataset.sources import load_data
from mpkd.model.networks import PLAIN, Sight, build_net, sight_of
from mpkd.run_context import Run
from mpkd.stages import check_networks, start_student, teacher_stage
from mpkd.starting import plain_floor, start_head, start_net
from mpkd.trainer.metrics_logger import MetricsLogger
from mpkd.trainer.objectives import LiveTeacher
from mpkd.trainer.settings import body_and_head, finetuned, settings_from
from mpkd.utils.config import load_config
from shared_core.checkpoints import CheckpointError
from shared_core.for_torch.checkpoints import from_numpy, weights_sha256
from shared_core.for_torch.data import Normalizer
from shared_core.for_torch.features import feature_function
from shared_core.for_torch.precision import Precision
from shared_core.for_torch.pretrained import start_network
from shared_core.metrics.floor import plain_features
from shared_core.metrics.probe import fit_probe
from shared_core.runs import StageLog, UsageError
from shared_core.weights.catalogue import entry
from shared_core.weights.finding import installed_file
from shared_core.weights.reading import read_weights

LITE0 = entry("lite0")
pytestmark = pytest.mark.skipif(
    LITE0 is None or installed_file(LITE0) is None, reason="needs the weights package of lite0"
)
KEYS = {
    "dataset.name": "digits", "dataset.image_size": 16, "dataset.max_images": 200,
    "dataset.workers": 0, "experiment.batch_size": 32, "experiment.device": "cpu",
    "model.teacher_model": "lite0", "model.teacher_size": 32, "model.student_widths": [8, 16],
    "teacher.epochs": 1, "distillation.views": 2, "logging.log_interval": 0,
}  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """A run on a few digits, whose teacher sees them at 32 pixels."""

    def make(name: str = "run", **changes: object) -> Run:
        keys = KEYS | {key.replace("__", "."): value for key, value in changes.items()}
        config = load_config(None, (), overrides=keys)
        folder = tmp_path / name
        data = load_data(config, folder, data_root=None)
        csv = MetricsLogger(folder / "t.csv", run_id="t")
        return Run(config, data, folder, StageLog(folder), csv, torch.device("cpu"))

    return make


# -- what a network sees --------------------------------------------------------------------------


def test_enlarging_is_opencvs_bicubic_and_the_mean_is_the_networks_own():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    other = Sight((0.4, 0.5, 0.6), (0.3, 0.2, 0.1), 40)
    seen = other.of(Normalizer()(pixels), PLAIN)
    wanted = [
        cv2.resize(p.astype(np.float32) / 255, (40, 40), interpolation=cv2.INTER_CUBIC)
        for p in pixels
    ]
    wanted = (np.stack(wanted) - np.array(other.mean)) / np.array(other.std)
    np.testing.assert_allclose(seen.permute(0, 2, 3, 1).numpy(), wanted, atol=2e-4)
    with pytest.raises(ValueError, match="40 pixels, expected plain ones"):
        PLAIN.of(seen, other)


def test_the_loader_of_a_network_gives_what_it_sees(make_run):
    run = make_run()
    net = start_net(run, "teacher").net
    assert sight_of(net) == Sight(tuple(LITE0.mean), tuple(LITE0.std), 32)
    mine = next(iter(run.evaluation_loader(TEST, sight=sight_of(net)))).images
    plain = next(iter(run.evaluation_loader(TEST))).images
    assert mine.shape[-1] == 32 and plain.shape[-1] == 16
    torch.testing.assert_close(mine, sight_of(net).of(plain, PLAIN), atol=1e-4, rtol=0)


def test_stored_answers_are_the_live_ones_of_a_teacher_that_sees_more(make_run):
    run = make_run()
    teacher = start_net(run, "teacher").net.eval()
    images = run.data.sets[TRAIN]
    stored, views = run.teacher_source(teacher, "a" * 64, images)
    live = LiveTeacher(teacher, autocast=Precision("cpu", "fp32").autocast)
    loader = run.training_loader("s", replayed=views)
    for epoch in range(views):
        loader.loader.order.set_epoch(epoch)
        for batch in loader:
            torch.testing.assert_close(stored(batch), live(batch), atol=1e-3, rtol=1e-3)
    kept = run.teacher_says(teacher, "a" * 64)
    assert kept.shape == (len(images),)


# -- weights --------------------------------------------------------------------------------------


def test_a_trained_start_holds_the_packages_weights_and_none_does_not(make_run):
    weights = from_numpy(read_weights(installed_file(LITE0)))
    started = start_net(make_run(), "teacher")
    state = started.net.state_dict()
    assert all(
        torch.equal(state[k], v) for k, v in weights.items() if not k.startswith("classifier.")
    )
    assert started.new_head and started.source["sha256"] == LITE0.sha256
    nothing = start_net(make_run("none", model__teacher_ckpt="none"), "teacher")
    assert not torch.equal(nothing.net.conv_stem.weight, weights["conv_stem.weight"])
    assert nothing.source == {} and nothing.about["side"] == 32


def test_small_images_are_shown_to_a_trained_teacher_at_128_pixels(make_run):
    from mpkd.utils.common import describe_net

    trained, none = (
        make_run(f"r{init}", model__teacher_size=0, model__teacher_ckpt=init).config
        for init in ("trained", "none")
    )
    assert describe_net("teacher", trained, image_size=32)["side"] == 128
    assert describe_net("teacher", none, image_size=32)["side"] == 0
    assert describe_net("teacher", trained, image_size=224)["image_size"] == 224
    assert describe_net("student", trained, image_size=32)["side"] == 0


def test_wrong_starts_are_refused_before_anything_is_trained(make_run, tmp_path):
    with pytest.raises(UsageError, match="nowhere: there is no such file"):
        check_networks(make_run(model__teacher_ckpt="nowhere"))
    torch.save(resnet18(num_classes=3).state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="weights do not fit"):
        start_net(make_run("b", model__teacher_ckpt=str(tmp_path / "other.pth")), "teacher")
    with pytest.raises(ValueError, match="'lite9'"):
        check_networks(make_run("c", model__teacher_model="lite9"))


def test_a_file_decides_head_and_stem(make_run, tmp_path):
    torch.manual_seed(0)
    source = resnet18(num_classes=10)
    path = str(tmp_path / "weights.pth")
    torch.save(source.state_dict(), path)
    keys = {"model__teacher_model": "resnet18", "model__teacher_ckpt": path}
    started = start_net(make_run("a", **keys), "teacher")
    assert torch.equal(started.net.fc.weight, source.fc.weight) and not started.new_head
    assert started.net.conv1.kernel_size == (7, 7)  # at 32 pixels, for its weights are such
    about = {"name": "resnet18", "image_size": 32, "stem": "small"}
    torch.save(build_net(about, num_classes=4).state_dict(), path)
    started = start_net(make_run("b", **keys), "teacher")
    assert started.net.conv1.kernel_size == (3, 3) and started.new_head


# -- probe and floors -----------------------------------------------------------------------------


def views_of(run: Run, part: str) -> np.ndarray:
    loader = run.evaluation_loader(part).loader
    return np.concatenate([batch.images.copy() for batch in loader])


def test_the_floor_is_a_line_through_the_trained_features(make_run):
    """Recomputed with the core's own function of features; the head then answers as the line."""
    run = make_run(dataset__image_size=32)
    started = start_net(run, "teacher")
    floor = start_head(run, started, "teacher")
    network = start_network("lite0", init="trained", num_classes=10)
    features = feature_function(network, num_classes=10)
    seen = {part: features(views_of(run, part)) for part in (TRAIN, CALIBRATION, TEST)}
    labels = {part: run.data.sets[part].labels for part in seen}
    probe = fit_probe(
        seen[TRAIN], labels[TRAIN], num_classes=10,
        validation=(seen[CALIBRATION], labels[CALIBRATION]),
    )  # fmt: skip
    assert abs(floor["accuracy"] - probe.accuracy(seen[TEST], labels[TEST])) <= 2 / len(
        labels[TEST]
    )
    assert floor["images"] == len(labels[TEST]) and floor["network"] == "lite0"
    assert abs(run.evaluate(started.net, TEST).accuracy - floor["accuracy"]) < 0.02


def test_the_floor_of_plain_features(make_run):
    run = make_run()
    seen = {p: np.stack([plain_features(i) for i in views_of(run, p)]) for p in run.data.sets}
    labels = {part: run.data.sets[part].labels for part in seen}
    probe = fit_probe(
        seen[TRAIN], labels[TRAIN], num_classes=10,
        validation=(seen[CALIBRATION], labels[CALIBRATION]),
    )  # fmt: skip
    assert plain_floor(run)["accuracy"] == probe.accuracy(seen[TEST], labels[TEST])


def test_the_students_head_is_what_the_teacher_says_and_reads_no_label(make_run, monkeypatch):
    keys = {"model__student_model": "lite0", "dataset__image_size": 32}
    heads = []
    for name in ("true", "permuted"):
        run = make_run(name, **keys)
        teacher = start_net(run, "teacher").net.eval()
        torch.manual_seed(1)
        with torch.no_grad():
            teacher.classifier.weight.normal_(0, 0.1)
            teacher.classifier.bias.zero_()
        if name == "permuted":
            train = run.data.sets[TRAIN]
            other = np.roll(train.labels, 7)
            sets = run.data.sets | {TRAIN: replace_labels(train, other)}
            run = replace(run, data=replace(run.data, sets=sets))
        started, floor = start_student(run, teacher, weights_sha256(teacher.state_dict()))
        assert floor == {}
        heads.append(started.net.classifier.weight.detach().clone())
    assert torch.equal(*heads)


def replace_labels(images, labels):
    from shared_core.datasets import ImageSet

    return ImageSet(images.paths, labels, images.keys, source=images.array)


# -- the recipe -----------------------------------------------------------------------------------


def test_body_and_head_learn_at_their_rates(make_run):
    run = make_run(finetune__body_rate=0.1, finetune__layer_decay=0.5)
    net = start_net(run, "teacher").net
    settings = finetuned(settings_from(run.config), run.config, classes=10)
    rates = {}
    for group in body_and_head(net, settings):
        for parameter in group["params"]:
            rates[id(parameter)] = (group["relative"], group["weight_decay"])
    assert rates[id(net.classifier.weight)] == (1.0, 0.02)
    assert rates[id(net.classifier.bias)][1] == 0.0
    assert rates[id(net.conv_head.weight)][0] == pytest.approx(0.1)
    assert rates[id(net.conv_stem.weight)][0] < 1e-4
    assert settings.rate(0, total=100, steps_per_epoch=10) == settings.learning_rate / 10


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A teacher fine-tuned for an epoch, with the recipe and with one of its parts cut."""
    made = {}
    for name, changes in {
        "recipe": {}, "moving": {"finetune.freeze_norms": False},
        "wild": {"teacher.learning_rate": 5.0},
    }.items():  # fmt: skip
        folder = tmp_path_factory.mktemp(name)
        config = load_config(None, (), overrides=KEYS | changes)
        data = load_data(config, folder, data_root=None)
        csv = MetricsLogger(folder / "t.csv", run_id="t")
        run = Run(config, data, folder, StageLog(folder), csv, torch.device("cpu"))
        made[name] = (run, teacher_stage(run))
    return made


def moved(run: Run, name: str) -> bool:
    from mpkd.stages import load_teacher

    weights = read_weights(installed_file(LITE0))
    return not np.allclose(load_teacher(run)[0].state_dict()[name].numpy(), weights[name])


def test_fine_tuning_moves_weights_and_leaves_the_statistics_of_norms(tuned):
    run, result = tuned["recipe"]
    assert result["start"]["name"] == LITE0.name and result["image_size"] == 32
    if result["epoch"]:  # else the probe was best
        assert moved(run, "blocks.3.0.conv_pw.weight")
    assert not moved(run, "bn1.running_mean")
    run, result = tuned["moving"]
    assert not result["epoch"] or moved(run, "bn1.running_mean")


def test_tuning_may_not_end_below_the_probe(tuned):
    run, result = tuned["wild"]
    assert result["epoch"] == 0 and not moved(run, "blocks.3.0.conv_pw.weight")
    assert result["test_accuracy"] == pytest.approx(result["floor"]["accuracy"], abs=0.02)
