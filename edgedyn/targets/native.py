"""Compile our C++ and CUDA on the machine that runs it: by CMake, once, into a cache keyed by content."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from edgedyn.cache import build_cached, cached_path
from edgedyn.children import run_tool
from edgedyn.errors import TargetMissingError

SOURCES = Path(__file__).parents[1] / "ops"


@dataclass(frozen=True)
class CompiledFile:
    """One file that CMake builds.

    Attributes:
        title: name of the file for people, in the error of a failed build.
        project: folder of its ``CMakeLists.txt``.
        file: plain name.
        sources: source files.
        fix: sentence on the tools that a build needs, for the error.
        options: options of CMake.
        facts: further parts of the cache key: versions, paths of packages.
        target: target of CMake.
    """

    title: str
    project: Path
    file: str
    sources: tuple[Path, ...]
    fix: str
    options: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    target: str = "all"

    def path(self) -> Path:
        """Return its place in the cache, whether it is built or not."""
        return cached_path(self.file, self.sources, *self.options, *self.facts)

    def build(self) -> Path:
        """Return its path; compile it first where a source changed, or the file is not as it was built.

        Raises:
            TargetMissingError: without a compiler, CMake or a package that it needs, with CMake's message.
            UsageError: if the cache's folder is not this user's.
        """
        return build_cached(self.path(), self._make)

    def _make(self, folder: Path) -> Path:
        configure = ("-S", self.project, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", *self.options)
        compile_it = ("--build", folder, "--target", self.target, "--parallel", os.cpu_count() or 1)
        for command in (configure, compile_it):
            if message := _cmake(*command):
                raise TargetMissingError(f"{self.title} cannot be built here: {message} {self.fix}")
        return folder / self.file


def find_sources(*patterns: str) -> tuple[Path, ...]:
    """Return the files of the ops whose names match a pattern."""
    return tuple(sorted({path for pattern in patterns for path in SOURCES.rglob(pattern)}))


def _cmake(*arguments: object) -> str | None:
    """Run the CMake of this environment, or else the machine's; return its error message, None on success."""
    beside = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if cmake is None:
        return "there is no cmake."
    done = run_tool([cmake, *arguments])
    if not done.returncode:
        return None
    lines = (line.strip() for line in (done.stderr + done.stdout).splitlines())
    messages = [line for line in lines if line and not line.startswith("--")]  # "--" marks success
    first = next((k for k, line in enumerate(messages) if "error" in line.lower()), 0)
    return " ".join(messages[first : first + 4])
