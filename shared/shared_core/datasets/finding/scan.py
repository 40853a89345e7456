"""Folders of class folders become a list of samples: sorted, the same on every machine."""

from __future__ import annotations

import itertools
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared_core.datasets.errors import DatasetError, DatasetNotFoundError
from shared_core.datasets.sets.spec_type import DatasetSpec, normal_name

IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif"}
)
# How people name the parts of a split; see part_of.
_PARTS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "vali"), "val"),
    **dict.fromkeys(("dev", "development", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing", "tst", "holdout", "heldout"), "test"),
}
# Folders that stand beside class folders or parts and are none.
_NO_CLASSES = frozenset(
    {"unlabeled", "unlabelled", "masks", "mask", "annotations", "labels", "labelmaps"}
)
# What a NAS, a Mac, Windows and Linux leave among a user's folders.
_SYSTEM = frozenset(
    {"__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "lost+found"}
    | {"system volume information", "@recycle", "@sharebin", "thumbs.db", "desktop.ini"}
)

# What we write into a data set's folder ourselves.
_OWN = frozenset(
    {"quarantine.txt", "split.json", "verify.json", "verify.md", "verify.html", "scenes.json"}
)


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
        ignored: number of files that are not named like images, by their ending.
    """

    root: Path
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    layout: Literal["single", "split"]
    stray: tuple[str, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)

    def notes(self) -> tuple[str, ...]:
        """One line each for what was passed over: images in no class folder, other files."""
        lines = []
        if self.stray:
            tops = sorted({path.split("/")[0] for path in self.stray if "/" in path})
            where = f" in {', '.join(tops[:4])}" if tops else ""
            lines.append(
                f"{len(self.stray)} images{where} lie in no class folder and are left out "
                f"(the first is {self.stray[0]})"
            )
        if self.ignored:
            counts = ", ".join(f"{n} {ending}" for ending, n in self.ignored.items())
            lines.append(f"files that are not named like images are left out: {counts}")
        return tuple(lines)

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


def part_of(name: str) -> str | None:
    """``train``, ``val`` or ``test`` for a folder that is named like a part of a split, else None.

    Case, separators and words such as ``set`` or ``images`` do not matter: ``Train_Set``,
    ``validation-images``.
    """
    plain = re.sub(r"[\s_.-]+", "", name.casefold())
    for ending in ("", "set", "data", "dataset", "images", "split", "folder", "part"):
        if plain.endswith(ending) and plain[: len(plain) - len(ending)] in _PARTS:
            return _PARTS[plain[: len(plain) - len(ending)]]
    return None


def _visible(name: str) -> bool:
    return not name.startswith(".") and name.casefold() not in _SYSTEM


def _bytes_key(parts: Sequence[str]) -> tuple[bytes, ...]:
    return tuple(part.encode("utf-8", "surrogateescape") for part in parts)


def _walk(
    folder: Path,
    parts: tuple[str, ...],
    above: frozenset[tuple[int, int]],
    ignored: Counter[str],
) -> Iterator[tuple[str, ...]]:
    """Image files below ``folder`` as tuples of path parts; links are followed, loops are not.

    Files of other endings are counted in ``ignored``.
    """
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
                    folder / entry.name, (*parts, entry.name), above | {identity}, ignored
                )
            elif not parts and entry.name in _OWN:
                continue
            elif not is_image_name(entry.name):
                ignored[os.path.splitext(entry.name)[1].lower() or "without an ending"] += 1
            else:  # broken links and pipes stay in the list: verify reports them, instead of nobody
                yield (*parts, entry.name)


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            (e.name for e in entries if _visible(e.name) and e.is_dir()),
            key=lambda name: _bytes_key([name]),
        )


def _split_tops(root: Path, files: list[tuple[str, ...]]) -> dict[str, str]:
    """Top folder -> part, of a folder that is split into parts; empty for class folders.

    Parts are named like parts and hold class folders, and classes of the training part are in
    another part, too. What else stands beside them is stray. A class that happens to be called
    ``train`` holds its images itself, or has no such brother.

    Raises:
        DatasetError: parts and other folders in a mixture that could mean either.
    """
    tops: dict[str, set[str]] = {}  # top -> folders inside that hold images
    for parts in files:
        if len(parts) > 1:
            inner = tops.setdefault(parts[0], set())
            if len(parts) > 2:
                inner.add(parts[1])
    named = {top: part for top in tops if (part := part_of(top)) is not None}
    nested = {top: part for top, part in named.items() if tops[top]}
    others = sorted(set(tops) - set(named))
    if not nested:
        return {}
    if not others:
        return named
    training = [top for top, part in nested.items() if part == "train"]
    related = {
        top
        for top, part in nested.items()
        if part != "train" and any(tops[top] & tops[one] for one in training)
    }
    if related:
        return {top: part for top, part in named.items() if top in related or part == "train"}
    strange = [top for top in others if top.casefold() in _NO_CLASSES]
    if strange:
        raise DatasetError(
            f"{root} holds {', '.join(sorted(nested))} beside {strange[0]}: is "
            f"{sorted(nested)[0]} a part of a split or a class? Take {strange[0]} out, or name the "
            "folder that holds the classes"
        )
    return {}


def _check_names(root: Path, files: list[tuple[str, ...]], depth: int) -> None:
    """Class folders whose names are no text, look alike, or are no classes.

    Raises:
        DatasetError: one of these.
    """
    seen: dict[str, set[str]] = {}  # folded name -> spellings
    parts_with: dict[str, set[str]] = {}  # spelling -> top folders
    for parts in files:
        name = parts[depth]
        seen.setdefault(unicodedata.normalize("NFC", name).casefold(), set()).add(name)
        parts_with.setdefault(name, set()).add(parts[0])
    for name in sorted(parts_with):
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DatasetError(
                f"class folder {name.encode('utf-8', 'surrogateescape')!r} in {root}: its name is "
                "not UTF-8, expected one that is; rename it"
            ) from None
    for spellings in seen.values():
        alike = sorted(spellings)
        for first, second in itertools.combinations(alike, 2):
            same = unicodedata.normalize("NFC", first) == unicodedata.normalize("NFC", second)
            # Two letters of one alphabet may differ in case; two parts must not spell differently.
            if same or (depth and not parts_with[first] & parts_with[second]):
                raise DatasetError(
                    f"class folders {first!r} and {second!r} in {root} look alike: expected one "
                    "spelling of a class"
                )
    names = set(parts_with)
    if not depth and {one.casefold() for one in names} & _NO_CLASSES and len(names) == 2:
        raise DatasetError(
            f"{root} holds {' and '.join(sorted(names))}, which are no classes of images: expected "
            "a folder of class folders"
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
    ignored: Counter[str] = Counter()
    files = sorted(_walk(root, (), frozenset(), ignored), key=_bytes_key)
    tops = _split_tops(root, files)
    split_layout = bool(tops)
    depth = 1 if split_layout else 0  # index of the class among a path's parts

    def stands(parts: tuple[str, ...]) -> bool:
        return len(parts) >= depth + 2 and (not split_layout or parts[0] in tops)

    stray = tuple("/".join(parts) for parts in files if not stands(parts))
    files = [parts for parts in files if stands(parts)]
    if not files:
        raise DatasetError(
            f"no image in a class folder below {root}; expected {root}/<class>/*.jpg "
            f"(extensions {' '.join(sorted(IMAGE_EXTENSIONS))})"
        )
    _check_names(root, files, depth)
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
            tops[parts[0]] if split_layout else None,
        )
        for parts in files
    )
    layout: Literal["single", "split"] = "split" if split_layout else "single"
    return Listing(root, names, samples, layout, stray, dict(ignored.most_common()))


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
    if len(inner) == 1 and part_of(inner[0]) is None and _folders(folder / inner[0]):
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
