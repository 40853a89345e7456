"""The image loader against torchvision's ImageFolder + DataLoader, on the same crop, in one run.

Both make batches of random, mirrored 224 px crops from the same JPEG files with two workers
(threads here, processes there); rounds are interleaved, so that other work on the machine
touches both. The pictures are synthetic: 1/f noise and rectangles, about 15 KB at 256 px and 150 KB
at 600 px. The resize is bilinear without smoothing here (above half size; JPEGs are decoded at 1/2
below), with smoothing in torchvision.

    python tools/bench/loader.py [--quick] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:1] = [str(REPOSITORY / "packages"), str(REPOSITORY / "shared")]

import cv2
import numpy as np
import simplejpeg
import torch

from shared_core.datasets.reading.cache import DecodedCache
from shared_core.datasets.reading.image_set import ImageSet
from shared_core.datasets.reading.loader import BatchLoader
from shared_core.datasets.reading.order import EpochOrder
from shared_core.datasets.views.augment import (
    SmallView,
    TrainView,
    random_resized_crop_box,
    view_rng,
)
from shared_core.for_torch.data import IMAGENET_MEAN, IMAGENET_STD, Normalizer, TorchLoader
from shared_core.runs import write_benchmark

WORKERS, CROP, BATCH = 2, 224, 64
QUALITY = {256: 80, 600: 94}  # 15 KB and 150 KB a picture
# "bytes": uint8 batches, as they go to a device that normalises them; "floats": normalised on the
# CPU, as torchvision's batches always are, 600 KB more memory an image.
GOALS = {
    "files, 256 px, bytes": 6.0,
    "files, 256 px, floats": 6.0,
    "files, 600 px, bytes": 3.0,
    "files, 600 px, floats": 3.0,
    "cache, 256 px, bytes": 15.0,
    "cache, 256 px, floats": 15.0,
    "cache, 600 px, bytes": 20.0,
    "cache, 600 px, floats": 20.0,
    "files, 256 px, bytes, of decode-only": 0.85,
    "files, 600 px, bytes, of decode-only": 0.85,
    "array, 32 px, bytes": 20.0,
    "array, 32 px, floats": 20.0,
}
Run = Callable[[], int]  # makes an epoch of batches, returns the number of images


def picture(size: int, seed: int) -> np.ndarray:
    """1/f^1.4 noise, mostly common to the channels, and translucent rectangles; uint8 RGB."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1.0
    noise = rng.standard_normal((4, *frequency.shape, 2)) @ np.array([1, 1j])
    field = np.fft.irfft2(noise * frequency**-1.4, (size, size))
    field = (field - field.mean(axis=(1, 2), keepdims=True)) / field.std(axis=(1, 2), keepdims=True)
    image = 128 + 40 * field[3, :, :, None] + 15 * field[:3].transpose(1, 2, 0)
    for _ in range(12):
        top, left = rng.integers(0, size, 2)
        height, width = rng.integers(size // 16, size // 4, 2)
        part = image[top : top + height, left : left + width]
        part[...] = 0.5 * part + 0.5 * rng.integers(0, 256, 3)
    return np.ascontiguousarray(np.clip(image, 0, 255), dtype=np.uint8)


def make_files(root: Path, size: int, number: int) -> list[Path]:
    """Write ``number`` pictures into four class folders below ``root``."""
    paths = []
    for n in range(number):
        path = root / f"class{n % 4}" / f"{n:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(picture(size, n), QUALITY[size], "RGB", "420"))
        paths.append(path)
    return sorted(paths)


def torchvision_run(root: Path, images: int) -> Run:
    """ImageFolder, PIL transforms, DataLoader with two processes that live through all rounds."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(CROP),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    folder = datasets.ImageFolder(str(root), transform)
    repeated = torch.utils.data.Subset(folder, [n % len(folder) for n in range(images)])
    return _data_loader_run(repeated)


def torchvision_small_run(images: np.ndarray, labels: np.ndarray) -> Run:
    """The CIFAR recipe: an image at a time, as torchvision's CIFAR10 class does it."""
    from PIL import Image
    from torchvision import transforms

    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    class Small(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return transform(Image.fromarray(images[index])), int(labels[index])

    return _data_loader_run(Small())


def _data_loader_run(dataset: Any) -> Run:
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True
    )
    return lambda: sum(len(labels) for _images, labels in loader)


def our_run(images: ImageSet, view: TrainView | SmallView, *, normalize: bool = True) -> Run:
    """The shared core's loader, and its normalisation unless only bytes are wanted."""
    order = EpochOrder(len(images), seed=0)
    loader = BatchLoader(images, view=view, batch_size=BATCH, order=order, threads=WORKERS)
    if not normalize:
        return lambda: sum(len(batch) for batch in loader)
    tensors = TorchLoader(loader, Normalizer())
    return lambda: sum(len(batch.labels) for batch in tensors)


def decode_run(paths: list[str]) -> Run:
    """Two threads that read and decode whole files and do nothing with the pixels."""

    def work(part: list[str]) -> None:
        for path in part:
            with open(path, "rb") as file:
                simplejpeg.decode_jpeg(file.read())

    def run() -> int:
        threads = [threading.Thread(target=work, args=(paths[n::WORKERS],)) for n in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(paths)

    return run


def bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """The slow reference of the resize: float64, half-pixel centres, edges repeated."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for length in image.shape[:2]:
        at = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.minimum(at.astype(int), max(length - 2, 0))
        parts.append((low, np.minimum(low + 1, length - 1), at - low))
    (top, bottom, y), (left, right, x) = parts
    rows = image[top] * (1 - y)[:, None, None] + image[bottom] * y[:, None, None]
    return rows[:, left] * (1 - x)[None, :, None] + rows[:, right] * x[None, :, None]


def check_files(images: ImageSet, view: TrainView, count: int) -> str:
    """Compare views without reduced decoding to the slow reference; say how far they are apart."""
    exact = TrainView(CROP, seed=view.seed, dct_scaled=False)
    loader = BatchLoader(images.subset(range(count)), view=exact, batch_size=count, threads=WORKERS)
    batch = next(iter(loader))
    worst = 0.0
    for n in range(count):
        whole = simplejpeg.decode_jpeg(Path(images.name(n)).read_bytes())
        rng = view_rng(exact.seed, images.keys[n], 0)
        top, left, height, width = random_resized_crop_box(rng, *whole.shape[:2])
        want = bilinear(whole[top : top + height, left : left + width].astype(float), CROP)
        if rng.random(2)[0] < exact.hflip:
            want = want[:, ::-1]
        worst = max(worst, float(np.abs(batch.images[n] - want).max()))
    if worst > 1.0:
        raise ValueError(f"views differ from the slow reference by {worst:.2f} of 255 levels")
    return f"{count} views within {worst:.2f} of 255 levels of float64 bilinear"


def check_small(images: np.ndarray, view: SmallView) -> str:
    """Compare a batch of small views, and their normalisation, with loops over pixels."""
    count = 16
    part = ImageSet(None, np.zeros(count, dtype=np.int64), source=images[:count])
    batch = next(iter(BatchLoader(part, view=view, batch_size=count, threads=WORKERS)))
    for n in range(count):
        top, left, flip = view_rng(view.seed, n, 0).random(3)
        padded = np.zeros((40, 40, 3), dtype=np.uint8)
        padded[4:36, 4:36] = images[n]
        want = padded[int(top * 9) :, int(left * 9) :][:32, :32]
        if not np.array_equal(batch.images[n], want[:, ::-1] if flip < 0.5 else want):
            raise ValueError(f"small view {n} differs from the slow reference")
    floats = Normalizer()(batch.images).numpy()
    slow = (batch.images / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    worst = float(np.abs(floats.transpose(0, 2, 3, 1) - slow).max())
    if worst > 1e-5:
        raise ValueError(f"normalised values differ by {worst:.1e}")
    return f"{count} views equal a loop bit for bit; normalised to {worst:.0e}"


def cpu_seconds() -> float:
    """Processor time of this process and its living children; NaN where /proc does not say."""
    me = os.getpid()
    try:
        children = Path(f"/proc/{me}/task/{me}/children").read_text().split()
        ticks = 0
        for process in (str(me), *children):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return math.nan


def measure(ours: Run, theirs: Run, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Wall and processor seconds an image, each ``(rounds, 2)``: ours and theirs, alternating."""
    wall, cpu = np.empty((rounds + 1, 2)), np.empty((rounds + 1, 2))
    for number in range(rounds + 1):  # the first is the warm-up
        for side, run in ((1, theirs), (0, ours)):
            start, start_cpu = time.perf_counter(), cpu_seconds()
            images = run()
            wall[number, side] = (time.perf_counter() - start) / images
            cpu[number, side] = (cpu_seconds() - start_cpu) / images
    return wall[1:], cpu[1:]


def row(name: str, ours: Run, theirs: Run, rounds: int, equal: str) -> dict[str, Any]:
    """Measure and print one line of the table."""
    wall, cpu = measure(ours, theirs, rounds)
    ratios = np.sort(wall[:, 1] / wall[:, 0])
    median, goal = float(np.median(ratios)), GOALS.get(name)
    cpu_ratio = float(np.median(cpu[:, 1]) / np.median(cpu[:, 0]))
    result = {
        "name": name,
        "ours": round(float(np.median(1 / wall[:, 0])), 1),
        "theirs": round(float(np.median(1 / wall[:, 1])), 1),
        "unit": "images/s",
        "ratio_median": round(median, 3),
        "ratio_min": round(float(ratios[0]), 3),
        "ratio_max": round(float(ratios[-1]), 3),
        # The same ratio in processor time: other work on the machine hardly touches it.
        "cpu_ratio": None if math.isnan(cpu_ratio) else round(cpu_ratio, 3),
        "goal": goal,
        "met": None if goal is None else median >= goal,
        "equal": equal,
    }
    verdict = "" if goal is None else f"  goal {goal:g}: {'met' if median >= goal else 'not met'}"
    print(
        f"{name:<38}{result['ours']:>9.0f}{result['theirs']:>9.0f} images/s  {median:6.2f}x "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}; {cpu_ratio:.2f} in processor time){verdict}",
        flush=True,
    )
    return result


def run_all(folder: Path, *, quick: bool, rounds: int) -> list[dict[str, Any]]:
    """All rows; the first column is ours, the second what it is compared with."""
    rows = []
    for size, number, epoch in ((256, 256, 1024), (600, 128, 384)):
        if quick:
            number, epoch = number // 8, epoch // 4
        root = folder / str(size)
        paths = [str(path) for path in make_files(root, size, number)]
        print(f"{size} px: {number} files of {_mean_size(paths) / 1000:.1f} KB", flush=True)
        repeated = [paths[n % number] for n in range(epoch)]
        view = TrainView(CROP, seed=1)
        files = ImageSet(repeated, np.zeros(epoch, dtype=np.int64))
        equal = check_files(files, view, min(16, number))
        theirs = torchvision_run(root, epoch)
        keyed = ImageSet(repeated, files.labels, [n % number for n in range(epoch)])
        cache = DecodedCache.build(keyed, folder / f"cache{size}")
        runs = {}
        for source, images in (("files", files), ("cache", keyed.with_source(cache))):
            runs[f"{source}, {size} px, bytes"] = our_run(images, view, normalize=False)
            runs[f"{source}, {size} px, floats"] = our_run(images, view)
        rows += [row(name, ours, theirs, rounds, equal) for name, ours in runs.items()]
        name = f"files, {size} px, bytes"
        decode = decode_run(repeated)
        rows.append(row(f"{name}, of decode-only", runs[name], decode, rounds, equal))
        del theirs
    small = np.stack([picture(32, n) for n in range(512)])
    small = np.concatenate([small] * (2 if quick else 16))
    labels = np.zeros(len(small), dtype=np.int64)
    view32 = SmallView(32, seed=1)
    set32 = ImageSet(None, labels, source=small)
    equal = check_small(small, view32)
    theirs32 = torchvision_small_run(small, labels)
    for name, normalize in (("array, 32 px, bytes", False), ("array, 32 px, floats", True)):
        ours32 = our_run(set32, view32, normalize=normalize)
        rows.append(row(name, ours32, theirs32, rounds, equal))
    return rows


def _mean_size(paths: list[str]) -> float:
    return statistics.mean(Path(path).stat().st_size for path in paths)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 whether goals are met or not, for the machine decides that, too."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 7; quick 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    options = parser.parse_args(argv)
    rounds = options.rounds or (2 if options.quick else 7)
    torch.set_num_threads(WORKERS)
    cv2.setNumThreads(1)  # the loader's threads are the parallelism, as in the other's processes
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        rows = run_all(Path(folder), quick=options.quick, rounds=rounds)
    if options.json:
        write_benchmark(options.json, topic="loader", rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
