"""The recipe's network, its capacities, and its rewrite on our ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from edgedyn.checkpoints.weights import settle_norms
from edgedyn.conversion.contract import load_network
from edgedyn.errors import CalibrationError, EdgedynError, ModelError, quote
from edgedyn.layers import RoutedModel, canonicalize

if TYPE_CHECKING:
    from edgedyn.recipe.recipe import Recipe


def rewrite(reference: nn.Module, capacities: dict[str, int] | None) -> nn.Module:
    """Rewrite a network on our ops; with capacities, as a capacity variant and a dense one."""
    canonical = canonicalize(reference)
    if capacities is None:
        return canonical
    from edgedyn.layers.dynconv.capacity import with_capacity

    return RoutedModel(None, {"capacity": with_capacity(canonical, capacities), "dense": canonical})


def load_reference(recipe: Recipe, drawn: Sequence[tuple[Tensor, ...]], *, trust: bool = False) -> nn.Module:
    """Return the recipe's network; without weights, its BatchNorm statistics come from real images.

    Raises:
        EdgedynError: as ``contract.load_network`` and ``settle``.
    """
    reference = load_network(recipe, trust=trust).model
    settle(recipe, reference, drawn)
    return reference


def settle(recipe: Recipe, reference: nn.Module, drawn: Sequence[tuple[Tensor, ...]]) -> bool:
    """Set the BatchNorm statistics of a network without weights from real images, in place.

    Returns:
        Whether there were any to set.

    Raises:
        CalibrationError: when it needs images and the recipe names no set.
        ModelError: when the network cannot run on them.
    """
    has_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in reference.modules())
    if recipe.is_trained or not has_norms:
        return False
    if not drawn:
        raise CalibrationError(
            f"recipe {recipe.name!r} has no weights, so its BatchNorm takes its statistics from images, and "
            "it names no calibration set. Set calibration: to a manifest in calib/, or give it model.weights."
        )
    batch = tuple(torch.cat(images) for images in zip(*drawn, strict=True))
    try:
        try:
            settle_norms(reference, batch)
        except EdgedynError:
            raise
        except Exception:  # a network that mixes its weights may take one image only
            settle_norms(reference, *drawn)
    except EdgedynError:
        raise
    except Exception as error:  # the network's own, of any kind
        raise ModelError(
            f"{type(reference).__name__} cannot take BatchNorm statistics from images "
            f"{[tuple(x.shape) for x in drawn[0]]}: {quote(error)}. Give the recipe trained weights "
            "(model.weights)."
        ) from error
    return True


def count_capacities(
    reference: nn.Module, drawn: Sequence[tuple[Tensor, ...]], quantile: float | None
) -> dict[str, int] | None:
    """Return layer -> quantile of its active positions, or None for a recipe without ``route.capacity``.

    Raises:
        CalibrationError: when there are no images.
    """
    if quantile is None:
        return None
    from edgedyn.layers.dynconv.capacity import capacities_of

    if not drawn:
        raise CalibrationError(
            "route.capacity is a quantile of active positions on the calibration set, and the recipe names "
            "none. Set calibration: to a manifest in calib/."
        )
    return capacities_of(canonicalize(reference), [inputs[0] for inputs in drawn], quantile)
