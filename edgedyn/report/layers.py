"""The section of a report that compares each layer in INT8 and in float32, measured after the build."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgedyn.errors import BundleError
from edgedyn.report.text import TIMES, number

OPENS, CLOSES = "<!-- layers -->", "<!-- end of layers -->"


def describe_layers(values: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of ``layers.html``.

    Args:
        values: ``Comparison.to_json()``, and ``machine``.
        row: ``Row.to_json()`` that sums it up.
    """
    several = len(values["int8_ms"]) > 1
    rows = [_describe(layer, several=several) for layer in values["layers"]]
    slower = [shown for shown, layer in zip(rows, values["layers"], strict=True) if layer["is_slower"]]
    whole = ", ".join(
        f"{f'{name}: ' if several else ''}{number(ms, digits=3)} ms in INT8, "
        f"{number(values['float_ms'][name], digits=3)} ms in float32"
        for name, ms in values["int8_ms"].items()
    )
    facts = {key: values[key] for key in ("runs", "machine", "keep_float")}
    return {**row, **facts, "value": number(row["value"]), "whole": whole, "slower": slower, "all": rows}


def replace_layers(page: str, section: str) -> str:
    """Put a section into its place on the page; it replaces an earlier one.

    Raises:
        BundleError: for a page without that place.
    """
    before, opens, rest = page.partition(OPENS)
    _, closes, after = rest.partition(CLOSES)
    if not opens or not closes:
        raise BundleError(
            f"report.html has no place {OPENS} for the times of layers; expected the page of this version. "
            "Build the bundle again."
        )
    return f"{before}{OPENS}\n{section}\n{CLOSES}{after}"


def _describe(layer: Mapping[str, Any], *, several: bool) -> dict[str, str]:
    shape = TIMES.join(map(str, layer["shape"]))
    note = f"{shape}, {number(layer['multiply_adds'] / 1e6, digits=3)} MMAC"
    ratio = layer["int8_ms"] / layer["float_ms"] if layer["float_ms"] else float("nan")
    word, mark = ("failed", "slower") if layer["is_slower"] else ("reported", "")
    if not layer["is_int8"]:
        word, mark = "reported", "float"
    return {
        "name": f"{layer['program']}: {layer['layer']}" if several else layer["layer"],
        "note": note,
        "float_ms": number(layer["float_ms"], digits=3),
        "int8_ms": number(layer["int8_ms"], digits=3),
        "ratio": number(ratio, digits=3) if layer["float_ms"] else "",
        "word": word,
        "mark": mark,
    }
