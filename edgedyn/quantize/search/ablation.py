"""Ablation: calibrate again with one switch of the method changed at a time, and measure the PSNR drop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from edgedyn.quantize.plan import Int8Method
from edgedyn.quantize.progress import Progress, silent
from edgedyn.quantize.rescale.generated import find_generating
from edgedyn.quantize.search.precision import EvaluationSet, Measured, Rounded

if TYPE_CHECKING:
    from edgedyn.recipe.keys import QuantizeSection

AS_IT_IS = "as the recipe says"
# values that may replace the recipe's, by dotted key
_SWITCHES: dict[str, tuple[Any, ...]] = {
    "equalize": (False, True),
    "equalize_dense": (3.0, 32.0),
    "equalize_outputs": (False, True),
    "equalize_inputs": (False, True),
    "rounding": ("nearest", "reconstruct"),
    "bias_correction": ("none", "fast", "full"),
    "generated": ("float", "tensor", "tap"),
    "bn_reestimation": (False, True),
    "dynamic": ([],),
    "finetune": (0,),
    "ranges.feature": ("minmax", "percentile", "mse", "entropy"),
    "ranges.weight": ("minmax", "mse"),
}


@torch.no_grad()
def ablate(
    module: fx.GraphModule,
    calibrate_by: Callable[[Int8Method], Rounded],
    method: Int8Method,
    evaluation: EvaluationSet,
    before: Measured,
    rounded: Rounded,
    progress: Progress = silent,
) -> dict[str, float]:
    """Return the PSNR drop at the worst noise level, dB: of the method, and with each switch changed alone.

    Args:
        module: the folded float program.
        calibrate_by: ``calibrate_by(method)`` calibrates the program by another method.
        method: the method of the recipe.
        evaluation: images with truths.
        before: PSNR of the float program by noise level, dB, from ``EvaluationSet.float_psnr_db``.
        rounded: the program in INT8 by the method as it is.
        progress: called with (phase, steps done, steps of the phase).
    """
    methods = {}
    names = [entry.name for entry in rounded.calibrated.entries if entry.kind == "kernel"]
    has_kernels = bool(find_generating(module, names))  # the outputs of float operators are float in any case
    for key, values in _SWITCHES.items():
        for value in values if has_kernels or key != "generated" else ():
            other = _change(method.section, key, value)
            if other != method.section:
                methods[f"{key}: {str(value).lower() if isinstance(value, bool) else value}"] = other
    measured = rounded.calibrated.precision
    drops = {AS_IT_IS: measured.drop_db if measured else evaluation.drop_db(before, rounded)}

    def drop(other: QuantizeSection) -> Measured:
        return {"drop_db": evaluation.drop_db(before, calibrate_by(replace(method, section=other)))}

    for done, (name, other) in enumerate(methods.items()):
        progress("ablate", done, len(methods))
        keys = other.model_dump_json(exclude={"table", "max_drop_db"})
        drops[name] = evaluation.remember(f"ablation {keys}", functools.partial(drop, other))["drop_db"]
    progress("ablate", len(methods), len(methods))
    return drops


def _change(section: QuantizeSection, key: str, value: Any) -> QuantizeSection:
    name, _, inner = key.partition(".")
    changed = getattr(section, name).model_copy(update={inner: value}) if inner else value
    return section.model_copy(update={name: changed})
