"""The samples that INT8 is judged on while its precision is chosen."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from edgedyn import extensions
from edgedyn.bundle.manifest import ROUTER
from edgedyn.conversion.image_sets import to_tensors
from edgedyn.errors import CalibrationError, RecipeError
from edgedyn.images.tasks import TASKS
from edgedyn.layers import part_inputs, parts
from edgedyn.quantize import EvaluationSet
from edgedyn.quantize.search.measurement_cache import MeasurementCache

if TYPE_CHECKING:
    from edgedyn.images.image_set import CalibrationSet
    from edgedyn.recipe.recipe import Recipe


_EXAM = 12  # samples that INT8 is judged on, once for each layer


def make_evaluation_sets(
    recipe: Recipe,
    images: CalibrationSet,
    canonical: nn.Module,
    key: Mapping[str, Any],
    *,
    by_layer: bool = True,
    ablates: bool = False,
) -> dict[str, EvaluationSet]:
    """Return what INT8 is judged on in each program that gives a picture, while its precision is chosen.

    The images are the calibration set's, with other crops and other noise than those that are observed.

    Args:
        recipe: its ``max_drop_db`` is the limit.
        images: the calibration set.
        canonical: the network, which says what each of its parts is given.
        key: of the calibration table: what is measured belongs to it, whatever the limit.
        by_layer: whether what each layer costs is measured.
        ablates: whether each switch of the method is tried the other way.

    Raises:
        CalibrationError: for a set without truth.
        RecipeError: for a task without truth.
    """
    task = TASKS[recipe.task]
    asked = "what INT8 costs (quantize.max_drop_db, --sensitivity, --ablation) is PSNR against the truth, and"
    if not task.has_truth:
        raise RecipeError(
            f"{asked} the task {recipe.task!r} has none. Choose float layers by quantize.keep_float; "
            "limits.sqnr_db is what is demanded of the outputs."
        )
    if not images.has_truth:
        raise CalibrationError(
            f"{asked} calibration set {images.name!r} has noisy photos without clean ones. Add clean: to the "
            "manifest, or choose by quantize.keep_float."
        )
    fresh = images.fresh(1).draw(recipe.input_shapes(), task)
    drawn = list(itertools.islice(fresh, _EXAM))
    given = [part_inputs(canonical, to_tensors(sample)) for sample in drawn]
    method = {**key["method"], "max_drop_db": None}
    facts = json.dumps({**key, "method": method, "target": recipe.target, "kernels": recipe.kernels})
    sources = [*sorted(Path(__file__).parents[1].rglob("*.py")), *extensions.files()]
    return {
        name: EvaluationSet(
            [x[name] for x in given],
            [sample.truth for sample in drawn],
            [sample.condition for sample in drawn],
            recipe.quantize.max_drop_db,
            recipe.limits.int8_share,
            by_layer,
            ablates,
            MeasurementCache(name + facts, sources),
        )
        for name in parts(canonical)
        if name != ROUTER
    }
