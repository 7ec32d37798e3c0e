"""The report of a build as one HTML file: verdict, pictures, every row, and the origin of the numbers.

Self-contained: pictures are embedded, and a content policy forbids the page to load or execute anything.
Equal arguments give equal bytes. ``page.html`` has the layout, this file the values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from edgedyn.errors import UsageError, printable
from edgedyn.report.advice import advise
from edgedyn.report.beside import BETWEEN, describe_beside
from edgedyn.report.curves import ablation_rows, precision_sections
from edgedyn.report.layers import CLOSES, OPENS, describe_layers, replace_layers
from edgedyn.report.pictures import Picture, panels
from edgedyn.report.text import TIMES, megabytes, number

__all__ = ["FILE", "Picture", "insert_layers", "write_report"]

FILE = "report.html"

# The question of each comparison; another ``between`` is shown without one.
QUESTIONS = {
    "canonical:reference": "Is the rewrite of the dynamic layers exact?",
    "decomposed:canonical": "Is the form that the target runs exact?",
    "quantized:decomposed": "How much quality does the precision cost?",
    "device:quantized": "Does the runtime compute the exported program?",
    "float:truth": "How good is the network before deployment?",
    "device:float": "Does the device compute the same as the float network?",
    "float:labels": "How many labelled photos does the network classify right before deployment?",
    "device:labels": "How many does the device classify right?",
    "device:truth": "How good is the network on the device?",
    "int8:float": "Is INT8 faster than float, layer by layer?",
    "decisions": "Do gates and masks still decide the same?",
    BETWEEN: "How long does a tile take on the build machine, in this build and in others?",
}

_UNITS = {"_db": "dB", "_ms": "ms", "_levels": "levels", "_bytes": "bytes", "_percent": "%"}
_ROW_KEYS = frozenset({"between", "metric", "value", "limit", "samples", "passed"})
_FACTS_SHOWN = frozenset(
    {
        "programs",
        "latency_ms",
        "latency_beside",
        "int8_mac_share",
        "float_nodes",
        "dynamic_ranges",
        "generated_kernels",
        "check_build",
        "calibration",
        "weights",
        "decisions",
        "routes",
        "precision",
        "ablation",
        "operators",
        "truth",
        "notes",
        "measured_on",
    }
)


def write_report(
    out: Path,
    *,
    title: str,
    ok: bool,
    rows: list[dict[str, Any]],
    manifest: dict[str, Any],
    pictures: list[Picture],
    facts: dict[str, Any],
) -> None:
    """Write ``report.html`` into the existing folder ``out``.

    Args:
        out: folder of the bundle.
        title: name of the recipe.
        ok: the verdict.
        rows: ``Row.to_json()`` of every row.
        manifest: ``target`` and ``precision``; where given, ``inputs``, ``outputs`` (TensorSpecs as dicts),
            ``forms`` {op: form}, ``versions`` {tool: version} and ``digests`` {name: sha256}.
        pictures: shown in this order.
        facts: measurements besides the rows. Each may be absent: ``programs`` {file: bytes},
            ``latency_ms`` {median, p95, runs}, ``latency_beside`` {counterpart: median in ms},
            ``int8_mac_share`` (a fraction), ``float_nodes`` [{node, reason}], ``dynamic_ranges`` [layer],
            ``check_build`` and ``calibration`` {name: value}, ``weights`` (where they are from), ``truth`` (a
            notice where none is known), ``precision`` and ``ablation`` (of a calibration table: {program:
            measurements}), ``generated_kernels`` {name:
            {spread, between_images}} (shares of a kernel's rms, see ``quantize.rescale.generated``),
            ``decisions`` and ``routes`` (histograms of margins: ``edges``, ``all``, ``changed``), ``notes``
            {tensor: note of the calibration}, ``measured_on`` {tile, runtime, threads, machine} (of
            ``latency_ms``). The page lists others at its end, except ``operators``, which ``edgedyn bench
            --per-layer`` uses.

    Raises:
        UsageError: for a verdict that the rows contradict, a row or a manifest without a required key, a
            picture whose arrays are unequal or not finite, or a missing folder.
    """
    _require(out, ok, rows, manifest)
    precision = str(manifest["precision"]).upper()
    page = _template("page.html").render(
        place_of_layers=f"{OPENS}{CLOSES}",
        title=title,
        ok=ok,
        notice=" ".join(filter(None, (_notice(str(facts.get("weights", ""))), facts.get("truth", "")))),
        histograms=list(_histograms(facts)),
        target=manifest["target"],
        precision=precision,
        verdict=_verdict(ok, rows),
        failed=[_row(row) for row in rows if not row["passed"]],
        advice=advise(rows, facts),
        notes=facts.get("notes", {}),
        figures=list(_figures(rows, facts)),
        pictures=[{"caption": p.caption, "panels": panels(p, precision)} for p in pictures],
        groups=_groups(rows),
        floats=_by_reason(facts.get("float_nodes", [])),
        int8_mac_share=facts.get("int8_mac_share"),
        dynamic_ranges=facts.get("dynamic_ranges", []),
        precisions=list(precision_sections(facts)),
        ablation=ablation_rows(facts),
        sections=[section for section in _sections(manifest, facts) if section[1]],
    )
    (out / FILE).write_text(page, encoding="utf-8")


def insert_layers(page: str, values: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    """Return a report's page with the section of its layers, in place of an earlier one.

    Args:
        page: a ``report.html``.
        values: ``Comparison.to_json()`` and the ``machine`` of the measurement.
        row: the row that sums it up.

    Raises:
        BundleError: for a page of another version.
    """
    shown = describe_layers(values, row)
    section = _template("layers.html").render(shown, question=QUESTIONS[row["between"]])
    return replace_layers(page, section)


def _require(out: Path, ok: bool, rows: list[dict[str, Any]], manifest: dict[str, Any]) -> None:
    if not out.is_dir():
        raise UsageError(
            f"the report goes into the folder {out}, which does not exist. Build the bundle first."
        )
    for key in ("target", "precision"):
        if key not in manifest:
            raise UsageError(
                f"the report needs {key!r} in the manifest; found {sorted(manifest)}. Build again."
            )
    for row in rows:
        if lacks := sorted(_ROW_KEYS - set(row)):
            raise UsageError(f"a row of the report lacks {lacks}; found {sorted(row)}. Pass Row.to_json().")
    passed = sum(bool(row["passed"]) for row in rows)
    if ok and (passed < len(rows) or not rows):
        raise UsageError(
            f"the report is to say 'passed', but {passed} of {len(rows)} rows passed; "
            "expected all, and at least one. Pass ValidationReport.ok."
        )


def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # not Markup
    )
    return environment.get_template(name)


def _verdict(ok: bool, rows: list[dict[str, Any]]) -> str:
    limited = [row for row in rows if row["limit"] or not row["passed"]]
    failed = sum(not row["passed"] for row in rows)
    if not rows:
        return "Nothing was compared. A report without rows is no success."
    if failed:
        return f"{failed} of {len(limited)} checks do not hold."
    if not ok:
        return "Every row below holds; the build failed for a reason outside this table."
    reported = len(rows) - len(limited)
    return f"All {len(limited)} checks hold." + (
        f" {reported} more numbers are reported only." if reported else ""
    )


def _figures(rows: list[dict[str, Any]], facts: Mapping[str, Any]) -> Iterable[tuple[str, str, str]]:
    """Yield the key figures as (label, value, note)."""
    yield from _psnr_cost(rows)
    if "int8_mac_share" in facts:
        yield "In INT8", f"{100 * facts['int8_mac_share']:.1f} %", "of the convolutions' multiply-adds"
    if programs := facts.get("programs"):
        yield "Size", megabytes(sum(programs.values())), ", ".join(sorted(programs))
    if latency := facts.get("latency_ms"):
        note = f"median of {latency['runs']} runs; p95 {number(latency['p95'])} ms"
        place = facts.get("measured_on", {})
        keys = [key for key in ("tile", "runtime", "threads", "machine") if key in place]
        note += "".join(f"; {place[key]}" for key in keys)
        yield "Latency on the build machine" if place else "Latency", f"{number(latency['median'])} ms", note
        beside = facts.get("latency_beside", {})
        for name, sentence in describe_beside(latency, beside).items():
            yield f"Latency, {name}", f"{number(beside[name])} ms", sentence


def _notice(weights: str) -> str:
    """Return a warning to read before the numbers, or the empty string."""
    if not weights.startswith("not trained"):
        return ""
    return (
        f"The network is {weights}. Its pictures and predictions mean nothing; the changes by deployment do."
    )


def _histograms(facts: Mapping[str, Any]) -> Iterable[tuple[str, str, list[tuple[float, float]]]]:
    """Yield (title, note, columns) of each histogram of margins; a column is two heights in percent."""
    tables = {**facts.get("decisions", {}), **facts.get("routes", {})}
    for name, table in tables.items():
        if not isinstance(table, dict) or "changed" not in table:
            continue
        tallest = math.sqrt(max(table["all"])) or 1.0
        columns = []
        for count, changed in zip(table["all"], table["changed"], strict=True):
            height = 100 * math.sqrt(count) / tallest
            red = height * changed / count if count else 0.0
            columns.append((height - red, red))
        note = f"{sum(table['changed'])} of {sum(table['all'])} decisions changed"
        yield name.replace("_", " "), note, columns


def _psnr_cost(rows: list[dict[str, Any]]) -> Iterable[tuple[str, str, str]]:
    """Yield the largest PSNR drop from float to device among the conditions of both."""
    psnr = {(r["between"], r["metric"]): float(r["value"]) for r in rows if r["metric"].startswith("psnr_db")}
    drops = [
        (psnr["float:truth", metric] - device, metric, psnr["float:truth", metric], device)
        for (between, metric), device in psnr.items()
        if between == "device:truth" and math.isfinite(psnr.get(("float:truth", metric), math.nan) - device)
    ]
    if drops:
        drop, metric, before, after = max(drops)
        condition = metric.partition("[")[2].rstrip("]")
        note = f"PSNR {before:.2f} → {after:.2f} dB" + (f", at worst: {condition}" if condition else "")
        yield "Quality lost", f"{drop:.2f} dB", note


def _groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = dict.fromkeys(row["between"] for row in rows)
    return [
        {
            "between": between,
            "question": QUESTIONS.get(between.replace(" ", ""), ""),
            "rows": [_row(row) for row in rows if row["between"] == between],
        }
        for between in order
    ]


def _row(row: dict[str, Any]) -> dict[str, Any]:
    name, _, condition = row["metric"].partition("[")
    unit = next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), "")
    signs = {"at_least": "≥", "at_most": "≤"}
    value = float(row["value"])
    # Four digits could show a failed value as equal to its limit.
    shown = number(value, digits=4 if row["passed"] else 8)
    if unit == "dB" and row["passed"] and 1 <= abs(value) < math.inf:
        shown = f"{value:.2f}"
    word = "failed" if not row["passed"] else "passed" if row["limit"] else "reported"
    return {
        "between": row["between"],
        "metric": name,
        "condition": condition.rstrip("]"),
        "value": f"{shown} {unit}".rstrip(),
        "limit": ", ".join(f"{signs[key]} {number(float(limit))}" for key, limit in row["limit"].items()),
        "samples": row["samples"],
        "word": word,
    }


def _by_reason(float_nodes: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    nodes: dict[str, list[str]] = {}
    for entry in float_nodes:
        nodes.setdefault(entry["reason"], []).append(entry["node"])
    return nodes


def _sections(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterable[tuple[str, dict[str, str]]]:
    """Yield (heading, {name: value}) of the origin of the numbers."""
    tensors = {
        f"{kind} {spec['name']}": f"{spec['dtype']}, {TIMES.join(map(str, spec['shape']))}; {spec['meaning']}"
        for kind in ("input", "output")
        for spec in manifest.get(f"{kind}s", [])
    }
    yield "Inputs and outputs", tensors
    yield "Forms", _texts(manifest.get("forms", {}))
    counted = {k: v for k, v in facts.get("routes", {}).items() if not isinstance(v, dict)}
    yield "Routing", _texts({**manifest.get("routing", {}), **counted})
    yield "Calibration", _texts(facts.get("calibration", {}))
    yield "Generated kernels, their deviation from the mean kernel", _kernels(facts)
    yield "Check build with TensorRT", _texts(facts.get("check_build", {}))
    yield "Tool versions", _texts(manifest.get("versions", {}))
    yield "Weights", _texts({"from": facts["weights"]} if "weights" in facts else {})
    yield "Digests", _texts(manifest.get("digests", {}))
    yield "Further facts", _texts({key: facts[key] for key in sorted(set(facts) - _FACTS_SHOWN)})


def _kernels(facts: Mapping[str, Any]) -> dict[str, str]:
    """Describe how far each generated kernel depends on the image."""
    return {
        name: f"{seen['spread']:.0%} of its rms; {seen['between_images']:.0%} from image to image"
        for name, seen in facts.get("generated_kernels", {}).items()
    }


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: _text(values[name]) for name in sorted(values)}  # as a manifest on disk has them


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    return (
        value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False, default=str, sort_keys=True)
    )
