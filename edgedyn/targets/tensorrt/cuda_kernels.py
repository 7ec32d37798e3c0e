"""Our CUDA kernels: compiled from ``edgedyn/ops`` by nvcc, cached by content, called by ``ctypes``.

The library has one C function an op, ``edgedyn_<op>(const Call*)``; ``ops/cuda.h`` says what it takes.
Device side: the standard library and nvcc only.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgedyn.errors import ModelError, TargetMissingError
from edgedyn.files import cached_path
from edgedyn.targets import native
from edgedyn.targets.tensorrt.signatures import SIGNATURES

LIBRARY = "libedgedyn_ops_cuda.so"
TYPES = ("float32", "float16", "int8")
COMPILE = ("-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-fPIC", f"-I{native.SOURCES}")
_INVALID_VALUE = 1
_MEND = (
    "They need nvcc 12 or newer and a C++17 compiler: JetPack has both; elsewhere install the CUDA toolkit "
    "(https://developer.nvidia.com/cuda-downloads) and put its bin folder on PATH."
)


class Affine(NamedTuple):
    """INT8 of a tensor, real = (stored - zero_point) * scale."""

    scale: float = 1.0
    zero_point: int = 0


_PLAIN = Affine()


class Array(NamedTuple):
    """A dense tensor on the device."""

    pointer: int
    shape: Sequence[int]


class _Quantization(ctypes.Structure):
    _fields_ = (("scale", ctypes.c_float), ("zero_point", ctypes.c_int32), ("inverse", ctypes.c_float))


class _Call(ctypes.Structure):
    """``struct Call`` of ops/cuda.h."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("inputs", ctypes.c_void_p * 4),
        ("shapes", ctypes.c_int64 * 4 * 4),
        ("attributes", ctypes.c_int64 * 8),
        ("output", ctypes.c_void_p),
        ("of_x", _Quantization),
        ("of_y", _Quantization),
        ("stream", ctypes.c_void_p),
    )


def sources() -> list[Path]:
    """Return the kernels, one file an op."""
    return list(native.find_sources("kernel_cuda.cu"))


def find_nvcc() -> str:
    """Return the compiler on PATH, or where toolkits put it.

    Raises:
        TargetMissingError: when there is none.
    """
    folders = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders, "/usr/local/cuda/bin"])
    found = shutil.which("nvcc", path=path)
    if found is None:
        raise TargetMissingError(f"the CUDA kernels cannot be built here: there is no nvcc. {_MEND}")
    return found


def library_path(architecture: str) -> Path:
    """Return where the library of these sources stands or would stand: a folder named by their content."""
    words = subprocess.run([find_nvcc(), "--version"], capture_output=True, check=False).stdout
    files = native.find_sources("*.h", "*.cuh", "kernel_cuda.cu")
    return cached_path(LIBRARY, files, words.decode(), architecture)


def build(architecture: str) -> Path:
    """Return the library for one GPU generation, compiled first where its sources changed.

    Args:
        architecture: as nvcc names it: ``sm_87`` (Orin), ``sm_110`` (Thor), ``sm_90`` (H200), ...

    Raises:
        TargetMissingError: without nvcc, or with its words where it fails.
    """
    path = library_path(architecture)
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent.parent) as folder:
        made = Path(folder) / LIBRARY
        options = [*COMPILE, f"-arch={architecture}", "--shared", "--threads=4", "-o", str(made)]
        command = [find_nvcc(), *options, *map(str, sources())]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            words = " ".join((done.stderr + done.stdout).split())[:600]
            raise TargetMissingError(f"the CUDA kernels cannot be built here: {words} {_MEND}")
        made.replace(path)  # whole or not at all, whoever else builds
    return path


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    """Load a library into this process, once."""
    return ctypes.CDLL(str(library))


def call(
    library: Path,
    op: str,
    dtype: str,
    *,
    inputs: Sequence[Array | None],
    attributes: Sequence[int | bool | str],
    output: int,
    of_x: Affine = _PLAIN,
    of_y: Affine = _PLAIN,
    stream: int = 0,
) -> None:
    """Launch the kernel of an op on the current device; it runs when its stream comes to it.

    Args:
        library: from ``build``.
        op: name of the op.
        dtype: of x and y, one of ``TYPES``.
        inputs: the tensors of the op's schema in order, None for an optional one that is absent. All are of
            the dtype, but beside INT8 float32.
        attributes: the other arguments of the schema in order.
        output: pointer to y, of the shape that the op gives.
        of_x: INT8 of x.
        of_y: INT8 of y.
        stream: handle of a CUDA stream; 0 is the default one.

    Raises:
        ModelError: for arguments that the kernel does not take.
        TargetMissingError: when CUDA cannot launch it here.
    """
    given = _Call(type=TYPES.index(dtype), output=output, stream=stream)
    for k, array in enumerate(inputs):
        if array is not None:
            given.inputs[k] = array.pointer
            given.shapes[k][: len(array.shape)] = list(array.shape)
    choices = SIGNATURES[op].attributes.values()
    named = zip(attributes, choices, strict=True)
    values = [known.index(value) if isinstance(value, str) else int(value) for value, known in named]
    given.attributes[: len(values)] = values
    given.of_x, given.of_y = (_Quantization(*q, 1 / q.scale if q.scale else 0) for q in (of_x, of_y))
    error = getattr(load(library), f"edgedyn_{op}")(ctypes.byref(given))
    if error == _INVALID_VALUE:
        shapes = [None if array is None else tuple(array.shape) for array in inputs]
        raise ModelError(
            f"the CUDA kernel of {op} does not take shapes {shapes} with {list(attributes)} as {dtype}; "
            "expected what the op's own check takes. Check the arguments against the op."
        )
    if error:
        raise TargetMissingError(
            f"the CUDA kernel of {op} could not be launched: CUDA error {error}; expected a GPU, its "
            "driver and a library of its architecture. Build it for the GPU that nvidia-smi lists."
        )
