"""Calibrate one program as often as something is tried: other layers in float, another method."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, fx

from edgedyn.quantize.ablation import ablate
from edgedyn.quantize.calibrate import (
    Calibrated,
    Observed,
    Progress,
    observe_program,
    refuse_samples,
    round_program,
)
from edgedyn.quantize.plan import Plan
from edgedyn.quantize.precision import Exam, Rounded, choose_precision
from edgedyn.targets import Int8Scheme

if TYPE_CHECKING:
    from edgedyn.recipe_sections import QuantizeSection


@dataclass(frozen=True)
class Trials:
    """What every calibration of a program has in common.

    Attributes:
        module: the folded float program; left as it is.
        plan: says by a section, for a copy of the module, which layers are INT8 but for those that are named.
        scheme: how the target annotates INT8.
        samples: calibration inputs.
        finetuning: inputs for training and judging weights; without any, the samples.
        sources: where each sample comes from, then each of ``finetuning``, for errors.
        generated: names of the tensors that are generated kernels.
        progress: called with (what is done, steps done, steps in all).
        vivid: so many of the samples, the last ones, are only there for ranges to hold them.
    """

    module: fx.GraphModule
    plan: Callable[[QuantizeSection, fx.GraphModule, Sequence[str]], Plan]
    scheme: Int8Scheme
    samples: Sequence[tuple[Tensor, ...]]
    finetuning: Sequence[tuple[Tensor, ...]]
    sources: Sequence[str]
    generated: Collection[str]
    progress: Progress
    vivid: int = 0

    def observe(self, section: QuantizeSection) -> tuple[fx.GraphModule, Observed]:
        """Return the program, equalized, with the ranges of its tensors."""
        module = copy.deepcopy(self.module)
        observed = observe_program(
            module,
            section=section,
            samples=self.samples,
            sources=self.sources,
            generated=self.generated,
            progress=self.progress,
        )
        return module, observed

    def round(
        self, section: QuantizeSection, module: fx.GraphModule, observed: Observed, kept: Sequence[str] = ()
    ) -> Rounded:
        """Round the weights of an observed program, which is left as it is."""
        made = copy.deepcopy(module)
        plan = self.plan(section, made, kept)
        calibrated = round_program(
            made,
            plan,
            observed,
            scheme=self.scheme,
            section=section,
            samples=self.samples[: len(self.samples) - self.vivid],
            finetuning=self.finetuning,
            progress=self.progress,
        )
        return Rounded(made, plan, self.scheme, calibrated)


def calibrate(trials: Trials, section: QuantizeSection, exam: Exam | None) -> Calibrated:
    """Calibrate a program by the recipe's section; with an exam, measure what INT8 costs and keep its limit.

    Raises:
        CalibrationError: without samples, or for a sample that brings NaN or infinite values.
        CheckFailedError: when the exam's limits leave no choice.
    """
    if trials.finetuning:
        refuse_samples(trials.finetuning, trials.sources[len(trials.samples) :])
    module, observed = trials.observe(section)

    def attempt(kept: Sequence[str]) -> Rounded:
        return trials.round(section, module, observed, kept)

    if exam is None:
        return attempt(()).calibrated
    rounded = choose_precision(module, attempt, exam, trials.progress) if exam.by_layer else attempt(())
    chosen = rounded.calibrated
    if not exam.ablates:
        return chosen

    def make(other: QuantizeSection) -> Rounded:
        return trials.round(other, *trials.observe(other), chosen.kept)

    return replace(chosen, ablation=ablate(trials.module, make, section, exam, rounded, trials.progress))
