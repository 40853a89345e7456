"""Making candidates: by commands that may fail, be killed and be called again."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import make_facts

from compare import making
from compare.candidates import MAKERS, REPO, Maker, Place, propose
from compare.contract import DataCheck, Job, Plan, Planned, read
from compare.progress import Watch, last_line
from shared_core.deploy.facts import write_facts

CHECK = DataCheck(
    "set", "real", "/images", ("a", "b"),
    {"train": (50, 50), "calibration": (5, 5), "test": (9, 9)}, "hash", False, 128,
)  # fmt: skip


def planned(name: str, maker: str = "good", minutes: float = 1.0, teacher: str = "") -> Planned:
    return Planned(
        name, name, maker, "tiny", f"a {name}", {"input_size": 8, "batch_size": 2}, 0, minutes,
        True, "", 0, teacher,
    )  # fmt: skip


def plan_of(*candidates: Planned, minutes: float = 30.0) -> Plan:
    return Plan(minutes, 1.0, (), 1, "cpu", 1, {}, candidates)


@pytest.fixture
def makers(tmp_path, monkeypatch):
    """``good`` leaves a model folder and counts its calls, ``bad`` ends with a line and code 1."""
    ready = tmp_path / "ready"
    ready.mkdir()
    write_facts(ready, make_facts())
    script = tmp_path / "project.py"
    script.write_text(
        textwrap.dedent(f"""
        import pathlib, shutil, sys
        what, work = sys.argv[1], pathlib.Path(sys.argv[2])
        work.mkdir(parents=True, exist_ok=True)
        with (work / "calls").open("a") as file:
            file.write("x")
        print("on it\\nthe accuracy lies below the floor of trained features")
        if what == "bad":
            sys.exit("error: no memory for this")
        if what == "good":
            shutil.copytree({str(ready)!r}, work / "model")
        """)
    )

    def commands(what: str):
        return lambda place: [[str(script), what, str(place.work)]]

    for what in ("good", "bad", "empty"):
        monkeypatch.setitem(MAKERS, what, Maker("tiny", (), commands(what), "model"))

    def both(place):
        return commands("bad")(place) + commands("good")(place)

    monkeypatch.setitem(MAKERS, "twice", Maker("tiny", (), both, "model"))
    return tmp_path


def made(folder: Path, plan: Plan, *, spent: float = 0.0) -> tuple[dict[str, Job], list[str]]:
    said: list[str] = []
    jobs = making.make_all(plan, CHECK, folder, spent=lambda: spent, say=said.append)
    return {job.name: job for job in jobs}, said


def test_a_candidate_that_fails_is_told_and_the_others_are_made(makers, tmp_path):
    jobs, said = made(tmp_path, plan_of(planned("one", "bad"), planned("two"), planned("three")))
    assert [job.state for job in jobs.values()] == ["failed", "done", "done"]
    assert jobs["one"].reason == "no memory for this (exit code 1)"
    assert any("one (1 of 3): failed: no memory" in line for line in said)
    assert (tmp_path / "candidates/two/model/model.json").is_file()
    assert jobs["two"].notes == ("the accuracy lies below the floor of trained features",)
    assert "project.py good" in jobs["two"].commands[0]
    assert not (tmp_path / "candidates/one/model").exists()


def test_what_is_done_or_has_failed_is_not_made_again(makers, tmp_path):
    plan = plan_of(planned("one", "bad"), planned("two"))
    first, _ = made(tmp_path, plan)
    again, said = made(tmp_path, plan)
    assert again == first and any("done before" in line for line in said)
    for name in ("one", "two"):
        assert (tmp_path / f"candidates/{name}/work/calls").read_text() == "x"


def test_a_command_that_fails_ends_its_candidate(makers, tmp_path):
    jobs, _ = made(tmp_path, plan_of(planned("one", "twice")))
    assert jobs["one"].state == "failed"
    assert (tmp_path / "candidates/one/work/calls").read_text() == "x"  # the second never ran


def test_int8_that_was_refused_leaves_the_float_file(makers, tmp_path, monkeypatch):
    refusing = tmp_path / "refusing.py"
    refusing.write_text(makers.joinpath("project.py").read_text() + "sys.exit(1)\n")
    for name, refuses in (("one", True), ("two", False)):
        maker = Maker("tiny", (), lambda place: [[str(refusing), "good", str(place.work)]], "model",
                      refuses=refuses)  # fmt: skip
        monkeypatch.setitem(MAKERS, name, maker)
    jobs, _ = made(tmp_path, plan_of(planned("one", "one"), planned("two", "two")))
    assert [job.state for job in jobs.values()] == ["done", "failed"]


def test_commands_that_leave_no_model_folder_have_failed(makers, tmp_path):
    jobs, _ = made(tmp_path, plan_of(planned("one", "empty")))
    assert jobs["one"].state == "failed" and "left no model/model.json" in jobs["one"].reason


def test_a_student_without_its_teacher_is_skipped(makers, tmp_path):
    jobs, _ = made(tmp_path, plan_of(planned("t", "bad"), planned("s", teacher="t")))
    assert (jobs["s"].state, jobs["s"].reason) == ("skipped", "its teacher has failed")


def test_when_the_minutes_are_spent_what_is_left_is_skipped(makers, tmp_path):
    plan = plan_of(planned("one"), planned("two", minutes=3.0), minutes=10)
    jobs, _ = made(tmp_path, plan, spent=60 * 9.0)
    assert [jobs[name].state for name in ("one", "two")] == ["done", "skipped"]
    assert jobs["two"].reason == "needs 3:00, 1:00 are left"
    assert read(tmp_path / "candidates/two/job.json", Job) == jobs["two"]


def test_what_was_begun_before_a_kill_is_finished_whatever_the_clock_says(makers, tmp_path):
    plan = plan_of(planned("one"), planned("two", minutes=3.0), minutes=10)
    (tmp_path / "candidates/two/work").mkdir(parents=True)
    jobs, _ = made(tmp_path, plan, spent=60 * 11.0)
    assert [jobs[name].state for name in ("one", "two")] == ["done", "done"]


def test_a_model_folder_that_was_moved_before_a_kill_is_kept(makers, tmp_path):
    plan = plan_of(planned("one"))
    made(tmp_path, plan)
    (tmp_path / "candidates/one/job.json").unlink()  # killed between moving and writing it down
    jobs, _ = made(tmp_path, plan)
    assert jobs["one"].state == "done"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_command_dies_with_the_journey(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(
        "import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c",
         "import sys; from compare.making import run_words\n"
         f"run_words([{str(child)!r}], open({str(tmp_path / 'log')!r}, 'ab'), lambda: None)"],
        env={**os.environ, "PYTHONPATH": f"{REPO / 'tools'}{os.pathsep}{REPO / 'shared'}"},
    )  # fmt: skip
    pid = _until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert _until(lambda: not _alive(int(pid)))


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _until(what, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.02)
    return None


def test_progress_says_where_it_is_and_what_is_left(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("epoch 1\nepoch 2: 5/9\repoch 2: 6/9\n\n")
    assert last_line(log) == "epoch 2: 6/9"
    watch = Watch("lite0-128 (2 of 5)", 120.0, 60.0, log)
    assert "lite0-128 (2 of 5): 0:30 of about 2:00; about 2:30 left" in watch.text(
        30.0
    ) and "[epoch 2: 6/9]" in watch.text(30.0)
    assert "longer than expected" in watch.text(121.0) and "longer" not in watch.text(119.0)


def zoo_words(words):
    from torch_cls_zoo.config import parse

    config = parse(words)
    return {
        "data": config.data.data, "split": config.data.split, "size": config.data.image_size[0],
        "epochs": config.training.epochs, "batch": config.data.batch_size,
        "seed": config.data.seed, "threads": config.processes.threads,
        "output": config.run.output, "start": config.run.start,
    }  # fmt: skip


def garbage_words(words):
    from visiondistill_gc.config import parse

    settings = parse(words, prog="main.py")
    assert settings.data.n_splits == 1 and settings.records.compare_seeds == ()
    return {
        "data": settings.data.data_path, "split": settings.data.split,
        "size": settings.data.input_size, "epochs": settings.training.epochs,
        "batch": settings.training.batch_size, "seed": settings.run.seed,
        "threads": settings.run.threads, "output": settings.run.output,
    }  # fmt: skip


def landmark_words(words):
    from landmark_distill.options import build_parser

    args = build_parser("main.py").parse_args(words)
    return {
        "data": args.data_path, "split": args.split, "size": args.input_size,
        "epochs": args.epochs, "batch": args.batch_size, "seed": args.seed,
        "threads": args.threads, "output": args.output,
    }  # fmt: skip


def mpkd_words(words):
    from mpkd.options import build_parser

    args = build_parser().parse_args(words)
    return {
        "data": args.data_path, "split": args.split, "size": args.input_size,
        "epochs": args.epochs, "batch": args.batch_size, "seed": args.seed,
        "threads": args.threads, "output": args.output,
    }  # fmt: skip


def gfnet_words(words):
    from gfnet_dynn.options import build_parser

    args = build_parser("main.py").parse_args(words)
    return {
        "data": args.data_path, "split": args.split, "size": args.input_size,
        "epochs": args.student_epochs, "batch": args.finetune_batch, "seed": args.seed,
        "threads": args.threads, "output": args.output,
    }  # fmt: skip


PARSERS = {
    "torch_cls_zoo": zoo_words, "visiondistill_gc": garbage_words, "gfnet_dynn": gfnet_words,
    "landmark_distill": landmark_words, "mpkd": mpkd_words,
}  # fmt: skip


@pytest.mark.parametrize("one", propose(CHECK), ids=lambda one: one.name)
def test_projects_understand_the_words_that_they_are_called_with(one, tmp_path):
    settings = {**one.settings, "epochs": 3}
    candidate = Planned(
        one.name, one.name, one.maker, MAKERS[one.maker].project, one.title, settings, 5, 1.0,
        True, "", one.order, one.teacher,
    )  # fmt: skip
    place = Place(candidate, replace(CHECK, root=str(tmp_path)), tmp_path, 2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/split.json").write_text("{}")
    (tmp_path / "candidates/teacher/work/answers/knowledge/train-0123").mkdir(parents=True)
    words = MAKERS[one.maker].commands(place)
    for command in words:
        assert (REPO / command[0]).is_file()
    if one.maker == "probe":
        return
    said = PARSERS[MAKERS[one.maker].project](words[0][1:])
    expected = {
        "data": tmp_path, "split": tmp_path / "data/split.json", "size": settings["input_size"],
        "epochs": 3, "batch": settings["batch_size"], "seed": 5, "threads": 2,
        "output": place.work, "start": "continue",
    }  # fmt: skip
    assert {key: str(value) for key, value in said.items()} == {
        key: str(expected[key]) for key in said
    }
    assert "--continue" in words[0]
