"""Capture of a network as an exported program; a refusal names the line that cannot be exported."""

from __future__ import annotations

import contextlib
import io

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgedyn.errors import EdgedynError, ModelError, quote


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
    except (Exception, SystemExit) as error:  # torch.export raises its own, dynamo's and the model's alike
        raise ModelError(
            f"torch.export cannot capture {type(model).__name__} for inputs "
            f"{[tuple(x.shape) for x in inputs]}: {quote(error)}. {_advice(error)}"
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
