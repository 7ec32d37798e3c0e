"""How the authors call MalleConv's operators and layers, and the tolerance for HDRNet's own approximation."""

from __future__ import annotations

from golden_check import Golden
from torch import Tensor

from edgedyn.checkpoints.authors import from_authors
from edgedyn.layers import canonicalize
from edgedyn.layers.malleconv import affine_slice
from edgedyn.layers.malleconv.slicing import (
    Geometry,
    bilateral_slice,
    bilateral_slice_apply,
    filter_sliced,
    slice_and_convolve,
)


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2).contiguous()


def nhwc(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1)


def depth_first(grid: Tensor) -> Tensor:
    """Turn the authors' (B, gh, gw, D, n) into our (B, D, n, gh, gw)."""
    return grid.permute(0, 3, 4, 1, 2).contiguous()


def operator(golden: Golden) -> dict[str, Tensor]:
    x, weight, bias = golden.inputs["input"], golden.inputs["weight"], golden.inputs.get("bias")
    names = ("kernel_size", "dilation", "stride", "padding")
    options = {name: tuple(golden.call[name]) for name in names}
    assert weight.shape[1] == x.shape[1] // golden.call["groups"]
    tap_major = weight.transpose(1, 2).flatten(1, 2)
    return {
        "y": slice_and_convolve(x, weight, bias, **options),
        "y@canonical": filter_sliced(x, tap_major, bias, Geometry.of(**options)),
    }


def layer(golden: Golden) -> dict[str, Tensor]:
    arguments = {**golden.constructor, **({"stride": s} if (s := golden.call.get("stride")) else {})}
    module = from_authors(golden.official, arguments, golden.parameters)
    x, *noise = (golden.inputs[name] for name in sorted(golden.inputs, key=lambda name: name != "x"))
    return {"y": module(x, *noise), "y@canonical": canonicalize(module)(x, *noise)}


def sliced(golden: Golden) -> dict[str, Tensor]:
    grid, guide = depth_first(golden.inputs["grid"]), golden.inputs["guide"].unsqueeze(1)
    return {"sliced": nhwc(bilateral_slice(grid, guide))}


def applied(golden: Golden) -> dict[str, Tensor]:
    grid, guide = depth_first(golden.inputs["grid"]), golden.inputs["guide"].unsqueeze(1)
    image, has_offset = nchw(golden.inputs["image"]), golden.call["has_offset"]
    return {"y": nhwc(bilateral_slice_apply(grid, guide, image, has_offset=has_offset))}


def affine(golden: Golden) -> dict[str, Tensor]:
    coefficients, x = nchw(golden.inputs["coefficients"]), nchw(golden.inputs["feature"])
    return {"post_image": nhwc(affine_slice(coefficients, x, golden.call["gz"]))}


RULES = {
    "flying_conv._flying_conv2d_torch": operator,
    "model.common.FlyingConv": layer,
    "jax/bilateral_slice.py bilateral_slice": sliced,
    "hdrnet/ops/bilateral_slice_apply.cc": applied,
    "MalleNet.py ModelTwo.call": affine,
}


def smoothing(*, depth: int) -> float:
    """Bound the effect of HDRNet's sqrt(d^2 + 1e-8) for |d| on a sliced value, relative to the largest cell.

    The root exceeds |d| by at most 1e-4, at d = 0, and by 1e-8 / (2 |d|) farther away. A weight max(1 - root,
    0) thus falls by at most 1e-4, and a pixel reads at most two cells of the depth axis; when d = 0 at the
    one, d = 1 at the other, which then adds 5e-9. In between both lose less together.
    """
    return 1e-4 + (5e-9 if depth > 1 else 0.0)


def bound_slice(golden: Golden) -> float:
    grid = golden.inputs["grid"]
    return smoothing(depth=grid.shape[3]) * grid.abs().max().item()


def bound_apply(golden: Golden) -> float:
    # a pixel sums one coefficient an input channel, times that channel, and the offset
    terms = golden.inputs["image"].abs().sum(3).max().item() + golden.call["has_offset"]
    return bound_slice(golden) * terms


def bound_affine(golden: Golden) -> float:
    terms = golden.inputs["feature"].abs().max().item() + 1
    largest = golden.inputs["coefficients"].abs().max().item()
    return smoothing(depth=golden.call["gz"]) * largest * terms


BOUNDS = {
    "jax/bilateral_slice.py bilateral_slice": bound_slice,
    "hdrnet/ops/bilateral_slice_apply.cc": bound_apply,
    "MalleNet.py ModelTwo.call": bound_affine,
}
