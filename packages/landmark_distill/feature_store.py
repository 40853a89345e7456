"""Features on disk with the names of their images: FILE.npy, FILE.paths.txt and FILE.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from landmark_distill.features import load_features
from shared_core.checkpoints import atomic_write


@dataclass(frozen=True)
class FeatureStore:
    """Features and what they are of."""

    features: NDArray[Any]  # (N, D), mapped
    paths: tuple[str, ...]  # relative to ``root``, with /; or row numbers where nothing is known
    facts: Mapping[str, Any]  # root, weights, architecture ...; empty where nothing is known

    @property
    def root(self) -> Path | None:
        """The folder that the paths start from."""
        return Path(self.facts["root"]) if "root" in self.facts else None

    def image(self, row: int) -> Path | None:
        """The image of a row, if it is known and there."""
        if self.root is None:
            return None
        path = self.root / self.paths[row]
        return path if path.is_file() else None


def beside(path: Path, suffix: str) -> Path:
    """``features.npy`` -> ``features.paths.txt``, ``features.json``."""
    return path.with_name(path.name.removesuffix(".npy") + suffix)


def write_names(path: Path, paths: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Write what belongs beside a feature file."""
    text = "".join(f"{one}\n" for one in paths)
    names, about = beside(path, ".paths.txt"), beside(path, ".json")
    atomic_write(
        names, lambda scratch: scratch.write_text(text, encoding="utf-8", errors="surrogateescape")
    )
    content = json.dumps(dict(facts), indent=2, ensure_ascii=False) + "\n"
    atomic_write(
        about,
        lambda scratch: scratch.write_text(content, encoding="utf-8", errors="surrogateescape"),
    )


def open_store(path: str | Path) -> FeatureStore:
    """Features with their names, as ``embed.py`` left them; a lone .npy has row numbers.

    Raises:
        FileNotFoundError, ValueError: no features, or names of another number.
    """
    path = Path(path)
    features = load_features(path)
    names, about = beside(path, ".paths.txt"), beside(path, ".json")
    paths = tuple(str(row) for row in range(len(features)))
    if names.is_file():
        text = names.read_text(encoding="utf-8", errors="surrogateescape")
        paths = tuple(text.split("\n")[:-1] if text.endswith("\n") else text.split("\n"))
        if len(paths) != len(features):
            raise ValueError(f"{names}: {len(paths)} lines for {len(features)} features")
    facts: dict[str, Any] = {}
    if about.is_file():
        try:
            facts = json.loads(about.read_text(encoding="utf-8", errors="surrogateescape"))
            if not isinstance(facts, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise ValueError(f"{about} cannot be read: {error}") from None
    return FeatureStore(features, paths, facts)
