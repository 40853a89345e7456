"""The benchmark runner: topics, records, the page, and what it refuses."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def _load():
    sys.path.insert(0, str(REPO / "tools"))
    spec = importlib.util.spec_from_file_location("bench_run", REPO / "tools/bench/run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bench = _load()

TOPIC = """
import argparse, json
parser = argparse.ArgumentParser()
parser.add_argument("--json")
parser.add_argument("--quick", action="store_true")
options = parser.parse_args()
record = {record}
record["rows"][0]["equal"] += " quickly" if options.quick else ""
open(options.json, "w").write(json.dumps(record))
{ending}
"""


def _row(**changes):
    row = {
        "name": "files 256 px",
        "ours": "4672 images/s",
        "theirs": "789 images/s",
        "ratio_median": 5.92,
        "ratio_min": 5.5,
        "ratio_max": 6.25,
        "goal": 6,
        "met": False,
        "skipped": None,
        "equal": "same pixels",
    }
    return row | changes


def _record(*rows, topic="loader"):
    environment = {"cpu": "a processor", "cores": 2, "python": "3.11.7", "packages": {"torch": "2"}}
    return {
        "topic": topic,
        "date": "2026-03-04",
        "environment": environment,
        "rows": list(rows) or [_row()],
    }


@pytest.fixture
def root(tmp_path):
    (tmp_path / "tools/bench").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    return tmp_path


def _topic(root, name, record=None, ending=""):
    text = TOPIC.replace("{record}", repr(record or _record())).replace("{ending}", ending)
    (root / "tools/bench" / f"{name}.py").write_text(text)


def _run(root, *arguments):
    return bench.main(["--root", str(root), *arguments])


def test_all_topics_run_and_the_page_shows_them(root, capsys):
    _topic(root, "loader")
    skipped = _row(
        name="int8 | vnni", met=None, skipped="no VNNI", ratio_median=None, ratio_min=None,
        ratio_max=None,
    )  # fmt: skip
    plain = _row(name="floor", ours=1234.56, theirs=2.5, unit="ms", goal=None, met=None)
    del plain["skipped"]
    good = _row(met=True, goal=5.5)
    _topic(root, "early_exit", _record(good, skipped, plain, topic="early exit"))
    (root / "tools/bench/_helper.py").write_text("raise SystemExit(3)")
    (root / "tools/bench/run.py").write_text("raise SystemExit(3)")
    assert _run(root, "--list") == 0 and capsys.readouterr().out == "early_exit\nloader\n"
    assert _run(root) == 0
    records = root / "docs/ledger/records"
    assert sorted(p.name for p in records.iterdir()) == [
        "bench-early-exit.json",
        "bench-loader.json",
    ]
    page = (root / "docs/benchmarks.md").read_text()
    assert (
        "| files 256 px | 4672 images/s | 789 images/s | 5.92 (5.50 to 6.25) | 6 | **no** | "
        "same pixels |" in page
    )
    assert "| 5.5 | yes | same pixels |" in page
    assert "| floor | 1235 ms | 2.5 ms | 5.92 (5.50 to 6.25) |  |  | same pixels |" in page
    assert "int8 \\| vnni" in page and "skipped: no VNNI" in page
    assert "2026-03-04, a processor, 2 cores, Python 3.11.7, torch 2" in page
    assert _run(root, "--check") == 0


def test_one_topic_with_further_options(root):
    _topic(root, "loader")
    _topic(root, "early_exit", ending="raise SystemExit(1)")
    assert _run(root, "loader", "--extra", "--quick") == 0
    assert "same pixels quickly" in (root / "docs/benchmarks.md").read_text()


def test_a_stale_page_is_noticed_and_rendered_without_running(root, capsys):
    _topic(root, "loader", ending="")
    assert _run(root) == 0
    page = root / "docs/benchmarks.md"
    page.write_text("old")
    (root / "tools/bench/loader.py").write_text("raise SystemExit(1)")
    assert _run(root, "--check") == 1 and "stale" in capsys.readouterr().err
    assert _run(root, "--render") == 0 and _run(root, "--check") == 0


@pytest.mark.parametrize(
    ("record", "ending", "words"),
    [
        (None, "raise SystemExit(3)", "exit code 3"),
        (None, "import os; os.remove(options.json)", "wrote no record"),
        (None, "open(options.json, 'w').write('{')", "Expecting"),
        (_record(_row(met=True)), "", "met is True with a ratio of 5.92 and a goal of 6"),
        (_record(_row(met=None)), "", "met is None with goal 6"),
        (_record(_row(goal=None)), "", "met is False with goal None"),
        (_record(_row(goal=5.5)), "", "met is False with a ratio of 5.92 and a goal of 5.5"),
        (_record(_row(skipped="why")), "", "met is False and skipped is 'why'"),
        (_record(_row(equal="")), "", "no equality check"),
        (_record(_row(ratio_min=7)), "", "expected rising"),
        (_record(_row(ratio_max=None)), "", "expected rising"),
        (_record(_row(), _row()), "", "occurs twice"),
        ({"topic": "x", "date": "", "environment": {}, "rows": [{"equal": ""}]}, "", "lacks"),
        ({"topic": "x", "date": "", "environment": {}, "rows": ["row"]}, "", "lacks"),
    ],
)
def test_a_failed_benchmark_keeps_the_old_record(root, capsys, record, ending, words):
    records = root / "docs/ledger/records"
    records.mkdir(parents=True)
    old = json.dumps(_record(_row(name="old")))
    (records / "bench-loader.json").write_text(old)
    if record and record["rows"] and not isinstance(record["rows"][0], dict):
        ending, record = f"open(options.json, 'w').write(json.dumps({record!r}))", None
    _topic(root, "loader", record, ending)
    assert _run(root) == 1
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1
    assert [p.read_text() for p in records.iterdir()] == [old]
    assert "old" in (root / "docs/benchmarks.md").read_text()


def test_an_unknown_topic_is_a_usage_error(root, capsys):
    _topic(root, "loader")
    assert _run(root, "lodaer") == 2
    assert "unknown benchmark 'lodaer'; known: loader" in capsys.readouterr().err


def test_without_records_the_page_says_so(root):
    assert _run(root, "--render") == 0
    assert "No benchmark was run yet." in (root / "docs/benchmarks.md").read_text()


def test_this_repositorys_records_are_sound():
    import ledger_records

    records = ledger_records.Records(REPO / "docs/ledger/records")
    assert records.problems == []
    page = REPO / "docs/benchmarks.md"
    if records.benchmarks or page.exists():
        assert page.read_text(encoding="utf-8") == bench.render(records.benchmarks)
