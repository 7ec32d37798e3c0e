"""edgedyn: deploy PyTorch networks with dynamic layers to phones and Jetsons, every step measured.

Public names are imported when they are used: ``import edgedyn`` imports neither torch nor any target.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgedyn.bundle.bundle import open_bundle
    from edgedyn.checkpoints.authors import from_authors
    from edgedyn.device.session import open_session
    from edgedyn.images.image_set import CalibrationSet
    from edgedyn.layers import RoutedModel, canonicalize
    from edgedyn.pipeline import build
    from edgedyn.recipe.recipe import load_recipe

__version__ = "0.1.0"
__all__ = [
    "CalibrationSet",
    "RoutedModel",
    "build",
    "canonicalize",
    "from_authors",
    "load_recipe",
    "open_bundle",
    "open_session",
]
_HOMES = {
    "CalibrationSet": "edgedyn.images.image_set",
    "RoutedModel": "edgedyn.layers",
    "build": "edgedyn.pipeline",
    "canonicalize": "edgedyn.layers",
    "from_authors": "edgedyn.checkpoints.authors",
    "load_recipe": "edgedyn.recipe.recipe",
    "open_bundle": "edgedyn.bundle.bundle",
    "open_session": "edgedyn.device.session",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgedyn' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
