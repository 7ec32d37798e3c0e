"""Forms of ``atom_depthwise2d``, with a kernel of ours or of ordinary operators.

All are decomposed after quantization, so that their arithmetic with the fixed bases stays float: in INT8 each
of the K responses would be rounded to 8 bits once more. Decomposed before, ``bases_first`` loses 0.4 dB of
the predicted noise's SQNR (11.5 against 11.9 in ExecuTorch 1.5.1; in PyTorch 1.9 dB where the 1x1
convolutions behind it stay float, 17.4 against 19.3): ACDADnCNN(16, 5) after 700 steps at sigma 25, one seed,
10 calibration and 10 validation crops of 128 x 128.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn.ops import FUSED, Form


def bases_first(x: Tensor, alpha: Tensor, bases: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Filter x with every basis, one static depthwise convolution each, then mix the K responses per pixel.

    Exact: the finite sums over taps and over bases change places. C * K * T + C * M * K multiply-adds
    per pixel; a stride is the convolution's own. Faster than ``atoms_first``, which may multiply less, but
    passes M * T times over C channels and not M * K times: 24 against 32 ms (C = 32, M = K = 6,
    R = 3, 128 x 128), 10 against 17 ms (C = 16, M = 4, K = 8, R = 5, 160 x 96), 7 against 15 ms (the first at
    stride 2); between a 1x1 and two convolutions, ExecuTorch 1.5.1 with XNNPACK, 2 x86 threads, the best of
    80 runs side by side.
    """
    channels, side = x.shape[1], (1, 1, kernel_size, kernel_size)
    responses = []
    for basis in torch.split(bases, 1):
        weight = basis.reshape(side).expand(channels, 1, kernel_size, kernel_size)
        responses.append(F.conv2d(x, weight, None, stride, kernel_size // 2, groups=channels))
    return _mix(alpha, responses)


def atoms_first(x: Tensor, alpha: Tensor, bases: Tensor, kernel_size: int, stride: int = 1) -> Tensor:
    """Make the M kernels of every pixel by static 1x1 convolutions, then shift x, multiply and add.

    Exact: it is the definition. M * K * T + C * M * T multiply-adds per pixel. A stride gives strided slices,
    which XNNPACK leaves to the portable kernels.
    """
    (count, taps), (height, width) = bases.shape, x.shape[2:]
    atom = bases.t().reshape(taps, count, 1, 1)
    # XNNPACK takes slices, and leaves a split to the portable kernels (executorch 1.5.1)
    kernels = [F.conv2d(alpha[:, m : m + count], atom) for m in range(0, alpha.shape[1], count)]
    padded = F.pad(x, (kernel_size // 2,) * 4)
    shifted = []
    for tap in range(taps):
        dy, dx = tap // kernel_size, tap % kernel_size
        shifted.append(padded[:, :, dy : dy + height : stride, dx : dx + width : stride])
    return _mix(torch.cat(kernels, dim=1), shifted)


def _mix(weights: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Weigh n feature maps (B, C, h, w) with weights (B, M * n, h, w) and add: (B, M * C, h, w).

    Pixels lie on one axis, (B, M, C, h * w), so that XNNPACK keeps planes: it holds images channels-last, and
    would call its multiplication once per pixel to broadcast a weight over the channels.
    """
    b, channels, height, width = features[0].shape
    kernels = weights.shape[1] // len(features)
    weights = weights.reshape(b, kernels, len(features), height * width)
    y = None
    for n, x in enumerate(features):
        term = weights[:, :, n : n + 1] * x.reshape(b, 1, channels, height * width)
        y = term if y is None else y + term
    assert y is not None  # the op refuses an empty set of bases
    return y.reshape(b, kernels * channels, height, width)


FORMS = (
    FUSED,
    Form("bases_first", bases_first, decompose="after_quantize"),
    Form("atoms_first", atoms_first, decompose="after_quantize"),
)
