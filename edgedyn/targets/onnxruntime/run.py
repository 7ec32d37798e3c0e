"""Run an ONNX file on the CPU, unoptimized. Device side: numpy and ONNX Runtime only.

Graph optimizations are disabled, because an oracle must not change the graph: on a quantized graph the error
of ONNX Runtime 1.31 was 3.97 at its EXTENDED level, one quantization step at BASIC, and 0 without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedyn.bundle.manifest import FORWARD
from edgedyn.errors import BundleError, ModelError, TargetMissingError, UsageError

if TYPE_CHECKING:
    from edgedyn.targets import Run

THREADS = 2


@dataclass(frozen=True)
class Input:
    """Name, numpy type and shape of one input of a loaded program."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def load(path: Path, program: str = FORWARD) -> Run:
    """Return ``run(*arrays) -> [array, ...]`` for an ONNX file; arrays in its order, of its types and shapes.

    ONNX Runtime computes a float16 operator without a kernel of its own in float32, between casts that it
    inserts.

    Raises:
        TargetMissingError: where ONNX Runtime is not installed.
        BundleError: where the file is missing or is not ONNX.
        ModelError: where ONNX Runtime has no kernel for an operator, for instance a TensorRT plugin.
        UsageError: from ``run``, for arrays of another number, type or shape than the program's inputs.
    """
    session = _open_session(path)
    inputs = [_read_input(value) for value in session.get_inputs()]

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        check_arrays(arrays, inputs)
        outputs: list[np.ndarray] = session.run(
            None, {spec.name: array for spec, array in zip(inputs, arrays, strict=True)}
        )
        return outputs

    return run


def attempt(path: Path, program: str, arrays: Sequence[np.ndarray]) -> None:
    """Load a program and run it once; ONNX Runtime's exceptions and messages pass, or end the process.

    Args:
        path, program: as for ``load``.
        arrays: its inputs.
    """
    load(path, program)(*arrays)


def runtime_name(path: Path) -> str:
    """Return the runtime of ``load(path)`` for people: ``ONNX Runtime 1.31.1, unoptimized``."""
    return f"ONNX Runtime {_import_onnxruntime().__version__}, unoptimized"


def check_arrays(arrays: Sequence[np.ndarray], inputs: Sequence[Input]) -> None:
    """Refuse arrays that differ from a program's inputs in number, type or shape.

    Raises:
        UsageError: with the first difference.
    """
    if len(arrays) != len(inputs):
        raise UsageError(
            f"the program got {len(arrays)} arrays; expected {len(inputs)}: {[s.name for s in inputs]}."
        )
    for array, spec in zip(arrays, inputs, strict=True):
        if array.dtype != spec.dtype or array.shape != spec.shape:
            raise UsageError(
                f"input {spec.name!r} got {array.dtype} {array.shape}; expected {spec.dtype} {spec.shape}. "
                "Shapes are fixed when a program is built: tile or pad the image, or build for this size."
            )


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise TargetMissingError(
            f"ONNX Runtime cannot be imported: {error}. Install it: pip install onnxruntime"
        ) from error
    return onnxruntime


def _open_session(path: Path) -> Any:
    ort = _import_onnxruntime()
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, InvalidProtobuf, NoSuchFile
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = THREADS
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors: the exception below carries them
    try:
        # without its fallback, which would print on stdout and try the same provider again
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)
    except (NoSuchFile, InvalidProtobuf) as error:
        raise BundleError(f"{path.name} cannot be read as ONNX: {error}. Build the bundle again.") from error
    except (Fail, InvalidGraph, NoKernel) as error:
        raise ModelError(
            f"ONNX Runtime {ort.__version__} cannot run {path.name}: {error}. Pick a form of ordinary ops in "
            "the recipe."
        ) from error


def _read_input(value: Any) -> Input:
    types = {"tensor(float)": "float32", "tensor(float16)": "float16"}
    dtype = types.get(value.type, value.type.removeprefix("tensor(").removesuffix(")"))
    return Input(value.name, np.dtype(dtype), tuple(value.shape))
