"""Programs of nothing but calls of our ops: what tests of the kernels share, whatever machine runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgedyn import ops
from edgedyn.targets import native
from edgedyn.targets.executorch.lower import lower
from edgedyn.targets.executorch.run import load

OPS = {
    name: op
    for name, op in ops.load_all().items()
    if (native.SOURCES / name / "kernel_executorch.cpp").is_file()
}
EXAMPLES = {f"{name}-{k}": (op, args) for name, op in OPS.items() for k, args in enumerate(op.examples())}


class Calls(nn.Module):
    """A network of calls of ops, each an output of its own; their tensors are its inputs, in order."""

    def __init__(self, *calls: tuple[Any, tuple[Any, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        return tuple(
            overload(*(next(given) if isinstance(a, Tensor) else a for a in args))
            for overload, args in self.calls
        )

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(a for _, args in self.calls for a in args if isinstance(a, Tensor))


def lower_calls(calls: Calls, folder: Path) -> Path:
    """Return the ``.pte`` of calls."""
    artifact = lower({"forward": torch.export.export(calls, calls.inputs())}, folder, "fp32")
    return folder / artifact.programs["forward"]


def lower_call(overload: Any, args: tuple[Any, ...], folder: Path) -> Any:
    """Return what runs one op in the real runtime: tensors in, array out."""
    run = load(lower_calls(Calls((overload, args)), folder))
    return lambda *given: run(*(t.numpy() for t in given))[0]
