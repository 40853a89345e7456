"""From a model file to a model folder, by the core's writer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from shared_core.deploy.staging import check_export_folder
from shared_core.deploy.write import Int8Wish, Written, write_model_folder
from visiondistill_gc.deploy.forms import macs_of, onnx_source, paddle_form
from visiondistill_gc.deploy.images import batches_of, calibration_of, judges_in
from visiondistill_gc.deploy.openers import PADDLE, facts_of, predictor_of
from visiondistill_gc.models.student_model import count_parameters
from visiondistill_gc.options import ExportOptions
from visiondistill_gc.utils.model_files import load_model


def export(options: ExportOptions) -> Written:
    """Write the folder; every file is checked against the model in Paddle.

    Raises:
        UsageError: the output holds what no export wrote.
        CheckpointError: no model of this project.
        ExportError: a file that does not answer as the model.
        ValueError: other categories, or images that do not fit.
    """
    check_export_folder(options.output)
    model = load_model(options.model, categories=options.categories)
    facts = facts_of(model)
    costs = {
        "macs": macs_of(model.net, facts.input_size),
        "parameters": count_parameters(model.net)["total"],
    }
    network = predictor_of(model, name=str(options.model))
    calibration, test = None, None
    if options.calibration is not None:
        calibration = calibration_of(options.calibration, facts.class_names, network.view)
    if options.accuracy is not None:
        files, labels = judges_in(
            options.accuracy, facts.class_names, calibration=options.calibration
        )
        test = batches_of(files, labels, network.view, what="accuracy")
    with TemporaryDirectory() as scratch:
        sources = []
        if "onnx" in options.formats:
            sources = [onnx_source(model.net, facts, Path(scratch), opset=options.opset)]
        return write_model_folder(
            options.output,
            facts=replace(facts, costs=costs),
            network=network,
            sources=sources,
            forms={PADDLE: paddle_form(model.net, facts)} if "paddle" in options.formats else None,
            test=test,
            judged_on=options.accuracy.name if options.accuracy else "test",
            calibration=calibration,
            int8=Int8Wish(
                options.int8,
                max_accuracy_loss=options.max_accuracy_loss,
                settings={"method": options.int8_method},
            ),
        )
