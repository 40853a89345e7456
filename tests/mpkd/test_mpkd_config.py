"""The configuration: every key documented by its default, and nothing else accepted."""

from __future__ import annotations

import pytest
import yaml

from mpkd.utils.config import CHOICES, DEFAULT_FILE, RANGES, flatten, load_config
from shared_core.runs import UsageError


def test_the_file_as_it_lies_there_is_valid_and_complete():
    config = load_config(DEFAULT_FILE)
    assert config == load_config() == flatten(yaml.safe_load(DEFAULT_FILE.read_text()))
    assert set(CHOICES) | set(RANGES) <= set(config)
    numbers = {k for k, v in config.items() if isinstance(v, (int, float)) and v is not True}
    assert {k for k in numbers if config[k] is not False} == set(RANGES)


def test_a_file_names_only_what_it_changes(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("experiment: {epochs: 3}\ndataset:\n  cache: {enabled: false}\n")
    config = load_config(own, ["experiment.epochs=7"], overrides={"experiment.batch_size": 4})
    assert config["experiment.epochs"] == 7 and config["experiment.batch_size"] == 4
    assert config["dataset.cache.enabled"] is False and config["experiment.seed"] == 0


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("experiment.learning_rate=3", 3.0),
        ("experiment.learning_rate=1.0e-4", 1e-4),
        ("model.student_widths=[8, 16]", [8, 16]),
        ("model.teacher_ckpt=", ""),
        ("dataset.unlabelled=[a, b c]", ["a", "b c"]),
        ("training.compile=true", True),
    ],
)
def test_settings_are_read_as_yaml(setting, value):
    assert load_config(None, [setting])[setting.partition("=")[0]] == value


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("experiment.learning_rate=1e-4", "YAML reads 1e-4 as text, write 1.0e-4"),
        ("experiment.learning_rate=fast", "'fast', expected a number$"),
        ("experiment.epochs=2.5", "2.5, expected a whole number"),
        ("experiment.epochs=true", "True, expected a whole number"),
        ("experiment.epochs=0", "0, expected 1 to"),
        ("experiment.epoch=3", "'experiment.epoch'.*perhaps experiment.epochs"),
        ("epochs=3", "'epochs'.*perhaps .*epochs"),
        ("nonsense.quux=3", "'nonsense.quux': expected a key of config.yaml$"),
        ("distillation.loss=kld", "'kld': expected one of kl.*perhaps kl$"),
        ("mixed_precision.enabled=1", "1, expected true or false"),
        ("model.student_widths=[8, x]", "list of whole numbers"),
        ("dataset.unlabelled=images", "list of texts"),
        ("experiment.name=[a]", "expected text"),
        ("experiment.epochs", "expected section.key=value"),
        ("experiment.name=[", "not YAML"),
        ("training.clip=.inf", "finite"),
        ("distillation.alpha=1.5", "1.5, expected 0 to 1"),
    ],
)
def test_what_does_not_fit_is_one_line(setting, words):
    with pytest.raises(UsageError, match=words) as caught:
        load_config(None, [setting])
    assert "\n" not in str(caught.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    for text, words in (("- a\n", "list, expected sections"), ("a: [\n", "not YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UsageError, match=words):
            load_config(tmp_path / "bad.yaml")
    (tmp_path / "odd.yaml").write_text("experiment: {batchsize: 3}\n")
    with pytest.raises(UsageError, match="perhaps experiment.batch_size"):
        load_config(tmp_path / "odd.yaml")


def test_ranges_and_defaults_agree():
    config = load_config()
    for key, (low, high) in RANGES.items():
        assert low <= config[key] <= high, key
