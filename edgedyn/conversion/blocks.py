"""Inverted-residual blocks of a network for ``inspect``: those of a fused kernel, and why others are none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram

from edgedyn.graph.blocks import find_blocks
from edgedyn.graph.nodes import convolution_arguments, module_path
from edgedyn.ops.masked_conv2d.unmask import unmask_blocks
from edgedyn.quantize.fold import fold


def block_rows(programs: Mapping[str, ExportedProgram]) -> dict[str, list[dict[str, Any]]]:
    """Return the blocks of captured programs, whatever the target's kernels are.

    Args:
        programs: by name, our ops as single nodes.

    Returns:
        ``blocks``, one row per block: ``program``, ``path``, ``layers``, ``activations``, ``stride``,
        ``masked``, ``residual``; ``refused_blocks``, one row per depthwise convolution in front of a 1 x 1
        convolution that makes none: ``program``, ``path``, ``reason``.
    """
    found, refused = [], []
    for name, program in programs.items():
        blocks, refusals = find_blocks(fold(unmask_blocks(program)))
        found += [
            {
                "program": name,
                "path": block.path,
                "layers": [module_path(stage.conv) for stage in block.stages],
                "activations": [stage.activation for stage in block.stages],
                "stride": int(convolution_arguments(block.stages[1].conv)[0][0]),
                "masked": block.mask is not None,
                "residual": block.is_residual,
            }
            for block in blocks
        ]
        refused += [{"program": name, "path": x.path, "reason": x.reason} for x in refusals]
    return {"blocks": found, "refused_blocks": refused}
