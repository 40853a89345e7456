"""Verification: every kind of damage is made by hand and must be found, and nothing else."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

import shared_core
from shared_core.datasets.builtin.sources import render_scene
from shared_core.datasets.errors import DatasetError, DatasetNotFoundError
from shared_core.datasets.finding import verify as verify_module
from shared_core.datasets.finding.quarantine import (
    load_quarantine,
    read_quarantine,
    write_quarantine,
)
from shared_core.datasets.finding.scan import scan
from shared_core.datasets.finding.verify import main, verify
from shared_core.datasets.sets import specs
from shared_core.runs.progress import progress

NAMES = (
    "tanks_grid",
    "roads_cross",
    "water_river",
    "planes_pair",
    "fields_stripes",
    "texture_forest",
)


def picture(index, size=48):
    return render_scene(NAMES[index % 6], index, size=size, seed=3, difficulty=0.2)[0]


def encoded(image, extension, *options):
    return cv2.imencode(extension, image[:, :, ::-1], list(options))[1].tobytes()


def put(root, name, data):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)


@pytest.fixture
def clean(tmp_path):
    root = tmp_path / "set"
    for i in range(6):
        put(root, f"{'ab'[i % 2]}/{i}.jpg", encoded(picture(i), ".jpg"))
    return root


def kinds(report):
    return {(p.path, p.kind) for p in report.problems}


def test_a_clean_set_is_ok_and_progress_is_shown(clean, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(verify_module, "progress", partial(progress, every=0.0))
    report = verify(scan(clean), workers=0)
    assert "verify: 6/6, 0:00 left" in capsys.readouterr().err
    assert report.ok and not report.problems and not report.duplicates
    assert report.counts == {"a": 3, "b": 3}
    assert report.sizes == {"48x48": 6}
    assert report.quarantine() == {}
    assert len(set(report.keys.values())) == 6


@pytest.mark.parametrize("extension", [".jpg", ".png", ".bmp", ".tif", ".webp"])
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.98])
def test_truncation_is_found_in_every_format(clean, extension, keep):
    data = encoded(picture(9, 64), extension)
    put(clean, f"a/whole{extension}", data)
    put(clean, f"b/cut{extension}", data[: int(len(data) * keep)])
    report = verify(scan(clean), workers=0, near=False)
    assert kinds(report) == {(f"b/cut{extension}", "truncated")}
    assert not report.ok
    assert list(report.quarantine()) == [f"b/cut{extension}"]


def test_each_kind_of_problem(clean):
    put(clean, "a/empty.jpg", b"")
    put(clean, "a/text.jpg", b"this is no picture at all")
    put(clean, "a/png_inside.jpg", encoded(picture(11), ".png"))
    put(clean, "b/png_inside.jpeg", encoded(picture(12), ".png"))
    os.symlink(clean / "nowhere", clean / "b" / "broken.jpg")
    put(clean, "cover.jpg", encoded(picture(13), ".jpg"))
    report = verify(scan(clean), workers=0)
    assert kinds(report) == {
        ("a/empty.jpg", "empty"),
        ("a/text.jpg", "not_an_image"),
        ("a/png_inside.jpg", "wrong_extension"),
        ("b/png_inside.jpeg", "wrong_extension"),
        ("b/broken.jpg", "missing"),
        ("cover.jpg", "stray"),
    }
    assert set(report.quarantine()) == {"a/empty.jpg", "a/text.jpg", "b/broken.jpg"}


def test_a_flipped_bit_inside_a_png_is_found(clean):
    data = bytearray(encoded(picture(14), ".png"))
    data[len(data) // 2] ^= 4
    put(clean, "a/bit.png", bytes(data))
    assert kinds(verify(scan(clean), workers=0)) == {("a/bit.png", "truncated")}


def test_bytes_after_the_end_of_a_jpeg_are_no_damage(clean):
    put(clean, "a/tail.jpg", encoded(picture(15), ".jpg") + b"camera maker's remarks")
    assert verify(scan(clean), workers=0).ok


def test_exact_copies_within_and_across_classes(clean):
    put(clean, "a/again.jpg", (clean / "a/0.jpg").read_bytes())
    put(clean, "b/again.jpg", (clean / "a/2.jpg").read_bytes())
    report = verify(scan(clean), workers=0)
    assert set(report.duplicates_exact) == {("a/0.jpg", "a/again.jpg"), ("a/2.jpg", "b/again.jpg")}
    assert kinds(report) == {
        ("a/again.jpg", "copy"),
        ("a/2.jpg", "copy_in_other_class"),
        ("b/again.jpg", "copy_in_other_class"),
    }
    assert report.duplicates_near == ()
    assert set(report.quarantine()) == {"a/2.jpg", "b/again.jpg"}  # which label is right?


def test_near_copies_of_many_kinds(clean):
    image = picture(0)
    put(clean, "a/quality.jpg", encoded(image, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 70))
    put(clean, "b/mirror.png", encoded(image[:, ::-1], ".png"))
    put(clean, "b/turn.png", encoded(np.rot90(image), ".png"))
    put(clean, "a/dark.png", encoded((image * 0.7).astype(np.uint8), ".png"))
    put(clean, "a/large.png", encoded(cv2.resize(image, (80, 80)), ".png"))
    put(clean, "a/exact.jpg", (clean / "a/0.jpg").read_bytes())
    report = verify(scan(clean), workers=0)
    assert report.duplicates_near == (
        ("a/0.jpg", "a/dark.png", "a/exact.jpg", "a/large.png", "a/quality.jpg", "b/mirror.png")
        + ("b/turn.png",),
    )
    assert report.ok  # near copies are for splits to keep together, not an error
    off = verify(scan(clean), workers=0, near=False)
    assert off.duplicates_near == () and not off.near_checked


def test_split_layout_leaks_and_missing_classes(tmp_path):
    for i, name in enumerate(("train/a/0.jpg", "train/b/1.jpg", "test/a/2.jpg")):
        put(tmp_path, name, encoded(picture(i), ".jpg"))
    put(tmp_path, "test/a/leak.jpg", (tmp_path / "train/a/0.jpg").read_bytes())
    report = verify(scan(tmp_path), workers=0)
    assert kinds(report) == {
        ("test/b", "class_missing"),
        ("test/a/leak.jpg", "copy_in_other_split"),
        ("train/a/0.jpg", "copy_in_other_split"),
    }
    assert report.ok


def test_spec_differences_are_facts_but_wrong_classes_an_error(clean):
    facts = ("num_classes", "num_images", "image_size")
    right = specs.DatasetSpec("x", 2, 7, 64, sources=dict.fromkeys(facts, "here"))
    report = verify(scan(clean), spec=right, workers=0)
    assert report.ok
    assert report.differences == (
        "6 images, x has 7",
        "6 of 6 images looked at are not 64 x 64 pixels as in x (most often 48 x 48: 6)",
    )
    wrong = verify(scan(clean), spec=specs.get("AID"), workers=0)
    assert not wrong.ok and kinds(wrong) == {(".", "wrong_classes")} and not wrong.quarantine()


@pytest.mark.slow
def test_processes_give_the_same_report(clean):
    put(clean, "a/cut.jpg", encoded(picture(20), ".jpg")[:400])
    for i in range(80):
        put(clean, f"b/more{i}.jpg", encoded(picture(100 + i), ".jpg"))
    alone = verify(scan(clean), workers=0)
    several = verify(scan(clean), workers=2)
    assert several == alone
    with pytest.raises(ValueError, match="workers is -1"):
        verify(scan(clean), workers=-1)


def test_report_files(clean, tmp_path):
    put(clean, "a/cut.jpg", encoded(picture(21), ".jpg")[:500])
    report = verify(scan(clean), workers=0, spec=specs.get("AID"))
    json_path, markdown_path = report.write(tmp_path / "out" / "report")
    content = json.loads(json_path.read_text())
    assert content["ok"] is False and content["counts"] == {"a": 4, "b": 3}
    assert {"path": "a/cut.jpg", "kind": "truncated"}.items() <= content["problems"][-1].items()
    page = markdown_path.read_text()
    assert "| usable as it is | no |" in page and "| a/cut.jpg |" in page and "| b | 3 |" in page
    assert "<td>a/cut.jpg</td>" in markdown_path.with_suffix(".html").read_text()
    assert "Against the facts of AID" in page
    assert report.write(tmp_path / "r.md") == (tmp_path / "r.json", tmp_path / "r.md")


def test_quarantine_round_trip_with_odd_names(tmp_path):
    reasons = {
        "a/plain name.jpg": "empty",
        "a/tab\there.jpg": "two\nlines",
        "#b/1.jpg": "",
        '"q".jpg': "x",
        "ü/ñ.jpg": "y",
        "bad\udcff.jpg": "name is no UTF-8",
    }
    write_quarantine(tmp_path / "q.txt", reasons)
    assert read_quarantine(tmp_path / "q.txt") == {**reasons, "a/tab\there.jpg": "two lines"}
    (tmp_path / "by_hand.txt").write_text("# mine\n\na/1.jpg\r\nb/2.jpg\tblurred\n")
    assert read_quarantine(tmp_path / "by_hand.txt") == {"a/1.jpg": "", "b/2.jpg": "blurred"}


@pytest.mark.parametrize("line", ["/etc/passwd\tx", "a/../../x.jpg", '"unfinished\tx'])
def test_quarantine_refuses_odd_lines(tmp_path, line):
    (tmp_path / "q.txt").write_text("a/1.jpg\tok\n" + line + "\n")
    with pytest.raises(DatasetError, match="q.txt line 2"):
        read_quarantine(tmp_path / "q.txt")


def test_quarantine_default_place(tmp_path):
    assert load_quarantine(tmp_path, None) == {}
    write_quarantine(tmp_path / "quarantine.txt", {"a/1.jpg": "empty"})
    assert load_quarantine(tmp_path, None) == {"a/1.jpg": "empty"}
    assert load_quarantine(tmp_path, {"b": "c"}) == {"b": "c"}
    with pytest.raises(DatasetNotFoundError, match="no quarantine list at"):
        load_quarantine(tmp_path, tmp_path / "no.txt")


def test_command_line(clean, tmp_path, capsys):
    assert main([str(clean), "--workers", "0"]) == 0
    assert "6 images, 2 classes, usable" in capsys.readouterr().out
    put(clean, "a/empty.jpg", b"")
    arguments = ["--workers", "0", "--no-near", "--report", str(tmp_path / "r.json")]
    assert main([str(clean), *arguments, "--quarantine", str(tmp_path / "q.txt")]) == 1
    assert "NOT usable" in capsys.readouterr().out
    assert read_quarantine(tmp_path / "q.txt") == {"a/empty.jpg": "empty: 0 bytes"}
    assert (tmp_path / "r.md").is_file()
    assert main([str(tmp_path / "no")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no dataset folder at") and error.count("\n") == 1
    assert main([str(clean), "--spec", "nope"]) == 1
    assert "unknown dataset 'nope'" in capsys.readouterr().err
    for wrong in ([], [str(clean), "--workers", "-2"], [str(clean), "--colour"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


@pytest.mark.slow
def test_module_runs_with_processes(clean):
    shared = str(Path(shared_core.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "shared_core.datasets.finding.verify", str(clean), "--workers", "2"],
        env={**os.environ, "PYTHONPATH": shared},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "6 images" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_with_the_place(clean, tmp_path, monkeypatch):
    (tmp_path / "deadly_helper.py").write_text(
        "import os\n\n\ndef die(paths, near):\n    os._exit(3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import deadly_helper

    monkeypatch.setattr(
        sys.modules["shared_core.datasets.finding.verify"], "_inspect_chunk", deadly_helper.die
    )
    with pytest.raises(DatasetError, match="a worker process died at or after .*/a/0.jpg"):
        verify(scan(clean), workers=1)


def test_summary_and_page_list_every_kind_of_finding(clean, tmp_path):
    put(clean, "a/again.jpg", (clean / "a/0.jpg").read_bytes())
    for i in range(60):
        put(clean, f"b/e{i:02d}.jpg", b"")
    report = verify(scan(clean), workers=0)
    assert "error: 60 empty (no bytes), first b/e00.jpg: 0 bytes" in report.summary()
    assert "note: 1 copy" in report.summary()
    page = report.write(tmp_path / "r.json")[1].read_text()
    assert "... 10 more in the JSON file" in page and "## Exact copies (1 groups)" in page
