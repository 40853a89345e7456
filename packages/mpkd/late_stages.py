"""The stages after the student is trained: quantize, export, analyze."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mpkd import quantization_stage
from mpkd.dataset.data_utils import TEST
from mpkd.deploy.export import KINDS, export_all
from mpkd.run_context import QUANTIZED_FILE, STUDENT_FILE, Run
from mpkd.stages import load_teacher, needs_teacher, save
from mpkd.utils.common import describe_quantization, load_net
from shared_core.runs import UsageError


def quantize_stage(run: Run) -> dict[str, Any]:
    """Give the trained student few bits, and measure what it lost."""
    config = run.config
    if config["quantization.method"] == "none":
        return {"method": "none"}
    student, facts = load_net(run.checkpoint(STUDENT_FILE))
    if facts.get("quantization"):
        run.log.say("quantize: the apprentice has its bits already")
        return {
            "method": "apprentice",
            **_costs(run, student.to(run.device), facts["quantization"]),
        }
    student.to(run.device)
    before = run.evaluate(student, TEST)
    teacher, digest = load_teacher(run) if needs_teacher(config) else (None, "")
    if run.world.world_size > 1:
        raise UsageError("--stage quantize runs in one process: expected it without torchrun")
    made = quantization_stage.quantize(run, student, teacher, digest)
    about = describe_quantization(made.net)
    test = run.evaluate(made.net, TEST)
    metrics = {"calibration_accuracy": made.accuracy, "test_accuracy": test.accuracy}
    save(run, QUANTIZED_FILE, made.net, facts["net"], epoch=0, metrics=metrics, quantization=about)
    for note in made.notes:
        run.log.say(f"quantize: {note}")
    run.log.say(
        f"quantize: test accuracy {before.accuracy:.4f} -> {test.accuracy:.4f} by {made.method}, "
        f"{made.mean_bits:.2f} bits a weight"
    )
    return {
        **made.record(), **metrics, "before": before.accuracy, "bytes": made.size_bytes,
        "agreement": test.agreement(before.logits),
    }  # fmt: skip


def _costs(run: Run, net: nn.Module, about: Mapping[str, Any] | None) -> dict[str, Any]:
    return quantization_stage.cost_facts(net, about, run.data.image_size)


def export_stage(run: Run) -> dict[str, Any]:
    """Write the student for other runtimes, as ``export.*`` says, and compare the answers."""
    if not any(run.config[f"export.{kind}"] for kind in KINDS):
        return {"files": {}}
    student, facts = load_net(run.checkpoint(STUDENT_FILE))
    return export_all(run, student, facts)


def analyze_stage(run: Run) -> dict[str, Any]:
    """Draw the curves of the run's CSV into ``outputs/`` and write the report."""
    from mpkd.analysis.analysis import write_report

    pages = write_report([run.folder], run.folder / "outputs")
    return {"report": [page.name for page in pages]}
