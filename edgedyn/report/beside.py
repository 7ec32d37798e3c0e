"""Latency of a build beside its counterparts: rows, and a sentence for each. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping

from edgedyn.report.rows import Row
from edgedyn.report.text import number

BETWEEN = "latency"
FUSED = "fused kernels"
_HINT = "--set kernels=fused; docs/kernels.md says how an app links them"


def latency_rows(latency_ms: Mapping[str, float], beside: Mapping[str, float]) -> list[Row]:
    """Return a row without limit per program, the build's own first; none without counterparts.

    Args:
        latency_ms: median and number of runs of the build's own program.
        beside: counterpart -> median in milliseconds, of as many runs.
    """
    measured = {"this build": latency_ms["median"], **beside} if beside else {}
    runs = int(latency_ms["runs"])
    return [Row(BETWEEN, f"latency_ms[{name}]", ms, {}, runs) for name, ms in measured.items()]


def describe_beside(latency_ms: Mapping[str, float], beside: Mapping[str, float]) -> dict[str, str]:
    """Return a sentence per counterpart; that on faster kernels of ours says how to get them.

    Args:
        latency_ms: median of the build's own program.
        beside: counterpart -> median in milliseconds.
    """
    own = latency_ms.get("median", 0.0)
    sentences = {}
    for name, ms in beside.items():
        text = f"{number(ms, digits=3)} ms instead of {number(own, digits=3)} per tile"
        sentences[name] = f"{text}; {_HINT}" if name == FUSED and ms < own else text
    return sentences
