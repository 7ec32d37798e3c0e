"""Layers with one set of weights, of which every width uses a prefix (DS-Net, arXiv 2103.13258).

    conv    y = W[:o, :i] * x + b[:o]            depthwise: groups = o = i
    linear  y = W[:, :i] x + b
    norm    y = (x - mean_k) / sqrt(var_k + eps) * gamma[:i] + beta[:i]     statistics k of width i

x: (B, i, H, W), or (B, i) for linear   y: (B, o, H', W')

No layer has a mode: its width follows from its input and an argument, and not from earlier calls. ``static``
returns the ordinary layer of one width, with copies of the weights. A call with a width that is not in the
layer's lists raises ModelError. State_dict keys are those of the authors' DSConv2d, DSBatchNorm2d, DSLinear.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError


def check_widths(widths: Sequence[int] | int, owner: str, *, repeats: bool = False) -> list[int]:
    """Check a list of widths, from narrow to wide, and return it.

    Args:
        widths: the list, or one number for a layer of one width.
        owner: the layer, for the message.
        repeats: allow equal neighbours, where several configurations share a width.

    Raises:
        ModelError: for an empty list, a number below 1, or a list that is not increasing.
    """
    found = list(widths) if isinstance(widths, Sequence) else [widths]
    if any(type(width) is not int or width < 1 for width in found) or not found:
        raise ModelError(
            f"{owner} got widths {found}; expected positive whole channel numbers. Fix the list."
        )
    falls = [b < a or (b == a and not repeats) for a, b in itertools.pairwise(found)]
    if any(falls):
        raise ModelError(
            f"{owner} got widths {found}, which are not increasing; expected from narrow to wide, each once. "
            "A narrower width is a prefix of a wider one: sort the list."
        )
    return found


def _check_known(width: int, known: Sequence[int], owner: str) -> int:
    if width not in known:
        raise ModelError(
            f"{owner} got width {width}; expected one of {sorted(set(known))}. Feed it a feature map of a "
            "width that it was built with."
        )
    return width


def _fill(module: nn.Module, tensors: Mapping[str, Tensor | None], *, training: bool) -> None:
    """Load copies of tensors into a module on ``meta``, with their device and type; skip None."""
    state = {name: tensor.detach().clone() for name, tensor in tensors.items() if tensor is not None}
    module.load_state_dict(state, assign=True)
    module.requires_grad_(True).train(training)


class SlimmableConv2d(nn.Conv2d):
    """A convolution that uses the first rows and columns of its weight; DSConv2d and DSpwConv2d.

    Args:
        in_channels_list: widths of the input, or one number.
        out_channels_list: widths of the output, or one number.
        kernel_size: side R.
        stride: distance of the outputs, pixels.
        dilation: distance of the taps, pixels.
        groups: 1, or the widest output for a depthwise convolution.
        bias: whether each output channel has an offset.

    Padding is ((stride - 1) + dilation * (R - 1)) // 2 on every side.

    Raises:
        ModelError: for width lists that are not increasing.
    """

    def __init__(
        self,
        in_channels_list: Sequence[int] | int,
        out_channels_list: Sequence[int] | int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        inputs = check_widths(in_channels_list, f"{type(self).__name__} (input)")
        outputs = check_widths(out_channels_list, f"{type(self).__name__} (output)")
        super().__init__(
            inputs[-1],
            outputs[-1],
            kernel_size,
            stride=stride,
            padding=((stride - 1) + dilation * (kernel_size - 1)) // 2,
            dilation=dilation,
            groups=groups,
            bias=bias,
        )
        self.in_channels_list, self.out_channels_list = inputs, outputs

    def forward(self, x: Tensor, out_channels: int) -> Tensor:  # type: ignore[override]
        """Convolve (B, i, H, W) to (B, out_channels, H', W'); both must be listed widths."""
        y: Tensor = self._conv_forward(x, *self._prefix(x.shape[1], out_channels))
        return y

    def static(self, in_channels: int, out_channels: int) -> nn.Conv2d:
        """Return the ordinary convolution of one width."""
        return self._plain(*self._prefix(in_channels, out_channels))

    def _prefix(self, in_channels: int, out_channels: int) -> tuple[Tensor, Tensor | None]:
        _check_known(in_channels, self.in_channels_list, f"{type(self).__name__} (input)")
        _check_known(out_channels, self.out_channels_list, f"{type(self).__name__} (output)")
        bias = None if self.bias is None else self.bias[:out_channels]
        return self.weight[:out_channels, :in_channels], bias

    def _plain(self, weight: Tensor, bias: Tensor | None, groups: int = 1) -> nn.Conv2d:
        conv = nn.Conv2d(
            weight.shape[1] * groups,
            weight.shape[0],
            self.kernel_size[0],
            stride=self.stride[0],
            padding=int(self.padding[0]),
            dilation=self.dilation[0],
            groups=groups,
            bias=bias is not None,
            device="meta",
        )
        _fill(conv, {"weight": weight, "bias": bias}, training=self.training)
        return conv


class SlimmableDepthwiseConv2d(SlimmableConv2d):
    """A depthwise convolution on as many channels as its input has; DSdwConv2d.

    Args:
        channels_list: widths of input and output.
        kernel_size: side R.
        stride: distance of the outputs, pixels.
        dilation: distance of the taps, pixels.
        bias: whether each channel has an offset.
    """

    def __init__(
        self,
        channels_list: Sequence[int] | int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
    ) -> None:
        widths = check_widths(channels_list, "SlimmableDepthwiseConv2d")
        super().__init__(
            widths, widths, kernel_size, stride=stride, dilation=dilation, groups=widths[-1], bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Filter (B, i, H, W) to (B, i, H', W')."""
        weight, bias = self._prefix(x.shape[1], x.shape[1])
        stride, padding, dilation = self.stride[0], int(self.padding[0]), self.dilation[0]
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1])

    def static(self, channels: int) -> nn.Conv2d:  # type: ignore[override]
        """Return the ordinary depthwise convolution of one width."""
        return self._plain(*self._prefix(channels, channels), groups=channels)


class SlimmableJoin2d(SlimmableConv2d):
    """A convolution on a concatenation of slimmable features: it uses one prefix of columns per input.

    Args:
        in_channels_lists: widths of each input.
        out_channels_list: widths of the output.
        kernel_size: side R.
        bias: whether each output channel has an offset.
    """

    def __init__(
        self,
        in_channels_lists: Sequence[Sequence[int]],
        out_channels_list: Sequence[int] | int,
        kernel_size: int,
        *,
        bias: bool = True,
    ) -> None:
        parts = [check_widths(widths, "SlimmableJoin2d (input)") for widths in in_channels_lists]
        super().__init__(sum(widths[-1] for widths in parts), out_channels_list, kernel_size, bias=bias)
        self.in_channels_lists = parts

    def forward(self, features: Sequence[Tensor], out_channels: int) -> Tensor:  # type: ignore[override]
        """Concatenate features (B, i_n, H, W) and convolve them to (B, out_channels, H, W)."""
        prefix = self._prefixes([x.shape[1] for x in features], out_channels)
        y: Tensor = self._conv_forward(torch.cat(tuple(features), dim=1), *prefix)
        return y

    def static(self, in_channels: Sequence[int], out_channels: int) -> nn.Conv2d:  # type: ignore[override]
        """Return the ordinary convolution of the concatenation, for one width per input."""
        return self._plain(*self._prefixes(in_channels, out_channels))

    def _prefixes(self, in_channels: Sequence[int], out_channels: int) -> tuple[Tensor, Tensor | None]:
        _check_known(out_channels, self.out_channels_list, "SlimmableJoin2d (output)")
        columns, start = [], 0
        for width, widths in zip(in_channels, self.in_channels_lists, strict=True):
            _check_known(width, widths, "SlimmableJoin2d (input)")
            columns.append(self.weight[:out_channels, start : start + width])
            start += widths[-1]
        return torch.cat(columns, dim=1), None if self.bias is None else self.bias[:out_channels]


class SlimmableLinear(nn.Linear):
    """A linear layer on the first features of its input; DSLinear.

    Args:
        in_features_list: widths of the input.
        out_features: outputs, always all of them.
        bias: whether each output has an offset.
    """

    def __init__(
        self, in_features_list: Sequence[int] | int, out_features: int, *, bias: bool = True
    ) -> None:
        widths = check_widths(in_features_list, "SlimmableLinear")
        super().__init__(widths[-1], out_features, bias=bias)
        self.in_features_list = widths

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, i) to (B, out_features)."""
        width = _check_known(x.shape[1], self.in_features_list, "SlimmableLinear")
        return F.linear(x, self.weight[:, :width], self.bias)

    def static(self, in_features: int) -> nn.Linear:
        """Return the ordinary linear layer of one width."""
        _check_known(in_features, self.in_features_list, "SlimmableLinear")
        linear = nn.Linear(in_features, self.out_features, bias=self.bias is not None, device="meta")
        tensors = {"weight": self.weight[:, :in_features], "bias": self.bias}
        _fill(linear, tensors, training=self.training)
        return linear


class SlimmableBatchNorm2d(nn.Module):
    """BatchNorm with running statistics of its own for every width; DSBatchNorm2d.

    The affine parameters, eps and momentum of all widths are those of the last entry of ``aux_bn``; the
    other entries hold statistics only.

    Args:
        num_features_list: one width per entry, not decreasing. Equal entries (rounded, or shared by
            configurations) still have their own statistics.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics.
        affine: whether there are gamma and beta.
    """

    def __init__(
        self,
        num_features_list: Sequence[int] | int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.num_features_list = check_widths(num_features_list, "SlimmableBatchNorm2d", repeats=True)
        *narrow, widest = self.num_features_list
        entries = [nn.BatchNorm2d(width, affine=False) for width in narrow]
        self.aux_bn = nn.ModuleList([*entries, nn.BatchNorm2d(widest, eps, momentum, affine=affine)])

    @property
    def last(self) -> nn.BatchNorm2d:
        """The entry that holds the affine parameters, eps and momentum of all widths."""
        return self.aux_bn[-1]  # type: ignore[return-value]

    def forward(self, x: Tensor, entry: int | None = None) -> Tensor:
        """Normalize (B, i, H, W) by the statistics of an entry, by default the first of x's width."""
        statistics = self._entry(x.shape[1], entry)
        weight, bias = self._affine(x.shape[1])
        momentum = self.last.momentum
        if statistics.training:
            assert statistics.num_batches_tracked is not None
            statistics.num_batches_tracked.add_(1)
            if momentum is None:  # as in BatchNorm2d: the plain mean of all batches
                momentum = 1 / float(statistics.num_batches_tracked)
        return F.batch_norm(
            x,
            statistics.running_mean,
            statistics.running_var,
            weight,
            bias,
            statistics.training,
            momentum or 0.0,
            self.last.eps,
        )

    def static(self, width: int, entry: int | None = None) -> nn.BatchNorm2d:
        """Return the ordinary BatchNorm of one width, in evaluation mode.

        Raises:
            ModelError: in training mode, whose statistics still change, or for an unknown width.
        """
        if self.training:
            raise ModelError(
                "a SlimmableBatchNorm2d is in training mode; a static network has fixed statistics. Call "
                "eval() first."
            )
        statistics = self._entry(width, entry)
        weight, bias = self._affine(width)
        norm = nn.BatchNorm2d(
            width, self.last.eps, self.last.momentum, affine=weight is not None, device="meta"
        )
        tensors = {
            "weight": weight,
            "bias": bias,
            "running_mean": statistics.running_mean,
            "running_var": statistics.running_var,
            "num_batches_tracked": statistics.num_batches_tracked,
        }
        _fill(norm, tensors, training=False)
        return norm

    def _entry(self, width: int, entry: int | None) -> nn.BatchNorm2d:
        _check_known(width, self.num_features_list, "SlimmableBatchNorm2d")
        index = self.num_features_list.index(width) if entry is None else entry
        if self.num_features_list[index] != width:
            raise ModelError(
                f"SlimmableBatchNorm2d got {width} channels for entry {index}, whose statistics are of "
                f"{self.num_features_list[index]}. Pass the configuration that the features are of."
            )
        return self.aux_bn[index]  # type: ignore[return-value]

    def _affine(self, width: int) -> tuple[Tensor | None, Tensor | None]:
        if not self.last.affine:
            return None, None
        return self.last.weight[:width], self.last.bias[:width]
