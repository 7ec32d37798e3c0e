"""Capture of a network as an exported program; a refusal names the line that cannot be exported."""

from __future__ import annotations

import contextlib
import io

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgedyn.errors import EdgedynError, ModelError, place_of, quote
from edgedyn.graph.mixes import dynamic_layers
from edgedyn.graph.nodes import module_path
from edgedyn.graph.rewrites import simplify


def capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Export the network with fixed shapes and simplify it.

    Raises:
        ModelError: as ``export`` and ``refine``.
    """
    return refine(export(model, inputs))


def refine(program: ExportedProgram) -> ExportedProgram:
    """Simplify an exported program (``graph.rewrites.simplify``).

    Raises:
        ModelError: when ``torch.export`` cannot follow the program that it wrote itself.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return simplify(program)
    except Exception as error:  # torch's own, of any kind
        raise ModelError(
            f"torch.export captures the network and cannot follow its own program: {quote(error)}"
            f"{place_of(str(error))}. Write the layer without torch.vmap and the like."
        ) from error


def find_generated(program: ExportedProgram) -> list[fx.Node]:
    """Return the layers of an exported program whose weight is computed from data, outside of our ops."""
    names = program.graph_signature.user_inputs
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    return dynamic_layers(program.graph, inputs)


def export(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """Export the network with fixed shapes; our ops stay single nodes.

    Raises:
        ModelError: when a layer refuses the inputs; when the network draws random numbers; when
            ``torch.export`` cannot follow the network, with the exporter's first line and the line of the
            network's code where it stopped.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch prints the graph that it cannot follow
            # a program takes its strides from its example, and the runtimes give it contiguous arrays
            program = torch.export.export(model, tuple(x.contiguous() for x in inputs), strict=False)
    except EdgedynError:  # the layer's own refusal says more
        raise
    except (Exception, SystemExit) as error:  # torch.export raises its own, dynamo's and the model's alike
        raise ModelError(
            f"torch.export cannot capture {type(model).__name__} for inputs "
            f"{[tuple(x.shape) for x in inputs]}: {quote(error)}. {_advice(error)}"
        ) from error

    _refuse_random(program)
    _refuse_open_sizes(program)
    return program


def _refuse_random(program: ExportedProgram) -> None:
    """Refuse a program that draws random numbers."""
    for node in program.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _is_idle(node):
            raise ModelError(
                f"the network draws random numbers in {module_path(node) or 'its forward'}: {node.target}"
                f"{place_of(node.meta.get('stack_trace') or '')}; a deployed program gives one image one "
                "output. Is this layer in training mode? F.dropout takes training=self.training."
            )


def _refuse_open_sizes(program: ExportedProgram) -> None:
    """Refuse a program that holds tensors or numbers whose size is known only with the image."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else (value,)
        if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
            raise ModelError(
                f"{node.target} in {module_path(node) or 'the network itself'} makes a tensor or a number of "
                f"the image's own size{place_of(node.meta.get('stack_trace') or '')}; a deployed program has "
                "fixed sizes. Write it with a mask of a fixed size."
            )


def _is_idle(node: fx.Node) -> bool:
    """Whether an operator that can draw random numbers draws none: Dropout, RReLU, attention or an LSTM."""
    defaults = {a.name: a.default_value for a in node.target._schema.arguments}  # type: ignore[union-attr]
    values = defaults | dict(zip(defaults, node.args, strict=False)) | node.kwargs
    return values.get("train", values.get("training")) is False or values.get("dropout_p") == 0


def _advice(error: BaseException) -> str:
    """Suggest a replacement for code that cannot be exported."""
    if "data-dependent" in str(error).lower() or "GuardOnDataDependent" in type(error).__name__:
        return (
            "This line decides on data. A choice for the whole image is a routed program "
            "(edgedyn.RoutedModel), a choice of positions a DynConv block (edgedyn.layers.dynconv), "
            "generated kernels a layer of edgedyn list layers."
        )
    return "Does the input shape fit (input.shape)? Is each dynamic layer one of edgedyn list layers?"
