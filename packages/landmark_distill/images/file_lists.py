"""Tab-separated image lists: several with label offsets, and the map that merges duplicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shared_core.datasets import DatasetError
from shared_core.texts import match_names, printable, read_json, read_text

Labels = NDArray[np.int64]
COLUMNS = 3  # relative path, a remark, label


@dataclass(frozen=True)
class ImageList:
    """The lines of one list, in their order; the second column, a remark, decides nothing.

    Attributes:
        names: first column, relative to ``root``.
        labels: third column, int64 ``(N,)``, 0 or more.
        root: the folder that the names start from.
        source: the list's own path, for messages.
        notes: lines for the user, where the text's encoding had to be guessed.
    """

    names: tuple[str, ...]
    labels: Labels
    root: Path
    source: Path
    notes: tuple[str, ...] = ()

    def files(self) -> list[Path]:
        """The images, each of which is there.

        A name that is spelled otherwise than its file (backslashes, composed accents, blanks) is
        looked for among all files below the root.

        Raises:
            DatasetError: names that match nothing; they are counted, the first ones named.
        """
        plain = [self.root / name for name in self.names]
        if all(path.is_file() for path in plain):
            return plain
        matched = match_names(self.names, _below(self.root))
        if matched.missing:
            raise DatasetError(f"{matched.note(self.source)} below {self.root}")
        return [self.root / matched.found[name] for name in self.names]


def _below(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]


def read_list(path: str | Path, root: str | Path) -> ImageList:
    """Read one list: a line is ``relative/path<TAB>remark<TAB>label``, empty ones are passed over.

    Whatever wrote it: with a byte order mark or without, CRLF or LF, UTF-8 or what an older
    system had; then the reading is taken that names the most files below ``root``.

    Raises:
        FileNotFoundError: no such list.
        DatasetError: no text, no lines, or a line of another form; the line's number is named.
    """
    path, root = Path(path), Path(root)
    try:
        text = read_text(path)
        if text.note is not None:
            text = read_text(path, known=_below(root))
    except ValueError as error:
        raise DatasetError(f"image list {error}") from None
    names, labels = [], []
    for number, line in enumerate(text.lines(), start=1):
        if not line.strip():
            continue
        parts = line.split("\t")
        if len(parts) != COLUMNS or not parts[0]:
            raise DatasetError(
                f"{path}, line {number}: {len(parts)} columns in {printable(line[:60])!r}, "
                "expected path, remark and label with a tab between each"
            )
        label = parts[2].strip()
        if not (label.isascii() and label.isdigit()):
            raise DatasetError(
                f"{path}, line {number}: label {parts[2][:20]!r}, expected a whole number of "
                "0 or more"
            )
        names.append(parts[0])
        labels.append(int(label))
    if not names:
        raise DatasetError(f"{path} has no lines, expected path, remark and label on each")
    notes = () if text.note is None else (text.note,)
    return ImageList(tuple(names), np.array(labels, dtype=np.int64), root, path, notes)


def label_offsets(lists: Sequence[ImageList]) -> list[int]:
    """What is added to each list's labels: the number of labels in the lists before it.

    Raises:
        DatasetError: a list whose labels are not 0 to n - 1, which would make two lists' labels
            collide.
    """
    offsets, total = [], 0
    for one in lists:
        distinct = np.unique(one.labels)
        if distinct[-1] != len(distinct) - 1:
            missing = int(np.setdiff1d(np.arange(len(distinct)), distinct)[0])
            raise DatasetError(
                f"{one.source}: {len(distinct)} labels up to {int(distinct[-1])} and none is "
                f"{missing}: expected 0 to {len(distinct) - 1} without gaps, as lists are joined"
            )
        offsets.append(total)
        total += len(distinct)
    return offsets


def read_remap(path: str | Path) -> dict[int, int]:
    """The map ``label -> final label`` that merges duplicate landmarks.

    A ``.json`` file holds ``{"label": final}`` or ``{"label": [final, score]}``; any other is a
    torch file of a dictionary ``{label: (final, score)}``, as the original wrote it. Scores are
    read and not used. Nothing in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        DatasetError: of another form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"label map {path}: there is no such file")
    if path.suffix == ".json":
        try:
            content = read_json(path)
        except ValueError as error:
            raise DatasetError(f"label map {error}") from None
    else:
        import torch

        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file can raise nearly anything
            raise DatasetError(
                f"label map {path}: no torch file of plain numbers ({type(error).__name__})"
            ) from None
    if not isinstance(content, dict) or not content:
        raise DatasetError(f"label map {path}: expected a dictionary label -> (final, score)")
    found = {}
    for key, value in content.items():
        final = value[0] if isinstance(value, list | tuple) and len(value) == 2 else value
        try:
            whole = int(key), int(final)
            good = min(whole) >= 0 and whole == (float(key), float(final))
        except (TypeError, ValueError):
            good = False
        if not good:
            raise DatasetError(
                f"label map {path}: {key!r} -> {value!r}, expected two labels of 0 or more"
            )
        found[whole[0]] = whole[1]
    return found


def joined_labels(
    lists: Sequence[ImageList], *, remap: Mapping[int, int] | None = None
) -> tuple[Labels, int]:
    """Labels of the lists behind one another: offset, then mapped where the map knows them.

    Returns:
        int64 ``(N,)`` and the number of classes, the highest final label plus one (gaps stay: a
        teacher's head has a row for each).
    """
    offsets = label_offsets(lists)
    labels = np.concatenate([one.labels + k for one, k in zip(lists, offsets, strict=True)])
    return remapped(labels, remap), int(remapped(labels, remap).max()) + 1


def remapped(labels: Labels, remap: Mapping[int, int] | None) -> Labels:
    """``labels`` with the map applied where it has an entry; the others stay as they are."""
    if not remap:
        return labels
    size = int(max(labels.max(initial=0), max(remap))) + 1
    table = np.arange(size, dtype=np.int64)
    table[np.fromiter(remap, dtype=np.int64)] = np.fromiter(remap.values(), dtype=np.int64)
    return table[labels]
