"""Build every recipe and write down what came of it; resumable: a recipe with a result is passed over.

    python tools/build_all.py --out docs/measurements/builds.json [PATTERN ...]

A result holds the verdict, the rows that failed, sizes, forms, and for INT8 the share of multiply-adds.
"""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import measurement
import typer

ROOT = Path(__file__).parents[1]
app = typer.Typer(add_completion=False)


@app.command()
def main(
    patterns: Annotated[list[str] | None, typer.Argument(help="recipe names, * matches any part")] = None,
    out: Path = ROOT / "docs/measurements/builds.json",
    again: Annotated[bool, typer.Option(help="build also what has a result")] = False,
) -> None:
    results = json.loads(out.read_text())["builds"] if out.is_file() else {}
    names = sorted(path.name.removesuffix(".yaml") for path in (ROOT / "recipes").glob("*.yaml"))
    for name in names:
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in patterns or ["*"])
        if not wanted or (name in results and not again) or needs_weights(name):
            continue
        results[name] = build(name)
        measurement.write(out, {"builds": dict(sorted(results.items()))})
        print(f"{'ok    ' if results[name]['ok'] else 'FAILED'} {name}", flush=True)
    raise typer.Exit(0 if all(result["ok"] for result in results.values()) else 1)


def needs_weights(name: str) -> bool:
    """Whether the recipe is of a published network, whose weights are not here."""
    return name.startswith("ffdnet")


def build(name: str) -> dict[str, Any]:
    """Build one recipe in a process of its own."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("edgedyn")), "build", f"recipes/{name}.yaml"]
        done = subprocess.run(
            [*command, "-o", f"{folder}/bundle", "--json"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
    seconds = round(time.perf_counter() - start, 1)
    if done.returncode not in (0, 1) or not done.stdout:
        return {"ok": False, "exit": done.returncode, "error": done.stderr[-600:], "seconds": seconds}
    printed = json.loads(done.stdout)
    rows = printed["rows"]
    return {
        "ok": printed["ok"],
        "stages": sorted({row["between"] for row in rows}),
        "failed": [row for row in rows if not row["passed"]],
        "forms": printed["forms"],
        "int8_mac_share": printed["int8_mac_share"],
        "program_bytes": sum(
            size for file, size in printed["files"].items() if file.endswith((".pte", ".onnx"))
        ),
        "latency_ms": printed["latency_ms"],
        "seconds": seconds,
    }


if __name__ == "__main__":
    app()
