"""The cache of built files: damaged ones are built again, no other user writes there, kills leave nothing."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgedyn.cache import build_cached, cache, cached_path, private_folder
from edgedyn.errors import UsageError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "edgedyn"


class Maker:
    def __init__(self, data=b"library" * 1000):
        self.data, self.calls = data, 0

    def __call__(self, folder):
        self.calls += 1
        (folder / "lib.so").write_bytes(self.data)
        return folder / "lib.so"


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


def flip(path):
    path.write_bytes(b"L" + path.read_bytes()[1:])


def link(path):
    path.rename(path.with_name("other"))
    path.symlink_to(path.with_name("other"))


@pytest.mark.parametrize(
    "damage",
    [
        *(truncate, flip, link, Path.unlink),
        lambda path: path.with_name("lib.so.sha256").unlink(),
        lambda path: path.with_name("lib.so.sha256").write_bytes(b"\xff" * 64),
        lambda path: path.with_name("lib.so.sha256").write_bytes(b""),
    ],
)
def test_a_damaged_file_is_built_again_and_a_whole_one_is_not(home, damage):
    make = Maker()
    path = build_cached(cached_path("lib.so", []), make)
    assert build_cached(path, make) == path
    assert make.calls == 1
    damage(path)
    assert build_cached(path, make) == path
    assert make.calls == 2
    assert path.read_bytes() == make.data
    assert not path.is_symlink()
    assert build_cached(path, make) == path
    assert make.calls == 2
    assert not list(home.glob("build-*"))


def test_the_cache_is_private_also_where_it_was_open_before(home):
    home.mkdir(mode=0o777)
    home.chmod(0o777)
    path = build_cached(cached_path("lib.so", []), Maker())
    for place in (home, path.parent, path):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700, place


def test_a_cache_of_another_user_or_behind_a_link_is_refused(home, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    home.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=r"is a link.*XDG_CACHE_HOME"):
        build_cached(cached_path("lib.so", []), Maker())
    home.unlink()
    home.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(UsageError, match=r"a folder of user \d+; expected a folder of user 12345"):
        build_cached(cached_path("lib.so", []), Maker())


def test_a_cache_that_cannot_be_made_is_refused(home):
    home.touch()
    with pytest.raises(UsageError, match="cannot be used"):
        private_folder(home / "x")


def test_a_relative_cache_home_is_no_folder_of_the_working_directory(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache() == Path.home() / ".cache" / "edgedyn"


BUILD = """
import sys
from edgedyn.cache import build_cached, cached_path
from edgedyn.children import run_tool

def make(folder):
    run_tool(["sh", "-c", "echo $$ > " + sys.argv[1] + "; (sleep 60 & echo $! >> " + sys.argv[1] + "; wait)"])

build_cached(cached_path("lib.so", []), make)
"""


def is_running(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_build_leaves_no_compiler_and_no_folder(home, tmp_path, number):
    pids = tmp_path / "pids"
    builder = subprocess.Popen([sys.executable, "-c", BUILD, str(pids)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (pids.exists() and pids.read_text().count("\n") == 2):
        assert builder.poll() is None, builder.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    compilers = [int(line) for line in pids.read_text().split()]
    builder.send_signal(number)
    builder.communicate(timeout=60)
    if number == signal.SIGKILL:  # nobody can clean up then: the next build does
        assert list(home.glob("build-*"))
        build_cached(cached_path("lib.so", []), Maker())
        os.killpg(compilers[0], signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(map(is_running, compilers)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not list(home.glob("build-*"))
