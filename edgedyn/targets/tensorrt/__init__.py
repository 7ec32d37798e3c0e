"""TensorRT on a Jetson: the host writes and checks ONNX, the device builds the engine."""

from __future__ import annotations

import importlib.util

from edgedyn.targets import Int8Scheme, Target, deferred


def _missing() -> str | None:
    """Return None where the engine, or the ONNX file as its oracle, can run; else a sentence with the fix."""
    installed = {
        name: importlib.util.find_spec(name) is not None for name in ("onnxruntime", "tensorrt", "pycuda")
    }
    if installed["onnxruntime"] or (installed["tensorrt"] and installed["pycuda"]):
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
    compile=deferred("edgedyn.targets.tensorrt.compile", "compile_engine"),
)
