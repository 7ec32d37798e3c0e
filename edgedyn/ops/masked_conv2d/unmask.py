"""Write the masked convolutions of inverted-residual blocks as convolutions, for a kernel of whole blocks.

    masked_conv2d(x, weight, bias, mask)  ->  activation(conv2d(x, weight, bias)) * mask

Exact, as the form ``dense_times_mask``. Quantizers and ``graph/blocks.py`` then see convolutions; at lowering
a block takes the mask of its output, and the masks inside follow from it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx
from torch.export import ExportedProgram

from edgedyn.graph.blocks import find_blocks
from edgedyn.graph.constants import export_again
from edgedyn.graph.nodes import with_defaults

_ATEN = torch.ops.aten
_ACTIVATIONS = {"relu": _ATEN.relu.default, "relu6": _ATEN.relu6.default}


def unmask_blocks(program: ExportedProgram) -> ExportedProgram:
    """Return a program in which the masked convolutions of every block are convolutions; others stay.

    Args:
        program: a captured program; returned as it is where it has no such block.
    """
    if not any(_is_masked(node) for node in program.graph.nodes):
        return program
    trial, module = program.module(check_guards=False), program.module(check_guards=False)
    assert isinstance(trial, fx.GraphModule)
    assert isinstance(module, fx.GraphModule)
    names = {node.name for node in trial.graph.nodes if _is_masked(node)}
    convolutions = _unmask(trial, names)
    inside = {
        convolutions[stage.conv]
        for block in find_blocks(trial)[0]
        for stage in block.stages
        if stage.conv in convolutions
    }
    if not inside:
        return program
    _unmask(module, inside)
    module.recompile()
    return export_again(program, module)


def _is_masked(node: fx.Node) -> bool:
    return node.target is torch.ops.edgedyn.masked_conv2d.default


def _unmask(module: fx.GraphModule, names: Collection[str]) -> dict[fx.Node, str]:
    """Rewrite the named calls in place; return the convolutions, with the name of the call of each."""
    convolutions = {}
    for node in [n for n in module.graph.nodes if n.name in names]:
        x, weight, bias, mask, *rest = node.args
        stride, padding, dilation, groups, activation = with_defaults(rest, 1, 0, 1, 1, "none")
        sides = [[side, side] for side in (stride, padding, dilation)]
        with module.graph.inserting_before(node):
            y = conv = module.graph.call_function(_ATEN.conv2d.default, (x, weight, bias, *sides, groups))
            if activation in _ACTIVATIONS:
                y = module.graph.call_function(_ACTIVATIONS[activation], (y,))
            product = module.graph.call_function(_ATEN.mul.Tensor, (y, mask))
        for made in (conv, y, product):
            made.meta = dict(node.meta)
        node.replace_all_uses_with(product)
        convolutions[conv] = node.name
        module.graph.erase_node(node)
    return convolutions
