"""Load a lowered program and run it once, before it is shipped; a refusal names the layers to keep float.

XNNPACK's compiler refuses a node by its debug handle, ``Failed to create StaticConstantPad node 12``; a
portable kernel by its operator, ``KernelCall failed ... in operator aten::pow.out``. The edge program without
delegates leads from either to the layers. Any other refusal leads to the INT8 layers with float consumers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

from executorch.exir import EdgeProgramManager
from torch import fx
from torch.export import ExportedProgram

from edgedyn.errors import ModelError
from edgedyn.graph.nodes import is_int8, module_path
from edgedyn.targets.executorch.run import SHOWN, refusal_lines
from edgedyn.targets.trial import find_refusal

_HANDLE = re.compile(r"Failed to create \S+ node (\d+) ")
_OPERATOR = re.compile(r"in operator (\w+::\w+)")
_LAYERS = ("aten.convolution.", "aten.linear.")
_SHOWN = 6  # candidates


def refuse_failing(
    path: Path, name: str, program: ExportedProgram, make_edge: Callable[[], EdgeProgramManager]
) -> None:
    """Remove a file, and refuse its program, that the runtime cannot load or run on its example inputs.

    Args:
        path: the lowered file.
        name: the program in it.
        program: as it was before lowering, for its example inputs.
        make_edge: makes the edge programs without delegates, to find the layers of a refusal.

    Raises:
        ModelError: with the runtime's own lines and the layers to keep in float.
    """
    assert program.example_inputs is not None  # torch.export keeps them
    arrays = [x.numpy() for x in program.example_inputs[0]]
    if refusal := find_refusal("executorch", path, name, arrays):
        path.unlink()
        text = "; ".join([*refusal_lines(refusal.log)[:SHOWN], refusal.words])
        place = locate(text, make_edge().exported_program(name).graph)
        raise ModelError(f"ExecuTorch {version('executorch')} refuses program {name!r}: {text}. {place}")


def locate(refusal: str, graph: fx.Graph) -> str:
    """Return sentences on the layers that a refusal is about, and on the next step.

    Args:
        refusal: lines of the runtime.
        graph: of the edge program without delegates.
    """
    nodes = list(_refused_nodes(refusal, graph))
    operators = sorted({f"{_operator(n)} of {module_path(n) or 'the network itself'}" for n in nodes})
    layers = _beside(nodes) if nodes else _at_borders(graph)
    place = f"The runtime stops at {', '.join(operators[:_SHOWN])}. " if nodes else ""
    if not layers:
        return f"{place}Write these layers with other operators, or pick another form in the recipe (forms)."
    kept = f"quantize.keep_float: [{', '.join(layers[:_SHOWN])}]"
    return f"{place}INT8 layers {'beside it' if nodes else 'with float readers'}: keep them float, {kept}."


def _refused_nodes(refusal: str, graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the nodes that a refusal names."""
    handle, operator = _HANDLE.search(refusal), _OPERATOR.search(refusal)
    for node in graph.nodes:
        if node.op != "call_function" or "quantized_decomposed" in str(node.target):
            continue
        by_handle = handle and node.meta.get("debug_handle") == int(handle[1])
        if by_handle or (operator and _schema_name(node) == operator[1]):
            yield node


def _schema_name(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", ""))


def _operator(node: fx.Node) -> str:
    return _schema_name(node).partition("::")[2]


def _is_layer(node: fx.Node) -> bool:
    return str(getattr(node.target, "__name__", "")).startswith(_LAYERS) and is_int8(node)


def _beside(nodes: list[fx.Node]) -> list[str]:
    """Return the paths of the INT8 layers that write the inputs of nodes, or read their outputs."""
    found: dict[str, None] = {}
    for follow in (lambda n: n.all_input_nodes, lambda n: list(n.users)):
        seen, waiting = set(nodes), list(nodes)
        while waiting:
            node = waiting.pop(0)
            if _is_layer(node):
                found[module_path(node) or node.name] = None
                continue
            new = [n for n in follow(node) if n not in seen]
            seen.update(new)
            waiting += new
    return list(found)


def _at_borders(graph: fx.Graph) -> list[str]:
    """Return the paths of the INT8 layers whose output a float operator reads."""
    readers = [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and not _is_layer(node)
        and "quantized_decomposed" not in str(node.target)
        and any("dequantize" in str(x.target) for x in node.all_input_nodes)
    ]
    return _beside(readers)
