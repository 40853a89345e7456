"""From a model file to a model folder: what is exported, which images judge it, what int8 cost."""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from landmark_distill.class_means import NearestMean, class_images, nearest_mean
from landmark_distill.gallery.embedder import (
    PROGRAM,
    PROGRAM_FILE,
    embedder_of,
    file_facts,
    program_run,
)
from landmark_distill.gallery.features import unit_rows
from landmark_distill.images.landmark_data import SPLIT_FILE
from landmark_distill.images.truths import folder_truths
from landmark_distill.judging.judge import openset_test
from landmark_distill.judging.retrieval import retrieval
from landmark_distill.model_files import load_model
from shared_core.checkpoints import atomic_write
from shared_core.datasets import BatchLoader, ImageSet, Manifest
from shared_core.datasets.finding.scan import list_images
from shared_core.deploy.facts import INT8, ONNX, ModelFacts, write_facts
from shared_core.deploy.predictor import Predictor, open_model
from shared_core.deploy.staging import check_export_folder
from shared_core.deploy.write import Calibration, Form, Int8Wish, Written, write_model_folder
from shared_core.for_torch.cost import count_params, layer_costs
from shared_core.for_torch.export import export_onnx
from shared_core.for_torch.precision import Precision
from shared_core.metrics import total_macs
from shared_core.runs.command import UsageError

FORMATS = (ONNX, PROGRAM)
BATCH = 16
LEARN, JUDGE = slice(1, None, 2), slice(0, None, 2)  # of the calibration images
LEAST_QUERIES = 30  # below, recall@1 says nothing
Answers = Any  # uint8 views (N, H, W, 3) to features (N, D)


@dataclass(frozen=True)
class ExportOptions:
    """What is asked of an export.

    Attributes:
        formats: some of ``FORMATS``.
        opset: of ONNX; None for torch's default.
        int8: ``no``, ``auto`` or ``yes``, see ``Int8Wish``.
        max_accuracy_loss: what int8 may lose of recall@1, or of the mean cosine.
        calibration: folder of images for int8; None takes the calibration part of the file's run.
        most: images of it to use.
        data_path: where the run's images lie now; None where they lay.
        class_means: class folder or split, whose class means make a classifier; None: features.
    """

    formats: tuple[str, ...] = FORMATS
    opset: int | None = None
    int8: str = "no"
    max_accuracy_loss: float = 0.01
    calibration: Path | None = None
    most: int = 1000
    data_path: Path | None = None
    class_means: Path | None = None


@dataclass(frozen=True)
class Judging:
    """Image files, and which of them belong together by ``coarse`` and ``fine`` where known."""

    files: Sequence[Path]
    truths: Mapping[str, NDArray[np.int64]]

    def part(self, rows: slice) -> Judging:
        """Some of them."""
        truths = {name: codes[rows] for name, codes in self.truths.items()}
        return Judging(self.files[rows], truths)

    def views(self, view: Any) -> Iterator[NDArray[np.uint8]]:
        """What a network sees of them, in batches."""
        images = ImageSet(list(self.files), [0] * len(self.files))
        for batch in BatchLoader(images, view=view, batch_size=BATCH, threads=2):
            yield batch.images


class Program(nn.Module):
    """uint8 images to features of length 1, with all that lies between."""

    scale: Tensor
    shift: Tensor

    def __init__(self, encoder: nn.Module, facts: ModelFacts) -> None:
        super().__init__()
        scale, shift = (torch.from_numpy(value) for value in facts.scale_and_shift())
        self.encoder, self.bgr = encoder, facts.bgr
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        """``(N, H, W, 3)`` to ``(N, D)``."""
        pixels = (images.float() * self.scale + self.shift).permute(0, 3, 1, 2)
        if self.bgr:
            pixels = pixels.flip(1)
        return nn.functional.normalize(self.encoder(pixels.contiguous()), dim=1)


def export_model(path: Path, folder: Path, options: ExportOptions) -> list[str]:
    """Write the model folder, and say what is in it.

    Raises:
        UsageError: options that do not fit, or a folder that holds what no export wrote.
        ExportError: a file does not answer as the network.
        ValueError, FileNotFoundError: no model file, or images that are missing or too few.
    """
    check_export_folder(folder)
    model, stored = load_model(path)
    if stored is None:
        raise ValueError(f"{path} does not say what network it is of: expected a file of this one")
    facts, encoder = file_facts(stored), model.encoder.eval()
    macs = total_macs(layer_costs(encoder, torch.zeros(1, 3, *facts.input_size)))
    facts = facts.replaced(costs={"macs": macs, "parameters": count_params(encoder)})
    network = embedder_of(encoder, facts, Precision("cpu"), name=str(path))
    if options.class_means is not None:
        return _export_classifier(folder, encoder, network, stored, options)
    calibration = _calibration(path, stored, options) if options.int8 != "no" else None
    test = run_part(path, stored, "test", options.data_path)
    with tempfile.TemporaryDirectory(prefix="landmark-export-") as scratch:
        sources = []
        if ONNX in options.formats:
            sources = [_onnx(encoder, Path(scratch), facts, options, "features")]
        written = write_model_folder(
            folder,
            facts=facts,
            network=network,
            sources=sources,
            forms={PROGRAM: _program_form(encoder, facts)} if PROGRAM in options.formats else None,
            test=None if test is None else ((views, None) for views in test.views(network.view)),
            judged_on=f"the test part {str(stored.get('split_hash'))[:12]} of its run",
            calibration=None if calibration is None else _views(calibration.part(LEARN), network),
            int8=_wish(options, calibration, network),
        )
    judges = test if test is not None else calibration and calibration.part(JUDGE)
    return [*written.lines, *_say_open_set(written, judges)]


def _export_classifier(
    folder: Path,
    encoder: nn.Module,
    network: Predictor,
    stored: Mapping[str, Any],
    options: ExportOptions,
) -> list[str]:
    """The embedding, its classes' means behind it, as a model that names classes."""
    known = (stored.get("config") or {}).get("data_path")
    data_path = options.data_path or (Path(known) if known else None)
    images = class_images(options.class_means, data_path)
    means, facts = nearest_mean(network, images, batch=BATCH)
    classifier = NearestMean(encoder, means).eval()
    answers = embedder_of(classifier, facts, Precision("cpu"), name="the network")
    view = facts.make_view()

    def batches(part: str) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        for one in BatchLoader(images.parts[part], view=view, batch_size=BATCH, threads=2):
            yield one.images.copy(), one.labels

    held = None
    if options.int8 != "no":
        views, labels = (np.concatenate(some) for some in zip(*batches("calibration"), strict=True))
        order = np.random.default_rng(0).permutation(len(labels))[: options.most]
        held = Calibration(views[order], labels[order])
    with tempfile.TemporaryDirectory(prefix="landmark-export-") as scratch:
        written = write_model_folder(
            folder,
            facts=facts,
            network=answers,
            sources=[_onnx(classifier, Path(scratch), facts, options, "logits")],
            test=batches("test") if "test" in images.parts else None,
            judged_on=f"the test part of {options.class_means.name}",
            calibration=held,
            int8=Int8Wish(options.int8, max_accuracy_loss=options.max_accuracy_loss),
        )
    return [*written.lines, f"  {len(images.names)} class means of {len(images.parts['train'])} "
            f"images, temperature {facts.temperature:.4f}"]  # fmt: skip


def _onnx(
    network: nn.Module, folder: Path, facts: ModelFacts, options: ExportOptions, output: str
) -> Path:
    """The float network as an ONNX file in ``folder``."""
    file, size = folder / "student.onnx", (3, *facts.input_size)
    with sdpa_kernel(SDPBackend.MATH):  # spelled out: the fused kernel's layout is not ONNX's
        export_onnx(network, file, input_size=size, output_names=(output,), opset=options.opset)
    return file


def _wish(options: ExportOptions, calibration: Judging | None, network: Predictor) -> Int8Wish:
    """int8 is judged by recall@1 where enough images have another of their class, else by the
    mean cosine to the float features."""
    if calibration is None:
        return Int8Wish()
    held = calibration.part(JUDGE)
    batches = [views.copy() for views in held.views(network.view)]
    exact = _features(network.probabilities, batches)
    fine = held.truths.get("fine", np.arange(len(held.files)))
    known = int((np.bincount(fine)[fine] > 1).sum()) >= LEAST_QUERIES

    def judge(run: Answers) -> float:
        rows = _features(run, batches)
        if known:
            return retrieval(rows, fine, ks=(1,)).recall[1]
        return float((rows * exact).sum(axis=1).mean())

    return Int8Wish(options.int8, max_accuracy_loss=options.max_accuracy_loss, judge=judge)


def _views(judging: Judging, network: Predictor) -> Calibration:
    return Calibration(np.concatenate([views.copy() for views in judging.views(network.view)]))


def _features(run: Answers, batches: Sequence[NDArray[np.uint8]]) -> NDArray[np.float64]:
    return np.concatenate([unit_rows(run(views)) for views in batches])


def _say_open_set(written: Written, judges: Judging | None) -> list[str]:
    """Retrieval and verification by each ONNX file, into ``model.json`` and onto the terminal."""
    runtimes = [name for name in (ONNX, INT8) if name in written.facts.files]
    if judges is None or not judges.truths or not runtimes:
        return []
    found: dict[str, Any] = {"images": len(judges.files)}
    lines = []
    for runtime in runtimes:
        predictor = open_model(written.folder, runtime=runtime)
        batches = [views.copy() for views in judges.views(predictor.view)]
        rows = _features(predictor.probabilities, batches)
        result = openset_test(rows, judges.truths, ks=(1, 5))
        found[runtime] = result.as_dict()
        for name, one in result.retrieval.items():
            rates = ", ".join(result.shown(name)[:4])
            lines.append(
                f"  {runtime}, {name}: recall@1 {one.recall[1]:.4f}, mAP@R "
                f"{one.mean_average_precision_at_r:.4f}, rates at FAR 1e-1 to 1e-4: {rates}"
            )
    measured = {**written.facts.measured, "open_set": found}
    write_facts(written.folder, written.facts.replaced(measured=measured))
    return lines


def _program_form(encoder: nn.Module, facts: ModelFacts) -> Form:
    """``torch.export``'s program with a free batch size."""

    def write(folder: Path) -> list[str]:
        example = torch.zeros(2, *facts.input_size, 3, dtype=torch.uint8)
        data = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            free = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(Program(encoder, facts), (example,), dynamic_shapes=free)
            torch.export.save(program, data)
        atomic_write(folder / PROGRAM_FILE, lambda to: to.write_bytes(data.getvalue()))
        return [PROGRAM_FILE]

    return Form(write, lambda folder: program_run(folder / PROGRAM_FILE))


# -- images ---------------------------------------------------------------------------------------


def run_part(
    path: Path, stored: Mapping[str, Any], part: str, data_path: Path | None
) -> Judging | None:
    """A part of the images of the run that made the file; None where they are not there.

    Raises:
        UsageError: ``data_path`` was named, and there is no split of this model beside the file.
    """
    config, home = stored.get("config") or {}, path.resolve().parent
    split = Path(config["split"]) if config.get("split") else home / SPLIT_FILE
    if not split.is_file():
        if data_path is not None:
            raise UsageError(f"--data-path: {split} is not there, expected the split of the run")
        return None
    root = data_path or (Path(config["data_path"]) if config.get("data_path") else None)
    root = root or home / "data" / "scenes"
    if not root.is_dir():
        return None
    manifest = Manifest.read(split, root=root)
    if manifest.hash != stored.get("split_hash") or part not in manifest.splits:
        return None
    items = manifest.subset(part)
    classes = [f"{manifest.classes[item.label]}/image" for item in items]
    return Judging([root / item.path for item in items], folder_truths(classes))


def _calibration(path: Path, stored: Mapping[str, Any], options: ExportOptions) -> Judging:
    """Images that fix and judge the ranges of int8, in an order that means nothing.

    Raises:
        UsageError: no folder was named, and the images of the run are not there.
        FileNotFoundError, ValueError: no folder, or fewer than four images.
    """
    if options.calibration is not None:
        found = _folder(options.calibration)
    else:
        run = run_part(path, stored, "calibration", options.data_path)
        if run is None:
            raise UsageError(
                "--int8 fixes ranges on images, and those of the model's run are not there: "
                "expected --calibration FOLDER"
            )
        found = run
    if len(found.files) < 4:
        raise ValueError(f"{len(found.files)} calibration images, expected four or more")
    order = np.random.default_rng(0).permutation(len(found.files))[: options.most]
    truths = {name: codes[order] for name, codes in found.truths.items()}
    return Judging([found.files[i] for i in order], truths)


def _folder(folder: Path) -> Judging:
    if not folder.is_dir():
        raise FileNotFoundError(f"--calibration {folder} is not a folder")
    files = list_images(folder).files
    names = [path.relative_to(folder).as_posix() for path in files]
    known = bool(names) and all("/" in name for name in names)
    return Judging(files, folder_truths(names) if known else {})
