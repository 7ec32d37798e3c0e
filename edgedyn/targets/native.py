"""Our C++ and CUDA, compiled where it runs: by CMake, once, into a cache named by its content."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from edgedyn.errors import TargetMissingError
from edgedyn.files import cached_path

SOURCES = Path(__file__).parents[1] / "ops"


@dataclass(frozen=True)
class Product:
    """One file that CMake makes.

    Attributes:
        what: what it is, for the error of a build that fails.
        project: the folder of its ``CMakeLists.txt``.
        file: its plain name.
        sources: the files that it is made of.
        fix: what a machine needs to build it, for the error.
        options: of CMake.
        facts: what else decides what it is: versions, paths of packages.
        target: of CMake, where not all is wanted.
    """

    what: str
    project: Path
    file: str
    sources: tuple[Path, ...]
    fix: str
    options: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()
    target: str = "all"

    def path(self) -> Path:
        """Return where it stands or would stand."""
        return cached_path(self.file, self.sources, *self.options, *self.facts)

    def build(self) -> Path:
        """Return it, compiled first where a source changed.

        Raises:
            TargetMissingError: without a compiler, CMake or what it looks for, with CMake's words.
        """
        path = self.path()
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent.parent) as folder:
            configure = ("-S", self.project, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", *self.options)
            compile_it = ("--build", folder, "--target", self.target, "--parallel", os.cpu_count() or 1)
            for command in (configure, compile_it):
                if wrong := _cmake(*command):
                    raise TargetMissingError(f"{self.what} cannot be built here: {wrong} {self.fix}")
            (Path(folder) / self.file).replace(path)  # whole or not at all, whoever else builds
        return path


def find_sources(*patterns: str) -> tuple[Path, ...]:
    """Return the files of the ops that have such names."""
    return tuple(sorted({path for pattern in patterns for path in SOURCES.rglob(pattern)}))


def _cmake(*arguments: object) -> str | None:
    """Run the CMake of this environment, or else the machine's; return what went wrong."""
    beside = Path(sys.executable).parent
    found = shutil.which("cmake", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        return "there is no cmake."
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, check=False)
    if not done.returncode:
        return None
    lines = (line.strip() for line in (done.stderr + done.stdout).splitlines())
    words = [line for line in lines if line and not line.startswith("--")]  # what went well begins with --
    wrong = next((k for k, line in enumerate(words) if "error" in line.lower()), 0)
    return " ".join(words[wrong : wrong + 4])
