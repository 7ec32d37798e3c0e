"""``edgedyn report``: the HTML page of a bundle, written again."""

from __future__ import annotations

from edgedyn.cli.options import AsJson, BundlePath, Verbosity
from edgedyn.cli.terminal import print_json, result, warn


def report(bundle: BundlePath, as_json: AsJson = False, verbose: Verbosity = None) -> None:
    """Write report.html again from the numbers in the bundle, for instance with a newer edgedyn."""
    from edgedyn.report.stored import rewrite_report

    has_pictures = rewrite_report(bundle)
    page = bundle / "report.html"
    if not has_pictures:
        warn(f"{page} has no pictures: the old page, which held them, is lost. To see them, build again.")
    if as_json:
        print_json({"ok": True, "report": str(page), "pictures": has_pictures})
    else:
        result(str(page))
