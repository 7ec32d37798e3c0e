"""Advice: every failed check says the row, the likely cause, the setting and where to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedyn.report import write_report
from edgedyn.report.advice import ADVICE, advise
from edgedyn.report.rows import Row
from edgedyn.validation.checks import CHECKS, Check

DOCS = Path(__file__).parents[2] / "docs"
LAYERS = [{"layer": "body.3", "gain_db": 0.4}, {"layer": "body.0", "gain_db": 0.1}]


def failed(metric: str, between: str = "decisions") -> dict[str, object]:
    return Row(between, metric, 0.406, {"at_most": 0.25}, 9).to_json()


def test_every_check_with_a_limit_has_advice():
    no_limit = Check.__dataclass_fields__["limit"].default
    limited = {check.metric for check in CHECKS if check.limit is not no_limit}
    assert len(limited) > 8
    assert limited <= set(ADVICE)


@pytest.mark.parametrize("metric", ADVICE)
def test_advice_names_a_page_that_is_there(metric):
    (found,) = advise([failed(metric)], {})
    page = found["advice"].rpartition("Read docs/")[2].rstrip(".")
    assert (DOCS / page).is_file()
    assert "{" not in found["advice"]


def test_margin_names_the_mask_that_decides():
    facts = {"decisions": {"worst_mask_device": "blocks.2.mask"}}
    (found,) = advise([failed("largest_flipped_margin[device]")], facts)
    assert found["row"] == "decisions largest_flipped_margin[device] is 0.406, limit <= 0.25"
    assert "The mask of blocks.2.mask has the largest changed margin." in found["advice"]
    assert "limits.flipped_margin" in found["advice"]


def test_drop_names_the_costliest_layer_and_the_notes():
    facts = {
        "precision": {"forward": {"layers": LAYERS}},
        "notes": {"body.2.input": "channel 5 is large"},
    }
    (found,) = advise([failed("psnr_drop_db[sigma=25]", "device:truth")], facts)
    assert "Layer body.3 costs most, 0.40 dB. body.2.input: channel 5 is large." in found["advice"]


def test_a_value_next_to_its_limit_is_told_from_it():
    row = Row("float:truth", "psnr_db", 24.53001, {"at_least": 24.53002}, 9).to_json()
    assert advise([row], {})[0]["row"] == "float:truth psnr_db is 24.53001, limit >= 24.53002"


def test_passed_rows_and_repeats_have_none():
    passed = Row("float:truth", "psnr_db", 30.0, {"at_least": 20.0}, 3).to_json()
    assert advise([passed], {}) == []
    assert len(advise([failed("mask_flip_rate[quantized]"), failed("mask_flip_rate[device]")], {})) == 1


def test_unknown_metric_still_says_where_to_read():
    assert advise([failed("other")], {})[0]["advice"] == "Read docs/limits.md on this check."


def test_page_shows_advice_notes_and_where_the_latency_is_from(tmp_path: Path):
    place = {"tile": "64 x 64 pixels", "runtime": "R 1", "threads": "2 threads", "machine": "x86"}
    facts = {
        "notes": {"body.2.input": "channel 5 is large"},
        "latency_ms": {"median": 1.0, "p95": 2.0, "runs": 3},
        "measured_on": place,
    }
    manifest = {"target": "executorch", "precision": "int8"}
    rows = [failed("largest_flipped_margin[device]")]
    write_report(tmp_path, title="t", ok=False, rows=rows, manifest=manifest, pictures=[], facts=facts)
    page = (tmp_path / "report.html").read_text()
    assert "The precision changes decisions of a mask" in page
    assert "channel 5 is large" in page
    assert "Latency on the build machine" in page
    assert all(value in page for value in place.values())
