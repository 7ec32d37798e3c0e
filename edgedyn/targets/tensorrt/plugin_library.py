"""Build and register our TensorRT plugins: the library in C++, or else the classes in Python.

    edgedyn plugin build; trtexec --onnx=model.onnx --stronglyTyped --dynamicPlugins=libedgedyn_plugins.so

The library includes the CUDA kernels. Compiling it needs TensorRT's headers; it links none of TensorRT's
libraries. Device side: the standard library, nvcc, CMake.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from edgedyn.errors import TargetMissingError
from edgedyn.targets import native
from edgedyn.targets.tensorrt import cuda_kernels
from edgedyn.targets.tensorrt.plugins import make_creators

_SOURCES = ("*.h", "*.cuh", "kernel_cuda.cu", "plugin_tensorrt.cpp", "plugin.cpp", "CMakeLists.txt")
_FIX = (
    "They need nvcc, a C++17 compiler, CMake 3.24 or newer and TensorRT's headers: on a Jetson sudo apt-get "
    "install libnvinfer-dev g++ and pip install cmake; elsewhere the CUDA toolkit, and TENSORRT_ROOT set to "
    "the folder that has include/NvInfer.h. A recipe with kernels: stock needs none of them."
)


def library() -> native.CompiledFile:
    """Return the description of the library, compiled against the headers that CMake finds."""
    return native.CompiledFile(
        title="the TensorRT plugins",
        project=native.SOURCES / "tensorrt",
        file="libedgedyn_plugins.so",
        sources=native.find_sources(*_SOURCES),
        fix=_FIX,
        facts=(os.environ.get("TENSORRT_ROOT", ""),),
    )


def build() -> Path:
    """Return the path of the plugin library; compile it for this GPU first where its sources changed.

    Raises:
        TargetMissingError: without nvcc, TensorRT's headers, CMake or a compiler, with CMake's message.
    """
    return library().build()


@functools.cache
def register(trt: Any, cuda: Any) -> tuple[Any, ...]:
    """Register the plugins with TensorRT, once per process; return the objects that must stay alive.

    Args:
        trt: the module ``tensorrt``.
        cuda: the module ``pycuda.driver``, started.

    Raises:
        TargetMissingError: where neither library nor kernels can be built, or TensorRT refuses them.
    """
    registry = trt.get_plugin_registry()
    try:
        path = build()
    except TargetMissingError:
        kernels = cuda_kernels.build("sm_{}{}".format(*cuda.Device(0).compute_capability()))
        creators = make_creators(trt, functools.partial(cuda_kernels.call, kernels))
        refused = sorted(c.name for c in creators if not registry.register_creator(c, "edgedyn"))
        if refused:
            raise TargetMissingError(
                f"TensorRT {trt.__version__} refuses the plugins {', '.join(refused)}; expected none of that "
                "name in the namespace edgedyn. Load no other plugin library of ours."
            ) from None
        return tuple(creators)
    handle = registry.load_library(str(path))
    if handle is None:
        raise TargetMissingError(
            f"TensorRT {trt.__version__} refuses the plugin library {path}; expected one compiled against "
            "its own headers. Delete the file and run: edgedyn plugin build"
        )
    return (handle,)
