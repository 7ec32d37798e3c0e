"""Our references against outputs of the authors' own code (``golden/``, see its README)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from edgedyn.layers import canonicalize
from edgedyn.layers.malleconv import (
    MalleConv,
    affine_slice,
    bilateral_slice,
    bilateral_slice_apply,
    slice_and_convolve,
)
from edgedyn.ops.sliced_depthwise2d import sliced_depthwise2d

FILES = sorted((Path(__file__).parent / "golden").glob("*.safetensors"))
# Both sides are float64 and differ by the order of summation only: at most 8 * 9 + 12 products of a chain of
# six layers, each rounded at 1.1e-16, relative to a largest output that cancels at most a hundredfold.
EXACT = 1e-12


class Golden:
    """One file: inputs in float64, parameters, the authors' float64 output, how they called their code."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118 a file, no dict
        self.official = metadata["official"]
        self.constructor, self.call = json.loads(metadata["constructor"]), json.loads(metadata["call"])
        self.inputs = part(tensors, "input.")
        self.parameters = part(tensors, "param.")
        (self.output,) = part(tensors, "output64.").values()


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def nhwc(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1)


def depth_first(grid: Tensor) -> Tensor:
    """Turn the authors' (B, gh, gw, D, n) into our (B, D, n, gh, gw)."""
    return grid.permute(0, 3, 4, 1, 2).contiguous()


def smoothing(*, depth: int) -> float:
    """Bound what HDRNet's sqrt(d^2 + 1e-8) for |d| does to a sliced value, relative to the largest cell.

    The root exceeds |d| by at most 1e-4, at d = 0, and by 1e-8 / (2 |d|) farther away. A weight max(1 - root,
    0) thus falls by at most 1e-4, and a pixel reads at most two cells of the depth axis; when d = 0 at the
    one, d = 1 at the other, which then adds 5e-9. In between both lose less together.
    """
    return 1e-4 + (5e-9 if depth > 1 else 0.0)


def assert_within(y: Tensor, golden: Golden, bound: float) -> None:
    assert y.shape == golden.output.shape
    assert (y - golden.output).abs().max().item() <= bound


def assert_exact(y: Tensor, golden: Golden) -> None:
    assert_within(y, golden, EXACT * golden.output.abs().max().item())


def check_operator(golden: Golden) -> None:
    x, weight, bias = golden.inputs["input"], golden.inputs["weight"], golden.inputs.get("bias")
    side, dilation = golden.call["kernel_size"][0], golden.call["dilation"][0]
    assert golden.call["stride"] == [1, 1]
    assert golden.call["padding"] == [dilation * (side // 2)] * 2
    assert weight.shape[1] == x.shape[1] // golden.call["groups"]
    assert_exact(slice_and_convolve(x, weight, bias, kernel_size=side, dilation=dilation), golden)
    tap_major = weight.transpose(1, 2).flatten(1, 2)
    assert_exact(sliced_depthwise2d(x, tap_major, bias, side, dilation), golden)


def check_layer(golden: Golden) -> None:
    layer = MalleConv(**golden.constructor).double()
    layer.load_state_dict(golden.parameters, strict=True)
    with torch.no_grad():
        for module in (layer, canonicalize(layer.eval())):
            assert_exact(module(golden.inputs["x"]), golden)


def check_slice(golden: Golden) -> None:
    grid, guide = depth_first(golden.inputs["grid"]), golden.inputs["guide"].unsqueeze(1)
    bound = smoothing(depth=grid.shape[1]) * grid.abs().max().item()
    assert_within(nhwc(bilateral_slice(grid, guide)), golden, bound)


def check_apply(golden: Golden) -> None:
    grid, guide = depth_first(golden.inputs["grid"]), golden.inputs["guide"].unsqueeze(1)
    image, has_offset = nchw(golden.inputs["image"]), golden.call["has_offset"]
    y = bilateral_slice_apply(grid, guide, image, has_offset=has_offset)
    # a pixel sums one coefficient an input channel, times that channel, and the offset
    terms = (image.abs().sum(1).max() + has_offset).item()
    assert_within(nhwc(y), golden, smoothing(depth=grid.shape[1]) * grid.abs().max().item() * terms)


def check_affine(golden: Golden) -> None:
    coefficients, x = nchw(golden.inputs["coefficients"]), nchw(golden.inputs["feature"])
    y = affine_slice(coefficients, x, golden.call["gz"])
    terms = x.abs().max().item() + 1
    assert_within(
        nhwc(y), golden, smoothing(depth=golden.call["gz"]) * coefficients.abs().max().item() * terms
    )


RULES = {
    "flying_conv._flying_conv2d_torch": check_operator,
    "model.common.FlyingConv": check_layer,
    "jax/bilateral_slice.py bilateral_slice": check_slice,
    "hdrnet/ops/bilateral_slice_apply.cc": check_apply,
    "MalleNet.py ModelTwo.call": check_affine,
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_output_of_the_authors_code_is_reproduced(path):
    golden = Golden(path)
    rules = [check for prefix, check in RULES.items() if golden.official.startswith(prefix)]
    assert len(rules) == 1, f"{path.name}: {golden.official!r} is covered by {len(rules)} rules, expected 1"
    assert golden.output.abs().max() > 0.1
    rules[0](golden)


def test_every_rule_has_a_file():
    official = [Golden(path).official for path in FILES]
    assert all(any(name.startswith(prefix) for name in official) for prefix in RULES)


def test_smoothing_bound_holds_and_is_reached():
    """The bound itself, on a fine scan of the distances: not exceeded, and not generous."""
    distance = torch.linspace(0, 1, 100001, dtype=torch.float64)
    root = (distance**2 + 1e-8).sqrt()
    lost = (root - distance) + (((1 - distance) ** 2 + 1e-8).sqrt() - (1 - distance))
    assert 0.99 * smoothing(depth=8) < lost.max().item() <= smoothing(depth=8)
    assert math.isclose((root - distance).max().item(), smoothing(depth=1), rel_tol=1e-12)
