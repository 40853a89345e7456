"""Torch checkpoints: what was saved comes back, and nothing else gets in."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared_core import checkpoints as core
from shared_core.checkpoints import CheckpointError, neutral

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from shared_core.for_torch import checkpoints  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"


def facts(**more):
    return core.make_facts(
        **{
            "project": "mpkd",
            "architecture": "small",
            "class_names": ["a", "b"],
            "framework": "torch",
            **more,
        }
    )


def small(classes=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def equal(a, b):
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_there_and_back_bit_for_bit(tmp_path, name):
    path, model = tmp_path / name, small()
    model(torch.rand(3, 3, 3, 3))  # moves the running statistics
    written = checkpoints.save_checkpoint(path, model.state_dict(), facts(epoch=2))
    weights, read = checkpoints.load_checkpoint(path, project="mpkd", architecture="small")
    order = dict(sorted(weights.items())) if name.endswith("safetensors") else weights
    own = model.state_dict()
    assert equal(order, {k: own[k] for k in order})
    assert set(weights) == set(own)
    assert read == written
    assert {k: v for k, v in read.items() if k != "sha256"} == facts(epoch=2)
    arrays = {k: v.numpy() for k, v in own.items()}
    assert read["sha256"] == core.weights_sha256(arrays)  # the hash of the NumPy side
    other = small(seed=1)
    assert not equal(other.state_dict(), own)
    assert checkpoints.load_into(other, path) == read
    assert equal(other.state_dict(), own)


def test_the_file_opens_with_torch_alone(tmp_path):
    path = tmp_path / "a.pth"
    checkpoints.save_checkpoint(path, small().state_dict(), facts())
    content = torch.load(path, weights_only=True)
    small(seed=1).load_state_dict(content["model"])
    neutral_path = tmp_path / "a.safetensors"
    checkpoints.save_checkpoint(neutral_path, small().state_dict(), facts())
    arrays, _ = neutral.read(neutral_path)  # without torch
    assert np.array_equal(arrays["3.weight"], small().state_dict()["3.weight"].numpy())


def test_all_dtypes_of_torch_files(tmp_path):
    weights = {
        "bf16": torch.randn(4).bfloat16(),
        "half": torch.randn(2, 2).half(),
        "complex": torch.randn(3, dtype=torch.complex64),
        "bool": torch.tensor([True, False]),
        "view": torch.arange(12.0).reshape(3, 4).T[1:3],
    }
    checkpoints.save_checkpoint(tmp_path / "a.pth", weights, facts())
    got, read = checkpoints.load_checkpoint(tmp_path / "a.pth")
    assert equal(got, weights)
    arrays = {k: weights[k].numpy() for k in ("half", "complex", "bool", "view")}
    assert checkpoints.weights_sha256({k: weights[k] for k in arrays}) == core.weights_sha256(
        arrays
    )
    assert (tmp_path / "a.pth").stat().st_size < 10_000
    with pytest.raises(CheckpointError, match="dtype that NumPy has not"):
        checkpoints.save_checkpoint(tmp_path / "a.safetensors", weights, facts())
    assert not (tmp_path / "a.safetensors").exists()


def test_numpy_there_and_back_shares_no_memory():
    weights = {"w": torch.arange(3.0), "n": torch.tensor(4)}
    arrays = checkpoints.to_numpy(weights)
    back = checkpoints.from_numpy(arrays)
    assert equal(back, weights)
    back["w"][0] = 9
    assert arrays["w"][0] == 0


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    checkpoints.save_checkpoint(tmp_path / "a.pth", {"w": torch.zeros(1_000_000)[:2]}, facts())
    assert (tmp_path / "a.pth").stat().st_size < 10_000


def test_wrapped_models_save_and_load_as_plain_ones(tmp_path):
    path, model = tmp_path / "a.pth", small()
    wrapped = nn.DataParallel(model)
    checkpoints.save_checkpoint(path, wrapped.state_dict(), facts())
    plain = small(seed=1)
    checkpoints.load_into(plain, path)
    assert equal(plain.state_dict(), model.state_dict())
    again = nn.DataParallel(small(seed=2))
    checkpoints.load_into(again, path)
    assert equal(again.module.state_dict(), model.state_dict())
    compiled = nn.Module()  # what torch.compile returns, without its seconds of import
    compiled._orig_mod = model
    assert checkpoints.unwrap(compiled) is model
    assert checkpoints.unwrap(nn.DataParallel(compiled)) is model


def test_every_weight_must_fit(tmp_path):
    path = tmp_path / "a.pth"
    checkpoints.save_checkpoint(path, small(classes=3).state_dict(), facts())
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        checkpoints.load_into(model, path)
    assert str(error.value) == (
        f"{path}: weights do not fit the model: 2 misshaped "
        "(3.weight (3, 4) instead of (2, 4), 3.bias (3,) instead of (2,))"
    )
    with pytest.raises(CheckpointError, match=r"2 missing \(4.weight, 4.bias\)"):
        checkpoints.load_into(nn.Sequential(*small(3), nn.Linear(3, 3)), path)
    with pytest.raises(CheckpointError, match=r"1 unexpected \(3.bias\)"):
        checkpoints.load_into(nn.Sequential(*small(3)[:3], nn.Linear(4, 3, bias=False)), path)
    assert equal(model.state_dict(), before)
    with pytest.raises(CheckpointError, match="^a list: weights do not fit the model: 8 missing"):
        checkpoints.fit_into(model, {"3.weight": torch.zeros(2, 4)}, path="a list")


class Runs:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize(
    "read",
    [
        checkpoints.load_checkpoint,
        checkpoints.load_foreign_weights,
        lambda path: checkpoints.load_run_state(path, {}),
    ],
)
def test_a_file_that_would_run_a_command_runs_nothing(tmp_path, form, read):
    path, witness = tmp_path / "a.pth", tmp_path / "ran"
    content = {"model": {"w": torch.zeros(2)}, "x": Runs(witness)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Runs(witness)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert not witness.exists()
    if form != "pickle":  # the trap works when the file is opened the careless way
        torch.load(path, weights_only=False)
        assert witness.exists()


def truncated(path):
    path.write_bytes(path.read_bytes()[:-300])


def one_bit(path):
    content = bytearray(path.read_bytes())
    place = content.rfind(np.float32(123.25).tobytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (truncated, "no readable torch file"),
        (one_bit, "weights are damaged|no readable torch file"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (
            lambda p: p.write_bytes(np.random.default_rng(0).bytes(500)),
            "no readable torch file|refused",
        ),
        (lambda p: (p.unlink(), p.mkdir()), "is a folder"),
        (lambda p: torch.save({"w": torch.zeros(1)}, p), "holds no facts"),
        (lambda p: torch.save(torch.zeros(1), p), "holds no facts"),
        (lambda p: torch.save({"model": {}, "facts": "{}"}, p), "schema is 'None'"),
        (
            lambda p: torch.save({"model": [1], "facts": core.facts_to_json(facts())}, p),
            "holds no weights",
        ),
        (
            lambda p: torch.save({"model": {"w": 1}, "facts": core.facts_to_json(facts())}, p),
            "entry 'w' is a int",
        ),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, harm, message):
    path = tmp_path / "a.pth"
    checkpoints.save_checkpoint(path, {"w": torch.full((3,), 123.25)}, facts())
    harm(path)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoints.load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_missing_file_other_project_other_framework(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoints.load_checkpoint(tmp_path / "a.pth")
    path = tmp_path / "b.pth"
    checkpoints.save_checkpoint(path, {"w": torch.zeros(1)}, facts())
    with pytest.raises(CheckpointError, match="project is 'mpkd', expected 'gfnet_dynn'"):
        checkpoints.load_checkpoint(path, project="gfnet_dynn")
    neutral.write(tmp_path / "c.safetensors", {"w": np.zeros(1)}, facts(framework="paddle"))
    with pytest.raises(CheckpointError, match="carry Paddle's names; convert it"):
        checkpoints.load_checkpoint(tmp_path / "c.safetensors")


def test_foreign_weights(tmp_path):
    model, path = small(), tmp_path / "a.pth"
    wrapped = {f"module.{k}": v for k, v in model.state_dict().items()}
    for content in (
        model.state_dict(),
        {"model": model.state_dict(), "epoch": 3},
        {"state_dict": wrapped, "best": 0.5},
    ):
        torch.save(content, path)
        assert equal(checkpoints.load_foreign_weights(path), dict(model.state_dict()))
    checkpoints.save_checkpoint(tmp_path / "a.safetensors", model.state_dict(), facts())
    got = checkpoints.load_foreign_weights(tmp_path / "a.safetensors")
    assert set(got) == set(model.state_dict())
    for content, message in [([1], "holds no weights"), ({"a": 1}, "entry 'a' is a int")]:
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load_foreign_weights(path)


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
from shared_core.checkpoints import make_facts
from shared_core.for_torch import checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
facts = make_facts(project="p", architecture="a", class_names=[], framework="torch")
for path in sys.argv[2:]:
    try:
        checkpoints.save_checkpoint(path, {"w": torch.zeros(1_000_000)}, facts)
    except OSError as error:
        print(error)
"""


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_old_file(tmp_path):
    """The size limit of a process stands in for a full disk: the same failing write."""
    paths = [tmp_path / "a.pth", tmp_path / "a.safetensors"]
    for path in paths:
        path.write_bytes(b"old")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(SHARED), *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    for path, line in zip(paths, done.stdout.splitlines(), strict=True):
        assert line.startswith(f"cannot write {path}: ")
        assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "a.safetensors"]
