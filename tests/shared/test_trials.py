"""Trials: shards, kills, changed settings, several folders; differences against scipy; the page."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from scipy import stats

from shared_core.runs import Report, UsageError, open_run
from shared_core.trials import (
    Cell,
    Trials,
    add_arms,
    add_differences,
    add_trial_options,
    check_trial_options,
    column,
    compare,
    draw_arms,
    run_cell,
    run_trials,
    shard_of,
    spread,
    verdict,
)

FORK = multiprocessing.get_context("fork")
SEEDS = (0, 1, 2)


def grid(**settings):
    """fp32, two that are made from it, and one that stands alone, for three seeds."""
    made = {"lr": 0.1, **settings}
    return [
        Cell(name, {**made, "arm": name}, seed, needs=("fp32",) if "bit" in name else ())
        for seed in SEEDS
        for name in ("fp32", "4 bits", "2 bits", "labels | T=1")
    ]


def measure(cell, place):
    """Numbers that hang on the cell alone."""
    (place / "weights.txt").write_text(cell.label)
    return {
        "accuracy": np.float64(0.5 + 0.01 * cell.seed**2 + 0.1 * (cell.name == "fp32")),
        "points": {"0.5": {"macs": np.int64(7 + cell.seed)}},
    }


def counting(calls):
    def count(cell, place):
        calls.append((cell.name, cell.seed))
        return measure(cell, place)

    return count


class TestShards:
    @pytest.mark.parametrize("count", [1, 2, 3, 5, 20])
    def test_every_cell_is_in_one_shard_and_after_what_it_needs(self, count):
        shards = [shard_of(grid(), (index + 1, count)) for index in range(count)]
        names = sorted((cell.name, cell.seed) for shard in shards for cell in shard)
        assert names == sorted((cell.name, cell.seed) for cell in grid())
        for shard in shards:
            seen = set()
            for cell in shard:
                assert {(need, cell.seed) for need in cell.needs} <= seen
                seen.add((cell.name, cell.seed))

    def test_the_work_is_shared_out(self):
        sizes = [len(shard_of(grid(), (index, 3))) for index in (1, 2, 3)]
        assert sizes == [4, 4, 4]

    def test_a_cell_that_needs_two_groups_binds_them(self):
        cells = [Cell("a", {}, 0), Cell("b", {}, 0), Cell("c", {}, 0, needs=("a", "b"))]
        assert shard_of(cells, (1, 2)) == cells and shard_of(cells, (2, 2)) == []

    @pytest.mark.parametrize("shard", [(0, 2), (3, 2)])
    def test_there_is_no_other_shard(self, shard):
        with pytest.raises(ValueError, match="expected a number from 1 to 2"):
            shard_of(grid(), shard)

    @pytest.mark.parametrize(
        ("cells", "told"),
        [
            ([Cell("a", {}, 0), Cell("a", {}, 0)], "a, seed 0 and a, seed 0 have one folder"),
            ([Cell("a b", {}, 0), Cell("a|b", {}, 0)], "have one folder"),
            ([Cell("b", {}, 1, ("a",)), Cell("a", {}, 1)], "b, seed 1 needs 'a': expected that"),
            ([Cell("a", {}, 0), Cell("b", {}, 1, ("a",))], "expected that one before it"),
        ],
    )
    def test_cells_that_cannot_be_told_apart_or_met_are_refused(self, tmp_path, cells, told):
        with pytest.raises(ValueError, match=told):
            run_trials(cells, measure, folder=tmp_path)


class TestRunning:
    def test_two_shards_together_equal_one_run(self, tmp_path):
        whole = run_trials(grid(), measure, folder=tmp_path / "one", say=str)
        first = run_trials(grid(), measure, folder=tmp_path / "two", shard=(1, 2), say=str)
        assert len(first.missing) == 6 and "6 of 12 trials are not done" in first.missing_text
        second = run_trials(grid(), measure, folder=tmp_path / "two", shard=(2, 2), say=str)
        assert second.results == whole.results and not second.missing
        for part in (1, 2):
            run_trials(grid(), measure, folder=tmp_path / f"part{part}", shard=(part, 2), say=str)
        calls = []
        merged = run_trials(
            grid(), counting(calls), folder=tmp_path / "part1", merge=[tmp_path / "part2"], say=str
        )
        assert merged.results == whole.results and calls == []

    def test_what_is_done_is_not_done_again(self, tmp_path):
        calls = []
        for _ in range(2):
            trials = run_trials(grid(), counting(calls), folder=tmp_path, say=str)
        assert calls == [(cell.name, cell.seed) for cell in grid()]
        assert trials.names == ["fp32", "4 bits", "2 bits", "labels | T=1"]
        assert trials.values("fp32", "accuracy") == [0.6, 0.61, 0.64]
        assert trials.values("2 bits", ("points", "0.5", "macs"), [2, 0]) == [9.0, 7.0]
        assert type(trials.results["fp32", 0]["accuracy"]) is float

    def test_a_killed_sweep_goes_on_within_its_cell(self, tmp_path):
        def slow(cell, place):
            state = place / "state.pth"
            if (cell.name, cell.seed) == ("2 bits", 1) and not state.exists():
                state.write_text("epoch 3")
                os.kill(os.getpid(), signal.SIGKILL)
            return {**measure(cell, place), "from": state.read_text() if state.exists() else ""}

        process = FORK.Process(target=run_trials, args=(grid(), slow), kwargs=dict(folder=tmp_path))
        process.start()
        process.join(10)
        assert process.exitcode == -signal.SIGKILL
        calls = []

        def again(cell, place):
            calls.append(cell.label)
            return slow(cell, place)

        trials = run_trials(grid(), again, folder=tmp_path, say=str)
        assert calls[0] == "2 bits, seed 1" and len(calls) == 12 - 6
        assert trials.results["2 bits", 1]["from"] == "epoch 3" and not trials.missing

    def test_a_changed_setting_is_refused(self, tmp_path):
        run_trials(grid(), measure, folder=tmp_path, shard=(1, 3), say=str)
        with pytest.raises(ValueError, match=r"fp32-s0 was made with lr=0.1, this command says 0"):
            run_trials(grid(lr=0.2), measure, folder=tmp_path, say=str)
        with pytest.raises(ValueError, match=r"wd=None, this command says 1"):
            run_trials(grid(wd=1), measure, folder=tmp_path / "b", merge=[tmp_path], say=str)
        with pytest.raises(FileNotFoundError, match="nowhere holds no cells/"):
            run_trials(grid(), measure, folder=tmp_path, merge=[tmp_path / "nowhere"], say=str)

    def test_so_is_one_of_a_cell_that_was_only_begun(self, tmp_path):
        def begun(cell, place):
            (place / "state.pth").write_text("hours of work")
            raise ValueError("stopped")

        def failed(cell, place):
            (place / "log.txt").write_text("a moment")
            raise ValueError("stopped")

        one = Cell("a", {"lr": 0.1}, 0)
        for work in (failed, begun):  # what failed in a moment leaves nothing
            with pytest.raises(ValueError, match="stopped"):
                run_cell(Cell("a", {"lr": 0.3 if work is failed else 0.1}, 0), work,
                         folder=tmp_path)  # fmt: skip
        with pytest.raises(ValueError, match="made with lr=0.1"):
            run_cell(Cell("a", {"lr": 0.2}, 0), measure, folder=tmp_path)
        assert run_cell(one, measure, folder=tmp_path)["result"]["accuracy"] == 0.5

    def test_a_merge_takes_cells_whole_or_not_at_all(self, tmp_path):
        """The files of the fp32 student stay in the other folder: what is made from it cannot be
        made here, so it is made here as well."""
        cells = [cell for cell in grid() if cell.seed == 0]
        run_trials(cells[:2], measure, folder=tmp_path / "a", say=str)
        calls = []
        run_trials(
            cells, counting(calls), folder=tmp_path / "b", merge=[tmp_path / "a"], say=str
        )  # fmt: skip
        assert ("fp32", 0) in calls and len(calls) == 4

    def test_lines_tell_the_number_and_the_time_that_is_left(self, tmp_path, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])

        def ten(cell, place):
            now[0] += 10
            return measure(cell, place)

        said = []
        cells = [cell for cell in grid() if cell.seed == 0]
        trials = run_trials(cells, ten, folder=tmp_path, show="accuracy", say=said.append)
        assert said[0] == "1/4 fp32, seed 0: 0.6000 (0:10, 0:30 left)"
        assert said[3].endswith("0.5000 (0:10, 0:00 left)")
        assert trials.seconds == 40


class TestSharedFolder:
    def hold(self, folder, cell, ready, end):
        def work(cell, place):
            ready.set()
            end.wait(10)
            return measure(cell, place)

        run_cell(cell, work, folder=folder)

    def test_a_cell_that_another_process_is_at_is_passed_over(self, tmp_path):
        cells = [cell for cell in grid() if cell.seed == 0]
        ready, end = FORK.Event(), FORK.Event()
        process = FORK.Process(target=self.hold, args=(tmp_path, cells[0], ready, end))
        process.start()
        assert ready.wait(10)
        said, calls = [], []
        trials = run_trials(cells, counting(calls), folder=tmp_path, say=said.append)
        assert calls == [("labels | T=1", 0)]
        assert "fp32, seed 0: another process is at it" in said
        assert "2 bits, seed 0: waits for a cell that another process is at" in said
        assert [cell.name for cell in trials.missing] == ["fp32", "4 bits", "2 bits"]
        end.set()
        # What all share is waited for.
        done = run_cell(cells[0], lambda c, p: pytest.fail("done twice"), folder=tmp_path)
        process.join(10)
        assert done["result"]["accuracy"] == 0.6

    def test_a_cell_may_open_a_run_of_its_own(self, tmp_path):
        def train(cell, place):
            with open_run(place, {"lr": 0.1}, keys=("lr",), start="continue") as run:
                run.stage("teach", lambda: {"accuracy": 0.5})
                return run.log.stages["teach"]

        config = {"trials": "test"}
        with open_run(tmp_path, config, keys=("trials",), start="new", shared=True) as sweep:
            trials = run_trials([Cell("a", {}, 0)], train, folder=sweep.folder, say=str)
        assert trials.values("a", "accuracy") == [0.5]


def made(**values):
    """Trials with an accuracy for each setting and seed."""
    cells = [Cell(name, {}, seed) for name, row in values.items() for seed in range(len(row))]
    results = {
        (name, seed): {"accuracy": value}
        for name, row in values.items()
        for seed, value in enumerate(row)
        if value is not None
    }
    return Trials(tuple(cells), results, 0.0)


class TestDifferences:
    def test_the_interval_is_scipys(self):
        rng = np.random.default_rng(0)
        a, b = rng.random(5), rng.random(5)
        found = compare(made(a=a, b=b), "a", "b", "accuracy")
        test = stats.ttest_rel(a, b)
        low, high = test.confidence_interval(0.95)
        assert found.interval == pytest.approx((low, high), rel=1e-12)
        assert found.mean == pytest.approx(np.mean(a - b), rel=1e-12)
        assert found.std == pytest.approx(np.std(a - b, ddof=1), rel=1e-12)
        assert found.wins == int((a > b).sum()) and found.values == pytest.approx(tuple(a - b))
        plain = found.plain()
        assert (plain["low"], plain["high"], plain["n"]) == (*found.interval, 5)
        assert json.loads(json.dumps(plain)) == plain

    def test_seeds_are_paired(self):
        found = compare(made(a=[0.1, None, 0.3], b=[None, 0.5, 0.2]), "a", "b", "accuracy")
        assert found.values == pytest.approx((0.1,)) and found.interval is None
        assert found.text == "+10.0 points (one seed)"
        with pytest.raises(ValueError, match="a and b have no seed in common"):
            compare(made(a=[0.1, None], b=[None, 0.2]), "a", "b", "accuracy")

    @pytest.mark.parametrize(
        ("a", "b", "how", "word"),
        [
            ([0.9, 0.91, 0.92], [0.5, 0.5, 0.5], {}, "holds"),
            ([0.5, 0.5, 0.5], [0.9, 0.91, 0.92], {}, "contradicted"),
            ([0.9, 0.4, 0.7], [0.5, 0.5, 0.5], {}, "not shown"),
            ([0.52, 0.521, 0.522], [0.5, 0.5, 0.5], {"least": 0.1}, "less than claimed"),
            ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], {}, "no difference"),
            ([0.9], [0.5], {}, "one seed only"),
            ([0.501, 0.5, 0.499], [0.5, 0.5, 0.5], {"equal_within": 0.02}, "holds"),
            ([0.9, 0.91, 0.92], [0.5, 0.5, 0.5], {"equal_within": 0.02}, "contradicted"),
            ([0.1, 0.11, 0.12], [0.5, 0.5, 0.5], {"equal_within": 0.02}, "contradicted"),
            ([0.9, 0.4, 0.7], [0.5, 0.5, 0.5], {"equal_within": 0.02}, "not shown"),
        ],
    )
    def test_the_words_hang_on_the_interval(self, a, b, how, word):
        assert verdict(compare(made(a=a, b=b), "a", "b", "accuracy"), **how) == word

    def test_numbers_of_rows(self):
        assert column([{"a": {"b": 1}}, {"a": {"b": 2}}], ("a", "b")) == [1.0, 2.0]
        with pytest.raises(ValueError, match="a.c: a result lacks 'c'"):
            column([{"a": {"b": 1}}], ("a", "c"))
        with pytest.raises(ValueError, match="a: a result is no finite number"):
            column([{"a": None}], "a")
        found = spread([1.0, 3.0])
        assert found == {"mean": 2.0, "std": math.sqrt(2), "n": 2, "values": [1.0, 3.0]}
        assert spread([1.0])["std"] is None


class TestPage:
    def test_it_tells_every_number(self, tmp_path):
        trials = made(a=[0.5, 0.6, 0.7], b=[0.4, 0.4, 0.4], c=[None])
        gap = compare(trials, "a", "b", "accuracy")
        report = Report("Arms")
        add_arms(report, trials, {"test accuracy": "accuracy"}, first="arm")
        add_differences(report, [gap], verdicts=[verdict(gap)])
        add_differences(report, [gap])
        text = report.write(tmp_path)[0].read_text()
        assert "| arm | test accuracy | by seed |" in text
        assert "| a | 0.6000 ± 0.1000 | 0.5000, 0.6000, 0.7000 |" in text
        assert "| c | – | not run |" in text
        low, high = (100 * end for end in gap.interval)
        shown = f"+20.0 points (95 % interval {low:+.1f} to {high:+.1f}, 3 of 3 seeds)"
        assert f"| a - b | +10.0, +20.0, +30.0 | {shown} | not shown |" in text
        assert f"| a - b | +10.0, +20.0, +30.0 | {shown} |\n" in text
        assert "contains 0 shows nothing" in text

    def test_the_plot_shows_means_and_seeds(self, tmp_path, monkeypatch):
        from matplotlib.axes import Axes

        drawn = {"barh": [], "plot": [], "axvline": []}
        for name, calls in drawn.items():
            real = getattr(Axes, name)
            monkeypatch.setattr(
                Axes, name, lambda *a, r=real, c=calls, **k: c.append(a[1:3]) or r(*a, **k)
            )
        trials = made(a=[0.5, 0.7], b=[0.25], c=[None])
        path = draw_arms(tmp_path / "a.png", trials, "accuracy", label="accuracy", floor=0.125)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert drawn["barh"] == [(0, 0.6), (1, 0.25)]
        assert drawn["plot"] == [([0.5, 0.7], [0, 0]), ([0.25], [1])]
        assert drawn["axvline"] == [(0.125,)]


class TestOptions:
    def parse(self, *words):
        parser = argparse.ArgumentParser(exit_on_error=False)
        add_trial_options(parser, seeds=(0, 1))
        parser.add_argument("--fresh", action="store_true")
        return parser.parse_args(words)

    def test_what_they_read(self):
        args = self.parse()
        assert (args.seeds, args.shard, args.merge) == ([0, 1], (1, 1), [])
        args = self.parse("--seeds", "3", "4", "--shard", "2/8", "--merge", "a", "b")
        assert (args.seeds, args.shard) == ([3, 4], (2, 8))
        assert [path.name for path in args.merge] == ["a", "b"]

    @pytest.mark.parametrize("word", ["0/2", "3/2", "1", "1/", "a/b", "1/0", "-1/2"])
    def test_a_wrong_shard_is_refused(self, word):
        with pytest.raises(argparse.ArgumentError, match="expected I/N, such as 1/4 to 4/4"):
            self.parse(f"--shard={word}")

    def test_a_part_goes_on_or_starts(self):
        assert check_trial_options(self.parse()) == "new"
        assert check_trial_options(self.parse("--shard", "1/2")) == "continue"
        assert check_trial_options(self.parse("--fresh")) == "fresh"
        with pytest.raises(UsageError, match="--fresh would delete what other parts do"):
            check_trial_options(self.parse("--fresh", "--shard", "1/2"))
        with pytest.raises(UsageError, match="--seeds 1 1: expected different numbers"):
            check_trial_options(self.parse("--seeds", "1", "1"))
