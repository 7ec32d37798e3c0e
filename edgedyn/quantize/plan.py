"""The plan of a program: its INT8 layers, and the quantization parameters by name of a tensor.

    x -> Q/DQ -> conv(int8 weights, per channel) [-> Q/DQ -> PReLU -> Q/DQ -> conv ...] -> float adds
    x -> min, max -> Q/DQ -> conv(int8 weights, per channel) -> float          where the range is dynamic
    x -> Q/DQ -> conv -> PReLU -> Q/DQ -> conv -> PReLU -> Q/DQ -> conv -> PReLU -> float    a fused block

Only convolutions and linear layers are INT8, with the PReLU between them where the runtime keeps it INT8.
Residual sums, products of two activations, generated kernels and slicing stay float: in a residual stream,
one rounding error per block would add up.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from edgedyn.errors import CalibrationError, RecipeError, nearest
from edgedyn.graph.blocks import Block, find_blocks
from edgedyn.graph.nodes import (
    belongs_to,
    fused_activation,
    is_quantizable,
    module_path,
    number_repeats,
)
from edgedyn.ops import is_ours, load_all
from edgedyn.quantize.accounting import (
    KEPT_ALWAYS,
    KEPT_BY_RECIPE,
    KEPT_FOR_QUALITY,
    KEPT_GENERATED,
    KEPT_IN_BLOCK,
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
        output_node: the call, or the activation behind it that runtimes fuse into it; in a block that a
            kernel of ours computes, the call behind activation and mask.
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
        """Name of the output activation, at ``output_node``."""
        return f"{self.name}.output"

    @property
    def weight(self) -> str:
        """Name of the weight."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """Name of the bias."""
        return f"{self.name}.bias"


def blocks_of(module: fx.GraphModule, scheme: Int8Scheme) -> tuple[Block, ...]:
    """Return the blocks of a folded program that a kernel of the target computes; none for other targets."""
    return find_blocks(module)[0] if scheme.fuses_blocks else ()


def find_quantizable_layers(module: fx.GraphModule, blocks: Collection[Block] = ()) -> list[QuantizableLayer]:
    """Return every convolution and linear layer with stored weights of a folded program, in its order.

    An activation is named after the layer that computes it, else after the first layer that reads it. These
    names do not depend on the forms of our ops, which are their alternative implementations.

    Args:
        module: the program.
        blocks: its blocks that a kernel computes, from ``blocks_of``.
    """
    calls = [node for node in module.graph.nodes if is_quantizable(node)]
    ends = {stage.conv: stage.end for block in blocks for stage in block.stages}
    names: dict[fx.Node, str] = {}
    layers = []
    for node, name in zip(calls, number_repeats(module_path(n) or n.name for n in calls), strict=True):
        input_name = names.setdefault(node.args[0], f"{name}.input")
        layer = QuantizableLayer(name, node, ends.get(node) or fused_activation(node) or node, input_name)
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
    """Name the generated kernels: the arguments that our ops declare as such, except masks, which decide.

    A kernel that a layer writes straight into the op has the name of that layer's output. A kernel that float
    operators write, for instance a Tanh or a norm, is named after the module whose last operator writes it.
    It has no name where the op is in the same module.

    Args:
        module: a folded program with our ops as nodes.
    """
    outputs = {layer.output_node: layer.output for layer in find_quantizable_layers(module)}
    modules = {node: name for name, node in _last_of_modules(module).items()}
    ops = {op.overload: op for op in load_all().values()}
    decided = find_decided(module)
    names = set()
    for node in filter(is_ours, module.graph.nodes):
        op, path = ops[node.target], module_path(node)
        for argument, value in zip(op.overload._schema.arguments, node.args, strict=False):
            if isinstance(value, fx.Node) and argument.name in op.generated:
                chain = [value]  # from the argument back to the node that computes it
                while moves_only(chain[-1]) and len(chain[-1].all_input_nodes) == 1:
                    chain.append(chain[-1].all_input_nodes[0])
                if chain[-1] in outputs:
                    names.add(outputs[chain[-1]])
                elif chain[-1] not in decided:
                    last = next((n for n in chain if module_path(n) != path), None)
                    if last in modules:
                        names.add(modules[last])
    return frozenset(names)


def find_kernels(module: fx.GraphModule, names: Collection[str]) -> dict[str, fx.Node]:
    """Return the nodes of generated kernels by name, in every form of our ops.

    A kernel may be the input of a layer as well, under another name.

    Args:
        module: a folded program.
        names: from ``find_generators``.
    """
    tensors = _last_of_modules(module) | {
        layer.output: layer.output_node for layer in find_quantizable_layers(module)
    }
    return {name: node for name, node in tensors.items() if name in names}


def _last_of_modules(module: fx.GraphModule) -> dict[str, fx.Node]:
    """Return the last tensor of each module of the network, by the name that it has as a kernel."""
    tensors = (node for node in module.graph.nodes if isinstance(node.meta.get("val"), Tensor))
    return {
        f"{path}.kernel": node
        for node in tensors
        if node.op == "call_function" and (path := module_path(node))
    }


@dataclass(frozen=True)
class QParams:
    """Quantization parameters by name of a tensor: x ~ scale * (q - zero point), q in int8.

    Attributes:
        tensors: of activations, per tensor: (scale, zero point).
        weights: of weights, per output channel: float32 scales, (O,); their zero points are 0.
    """

    tensors: Mapping[str, tuple[float, int]]
    weights: Mapping[str, Tensor]

    def of(self, tensor: str) -> tuple[float, int]:
        """Return scale and zero point of an activation.

        Raises:
            CalibrationError: when the calibration, made for another program, has no such activation.
        """
        if tensor not in self.tensors:
            raise CalibrationError(
                f"the calibration table has no scale for the tensor {tensor!r}: it was made for other forms "
                "of our ops. Calibrate again with this recipe, or give it the table's kernels and forms."
            )
        return self.tensors[tensor]


@dataclass(frozen=True)
class Plan:
    """The INT8 layers and ops of a folded program.

    Attributes:
        layers: the INT8 convolutions and linear layers.
        kernels: calls of our ops with an INT8 x, and the name of x.
        reasons: why other layers stay float, by node name.
        dynamic: calls of layers that take their input range from each image, and write float.
        ends: calls of the last layers of blocks, which write float, too.
        together: names of the layers of a block, by the name of each: all are INT8 or none.
    """

    layers: tuple[QuantizableLayer, ...]
    kernels: Mapping[fx.Node, str]
    reasons: Mapping[str, str]
    dynamic: frozenset[fx.Node] = frozenset()
    ends: frozenset[fx.Node] = frozenset()
    together: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def units(self) -> tuple[tuple[str, ...], ...]:
        """Names of the INT8 layers; those of a block together."""
        return tuple(dict.fromkeys(self.together.get(layer.name, (layer.name,)) for layer in self.layers))

    def quantized_outputs(self, scheme: Int8Scheme) -> tuple[QuantizableLayer, ...]:
        """Return the layers whose output activation is quantized."""
        float_outputs = self.dynamic | self.ends
        return tuple(layer for layer in self.layers if scheme.outputs and layer.node not in float_outputs)


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
    """Choose the INT8 layers of a folded program.

    Where layers have float outputs, the input of an op of ours is quantized only if all readers of its output
    are INT8 layers. Otherwise a float feature map stays in memory, and the rounding gains nothing.

    Args:
        module: a folded program.
        scheme: how the target annotates INT8.
        keep_float: patterns of paths of layers or modules that stay float.
        dynamic: the same of those that take their input range from each image, where the scheme allows it.
        float32: names of module classes that are never quantized.
        kernels: overloads of our ops that the target computes in INT8 where x is.
        kept: names of the layers that the precision search keeps in float.
        is_router: whether the host compares the first output.
        generated: names of generated kernels that stay float, where the scheme quantizes outputs at all.
    """
    blocks = blocks_of(module, scheme)
    inside = {stage.conv for block in blocks for stage in block.stages}
    ends = frozenset(block.stages[-1].conv for block in blocks)
    candidates = find_quantizable_layers(module, blocks)
    reasons = {layer.node.name: KEPT_FOR_QUALITY for layer in candidates if layer.name in kept}
    reasons |= dict.fromkeys(_matching(candidates, keep_float), KEPT_BY_RECIPE)
    free = [layer for layer in candidates if layer.node not in inside]
    dynamic_names = _matching([layer for layer in free if scheme.dynamic(layer.node)], dynamic)
    if scheme.outputs:
        static = [x for x in candidates if x.node.name not in dynamic_names and x.node not in ends]
        reasons |= {layer.node.name: KEPT_GENERATED for layer in static if layer.output in generated}
    reasons |= {node.name: KEPT_ALWAYS for node in module.graph.nodes if belongs_to(node, float32)}
    deciding = find_deciding_layers(module, is_router=is_router)
    reasons |= {node.name: KEPT_ALWAYS for node in deciding}
    for block in blocks:
        together = [stage.conv.name for stage in block.stages]
        if any(name in reasons for name in together):
            reasons = dict.fromkeys(together, KEPT_IN_BLOCK) | reasons
    layers = tuple(layer for layer in candidates if layer.node.name not in reasons)
    int8 = {layer.node for layer in layers}
    names = {node: name for name, node in name_tensors(module, candidates).items()}
    calls = [] if scheme.outputs else [node for node in module.graph.nodes if node.target in kernels]
    int8_calls = {node: names[node.args[0]] for node in calls if int8.issuperset(node.users)}
    named = {layer.node: layer.name for layer in candidates}
    units = [tuple(named[stage.conv] for stage in block.stages) for block in blocks]
    return Plan(
        layers,
        int8_calls,
        reasons,
        frozenset(node for node in int8 if node.name in dynamic_names),
        ends,
        {name: unit for unit in units for name in unit},
    )


@dataclass(frozen=True)
class Int8Method:
    """The recipe's ``quantize`` section on one target.

    Attributes:
        scheme: how the target annotates INT8.
        section: the recipe's ``quantize`` section.
        float32: names of module classes that are never quantized.
        kernels: overloads of our ops that the target computes in INT8 where x is.
        is_router: whether the host compares the program's first output, whose layers then stay float.
    """

    scheme: Int8Scheme
    section: QuantizeSection
    float32: Collection[str] = frozenset()
    kernels: Collection[Any] = frozenset()
    is_router: bool = False

    @property
    def shifts(self) -> bool:
        """Whether zero points become offsets of the activations: ``quantize.shift`` on a symmetric target.

        Not where layers have INT8 outputs: their readers may have no bias that takes the offset.
        """
        return self.section.shift and self.scheme.symmetric and not self.scheme.outputs

    @property
    def ranges(self) -> Int8Scheme:
        """The scheme of the ranges: affine where ``shifts`` turns the zero points into offsets later."""
        return replace(self.scheme, symmetric=False) if self.shifts else self.scheme

    def plan(
        self, module: fx.GraphModule, *, kept: Sequence[str] = (), generated: Collection[str] = frozenset()
    ) -> Plan:
        """Choose the INT8 layers of a folded program.

        Args:
            module: the program.
            kept: names of the layers that the precision search keeps in float.
            generated: names of the generated kernels.
        """
        return make_plan(
            module,
            scheme=self.ranges,
            keep_float=self.section.keep_float,
            dynamic=self.section.dynamic,
            float32=self.float32,
            kernels=frozenset() if self.shifts else self.kernels,  # our ops have no bias for an offset
            generated=generated if self.section.generated == "float" else (),
            kept=kept,
            is_router=self.is_router,
        )


def refuse_unknown_layers(programs: Sequence[fx.GraphModule], key: str, patterns: Sequence[str]) -> None:
    """Refuse a pattern that matches no layer of any program; variants may have different layers.

    Args:
        programs: all folded programs of a network.
        key: key in the recipe's ``quantize`` section, for the error.
        patterns: of paths of layers, or of modules around them (``*`` as in file names).

    Raises:
        RecipeError: naming the first layers of the network.
    """
    paths = [module_path(layer.node) for module in programs for layer in find_quantizable_layers(module)]
    for pattern in patterns:
        if not any(matches(path, [pattern, f"{pattern}.*"]) for path in paths):
            first = ", ".join(dict.fromkeys(paths[:8]))
            raise RecipeError(
                f"quantize.{key}: {pattern!r} matches no layer; {nearest(pattern, paths)}found {len(paths)} "
                f"convolutions and linear layers, the first are {first}. "
                "Use a dotted path; * matches any part."
            )


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a dotted path matches one of the patterns; * matches any part."""
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def _matching(layers: Sequence[QuantizableLayer], patterns: Sequence[str]) -> list[str]:
    """Name the nodes whose path, or that of a module around, matches a pattern."""
    patterns = [*patterns, *(f"{pattern}.*" for pattern in patterns)]
    return [layer.node.name for layer in layers if matches(module_path(layer.node), patterns)]
