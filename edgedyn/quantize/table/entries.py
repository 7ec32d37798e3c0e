"""What a calibration table holds: tensors, layers by what INT8 costs, and what the network decided.

Each is JSON with the sha256 of its own values, so that one edited by hand is found and named. Standard
library and numpy only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgedyn.quantize.observe.histogram import Histogram

Kind = Literal["weight", "feature", "kernel", "decision"]


@dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
        name: layer and operator that it comes from.
        kind: weight, feature map, generated kernel, or what a decision is made of.
        histogram: of all its values on the calibration samples.
        estimator: how its range was found.
        affine: (scale, zero point) for runtimes of affine activations; None for weights and decisions.
        symmetric: scale where the zero point is 0.
        channels: scales of a weight, one an output channel; of another tensor whose channels were scaled, the
            factors of the product: what each channel's, or tap's, step is of the tensor's where a layer wrote
            it, and the other way round where one reads it.
        spread: of a generated kernel: how far it depends on content, and how far on the image as a whole, see
            ``edgedyn.quantize.rescale.generated``.
    """

    name: str
    kind: Kind
    histogram: Histogram
    estimator: str = ""
    affine: tuple[float, int] | None = None
    symmetric: float | None = None
    channels: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()

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
        return sealed(values)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Entry:
        """Read what ``to_json`` gives; KeyError, TypeError or ValueError for anything else."""
        affine = values["affine"]
        return cls(
            values["name"],
            values["class"],
            Histogram.from_json(values["histogram"]),
            values["estimator"],
            None if affine is None else (float(affine[0]), int(affine[1])),
            values["symmetric"],
            tuple(values["channels"]),
            tuple(values["spread"]),
        )


@dataclass(frozen=True)
class LayerCost:
    """What INT8 costs in one layer.

    Attributes:
        layer: its name.
        share: of all multiply-adds.
        sqnr_db: its output's power over that of its error where all layers are INT8.
        gain_db: PSNR that comes back where this layer alone is float, at the noise level that loses most.
    """

    layer: str
    share: float
    sqnr_db: float
    gain_db: float


@dataclass(frozen=True)
class Point:
    """One choice: how many layers are float, the share that is INT8, and the PSNR that this costs, dB."""

    layers: int
    int8_share: float
    drop_db: float


@dataclass(frozen=True)
class Precision:
    """What was measured to choose, and what was chosen.

    Attributes:
        layers: the INT8 layers in the order in which they become float.
        curve: drop against INT8 share, the most INT8 first.
        kept: the chosen float layers.
        drop_db: of what was chosen, its weights rounded for it.
    """

    layers: tuple[LayerCost, ...]
    curve: tuple[Point, ...]
    kept: tuple[str, ...] = ()
    drop_db: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        values = asdict(self)
        return {name: list(x) if isinstance(x, tuple) else x for name, x in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Precision:
        """Read what ``to_json`` gives."""
        layers = tuple(LayerCost(**layer) for layer in values["layers"])
        curve = tuple(Point(**point) for point in values["curve"])
        return cls(layers, curve, tuple(values["kept"]), values["drop_db"])


@dataclass(frozen=True)
class Outcome:
    """One thing that a network can decide, and how many calibration samples it decided so.

    Attributes:
        decision: ``variant``, ``mask`` (active anywhere) or ``density`` (active share of all masks).
        name: of the variant, the layer with the mask, or the band, ``25-50%``; of masks in a variant its name
            and a colon stand in front.
        taken: samples that take it.
        samples: all of them.
        needed: samples that the recipe demands; 0 where it only reports.
        least: smallest density of a mask.
        most: largest density of a mask.
    """

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
