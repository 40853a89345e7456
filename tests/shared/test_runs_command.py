"""The command line's manners: what is one line, what keeps its traceback, which exit code."""

from __future__ import annotations

import importlib
import json
import types

import numpy as np
import pytest

from shared_core.datasets.errors import DatasetNotFoundError
from shared_core.runs.command import UsageError, run_command
from shared_core.runs.record import read_result


def code_of(work):
    return run_command(lambda argv: work())


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [(UsageError("a\nb"), 2), (ValueError("a\nb"), 1), (OSError(28, "full"), 1),
     (ImportError("no mlflow"), 1), (ModuleNotFoundError("x", name="mlflow"), 1),
     (DatasetNotFoundError("no images"), 1)],
)  # fmt: skip
def test_what_a_user_can_cause_is_one_line(error, code, capsys):
    assert code_of(raising(error)) == code
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out


def test_an_error_of_the_core_is_one_line_from_however_deep(tmp_path, capsys):
    (tmp_path / "result.json").write_text("[]")
    assert code_of(lambda: read_result(tmp_path / "result.json")) == 1
    assert "holds list, expected an object" in capsys.readouterr().err


def of_module(name, text):
    """A function of a module with that name, as a package of this repository or a library has."""
    module = types.ModuleType(name)
    exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    return module.work


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("mpkd.quant.x", "raise ValueError('bits are 0')", True),
        ("gfnet_dynn", "raise ValueError('exits are 0')", True),
        ("mpkd.quant.x", "int('x')", False),
        ("mpkd.quant.x", "a, b = [1]", False),
        ("mpkd.quant.x", "[1].index(2)", False),
        ("sklearn.svm", "raise ValueError('n_samples')", False),
        ("shared_core_of_others", "raise ValueError('x')", False),
    ],
)
def test_only_a_raise_statement_of_ours_tells_a_user_something(name, text, told, capsys):
    work = of_module(name, f"def work():\n    {text}")
    if told:
        assert code_of(work) == 1
        assert "are 0" in capsys.readouterr().err
    else:
        with pytest.raises(ValueError):
            code_of(work)


def test_a_raise_that_another_error_caused_is_ours():
    text = (
        "def work():\n try:\n  int('x')\n except ValueError as e:\n  raise ValueError('n') from e"
    )
    assert code_of(of_module("mpkd", text)) == 1
    again = "def work():\n try:\n  int('x')\n except ValueError:\n  raise"
    with pytest.raises(ValueError, match="invalid literal"):
        code_of(of_module("mpkd", again))


@pytest.mark.parametrize(
    "work",
    [
        lambda: np.zeros(3) + np.zeros(4),
        lambda: np.zeros((2, 3)) @ np.zeros((2, 3)),
        lambda: {}["bug"],
        lambda: [][1],
        lambda: json.loads("{"),
        raising(RuntimeError("a bug")),
        raising(ImportError("cannot import name", name="shared_core.runs")),
        lambda: importlib.import_module("shared_core.nothing"),
    ],
)
def test_a_fault_of_the_program_keeps_its_traceback(work):
    with pytest.raises((ValueError, KeyError, IndexError, RuntimeError, ImportError)):
        code_of(work)


class OutOfMemoryError(Exception):
    """As a framework names its own."""


OutOfMemoryError.__module__ = "torch"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "error: out of memory: MemoryError; lower --batch-size or --input-size"),
        (MemoryError("Unable to allocate 7 TiB for an array"), "out of memory: Unable to allocate"),
        (
            OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total"),
            "error: out of GPU memory: CUDA out of memory; lower",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors"), "out of GPU memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), "out of"),
        (RuntimeError("std::bad_alloc"), "out of memory: std::bad_alloc; lower"),
        (MemoryError("(ResourceExhausted) Out of memory error on GPU 0. Cannot"), "GPU memory"),
        (MemoryError("(ResourceExhausted) Fail to alloc memory of 4 size"), "out of memory: (Res"),
    ],
)
def test_a_lack_of_memory_is_one_line_that_says_what_to_lower(error, told, capsys):
    assert code_of(raising(error)) == 1
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and "--batch-size" in said


def test_real_lacks_of_memory_are_known(capsys):
    torch = pytest.importorskip("torch")
    for work in (lambda: np.empty((10**7, 10**7)), lambda: torch.empty(10**14)):
        assert code_of(work) == 1
        assert capsys.readouterr().err.startswith("error: out of memory: ")


def test_a_process_that_fails_because_the_main_one_did_is_silent(capsys):
    assert code_of(raising(RuntimeError("the main process failed: no images"))) == 1
    assert capsys.readouterr().err == ""


def test_the_code_and_the_words_go_through():
    assert run_command(lambda argv: len(argv), ["a", "b", "c"]) == 3
    assert run_command(lambda argv: None) == 0


def test_tracebacks_on_request(monkeypatch):
    monkeypatch.setenv("SMALLVISION_TRACEBACK", "1")
    with pytest.raises(UsageError):
        code_of(raising(UsageError("x")))


def test_interrupting_is_130(capsys):
    assert code_of(raising(KeyboardInterrupt())) == 130
    assert "--resume" in capsys.readouterr().err
