"""A run: opening it, its options, log, stages, seeds, environment, record, report, command line.

What belongs here is what a run is to its user, whatever it trains: no framework, and nothing that
is slow to import, because every ``--help`` passes through here.
"""

from shared_core.runs.benchmark import write_benchmark
from shared_core.runs.command import UsageError, run_command
from shared_core.runs.environment import environment
from shared_core.runs.lock import RunLock
from shared_core.runs.log import MetricLog, read_metrics
from shared_core.runs.opening import OpenRun, open_run
from shared_core.runs.progress import progress
from shared_core.runs.record import RecordError, check_record, read_result, write_result
from shared_core.runs.report import Report
from shared_core.runs.seeds import derive_seed, seed_python_numpy
from shared_core.runs.stage_log import StageLog

__all__ = [
    "MetricLog",
    "OpenRun",
    "RecordError",
    "Report",
    "RunLock",
    "StageLog",
    "UsageError",
    "check_record",
    "derive_seed",
    "environment",
    "open_run",
    "progress",
    "read_metrics",
    "read_result",
    "run_command",
    "seed_python_numpy",
    "write_benchmark",
    "write_result",
]
