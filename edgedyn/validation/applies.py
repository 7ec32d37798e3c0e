"""When a check is made: functions of the precision and the task."""

from __future__ import annotations

from collections.abc import Callable

from edgedyn.images.tasks import Task

Applies = Callable[[str, Task], bool]

LOSSY = ("fp16", "int8")


def on(*precisions: str) -> Applies:
    """Apply at these precisions."""
    return lambda precision, task: precision in precisions


def picture(*precisions: str) -> Applies:
    """Apply to outputs that are pictures, at these precisions, or at any."""
    return lambda precision, task: task.predictions is None and precision in (precisions or (precision,))


def truth(*precisions: str) -> Applies:
    """Apply to pictures whose truth is known."""
    return lambda precision, task: task.has_truth and precision in (precisions or (precision,))


def predicts(*precisions: str) -> Applies:
    """Apply to outputs that predict classes or keypoints."""
    return lambda precision, task: task.predictions is not None and precision in (precisions or (precision,))


def no_truth(precision: str, task: Task) -> bool:
    """Apply to pictures without a truth: of noisy photos without clean ones."""
    return task.predictions is None and not task.has_truth


def labelled(precision: str, task: Task) -> bool:
    """Apply to photos whose class is known."""
    return task.is_labelled


def residual(precision: str, task: Task) -> bool:
    """Apply to a network that predicts a difference, at a lossy precision."""
    return task.is_residual and precision in LOSSY


def other_picture(precision: str, task: Task) -> bool:
    """Apply to the other pictures at a lossy precision."""
    return task.predictions is None and not task.is_residual and precision in LOSSY
