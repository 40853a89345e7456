"""``--find_lr``: the LR-range test with the training's own batches, loss and optimizer."""

from __future__ import annotations

import json
import math
from typing import Any

from shared_core.checkpoints import atomic_write
from torch_cls_zoo.applications.session import Session
from torch_cls_zoo.applications.train import make_learner
from torch_cls_zoo.utils.lr_finder import lr_range, plot_lr_range

LOW, HIGH = 1e-6, 1.0


def find_lr(session: Session) -> dict[str, Any]:
    """Raise the rate over ``--find_lr`` steps; writes ``lr_range.png`` and ``lr_range.json``.

    Raises:
        ValueError: a loss that is not finite from the start.
    """
    learner, loader = make_learner(session)
    learner.model.train()
    learner.criterion.train()
    batches = iter(loader)
    number = 0

    def step() -> float:
        nonlocal batches, number
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            batch = next(batches)
        number += 1
        try:
            return learner.step(batch, number)[0]
        except ValueError as error:
            if "expected a finite one" not in str(error):
                raise
            return math.nan  # ends the test

    result = lr_range(step, learner.optimizer, low=LOW, high=HIGH, steps=session.args.find_lr)
    folder = session.args.output
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.facts(), indent=1) + "\n"
    atomic_write(folder / "lr_range.json", lambda path: path.write_text(text, encoding="utf-8"))
    plot_lr_range(result, folder / "lr_range.png")
    session.say(
        f"learning rate: the loss falls fastest at {result.suggestion:.2g} and is least at "
        f"{result.largest:.2g}: {folder / 'lr_range.png'}"
    )
    return {"suggestion": result.suggestion, "largest": result.largest}
