"""From a model file to a model folder, by the core's writer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from shared_core.deploy.staging import check_export_folder
from shared_core.deploy.write import Int8Wish, Written, write_model_folder
from visiondistill_gc.deploy.forms import macs_of, onnx_source, paddle_form
from visiondistill_gc.deploy.images import (
    batches_of,
    calibration_of,
    judges_in,
    run_parts,
    unsure_below,
)
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
    calibration, test, judged_on = None, None, "test"
    parts = None if options.run is None else run_parts(options.run, model, options.data_path)
    if options.int8 != "no" or options.unsure_accuracy is not None:
        calibration = calibration_of(options.calibration, parts, facts.class_names, network.view)
    if options.accuracy is not None:
        seen, judged_on = options.calibration, options.accuracy.name
        files, labels = judges_in(options.accuracy, facts.class_names, calibration=seen)
        test = batches_of(files, labels, network.view, what="accuracy")
    elif parts is not None and "test" in parts:
        test = batches_of(*parts["test"], network.view, what="test")
    limit = options.unsure
    if options.unsure_accuracy is not None and calibration is not None:
        limit = unsure_below(network, calibration, options.unsure_accuracy)
    facts = replace(facts, costs=costs, unknown_threshold=limit)
    with TemporaryDirectory() as scratch:
        sources = []
        if "onnx" in options.formats:
            sources = [onnx_source(model.net, facts, Path(scratch), opset=options.opset)]
        return write_model_folder(
            options.output,
            facts=facts,
            network=network,
            sources=sources,
            forms={PADDLE: paddle_form(model.net, facts)} if "paddle" in options.formats else None,
            test=test,
            judged_on=judged_on,
            calibration=calibration,
            int8=Int8Wish(
                options.int8,
                max_accuracy_loss=options.max_accuracy_loss,
                settings={"method": options.int8_method},
            ),
        )
