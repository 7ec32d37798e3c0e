"""The page recipes/README.md: the recipes by network, with their measured numbers beside them.

tools/make_docs.py writes it. Numbers come from docs/measurements/: builds.json (INT8 share, program size),
bench.json (latency), int8-*.json (PSNR drop).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MEASUREMENTS = ROOT / "docs/measurements"
_PRECISIONS = {"fp32": "float32", "fp16": "float16", "int8": "INT8"}
_VARIANT = re.compile(r" (ExecuTorch|TensorRT), (float32|float16|INT8)\.$")
_HEAD = """# Recipes

<!-- written by tools/make_docs.py from the recipes and docs/measurements/; do not edit -->

Every name works in each command, from any folder: `edgedyn build mallenet-s.phone.int8 -o out`. The recipes
of one network differ in target, precision and quantization ([all keys](../docs/recipe.md)).

* **INT8**: share of the convolutions' multiply-adds that runs in INT8. **Program**: size of its files. Both
  are from [builds.json](../docs/measurements/builds.json).
* **ms**: median latency of one 320 x 480 image, from [bench.json](../docs/measurements/bench.json).
* **PSNR drop**: float32 minus INT8, per noise level, on the test images that the linked file names. Phone
  recipes ran in ExecuTorch, Jetson recipes in ONNX Runtime on the host.

All numbers are of x86 machines; each file states machine, versions and command. A dash: not measured.
"""


def recipes_page(folder: Path = ROOT / "recipes") -> str:
    """Return the text of recipes/README.md: one section with one table per network."""
    networks: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.yaml")):
        networks.setdefault(path.name.partition(".")[0], []).append(path)
    page = [_HEAD.rstrip()]
    for network, paths in networks.items():
        page += [f"\n## {network}\n", _summary(paths[0]), ""]
        page.append("| recipe | INT8 | ms | program | PSNR drop |\n|---|---|---|---|---|")
        page += [_row(path.stem) for path in sorted(paths, key=_phone_first)]
    return "\n".join(page) + "\n"


def _phone_first(path: Path) -> tuple[bool, str]:
    return ".phone." not in path.name, path.name


def _summary(path: Path) -> str:
    """Return the comments at the head of a recipe, without schema, target and precision."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.removeprefix("# ") for line in lines[1 : lines.index(f"name: {path.stem}")]]
    return " ".join([_VARIANT.sub("", comments[0]), *comments[1:]])


def _row(name: str) -> str:
    network, target, precision, *kernels = name.split(".")
    built = _read("builds")["builds"].get(name, {})
    share = built.get("int8_mac_share")
    drop, measured_share = _drop(name)
    cells = [
        f"[{name}]({name}.yaml)",
        _percent(share if share is not None else measured_share),
        _latency(network, " ".join([_PRECISIONS[precision], *kernels])) if target == "phone" else "-",
        f"{built['program_bytes'] / 2**20:.2f} MB" if built else "-",
        drop,
    ]
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}".replace("%", " %")


def _latency(network: str, variant: str) -> str:
    """Return the latency in milliseconds of a phone recipe; published networks are measured by short name."""
    program = f"ExecuTorch {variant}"
    rows = {row["what"]: row["median_ms"] for row in _read("bench")["rows"] if row["size"] == "320x480"}
    names = [f"{name}, {program}" for name in (network, network.removesuffix("-color"))]
    return next((f"{rows[name]:g}" for name in names if name in rows), "-")


def _drop(name: str) -> tuple[str, float | None]:
    """Return the PSNR drop of a recipe with a link to its file, and the INT8 share there."""
    for path in sorted(_MEASUREMENTS.glob("int8-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["recipe"] != name:
            continue
        found = record["results"]["INT8"]
        drops = {key.rpartition("=")[2].rstrip("]"): found[key] for key in found if key.startswith("drop_db")}
        values = ", ".join(f"{value}" for value in drops.values())
        link = path.relative_to(ROOT).as_posix()
        (kind,) = {key.partition("[")[2].partition("=")[0] for key in found if key.startswith("drop_db")}
        return f"[{values} dB](../{link}) at {kind} {', '.join(drops)}", found["int8_mac_share"]
    return "-", None


def _read(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((_MEASUREMENTS / f"{name}.json").read_text(encoding="utf-8"))
    return record
