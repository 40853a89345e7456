"""What is true of a dataset whoever reads it: the fact sheet and its own consistency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


def normal_name(name: str) -> str:
    """``name`` in lower case with letters and digits only: the form in which names are compared."""
    return "".join(c for c in name.lower() if c.isalnum())


@dataclass(frozen=True)
class DatasetSpec:
    """The facts of one dataset, each with its source.

    ``None`` stands for "not fixed, or not known for certain": such a fact is never checked.

    Attributes:
        name: the name that reports use.
        num_classes: number of classes, at least 1.
        num_images: images in all its splits together.
        image_size: height and width in pixels where every image has them, else None.
        class_names: folder names of the classes; compared without case, spaces and underscores.
        images_per_class: images of each class over all splits.
        split_images: images of each published split.
        sources: for every fact above (by its field's name) where it comes from.
        licence: one line; says so where none is stated by the authors.
        homepage: where a user gets the images.
        aliases: further names of the set, and of folders that hold it.
        layout: where the files are expected below the folder that holds the sets.

    Raises:
        ValueError: the facts contradict one another, or one has no source.
    """

    name: str
    num_classes: int
    num_images: int | None
    image_size: int | None
    class_names: tuple[str, ...] | None = None
    images_per_class: Mapping[str, int] | None = field(default=None, hash=False)
    split_images: Mapping[str, int] | None = field(default=None, hash=False)
    sources: Mapping[str, str] = field(default_factory=dict, hash=False)
    licence: str = "not stated by its authors"
    homepage: str = ""
    aliases: tuple[str, ...] = ()
    layout: str = ""

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise ValueError(f"{self.name}: num_classes is {self.num_classes}, expected >= 1")
        if self.class_names is not None and len(set(self.class_names)) != self.num_classes:
            raise ValueError(
                f"{self.name}: {len(set(self.class_names))} different class names, "
                f"expected num_classes = {self.num_classes}"
            )
        if self.images_per_class is not None:
            names = {normal_name(c) for c in self.images_per_class}
            if names != {normal_name(c) for c in self.class_names or ()}:
                raise ValueError(f"{self.name}: images_per_class and class_names differ")
        for fact in ("images_per_class", "split_images"):
            counts: Mapping[str, int] | None = getattr(self, fact)
            if counts is not None and sum(counts.values()) != self.num_images:
                raise ValueError(
                    f"{self.name}: {fact} sums to {sum(counts.values())}, "
                    f"expected num_images = {self.num_images}"
                )
        for fact in (
            "num_classes",
            "num_images",
            "image_size",
            "class_names",
            "images_per_class",
            "split_images",
        ):
            if getattr(self, fact) is not None and not self.sources.get(fact):
                raise ValueError(f"{self.name}: no source for {fact}")

    def how_to_get(self) -> str:
        """One line: where the images are, and where they are to be put."""
        place = self.layout or f"{self.name}/<class>/*.jpg"
        return f"get it from {self.homepage or 'its authors'} and put it as {place}"
