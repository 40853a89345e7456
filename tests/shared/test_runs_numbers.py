"""Numbers on a command line: what is in range comes back, what is not is told with the range."""

from __future__ import annotations

import argparse

import pytest

from shared_core.runs.numbers import COUNT, FRACTION, POSITIVE, SIZE, WEIGHT, number


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (POSITIVE, "1e-9", 1e-9),
        (WEIGHT, "0", 0.0),
        (FRACTION, "1", 1.0),
        (COUNT, "0", 0),
        (SIZE, "1", 1),
        (number(int, -3, 4), "-3", -3),
    ],
)
def test_the_ends_are_inside(parse, text, value):
    found = parse(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("parse", "text", "words"),
    [
        (POSITIVE, "0", r"0: expected \(0, inf\)"),
        (WEIGHT, "-1", r"-1: expected \[0, inf\)"),
        (WEIGHT, "inf", r"inf: expected"),
        (FRACTION, "nan", "nan: expected"),
        (FRACTION, "1.5", r"1.5: expected \[0, 1\]"),
        (COUNT, "2.5", "'2.5': expected int"),
        (SIZE, "0", r"0: expected \[1, 1e\+09\]"),
        (POSITIVE, "fast", "'fast': expected float"),
    ],
)
def test_others_are_refused_with_the_range(parse, text, words):
    with pytest.raises(argparse.ArgumentTypeError, match=words):
        parse(text)
