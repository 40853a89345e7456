"""``--find_lr``: the LR-range test with the training's own batches, loss and optimizer."""

from __future__ import annotations

import itertools
import json
from typing import Any

from shared_core.checkpoints import atomic_write
from shared_core.runs import UsageError
from torch_cls_zoo.applications.prepare import make_learner
from torch_cls_zoo.applications.probe import start_head
from torch_cls_zoo.applications.session import Session
from torch_cls_zoo.optim.lr_range import lr_range, plot_lr_range

LOW, HIGH = 1e-6, 1.0


def find_lr(session: Session) -> dict[str, Any]:
    """Raise the rate over ``--find_lr`` steps; writes ``lr_range.png`` and ``lr_range.json``.

    Raises:
        UsageError: several processes.
        ValueError: a loss that is not finite from the start.
    """
    if session.world.world_size > 1:
        raise UsageError("--find_lr runs in one process: leave out --gpus and torchrun")
    learner, loader, _schedule = make_learner(session)
    if session.config.training.probe:
        start_head(session)
    learner.train()
    batches = (batch for _epoch in itertools.count() for batch in loader)
    numbers = itertools.count(1)

    def step() -> float:
        return float(learner.step(next(batches), next(numbers))[0])

    steps = int(session.config.training.find_lr or 0)
    result = lr_range(step, learner.optimizer, low=LOW, high=HIGH, steps=steps)
    folder = session.output
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.facts(), indent=1) + "\n"
    atomic_write(folder / "lr_range.json", lambda path: path.write_text(text, encoding="utf-8"))
    plot_lr_range(result, folder / "lr_range.png")
    session.say(
        f"learning rate: the loss falls fastest at {result.suggestion:.2g} and is least at "
        f"{result.largest:.2g}: {folder / 'lr_range.png'}"
    )
    return {"suggestion": result.suggestion, "largest": result.largest}
