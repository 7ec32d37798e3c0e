"""Progress of a calibration: the callback that long functions call."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (phase, steps done, steps in the phase)


def silent(phase: str, done: int, total: int) -> None:
    """Report nothing."""
