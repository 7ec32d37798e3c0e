"""ONNX Runtime on the host's CPU, unoptimized: the oracle for every program that is shipped as ONNX."""

from __future__ import annotations

import importlib.util

from edgedyn.targets import Int8Scheme, Target, deferred


def _missing() -> str | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return "the package onnxruntime is not installed. Install it: pip install onnxruntime"
    return None


TARGET = Target(
    name="onnxruntime",
    summary="ONNX on the host's CPU, unoptimized: the oracle (fp32, fp16, int8)",
    capabilities=frozenset(),
    kernels=frozenset(),
    precisions=frozenset({"fp32", "fp16", "int8"}),
    int8=Int8Scheme(symmetric=True, outputs=False),
    lower=deferred("edgedyn.targets.onnxruntime.lower", "lower"),
    preview=deferred("edgedyn.targets.onnxruntime.lower", "preview"),
    load=deferred("edgedyn.targets.onnxruntime.run", "load"),
    missing=_missing,
)
