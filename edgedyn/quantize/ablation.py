"""What each part of the method is worth: INT8 made again for every switch, set otherwise, and its drop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from edgedyn.quantize.calibrate import Progress
from edgedyn.quantize.generated import find_generating
from edgedyn.quantize.precision import Exam, Measured, Rounded

if TYPE_CHECKING:
    from edgedyn.recipe_sections import QuantizeSection

AS_IT_IS = "as the recipe says"
# what may take the place of the recipe's value, by dotted key
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
    make: Callable[[QuantizeSection], Rounded],
    section: QuantizeSection,
    exam: Exam,
    rounded: Rounded,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, float]:
    """Return the PSNR drop at the worst noise level of the method, and with one switch changed at a time, dB.

    Args:
        module: the folded float program.
        make: calibrates it by a section.
        section: the recipe's.
        exam: images with truths.
        rounded: by the method as it is.
        progress: called with (what is done, steps done, steps in all).
    """
    tried = {}
    names = [entry.name for entry in rounded.calibrated.entries if entry.kind == "kernel"]
    has_kernels = bool(find_generating(module, names))  # what float operators write is float in any case
    for key, values in _SWITCHES.items():
        for value in values if has_kernels or key != "generated" else ():
            other = _change(section, key, value)
            if other != section:
                tried[f"{key}: {str(value).lower() if isinstance(value, bool) else value}"] = other
    before, measured = exam.float_psnr_db(module), rounded.calibrated.precision
    found = {AS_IT_IS: measured.drop_db if measured else exam.drop_db(before, rounded)}

    def drop(other: QuantizeSection) -> Measured:
        return {"drop_db": exam.drop_db(before, make(other))}

    for done, (name, other) in enumerate(tried.items()):
        progress("ablate", done, len(tried))
        method = other.model_dump_json(exclude={"table", "max_drop_db"})
        found[name] = exam.recall(f"ablation {method}", functools.partial(drop, other))["drop_db"]
    progress("ablate", len(tried), len(tried))
    return found


def _change(section: QuantizeSection, key: str, value: Any) -> QuantizeSection:
    name, _, inner = key.partition(".")
    changed = getattr(section, name).model_copy(update={inner: value}) if inner else value
    return section.model_copy(update={name: changed})
