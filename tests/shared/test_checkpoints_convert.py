"""tools/convert.py: there and back bit for bit, and one line for what cannot be converted."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from shared_core import checkpoints as core
from shared_core.checkpoints import neutral, pickle_arrays
from shared_core.runs import run_command

REPO = Path(__file__).resolve().parents[2]


def load_tool():
    spec = importlib.util.spec_from_file_location("convert_tool", REPO / "tools" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


convert = load_tool()


def torch_arrays():
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32),
        "bn.running_mean": rng.normal(size=4).astype(np.float32),
        "bn.running_var": rng.uniform(size=4).astype(np.float32),
        "bn.num_batches_tracked": np.array(12),
        "embed.weight": rng.normal(size=(7, 4)).astype(np.float32),
        "fc.weight": rng.normal(size=(5, 4)).astype(np.float32),
    }


def facts(framework="torch"):
    return core.make_facts(
        project="mpkd", architecture="m", class_names=["a"], framework=framework, epoch=4
    )


def run(capsys, *arguments):
    """Exit code, and what was printed (standard error when there is any)."""
    code = run_command(convert.main, [str(a) for a in arguments])
    out = capsys.readouterr()
    return code, (out.err or out.out).strip()


def test_there_and_back_through_every_format(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    from shared_core.for_torch import checkpoints

    first = tmp_path / "a.pth"
    weights = checkpoints.from_numpy(torch_arrays())
    written = checkpoints.save_checkpoint(first, weights, facts())
    flag = ("--not-linear", "embed.weight")
    steps = ["b.pdparams", "c.safetensors", "d.pth", "e.safetensors", "f.pdparams", "g.pth"]
    source = first
    for name in steps:
        code, printed = run(capsys, source, tmp_path / name, *(flag if source is first else ()))
        assert (code, printed.splitlines()[-1][:10]) == (0, f"{tmp_path / name}"[:10])
        source = tmp_path / name
    paddle, paddle_facts = pickle_arrays.read(tmp_path / "b.pdparams", project="mpkd")
    assert paddle_facts["framework"] == "paddle"
    assert sorted(paddle) == sorted(
        ["conv.weight", "bn._mean", "bn._variance", "embed.weight", "fc.weight"]
    )
    assert np.array_equal(paddle["fc.weight"], torch_arrays()["fc.weight"].T)
    assert np.array_equal(paddle["embed.weight"], torch_arrays()["embed.weight"])
    assert neutral.read(tmp_path / "c.safetensors")[1]["framework"] == "paddle"
    for name in ("d.pth", "g.pth"):
        got, read = checkpoints.load_checkpoint(tmp_path / name)
        assert read == written  # the same sha256, so the same bits
        assert all(torch.equal(got[k], weights[k]) for k in weights)
        assert sorted(got) == sorted(weights)


def test_neutral_to_paddle_needs_no_framework(tmp_path, capsys, monkeypatch):
    neutral.write(tmp_path / "a.safetensors", torch_arrays(), facts())
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    monkeypatch.setitem(__import__("sys").modules, "paddle", None)
    assert run(capsys, tmp_path / "a.safetensors", tmp_path / "b.pdparams")[0] == 0
    code, _ = run(capsys, tmp_path / "b.pdparams", tmp_path / "c.safetensors", "--names", "torch")
    assert code == 0
    got, read = neutral.read(tmp_path / "c.safetensors")
    assert read["sha256"] == core.weights_sha256(torch_arrays())
    assert got["embed.weight"].tobytes() == torch_arrays()["embed.weight"].tobytes()


def test_foreign_files_need_to_be_named(tmp_path, capsys):
    source = tmp_path / "zoo.pdparams"
    pickle_arrays.write_pickle(source, {"fc.weight": np.ones((2, 3), np.float32)})
    code, printed = run(capsys, source, tmp_path / "b.safetensors")
    assert code == 1
    assert "holds no facts" in printed
    code, printed = run(capsys, source, tmp_path / "b.safetensors", "--foreign", "paddle")
    assert (code, "needs --project" in printed) == (2, True)
    named = ("--foreign", "paddle", "--project", "mpkd", "--architecture", "m")
    code, _ = run(capsys, source, tmp_path / "b.safetensors", *named, "--names", "torch")
    assert code == 0
    got, read = neutral.read(tmp_path / "b.safetensors", project="mpkd", architecture="m")
    assert got["fc.weight"].shape == (3, 2)
    assert read["framework"] == "torch"


def test_errors_are_one_line_and_lose_nothing(tmp_path, capsys):
    source, target = tmp_path / "a.safetensors", tmp_path / "b.pdparams"
    neutral.write(source, torch_arrays(), facts())
    target.write_bytes(b"mine")
    code, printed = run(capsys, source, target)
    assert code == 1
    assert printed == f"error: {target} exists; use --force to replace it"
    assert target.read_bytes() == b"mine"
    assert run(capsys, source, target, "--force")[0] == 0
    for arguments, wanted, text in [
        ((source, tmp_path / "c.pdparams", "--names", "torch"), 2, "does not fit c.pdparams"),
        ((source, tmp_path / "c.pdparams", "--project", "x"), 2, "are for --foreign files"),
        ((source, tmp_path / "c.pdparams", "--not-linear", "no"), 1, "no weight is called 'no'"),
        ((tmp_path / "none.pdparams", tmp_path / "c.safetensors"), 1, "no checkpoint at"),
    ]:
        code, printed = run(capsys, *arguments)
        assert (code, text in printed) == (wanted, True), printed
        assert "\n" not in printed or wanted == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.pdparams"]


def test_paddles_bfloat16_becomes_numbers(tmp_path, capsys):
    values = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    for source, foreign in (("own.pdparams", []), ("foreign.pdparams", ["--foreign", "paddle"])):
        if foreign:
            pickle_arrays.write_pickle(tmp_path / source, {"fc.weight": bits})
            foreign += ["--project", "mpkd", "--architecture", "m"]
        else:
            pickle_arrays.write(tmp_path / source, {"fc.weight": bits}, facts("paddle"))
        target = tmp_path / f"{source}.safetensors"
        assert run(capsys, tmp_path / source, target, *foreign)[0] == 0
        got = neutral.read(target)[0]["fc.weight"]
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, values, rtol=2**-7, atol=1e-6)
