"""edgedyn: deploy PyTorch networks with dynamic layers to phones and Jetsons, every step measured.

    import edgedyn

    built = edgedyn.build("recipes/mallenet-s.phone.int8.yaml", "out")
    print(built.report.ok)
    edgedyn.run("out", ["noisy.png"], "denoised")

A public name is imported on its first use: ``import edgedyn`` imports neither torch nor any target.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgedyn.bundle.bundle import open_bundle
    from edgedyn.checkpoints.authors import from_authors
    from edgedyn.conversion.inspection import inspect
    from edgedyn.device.compile import compile_bundle
    from edgedyn.device.files import run
    from edgedyn.device.session import check, open_session
    from edgedyn.errors import EdgedynError
    from edgedyn.images.image_set import CalibrationSet
    from edgedyn.layers import RoutedModel, canonicalize
    from edgedyn.pipeline import build, calibrate, lower
    from edgedyn.recipe.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = [
    "CalibrationSet",
    "EdgedynError",
    "Recipe",
    "RoutedModel",
    "build",
    "calibrate",
    "canonicalize",
    "check",
    "compile_bundle",
    "from_authors",
    "inspect",
    "load_recipe",
    "lower",
    "open_bundle",
    "open_session",
    "run",
]
_HOMES = {
    "CalibrationSet": "edgedyn.images.image_set",
    "EdgedynError": "edgedyn.errors",
    "Recipe": "edgedyn.recipe.recipe",
    "RoutedModel": "edgedyn.layers",
    "build": "edgedyn.pipeline",
    "calibrate": "edgedyn.pipeline",
    "canonicalize": "edgedyn.layers",
    "check": "edgedyn.device.session",
    "compile_bundle": "edgedyn.device.compile",
    "from_authors": "edgedyn.checkpoints.authors",
    "inspect": "edgedyn.conversion.inspection",
    "load_recipe": "edgedyn.recipe.recipe",
    "lower": "edgedyn.pipeline",
    "open_bundle": "edgedyn.bundle.bundle",
    "open_session": "edgedyn.device.session",
    "run": "edgedyn.device.files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgedyn' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
