"""Run records: seeds, folder, log, environment, record, progress, command line, report."""

import io
import json
import random
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest

from shared_core import runs
from shared_core.runs.progress import format_seconds

SHARED = str(Path(__file__).resolve().parents[2] / "shared")


def test_equal_seeds_give_equal_draws_and_purposes_do_not_share_a_stream():
    draws = []
    for _ in range(2):
        runs.seed_python_numpy(7)
        draws.append((random.random(), np.random.rand()))
    assert draws[0] == draws[1]
    seeds = {runs.derive_seed(7, "a"), runs.derive_seed(7, "b"), runs.derive_seed(8, "a"),
             runs.derive_seed(7, "a", 1), runs.derive_seed(7, "a1")}  # fmt: skip
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    with pytest.raises(ValueError, match=r"seed -1: expected an integer in \[0, 2\*\*32\)"):
        runs.seed_python_numpy(-1)


def test_a_derived_seed_is_the_same_in_another_process():
    code = f"import sys; sys.path.insert(0, {SHARED!r}); from shared_core import runs;"
    code += "print(runs.derive_seed(3, 'data', 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == runs.derive_seed(3, "data", 2)


class TestMetricLog:
    def test_lines_are_plain_json_and_cut_at_the_resumed_position(self, tmp_path):
        log = runs.MetricLog(tmp_path / "m.jsonl")
        assert log.position() == 0
        log.write({"loss": np.float32(0.5), "n": np.int64(3), "per_class": np.array([1.0, 2.0])})
        kept = log.position()
        log.write({"loss": float("nan")})
        assert runs.read_metrics(log.path) == [
            {"loss": 0.5, "n": 3, "per_class": [1.0, 2.0]}, {"loss": None}]  # fmt: skip
        log.cut(kept)
        assert len(runs.read_metrics(log.path)) == 1

    def test_a_line_cut_short_by_a_crash_is_left_out(self, tmp_path):
        path = tmp_path / "m.jsonl"
        path.write_text('{"a": 1}\n{"a": 2')
        assert runs.read_metrics(path) == [{"a": 1}]

    def test_a_log_that_lost_lines_is_an_error(self, tmp_path):
        log = runs.MetricLog(tmp_path / "m.jsonl")
        with pytest.raises(FileNotFoundError, match="is gone"):
            log.cut(10)
        log.write({"a": 1})
        with pytest.raises(ValueError, match="holds 9 bytes, the resumed run had written 10"):
            log.cut(10)


def test_the_environment_names_versions_and_hardware_and_nobody(tmp_path):
    found = runs.environment()
    assert found["packages"]["numpy"] == np.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    text = json.dumps(found)
    import getpass
    import socket

    for private in (socket.gethostname(), str(tmp_path)):
        assert private not in text
    assert f'"{getpass.getuser()}"' not in text


class TestRecord:
    good = dict(
        task="gfnet_dynn/aid", command="make repro-gfnet-aid", scale="short",
        data={"name": "AID", "kind": "subset", "images": 8000, "pixels": 128, "split_hash": "ab"},
        seeds=[0], measured={"student": {"accuracy": np.float64(0.5)}},
        started=datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc), wall_seconds=12.34,
    )  # fmt: skip

    def test_what_is_written_is_read_back(self, tmp_path):
        written = runs.write_result(tmp_path / "result.json", **self.good)
        assert runs.read_result(tmp_path / "result.json") == written
        assert written["measured"] == {"student": {"accuracy": 0.5}}
        assert written["started"] == "2026-01-02T03:04:05+00:00"
        assert written["wall_seconds"] == 12.3

    def test_a_record_must_say_what_it_measured_on_what(self, tmp_path):
        written = runs.write_result(tmp_path / "r.json", **self.good)
        for change, message in [
            ({"scale": None}, "scale is NoneType, expected str"),
            ({"schema": "x"}, "schema 'x', expected 'smallvision.record/1'"),
            ({"measured": {}}, "nothing was measured"),
            ({"data": {**written["data"], "kind": "toy"}}, "data kind 'toy', expected one of"),
            ({"data": {"name": "AID"}}, "data lacks 'kind'"),
            ({"data": {**written["data"], "kind": "built-in"}}, "at scale 'short' is a rehearsal"),
        ]:
            with pytest.raises(runs.RecordError, match=message):
                runs.check_record({**written, **change})
        with pytest.raises(runs.RecordError, match="lacks 'seeds'"):
            runs.check_record({k: v for k, v in written.items() if k != "seeds"})

    def test_a_file_that_is_no_record_is_one_line(self, tmp_path):
        path = tmp_path / "r.json"
        path.write_text("{")
        with pytest.raises(runs.RecordError, match="is not JSON"):
            runs.read_result(path)
        path.write_text("[]")
        with pytest.raises(runs.RecordError, match="holds list, expected an object"):
            runs.read_result(path)


class TestProgress:
    def test_a_log_gets_plain_lines_with_the_remaining_time(self):
        out = io.StringIO()
        items = list(runs.progress(iter("abcd"), total=4, label="x", every=0, stream=out))
        assert items == list("abcd")
        assert out.getvalue().splitlines()[0] == "x: 1/4, 0:00 left"
        assert "\r" not in out.getvalue()

    def test_a_terminal_gets_one_moving_line(self):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        out = Terminal()
        list(runs.progress([1, 2], total=5, done=3, label="x", every=0, stream=out))
        assert "\n" not in out.getvalue() and "x: 5/5" in out.getvalue()

    @pytest.mark.parametrize(
        ("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3700, "1:01:40"), (-3, "0:00")]
    )
    def test_times_are_readable(self, seconds, text):
        assert format_seconds(seconds) == text


class TestReport:
    def test_both_forms_say_the_same(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        report = runs.Report("Run <1>")
        report.heading("Result")
        report.note("built-in data")
        report.text("a & b")
        report.table(["exit", "accuracy"], [["final", 0.51234], ["3", None]])
        report.figure(tmp_path / "a.png", "curve")
        markdown, page = report.write(tmp_path)
        text, html = markdown.read_text(), page.read_text()
        assert "| final | 0.5123 |" in text and "| 3 | – |" in text and "![curve](a.png)" in text
        assert "Run &lt;1&gt;" in html and "a &amp; b" in html and "0.5123" in html
        assert "data:image/png;base64,iVBORw0KGgo=" in html and "http" not in html

    def test_a_ragged_table_is_refused(self):
        with pytest.raises(ValueError, match="has 1 cells, expected 2"):
            runs.Report("x").table(["a", "b"], [[1]])

    def test_a_missing_picture_is_an_error(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            runs.Report("x").figure(tmp_path / "none.png", "c")


class TestBenchmark:
    row = {"name": "a", "ours": np.float64(1.0), "theirs": 2.0, "ratio_median": 2.0, "met": True}

    def test_what_is_written_says_where_it_was_measured(self, tmp_path):
        path = tmp_path / "bench-x.json"
        written = runs.write_benchmark(path, topic="x", rows=[self.row])
        assert json.loads(path.read_text()) == written
        assert written["topic"] == "x" and written["rows"][0]["ours"] == 1.0
        assert written["environment"]["packages"]["numpy"] == np.__version__

    def test_nothing_measured_is_no_record(self, tmp_path):
        with pytest.raises(ValueError, match="benchmark x: no rows"):
            runs.write_benchmark(tmp_path / "x.json", topic="x", rows=[])
        assert not list(tmp_path.iterdir())
