"""The command line's manners: one line for an error, exit code 2 for usage and 1 for the rest."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence


class UsageError(ValueError):
    """The command's words contradict each other or name something that does not exist."""


def run_command(
    main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None
) -> int:
    """Run ``main(argv)`` and turn what a user can cause into one line and an exit code.

    ``UsageError`` gives 2; ``ValueError``, ``OSError`` (a missing file, a full disk) and a missing
    package give 1; Ctrl-C gives 130. Anything else is a fault of the program and keeps its
    traceback, and so does everything when ``SMALLVISION_TRACEBACK`` is set.

    Returns:
        The exit code, for ``sys.exit``.
    """
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
    except (ValueError, OSError, ImportError) as error:
        line = " ".join(str(error).split())
        print(f"error: {line or type(error).__name__}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
