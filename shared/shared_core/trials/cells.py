"""What is tried: cells of one setting and one seed, and which of several processes does which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One setting with one seed.

    Attributes:
        name: of the setting, as tables show it: an arm, a row.
        settings: everything that the result depends on, plain JSON and paths; a result that is
            kept must have been made with the same.
        seed: from 0.
        needs: names of cells of the same seed whose files or results this one reads. They come
            first, and the same process of a job array does them.
    """

    name: str
    settings: Mapping[str, Any]
    seed: int
    needs: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For a line to the user."""
        return f"{self.name}, seed {self.seed}"

    @property
    def folder_name(self) -> str:
        """Below ``cells/`` of the sweep's folder."""
        plain = "".join(c if c.isalnum() or c in "._+=" else "-" for c in self.name)
        return f"{plain.strip('-.')}-s{self.seed}"


def check_cells(cells: Sequence[Cell]) -> None:
    """Refuse cells that cannot be told apart, or that need what does not come before them.

    Raises:
        ValueError: two cells with one name and seed, or with one folder; a need that is not met.
    """
    known: set[tuple[str, int]] = set()
    folders: dict[str, Cell] = {}
    for cell in cells:
        other = folders.setdefault(cell.folder_name.lower(), cell)
        if other is not cell:
            raise ValueError(f"cells {other.label} and {cell.label} have one folder, expected two")
        for need in cell.needs:
            if (need, cell.seed) not in known:
                raise ValueError(f"cell {cell.label} needs {need!r}: expected that one before it")
        known.add((cell.name, cell.seed))


def groups_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that need one another, together; in the order of each group's first cell."""
    groups: list[list[Cell]] = []
    for cell in cells:
        wanted = {(need, cell.seed) for need in cell.needs}
        bound = [g for g in groups if any((one.name, one.seed) in wanted for one in g)]
        if bound:
            home = bound[0]
            for other in bound[1:]:
                home += other
                groups.remove(other)
            home.append(cell)
        else:
            groups.append([cell])
    return groups


def shard_of(cells: Sequence[Cell], shard: tuple[int, int]) -> list[Cell]:
    """The cells of process ``shard[0]`` (from 1) of ``shard[1]``, in the order of ``cells``.

    Every cell is in one shard, cells that need one another are in the same, and the shards have
    about as many cells.

    Raises:
        ValueError: a number that is not from 1 to the number of shards.
    """
    index, count = shard
    if not 1 <= index <= count:
        raise ValueError(f"shard {index}/{count}: expected a number from 1 to {count}")
    shards: list[list[Cell]] = [[] for _ in range(count)]
    for group in sorted(groups_of(cells), key=len, reverse=True):
        min(shards, key=len).extend(group)
    return [cell for cell in cells if cell in shards[index - 1]]
