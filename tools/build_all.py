"""Build every recipe and record the results; resumable.

    python tools/build_all.py [--workers 2] [--out docs/measurements/builds.json] [PATTERN ...]

A result holds the verdict, the failed rows, sizes, forms, and the INT8 share of multiply-adds. A recipe whose
result has the same sources is skipped.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
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
    workers: Annotated[int, typer.Option(help="parallel builds, of one thread each if several")] = 1,
    again: Annotated[bool, typer.Option(help="build recipes with an up-to-date result, too")] = False,
) -> None:
    results = json.loads(out.read_text())["builds"] if out.is_file() else {}
    names = sorted(path.name.removesuffix(".yaml") for path in (ROOT / "recipes").glob("*.yaml"))
    selected = [
        name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns or ["*"])
    ]
    selected = [name for name in selected if not needs_weights(name)]
    if not selected:
        raise typer.BadParameter(f"no recipe matches {patterns}; there are {', '.join(names)}")
    sources = {name: digest(name) for name in selected}
    due = [name for name in selected if again or results.get(name, {}).get("sources") != sources[name]]
    with ThreadPoolExecutor(workers) as pool:
        builds = {pool.submit(build, name, threads=1 if workers > 1 else None): name for name in due}
        for done in as_completed(builds):
            name = builds[done]
            results[name] = {**done.result(), "sources": sources[name]}
            measurement.write(out, {"builds": dict(sorted(results.items()))})
            print(f"{'ok    ' if results[name]['ok'] else 'FAILED'} {name}", flush=True)
    raise typer.Exit(0 if all(results[name]["ok"] for name in selected) else 1)


def needs_weights(name: str) -> bool:
    """Tell whether the recipe needs published weights, which this project does not include."""
    return name.startswith(("ffdnet", "dncnn-gray"))


def digest(name: str) -> str:
    """Return a short hash of everything that determines a build: package, recipe, image sets, weights."""
    files = [ROOT / f"recipes/{name}.yaml"]
    files += sorted(path for path in (ROOT / "edgedyn").rglob("*") if path.suffix in (".py", ".html"))
    files += sorted(
        path
        for folder in ("calib", "recipes/weights")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    )
    content = hashlib.sha256()
    for path in files:
        content.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return content.hexdigest()[:12]


def build(name: str, threads: int | None = None) -> dict[str, Any]:
    """Build one recipe in a process of its own, by default with as many threads as the machine has."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).with_name("edgedyn")), "build", f"recipes/{name}.yaml"]
        done = subprocess.run(
            [*command, "-o", f"{folder}/bundle", "--no-compare", "--json"],
            cwd=ROOT,
            env={**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})},
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
        "seconds": seconds,
    }


if __name__ == "__main__":
    app()
