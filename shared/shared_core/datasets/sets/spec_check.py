"""What a folder has other than its dataset's fact sheet says: facts to report, not errors."""

from __future__ import annotations

from collections.abc import Mapping

import simplejpeg

from shared_core.datasets.finding.scan import Listing
from shared_core.datasets.reading.decode import decode
from shared_core.datasets.sets.spec_type import DatasetSpec, normal_name

Size = tuple[int, int]  # height, width in pixels


def describe(listing: Listing, spec: DatasetSpec, *, probe: int = 32) -> list[str]:
    """One line for each fact of ``spec`` that the folder does not meet; empty when all are met.

    A smaller edition of a set (fewer images, other pixel size) trains as well as the full one,
    but a number measured on it is not a number of the set: reports carry these lines.

    Args:
        probe: how many images, evenly spread, are opened for their pixel size; 0 opens none.
    """
    lines = describe_counts(listing, spec)
    sizes: dict[Size, int] = {}
    step = max(1, len(listing.samples) // probe) if probe > 0 else 0
    for sample in listing.samples[::step][:probe] if step else ():
        size = _pixel_size(sample.path)
        if size is not None:
            sizes[size] = sizes.get(size, 0) + 1
    return lines + describe_sizes(sizes, spec)


def _pixel_size(path: object) -> Size | None:
    try:
        with open(str(path), "rb") as file:
            data = file.read()
        if data[:2] == b"\xff\xd8":
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            return int(height), int(width)
        image = decode(data)
        return int(image.shape[0]), int(image.shape[1])
    except (OSError, ValueError):
        return None  # verify is who reports broken files


def class_mismatch(listing: Listing, spec: DatasetSpec) -> str | None:
    """One line when the classes are other than the spec's: then it is another set."""
    if len(listing.classes) != spec.num_classes:
        return f"{len(listing.classes)} classes, {spec.name} has {spec.num_classes}"
    if spec.class_names is not None:
        known = {normal_name(name) for name in spec.class_names}
        unknown = [name for name in listing.classes if normal_name(name) not in known]
        if unknown:
            return f"class {unknown[0]!r} (and {len(unknown) - 1} more) is none of {spec.name}'s"
    return None


def describe_counts(listing: Listing, spec: DatasetSpec) -> list[str]:
    """Lines for classes, images in all, images a class and images a split that differ."""
    lines = []
    if mismatch := class_mismatch(listing, spec):
        lines.append(mismatch)
    total = len(listing.samples)
    if spec.num_images is not None and total != spec.num_images:
        lines.append(f"{total:,} images, {spec.name} has {spec.num_images:,}")
    if spec.images_per_class is not None:
        counts = {normal_name(name): count for name, count in listing.counts().items()}
        off = [
            (name, counts.get(normal_name(name), 0), expected)
            for name, expected in spec.images_per_class.items()
            if counts.get(normal_name(name), 0) != expected
        ]
        if off:
            shown = ", ".join(f"{name} {got} of {expected}" for name, got, expected in off[:3])
            more = f" and {len(off) - 3} more" if len(off) > 3 else ""
            lines.append(
                f"images differ in {len(off)} of {spec.num_classes} classes: {shown}{more}"
            )
    if spec.split_images is not None and listing.layout == "split":
        for split, expected in spec.split_images.items():
            got = sum(sample.split == split for sample in listing.samples)
            if got != expected:
                lines.append(f"{got:,} images in {split}, {spec.name} has {expected:,}")
    return lines


def describe_sizes(sizes: Mapping[Size, int], spec: DatasetSpec) -> list[str]:
    """A line when images are of another pixel size than the spec's square one."""
    if spec.image_size is None:
        return []
    right = (spec.image_size, spec.image_size)
    off = {size: count for size, count in sizes.items() if size != right}
    if not off:
        return []
    seen = sum(sizes.values())
    (height, width), count = max(off.items(), key=lambda item: (item[1], item[0]))
    return [
        f"{sum(off.values()):,} of {seen:,} images looked at are not {spec.image_size} x "
        f"{spec.image_size} pixels as in {spec.name} (most often {width} x {height}: {count:,})"
    ]
