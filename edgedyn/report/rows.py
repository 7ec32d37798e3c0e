"""One measured number with its limit, and a report of them. Device side: standard library only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """One measured number between two things, for instance ``device:truth``.

    Attributes:
        between: ``canonical:reference``, ``decomposed:canonical``, ``quantized:decomposed``,
            ``device:quantized``, ``float:truth``, ``device:truth``, ``device:float``, ``float:labels``,
            ``device:labels``, ``int8:float``,
            ``device:vectors``, ``build:report``, ``decisions``, ``latency``, or a check of a toolchain.
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

    def __repr__(self) -> str:
        """Return one line: the comparison, the value, its limit and the verdict."""
        words = {"at_least": "at least", "at_most": "at most"}
        limit = "".join(f", {words[key]} {value:.4g}" for key, value in self.limit.items())
        verdict = "failed" if not self.passed else "passed" if self.limit else "reported"
        value = f"{self.value:.4g}" if self.passed else f"{self.value:.8g}"  # 4 digits may equal the limit
        return f"Row({self.between} {self.metric} = {value}{limit}, samples {self.samples}: {verdict})"

    @property
    def passed(self) -> bool:
        """Whether the row has samples and its limit holds; not-a-number never passes."""
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

    def __repr__(self) -> str:
        """Return the counts in one line, and each failed row on a line of its own."""
        failed = [row for row in self.rows if not row.passed]
        checks = sum(bool(row.limit) or not row.passed for row in self.rows)
        verdict = "passed" if self.ok else "failed"
        line = f"ValidationReport({verdict}: {checks} checks, {len(failed)} failed; {len(self.rows)} rows)"
        return "\n  ".join([line, *map(repr, failed)])

    @property
    def ok(self) -> bool:
        """Whether there are rows and all pass; an empty report is no success."""
        return bool(self.rows) and all(row.passed for row in self.rows)
