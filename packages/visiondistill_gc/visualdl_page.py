"""Open the VisualDL page of a run, with settings that work; ``--help`` lists the options.

``visualdl --logdir=...`` alone answers 500 to a browser that speaks neither English nor Chinese,
counts visitors at an outside service, and offers tabs that install packages.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: use this checkout, whatever is installed
    repo = Path(__file__).resolve().parents[2]
    sys.path[:1] = [str(repo / "packages"), str(repo / "shared")]

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from shared_core.runs import run_command
from shared_core.runs.numbers import number
from shared_core.runs.options import CommandParser

LANGUAGES = ("en", "zh")
LOG = "*vdlrecords*.log"
# All that a run can log. The others install packages, or show what no run here writes.
TABS = ("scalar", "image", "text", "histogram", "hyper_parameters", "pr_curve", "roc_curve",
        "static_graph", "dynamic_graph")  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    p = CommandParser(
        prog="visualdl_page.py",
        description="Serve the VisualDL page of one run or of many, without telemetry, in English "
        "or Chinese. Stop it with Ctrl-C.",
    )
    add = p.add_argument
    add(
        "--logdir",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="The folders with logs in and below them (default: logs/ of the newest run in "
        "--runs).",
    )
    add(
        "--runs",
        type=Path,
        default=Path("runs/visiondistill_gc"),
        metavar="DIR",
        help="Where runs lie.",
    )
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="The address to listen on.")
    add(
        "--port",
        type=number(int, 1, 65535),
        default=8040,
        metavar="N",
        help="The port to listen on.",
    )
    add("--language", choices=LANGUAGES, default="en", help="The language of the page.")
    add("--open_browser", action="store_true", help="Open the page in a browser.")  # fmt: skip
    return p


def newest_logs(runs: Path) -> Path:
    """The folder ``logs`` below ``runs`` that was written to last.

    Raises:
        FileNotFoundError: there is none.
    """
    written = {
        folder: max((log.stat().st_mtime for log in folder.rglob(LOG)), default=None)
        for folder in runs.rglob("logs")
    }
    found = [folder for folder, when in written.items() if when is not None]
    if not found:
        raise FileNotFoundError(f"no logs below {runs}: expected a run there, or --logdir FOLDER")
    return max(found, key=lambda folder: (written[folder], str(folder)))


def settings(
    folders: Sequence[Path],
    *,
    host: str = "127.0.0.1",
    port: int = 8040,
    language: str = "en",
    open_browser: bool = False,
) -> dict[str, Any]:
    """What VisualDL's server is started with.

    Raises:
        FileNotFoundError: a folder that is missing, or without a log in or below it.
    """
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"--logdir {folder} does not exist, expected a folder of logs")
        if next(folder.rglob(LOG), None) is None:
            raise FileNotFoundError(
                f"--logdir {folder} holds no VisualDL log ({LOG}), expected one in or below it"
            )
    return {
        "logdir": [str(folder) for folder in folders],
        "host": host,
        "port": port,
        "language": language,
        "telemetry": False,
        "component_tabs": list(TABS),
        "open_browser": open_browser,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Check, then serve until told to stop. Returns the exit code."""
    args = build_parser().parse_args(argv)
    folders = args.logdir or [newest_logs(args.runs)]
    chosen = settings(
        folders,
        host=args.host,
        port=args.port,
        language=args.language,
        open_browser=args.open_browser,
    )
    from shared_core.deploy.service.command import listen

    # Flask says that a port is taken, and exits; said here it is one line like all the others.
    listen(args.host, args.port).close()
    from visualdl.server import app

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request else, hundreds a page
    names = " ".join(map(str, folders))
    print(f"VisualDL of {names} on http://{args.host}:{args.port}/ (Ctrl-C stops it)", flush=True)
    app._run(chosen)  # what the visualdl command calls; `run` would start a process of its own
    return 0


def cli() -> int:
    """The installed command."""
    return run_command(main)


if __name__ == "__main__":
    sys.exit(cli())
