"""Calibrate one program: once by the recipe, and again for the precision search and the ablation."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, fx
from torch.export import ExportedProgram

from edgedyn.errors import CalibrationError, TargetMissingError
from edgedyn.quantize.calibrated import Calibrated
from edgedyn.quantize.fold import fold
from edgedyn.quantize.observe.program import Observed, observe_program
from edgedyn.quantize.plan import Int8Method, blocks_of
from edgedyn.quantize.progress import Progress, silent
from edgedyn.quantize.rounding.program import round_program
from edgedyn.quantize.search.ablation import ablate
from edgedyn.quantize.search.precision import EvaluationSet, Rounded, choose_precision

if TYPE_CHECKING:
    from edgedyn.recipe.keys import QuantizeSection


@dataclass(frozen=True)
class CalibrationInputs:
    """The inputs that one program is calibrated on, each a tuple of tensors of the program's shapes.

    Attributes:
        samples: inputs for the ranges and for the rounding of weights.
        color_augmented: number of the last samples that only widen ranges, not round weights.
        finetuning: inputs that fine-tuning trains and scores on; without any, the samples.
        sources: origin of each sample, then of each of ``finetuning``, for errors.
    """

    samples: Sequence[tuple[Tensor, ...]]
    color_augmented: int = 0
    finetuning: Sequence[tuple[Tensor, ...]] = ()
    sources: Sequence[str] = ()

    @property
    def natural(self) -> Sequence[tuple[Tensor, ...]]:
        """The samples that weights are rounded for."""
        return self.samples[: len(self.samples) - self.color_augmented]


def calibrate(
    program: ExportedProgram,
    inputs: CalibrationInputs,
    method: Int8Method,
    *,
    generated: Collection[str] = frozenset(),
    evaluation: EvaluationSet | None = None,
    progress: Progress = silent,
) -> Calibrated:
    """Choose the INT8 ranges, weights and float layers of a decomposed float program.

    Args:
        program: decomposed float program; left as it is.
        inputs: calibration inputs of the program.
        method: the recipe's ``quantize`` section on a target.
        generated: names of the generated kernels, from ``find_generators``.
        evaluation: evaluation set of the precision search and the ablation; None for neither.
        progress: called with (phase, steps done, steps of the phase).

    Raises:
        CalibrationError: without samples, or for a sample that brings NaN or infinite values.
        CheckFailedError: when the evaluation's limits leave no choice.
        TargetMissingError: when biases are corrected, and NNCF is not installed.
    """
    refuse_missing_tools(method.section, ablates=evaluation is not None and evaluation.ablates)
    inputs = replace(inputs, samples=list(inputs.samples))
    calibrator = Calibrator(fold(program), inputs, method, generated, progress)
    refuse_samples(inputs.samples, inputs.sources)
    if inputs.finetuning:
        refuse_samples(inputs.finetuning, inputs.sources[len(inputs.samples) :])
    module, observed = calibrator.observe()

    def attempt(kept: Sequence[str]) -> Rounded:
        return calibrator.round(module, observed, kept)

    if evaluation is None:
        return attempt(()).calibrated
    before = evaluation.float_psnr_db(calibrator.module)
    rounded = (
        choose_precision(module, attempt, evaluation, before, progress)
        if evaluation.by_layer
        else attempt(())
    )
    chosen = rounded.calibrated
    if not evaluation.ablates:
        return chosen

    def calibrate_by(other: Int8Method) -> Rounded:
        changed = replace(calibrator, method=other)
        return changed.round(*changed.observe(), chosen.kept)

    return replace(
        chosen,
        ablation=ablate(calibrator.module, calibrate_by, method, evaluation, before, rounded, progress),
    )


@dataclass(frozen=True)
class Calibrator:
    """The two halves of a calibration, for callers that repeat one of them.

    Attributes:
        module: the folded float program; left as it is.
        inputs: its calibration inputs.
        method: the recipe's ``quantize`` section on a target.
        generated: names of the generated kernels.
        progress: called with (phase, steps done, steps of the phase).
    """

    module: fx.GraphModule
    inputs: CalibrationInputs
    method: Int8Method
    generated: Collection[str] = frozenset()
    progress: Progress = silent

    def observe(self) -> tuple[fx.GraphModule, Observed]:
        """Return the program with rescaled channels, and the ranges of its tensors."""
        module = copy.deepcopy(self.module)
        observed = observe_program(
            module,
            section=self.method.section,
            samples=self.inputs.samples,
            sources=self.inputs.sources,
            generated=self.generated,
            blocks=blocks_of(module, self.method.scheme),
            progress=self.progress,
        )
        return module, observed

    def round(self, module: fx.GraphModule, observed: Observed, kept: Sequence[str] = ()) -> Rounded:
        """Round the weights of a copy of an observed program.

        Args:
            module: from ``observe``; left as it is.
            observed: its ranges.
            kept: names of the layers that the precision search keeps in float.
        """
        made = copy.deepcopy(module)
        plan = self.method.plan(made, kept=kept, generated=self.generated)
        calibrated = round_program(
            made,
            plan,
            observed,
            scheme=self.method.ranges,
            section=self.method.section,
            samples=self.inputs.natural,
            finetuning=self.inputs.finetuning,
            progress=self.progress,
        )
        return Rounded(made, plan, self.method.ranges, calibrated)


def refuse_missing_tools(section: QuantizeSection, *, ablates: bool = False) -> None:
    """Refuse a method whose optional package is not installed; callers ask before their long work.

    Args:
        section: the recipe's ``quantize`` section.
        ablates: whether the ablation follows, which also tries bias correction.

    Raises:
        TargetMissingError: naming the package and the command that installs it.
    """
    if section.bias_correction == "none" and not ablates:
        return
    try:
        import nncf  # noqa: F401
    except ImportError as error:
        asked = "the ablation" if ablates else f"quantize.bias_correction: {section.bias_correction}"
        other = "leave the ablation out" if ablates else "set quantize.bias_correction: none"
        raise TargetMissingError(
            f"{asked} corrects biases with NNCF, and NNCF cannot be imported ({error}). Install it: "
            f'pip install "edgedyn[nncf]"; or {other}.'
        ) from error


def refuse_samples(samples: Sequence[tuple[Tensor, ...]], sources: Sequence[str]) -> None:
    """Refuse an empty list of inputs, and inputs that are not finite.

    Raises:
        CalibrationError: naming the sample by its source.
    """
    if not samples:
        raise CalibrationError(
            "there are no calibration samples; INT8 needs at least one image. Add one to the calibration set."
        )
    for index, sample in enumerate(samples):
        bad = sum(int((~x.isfinite()).sum()) for x in sample)
        if bad:
            raise CalibrationError(
                f"calibration sample {index}, {sources[index] if sources else 'of a program'}: {bad} values "
                "are NaN or infinite; a range needs finite ones. Take the file out of the set, or fix it."
            )
