"""How the files of ``golden/`` that hold ACDA are computed by our reference and its canonical counterpart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgedyn.checkpoints.authors import from_authors
from edgedyn.layers import canonicalize


def compute_layer(golden: Any) -> dict[str, Tensor]:
    """Compute y, and of the reference also alpha, the features Z and the first sample's kernels."""
    layer = from_authors(golden.official, golden.constructor, golden.parameters)
    x = golden.inputs["x"]
    with torch.no_grad():
        alpha = layer.coefficients(x)
        return {
            "y": layer(x),
            "y@canonical": canonicalize(layer)(x),
            "mid.alpha": alpha,
            "mid.bases_out": layer.features(x, alpha),
            "mid.atoms_sample0": torch.einsum("bmkhw, kt -> bmthw", alpha[:1], layer.bases),
        }


RULES = {"Conv_DCFD.Conv_DCFD": compute_layer}
