"""Processes that we start. Device side: standard library only.

A Python child imports only from where this process does, and never from the working directory: a ``numpy.py``
that lies there, or in a bundle from somebody else, must not run. An interruption ends a tool with all of its
own children: no compiler keeps running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import site
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

# -I: neither the working directory, nor PYTHON* variables, nor the user's site; then the parent's own path.
# Python 3.10 has no -P, which would do without the list.
_START = (
    "import runpy, site, sys; user, path, name = {user!r}, {path!r}, {name!r}; "
    "user and site.addsitedir(user); sys.path[:] = path; "
    "runpy.run_module(name, run_name='__main__', alter_sys=True)"
)


def python_command(module: str, *arguments: object) -> list[str]:
    """Return the command that runs a module, as ``python -m``, without the working directory on its path."""
    user = site.getusersitepackages() if site.ENABLE_USER_SITE else None
    code = _START.format(user=user, path=import_path(), name=module)
    return [sys.executable, "-I", "-c", code, *map(str, arguments)]


def import_path() -> list[str]:
    """Return ``sys.path`` without the working directory, which ``python -m`` and ``python -c`` put first.

    It stays where the user named it in ``PYTHONPATH``, and where edgedyn itself lies in it: a checkout.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it is deleted: nothing lies there
        return [entry for entry in sys.path if entry]
    named = {os.path.realpath(x) for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x}
    named.add(str(Path(__file__).resolve().parents[1]))
    return [entry for entry in sys.path if os.path.realpath(entry) != here or here in named]


def leave_working_directory() -> None:
    """Import nothing more from the working directory, unless a recipe names a network in it."""
    sys.path[:] = import_path()


def run_tool(command: Sequence[object], *, seconds: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and capture its output; an interruption ends it with all its children.

    Args:
        command: program and arguments.
        seconds: time after which it is ended; None: no limit.

    Raises:
        OSError: if the program cannot be started.
        subprocess.TimeoutExpired: if it took longer.
    """
    words = [str(word) for word in command]
    with _terminated_as_interrupted():
        tool = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="backslashreplace",
            start_new_session=True,
        )
        try:
            out, err = tool.communicate(timeout=seconds)
        except BaseException:
            _end_group(tool)
            raise
    return subprocess.CompletedProcess(words, tool.returncode, out, err)


def _end_group(tool: subprocess.Popen[str]) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(tool.pid, signal.SIGKILL)
    tool.kill()
    tool.wait()


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt where nobody handles it, so that nothing is left behind."""
    is_ours = threading.current_thread() is threading.main_thread()
    if not is_ours or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
