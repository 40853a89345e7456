"""The stage that gives the student few bits: what :mod:`mpkd.quant.stage` needs, from a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpkd.dataset.data_utils import CALIBRATION
from mpkd.quant.cost import layer_facts, mean_bits, size_bytes
from mpkd.quant.layers import FLOAT, bits_for, calibrate, quantizable, quantize_net
from mpkd.quant.stage import QuantizationResult, run_quantization
from mpkd.run_context import Run
from mpkd.trainer.objectives import NEEDS_LABELS
from mpkd.utils.common import describe_quantization
from shared_core.for_torch.run_state import StageState
from shared_core.runs import UsageError

# Steps of Adam a block of BRECQ; the paper has 20,000.
BRECQ_STEPS = {"full": 20_000, "short": 1_000, "rehearsal": 150}
HAQ_EPISODES = {"full": 600, "short": 60, "rehearsal": 10}


def bits_by_layer(
    net: nn.Module, config: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, int]]:
    """Bits of weights and of inputs by layer, 8 for the first and the last where it is asked."""
    names = quantizable(net)
    found = []
    for key in ("w_bits", "a_bits"):
        bits = int(config[f"quantization.{key}"])
        ends = 8 if config["quantization.first_last_8bit"] and bits != FLOAT else None
        found.append(bits_for(names, bits, first_last=ends))
    return found[0], {name: bits for name, bits in found[1].items() if bits != FLOAT}


def lower(run: Run, net: nn.Module) -> Mapping[str, Any]:
    """Give ``net`` fake-quantized layers with learned scales, in place; what rebuilds them.

    For the apprentice schemes, whose student has few bits while it learns. Batch norms stay beside
    the convolutions.
    """
    w_bits, a_bits = bits_by_layer(net, run.config)
    quantize_net(net, w_bits, a_bits, learned=True)
    net.to(run.device)
    if a_bits:
        calibrate(net, run.calibration_images())
    about = describe_quantization(net)
    if about is None:
        raise UsageError("nothing to quantize: the network has no convolution and no linear layer")
    return about


def training_batches(run: Run, teacher: nn.Module | None, digest: str) -> tuple[Any, int]:
    """``epoch -> (images, labels or None[, teacher logits])``, and batches an epoch.

    The labels are None where the objective may not see them.
    """
    config = run.config
    labels = config["distillation.mode"] in NEEDS_LABELS
    images = run.data.learning_set(unlabelled=teacher is not None and not labels)
    source, replayed = None, 0
    if teacher is not None:
        source, replayed = run.teacher_source(teacher, digest, images)

    def batches(epoch: int) -> Iterator[tuple[Tensor | None, ...]]:
        loader = run.training_loader("quantize", images, replayed=replayed)
        loader.loader.order.set_epoch(epoch)
        for batch in loader:
            row = (batch.images, batch.labels if labels else None)
            yield row if source is None else (*row, source(batch))

    return batches, len(run.training_loader("quantize", images))


def quantize(
    run: Run, student: nn.Module, teacher: nn.Module | None, digest: str
) -> QuantizationResult:
    """The student by ``quantization.method``, with what it cost and lost.

    Searches choose by the accuracy on the calibration images.
    """
    config = run.config
    method = config["quantization.method"]
    batches, steps = None, None
    if method in ("qat", "sdq", "haq") or config.get("quantization.finish") == "qat":
        batches, steps = training_batches(run, teacher, digest)
    run.begin("quantize")
    chosen = {
        "quantization.brecq_steps": BRECQ_STEPS[run.scale],
        "quantization.haq_episodes": HAQ_EPISODES[run.scale],
        **config,
    }
    return run_quantization(
        student,
        chosen,
        calibration=torch.cat(run.calibration_images()),
        evaluate=lambda net: run.evaluate(net, CALIBRATION).accuracy,
        teacher=teacher,
        train_batches=batches,
        steps_an_epoch=steps,
        state=lambda name, parts: StageState(f"quantize-{name}", parts, run.log),
        cache=run.folder / "state" / "haq_scores.json",
        log=run.log.say,
    )


def cost_facts(net: nn.Module, about: Mapping[str, Any] | None, image_size: int) -> dict[str, Any]:
    """Size of a network and the bits a weight has on average."""
    facts = layer_facts(net, image_size)
    w_bits = dict(about["w_bits"]) if about else {}
    return {
        "bytes": size_bytes(net, facts, w_bits),
        "mean_bits": mean_bits(facts, w_bits),
        "macs": sum(layer.macs for layer in facts),
        "w_bits": w_bits,
    }
