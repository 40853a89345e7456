"""Opening a run: who may work in it, what a resumed one must say, what a failed one leaves."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import signal
import threading
import time
from dataclasses import dataclass

import pytest

from shared_core.runs import StageLog, UsageError, open_run, read_metrics
from shared_core.runs.clock import RunClock

KEYS = ("lr", "scale")
FORK = multiprocessing.get_context("fork")


def opened(folder, start="new", *, keys=KEYS, lr=0.1, **more):
    """A run's configuration with what a test changes."""
    config = {"lr": lr, "scale": "short", "threads": None, **more.pop("config", {})}
    return open_run(folder, config, keys=keys, start=start, usual={"threads": 2}, **more)


def tree(folder):
    """Every file below a folder with its bytes."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def finished(tmp_path):
    """A run with one stage done and a checkpoint."""
    with opened(tmp_path / "run") as run:
        run.stage("teach", lambda: {"accuracy": 0.5})
        (run.folder / "best.pth").write_bytes(b"hours of work")
    return tmp_path / "run"


class Held:
    """Another process that holds a run open until the block ends."""

    def __init__(self, folder, **how):
        self.ready, self.end = FORK.Event(), FORK.Event()
        self.process = FORK.Process(target=self._hold, args=(folder, how))

    def _hold(self, folder, how):
        with opened(folder, "continue", **how):
            self.ready.set()
            self.end.wait(20)

    def __enter__(self):
        self.process.start()
        assert self.ready.wait(10)
        return self.process.pid

    def __exit__(self, *_):
        self.end.set()
        self.process.join(10)


@pytest.mark.parametrize("start", ["new", "resume", "continue", "fresh"])
def test_a_second_process_is_refused_whatever_it_wants(finished, start):
    with Held(finished) as pid:
        before = tree(finished)
        with pytest.raises(ValueError, match=f"run is in use by process {pid}: expected it to end"):
            opened(finished, start).__enter__()
        assert tree(finished) == before
    with opened(finished, "resume") as run:
        assert run.resumed


def test_the_lock_is_held_to_the_end_and_a_killed_one_is_taken_over(tmp_path):
    folder = tmp_path / "run"

    def die():
        with opened(folder) as run:
            run.log.write("teach", "train", 0, {"loss": 1.0})
            os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=die)
    process.start()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    assert {"config.json", ".lock", "metrics.jsonl"} <= tree(folder).keys()  # a kill undoes nothing
    with opened(folder, "resume") as run:
        assert run.resumed and (folder / ".lock").exists()
    assert not (folder / ".lock").exists()


class TestStarting:
    def test_new_writes_the_configuration_and_refuses_a_run(self, tmp_path):
        with opened(tmp_path / "a" / "run") as run:
            assert (run.config, run.stored, run.resumed) == (
                {"lr": 0.1, "scale": "short", "threads": 2}, {}, False)  # fmt: skip
            run.stage("teach", dict)
        assert json.loads((tmp_path / "a/run/config.json").read_text()) == run.config
        with pytest.raises(FileExistsError, match="already holds a run: add --resume .* --fresh"):
            opened(tmp_path / "a" / "run").__enter__()

    def test_resume_needs_a_run_and_makes_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing to resume: .* holds no run"):
            opened(tmp_path / "a" / "run", "resume").__enter__()
        assert not list(tmp_path.iterdir())

    def test_continue_starts_or_goes_on(self, tmp_path):
        for resumed in (False, True):
            with opened(tmp_path, "continue") as run:
                assert run.resumed is resumed
                run.stage("teach", dict)

    def test_fresh_removes_a_run_and_keeps_the_folder_locked(self, finished):
        with opened(finished, "fresh", lr=0.2) as run:
            assert not run.resumed and run.log.done("teach") is None
            assert tree(finished).keys() == {"config.json", ".lock", ".clock.json"}
            assert json.loads((finished / "config.json").read_text())["lr"] == 0.2
            with pytest.raises(ValueError, match="in use"):
                opened(finished, "fresh").__enter__()

    @pytest.mark.parametrize("left", ["photo.jpg", "config.json"])
    def test_fresh_removes_nothing_that_is_no_run_of_this_command(self, tmp_path, left):
        (tmp_path / left).write_text('{"lr": 0.1, "folds": 5}')
        with pytest.raises(UsageError, match="holds no run, expected one to replace; nothing del"):
            opened(tmp_path, "fresh").__enter__()
        assert tree(tmp_path).keys() == {left}

    def test_fresh_that_was_killed_at_removing_is_finished_first(self, finished):
        os.replace(finished / "config.json", finished / ".fresh")  # what it does first
        with opened(finished) as run:
            assert not run.resumed
            assert tree(finished).keys() == {"config.json", ".lock", ".clock.json"}

    def test_a_run_of_another_command_is_not_gone_on_with(self, finished):
        with pytest.raises(ValueError, match="is of another command, expected folds in it"):
            opened(finished, "continue", keys=("folds",)).__enter__()

    def test_a_damaged_configuration_is_one_line(self, finished):
        (finished / "config.json").write_text("{")
        with pytest.raises(ValueError, match="config.json .*another command"):
            opened(finished, "resume").__enter__()


class TestComparing:
    def test_the_first_difference_is_named(self, finished):
        with pytest.raises(ValueError, match="started with lr=0.1, this command says 0.2"):
            opened(finished, "resume", lr=0.2).__enter__()
        with pytest.raises(ValueError, match="wd=None, this command says 1"):
            opened(finished, "resume", config={"wd": 1}).__enter__()

    def test_what_may_differ_is_this_commands(self, finished):
        with opened(finished, "resume", lr=0.2, may_differ=("lr",)) as run:
            assert run.config["lr"] == 0.2 and run.stored["lr"] == 0.1

    def test_what_the_command_does_not_say_is_kept(self, tmp_path):
        for asked, threads in ((3, 3), (None, 3), (3, 3)):
            with opened(tmp_path, "continue", config={"threads": asked}) as run:
                assert run.config["threads"] == threads
                run.stage("teach", dict)
        with pytest.raises(ValueError, match="threads=3, this command says 4"):
            opened(tmp_path, "continue", config={"threads": 4}).__enter__()

    def test_paths_and_tuples_survive_the_round_trip(self, tmp_path):
        config = {"data": tmp_path / "images", "exits": (3, 5)}
        for _ in range(2):
            with opened(tmp_path / "run", "continue", config=config) as run:
                assert run.config["data"] == str(tmp_path / "images")
                run.stage("teach", dict)


class TestFailing:
    def fail(self, folder, *, leave=(), stages=(), start="new", error=ValueError):
        with pytest.raises(error):
            with opened(folder, start) as run:
                for name in leave:
                    path = run.folder / name
                    path.parent.mkdir(exist_ok=True)
                    path.write_text("x")
                for stage in stages:
                    run.stage(stage, dict)
                raise error("the loss is not finite")

    def test_a_first_run_leaves_nothing_that_blocks_the_next(self, tmp_path):
        folder = tmp_path / "runs" / "a"
        self.fail(folder, leave=("split.json", "logs/a.log"), stages=("prepare",))
        assert not list(tmp_path.iterdir())
        with opened(folder, lr=0.2) as run:
            assert not run.resumed

    def test_what_was_there_before_stays(self, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        self.fail(tmp_path, leave=("split.json",))
        assert tree(tmp_path) == {"notes.txt": b"mine"}

    @pytest.mark.parametrize(
        ("leave", "stages"),
        [
            (("state/a.pth",), ()),
            (("best.pdparams",), ()),
            ((), ("teach",)),
            (("checkpoint.pth.tar",), ()),
        ],
    )
    def test_what_took_long_stays_and_is_resumed(self, tmp_path, leave, stages):
        self.fail(tmp_path, leave=leave, stages=stages)
        with opened(tmp_path, "resume") as run:
            assert run.log.stages.keys() == set(stages)
            assert all((tmp_path / name).exists() for name in leave)

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_a_stop_by_the_user_is_no_failure(self, tmp_path, error):
        self.fail(tmp_path, error=error)
        with opened(tmp_path, "resume") as run:
            assert run.resumed

    def test_a_resumed_run_that_fails_stays(self, finished):
        before = tree(finished).keys()
        self.fail(finished, start="resume")
        assert tree(finished).keys() == before

    def test_a_run_that_failed_anew_leaves_the_empty_folder(self, finished):
        self.fail(finished, start="fresh")
        assert not list(finished.iterdir())


class TestStages:
    def test_a_stage_is_done_once(self, tmp_path, capsys):
        calls = []

        def work():
            calls.append(1)
            return {"accuracy": 0.5}

        for start in ("new", "resume"):
            with opened(tmp_path / "run", start) as run:
                done = run.stage("teach", work)
                assert done["accuracy"] == 0.5 and done["seconds"] >= 0
        assert calls == [1]
        assert "--- teach" in capsys.readouterr().out
        with opened(tmp_path / "run", "resume") as run:
            run.stage("teach", work)
        assert capsys.readouterr().out == "teach: done before\n"

    def test_the_states_file_decides_whether_lines_of_a_killed_try_stay(self, tmp_path):
        for saved in (False, True):
            folder = tmp_path / str(saved)
            state = folder / "state" / "learn.pth"
            with opened(folder) as run:
                run.stage("teach", dict)
            StageLog(folder).write("learn", "train", 0, {"loss": 1.0})  # by a killed try
            if saved:
                state.parent.mkdir()
                state.write_text("x")
            with opened(folder, "resume") as run:
                run.stage("learn", lambda: {"seconds": 7.5}, state=state)
                assert run.log.done("learn")["seconds"] == 7.5  # the work's own comes first
            assert len(read_metrics(folder / "metrics.jsonl")) == saved
            assert not state.exists()


def test_wall_time_survives_kills_and_resumes(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = RunClock(tmp_path)
    now[0] += 50
    clock.mark()  # killed afterwards
    now[0] += 1000
    again = RunClock(tmp_path)
    assert again.started == clock.started and again.seconds == 50
    now[0] += 7
    again.mark(every=0)
    assert RunClock(tmp_path, writes=False).seconds == 57

    with opened(tmp_path / "run") as run:
        run.stage("teach", dict)
        now[0] += 30
        run.log.write("teach", "train", 0, {"loss": 1.0})  # every write marks the time
        kept = json.loads((tmp_path / "run" / ".clock.json").read_text())
        assert kept["seconds"] == 30
        now[0] += 4
    with opened(tmp_path / "run", "resume") as run:
        now[0] += 6
        assert run.seconds == 40


@dataclass(frozen=True)
class Process:
    """What a framework's World says."""

    rank: int
    world_size: int = 2

    @property
    def is_main(self):
        return self.rank == 0


class TestSeveralProcesses:
    def both(self, folder, body, *, start="new"):
        """Two threads in the place of two processes: the main one's answers reach the other."""
        told, found = queue.Queue(), {}

        def main_writes(write, world):
            if not world.is_main:
                error, answer = told.get(timeout=10)
                if error is not None:
                    raise RuntimeError(f"the main process failed: {error}")
                return answer
            try:
                answer = write()
            except Exception as error:
                told.put((error, None))
                raise
            told.put((None, answer))
            return answer

        def one(rank):
            try:
                with opened(folder, start, world=Process(rank), main_writes=main_writes) as run:
                    found[rank] = body(run)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return found

    def test_the_main_one_opens_and_the_other_is_silent(self, finished, capsys):
        def body(run):
            run.stage("teach", lambda: pytest.fail("done before"))
            run.log.say(f"main: {run.is_main}")

            def work():
                run.log.write("learn", "train", 0, {"main": run.is_main})
                return {"main": run.is_main}

            assert run.stage("learn", work)["main"] and run.log.stages["learn"]["main"]
            return run.config, run.resumed, sorted(run.log.stages)

        found = self.both(finished, body, start="resume")
        assert found[0] == found[1]
        assert found[0][1:] == (True, ["learn", "teach"])
        said = capsys.readouterr().out
        assert "main: True" in said and "main: False" not in said and said.count("--- learn") == 1
        assert [line["main"] for line in read_metrics(finished / "metrics.jsonl")] == [True]

    def test_both_hear_that_there_is_nothing_to_resume(self, tmp_path):
        found = self.both(tmp_path / "run", lambda run: None, start="resume")
        assert isinstance(found[0], FileNotFoundError)
        assert str(found[1]).startswith("the main process failed: nothing to resume")

    def test_it_needs_the_frameworks_words(self, tmp_path):
        with pytest.raises(TypeError, match="main_writes"):
            opened(tmp_path, world=Process(0)).__enter__()


class TestSharing:
    def test_commands_may_share_a_folder_and_nobody_removes_it(self, tmp_path):
        folder = tmp_path / "sweep"
        with Held(folder, shared=True) as pid:
            began = json.loads((folder / ".clock.json").read_text())
            with opened(folder, "continue", shared=True) as run:
                assert run.resumed and run.config["threads"] == 2
                assert run.started.isoformat() == began["started"] and began["seconds"] == 0
                with pytest.raises(TypeError, match="a shared run has cells"):
                    run.stage("teach", dict)
            with pytest.raises(ValueError, match="started with lr=0.1"):
                opened(folder, "continue", lr=0.2, shared=True).__enter__()
            for start, shared in (("fresh", True), ("continue", False)):
                with pytest.raises(ValueError, match="in use by process"):
                    opened(folder, start, shared=shared).__enter__()
            assert pid and (folder / "config.json").exists() and (folder / ".lock").exists()
        assert not (folder / ".lock").exists()
        with opened(folder, "fresh", lr=0.2, shared=True) as run:
            assert run.config["lr"] == 0.2

    def test_what_is_for_all_is_made_once(self, tmp_path):
        def prepare():
            with opened(tmp_path, "continue", shared=True) as run, run.one_at_a_time():
                made = tmp_path / "scenes.txt"
                if not made.exists():
                    made.write_text("half")
                    time.sleep(0.1)
                    made.write_text("whole")
                os._exit(0 if made.read_text() == "whole" else 1)

        processes = [FORK.Process(target=prepare) for _ in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(10)
        assert [process.exitcode for process in processes] == [0, 0, 0]

    def test_one_that_fails_takes_nothing_from_the_others(self, tmp_path):
        folder = tmp_path / "sweep"
        with pytest.raises(ValueError, match="bad"):
            with opened(folder, shared=True):
                with Held(folder, shared=True):
                    raise ValueError("bad")
        assert not folder.exists()  # the other one had ended by then
        held = Held(folder, shared=True)
        with pytest.raises(ValueError, match="bad"):
            with opened(folder, shared=True):
                held.__enter__()
                raise ValueError("bad")
        assert (folder / "config.json").exists()
        held.__exit__()


def test_a_log_of_ones_own_hears_which_process_it_is_in(tmp_path):
    class Own(StageLog):
        pass

    with opened(tmp_path, make_log=Own) as run:
        assert isinstance(run.log, Own) and not run.log.silent
