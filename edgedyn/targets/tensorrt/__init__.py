"""TensorRT on a Jetson: ONNX is written and checked on the host, the engine is built on the device."""

from __future__ import annotations

import importlib.util

from edgedyn.targets import Int8Scheme, Target, deferred


def _missing() -> str | None:
    """Nothing is missing where either the engine or, as its oracle, the ONNX file can run."""
    found = {
        name: importlib.util.find_spec(name) is not None for name in ("onnxruntime", "tensorrt", "pycuda")
    }
    if found["onnxruntime"] or (found["tensorrt"] and found["pycuda"]):
        return None
    return (
        "neither ONNX Runtime (to run the ONNX on a host) nor TensorRT with pycuda (to run the engine) is "
        "installed. Install one: pip install onnxruntime on a host, pip install 'edgedyn[jetson]' on a Jetson"
    )


TARGET = Target(
    name="tensorrt",
    summary="TensorRT 10 and 11 on Jetson: ONNX here, engine there (fp32, fp16, int8)",
    capabilities=frozenset(),
    kernels=frozenset({"edgedyn_kernels"}),
    precisions=frozenset({"fp32", "fp16", "int8"}),
    int8=Int8Scheme(symmetric=True, outputs=False),
    lower=deferred("edgedyn.targets.tensorrt.lower", "lower"),
    preview=deferred("edgedyn.targets.tensorrt.lower", "preview"),
    load=deferred("edgedyn.targets.tensorrt.run", "load"),
    missing=_missing,
)
