"""Say what this machine has for smallvision and what does not fit. ``make doctor`` runs it."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import sys
import warnings
from importlib import metadata
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(REPO / "packages"), str(REPO / "shared")]


def version(package: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_torch() -> list[tuple[bool, str]]:
    """torch, its GPU, and whether torchvision is of the same build."""
    if version("torch") is None:
        return [(True, "torch: not installed (visiondistill_gc needs none)")]
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    rows = [(True, f"torch {torch.__version__}: {gpu}, {torch.get_num_threads()} threads")]
    if version("torchvision") is None:
        rows.append((True, "torchvision: not installed"))
        return rows
    try:
        import torchvision
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        rows.append((True, f"torchvision {torchvision.__version__}: fits torch"))
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        first = " ".join(str(error).split())[:120]
        rows.append(
            (False, f"torchvision {version('torchvision')} does not fit torch: {first}; "
                    "install the pair of one build (README, 'Choosing a torch build')")
        )  # fmt: skip
    return rows


def check_paddle() -> list[tuple[bool, str]]:
    """paddle and whether it sees a GPU."""
    if version("paddlepaddle") is None and version("paddlepaddle-gpu") is None:
        return [(True, "paddle: not installed (only visiondistill_gc needs it)")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import paddle
        except (ImportError, OSError) as error:
            return [(False, f"paddle does not import: {' '.join(str(error).split())[:120]}")]
    gpus = paddle.device.cuda.device_count() if paddle.device.is_compiled_with_cuda() else 0
    return [(True, f"paddle {paddle.__version__}: {gpus or 'no'} GPU")]


def check_data(data_root: Path) -> list[tuple[bool, str]]:
    """Which known data sets lie under the data folder."""
    from shared_core import datasets

    found = []
    for name in datasets.names():
        folder = datasets.find(data_root, datasets.get(name))
        if folder is not None:
            found.append(f"{name} ({folder.name})")
    place = f"data folder {data_root}"
    if not data_root.is_dir():
        return [(True, f"{place}: not there; targets rehearse on built-in data")]
    return [(True, f"{place}: {', '.join(found) or 'no known data set'}")]


def main(argv: list[str] | None = None) -> int:
    """Print one line a fact; exit code 1 when something does not fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    args = parser.parse_args(argv)

    fits = (3, 10) <= sys.version_info[:2] <= (3, 13)
    rows = [
        (fits, f"Python {platform.python_version()}" + ("" if fits else ": expected 3.10-3.13"))
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    rows.append((True, f"{os.cpu_count()} cores, {memory:.0f} GiB of memory"))
    rows += check_torch()
    rows += check_paddle()
    for package in ("numpy", "opencv-python", "scikit-learn", "mlflow", "onnxruntime"):
        rows.append((True, f"{package} {version(package) or 'not installed'}"))
    free = shutil.disk_usage(REPO).free / 2**30
    rows.append((free > 10, f"{free:.0f} GiB of disk free (the environment takes 8)"))
    rows += check_data(args.data_root)
    for good, text in rows:
        print(f"{'ok  ' if good else 'BAD '} {text}")
    return 0 if all(good for good, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
