"""Runs of every program of a build on the validation samples."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from edgedyn import ops
from edgedyn.bundle.dispatch import Decision, Dispatcher
from edgedyn.conversion.convert import Converted
from edgedyn.conversion.reference import rewrite
from edgedyn.graph.rewrites import to_float64_like
from edgedyn.layers import parts
from edgedyn.quantize.progress import Progress
from edgedyn.report.rows import Row
from edgedyn.validation import stages as validate
from edgedyn.validation.stages import Outputs

if TYPE_CHECKING:
    from edgedyn.images.image_set import Sample
    from edgedyn.recipe.recipe import Recipe
    from edgedyn.targets import Run


_EXACT_SAMPLES = 1  # float64 comparison of whole networks; the rewrite does not depend on the image


def exactness_rows(converted: Converted, outputs: Outputs, recipe: Recipe) -> list[Row]:
    """Prove the rewrite in float64: reference, canonical and decomposed network on real images.

    The first row says what float32 costs this network: it bounds what comparing programs can show.
    """
    wide = copy.deepcopy(converted.reference).double()
    canonical = rewrite(wide, converted.capacities)
    decomposed = {}
    for name, module in parts(canonical).items():
        made = converted.parts[name]
        program = ops.decompose(made.decomposed, made.forms, "after_quantize")
        decomposed[name] = in_torch(to_float64_like(program, module), torch.float64)
    # every float32 row is judged by it; other precisions cost far more than it
    judged = outputs.samples if recipe.precision == "fp32" else outputs.samples[:_EXACT_SAMPLES]
    exact = validate.run_wide(in_torch(wide, torch.float64), judged)
    rounding = validate.rounding_row(exact, outputs.decomposed[: len(exact)])
    return [
        rounding,
        *validate.rewrite_rows(
            exact[:_EXACT_SAMPLES],
            in_torch(canonical, torch.float64),
            Dispatcher(decomposed, converted.routing),
            outputs.samples[:_EXACT_SAMPLES],
            validate.at_least_rounding(recipe.limits.exact, rounding.value, np.float64),
        ),
    ]


def in_torch(module: nn.Module, dtype: torch.dtype) -> Run:
    """Return a module as a target's ``run``: numpy arrays in and out, computed in ``dtype``."""

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            y = module(*(torch.from_numpy(np.ascontiguousarray(x)).to(dtype) for x in arrays))
        outputs = y if isinstance(y, tuple | list) else (y,)
        return [np.asarray((t if dtype == torch.float64 else t.float()).numpy()) for t in outputs]

    return run


def run_samples(
    converted: Converted, device: Dispatcher, samples: list[Sample], recipe: Recipe, progress: Progress
) -> Outputs:
    """Run decomposed, quantized and lowered programs on every validation sample."""
    half = recipe.precision == "fp16"
    parts_of = converted.parts.items()
    decomposed = {name: in_torch(p.decomposed.module(), torch.float32) for name, p in parts_of}
    dtype = torch.float16 if half else torch.float32
    quantized = {name: in_torch(p.program.module(), dtype) for name, p in parts_of}
    dispatchers = {
        "decomposed": Dispatcher(decomposed, converted.routing),
        "quantized": Dispatcher(quantized, converted.routing),
        "device": device,
    }
    outputs: dict[str, list[np.ndarray]] = {}
    decided: dict[str, list[Decision | None]] = {}
    for done, (name, dispatcher) in enumerate(dispatchers.items(), 1):
        kind = np.float16 if half and name == "device" else np.float32
        results = validate.run_all(dispatcher, samples, name, kind)
        outputs[name], decided[name] = [y for y, _ in results], [d for _, d in results]
        progress("validate", done, len(dispatchers))
    return Outputs(samples, **outputs, decided=decided, dispatchers=dispatchers)
