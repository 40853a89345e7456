"""What goes wrong says so in one line with the right exit code, and loses nothing."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path

import pytest
import torch

from command_tools import without
from shared_core.runs import read_result


def words_for_folder(tiny, output: Path, *more: str) -> list[str]:
    """A tiny run on images of a folder."""
    return without(tiny(output, *more), "--builtin-classes", "--builtin-images")


def one_line(done, code: int) -> str:
    """The error's only line; everything else fails the test."""
    assert done.code == code, (done.code, done.err, done.out)
    assert "Traceback" not in done.err
    lines = done.err.strip().splitlines()
    errors = [line for line in lines if "error: " in line]
    assert len(errors) == 1 and errors[0] == lines[-1]
    return errors[0]


def only_line(done, code: int = 1) -> str:
    line = one_line(done, code)
    others = done.err.strip().splitlines()[:-1]  # what is odd about the images, if anything
    assert line.startswith("error: ") and all(other.startswith("note: ") for other in others)
    return line


WRONG = (
    (("--no-such-flag",), "unrecognized arguments: --no-such-flag"),
    (("--lr", "fast"), "'fast': expected float"),
    (("--lr", "0"), "0: expected (0, inf)"),
    (("--use_mlflow", "maybe"), "'maybe': expected true or false"),
    (("--exits", "3;5"), "expected block numbers"),
    (("--exits", "0,3"), "--exits 0,3: expected rising block numbers from 0 to 2"),
    (("--data-set", "MNIST"), "unknown --data-set 'MNIST': expected one of AID"),
    (("--data-set", "a/b", "--data-path", "."), "expected a name that a file may bear"),
    (("--device", "abacus"), "--device 'abacus': expected auto, cpu, cuda"),
    (("--crop-scale", "0.9", "0.1"), "--crop-scale 0.9 0.1: expected 0 < low <= high"),
    (("--aa", "rand-q9"), "--aa rand-q9"),
    (("--max_warmup_epoch", "4"), "--max_warmup_epoch 4 leaves nothing of --num_epoch 4"),
    (("--fresh", "--resume"), "--resume and --fresh: expected one of them"),
    (("--gate", "identity", "--policy", "jei"), "--gate identity has none"),
    (("--backbone-arch", "gfnet-h-ti", "--no-distil"), "exits cannot sit on gfnet-h-ti"),
    (
        ("--backbone-arch", "gfnet-h-ti", "--spectrum-weight", "1"),
        "compares tokens of one grid",
    ),
    (("--backbone-arch", "gfnet-h-ti"), "expected 32 or more"),
    (("--phase2", "backbone", "--max_warmup_epoch", "0"), "expected --max_warmup_epoch of 1"),
    (("--input-size", "3"), "is less than the networks can cut into patches"),
    (("--no-distil",), "--student-dim would have no effect: --no-distil"),
    (("--aa", "rand-m9-mstd0.5-inc1", "--color-jitter", "0.4"), "--aa rand-m9"),
    (("--resolution-transfer", "spectrum"), "there is no --init or --student-init file"),
    (("--deep-kd", "2"), "--deep-kd would have no effect: --deep-supervision is 0"),
    (("--stage", "distil"), "needs the backbone stage first"),
)


def test_wrong_words(tmp_path, tiny, command):
    for words, says in WRONG:
        line = one_line(command(*tiny(tmp_path / "run", *words)), 2)
        assert says in line, (words, line)
        assert not (tmp_path / "run").exists()  # refused before any work, and nothing left


def test_flags_without_effect_are_refused_with_the_reason(tmp_path, tiny, command):
    from gfnet_dynn.options import REFUSED

    assert len(REFUSED) == 8
    for number, (flag, reason) in enumerate(REFUSED.items()):
        for entry in ("main", "main_dynn"):
            more = ["3"] if number % 2 else []  # with and without a value
            line = one_line(command(*tiny(tmp_path / "run", flag, *more), entry=entry), 2)
            assert f"{flag} had no effect in the original: {reason}" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("entry", ["main", "main_dynn"])
def test_data_set_absent_says_what_is_expected_and_where_to_get_it(tmp_path, tiny, command, entry):
    words = words_for_folder(tiny, tmp_path / "run", "--scale", "short", "--data-set", "AID")
    line = only_line(command(*words, "--data-root", tmp_path / "no data", entry=entry))
    assert "AID not found under" in line and "AID/<class>/" in line and "http" in line
    assert not (tmp_path / "run").exists()


def test_missing_files_and_folders_leave_nothing_behind(tmp_path, tiny, command):
    run, gone = tmp_path / "run", tmp_path / "gone"
    words = words_for_folder(tiny, run)
    assert "is not a folder" in only_line(command(*words, "--data-path", gone))
    for flag in ("--checkpoint-path", "--init", "--teacher", "--quarantine", "--resume"):
        assert "there is no such file" in only_line(command(*tiny(run), flag, gone))
    assert "nothing to evaluate" in only_line(command(*tiny(run, "--eval")))
    assert not run.exists()


def test_eval_of_a_run_without_a_model(tmp_path, tiny, command):
    assert command(*tiny(tmp_path / "run", "--stage", "prepare")).code == 0
    line = only_line(command(*tiny(tmp_path / "run", "--eval")))
    assert "holds no model with exits" in line and "--checkpoint-path" in line


def test_folders_that_are_no_data_set(tmp_path, tiny, command, folder_of_images):
    def said(root: Path, *more: str) -> str:
        output = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return only_line(command(*words_for_folder(tiny, output), "--data-path", root, *more))

    one = folder_of_images(tmp_path / "one", ("lonely",), images=5)
    assert "has one class, 'lonely'" in said(one)
    empty = folder_of_images(tmp_path / "empty", images=5)
    (empty / "void").mkdir()
    assert "holds no image" in said(empty) and "void" in said(empty)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert "<class>/*.jpg" in said(nothing)
    few = folder_of_images(tmp_path / "few", images=5)
    assert "training images make no batch of 16" in said(few)
    assert "has 3 classes, --num_classes says 30" in said(few, "--num_classes", "30")
    assert "3 class folders, UCM has 21" in said(few, "--data-set", "UCM")
    split = tmp_path / "split"
    folder_of_images(split / "train", images=5)
    assert said(split)  # only a train folder


def test_broken_images_are_left_out_and_listed(
    tmp_path, tiny, command, folder_of_images, no_figures
):
    root = folder_of_images(tmp_path / "set")
    (root / "a/000.png").write_bytes(b"this is no picture")  # the first file of all
    whole = (root / "b/003.png").read_bytes()
    (root / "b/003.png").write_bytes(whole[: len(whole) // 2])
    (root / "c/005.png").write_bytes(b"")
    done = command(*words_for_folder(tiny, tmp_path / "run"), "--data-path", root)
    assert done.code == 0, done.err
    assert "left out 3 files (" in done.err
    listed = (tmp_path / "run/quarantine.txt").read_text()
    for name in ("a/000.png", "b/003.png", "c/005.png"):
        assert f"{name}\t" in listed
    assert listed.count("\n") == 4
    assert "left out: 3 files" in done.out
    assert read_result(tmp_path / "run/result.json")["data"]["images"] == 117
    assert "117 images" in done.out.splitlines()[0]


@pytest.mark.parametrize("where", ["flag", "folder"])
def test_quarantine_lists_are_honoured(tmp_path, tiny, command, folder_of_images, where):
    root = folder_of_images(tmp_path / "set")
    place = (root if where == "folder" else tmp_path) / "quarantine.txt"
    place.write_text("a/001.png\tblurred\n")
    words = words_for_folder(tiny, tmp_path / "run", "--stage", "prepare")
    more = ("--quarantine", place) if where == "flag" else ()
    done = command(*words, "--data-path", root, *more)
    assert done.code == 0 and "119 images" in done.out
    assert "a/001.png\tblurred" in (tmp_path / "run/quarantine.txt").read_text()


class Hostile:
    """Unpickling it would make a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self):
        return (os.mkdir, (str(self.place),))


@pytest.mark.parametrize("kind", ["hostile", "pickle", "garbage", "empty", "truncated"])
def test_hostile_and_damaged_checkpoints(tmp_path, tiny_on_file, command, finished, kind):
    folder, trap, path = finished[0], tmp_path / "trap", tmp_path / "model.pth"
    student = (folder / "checkpoint/student_built-in-scenes.pth").read_bytes()
    if kind == "hostile":
        torch.save({"model": Hostile(trap), "facts": "{}"}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Hostile(trap)))
    else:
        content = {"garbage": b"x" * 999, "empty": b"", "truncated": student[: len(student) // 2]}
        path.write_bytes(content[kind])
    for number, words in enumerate(
        (("--checkpoint-path",), ("--eval", "--checkpoint-path"), ("--pretrained",))
    ):
        run = tmp_path / f"run{number}"
        assert str(path) in only_line(command(*tiny_on_file(run, *words, str(path))))
        assert not trap.exists()


def test_checkpoint_of_other_kind_classes_or_size(
    tmp_path, tiny_on_file, command, finished, folder_of_images
):
    folder, _ = finished
    best = str(next((folder / "checkpoint/best").glob("*.pth")))
    student = str(folder / "checkpoint/student_built-in-scenes.pth")
    assert "GFNet" in only_line(command(*tiny_on_file(tmp_path / "1", "--checkpoint-path", best)))
    assert "GFNet" in only_line(
        command(*tiny_on_file(tmp_path / "2", "--eval", "--resume", student))
    )
    size = command(
        *tiny_on_file(tmp_path / "3", "--checkpoint-path", student, "--input-size", "20")
    )
    assert "takes images of 16 pixels" in only_line(size)
    size = command(*tiny_on_file(tmp_path / "4", "--eval", "--resume", best, "--input-size", "20"))
    assert "16" in only_line(size)
    root = folder_of_images(tmp_path / "set", ("x", "y"))
    for number, words in enumerate(
        (("--checkpoint-path", student), ("--eval", "--checkpoint-path", best))
    ):
        words = words_for_folder(tiny_on_file, tmp_path / f"5{number}", *words)
        assert "classes" in only_line(command(*words, "--data-path", root))


def test_loss_that_is_not_finite(tmp_path, tiny, command):
    words = tiny(tmp_path / "run", "--backbone-lr", "1e30", "--clip-grad", "0")
    line = only_line(command(*words))
    assert "backbone: the loss is not finite at step" in line and "learning rate" in line


@pytest.mark.slow
def test_full_disk(tmp_path, server, tiny, finished, digests, without_times):
    """A small disk fills up in the middle; after making room the run ends as if it had not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", disk], capture_output=True
        ).returncode
    )
    try:
        folder, said = disk / "run", tmp_path / "said.txt"
        ballast = disk / "ballast"
        words = tiny(folder)
        assert server.run([*words, "--stage", "prepare"], out=said) == 0
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        if mounted:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            ballast.write_bytes(bytes(max(0, free - 40_000)))
        limit = 0 if mounted else 30_000
        code = server.run([*words, "--resume"], out=said, file_limit=limit)
        text = said.read_text()
        assert code == 1 and "Traceback" not in text
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert any(why in errors[0] for why in ("No space left", "too large", "could not"))
        for path, content in before.items():
            assert path.read_bytes() == content
        if mounted:
            ballast.unlink()
            subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        assert server.run([*words, "--resume"], out=said) == 0, said.read_text()
        theirs = finished[0]
        assert (folder / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
        assert digests(folder) == digests(theirs)
        records = [read_result(path / "result.json")["measured"] for path in (folder, theirs)]
        assert without_times(records[0]) == without_times(records[1])
    finally:
        if mounted:
            subprocess.run(["umount", disk], check=True)


def test_output_that_cannot_be_a_folder(tmp_path, tiny, command):
    (tmp_path / "file").write_text("mine")
    only_line(command(*tiny(tmp_path / "file")))
    only_line(command(*tiny(tmp_path / "file", "--fresh")))
    assert (tmp_path / "file").read_text() == "mine"


def test_help_names_every_option(command):
    done = command("--help")
    assert done.code == 0
    for flag in ("--data_set", "--img_size", "--split-ratio", "-r", "--ce_ic_tradeoff", "--exits"):
        assert flag in done.out
    assert "--proj_dim" not in done.out
