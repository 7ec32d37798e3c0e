"""From the authors' DDF and DDF-Up, arguments or instances, to our references with the same weights.

Two published classes are called ``DDFUpPack``: the first (theFoxofSky/ddfnet) has a depthwise convolution in
front of every spatial branch without a guide, the repaired one (rightchose/ddfnet) an optional one inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers._adopt import adopt, require, require_outputs
from edgedyn.layers.ddf.reference import DDFPack, DDFUpPack, FilterNorm


def _recognise(foreign: Any, make: Callable[[Any], nn.Module]) -> nn.Module | None:
    """Make the reference from an instance, or return None for one without the two dynamic branches."""
    if not hasattr(foreign, "spatial_branch") and not hasattr(foreign, "channel_branch"):
        return None
    reference = adopt(make, foreign)
    for path, ours in reference.named_modules():
        if isinstance(ours, FilterNorm | nn.AdaptiveAvgPool2d):
            parts = dict(foreign.named_modules())
            require(path in parts, foreign, f"has no {path}, expected {type(ours).__name__}")
            found, expected = _describe(parts[path]), _describe(ours)
            require(found == expected, foreign, f"has {found} as {path}, expected {expected}")
        if isinstance(ours, FilterNorm) and not isinstance(ours.std, Tensor):
            ours.std = parts[path].std  # a number, which no state_dict holds
    return require_outputs(reference, foreign)


def _describe(part: Any) -> tuple[object, ...]:
    """Return type and options of a FilterNorm or a pool."""
    if isinstance(part, FilterNorm):
        learned = isinstance(part.std, Tensor), part.mean is not None
        return "FilterNorm", part.filter_type, part.in_channels, *learned
    if isinstance(part, nn.AdaptiveAvgPool2d):
        return "AdaptiveAvgPool2d", part.output_size in (1, (1, 1))
    attributes = ("filter_type", "in_channels", "runing_std", "runing_mean")  # the published spelling
    return type(part).__name__, *(getattr(part, name, None) for name in attributes)


def _make_pack(foreign: Any) -> DDFPack:
    hidden, channels = foreign.channel_branch[1].weight.shape[:2]
    return DDFPack(
        channels,
        foreign.kernel_size,
        foreign.stride,
        foreign.dilation,
        foreign.head,
        (hidden + 0.5) / channels,
        kernel_combine=foreign.kernel_combine,
        gen_kernel_size=foreign.spatial_branch[0].weight.shape[-1],
    )


def _make_up_pack(foreign: Any) -> DDFUpPack:
    hidden, channels = foreign.channel_branch[0][1].weight.shape[:2]
    first = foreign.spatial_branch[0][0].weight
    side, is_first_version = first.shape[-1], _is_first_version(foreign.state_dict())
    is_joint = side > 1 and not is_first_version
    return DDFUpPack(
        channels,
        foreign.kernel_size,
        foreign.scale_factor,
        foreign.dilation,
        foreign.head,
        (hidden + 0.5) / channels,
        gen_kernel_size=1 if is_first_version else side,
        joint_channels=first.shape[0] if is_joint else -1,
        kernel_combine=foreign.kernel_combine,
        dw_kernel_size=side if is_first_version else 0,
    )


def _is_first_version(state: Mapping[str, Tensor]) -> bool:
    """Tell the first published DDFUpPack without a guide: its plain spatial branches nest."""
    return "spatial_branch.0.1.0.weight" in state


def _build_pack(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> DDFPack:
    return DDFPack(**arguments)


def _build_norm(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> FilterNorm:
    return FilterNorm(**arguments)


def _build_up_pack(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> DDFUpPack:
    """Choose the version by the state_dict's keys.

    With a guide, the first version has no depthwise convolution and ignores joint_channels: its guide has
    in_channels channels. It equals the repaired version without joint_channels, called with joint_x.
    """
    known, joint = dict(arguments), arguments.get("joint_channels", -1)
    if _is_first_version(state_dict):
        _refuse_ignored(known, "gen_kernel_size", "the first published version, which has none")
        known["dw_kernel_size"] = max(known.get("dw_kernel_size", 3), 3)
    elif joint > 0 and "spatial_branch.0.1.weight" not in state_dict:
        reason = "the first published version with a guide, which has none"
        _refuse_ignored(known, "gen_kernel_size", reason)
        _refuse_ignored(known, "dw_kernel_size", reason)
        if joint != arguments.get("in_channels"):
            raise ModelError(
                f"DDFUpPack got joint_channels={joint}, in_channels={arguments.get('in_channels')} and "
                "weights of the first published version, which ignores joint_channels: its guide has "
                "in_channels channels. Pass joint_channels=in_channels."
            )
        del known["joint_channels"]
    else:
        _refuse_ignored(known, "dw_kernel_size", "the repaired version, which has none")
    return DDFUpPack(**known)


def _refuse_ignored(arguments: Mapping[str, Any], name: str, version: str) -> None:
    if name in arguments:
        raise ModelError(
            f"DDFUpPack got {name}={arguments[name]} and weights of {version}. Leave it out, or load the "
            "state_dict that belongs to it."
        )


BUILD: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], nn.Module]] = {
    "DDFPack": _build_pack,
    "DDFUpPack": _build_up_pack,
    "FilterNorm": _build_norm,
}
RECOGNISE: dict[str, Callable[[Any], nn.Module | None]] = {
    "DDFPack": lambda foreign: _recognise(foreign, _make_pack),
    "DDFUpPack": lambda foreign: _recognise(foreign, _make_up_pack),
}
