"""The blocks of DS-Net (arXiv 2103.13258): an opening of the input's width, channel attention, a closing.

    separable          depthwise, norm, act, attention | pointwise, norm, act
    inverted residual  pointwise, norm, act, depthwise, norm, act, attention | pointwise, norm
    with a shortcut    y = x + block(x), x pooled and convolved to y's size and width where they differ

x: (B, i, H, W)   y: (B, o, H', W')

In a gated block the attention also decides. The gate precedes ``|``: the opening has the width of the block's
input, the closing already has the chosen one. State_dict keys are the authors'; "theirs" names their class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.ddsnet.gates import SlimmableGate, make_activation, make_divisible
from edgedyn.layers.ddsnet.slimmable import (
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableDepthwiseConv2d,
    check_widths,
)


@dataclass(frozen=True)
class BlockOptions:
    """Options of the authors' blocks; names and defaults are theirs.

    ``stride`` and ``dilation`` are of the depthwise convolution, ``exp_ratio`` is the inner width of an
    inverted residual divided by its input's, ``se_ratio`` the reduced width of the attention divided by its
    widest input's, and ``gate_outputs`` the number of logits of the gate, 0 for a block without a gate.
    """

    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    act_layer: str = "relu"
    noskip: bool = False
    exp_ratio: float = 6.0
    se_ratio: float = 0.25
    norm_kwargs: Mapping[str, Any] = field(default_factory=dict)
    bias: bool = False
    gate_outputs: int = 0


class SlimmableBlock(nn.Module):
    """A block from features of one width to another: opening, attention with or without gate, closing.

    Args:
        in_channels_list: widths of the input.
        out_channels_list: widths of the output.
        options: the other options.

    Raises:
        ModelError: for width lists that are not increasing; when called, for a shortcut of another shape than
            the branch.
    """

    gate: SlimmableGate
    downsample: nn.Sequential | None

    def __init__(
        self, in_channels_list: Sequence[int], out_channels_list: Sequence[int], options: BlockOptions
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_channels_list = check_widths(in_channels_list, f"{name} (input)")
        self.out_channels_list = check_widths(out_channels_list, f"{name} (output)")
        self.options = options
        layers: list[nn.Module] = []
        if not options.noskip and options.stride == 2:
            layers.append(nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False))
        if not options.noskip and in_channels_list[-1] != out_channels_list[-1]:
            layers.append(SlimmableConv2d(in_channels_list, out_channels_list, 1, bias=options.bias))
        self.downsample = nn.Sequential(*layers) if layers else None

    def forward(self, x: Tensor, out_channels: int) -> Tensor:
        """Map (B, i, H, W) to (B, out_channels, H', W'); the gate's logits are not computed."""
        y: Tensor = self.gate(self._opening(x))
        for layer in self._closing():
            y = layer(y, out_channels) if isinstance(layer, SlimmableConv2d) else layer(y)
        if self.options.noskip:
            return y
        for layer in self.downsample or ():
            x = layer(x, out_channels) if isinstance(layer, SlimmableConv2d) else layer(x)
        if x.shape != y.shape:
            raise ModelError(
                f"{type(self).__name__} got a shortcut {tuple(x.shape)} for a branch {tuple(y.shape)}; "
                "expected equal shapes. Without a 1x1 convolution it keeps the input's width: build the "
                "block with noskip=True, or give its widest output another width."
            )
        return x + y

    def logits(self, x: Tensor) -> Tensor:
        """Return the gate's logits (B, K) for the block's input (B, i, H, W)."""
        return self.gate.logits(self._opening(x))

    def static(self, in_channels: int, out_channels: int) -> nn.Module:
        """Return the ordinary block of one width."""
        attention = self.gate.static(self._inner(in_channels))
        opening = nn.Sequential(*self._static_opening(in_channels), attention)
        return Block(opening, self.static_closing(in_channels, out_channels))

    def static_opening(self, in_channels: int) -> nn.Sequential:
        """Return the ordinary opening of one width with its gate: x -> (features, logits)."""
        gate = self.gate.static_gate(self._inner(in_channels))
        return nn.Sequential(*self._static_opening(in_channels), gate)

    def static_closing(self, in_channels: int, out_channels: int) -> Closing:
        """Return the closing of one width: features (B, inner, H, W) and the block's input -> y."""
        conv, norm, *act = self._closing()
        inner = self._inner(in_channels)
        body = nn.Sequential(conv.static(inner, out_channels), norm.static(out_channels), *act)
        if self.options.noskip:
            return Closing(body, None)
        layers = [
            layer.static(in_channels, out_channels) if isinstance(layer, SlimmableConv2d) else HalvingPool()
            for layer in self.downsample or ()
        ]
        return Closing(body, nn.Sequential(*layers))

    def _inner(self, in_channels: int) -> int:
        """Return the width at the attention."""
        raise NotImplementedError

    def _opening(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _static_opening(self, in_channels: int) -> list[nn.Module]:
        raise NotImplementedError

    def _closing(self) -> list[Any]:
        raise NotImplementedError


class DepthwiseSeparable(SlimmableBlock):
    """Depthwise, norm, act, attention; pointwise, norm, act. Theirs: DSDepthwiseSeparable."""

    def __init__(
        self, in_channels_list: Sequence[int], out_channels_list: Sequence[int], options: BlockOptions
    ) -> None:
        super().__init__(in_channels_list, out_channels_list, options)
        o, ins, outs = options, self.in_channels_list, self.out_channels_list
        self.conv_dw = SlimmableDepthwiseConv2d(
            ins, o.kernel_size, stride=o.stride, dilation=o.dilation, bias=o.bias
        )
        self.bn1 = SlimmableBatchNorm2d(ins, **o.norm_kwargs)
        self.act1 = make_activation(o.act_layer)
        self.gate = SlimmableGate(ins, o.se_ratio, channel_gate_num=o.gate_outputs)
        self.conv_pw = SlimmableConv2d(ins, outs, 1, bias=o.bias)
        self.bn2 = SlimmableBatchNorm2d(outs, **o.norm_kwargs)
        self.act2 = make_activation(o.act_layer)
        _start_as_shortcut(self.bn2, o)

    def _inner(self, in_channels: int) -> int:
        return in_channels

    def _opening(self, x: Tensor) -> Tensor:
        y: Tensor = self.act1(self.bn1(self.conv_dw(x)))
        return y

    def _static_opening(self, in_channels: int) -> list[nn.Module]:
        return [self.conv_dw.static(in_channels), self.bn1.static(in_channels), self.act1]

    def _closing(self) -> list[Any]:
        return [self.conv_pw, self.bn2, self.act2]


class InvertedResidual(SlimmableBlock):
    """Pointwise, norm, act, depthwise, norm, act, attention; pointwise, norm. Theirs: DSInvertedResidual.

    The inner widths are those of the input times ``exp_ratio``, rounded to multiples of 8. Two widths that
    rounding makes equal share the statistics of the first, as in the authors' code.
    """

    def __init__(
        self, in_channels_list: Sequence[int], out_channels_list: Sequence[int], options: BlockOptions
    ) -> None:
        super().__init__(in_channels_list, out_channels_list, options)
        o, ins, outs = options, self.in_channels_list, self.out_channels_list
        self.inner = [make_divisible(width * o.exp_ratio) for width in ins]
        widths = sorted(set(self.inner))
        self.conv_pw = SlimmableConv2d(ins, widths, 1, bias=o.bias)
        self.bn1 = SlimmableBatchNorm2d(self.inner, **o.norm_kwargs)
        self.act1 = make_activation(o.act_layer)
        self.conv_dw = SlimmableDepthwiseConv2d(
            widths, o.kernel_size, stride=o.stride, dilation=o.dilation, bias=o.bias
        )
        self.bn2 = SlimmableBatchNorm2d(self.inner, **o.norm_kwargs)
        self.act2 = make_activation(o.act_layer)
        self.gate = SlimmableGate(widths, o.se_ratio, channel_gate_num=o.gate_outputs)
        self.conv_pwl = SlimmableConv2d(widths, outs, 1, bias=o.bias)
        self.bn3 = SlimmableBatchNorm2d(outs, **o.norm_kwargs)
        _start_as_shortcut(self.bn3, o)

    def _inner(self, in_channels: int) -> int:
        return self.inner[self.in_channels_list.index(in_channels)]

    def _opening(self, x: Tensor) -> Tensor:
        y: Tensor = self.act1(self.bn1(self.conv_pw(x, self._inner(x.shape[1]))))
        y = self.act2(self.bn2(self.conv_dw(y)))
        return y

    def _static_opening(self, in_channels: int) -> list[nn.Module]:
        inner = self._inner(in_channels)
        expand = [self.conv_pw.static(in_channels, inner), self.bn1.static(inner), self.act1]
        return [*expand, self.conv_dw.static(inner), self.bn2.static(inner), self.act2]

    def _closing(self) -> list[Any]:
        return [self.conv_pwl, self.bn3]


def _start_as_shortcut(norm: SlimmableBatchNorm2d, options: BlockOptions) -> None:
    """Start training with the branch switched off where there is a shortcut."""
    if not options.noskip and norm.last.affine:
        nn.init.zeros_(norm.last.weight)


class HalvingPool(nn.Module):
    """AvgPool2d(2, ceil_mode=True, count_include_pad=False), which XNNPACK lacks (executorch 1.5.1).

    At an odd border that pool averages the pixels inside; repeating the last row or column does the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Halve (B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2))."""
        if x.shape[2] % 2:
            x = torch.cat([x, x[:, :, -1:]], dim=2)
        if x.shape[3] % 2:
            x = torch.cat([x, x[:, :, :, -1:]], dim=3)
        return F.avg_pool2d(x, 2)


class Closing(nn.Module):
    """The ordinary second half of a block: pointwise convolution, and the shortcut where there is one."""

    def __init__(self, body: nn.Sequential, shortcut: nn.Sequential | None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, features: Tensor, *block_input: Tensor) -> Tensor:
        """Close a block whose opening returned ``features``; a block with a shortcut also needs its input."""
        y: Tensor = self.body(features)
        return y if self.shortcut is None else y + self.shortcut(*block_input)


class Block(nn.Module):
    """An ordinary block of one width."""

    def __init__(self, opening: nn.Sequential, closing: Closing) -> None:
        super().__init__()
        self.opening, self.closing = opening, closing

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, i, H, W) to (B, o, H', W')."""
        y: Tensor = self.closing(self.opening(x), x)
        return y


BLOCKS: dict[str, type[SlimmableBlock]] = {"ds": DepthwiseSeparable, "ir": InvertedResidual}


class Stage(nn.Module):
    """Blocks of one type; the first changes width and size, and only it may be gated. Theirs: DSStage.

    Args:
        stage_type: ``ds`` or ``ir``.
        in_channels_list: widths of the input.
        out_channels_list: widths of the output.
        layer_num: number of blocks.
        options: of the first block; the others have stride 1 and no gate.

    Raises:
        ModelError: for an unknown type or no blocks.
    """

    def __init__(
        self,
        stage_type: str,
        in_channels_list: Sequence[int],
        out_channels_list: Sequence[int],
        layer_num: int,
        options: BlockOptions,
    ) -> None:
        super().__init__()
        if stage_type.lower() not in BLOCKS or layer_num < 1:
            raise ModelError(
                f"a stage got type {stage_type!r} and {layer_num} blocks; expected "
                f"{' or '.join(sorted(BLOCKS))} and at least 1. Fix choices_cfg."
            )
        block = BLOCKS[stage_type.lower()]
        later = replace(options, stride=1, gate_outputs=0)
        self.first_block = block(in_channels_list, out_channels_list, options)
        self.residual_blocks = nn.ModuleList(
            block(out_channels_list, out_channels_list, later) for _ in range(layer_num - 1)
        )

    @property
    def all_blocks(self) -> list[SlimmableBlock]:
        """The blocks in order."""
        return [self.first_block, *self.residual_blocks]

    def forward(self, x: Tensor, out_channels: int) -> Tensor:
        """Map (B, i, H, W) to (B, out_channels, H', W')."""
        for block in self.all_blocks:
            x = block(x, out_channels)
        return x
