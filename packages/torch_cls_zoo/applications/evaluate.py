"""``--evaluate``: the test part, measured once, with its record and report."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from shared_core.metrics.intervals import wilson_interval
from shared_core.runs import write_result
from torch_cls_zoo.applications.evaluation_report import write_report
from torch_cls_zoo.applications.floor import Floors
from torch_cls_zoo.applications.session import PROJECT, Session
from torch_cls_zoo.applications.test import measure, outputs_of, plain_criterion, probabilities_of
from torch_cls_zoo.dataloader.folders import part


def evaluate(
    session: Session,
    folder: Path,
    *,
    split: str = "test",
    started: datetime,
    seconds: float,
    training: Mapping[str, Any] | None = None,
    floors: Floors | None = None,
) -> dict[str, Any]:
    """Measure a part and write ``result.json`` and the report into ``folder``.

    Returns:
        The numbers, without the confusion matrix; ``low`` and ``high`` are the ends of the
        accuracy's 95 % interval.
    """
    criterion = plain_criterion(session)
    outputs = outputs_of(session, part(session.data, split))
    values = measure(outputs, criterion, num_classes=len(session.classes))
    right = round(values["accuracy"] * values["images"])
    values["low"], values["high"] = wilson_interval(right, values["images"])
    numbers = {key: value for key, value in values.items() if key != "confusion"}

    def write() -> str:
        measured: dict[str, Any] = {split: values}
        if training:
            measured["training"] = dict(training)
        if floors is not None:
            measured["floor"] = floors.facts()
        write_result(
            folder / "result.json",
            task=f"{PROJECT}/{'train' if training else 'evaluate'}",
            command=session.config.run.command,
            scale="rehearsal" if session.data.rehearsal else "full",
            data=session.data.facts(max(session.settings.size)),
            seeds=[session.config.data.seed],
            measured=measured,
            started=started,
            wall_seconds=seconds,
        )
        page = write_report(
            session,
            folder,
            outputs,
            probabilities_of(outputs, criterion),
            values,
            title=f"{session.arch} on {session.data.name}, {split}",
            training=training,
            first=None if floors is None else floors.verdict(numbers),
        )
        return str(page)

    folder.mkdir(parents=True, exist_ok=True)
    page = session.only_main(write)
    more = f", top-5 {values['top5']:.4f}" if "top5" in values else ""
    lost = f", {values['unreadable']} unreadable" if values["unreadable"] else ""
    session.say(
        f"{split}: accuracy {values['accuracy']:.4f}{more}, macro F1 {values['macro_f1']:.4f}, "
        f"loss {values['loss']:.4f}, {values['images']} images{lost}"
    )
    session.say(f"report: {page}")
    return numbers
