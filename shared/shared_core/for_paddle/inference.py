"""Paddle Inference: what ``paddle.jit.save`` wrote, run without layers; oneDNN on a CPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_core.runs import UsageError

Network = Callable[[NDArray[Any]], NDArray[np.float32]]  # a batch of images to (N, K)


def import_paddle() -> Any:
    """Paddle, without its warning that a compiler cache is missing, which nothing here needs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No ccache found")
        import paddle
    return paddle


def check_gpu() -> None:
    """Refuse a GPU where Paddle has none.

    Raises:
        UsageError: a CPU build, or no device.
    """
    paddle = import_paddle()
    if not paddle.device.is_compiled_with_cuda():
        raise UsageError("use_gpu: this Paddle is built for CPUs, expected paddlepaddle-gpu")
    if not paddle.device.cuda.device_count():
        raise UsageError("use_gpu: Paddle finds no GPU, expected at least one")


def paddle_inference(prefix: str | Path, *, threads: int = 1, gpu: bool = False) -> Network:
    """The network of ``prefix.json`` and ``prefix.pdiparams``.

    Raises:
        UsageError: ``gpu`` where there is none.
        ValueError: damaged, or not there.
    """
    inference = import_paddle().inference
    config = inference.Config(f"{prefix}.json", f"{prefix}.pdiparams")
    config.disable_glog_info()
    if gpu:
        check_gpu()
        config.enable_use_gpu(256, 0)
    else:
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(threads)
        # MKL-DNN is oneDNN's former name. Without a limit, every new batch size adds to its cache.
        config.enable_mkldnn()
        config.set_mkldnn_cache_capacity(16)
    try:
        predictor = inference.create_predictor(config)
    except Exception as error:  # C++ errors of several kinds
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{prefix}.pdiparams: Paddle Inference cannot open it: {reason}") from None
    taken = predictor.get_input_handle(predictor.get_input_names()[0])
    given = predictor.get_output_handle(predictor.get_output_names()[0])

    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        taken.reshape(list(images.shape))
        taken.copy_from_cpu(np.ascontiguousarray(images))
        predictor.run()
        return np.asarray(given.copy_to_cpu(), np.float32)

    return run
