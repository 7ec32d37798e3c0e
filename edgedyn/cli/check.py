"""``edgedyn check``: the hashes of a bundle, and its validation vectors on this machine."""

from __future__ import annotations

from edgedyn.cli.options import AsJson, BundlePath, Verbosity
from edgedyn.cli.tables import print_rows
from edgedyn.cli.terminal import detail, exit_unless, library_output, print_json, result


def check(bundle: BundlePath, as_json: AsJson = False, verbose: Verbosity = None) -> None:
    """Verify the hash of every file, then run the validation vectors on this machine."""
    from edgedyn.device import session

    with library_output():
        opened = session.open_session(bundle)
        report = session.check(opened)
    runtime = session.runtime_name(opened.bundle)
    if as_json:
        rows = [row.to_json() for row in report.rows]
        print_json({"ok": report.ok, "bundle": str(bundle), "runtime": runtime, "rows": rows})
    else:
        print_rows(report.rows)
        detail()
        result(f"{'ok' if report.ok else 'FAILED'}: {len(opened.bundle.manifest['files'])} files verified")
        detail(f"ran with {runtime}")
    exit_unless(report.ok)
