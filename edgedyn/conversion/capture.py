"""Capture of a network as an exported program; a refusal names the line that cannot be exported."""

from __future__ import annotations

import contextlib
import io
import os
import traceback

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgedyn.errors import EdgedynError, ModelError


def capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Export the network with fixed shapes; our ops stay single nodes.

    Raises:
        ModelError: when a layer refuses the inputs; when ``torch.export`` cannot follow the network, with the
            exporter's first line and the line of the network's code where it stopped.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch prints the graph that it cannot follow
            # a program takes its strides from its example, and the runtimes give it contiguous arrays
            return torch.export.export(model, tuple(x.contiguous() for x in inputs), strict=False)
    except EdgedynError:  # the layer's own refusal says more
        raise
    except Exception as error:  # torch.export raises its own, dynamo's and the model's exceptions alike
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"torch.export cannot capture {type(model).__name__} for inputs "
            f"{[tuple(x.shape) for x in inputs]}: {first}{_culprit(error)}. {_advice(error)}"
        ) from error


def _advice(error: BaseException) -> str:
    """Suggest a replacement for code that cannot be exported."""
    if "data-dependent" in str(error).lower() or "GuardOnDataDependent" in type(error).__name__:
        return (
            "This line decides on data. A choice for the whole image is a routed program "
            "(edgedyn.RoutedModel), a choice of positions a DynConv block "
            "(edgedyn.layers.dynconv), of kernels one of: edgedyn list layers."
        )
    return "Does the input shape fit (input.shape)? Has each dynamic layer a canonical form (list layers)?"


def _culprit(error: BaseException) -> str:
    """Return the last line of code outside torch that an error passed through."""
    outside = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if f"{os.sep}torch{os.sep}" not in frame.filename and frame.filename != __file__
    ]
    return f" (at {outside[-1].filename}:{outside[-1].lineno}: {outside[-1].line})" if outside else ""
