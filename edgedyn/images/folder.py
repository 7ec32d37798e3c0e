"""The images of a folder, with the clean photo or the class of each, found by stated rules.

    pairs     two files whose paths differ only in one word: noisy - clean, noisy - gt, real - mean,
              a/x_noisy.png - a/x_clean.png, noisy/x.png - clean/x.png; or x.png in a folder of clean photos
    classes   one subfolder per class, in sorted order as torchvision's ImageFolder has them; or a CSV file
              of file,class in the folder: ``labels.csv``
    photos    anything else: the images that lie in the folder itself

A word is bounded by / _ - . or a space, in upper or lower case. A folder in which only some files pair up is
refused, since a clean and a noisy photo would count as two scenes.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgedyn.errors import CalibrationError, nearest, shown
from edgedyn.images.noise import FOLDER_NOISE, NO_NOISE, NoiseSection
from edgedyn.images.pixels import SUFFIXES
from edgedyn.reading import TextError, read_text

LABELS = "labels.csv"
_WORDS = {"noisy": ("clean", "gt"), "real": ("mean",)}
_WORD = re.compile(r"(?<![^/_\-. ])(noisy|real)(?![^/_\-. ])", re.IGNORECASE)


@dataclass(frozen=True)
class FolderImage:
    """One image of a folder.

    Attributes:
        path: the file.
        clean: the same scene without noise.
        label: index of its class.
    """

    path: Path
    clean: Path | None = None
    label: int | None = None


@dataclass(frozen=True)
class Listing:
    """The images of a folder, in sorted order.

    Attributes:
        images: at least one.
        classes: class names in the order of the logits; empty for photos, and for labels that are indices.
        noise: ``real`` for pairs, none for labelled photos, else ``FOLDER_NOISE``.
    """

    images: tuple[FolderImage, ...]
    classes: tuple[str, ...] = ()
    noise: NoiseSection = FOLDER_NOISE


def list_folder(folder: Path, beside: Path | None = None, classes: Sequence[str] = ()) -> Listing:
    """List the images of a folder.

    Args:
        folder: the folder.
        beside: a folder of clean photos, of the same names as the noisy ones but for the suffix; or a CSV
            file of file,class. By default the rules above decide.
        classes: names of all classes in the order of the logits; by default those of the folder or the CSV
            file, sorted.

    Raises:
        CalibrationError: when there is no image, files do not pair up, a class is unknown, or the CSV file is
            not one of file,class.
    """
    if beside is not None and not os.path.exists(beside):
        raise CalibrationError(f"{beside}: found no such file or folder. Check the path.")
    if beside is not None and os.path.isdir(beside):
        return Listing(tuple(_clean_of(folder, beside)), noise=NoiseSection(kind="real"))
    if beside is not None or (folder / LABELS).is_file():
        rows = list(_rows(beside or folder / LABELS, folder))
        if not classes and all(_is_index(label) for _, label in rows):
            return _with_labels(rows, int, ())
        return _labelled(folder, rows, classes)
    top, deep = _images_in(folder, "*"), _images_in(folder, "*/**/*")
    if pairs := _pairs(folder, top) or _pairs(folder, deep):
        return Listing(tuple(pairs), noise=NoiseSection(kind="real"))
    if top:
        return Listing(tuple(FolderImage(path) for path in top))
    if not deep:
        raise CalibrationError(
            f"image folder {folder} holds no image ({len(list(folder.iterdir()))} other entries); "
            f"expected files with a suffix of {', '.join(sorted(SUFFIXES))}, or one folder per class. "
            "Put images there or name another folder."
        )
    # ImageFolder's numbers count folders without images too
    folders = [path.name for path in folder.iterdir() if path.is_dir() and not _is_hidden(path, folder)]
    rows = [(path, path.relative_to(folder).parts[0]) for path in deep]
    return _labelled(folder, rows, classes, folders)


def _images_in(folder: Path, pattern: str) -> list[Path]:
    found = (path for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if path.is_file() and not _is_hidden(path, folder))


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _clean_of(folder: Path, clean: Path) -> Iterator[FolderImage]:
    """Yield each image with the one of its name in the folder of clean photos."""
    by_stem: dict[str, list[Path]] = {}
    for path in _images_in(clean, "*"):
        by_stem.setdefault(path.stem, []).append(path)
    noisy = _images_in(folder, "*")
    lacks = [path.name for path in noisy if len(by_stem.get(path.stem, ())) != 1]
    if lacks or not noisy:
        raise CalibrationError(
            f"{len(lacks)} of {len(noisy)} images of {folder} have not exactly one clean photo of their name "
            f"in {clean}{_some(lacks)}. Give both the same name, or leave these out."
        )
    return (FolderImage(path, by_stem[path.stem][0]) for path in noisy)


def _pairs(folder: Path, paths: list[Path]) -> list[FolderImage]:
    """Return the noisy images with their clean ones; none where no two files pair up.

    Raises:
        CalibrationError: where only some do.
    """
    names = {_key(folder, path): path for path in paths}
    pairs = [FolderImage(path, clean) for path in paths if (clean := _partner(folder, path, names))]
    used = {path for pair in pairs for path in (pair.path, pair.clean)}
    alone = [path.relative_to(folder).as_posix() for path in paths if path not in used]
    if pairs and alone:
        raise CalibrationError(
            f"{len(pairs)} pairs of a noisy and a clean photo lie in {folder}, and {len(alone)} other "
            f"images{_some(alone)}. Move these, name the clean photos' folder, or write a manifest."
        )
    return pairs


def _partner(folder: Path, path: Path, names: dict[str, Path]) -> Path | None:
    key = _key(folder, path)
    for word in _WORD.finditer(key):
        for other in _WORDS[word[0]]:
            if partner := names.get(key[: word.start()] + other + key[word.end() :]):
                return partner
    return None


def _key(folder: Path, path: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix().lower()


def _rows(table: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Yield image and class of each line of a CSV file; the first line may be a header."""
    try:
        reader = csv.reader(io.StringIO(read_text(table), newline=""), strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader if any(line)]
    except (OSError, TextError, csv.Error) as error:
        raise CalibrationError(f"labels {table} cannot be read ({error}). Write CSV in UTF-8.") from error
    lines = [(number, line) for number, line in lines if any(line)]
    seen: set[str] = set()
    for number, line in lines:
        if number == lines[0][0] and [cell.lower() for cell in line[1:]] in (["class"], ["label"]):
            continue
        if fault := _fault(line, folder, seen):
            raise CalibrationError(
                f"labels {table}, line {number}: {shown(','.join(line)[:80])} {fault}; expected file,class "
                f"of each file in {folder} once. Fix this line."
            )
        yield folder / line[0], line[1]
    if not seen:
        raise CalibrationError(f"labels {table} name no image. Write lines of file,class.")


def _fault(line: Sequence[str], folder: Path, seen: set[str]) -> str:
    """Return the fault of a line of labels, or the empty string; its file is added to those seen."""
    if len(line) != 2 or not all(line):
        return "is no line file,class"
    if any(unicodedata.category(letter) == "Cc" for letter in line[1]):
        return "has a control character in the class"
    path = PurePosixPath(line[0])
    if path.is_absolute() or ".." in path.parts or not os.path.isfile(folder / path):
        return "names no file"
    if str(path) in seen:
        return "is listed twice"
    seen.add(str(path))
    return ""


def _is_index(label: str) -> bool:
    return label.isascii() and label.isdigit()


def _is_number(label: str) -> bool:
    try:
        return math.isfinite(float(label))
    except ValueError:
        return False


def _labelled(
    folder: Path, rows: list[tuple[Path, str]], classes: Sequence[str], folders: Sequence[str] = ()
) -> Listing:
    named = sorted({*(label for _, label in rows), *folders})
    if not classes and all(map(_is_index, named)):
        if sorted(named, key=int) == named:
            return _with_labels(rows, int, ())
        raise CalibrationError(
            f"the classes of {folder} are the numbers {', '.join(named[:4])}...: in sorted order, as "
            "ImageFolder has them, or by value? Name all classes in the order of the logits: classes: [...]."
        )
    if not classes and all(map(_is_number, named)):
        raise CalibrationError(
            f"the classes of {folder} are the numbers {', '.join(named[:4])}; expected whole numbers from 0, "
            "the indices of logits. Write them so, or name all classes in their order: classes: [...]."
        )
    names = list(classes) or named
    if unknown := [label for label in named if label not in names]:
        raise CalibrationError(
            f"{folder} has the class {unknown[0]!r}; {nearest(unknown[0], names)}expected one of "
            f"{len(names)} classes{_some(names)}. Fix the label, or the list of classes."
        )
    return _with_labels(rows, names.index, names)


def _with_labels(rows: list[tuple[Path, str]], number: Callable[[str], int], names: Sequence[str]) -> Listing:
    images = sorted(rows, key=lambda row: row[0])
    return Listing(
        tuple(FolderImage(path, label=number(label)) for path, label in images), tuple(names), NO_NOISE
    )


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
