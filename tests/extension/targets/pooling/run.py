"""The device side of the target: load a program, and name the runtime."""

from __future__ import annotations

from edgedyn.targets.onnxruntime.run import load, runtime_name

__all__ = ["load", "runtime_name"]
