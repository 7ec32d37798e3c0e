"""Stacked hourglass of DynConv blocks for human pose (arXiv 1912.03203, sec. 4.3; arXiv 1603.06937).

    heatmaps = net(x)        x: (B, 3, H, W)   heatmaps: (B, joints, H / 4, W / 4), one per joint

A stem at a quarter of the resolution, then stacks of an hourglass (four times halved, joined on the way up),
a block, and two 1x1 convolutions that score the joints. Every stack but the last feeds its features and
scores back into the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers.dynconv import SparseInvertedResidual
from edgedyn.layers.dynconv.residual import InvertedResidual

_DEPTH = 4


def _blocks(inp: int, oup: int, count: int, *, sparse: bool) -> nn.Sequential:
    """Chain blocks; the first is gated only where it keeps the number of channels."""
    first = (SparseInvertedResidual if sparse and inp == oup else InvertedResidual)(inp, oup)
    rest = SparseInvertedResidual if sparse else InvertedResidual
    return nn.Sequential(first, *[rest(oup, oup) for _ in range(count - 1)])


class Hourglass(nn.Module):
    """Halve the resolution four times and join the halves on the way up; (B, C, H, W) both."""

    def __init__(self, channels: int, blocks: int, *, sparse: bool) -> None:
        super().__init__()
        self.hg = nn.ModuleList(
            nn.ModuleList(
                _blocks(channels, channels, blocks, sparse=sparse) for _ in range(4 if level == 0 else 3)
            )
            for level in range(_DEPTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W), H and W multiples of 16."""
        return self._descend(_DEPTH - 1, x)

    def _descend(self, level: int, x: Tensor) -> Tensor:
        blocks: Any = self.hg[level]  # beside, on the way down, on the way up, and at the bottom
        low = blocks[1](F.max_pool2d(x, 2))
        low = self._descend(level - 1, low) if level else blocks[3](low)
        y: Tensor = blocks[0](x) + F.interpolate(blocks[2](low), scale_factor=2.0)
        return y


class HourglassNet(nn.Module):
    """The published network, which returns the heatmaps of every stack.

    Args:
        features: channels of the stream, rounded down to an even number.
        stacks: number of hourglasses.
        blocks: blocks at each place of an hourglass.
        joints: number of heatmaps.
        sparse: whether blocks are gated; the same network without gates otherwise.

    Raises:
        ModelError: for fewer than 4 features, or counts below 1.
    """

    def __init__(
        self,
        features: int = 96,
        stacks: int = 4,
        blocks: int = 1,
        *,
        joints: int = 16,
        sparse: bool = True,
    ) -> None:
        super().__init__()
        if features < 4 or min(stacks, blocks, joints) < 1:
            raise ModelError(
                f"HourglassNet got features={features}, stacks={stacks}, blocks={blocks}, joints={joints}; "
                "expected at least 4 features and at least 1 of the others."
            )
        stem, half = features // 4, features // 2
        channels = 2 * half
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _blocks(stem, 2 * stem, 1, sparse=sparse)
        self.layer2 = _blocks(2 * stem, 4 * stem, 1, sparse=sparse)
        self.layer3 = _blocks(4 * stem, channels, 1, sparse=sparse)
        self.hg = nn.ModuleList(Hourglass(channels, blocks, sparse=sparse) for _ in range(stacks))
        self.res = nn.ModuleList(_blocks(channels, channels, blocks, sparse=sparse) for _ in range(stacks))
        self.fc = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
            for _ in range(stacks)
        )
        self.score = nn.ModuleList(nn.Conv2d(channels, joints, 1) for _ in range(stacks))
        self.fc_ = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(stacks - 1))
        self.score_ = nn.ModuleList(nn.Conv2d(joints, channels, 1) for _ in range(stacks - 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return a tuple of heatmaps (B, joints, H / 4, W / 4), one per stack; H and W multiples of 64.

        Raises:
            ModelError: for another size.
        """
        if any(size % (4 * 2**_DEPTH) for size in x.shape[2:]):
            raise ModelError(
                f"HourglassNet got x {tuple(x.shape)}; expected height and width that are multiples of 64, "
                "because it halves them six times and joins the halves. Pad or resize the image."
            )
        x = F.max_pool2d(self.layer1(F.relu(self.bn1(self.conv1(x)))), 2)
        x = self.layer3(self.layer2(x))
        heatmaps = []
        for k, (hourglass, res, fc) in enumerate(zip(self.hg, self.res, self.fc, strict=True)):
            y = fc(res(hourglass(x)))
            score = self.score[k](y)
            heatmaps.append(score)
            if k < len(self.fc_):
                x = x + self.fc_[k](y) + self.score_[k](score)
        return tuple(heatmaps)


class DynConvHourglass(HourglassNet):
    """The network for inference: the heatmaps of the last stack alone. 6.885 M parameters by default."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return heatmaps (B, joints, H / 4, W / 4) of x (B, 3, H, W), H and W multiples of 64."""
        return super().forward(x)[-1]


def _from_authors(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Make the network from the authors' configuration fields; refuse other fields."""
    known = {
        "NUM_FEATURES": "features",
        "NUM_STACKS": "stacks",
        "NUM_BLOCKS": "blocks",
        "NUM_JOINTS": "joints",
        "ENABLED": "sparse",
    }
    fields = {key.rpartition(".")[2]: value for key, value in arguments.items()}
    unknown = sorted(fields.keys() - known.keys() - {"name", "cls", "block"})
    lacking = sorted({"NUM_FEATURES", "NUM_STACKS", "NUM_BLOCKS", "NUM_JOINTS"} - fields.keys())
    if unknown or lacking:
        raise ModelError(
            f"HourglassNet got the fields {sorted(fields)}; expected {sorted(known)}, as in MODEL.EXTRA, "
            "MODEL.NUM_JOINTS and DYNCONV.ENABLED of the authors' configuration."
        )
    fields.setdefault("ENABLED", any(".masker." in key for key in state_dict))
    return HourglassNet(**{ours: fields[field] for field, ours in known.items()})


NETWORK = DynConvHourglass
AUTHORS = {"HourglassNet": _from_authors}
