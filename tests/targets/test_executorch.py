"""ExecuTorch in its real runtime: a lowered program loads, runs, and computes the exported program."""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_int8 import quantize_program
from small_networks import LAYERS, sum_of_terms
from torch import Tensor, nn

from edgedyn import ops, quantize, targets
from edgedyn.errors import BundleError, ModelError
from edgedyn.layers import canonicalize
from edgedyn.layers.dynconv import SparseInvertedResidual
from edgedyn.recipe.keys import QuantizeSection

TARGET = targets.load("executorch")
SHAPE = (1, 3, 16, 24)


def lower(program, folder, precision):
    return TARGET.lower({"forward": program}, folder, precision)


def make_input(seed: int = 21, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def make_net(cls, *arguments) -> nn.Module:
    torch.manual_seed(22)
    net = cls(*arguments).eval()
    for name, tensor in net.state_dict().items():
        if name.endswith(("gate", "running_mean")):
            tensor.add_(0.3)
    return net


def capture(net: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    program = torch.export.export(canonicalize(net), (x,), strict=False)
    return ops.decompose(program, ops.choose_forms(program, TARGET, {}), "before_quantize")


def to_int8(net: nn.Module, x: Tensor, **section) -> quantize.Quantized:
    return quantize_program(
        capture(net, x),
        (x,),
        scheme=TARGET.int8,
        section=QuantizeSection(**section),
        samples=[(make_input(seed, tuple(x.shape)),) for seed in (23, 24)],
    )


def last_step(program: torch.export.ExportedProgram) -> float:
    """Return the step of the last tensor that a program quantizes."""
    return [n.args[1] for n in program.graph.nodes if ".quantize_per_tensor" in str(n.target)][-1]


def lower_and_run(program: torch.export.ExportedProgram, folder: Path, precision: str, x: Tensor):
    """Return (delegates, portable operators, output of the real runtime, output of the program)."""
    artifact = lower(program, folder, precision)
    assert artifact.programs == {"forward": "model.pte"}
    (y,) = TARGET.load(folder / "model.pte")(x.numpy())
    with torch.no_grad():
        expected = program.module()(x).numpy()
    return artifact.facts["delegates"], artifact.facts["portable"], y, expected


class PlainNet(nn.Module):
    """Two convolutions with PReLU between them and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.act, self.tail = nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.tail(self.act(self.head(x)))


class LayerNet(nn.Module):
    """A residual network around one dynamic layer, which reads a convolution's output directly."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.head, self.dynamic, self.tail = (
            nn.Conv2d(3, 8, 3, padding=1),
            layer,
            nn.Conv2d(8, 3, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x - self.tail(self.dynamic(self.head(x)))


# GroupNorm and the split of the predictor have no XNNPACK operator (executorch 1.5.1)
PORTABLE = {
    "affine": set(),
    "kernels": {"aten.native_group_norm.default", "aten.split_with_sizes_copy.default"},
}


def test_float32_differs_from_float64_by_rounding_only(tmp_path):
    net, x = make_net(PlainNet), make_input()
    program = quantize.to_float(capture(net, x), (x,), "fp32").program
    delegates, portable, y, _ = lower_and_run(program, tmp_path, "fp32", x)
    with torch.no_grad():
        error = (torch.from_numpy(y).double() - net.double()(x.double())).abs()
    # products, sums and elementwise steps on the way to a pixel, each rounded once
    roundings = 2 * (3 * 9 + 8) + 4
    assert (error <= roundings * 2.0**-24 * sum_of_terms(net, x)).all(), error.max()
    assert (delegates, portable) == (1, {})


@pytest.mark.parametrize("layer", LAYERS)
def test_dynamic_layer_in_float32(tmp_path, layer):
    net, x = make_net(lambda: LayerNet(LAYERS[layer]())), make_input(shape=(1, 3, 32, 48))
    program = quantize.to_float(capture(net, x), (x,), "fp32").program
    delegates, portable, y, _ = lower_and_run(program, tmp_path, "fp32", x)
    with torch.no_grad():
        expected, in_torch = net(x).numpy(), copy.deepcopy(net).double()(x.double()).numpy()
    # another order of summation: ten times the error of PyTorch in float32, at least 1e-6 of the maximum
    bound = max(10 * np.abs(expected - in_torch).max(), 1e-6 * np.abs(in_torch).max())
    assert np.abs(y - in_torch).max() <= bound
    assert set(portable) == PORTABLE[layer]
    assert delegates == 1 or layer == "kernels"


def assert_within_steps(y: np.ndarray, expected: np.ndarray, step: float) -> None:
    """Compare in steps of the output's quantizer.

    The runtime requantizes by another rounding than torch (one multiply against a divide), so a value near a
    tie falls to the neighbour: rarely, by one step each time, and three quantizers lie on the way.
    """
    assert y.shape == expected.shape
    steps = np.abs(y - expected) / step
    assert steps.max() <= 3 + 1e-3
    assert steps.mean() <= 0.1
    assert np.abs(expected).max() > 10 * step


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x.astype(np.float64) ** 2)))


@pytest.mark.parametrize("layer", ["affine", "kernels"])
def test_dynamic_layer_in_int8(tmp_path, layer):
    net, x = make_net(lambda: LayerNet(LAYERS[layer]())), make_input(shape=(1, 3, 32, 48))
    result = to_int8(net, x)
    delegates, portable, y, expected = lower_and_run(result.program, tmp_path, "int8", x)
    assert result.int8_mac_share == 1
    assert set(portable) == PORTABLE[layer]
    assert delegates == 1 or layer == "kernels"
    assert_within_steps(y, expected, last_step(result.program))
    with torch.no_grad():
        assert np.abs(y - net(x).numpy()).max() > 1e-4, "nothing was quantized"


class Between(nn.Module):
    """A pattern between convolutions: conv a, pattern, conv b, conv c."""

    def __init__(self, pattern, channels: int = 4) -> None:
        super().__init__()
        self.a, self.d = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.b, self.c = nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, 3, 1)
        self.linear = nn.Linear(4, 4)
        self.pattern = pattern

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.pattern(self, self.a(x))))


# name -> pattern, channels that it leaves; several died when loaded or run, or were silently wrong
# (executorch 1.5.1), before quantizer, partitioner and passes avoided them
PATTERNS = {
    "max_pool": (lambda net, y: F.max_pool2d(y, 2), 4),
    "global_average_pool": (lambda net, y: F.adaptive_avg_pool2d(y, 1), 4),
    "gate_of_global_average": (lambda net, y: y * torch.sigmoid(net.d(F.adaptive_avg_pool2d(y, 1))), 4),
    "two_readers_float_and_conv": (lambda net, y: y * torch.sigmoid(net.d(y)), 4),
    "two_readers_sum_and_pool": (
        lambda net, y: y + F.interpolate(net.d(F.avg_pool2d(y, 2)), scale_factor=2, mode="bilinear"),
        4,
    ),
    "residual_sum": (lambda net, y: y + net.d(y), 4),
    "pixel_unshuffle": (lambda net, y: F.pixel_unshuffle(y, 2), 16),
    "pixel_unshuffle_and_tanh": (lambda net, y: torch.tanh(F.pixel_unshuffle(y, 2)), 16),
    "pixel_unshuffle_and_product": (lambda net, y: 2.0 * F.pixel_unshuffle(y, 2), 16),
    "concatenation": (lambda net, y: torch.cat([y, net.d(y)], dim=1), 8),
    "zero_pad": (lambda net, y: F.pad(y, (1, 2, 0, 1)), 4),
    "zero_pad_read_in_float": (lambda net, y: torch.sigmoid(F.pad(y, (1, 2, 0, 1))), 4),
    "reflect_pad": (lambda net, y: F.pad(y, (0, 3, 0, 2), mode="reflect"), 4),
    "linear_of_positions": (
        lambda net, y: net.linear(y.permute(0, 2, 3, 1).flatten(0, 2)).view(1, 16, 24, 4).permute(0, 3, 1, 2),
        4,
    ),
    "linear_gate": (
        lambda net, y: y * net.linear(y.mean((2, 3), keepdim=True).flatten(1)).sigmoid()[:, :, None, None],
        4,
    ),
    "linear_along_width": (lambda net, y: net.linear(y.unflatten(3, (6, 4))).flatten(3), 4),
    "same_convolution_twice": (lambda net, y: 4.0 * net.b(5.0 * torch.sigmoid(net.b(y))), 4),
}
PORTABLE_BY_DESIGN = {
    "reflect_pad"
}  # index arithmetic: deployed sizes are multiples, where nothing is padded


@pytest.mark.parametrize("name", PATTERNS)
def test_int8_pattern_runs_and_computes_what_the_program_says(tmp_path, name):
    net, x = make_net(Between, *PATTERNS[name]), make_input()
    result = to_int8(net, x)
    delegates, portable, y, expected = lower_and_run(result.program, tmp_path, "int8", x)
    assert result.int8_mac_share == 1
    assert_within_steps(y, expected, last_step(result.program))
    if name not in PORTABLE_BY_DESIGN:
        assert (delegates, portable) == (1, {})


@pytest.mark.parametrize("name", PATTERNS)
def test_pattern_with_ranges_of_each_image_runs_and_computes_what_the_program_says(tmp_path, name):
    net, x = make_net(Between, *PATTERNS[name]), 3 * make_input()  # beyond the calibrated range
    result = to_int8(net, x, dynamic=["*"])
    delegates, portable, y, expected = lower_and_run(result.program, tmp_path, "int8", x)
    assert result.int8_mac_share == 1
    assert any("choose_qparams" in str(node.target) for node in result.program.graph.nodes)
    with torch.no_grad():
        float_ = net(x).numpy()
    # ties fall to other sides, so errors differ; they are no larger
    assert 1e-4 * np.abs(float_).max() < rms(y - float_) <= 1.5 * rms(expected - float_)
    if name not in PORTABLE_BY_DESIGN:
        assert (delegates, portable) == (1, {})


def test_layers_behind_a_mask_take_their_range_from_each_image(tmp_path):
    net, x = make_net(lambda: LayerNet(SparseInvertedResidual(8, 8))), 3 * make_input()
    result = to_int8(net, x, dynamic=["*"])
    assert {"dynamic.expand", "dynamic.project", "tail"} <= set(result.dynamic)
    delegates, portable, y, expected = lower_and_run(result.program, tmp_path, "int8", x)
    assert (delegates, portable) == (1, {})
    with torch.no_grad():
        float_ = net(x).numpy()
    assert 1e-4 * np.abs(float_).max() < rms(y - float_) <= 1.5 * rms(expected - float_)


def test_program_runs_again_after_its_file_and_maker_are_gone(tmp_path):
    """The runtime keeps neither the bytes nor the program alive."""
    net, x = make_net(PlainNet), make_input()
    lower(quantize.to_float(capture(net, x), (x,), "fp32").program, tmp_path, "fp32")
    run = TARGET.load(tmp_path / "model.pte")
    (tmp_path / "model.pte").unlink()
    (first,) = run(x.numpy())
    kept = first.copy()
    (other,) = run(make_input(25).numpy())
    assert not np.array_equal(other, kept)
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(run(x.numpy())[0], kept)


def test_lowering_leaves_the_program_as_it_was(tmp_path):
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("window", torch.ones(1, 1, 3, 3), persistent=False)

        def forward(self, x):
            return nn.functional.conv_transpose2d(x, self.window, stride=2)

    x = make_input(shape=(1, 1, 5, 6))
    program = capture(Spread().eval(), x)
    before = program.module()(x)
    lower(program, tmp_path, "fp32")
    assert torch.equal(program.module()(x), before)


def test_input_that_is_not_contiguous_is_copied(tmp_path):
    net, x = make_net(PlainNet), make_input()
    lower(quantize.to_float(capture(net, x), (x,), "fp32").program, tmp_path, "fp32")
    run = TARGET.load(tmp_path / "model.pte")
    view = np.ascontiguousarray(x.numpy().transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not view.flags.c_contiguous
    np.testing.assert_array_equal(run(view)[0], run(x.numpy())[0])


def test_loading_and_running_print_nothing(tmp_path):
    """In a process of its own: the runtime looks for the kind of CPU once."""
    net, x = make_net(PlainNet), make_input()
    lower(quantize.to_float(capture(net, x), (x,), "fp32").program, tmp_path, "fp32")
    code = (
        "import sys, numpy as np, logging; from pathlib import Path; from edgedyn import targets;"
        "from edgedyn.targets.quiet import quiet_libraries\n"
        f"with quiet_libraries(): targets.load('executorch').load(Path({str(tmp_path / 'model.pte')!r}))"
        f"(np.zeros({tuple(x.shape)}, np.float32))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cpuinfo" not in done.stderr + done.stdout


def test_failed_run_raises_with_the_runtimes_message(tmp_path):
    net, x = make_net(PlainNet), make_input()
    lower(quantize.to_float(capture(net, x), (x,), "fp32").program, tmp_path, "fp32")
    with pytest.raises(
        BundleError, match=r"cannot run model\.pte on inputs \[\(1, 3, 5, 5\)\]: .+keep_float"
    ):
        TARGET.load(tmp_path / "model.pte")(np.zeros((1, 3, 5, 5), np.float32))


def test_damaged_program_is_refused_with_the_runtimes_words(tmp_path):
    path = tmp_path / "model.pte"
    path.write_bytes(b"not a program" * 20)
    with pytest.raises(
        BundleError,
        match=r"ExecuTorch \S+ refuses 'forward' of model\.pte \(260 bytes\): .+build the bundle again",
    ) as caught:
        TARGET.load(path)
    assert caught.value.exit_code == 1


def test_facts_name_the_version_and_the_target_states_what_it_has(tmp_path):
    net, x = make_net(PlainNet), make_input()
    facts = TARGET.lower(
        {"forward": quantize.to_float(capture(net, x), (x,), "fp32").program}, tmp_path, "fp32"
    ).facts
    assert facts["executorch"] == version("executorch")
    assert TARGET.precisions == {"fp32", "int8"}
    assert TARGET.missing() is None


def test_operator_that_the_runtime_lacks_is_refused_with_node_and_layer(tmp_path):
    class Exponential(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.matrix_exp(x)

    net = torch.nn.Sequential(torch.nn.Identity(), Exponential()).eval()
    with pytest.raises(ModelError, match=r"'forward' calls operators .*stock runtime") as caught:
        lower(torch.export.export(net, (torch.rand(1, 3, 4, 4),)), tmp_path, "fp32")
    assert "aten::linalg_matrix_exp" in str(caught.value)
    assert "of 1)" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_programs_become_methods_of_one_file_and_share_weights(tmp_path):
    torch.manual_seed(0)
    shared = torch.nn.Conv2d(3, 64, 3, padding=1)
    nets = {f"w{c}": torch.nn.Sequential(shared, torch.nn.Conv2d(64, c, 1)).eval() for c in (3, 5)}
    x = torch.rand(1, 3, 9, 13)
    programs = {name: torch.export.export(net, (x,)) for name, net in nets.items()}
    artifact = TARGET.lower(programs, tmp_path, "fp32")
    assert artifact.programs == {"w3": "model.pte", "w5": "model.pte"}
    assert artifact.facts["shared_bytes"] > shared.weight.numel() * 4 * 0.5
    for name, net in nets.items():
        (y,) = TARGET.load(tmp_path / "model.pte", name)(x.numpy())
        # 27 products a value, rounded at 6e-8 in another order
        np.testing.assert_allclose(y, net(x).detach().numpy(), atol=1e-5)
