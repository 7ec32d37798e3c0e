"""Write the report page of an existing bundle again, from the numbers in the bundle.

Only the page itself holds the pictures, so they are copied from the old page. Where the old page is damaged
or missing, the new one has no pictures.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from edgedyn.bundle.bundle import Bundle, add_files, open_bundle
from edgedyn.bundle.manifest import refusal
from edgedyn.errors import BundleError, EdgedynError
from edgedyn.files import staging_folder
from edgedyn.reading import TextError, read_json
from edgedyn.report import FILE, insert_layers, write_report

_PICTURES = re.compile(r"<!-- pictures -->.*?<!-- end of pictures -->", re.DOTALL)
_LAYERS = "int8:float"  # the row of `edgedyn bench --per-layer`, which brings its own section


def rewrite_report(path: str | Path) -> bool:
    """Write ``report.html`` of a bundle again; return whether it has the pictures of the build.

    Raises:
        BundleError: if another file of the bundle does not verify.
        UsageError: if the bundle cannot be written.
    """
    path = Path(path)
    bundle = open_bundle(path, rebuilt={FILE})
    pictures = _PICTURES.search(_whole_page(bundle))
    stored = read_values(path, "report.json")
    with staging_folder(path.resolve()) as staging:
        page = staging / FILE
        try:
            text = _render(bundle, staging, stored)
        except (EdgedynError, OSError):
            raise
        except Exception as error:  # numbers of another shape fail anywhere in the page
            problem = f"{type(error).__name__}, {error}"
            raise refusal(path, "report.json", problem, "rows and facts of a build") from error
        if pictures:
            text = _PICTURES.sub(lambda _: pictures[0], text)
        page.write_text(text, encoding="utf-8")
        add_files(bundle, [page])
    return pictures is not None


def _render(bundle: Bundle, staging: Path, stored: dict[str, Any]) -> str:
    """Return the page, without pictures."""
    files = sorted(set(bundle.programs.values()))
    sizes = {name: bundle.manifest["files"][name]["size"] for name in files}
    write_report(
        staging,
        title=bundle.manifest["name"],
        ok=bundle.ok,
        rows=[row for row in stored["rows"] if row["between"] != _LAYERS],
        manifest=bundle.manifest,
        pictures=[],
        facts={**bundle.manifest["facts"], "programs": sizes},
    )
    text = (staging / FILE).read_text(encoding="utf-8")
    for row in stored["rows"]:
        if row["between"] == _LAYERS:
            text = insert_layers(text, read_values(bundle.path, "bench.json"), row)
    return text


def read_values(path: Path, name: str) -> dict[str, Any]:
    """Return the values of a JSON file of the bundle in ``path``.

    Raises:
        BundleError: when it is missing or no JSON object.
    """
    try:
        values = read_json(path / name)
    except (OSError, TextError) as error:
        raise refusal(path, name, str(error), "a file of JSON") from error
    if not isinstance(values, dict):
        raise refusal(path, name, type(values).__name__, "an object of JSON")
    return values


def _whole_page(bundle: Bundle) -> str:
    """Return the page that stands in a bundle, or the empty string where it does not verify."""
    try:
        open_bundle(bundle.path)
        return (bundle.path / FILE).read_text(encoding="utf-8")
    except (BundleError, OSError):
        return ""
