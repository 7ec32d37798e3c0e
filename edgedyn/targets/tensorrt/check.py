"""Check build: run NVIDIA's ONNX parser and builder on a model, on a host without a GPU.

TensorRT-RTX shares both with TensorRT and builds for a named GPU generation. It does not support Orin (SM87);
SM86 is the same generation, Ampere. A passed check means that TensorRT accepts every operator, type and
shape, and gives the memory that the builder plans. It gives no engine for a Jetson, no times and no outputs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgedyn.errors import ModelError
from edgedyn.targets.tensorrt.compile import build_plan, create_config, create_logger, parse_network


def check_build(onnx_path: Path) -> dict[str, object]:
    """Parse and build an ONNX file with TensorRT-RTX, for SM86, strongly typed.

    Returns:
        Where tensorrt_rtx is not installed, only ``missing``: a sentence. Otherwise ``passed``; ``version``
        of TensorRT-RTX; ``layers`` of the parsed network; ``engine_bytes``; ``scratch_bytes``, device memory
        for activations, beside weights, inputs and outputs; ``weights_bytes``, device memory for weights;
        ``seconds``; ``messages``: the parser's errors, node by node, or the builder's warnings. Values that
        the builder did not reach are None.
    """
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        return {
            "missing": f"the model was not check-built, tensorrt_rtx cannot be imported ({error}). "
            "Install it: pip install 'edgedyn[tensorrt-check]'"
        }
    start, log = time.perf_counter(), create_logger(trt)
    layers, engine_bytes, messages = None, None, []
    try:
        layers, engine_bytes = _build(trt, log, onnx_path)
        messages = [text for severity, text in log.lines if severity != "INFO"]
    except ModelError as error:
        messages = str(error).splitlines()
    return {
        "passed": engine_bytes is not None,
        "version": trt.__version__,
        "layers": layers,
        "engine_bytes": engine_bytes,
        "scratch_bytes": _find_bytes(log.lines, "Total Activation Memory"),
        "weights_bytes": _find_bytes(log.lines, "Total Weights Memory"),
        "seconds": round(time.perf_counter() - start, 2),
        "messages": messages,
    }


def _build(trt: Any, log: Any, onnx_path: Path) -> tuple[int, int]:
    """Return the number of layers of the network and the bytes of the engine, which is discarded."""
    builder = trt.Builder(log)
    network = parse_network(trt, builder, log, onnx_path)
    config = create_config(trt, builder)
    config.num_compute_capabilities = 1
    # the default, CURRENT, asks the driver and fails without one
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    return network.num_layers, build_plan(builder, network, config, log).nbytes


def _find_bytes(lines: Iterable[tuple[str, str]], label: str) -> int | None:
    """Return the number in ``<label>: <number> bytes`` of the builder's log.

    An engine has it, too (``device_memory_size_v2``), but can only be deserialized on a GPU.
    """
    matches = [re.fullmatch(rf"{label}: (\d+) bytes", text) for _, text in lines]
    return next((int(match[1]) for match in matches if match), None)
