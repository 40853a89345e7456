"""Facts, digest, fit and the neutral (safetensors) checkpoint."""

import hashlib
import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from shared_core import checkpoints
from shared_core.checkpoints import CheckpointError, neutral


def facts(**more):
    values = {
        "project": "gfnet_dynn",
        "architecture": "gfnet-ti",
        "class_names": ["a", "b"],
        "framework": "torch",
        **more,
    }
    return checkpoints.make_facts(**values)


def arrays():
    rng = np.random.default_rng(0)
    return {
        "w": rng.normal(size=(3, 4)).astype(np.float32),
        "half": rng.normal(size=5).astype(np.float16),
        "count": np.array(7, dtype=np.int64),
        "mask": np.array([True, False]),
        "strided": np.arange(12, dtype=np.float64).reshape(3, 4).T,
        "nothing": np.zeros((0, 3), dtype=np.float32),
    }


def one_line(error) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 400


def test_facts_are_plain_json_and_survive():
    made = facts(
        input_size=(3, 128, 128),
        mean=np.float32([0.5, 0.25, 0.125]),
        metrics={"top1": np.float64(0.5), "loss": float("nan")},
        config={"lr": np.float32(0.25), "layers": (1, 2)},
        teacher="abc",
    )
    text = checkpoints.facts_to_json(made)
    assert json.loads(text) == made
    assert made["metrics"] == {"top1": 0.5, "loss": None}  # JSON has no nan
    assert made["config"] == {"lr": 0.25, "layers": [1, 2]}
    assert made["mean"] == [0.5, 0.25, 0.125]
    assert made["teacher"] == "abc"


def test_facts_refuse_what_json_cannot_hold():
    with pytest.raises(CheckpointError, match=r"facts.config.f is a function"):
        facts(config={"f": lambda: 0})
    with pytest.raises(CheckpointError, match="key 1 of facts.config is not a string"):
        facts(config={1: 2})
    with pytest.raises(CheckpointError, match="framework is 'jax', expected one of torch"):
        facts(framework="jax")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f | {"schema": "other/9"}, "schema is 'other/9', expected"),
        (lambda f: {k: v for k, v in f.items() if k != "architecture"}, "facts lack architecture"),
        (lambda f: [f], "facts are a list"),
    ],
)
def test_check_facts_refuses(change, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.check_facts("x.pth", change(facts()))


def test_check_facts_names_the_other_project():
    with pytest.raises(CheckpointError, match="project is 'gfnet_dynn', expected 'mpkd'"):
        checkpoints.check_facts("x.pth", facts(), project="mpkd")
    with pytest.raises(CheckpointError, match="architecture is 'gfnet-ti', expected 'gfnet-b'"):
        checkpoints.check_facts("x.pth", facts(), architecture="gfnet-b")


def test_digest_is_sha256_of_name_dtype_shape_and_bytes():
    array = np.array([[1.0, 2.0]], dtype=np.float32)
    wanted = hashlib.sha256(b"w\0float32\x001,2\0" + struct.pack("<2f", 1, 2)).hexdigest()
    assert checkpoints.weights_sha256({"w": array}) == wanted
    assert checkpoints.weights_sha256({"w": array.astype(">f4")}) == wanted
    base = checkpoints.weights_sha256({"a": array, "b": array + 1})
    assert base == checkpoints.weights_sha256({"b": array + 1, "a": array})
    others = [
        {"a": array, "c": array + 1},
        {"a": array + 1, "b": array},
        {"a": array, "b": array.reshape(2) + 1},
        {"a": array, "b": (array + 1).view(np.int32)},
    ]
    assert all(checkpoints.weights_sha256(other) != base for other in others)


def test_neutral_file_is_bit_identical(tmp_path):
    path = tmp_path / "a.safetensors"
    neutral.write(path, arrays(), facts(epoch=3))
    got, read = neutral.read(path, project="gfnet_dynn", architecture="gfnet-ti")
    assert list(sorted(got)) == sorted(arrays())
    for name, array in arrays().items():
        assert got[name].dtype == array.dtype
        assert got[name].shape == array.shape
        assert got[name].tobytes() == np.ascontiguousarray(array).tobytes()
    assert read == facts(epoch=3) | {"sha256": checkpoints.weights_sha256(arrays())}


def test_neutral_refuses_objects(tmp_path):
    with pytest.raises(CheckpointError, match="o has dtype object"):
        neutral.write(tmp_path / "a.safetensors", {"o": np.array([None])}, facts())
    assert list(tmp_path.iterdir()) == []


def test_facts_take_paths_and_pipes_are_no_checkpoints(tmp_path):
    assert facts(config={"folder": tmp_path})["config"] == {"folder": tmp_path.as_posix()}
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is no regular file"):
        neutral.read(tmp_path / "pipe")


def test_neutral_refuses_dtypes_that_safetensors_has_not(tmp_path):
    for dtype in (np.longdouble, np.complex64):
        with pytest.raises(CheckpointError, match="w has dtype .*, expected booleans, integers"):
            neutral.write(tmp_path / "a.safetensors", {"w": np.zeros(2, dtype)}, facts())
    assert list(tmp_path.iterdir()) == []


def damaged(path):
    """Flip one bit of the last weight."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def other_schema(path):
    save_file({"w": np.zeros(2)}, path, metadata={neutral.FACTS_KEY: json.dumps({"schema": "x"})})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damaged, "weights are damaged: sha256 is"),
        (lambda p: p.write_bytes(p.read_bytes()[:-5]), "no readable safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:40]), "no readable safetensors file"),
        (lambda p: p.write_bytes(b"\xff" * 64), "no readable safetensors file"),
        (lambda p: p.write_bytes(b""), "is empty"),
        (lambda p: (p.unlink(), p.mkdir()), "is a folder"),
        (lambda p: save_file({"w": np.zeros(2)}, p), "holds no facts"),
        (lambda p: save_file({"w": np.zeros(2)}, p, {neutral.FACTS_KEY: "{"}), "not JSON"),
        (lambda p: save_file({"w": np.zeros(2)}, p, {neutral.FACTS_KEY: "[" * 99999}), "not JSON"),
        (other_schema, "schema is 'x'"),
    ],
)
def test_neutral_reading_a_bad_file_is_one_line(tmp_path, harm, message):
    path = tmp_path / "a.safetensors"
    neutral.write(path, {"w": np.arange(6.0)}, facts())
    harm(path)
    with pytest.raises(CheckpointError, match=message) as error:
        neutral.read(path)
    assert str(path) in str(error.value)
    assert one_line(error)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        neutral.read(tmp_path / "none.safetensors")


def test_check_fit_names_the_first_few():
    model = {f"l{i}": (2,) for i in range(6)} | {"w": (2, 3)}
    checkpoints.check_fit("x", model=model, weights=dict(model))
    with pytest.raises(CheckpointError) as error:
        checkpoints.check_fit("x.pth", model=model, weights={"w": (3, 2), "extra": (1,)})
    assert str(error.value) == (
        "x.pth: weights do not fit the model: 6 missing (l0, l1, l2 and 3 more); "
        "1 unexpected (extra); 1 misshaped (w (3, 2) instead of (2, 3))"
    )


def test_plain_names_take_wrappers_off_only_when_all_have_them():
    assert checkpoints.plain_names(["module._orig_mod.a.b", "module._orig_mod.c"]) == {
        "module._orig_mod.a.b": "a.b",
        "module._orig_mod.c": "c",
    }
    assert checkpoints.plain_names(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}
    assert checkpoints.plain_names([]) == {}


@pytest.mark.skipif(os.name != "posix", reason="rights are those of POSIX")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_file_has_the_rights_of_new_files(tmp_path, mask):
    before = os.umask(mask)
    try:
        neutral.write(tmp_path / "a.safetensors", {"w": np.zeros(2, np.float32)}, facts())
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_integers_where_floats_belong_do_not_fit():
    shapes = {"w": (2,), "n": ()}
    floats = {"w": True, "n": False}
    checkpoints.check_fit(
        "x", model=shapes, weights=shapes, model_floats=floats, weight_floats=floats
    )
    with pytest.raises(CheckpointError, match="1 of another type .*w integers instead of floats"):
        checkpoints.check_fit(
            "x", model=shapes, weights=shapes, model_floats=floats,
            weight_floats={"w": False, "n": False},
        )  # fmt: skip
