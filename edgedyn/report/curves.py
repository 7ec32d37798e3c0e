"""What INT8 costs by layer and by share, and what each part of its making is worth: facts drawn and listed.

Drawings are SVG in units of 1/100 of their width and height, the origin at the top left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgedyn.report.text import number

_LAYERS = 12  # of the table: those that cost most a multiply-add


def precision_sections(facts: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Yield for each program the curve of drop against INT8 share, and the layers that cost most."""
    for program, found in facts.get("precision", {}).items():
        top = max(point["drop_db"] for point in found["curve"]) or 1.0
        dots = [
            (100 * point["int8_share"], 100 - 100 * max(point["drop_db"], 0) / top)
            for point in found["curve"]
        ]
        yield {
            "program": program,
            "dots": [(f"{x:.2f}", f"{y:.2f}") for x, y in dots],
            "top": f"{number(top, digits=3)} dB",
            "points": [
                f"{point['layers']} layers float: {100 * point['int8_share']:.1f} % INT8, "
                f"{number(point['drop_db'], digits=3)} dB"
                for point in found["curve"]
            ],
            "chosen": f"{len(found['kept'])} layers stay float for it; then INT8 costs "
            f"{number(found['drop_db'], digits=3)} dB on the calibration images with fresh noise and crops.",
            "layers": [_layer(layer, found["kept"]) for layer in found["layers"][:_LAYERS]],
            "more": max(len(found["layers"]) - _LAYERS, 0),
        }


def _layer(layer: Mapping[str, Any], kept: Iterable[str]) -> tuple[str, str, str, str, str]:
    return (
        layer["layer"],
        f"{100 * layer['share']:.1f} %",
        f"{layer['sqnr_db']:.1f} dB",
        f"{layer['gain_db']:.4f} dB",
        "float" if layer["layer"] in kept else "INT8",
    )


def ablation_rows(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (program, what was changed, drop) of everything that was tried."""
    return [
        (program, change, f"{drop:.4f} dB")
        for program, tried in facts.get("ablation", {}).items()
        for change, drop in tried.items()
    ]
