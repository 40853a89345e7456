"""The Makefile, the CI workflow and the README name only what exists."""

import functools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((REPO / ".github" / "workflows").glob("*.yml"))
WORKFLOW = REPO / ".github" / "workflows" / "ci.yml"
PROJECTS = sorted(path.parent.name for path in (REPO / "packages").glob("*/pyproject.toml"))


@functools.cache
def make_targets() -> set[str]:
    """Every explicit target that make itself knows."""
    done = subprocess.run(
        ["make", "-npRr", "help"], cwd=REPO, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"^([A-Za-z][\w.-]*):", done.stdout, flags=re.MULTILINE))


def commands(text: str) -> list[list[str]]:
    """The words of every `make` command in a shell text."""
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("make ")]


def targets_of(words: list[str]) -> list[str]:
    return [word for word in words[1:] if "=" not in word and not word.startswith("-")]


def expand(text: str, matrix: dict) -> list[str]:
    """Fill ``${{ matrix.x }}`` with each value."""
    found = re.search(r"\$\{\{\s*matrix\.(\w+)\s*\}\}", text)
    if not found:
        return [text]
    assert found[1] in matrix, f"{text}: the matrix has no {found[1]}"
    return [
        line
        for value in matrix[found[1]]
        for line in expand(text[: found.start()] + str(value) + text[found.end() :], matrix)
    ]


def test_the_workflows_name_only_packages_targets_and_steps_that_exist():
    known = make_targets()
    seen = set()
    jobs = [
        (f"{path.name} {name}", job)
        for path in WORKFLOWS
        for name, job in yaml.safe_load(path.read_text())["jobs"].items()
    ]
    for name, job in jobs:
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), (name, step)
            if "uses" in step:
                assert re.fullmatch(r"actions/(checkout|setup-python)@v\d+", step["uses"]), step
                continue
            for text in expand(step["run"], matrix):
                for words in commands(text):
                    for target in targets_of(words):
                        assert target in known, f"job {name}: make has no target {target}"
                        seen.add(target)
    assert {"lint", "test-shared", "test-slow", "mutants"} <= seen
    assert {f"test-{p}" for p in PROJECTS} | {f"install-{p}" for p in PROJECTS} <= seen


def test_the_matrix_is_every_package_on_two_pythons_and_does_not_fail_fast():
    job = yaml.safe_load(WORKFLOW.read_text())["jobs"]["package"]
    assert sorted(job["strategy"]["matrix"]["project"]) == PROJECTS
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.12"]
    assert job["strategy"]["fail-fast"] is False


def test_the_local_ci_calls_the_same_targets():
    text = (REPO / ".ci" / "run").read_text()
    for target in ("lint", "test", "setup", "wheels"):
        assert f"make {target}" in text
    assert 'make "install-$project"' in text
    (listed,) = re.findall(r"for project in ([\w ]+); do", text)
    assert sorted(listed.split()) == PROJECTS


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "CONTRIBUTING.md"])
def test_every_make_command_and_path_in_a_document_exists(name):
    text = (REPO / name).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, flags=re.DOTALL))
    known, found = make_targets(), 0
    for words in commands(blocks):
        for target in targets_of(words):
            assert target in known, f"{name}: make has no target {target}"
            found += 1
    for script in re.findall(r"(?:packages|tools|shared)/[\w./-]+\.(?:py|md|yaml|txt)", text):
        assert (REPO / script).exists(), f"{name} names {script}"
    for link in re.findall(r"\]\(((?!https?://|#)[^)]+)\)", text):
        assert (REPO / link.split("#")[0]).exists(), f"{name} links to {link}"
    assert found, f"{name} shows no make command"


def test_help_names_every_public_target_and_the_variables():
    done = subprocess.run(["make"], cwd=REPO, capture_output=True, text=True, check=True)
    for word in (
        "setup", "install-<project>", "test", "test-<project>", "lint", "doctor", "ledger",
        "bench", "constraints", "repro", "repro-gfnet-aid", "repro-landmark-resnet12",
        "repro-visiondistill-garbage", "repro-zoo-criteria", "repro-mpkd-cifar10", "mlflow",
        "visualdl", "tensorboard", "clean",
        "PYTHON", "DATA_ROOT", "SCALE", "EXTRA", *PROJECTS,
    ):  # fmt: skip
        assert word in done.stdout, word


def test_an_unfit_python_is_one_clear_line(tmp_path):
    fake = tmp_path / "my python"
    fake.write_text("#!/bin/sh\nexec python3 -c \"import sys; sys.exit('error: too old')\"\n")
    fake.chmod(0o755)
    done = subprocess.run(
        ["make", "-B", "-n", "setup", f"PYTHON={fake}"], cwd=REPO, capture_output=True, text=True
    )
    assert f'"{fake}" -m venv' in done.stdout  # quoted: a path with a space stays one word


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_is_tested_in_the_whole_environment_or_in_its_own(project):
    def plan(*words):
        done = subprocess.run(
            ["make", "-n", f"test-{project}", *words],
            cwd=REPO, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.splitlines()

    (line,) = [line for line in plan() if "pytest -q" in line]
    assert line.split()[-1] == f"tests/{project}" and (REPO / "tests" / project).is_dir()
    assert " .venv/bin/python" in line
    own = plan("ONLY=1")
    assert f" .venv-{project}/bin/python -m pytest" in own[-1]
    others = [p for p in PROJECTS if p != project and any(f"packages/{p}" in one for one in own)]
    assert not others


def test_every_target_that_needs_the_environment_makes_it_first():
    """With no environment, each such target's plan begins by making one."""
    targets = (
        "test", "test-slow", "mutants", "wheels", "doctor", "ledger", "bench", "constraints",
        "mlflow", "visualdl", "tensorboard", "repro-gfnet-aid", "repro-landmark-swin-tiny",
        "repro-visiondistill-garbage", "repro-zoo-distill", "repro-mpkd-cifar10",
        *(f"test-{project}" for project in PROJECTS),
    )  # fmt: skip
    for target in targets:
        done = subprocess.run(
            ["make", "-n", "READY=.none/.ready", target],
            cwd=REPO, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "pip install" in done.stdout, target
        assert done.stdout.index("pip install") < done.stdout.rindex(".venv/bin/python"), target


def test_lint_takes_the_whole_environment_or_a_small_one():
    def plan(ready):
        done = subprocess.run(
            ["make", "-n", "-B", f"READY={ready}", "lint"],
            cwd=REPO, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    small = plan(".none/.ready")
    assert "requirements-lint.in" in small and "packages/" not in small
    assert ".venv-lint/bin/python -m mypy" in small


def test_another_build_of_torch_comes_first_and_from_its_own_index():
    done = subprocess.run(
        ["make", "-n", "-B", "setup", "TORCH_INDEX=https://example.org/whl/cpu"],
        cwd=REPO, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert '--no-deps --index-url "https://example.org/whl/cpu" torch torchvision' in lines[0]
    assert not any("index-url" in line for line in lines[1:])
