"""Masked convolutions of blocks as convolutions: exact, with their paths; all others stay."""

from __future__ import annotations

import pytest
import torch
from disturbed import redraw
from torch import nn

from edgedyn import targets
from edgedyn.graph.blocks import find_blocks
from edgedyn.layers import canonicalize
from edgedyn.layers.dynconv import SparseBottleneck, SparseInvertedResidual
from edgedyn.ops.masked_conv2d.unmask import unmask_blocks
from edgedyn.quantize.fold import fold
from edgedyn.quantize.quantized import to_float
from edgedyn.targets.fuse_blocks import fuse_blocks

X = torch.randn(1, 4, 12, 10, generator=torch.Generator().manual_seed(4))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(SparseInvertedResidual(4, 4), SparseInvertedResidual(4, 4))
        self.other = SparseBottleneck(4, 1)

    def forward(self, x):
        return self.other(self.body(x))


@pytest.fixture(scope="module")
def captured():
    return torch.export.export(canonicalize(redraw(Net(), seed=7).eval()), (X,))


def called(program, name):
    return [node for node in program.graph.nodes if name in str(node.target)]


def test_blocks_are_convolutions_with_their_paths_and_others_stay(captured):
    assert len(called(captured, "masked_conv2d")) == 9
    program = unmask_blocks(captured)
    assert len(called(program, "masked_conv2d")) == 3  # a dense 3x3 between two 1x1
    torch.testing.assert_close(program.module()(X), captured.module()(X), rtol=1e-5, atol=1e-6)
    blocks, refusals = find_blocks(fold(program))
    assert [block.path for block in blocks] == ["body.0", "body.1"]
    assert all(block.mask is not None and block.is_residual for block in blocks)
    assert refusals == ()


def test_masked_blocks_become_single_nodes_that_compute_the_same(captured):
    expected = captured.module()(X)
    fused = fuse_blocks(to_float(unmask_blocks(captured), (X,), "fp32").program)
    assert len(called(fused, "inverted_residual")) == 2
    torch.testing.assert_close(fused.module()(X), expected, rtol=1e-5, atol=1e-5)


def test_a_program_without_masked_blocks_is_the_same_object():
    program = torch.export.export(canonicalize(redraw(SparseBottleneck(4, 1), seed=7).eval()), (X,))
    assert unmask_blocks(program) is program


def test_only_a_target_with_the_kernel_of_blocks_fuses_them():
    assert targets.load("executorch", "fused").fuses_blocks
    assert not targets.load("executorch").fuses_blocks
    assert not targets.load("tensorrt", "fused").fuses_blocks
    kept = targets.load("executorch", "fused", {"inverted_residual": "three_convolutions"})
    assert not kept.fuses_blocks
    assert "edgedyn_kernels" in kept.capabilities
