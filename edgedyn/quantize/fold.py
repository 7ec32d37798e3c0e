"""A captured program as a graph whose constants and BatchNorms are folded."""

from __future__ import annotations

from torch import fx
from torch.export import ExportedProgram

from edgedyn.graph.constants import unshare_constants
from edgedyn.graph.nodes import MULTIPLY_ADD_OPS
from edgedyn.graph.rewrites import explicit_padding


def fold(program: ExportedProgram) -> fx.GraphModule:
    """Fold every BatchNorm that follows a convolution into it; exact up to rounding of the weights.

    A convolution with several calls gets one weight per call, because each call may meet another BatchNorm.
    """
    from torchao.quantization.pt2e.utils import _fuse_conv_bn_

    # without guards: shapes are fixed, and the interpreters of the graph know operators only
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    explicit_padding(module)
    unshare_constants(module, MULTIPLY_ADD_OPS)
    _fuse_conv_bn_(module)
    return module
