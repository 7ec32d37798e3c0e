"""The calibration table: of every tensor what calibration saw, and the INT8 steps that follow. A text file.

    NAME.json               the key, the image set, and for each program its tensors, one a line
    NAME.json.safetensors   beside it, where calibration changed weights or biases: their new values

A table belongs to what its key says: network, graph, forms, images, transform, method, versions. Each tensor
has the sha256 of its own line, so that one edited by hand is found and named; so have the key and the list of
all lines. Standard library, numpy and safetensors only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edgedyn.errors import CalibrationError, UsageError
from edgedyn.files import replace_files
from edgedyn.quantize.table.entries import Entry, Outcome, Precision, digest, sealed

FORMAT = 4
_AGAIN = "Calibrate again: edgedyn calibrate RECIPE -o FILE"


@dataclass(frozen=True)
class CalibrationTable:
    """Everything that calibration found out.

    Attributes:
        key: what the table belongs to, by field.
        images: name, licence and files of the set.
        programs: program -> its tensors in the order of its graph.
        constants: ``program/tensor`` -> new value of a weight or bias: float32, or int8 codes of a weight
            whose scales are in its entry.
        precision: program -> which layers stay float because of what INT8 costs, where that was measured.
        ablation: program -> PSNR drop by what was changed in the method, dB, where that was measured.
        coverage: how often the samples take each outcome of what the network decides.
    """

    key: Mapping[str, Any]
    images: Mapping[str, Any]
    programs: Mapping[str, tuple[Entry, ...]]
    constants: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    precision: Mapping[str, Precision] = field(default_factory=dict)
    ablation: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    coverage: tuple[Outcome, ...] = ()

    def mismatch(self, key: Mapping[str, Any]) -> str:
        """Say which field of another key differs first, what the table has, what is wanted; else nothing."""
        for name in {**self.key, **key}:
            found, wanted = self.key.get(name), key.get(name)
            if found != wanted:
                other = "other" if name.endswith("s") else "another"
                return f"is of {other} {name}: {_difference(found, wanted)}"
        return ""

    def refuse_other(self, key: Mapping[str, Any], path: Path) -> None:
        """Refuse to be used for anything else than what it was made of.

        Raises:
            CalibrationError: naming the first field that differs, what the table has and what is wanted.
        """
        mismatch = self.mismatch(key)
        if mismatch:
            raise CalibrationError(
                f"calibration table {path} {mismatch}. {_AGAIN}, or pass --force to use it as it is; the "
                "report will say so."
            )

    def write(self, path: Path) -> None:
        """Write the table, and its constants beside it.

        Whoever interrupts this leaves the old table, the new one, or none: never one with other constants.
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
        CalibrationError: when it is missing, damaged, of another format, or edited: the tensor is named.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        if values["format"] != FORMAT:
            raise CalibrationError(
                f"calibration table {path} has format {values['format']}; this version reads {FORMAT}. "
                f"{_AGAIN}."
            )
        whole, programs = _whole(values), {}
        for program, rows in values["programs"].items():
            for row in rows:
                what = f"the entry {row.get('name')!r} of program {program!r}"
                _refuse_edited(path, row, what, "The recipe sets ranges (quantize.ranges)")
            programs[program] = tuple(Entry.from_json(row) for row in rows)
        for program, row in values["precision"].items():
            what = f"the precision of program {program!r}"
            _refuse_edited(path, row, what, "The recipe keeps layers float (quantize.keep_float)")
        precision = {name: Precision.from_json(row) for name, row in values["precision"].items()}
        for program, row in values["ablation"].items():
            _refuse_edited(path, row, f"the ablation of program {program!r}", "It is measured, never written")
        for row in values["coverage"]:
            what = f"the coverage of {row.get('decision')} {row.get('name')!r}"
            _refuse_edited(path, row, what, "The recipe says what is demanded (quantize.coverage)")
        if values["sha256"] != whole:
            raise CalibrationError(
                f"calibration table {path}: its key, its images or its list of tensors was edited: the "
                f"sha256 of all is {whole}, it says {values['sha256']}. {_AGAIN}."
            )
        coverage = tuple(Outcome(**row) for row in values["coverage"])
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
    """Refuse a path that no table can be written to: better before a calibration than after it.

    Raises:
        UsageError: when it names no JSON file, or its folder is not there.
    """
    if path.suffix != ".json":
        raise UsageError(
            f"a calibration table is a JSON file, found {path}. Give it a name that ends in .json."
        )
    if not path.absolute().parent.is_dir():
        raise UsageError(f"calibration table {path}: there is no folder {path.parent}. Make it first.")


def _beside(path: Path) -> Path:
    """Return where the constants of a table stand: under a name that nobody else gives a file."""
    return path.with_name(f"{path.name}.safetensors")


def _whole(values: Mapping[str, Any]) -> str:
    """Return the digest of what the rows of a table do not say: its key, and which rows there are."""
    rows = {
        "precision": {name: row["sha256"] for name, row in values["precision"].items()},
        "ablation": {name: row["sha256"] for name, row in values["ablation"].items()},
        "coverage": [row["sha256"] for row in values["coverage"]],
        "programs": {name: [row["sha256"] for row in rows] for name, rows in values["programs"].items()},
    }
    return digest({name: values[name] for name in ("format", "key", "images", "constants")} | rows)


def _refuse_edited(path: Path, row: dict[str, Any], what: str, instead: str) -> None:
    """Take the digest off a row of a table, and refuse a row that it does not fit."""
    given = row.pop("sha256")
    if digest(row) != given:
        raise CalibrationError(
            f"calibration table {path}: {what} was edited: its sha256 is {digest(row)}, it says {given}. "
            f"{instead}. {_AGAIN}."
        )


def _read_constants(path: Path, expected: str) -> dict[str, np.ndarray]:
    if not expected:
        return {}
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise CalibrationError(
            f"{path}, the weights of a calibration table, has sha256 {found}; the table says {expected}. "
            f"{_AGAIN}."
        )
    try:
        return dict(load(data))
    except SafetensorError as error:
        raise CalibrationError(f"{path} is not a safetensors file: {error}. {_AGAIN}.") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"the value {name} is not a number")


def _difference(found: Any, wanted: Any) -> str:
    """Say where two values of a field differ; in dictionaries the first part that does."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        part = next(name for name in {**found, **wanted} if found.get(name) != wanted.get(name))
        return f"{part} was {found.get(part)!r}, now {wanted.get(part)!r}"
    return f"it was {found!r}, now {wanted!r}"
