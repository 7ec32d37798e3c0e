"""Our own kernels for ExecuTorch: built from ``edgedyn/ops`` by CMake, cached by content, loaded once.

The library registers ``edgedyn::<op>.out`` with the runtime when it is loaded. It links the runtime of the
installed package, so it is built where it runs; a phone app builds the same folder with its own toolchain.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from edgedyn.errors import TargetMissingError

SOURCES = Path(__file__).parents[2] / "ops"
LIBRARY = "libedgedyn_ops_executorch.so"
_MEND = (
    "They need a C++17 compiler, CMake 3.28 or newer and Highway: sudo apt-get install g++ libhwy-dev, "
    'pip install "edgedyn[kernels]". A recipe with kernels: stock needs none of them.'
)


def library_path() -> Path:
    """Return where the library of these sources stands or would stand: a folder named by their content."""
    content = hashlib.sha256(f"{version('executorch')} {platform.platform()}".encode())
    for path in sorted(p for p in SOURCES.rglob("*") if p.suffix in (".h", ".cpp", ".txt")):
        content.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "edgedyn" / f"ops-{content.hexdigest()[:16]}" / LIBRARY


def build() -> Path:
    """Return the library, compiled first where its sources changed.

    Raises:
        TargetMissingError: without a C++ compiler, CMake or Highway, with CMake's words.
    """
    path = library_path()
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent.parent) as folder:
        prefix = f"-DCMAKE_PREFIX_PATH={_executorch_folder()}"
        _cmake("-S", SOURCES, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", prefix)
        _cmake("--build", folder, "--parallel", str(os.cpu_count() or 1))
        (Path(folder) / LIBRARY).replace(path)  # whole or not at all, whoever else builds
    return path


@functools.cache
def load() -> Path:
    """Build where necessary, load the library into this process, return it."""
    path = build()
    ctypes.CDLL(str(path))
    return path


def _executorch_folder() -> str:
    from importlib.util import find_spec

    spec = find_spec("executorch")
    assert spec is not None  # the target is not loaded without
    assert spec.submodule_search_locations is not None
    return spec.submodule_search_locations[0]


def _cmake(*arguments: object) -> None:
    """Run the CMake of this environment, or else the machine's."""
    beside = Path(sys.executable).parent
    found = shutil.which("cmake", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise TargetMissingError(f"the fused kernels cannot be built here: there is no cmake. {_MEND}")
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        wrong = next((k for k, line in enumerate(words) if "error" in line.lower()), 0)
        shown = " ".join(words[wrong : wrong + 4])
        raise TargetMissingError(f"the fused kernels cannot be built here: {shown} {_MEND}")
