"""A captured program as a graph whose constants and BatchNorms are folded."""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.nn.utils.fusion import fuse_conv_bn_weights

from edgedyn.graph.constants import store_parameter, unshare_constants
from edgedyn.graph.nodes import (
    COUNTED_OPS,
    TRANSPOSED,
    argument,
    bias_of,
    constant_of,
    shape_of,
    weight_of,
)
from edgedyn.graph.rewrites import explicit_padding

_NORMS = {
    torch.ops.aten.batch_norm.default,
    torch.ops.aten._native_batch_norm_legit_no_training.default,
}
_LINEAR = torch.ops.aten.linear.default
# the general operator states its kind in an argument; programs hold it only once they are lowered
_CONVOLUTIONS = COUNTED_OPS - {_LINEAR, torch.ops.aten.convolution.default}
_ALIAS = torch.ops.aten.alias.default


def fold(program: ExportedProgram) -> fx.GraphModule:
    """Fold every BatchNorm that follows a convolution or linear layer; exact up to rounding of the weights.

    A layer with several calls gets one weight per call, because each call may meet another BatchNorm. A
    BatchNorm stays where it takes its statistics from each image, and where its layer has other readers or a
    weight that is computed from data.
    """
    # without guards: shapes are fixed, and the interpreters of the graph know operators only
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    explicit_padding(module)
    unshare_constants(module, COUNTED_OPS)
    for norm in [node for node in module.graph.nodes if _is_foldable(node)]:
        _fold_norm(module, norm)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _fold_norm(module: fx.GraphModule, norm: fx.Node) -> None:
    """Fold one BatchNorm; torchao's own (0.18) cleans the whole graph for each, seconds in a deep network."""
    layer = norm.args[0]
    assert isinstance(layer, fx.Node)
    is_plain = norm.target is torch.ops.aten.batch_norm.default
    scale, shift, mean, variance = (x and constant_of(module, x) for x in norm.args[1:5])
    old = weight_of(module, layer), bias_of(module, layer)
    statistics = mean, variance, argument(norm, 7 if is_plain else 6), scale, shift
    # also for a linear layer: torch's fuse_linear_bn_weights (2.13) takes no BatchNorm without gain and bias
    weight, bias = fuse_conv_bn_weights(*old, *statistics, layer.target in TRANSPOSED)  # type: ignore[arg-type]
    place = str(layer.args[1].target)  # type: ignore[union-attr]
    store_parameter(module, place, weight)
    if old[1] is not None:
        store_parameter(module, str(layer.args[2].target), bias)  # type: ignore[union-attr]
    else:
        store_parameter(module, f"{place}_bias", bias)
        with module.graph.inserting_before(layer):
            reads = module.graph.get_attr(f"{place}_bias")
        reads.meta["val"] = bias.detach()
        layer.args = (*layer.args[:2], reads, *layer.args[3:])
    # _native_batch_norm_legit_no_training returns a tuple
    for output in [norm] if is_plain else [user for user in norm.users if user.args[1] == 0]:
        output.replace_all_uses_with(layer)


def _is_foldable(norm: fx.Node) -> bool:
    """Whether a node is a BatchNorm of constants that alone reads a layer of constants."""
    if norm.target not in _NORMS:
        return False
    layer, scale, shift, mean, variance, takes_image_statistics = norm.args[:6]
    if norm.target is not torch.ops.aten.batch_norm.default:
        takes_image_statistics = False
    assert isinstance(layer, fx.Node)
    # the channels of a linear layer's output (B, T, C) are not those that a BatchNorm takes
    is_linear = layer.target is _LINEAR and len(shape_of(layer)) == 2
    if takes_image_statistics or len(layer.users) > 1 or not (is_linear or layer.target in _CONVOLUTIONS):
        return False
    weight, *bias = layer.args[1:3]
    constants = [mean, variance, weight, *(x for x in (scale, shift, *bias) if x is not None)]
    if not all(isinstance(x, fx.Node) and x.op == "get_attr" for x in constants):
        return False
    # torch's formula takes a transposed convolution's output channels from one axis: (I, O / groups, ...)
    return layer.target not in TRANSPOSED or shape_of(weight)[1] == shape_of(mean)[0]


def hide_norms(module: fx.GraphModule) -> None:
    """Insert an alias in front of every BatchNorm of a folded program, so that torchao folds none (0.18).

    It folds any that reads a layer: it changes the weight under the layer's other readers, raises TypeError
    where there are no statistics, and changes weights that are INT8 already.
    """
    for norm in [node for node in module.graph.nodes if node.target in _NORMS]:
        x = norm.args[0]
        assert isinstance(x, fx.Node)
        with module.graph.inserting_before(norm):
            alias = module.graph.call_function(_ALIAS, (x,))
        alias.meta = dict(x.meta)
        norm.replace_input_with(x, alias)


def show_norms(module: fx.GraphModule) -> None:
    """Remove the aliases of ``hide_norms``."""
    for node in [n for n in module.graph.nodes if n.target is _ALIAS]:
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
    module.recompile()
