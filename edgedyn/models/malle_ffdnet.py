"""FFDNet with K x K MalleConvs (arXiv 2201.00392) in its body: thinner, with kernels that fit the image.

    z[k + 1] = malle_k(relu(conv_k(z[k])))      malle_k: only behind the convolutions of ``after``

x, y: (B, 3 or 1, H, W) in [0, 1], H and W at least 16. Convolutions run at half resolution; a kernel grid has
one cell per 16 x 16 pixels of the image. The noise level is a constant map, as in FFDNet.

A new MalleConv is the identity: its last predictor layer has no weights and the centre tap as its bias, its
1x1 convolution is the unit matrix. With the weights of an FFDNet of as many channels the network is that
FFDNet until it is trained.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.malleconv import MalleConv
from edgedyn.models.ffdnet import FFDNet

_CENTRE = 4  # of the 9 taps, row-major


class MalleFFDNet(FFDNet):
    """FFDNet with MalleConvs, for one noise level.

    Args:
        sigma: noise level on the 0..255 scale.
        colors: image channels, 3 or 1.
        channels: channels between the convolutions.
        after: numbers of the convolutions, from 0, whose ReLU a MalleConv follows; not the last one.
        num_blocks: predictor blocks of each MalleConv.

    Raises:
        ModelError: when ``after`` repeats a number or names a convolution that no ReLU follows.
    """

    def __init__(
        self,
        sigma: float = 25.0,
        *,
        colors: int = 3,
        channels: int = 64,
        after: Sequence[int] = (3, 7),
        num_blocks: int = 4,
    ) -> None:
        super().__init__(sigma, colors=colors, channels=channels)
        last = len(self.model) // 2
        if len(set(after)) != len(after) or not all(0 <= number < last for number in after):
            raise ModelError(
                f"MalleFFDNet got after={list(after)}; expected different numbers from 0 to {last - 1}: the "
                "convolutions that a ReLU follows."
            )
        self.after = {2 * number + 1: k for k, number in enumerate(after)}  # by the place of the ReLU
        layers = [MalleConv(channels, channels, num_blocks=num_blocks) for _ in after]
        for layer in layers:
            start_as_identity(layer)
        self.malle = nn.ModuleList(layers)

    def run_chain(self, y: Tensor) -> Tensor:
        """Run convolutions and MalleConvs; (B, 4 * colors + 1, H / 2, W / 2) to (B, 4 * colors, ...)."""
        for place, layer in enumerate(self.model):
            y = layer(y)
            if place in self.after:
                y = self.malle[self.after[place]](y)
        return y


def start_as_identity(layer: MalleConv) -> None:
    """Set a MalleConv, in place, to return its input, whatever its predictor's blocks hold.

    Raises:
        ModelError: when its numbers of input and output channels differ.
    """
    channels, outputs = layer.pwconv.in_channels, layer.pwconv.out_channels
    if channels != outputs:
        raise ModelError(
            f"MalleConv has {channels} input and {outputs} output channels; expected as many of both. "
            "Choose out_channel=in_channel."
        )
    bias = torch.zeros(layer.filters, 9)
    bias[:, _CENTRE] = 1
    nn.init.zeros_(layer.expander.weight)
    nn.init.dirac_(layer.pwconv.weight)
    nn.init.zeros_(layer.pwconv.bias)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.expander.bias.copy_(bias.flatten())  # type: ignore[union-attr]


NETWORK = MalleFFDNet
