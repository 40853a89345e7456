"""Trials: cells of a setting and a seed, each measured once; differences paired by seed; a page.

What belongs here is how a sweep is run and told: which process does which cell, what is kept when
it is killed, what the numbers say. What a cell trains and measures is its project's.
"""

from shared_core.trials.cells import Cell, shard_of
from shared_core.trials.differences import Difference, compare, verdict
from shared_core.trials.page import add_arms, add_differences, draw_arms
from shared_core.trials.results import Trials, column, spread
from shared_core.trials.running import run_cell, run_trials
from shared_core.trials.trial_options import add_trial_options, check_trial_options

__all__ = [
    "Cell",
    "Difference",
    "Trials",
    "add_arms",
    "add_differences",
    "add_trial_options",
    "check_trial_options",
    "column",
    "compare",
    "draw_arms",
    "run_cell",
    "run_trials",
    "shard_of",
    "spread",
    "verdict",
]
