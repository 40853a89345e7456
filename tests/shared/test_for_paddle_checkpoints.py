"""Paddle checkpoints: what was saved comes back, nothing else gets in, a run goes on exactly."""

import importlib.util
import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared_core import checkpoints as core
from shared_core.checkpoints import CheckpointError, neutral, pickle_arrays

paddle = pytest.importorskip("paddle")
from paddle import nn  # noqa: E402

from shared_core.for_paddle import checkpoints, seeds  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"


def facts(**more):
    return core.make_facts(
        **{
            "project": "visiondistill_gc",
            "architecture": "small",
            "class_names": ["a", "b"],
            "framework": "paddle",
            **more,
        }
    )


def small(classes=2):
    return nn.Sequential(nn.Conv2D(3, 4, 3), nn.BatchNorm2D(4), nn.Flatten(), nn.Linear(4, classes))


def arrays(model):
    return {k: v.numpy() for k, v in model.state_dict().items()}


def equal(a, b):
    return sorted(a) == sorted(b) and all(np.array_equal(np.array(a[k]), np.array(b[k])) for k in a)


@pytest.mark.parametrize("name", ["a.pdparams", "a.safetensors"])
def test_there_and_back_bit_for_bit(tmp_path, name):
    path, model = tmp_path / name, small()
    model(paddle.rand([3, 3, 3, 3]))  # moves the running statistics
    written = checkpoints.save_checkpoint(path, model.state_dict(), facts(epoch=2))
    weights, read = checkpoints.load_checkpoint(
        path, project="visiondistill_gc", architecture="small"
    )
    assert equal(weights, arrays(model))
    assert read == written
    assert read["sha256"] == core.weights_sha256(arrays(model))
    other = small()
    assert not equal(arrays(other), arrays(model))
    checkpoints.load_into(other, path)
    assert equal(arrays(other), arrays(model))
    without_paddle = pickle_arrays.read if name.endswith("pdparams") else neutral.read
    assert equal(without_paddle(path)[0], arrays(model))


def test_numpy_there_and_back_shares_no_memory():
    weights = {"w": paddle.arange(3, dtype="float32"), "n": paddle.to_tensor(4)}
    saved = checkpoints.to_numpy(weights)
    back = checkpoints.from_numpy(saved)
    assert equal(back, saved)
    assert [back[k].dtype for k in back] == [weights[k].dtype for k in weights]
    back["w"][0] = 9
    assert saved["w"][0] == 0


def test_the_file_opens_with_paddle_alone(tmp_path):
    path, model, other = tmp_path / "a.pdparams", small(), small()
    checkpoints.save_checkpoint(path, model.state_dict(), facts())
    missing, unexpected = other.set_state_dict(paddle.load(str(path))["model"])
    assert not missing
    assert not unexpected
    assert equal(arrays(other), arrays(model))


def test_floating_weights_take_the_models_precision_and_whole_numbers_are_refused():
    model = nn.Linear(3, 2)
    half = {"weight": np.full((3, 2), 0.5, np.float16), "bias": np.zeros(2, np.float64)}
    checkpoints.fit_into(model, half, path="half.npz")
    assert model.weight.dtype == paddle.float32 and (model.weight.numpy() == 0.5).all()
    whole = {"weight": np.ones((3, 2), np.int64), "bias": np.ones(2, np.float32)}
    with pytest.raises(CheckpointError, match="whole.npz: weight weight is .*int64, expected"):
        checkpoints.fit_into(model, whole, path="whole.npz")
    assert (model.weight.numpy() == 0.5).all() and (model.bias.numpy() == 0).all()


def test_every_weight_must_fit(tmp_path):
    """Paddle itself only warns: the first assertion is what this module protects from."""
    path, model = tmp_path / "a.pdparams", small()
    checkpoints.save_checkpoint(path, small(classes=3).state_dict(), facts())
    before = arrays(model)
    with pytest.raises(CheckpointError) as error:
        checkpoints.load_into(model, path)
    assert str(error.value) == (
        f"{path}: weights do not fit the model: 2 misshaped "
        "(3.weight (4, 3) instead of (4, 2), 3.bias (3,) instead of (2,))"
    )
    with pytest.raises(CheckpointError, match=r"2 missing \(4.weight, 4.bias\)"):
        checkpoints.load_into(nn.Sequential(*small(3), nn.Linear(3, 3)), path)
    assert equal(arrays(model), before)
    with pytest.raises(CheckpointError, match="^a list: weights do not fit the model: 7 missing"):
        checkpoints.fit_into(model, {"3.weight": paddle.zeros([4, 2])}, path="a list")
    with pytest.warns(UserWarning):
        model.set_state_dict(checkpoints.load_checkpoint(path)[0])


class Runs:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize(
    "read",
    [
        checkpoints.load_checkpoint,
        checkpoints.load_foreign_weights,
        lambda path: checkpoints.load_run_state(path, {}),
    ],
)
def test_a_file_that_would_run_a_command_runs_nothing(tmp_path, read):
    path, witness = tmp_path / "a.pdparams", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"w": np.zeros(2), "x": Runs(witness)}))
    with pytest.raises(CheckpointError, match="refused, it holds .*system") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert not witness.exists()


def test_bad_files(tmp_path):
    path = tmp_path / "a.pdparams"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoints.load_checkpoint(path)
    checkpoints.save_checkpoint(path, small().state_dict(), facts())
    with pytest.raises(CheckpointError, match="project is 'visiondistill_gc', expected 'mpkd'"):
        checkpoints.load_checkpoint(path, project="mpkd")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="no readable pickle"):
        checkpoints.load_checkpoint(path)
    pickle_arrays.write(path, {"w": np.zeros(1)}, facts(framework="torch"))
    with pytest.raises(CheckpointError, match="carry torch's names; convert it"):
        checkpoints.load_checkpoint(path)
    with pytest.raises(CheckpointError, match="w is bfloat16"):
        checkpoints.save_checkpoint(path, {"w": paddle.ones([2]).astype("bfloat16")}, facts())


def test_foreign_weights(tmp_path):
    model, path = small(), str(tmp_path / "a.pdparams")
    for content in (model.state_dict(), {"model": model.state_dict(), "epoch": 3}):
        paddle.save(content, path)
        assert equal(checkpoints.load_foreign_weights(path), arrays(model))
    checkpoints.save_checkpoint(tmp_path / "a.safetensors", model.state_dict(), facts())
    assert equal(checkpoints.load_foreign_weights(tmp_path / "a.safetensors"), arrays(model))
    paddle.save({}, path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        checkpoints.load_foreign_weights(path)


def test_every_length_of_a_safetensors_header_is_read(tmp_path):
    """The first byte is the length's lowest: 0x80, a pickle's first, is as good as any other."""
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    entry = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    header = json.dumps(entry).encode()
    for length in range(512, 768):
        path = tmp_path / f"{length}.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + values.tobytes())
        assert equal(checkpoints.load_foreign_weights(path), {"w": values}), length


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_is_taken_for_safetensors(tmp_path, protocol):
    for count in (1, 123, 300, 70_000):  # lengths of names and frames stand near the ninth byte
        weights = {"w" * (count % 500): np.arange(count, dtype=np.float32)}
        (tmp_path / "a.pdparams").write_bytes(pickle.dumps(weights, protocol=protocol))
        assert equal(checkpoints.load_foreign_weights(tmp_path / "a.pdparams"), weights)


RUN = """
import random, sys
import numpy as np
import paddle
from paddle import nn
from shared_core.for_paddle import checkpoints, seeds
from shared_core.for_paddle.precision import Precision


def build(kind):
    seeds.seed_all(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1D(16), nn.GELU(), nn.Dropout(0.3),
                          nn.Linear(16, 3))
    schedule = paddle.optimizer.lr.CosineAnnealingDecay(0.05, 20)
    make = paddle.optimizer.AdamW if kind == "adamw" else paddle.optimizer.Momentum
    return {"student": model, "precision": Precision("cpu"),
            "optimizer": make(learning_rate=schedule, parameters=model.parameters())}


def train(parts, start, stop, save_at=None, path=None):
    images = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")
    labels = paddle.to_tensor(np.arange(40) % 3)
    for step in range(start, stop):
        if step == save_at:
            checkpoints.save_run_state(path, parts, counters={"step": step})
        batch = np.random.permutation(40)[:8]
        noise = 0.1 * paddle.randn([8, 6]) + 0.1 * random.random()
        logits = parts["student"](paddle.to_tensor(images[batch]) + noise)
        loss = nn.functional.cross_entropy(logits, paddle.gather(labels, paddle.to_tensor(batch)))
        parts["precision"].backward_step(loss, parts["optimizer"], clip=1.0)
        parts["optimizer"]._learning_rate.step()
    end = {k: v.numpy() for k, v in parts["student"].state_dict().items()}
    end["rest"] = np.array([random.random(), np.random.rand(), paddle.rand([1]).item(),
                            parts["optimizer"].get_lr()])
    return end


if __name__ == "__main__":
    for job in sys.argv[1:]:
        state, out, kind = job.split(",")
        parts = build(kind)
        random.seed(99); paddle.seed(99); np.random.seed(99)  # all of it must be put back
        counters = checkpoints.load_run_state(state, parts)
        np.savez(out, **train(parts, counters["step"], 13))
"""


@pytest.fixture
def rng_kept():
    state = seeds.capture_rng()
    yield
    seeds.restore_rng(state)


def test_resume_in_a_new_process_is_bit_identical(tmp_path, rng_kept):
    """Like fold 2 of k-fold: the saved model is the second of its process, with other names."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    spec = importlib.util.spec_from_file_location("paddle_resume_run", script)
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    whole, jobs = {}, []
    for kind in ("adamw", "momentum"):
        run.train(run.build(kind), 0, 2)  # fold 1
        parts = run.build(kind)
        state, out = tmp_path / f"{kind}.state", tmp_path / f"{kind}.npz"
        whole[out] = run.train(parts, 0, 13, save_at=6, path=state)
        jobs.append(f"{state},{out},{kind}")
    done = subprocess.run(
        [sys.executable, str(script), *jobs],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SHARED)},
    )
    assert done.returncode == 0, done.stderr
    for out, never_stopped in whole.items():
        resumed = np.load(out)
        assert sorted(resumed) == sorted(never_stopped)
        for name, value in never_stopped.items():
            assert np.array_equal(resumed[name], value), (out, name)


def parts_of(model, rate=0.1):
    optimizer = paddle.optimizer.Adam(learning_rate=rate, parameters=model.parameters())
    return {"model": model, "optimizer": optimizer}


def step(parts, inputs):
    parts["model"](inputs).square().mean().backward()
    parts["optimizer"].step()
    parts["optimizer"].clear_grad()


def test_going_back_in_the_same_process(tmp_path):
    """Into the very optimizer that has moved on, and into a fresh one: both repeat the steps."""
    parts, inputs = parts_of(nn.Linear(3, 2)), paddle.rand([4, 3])
    step(parts, inputs)
    checkpoints.save_run_state(tmp_path / "s", parts, counters={})
    parts["optimizer"].set_lr(0.5)
    step(parts, inputs)
    parts["optimizer"].set_lr(0.1)
    checkpoints.load_run_state(tmp_path / "s", parts)
    step(parts, inputs)
    fresh = parts_of(nn.Linear(3, 2), rate=0.7)  # the stored rate counts
    checkpoints.load_run_state(tmp_path / "s", fresh)
    step(fresh, inputs)
    assert equal(arrays(fresh["model"]), arrays(parts["model"]))
    same_model = {"model": fresh["model"], **parts_of(fresh["model"])}  # names counted up to _1
    checkpoints.load_run_state(tmp_path / "s", same_model)
    step(same_model, inputs)
    assert equal(arrays(same_model["model"]), arrays(parts["model"]))


def test_run_state_errors(tmp_path):
    path, parts = tmp_path / "s", parts_of(nn.Linear(3, 2))
    step(parts, paddle.rand([4, 3]))
    checkpoints.save_run_state(path, parts, counters={"epoch": 1})
    with pytest.raises(CheckpointError, match="holds the parts model, optimizer, expected model"):
        checkpoints.load_run_state(path, {"model": parts["model"]})
    with pytest.raises(CheckpointError, match="was saved by 1 processes"):
        checkpoints.load_run_state(path, parts, rank=3)
    with pytest.raises(CheckpointError, match=r"\(model\): weights do not fit the model"):
        checkpoints.load_run_state(path, parts_of(nn.Linear(4, 2)))
    with pytest.raises(CheckpointError, match="belongs to no saved model"):
        checkpoints.save_run_state(path, {"optimizer": parts["optimizer"]}, counters={})
    content = pickle_arrays.read_pickle(path)
    moments = content["parts"]["optimizer"]["moments"]
    for key, value, message in [
        ("model.gone/moment1", np.zeros(2), "no weight model.gone for its stored moment1"),
        ("model.weight/moment1", np.zeros((2, 2)), r"moment1 of model.weight has shape \(2, 2\)"),
    ]:
        changed = {**content["parts"]["optimizer"], "moments": {**moments, key: value}}
        other = content | {"parts": {**content["parts"], "optimizer": changed}}
        pickle_arrays.write_pickle(tmp_path / "other", other)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load_run_state(tmp_path / "other", parts)
    sgd = paddle.optimizer.SGD(
        learning_rate=paddle.optimizer.lr.StepDecay(0.1, 2), parameters=parts["model"].parameters()
    )
    with pytest.raises(CheckpointError, match="that of another optimizer or scheduler"):
        checkpoints.load_run_state(path, parts | {"optimizer": sgd})
    for content in ({"schema": "x"}, [1], {"schema": "smallvision-run/1", "parts": 1, "rng": []}):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError):
            checkpoints.load_run_state(path, {})
    damaged = {"schema": "smallvision-run/1", "parts": {}, "rng": [{}], "counters": "{}"}
    path.write_bytes(pickle.dumps(damaged))
    with pytest.raises(CheckpointError, match="random states or counters are damaged"):
        checkpoints.load_run_state(path, {})


def test_random_state_repeats(rng_kept):
    seeds.seed_all(4)
    paddle.rand([3])
    state = seeds.capture_rng()
    first = (random.random(), np.random.rand(), paddle.rand([2]).tolist())
    seeds.seed_all(5, deterministic=True)
    seeds.restore_rng(state)
    assert (random.random(), np.random.rand(), paddle.rand([2]).tolist()) == first
    with pytest.raises(ValueError, match="seed -1"):
        seeds.seed_all(-1)
