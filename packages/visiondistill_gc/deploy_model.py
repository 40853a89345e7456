"""A finished model, ready to be asked: a ``.pdparams`` file, or a folder that ``export.py`` wrote.

A folder can hold the network for ONNX Runtime (fp32 and int8) and for Paddle Inference; only what
is asked for is loaded, so that a service on ONNX Runtime needs no Paddle in memory.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared_core import metrics
from shared_core.runs import UsageError
from visiondistill_gc.utils.transforms import eval_view

DESCRIPTION_FILE = "model.json"
FORMAT = "visiondistill_gc.model/1"
# By runtime: what to look for in an exported folder, in the order of "auto".
FILES = {
    "onnx": ("student.onnx",),
    "paddle": ("student.json", "student.pdiparams"),
    "onnx-int8": ("student-int8.onnx",),
}
RUNTIMES = tuple(FILES)

Network = Callable[[NDArray[np.float32]], NDArray[np.float32]]  # (N, 3, H, W) to logits (N, K)


@dataclass(frozen=True)
class Description:
    """What has to be known beside the weights; plain JSON on disk."""

    class_names: tuple[str, ...]  # in the order of the logits
    input_size: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...]  # of RGB in [0, 1]
    std: tuple[float, ...]

    @classmethod
    def of(cls, model: Any) -> Description:
        """Of a :class:`visiondistill_gc.utils.model_files.LoadedModel`."""
        size = (model.input_size, model.input_size)
        return cls(tuple(model.class_names), size, tuple(model.mean), tuple(model.std))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON that :meth:`from_dict` reads, with the view that made the pixels."""
        values = json.loads(json.dumps(asdict(self)))
        return {**values, "view": eval_view(self.input_size[0]).settings()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Description:
        """What :meth:`as_dict` wrote; other entries are passed over.

        Raises:
            ValueError, KeyError, TypeError: an entry is missing or makes no sense.
        """
        names = tuple(str(name) for name in values["class_names"])
        height, width = (int(side) for side in values["input_size"])
        mean, std = (tuple(float(v) for v in values[name]) for name in ("mean", "std"))
        if len(names) < 2 or height != width or height < 1 or len(mean) != 3 or len(std) != 3:
            raise ValueError("classes, sizes or normalisation make no sense")
        found = cls(names, (height, width), mean, std)
        if values["view"] != found.as_dict()["view"]:
            raise ValueError("it wants a view of images that this version does not make")
        return found

    def normalise(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """uint8 ``(N, H, W, 3)`` to float32 ``(N, 3, H, W)``, as the core's ``Normalizer``."""
        spread = np.asarray(self.std, np.float64)
        scale = (1 / (255 * spread)).astype(np.float32)
        shift = (-np.asarray(self.mean) / spread).astype(np.float32)
        return np.ascontiguousarray((images * scale + shift).transpose(0, 3, 1, 2))


class Classifier:
    """A network with its description: uint8 views in, probabilities out.

    Args:
        name: what to call it in messages, usually its path.
        runtime: ``dygraph``, ``onnx``, ``onnx-int8`` or ``paddle``.
    """

    def __init__(
        self, network: Network, description: Description, *, name: str, runtime: str
    ) -> None:
        self.network, self.description = network, description
        self.name, self.runtime = name, runtime

    @property
    def view(self) -> Any:
        """The view that evaluation takes of an image."""
        return eval_view(self.description.input_size[0])

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """``(N, K)`` of uint8 views ``(N, H, W, 3)``."""
        return self.network(self.description.normalise(images))

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """``(N, K)``, each row sums to 1, of uint8 views ``(N, H, W, 3)``."""
        return metrics.softmax(self.logits(images))


def top_classes(
    probabilities: NDArray[np.floating], class_names: Sequence[str], count: int
) -> list[dict[str, Any]]:
    """The ``count`` most probable classes of one row ``(K,)``, best first, ties by number."""
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [{"class": class_names[k], "probability": float(probabilities[k])} for k in best]


def import_paddle() -> Any:
    """Paddle, without its warning that a compiler cache is missing, which nothing here needs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No ccache found")
        import paddle
    return paddle


# -- networks -------------------------------------------------------------------------------------


def dygraph_network(net: Any) -> Network:
    """A Paddle layer in eval mode."""
    paddle = import_paddle()

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with paddle.no_grad():
            return net(paddle.to_tensor(images)).astype("float32").numpy()

    return run


def onnx_network(path: Path, *, threads: int = 1, gpu: bool = False) -> Network:
    """An ONNX file in ONNX Runtime."""
    import onnxruntime

    providers = ["CUDAExecutionProvider"] if gpu else []
    if gpu and providers[0] not in onnxruntime.get_available_providers():
        raise UsageError("use_gpu: this ONNX Runtime has no CUDA, expected onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=[*providers, "CPUExecutionProvider"]
        )
    except Exception as error:  # its own exceptions derive from no common class
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: ONNX Runtime cannot load it: {line}") from error
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def paddle_network(
    program: Path, weights: Path, *, threads: int = 1, gpu: bool = False, onednn: bool = True
) -> Network:
    """Files of ``paddle.jit.save`` in Paddle Inference, on a CPU with oneDNN's kernels.

    Args:
        program: ``*.json``.
        weights: ``*.pdiparams``.
    """
    inference = import_paddle().inference
    config = inference.Config(str(program), str(weights))
    config.disable_glog_info()
    if gpu:
        check_gpu()
        config.enable_use_gpu(256, 0)
    else:
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(threads)
        # MKL-DNN is oneDNN's former name. Without a limit, every new batch size adds to its cache.
        if onednn:
            config.enable_mkldnn()
            config.set_mkldnn_cache_capacity(16)
        else:
            config.disable_mkldnn()
    predictor = inference.create_predictor(config)
    taken = predictor.get_input_handle(predictor.get_input_names()[0])
    given = predictor.get_output_handle(predictor.get_output_names()[0])

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        taken.reshape(list(images.shape))
        taken.copy_from_cpu(np.ascontiguousarray(images))
        predictor.run()
        return given.copy_to_cpu()

    return run


def check_gpu() -> None:
    """Refuse ``--use_gpu`` where Paddle has none.

    Raises:
        UsageError: a CPU build, or no device.
    """
    paddle = import_paddle()
    if not paddle.device.is_compiled_with_cuda():
        raise UsageError("use_gpu: this Paddle is built for CPUs, expected paddlepaddle-gpu")
    if not paddle.device.cuda.device_count():
        raise UsageError("use_gpu: Paddle finds no GPU, expected at least one")


# -- loading --------------------------------------------------------------------------------------


def load_classifier(
    path: str | Path,
    *,
    categories: Sequence[str] | None = None,
    runtime: str = "auto",
    use_gpu: bool = False,
    threads: int = 1,
) -> Classifier:
    """A model file or an exported folder.

    Args:
        categories: the classes that the caller believes it has, in order; None takes the model's.
        runtime: for a folder ``onnx``, ``onnx-int8`` or ``paddle``; ``auto`` takes the first of
            ``onnx`` and ``paddle`` that is there and whose package is installed.
        threads: of an exported network on a CPU.

    Raises:
        FileNotFoundError: nothing is there, or not for this runtime.
        ValueError: damaged, or other categories than the model's.
        UsageError: a runtime for a model file, or a GPU that is not there.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path, categories, runtime, use_gpu, threads)
    if runtime != "auto":
        raise UsageError(
            f"runtime {runtime}: {path} is a model file that Paddle runs as it is; expected a "
            "folder that export.py wrote"
        )
    paddle = import_paddle()
    from visiondistill_gc.utils.model_files import load_model

    if use_gpu:
        check_gpu()
    paddle.set_device("gpu" if use_gpu else "cpu")
    model = load_model(path, categories=categories)
    network = dygraph_network(model.net)
    return Classifier(network, Description.of(model), name=str(path), runtime="dygraph")


def read_description(folder: Path) -> tuple[Description, dict[str, Any]]:
    """Of an exported folder: the description, and everything that ``model.json`` says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it describes no model of this project.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {DESCRIPTION_FILE}: expected a folder that export.py wrote, or a "
            ".pdparams file"
        )
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']!r}, expected {FORMAT!r}")
        return Description.from_dict(facts), facts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} describes no model: {error}") from None


def _load_folder(
    folder: Path, categories: Sequence[str] | None, runtime: str, use_gpu: bool, threads: int
) -> Classifier:
    from importlib.util import find_spec

    description, _ = read_description(folder)
    names = description.class_names
    if categories is not None and tuple(categories) != names:
        raise ValueError(
            f"categories are {' '.join(categories)}, expected those of {folder}: "
            f"{' '.join(names)}; leave them out to take the model's own"
        )
    present = [r for r, files in FILES.items() if all((folder / f).is_file() for f in files)]
    if runtime == "auto":
        usable = [r for r in present if r == "paddle" or find_spec("onnxruntime")]
        if not usable:
            raise FileNotFoundError(f"{folder} holds no network that can run here, found {present}")
        runtime = usable[0]
    if runtime not in FILES:
        raise UsageError(f"runtime is {runtime!r}, expected auto or one of {', '.join(FILES)}")
    if runtime not in present:
        raise FileNotFoundError(
            f"{folder} holds no network for {runtime}, expected {' and '.join(FILES[runtime])} in "
            f"it; found: {', '.join(present) or 'none'}"
        )
    files = [folder / name for name in FILES[runtime]]
    if runtime == "paddle":
        network = paddle_network(*files, threads=threads, gpu=use_gpu)
    else:
        network = onnx_network(*files, threads=threads, gpu=use_gpu)
    return Classifier(network, description, name=str(folder), runtime=runtime)
