"""Imported by a command that is run as a script: this checkout first, whatever is installed."""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:1] = [str(REPOSITORY / "packages"), str(REPOSITORY / "shared")]
