"""This project's model files as the core's predictors: what they are, and how torch runs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gfnet_dynn.choices import DEFAULT_POINT
from gfnet_dynn.data_loader_helper import METHOD
from gfnet_dynn.model_files import POLICIES, PROJECT, choose_device, load_model
from gfnet_dynn.models.exit_policy import NEVER, ExitPolicy
from gfnet_dynn.models.gfnet_dynn import GFNetDynn
from gfnet_dynn.models.op_counter import model_macs
from shared_core.datasets.views.augment import EvalView
from shared_core.deploy import exit_policy as core
from shared_core.deploy.facts import Exits, ModelFacts
from shared_core.deploy.predictor import (
    ExitPredictor,
    NetworkPredictor,
    Predictor,
    activate,
)
from shared_core.for_torch.data import Normalizer

RUNTIME = "torch"


def open_checkpoint(
    path: Path, *, runtime: str = "auto", threads: int = 1, device: str = "cpu"
) -> Predictor | None:
    """An opener for the core: a file of this project by torch; None for anything else."""
    if path.suffix != ".pth" or runtime not in ("auto", RUNTIME):
        return None
    model, stored = load_checkpoint(path)
    about = model_facts(model, stored)
    return predictor_of(model, about, name=str(path), device=choose_device(device))


def load_checkpoint(path: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Network and facts; a network with an empty list of exits is the plain one in it."""
    model, facts = load_model(path)
    if isinstance(model, GFNetDynn) and not model.exits:
        model = model.backbone
    return model, facts


def predictor_of(
    model: nn.Module, about: ModelFacts, *, name: str, device: torch.device
) -> Predictor:
    """A loaded network that answers as its own run's evaluation did."""
    model = model.to(device).eval()
    normalise = Normalizer(about.mean, about.std, device=device)
    names = {"runtime": RUNTIME, "name": name}
    if not isinstance(model, GFNetDynn):

        @torch.inference_mode()
        def run(images: np.ndarray) -> np.ndarray:
            return activate(model(normalise(images)).float().cpu().numpy(), about.activation)

        return NetworkPredictor(about, run, **names)

    @torch.inference_mode()
    def classify(images: np.ndarray, policy: core.ExitPolicy) -> tuple[np.ndarray, np.ndarray]:
        pixels = normalise(images)
        if min(policy.thresholds) >= NEVER:  # nobody leaves: no exit needs to be looked at
            logits = model.backbone(pixels).float().cpu().numpy()
            return logits, np.full(len(logits), model.num_gates)
        result = model.early_exit(pixels, ExitPolicy.from_state(policy.state_dict()))
        return result.logits.float().cpu().numpy(), result.exit_index.cpu().numpy()

    return ExitPredictor(about, classify, has_gates=True, **names)


def model_facts(model: nn.Module, facts: Mapping[str, Any]) -> ModelFacts:
    """What has to be known beside the weights, from the facts of a model file."""
    config = facts.get("config") or {}
    size = tuple(facts["input_size"][1:])
    view = EvalView(
        size,
        resize_ratio=1 / float(config.get("crop_pct", 0.875)),
        method=METHOD[str(config.get("train_interpolation", "bicubic"))],
    )
    plain = float(model_macs(model.backbone if isinstance(model, GFNetDynn) else model))
    parameters = sum(p.numel() for p in model.parameters())
    return ModelFacts(
        project=PROJECT,
        architecture=facts["architecture"],
        class_names=tuple(facts["class_names"]),
        input_size=size,
        view=view.settings(),
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        exits=_exits(model, facts, plain) if isinstance(model, GFNetDynn) else None,
        costs={"macs": plain, "parameters": parameters},
        provenance={
            "checkpoint_sha256": facts["sha256"],
            "data": facts.get("data"),
            "split_hash": facts.get("split_hash"),
            "initial_weights": facts.get("start") or config.get("pretrained"),
            "teacher": config.get("teacher"),
            "scale": config.get("scale"),
            "seed": config.get("seed"),
            "calibration": {
                name: value
                for name, value in (facts.get("metrics") or {}).items()
                if name.startswith("calibration_")
            },
        },
    )


def _exits(model: GFNetDynn, facts: Mapping[str, Any], plain: float) -> Exits:
    known = facts.get(POLICIES) or {"points": {}, "rules": {}}
    return Exits(
        after=model.exits,
        costs=tuple(float(cost) for cost in model.exit_costs()),
        plain_cost=plain,
        learned_gates=model.gate_kind == "unc",
        policy=known["points"].get(DEFAULT_POINT),
        points=known["points"],
        rules=known["rules"],
    )
