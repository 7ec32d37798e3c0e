"""A slimmable network of K configurations, and the gate that picks one for each sample (arXiv 2110.08940).

    logits = gate(x)        y = network(x, argmax(logits))

    gate    r = act(reduce(mean_hw(x)));   logits = decide(r)   (B, K)
    attention, where a gate also rescales its features:   y = x * sigmoid(expand(r))

A configuration is a vector of channel numbers, one a slimmable layer: not one ratio for all. Each holds the
one before it, so that every weight is a prefix. Deployed, a configuration is an ordinary network with the
weights of its own width, the gate stays in float32, and the host picks by argmax: no noise, and no masks at
full width as in the authors' evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.slimmable import SlimmableBatchNorm2d, SlimmableConv2d, SlimmableJoin2d

Configurations = tuple[tuple[int, ...], ...]

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


class SlimmableNetwork(Protocol):
    """What a gate can pick from: K configurations of one network, from cheap to dear.

    ``configurations`` holds one vector of channel numbers each, ``forward(*features, choice)`` runs number
    ``choice`` on what the gate passes on (the image, unless it says otherwise), and ``static(choice)`` is the
    ordinary network of that configuration, in evaluation mode, with weights of its own.
    """

    configurations: Configurations

    def __call__(self, *inputs: Any) -> Tensor:
        """Run ``(*features, choice)``."""

    def static(self, choice: int) -> nn.Module:
        """Return the ordinary network of one configuration."""


def check_configurations(
    configurations: Sequence[Sequence[int]], layers: Sequence[str], owner: str
) -> Configurations:
    """Return K configurations of a network, from cheap to dear.

    Args:
        configurations: one vector of channel numbers each, one number a slimmable layer; the last is the full
            width.
        layers: names of the slimmable layers, in the order of a vector.
        owner: the network, for the message.

    Raises:
        ModelError: for fewer than 2, a vector of another length, a number below 1, or a configuration that
            does not hold the one before it and more.
    """
    found = tuple(tuple(vector) for vector in configurations)
    if len(found) < 2:
        raise ModelError(
            f"{owner} got {len(found)} configurations; expected at least 2, from cheap to dear. Add one, or "
            "deploy an ordinary network."
        )
    for k, vector in enumerate(found):
        if len(vector) != len(layers) or any(type(width) is not int or width < 1 for width in vector):
            raise ModelError(
                f"{owner} got configuration {k} {list(vector)}; expected {len(layers)} positive whole "
                f"channel numbers, one for each of {', '.join(layers)}. Mend this configuration."
            )
    for k, (narrow, wide) in enumerate(itertools.pairwise(found)):
        lost = [name for name, a, b in zip(layers, narrow, wide, strict=True) if b < a]
        if lost or narrow == wide:
            raise ModelError(
                f"{owner} got configurations {k} and {k + 1}, {list(narrow)} and {list(wide)}, which are not "
                f"increasing ({f'{lost[0]} gets narrower' if lost else 'they are equal'}); expected each to "
                "hold the one before it and more. Sort them from cheap to dear."
            )
    return found


class SlimmableUnit(nn.Module):
    """Convolution, BatchNorm and ReLU of a slimmable network, on one feature map or a concatenation.

    Args:
        in_widths: for each input, its channel number in every configuration.
        out_widths: the output's channel number in every configuration.
        stride: distance of the outputs, pixels; 1 on a concatenation.

    Each configuration has its own BatchNorm statistics, equal widths included: what reaches the layer
    depends on the layers before it.
    """

    def __init__(
        self, in_widths: Sequence[Sequence[int]], out_widths: Sequence[int], stride: int = 1
    ) -> None:
        super().__init__()
        self.in_widths, self.out_widths = in_widths, out_widths
        inputs, outputs = [sorted(set(widths)) for widths in in_widths], sorted(set(out_widths))
        self.conv: SlimmableConv2d
        if len(inputs) == 1:
            self.conv = SlimmableConv2d(inputs[0], outputs, 3, stride=stride, bias=False)
        else:
            self.conv = SlimmableJoin2d(inputs, outputs, 3, bias=False)
        self.norm = SlimmableBatchNorm2d(out_widths)

    def forward(self, choice: int, *features: Tensor) -> Tensor:
        """Map features (B, i_n, H, W) of a configuration to (B, o, H', W')."""
        conv, out_channels = self.conv, self.out_widths[choice]
        joins = isinstance(conv, SlimmableJoin2d)
        y = conv(features, out_channels) if joins else conv(*features, out_channels)
        return F.relu(self.norm(y, choice))

    def static(self, choice: int) -> nn.Sequential:
        """Return the ordinary layers of one configuration; they take the concatenation."""
        in_channels = [widths[choice] for widths in self.in_widths]
        out_channels = self.out_widths[choice]
        if isinstance(self.conv, SlimmableJoin2d):
            conv = self.conv.static(in_channels, out_channels)
        else:
            conv = self.conv.static(in_channels[0], out_channels)
        return nn.Sequential(conv, self.norm.static(out_channels, choice), nn.ReLU())


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
    """Rescale each channel by what all channels hold on average; the ordinary form of one width."""

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
        """Return what attention and gate look at, (B, reduced, 1, 1)."""
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
        reduced_base_chs: what ``se_ratio`` refers to; 0 for the widest input.
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
        if self.outputs:
            self.gate = nn.ModuleList([SlimmableConv2d(reduced, self.outputs, 1, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        """Rescale (B, i, H, W)."""
        return x * ATTENTIONS[self.attn_act_fn](self.conv_expand(self._reduced(x), x.shape[1]))

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (B, outputs) of features (B, i, H, W), without the authors' noise.

        Raises:
            ModelError: when there is no gate.
        """
        self._check_gate()
        logits: Tensor = self.gate[0](self._reduced(x), self.outputs)
        return logits.flatten(1)

    def static(self, width: int) -> ChannelAttention:
        """Return the ordinary attention of one width."""
        return ChannelAttention(*self._parts(width), None)

    def static_gate(self, width: int) -> GatedAttention:
        """Return the ordinary attention of one width, with its gate.

        Raises:
            ModelError: when there is no gate.
        """
        self._check_gate()
        reduced = self.conv_reduce.out_channels
        return GatedAttention(*self._parts(width), self.gate[0].static(reduced, self.outputs))

    def _reduced(self, x: Tensor) -> Tensor:
        y = self.conv_reduce(F.adaptive_avg_pool2d(x, 1), self.conv_reduce.out_channels)
        return self.act1(y)  # type: ignore[no-any-return]

    def _parts(self, width: int) -> tuple[nn.Conv2d, nn.Module, nn.Conv2d, str]:
        reduced = self.conv_reduce.out_channels
        reduce, expand = self.conv_reduce.static(width, reduced), self.conv_expand.static(reduced, width)
        return reduce, self.act1, expand, self.attn_act_fn

    def _check_gate(self) -> None:
        if not self.outputs:
            raise ModelError(
                "this attention has no gate; expected channel_gate_num of at least 2. Ask the gated block."
            )


class ImageGate(nn.Module):
    """A gate on the image: two thin static convolutions at 1/2 and 1/4 of its size, mean, reduce, decide.

    Args:
        outputs: logits K, one a configuration.
        colors: image channels.
        features: channels of the second convolution.
    """

    def __init__(self, outputs: int, colors: int = 3, features: int = 16) -> None:
        super().__init__()
        self.outputs = outputs
        self.head = nn.Sequential(
            nn.Conv2d(colors, features // 2, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(features // 2, features, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.reduce = nn.Conv2d(features, features // 2, 1)
        self.decide = nn.Conv2d(features // 2, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, outputs) of images (B, colors, H, W)."""
        r = F.relu(self.reduce(F.adaptive_avg_pool2d(self.head(x), 1)))
        logits: Tensor = self.decide(r)
        return logits.flatten(1)


class GatedNetwork(nn.Module):
    """A gate and the slimmable network whose configuration it picks, for each sample of a batch by itself.

    Args:
        gate: x -> logits (B, K), or (logits, *features) where the network takes ``features`` instead of x;
            its attribute ``outputs`` is K.
        network: a ``SlimmableNetwork`` of K configurations.

    Raises:
        ModelError: when the gate has not one output a configuration.
    """

    def __init__(self, gate: nn.Module, network: SlimmableNetwork) -> None:
        super().__init__()
        check_outputs(int(gate.outputs), len(network.configurations), type(network).__name__)  # type: ignore[arg-type]
        self.gate = gate
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Run each sample of x (B, ...) in the configuration with the largest logit."""
        given = self.gate(x)
        logits, *features = given if isinstance(given, tuple) else (given,)
        return run_each(logits, features or [x], self.network)


def check_outputs(outputs: int, configurations: int, owner: str) -> None:
    """Refuse a gate that has not one output a configuration.

    Raises:
        ModelError: with both numbers.
    """
    if outputs != configurations:
        raise ModelError(
            f"the gate of {owner} has {outputs} outputs for {configurations} configurations; expected one "
            "each. Train a gate of that many outputs, or keep as many configurations."
        )


def run_each(logits: Tensor, features: Sequence[Tensor], run: Callable[..., Tensor]) -> Tensor:
    """Call ``run(*features, choice)`` for each sample, choice being the place of its largest logit."""
    choices = logits.argmax(1).tolist()
    samples = zip(*(torch.split(feature, 1) for feature in features), strict=True)
    return torch.cat([run(*sample, choice) for sample, choice in zip(samples, choices, strict=True)])
