"""From the authors' DDS-Net and DS-Net, arguments or instances, to our references with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.ddsnet.blocks import BLOCKS, BlockOptions, Stage
from edgedyn.layers.ddsnet.dsnet import MBNET_14, DSNet, recognise_dsnet
from edgedyn.layers.ddsnet.gates import SlimmableGate
from edgedyn.layers.ddsnet.slimmable import (
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableDepthwiseConv2d,
    SlimmableLinear,
)

Arguments = Mapping[str, Any]


def _take(arguments: Arguments, known: str, ignored: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the arguments that take effect; refuse unknown ones.

    Args:
        arguments: the authors', by keyword.
        known: names of arguments that take effect, separated by blanks.
        ignored: names of arguments that the authors' class ignores, with the only value to accept.
        name: the class, for the message.
    """
    taken = dict(arguments)
    for key in ("cls", "name", "block"):
        taken.pop(key, None)
    for key in [key for key in ignored if key in taken]:
        value = taken.pop(key)
        if value != ignored[key]:
            raise ModelError(
                f"{name} got {key}={value!r}, which its code ignores; expected {ignored[key]!r}. Leave "
                "it out."
            )
    if unknown := sorted(taken.keys() - set(known.split())):
        raise ModelError(
            f"{name} got {unknown[0]}={taken[unknown[0]]!r}; expected only {known}. Leave it out."
        )
    return taken


def _side(value: Any, name: str, argument: str) -> int:
    """Read a kernel size, stride or dilation, equal on both axes."""
    pair = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(pair) != 2 or pair[0] != pair[1] or type(pair[0]) is not int or pair[0] < 1:
        raise ModelError(
            f"{name} got {argument}={value!r}; its padding is computed from one axis, so expected one "
            "positive whole number for both."
        )
    return pair[0]


_PADDING_MODE = {"padding_mode": "zeros"}


def _conv(arguments: Arguments, state_dict: Mapping[str, Tensor]) -> nn.Module:
    known = "in_channels_list out_channels_list kernel_size stride dilation groups bias"
    options = _take(arguments, known, _PADDING_MODE, "DSConv2d")
    inputs, outputs = options.pop("in_channels_list"), options.pop("out_channels_list")
    groups, kernel_size = (
        options.pop("groups", 1),
        _side(options.pop("kernel_size"), "DSConv2d", "kernel_size"),
    )
    for key in ("stride", "dilation"):
        options[key] = _side(options.get(key, 1), "DSConv2d", key)
    if groups == 1:
        return SlimmableConv2d(inputs, outputs, kernel_size, **options)
    if list(_listed(inputs)) == list(_listed(outputs)) and groups == _listed(outputs)[-1]:
        return SlimmableDepthwiseConv2d(outputs, kernel_size, **options)
    raise ModelError(
        f"DSConv2d got groups={groups} for {inputs} to {outputs} channels; expected 1, or for a depthwise "
        "convolution the widest of equal lists."
    )


def _listed(widths: Any) -> list[int]:
    return list(widths) if isinstance(widths, list | tuple) else [widths]


def _pointwise(arguments: Arguments, state_dict: Mapping[str, Tensor]) -> nn.Module:
    options = _take(arguments, "in_channels_list out_channels_list bias", {}, "DSpwConv2d")
    return SlimmableConv2d(kernel_size=1, **options)


def _depthwise(arguments: Arguments, state_dict: Mapping[str, Tensor]) -> nn.Module:
    options = _take(arguments, "channels_list kernel_size stride dilation bias", {}, "DSdwConv2d")
    sides = {k: _side(v, "DSdwConv2d", k) for k, v in options.items() if k not in ("channels_list", "bias")}
    return SlimmableDepthwiseConv2d(**(options | sides))


def _norm(arguments: Arguments, state_dict: Mapping[str, Tensor]) -> nn.Module:
    known = "num_features_list eps momentum affine"
    return SlimmableBatchNorm2d(**_take(arguments, known, {"track_running_stats": True}, "DSBatchNorm2d"))


def _linear(arguments: Arguments, state_dict: Mapping[str, Tensor]) -> nn.Module:
    return SlimmableLinear(**_take(arguments, "in_features_list out_features bias", {}, "DSLinear"))


def _gate(arguments: Arguments, state_dict: Mapping[str, Tensor]) -> nn.Module:
    known = "in_chs se_ratio reduced_base_chs act_layer attn_act_fn divisor channel_gate_num"
    options = _take(arguments, known, {"gate_num_features": 1024}, "MultiHeadGate")
    if options.get("channel_gate_num") is None:
        raise ModelError(
            "MultiHeadGate got no channel_gate_num, which its code compares with 1; expected the number of "
            "configurations, or 0 for attention alone."
        )
    options["reduced_base_chs"] = options.get("reduced_base_chs") or 0
    return SlimmableGate(options.pop("in_chs"), options.pop("se_ratio", 0.25), **options)


_OPTIONS = " ".join(option.name for option in fields(BlockOptions) if option.name != "gate_outputs")
# every argument of the authors' blocks; drop_path_rate has an effect in training only
_BLOCK = "in_channels_list out_channels_list layer_num norm_layer drop_path_rate has_gate " + _OPTIONS


def _block_options(options: dict[str, Any], name: str) -> BlockOptions:
    if options.pop("norm_layer", "DSBatchNorm2d") != "DSBatchNorm2d":
        raise ModelError(f"{name} got another norm_layer; expected DSBatchNorm2d, the only slimmable one.")
    options.pop("drop_path_rate", 0.0)  # without effect in evaluation
    outputs = 4 if options.pop("has_gate", False) else 0  # a constant of the authors' code
    options["norm_kwargs"] = _take(options.get("norm_kwargs") or {}, "eps momentum affine", {}, "norm_kwargs")
    return BlockOptions(**options, gate_outputs=outputs)


def _block(kind: str, name: str) -> Callable[[Arguments, Mapping[str, Tensor]], nn.Module]:
    """Return the function that builds a block of the authors' class ``name``."""
    known = _BLOCK if kind == "ir" else _BLOCK.replace(" exp_ratio", "")

    def build(arguments: Arguments, state_dict: Mapping[str, Tensor]) -> nn.Module:
        options = _take(arguments, known, {"conv_kwargs": None}, name)
        options.pop("layer_num", None)  # an option of the stage; this is one block
        widths = options.pop("in_channels_list"), options.pop("out_channels_list")
        return BLOCKS[kind](*widths, _block_options(options, name))

    return build


def _stage(arguments: Arguments, state_dict: Mapping[str, Tensor]) -> nn.Module:
    options = _take(arguments, "stage_type " + _BLOCK, {"conv_kwargs": None}, "DSStage")
    blocks, kind = options.pop("layer_num"), options.pop("stage_type")
    widths = options.pop("in_channels_list"), options.pop("out_channels_list")
    return Stage(kind, *widths, blocks, _block_options(options, "DSStage"))


def _dsnet(arguments: Arguments, state_dict: Mapping[str, Tensor]) -> nn.Module:
    known = (
        "num_classes in_chans choices_cfg act_layer noskip drop_rate se_ratio norm_layer norm_kwargs bias "
        "has_head"
    )
    options = _take(arguments, known, {"drop_path_rate": 0.0, "pretrained": False}, "DSNet")
    options.pop("drop_rate", 0.0)  # without effect in evaluation
    if options.get("choices_cfg") is None:
        raise ModelError("DSNet got no choices_cfg; expected the widths, blocks and strides of its stages.")
    norm: dict[str, Any] = {key: options.pop(key) for key in ("norm_layer", "norm_kwargs") if key in options}
    return DSNet(**options, norm_kwargs=_block_options(norm, "DSNet").norm_kwargs)


def _mbnet(arguments: Arguments, state_dict: Mapping[str, Tensor]) -> nn.Module:
    name = "slimmable_mbnet_v1_bn_uniform"
    known = "num_classes in_chans drop_rate se_ratio norm_kwargs bias has_head pretrained drop_path_rate"
    options = _take(arguments, known, {"noskip": True}, name)
    return _dsnet(options | {"choices_cfg": MBNET_14, "act_layer": "swish", "noskip": True}, state_dict)


def _refuse_alone(module: nn.Module) -> None:
    """Refuse a slimmable layer of the authors outside of a DSNet; return None for one of a single width."""
    lists = [
        widths
        for part in module.modules()
        for key in ("in_channels_list", "out_channels_list")
        if hasattr(part, "channel_choice") and isinstance(widths := getattr(part, key, None), list | tuple)
    ]
    if all(len(widths) < 2 for widths in lists):
        return
    raise ModelError(
        f"a {type(module).__name__} stands in a network that is no DSNet. Its width is set by the program "
        "around it (channel_choice, mode), which no exported file holds. Deploy the whole network: as a "
        "DSNet, as a GatedNetwork of edgedyn.layers.ddsnet, or at one width with "
        "from_authors(...).static(...)."
    )


_ALONE = (
    "DSConv2d DSpwConv2d DSdwConv2d DSBatchNorm2d DSLinear MultiHeadGate DSDepthwiseSeparable "
    "DSInvertedResidual DSStage"
)


BUILD: Mapping[str, Callable[[Arguments, Mapping[str, Tensor]], nn.Module]] = {
    "DSConv2d": _conv,
    "DSpwConv2d": _pointwise,
    "DSdwConv2d": _depthwise,
    "DSBatchNorm2d": _norm,
    "DSLinear": _linear,
    "MultiHeadGate": _gate,
    "DSDepthwiseSeparable": _block("ds", "DSDepthwiseSeparable"),
    "DSInvertedResidual": _block("ir", "DSInvertedResidual"),
    "DSStage": _stage,
    "DSNet": _dsnet,
    "slimmable_mbnet_v1_bn_uniform": _mbnet,
}


RECOGNISE: Mapping[str, Callable[[Any], nn.Module | None]] = {"DSNet": recognise_dsnet} | dict.fromkeys(
    _ALONE.split(), _refuse_alone
)
