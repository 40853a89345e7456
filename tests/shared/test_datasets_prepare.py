"""Preparing: archives of every kind, hostile ones, interrupted runs, and the command line."""

import io
import stat
import tarfile
import zipfile
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from shared_core.datasets.builtin.sources import render_scene
from shared_core.datasets.errors import DatasetError, DatasetNotFoundError
from shared_core.datasets.finding import unpack
from shared_core.datasets.finding.prepare import main, prepare
from shared_core.datasets.finding.scan import scan
from shared_core.datasets.finding.unpack import Limits
from shared_core.datasets.sets import specs
from shared_core.datasets.splitting.manifest import Manifest


def jpeg(index):
    name = ("tanks_grid", "water_river", "roads_star")[index % 3]
    image = render_scene(name, index, size=32, seed=1)[0]
    return cv2.imencode(".jpg", image)[1].tobytes()


FILES = {f"{c}/{i:02d}.jpg": jpeg(i + 100 * (c == "b")) for c in "ab" for i in range(20)}


def write_zip(path, files, prefix=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(prefix + name, data)
    return path


def write_tar(path, files, mode="w:gz", prefix=""):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def content(root):
    listing = scan(root)
    return {listing.relative(s): s.path.read_bytes() for s in listing.samples}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz", "folder"])
@pytest.mark.parametrize("prefix", ["", "AID/", "./outer/inner/"])
def test_every_source_gives_the_same_set(tmp_path, kind, prefix):
    source = tmp_path / f"source.{kind}"
    if kind == "zip":
        write_zip(source, FILES, prefix)
    elif kind == "folder":
        write_folder(source, {prefix + n: d for n, d in FILES.items()})
    else:
        write_tar(source, FILES, "w:" + kind.partition(".")[2], prefix)
    done = prepare(source, tmp_path / "data" / "set", workers=0, near=False)
    assert content(done.root) == FILES
    assert Manifest.read(done.root / "split.json", root=done.root) == done.manifest
    assert done.report.ok and (done.root / "verify.md").is_file()
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["set"]  # no scratch is left


def test_the_split_does_not_depend_on_the_source(tmp_path):
    one = prepare(write_zip(tmp_path / "a.zip", FILES), tmp_path / "one", workers=0)
    two = prepare(write_tar(tmp_path / "b.tar.gz", FILES), tmp_path / "two", workers=0)
    assert one.manifest.hash == two.manifest.hash
    other = prepare(write_zip(tmp_path / "c.zip", FILES), tmp_path / "three", workers=0, seed=1)
    assert other.manifest.hash != one.manifest.hash


def test_broken_files_go_to_quarantine_and_out_of_the_split(tmp_path):
    files = {**FILES, "a/bad.jpg": jpeg(3)[:300], "b/empty.jpg": b""}
    done = prepare(write_zip(tmp_path / "s.zip", files), tmp_path / "set", workers=0)
    assert not done.report.ok
    assert set(done.manifest.quarantined) == {"a/bad.jpg", "b/empty.jpg"}
    assert len(done.manifest.entries) == 40
    assert "a/bad.jpg\ttruncated" in (done.root / "quarantine.txt").read_text()


def test_a_split_layout_is_kept_and_its_wrapper_is_not(tmp_path):
    files = {f"cifar/{s}/{n}": d + s.encode() for s in ("train", "test") for n, d in FILES.items()}
    done = prepare(write_zip(tmp_path / "s.zip", files), tmp_path / "set", workers=0, near=False)
    assert done.manifest.kind == "layout"
    assert all(e.path.startswith("test/") for e in done.manifest.entries if e.split == "test")
    free = prepare(tmp_path / "s.zip", tmp_path / "free", workers=0, near=False, keep_layout=False)
    assert free.manifest.kind == "random"


def test_a_single_train_folder_is_not_taken_for_a_wrapper(tmp_path):
    files = {f"train/{name}": data for name, data in FILES.items()}
    root = unpack.unpack(write_zip(tmp_path / "s.zip", files), tmp_path / "set", limits=Limits())
    assert (root / "train" / "a").is_dir()


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "/abs/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg", "C:/evil.jpg"]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_escaping_members_are_refused(tmp_path, name, kind):
    files = {**FILES, name: b"x"}
    source = (write_zip if kind == "zip" else write_tar)(tmp_path / f"s.{kind}", files)
    with pytest.raises(DatasetError, match="would be written outside of the target"):
        prepare(source, tmp_path / "deep" / "set", workers=0)
    assert not list(tmp_path.rglob("evil.jpg"))
    assert not list((tmp_path / "deep").iterdir())


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_in_tars_are_refused(tmp_path, kind):
    source = write_tar(tmp_path / "s.tar", FILES, "w")
    with tarfile.open(source, "a") as archive:
        info = tarfile.TarInfo("a/link.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DatasetError, match="'a/link.jpg' is .*only files are taken"):
        prepare(source, tmp_path / "set", workers=0)
    assert not (tmp_path / "set").exists()


def test_links_in_zips_are_refused(tmp_path):
    source = write_zip(tmp_path / "s.zip", FILES)
    with zipfile.ZipFile(source, "a") as archive:
        info = zipfile.ZipInfo("a/link.jpg")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DatasetError, match="links are refused"):
        prepare(source, tmp_path / "set", workers=0)


def test_bombs_are_refused_before_anything_is_written(tmp_path):
    source = write_zip(tmp_path / "s.zip", {"a/zeros.bmp": bytes(120_000_000), **FILES})
    with pytest.raises(DatasetError, match="more than 200 times its size"):
        prepare(source, tmp_path / "set", workers=0)
    with pytest.raises(DatasetError, match="more than 1,000 bytes"):
        prepare(source, tmp_path / "set", workers=0, limits=Limits(max_bytes=1000))
    with pytest.raises(DatasetError, match="more than 5 files"):
        source = write_zip(source, FILES)
        prepare(source, tmp_path / "set", workers=0, limits=Limits(max_files=5))
    assert [p.name for p in tmp_path.iterdir()] == ["s.zip"]


def test_too_little_disk_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(unpack.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(DatasetError, match="needs .* GB at .* are free"):
        prepare(write_zip(tmp_path / "s.zip", FILES), tmp_path / "set", workers=0)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_damaged_archives(tmp_path, kind):
    source = (write_zip if kind == "zip" else write_tar)(tmp_path / f"s.{kind}", FILES)
    data = bytearray(source.read_bytes())
    if kind == "zip":
        data[200:260] = bytes(60)  # inside the first file's data; the table is at the end
    else:
        del data[len(data) // 2 :]
    source.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match="is damaged|does not have") as caught:
        prepare(source, tmp_path / "set", workers=0)
    assert "\n" not in str(caught.value) and not (tmp_path / "set").exists()
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(DatasetError, match="neither a zip, a tar nor a folder"):
        prepare(tmp_path / "text.zip", tmp_path / "set", workers=0)


def test_a_member_twice_is_refused(tmp_path):
    source = tmp_path / "s.tar"
    write_tar(source, FILES, "w")
    with tarfile.open(source, "a") as archive:
        info = tarfile.TarInfo("./a/00.jpg")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"x"))
    with pytest.raises(DatasetError, match="holds 'a/00.jpg' twice"):
        prepare(source, tmp_path / "set", workers=0)


def test_an_interrupted_run_is_continued(tmp_path, monkeypatch):
    source = write_zip(tmp_path / "s.zip", FILES)
    real, calls = unpack._write_member, []

    def killed(member, scratch, archive):
        calls.append("/".join(member.parts))
        if len(calls) == 8:
            raise KeyboardInterrupt
        real(member, scratch, archive)

    monkeypatch.setattr(unpack, "_write_member", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "set", workers=0)
    assert not (tmp_path / "set").exists()
    half = [p for p in tmp_path.rglob("*.jpg")]
    assert len(half) == 7
    before = {p.name: p.stat().st_mtime_ns for p in half}

    opened = []
    monkeypatch.setattr(unpack, "_write_member", real)
    real_replace = unpack.os.replace
    monkeypatch.setattr(
        unpack.os, "replace", lambda a, b: (opened.append(str(b)), real_replace(a, b))[1]
    )
    done = prepare(source, tmp_path / "set", workers=0)
    assert content(done.root) == FILES
    assert sum(path.endswith(".jpg") for path in opened) == 33  # the seven are not written again
    after = {p.name: p.stat().st_mtime_ns for p in done.root.rglob("*.jpg")}
    assert all(name in after for name in before)


def test_a_second_call_does_not_unpack_again_and_other_targets_are_safe(tmp_path, monkeypatch):
    source = write_zip(tmp_path / "s.zip", FILES)
    first = prepare(source, tmp_path / "set", workers=0)
    monkeypatch.setattr(unpack, "_extract", lambda *a: pytest.fail("unpacked again"))
    assert prepare(source, tmp_path / "set", workers=0).manifest == first.manifest
    other = write_zip(tmp_path / "t.zip", dict(list(FILES.items())[:30]))
    with pytest.raises(DatasetError, match="is not empty, and was not made from"):
        prepare(other, tmp_path / "set", workers=0)
    assert content(tmp_path / "set") == FILES
    with pytest.raises(DatasetNotFoundError, match="nothing to prepare at"):
        prepare(tmp_path / "no.zip", tmp_path / "x", workers=0)
    with pytest.raises(DatasetError, match="is no folder"):
        prepare(source, tmp_path / "t.zip", workers=0)
    with pytest.raises(DatasetError, match="lies inside the source"):
        prepare(tmp_path / "set", tmp_path / "set" / "inside", workers=0)


def test_another_dataset_than_the_spec_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="is not AID: 2 classes, AID has 30"):
        prepare(
            write_zip(tmp_path / "s.zip", FILES), tmp_path / "set", spec=specs.get("AID"), workers=0
        )


def test_command_line(tmp_path, capsys):
    source = write_zip(tmp_path / "s.zip", FILES)
    assert main([str(source), str(tmp_path / "set"), "--workers", "0", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "40 images, 2 classes, usable" in out and "train:" in out
    assert Manifest.read(tmp_path / "set" / "split.json").seed == 3
    assert main([str(tmp_path / "no.zip"), str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: nothing to prepare") and error.count("\n") == 1
    for wrong in ([str(source)], [str(source), "x", "--workers", "-1"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2


# -- archives of other systems, and damaged ones ------------------------------------------------


def raw_zip(path, files, *, flag=0):
    """A zip whose members' names are these bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for n, data in enumerate(files.values()):
            archive.writestr(f"{n:0{len(list(files)[n])}d}", data)
    content = path.read_bytes()
    for n, name in enumerate(files):
        old = f"{n:0{len(name)}d}".encode()
        assert content.count(old) >= 2
        content = content.replace(b"\x00\x00" + old, b"\x00\x00" + name)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("encoding", ["gbk", "utf-8"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_chinese_names_are_read_whatever_packed_them(tmp_path, capsys, encoding, kind):
    # 昞 and 癨 end in a backslash in GBK.
    names = ["电路板检测样本甲/图片一号.jpg", "電路板檢測樣本乙/昞癨二号.jpg"]
    files = {name.encode(encoding): jpeg(n) for n, name in enumerate(names)}
    source = tmp_path / f"s.{kind}"
    if kind == "zip":
        raw_zip(source, files)
    else:
        with tarfile.open(source, "w", encoding=encoding, format=tarfile.GNU_FORMAT) as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(name.decode(encoding))
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    root = unpack.unpack(source, tmp_path / "set", limits=Limits())
    found = {p.relative_to(root).as_posix() for p in root.rglob("*.jpg")}
    assert found == set(names)
    if kind == "zip":
        reading = "gb18030" if encoding == "gbk" else "utf-8"
        assert f"read as {reading}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tar.gz", "tar.bz2", "tar.xz"])
def test_a_flipped_bit_in_a_packed_tar_is_never_accepted(tmp_path, kind):
    source = write_tar(tmp_path / f"s.{kind}", FILES, "w:" + kind.partition(".")[2])
    whole = source.read_bytes()
    rng = np.random.default_rng(0)
    for number in range(40):
        data = bytearray(whole)
        at = int(rng.integers(20, len(data)))
        data[at] ^= 1 << int(rng.integers(0, 8))
        source.write_bytes(bytes(data))
        try:
            root = unpack.unpack(source, tmp_path / f"set{number}", limits=Limits())
        except DatasetError as error:
            assert "\n" not in str(error)
            assert not list(tmp_path.glob(".set*"))  # no scratch is left
        else:  # bits that the format does not use change nothing
            assert content(root) == FILES


def test_no_cut_of_a_tar_is_taken_for_its_end(tmp_path):
    few = dict(list(FILES.items())[:4])
    source = write_tar(tmp_path / "s.tar", few, "w")
    whole = source.read_bytes()
    for keep in range(512, len(whole) - 10240, 256):
        source.write_bytes(whole[:keep])
        with pytest.raises(DatasetError):
            unpack.unpack(source, tmp_path / "set", limits=Limits())
    damaged = bytearray(whole)
    second = whole.find(b"a/01.jpg")
    damaged[second + 3] ^= 1  # the header of the second file: tarfile calls this the end
    source.write_bytes(bytes(damaged))
    with pytest.raises(DatasetError, match="no end of the archive"):
        unpack.unpack(source, tmp_path / "set", limits=Limits())


def test_the_first_bytes_say_what_an_archive_is(tmp_path):
    """A tar whose last file is a stored zip has a zip's table at its end."""
    inner = write_zip(tmp_path / "inner.zip", {"evil/1.jpg": jpeg(5)})
    files = {"a/0.jpg": jpeg(0), "b/1.jpg": jpeg(1), "c.zip": inner.read_bytes()}
    source = write_tar(tmp_path / "s.tar", files, "w")
    root = unpack.unpack(source, tmp_path / "set", limits=Limits())
    assert {p.name for p in root.rglob("*.jpg")} == {"0.jpg", "1.jpg"}


@pytest.mark.parametrize(("method", "name"), [(9, "Deflate64"), (97, "an unusual method")])
def test_other_packing_is_one_line_and_leaves_nothing(tmp_path, method, name):
    source = write_zip(tmp_path / "s.zip", FILES)
    data = bytearray(source.read_bytes())
    at = data.find(b"PK\x01\x02")
    data[at + 10] = data[8] = method
    source.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match=f"packed by {name} .*unpack it"):
        unpack.unpack(source, tmp_path / "set", limits=Limits())
    assert [p.name for p in tmp_path.iterdir()] == ["s.zip"]
