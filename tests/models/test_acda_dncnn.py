"""ACDADnCNN: its size, its residual, and a deployed program without BatchNorm."""

from __future__ import annotations

import pytest
import torch

from edgedyn import ops, pipeline, quantize, targets
from edgedyn.errors import ModelError
from edgedyn.layers import canonicalize, find_dynamic
from edgedyn.layers.acda import ACDAConv
from edgedyn.models.acda_dncnn import ACDADnCNN


def make_net(*args, **arguments) -> ACDADnCNN:
    torch.manual_seed(1)
    net = ACDADnCNN(*args, **arguments).eval()
    generator = torch.Generator().manual_seed(2)
    for name, tensor in net.state_dict().items():
        if "running_mean" in name:
            tensor.normal_(0, 0.2, generator=generator)
        elif "running_var" in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return net


def test_parameter_count_is_the_stated_one():
    assert round(sum(p.numel() for p in ACDADnCNN().parameters()) / 1e6, 2) == 0.28


@pytest.mark.parametrize("colors", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (7, 12)], ids=str)
def test_output_has_the_size_of_the_input(size, colors):
    x = torch.rand(2, colors, *size)
    with torch.no_grad():
        y = make_net(4, 3, colors=colors)(x)
    assert y.shape == x.shape
    assert not torch.equal(y, x)


def test_network_removes_what_its_last_convolution_says():
    net, x = make_net(4, 4), torch.rand(2, 3, 5, 7)
    with torch.no_grad():
        net.body[-1].weight.zero_()
        net.body[-1].bias.copy_(torch.tensor([0.5, 0.25, 0.125]))
        assert torch.equal(net(x), x - net.body[-1].bias.view(1, 3, 1, 1))


def test_middle_layers_are_dynamic_with_the_given_kernel_and_bases():
    dynamic = [module for _, module, _ in find_dynamic(make_net(4, 5, kernel_size=5, num_bases=2))]
    assert [type(module) for module in dynamic] == [ACDAConv] * 3
    assert {(module.kernel_size, module.num_bases) for module in dynamic} == {(5, 2)}


@pytest.mark.parametrize("arguments", [{}, {"kernel_size": 5, "num_bases": 2}], ids=str)
def test_canonical_network_equals_the_reference(arguments):
    net = make_net(4, 4, **arguments).double()
    x = torch.rand(2, 3, 7, 12, dtype=torch.float64)
    with torch.no_grad():
        y = net(x)
        torch.testing.assert_close(canonicalize(net)(x), y, rtol=1e-12, atol=1e-12 * y.abs().max().item())


@pytest.mark.parametrize("name", ["executorch", "tensorrt"])
def test_no_batch_norm_is_left_in_the_program(name):
    x = torch.rand(1, 3, 7, 12)
    net = make_net(4, 4, num_bases=2)
    program = pipeline.capture(canonicalize(net), (x,))
    forms = ops.choose_forms(program, targets.load(name), {"atom_depthwise2d": "bases_first"})
    program = quantize.to_float(ops.decompose(program, forms, "before_quantize"), (x,), "fp32").program
    program = ops.decompose(program, forms, "after_quantize")
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [target for target in called if "batch_norm" in target or "edgedyn" in target]
    with torch.no_grad():
        # float32 on both sides, BatchNorm folded and sums in another order
        torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("width", "depth"), [(0, 8), (32, 2)])
def test_network_without_dynamic_layers_is_refused(width, depth):
    with pytest.raises(ModelError, match=f"width={width}, depth={depth}; expected width >= 1 and depth >= 3"):
        ACDADnCNN(width, depth)
