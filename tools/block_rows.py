"""Rows of inverted-residual blocks: our kernel beside XNNPACK; alone, masked and in chains.

The blocks are MalleNet's (a, b, c) and DynConv's (d). Weights, inputs and calibration samples are random.
Both sides of a row have the same weights and are calibrated on the same samples; rows "SQNR" as by a recipe
that sets no key of ``quantize``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from bench_rows import QUICK, Inputs, Lowered, Row, SqnrRow, by_executorch, on_runtime
from small_blocks import Block, MobileNetV2, dilated, randomize
from torch import Tensor, nn

from edgedyn.recipe.keys import QuantizeSection

Make = Callable[[Path], Lowered]


class Kind(NamedTuple):
    """A block, its size, and the limits on its ratios.

    Attributes:
        channels: of x and y.
        hidden: channels between the convolutions.
        activations: behind each convolution.
        size: height and width, pixels.
        limits: fused float32 : XNNPACK float32; fused INT8 : XNNPACK float32; fused INT8 : XNNPACK INT8.
    """

    channels: int
    hidden: int
    activations: tuple[str, str, str]
    size: tuple[int, int]
    limits: tuple[float, float, float]


_PRELU, _RELU6 = ("prelu",) * 3, ("relu6", "relu6", "none")
KINDS = {
    "a": Kind(16, 80, _PRELU, (256, 256), (0.42, 0.24, 0.20)),
    "b": Kind(16, 80, _PRELU, (1024, 1024), (0.28, 0.16, 0.15)),
    "c": Kind(32, 160, _PRELU, (128, 128), (0.60, 0.32, 0.25)),
    "d": Kind(32, 192, _RELU6, (160, 240), (0.75, 0.38, 0.42)),
}
INT8_TO_FLOAT = 0.65  # limit of fused INT8 : fused float32
MASKED = {0.15: 0.35, 0.5: 0.75}  # share of active positions -> limit
CHAIN = 4  # blocks
SAMPLES = 4
SMALL = (64, 64)  # of the calibration samples of blocks, pixels
PHOTO = (224, 224)


def block(name: str, seed: int = 3) -> Block:
    """Return a block of ``KINDS``."""
    kind = KINDS[name]
    made = Block(kind.channels, kind.hidden, kind.channels, activations=kind.activations)
    randomize(made, seed)
    return made


class Gated(nn.Module):
    """A block that counts where a field is not negative, as DynConv's masks decide."""

    def __init__(self, of: Block) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor, field: Tensor) -> Tensor:
        """Return x + mask * F(x)."""
        mask = (field >= 0).float()
        y = self.of.act1(self.of.expand(x)) * dilated(3)(mask)
        y = self.of.act2(self.of.depthwise(y)) * mask
        return x + self.of.act3(self.of.project(y)) * mask


def blobs(active: float, size: tuple[int, int]) -> Tensor:
    """Return a smooth field (1, 1, H, W) that is not negative at a share of its positions, as in photos."""
    coarse = torch.randn(1, 1, *(side // 8 for side in size), generator=torch.Generator().manual_seed(5))
    field = F.interpolate(coarse, size=size, mode="bicubic")
    return field - field.quantile(1 - active)


def feature_map(channels: int, size: tuple[int, int], seed: int = 0) -> Inputs:
    """Return one random feature map (1, C, H, W)."""
    return (torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(seed)),)


def calibration(channels: int, size: tuple[int, int] = SMALL) -> list[Inputs]:
    """Return the calibration samples of a network with one input."""
    return [feature_map(channels, size, seed) for seed in range(1, 1 + SAMPLES)]


def lowered(
    network: nn.Module,
    inputs: Inputs,
    samples: Sequence[Inputs],
    kernels: str,
    precision: str,
    section: QuantizeSection = QUICK,
) -> Make:
    """Return a function that lowers a network with ``fused`` or ``stock`` kernels in ``f32`` or ``INT8``."""
    samples = samples if precision == "INT8" else ()
    return on_runtime((network, inputs), kernels, samples=samples, section=section)


def beside_xnnpack(
    name: str, made: Callable[[str, str], Make], limits: Sequence[float | None]
) -> Iterator[Row]:
    """Yield the three rows of a network beside XNNPACK, and INT8 beside float32."""
    pairs = (("f32", "f32"), ("INT8", "f32"), ("INT8", "INT8"))
    is_counted = name != "block b"  # its 1024 x 1024 pixels take valgrind minutes
    for (ours, yardstick), limit in zip(pairs, limits, strict=True):
        title = f"{name} fused {ours} : XNNPACK {yardstick}"
        yield Row(title, limit, made("fused", ours), made("stock", yardstick), is_counted)
    limit = None if limits[0] is None else INT8_TO_FLOAT
    title = f"{name} fused INT8 : fused f32"
    yield Row(title, limit, made("fused", "INT8"), made("fused", "f32"), is_counted)


def _rows() -> Iterator[Row]:
    for name, kind in KINDS.items():
        inputs = feature_map(kind.channels, kind.size)
        made = partial(lowered, block(name), inputs, calibration(kind.channels))
        yield from beside_xnnpack(f"block {name}", made, kind.limits)
    kind = KINDS["d"]
    for active, limit in MASKED.items():
        (x,), samples = feature_map(kind.channels, kind.size), calibration(kind.channels)
        gated = [(*sample, blobs(active, SMALL)) for sample in samples]
        masked = partial(lowered, Gated(block("d")), (x, blobs(active, kind.size)), gated, "fused")
        dense = partial(lowered, block("d"), (x,), samples, "fused")
        for precision in ("f32", "INT8"):
            title = f"block d fused {precision}, {active:.0%} active : dense"
            yield Row(title, limit, masked(precision), dense(precision))
    kind = KINDS["a"]
    blocks = nn.Sequential(*(block("a", seed) for seed in range(CHAIN)))
    made = partial(lowered, blocks, feature_map(kind.channels, kind.size), calibration(kind.channels))
    yield from beside_xnnpack(f"{CHAIN} blocks a", made, (None,) * 3)
    network, x = randomize(MobileNetV2()), feature_map(3, PHOTO)
    samples = calibration(3, PHOTO)
    made = partial(lowered, network, x, samples)
    title = "MobileNetV2 at 224 x 224 fused INT8 : "
    yield Row(f"{title}XNNPACK INT8", 0.8, made("fused", "INT8"), made("stock", "INT8"))
    yield Row(f"{title}INT8 by ExecuTorch", None, made("fused", "INT8"), by_executorch((network, x), samples))


def _sqnr_rows() -> Iterator[SqnrRow]:
    for name, kind in KINDS.items():
        network, inputs = block(name), feature_map(kind.channels, SMALL)
        made = partial(lowered, network, inputs, calibration(kind.channels), section=QuantizeSection())
        title = f"block {name} SQNR, fused INT8 - XNNPACK INT8"
        yield SqnrRow(title, -0.5, network, made("fused", "INT8"), made("stock", "INT8"))


ROWS = tuple(_rows())
SQNR_ROWS = tuple(_sqnr_rows())
