"""Files of strangers: regular, of a limited size, UTF-8, strict JSON."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest

from edgedyn.reading import TextError, parse_json, read_bytes, read_json, read_text


def refusal(path: Path) -> str:
    """Return the reason why a file is not read; fail where the reader waits for it."""
    reasons: list[str] = []

    def read() -> None:
        try:
            read_bytes(path, 100)
        except OSError as error:
            reasons.append(str(error.strerror))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(10)
    assert not reader.is_alive(), "the reader waits"
    return reasons[0] if reasons else ""


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for path in (*(tmp_path / name for name in ("pipe", "link", "socket")), tmp_path, Path("/dev/zero")):
            assert refusal(path) == "not a regular file", path


def test_a_link_to_a_file_is_read_and_a_missing_file_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert read_bytes(tmp_path / "link", 1) == b"x"
    assert refusal(tmp_path / "b") == "No such file or directory"


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_has_is_refused(name):
    assert "not a file name" in refusal(Path(name))


def test_a_file_is_read_up_to_the_limit(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    assert read_bytes(path, 100) == bytes(100)
    with path.open("wb") as file:
        file.truncate(2**40)
    assert refusal(path) == f"{2**40} bytes; expected at most 100"


def test_text_is_utf8_without_its_mark_and_the_line_of_another_byte_is_named(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\xef\xbb\xbfa: \xc3\xa4\n")
    assert read_text(path) == "a: ä\n"
    path.write_bytes(b"a\nb\n\xe4")
    with pytest.raises(TextError, match="line 3: the byte 0xe4 is not UTF-8"):
        read_text(path)
    path.write_bytes('{"a": [1, 2.5, "x"]}'.encode("utf-16"))
    with pytest.raises(TextError, match="not UTF-8"):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": 2, "a": 3}', "a key twice in one object, 'a'"),
        ("[NaN]", "NaN is not a number"),
        ("[-Infinity]", "-Infinity is not a number"),
        ("[1e999]", "not finite"),
        ("[9007199254740993]", "beyond 2"),
        ("[" + "9" * 10_000 + "]", "beyond 2"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[1", "Expecting"),
        ("", "Expecting"),
        (b"\xff\xfe", "codec|decode|Expecting|JSON"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_that_is_not_strict_is_refused(text, words):
    with pytest.raises(TextError, match=words) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 300


def test_strict_json_is_read_as_every_parser_reads_it():
    text = '{"a": [1, -2.5e-3, true, null, "\\u00e4"], "b": {}}'
    assert parse_json(text) == json.loads(text)
