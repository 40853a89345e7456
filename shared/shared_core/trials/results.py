"""What the cells of a sweep gave: results by setting and seed, and one number of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shared_core.trials.cells import Cell

Metric = str | tuple[str, ...]  # a key of a cell's result, or the keys that lead to a number


def column(rows: Sequence[Mapping[str, Any]], metric: Metric) -> list[float]:
    """One number of every row.

    Raises:
        ValueError: a row has no such number, or one that was not finite.
    """
    keys = (metric,) if isinstance(metric, str) else metric
    values = []
    for row in rows:
        value: Any = row
        for key in keys:
            if not isinstance(value, Mapping) or key not in value:
                raise ValueError(f"{'.'.join(keys)}: a result lacks {key!r}")
            value = value[key]
        if value is None:
            raise ValueError(f"{'.'.join(keys)}: a result is no finite number, expected one")
        values.append(float(value))
    return values


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample deviation (None of one seed), number of seeds, and the values themselves."""
    from shared_core.metrics import summarize  # loads NumPy

    return {**asdict(summarize(values)), "values": list(values)}


@dataclass(frozen=True)
class Trials:
    """What the cells of a sweep gave.

    Attributes:
        cells: all of them, in order.
        results: by name and seed, of those that are done.
        seconds: wall time of the cells, added up.
    """

    cells: tuple[Cell, ...]
    results: Mapping[tuple[str, int], dict[str, Any]]
    seconds: float

    @property
    def names(self) -> list[str]:
        """The settings, in order."""
        return list(dict.fromkeys(cell.name for cell in self.cells))

    @property
    def missing(self) -> list[Cell]:
        """Cells that are not done: another process has them, or another folder."""
        return [cell for cell in self.cells if (cell.name, cell.seed) not in self.results]

    @property
    def missing_text(self) -> str:
        """A line for a process that finds cells missing."""
        return (
            f"{len(self.missing)} of {len(self.cells)} trials are not done here "
            f"({self.missing[0].label}, ...): the command that finds all of them writes the report"
        )

    def seeds(self, *names: str) -> list[int]:
        """Seeds that are done for all of ``names``, in order."""
        order = dict.fromkeys(cell.seed for cell in self.cells)
        return [seed for seed in order if all((name, seed) in self.results for name in names)]

    def rows(self, name: str, seeds: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Results of a setting, one for each of ``seeds`` (all that are done)."""
        return [self.results[name, seed] for seed in (self.seeds(name) if seeds is None else seeds)]

    def values(self, name: str, metric: Metric, seeds: Sequence[int] | None = None) -> list[float]:
        """One number of a setting, one value for each of ``seeds`` (all that are done)."""
        return column(self.rows(name, seeds), metric)
