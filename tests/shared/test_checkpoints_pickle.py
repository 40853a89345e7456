"""Pickled arrays are read without running anything that a pickle names."""

import _codecs as codecs
import collections
import os
import pickle
import pickletools
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shared_core import checkpoints
from shared_core.checkpoints import CheckpointError, pickle_arrays, torch_arrays


def facts():
    return checkpoints.make_facts(
        project="visiondistill_gc", architecture="m", class_names=["a"], framework="paddle"
    )


class Runs:
    """Would run a shell command when it is unpickled the ordinary way."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


def write_raw(path: Path, content, protocol=4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_and_containers_come_back(tmp_path, protocol):
    content = {
        "model": collections.OrderedDict(
            w=np.arange(6, dtype=np.float32).reshape(2, 3),
            fortran=np.asfortranarray(np.arange(6.0).reshape(2, 3)),
            big=np.array([1, 2], dtype=">i4"),
            zero=np.float64(2.5),
            mask=np.array([True, False]),
            none=np.zeros((0, 2), dtype=np.int8),
        ),
        "list": [1, 2.5, "text", None, True, (1, 2)],
        3: {"deep": [np.array(4, dtype=np.int64)]},
    }
    got = pickle_arrays.read_pickle(write_raw(tmp_path / "a.pdparams", content, protocol))
    assert got["list"] == content["list"]
    assert got[3]["deep"][0] == 4
    for name, value in content["model"].items():
        assert np.array_equal(got["model"][name], value), name
        assert got["model"][name].shape == value.shape
    assert got["model"]["big"].dtype == np.int32
    got["model"]["w"][0, 0] = 9  # an array of its own, not a view of the file's bytes


def test_a_pickle_that_would_run_a_command_runs_nothing(tmp_path):
    witness = tmp_path / "ran"
    for number, evil in enumerate(
        [
            Runs(os.system, f"touch {witness}"),
            {"w": np.zeros(2), "x": [Runs(eval, f"open({str(witness)!r}, 'w')")]},
            Runs(exec, f"open({str(witness)!r}, 'w')"),
            {"w": np.array([Runs(os.system, f"touch {witness}")], dtype=object)},
            Runs(getattr, "text", "upper"),
            Runs(np.load, str(witness)),
            Runs(pickle.loads, pickle.dumps(1)),
        ]
    ):
        path = write_raw(tmp_path / f"{number}.pdparams", evil)
        with pytest.raises(CheckpointError, match="refused") as error:
            pickle_arrays.read_pickle(path)
        assert "\n" not in str(error.value)
    assert not witness.exists()
    # the same file does run its command when it is opened the careless way
    pickle.loads((tmp_path / "0.pdparams").read_bytes())
    assert witness.exists()


def reconstructed(*state):
    """A pickle of an array with this raw state (version, shape, dtype, fortran, data)."""

    class Forged:
        def __reduce__(self):
            rebuild = np.zeros(1).__reduce__()[0]
            return rebuild, (np.ndarray, (0,), b"b"), state

    return Forged()


@pytest.mark.parametrize(
    "content",
    [
        reconstructed(1, (10**9,), np.dtype("f4"), False, b"abcd"),
        reconstructed(1, (-1,), np.dtype("f4"), False, b"abcd"),
        reconstructed(1, (True,), np.dtype("f4"), False, b"abcd"),
        reconstructed(1, (1,), np.dtype("O"), False, [1]),
        reconstructed(1, (1,), np.dtype("f4"), False, [1.0]),
        reconstructed(1, (1,), np.dtype("S4"), False, b"abcd"),
        reconstructed(1, (1,), np.dtype("M8[s]"), False, b"abcdefgh"),
        reconstructed(1, 4, np.dtype("f4"), False, b"abcd"),
        reconstructed(1, (1,), "f4", False, b"abcd"),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        {"s": {1, 2}},
        {(1, 2): 3},
        {"b": b"bytes"},
        {"c": 1j},
        slice(1),
        Runs(np.dtype, "a-long-name-of-a-dtype"),
        Runs(np.dtype, "nonsense"),
        Runs(collections.OrderedDict, [(1, 2)]),
        Runs(tuple, [0] * 9),
        Runs(codecs.encode, "text", "rot13"),
        Runs(np.zeros(1).__reduce__()[0], np.ndarray, (0,), b"b"),
        reconstructed(1, (1,), np.dtype("f4")),
        reconstructed(1, (1,), Runs(np.dtype, "nonsense"), False, b"abcd"),
    ],
)
def test_anything_else_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError):
        pickle_arrays.read_pickle(write_raw(tmp_path / "a.pdparams", content))


def test_a_list_that_contains_itself_is_refused(tmp_path):
    loop = [1]
    loop.append(loop)
    with pytest.raises(CheckpointError, match="contains itself"):
        pickle_arrays.read_pickle(write_raw(tmp_path / "a.pdparams", loop))


def test_small_files_stay_small(tmp_path):
    bomb = []
    for _ in range(60):  # 10 ** 60 items if shared lists were copied
        bomb = [bomb] * 10
    assert pickle_arrays.read_pickle(write_raw(tmp_path / "a.pdparams", bomb)) is not None
    # one megabyte of data, named a thousand times by different array headers
    data = bytes(1 << 20)

    class Copy:
        def __reduce__(self):
            rebuild = np.zeros(1).__reduce__()[0]
            return rebuild, (np.ndarray, (0,), b"b"), (1, (1 << 20,), np.dtype("u1"), False, data)

    path = write_raw(tmp_path / "b.pdparams", [Copy() for _ in range(1000)])
    assert path.stat().st_size < 2 << 20
    with pytest.raises(CheckpointError, match="more array data than the file has bytes"):
        pickle_arrays.read_pickle(path)


def test_every_truncation_is_a_checkpoint_error(tmp_path):
    path = tmp_path / "a.pdparams"
    pickle_arrays.write(path, {"w": np.arange(4.0)}, facts())
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            pickle_arrays.read(path)


def test_random_damage_never_escapes_as_another_error(tmp_path):
    path = tmp_path / "a.pdparams"
    pickle_arrays.write(path, {"w": np.arange(4.0)}, facts())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        for place in rng.integers(len(content), size=3):
            content[place] = rng.integers(256)
        path.write_bytes(content)
        try:
            got, _ = pickle_arrays.read(path)
        except CheckpointError:
            refused += 1
        else:
            assert np.array_equal(got["w"], np.arange(4.0))  # the damage was in the facts
    assert refused > 150


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no facts"),
        ({"model": {}}, "holds no facts"),
        ({"model": {}, "facts": "{}"}, "schema is 'None'"),
    ],
)
def test_a_pickle_that_is_no_checkpoint(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        pickle_arrays.read(write_raw(tmp_path / "a.pdparams", content))


def test_checkpoint_round_trip_and_other_project(tmp_path):
    path = tmp_path / "a.pdparams"
    weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    pickle_arrays.write(path, weights, facts())
    got, read = pickle_arrays.read(path, project="visiondistill_gc")
    assert got["w"].tobytes() == weights["w"].tobytes()
    assert read["sha256"] == checkpoints.weights_sha256(weights)
    with pytest.raises(CheckpointError, match="project is 'visiondistill_gc', expected 'mpkd'"):
        pickle_arrays.read(path, project="mpkd")
    named = {argument for _, argument, _ in pickletools.genops(path.read_bytes())}
    assert not {"torch", "paddle"} & named


def test_writing_refuses_what_reading_would(tmp_path):
    with pytest.raises(CheckpointError, match="cannot hold a set"):
        pickle_arrays.write_pickle(tmp_path / "a", {"x": {1}})
    with pytest.raises(CheckpointError, match="w is object, expected an array of numbers"):
        pickle_arrays.write(tmp_path / "a", {"w": np.array([None])}, facts())
    with pytest.raises(CheckpointError, match="w is list, expected an array of numbers"):
        pickle_arrays.write(tmp_path / "a", {"w": [1]}, facts())
    assert list(tmp_path.iterdir()) == []


def test_state_arrays_undo_paddles_wrapping():
    array = np.zeros(2)
    got = pickle_arrays.state_arrays(
        "x", {"a": ("linear_0.w_0", array), "b": array, "StructuredToParameterName@@": {"a": "l"}}
    )
    assert list(got) == ["a", "b"]
    with pytest.raises(CheckpointError, match="entry 'a' is a int"):
        pickle_arrays.state_arrays("x", {"a": 1})
    with pytest.raises(CheckpointError, match="split in slices"):
        pickle_arrays.state_arrays("x", {"UnpackBigParamInfor@@": {}})
    with pytest.raises(CheckpointError, match="holds a list"):
        pickle_arrays.state_arrays("x", [])


BOMBS = {
    "memory index": b"\x80\x02Nr\xff\xff\xff\x1f.",
    "memory index in digits": b"Np536870911\n.",
    "length of bytes": b"\x80\x04\x8e\x00\x00\x00\x00\x02\x00\x00\x00.",
    "length of text": b"\x80\x02X\xff\xff\xff\x7f.",
    "frame": b"\x80\x04\x95\x00\x00\x00\x00\x02\x00\x00\x00N.",
    "nested": b"]" * 200_000 + b"a" * 199_999 + b".",
}


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("reader", ["pickle_arrays", "torch_arrays", "torch zip"])
def test_bombs_cost_nothing_and_are_one_line(tmp_path, kind, reader):
    path = tmp_path / "bomb.pth"
    content = BOMBS[kind]
    if reader == "torch zip":
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("x/data.pkl", content)
    else:
        if reader == "torch_arrays":
            content = b"".join(
                pickle.dumps(n, 2) for n in (0x1950A86A20F9469CFC6C, 1001, {})
            ) + content  # fmt: skip
        path.write_bytes(content)
    read = torch_arrays.read_torch if reader != "pickle_arrays" else pickle_arrays.read_pickle
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"bomb\.pth") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_paddles_bfloat16_is_widened_bit_for_bit():
    values = np.array([-0.34765625, 1.0, 0.0, 3.0e38, -1e-30], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    counters = np.array([3])
    got = pickle_arrays.widened({"w": bits.reshape(5, 1), "n": counters})
    assert got["n"] is counters and got["w"].dtype == np.float32 and got["w"].shape == (5, 1)
    np.testing.assert_array_equal(got["w"].view(np.uint32) >> 16, bits[:, None].astype(np.uint32))
    np.testing.assert_allclose(got["w"][:, 0], values, rtol=2**-7)
