"""Advice on failed checks: the likely cause, the setting, and where to read. Standard library only.

``ADVICE`` is the table, by metric; the worst layer is named where the build measured one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_COSTLY = (
    "The precision costs too much quality. {worst}In INT8, set quantize.max_drop_db to the limit, so that "
    "the costliest layers stay float, or name them in quantize.keep_float; `edgedyn calibrate RECIPE -o "
    "table.json --sensitivity` measures every layer. Read docs/calibration.md."
)
_RUNTIME = (
    "The runtime computes another result than the exported program. Run `edgedyn doctor` and compare the "
    "versions with the manifest's. In INT8, then keep layers in float one by one (quantize.keep_float) to "
    "find the one that the runtime computes otherwise. Read docs/limits.md."
)
_MASKS = (
    "The precision changes decisions of a mask. {mask}Keep the layers that write its input in float "
    "(quantize.keep_float), or train on with a larger margin; limits.{limit} is the limit. Read "
    "docs/calibration.md."
)
_GATES = (
    "The precision changes the choice of a variant. In INT8, keep the gate's layers and those in front of it "
    "in float (quantize.keep_float), or train the gate on; limits.{limit} is the limit. Read "
    "docs/calibration.md."
)
_EXACT = (
    "The rewrite is not equal to the reference. Check that the class is the published one and that its "
    "weights fit it (edgedyn.from_authors), and pick another form (forms). Read docs/your-network.md."
)
_PREDICTIONS = (
    "The precision changes predictions. {worst}In INT8, keep the last layers and the costliest in float "
    "(quantize.keep_float), and calibrate on more images of the same kind (quantize.samples). Read "
    "docs/calibration.md."
)
_WEAK = (
    "The output is no better than the input, before or after deployment. Check model.weights, the noise "
    "level of images, and the range of the input (input). Read docs/your-network.md."
)
ADVICE: Mapping[str, str] = {
    "max_abs": _EXACT,
    "max_relative": _EXACT,
    "int8_mac_share": "Too few multiply-adds are INT8. The report's list of float layers has the reason for "
    "each; take patterns out of quantize.keep_float, or lower limits.int8_share. Read docs/limits.md.",
    "psnr_drop_db": _COSTLY,
    "sqnr_db": _COSTLY,
    "residual_sqnr_db": _COSTLY,
    "mean_abs_levels": _RUNTIME,
    "mean_relative": _RUNTIME,
    "rms_ratio": _RUNTIME,
    "noise_ratio": _RUNTIME,
    "psnr_db": _WEAK,
    "prediction_agreement": _PREDICTIONS,
    "top1_drop": _PREDICTIONS,
    "top5_drop": _PREDICTIONS,
    "mask_flip_rate": _MASKS.replace("{limit}", "mask_flips"),
    "largest_flipped_margin": _MASKS.replace("{limit}", "flipped_margin"),
    "gate_agreement": _GATES.replace("{limit}", "gate"),
    "largest_flipped_gate_margin": _GATES.replace("{limit}", "flipped_margin"),
    "unmeasured_decisions": "The network decides in a way that the build cannot compare. Write the decision "
    "as a mask or a gate of edgedyn (edgedyn list layers). Read docs/your-network.md.",
    "check_build_failures": "NVIDIA's parser or builder refuses the model; the report's section on the check "
    "build has its own lines. Without TensorRT-RTX: pip install 'edgedyn[tensorrt-check]'. "
    "Read docs/jetson.md.",
    "coverage": "Too few calibration samples reach an outcome of the network's decisions. Add such images, "
    "or name masks that training left empty in quantize.coverage.unused. Read docs/calibration.md.",
}
_OTHER = "Read docs/limits.md on this check."


def advise(rows: Iterable[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the advice on failed rows, once per metric: ``{"row", "advice"}``.

    Args:
        rows: ``Row.to_json()`` of every row.
        facts: of the manifest; ``precision``, ``decisions`` and ``notes`` name the layers.
    """
    advice: dict[str, dict[str, str]] = {}
    for row in rows:
        name, _, condition = str(row["metric"]).partition("[")
        if row["passed"] or name in advice:
            continue
        shown = " ".join(f"{_SIGNS[key]} {_number(value, row)}" for key, value in row["limit"].items())
        text = ADVICE.get(name, _OTHER).replace("{worst}", _worst_layer(facts))
        text = text.replace("{mask}", _worst_mask(facts, condition.rstrip("]")))
        value = f"{row['between']} {row['metric']} is {_number(row['value'], row)}"
        advice[name] = {"row": f"{value}, limit {shown or 'none'}", "advice": text}
    return list(advice.values())


def _number(value: Any, row: Mapping[str, Any]) -> str:
    """Return a number in four digits, or in as many as tell the value of a row from its limits."""
    others = {float(x) for x in (row["value"], *row["limit"].values())}
    digits = next((n for n in range(4, 17) if len({f"{x:.{n}g}" for x in others}) == len(others)), 17)
    return f"{float(value):.{digits}g}"


_SIGNS = {"at_most": "<=", "at_least": ">="}


def _worst_layer(facts: Mapping[str, Any]) -> str:
    """Name the layer that costs most, where the precision search measured it, and the layers with notes."""
    layers = [layer for found in facts.get("precision", {}).values() for layer in found.get("layers", ())]
    parts = []
    if layers:
        worst = max(layers, key=lambda layer: layer["gain_db"])
        parts.append(f"Layer {worst['layer']} costs most, {worst['gain_db']:.2f} dB.")
    parts += [f"{name}: {note}." for name, note in list(facts.get("notes", {}).items())[:3]]
    return " ".join(parts) + " " * bool(parts)


def _worst_mask(facts: Mapping[str, Any], where: str) -> str:
    path = facts.get("decisions", {}).get(f"worst_mask_{where}", "")
    return f"The mask of {path} has the largest changed margin. " if path else ""
