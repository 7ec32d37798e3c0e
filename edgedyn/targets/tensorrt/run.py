"""Run a TensorRT engine, or its ONNX where there is none. Device side: TensorRT and pycuda, or ONNX Runtime.

    model.engine beside model.onnx, TensorRT and a GPU here   -> the engine
    otherwise                                                 -> the ONNX, unoptimized, on the CPU;
                                                                 with plugin nodes: model.decomposed.onnx

``runtime_name`` names the runtime, so that nobody takes a check on a host for one on a Jetson.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from packaging.version import Version

from edgedyn.bundle.manifest import FORWARD
from edgedyn.errors import BundleError, TargetMissingError
from edgedyn.targets.onnxruntime import run as onnxruntime_run

if TYPE_CHECKING:
    from edgedyn.targets import Run

MINIMUM_VERSION = Version("10.1")  # the first with ICudaEngine.device_memory_size_v2; JetPack 6.1 brings 10.3
_ENGINE_SUFFIX = ".engine"


def load(path: Path, program: str = FORWARD) -> Run:
    """Return ``run(*arrays) -> [array, ...]`` for ``model.onnx`` or ``model.engine``.

    Raises:
        TargetMissingError: where TensorRT or a GPU is missing for a ``.engine``, or differs from its
            build's; where ONNX Runtime is missing for an ONNX file.
        BundleError: where the file is missing or damaged.
        UsageError: from ``run``, for arrays of another number, type or shape than the program's inputs.
    """
    engine_path = path.with_suffix(_ENGINE_SUFFIX)
    if path.suffix == _ENGINE_SUFFIX or (engine_path.is_file() and _why_no_engine() is None):
        return EngineRun(engine_path)
    return onnxruntime_run.load(host_path(path))


def decomposed_path(path: Path) -> Path:
    """Return the path of the decomposed counterpart of a model: ``model.decomposed.onnx``."""
    return path.with_suffix(".decomposed.onnx")


def host_path(path: Path) -> Path:
    """Return the model that runs without plugins: the decomposed counterpart where there is one."""
    decomposed = decomposed_path(path)
    return decomposed if decomposed.is_file() else path


def register_plugins(trt: Any, cuda: Any, path: Path) -> None:
    """Register our plugins if a model needs them; such a model has a decomposed counterpart beside it."""
    if decomposed_path(path).is_file():
        from edgedyn.targets.tensorrt import plugin_library

        plugin_library.register(trt, cuda)


def runtime_name(path: Path) -> str:
    """Return the runtime of ``load(path)``: ``TensorRT 10.3.0 engine``, or ONNX Runtime and why no engine."""
    engine_path = path.with_suffix(_ENGINE_SUFFIX)
    reason = _why_no_engine() if engine_path.is_file() else "no TensorRT engine here"
    if reason is None or path.suffix == _ENGINE_SUFFIX:
        return f"TensorRT {require_tensorrt()[0].__version__} engine"
    decomposed = "plugin nodes decomposed, " if decomposed_path(path).is_file() else ""
    return f"{onnxruntime_run.runtime_name(path)} ({decomposed}{reason})"


class EngineRun:
    """A loaded engine with its context, stream and device buffers; call it with arrays, from one thread."""

    def __init__(self, path: Path) -> None:
        self._trt, self._cuda = require_tensorrt()
        if not path.is_file():
            raise BundleError(f"there is no engine {path}. Build it on this machine: edgedyn compile BUNDLE")
        with current_device(self._cuda):
            register_plugins(self._trt, self._cuda, path)
            self._engine = load_engine(self._trt, path)
            self._context = self._engine.create_execution_context()
            self._stream = self._cuda.Stream()
            names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
            specs = [self._describe(name) for name in names]
            self._buffers = {spec.name: self._allocate(spec) for spec in specs}
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        self._inputs = [spec for spec in specs if modes[spec.name] == self._trt.TensorIOMode.INPUT]
        self._outputs = [spec for spec in specs if modes[spec.name] == self._trt.TensorIOMode.OUTPUT]

    def __call__(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Copy the arrays to the device, run, wait, and return the outputs.

        Raises:
            UsageError: for arrays of another number, type or shape than the engine's inputs.
            TargetMissingError: where the device could not run the engine.
        """
        onnxruntime_run.check_arrays(arrays, self._inputs)
        outputs = [np.empty(spec.shape, spec.dtype) for spec in self._outputs]
        with current_device(self._cuda):
            for spec, array in zip(self._inputs, arrays, strict=True):
                self._cuda.memcpy_htod_async(
                    self._buffers[spec.name], np.ascontiguousarray(array), self._stream
                )
            self._start()
            for spec, array in zip(self._outputs, outputs, strict=True):
                self._cuda.memcpy_dtoh_async(array, self._buffers[spec.name], self._stream)
            self._stream.synchronize()
        return outputs

    def time(self, *, runs: int = 50, warm_up: int = 10) -> dict[str, float]:
        """Time the engine alone by CUDA events, without copies, on its buffers as they are; milliseconds."""
        times = []
        with current_device(self._cuda):
            begin, end = self._cuda.Event(), self._cuda.Event()
            for _ in range(warm_up + runs):
                begin.record(self._stream)
                self._start()
                end.record(self._stream)
                end.synchronize()
                times.append(begin.time_till(end))
        timed = times[warm_up:]
        return {"median": float(np.median(timed)), "p95": float(np.percentile(timed, 95)), "runs": runs}

    def _start(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise TargetMissingError("TensorRT could not start the engine; the device may be out of memory.")

    def _describe(self, name: str) -> onnxruntime_run.Input:
        dtype = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
        return onnxruntime_run.Input(name, dtype, tuple(self._engine.get_tensor_shape(name)))

    def _allocate(self, spec: onnxruntime_run.Input) -> Any:
        buffer = self._cuda.mem_alloc(int(np.prod(spec.shape)) * spec.dtype.itemsize)
        self._context.set_tensor_address(spec.name, int(buffer))
        return buffer


def measure_engine(path: Path) -> dict[str, object]:
    """Load an engine and measure it on this GPU, alone.

    Returns:
        ``latency_ms``: median, p95 and runs; ``device_memory_bytes``: the GPU memory of weights, scratch
        memory, inputs and outputs.
    """
    cuda = require_tensorrt()[1]
    with current_device(cuda):
        free = cuda.mem_get_info()[0]
        engine = EngineRun(path)
        latency = engine.time()
        used = free - cuda.mem_get_info()[0]
    return {"latency_ms": latency, "device_memory_bytes": used}


def require_tensorrt() -> tuple[Any, Any]:
    """Return the modules ``tensorrt`` and ``pycuda.driver``, on a machine with a GPU.

    Raises:
        TargetMissingError: where one of them, its version or a GPU is missing, with the fix.
    """
    try:
        import pycuda.driver as cuda
        import tensorrt as trt
    except ImportError as error:
        raise TargetMissingError(
            f"an engine needs TensorRT and pycuda, found: {error}. On a Jetson install JetPack 6.1 or newer, "
            "which brings TensorRT, and: pip install pycuda; elsewhere: pip install 'edgedyn[jetson]'"
        ) from error
    if Version(trt.__version__) < MINIMUM_VERSION:
        raise TargetMissingError(
            f"found TensorRT {trt.__version__}; expected {MINIMUM_VERSION} or newer. "
            "On a Jetson install JetPack 6.1 or newer; elsewhere: pip install 'tensorrt>=10.1'"
        )
    try:
        cuda.init()
        if cuda.Device.count() < 1:
            raise TargetMissingError("CUDA finds no GPU on this machine; an engine needs one.")
    except cuda.Error as error:
        raise TargetMissingError(
            f"CUDA cannot start: {error}. An engine needs an NVIDIA GPU and its driver on this machine."
        ) from error
    return trt, cuda


@contextmanager
def current_device(cuda: Any) -> Iterator[Any]:
    """Make the first GPU current, in its primary context, which TensorRT itself uses."""
    device = cuda.Device(0)
    context = device.retain_primary_context()
    context.push()
    try:
        yield device
    finally:
        context.pop()


def load_engine(trt: Any, path: Path) -> Any:
    """Deserialize an engine.

    Raises:
        TargetMissingError: where TensorRT refuses it.
    """
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise TargetMissingError(
            f"TensorRT {trt.__version__} refuses {path.name}; expected an engine built with this version on "
            "this GPU. Build it again on this machine: edgedyn compile BUNDLE"
        )
    return engine


def _why_no_engine() -> str | None:
    """Return why an engine cannot run here, or None where it can."""
    try:
        require_tensorrt()
    except TargetMissingError as error:
        return f"an engine is here, but {error}"
    return None
