"""Our own kernels for ExecuTorch: built from ``edgedyn/ops`` by CMake, cached by content, loaded once.

The library registers ``edgedyn::<op>.out`` with the runtime when it is loaded. It links the runtime of the
installed package, so it is built where it runs; a phone app builds the same folder with its own toolchain.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from edgedyn.targets.executorch.compile import Product, installed_package

SOURCES = Path(__file__).parents[2] / "ops"
_MEND = (
    "They need a C++17 compiler, CMake 3.28 or newer and Highway: sudo apt-get install g++ libhwy-dev, "
    'pip install "edgedyn[kernels]". A recipe with kernels: stock needs none of them.'
)


def build() -> Path:
    """Return the library, compiled first where its sources changed.

    Raises:
        TargetMissingError: without a C++ compiler, CMake or Highway, with CMake's words.
    """
    file = "libedgedyn_ops_executorch.so"
    package = installed_package()
    return Product("the fused kernels", SOURCES, file, (SOURCES,), package, _MEND).build()


@functools.cache
def load() -> Path:
    """Build where necessary, load the library into this process, return it."""
    path = build()
    ctypes.CDLL(str(path))
    return path
