"""Networks that lie in one file or in several, run to their end: every output of every file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shared_core.deploy.exit_chain import GATE, LOGITS, Session

Array = npt.NDArray[Any]


def full_pass(sessions: Sequence[Session], images: Array) -> list[dict[str, Array]]:
    """The outputs by name of each session, everything going to the end.

    What a segment of a chain gives beside ``logits`` and ``gate_logit`` is the next one's input.
    """
    values: list[Array] = [np.ascontiguousarray(images)]
    found = []
    for session in sessions:
        feed = dict(zip([one.name for one in session.get_inputs()], values, strict=True))
        outputs = dict(
            zip([one.name for one in session.get_outputs()], session.run(None, feed), strict=True)
        )
        values = [value for name, value in outputs.items() if name not in (LOGITS, GATE)]
        found.append(outputs)
    return found


def answers_of(outputs: Sequence[dict[str, Array]]) -> Array:
    """What a network says, of :func:`full_pass`: ``(N, K)``, of a chain all heads side by side."""
    if len(outputs) == 1 and LOGITS not in outputs[0]:
        (only,) = outputs[0].values()
        return only
    return np.concatenate([one[LOGITS] for one in outputs], axis=1)


def inputs_of(sessions: Sequence[Session], images: Array) -> list[Array]:
    """What each session is given: the images, then what is carried on, one array each.

    Raises:
        ValueError: a segment hands on several values.
    """
    given = [images]
    for number, outputs in enumerate(full_pass(sessions[:-1], images)):
        carried = [value for name, value in outputs.items() if name not in (LOGITS, GATE)]
        if len(carried) != 1:
            raise ValueError(f"segment {number} hands on {len(carried)} values, expected one")
        given += carried
    return given
