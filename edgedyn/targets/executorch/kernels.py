"""Our own kernels for ExecuTorch: CMake builds them from ``edgedyn/ops`` into a cache keyed by content.

On loading, the library registers ``edgedyn::<op>.out`` with the runtime. It links the installed package's
runtime, so it is built where it runs; a phone app builds the same folder with its own toolchain.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from edgedyn.errors import TargetMissingError
from edgedyn.targets import native

_FIX = (
    "They need a C++17 compiler, CMake 3.28 or newer and Highway: sudo apt-get install g++ libhwy-dev, "
    'pip install "edgedyn[kernels]". A recipe with kernels: stock needs none of them.'
)


def library() -> native.CompiledFile:
    """Return the description of the library, linked against the installed package."""
    return native.CompiledFile(
        title="the fused kernels",
        project=native.SOURCES,
        file="libedgedyn_ops_executorch.so",
        sources=sources(),
        fix=_FIX,
        options=linked(installed_package()),
        facts=(version("executorch"),),
    )


def sources() -> tuple[Path, ...]:
    """Return the source files of the kernels."""
    return native.find_sources("*.h", "kernel_executorch.cpp", "CMakeLists.txt")


def linked(package: Path) -> tuple[str, ...]:
    """Return CMake's option for the folder of a package of ExecuTorch; the library loads it from there."""
    return (f"-DCMAKE_PREFIX_PATH={package}",)


def build() -> Path:
    """Return the path of the library; compile it first where its sources changed.

    Raises:
        TargetMissingError: without a C++ compiler, CMake or Highway, with CMake's message.
    """
    return library().build()


@functools.cache
def load() -> Path:
    """Build the library where necessary, load it into this process once, and return its path.

    Raises:
        TargetMissingError: as ``build``; where the system does not load it, for instance from a folder
            whose files may not be executed.
    """
    path = build()
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        raise TargetMissingError(
            f"the fused kernels cannot be loaded: {error}. Remove {path.parent}, or set XDG_CACHE_HOME to a "
            "folder whose files may be executed. A recipe with kernels: stock does not need them."
        ) from error
    return path


def installed_package() -> Path:
    """Return the folder of the installed package executorch."""
    spec = find_spec("executorch")
    assert spec is not None  # the target is not loaded without
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])
