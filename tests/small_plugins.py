"""What the tests of TensorRT plugins share: examples as nodes, TensorRT's headers, a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from edgedyn import ops
from edgedyn.targets import native

OPS = {
    name: op
    for name, op in ops.load_all().items()
    if (native.SOURCES / name / "plugin_tensorrt.cpp").is_file()
}
KINDS = ("float32", "float16", "int8")
KEPT: list[Any] = []
CASES = [
    pytest.param(op, args, id=f"{name}-{k}")
    for name, op in OPS.items()
    for k, args in enumerate(op.examples())
]
every_case = pytest.mark.parametrize(("op", "args"), CASES)
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def values_of(op: ops.Op, args: tuple[Any, ...]) -> dict[str, int]:
    """Return the attributes of an op's node: its arguments behind the tensors as numbers."""
    orders = {"combine": ["mul", "add"], "activation": ["none", "relu", "relu6"]}
    given = list(args) + [a.default_value for a in op.overload._schema.arguments[len(args) :]]
    named = zip((a.name for a in op.overload._schema.arguments), given, strict=True)
    return {
        name: orders[name].index(value) if name in orders else int(value)
        for name, value in named
        if isinstance(value, int | str)
    }


def tensors_of(op: ops.Op, args: tuple[Any, ...]) -> list[tuple[int, ...] | None]:
    """Return the shapes of the schema's tensors."""
    return [None if a is None else tuple(a.shape) for a in args if a is None or isinstance(a, Tensor)]


def node_inputs(op: ops.Op, args: tuple[Any, ...]) -> list[tuple[int, ...]]:
    """Return the shapes of a node's inputs: an optional one stands last, or not at all."""
    shapes = tensors_of(op, args)
    if op.name == "masked_conv2d":
        shapes.append(shapes.pop(2))
    return [shape for shape in shapes if shape is not None]


def make_fields(trt: Any, values: dict[str, int | float]) -> Any:
    """Return a node's attributes as TensorRT's parser gives them."""
    kinds = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32}
    arrays = [np.array([v], np.float32 if isinstance(v, float) else np.int32) for v in values.values()]
    KEPT.extend(arrays)  # a field only points at its array
    named = zip(values, arrays, strict=True)
    return trt.PluginFieldCollection([trt.PluginField(n, a, kinds[a.dtype.name]) for n, a in named])


def find_headers() -> Path | None:
    given = os.environ.get("TENSORRT_ROOT")
    places = [Path(given) / "include"] if given else []
    places += [Path(f"/usr/include/{machine}-linux-gnu") for machine in ("aarch64", "x86_64")]
    return next((place for place in places if (place / "NvInferRuntime.h").is_file()), None)


def find_cuda() -> Path | None:
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
    places = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    places += [Path("/usr/local/cuda/include"), Path("/usr/include")]
    return next((place for place in places if (place / "cuda_runtime_api.h").is_file()), None)


def compile_plugins(made: Path, *flags: str) -> None:
    """Compile the plugins with stand-ins for the kernels, or skip."""
    headers, cuda = find_headers(), find_cuda()
    if headers is None or cuda is None or shutil.which("g++") is None:
        pytest.skip(
            f"needs g++, TensorRT's headers (TENSORRT_ROOT, found: {headers}) and CUDA's (found: {cuda})"
        )
    sources = [Path(__file__).with_name("plugin_host.cpp"), native.SOURCES / "tensorrt/plugin.cpp"]
    sources += sorted(native.SOURCES.glob("*/plugin_tensorrt.cpp"))
    kernels = " ".join(f"KERNEL({name})" for name in OPS)
    checks = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", f"-DKERNELS={kernels}"]
    folders = [f"-I{native.SOURCES}", "-isystem", headers, "-isystem", cuda]
    command = ["g++", "-std=c++17", "-O1", *checks, *flags, *folders, *sources, "-o", made]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
