"""Folders of class folders become a list of samples: sorted, the same on every machine."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared_core.datasets.errors import DatasetError, DatasetNotFoundError
from shared_core.datasets.sets.spec_type import DatasetSpec, normal_name

IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True)
class Sample:
    """One image file: its path, its class index, and the split folder it lies in (or None)."""

    path: Path
    label: int
    split: str | None


@dataclass(frozen=True)
class Listing:
    """The images of a folder.

    Attributes:
        root: the folder that was scanned.
        classes: class names; a sample's label is an index into them.
        samples: sorted by their path below root, part by part, as UTF-8 bytes.
        layout: "single" for root/class/..., "split" for root/{train,val,test}/class/...
        stray: image files (paths below root) that lie in no class folder; they are not samples.
    """

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    layout: Literal["single", "split"]
    stray: tuple[str, ...] = ()

    def relative(self, sample: Sample) -> str:
        """The sample's path below root, with forward slashes."""
        return sample.path.relative_to(self.root).as_posix()

    def counts(self) -> dict[str, int]:
        """Images of each class over all splits."""
        counts = [0] * len(self.classes)
        for sample in self.samples:
            counts[sample.label] += 1
        return dict(zip(self.classes, counts, strict=True))


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its extension, hidden files not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _bytes_key(parts: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(part.encode("utf-8", "surrogateescape") for part in parts)


def _walk(
    folder: Path, parts: tuple[str, ...], above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, ...]]:
    """Image files below ``folder`` as tuples of path parts; links are followed, loops are not."""
    here = os.stat(folder)
    identity = (here.st_dev, here.st_ino)
    if identity in above:  # a link that leads back to a folder which holds it
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _visible(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(
                    folder / entry.name, (*parts, entry.name), above | frozenset({identity})
                )
            # A broken link stays in the list: verify reports it, instead of nobody.
            elif is_image_name(entry.name) and (entry.is_file() or entry.is_symlink()):
                yield (*parts, entry.name)


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            (e.name for e in entries if _visible(e.name) and e.is_dir()),
            key=lambda name: _bytes_key([name]),
        )


def _is_split_layout(files: list[tuple[str, ...]]) -> bool:
    """Split folders all, at least one of them with class folders inside.

    A class that happens to be called ``train`` has sisters of other names, or holds its images
    itself; neither is taken for a split.
    """
    tops = {parts[0] for parts in files if len(parts) > 1}
    return (
        bool(tops)
        and all(top.lower() in SPLIT_FOLDERS for top in tops)
        and any(len(parts) > 2 for parts in files)
    )


def scan(root: str | Path, *, classes: Sequence[str] | None = None) -> Listing:
    """List the images below ``root``: ``class/...`` or ``{train,val,test}/class/...``.

    Images may lie at any depth below their class folder. Hidden files and files that are no
    images by their extension are passed over.

    Args:
        root: folder of class folders, or of split folders of class folders.
        classes: class names in the order of their labels (a checkpoint's, say). Classes without a
            folder are then allowed; a folder that is not among them is an error. By default the
            folders' names, sorted as bytes.

    Raises:
        DatasetNotFoundError: ``root`` is no folder.
        DatasetError: it holds no images, a class folder is empty, or is not among ``classes``.
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetNotFoundError(f"no dataset folder at {root}; expected a folder of classes")
    files = sorted(_walk(root, (), frozenset()), key=_bytes_key)
    split_layout = _is_split_layout(files)
    depth = 1 if split_layout else 0  # index of the class among a path's parts
    stray = tuple("/".join(parts) for parts in files if len(parts) < depth + 2)
    files = [parts for parts in files if len(parts) >= depth + 2]
    if not files:
        raise DatasetError(
            f"no image in a class folder below {root}; expected {root}/<class>/*.jpg "
            f"(extensions {' '.join(sorted(IMAGE_EXTENSIONS))})"
        )
    found = sorted({parts[depth] for parts in files}, key=lambda name: _bytes_key([name]))
    if classes is None:
        _refuse_wrapping_folder(root, files, found, split_layout)
        _refuse_empty_classes(root, files, found, split_layout)
        names = tuple(found)
    else:
        names = tuple(classes)
        if len(set(names)) != len(names):
            raise DatasetError(f"a class is named twice in {names}")
        if unknown := [name for name in found if name not in set(names)]:
            raise DatasetError(
                f"class folder {unknown[0]!r} in {root} is not among the {len(names)} classes "
                f"expected: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            )
    label = {name: index for index, name in enumerate(names)}
    samples = tuple(
        Sample(
            root.joinpath(*parts),
            label[parts[depth]],
            SPLIT_FOLDERS[parts[0].lower()] if split_layout else None,
        )
        for parts in files
    )
    return Listing(root, names, samples, "split" if split_layout else "single", stray)


def _refuse_wrapping_folder(
    root: Path, files: list[tuple[str, ...]], found: list[str], split_layout: bool
) -> None:
    inner = {parts[1] for parts in files if len(parts) > 2}
    if not split_layout and len(found) == 1 and len(inner) > 1 and all(len(p) > 2 for p in files):
        raise DatasetError(
            f"{root} holds the one folder {found[0]!r} whose {len(inner)} folders hold the "
            f"images; expected a folder of classes: did you mean {root / found[0]}?"
        )


def _refuse_empty_classes(
    root: Path, files: list[tuple[str, ...]], found: list[str], split_layout: bool
) -> None:
    """An empty class folder would shift the labels of the classes after it, unseen."""
    if split_layout:
        tops = sorted({parts[0] for parts in files})
        present = {name: f"{top}/{name}" for top in tops for name in _folders(root / top)}
    else:
        present = {name: name for name in _folders(root)}
    for name in sorted(present):
        if name not in set(found):
            raise DatasetError(
                f"class folder {root / present[name]} holds no image; fill it, or take it away"
            )


def find(data_root: str | Path, spec: DatasetSpec) -> Path | None:
    """The folder of a dataset below ``data_root``: its name or an alias in any spelling.

    The name comes before the aliases. A single folder inside that wraps the class folders
    (``UCMerced_LandUse/Images``) is stepped into. None when there is no such folder.
    """
    data_root = Path(data_root)
    if not data_root.is_dir():
        return None
    present = _folders(data_root)
    for wanted in (spec.name, *spec.aliases):
        matches = [name for name in present if normal_name(name) == normal_name(wanted)]
        if matches:
            return _unwrap(data_root / (wanted if wanted in matches else matches[0]))
    return None


def _unwrap(folder: Path) -> Path:
    inner = _folders(folder)
    if len(inner) == 1 and inner[0].lower() not in SPLIT_FOLDERS and _folders(folder / inner[0]):
        return folder / inner[0]
    return folder


def require(data_root: str | Path, spec: DatasetSpec) -> Path:
    """Like ``find``, but a set that is not there is an error that says how to get it.

    Raises:
        DatasetNotFoundError: one line with the place that was expected and the home page.
    """
    folder = find(data_root, spec)
    if folder is None:
        layout = spec.layout or f"{spec.name}/<class>/*.jpg"
        raise DatasetNotFoundError(
            f"{spec.name} not found under {data_root}: expected {Path(data_root) / layout}; "
            f"get it from {spec.homepage or 'its authors'}"
        )
    return folder


@dataclass
class FoundImages:
    """What :func:`list_images` found.

    Attributes:
        files: image files in order, each once.
        bad: what was asked for and is not there, holds no image or cannot be read, with the reason.
        ignored: visible files in folders that are not named like images.
    """

    files: list[Path] = field(default_factory=list)
    bad: list[tuple[Path, str]] = field(default_factory=list)
    ignored: list[Path] = field(default_factory=list)

    def ignored_line(self) -> str | None:
        """One line that counts the ignored files by their endings; None where there is none."""
        if not self.ignored:
            return None
        endings = Counter(path.suffix.lower() or "without an ending" for path in self.ignored)
        counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(8))
        return (
            f"files that are not named like images were left out: {counts} "
            f"(the first is {self.ignored[0]})"
        )


def list_images(paths: str | Path | Iterable[str | Path]) -> FoundImages:
    """Image files at and below ``paths``: a path, or several.

    A file that is named itself is taken whatever its ending is. A folder gives the files in and
    below it that are named like images, sorted by the bytes of their paths' parts; hidden files and
    folders are passed over, links are followed, and a link back to a folder above is not. Only
    regular files are images: a named pipe, a device or a broken link is ``bad``. Nothing is read.
    """
    found = FoundImages()
    files: dict[Path, None] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        inside: dict[Path, None] = {}
        told = len(found.bad)
        _collect(Path(path), None, inside, found)
        if not inside and len(found.bad) == told:
            found.bad.append((Path(path), "no image in this folder"))
        files.update(inside)
    found.files.extend(files)
    return found


def _collect(
    path: Path,
    above: frozenset[tuple[int, int]] | None,
    files: dict[Path, None],
    found: FoundImages,
) -> None:
    """Put ``path``, or what lies below it, where it belongs; ``above`` is None for a named path."""
    wanted = above is None or is_image_name(path.name)
    try:
        here = os.stat(path)
        if stat.S_ISDIR(here.st_mode):
            identity = (here.st_dev, here.st_ino)
            if above is None or identity not in above:  # else a link back to a folder above
                for name in sorted(filter(_visible, os.listdir(path)), key=os.fsencode):
                    _collect(path / name, (above or frozenset()) | {identity}, files, found)
        elif not wanted:
            found.ignored.append(path)
        elif stat.S_ISREG(here.st_mode):
            files[path] = None
        else:
            found.bad.append((path, "a pipe, a socket or a device, expected a file"))
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, FileNotFoundError):
            reason = "a link to nothing" if path.is_symlink() else "no such file or folder"
        if wanted or not isinstance(error, FileNotFoundError):
            found.bad.append((path, reason))
        else:
            found.ignored.append(path)
