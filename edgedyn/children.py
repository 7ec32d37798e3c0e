"""Processes that we start. Device side.

A Python child imports only from where this process does, and never from the working directory: a ``numpy.py``
that lies there, or in a bundle from somebody else, must not run. An interruption ends a tool with all of its
own children: no compiler keeps running. A child that runs somebody's program has ``limit_resources``.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import site
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from edgedyn.errors import printable

MEMORY_SHARE = 0.75  # of this machine's memory, for a child that runs a program of somebody

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


def limit_resources() -> None:
    """Limit the memory of this process to ``MEMORY_SHARE`` of the machine's, and let it leave no core file.

    Linux counts memory that the process may write; other systems may ignore the limit.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    for kind, most in ((resource.RLIMIT_DATA, memory_limit()), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def memory_limit() -> int:
    """Return the bytes of ``limit_resources``."""
    return int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def end_of(status: int) -> str:
    """Return how a process ended: ``was ended by SIGSEGV``, ``ended with status 1``."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal
        return f"was ended by signal {-status}"


def last_words(text: str) -> str:
    """Return ``; its last words: ...`` with the last line of a process's text, or nothing."""
    lines = [line for line in text.splitlines() if line.strip()]
    return f"; its last words: {one_line(lines[-1])}" if lines else ""


def one_line(text: str) -> str:
    """Return a text of a runtime as one printable line of at most 300 characters."""
    return printable(" ".join(text.split())[:300])


class ChildEndedError(Exception):
    """A child ended before it answered.

    Attributes:
        how: ``was ended by SIGSEGV``.
        log: the text that it wrote to its standard streams.
    """

    def __init__(self, how: str, log: str) -> None:
        super().__init__(how)
        self.how, self.log = how, log


class Child:
    """A Python process that answers questions, one after another, with the function that it ``serve``s.

    It ends with this process, and when an answer does not come.
    """

    def __init__(self, module: str, *arguments: object) -> None:
        """Start ``python -m module arguments``, whose main part calls ``serve``."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        self._process = subprocess.Popen(
            python_command(module, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            start_new_session=True,
        )

    def ask(
        self, question: object, *, seconds: float | None = None, notify: Callable[[Any], None] | None = None
    ) -> tuple[Any, str]:
        """Return the child's answer, and the text that it wrote to its standard streams meanwhile.

        Args:
            question: a value of JSON.
            seconds: time after which the child is ended; None: no limit.
            notify: called with each value that the child reports before its answer.

        Raises:
            ChildEndedError: if the child ended first.
        """
        process, start = self._process, os.fstat(self._log.fileno()).st_size
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            process.kill()

        timer = threading.Timer(seconds or 0, end)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if seconds is not None:
                timer.start()
            with _terminated_as_interrupted():
                with contextlib.suppress(BrokenPipeError):  # it ended: its log says why
                    process.stdin.write(json.dumps(question) + "\n")
                    process.stdin.flush()
                for line in process.stdout:
                    is_answer, value = json.loads(line)
                    if is_answer:
                        return value, self._read_log(start)
                    if notify is not None:
                        notify(value)
        except BaseException:
            self.close()
            raise
        finally:
            timer.cancel()
        ended, log = end_of(process.wait()), self._read_log(start)
        self.close()
        raise ChildEndedError(f"did not end within {seconds:.0f} s" if is_late.is_set() else ended, log)

    def close(self) -> None:
        """End the child."""
        _end_group(self._process)
        for file in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                assert file is not None
                file.close()

    def _read_log(self, start: int) -> str:
        # the child writes where the file's one position stands: pread leaves it there
        return os.pread(self._log.fileno(), 1 << 20, start).decode(errors="replace")


def serve(answer: Callable[[Any, Callable[[Any], None]], Any]) -> None:
    """Answer the questions of the process that made this one a ``Child``, until it closes the pipe.

    Args:
        answer: ``answer(question, report)`` returns a value of JSON; ``report(value)`` sends one before it.
    """
    replies, one_at_a_time = os.fdopen(os.dup(1), "w", encoding="utf-8"), threading.Lock()
    os.dup2(2, 1)  # for libraries that print

    def reply(is_answer: bool, value: object) -> None:
        with one_at_a_time:  # a library may report from its threads
            replies.write(json.dumps([is_answer, value]) + "\n")
            replies.flush()

    for line in sys.stdin:
        reply(True, answer(json.loads(line), lambda value: reply(False, value)))
