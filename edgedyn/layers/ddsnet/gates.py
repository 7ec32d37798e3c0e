"""Channel attention and the gate in it, slimmable and of one width (DS-Net, arXiv 2103.13258, section 3.3).

    r = act(reduce(mean_hw(x)))     y = x * sigmoid(expand(r))     logits = decide(r)

x, y: (B, i, H, W)   r: (B, reduced, 1, 1)   logits: (B, K), one per configuration

State_dict keys are those of the authors' MultiHeadGate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.ddsnet.slimmable import SlimmableConv2d

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}
ATTENTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
    "tanh": lambda x: 1 + torch.tanh(x),
}


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round a channel number to a multiple of the divisor, never below 90 % of it (DS-Net, MobileNetV2)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def make_activation(name: str) -> nn.Module:
    """Return an activation by the name that the authors' configurations use.

    Raises:
        ModelError: for an unknown name.
    """
    if name not in ACTIVATIONS:
        raise ModelError(
            f"activation {name!r} is unknown; expected one of {', '.join(sorted(ACTIVATIONS))}. Pick one."
        )
    return ACTIVATIONS[name]()


class ChannelAttention(nn.Module):
    """Rescale each channel by a factor computed from the means of all; an ordinary layer of one width."""

    def __init__(
        self, reduce: nn.Conv2d, act: nn.Module, expand: nn.Conv2d, attention: str, decide: nn.Conv2d | None
    ) -> None:
        super().__init__()
        self.reduce, self.act, self.expand, self.decide = reduce, act, expand, decide
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """Rescale (B, C, H, W)."""
        return x * ATTENTIONS[self.attention](self.expand(self.reduced(x)))

    def reduced(self, x: Tensor) -> Tensor:
        """Return the input of attention and gate, (B, reduced, 1, 1)."""
        y: Tensor = self.act(self.reduce(F.adaptive_avg_pool2d(x, 1)))
        return y


class GatedAttention(ChannelAttention):
    """Channel attention that also decides: the gate of a DS-Net."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return the rescaled (B, C, H, W) and the logits (B, K)."""
        assert self.decide is not None
        r = self.reduced(x)
        return x * ATTENTIONS[self.attention](self.expand(r)), self.decide(r).flatten(1)


class SlimmableGate(nn.Module):
    """Channel attention of a slimmable layer, and the gate where it has one; MultiHeadGate.

    Args:
        in_chs: widths of the input.
        se_ratio: channels of the reduced vector, as a share of ``reduced_base_chs``.
        reduced_base_chs: channels that ``se_ratio`` refers to; 0 for the widest input.
        divisor: the reduced channel number is a multiple of it.
        act_layer: activation of the reduced vector, a name.
        attn_act_fn: ``sigmoid``, ``hard_sigmoid`` or ``tanh`` (which rescales by 1 + tanh).
        channel_gate_num: logits of the gate; 0 for attention alone.

    Raises:
        ModelError: for width lists that are not increasing, or an unknown name.
    """

    def __init__(
        self,
        in_chs: Sequence[int],
        se_ratio: float = 0.25,
        *,
        reduced_base_chs: int = 0,
        divisor: int = 1,
        act_layer: str = "relu",
        attn_act_fn: str = "sigmoid",
        channel_gate_num: int = 0,
    ) -> None:
        super().__init__()
        if attn_act_fn not in ATTENTIONS:
            raise ModelError(
                f"attention {attn_act_fn!r} is unknown; expected one of {', '.join(sorted(ATTENTIONS))}."
            )
        reduced = make_divisible((reduced_base_chs or in_chs[-1]) * se_ratio, divisor)
        self.conv_reduce = SlimmableConv2d(in_chs, reduced, 1)
        self.act1 = make_activation(act_layer)
        self.conv_expand = SlimmableConv2d(reduced, in_chs, 1)
        self.attn_act_fn = attn_act_fn
        self.outputs = channel_gate_num if channel_gate_num > 1 else 0
        decide = [SlimmableConv2d(reduced, self.outputs, 1, bias=False)] if self.outputs else []
        self.gate = nn.ModuleList(decide)

    def forward(self, x: Tensor) -> Tensor:
        """Rescale (B, i, H, W)."""
        return x * ATTENTIONS[self.attn_act_fn](self.conv_expand(self._reduced(x), x.shape[1]))

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (B, outputs) of features (B, i, H, W), without the authors' noise.

        Raises:
            ModelError: when there is no gate.
        """
        logits: Tensor = self._decide()(self._reduced(x), self.outputs)
        return logits.flatten(1)

    def static(self, width: int) -> ChannelAttention:
        """Return the ordinary attention of one width."""
        return ChannelAttention(*self._parts(width), None)

    def static_gate(self, width: int) -> GatedAttention:
        """Return the ordinary attention of one width, with its gate.

        Raises:
            ModelError: when there is no gate.
        """
        decide = self._decide()
        return GatedAttention(*self._parts(width), decide.static(decide.in_channels, self.outputs))

    def _reduced(self, x: Tensor) -> Tensor:
        y = self.conv_reduce(F.adaptive_avg_pool2d(x, 1), self.conv_reduce.out_channels)
        return self.act1(y)  # type: ignore[no-any-return]

    def _parts(self, width: int) -> tuple[nn.Conv2d, nn.Module, nn.Conv2d, str]:
        reduced = self.conv_reduce.out_channels
        reduce, expand = self.conv_reduce.static(width, reduced), self.conv_expand.static(reduced, width)
        return reduce, self.act1, expand, self.attn_act_fn

    def _decide(self) -> SlimmableConv2d:
        for conv in self.gate:
            assert isinstance(conv, SlimmableConv2d)
            return conv
        raise ModelError(
            "this attention has no gate; expected channel_gate_num of at least 2. Take the logits of the "
            "gated block."
        )
