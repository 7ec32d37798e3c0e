"""Replace the inverted-residual blocks of a program by one node each, for programs that call our own kernels.

    conv -> act -> depthwise -> act -> conv -> act [-> mul mask] [-> add x]  ->  inverted_residual
    the same with Q -> DQ in front of each convolution                       ->  inverted_residual_int8

``graph/blocks.py`` finds them. The kernel computes a block strip by strip and keeps no hidden map in memory.
In INT8 it rounds x and the hidden maps as the Q/DQ pairs do.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from edgedyn import ops
from edgedyn.graph.blocks import Block, find_blocks
from edgedyn.graph.constants import add_constant, export_again
from edgedyn.graph.nodes import argument, constant_of, convolution_arguments
from edgedyn.graph.stages import DEQUANTIZE, QUANTIZE, Stage, slopes_of


def fuse_blocks(program: ExportedProgram) -> ExportedProgram:
    """Return a program with its blocks as single nodes; the same object where it has none."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    blocks, _ = find_blocks(module)
    if not blocks:
        return program
    ops.load_all()  # registers the op
    counted = Counter(block.path for block in blocks)
    for block in reversed(blocks):  # x of a later block is the output of an earlier one
        _fuse(module, block, block.path if counted[block.path] == 1 else "")
    module.graph.eliminate_dead_code()
    module.recompile()
    return export_again(program, module)


def _fuse(module: fx.GraphModule, block: Block, path: str) -> None:
    """Replace one block by a node of a path, else of its depthwise layer's; constants become dead code."""
    end, kinds = block.output, [stage.activation for stage in block.stages]
    stride = int(convolution_arguments(block.stages[1].conv)[0][0])
    maps = [block.qparams, *(stage.qparams for stage in block.stages[:2])]
    tensors: list[Any] = []
    for stage, qparams in zip(block.stages, maps, strict=True):
        tensors += [*(qparams or ()), *_tensors(module, stage, end)]
    name = "inverted_residual" if block.qparams is None else "inverted_residual_int8"
    overload = getattr(torch.ops.edgedyn, name).default
    with module.graph.inserting_before(end):
        y = module.graph.call_function(
            overload, (block.x, *tensors, block.mask, *kinds, stride, block.is_residual)
        )
    stack = block.stages[1].conv.meta.get("nn_module_stack") or {}
    around = {key: value for key, value in stack.items() if f"{path}.".startswith(f"{value[0]}.")}
    y.meta = {**end.meta, "nn_module_stack": around if path else stack}
    end.replace_all_uses_with(y)
    # dead code elimination keeps activations that work in place
    for node in reversed(module.graph.nodes):
        if not node.users and (node in block.nodes or node.target in (QUANTIZE, DEQUANTIZE)):
            module.graph.erase_node(node)


def _tensors(module: fx.GraphModule, stage: Stage, before: fx.Node) -> list[fx.Node | None]:
    """Return weight, in INT8 its scales, bias and slopes of a convolution, as the op takes them."""

    def store(kind: str, value: Tensor) -> fx.Node:
        return add_constant(module, before, f"{stage.conv.name}_{kind}_of_block", value, {"val": value})

    weight, bias, slopes = argument(stage.conv, 1), argument(stage.conv, 2), slopes_of(module, stage)
    constants = [weight]
    if weight.op != "get_attr":
        constants = [weight.args[0], store("scales", constant_of(module, weight.args[1]).float())]
    channels = len(constant_of(module, constants[0]))
    return [
        *constants,
        store("bias", torch.zeros(channels)) if bias is None else bias,
        None if slopes is None else store("slopes", slopes),
    ]
