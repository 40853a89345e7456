"""torch and Paddle against NumPy float64, each in a process of its own, through files only.

The two may live in one environment or in two: SMALLVISION_TORCH_PYTHON and
SMALLVISION_PADDLE_PYTHON name the interpreters; this one is taken where they are not set.
"""

import ast
import functools
import glob
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared_core.checkpoints import names

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
SHARED = REPO / "shared"
FRAMEWORKS = ("torch", "paddle")
pytestmark = pytest.mark.parity


def load_reference():
    spec = importlib.util.spec_from_file_location("parity_reference", HERE / "parity_reference.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


REFERENCE = load_reference()
CASES = REFERENCE.cases()


# -- which functions are shared ------------------------------------------------------------------

# Shared names that compute no numbers from tensors, and the file that tests each side.
ELSEWHERE = {
    "checkpoints": "test_for_{}_*.py",
    "distributed": "test_for_{}_distributed.py",
    "precision": {
        "torch": "test_for_torch_precision.py",
        "paddle": "test_for_paddle_rest.py",
    },
    "seeds": {"torch": "test_for_torch_resume.py", "paddle": "test_for_paddle_checkpoints.py"},
    "export": {"torch": "test_for_torch_export.py", "paddle": "test_for_paddle_rest.py"},
    "data": {"torch": "test_*torch_data.py", "paddle": "test_for_paddle_rest.py"},
    "accuracy": "test_for_{}_*.py",
    "ema": "test_for_{}_*.py",
    "features": "test_for_{}_*.py",
    "networks": "test_for_{}_*.py",
    "pretrained": "test_for_{}_*.py",
    "efficientnet_lite": "../parity/test_efficientnet_lite.py",
}
NUMERIC_MODULES = ("losses", "mixing")  # everything in these needs a case
NUMERIC_NAMES = ("data.Normalizer",)


def public(framework: str) -> dict[str, ast.AST]:
    """``module.name`` of every public function and class that the adapter defines."""
    found = {}
    for path in sorted((SHARED / "shared_core" / f"for_{framework}").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                found[f"{path.stem}.{node.name}"] = node
    return found


def test_the_two_sides_of_numeric_modules_have_the_same_functions_and_arguments():
    torch, paddle = public("torch"), public("paddle")
    for module in NUMERIC_MODULES:
        mine = {n: v for n, v in torch.items() if n.startswith(f"{module}.")}
        theirs = {n: v for n, v in paddle.items() if n.startswith(f"{module}.")}
        assert sorted(mine) == sorted(theirs)
        assert mine
        for name in mine:
            assert ast.unparse(mine[name].args) == ast.unparse(theirs[name].args), name


def untested(shared: list[str]) -> list[str]:
    """Those shared names that have neither a parity case nor a test of their own on each side."""
    cases = {case.function for case in CASES.values()}
    found = []
    for name in shared:
        module, _, leaf = name.partition(".")
        if module in NUMERIC_MODULES or name in NUMERIC_NAMES or module not in ELSEWHERE:
            found += [name] if name not in cases else []
            continue
        where = ELSEWHERE[module]
        for framework in FRAMEWORKS:
            pattern = where[framework] if isinstance(where, dict) else where.format(framework)
            texts = [
                Path(p).read_text("utf-8") for p in glob.glob(f"{REPO}/tests/shared/{pattern}")
            ]
            if not any(leaf in text for text in texts):
                found.append(f"{name} ({pattern})")
    return found


def test_every_shared_name_has_a_parity_case_or_tests_of_its_own():
    shared = sorted(set(public("torch")) & set(public("paddle")))
    assert untested(shared) == []
    new = ["losses.brand_new", "mixing.brand_new", "brand_new.function"]
    assert untested([*shared, *new]) == new
    assert {case.function for case in CASES.values()} <= set(shared)


# -- running the two sides -----------------------------------------------------------------------


@functools.cache
def interpreter(framework: str) -> str | None:
    """The Python that has the framework (and what the worker needs beside it), or None."""
    python = os.environ.get(f"SMALLVISION_{framework.upper()}_PYTHON", sys.executable)
    code = (
        "import importlib.util as u, sys; "
        f"sys.exit(any(u.find_spec(m) is None for m in ({framework!r}, 'safetensors', 'cv2')))"
    )
    return python if subprocess.run([python, "-c", code], check=False).returncode == 0 else None


def need(*frameworks: str) -> None:
    for framework in frameworks:
        if interpreter(framework) is None:
            pytest.skip(f"{framework} is not installed; set SMALLVISION_{framework.upper()}_PYTHON")


def run(framework: str, task: str, folder: Path, job: dict, arrays: dict) -> dict:
    """One call of the worker."""
    stem = folder / f"{framework}-{task}"
    paths = [stem.with_suffix(s) for s in (".json", ".in.npz", ".out.npz")]
    paths[0].write_text(json.dumps(job))
    np.savez(paths[1], **arrays)
    done = subprocess.run(
        [interpreter(framework), str(HERE / "parity_worker.py"), framework, task, *map(str, paths)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SHARED)},
    )
    assert done.returncode == 0, done.stderr
    return dict(np.load(paths[2]))


def job_and_arrays() -> tuple[dict, dict]:
    job, arrays = {}, {}
    for name, case in CASES.items():
        keys = [f"{name}/{i}" for i in range(len(case.args))]
        arrays |= dict(zip(keys, case.args, strict=True))
        tensors = {k: v for k, v in case.kwargs.items() if isinstance(v, np.ndarray)}
        arrays |= {f"{name}/{k}": v for k, v in tensors.items()}
        value = np.asarray(case.truth(*case.args, **case.kwargs))
        arrays[f"{name}/weights"] = REFERENCE.weights_like(value)
        job[name] = {
            "function": case.function,
            "args": keys,
            "kwargs": {k: v for k, v in case.kwargs.items() if k not in tensors},
            "tensors": {k: f"{name}/{k}" for k in tensors},
            "grad": case.differentiable,
            "weights": f"{name}/weights",
            "construct": case.construct,
        }
    return job, arrays


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each framework that is there computed, from one process of each."""
    folder = tmp_path_factory.mktemp("parity")
    job, arrays = job_and_arrays()
    return {
        framework: run(framework, "functions", folder, job, arrays)
        for framework in FRAMEWORKS
        if interpreter(framework)
    }


def assert_close(got, wanted, tolerance):
    """Relative to the largest value: gradients hold numbers that are nearly 0."""
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_numpys(results, name, framework):
    need(framework)
    value, gradient = REFERENCE.reference(CASES[name])
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-8)):
        if CASES[name].args[0].dtype.kind != "f":
            tolerance = 1e-5  # these give float32 whatever comes in
        got = results[framework]
        assert_close(got[f"{name}/{dtype}/value"], value, tolerance)
        if gradient is not None:
            assert_close(got[f"{name}/{dtype}/gradient"], gradient, tolerance)


# -- the same weights ----------------------------------------------------------------------------


def only(arrays: dict, prefix: str) -> dict:
    return {k[len(prefix) :]: v for k, v in arrays.items() if k.startswith(prefix)}


IMAGES = np.random.default_rng(1).normal(size=(2, 3, 64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def torch_zoo(tmp_path_factory):
    """Weights and eval logits of a zoo model of torchvision, computed once."""

    @functools.cache
    def compute(model: str) -> dict:
        need("torch", "paddle")
        find = "import importlib.util as u, sys; sys.exit(u.find_spec('torchvision') is None)"
        if subprocess.run([interpreter("torch"), "-c", find], check=False).returncode:
            pytest.skip("torchvision is not installed beside torch")
        folder = tmp_path_factory.mktemp(model)
        return run("torch", "model", folder, {"model": model}, {"images": IMAGES})

    return compute


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "mobilenet_v2"])
def test_the_same_weights_give_the_same_logits(tmp_path, torch_zoo, model):
    """torch's weights in Paddle's model: eval logits to 1e-5 relative; there and back exactly."""
    torch = torch_zoo(model)
    weights = only(torch, "w/")
    linear = names.linear_names(weights)
    assert len(linear) == 1
    converted = names.to_paddle(weights, linear)
    arrays = {f"w/{k}": v for k, v in converted.items()} | {"images": IMAGES}
    paddle = run("paddle", "model", tmp_path, {"model": model}, arrays)
    assert np.abs(torch["logits"]).max() > 1e-3
    assert_close(paddle["logits"], torch["logits"], 1e-5)
    assert np.array_equal(paddle["logits"].argmax(1), torch["logits"].argmax(1))
    back = names.to_torch(only(paddle, "w/"), linear, tracked=names.counters(weights))
    assert sorted(back) == sorted(weights)
    for name, array in weights.items():
        assert back[name].tobytes() == array.tobytes(), name
        assert back[name].dtype == array.dtype


@pytest.mark.slow
def test_one_training_step_in_float64(tmp_path, torch_zoo):
    """Loss 1e-9 and gradients 1e-6 relative; the running variances differ by n / (n - 1)."""
    rng = np.random.default_rng(2)
    batch = {
        "images": rng.normal(size=(4, 3, 32, 32)).astype(np.float32),
        "labels": rng.integers(10, size=4),
        "teacher": rng.normal(size=(4, 10)),
    }
    job = {"model": "resnet18"}
    weights = only(torch_zoo("resnet18"), "w/")
    linear = names.linear_names(weights)
    there = {f"w/{k}": v for k, v in names.to_paddle(weights, linear).items()}
    torch = run("torch", "step", tmp_path, job, batch | {f"w/{k}": v for k, v in weights.items()})
    paddle = run("paddle", "step", tmp_path, job, batch | there)
    assert paddle["loss"] == pytest.approx(torch["loss"], rel=1e-9)
    gradients = names.to_torch(only(paddle, "g/"), linear)
    assert sorted(gradients) == sorted(only(torch, "g/"))
    for name, gradient in only(torch, "g/").items():
        assert_close(gradients[name], gradient, 1e-6)

    # Paddle's parameters() counts the statistics; the trainable ones are torch's
    assert torch["trainable"] == torch["parameters"] == paddle["trainable"] == 11_181_642
    assert paddle["parameters"] == 11_191_242

    # the first batch norm sees 4 x 16 x 16 values per channel, the last ones 4 x 1 x 1
    for layer, count in (("bn1", 4 * 16 * 16), ("layer4.1.bn2", 4)):
        start = weights[f"{layer}.running_var"].astype(np.float64)
        ours, theirs = torch[f"s/{layer}.running_var"], paddle[f"s/{layer}._variance"]
        unbiased = (ours - 0.9 * start) / 0.1  # both keep 0.9 of the old value
        biased = (theirs - 0.9 * start) / 0.1
        assert_close(names.unbiased_variance(biased, count=count), unbiased, 1e-5)
        # Paddle keeps the statistics of a float64 model to float32's precision: the median
        assert np.median(biased / unbiased) == pytest.approx((count - 1) / count, rel=1e-4)
        mean = paddle[f"s/{layer}._mean"]
        assert_close(mean, torch[f"s/{layer}.running_mean"], 1e-6)
