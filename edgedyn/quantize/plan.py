"""Which tensors of a folded program are INT8, and by which steps.

    x -> Q/DQ -> conv(int8 weights, one scale a channel) [-> Q/DQ -> PReLU -> Q/DQ -> conv ...] -> float adds
    x -> min, max -> Q/DQ -> conv(int8 weights, one scale a channel) -> float          where that is dynamic

Only convolutions and linear layers are INT8, with the PReLU between them where the runtime keeps it so.
Residual sums, products of two activations, generated kernels and slicing stay float: the residual stream is
where an 8-bit step would be paid at every block.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from edgedyn.errors import CalibrationError, RecipeError, nearest
from edgedyn.graph.nodes import MULTIPLY_ADD_OPS, belongs_to, fused_activation, module_path
from edgedyn.ops import is_ours, load_all
from edgedyn.quantize.accounting import (
    KEPT_ALWAYS,
    KEPT_BY_RECIPE,
    KEPT_FOR_QUALITY,
    KEPT_GENERATED,
    moves_only,
)
from edgedyn.quantize.deciding import find_decided, find_deciding_layers
from edgedyn.targets import Int8Scheme

if TYPE_CHECKING:
    from edgedyn.recipe.keys import QuantizeSection


@dataclass(frozen=True)
class QuantizableLayer:
    """One call of a convolution or linear layer, and the names of its tensors in a calibration table.

    Attributes:
        name: dotted path of the layer; the second call of the same layer ends in ``#2``.
        node: the call.
        output_node: the call, or the activation behind it that runtimes fuse into it.
        input: name of the input activation.
    """

    name: str
    node: fx.Node
    output_node: fx.Node
    input: str

    @property
    def input_node(self) -> fx.Node:
        """Node of the input activation."""
        node = self.node.args[0]
        assert isinstance(node, fx.Node)
        return node

    @property
    def output(self) -> str:
        """Name of the output activation, behind the fused activation."""
        return f"{self.name}.output"

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """Name of the bias."""
        return f"{self.name}.bias"


def find_quantizable_layers(module: fx.GraphModule) -> list[QuantizableLayer]:
    """Return every convolution and linear layer of a folded program, in the order of the graph.

    An activation is named after the layer that computes it, else after the first layer that reads it. These
    names do not depend on the forms of our ops.
    """
    calls: Counter[str] = Counter()
    names: dict[fx.Node, str] = {}
    layers = []
    for node in module.graph.nodes:
        if node.target in MULTIPLY_ADD_OPS:
            path = module_path(node) or node.name
            calls[path] += 1
            name = path if calls[path] == 1 else f"{path}#{calls[path]}"
            input_name = names.setdefault(node.args[0], f"{name}.input")
            layer = QuantizableLayer(name, node, fused_activation(node) or node, input_name)
            names[layer.output_node] = layer.output
            layers.append(layer)
    return layers


def name_tensors(module: fx.GraphModule, layers: Sequence[QuantizableLayer]) -> dict[str, fx.Node]:
    """Return the activations that may be INT8 on any target, by name.

    They are the inputs and outputs of layers and the first argument of every op of ours.
    """
    tensors: dict[str, fx.Node] = {}
    for layer in layers:
        tensors |= {layer.input: layer.input_node, layer.output: layer.output_node}
    known = {node: name for name, node in tensors.items()}
    for node in module.graph.nodes:
        if is_ours(node):
            x = node.args[0]
            tensors[known.setdefault(x, f"{module_path(node) or node.name}.input")] = x
    return tensors


def find_generators(module: fx.GraphModule) -> frozenset[str]:
    """Name the tensors that are generated kernels: what an op of ours takes as such, but masks, which decide.

    One that a layer writes straight into the op is that layer's output. One that float operators write, a
    Tanh or a norm, is named by the module that ends with them, at its last call; where the op is in the same
    module it has no name.

    Args:
        module: a folded program with our ops as nodes.
    """
    written = {site.output_node: site.output for site in find_quantizable_layers(module)}
    names = {node: name for name, node in _last_of_modules(module).items()}
    ops = {op.overload: op for op in load_all().values()}
    decided = find_decided(module)
    found = set()
    for node in filter(is_ours, module.graph.nodes):
        op, path = ops[node.target], module_path(node)
        for argument, value in zip(op.overload._schema.arguments, node.args, strict=False):
            if isinstance(value, fx.Node) and argument.name in op.generated:
                moved = [value]  # from what the op is given to what was computed
                while moves_only(moved[-1]) and len(moved[-1].all_input_nodes) == 1:
                    moved.append(moved[-1].all_input_nodes[0])
                if moved[-1] in written:
                    found.add(written[moved[-1]])
                elif moved[-1] not in decided:
                    given = next((n for n in moved if module_path(n) != path), None)
                    if given in names:
                        found.add(names[given])
    return frozenset(found)


def find_kernels(module: fx.GraphModule, names: Collection[str]) -> dict[str, fx.Node]:
    """Return generated kernels by name, in whichever form our ops are; one may be what a layer reads as well.

    Args:
        module: a folded program.
        names: from ``find_generators``.
    """
    tensors = _last_of_modules(module) | {
        site.output: site.output_node for site in find_quantizable_layers(module)
    }
    return {name: node for name, node in tensors.items() if name in names}


def _last_of_modules(module: fx.GraphModule) -> dict[str, fx.Node]:
    """Return the tensor that each module of the network gives, by the name that it has as a kernel."""
    given = (node for node in module.graph.nodes if isinstance(node.meta.get("val"), Tensor))
    return {
        f"{path}.kernel": node for node in given if node.op == "call_function" and (path := module_path(node))
    }


@dataclass(frozen=True)
class QParams:
    """Scales and zero points by name of a tensor.

    Attributes:
        tensors: of activations: (scale, zero point), one of each for the whole tensor.
        weights: of weights: float32 scales, one an output channel; their zero points are 0.
    """

    tensors: Mapping[str, tuple[float, int]]
    weights: Mapping[str, Tensor]

    def of(self, tensor: str) -> tuple[float, int]:
        """Return the step of an activation.

        Raises:
            CalibrationError: when it has none: the table was made where nobody read or wrote this tensor.
        """
        if tensor not in self.tensors:
            raise CalibrationError(
                f"the calibration table has no step for the tensor {tensor!r}: it was made for other forms "
                "of our ops. Calibrate again with this recipe, or give it the table's kernels and forms."
            )
        return self.tensors[tensor]


@dataclass(frozen=True)
class Plan:
    """What is computed in INT8.

    Attributes:
        layers: the INT8 convolutions and linear layers.
        kernels: calls of our ops that get their x in INT8, with the name of x.
        reasons: of what stays float, by node name.
        dynamic: calls of layers that take the range of what they read from each image, and write float.
    """

    layers: tuple[QuantizableLayer, ...]
    kernels: Mapping[fx.Node, str]
    reasons: Mapping[str, str]
    dynamic: frozenset[fx.Node] = frozenset()

    def quantized_outputs(self, scheme: Int8Scheme) -> tuple[QuantizableLayer, ...]:
        """Return the layers whose output activation is quantized."""
        return tuple(site for site in self.layers if scheme.outputs and site.node not in self.dynamic)


def make_plan(
    module: fx.GraphModule,
    *,
    scheme: Int8Scheme,
    keep_float: Sequence[str] = (),
    dynamic: Sequence[str] = (),
    float32: Collection[str] = frozenset(),
    kernels: Collection[Any] = frozenset(),
    kept: Sequence[str] = (),
    is_router: bool = False,
    generated: Collection[str] = frozenset(),
) -> Plan:
    """Decide what is INT8.

    Where convolutions have no quantized output, a kernel's x gets its step only in front of readers that
    quantize y as well: an 8-bit rounding that saves no float feature map would be paid for nothing.

    Args:
        module: a folded program.
        scheme: how the target annotates INT8.
        keep_float: patterns of layer paths that stay float.
        dynamic: patterns of layer paths that take the range of what they read from each image, where the
            scheme lets them.
        float32: names of module classes that are never quantized.
        kernels: overloads of our ops that the target computes in INT8 where x is.
        kept: names of layers that stay float because of what INT8 costs there.
        is_router: whether the first output is compared.
        generated: names of generated kernels that are to stay float, where outputs are quantized at all.
    """
    found = find_quantizable_layers(module)
    reasons = {site.node.name: KEPT_FOR_QUALITY for site in found if site.name in kept}
    reasons |= dict.fromkeys(_matching(found, keep_float), KEPT_BY_RECIPE)
    names = _matching([site for site in found if scheme.dynamic(site.node)], dynamic)
    if scheme.outputs:
        written = [site for site in found if site.node.name not in names]
        reasons |= {site.node.name: KEPT_GENERATED for site in written if site.output in generated}
    reasons |= {node.name: KEPT_ALWAYS for node in module.graph.nodes if belongs_to(node, float32)}
    deciding = find_deciding_layers(module, is_router=is_router)
    reasons |= {node.name: KEPT_ALWAYS for node in deciding}
    sites = tuple(site for site in found if site.node.name not in reasons)
    chosen = {site.node for site in sites}
    tensors = {node: name for name, node in name_tensors(module, found).items()}
    calls = [] if scheme.outputs else [node for node in module.graph.nodes if node.target in kernels]
    fed = {node: tensors[node.args[0]] for node in calls if chosen.issuperset(node.users)}
    ranged = frozenset(node for node in chosen if node.name in names)
    return Plan(sites, fed, reasons, ranged)


@dataclass(frozen=True)
class Int8Method:
    """How a program becomes INT8: the recipe's ``quantize`` section on one target.

    Attributes:
        scheme: how the target annotates INT8.
        section: the recipe's ``quantize`` section.
        float32: names of module classes that are never quantized.
        kernels: overloads of our ops that the target computes in INT8 where x is.
        is_router: whether the program's first output is compared, so that what computes it stays float.
    """

    scheme: Int8Scheme
    section: QuantizeSection
    float32: Collection[str] = frozenset()
    kernels: Collection[Any] = frozenset()
    is_router: bool = False

    @property
    def shifts(self) -> bool:
        """Whether zero points become offsets of the activations: ``quantize.shift`` on a symmetric target.

        Not where layers have INT8 outputs: others read these, and have no bias that could take the offset.
        """
        return self.section.shift and self.scheme.symmetric and not self.scheme.outputs

    @property
    def ranges(self) -> Int8Scheme:
        """The scheme that ranges are chosen for: with zero points where ``shifts`` takes them away later."""
        return replace(self.scheme, symmetric=False) if self.shifts else self.scheme

    def plan(
        self, module: fx.GraphModule, *, kept: Sequence[str] = (), generated: Collection[str] = frozenset()
    ) -> Plan:
        """Choose the INT8 layers of a folded program.

        Args:
            module: the program.
            kept: names of layers that stay float because of what INT8 costs there.
            generated: names of the tensors that are generated kernels.
        """
        return make_plan(
            module,
            scheme=self.ranges,
            keep_float=self.section.keep_float,
            dynamic=self.section.dynamic,
            float32=self.float32,
            kernels=frozenset() if self.shifts else self.kernels,  # these read float then
            generated=generated if self.section.generated == "float" else (),
            kept=kept,
            is_router=self.is_router,
        )


def refuse_unknown_layers(programs: Sequence[fx.GraphModule], key: str, patterns: Sequence[str]) -> None:
    """Refuse a pattern that matches no layer of any program: variants need not have the same ones.

    Args:
        programs: folded, all of a network.
        key: of the recipe's ``quantize`` section, for the error.
        patterns: of layer paths (``*`` as in file names).

    Raises:
        RecipeError: naming the first layers that there are.
    """
    paths = [module_path(site.node) for module in programs for site in find_quantizable_layers(module)]
    for pattern in patterns:
        if not fnmatch.filter(paths, pattern):
            first = ", ".join(dict.fromkeys(paths[:8]))
            raise RecipeError(
                f"quantize.{key}: {pattern!r} matches no layer; {nearest(pattern, paths)}found {len(paths)} "
                f"convolutions and linear layers, the first are {first}. "
                "Use a dotted path; * matches any part."
            )


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Say whether a dotted path is one of those that patterns name; * matches any part."""
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def _matching(sites: Sequence[QuantizableLayer], patterns: Sequence[str]) -> list[str]:
    """Name the nodes whose layer path matches a pattern."""
    return [site.node.name for site in sites if matches(module_path(site.node), patterns)]
