"""Text from Notepad, Windows and ls, and names that no encoding holds."""

import io
import json
import locale
import os
import sys

import pytest

from shared_core import texts
from shared_core.datasets.errors import DatasetError
from shared_core.datasets.finding.quarantine import honoured, load_quarantine, read_quarantine
from shared_core.runs.command import run_command

NAMES = ["猫/一.jpg", "犬/2.jpg", "a/b c.jpg"]


@pytest.mark.parametrize(
    ("encoding", "noted"),
    [("utf-8", 0), ("utf-8-sig", 0), ("utf-16", 0), ("utf-32", 0), ("gbk", 1), ("gb18030", 1)],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("slash", ["/", "\\"])
def test_a_list_means_the_same_in_every_encoding(tmp_path, encoding, noted, end, slash):
    content = f"# mine{end}{end}" + end.join(n.replace("/", slash) + "\tblurred" for n in NAMES)
    path = tmp_path / "list.txt"
    path.write_bytes((content + end).encode(encoding))
    entries = texts.read_entries(path, known=NAMES)
    assert [texts.plain_path(name) for name in entries.names] == NAMES
    assert entries.rests == ("blurred",) * 3 and entries.numbers == (3, 4, 5)
    assert len(entries.notes) == noted
    matched = texts.match_names(entries.names, NAMES)
    assert list(matched.found.values()) == NAMES and not matched.missing
    assert set(read_quarantine(path, known=NAMES).values()) == {"blurred"}


def test_what_fits_the_names_decides_between_encodings(tmp_path, monkeypatch):
    path = tmp_path / "list.txt"
    path.write_bytes("café.jpg\nthé.jpg\n".encode("latin-1"))
    monkeypatch.setattr(locale, "getpreferredencoding", lambda _=True: "cp1252")
    assert texts.read_entries(path, known=["café.jpg"]).names[0] == "café.jpg"
    # The files themselves have these bytes as names: Linux with an old disk.
    kept = os.fsdecode("café.jpg".encode("latin-1"))
    assert texts.read_entries(path, known=[kept]).names[0] == kept
    note = texts.read_entries(path, known=["café.jpg"]).notes[0]
    assert str(path) in note and "CP1252" in note


@pytest.mark.parametrize("data", [b"a\0b", b"\xff\xfea", b"\x89PNG\r\n\x1a\n\0\0"])
def test_what_is_no_text_is_one_line(tmp_path, data):
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.txt") as error:
        texts.read_text(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no text file"):
        texts.read_text(tmp_path)
    with pytest.raises(FileNotFoundError, match="no.txt"):
        texts.read_text(tmp_path / "no.txt")


def test_names_are_matched_by_what_they_mean_and_the_rest_is_named():
    known = ["a/1.jpg", "caf\u00e9/2.jpg", "b/3 .jpg"]
    given = ["./a\\1.jpg", "cafe\u0301/2.jpg", "b/3 .jpg", " a/1.jpg ", "a/9.jpg", "x\ny.jpg"]
    matched = texts.match_names(given, known)
    assert matched.found == {
        "./a\\1.jpg": "a/1.jpg", "cafe\u0301/2.jpg": "caf\u00e9/2.jpg", "b/3 .jpg": "b/3 .jpg",
        " a/1.jpg ": "a/1.jpg",
    }  # fmt: skip
    assert matched.missing == ("a/9.jpg", "x\ny.jpg")
    assert matched.note("list.txt") == (
        "2 of 6 entries of list.txt match no file: a/9.jpg, x\\ny.jpg"
    )
    assert texts.match_names([], known).note("list.txt") is None


def test_a_quarantine_list_from_windows_is_honoured_and_strangers_are_counted(tmp_path):
    (tmp_path / "quarantine.txt").write_bytes(
        b"\xef\xbb\xbfa\\1.jpg\tblurred\r\nb/2.jpg\r\nb/gone.jpg\r\n"
    )
    known = ["a/1.jpg", "b/2.jpg", "b/3.jpg"]
    reasons, notes = honoured(load_quarantine(tmp_path, None), known, where="quarantine.txt")
    assert reasons == {"a/1.jpg": "blurred", "b/2.jpg": ""}
    assert notes == ("1 of 3 entries of quarantine.txt match no file: b/gone.jpg",)
    (tmp_path / "q.txt").write_text("..\\x.jpg\n")
    with pytest.raises(DatasetError, match="line 1"):
        read_quarantine(tmp_path / "q.txt")


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"[" * 200_000, "nested too deeply"), (b'{"a": 1', "expected JSON"), (b"\0", "no text")],
)
def test_json_of_users_is_one_line(tmp_path, content, why):
    (tmp_path / "map.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"map\.json: .*{why}") as error:
        texts.read_json(tmp_path / "map.json")
    assert "\n" not in str(error.value)
    (tmp_path / "map.json").write_bytes(b"\xef\xbb\xbf" + '{"猫": 1}\r\n'.encode())
    assert texts.read_json(tmp_path / "map.json") == {"猫": 1}


@pytest.mark.parametrize(
    "lines",
    [
        [b"\xef\xbb\xbfa.jpg\r\n", b"\xe7\x8c\xab.jpg\n", b"caf\xe9.jpg"],
        ["\ufeffa.jpg\n", "猫.jpg\r\n", "caf\udce9.jpg\n"],
    ],
)
def test_lines_of_a_stream_come_clean(lines):
    assert list(texts.clean_lines(lines)) == ["a.jpg", "猫.jpg", "caf\udce9.jpg"]


def test_lines_of_a_stream_come_one_at_a_time():
    asked = []

    def given():
        for n in range(3):
            asked.append(n)
            yield f"{n}\n"

    assert next(texts.clean_lines(given())) == "0" and asked == [0]


def test_no_name_stops_a_printer_or_is_lost():
    odd = "b\udce9\udcff/图\n\x1b[0m\u2028.jpg"
    assert texts.printable(odd) == "b\\xe9\\xff/图\\n\\x1b[0m\\u2028.jpg"
    document = texts.as_utf8(json.dumps({"path": odd}, ensure_ascii=False))
    assert json.loads(document.decode())["path"] == odd  # nothing is lost
    raw = io.BytesIO()
    for encoding in ("ascii", "cp1252", "utf-8", "gbk"):
        stream = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
        texts.say(odd, stream)
        stream.detach()
    assert raw.getvalue().startswith(rb"b\udce9\udcff/\u56fe")


def test_streams_are_made_safe(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # cannot be reconfigured, and need not
    with pytest.raises(UnicodeEncodeError):
        print("猫", flush=True)
    texts.safe_streams()
    print("猫 b\udce9", flush=True)
    assert b"\\u732b b\\udce9" in raw.getvalue()


def test_every_command_prints_whatever_the_terminal_lacks(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run_command(lambda _: print("猫 b\udce9", flush=True)) == 0
    assert raw.getvalue() == b"\\u732b b\\udce9\n"
