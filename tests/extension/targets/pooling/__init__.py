"""ONNX Runtime as a target with two more capabilities, which forms may require."""

from __future__ import annotations

from edgedyn.targets import Int8Scheme, Target, deferred

TARGET = Target(
    name="pooling",
    summary="ONNX on the host's CPU with pooling",
    capabilities=frozenset({"pooling", "select"}),
    kernels=frozenset(),
    precisions=frozenset({"fp32", "int8"}),
    int8=Int8Scheme(symmetric=True, outputs=False),
    lower=deferred("edgedyn.targets.onnxruntime.lower", "lower"),
    preview=deferred("edgedyn.targets.onnxruntime.lower", "preview"),
    load=deferred("edgedyn.targets.pooling.run", "load"),
    missing=lambda: None,
)
