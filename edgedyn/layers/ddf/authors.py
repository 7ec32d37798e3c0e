"""From the authors' DDF and DDF-Up, arguments or instances, to our references with the same weights.

Two published classes are called ``DDFUpPack``: the first (theFoxofSky/ddfnet) has a depthwise convolution in
front of every spatial branch without a guide, the repaired one (rightchose/ddfnet) an optional one inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.ddf.reference import DDFPack, DDFUpPack, FilterNorm


def take_weights(reference: nn.Module, module: nn.Module, name: str) -> nn.Module:
    """Load the weights of an authors' instance, and prove that it is built like the reference.

    Args:
        reference: ours, made of what the instance's attributes and shapes say.
        module: the authors' instance.
        name: the authors' class, for the message.

    Returns:
        The reference, in the mode and dtype of the instance.

    Raises:
        ModelError: where keys, shapes, convolutions or normalisations differ.
    """
    try:
        state = module.state_dict()
        reference.to(next(iter(state.values())))
        reference.load_state_dict(state)
        for path, ours in reference.named_modules():
            _match(path, ours, module.get_submodule(path))
    except (RuntimeError, AttributeError, ModelError) as error:
        raise refuse_instance(name, error) from error
    return reference.train(module.training)


def refuse_instance(name: str, error: Exception) -> ModelError:
    """Say why an instance with dynamic branches is not the authors' class of that name."""
    return ModelError(
        f"a {name} is not the published one: {' '.join(str(error).split())}. Build it with "
        "edgedyn.authors.from_authors from its constructor arguments and state_dict, or rename the class."
    )


def _match(path: str, ours: nn.Module, theirs: Any) -> None:
    """Compare one part; take over a constant spread, which no state_dict holds."""
    found: list[object]
    expected: list[object]
    if isinstance(ours, nn.Conv2d | nn.AdaptiveAvgPool2d | nn.ReLU):
        found, expected = _describe(theirs), _describe(ours)
    elif isinstance(ours, FilterNorm):
        found = [theirs.filter_type, theirs.in_channels, theirs.runing_std, theirs.runing_mean]
        expected = [ours.filter_type, ours.in_channels, isinstance(ours.std, Tensor), ours.mean is not None]
        ours.std = theirs.std if isinstance(theirs.std, float) else ours.std
    else:
        return
    if found != expected:
        raise ModelError(f"its {path} is {found}, expected {expected}")


def _describe(part: nn.Module) -> list[object]:
    """Name a part and what it computes with; whether it writes in place makes no difference."""
    if isinstance(part, nn.AdaptiveAvgPool2d):
        return [type(part).__name__, str(part.output_size in (1, (1, 1)))]
    return [type(part).__name__, "" if isinstance(part, nn.ReLU) else part.extra_repr()]


def _read(
    name: str, module: Any, build: Callable[[Any, Mapping[str, Tensor]], nn.Module]
) -> nn.Module | None:
    """Build our reference of an instance from its attributes and the shapes of its weights."""
    if not hasattr(module, "spatial_branch") and not hasattr(module, "channel_branch"):
        return None
    try:
        reference = build(module, module.state_dict())
    except (KeyError, AttributeError, TypeError, ModelError) as error:
        raise refuse_instance(name, error) from error
    return take_weights(reference, module, name)


def _read_pack(module: Any, state: Mapping[str, Tensor]) -> DDFPack:
    hidden, channels = state["channel_branch.1.weight"].shape[:2]
    return DDFPack(
        channels,
        module.kernel_size,
        module.stride,
        module.dilation,
        module.head,
        (hidden + 0.5) / channels,
        kernel_combine=module.kernel_combine,
        gen_kernel_size=state["spatial_branch.0.weight"].shape[-1],
    )


def _read_up_pack(module: Any, state: Mapping[str, Tensor]) -> DDFUpPack:
    hidden, channels = state["channel_branch.0.1.weight"].shape[:2]
    first = state["spatial_branch.0.0.weight"]
    side, is_first_version = first.shape[-1], _is_first_version(state)
    is_joint = side > 1 and not is_first_version
    return DDFUpPack(
        channels,
        module.kernel_size,
        module.scale_factor,
        module.dilation,
        module.head,
        (hidden + 0.5) / channels,
        gen_kernel_size=1 if is_first_version else side,
        joint_channels=first.shape[0] if is_joint else -1,
        kernel_combine=module.kernel_combine,
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

    With a guide the first version has no depthwise convolution, and reads in_channels channels whatever
    joint_channels says: it then is the repaired one without a guide, called with joint_x.
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
    "DDFPack": lambda module: _read("DDFPack", module, _read_pack),
    "DDFUpPack": lambda module: _read("DDFUpPack", module, _read_up_pack),
}
