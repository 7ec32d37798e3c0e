"""Evaluation sets of the precision search: calibration images with fresh crops and noise."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from edgedyn import extensions
from edgedyn.bundle.manifest import ROUTER
from edgedyn.conversion.image_sets import draw_each, to_tensors
from edgedyn.errors import CalibrationError, RecipeError
from edgedyn.layers import part_inputs, parts
from edgedyn.quantize import EvaluationSet
from edgedyn.quantize.search.measurement_cache import MeasurementCache

if TYPE_CHECKING:
    from edgedyn.images.image_set import CalibrationSet
    from edgedyn.recipe.recipe import Recipe


_SAMPLES = 12  # the search runs them once per layer


def make_evaluation_sets(
    recipe: Recipe,
    images: CalibrationSet,
    canonical: nn.Module,
    key: Mapping[str, Any],
    *,
    by_layer: bool = True,
    ablates: bool = False,
) -> dict[str, EvaluationSet]:
    """Return the evaluation set of each program but the router.

    Calibration images with fresh crops and noise, on which the mixed-precision search is scored; never
    validation images.

    Args:
        recipe: its ``max_drop_db`` is the limit.
        images: the calibration set.
        canonical: the network; it computes the inputs of its parts.
        key: key of the calibration table. Cached measurements are valid for this key, with any
            ``max_drop_db``.
        by_layer: measure the cost of INT8 in each layer.
        ablates: measure the worth of each switch of the method.

    Raises:
        CalibrationError: for a set without truth.
        RecipeError: for a task without truth.
    """
    cost = "the cost of INT8 (quantize.max_drop_db, --sensitivity, --ablation) is PSNR lost against the truth"
    if not recipe.sampling.has_truth:
        raise RecipeError(
            f"{cost}, and the task {recipe.task!r} has none. Choose float layers by quantize.keep_float; "
            "limits.sqnr_db limits the error of the outputs."
        )
    if not images.has_truth:
        raise CalibrationError(
            f"{cost}, and calibration set {images.name!r} has noisy photos without clean ones. Add clean: to "
            "the manifest, or choose by quantize.keep_float."
        )
    drawn = list(itertools.islice(draw_each(recipe, images.fresh(1)), _SAMPLES))
    inputs = [part_inputs(canonical, to_tensors(sample)) for sample in drawn]
    method = {**key["method"], "max_drop_db": None}
    facts = json.dumps({**key, "method": method, "target": recipe.target, "kernels": recipe.kernels})
    sources = [*sorted(Path(__file__).parents[1].rglob("*.py")), *extensions.files()]
    return {
        name: EvaluationSet(
            [x[name] for x in inputs],
            [sample.truth for sample in drawn],
            [sample.condition for sample in drawn],
            recipe.quantize.max_drop_db,
            recipe.limits.int8_share,
            by_layer,
            ablates,
            MeasurementCache(name + facts, sources),
            recipe.output_spec("output", drawn[0].truth.shape).decode,
        )
        for name in parts(canonical)
        if name != ROUTER
    }
