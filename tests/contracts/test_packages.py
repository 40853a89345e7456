"""The five packages: their metadata, their contents, their entry scripts."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

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


@pytest.mark.slow
@pytest.mark.parametrize("project", PROJECTS)
def test_the_wheel_holds_the_package_and_nothing_else(project, tmp_path):
    done = run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
        "--disable-pip-version-check", "-w", tmp_path, REPO / "packages" / project,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    source = {
        path.relative_to(REPO / "packages").as_posix()
        for path in (REPO / "packages" / project).rglob("*.py")
    }
    assert source <= set(names)
    inside = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in inside} == {project}
    metadata = zipfile.ZipFile(wheel).read(
        next(name for name in names if name.endswith(".dist-info/METADATA"))
    )
    assert re.search(rb"Requires-Dist: shared-core @ file://.*shared", metadata)


@pytest.mark.slow
@pytest.mark.parametrize("project", PROJECTS)
def test_main_answers_help_from_another_folder(project, tmp_path):
    done = run(sys.executable, REPO / "packages" / project / "main.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


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
    for version in ("3.10", "3.11", "3.12", "3.13"):
        here = {"python_version": version, "python_full_version": version + ".0",
                "sys_platform": "linux", "platform_machine": "x86_64"}  # fmt: skip
        for name in ("torch", "torchvision", "paddlepaddle", "numpy", "pytest", "mlflow"):
            fits = [p for p in pins if p.name == name
                    and (p.marker is None or p.marker.evaluate(here))]  # fmt: skip
            assert len(fits) == 1, f"{name} on Python {version}: {fits}"
            assert all(spec.operator == "==" for spec in fits[0].specifier)
