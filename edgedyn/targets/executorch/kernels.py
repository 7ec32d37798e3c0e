"""Our own kernels for ExecuTorch: built from ``edgedyn/ops`` by CMake, cached by content, loaded once.

The library registers ``edgedyn::<op>.out`` with the runtime when it is loaded. It links the runtime of the
installed package, so it is built where it runs; a phone app builds the same folder with its own toolchain.
"""

from __future__ import annotations

import ctypes
import functools
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from edgedyn.targets import native

_MEND = (
    "They need a C++17 compiler, CMake 3.28 or newer and Highway: sudo apt-get install g++ libhwy-dev, "
    'pip install "edgedyn[kernels]". A recipe with kernels: stock needs none of them.'
)


def product() -> native.Product:
    """Return what is built: the library, against the installed package."""
    return native.Product(
        what="the fused kernels",
        project=native.SOURCES,
        file="libedgedyn_ops_executorch.so",
        sources=sources(),
        fix=_MEND,
        options=linked(installed_package()),
        facts=(version("executorch"),),
    )


def sources() -> tuple[Path, ...]:
    """Return the files that the kernels are made of."""
    return native.find_sources("*.h", "kernel_executorch.cpp", "CMakeLists.txt")


def linked(package: Path) -> tuple[str, ...]:
    """Return what tells CMake where a package of ExecuTorch stands; what it builds finds it by that path."""
    return (f"-DCMAKE_PREFIX_PATH={package}",)


def build() -> Path:
    """Return the library, compiled first where its sources changed.

    Raises:
        TargetMissingError: without a C++ compiler, CMake or Highway, with CMake's words.
    """
    return product().build()


@functools.cache
def load() -> Path:
    """Build where necessary, load the library into this process, return it."""
    path = build()
    ctypes.CDLL(str(path))
    return path


def installed_package() -> Path:
    """Return the folder of the installed package executorch."""
    spec = find_spec("executorch")
    assert spec is not None  # the target is not loaded without
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])
