"""``smallvision verify`` on a deliberately awful folder: every file is counted by its fate."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shared_core
from shared_core import smallvision
from shared_core.datasets.finding import look_cache
from shared_core.datasets.finding import verify as verify_module
from shared_core.datasets.finding.prepare import prepare
from shared_core.datasets.finding.scan import scan
from shared_core.datasets.finding.verify import verify
from shared_core.datasets.splitting.prepared import prepare_data

LINUX = sys.platform == "linux"


def encoded(seed, kind="JPEG", size=(32, 40), **options):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def put(root, name, data):
    path = Path(os.fsdecode(os.fsencode(root) + b"/" + os.fsencode(name)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def awful(tmp_path):
    """A folder as people have them; the second value is what must become of its files."""
    root = tmp_path / "awful <b>&|"
    for n in range(12):
        put(root, f"train/{'ab'[n % 2]}/{n}.jpg", encoded(n))
    for n in range(6):
        put(root, f"Test_Set/{'ab'[n % 2]}/{n}.jpg", encoded(100 + n))
    used = 18
    put(root, "train/a/dup.jpg", encoded(0))
    put(root, "train/b/leak.jpg", encoded(101))  # Test_Set/b/1.jpg, which is one, too
    put(root, "train/a/both.jpg", encoded(500))
    put(root, "train/b/both.jpg", encoded(500))
    bad = {
        "empty.jpg": b"", "text.jpg": b"hello", "cut.jpg": encoded(7)[:400],
        "lie.jpg": encoded(8).replace(b"\xff\xc0\x00\x11\x08\x00\x28\x00\x20",
                                      b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff"),
        "many.tif": encoded(9, "TIFF").replace(b"\x15\x01\x03\x00\x01\x00\x00\x00\x03",
                                               b"\x15\x01\x03\x00\x01\x00\x00\x00\x0d"),
    }  # fmt: skip
    for name, data in bad.items():
        put(root, f"train/a/{name}", data)
    unreadable = len(bad)
    if LINUX:
        os.symlink("/nowhere", root / "train/a/link.jpg")
        os.symlink("/dev/zero", root / "train/a/zero.jpg")
        os.mkfifo(root / "train/a/pipe.jpg")
        unreadable += 3
        put(root, b"train/a/caf\xe9<i>|.jpg", encoded(40))
        used += 1
    put(root, "train/a/png.jpg", encoded(41, "PNG"))
    put(root, "train/a/line\nbreak|.gif", encoded(42, "GIF"))
    (root / "train/a/folder.jpg").mkdir()
    put(root, "train/a/folder.jpg/deep.jpg", encoded(43))
    dim = io.BytesIO()
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40)).save(dim, "PNG")
    put(root, "train/a/dim.png", dim.getvalue())
    used += 4
    for name in ("1.heic", "2.heic", "readme.txt", "no_ending"):
        put(root, f"train/a/{name}", b"x")
    put(root, "unlabeled/1.jpg", encoded(60))
    put(root, "train/a/@eaDir/1.jpg", encoded(61))
    put(root, "train/a/._1.jpg", b"x")
    put(root, "train/b/listed.jpg", encoded(70))
    put(root, "quarantine.txt", b"\xef\xbb\xbftrain\\b\\listed.jpg\tblurred\r\n")
    return root, {
        "used": used - 1, "duplicate": 1, "leak": 2, "unreadable": unreadable, "quarantined": 3,
        "stray": 1, "ignored": 4,
    }  # fmt: skip


def test_every_file_of_an_awful_folder_is_counted_by_what_became_of_it(awful, tmp_path, capsys):
    root, want = awful
    code = smallvision.main(
        ["verify", str(root), "--workers", "0", "--report", str(tmp_path / "check.json")]
    )
    out = capsys.readouterr().out
    assert code == 1 and "NOT usable" in out and "2 .heic" in out
    said = json.loads((tmp_path / "check.json").read_text())
    assert said["files"] == want
    visible = [
        p for p in root.rglob("*")
        if not p.is_dir() and not p.name.startswith(".") and "@eaDir" not in p.parts
        and p.name != "quarantine.txt"  # ours
    ]  # fmt: skip
    assert sum(said["files"].values()) == len(visible)
    assert said["became"]["train/b/listed.jpg"] == "quarantined"
    kinds = {(p["path"].split("/")[-1], p["kind"]) for p in said["problems"]}
    assert {("lie.jpg", "unsupported"), ("many.tif", "unsupported"), ("dim.png", "dim")} <= kinds
    if LINUX:
        assert {("zero.jpg", "not_a_file"), ("pipe.jpg", "not_a_file")} <= kinds
    page, text = (tmp_path / f"check.{ending}" for ending in ("html", "md"))
    html = page.read_text(encoding="utf-8")
    assert "<i>" not in html and "<b>" not in html and "awful &lt;b&gt;&amp;|" in html
    if LINUX:
        assert "caf\\xe9&lt;i&gt;|.jpg" in html or "caf\\xe9" not in str(kinds)
    width = 0
    for line in text.read_text(encoding="utf-8").splitlines():
        bars = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert bars == width or not (bars and width)  # a name does not break a row
        width = bars


def test_training_on_it_says_the_same_in_the_record(awful, tmp_path, capsys):
    root, want = awful
    data = prepare_data(tmp_path / "run", root=root)
    notes = " | ".join(data.facts(32)["notes"])
    for name in ("duplicate", "leak", "unreadable", "quarantined"):
        assert f"{want[name]} {name}" in notes
    assert "2 .heic" in notes and "--scale-max 2047" in notes and "unlabeled" in notes
    assert "train/b/listed.jpg" in data.manifest.quarantined
    assert capsys.readouterr().err.count("note: ") == len(data.notes)


# -- looks that are kept -----------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALLVISION_CACHE", str(tmp_path / "cache"))
    for n in range(6):
        put(tmp_path / "set", f"{'ab'[n % 2]}/{n}.jpg", encoded(n))
    put(tmp_path / "set", "a/cut.jpg", encoded(20)[:300])
    return tmp_path / "set"


@pytest.fixture
def looked(monkeypatch):
    """The files that are read."""
    seen = []
    real = verify_module.inspect_file

    def spy(path, *, near=True):
        seen.append(path.name)
        return real(path, near=near)

    monkeypatch.setattr(verify_module, "inspect_file", spy)
    return seen


def test_what_was_looked_at_is_not_read_again(small, looked, monkeypatch):
    first = verify(scan(small), workers=0)
    assert len(looked) == 7
    assert verify(scan(small), workers=0) == first and len(looked) == 7
    put(small, "a/new.jpg", encoded(30))
    put(small, "b/1.jpg", encoded(31))  # another content, and time
    again = verify(scan(small), workers=0)
    assert sorted(looked[7:]) == ["1.jpg", "new.jpg"]
    assert again == verify(scan(small), workers=0, cache=False) and len(looked) == 9 + 8
    monkeypatch.setattr(look_cache, "VERSION", look_cache.VERSION + 1)
    verify(scan(small), workers=0)
    assert len(looked) == 9 + 8 + 8


def test_a_look_without_near_copies_is_made_again_with_them(small, looked):
    verify(scan(small), workers=0, near=False)
    full = verify(scan(small), workers=0)
    assert len(looked) == 7 + 6  # the damaged one has no picture in either
    assert full == verify(scan(small), workers=0, cache=False)


def test_the_option_reads_every_file(small, looked):
    for extra, number in (([], 7), ([], 7), (["--no-cache"], 14)):
        smallvision.main(["verify", str(small), "--workers", "0", *extra])
        assert len(looked) == number


@pytest.mark.parametrize("trouble", ["no home", "off", "a file in the way", "damaged"])
def test_no_cache_is_no_error(small, looked, tmp_path, monkeypatch, trouble):
    cache = tmp_path / "cache"
    if trouble == "no home":
        for name in ("SMALLVISION_CACHE", "XDG_CACHE_HOME", "HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        assert look_cache.cache_file() is None
    elif trouble == "off":
        monkeypatch.setenv("SMALLVISION_CACHE", "")
    elif trouble == "a file in the way":
        cache.write_text("")
    else:
        cache.mkdir()
        (cache / "looks.sqlite").write_bytes(b"no database" * 100)
    first = verify(scan(small), workers=0)
    assert verify(scan(small), workers=0) == first and len(looked) == 14


def test_each_new_run_and_each_kfold_reads_nothing_twice(small, looked, tmp_path):
    prepare_data(tmp_path / "one", root=small, fractions=(("train", 0.5), ("test", 0.5)))
    prepare_data(tmp_path / "two", root=small, fractions=(("train", 0.5), ("test", 0.5)))
    assert len(looked) == 7


# -- small machines ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OSError(30, "Read-only file system"), ImportError("no sem_open")]
)
def test_without_worker_processes_one_does_the_work(small, monkeypatch, capsys, error):
    def refuses(*_, **__):
        raise error

    alone = verify(scan(small), workers=0, cache=False)
    monkeypatch.setattr(verify_module, "ProcessPoolExecutor", refuses)
    assert verify(scan(small), workers=2, cache=False) == alone
    assert "one process works" in capsys.readouterr().err


def test_the_module_runs_without_a_warning(small):
    shared = str(Path(shared_core.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "shared_core.datasets.finding.verify", str(small), "--workers", "0"],
        env={**os.environ, "PYTHONPATH": shared},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr == "" and "7 images" in done.stdout


# -- a stated scale ----------------------------------------------------------------------------


def test_prepare_makes_eight_bits_of_twelve(tmp_path):
    source = tmp_path / "s.zip"
    levels = {}
    with zipfile.ZipFile(source, "w") as archive:
        for n in range(12):
            rng = np.random.default_rng(n)
            coarse = rng.integers(0, 4096, (4, 4)).astype(np.float32)
            image = Image.fromarray(coarse).resize((24, 24), Image.Resampling.NEAREST)
            levels[n] = np.asarray(image).astype(np.uint16)
            file = io.BytesIO()
            Image.fromarray(levels[n]).save(file, "TIFF")
            archive.writestr(f"{'ab'[n % 2]}/{n}.tif", file.getvalue())
        archive.writestr("a/plain.jpg", encoded(1))
    done = prepare(source, tmp_path / "set", workers=0, scale_max=4095)
    paths = {p.relative_to(done.root).as_posix() for p in done.root.rglob("?/*.*")}
    assert paths == {f"{'ab'[n % 2]}/{n}.png" for n in range(12)} | {"a/plain.jpg"}
    for n in range(12):
        got = np.asarray(Image.open(done.root / f"{'ab'[n % 2]}/{n}.png"))[..., 0]
        np.testing.assert_array_equal(got, np.floor(levels[n].astype(float) * 255 / 4095 + 0.5))
    assert done.report.ok and not done.report.notes()
    shutil.rmtree(tmp_path / "set")
    plain = prepare(source, tmp_path / "set", workers=0)
    assert "12 images like a/0.tif" in plain.report.notes()[0]
