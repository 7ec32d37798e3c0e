"""Measurements on disk, written as soon as they are made: an interrupted run continues where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from edgedyn.cache import cached_path, private_folder
from edgedyn.files import replace_file
from edgedyn.reading import read_json

Values = dict[str, float]


class MeasurementCache:
    """Named measurements of one subject, in a file whose name is a digest of the subject and the code.

    Args:
        facts: everything that the measurements depend on.
        sources: files of code that measure; a change in one of them empties the cache.
    """

    def __init__(self, facts: str, sources: Iterable[Path]) -> None:
        self.path = cached_path("measured.json", sources, facts)

    def __call__(self, name: str, measure: Callable[[], Values]) -> Values:
        """Return the measurement of a name from the cache, or measure and store it."""
        known = self._read()
        if name not in known:
            known[name] = measure()
            private_folder(self.path.parent)
            replace_file(self.path, json.dumps(known).encode())
        return known[name]

    def _read(self) -> dict[str, Values]:
        try:
            known = read_json(self.path)
        except (OSError, ValueError):  # nothing measured yet, or a damaged file: measure again
            return {}
        return known if isinstance(known, dict) else {}
