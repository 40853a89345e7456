"""Who imports whom, read from the source and seen in a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import house

REPO = Path(__file__).resolve().parents[2]
PROJECTS = ("gfnet_dynn", "landmark_distill", "visiondistill_gc", "torch_cls_zoo", "mpkd")
PADDLE = {"visiondistill_gc"}
# Imported where they log, draw, export or fit a floor, never at the top of a module.
ON_USE = {
    "mlflow", "visualdl", "tensorboard", "matplotlib", "onnx", "onnxruntime", "onnxscript",
    "paddle2onnx", "sklearn", "openvino", "nncf",
}  # fmt: skip


def imported(path: Path, *, top_level: bool = False) -> set[str]:
    """Every name a file imports, as dotted paths; with ``top_level`` only outside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = set()
    if top_level:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside |= {id(child) for child in ast.walk(node)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, folder
    return found


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_imports_no_other_project_and_one_framework(project):
    foreign = set(PROJECTS) - {project} | ({"torch"} if project in PADDLE else {"paddle"})
    adapter = "shared_core.for_torch" if project in PADDLE else "shared_core.for_paddle"
    for path in files(REPO / "packages" / project):
        names = imported(path)
        assert not roots(names) & foreign, f"{path} imports {roots(names) & foreign}"
        assert not any(name.startswith(adapter) for name in names), path


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_uses_absolute_imports(project):
    for path in files(REPO / "packages" / project):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}:{node.lineno}"


def test_the_core_imports_no_project_and_frameworks_only_in_their_adapters():
    core = REPO / "shared" / "shared_core"
    for path in files(core):
        names = roots(imported(path))
        part = path.relative_to(core).parts[0]
        assert not names & set(PROJECTS), path
        if part != "for_torch":
            assert "torch" not in names and "torchvision" not in names, path
        if part != "for_paddle":
            assert "paddle" not in names, path


def test_trackers_plotters_and_exporters_are_imported_on_use():
    for folder in (REPO / "packages", REPO / "shared" / "shared_core"):
        for path in files(folder):
            found = roots(imported(path, top_level=True)) & ON_USE
            assert not found, f"{path} imports {found} at its top"


def test_the_core_loads_without_a_framework():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from shared_core import checkpoints, datasets, knowledge, metrics, runs;"
        "print(sorted({'torch', 'paddle', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(REPO / "shared")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("part", [*PROJECTS, "shared_core"])
def test_no_part_has_an_import_circle(part):
    assert house.count(house.PARTS[part])["circles"] == []


def test_a_circle_is_found(tmp_path):
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "__init__.py").write_text("from part import a\n")
    (folder / "a.py").write_text("def f():\n    from part.b import g\n")
    (folder / "b.py").write_text("from part import c\n")
    (folder / "c.py").write_text("import part.a\n")
    (folder / "d.py").write_text("from part import a\n")
    counted = house.count(folder)
    assert counted["circles"] == [["part.a", "part.b", "part.c"]] and counted["arrows"] == 4
    assert (counted["files"], counted["lines"]) == (5, 6)


def test_the_rule_finds_an_offender(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from mpkd import main\nimport mlflow\n")
    assert "mpkd" in roots(imported(bad))
    assert roots(imported(bad, top_level=True)) == {"mlflow"}
