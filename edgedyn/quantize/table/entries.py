"""Rows of a calibration table: tensors, the precision search, and the network's decisions.

Each row is JSON with the sha256 of its own values, so that the reader finds a row that was edited by hand.
``read_row`` checks the type of every value: a digest only proves who wrote last.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from edgedyn.quantize.observe.histogram import MOST_BINS, Histogram

Kind = Literal["weight", "feature", "kernel", "decision"]
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Positive = Annotated[float, Field(gt=0)]
_Row = TypeVar("_Row")


class _HistogramRow(BaseModel):
    model_config = STRICT
    low: float
    high: float
    step: _Positive
    first: Annotated[int, Field(ge=-(2**53), le=2**53)]
    counts: Annotated[list[Annotated[int, Field(ge=0, le=2**53)]], Field(min_length=1, max_length=MOST_BINS)]


class _EntryRow(BaseModel):
    model_config = STRICT
    name: str
    kind: Kind = Field(alias="class")
    histogram: _HistogramRow
    estimator: str
    affine: tuple[_Positive, Annotated[int, Field(ge=-128, le=127)]] | None
    symmetric: _Positive | None
    channels: tuple[float, ...]
    spread: tuple[float, ...]
    note: str = ""


def read_row(row: Mapping[str, Any], kind: type[_Row]) -> _Row:
    """Return a row of JSON values as its class.

    Raises:
        ValueError: for a missing or unknown value, or one of another type; the message names it.
    """
    try:
        read: _Row = _adapter(kind).validate_json(json.dumps(row))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "a row"
        raise ValueError(f"{where}: {problem['msg']}") from error
    return read


_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


@dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
        name: dotted path of the layer, and the tensor's part in it, for instance ``body.0.output``.
        kind: weight, feature map, generated kernel, or logits of a decision.
        histogram: of all its values on the calibration samples.
        estimator: range estimator, see ``edgedyn.quantize.observe.ranges``.
        affine: (scale, zero point) for runtimes of affine activations; None for weights and decisions.
        symmetric: scale for runtimes whose zero point is 0.
        channels: of a weight, one scale per output channel; of a rescaled activation, the per-channel factors
            of its rescale Mul.
        spread: of a generated kernel, two shares of its rms: the spread over all positions, and the spread
            between images, see ``edgedyn.quantize.rescale.generated``.
        note: for readers of the report; empty but for a layer that was not calibrated as the recipe says.
    """

    name: str
    kind: Kind
    histogram: Histogram
    estimator: str = ""
    affine: tuple[float, int] | None = None
    symmetric: float | None = None
    channels: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    note: str = ""

    def __repr__(self) -> str:
        """Return one line; the values are in the fields."""
        channels = f", {len(self.channels)} channels" if self.channels else ""
        return f"Entry({self.name}: {self.kind}, {self.estimator or 'no range'}{channels}, {self.histogram})"

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, with the digest of all others."""
        values: dict[str, Any] = {
            "name": self.name,
            "class": self.kind,
            "estimator": self.estimator,
            "affine": None if self.affine is None else list(self.affine),
            "symmetric": self.symmetric,
            "channels": list(self.channels),
            "spread": list(self.spread),
            "histogram": self.histogram.to_json(),
        }
        return sealed(values | ({"note": self.note} if self.note else {}))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Entry:
        """Return the entry of JSON values from ``to_json``; ValueError for others."""
        row = read_row({name: x for name, x in values.items() if name != "sha256"}, _EntryRow)
        return cls(**{**dict(row), "histogram": Histogram.from_json(dict(row.histogram))})


@dataclass(frozen=True)
class LayerCost:
    """The cost of INT8 in one layer, or in the layers of a block, which are INT8 together.

    Attributes:
        layer: its name; of a block the first layer's.
        share: its share of all multiply-adds.
        sqnr_db: power of its output over that of the error, with all layers in INT8.
        gain_db: PSNR gained with this layer alone in float, at the noise level with the largest drop.
    """

    __pydantic_config__ = STRICT

    layer: str
    share: float
    sqnr_db: float
    gain_db: float


@dataclass(frozen=True)
class Point:
    """One choice of the search: number of float layers, INT8 share of multiply-adds, and PSNR drop in dB."""

    __pydantic_config__ = STRICT

    layers: int
    int8_share: float
    drop_db: float


@dataclass(frozen=True)
class Precision:
    """Result of the precision search.

    Attributes:
        layers: the INT8 layers in the order in which the search makes them float.
        curve: PSNR drop against INT8 share, the most INT8 first.
        kept: the chosen float layers.
        drop_db: PSNR drop of this choice, with weights rounded for it.
    """

    __pydantic_config__ = STRICT

    layers: tuple[LayerCost, ...] = field(repr=False)
    curve: tuple[Point, ...] = field(repr=False)
    kept: tuple[str, ...] = ()
    drop_db: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        values = asdict(self)
        return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Precision:
        """Return the precision of JSON values from ``to_json``."""
        return read_row(values, cls)


@dataclass(frozen=True)
class Outcome:
    """One outcome of a decision, and the number of calibration samples with this outcome.

    Attributes:
        decision: ``variant``, ``mask`` (active anywhere) or ``density`` (active share of all masks).
        name: of the variant, the layer with the mask, or the band, ``25-50%``. For masks in a variant, the
            name of the variant and a colon stand in front.
        taken: number of samples with this outcome.
        samples: number of all samples.
        needed: number of samples that the recipe requires; 0 where it only reports.
        least: smallest density of a mask.
        most: largest density of a mask.
    """

    __pydantic_config__ = STRICT

    decision: str
    name: str
    taken: int
    samples: int
    needed: int = 0
    least: float | None = None
    most: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, with the digest of all others."""
        return sealed(asdict(self))


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Return values with their digest."""
    return {**values, "sha256": digest(values)}


def digest(values: Mapping[str, Any]) -> str:
    """Return 16 digits of the sha256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
