"""``edgedyn run`` on a bundle that predicts: classes or keypoints of each image, printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedyn.cli.terminal import ERR, exit_unless, print_json, progress_bars, result
from edgedyn.errors import EdgedynError

if TYPE_CHECKING:
    from edgedyn.device.session import Session


def print_predictions(session: Session, sources: Sequence[str], *, recursive: bool, as_json: bool) -> None:
    """Predict each image, and print the classes or keypoints; a file that cannot be read stops no other one.

    Raises:
        EdgedynError: of the image, where there is only one; exit code 1 where one of several fails.
    """
    from edgedyn.device.files import STDIN, find_images, read_stdin
    from edgedyn.device.predictions import predict

    images = [image for image, _ in find_images(sources, Path(STDIN), recursive=recursive)]

    found: list[dict[str, Any]] = []
    failed: list[EdgedynError] = []
    with progress_bars() as advance:
        for done, image in enumerate(images, 1):
            try:
                found.append(predict(session, image, read_stdin() if str(image) == STDIN else None))
            except EdgedynError as error:
                if len(images) == 1:
                    raise
                failed.append(error)
                values = {"type": type(error).__name__, "message": str(error)}
                found.append({"image": str(image), "error": values})
            advance("images", done, len(images))
    if as_json:
        print_json({"ok": not failed, "images": found})
    else:
        for prediction in found:
            _print(prediction)
    for reason in failed:
        ERR.print(f"failed: {reason}", soft_wrap=True)
    exit_unless(not failed)


def _print(prediction: dict[str, Any]) -> None:
    if "error" not in prediction:
        result(prediction["image"])
    for seen in prediction.get("classes", ()):
        result(f"  {seen['probability']:6.1%}  {seen.get('name', seen['index'])}")
    for seen in prediction.get("keypoints", ()):
        result(f"  {seen['index']:3}  x {seen['x']:.1f}  y {seen['y']:.1f}  score {seen['score']:.3f}")
