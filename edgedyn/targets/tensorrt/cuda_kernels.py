"""Our CUDA kernels: nvcc compiles ``edgedyn/ops`` into a cache keyed by content; ``ctypes`` calls them.

The library has one C function per op, ``edgedyn_<op>(const Call*)``; ``ops/cuda.h`` defines ``Call``.
Device side: the standard library and nvcc only.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edgedyn.cache import build_cached, cached_path
from edgedyn.children import run_tool
from edgedyn.errors import ModelError, TargetMissingError
from edgedyn.targets import native
from edgedyn.targets.tensorrt.signatures import SIGNATURES

LIBRARY = "libedgedyn_ops_cuda.so"
TYPES = ("float32", "float16", "int8")
COMPILE = ("-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-fPIC", f"-I{native.SOURCES}")
_INVALID_VALUE = 1
_FIX = (
    "They need nvcc 12 or newer and a C++17 compiler: JetPack has both; elsewhere install the CUDA toolkit "
    "(https://developer.nvidia.com/cuda-downloads) and put its bin folder on PATH."
)


class Affine(NamedTuple):
    """Quantization parameters of an INT8 tensor, real = (stored - zero_point) * scale."""

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
    """Return the kernels, one file per op."""
    return list(native.find_sources("kernel_cuda.cu"))


def find_nvcc() -> str:
    """Return nvcc on PATH, or in the usual folders of the toolkit.

    Raises:
        TargetMissingError: where there is none.
    """
    folders = [f"{os.environ[name]}/bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders, "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is None:
        raise TargetMissingError(f"the CUDA kernels cannot be built here: there is no nvcc. {_FIX}")
    return nvcc


def library_path(architecture: str) -> Path:
    """Return the library's place in the cache: a folder named by the content of its sources."""
    release = run_tool([find_nvcc(), "--version"]).stdout
    files = native.find_sources("*.h", "*.cuh", "kernel_cuda.cu")
    return cached_path(LIBRARY, files, release, architecture)


def build(architecture: str) -> Path:
    """Return the library for one GPU generation; compile it first where its sources changed or it is damaged.

    Args:
        architecture: nvcc's name: ``sm_87`` (Orin), ``sm_110`` (Thor), ``sm_90`` (H200), ...

    Raises:
        TargetMissingError: without nvcc, or with its message where it fails.
    """

    def make(folder: Path) -> Path:
        options = [*COMPILE, f"-arch={architecture}", "--shared", "--threads=4", "-o", folder / LIBRARY]
        done = run_tool([find_nvcc(), *options, *sources()])
        if done.returncode:
            message = " ".join((done.stderr + done.stdout).split())[:600]
            raise TargetMissingError(f"the CUDA kernels cannot be built here: {message} {_FIX}")
        return folder / LIBRARY

    return build_cached(library_path(architecture), make)


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
    """Launch the kernel of an op on the current device, asynchronously on a stream.

    Args:
        library: from ``build``.
        op: name of the op.
        dtype: of x and y, one of ``TYPES``.
        inputs: tensors of the op's schema in order, None for an absent optional one. All have the dtype, but
            with an INT8 x the others are float32.
        attributes: the other arguments of the schema in order.
        output: pointer to y, a dense tensor of the op's output shape.
        of_x: quantization parameters of an INT8 x.
        of_y: quantization parameters of an INT8 y.
        stream: handle of a CUDA stream; 0 is the default one.

    Raises:
        ModelError: for arguments that the kernel does not support.
        TargetMissingError: where CUDA cannot launch the kernel.
    """
    arguments = _Call(type=TYPES.index(dtype), output=output, stream=stream)
    for k, array in enumerate(inputs):
        if array is not None:
            arguments.inputs[k] = array.pointer
            arguments.shapes[k][: len(array.shape)] = list(array.shape)
    choices = SIGNATURES[op].attributes.values()
    named = zip(attributes, choices, strict=True)
    values = [known.index(value) if isinstance(value, str) else int(value) for value, known in named]
    arguments.attributes[: len(values)] = values
    arguments.of_x, arguments.of_y = (_Quantization(*q, 1 / q.scale if q.scale else 0) for q in (of_x, of_y))
    error = getattr(load(library), f"edgedyn_{op}")(ctypes.byref(arguments))
    if error == _INVALID_VALUE:
        shapes = [None if array is None else tuple(array.shape) for array in inputs]
        raise ModelError(
            f"the CUDA kernel of {op} does not take shapes {shapes} with {list(attributes)} as {dtype}; "
            "expected arguments that pass the op's own check. Compare them with the op's schema."
        )
    if error:
        raise TargetMissingError(
            f"the CUDA kernel of {op} could not be launched: CUDA error {error}; expected a GPU, its "
            "driver and a library of its architecture. Build it for the GPU that nvidia-smi lists."
        )
