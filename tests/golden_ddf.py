"""How the authors call DDF's operator, layers and networks, and how far FilterNorm amplifies rounding."""

from __future__ import annotations

import torch
from golden_check import Golden
from torch import Tensor, nn

from edgedyn.checkpoints.authors import from_authors
from edgedyn.layers import canonicalize
from edgedyn.layers.ddf import FilterGenerator, FilterNorm, decoupled_filter
from edgedyn.ops.decoupled_depthwise2d import decoupled_depthwise2d


def operator(golden: Golden) -> dict[str, Tensor]:
    x, spatial = golden.inputs["features"], golden.inputs["spatial_filter"]
    channel = golden.inputs["channel_filter"].flatten(2)
    known = dict(golden.call)
    side, combine = known.pop("kernel_size"), known.pop("kernel_combine")
    tap_major = channel.transpose(1, 2).reshape(x.shape[0], -1, 1, 1)
    return {
        "y": decoupled_filter(x, channel.flatten(1), spatial, side, combine=combine, **known),
        "y@canonical": decoupled_depthwise2d(x, tap_major, spatial, side, combine=combine, **known),
    }


def filter_norm(golden: Golden) -> dict[str, Tensor]:
    module, x = from_authors(golden.official, golden.constructor, golden.parameters), golden.inputs["x"]
    return {"y": module(x), "y@canonical": deployed_norm(module, x)}


def deployed_norm(norm: FilterNorm, x: Tensor) -> Tensor:
    """Normalise ready-made taps: the generator behind a 1x1 convolution that changes nothing."""
    rows = norm.in_channels * norm.taps
    unit = nn.Conv2d(rows, rows, 1).to(x.dtype)
    with torch.no_grad():
        unit.weight.copy_(torch.eye(rows).view(rows, rows, 1, 1))
        unit.bias.zero_()
    pixels = x.shape[2:] if norm.filter_type == "spatial" else (1, 1)
    y = FilterGenerator(unit, norm)(x.reshape(x.shape[0], rows, *pixels))
    y = y.view(x.shape[0], norm.taps, norm.in_channels, *pixels).transpose(1, 2)
    return y.reshape(x.shape[0], rows, *(pixels if norm.filter_type == "spatial" else ()))


def layer(golden: Golden) -> dict[str, Tensor]:
    """Run a module; the inputs and outputs of its FilterNorms and DDFPacks are intermediates."""
    (name,) = (output for output in golden.outputs if not output.startswith("mid."))
    module = from_authors(golden.official, golden.constructor, golden.parameters)
    found: dict[str, Tensor] = {}
    for path, part in module.named_modules():
        if path and type(part).__name__ in ("FilterNorm", "DDFPack"):
            part.register_forward_hook(recorder(found, path))
    inputs = [golden.inputs[key] for key in ("x", "joint_x") if key in golden.inputs]
    found[name] = module(*inputs)
    for part in module.modules():
        part._forward_hooks.clear()
    return found | {f"{name}@canonical": canonicalize(module)(*inputs)}


def recorder(found: dict[str, Tensor], path: str):
    def record(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        if type(module).__name__ == "FilterNorm":
            found[f"mid.{path}.in"], found[f"mid.{path}.out"] = inputs[0], y
        else:
            found[f"mid.{path}"] = y

    return record


RULES = {
    "ddf.ddf.ddf": operator,
    "ddf.ddf.FilterNorm": filter_norm,
    "ddf.ddf.DDFPack": layer,
    "ddf.ddf.DDFUpPack": layer,
    "ddf_resnet.": layer,
}


def own_rounding(golden: Golden) -> float:
    """Bound the error of a file whose FilterNorm divides by small spreads, by the authors' own rounding.

    Both precisions run the same operations, so float64's error is 2^-29 of float32's, ten times that in
    another order (as the files' README has it for float32). Only above 5e-5 of the largest output does this
    exceed the usual tolerance; the largest of these files has 1.5e-5.
    """
    return 10 * 2.0**-29 * max(golden.own_error.values())


BOUNDS = {prefix: own_rounding for prefix in RULES if prefix != "ddf.ddf.ddf"}
