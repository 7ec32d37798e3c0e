"""The calibration table: histograms and quantization parameters of every tensor, as a text file.

    NAME.json               the key, the image set, and the tensors of each program, one per line
    NAME.json.safetensors   beside it, where calibration changed weights or biases: their new values

A table fits one key: network, graph, forms, images, transform, method and versions. Each tensor's line
has its own sha256, so that the reader finds and names a tensor that was edited by hand; another sha256 covers
the key and the list of all lines.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edgedyn.errors import CalibrationError, UsageError, shown
from edgedyn.files import replace_files
from edgedyn.quantize.table.entries import STRICT, Entry, Outcome, Precision, digest, read_row, sealed
from edgedyn.reading import read_bytes, read_json

FORMAT = 4
_MAX_BYTES = 2**31  # of weights
_AGAIN = "Calibrate again: edgedyn calibrate RECIPE -o FILE"


class _Table(BaseModel):
    """The outline of a table; its rows are checked one by one, so that an error names the row."""

    model_config = STRICT
    format: int
    key: dict[str, Any]
    images: dict[str, Any]
    constants: str
    precision: dict[str, dict[str, Any]]
    ablation: dict[str, dict[str, float | str]]
    coverage: list[dict[str, Any]]
    programs: dict[str, list[dict[str, Any]]]
    sha256: str


@dataclass(frozen=True)
class CalibrationTable:
    """The calibration of all programs of a network.

    Attributes:
        key: network, graph, forms, images, transform, method and versions that the table fits.
        images: name, licence and files of the calibration set.
        programs: program -> its tensors in the order of its graph.
        constants: ``program/tensor`` -> new value of a weight or bias: float32, or int8 values of a weight
            whose scales are in its entry.
        precision: program -> result of the precision search, where it ran.
        ablation: program -> PSNR drop by change of the method, dB, where it was measured.
        coverage: number of samples per outcome of the network's decisions.
    """

    key: Mapping[str, Any]
    images: Mapping[str, Any]
    programs: Mapping[str, tuple[Entry, ...]]
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)
    precision: Mapping[str, Precision] = field(default_factory=dict)
    ablation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    coverage: tuple[Outcome, ...] = ()

    def __repr__(self) -> str:
        """Return one line with counts; the values are in the fields."""
        tensors = sum(map(len, self.programs.values()))
        return (
            f"CalibrationTable({self.images.get('name', 'no set')}: {len(self.programs)} programs, "
            f"{tensors} tensors, {len(self.constants)} changed constants)"
        )

    def mismatch(self, key: Mapping[str, Any]) -> str:
        """Describe the first field in which another key differs; empty where none does."""
        for name in {**self.key, **key}:
            table, recipe = self.key.get(name), key.get(name)
            if table != recipe:
                other = "other" if name.endswith("s") else "another"
                return f"is of {other} {name}: {_difference(table, recipe)}"
        return ""

    def refuse_other(self, key: Mapping[str, Any], path: Path) -> None:
        """Refuse the table for a recipe with another key.

        Args:
            key: key of the recipe.
            path: file of the table, for the error.

        Raises:
            CalibrationError: naming the first field that differs, with both values.
        """
        mismatch = self.mismatch(key)
        if mismatch:
            raise CalibrationError(
                f"calibration table {path} {mismatch}. {_AGAIN}, or pass --force to use it as it is; the "
                "report will say so."
            )

    def write(self, path: Path) -> None:
        """Write the table, and its constants beside it.

        An interruption leaves the old table, the new one, or none; never a table beside another table's
        constants.
        """
        weights = save({name: np.ascontiguousarray(x) for name, x in sorted(self.constants.items())})
        beside = _beside(path)
        head = {
            "format": FORMAT,
            "key": dict(self.key),
            "images": dict(self.images),
            "constants": hashlib.sha256(weights).hexdigest() if self.constants else "",
            "precision": {name: sealed(p.to_json()) for name, p in self.precision.items()},
            "ablation": {name: sealed(dict(drops)) for name, drops in self.ablation.items()},
        }
        coverage = [outcome.to_json() for outcome in self.coverage]
        programs = {name: [entry.to_json() for entry in entries] for name, entries in self.programs.items()}
        head["sha256"] = _whole({**head, "coverage": coverage, "programs": programs})
        outcomes = ",".join(f"\n  {json.dumps(row)}" for row in coverage)
        lines = [json.dumps(head, indent=1)[:-2] + f',\n "coverage": [{outcomes}],\n "programs": {{']
        for number, (program, entries) in enumerate(programs.items()):
            rows = ",\n".join(f"   {json.dumps(row)}" for row in entries)
            comma = "," if number + 1 < len(programs) else ""
            lines.append(f"  {json.dumps(program)}: [\n{rows}\n  ]{comma}")
        text = "\n".join([*lines, " }\n}\n"]).encode()
        replace_files({beside: weights, path: text} if self.constants else {path: text})
        if not self.constants:
            beside.unlink(missing_ok=True)


def read_table(path: Path) -> CalibrationTable:
    """Read a table and verify every digest in it.

    Raises:
        CalibrationError: when it is missing, damaged, of another format, or edited, naming the tensor.
    """
    try:
        values = read_json(path)
        if values["format"] != FORMAT:
            raise CalibrationError(
                f"calibration table {path} has format {shown(values['format'])}; this version reads "
                f"{FORMAT}. {_AGAIN}."
            )
        read_row(values, _Table)
        whole, programs = _whole(values), {}
        for program, rows in values["programs"].items():
            for row in rows:
                label = f"the entry {row.get('name')!r} of program {program!r}"
                _refuse_edited(path, row, label, "The recipe sets ranges (quantize.ranges)")
            programs[program] = tuple(Entry.from_json(row) for row in rows)
        for program, row in values["precision"].items():
            label = f"the precision of program {program!r}"
            _refuse_edited(path, row, label, "The recipe keeps layers float (quantize.keep_float)")
        precision = {name: Precision.from_json(row) for name, row in values["precision"].items()}
        for program, row in values["ablation"].items():
            _refuse_edited(path, row, f"the ablation of program {program!r}", "It is measured, never written")
        for row in values["coverage"]:
            label = f"the coverage of {row.get('decision')} {row.get('name')!r}"
            _refuse_edited(path, row, label, "The recipe sets the required samples (quantize.coverage)")
        if values["sha256"] != whole:
            raise CalibrationError(
                f"calibration table {path}: its key, its images or its list of tensors was edited: the "
                f"sha256 of all is {whole}, the table says {values['sha256']}. {_AGAIN}."
            )
        coverage = tuple(read_row(row, Outcome) for row in values["coverage"])
        constants = _read_constants(_beside(path), values["constants"])
        key, images, ablation = values["key"], values["images"], values["ablation"]
        return CalibrationTable(key, images, programs, constants, precision, ablation, coverage)
    except OSError as error:
        raise CalibrationError(
            f"calibration table {path} cannot be read ({error.strerror}). {_AGAIN}."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CalibrationError(
            f"calibration table {path} is damaged ({type(error).__name__}: {error}). {_AGAIN}."
        ) from error


def refuse_place(path: Path) -> None:
    """Refuse a path that no table can be written to, before a long calibration.

    Raises:
        UsageError: when it names no JSON file, or its folder does not exist.
    """
    if path.suffix != ".json":
        raise UsageError(
            f"a calibration table is a JSON file, found {path}. Give it a name that ends in .json."
        )
    if not os.path.isdir(path.absolute().parent):
        raise UsageError(f"calibration table {path}: there is no folder {path.parent}. Make it first.")


def _beside(path: Path) -> Path:
    """Return the path of a table's constants: a name that no other file is likely to have."""
    return path.with_name(f"{path.name}.safetensors")


def _whole(values: Mapping[str, Any]) -> str:
    """Return the digest of a table's key and list of rows, which the digests of the rows do not cover."""
    rows = {
        "precision": {name: row["sha256"] for name, row in values["precision"].items()},
        "ablation": {name: row["sha256"] for name, row in values["ablation"].items()},
        "coverage": [row["sha256"] for row in values["coverage"]],
        "programs": {name: [row["sha256"] for row in rows] for name, rows in values["programs"].items()},
    }
    return digest({name: values[name] for name in ("format", "key", "images", "constants")} | rows)


def _refuse_edited(path: Path, row: dict[str, Any], label: str, instead: str) -> None:
    """Remove the digest from a row of a table, and refuse a row that does not match it."""
    stored = row.pop("sha256")
    if digest(row) != stored:
        raise CalibrationError(
            f"calibration table {path}: {label} was edited: its sha256 is {digest(row)}, expected {stored}. "
            f"{instead}. {_AGAIN}."
        )


def _read_constants(path: Path, expected: str) -> dict[str, np.ndarray]:
    if not expected:
        return {}
    data = read_bytes(path, _MAX_BYTES)
    actual = hashlib.sha256(data).hexdigest()
    if actual != expected:
        raise CalibrationError(
            f"{path}, the weights of a calibration table, has sha256 {actual}; the table says {expected}. "
            f"{_AGAIN}."
        )
    try:
        return dict(load(data))
    except SafetensorError as error:
        raise CalibrationError(f"{path} is not a safetensors file: {error}. {_AGAIN}.") from error


def _difference(table: Any, recipe: Any) -> str:
    """Describe the difference of two values of a field; of dictionaries, only the first key that differs."""
    if isinstance(table, dict) and isinstance(recipe, dict):
        part = next(name for name in {**table, **recipe} if table.get(name) != recipe.get(name))
        return f"{part} was {table.get(part)!r}, now {recipe.get(part)!r}"
    return f"it was {table!r}, now {recipe!r}"
