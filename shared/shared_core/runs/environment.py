"""Environment facts: what a number was measured with."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

PACKAGES = (
    "numpy", "scipy", "opencv-python", "simplejpeg", "pillow", "safetensors", "torch", "torchvision",
    "timm", "paddlepaddle", "onnx", "onnxruntime", "openvino", "mlflow", "scikit-learn",
    "shared-core",
)  # fmt: skip


def _cpu() -> tuple[str, list[str]]:
    """The processor's model and those of its features that decide low-precision speed."""
    model, features = platform.processor() or platform.machine(), []
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                wanted = (
                    *("avx2", "avx512f", "avx512_vnni", "avx_vnni"),
                    *("avx512_bf16", "amx_bf16", "amx_int8"),
                )
                features = [flag for flag in wanted if flag in value.split()]
                break
    return model, features


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpu() -> str | None:
    """The GPU's name if a framework that is already loaded sees one; loads none itself."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    paddle = sys.modules.get("paddle")
    if paddle is not None and paddle.device.is_compiled_with_cuda():
        count = paddle.device.cuda.device_count()
        return str(paddle.device.cuda.get_device_name()) if count else None
    return None


def _commit() -> str | None:
    """The commit of the checkout this file lies in, ``+changes`` when it was edited."""
    import subprocess

    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD")[:12] + ("+changes" if changed else "") if tracked else None
    except (OSError, subprocess.SubprocessError):
        return None


def environment() -> dict[str, Any]:
    """Python, platform, processor, memory, GPU, package versions and commit; plain JSON.

    Names no user, host or path.
    """
    from importlib import metadata  # here, for --help must not wait for it

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    model, features = _cpu()
    torch = sys.modules.get("torch")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": model,
        "cpu_features": features,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "memory_gib": _memory_gib(),
        "gpu": _gpu(),
        "packages": versions,
        "commit": _commit(),
    }
