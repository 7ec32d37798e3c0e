"""Write the report page of an existing bundle again, from the numbers in the bundle.

Only the page itself holds the pictures, so they are copied from the old page. Where the old page is damaged
or missing, the new one has no pictures.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from edgedyn.bundle.bundle import Bundle, add_files, open_bundle, staging_folder
from edgedyn.errors import BundleError
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
    stored = json.loads((path / "report.json").read_text(encoding="utf-8"))
    files = sorted(set(bundle.programs.values()))
    sizes = {name: bundle.manifest["files"][name]["size"] for name in files}
    with staging_folder(path) as staging:
        page = staging / FILE
        write_report(
            staging,
            title=bundle.manifest["name"],
            ok=bundle.ok,
            rows=[row for row in stored["rows"] if row["between"] != _LAYERS],
            manifest=bundle.manifest,
            pictures=[],
            facts={**bundle.manifest["facts"], "programs": sizes},
        )
        text = page.read_text(encoding="utf-8")
        if pictures:
            text = _PICTURES.sub(lambda _: pictures[0], text)
        for row in stored["rows"]:
            if row["between"] == _LAYERS:
                values = json.loads((path / "bench.json").read_text(encoding="utf-8"))
                text = insert_layers(text, values, row)
        page.write_text(text, encoding="utf-8")
        add_files(bundle, [page])
    return pictures is not None


def _whole_page(bundle: Bundle) -> str:
    """Return the page that stands in a bundle, or the empty string where it does not verify."""
    try:
        open_bundle(bundle.path)
        return (bundle.path / FILE).read_text(encoding="utf-8")
    except (BundleError, OSError):
        return ""
