"""Our C++ compiled against a package of ExecuTorch: by CMake, cached by content, for any machine."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from edgedyn.errors import TargetMissingError


@dataclass(frozen=True)
class Product:
    """One file that CMake makes.

    Attributes:
        what: what it is, for the error of a build that fails.
        project: the folder of its ``CMakeLists.txt``.
        file: its plain name.
        sources: the folders whose C++ and CMake files it is made of: their content names the cached file.
        package: the folder ``executorch`` of the package that it links.
        options: what CMake needs to know besides: a cross compiler.
        mend: what a machine needs to build it, for the error.
    """

    what: str
    project: Path
    file: str
    sources: tuple[Path, ...]
    package: Path
    mend: str
    options: tuple[str, ...] = ()

    def path(self) -> Path:
        """Return where the file of these sources stands or would stand: a folder named by their content."""
        linked = (
            f"{version('executorch')} {self.package} {self.options}"  # a product finds its package by path
        )
        content = hashlib.sha256(f"{platform.platform()} {linked}".encode())
        for folder in self.sources:
            for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cpp", ".txt")):
                content.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
        return cache() / f"{self.file.split('.')[0]}-{content.hexdigest()[:16]}" / self.file

    def build(self) -> Path:
        """Return the file, compiled first where its sources changed.

        Raises:
            TargetMissingError: without what it needs, with CMake's words.
        """
        path = self.path()
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent.parent) as folder:
            prefix = f"-DCMAKE_PREFIX_PATH={self.package}"
            self._cmake("-S", self.project, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", prefix, *self.options)
            self._cmake("--build", folder, "--parallel", str(os.cpu_count() or 1))
            (Path(folder) / self.file).replace(path)  # whole or not at all, whoever else builds
        return path

    def _cmake(self, *arguments: object) -> None:
        """Run the CMake of this environment, or else the machine's."""
        beside = Path(sys.executable).parent
        found = shutil.which("cmake", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
        if found is None:
            raise TargetMissingError(f"{self.what} cannot be built here: there is no cmake. {self.mend}")
        done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode:
            words = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            wrong = next((k for k, line in enumerate(words) if "error" in line.lower()), 0)
            shown = " ".join(words[wrong : wrong + 4])
            raise TargetMissingError(f"{self.what} cannot be built here: {shown} {self.mend}")


def cache() -> Path:
    """Return the folder of what is built or fetched once and used by every checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgedyn"


def installed_package() -> Path:
    """Return the folder of the installed package executorch."""
    spec = find_spec("executorch")
    assert spec is not None  # the target is not loaded without
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])
