"""Measurements kept on the disk as soon as they are made: an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from edgedyn.files import cached_path, replace_file

Values = dict[str, float]


class MeasurementCache:
    """Named measurements of one subject; standing in the cache under what they are of.

    Args:
        facts: everything that the measurements depend on.
        sources: the code that they are made by, too: other code measures anew.
    """

    def __init__(self, facts: str, sources: Iterable[Path]) -> None:
        self.path = cached_path("measured.json", sources, facts)

    def __call__(self, name: str, measure: Callable[[], Values]) -> Values:
        """Return what is remembered under a name, else measure and remember it."""
        known = self._read()
        if name not in known:
            known[name] = measure()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.path, json.dumps(known).encode())
        return known[name]

    def _read(self) -> dict[str, Values]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # nothing measured yet, or a file that somebody damaged: measured again
            return {}
        return found if isinstance(found, dict) else {}
