"""``edgedyn run``: image files through a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edgedyn.cli.options import AsJson, BundlePath, Replace, Verbosity
from edgedyn.cli.predictions import print_predictions
from edgedyn.cli.terminal import ERR, exit_unless, library_output, print_json, progress_bars, result, warn
from edgedyn.errors import UsageError, printable

if TYPE_CHECKING:
    from edgedyn.device.files import Outcome
    from edgedyn.device.session import Session


def run(
    bundle: BundlePath,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="Image files of any size, folders, quoted patterns ('photos/*.jpg'), or - (standard input).",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            metavar="OUT",
            help="Folder for the results; for one image also a file, or - for standard output. Not for a "
            "bundle that predicts.",
        ),
    ] = None,
    recursive: Annotated[
        bool,
        typer.Option("--recursive", "-r", help="Take the folders in a folder too, and keep their places."),
    ] = False,
    noise_level: Annotated[
        float | None,
        typer.Option(
            metavar="SIGMA",
            help="Standard deviation of the images' noise, 0 to 255, for a network that takes it.",
        ),
    ] = None,
    force: Replace = False,
    as_json: AsJson = False,
    verbose: Verbosity = None,
) -> None:
    """Run images of any size through a bundle, in tiles without seams.

    Results that exist are kept, so that the same command continues an interrupted one. A file that cannot be
    read stops no other one; it is listed at the end, and the exit code is 1.

    A bundle of the task classify prints the five most probable classes of each image; one of keypoints prints
    their positions in the image's pixels.
    """
    from edgedyn.device.files import STDIN
    from edgedyn.device.predictions import makes_predictions
    from edgedyn.device.session import open_session

    if as_json and out == STDIN:
        raise UsageError("found --json and -o -, which both take standard output. Leave one of them out.")
    with library_output():
        opened = open_session(bundle)
    opened = opened if noise_level is None else opened.with_noise_level(noise_level)
    if not opened.bundle.ok:
        warn(f"checks of {bundle} failed when it was built; see its report.html")
    if makes_predictions(opened.bundle):
        if out is not None:
            raise UsageError(f"bundle {bundle} predicts, and writes no images. Leave -o out.")
        print_predictions(opened, images, recursive=recursive, as_json=as_json)
        return
    if out is None:
        raise UsageError(f"bundle {bundle} returns images. Name a folder for them: -o DIR.")
    _report(_run_images(opened, images, out, recursive=recursive, force=force), as_json=as_json)


def _run_images(
    session: Session, images: list[str], out: str, *, recursive: bool, force: bool
) -> list[Outcome]:
    from edgedyn.device import files

    with library_output(), progress_bars() as advance:
        jobs = files.plan(session, images, out, recursive=recursive)
        done: list[Outcome] = []

        advance("images", 0, len(jobs))

        def finish(outcome: Outcome) -> None:
            done.append(outcome)
            advance("images", len(done), len(jobs))

        files.run_jobs(
            session,
            jobs,
            force=force,
            progress=lambda job, tile, tiles: advance("tiles", tile, tiles),
            finished=finish,
        )
    return done


def _report(outcomes: list[Outcome], *, as_json: bool) -> None:
    from edgedyn.device.files import STDIN, THERE

    failed = [outcome for outcome in outcomes if outcome.error]
    if len(outcomes) == 1 and failed and failed[0].error:
        raise failed[0].error
    there = [outcome for outcome in outcomes if outcome.state == THERE]
    if as_json:
        files = [str(outcome.job.result) for outcome in outcomes if not outcome.error]
        print_json({"ok": not failed, "files": files, "images": [outcome.to_json() for outcome in outcomes]})
    else:
        for outcome in outcomes:
            if not outcome.error and str(outcome.job.result) != STDIN:
                result(str(outcome.job.result))
    for outcome in outcomes:
        for note in outcome.notes:
            ERR.print(printable(f"note: {outcome.job.image}: {note}"), soft_wrap=True)
    if there:
        them = "it" if len(there) == 1 else "them"
        were = "was" if len(there) == 1 else "were"
        ERR.print(
            f"{len(there)} of {len(outcomes)} {were} there already; --force writes {them} again.",
            soft_wrap=True,
        )
    if failed:
        ERR.print(f"{len(failed)} of {len(outcomes)} images failed:", style="bold red", soft_wrap=True)
        for outcome in failed:
            ERR.print(f"  {outcome.error}", soft_wrap=True)
    exit_unless(not failed)
