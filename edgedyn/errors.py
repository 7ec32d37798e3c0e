"""Everything that edgedyn refuses, each with the exit code of the command line.

A message says what, found, expected, next. Anything else that escapes a public function is a bug of ours.
"""

from __future__ import annotations


class EdgedynError(Exception):
    """A refusal with a reason; ``exit_code`` is what the command line returns."""

    exit_code = 2


class CheckFailedError(EdgedynError):
    """A check ran and its limit was not met."""

    exit_code = 1


class BundleError(EdgedynError):
    """A bundle is not what its manifest says."""

    exit_code = 1


class RecipeError(EdgedynError):
    """A recipe has an unknown key, a wrong type, or names something that does not exist."""


class WeightsError(EdgedynError):
    """A weights file is missing, unsafe, damaged, or does not fit the network."""


class ImageError(EdgedynError):
    """A file is not a readable image, or an image cannot go through this bundle."""


class UsageError(EdgedynError):
    """A command was asked for something that it does not do, or would overwrite what is there."""


class TrainingError(EdgedynError):
    """Training cannot start or cannot go on."""


class TargetMissingError(EdgedynError):
    """A target, device or optional package is not available here."""

    exit_code = 3


class ModelError(EdgedynError):
    """A network or a layer has a structure or a shape that is not supported."""

    exit_code = 4


class NoFormError(ModelError):
    """No form of an op runs on the target."""


class CalibrationError(EdgedynError):
    """A calibration set is refused."""

    exit_code = 5
