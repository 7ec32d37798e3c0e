"""The DDF networks: sizes, shapes, the authors' checkpoints, exact rewriting, programs on the phone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_int8 import quantize_program
from torch import Tensor, nn

from edgedyn import ops, pipeline, quantize, targets
from edgedyn.checkpoints.authors import from_authors
from edgedyn.errors import ModelError, WeightsError
from edgedyn.layers import canonicalize, find_dynamic, float32_classes
from edgedyn.models.ddf_denoiser import DDFDenoiser
from edgedyn.models.ddf_resnet import DDFBottleneck, DDFResNet
from edgedyn.models.ddf_upsampler import DDFUpsampler
from edgedyn.recipe.keys import QuantizeSection

EXECUTORCH = targets.load("executorch")


def rand(*shape: int, seed: int = 6) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def make(cls, *arguments, **options) -> nn.Module:
    """Build a network whose statistics are no zeros and ones."""
    torch.manual_seed(12)
    net = cls(*arguments, **options).eval()
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            tensor.normal_(0, 0.2)
    return net


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("combine", ["mul", "add"])
@pytest.mark.parametrize(("depth", "parameters"), [(50, 16_843_748), (101, 28_146_912)])
def test_resnet_has_the_published_number_of_parameters(depth, parameters, combine):
    with torch.device("meta"):
        net = DDFResNet(depth, combine=combine)
    assert count(net) == parameters
    assert len(find_dynamic(net)) == {50: 16, 101: 33}[depth]


@pytest.mark.parametrize(
    ("cls", "options", "parameters"),
    [
        (DDFDenoiser, {}, 129_533),
        (DDFUpsampler, {}, 86_943),
        (DDFUpsampler, {"joint": True}, 91_711),
    ],
)
def test_small_networks_have_the_stated_number_of_parameters(cls, options, parameters):
    assert count(cls(**options)) == parameters


NETS = {
    "resnet": (lambda: make(DDFResNet, base_width=8, num_classes=10, combine="add"), [(2, 3, 64, 32)]),
    "dilated resnet": (
        lambda: make(DDFResNet, base_width=8, num_classes=4, output_stride=8, gen_kernel_size=3),
        [(2, 3, 32, 64)],
    ),
    "denoiser": (lambda: make(DDFDenoiser, 8, 2), [(2, 3, 17, 26)]),
    "gray denoiser": (lambda: make(DDFDenoiser, 8, 1, colors=1, head=2, combine="add"), [(2, 1, 9, 12)]),
    "upsampler": (lambda: make(DDFUpsampler, 8, 1), [(2, 3, 9, 14)]),
    "joint upsampler": (
        lambda: make(DDFUpsampler, 8, 1, colors=1, joint=True, head=2),
        [(2, 1, 9, 14), (2, 3, 18, 28)],
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_canonical_network_equals_the_reference_in_float64(name):
    build, shapes = NETS[name]
    net, inputs = build().double(), [rand(*shape).double() for shape in shapes]
    with torch.no_grad():
        expected, y = net(*inputs), canonicalize(net)(*inputs)
        disturbed = net(*(x + 1e-6 * rand(*x.shape, seed=7) for x in inputs))
    assert find_dynamic(net)
    # how a disturbance of 1e-6 grows tells how roundings of 1e-16 do, some 100 in each part of the network
    growth = max((disturbed - expected).abs().max() / 1e-6, expected.abs().max())
    assert (y - expected).abs().max() <= 100 * len(list(net.modules())) * 2.0**-53 * growth
    assert (y - expected).abs().max() <= 1e-11 * expected.abs().max()
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("name", NETS)
def test_example_of_a_batch_does_not_depend_on_its_neighbour(name):
    build, shapes = NETS[name]
    net, inputs = canonicalize(build()).double(), [rand(*shape).double() for shape in shapes]
    with torch.no_grad():
        torch.testing.assert_close(net(*inputs)[1:], net(*(x[1:] for x in inputs)), rtol=1e-9, atol=1e-9)


def test_network_up_to_a_layer_has_that_layer_s_features_and_no_more():
    whole = make(DDFResNet, base_width=8, num_classes=5)
    part = DDFResNet(base_width=8, up_to="layer3").eval()
    part.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith(("layer4", "fc"))})
    x, seen = rand(2, 3, 32, 64), []
    whole.layer3.register_forward_hook(lambda module, inputs, y: seen.append(y))
    with torch.no_grad():
        whole(x)
        assert torch.equal(part(x), seen[0])


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_output_stride_keeps_the_resolution_by_dilation(stride):
    net = make(DDFResNet, base_width=8, output_stride=stride, up_to="layer4")
    with torch.no_grad():
        assert net(rand(1, 3, 64, 96)).shape == (1, 2048, 64 // stride, 96 // stride)
    dilations = [net.get_submodule(f"layer4.{k}.conv2").dilation for k in range(3)]
    assert dilations == {8: [2, 4, 4], 16: [1, 2, 2], 32: [1, 1, 1]}[stride]


def test_image_sizes_that_do_not_divide_are_refused():
    net = make(DDFResNet, base_width=8)
    for module in (net, canonicalize(net)):
        with pytest.raises(ModelError, match="features of 5 x 8 pixels at stride 2; expected multiples of 2"):
            module(rand(1, 3, 40, 64))


@pytest.mark.parametrize("options", [{"depth": 18}, {"output_stride": 4}, {"up_to": "layer5"}])
def test_unknown_resnet_is_refused_with_the_known_ones(options):
    with pytest.raises(ModelError, match=r"DDFResNet got .*\[50, 101, 152\], one of \[8, 16, 32\].*'layer1'"):
        DDFResNet(**options)


RESNET = {"base_width": 8, "num_classes": 10}


@pytest.mark.parametrize("name", [f"ddf_{c}_resnet{d}" for c in ("mul", "add") for d in (50, 101)])
def test_checkpoint_of_the_authors_networks_loads(name):
    _, combine, depth = name.replace("resnet", "").split("_")
    state = DDFResNet(int(depth), combine=combine, **RESNET).state_dict()
    known = {"name": name, "drop_path_rate": 0.1, **RESNET}
    net = from_authors("ddf_resnet.ddf_{mul,add}_resnet50", known, state)
    assert {pack.kernel_combine for _, pack, _ in find_dynamic(net)} == {combine}
    assert len(find_dynamic(net)) == {50: 16, 101: 33}[int(depth)]


def test_words_up_to_a_layer_ask_for_that_part():
    state = DDFResNet(up_to="layer1", **RESNET).state_dict()
    net = from_authors("ddf_resnet.ddf_mul_resnet50, forward up to layer1", RESNET, state)
    with torch.no_grad():
        assert net(rand(1, 3, 32, 64)).shape == (1, 256, 8, 16)


def test_part_of_a_checkpoint_is_not_a_network():
    state = DDFResNet(up_to="layer2", **RESNET).state_dict()
    with pytest.raises(WeightsError, match=r"\d+ keys missing, 0 unknown"):
        from_authors("ddf_mul_resnet50", RESNET, state)
    with pytest.raises(WeightsError, match=r"0 keys missing, \d+ unknown"):
        from_authors("ddf_mul_resnet50, forward up to layer1", RESNET, state)


def test_block_arguments_go_to_the_blocks():
    options = {"block_args": {"se_ratio": 0.4, "gen_kernel_size": 3}, **RESNET}
    state = DDFResNet(se_ratio=0.4, gen_kernel_size=3, **RESNET).state_dict()
    net = from_authors("ddf_add_resnet50", options, state)
    assert net.layer1[0].conv2.spatial_branch[0].kernel_size == (3, 3)


@pytest.mark.parametrize("option", [{"stem_type": "deep"}, {"avg_down": True}, {"layers": [1, 1, 1, 1]}])
def test_options_of_other_resnets_are_refused(option):
    with pytest.raises(ModelError, match=f"unexpected keyword argument '{next(iter(option))}'"):
        from_authors("ddf_mul_resnet50", {**RESNET, **option}, {})


BLOCK = {"inplanes": 32, "planes": 16, "first_dilation": 1, "stride": 2, "with_downsample": True}


@pytest.mark.parametrize(
    ("name", "given", "combine"),
    [
        ("DDFMulBottleneck", {}, "mul"),
        ("DDFAddBottleneck", {"first_dilation": 2, "dilation": 4}, "add"),
        ("DDFMulBottleneck / DDFAddBottleneck", {"combine": "add"}, "add"),
    ],
)
def test_authors_block_is_built(name, given, combine):
    known = BLOCK | given
    own = DDFBottleneck(32, 16, stride=2, combine=combine, with_downsample=True)
    block = from_authors(f"ddf_resnet.{name}", known, own.state_dict())
    assert (block.conv2.kernel_combine, block.conv2.dilation) == (combine, known["first_dilation"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"first_dilation": None}, "first_dilation=None; expected reduce_first=1 and a number"),
        ({"reduce_first": 2}, "reduce_first=2"),
        ({"with_downsample": False}, "32 channels in, 64 out at stride 2.*Set with_downsample"),
        ({"attn_layer": "se"}, "unexpected keyword argument 'attn_layer'"),
    ],
)
def test_block_that_the_published_code_cannot_run_is_refused(changed, message):
    with pytest.raises(ModelError, match=message):
        from_authors("DDFMulBottleneck", BLOCK | changed, {})


@pytest.mark.parametrize("colors", [1, 3])
def test_denoiser_removes_what_its_tail_says(colors):
    net, x = make(DDFDenoiser, 8, 1, colors=colors), rand(2, colors, 7, 12)
    with torch.no_grad():
        assert not torch.equal(net(x), x)
        net.tail.weight.zero_()
        net.tail.bias.fill_(0.25)
        assert torch.equal(net(x), x - 0.25)


def test_upsampler_adds_detail_to_a_bilinear_image():
    net, x = make(DDFUpsampler, 8, 1), rand(2, 3, 7, 12)
    with torch.no_grad():
        assert net(x).shape == (2, 3, 14, 24)
        net.tail.weight.zero_()
        net.tail.bias.zero_()
        expected = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        assert torch.equal(net(x), expected)


def test_every_pixel_of_the_guide_counts():
    net, x, guide = make(DDFUpsampler, 8, 1, joint=True), rand(1, 3, 6, 9), rand(1, 3, 12, 18, seed=9)
    guide.requires_grad_()
    net(x, guide).square().sum().backward()
    assert (guide.grad != 0).all()


@pytest.mark.parametrize(
    ("joint", "guide", "message"),
    [
        (False, (1, 3, 12, 18), r"guide \(1, 3, 12, 18\); expected None"),
        (True, None, r"guide None; expected \(1, 3, 12, 18\)"),
        (True, (1, 3, 6, 9), r"guide \(1, 3, 6, 9\); expected \(1, 3, 12, 18\).*output's resolution"),
        (True, (1, 1, 12, 18), r"guide \(1, 1, 12, 18\); expected \(1, 3, 12, 18\)"),
    ],
)
def test_guide_that_does_not_fit_is_refused(joint, guide, message):
    net = make(DDFUpsampler, 8, 1, joint=joint)
    with pytest.raises(ModelError, match=message):
        net(rand(1, 3, 6, 9), None if guide is None else rand(*guide))


@pytest.mark.parametrize(
    ("cls", "options"),
    [(DDFDenoiser, {"blocks": 0}), (DDFDenoiser, {"colors": 0}), (DDFUpsampler, {"guide_colors": 0})],
)
def test_nothing_is_not_a_network(cls, options):
    with pytest.raises(ModelError, match="expected at least 1 of each"):
        cls(**options)


def lower_and_run(net: nn.Module, inputs: tuple[Tensor, ...], folder, precision: str):
    """Return (facts, output of the ExecuTorch runtime, INT8 share of multiply-adds)."""
    program = pipeline.capture(canonicalize(net), inputs)
    forms = ops.choose_forms(program, EXECUTORCH, {})
    program, kept = ops.decompose(program, forms, "before_quantize"), float32_classes()
    if precision == "fp32":
        result = quantize.to_float(program, inputs, precision, kept)
    else:
        result = quantize_program(
            program,
            inputs,
            scheme=EXECUTORCH.int8,
            section=QuantizeSection(),
            samples=[inputs],
            float32=kept,
        )
    artifact = EXECUTORCH.lower({"forward": result.program}, folder, precision)
    (y,) = EXECUTORCH.load(folder / "model.pte", "forward")(*(x.numpy() for x in inputs))
    return artifact.facts, y, result.int8_mac_share


PHONE = {
    "denoiser": (lambda: make(DDFDenoiser, 8, 1), [(1, 3, 16, 24)]),
    "joint upsampler": (lambda: make(DDFUpsampler, 8, 1, joint=True), [(1, 3, 8, 12), (1, 3, 16, 24)]),
    "resnet block": (
        lambda: make(DDFBottleneck, 32, 16, stride=2, combine="add", with_downsample=True),
        [(1, 32, 8, 12)],
    ),
}


@pytest.mark.parametrize(
    ("name", "precision"),
    [("denoiser", "int8"), ("joint upsampler", "fp32"), ("resnet block", "fp32"), ("resnet block", "int8")],
)
def test_network_runs_on_the_phone_s_runtime_in_one_delegate(name, precision, tmp_path):
    build, shapes = PHONE[name]
    net, inputs = build(), tuple(rand(*shape) for shape in shapes)
    facts, y, share = lower_and_run(net, inputs, tmp_path, precision)
    assert (facts["delegates"], facts["portable"]) == (1, {})
    with torch.no_grad():
        exact = net.double()(*(x.double() for x in inputs)).numpy()
    error = np.abs(y - exact).max() / np.abs(exact).max()
    if precision == "fp32":
        assert error < 1e-5  # some 100 roundings of 6e-8 one after the other
    else:
        assert 1e-4 < error < 0.15  # int8 steps are 1/255 of a tensor's range; an index error is of order 1
        assert share > 0.8
