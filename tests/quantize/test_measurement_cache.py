"""Measurements are kept, and made anew where the file on disk is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedyn.quantize.search.measurement_cache import MeasurementCache


@pytest.mark.parametrize("content", ["{", "", "[]", "null", "3", '"drop"'])
def test_broken_file_is_measured_anew_and_replaced(tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = MeasurementCache("x", [Path(__file__)])
    cache.path.parent.mkdir(parents=True)
    cache.path.write_text(content)
    assert cache("drop", lambda: {"a": 1.0}) == {"a": 1.0}
    assert cache("drop", lambda: pytest.fail("measured again")) == {"a": 1.0}
