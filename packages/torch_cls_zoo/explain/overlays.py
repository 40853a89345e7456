"""Pictures of class activation maps: one for each image, and one contact sheet of all.

A picture has the image, and for each method one overlay for each explained class: the most probable
ones, and the true one if it is not among them. The legend says what the colours mean: each map is
divided by its own largest value, so colours compare within an overlay, not between overlays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared_core.checkpoints import atomic_write
from shared_core.runs import UsageError
from torch_cls_zoo.explain.cam import METHODS, class_maps, enlarge, normalized
from torch_cls_zoo.explain.cam_layers import default_layer
from torch_cls_zoo.utils.fonts import figure_texts

# The README of this zoo prints "grad-camm++"; both spellings mean the same.
METHOD_NAMES = {**{name: (name,) for name in METHODS}, "all": METHODS, "grad-camm++": METHODS[2:]}
SHEET_ROWS = 24  # images on a contact sheet
LOWEST = 0.15  # below this share of the largest value a map is fully transparent
OPACITY = 0.65


@dataclass
class Explained:
    """One image and what the network saw in it."""

    name: str  # for the file and the title
    image: np.ndarray  # uint8 (H, W, 3)
    label: int | None
    classes: list[int]  # explained, the most probable first
    probabilities: list[float]  # of these
    maps: dict[str, np.ndarray] = field(default_factory=dict)  # by method (M, H, W) in [0, 1]


def methods_of(name: str, *, cam_possible: bool = True) -> list[str]:
    """The methods that ``--visual_method`` names.

    Raises:
        UsageError: unknown.
    """
    if name not in METHOD_NAMES:
        raise UsageError(f"--visual_method {name!r}, expected one of {', '.join(METHOD_NAMES)}")
    return [one for one in METHOD_NAMES[name] if cam_possible or one != "cam" or name == "cam"]


def explain(
    model: nn.Module,
    images: np.ndarray,
    inputs: Tensor,
    *,
    names: Sequence[str],
    labels: Sequence[int | None],
    layer: str,
    methods: Sequence[str],
    family: str = "softmax",
    top: int = 2,
) -> list[Explained]:
    """Explain a batch.

    Args:
        model: gives logits.
        images: what is drawn, uint8 ``(N, H, W, 3)``.
        inputs: the same, normalised, ``(N, 3, H, W)``, on the model's device.
        names: one an image.
        labels: true classes; None where unknown.
        layer: module to look at.
        methods: out of :data:`torch_cls_zoo.explain.cam.METHODS`.
        family: ``softmax`` or ``sigmoid`` (``bce``): for the probabilities.
        top: most probable classes to explain, 1 or more.

    Raises:
        ValueError: see :func:`torch_cls_zoo.explain.cam.class_maps`.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        logits = model(inputs).float()
    for module, training in modes.items():
        module.training = training
    probs = logits.softmax(1) if family == "softmax" else logits.sigmoid()
    top = min(top, probs.shape[1])
    ranked = probs.argsort(dim=1, descending=True).cpu().tolist()
    chosen = []
    for order, label in zip(ranked, labels, strict=True):
        found = order[:top]
        if label is not None and label not in found:
            found = [*order[: max(1, top - 1)], int(label)][: max(top, 2)]
        chosen.append(found + [c for c in order if c not in found][: max(0, top - len(found))])
    width = max(len(found) for found in chosen)
    chosen = [found + found[-1:] * (width - len(found)) for found in chosen]
    maps, _logits = class_maps(model, inputs, chosen, layer=layer, methods=methods)
    height, breadth = images.shape[1:3]
    large = {
        name: normalized(enlarge(found.float(), (height, breadth))).cpu().numpy()
        for name, found in maps.items()
    }
    return [
        Explained(
            name=names[i],
            image=images[i],
            label=labels[i],
            classes=chosen[i],
            probabilities=[float(probs[i, c]) for c in chosen[i]],
            maps={name: found[i] for name, found in large.items()},
        )
        for i in range(len(images))
    ]


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Blend a map ``(H, W)`` in [0, 1] over an image: the stronger, the more opaque.

    Returns:
        uint8 ``(H, W, 3)``.
    """
    from matplotlib import colormaps

    colour = colormaps["turbo"](heat)[..., :3] * 255.0
    alpha = np.clip((heat - LOWEST) / (1.0 - LOWEST), 0.0, 1.0)[..., None] * OPACITY
    mixed = image * (1.0 - alpha) + colour * alpha
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8)


def draw_sheet(
    explained: Sequence[Explained], path: str | Path, *, class_names: Sequence[str], title: str
) -> None:
    """Draw images as rows: image, then overlays; with a legend. Written atomically as PNG."""
    with figure_texts([*class_names, title, *(one.name for one in explained)]) as ready:
        _draw_sheet(explained, Path(path), [ready(name) for name in class_names], ready, title)


def _draw_sheet(
    explained: Sequence[Explained],
    path: Path,
    class_names: Sequence[str],
    ready: Callable[[str], str],
    title: str,
) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    methods = list(explained[0].maps)
    columns = 1 + len(methods) * max(len(one.classes) for one in explained)
    aspect = explained[0].image.shape[0] / explained[0].image.shape[1]
    rows = len(explained)
    figure = Figure(
        figsize=(1.75 * columns + 1.2, (1.75 * aspect + 0.42) * rows + 0.95), dpi=110,
        layout="constrained",
    )  # fmt: skip
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, one in zip(grid, explained, strict=True):
        line[0].imshow(one.image)
        truth = "" if one.label is None else f"\ntrue: {_short(class_names[one.label])}"
        line[0].set_title(_short(ready(one.name)) + truth, fontsize=7)
        places = iter(line[1:])
        for method in methods:
            for number, (label, prob) in enumerate(
                zip(one.classes, one.probabilities, strict=True)
            ):
                axes = next(places)
                axes.imshow(overlay(one.image, one.maps[method][number]))
                empty = " (empty map)" if not one.maps[method][number].any() else ""
                hue = "black" if one.label is None else "#1d7a3c" if label == one.label else "#a33"
                axes.set_title(
                    f"{method}{empty}\n{_short(class_names[label])} {prob:.2f}",
                    fontsize=7,
                    color=hue,
                )
    figure.suptitle(ready(title), fontsize=9)
    bar = figure.colorbar(
        ScalarMappable(cmap=colormaps["turbo"]), ax=grid.ravel().tolist(), shrink=min(1, 3 / rows),
        fraction=0.03, pad=0.01,
    )  # fmt: skip
    bar.set_label("evidence for the class, share of this map's largest", fontsize=7)
    bar.ax.tick_params(labelsize=7)
    atomic_write(path, lambda scratch: figure.savefig(str(scratch), format="png"))


def _short(text: str, most: int = 22) -> str:
    return text if len(text) <= most else "…" + text[-most + 1 :]


def visualise(
    model: nn.Module,
    batches: Iterable[tuple[np.ndarray, Sequence[int | None], Sequence[str]]],
    folder: str | Path,
    *,
    class_names: Sequence[str],
    normalise: Callable[[np.ndarray], Tensor],
    method: str = "all",
    layer: str | None = None,
    family: str = "softmax",
    top: int = 2,
    title: str = "",
    sheet_rows: int = SHEET_ROWS,
) -> dict[str, Any]:
    """Draw the maps of a stream of images into ``folder``.

    Args:
        model: gives logits.
        batches: (images uint8 ``(N, H, W, 3)`` as the network sees them, labels, names); a name may
            have slashes and becomes part of a file name, so names must differ.
        folder: gets a PNG for each image and ``contact_sheet.png`` of the first ``sheet_rows``.
        class_names: in the order of the logits.
        normalise: uint8 ``(N, H, W, 3)`` to the model's input on its device.
        method: ``cam``, ``grad-cam``, ``grad-cam++`` or ``all``; with ``all`` CAM is left out, and
            that is noted, where a network has none.
        layer: module to look at; None takes the default of the network.
        family: ``softmax`` or ``sigmoid`` (``bce``).
        top: classes to explain for each image.
        title: of the contact sheet.
        sheet_rows: images on it.

    Returns:
        ``layer``, ``methods``, ``images`` (count), ``sheet`` (path), ``notes``.

    Raises:
        UsageError: an unknown method.
        ValueError: no images, or a layer or method that this network has not.
    """
    methods = methods_of(method)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kept: list[Explained] = []
    notes: list[str] = []
    used: set[str] = set()
    count = 0
    for images, labels, names in batches:
        inputs = normalise(images)
        if layer is None:
            layer = default_layer(model, inputs[:1], len(class_names))
        settings = {"layer": layer, "family": family, "top": top}
        pack = {"names": names, "labels": labels, **settings}
        try:
            found = explain(model, images, inputs, methods=methods, **pack)
        except ValueError as error:
            if method != "all" or "cam" not in methods or "visual_method cam" not in str(error):
                raise
            notes.append(f"CAM left out: {error}")
            methods = methods_of(method, cam_possible=False)
            found = explain(model, images, inputs, methods=methods, **pack)
        for one in found:
            stem = Path(one.name.replace("/", "_")).stem
            file = stem if stem not in used else f"{stem}_{count}"
            used.add(file)
            heading = f"{one.name}: layer {layer}"
            draw_sheet([one], folder / f"{file}.png", class_names=class_names, title=heading)
            if len(kept) < sheet_rows:
                kept.append(one)
            count += 1
    if not kept:
        raise ValueError("no image to explain, expected one or more")
    sheet = folder / "contact_sheet.png"
    heading = title or f"{type(model).__name__}, layer {layer}"
    draw_sheet(kept, sheet, class_names=class_names, title=heading)
    return {
        "layer": layer, "methods": methods, "images": count, "sheet": str(sheet), "notes": notes,
    }  # fmt: skip
