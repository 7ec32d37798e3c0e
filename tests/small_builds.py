"""What tests of whole builds share: the stages of a report, and what a Jetson build needs here."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

STAGES = {
    "canonical:reference",
    "decomposed:canonical",
    "quantized:decomposed",
    "device:quantized",
    "float:truth",
    "device:truth",
    "decisions",
}
# a Jetson build is not ok without its check build
NEEDS_RTX = [
    pytest.mark.tensorrt_rtx,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="needs the extra tensorrt-check"),
]
