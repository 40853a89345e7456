"""A finished model, ready to classify images: a model file, or a folder of exported ONNX files.

Both come with a :class:`Description`: classes, preprocessing, exits, costs and the exit policies
that the model's own run chose on its calibration split.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from gfnet_dynn.data_loader_helper import METHOD
from gfnet_dynn.model_files import load_model
from gfnet_dynn.models.exit_policy import KINDS, ExitPolicy
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.models.op_counter import model_macs
from gfnet_dynn.onnx_chain import OnnxEarlyExit, session
from shared_core import checkpoints, datasets
from shared_core.datasets.finding.scan import is_image_name
from shared_core.for_torch.data import Normalizer
from shared_core.runs import UsageError

DESCRIPTION_FILE = "model.json"
FORMAT = "gfnet_dynn.model/1"
POINTS = ("careful", "balanced", "fast")
DEFAULT_POINT = "balanced"


@dataclass(frozen=True)
class Description:
    """What has to be known beside the weights; plain JSON on disk."""

    class_names: tuple[str, ...]  # in the order of the logits
    input_size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]  # of RGB in [0, 1]
    std: tuple[float, ...]
    crop_pct: float  # share of the resized image that the network sees
    interpolation: str  # bicubic or bilinear
    exits: tuple[int, ...]  # blocks, counted from 0; none for a plain network
    costs: tuple[float, ...]  # MACs of an image that leaves at each exit, the final head last
    plain_cost: float  # MACs when no exit is looked at
    learned_gates: bool
    points: Mapping[str, dict] = field(default_factory=dict)  # policy states by wish
    rules: Mapping[str, dict] = field(default_factory=dict)  # the balanced policy of each kind
    policy: dict | None = None  # state of the policy to use when none is asked for

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON that :meth:`from_dict` reads."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Description:
        """What :meth:`as_dict` wrote; other entries are passed over."""
        kept = {name: values[name] for name in cls.__dataclass_fields__}
        for name in ("class_names", "input_size", "mean", "std", "exits", "costs"):
            kept[name] = tuple(kept[name])
        for state in (kept["policy"], *kept["points"].values(), *kept["rules"].values()):
            if state is not None:
                ExitPolicy.from_state(state).check(len(kept["exits"]))
        return cls(**kept)

    def loader(self, paths: Sequence[Path], *, batch: int, threads: int) -> datasets.BatchLoader:
        """Batches as the model wants them, in order; unreadable files are put aside."""
        view = datasets.EvalView(
            self.input_size, resize_ratio=1 / self.crop_pct, method=METHOD[self.interpolation]
        )
        images = datasets.ImageSet(list(paths), [0] * len(paths))
        return datasets.BatchLoader(
            images, view=view, batch_size=batch, threads=threads, on_error="skip"
        )

    def normalizer(self, device: torch.device | str = "cpu") -> Normalizer:
        """From uint8 batches to what the network takes."""
        return Normalizer(tuple(self.mean), tuple(self.std), device=device)


class Classifier(Protocol):
    """A network that can be asked."""

    description: Description
    device: torch.device
    full_cost: float  # MACs of an image under the policy None

    def classify(
        self, images: torch.Tensor, policy: ExitPolicy | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logits ``(N, K)`` and exits ``(N,)`` in 0..G of normalised images ``(N, 3, H, W)``.

        Under None everything runs to the final head, number G.
        """
        ...


class TorchClassifier:
    """A model file, run by torch."""

    def __init__(self, path: Path, *, device: torch.device | str = "cpu") -> None:
        self.model, self.facts = load_model(path)
        self.device = torch.device(device)
        self.model.to(self.device)
        self.description = _describe(path, self.model, self.facts)
        self.full_cost = self.description.plain_cost

    @torch.inference_mode()
    def classify(
        self, images: torch.Tensor, policy: ExitPolicy | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Classifier`."""
        if isinstance(self.model, GFNetDynn) and policy is not None:
            result = self.model.early_exit(images, policy)
            return result.logits.float().cpu().numpy(), result.exit_index.cpu().numpy()
        plain = self.model.backbone if isinstance(self.model, GFNetDynn) else self.model
        logits = plain(images).float().cpu().numpy()
        return logits, np.full(len(logits), len(self.description.exits))


class OnnxClassifier:
    """A folder that ``export_model.py`` wrote, run by ONNX Runtime on a CPU."""

    def __init__(self, folder: Path, *, threads: int = 1) -> None:
        path = folder / DESCRIPTION_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {DESCRIPTION_FILE}: expected a folder that export_model.py "
                "wrote, or a .pth file"
            )
        try:
            self.facts = json.loads(path.read_text(encoding="utf-8"))
            if self.facts["format"] != FORMAT:
                raise ValueError(f"its format is {self.facts['format']!r}, expected {FORMAT!r}")
            self.description = Description.from_dict(self.facts)
            file = None if self.facts["file"] is None else folder / str(self.facts["file"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} describes no model: {error}") from None
        self.device = torch.device("cpu")
        self.full_cost = self.description.costs[-1]
        self.chain = self.session = None
        if file is None:
            self.chain = OnnxEarlyExit(folder, threads=threads)
        elif file.is_file():
            self.session = session(file, threads=threads)
        else:
            raise FileNotFoundError(f"{file} is missing, expected the network of {path}")

    def classify(
        self, images: torch.Tensor, policy: ExitPolicy | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Classifier`."""
        values = images.contiguous().numpy()
        if self.chain is not None:
            return tuple(self.chain.run(values, ExitPolicy.never() if policy is None else policy))
        (logits,) = self.session.run(None, {"image": values})
        return logits, np.zeros(len(logits), np.int64)


def load_classifier(path: Path, *, device: torch.device | str, threads: int = 1) -> Classifier:
    """A model file or an exported folder."""
    if path.is_dir():
        return OnnxClassifier(path, threads=threads)
    return TorchClassifier(path, device=device)


def _describe(path: Path, model: torch.nn.Module, facts: Mapping[str, Any]) -> Description:
    config = facts.get("config") or {}
    has_exits = isinstance(model, GFNetDynn)
    costs = tuple(float(c) for c in model.exit_costs()) if has_exits else ()
    plain = float(model_macs(model.backbone if has_exits else model))
    found = recorded_policies(path, facts, costs) if has_exits else {}
    return Description(
        class_names=tuple(facts["class_names"]),
        input_size=tuple(facts["input_size"][1:]),
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        crop_pct=float(config.get("crop_pct", 0.875)),
        interpolation=str(config.get("train_interpolation", "bicubic")),
        exits=model.exits if has_exits else (),
        costs=costs or (plain,),
        plain_cost=plain,
        learned_gates=has_exits and model.gate_kind == "unc",
        **found,
    )


def recorded_policies(
    path: Path, facts: Mapping[str, Any], costs: Sequence[float]
) -> dict[str, Any]:
    """``points``, ``rules`` and ``policy`` that the model's run chose, nothing if there is none.

    The record is ``result.json`` of the run whose ``checkpoint/best/`` holds the file; one of
    another split or of other exits is not of this model.
    """
    path = path.resolve()
    record = path.parents[2] / "result.json" if len(path.parents) > 2 else None
    if record is None or path.parent.name != "best" or not record.is_file():
        return {}
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        exits = content["measured"]["exits"]
        same = content["data"]["split_hash"] == facts["split_hash"]
        judged = exits.get("model")  # another file may have been evaluated in the same folder
        if judged is not None and judged["sha256"] != facts["sha256"]:
            return {}
        if not same or not np.allclose(exits["macs_per_exit"], costs, rtol=1e-9):
            return {}

        def state(kind: str, row: Mapping[str, Any]) -> dict:
            policy = ExitPolicy(kind, row["threshold"], exits["temperatures"])
            policy.check(len(costs) - 1)
            return policy.state_dict()

        points = {name: state(exits["policy"], exits["points"][name]) for name in POINTS}
        rules = {kind: state(kind, row) for kind, row in exits.get("policies", {}).items()}
    except (KeyError, TypeError, ValueError) as error:
        raise checkpoints.CheckpointError(
            f"{record} is no record of a finished run ({type(error).__name__}: {error})"
        ) from None
    return {"points": points, "rules": rules, "policy": points[DEFAULT_POINT]}


# -- who leaves where -----------------------------------------------------------------------------


def add_policy_options(parser: argparse.ArgumentParser, *, may_skip: bool) -> None:
    """``--policy-point``, ``--policy`` with ``--threshold``, and ``--no-exits``."""
    group = parser.add_argument_group(
        "who may leave early (models with exits)",
        "Default: the balanced thresholds that the model's own run found on calibration data.",
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--policy-point",
        choices=POINTS,
        help="thresholds of the run: careful loses nothing on calibration data, balanced at most "
        "what the run allowed, fast spends half the MACs",
    )
    which.add_argument(
        "--policy",
        choices=KINDS,
        help="another rule; without --threshold the run's balanced one for it",
    )
    if may_skip:
        which.add_argument(
            "--no-exits", action="store_true", help="everything runs to the final head"
        )
    group.add_argument(
        "--threshold",
        type=_thresholds,
        metavar="T",
        help="leave where the score reaches T; one for all exits or one an exit: 0.5,0.6,0.7",
    )


def _thresholds(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not np.isfinite(values).all():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, or numbers with commas")
    return values


def choose_policy(
    args: argparse.Namespace, description: Description, path: Path, *, needed: bool = True
) -> ExitPolicy | None:
    """The policy that the options ask for; None: no exits.

    Args:
        needed: whether having none, because nothing says which, is an error.

    Raises:
        UsageError: options that do not fit the model, or each other.
    """
    asked = args.policy_point or args.policy
    if args.threshold is not None and args.policy is None:
        raise UsageError("--threshold alone says no rule: expected --policy KIND with it")
    if getattr(args, "no_exits", False):
        return None
    if not description.exits:
        if asked:
            raise UsageError(f"{path} has no exits: expected no exit policy")
        return None
    if args.policy is not None and args.threshold is not None:
        if args.policy in ("gate", "jei") and not description.learned_gates:
            raise UsageError(f"--policy {args.policy} asks learned gates, {path} has none")
        temperatures: Sequence[float] = (1.0,)
        if description.policy is not None:
            temperatures = description.policy["temperatures"]
        policy = ExitPolicy(args.policy, args.threshold, temperatures)
        try:
            policy.check(len(description.exits))
        except ValueError as error:
            raise UsageError(f"--threshold: {error}") from None
        return policy
    if args.policy is not None:
        state = description.rules.get(args.policy)
    else:
        state = description.points.get(args.policy_point) if asked else description.policy
    if state is not None:
        return ExitPolicy.from_state(state)
    if not needed and not asked:
        return None
    what = f"--policy {args.policy}" if args.policy else "its exits"
    raise UsageError(
        f"no record of its run gives {path} thresholds for {what}: expected --policy KIND "
        "--threshold T" + (", or --no-exits" if hasattr(args, "no_exits") else "")
    )


# -- which images ---------------------------------------------------------------------------------


def list_images(paths: Iterable[Path]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Image files at and below ``paths``, each once, folders sorted as bytes.

    A file that is named itself is taken whatever its extension is.

    Returns:
        The files, and what could not be listed with the reason.
    """
    files: dict[Path, None] = {}
    bad: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_dir():
            found: list[Path] = []
            _walk(path, found, bad, frozenset())
            if not found:
                bad.append((path, "no image in this folder"))
            files.update(dict.fromkeys(found))
        elif path.exists():
            files[path] = None
        else:
            bad.append((path, "no such file or folder"))
    return list(files), bad


def _walk(
    folder: Path, found: list[Path], bad: list[tuple[Path, str]], above: frozenset[str]
) -> None:
    real = os.path.realpath(folder)
    if real in above:  # a link back to a folder that holds it
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        bad.append((folder, error.strerror or str(error)))
        return
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith("."):
            _walk(folder / entry.name, found, bad, above | {real})
        elif is_image_name(entry.name) and not entry.is_dir():
            found.append(folder / entry.name)
