"""The command line's manners: one line for an error, exit code 2 for usage and 1 for the rest."""

from __future__ import annotations

import dis
import os
import sys
from collections.abc import Callable, Sequence
from types import TracebackType

from shared_core.texts import safe_streams

# Packages of this repository; scripts beside them are known by the function that they run.
OURS = (
    "shared_core", "gfnet_dynn", "landmark_distill", "visiondistill_gc", "torch_cls_zoo", "mpkd",
    "__main__",
)  # fmt: skip
# How torch, Paddle and ONNX Runtime say that memory is exhausted.
MEMORY_SIGNS = ("out of memory", "allocate memory", "bad_alloc", "ResourceExhausted")
SAVE_MEMORY = "lower --batch-size or --input-size"
_ABROAD = "the main process failed"  # main_writes, in all processes but that one


class UsageError(ValueError):
    """The command's words contradict each other or name something that does not exist."""


def run_command(
    main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None
) -> int:
    """Run ``main(argv)`` and turn what a user can cause into one line and an exit code.

    A ``ValueError`` that one of our modules raises is such an error (``UsageError`` gives 2, others
    1); one that NumPy raises, or ``int("x")``, is a fault of the program. ``OSError`` (a missing
    file, a full disk), a missing package and a lack of memory give 1, Ctrl-C gives 130. Anything
    else keeps its traceback, and so does everything when ``SMALLVISION_TRACEBACK`` is set.

    Returns:
        The exit code, for ``sys.exit``.
    """
    safe_streams()  # a name that the terminal lacks is written out, and stops nothing
    if os.environ.get("SMALLVISION_TRACEBACK"):
        return int(main(argv) or 0)
    try:
        return int(main(argv) or 0)
    except KeyboardInterrupt:
        print("stopped; a run goes on with the same command and --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        ours = (*OURS, getattr(main, "__module__", "").partition(".")[0])
        line = _line(error, ours)
        if line is None:
            raise
        if line:
            print(f"error: {line}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _line(error: Exception, ours: Sequence[str]) -> str | None:
    """What to say of an error; None where it is a fault of the program."""
    line = " ".join(str(error).split()) or type(error).__name__
    memory = _memory(error)
    if memory is not None:
        return f"{memory}: {_first_sentence(line)}; {SAVE_MEMORY}"
    if isinstance(error, OSError):
        return line
    if isinstance(error, ImportError):
        return None if (error.name or "").partition(".")[0] in ours else line
    if isinstance(error, ValueError):
        return line if _raised_by(error.__traceback__, ours) else None
    if isinstance(error, RuntimeError) and line.startswith(_ABROAD):
        return ""  # that process says it
    return None


def _memory(error: Exception) -> str | None:
    """Which memory is exhausted, if that is what happened; no framework is imported for it."""
    text, kind = str(error), type(error)
    framework = kind.__module__.partition(".")[0] in ("torch", "paddle", "onnxruntime")
    told = any(sign in text for sign in MEMORY_SIGNS)
    if isinstance(error, MemoryError) or (told and (framework or isinstance(error, RuntimeError))):
        on_gpu = any(word in text for word in ("CUDA", "GPU", "HIP"))
        return "out of GPU memory" if on_gpu else "out of memory"
    return None


def _first_sentence(line: str) -> str:
    """Frameworks go on for a screen after it."""
    head = line.partition(". ")[0]
    return head if len(head) <= 200 else f"{head[:200]}..."


def _raised_by(trace: TracebackType | None, ours: Sequence[str]) -> bool:
    """Whether a ``raise`` statement of one of ``ours`` made the error: not a library, and not an
    operation such as ``int("x")``."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
    code = trace.tb_frame.f_code.co_code
    return package in ours and code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
