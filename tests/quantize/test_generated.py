"""Generated kernels: how far they depend on the image; one range for all taps, or float."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from small_int8 import quantize_program
from small_networks import LAYERS
from torch import Tensor, nn

from edgedyn import ops, pipeline, quantize, targets
from edgedyn.conversion.convert import Converted, load_target
from edgedyn.layers import canonicalize
from edgedyn.layers.acda import ACDAConv
from edgedyn.layers.ddf import DDFPack
from edgedyn.layers.dynconv import SparseBasicBlock
from edgedyn.quantize.accounting import KEPT_OUTPUT_RESCALE
from edgedyn.quantize.observe.program import observe_program
from edgedyn.quantize.observe.statistics import channel_maxima, look
from edgedyn.quantize.plan import find_kernels
from edgedyn.quantize.rescale.generated import ContentMeter, find_generating
from edgedyn.quantize.rescale.passes import find_places, rescale_channels
from edgedyn.quantize.table.entries import Entry
from edgedyn.recipe.keys import QuantizeSection, RangeSection
from edgedyn.recipe.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["model.network=small_networks:small_affine_net", "model.weights=null", "model.arguments={}"]
SMALL += ["input.shape=[1, 3, 32, 48]", "tile.overlap=0", "quantize.keep_float=[]", "quantize.dynamic=[]"]
KERNELS = {"1.scales.0.output", "1.offsets.0.output"}


def measure_content(module, layers, samples):
    meter = ContentMeter({layer.output: layer.output_node for layer in layers})
    channel_maxima(module, (), samples, dict.fromkeys(meter.names, meter.add))
    return meter.read()


def scale_taps(module, names, samples) -> dict[str, Tensor]:
    section = QuantizeSection(generated="tap", equalize=False, equalize_outputs=False)
    places = find_places(module, section, names)
    nodes = {node for _, place in places for node in place.activations}
    factors, _ = rescale_channels(module, places, channel_maxima(module, nodes, samples))
    return factors


def largest_taps(module, samples) -> dict[str, Tensor]:
    nodes = {layer.output_node: layer.output for layer in find_generating(module, KERNELS)}
    maxima = channel_maxima(module, nodes, samples)
    return {name: maxima[node] for node, name in nodes.items()}


def make_samples(count: int = 3) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(13)
    return [(torch.rand(1, 3, 32, 48, generator=generator) ** (k + 1),) for k in range(count)]


def make_net(*, spread: float = 1.0) -> nn.Sequential:
    """Return a network whose taps have sizes from 1 to ``spread``."""
    torch.manual_seed(21)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), LAYERS["affine"](), nn.Conv2d(8, 3, 3, padding=1))
    with torch.no_grad():
        net[1].gate.fill_(1)
        sizes = spread ** torch.linspace(0, 1, 8).repeat(2)
        net[1].coefficients.weight.mul_(sizes[:, None, None, None])
        net[1].coefficients.bias.mul_(sizes)
    return net.eval()


def captured(net: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(canonicalize(net), make_samples()[0], strict=False)


def decomposed(net: nn.Module, target: str = "executorch") -> torch.export.ExportedProgram:
    program = captured(net)
    forms = ops.choose_forms(program, targets.load(target), {})
    return ops.decompose(ops.decompose(program, forms, "before_quantize"), forms, "after_quantize")


def to_int8(net: nn.Module, generated: str, target: str = "executorch", **section) -> quantize.Quantized:
    names = quantize.find_generators(quantize.fold(captured(net)))
    assert names == KERNELS
    return quantize_program(
        decomposed(net, target),
        make_samples()[0],
        scheme=targets.load(target).int8,
        section=QuantizeSection(generated=generated, rounding="nearest", **section),
        samples=make_samples(),
        generated=names,
    )


def test_scaled_taps_have_one_range_and_their_readers_find_what_they_found():
    net, samples = make_net(spread=100), make_samples()
    module = quantize.fold(decomposed(net))
    before = largest_taps(module, samples)
    assert scale_taps(module, KERNELS, samples).keys() == KERNELS
    with torch.no_grad():
        for x in samples:  # float32 rounding of weights and of the Mul, on values around 1
            torch.testing.assert_close(module(*x), net(*x), rtol=0, atol=1e-5)
    after = largest_taps(module, samples)
    for name in KERNELS:
        assert before[name].max() / before[name].min() > 10
        torch.testing.assert_close(after[name], before[name].max().expand(8), rtol=1e-5, atol=0)


def test_tap_that_is_always_zero_stays_finite_and_takes_no_more_than_the_limit():
    net, samples = make_net(), make_samples()
    with torch.no_grad():
        net[1].coefficients.weight[[2, 10]] = 0
        net[1].coefficients.bias[[2, 10]] = 0
        net[1].norm.bias[2] = 0
    module = quantize.fold(decomposed(net))
    factors = scale_taps(module, KERNELS, samples)
    assert factors["1.scales.0.output"][2] == 1 / 1024
    with torch.no_grad():
        torch.testing.assert_close(module(*samples[0]), net(*samples[0]), rtol=0, atol=1e-5)  # float32


def test_a_scale_per_tap_is_finer_than_one_per_tensor_and_coarser_than_float():
    net, errors = make_net(spread=100), {}
    x = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(14))
    with torch.no_grad():
        for generated in ("tensor", "tap", "float"):
            y = to_int8(net, generated).program.module()(x)
            errors[generated] = float((y - net(x)).square().mean())
    assert errors["float"] < errors["tap"] < errors["tensor"]


@pytest.mark.parametrize(("target", "count"), [("executorch", 2), ("tensorrt", 0)])
def test_float_kernels_are_accounted_where_outputs_would_be_int8(target, count):
    rows = [row for row in to_int8(make_net(), "float", target).float_nodes if "generated)" in row["reason"]]
    assert [row["node"] for row in rows] == ["1.scales.0", "1.offsets.0"][:count]


def test_runtime_of_float_kernels_has_no_rescale_muls_and_the_same_scales():
    """The int8 values of a weight do not change with the size of its rows, nor does its output."""
    programs = {g: to_int8(make_net(spread=100), g, "tensorrt").program for g in ("tensor", "tap")}
    calls = {
        g: Counter(str(n.target) for n in p.graph.nodes if n.op == "call_function")
        for g, p in programs.items()
    }
    assert calls["tap"] == calls["tensor"]
    x = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(14))
    with torch.no_grad():
        a, b = (p.module()(x) for p in programs.values())
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)  # of values around 1


def test_rescale_muls_of_taps_are_accounted_as_such():
    rows = to_int8(make_net(), "tap", equalize_outputs=False).float_nodes
    (row,) = [row for row in rows if row["reason"] == KEPT_OUTPUT_RESCALE]
    assert (row["node"], row["count"]) == ("mul", 2)


@pytest.mark.parametrize("target", ["executorch", "tensorrt"])
@pytest.mark.parametrize(
    ("layer", "kernels"),
    [
        (lambda: ACDAConv(3, 4), {"0.bases_net.5.kernel": (1, 36, 32, 48)}),
        (
            lambda: DDFPack(3, head=3, se_ratio=0.5),
            {"0.channel_branch.3.kernel": (1, 27, 1, 1), "0.spatial_branch.0.kernel": (1, 27, 32, 48)},
        ),
        (
            lambda: DDFPack(3, se_ratio=0.5),
            {"0.channel_branch.3.kernel": (1, 27, 1, 1), "0.spatial_branch.0.kernel": (1, 9, 32, 48)},
        ),
        (lambda: SparseBasicBlock(3, 3), {}),
    ],
    ids=["tanh", "heads", "filter_norm", "mask"],
)
def test_kernels_that_float_operators_write_are_the_same_tensors_in_every_form(layer, kernels, target):
    torch.manual_seed(23)
    net, (x,) = nn.Sequential(layer()).eval(), make_samples()[0]
    modules = quantize.fold(captured(net)), quantize.fold(decomposed(net, target))
    names = quantize.find_generators(modules[0])
    assert names == kernels.keys()
    seen: list[dict[str, Tensor]] = [{}, {}]
    for module, values in zip(modules, seen, strict=True):
        nodes = {node: name for name, node in find_kernels(module, names).items()}
        look(module, nodes, (x,), lambda node, y, values=values, nodes=nodes: values.update({nodes[node]: y}))
    for name, shape in kernels.items():
        assert seen[0][name].shape == shape
        assert torch.equal(seen[0][name], seen[1][name])


class Generator(nn.Module):
    """Kernels of a given layer, for an op of ours and, where it is read twice, for a convolution."""

    def __init__(self, layer: nn.Module, *, is_read_twice: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.reader = nn.Conv2d(6, 3, 1) if is_read_twice else None

    def forward(self, x: Tensor) -> Tensor:
        grid = self.layer(x[:, :, ::8, ::8])
        y = torch.ops.edgedyn.sliced_depthwise2d(x, grid[:, :3], grid[:, 3:], 1)
        return y if self.reader is None else y + self.reader(grid).mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("net", "scaled"),
    [
        (Generator(nn.Conv2d(3, 6, 1)), 1),
        (Generator(nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.ReLU())), 1),
        (Generator(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Hardtanh(-2, 2))), 0),
        (Generator(nn.Conv2d(3, 6, 1), is_read_twice=True), 0),
    ],
    ids=["convolution", "relu", "clamp", "read_by_a_convolution"],
)
def test_only_taps_that_can_be_scaled_exactly_are_scaled(net, scaled):
    torch.manual_seed(22)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    samples = make_samples()
    module = quantize.fold(torch.export.export(net.eval(), samples[0]))
    with torch.no_grad():
        expected = net(*samples[0])
        names = {"layer.output", "layer.0.output"}
        assert len(find_generating(module, names)) == 1
        assert len(scale_taps(module, names, samples)) == scaled
        torch.testing.assert_close(module(*samples[0]), expected, rtol=1e-5, atol=1e-5)  # float32, 6 terms


@pytest.mark.parametrize(("behind", "is_tried"), [(nn.Identity, True), (nn.Tanh, False)])
def test_ablation_tries_steps_of_kernels_that_a_layer_writes(behind, is_tried):
    """The output of a Tanh is float, whatever the recipe says."""
    torch.manual_seed(25)
    net, samples = Generator(nn.Sequential(nn.Conv2d(3, 6, 1), behind())).eval(), make_samples()
    program = torch.export.export(net, samples[0])
    truths = [x.numpy() for (x,) in samples]
    found = quantize_program(
        program,
        samples[0],
        scheme=targets.load("executorch").int8,
        section=QuantizeSection(rounding="nearest"),
        samples=samples,
        generated=quantize.find_generators(quantize.fold(program)),
        evaluation=quantize.EvaluationSet(samples, truths, ["as they are"] * 3, by_layer=False, ablates=True),
    )
    assert ("generated: tensor" in found.calibrated.ablation) == is_tried


def test_kernel_that_a_convolution_reads_as_well_is_both():
    torch.manual_seed(24)
    net = Generator(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Tanh()), is_read_twice=True).eval()
    module = quantize.fold(torch.export.export(net, make_samples()[0]))
    names = quantize.find_generators(module)
    assert names == {"layer.1.kernel"}
    section = QuantizeSection(rounding="nearest")
    found = observe_program(module, section=section, samples=make_samples(), generated=names)
    entries = {entry.name: entry for entry in found.entries}
    kinds = {name: entries[name].kind for name in ("layer.1.kernel", "reader.input")}
    assert kinds == {"layer.1.kernel": "kernel", "reader.input": "feature"}
    assert entries["layer.1.kernel"].histogram.total == entries["reader.input"].histogram.total


def entries_of(**ranges: str) -> dict[str, Entry]:
    plain = {"equalize": False, "equalize_outputs": False, "rounding": "nearest"}
    section = QuantizeSection(ranges=RangeSection(**ranges, percentile=90.0), **plain)
    net = make_net()
    with torch.no_grad():
        net[2].weight[0] = 63.5 / 127  # between two int8 values of the full range
        net[2].weight[0, 0, 0, 0] = 1
    module = quantize.fold(decomposed(net))
    found = observe_program(module, section=section, samples=make_samples(), generated=KERNELS)
    return {entry.name: entry for entry in found.entries}


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind in ("feature", "kernel") for method in ("percentile", "mse", "entropy")]
    + [("weight", "percentile"), ("weight", "mse")],
)
def test_estimator_of_a_class_chooses_the_ranges_of_that_class_alone(kind, method):
    before, after = entries_of(), entries_of(**{kind: method})
    assert before.keys() == after.keys()
    for name, entry in after.items():
        assert entry.estimator == (method if entry.kind == kind else "minmax")
        if entry.kind != kind:
            assert entry.to_json() == before[name].to_json()
    # all of them cut off rare values: no range is wider, and some are narrower
    ratios = [
        np.array(entry.channels or entry.symmetric)
        / np.array(before[name].channels or before[name].symmetric)
        for name, entry in after.items()
        if entry.kind == kind
    ]
    assert max(ratio.max() for ratio in ratios) <= 1
    assert min(ratio.min() for ratio in ratios) < 0.995


def content_of(kernels: np.ndarray) -> tuple[float, float]:
    """Measure the content of kernels (N, C, gh, gw) in a network that copies them."""
    identity = nn.Conv2d(6, 6, 1, bias=False)
    with torch.no_grad():
        identity.weight.copy_(torch.eye(6)[:, :, None, None])
    module = quantize.fold(torch.export.export(identity.eval(), (torch.zeros(1, *kernels.shape[1:]),)))
    layers = find_generating(module, {"conv2d.output"})
    samples = [(torch.from_numpy(x[None]),) for x in kernels]
    (found,) = measure_content(module, layers, samples).values()
    return found.spread, found.between_images


def test_spread_is_what_its_definition_says():
    kernels = np.random.default_rng(3).standard_normal((5, 6, 4, 3)).astype(np.float32) + 0.5
    mean = kernels.mean((0, 2, 3), keepdims=True)
    rms = np.sqrt((kernels**2).mean())
    spread = np.sqrt(((kernels - mean) ** 2).mean()) / rms
    images = np.sqrt(((kernels.mean((2, 3), keepdims=True) - mean) ** 2).mean()) / rms
    np.testing.assert_allclose(content_of(kernels), (spread, images), rtol=1e-5)


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        (np.broadcast_to(np.arange(1, 7)[:, None, None], (3, 6, 4, 3)), (0, 0)),
        (np.broadcast_to(np.float32([-1, 0, 1])[:, None, None, None], (3, 6, 4, 3)), (1, 1)),
        (np.broadcast_to(np.float32([-1, 0, 1]), (3, 6, 4, 3)), (1, 0)),
        (np.zeros((3, 6, 4, 3)), (0, 0)),
    ],
    ids=["static", "by_image", "by_position", "zero"],
)
def test_spread_of_extreme_kernels(kernels, expected):
    np.testing.assert_allclose(content_of(np.array(kernels, np.float32)), expected, atol=1e-6)


def convert(folder: Path, generated: str) -> Converted:
    overrides = [*SMALL, f"quantize.table={folder / 'table.json'}", f"quantize.generated={generated}"]
    recipe = load_recipe(RECIPES / "mallenet-s.phone.int8.yaml", overrides)
    calibration, samples = pipeline.load_sets(recipe)
    target = load_target(recipe)
    return pipeline.convert(pipeline.rewrite_network(recipe, target), target, calibration, samples[0])


@pytest.mark.parametrize("generated", ["tap", "float"])
def test_second_build_is_the_same_to_the_bit_and_the_runtime_computes_it(tmp_path, generated, monkeypatch):
    first = convert(tmp_path, generated).parts["forward"].program
    monkeypatch.setattr(quantize, "calibrate", lambda *_, **__: pytest.fail("observed samples"))
    again = convert(tmp_path, generated)
    second = again.parts["forward"].program
    assert first.graph_module.code == second.graph_module.code
    for name, tensor in {**first.state_dict, **first.constants}.items():
        assert torch.equal(tensor, {**second.state_dict, **second.constants}[name])
    entries = {entry.name: entry for entry in again.table.programs["forward"]}
    for name in KERNELS:
        assert len(entries[name].channels) == (8 if generated == "tap" else 0)
        assert 0 < entries[name].spread[1] < entries[name].spread[0] < 1
    target, x = targets.load("executorch"), make_samples()[0][0]
    artifact = target.lower(again.programs, tmp_path, "int8")
    (y,) = target.load(tmp_path / artifact.programs["forward"], "forward")(x.numpy())
    error = np.abs(y - second.module()(x).numpy())
    # the runtime rounds ties of earlier activations to the other side; a wrong tap is off by many values
    assert error.mean() < entries["2.output"].affine[0]
