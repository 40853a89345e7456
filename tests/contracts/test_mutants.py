"""The rows of mutants.yaml fit the code; the tool tells a fault that dies from one that lives."""

import subprocess

import pytest
import yaml

import mutants


def test_every_row_fits_the_code():
    rows = mutants.read_rows()
    assert rows
    assert len({(row["file"], row["before"], row["after"]) for row in rows}) == len(rows)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of one function and two tests, of which one looks at it."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "code.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "tests/test_code.py").write_text(
        "import sys, pathlib\n"
        "sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))\n"
        "from code import double\n"
        "def test_it():\n    assert double(3) == 6\n"
        "def test_nothing():\n    assert double\n"
    )
    (tmp_path / "code.py").rename(tmp_path / "doubling.py")
    test = tmp_path / "tests/test_code.py"
    test.write_text(test.read_text().replace("from code", "from doubling"))
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(mutants, "REPO", tmp_path)
    return tmp_path


def row(**changes):
    return {
        "file": "doubling.py",
        "why": "it doubled nothing",
        "before": "    return 2 * x",
        "after": "    return x",
        "tests": ["tests/test_code.py::test_it"],
    } | changes


def write(repository, *rows):
    path = repository / "rows.yaml"
    path.write_text(yaml.safe_dump(list(rows)))
    return ["--rows", str(path), "--jobs", "1"]


def test_a_fault_that_a_test_sees_dies_and_the_file_is_as_it_was(repository, capsys):
    assert mutants.main(write(repository, row())) == 0
    assert "dies  doubling.py: it doubled nothing (1 failed" in capsys.readouterr().out
    assert "2 * x" in (repository / "doubling.py").read_text()


@pytest.mark.parametrize("test", ["test_nothing", "test_gone"])
def test_a_fault_that_no_test_sees_lives(repository, capsys, test):
    assert mutants.main(write(repository, row(tests=[f"tests/test_code.py::{test}"]))) == 1
    out = capsys.readouterr().out
    assert out.startswith("LIVES doubling.py") and "0 of 1 rows die" in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"before": "    return 3 * x"}, "is there 0 times"),
        ({"after": "    return 2 * x"}, "expected once"),
        ({"tests": ["tests/test_gone.py"]}, "there is no tests/test_gone.py"),
        ({"tests": []}, "expected"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(repository, change, words):
    with pytest.raises(ValueError, match=words):
        mutants.main(write(repository, row(**change)))


def test_a_word_chooses_rows(repository, capsys):
    rows = write(repository, row(), row(why="another reason", after="    return 0"))
    assert mutants.main([*rows, "--only", "another"]) == 0
    assert "1 of 1 rows die" in capsys.readouterr().out
