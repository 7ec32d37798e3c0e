"""Move every pixel towards the mean of its 3 x 3 neighbours, as far as a gate says.

    y[b, c, p] = x[b, c, p] + gate[b, 0, p] * (mean_t x[b, c, p + off(t)] - x[b, c, p])

x: (B, C, H, W)   gate: (B, 1, H, W)   y: (B, C, H, W), zero padding
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn.errors import ModelError
from edgedyn.ops import Form, Op, register


def oracle(x: Tensor, gate: Tensor) -> Tensor:
    """Compute the op by its definition."""
    _check(x, gate)
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    total = torch.zeros_like(x)
    for tap in range(9):
        dy, dx = tap // 3, tap % 3
        total = total + padded[:, :, dy : dy + height, dx : dx + width]
    return x + gate * (total / 9 - x)


def average_pool(x: Tensor, gate: Tensor) -> Tensor:
    """Take the mean by one pooling operator; padded zeros count, as in the definition."""
    return x + gate * (F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=True) - x)


def box_filter(x: Tensor, gate: Tensor) -> Tensor:
    """Take the sum by one depthwise convolution with a kernel of ones, which every target has."""
    kernel = torch.ones(x.shape[1], 1, 3, 3, dtype=x.dtype)  # 1/9 would be rounded to float32 in the program
    return x + gate * (F.conv2d(x, kernel, padding=1, groups=x.shape[1]) / 9 - x)


def _fake(x: Tensor, gate: Tensor) -> Tensor:
    _check(x, gate)
    return x.new_empty(x.shape)


def _check(x: Tensor, gate: Tensor) -> None:
    expected = (x.shape[0], 1, *x.shape[2:])
    if x.dim() != 4 or gate.shape != expected:
        raise ModelError(
            f"gated_mean2d got x {tuple(x.shape)} and gate {tuple(gate.shape)}; expected x (B, C, H, W) and "
            "gate (B, 1, H, W). Reshape the gate."
        )


def _examples() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the op's arguments: batches, odd sizes, H != W, distinct values."""
    generator = torch.Generator().manual_seed(3)
    for b, c, h, w in ((2, 3, 7, 10), (3, 1, 5, 4)):
        yield torch.randn(b, c, h, w, generator=generator), torch.rand(b, 1, h, w, generator=generator)


def _apply_macs(x: Tensor, gate: Tensor) -> int:
    """Count 9 taps and the gate per output value."""
    return 10 * x.numel()


OP = Op(
    name="gated_mean2d",
    overload=register("gated_mean2d", "(Tensor x, Tensor gate) -> Tensor", oracle, _fake),
    forms=(Form("average_pool", average_pool, frozenset({"pooling"})), Form("box_filter", box_filter)),
    examples=_examples,
    generated=("gate",),
    apply_macs=_apply_macs,
)


def gated_mean2d(x: Tensor, gate: Tensor) -> Tensor:
    """Call the op; one node of an exported graph."""
    return torch.ops.edgedyn.gated_mean2d(x, gate)  # type: ignore[no-any-return]
