"""Code blocks of Markdown pages, and a folder to run those of one page in, one after the other.

A comment in front of a block, ``<!-- test: ... -->``, says how it differs from its plain run:

    skip: REASON          not run, for instance because it needs a device
    slow: REASON          run by make test-long only
    first: COMMAND        a shell command before the block
    with OPTIONS          appended to each edgedyn build, calibrate and inspect: a small shape
    replace OLD => NEW    replaced in the block

``sh`` and ``python`` blocks run; a block with a title is a file that the page tells its reader to write.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MARK = re.compile(r"<!-- test: (?P<text>.*) -->$")
_FENCE = re.compile(r"```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?$")
_SMALLER = ("build", "calibrate", "inspect")
_OPERATORS = re.compile(r"&&|\|\||[|;<>$]|\bexport\b")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it stands, its language, its title, its marks and its text."""

    page: str
    line: int
    language: str
    title: str | None
    marks: tuple[str, ...]
    code: str

    def mark(self, name: str) -> str | None:
        """Return the text behind a mark's name, or None."""
        found = [text.removeprefix(name).lstrip(": ") for text in self.marks if text.startswith(name)]
        return found[0] if found else None

    @property
    def text(self) -> str:
        """The code, with every replacement made."""
        code = self.code
        for mark in self.marks:
            if mark.startswith("replace "):
                old, _, new = mark.removeprefix("replace ").partition(" => ")
                assert old in code, f"{self.page}:{self.line} holds no {old!r}"
                code = code.replace(old, new)
        return code


def read_blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, in their order."""
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    marks: list[str] = []
    for number, line in lines:
        mark, fence = _MARK.match(line), _FENCE.match(line)
        if mark:
            marks.append(mark["text"])
        elif line.startswith("```"):
            assert fence, f"{page.name}:{number}: {line!r} is no fence that the tests know"
            code = []
            for _, inner in lines:
                if inner == "```":
                    break
                code.append(inner + "\n")
            yield Block(page.name, number, fence["language"], fence["title"], tuple(marks), "".join(code))
            marks = []
        else:
            assert not marks, f"{page.name}:{number}: a test comment stands in front of no block"


@dataclass
class Reader:
    """Follows a page in a folder of its own, as a reader would with a checkout at hand.

    ``edgedyn`` lines run in this process, where torch is imported already; other lines in a shell.
    """

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__page__"})

    def __post_init__(self) -> None:
        for name in ("tools", "recipes", "calib"):
            (self.folder / name).symlink_to(ROOT / name)
        command = self.folder / "bin/edgedyn"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgedyn.cli.app "$@"\n')
        command.chmod(0o755)

    def follow(self, block: Block) -> None:
        """Run a block, or write the file that it is."""
        for mark in block.marks:
            if mark.startswith("first"):
                self.shell(mark.removeprefix("first: "))
        if block.title:
            path = self.folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            sys.modules.pop(path.stem, None)  # of another page
            importlib.invalidate_caches()
        elif block.language == "python":
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), self.names)
        elif block.language == "sh":
            self._commands(block)

    def _commands(self, block: Block) -> None:
        text = re.sub(r"(^|\s)#.*$", "", block.text.replace("\\\n", " "), flags=re.MULTILINE)
        lines = [shlex.split(line) for line in text.splitlines()]
        if _OPERATORS.search(text) or any(words[:1] != ["edgedyn"] for words in lines if words):
            assert block.mark("with") is None, "options are appended to plain edgedyn lines only"
            self.shell(text)
            return
        for _, *words in filter(None, lines):
            smaller = shlex.split(block.mark("with") or "") if words[0] in _SMALLER else []
            smaller += ["--no-compare"] if words[0] == "build" else []
            self.edgedyn([*words, *smaller])

    def edgedyn(self, words: list[str]) -> None:
        """Run a command of ours; a refusal is raised as it is, and a failed check is a failure."""
        from edgedyn.cli.app import app

        code = app(words, standalone_mode=False)
        assert code in (None, 0), f"edgedyn {shlex.join(words)} ended with exit code {code}"

    def shell(self, text: str) -> None:
        """Run shell commands in the folder; the first that fails ends them."""
        path = os.pathsep.join(
            [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
