"""Static capacity: exact while it holds, counted where it does not, and run by the real runtimes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from disturbed import redraw
from torch import nn

from edgedyn import targets
from edgedyn.errors import ModelError
from edgedyn.graph.nodes import module_path
from edgedyn.layers import RoutedModel, canonicalize, float32_classes
from edgedyn.layers.dynconv import LAYER, SparseBasicBlock, SparseBottleneck, SparseInvertedResidual
from edgedyn.layers.dynconv.capacity import CapacityBlock, Grid, capacities_of, with_capacity
from edgedyn.layers.dynconv.masks import PointMaskHead, Selection
from edgedyn.pipeline import capture
from edgedyn.quantize import to_float
from edgedyn.targets.tensorrt.check import check_build


def fresh(module: nn.Module, seed: int = 8) -> nn.Module:
    return redraw(module, seed=seed).eval()


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


EXAMPLES = {
    type(m).__name__ + str(k): (fresh(m).double(), x.double()) for k, (m, (x,)) in enumerate(LAYER.examples())
}


def select(mask: torch.Tensor, capacity: int) -> Grid:
    return Grid(*Selection(capacity)(mask))


every_example = pytest.mark.parametrize(("block", "x"), EXAMPLES.values(), ids=EXAMPLES)


class Network(nn.Module):
    """Gated blocks between ordinary convolutions; one of them is called twice."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 4, 3, padding=1)
        shared = SparseInvertedResidual(4, 4)
        self.body = nn.Sequential(shared, SparseBasicBlock(4, 6, 2, downsample=True), SparseBasicBlock(6, 6))
        self.again = nn.ModuleList([shared])

    def forward(self, x):
        return self.body(self.again[0](self.head(x)))


def make_network() -> nn.Module:
    torch.manual_seed(3)
    return fresh(Network())


@every_example
def test_output_is_exact_at_the_capacity_that_was_measured(block, x):
    for sample in torch.split(x, 1):
        network = with_capacity(block, capacities_of(block, [sample]))
        with torch.no_grad():
            (y, overflow), expected = network(sample), block(sample)
        assert overflow.tolist() == [0]
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


@every_example
def test_one_position_less_overflows_by_one(block, x):
    sample = x[:1]
    capacities = capacities_of(block, [sample])
    masks = canonicalize(block).masker(sample)
    assert capacities == {"": masks.mask.sum().item(), ".dilated": masks.dilated.sum().item()}
    for name, k in capacities.items():
        _, overflow = with_capacity(block, capacities | {name: k - 1})(sample)
        assert overflow.tolist() == [1]
    _, overflow = with_capacity(block, {name: k - 2 for name, k in capacities.items()})(sample)
    assert overflow.tolist() == [4]


@every_example
def test_inner_convolutions_get_what_the_positions_can_need(block, x):
    k = capacities_of(block, [x[:1]])[""]
    y, overflow = with_capacity(block, {"": k})(x[:1])
    assert overflow.tolist() == [0]
    torch.testing.assert_close(y, block(x[:1]), rtol=1e-12, atol=1e-12 * y.abs().max().item())


def test_capacity_beyond_the_map_is_the_whole_map():
    block, x = EXAMPLES["SparseInvertedResidual5"]
    y, overflow = with_capacity(block, {"": 10_000})(x[:1])
    assert overflow.tolist() == [0]
    torch.testing.assert_close(y, block(x[:1]), rtol=1e-12, atol=1e-12)


def test_only_the_chosen_positions_are_computed():
    """Active positions beyond k are left out, in order, and nothing else."""
    block, x = EXAMPLES["SparseInvertedResidual5"]
    mask = canonicalize(block).masker(x[:1]).mask[0, 0]
    active = mask.flatten().nonzero().flatten()
    with torch.no_grad():
        y, overflow = with_capacity(block, {"": 5, ".dilated": 10_000})(x[:1])
    assert overflow.item() == len(active) - 5
    changed = (y - x[:1]).abs().amax((0, 1)).flatten().nonzero().flatten()
    assert changed.tolist() == active[:5].tolist()


def test_grid_lists_active_positions_first_and_in_order():
    mask = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 1.0]]).view(1, 1, 2, 4)
    grid = select(mask, 3)
    assert grid.positions.tolist() == [1, 3, 4]
    assert grid.slots.flatten().tolist() == [3, 0, 3, 1, 2, 3, 3, 3]
    assert grid.overflow.item() == 1
    assert select(mask, 6).positions.tolist() == [1, 3, 4, 7, 0, 0]
    assert select(torch.zeros(1, 1, 2, 4), 2).slots.unique().tolist() == [2]


def test_selection_counts_past_what_half_precision_can():
    """2990 of 3000 positions, in a float16 program: positions and slots are exact, none is out of range."""
    block = fresh(SparseInvertedResidual(4, 4, expand_ratio=2))
    head = next(module for module in block.modules() if isinstance(module, PointMaskHead))
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(1.0)
    network, x = with_capacity(block, {"": 2990, ".dilated": 3000}), rand(1, 4, 50, 60)
    program = to_float(capture(network, (x,)), (x,), "fp16", float32_classes()).program
    y, overflow = program.module()(x.half())
    expected, dropped = network(x)
    assert overflow.item() == dropped.item() == 10
    # input, three convolutions and the sum, each rounded to 2**-11 of its value; a wrong position is off by 1
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=5 * 2**-11 * expected.abs().max().item())


def test_network_sums_the_overflow_of_its_blocks_and_keeps_nothing():
    network, x = make_network().double(), rand(1, 3, 10, 14).double()
    capacities = capacities_of(network, [x])
    assert set(capacities) == {f"body.{k}{name}" for k in range(3) for name in ("", ".dilated")}
    exact = with_capacity(network, capacities)
    y, overflow = exact(x)
    assert overflow.tolist() == [0]
    torch.testing.assert_close(y, network(x), rtol=1e-12, atol=1e-12 * y.abs().max().item())
    assert exact.body[0].overflow.counts == []
    small = with_capacity(network, dict.fromkeys(capacities, 1))
    first = small(x)[1]
    assert first.item() > 3
    assert torch.equal(small(x)[1], first)
    stop = small.body[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small(x)
    stop.remove()
    assert torch.equal(small(x)[1], first)


def test_layers_keep_the_paths_that_recipes_name():
    network, x = make_network(), rand(1, 3, 10, 14)
    program = capture(with_capacity(network, dict.fromkeys(capacities_of(network, [x]), 9)), (x,))
    paths = {module_path(node) for node in program.graph.nodes}
    assert {"head", "body.1.masker.maskconv.conv", "body.1.conv1.products.0"} <= paths


def test_block_at_two_places_stays_one_module_and_counts_twice():
    network = make_network()
    built = with_capacity(network, {"body.0": 2, "body.0.dilated": 500})
    assert isinstance(built.body[0], CapacityBlock)
    assert built.again[0] is built.body[0]
    assert not isinstance(built.body[1], CapacityBlock)


def test_model_is_not_changed():
    network, x = make_network(), rand(1, 3, 8, 9)
    before = copy.deepcopy(network.state_dict())
    expected = network(x)
    with_capacity(network, capacities_of(network, [x]))(x)
    assert type(network.body[0]) is SparseInvertedResidual
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert torch.equal(network(x), expected)
    assert not any(module._forward_hooks for module in network.modules())


def test_quantile_is_that_of_samples_rounded_up():
    block = SparseInvertedResidual(1, 1).eval()
    block.masker.maskconv.weight.data.fill_(1)
    block.masker.maskconv.bias.data.fill_(-0.5)
    x = torch.zeros(4, 1, 3, 5)
    for sample, active in enumerate((0, 3, 4, 10)):
        x[sample].view(-1)[:active] = 1
    assert capacities_of(block, [x[:2], x[2:]])[""] == 10
    assert capacities_of(block, [x], 2 / 3)[""] == 4
    assert capacities_of(block, [x], 0.5)[""] == 4
    assert capacities_of(block, [x], 1 / 3)[""] == 3
    assert capacities_of(block, [x], 0.01)[""] == 3
    assert capacities_of(block, [x[:1]])[""] == 1


def test_routed_program_is_right_on_both_sides_of_the_capacity():
    network, x = make_network(), rand(6, 3, 10, 14)
    capacities = capacities_of(network, [x], 0.7)
    quick = with_capacity(network, capacities)
    with torch.no_grad():
        overflows = torch.cat([quick(sample)[1] for sample in torch.split(x, 1)])
        assert 0 < (overflows > 0).sum() < 6
        routed = RoutedModel(None, {"capacity": quick, "dense": canonicalize(network)})
        # sums of at most 54 terms in another order, through four blocks
        torch.testing.assert_close(routed(x), network(x), rtol=0, atol=1e-4)


def lower(network, x, name, folder):
    target = targets.load(name)
    program = to_float(capture(network, (x,)), (x,), "fp32").program
    artifact = target.lower({"forward": program}, folder, "fp32")
    return target.load(folder / artifact.programs["forward"], "forward")


@pytest.mark.parametrize("name", ["executorch", "onnxruntime"])
def test_real_runtime_computes_output_and_overflow(name, tmp_path):
    block, x = fresh(SparseInvertedResidual(3, 3)), rand(4, 3, 7, 9)
    block.masker.maskconv.bias.data.fill_(-0.05)  # about a quarter is active
    quick = with_capacity(block, capacities_of(block, [x], 0.5))
    run = lower(quick, x[:1], name, tmp_path)
    seen = set()
    for image in torch.split(x, 1):
        y, overflow = run(image.numpy())
        expected, count = quick(image)
        assert overflow.tolist() == count.tolist()
        seen.add(count.item() > 0)
        # at most 27 products of about 3, summed in another order, in three convolutions
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=0, atol=1e-4)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("block", "x", "capacities"),
    [
        (SparseBottleneck(4, 3, 2, downsample=True), rand(1, 4, 9, 12), {"": 6, ".dilated": 30}),
        # more than the 3840 of TensorRT's TopK
        (SparseInvertedResidual(4, 4), rand(1, 4, 90, 70), {"": 2000, ".dilated": 5000}),
    ],
    ids=["small", "many"],
)
def test_tensorrt_takes_it(tmp_path, block, x, capacities):
    quick = with_capacity(fresh(block), capacities)
    lower(quick, x, "onnxruntime", tmp_path)
    found = check_build(tmp_path / "model.onnx")
    if "missing" in found:
        pytest.skip(str(found["missing"]))
    assert found["passed"], found["messages"]


@pytest.mark.parametrize(
    ("capacities", "message"),
    [
        ({}, r"got \{\}; expected at least one capacity"),
        ({"body.0": 0}, "each 1 or more"),
        ({"body.7": 3}, r"not 'body\.7'\. Found blocks: \['body\.0', 'body\.1', 'body\.2'\]"),
        ({"head": 3}, "not 'head'"),
        ({"body.0": 3, "body.1.dilated": 9}, r"not 'body\.1\.dilated'"),
    ],
)
def test_capacities_that_fit_no_block_are_refused(capacities, message):
    with pytest.raises(ModelError, match=message):
        with_capacity(make_network(), capacities)


def test_batch_is_refused():
    block, x = EXAMPLES["SparseInvertedResidual5"]
    with pytest.raises(ModelError, match=r"x \(2, 6, 11, 16\); expected a batch of 1"):
        with_capacity(block, {"": 5})(x)


@pytest.mark.parametrize(
    ("model", "inputs", "quantile", "message"),
    [
        (SparseInvertedResidual(2, 2), [torch.zeros(1, 2, 3, 4)], 0.0, "quantile=0.0 and counted 2 masks"),
        (SparseInvertedResidual(2, 2), [torch.zeros(1, 2, 3, 4)], 1.5, "quantile=1.5"),
        (SparseInvertedResidual(2, 2), [], 1.0, "counted 0 masks"),
        (nn.Conv2d(2, 2, 1), [torch.zeros(1, 2, 3, 4)], 1.0, "a network with gated blocks"),
    ],
    ids=["zero", "above_one", "no_inputs", "no_blocks"],
)
def test_capacities_of_refuses_what_it_cannot_measure(model, inputs, quantile, message):
    with pytest.raises(ModelError, match=message):
        capacities_of(model.eval(), inputs, quantile)
