"""The refusals of edgedyn, each with the exit code of the command line.

    0    ok
    1    a check failed, a bundle is not as its manifest says, or images of a batch failed
    2    wrong usage, recipe, weights or image, or an existing file is in the way
    3    a target, device or package is not available here
    4    the network or a layer is not supported
    5    the calibration images are refused
    70   a fault of edgedyn
    130  interrupted by Ctrl-C, 129 and 143 by SIGHUP and SIGTERM; no partial file is left

A message names the fault, the value found, the value expected, and the next step. Any other exception from a
public function is a bug of edgedyn.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path

MAX_LINE = 2000  # characters of a line of a message; longer ones hold data, not words
_UNSAFE = re.compile(  # characters that move a cursor, hide text, turn its direction, or have no encoding
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e0fff]"
)


class EdgedynError(Exception):
    """A refusal with its reason; ``exit_code`` is the exit status of the command line.

    Its text is safe to print: control characters are escaped, a long line is cut.
    """

    exit_code = 2

    def __str__(self) -> str:
        """Return the message, safe to print."""
        return "\n".join(map(_shorten, printable(super().__str__()).split("\n")))


def _shorten(line: str) -> str:
    """Cut the middle out of a line that is too long: the reason and the next step stand at the end."""
    if len(line) <= MAX_LINE:
        return line
    return f"{line[: MAX_LINE // 2]}... ({len(line)} characters) ...{line[-MAX_LINE // 2 :]}"


class CheckFailedError(EdgedynError):
    """A check ran and its limit was not met."""

    exit_code = 1


class BundleError(EdgedynError):
    """A bundle is not as its manifest says."""

    exit_code = 1


class RecipeError(EdgedynError):
    """A recipe has an unknown key, a wrong value, or names something that does not exist."""


class WeightsError(EdgedynError):
    """A weights file is missing, unsafe, damaged, or does not fit the network."""


class ImageError(EdgedynError):
    """A file is not a readable image, or an image cannot go through this bundle."""


class UsageError(EdgedynError):
    """A command or function is used wrongly, or a file exists already or cannot be written."""


class TrainingError(EdgedynError):
    """Training cannot start or continue."""


class TargetMissingError(EdgedynError):
    """A target, device or optional package is not available here."""

    exit_code = 3


class ModelError(EdgedynError):
    """A network or a layer has a structure or a shape that is not supported."""

    exit_code = 4


class NoFormError(ModelError):
    """No form of an op runs on the target."""


class CalibrationError(EdgedynError):
    """Calibration or validation images are refused."""

    exit_code = 5


def printable(text: str) -> str:
    r"""Return text with control characters escaped as Python does, ``\x1b``; line breaks and tabs stay."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def shown(value: object, most: int = 80) -> str:
    """Return the ``repr`` of a value of a user for a message, cut to about ``most`` characters.

    Of large lists and mappings only the first entries are read, so that nothing grows with the value.
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most
    short.maxlist = short.maxtuple = short.maxset = short.maxdict = 20
    try:
        text = short.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} of too many digits"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'? `` for the known name most like ``name``, or the empty string.

    Case does not count, and the last part of a dotted name is enough: ``conv3`` finds ``body.conv3``.
    """
    name, names = name[:200], list(known)  # the search is quadratic
    lowered = {candidate.lower(): candidate for candidate in reversed(names)}
    lowered = {candidate.lower().rpartition(".")[2]: candidate for candidate in reversed(names)} | lowered
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f"did you mean {lowered[near[0]]!r}? " if near else ""


def quote(error: BaseException) -> str:
    """Return type and first line of a foreign exception, and the user's line that it came from.

    ``RuntimeError: my config is missing (at net.py:7: raise RuntimeError("my config is missing"))``. The
    user's line is the innermost one outside of Python's own library, installed packages and edgedyn; without
    any, the innermost outside of torch.
    """
    first = next(iter(str(error).strip().splitlines()), "")
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    frames = [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames = [(error.filename or "", error.lineno, (error.text or "").strip())]
        text = f"SyntaxError: {error.msg}"
    return text + _place(frames)


def place_of(stack: str) -> str:
    """Return `` (at file:line: code)`` for the user's line in a stack as torch keeps it, or nothing."""
    frames = re.findall(r'File "(.+?)", line (\d+), in .*\n(?: *(.*))?', stack)
    return _place([(file, int(number), line) for file, number, line in frames])


def _place(frames: Sequence[tuple[str, int | None, str | None]]) -> str:
    """Return the user's line among (file, number, code) of a stack, outermost first."""
    library = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), str(Path(__file__).parent), "<")
    users = [frame for frame in frames if not frame[0].startswith(library)]
    others = [f for f in frames if "/torch/" not in f[0].replace("\\", "/") and not f[0].startswith("<")]
    if not users and not others:
        return ""
    file, number, line = (users or others)[-1]
    return f" (at {file}:{number}: {line})"
