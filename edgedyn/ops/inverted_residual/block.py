"""The parts of an inverted residual, read from the op's flat arguments, and the checks of both ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edgedyn.errors import ModelError

NAMES = ("expand", "depthwise", "project")
ACTIVATIONS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "none": lambda y, _: y,
    "relu": lambda y, _: F.relu(y),
    "relu6": lambda y, _: F.relu6(y),
    "prelu": lambda y, slopes: F.prelu(y, slopes),  # type: ignore[arg-type]  # check() demands slopes
    "hardswish": lambda y, _: F.hardswish(y),
}
_OPTIONS = ("none", "none", "none", 1, False)  # the schema's defaults


class Convolution(NamedTuple):
    """One of the three convolutions of a block.

    Attributes:
        weight: (E, C, 1, 1), (E, 1, R, R) or (O, E, 1, 1).
        bias: one value per output channel.
        slopes: of a PReLU, one per output channel; None with any other activation.
        activation: ``none``, ``relu``, ``relu6``, ``prelu`` or ``hardswish``.
    """

    weight: Tensor
    bias: Tensor
    slopes: Tensor | None = None
    activation: str = "none"

    def activate(self, y: Tensor) -> Tensor:
        """Apply the activation to (B, channels, h, w)."""
        return ACTIVATIONS[self.activation](y, self.slopes)


class Block(NamedTuple):
    """All that an inverted residual applies to x.

    Attributes:
        expand: 1 x 1 convolution, C to E channels.
        depthwise: R x R convolution on E channels.
        project: 1 x 1 convolution, E to O channels.
        mask: (B, 1, h, w) of 0 and 1, or None for a mask of ones.
        stride: of the depthwise convolution, pixels.
        residual: whether x is added.
    """

    expand: Convolution
    depthwise: Convolution
    project: Convolution
    mask: Tensor | None
    stride: int
    residual: bool

    @classmethod
    def read(cls, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Block:
        """Return the block of the tensors behind x, three per convolution and the mask, and the options."""
        options += _OPTIONS[len(options) :]
        convolutions = [
            Convolution._make((*tensors[3 * k : 3 * k + 3], activation))
            for k, activation in enumerate(options[: len(NAMES)])
        ]
        return cls._make((*convolutions, tensors[9], *options[len(NAMES) :]))

    @property
    def convolutions(self) -> Iterator[tuple[str, Convolution]]:
        """The three convolutions in order, with their names."""
        return zip(NAMES, (self.expand, self.depthwise, self.project), strict=True)

    def output(self, x: Tensor) -> tuple[int, int, int, int]:
        """Return the shape of y."""
        height, width = ((extent - 1) // self.stride + 1 for extent in x.shape[2:])
        return x.shape[0], self.project.weight.shape[0], height, width


def check(x: Tensor, block: Block, op: str = "inverted_residual", weights: torch.dtype | None = None) -> None:
    """Refuse arguments that do not fit together; shapes and types only, for traces too.

    Args:
        x: (B, C, H, W).
        block: all other arguments.
        op: name of the op for messages.
        weights: type of the weights; None for the type of x.

    Raises:
        ModelError: with the argument that was found, the expected one, and the next step.
    """
    _check_shapes(x, block, op)
    _check_activations(block, op)
    outputs = block.project.weight.shape[0]
    may_be_added = block.stride == 1 and outputs == x.shape[1]
    if block.stride not in (1, 2) or (block.residual and not may_be_added):
        raise ModelError(
            f"{op} got stride={block.stride}, residual={block.residual}, x of {x.shape[1]} and project of "
            f"{outputs} channels; expected stride 1 or 2, and with a residual stride 1 and "
            "as many outputs as inputs. Keep another block as three convolutions."
        )
    _check_mask(x, block, op)
    _check_types(x, block, op, weights or x.dtype)


def check_mask_values(mask: Tensor | None, op: str = "inverted_residual") -> None:
    """Refuse a mask of other values than 0 and 1; not for traces.

    Raises:
        ModelError: with the range that was found.
    """
    if mask is not None and not ((mask == 0) | (mask == 1)).all():
        raise ModelError(
            f"{op} got a mask with values from {mask.min().item()} to {mask.max().item()}; expected 0 and 1 "
            "only. Decide first: logits >= 0."
        )


def _check_shapes(x: Tensor, block: Block, op: str) -> None:
    expand, depthwise, project = (tuple(of.weight.shape) for _, of in block.convolutions)
    hidden, outputs = expand[:1], project[:1]
    is_depthwise = depthwise in ((*hidden, 1, 3, 3), (*hidden, 1, 5, 5))
    fits = x.dim() == 4 and expand[1:] == (x.shape[1], 1, 1) and project[1:] == (*hidden, 1, 1)
    if not (fits and is_depthwise) or not all((*x.shape[1:], *hidden, *outputs)):
        raise ModelError(
            f"{op} got x {tuple(x.shape)} and weights {expand}, {depthwise}, {project}; expected "
            "(B, C, H, W), not empty, and (E, C, 1, 1), (E, 1, R, R) with R 3 or 5, (O, E, 1, 1). Keep "
            "another block as three convolutions."
        )
    for name, of in block.convolutions:
        if tuple(of.bias.shape) != of.weight.shape[:1]:
            raise ModelError(
                f"{op} got {name}_bias {tuple(of.bias.shape)}; expected {tuple(of.weight.shape[:1])}: one "
                "value per output channel. Pass zeros where the network has none."
            )


def _check_activations(block: Block, op: str) -> None:
    for name, of in block.convolutions:
        if of.activation not in ACTIVATIONS:
            raise ModelError(
                f"{op} got {name}_activation={of.activation!r}; expected one of {', '.join(ACTIVATIONS)}. "
                "Keep a block with another one as three convolutions."
            )
        expected = of.weight.shape[:1] if of.activation == "prelu" else None
        if (None if of.slopes is None else of.slopes.shape) != expected:
            found = None if of.slopes is None else tuple(of.slopes.shape)
            raise ModelError(
                f"{op} got {name}_slopes {found} with {name}_activation={of.activation!r}; expected "
                f"{None if expected is None else tuple(expected)}: one slope per output channel, of a "
                "prelu only. Repeat a slope that channels share."
            )


def _check_mask(x: Tensor, block: Block, op: str) -> None:
    size = block.output(x)[2:]
    if block.mask is not None and tuple(block.mask.shape) != (x.shape[0], 1, *size):
        raise ModelError(
            f"{op} got mask {tuple(block.mask.shape)} for x {tuple(x.shape)}; expected "
            f"{(x.shape[0], 1, *size)}: one value per position of y. Give the mask the resolution of y."
        )


def _check_types(x: Tensor, block: Block, op: str, weights: torch.dtype) -> None:
    found = {"mask": block.mask}
    for name, of in block.convolutions:
        found |= {f"{name}_bias": of.bias, f"{name}_slopes": of.slopes}
        if of.weight.dtype != weights:
            raise ModelError(
                f"{op} got {name} of {of.weight.dtype}; expected {weights}. Cast it, or take the op for its "
                "type: inverted_residual for the type of x, inverted_residual_int8 for int8."
            )
    for name, tensor in found.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise ModelError(
                f"{op} got {name} of {tensor.dtype} for x of {x.dtype}; expected the same type. Cast it to "
                "the type of x."
            )
