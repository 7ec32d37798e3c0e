"""The cost of INT8 by layer and by share, and the worth of each switch of the method, drawn and listed.

Drawings are SVG in units of 1/100 of their width and height, the origin at the top left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edgedyn.report.text import number

_LAYERS = 12  # of the table: those of the highest cost per multiply-add


def precision_sections(facts: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """Yield for each program the curve of PSNR drop against INT8 share, and the most expensive layers."""
    for program, measured in facts.get("precision", {}).items():
        top = max(point["drop_db"] for point in measured["curve"]) or 1.0
        dots = [
            (100 * point["int8_share"], 100 - 100 * max(point["drop_db"], 0) / top)
            for point in measured["curve"]
        ]
        yield {
            "program": program,
            "dots": [(f"{x:.2f}", f"{y:.2f}") for x, y in dots],
            "top": f"{number(top, digits=3)} dB",
            "points": [
                f"{point['layers']} layers float: {100 * point['int8_share']:.1f} % INT8, "
                f"{number(point['drop_db'], digits=3)} dB"
                for point in measured["curve"]
            ],
            "chosen": f"{len(measured['kept'])} layers stay float; INT8 then costs "
            f"{number(measured['drop_db'], digits=3)} dB on calibration images with fresh noise and crops.",
            "layers": [_layer(layer, measured["kept"]) for layer in measured["layers"][:_LAYERS]],
            "more": max(len(measured["layers"]) - _LAYERS, 0),
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
    """Return (program, changed switch, drop) of every trial."""
    return [
        (program, change, f"{drop:.4f} dB")
        for program, tried in facts.get("ablation", {}).items()
        for change, drop in tried.items()
    ]
