"""Files are whole or as they were."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgedyn.errors import UsageError
from edgedyn.files import refuse_unwritable, replace_file, replace_files, staging_folder, to_json


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "model.engine"
    replace_file(path, b"first")
    with pytest.raises(TypeError):
        replace_file(path, object())
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
    replace_file(path, b"second")
    assert path.read_bytes() == b"second"


def test_replacing_a_file_that_cannot_be_written_is_refused_and_leaves_no_part(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="cannot write"):
        replace_file(tmp_path / "folder", b"data")
    assert os.listdir(tmp_path) == ["folder"]


def test_files_that_belong_together_are_refused_before_anything_changes(tmp_path):
    first, last = tmp_path / "a", tmp_path / "z"
    replace_files({first: b"1", last: b"1"})
    with pytest.raises(TypeError):
        replace_files({first: b"2", last: object()})
    with pytest.raises(UsageError, match=r"cannot write .*nowhere/z"):
        replace_files({first: b"2", tmp_path / "nowhere/z": b"2"})
    assert (first.read_bytes(), last.read_bytes()) == (b"1", b"1")
    assert sorted(os.listdir(tmp_path)) == ["a", "z"]


KILLED = """
import os, signal, sys
from pathlib import Path
from edgedyn.files import replace_files

left = int(sys.argv[2])

def dying(method):
    def call(self, *arguments, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return method(self, *arguments, **options)
    return call

Path.replace, Path.unlink = dying(Path.replace), dying(Path.unlink)
replace_files({Path(sys.argv[1], name): b"new" for name in ("a", "b", "z")})
"""


@pytest.mark.parametrize("steps", range(5))
def test_killed_writer_leaves_the_last_file_with_its_own_others_or_not_at_all(tmp_path, steps):
    """Killed before any step that shows: one removal and three renames; after them nothing is left to do."""
    names = ("a", "b", "z")
    replace_files({tmp_path / name: b"old" for name in names})
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(steps)], check=False)
    assert killed.returncode == -signal.SIGKILL
    found = {name: (tmp_path / name).read_bytes() for name in names if (tmp_path / name).exists()}
    expected = {0: dict.fromkeys(names, b"old"), 4: dict.fromkeys(names, b"new")}
    assert found == expected.get(steps, found)
    assert ("z" in found) == (steps in expected)


def test_json_holds_nothing_that_a_strict_parser_refuses():
    values = {"rows": [{"value": math.inf}, (math.nan, -math.inf)], "path": Path("out"), "median": 1.5}
    text = to_json(values)
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read == {"rows": [{"value": "inf"}, ["nan", "-inf"]], "path": "out", "median": 1.5}


def test_an_output_that_can_be_written_is_not_refused_and_nothing_is_left(tmp_path):
    refuse_unwritable(tmp_path / "a/b/out", is_folder=True)
    refuse_unwritable(tmp_path / "c/table.json")
    refuse_unwritable(tmp_path / ("n" * 255))
    assert os.listdir(tmp_path) == []
    (tmp_path / "out").mkdir()
    refuse_unwritable(tmp_path / "out", is_folder=True)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("n" * 256, "File name too long. Choose a shorter name"),
        ("d/" * 2100 + "x", "File name too long. Choose a shorter name"),
        ("file/out", "Not a directory|File exists"),
        ("file/a/out", "Not a directory|File exists"),
        ("a\0b", "null"),
        ("folder", "Is a directory"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, name, words):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=f"cannot write .*({words})"):
        refuse_unwritable(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    if name != "folder":
        with pytest.raises(UsageError, match="cannot write"):
            refuse_unwritable(tmp_path / name, is_folder=True)
        with pytest.raises(UsageError, match="cannot write"):
            replace_file(tmp_path / name, b"data")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


AS_NOBODY = """
import os, sys
from pathlib import Path
from edgedyn.errors import UsageError
from edgedyn.files import refuse_unwritable, replace_file, staging_folder

os.setgid(65534), os.setuid(65534)
out = Path(sys.argv[1])
replace, stage = (lambda path: replace_file(path, b"")), (lambda path: staging_folder(path).__enter__())
for write in (refuse_unwritable, replace, stage):
    try:
        write(out)
    except UsageError as error:
        print(error)
"""


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs root, to be nobody")
def test_closed_permissions_are_a_refusal_with_a_next_step(tmp_path):
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    words = f"cannot write {tmp_path}/out: Permission denied. Choose a folder that you may write to."
    assert done.stdout.splitlines() == [words] * 3
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file(tmp_path):
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom edgedyn.errors import UsageError\n"
        "from edgedyn.files import refuse_unwritable, replace_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, 2**12))\n"
        "for write in (refuse_unwritable, lambda path: replace_file(path, bytes(2**13))):\n"
        "    try:\n        write(Path(sys.argv[1]))\n    except UsageError as error:\n        print(error)\n"
    )
    path = tmp_path / "table.json"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("File too large. Free disk space, or choose a place on another disk.") == 2
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["table.json"]


def test_remains_of_a_killed_writer_go_with_the_next_write_and_other_files_stay(tmp_path):
    for name in (".a.part-0123abcd", ".b.part-0123abcd", ".a.part-mine", "a.part-0123abcd"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".a.part-89abcdef").mkdir()
    (tmp_path / ".a.part-89abcdef" / "model.pte").write_bytes(b"half")
    os.mkfifo(tmp_path / ".a.part-aaaaaaaa")
    replace_file(tmp_path / "a", b"new")
    assert sorted(os.listdir(tmp_path)) == [".a.part-mine", ".b.part-0123abcd", "a", "a.part-0123abcd"]
    with staging_folder(tmp_path / "b"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".a.part-mine", "a", "a.part-0123abcd"]


def test_an_old_version_goes_once_the_new_one_is_there(tmp_path):
    (tmp_path / ".a.old-0123abcd").mkdir()
    with staging_folder(tmp_path / "a") as staging:
        assert (tmp_path / ".a.old-0123abcd").is_dir()  # nothing else is left of it
        staging.rename(tmp_path / "a")
    with staging_folder(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_of_a_reader_in_a_staging_folder_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), staging_folder(tmp_path / "out"):
        (tmp_path / "nowhere").read_bytes()
    assert os.listdir(tmp_path) == []
