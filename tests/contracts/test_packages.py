"""The five packages: their metadata, their contents, their entry scripts."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

import version

REPO = Path(__file__).resolve().parents[2]
PROJECTS = ("gfnet_dynn", "landmark_distill", "visiondistill_gc", "torch_cls_zoo", "mpkd")


def run(*command, cwd=REPO, env=None):
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, **(env or {})},
    )  # fmt: skip


@pytest.mark.parametrize("folder", [*(f"packages/{p}" for p in PROJECTS), "shared"])
def test_poetry_check_passes(folder):
    done = run(sys.executable, "-m", "poetry", "check", cwd=REPO / folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stdout + done.stderr


@pytest.mark.parametrize("project", PROJECTS)
def test_the_metadata_follow_the_one_pattern(project):
    settings = tomllib.loads((REPO / "packages" / project / "pyproject.toml").read_text())
    assert settings["project"]["name"] == project
    assert settings["project"]["dynamic"] == ["dependencies"]
    assert settings["project"]["requires-python"] == ">=3.10,<3.14"
    needs = settings["tool"]["poetry"]["dependencies"]
    assert needs["shared-core"] == {"path": "../../shared", "develop": True}
    packed = settings["tool"]["poetry"]["packages"]
    assert packed[0] == {"include": f"{project}/**/*.py", "from": ".."}
    for entry in packed:
        assert set(entry) == {"include", "from"}, "`to` breaks editable installs"
    for entry in packed[1:]:
        assert (REPO / "packages" / entry["include"]).is_file(), entry

    assert settings["project"]["scripts"], "expected a command"
    for name, target in settings["project"]["scripts"].items():
        module, function = target.split(":")
        assert module.split(".")[0] == project and name.startswith(project.replace("_", "-"))
        source = REPO / "packages" / (module.replace(".", "/") + ".py")
        assert f"def {function}(" in source.read_text(encoding="utf-8"), target


def test_one_version_everywhere():
    stated = version.stated()
    assert len(stated) == len(PROJECTS) + 3 and len(set(stated.values())) == 1, stated


def test_a_version_is_written_everywhere(tmp_path, monkeypatch):
    for name in version.stated():
        place = tmp_path / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text((REPO / name).read_text())
    monkeypatch.setattr(version, "REPO", tmp_path)
    assert version.main(["1.2.3"]) == 0
    assert set(version.stated().values()) == {"1.2.3"}
    settings = tomllib.loads((tmp_path / "packages/mpkd/pyproject.toml").read_text())
    before = tomllib.loads((REPO / "packages/mpkd/pyproject.toml").read_text())
    assert settings["project"].pop("version") == "1.2.3" != before["project"].pop("version")
    assert settings == before


def test_every_distribution_brings_the_licence_and_its_types():
    text = (REPO / "LICENSE").read_bytes()
    for folder in ("shared", *(f"packages/{p}" for p in PROJECTS)):
        assert (REPO / folder / "LICENSE").read_bytes() == text
    for folder in ("shared/shared_core", *(f"packages/{p}" for p in PROJECTS)):
        assert (REPO / folder / "py.typed").is_file()


def test_all_projects_can_be_had_by_one_name():
    settings = tomllib.loads((REPO / "pyproject.toml").read_text())
    needs = settings["tool"]["poetry"]["dependencies"]
    extras = settings["tool"]["poetry"]["extras"]
    for project in PROJECTS:
        assert needs[project]["path"] == f"packages/{project}" and needs[project]["optional"]
        assert extras[project] == [project] and project in extras["all"]
    assert needs["shared-core"]["path"] == "shared"


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """What `make wheels` leaves."""
    folder = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, REPO / "tools" / "wheels.py", "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["shared_core", *PROJECTS])
def test_a_wheel_to_hand_on_holds_its_package_and_names_no_path(name, dist):
    (wheel,) = dist.glob(f"{name}-*.whl")
    (archive,) = dist.glob(f"{name}-*.tar.gz")
    packed = zipfile.ZipFile(wheel)
    names = packed.namelist()
    base = REPO / ("shared" if name == "shared_core" else "packages")
    listed = run("git", "ls-files", "-z", f"{name}/*.py", cwd=base).stdout.split("\0")
    assert {one for one in listed if one and (base / one).is_file()} <= set(names)
    inside = {one for one in names if ".dist-info/" not in one}
    assert {one.split("/")[0] for one in inside} == {name}
    assert f"{name}/py.typed" in inside
    assert any(one.endswith(".dist-info/licenses/LICENSE") for one in names)
    about = packed.read(next(one for one in names if one.endswith("/METADATA"))).decode()
    assert "file:" not in about
    number = version.stated()["shared/pyproject.toml"]
    assert (f"Requires-Dist: shared-core (=={number})" in about) == (name != "shared_core")
    if name != "shared_core":
        commands = packed.read(next(one for one in names if one.endswith("/entry_points.txt")))
        assert name.replace("_", "-").encode() in commands
    assert archive.stat().st_size > 10_000


HEAVY = ("torch", "torchvision", "timm", "paddle", "cv2", "onnxruntime", "sklearn", "matplotlib")
HELP = """
import runpy, sys
sys.argv = [sys.argv[1], "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print("LOADED", *sorted(set(sys.modules) & set(%r)))
"""
COMMANDS = sorted(
    path.relative_to(REPO).as_posix()
    for path in (REPO / "packages").glob("*/*.py")
    if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_framework_and_works_from_another_folder(command, tmp_path):
    done = run(sys.executable, "-c", HELP % (HEAVY,), REPO / command, cwd=tmp_path)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED", done.stdout.splitlines()[-1]


@pytest.mark.parametrize("project", PROJECTS)
def test_a_script_runs_this_checkout_whatever_is_installed(project, tmp_path):
    """A decoy package earlier on the path must not be what runs."""
    decoy = tmp_path / project
    decoy.mkdir()
    (decoy / "__init__.py").write_text("raise SystemExit('decoy')")
    (tmp_path / "shared_core").mkdir()
    (tmp_path / "shared_core" / "__init__.py").write_text("raise SystemExit('decoy')")
    done = run(
        sys.executable, REPO / "packages" / project / "main.py", "--help",
        env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_constraints_cover_every_supported_python_and_name_no_registry():
    from packaging.requirements import Requirement

    lines = [
        line for line in (REPO / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]  # fmt: skip
    pins = [Requirement(line) for line in lines]
    assert not [line for line in lines if "://" in line or line.startswith("-")]
    for python in ("3.10", "3.11", "3.12", "3.13"):
        here = {"python_version": python, "python_full_version": python + ".0",
                "sys_platform": "linux", "platform_machine": "x86_64"}  # fmt: skip
        for name in ("torch", "torchvision", "paddlepaddle", "numpy", "pytest", "mlflow"):
            fits = [p for p in pins if p.name == name
                    and (p.marker is None or p.marker.evaluate(here))]  # fmt: skip
            assert len(fits) == 1, f"{name} on Python {python}: {fits}"
            assert all(spec.operator == "==" for spec in fits[0].specifier)
