"""One measured number with its limit, and a report of them. Device side: standard library only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One measured number between two things, for instance ``device:truth``.

    Attributes:
        between: ``canonical:reference``, ``decomposed:canonical``, ``quantized:decomposed``,
            ``device:quantized``, ``float:truth``, ``device:truth``, ``device:float``, ``int8:float``,
            ``decisions``, or a check of a toolchain.
        metric: name with its unit, ``psnr_db``; a condition follows in brackets, ``psnr_db[sigma=25]``.
        value: the measurement.
        limit: ``{"at_least": x}``, ``{"at_most": x}``, or empty where the number is only reported.
        samples: images, tensors or nodes that the number was measured on.
    """

    between: str
    metric: str
    value: float
    limit: dict[str, float]
    samples: int

    @property
    def passed(self) -> bool:
        """Whether something was measured and the limit holds; not-a-number never passes."""
        if self.samples < 1 or math.isnan(self.value):
            return False
        low = self.limit.get("at_least", -math.inf)
        return low <= self.value <= self.limit.get("at_most", math.inf)

    def to_json(self) -> dict[str, object]:
        """Return the row as JSON values, ``passed`` included."""
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class ValidationReport:
    """All rows of one build or check."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether there are rows and all pass: nothing compared is not a success."""
        return bool(self.rows) and all(row.passed for row in self.rows)
