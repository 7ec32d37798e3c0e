"""Networks that a user deploys, one file each; the constant ``NETWORK`` is the class or function to call."""

from __future__ import annotations

import pkgutil


def names() -> list[str]:
    """Return the names of all networks."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))
