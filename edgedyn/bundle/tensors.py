"""Inputs and outputs of a deployed program."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a program.

    Attributes:
        name: name in the artifact.
        dtype: numpy name, ``float32`` or ``float16``.
        shape: fixed shape, B C H W for images.
        low: smallest value that a valid tensor holds in normal use.
        high: largest such value.
        meaning: one phrase for people: colour space, order, what 0 and 1 stand for.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float
    meaning: str
