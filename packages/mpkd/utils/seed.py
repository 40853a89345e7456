"""Seeds: one number from the configuration, a stream of its own for every purpose."""

from __future__ import annotations

from shared_core.for_torch.seeds import seed_all
from shared_core.runs import derive_seed


def stage_seed(seed: int, *purpose: str | int) -> int:
    """A seed below ``2 ** 31`` for one purpose; another purpose gets an unrelated one."""
    return derive_seed(seed, *purpose) % 2**31


def seed_stage(seed: int, *purpose: str | int) -> None:
    """Seed Python, NumPy and torch for one stage. For the pipeline, never for libraries."""
    seed_all(stage_seed(seed, *purpose))
