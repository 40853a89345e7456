"""The configuration: config.yaml, what the command line sets, and the refusal of anything else.

The file that lies in this package is complete: it lists every key with its default, and its values
say which type each key has. Any other file names only what it changes. Nothing heavy is loaded
here, so that contradictions are told before torch is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shared_core.runs.command import UsageError
from shared_core.texts import read_text

NEEDS_TEACHER = ("teacher_only", "mixed", "apprentice_a", "apprentice_b", "apprentice_c")
NEEDS_LABELS = ("labels", "mixed", "apprentice_a", "apprentice_b", "apprentice_c")
INSTALL_OPENVINO = "pip install './packages/mpkd[openvino]'"

DEFAULT_FILE = Path(__file__).resolve().parents[1] / "config.yaml"

CHOICES: dict[str, tuple[str, ...]] = {
    "dataset.name": ("cifar10", "imagenet", "folder", "digits", "builtin"),
    "model.stem": ("auto", "small", "standard"),
    "teacher.mode": ("full", "head", "lora"),
    "lora.target": ("teacher", "student"),
    "distillation.mode": (
        "teacher_only", "labels", "mixed", "apprentice_a", "apprentice_b", "apprentice_c",
    ),
    "distillation.loss": ("kl", "mse_logits", "js", "dkd", "dist"),
    "distillation.teacher_engine": ("torch", "openvino"),
    "mixed_precision.dtype": ("auto", "bf16", "fp16"),
    "training.lr_scheduler": ("constant", "cosine", "step"),
    "quantization.method": (
        "none", "ptq", "qat", "brecq", "uniform", "sensitivity", "haq", "sdq", "mixquant",
    ),
    "quantization.budget_kind": ("size", "bops", "latency"),
    "quantization.finish": ("auto", "ptq", "brecq", "qat"),
    "quantization.ranges": ("mse", "minmax"),
}  # fmt: skip

# Lowest and highest value, both allowed.
RANGES: dict[str, tuple[float, float]] = {
    "experiment.seed": (0, 2**32 - 1),
    "experiment.epochs": (1, 100_000),
    "experiment.batch_size": (1, 1_000_000),
    "experiment.learning_rate": (1e-12, 1e3),
    "experiment.weight_decay": (0, 10),
    "experiment.threads": (0, 1024),
    "dataset.image_size": (0, 4096),
    "dataset.max_images": (0, math.inf),
    "dataset.val_split": (0.01, 0.5),
    "dataset.crop": (0.01, 1),
    "dataset.workers": (0, 256),
    "model.num_classes": (0, 1_000_000),
    "model.teacher_size": (0, 4096),
    "finetune.body_rate": (1e-6, 1),
    "finetune.layer_decay": (1e-3, 1),
    "finetune.weight_decay": (0, 10),
    "finetune.warmup": (0, 0.9),
    "finetune.label_smoothing": (0, 0.99),
    "teacher.epochs": (1, 100_000),
    "teacher.learning_rate": (1e-12, 1e3),
    "lora.r": (1, 4096),
    "lora.alpha": (1e-6, 1e6),
    "lora.dropout": (0, 0.99),
    "distillation.temperature": (1e-3, 1e3),
    "distillation.alpha": (0, 1),
    "distillation.views": (1, 1000),
    "mixed_precision.init_scale": (1, 2.0**40),
    "mixed_precision.growth_interval": (1, 10**9),
    "training.gradient_accumulation_steps": (1, 100_000),
    "training.clip": (0, math.inf),
    "training.lr_step_size": (1, 100_000),
    "training.lr_gamma": (1e-6, 1),
    "training.lr_warmup_steps": (0, math.inf),
    "training.max_train_steps": (0, math.inf),
    "training.ema": (0, 0.999999),
    "quantization.w_bits": (2, 32),
    "quantization.a_bits": (2, 32),
    "quantization.budget": (1e-6, 32),
    "quantization.calib_samples": (1, math.inf),
    "quantization.epochs": (1, 100_000),
    "quantization.learning_rate": (1e-12, 1e3),
    "quantization.bin_strength": (0, 1e3),
    "quantization.brecq_steps": (1, 10**9),
    "quantization.brecq_learning_rate": (0, 1e3),
    "quantization.haq_episodes": (1, 10**9),
    "quantization.sdq_epochs": (0, 100_000),
    "export.max_accuracy_loss": (0, 1),
    "logging.log_interval": (0, math.inf),
}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def load_config(
    path: str | Path | None = None,
    settings: Sequence[str] = (),
    *,
    overrides: Mapping[str, Any] | None = None,
    last: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Defaults, then the file, then ``overrides``, then ``settings``.

    Args:
        path: a YAML file; None = the defaults alone.
        settings: ``section.key=value`` as on the command line; the value is read as YAML.
        overrides: values by dotted key, of a recipe.
        last: values by dotted key, over everything else.

    Returns:
        Values by dotted key, every one of the right type.

    Raises:
        FileNotFoundError: no such file.
        UsageError: an unknown key (the line names the nearest one), a wrong type, a value that is
            none of the choices or out of range.
    """
    known = flatten(_read(DEFAULT_FILE))
    config = copy.deepcopy(known)
    if path is not None and Path(path).resolve() != DEFAULT_FILE:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--config {path}: there is no such file")
        for key, value in flatten(_read(Path(path))).items():
            config[_known_key(key, known, str(path))] = value
    for key, value in (overrides or {}).items():
        config[_known_key(key, known, "recipe")] = value
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: expected section.key=value")
        config[_known_key(key.strip(), known, "--set")] = _parse(value, text)
    config.update(last or {})
    for key, value in config.items():
        config[key] = _checked(key, value, known[key])
    return config


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(read_text(path).content)
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: {type(content).__name__}, expected sections with keys")
    return content


def _parse(value: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(value) if value.strip() else ""
    except yaml.YAMLError:
        raise UsageError(f"--set {text}: the value is not YAML") from None


def _known_key(key: str, known: Mapping[str, Any], where: str) -> str:
    if key in known:
        return key
    near = get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        leaf = key.rpartition(".")[2]
        near = [name for name in known if name.rpartition(".")[2] == leaf]
    hint = f", perhaps {near[0]}" if near else ""
    raise UsageError(f"{where}: unknown key {key!r}: expected a key of config.yaml{hint}")


def _checked(key: str, value: Any, default: Any) -> Any:
    """``value`` in the type of ``default``."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UsageError(f"{key} is {value!r}, expected true or false")
    elif isinstance(default, int):
        if isinstance(value, bool) or not isinstance(value, int):
            raise UsageError(f"{key} is {value!r}, expected a whole number{_number_hint(value)}")
    elif isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UsageError(f"{key} is {value!r}, expected a number{_number_hint(value)}")
        value = float(value)
        if not math.isfinite(value):
            raise UsageError(f"{key} is {value}, expected a finite number")
    elif isinstance(default, list):
        kind = str if key in ("dataset.unlabelled", "lora.target_modules") else int
        if not isinstance(value, list) or not all(
            isinstance(item, kind) and not isinstance(item, bool) for item in value
        ):
            wanted = "texts" if kind is str else "whole numbers"
            raise UsageError(f"{key} is {value!r}, expected a list of {wanted}")
    elif value is None:
        value = ""
    elif not isinstance(value, str):
        raise UsageError(f"{key} is {value!r}, expected text")
    if key in CHOICES and value not in CHOICES[key]:
        near = get_close_matches(str(value), CHOICES[key], n=1, cutoff=0.5)
        hint = f", perhaps {near[0]}" if near else ""
        raise UsageError(f"{key} is {value!r}: expected one of {', '.join(CHOICES[key])}{hint}")
    if key in RANGES:
        low, high = RANGES[key]
        if not low <= value <= high:
            raise UsageError(f"{key} is {value}, expected {low:g} to {high:g}")
    return value


def _number_hint(value: Any) -> str:
    """YAML reads 1e-4 as text; say how to write it."""
    if not isinstance(value, str):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    mantissa, _, exponent = value.lower().partition("e")
    if not exponent or not math.isfinite(number):
        return ""
    return f": YAML reads {value} as text, write {float(mantissa)}e{int(exponent):+d}"


# -- what does not go together --------------------------------------------------------------------


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse settings that contradict each other.

    Raises:
        UsageError: names both.
    """
    mode, method = config["distillation.mode"], config["quantization.method"]
    if config["dataset.unlabelled"] and mode in NEEDS_LABELS:
        raise UsageError(
            f"dataset.unlabelled: mode {mode} reads labels, which these images have not; expected "
            "distillation.mode=teacher_only"
        )
    if mode == "apprentice_a" and config["model.teacher_ckpt"] not in ("", "none", "trained"):
        raise UsageError(
            "model.teacher_ckpt: mode apprentice_a trains its teacher from scratch; expected none, "
            "or distillation.mode=apprentice_b"
        )
    if mode == "apprentice_c" and method not in ("none", "qat"):
        raise UsageError(
            f"quantization.method is {method}: mode apprentice_c gives its student the bits while "
            "it learns, expected qat or none"
        )
    if config["distillation.teacher_engine"] == "openvino":
        _check_openvino(mode)
    loss = config["distillation.loss"]
    if loss == "mse_logits" and mode in ("teacher_only", "mixed"):
        temperature = config["distillation.temperature"]
        if temperature != 1:
            raise UsageError(
                f"distillation.temperature is {temperature}: mse_logits compares logits as they "
                "are, expected 1"
            )
    gathered = config["training.gradient_accumulation_steps"]
    if gathered > 1 and loss == "dist":
        raise UsageError(
            "distillation.loss dist compares the images of a batch with each other: expected "
            f"training.gradient_accumulation_steps=1, got {gathered}"
        )
    if config["dataset.split"] and config["dataset.name"] != "folder":
        raise UsageError(
            f"dataset.split: dataset.name is {config['dataset.name']}, which has a split of its "
            "own; expected dataset.name=folder"
        )


def _check_openvino(mode: str) -> None:
    if mode not in NEEDS_TEACHER or mode == "apprentice_a":
        why = "trains its teacher" if mode == "apprentice_a" else "has no teacher"
        raise UsageError(
            f"distillation.teacher_engine openvino answers for a fixed teacher, mode {mode} {why}: "
            "expected distillation.teacher_engine=torch"
        )
    if find_spec("openvino") is None:
        raise UsageError(
            "distillation.teacher_engine is openvino, which is not installed: expected "
            f"distillation.teacher_engine=torch, or {INSTALL_OPENVINO}"
        )
