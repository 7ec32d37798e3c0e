"""Build a TensorRT engine from an ONNX file, on the machine that will run it.

    model.onnx --NVIDIA's parser--> strongly typed network --builder, timing kernels on this GPU--> engine

An engine fits one TensorRT version and one GPU model, so it is built where it runs. Device side: TensorRT and
pycuda only. The module ``tensorrt`` is the argument ``trt``: the check build passes TensorRT-RTX, which has
the same interface.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgedyn.errors import BundleError, ModelError, UsageError
from edgedyn.files import replace_file
from edgedyn.targets.tensorrt.run import (
    current_device,
    measure_engine,
    register_plugins,
    require_tensorrt,
)

Progress = Callable[[str, int, int], None]


def compile_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    workspace_bytes: int | None = None,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Build ``engine_path`` from ``onnx_path`` for the GPU of this machine; takes minutes on a Jetson.

    Args:
        onnx_path: file of the ``tensorrt`` target; its types decide the precision.
        engine_path: replaced only by a whole engine.
        workspace_bytes: limit on the scratch memory of a layer; None: TensorRT's default, all memory.
        timing_cache: file with kernel timings of earlier builds; read if it exists, then replaced.
        progress: called with (phase, steps done, steps of the phase), from TensorRT's threads.

    Returns:
        ``tensorrt`` (its version), ``device``, ``compute_capability``, ``layers``, ``engine_bytes``,
        ``scratch_bytes``, ``seconds``; ``latency_ms`` and ``device_memory_bytes`` of ``measure_engine``.

    Raises:
        TargetMissingError: where TensorRT 10.1 or newer, pycuda, or a GPU is missing; where the model needs
            our plugins and they cannot be built here.
        BundleError: where the ONNX file is missing.
        UsageError: for a timing cache of another GPU or version.
        ModelError: with the parser's errors per node, or the builder's.
    """
    trt, cuda = require_tensorrt()
    with current_device(cuda) as device:
        start, log = time.perf_counter(), create_logger(trt)
        register_plugins(trt, cuda, onnx_path)
        builder = trt.Builder(log)
        network = parse_network(trt, builder, log, onnx_path)
        config = create_config(trt, builder)
        if workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        monitor = create_monitor(trt, progress) if progress else None  # must outlive the build
        if monitor:
            config.progress_monitor = monitor
        timings = attach_timings(config, timing_cache) if timing_cache else None
        plan = build_plan(builder, network, config, log)
        engine = trt.Runtime(log).deserialize_cuda_engine(plan)
        if engine is None:
            raise ModelError(f"TensorRT cannot load the engine that it has built: {_errors(log)}.")
        replace_file(engine_path, plan)
        if timing_cache and timings:
            replace_file(timing_cache, timings.serialize())
        facts = {
            "tensorrt": trt.__version__,
            "device": device.name(),
            "compute_capability": "{}.{}".format(*device.compute_capability()),
            "layers": engine.num_layers,
            "engine_bytes": plan.nbytes,
            "scratch_bytes": engine.device_memory_size_v2,
            "seconds": round(time.perf_counter() - start, 1),
        }
        del engine  # its memory must not count in the measurement
        return {**facts, **measure_engine(engine_path)}


def create_logger(trt: Any) -> Any:
    """Return a TensorRT logger that records ``lines``, (severity name, text), except VERBOSE ones."""

    class RecordingLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, text: str) -> None:
            if severity != trt.ILogger.Severity.VERBOSE:
                self.lines.append((severity.name, text.strip()))

    return RecordingLogger()


def create_monitor(trt: Any, progress: Progress) -> Any:
    """Return TensorRT's progress monitor that calls ``progress(phase, done, steps)`` after each step."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(phase_name, step + 1, self.steps[phase_name])
            return True  # False would cancel the build

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

    return Monitor()


def create_config(trt: Any, builder: Any) -> Any:
    """Return a builder configuration without TF32.

    By default TensorRT may round the factors of float32 multiplications to 10 bits of mantissa (TF32).
    """
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    return config


def parse_network(trt: Any, builder: Any, log: Any, onnx_path: Path) -> Any:
    """Parse an ONNX file into a strongly typed network.

    Raises:
        BundleError: where there is no such file.
        ModelError: one line per error of the parser, with operator and node.
    """
    if not onnx_path.is_file():
        raise BundleError(f"there is no ONNX file {onnx_path}; expected one to build an engine from.")
    # TensorRT 11 has only strongly typed networks; it accepts the flag and ignores it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(onnx_path)):
        return network
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    described = [f"{e.node_operator() or 'file'} {e.node_name()!r}: {e.desc()}" for e in errors]
    raise ModelError(
        "\n".join(
            [f"TensorRT {trt.__version__} cannot parse {onnx_path.name}, {len(errors)} errors:", *described]
        )
    )


def build_plan(builder: Any, network: Any, config: Any, log: Any) -> Any:
    """Return the serialized engine, a buffer with ``nbytes``.

    Raises:
        ModelError: with the builder's errors.
    """
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ModelError(f"TensorRT parsed the network and could not build it:\n{_errors(log)}")
    return plan


def attach_timings(config: Any, path: Path) -> Any:
    """Attach the timing cache in a file, or an empty one, to a build, and return it.

    Raises:
        UsageError: where TensorRT refuses it.
    """
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise UsageError(
            f"TensorRT refuses the timing cache {path}; expected one of this GPU and this version. "
            "Delete the file."
        )
    return cache


def _errors(log: Any) -> str:
    """Return the logged errors, one per line."""
    return (
        "\n".join(text for severity, text in log.lines if severity.endswith("ERROR")) or "it gave no reason"
    )
