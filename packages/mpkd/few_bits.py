"""The stage that gives the student few bits: what :mod:`mpkd.quant` needs, from a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mpkd.dataset.data_utils import CALIBRATION, TEST, TRAIN
from mpkd.deploy.layer_latency import latency_table
from mpkd.model.networks import sight_of
from mpkd.quant.companion import Companion
from mpkd.quant.cost import layer_facts, mean_bits, size_bytes
from mpkd.quant.finish import Learn, Material
from mpkd.quant.layers import FLOAT, calibrate, quantizable, quantize_net
from mpkd.quant.quantize import QuantizationResult, run_quantization
from mpkd.quant.search.sdq import Sdq
from mpkd.quant.settings import quant_settings
from mpkd.quant.shipped import shipped
from mpkd.run_context import PACKED_FILE, QUANTIZED_FILE, STUDENT_FILE, Run
from mpkd.trainer.objectives import make_objective
from mpkd.trainer.settings import bits_settings
from mpkd.utils.common import describe_quantization, load_net, save_packed, starts_trained
from mpkd.utils.config import NEEDS_LABELS, NEEDS_TEACHER
from shared_core.for_torch.run_state import StageState
from shared_core.runs import UsageError


def needs_teacher(config: Mapping[str, Any]) -> bool:
    """Whether the run has a teacher at all."""
    return config["distillation.mode"] in NEEDS_TEACHER


def lower(run: Run, net: nn.Module) -> Mapping[str, Any]:
    """Give ``net`` fake-quantized layers with learned scales, in place; what rebuilds them.

    For the apprentice schemes, whose student has few bits while it learns. Batch norms stay beside
    the convolutions.
    """
    settings = quant_settings(run.config)
    if not quantizable(net):
        raise UsageError("nothing to quantize: the network has no convolution and no linear layer")
    plan = settings.plain_plan(layer_facts(net, run.data.image_size))
    inputs = {name: bits for name, bits in plan.a.items() if bits != FLOAT}
    quantize_net(
        net, plan.w, inputs, learned=settings.learned, method=settings.ranges,
        symmetric=settings.symmetric,
    )  # fmt: skip
    net.to(run.device)
    if inputs:
        calibrate(net, run.calibration_images(sight=sight_of(net)), method=settings.ranges)
    return describe_quantization(net) or {}


def learner(run: Run, teacher: nn.Module | None, digest: str, states: list[StageState]) -> Learn:
    """What trains a network of few bits by the run's objective, as the pipeline trains all others.

    Args:
        digest: sha256 of the teacher's weights.
        states: gets the state of each training; remove them when the stage's result is written.
    """
    config = run.config
    alone = teacher is not None and config["distillation.mode"] not in NEEDS_LABELS
    images = run.data.learning_set(unlabelled=alone)
    taught: dict[str, Any] = {}

    def learn(
        name: str, net: nn.Module, *, epochs: int, companion: Companion | None = None
    ) -> None:
        if teacher is not None and not taught:
            seen = sight_of(net)
            source, replayed = run.teacher_source(teacher, digest, images, seen=seen)
            taught.update(source=source, replayed=replayed, reference=run.reference(teacher))
        chosen = config if teacher is not None else {"distillation.mode": "labels"}
        best = "agreement" if alone else "accuracy"
        _, trainer = run.fit(
            f"quantize-{name}", net, make_objective(chosen, taught.get("source")),
            settings=bits_settings(config, epochs=epochs),
            loader=run.training_loader(
                "quantize", images, replayed=taught.get("replayed", 0), sight=sight_of(net)
            ),
            reference=taught.get("reference"), companion=companion,
            follows=states[-1] if states else None,
            choose_by="last" if isinstance(companion, Sdq) else best,
            labelled=len(images) == len(run.data.sets[TRAIN]),
            frozen_norms=starts_trained(config, "student") and config["finetune.freeze_norms"],
        )  # fmt: skip
        states.append(trainer.state)

    return learn


def quantize(
    run: Run, student: nn.Module, teacher: nn.Module | None, digest: str
) -> tuple[QuantizationResult, Callable[[], None]]:
    """The student by ``quantization.method``, with what it cost and lost.

    Searches choose by the accuracy on the calibration images.

    Returns:
        The result, and what to call when it is written: the states of its trainings go.
    """
    settings, states = quant_settings(run.config), []
    run.begin("quantize")
    size = run.data.image_size
    material = Material(
        calibration=torch.cat(run.calibration_images(sight=sight_of(student))),
        evaluate=lambda net: run.evaluate(net, CALIBRATION).accuracy,
        learn=learner(run, teacher, digest, states),
        latencies=lambda bits: latency_table(student, size, bits, device=run.device),
        cache=run.log.folder / "state" / "haq_scores.json" if run.world.is_main else None,
        log=run.log.say,
    )
    made = run_quantization(student, settings, material)

    def written() -> None:
        for state in states:
            state.remove()

    return made, written


def quantize_stage(
    run: Run, load_teacher: Callable[[Run], tuple[nn.Module, str]]
) -> dict[str, Any]:
    """Give the trained student few bits, and measure what it lost.

    Args:
        load_teacher: the run's teacher and the sha256 of its weights.
    """
    config = run.config
    if config["quantization.method"] == "none":
        return {"method": "none"}
    student, facts = load_net(run.checkpoint(STUDENT_FILE))
    student.to(run.device)
    if facts.get("quantization"):
        return _apprentice(run, student, facts)
    before = run.evaluate(student, TEST)
    teacher, digest = load_teacher(run) if needs_teacher(config) else (None, "")
    made, written = quantize(run, student, teacher, digest)
    test = run.evaluate(made.net, TEST)
    metrics = {"calibration_accuracy": made.accuracy, "test_accuracy": test.accuracy}
    run.save(QUANTIZED_FILE, made.net, facts["net"], epoch=0, metrics=metrics,
             quantization=describe_quantization(made.net))  # fmt: skip
    on_disk = run.from_main(lambda: save_packed(run.checkpoint(PACKED_FILE), made.net, facts))
    for note in made.notes:
        run.log.say(f"quantize: {note}")
    run.log.say(
        f"quantize: test accuracy {before.accuracy:.4f} -> {test.accuracy:.4f} by {made.method}, "
        f"{made.mean_bits:.2f} bits a weight, {on_disk:,} bytes on disk"
    )
    written()
    return {
        **made.record(), **metrics, "before": before.accuracy, "bytes": on_disk,
        "agreement": test.agreement(before.logits),
    }  # fmt: skip


def _apprentice(run: Run, student: nn.Module, facts: Mapping[str, Any]) -> dict[str, Any]:
    """An apprentice has its bits already: pack it, and say what it costs."""
    run.log.say("quantize: the apprentice has its bits already")
    net, about = shipped(student), facts["quantization"]
    layers = layer_facts(net, run.data.image_size)
    on_disk = run.from_main(lambda: save_packed(run.checkpoint(PACKED_FILE), net, facts))
    return {
        "method": "apprentice", "bytes": on_disk, "w_bits": about["w_bits"],
        "w_levels": about["w_levels"], "mean_bits": mean_bits(layers, about["w_bits"]),
        "size_bytes": size_bytes(net, layers, about["w_bits"]),
        "macs": sum(layer.macs for layer in layers),
    }  # fmt: skip
