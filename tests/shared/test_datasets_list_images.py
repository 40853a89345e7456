"""Which image files a path means: files, folders, links, pipes, and what is left out, said."""

import os

import pytest

from shared_core.datasets.finding import scan as scan_module
from shared_core.datasets.finding.scan import list_images


def names(found, root):
    return [path.relative_to(root).as_posix() for path in found.files]


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/b/c.webp", "c.jpg/inside.tif", "notes.txt", "a/x.heic",
                 ".hidden.png", ".cache/y.png", "__MACOSX/z.png", "._b.png"):  # fmt: skip
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "set"


def test_a_folder_is_walked_in_the_order_of_its_names(folder):
    found = list_images(folder)
    assert names(found, folder) == ["a/b/c.webp", "a/z.JPG", "b.png", "c.jpg/inside.tif"]
    assert found.bad == []
    assert [path.name for path in found.ignored] == ["x.heic", "notes.txt"]
    assert "1 .heic, 1 .txt" in found.ignored_line() and str(folder / "a/x.heic") in (
        found.ignored_line()
    )
    assert list_images(folder / "b.png").ignored_line() is None


def test_bytes_decide_the_order(tmp_path):
    for name in ("ä.png", "Z.png", "a.png", "z.png"):
        (tmp_path / name).write_bytes(b"x")
    assert names(list_images(tmp_path), tmp_path) == ["Z.png", "a.png", "z.png", "ä.png"]


def test_named_files_are_taken_whatever_their_ending_and_each_once(folder):
    found = list_images([folder / "notes.txt", folder, folder / "b.png", str(folder / "b.png")])
    assert found.files[0] == folder / "notes.txt" and len(found.files) == 5
    assert list_images(str(folder / "b.png")).files == [folder / "b.png"]


def test_what_is_not_there_is_said(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    found = list_images([tmp_path / "none.png", tmp_path / "empty", folder / "b.png"])
    assert found.bad == [
        (tmp_path / "none.png", "no such file or folder"),
        (tmp_path / "empty", "no image in this folder"),
    ]
    assert len(found.files) == 1


def test_links_are_followed_but_not_in_circles(folder):
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "a" / "self.png").symlink_to(folder / "a" / "self.png")
    (folder / "gone.png").symlink_to(folder / "nothing")
    (folder / "gone").symlink_to(folder / "nothing")
    (folder / "other.png").symlink_to(folder / "b.png")
    found = list_images(folder)
    assert "other.png" in names(found, folder) and len(found.files) == 5
    assert (folder / "gone.png", "a link to nothing") in found.bad
    assert [path.name for path, _ in found.bad] == ["self.png", "gone.png"]
    assert folder / "gone" in found.ignored


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_pipes_and_devices_are_never_opened(folder):
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.png").symlink_to("/dev/zero")
    found = list_images([folder, folder / "pipe.jpg"])
    assert len(found.files) == 4
    assert [path.name for path, _ in found.bad] == ["pipe.jpg", "zero.png", "pipe.jpg"]
    assert all("expected a file" in reason for _, reason in found.bad)


def test_a_folder_that_cannot_be_read_is_bad_and_the_rest_is_listed(folder, monkeypatch):
    real = os.listdir

    def refuse(path):
        if os.fspath(path).endswith("/a"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(scan_module.os, "listdir", refuse)
    found = list_images(folder)
    assert found.bad == [(folder / "a", "Permission denied")]
    assert names(found, folder) == ["b.png", "c.jpg/inside.tif"]
