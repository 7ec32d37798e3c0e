"""Outputs of every program of a build on the validation samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edgedyn.bundle.dispatch import Decision, Dispatcher
from edgedyn.errors import CheckFailedError
from edgedyn.images import metrics

if TYPE_CHECKING:
    from edgedyn.bundle.tensors import TensorSpec
    from edgedyn.conversion.convert import Converted
    from edgedyn.images.sample import Sample
    from edgedyn.quantize.progress import Progress
    from edgedyn.targets import Run


@dataclass(frozen=True)
class Outputs:
    """Outputs of each program on the same samples.

    Attributes:
        samples: the validation samples.
        decomposed: first output (1, ...) of the exact rewrite, in PyTorch; float32, pixels of a picture.
        quantized: that of the program at the recipe's precision, in PyTorch.
        device: that of the lowered program, in its runtime.
        decided: program (decomposed, quantized, device) -> its decision on each sample; None without routing.
        dispatchers: the three programs themselves.
        specs: the tensors that the programs return; none where the first one's values are pixels.
        returned: program -> per sample, every output with the values that the program gave it, float32.
    """

    samples: Sequence[Sample]
    decomposed: Sequence[np.ndarray]
    quantized: Sequence[np.ndarray]
    device: Sequence[np.ndarray]
    decided: Mapping[str, list[Decision | None]] = field(default_factory=dict)
    dispatchers: Mapping[str, Dispatcher] = field(default_factory=dict)
    specs: Sequence[TensorSpec] = ()
    returned: Mapping[str, Sequence[Sequence[np.ndarray]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return one line: the number of samples and the shape of an output."""
        return f"Outputs({len(self.samples)} samples, {self.device[0].shape})"

    def take(self, indices: Sequence[int]) -> Outputs:
        """Return the outputs on some of the samples."""
        return replace(
            self,
            samples=[self.samples[i] for i in indices],
            decomposed=[self.decomposed[i] for i in indices],
            quantized=[self.quantized[i] for i in indices],
            device=[self.device[i] for i in indices],
            decided={name: [decided[i] for i in indices] for name, decided in self.decided.items()},
            returned={name: [values[i] for i in indices] for name, values in self.returned.items()},
        )

    def decode(self, values: np.ndarray) -> np.ndarray:
        """Return the pixels of a first output; of one that is no picture, its values."""
        return self.specs[0].decode(values) if self.specs else values

    def of(self, index: int) -> Outputs:
        """Return the outputs with another one, decoded, in the first one's place."""
        decode = self.specs[index].decode
        chosen: dict[str, Any] = {n: [decode(ys[index]) for ys in v] for n, v in self.returned.items()}
        return replace(self, **chosen)


def run_samples(
    converted: Converted, device: Dispatcher, samples: list[Sample], precision: str, progress: Progress
) -> Outputs:
    """Run decomposed, quantized and lowered programs on every validation sample.

    Raises:
        CheckFailedError: as ``run_all``.
    """
    half = precision == "fp16"
    decomposed = {
        name: in_torch(part.decomposed.module(), torch.float32) for name, part in converted.parts.items()
    }
    dtype = torch.float16 if half else torch.float32
    quantized = {name: in_torch(part.program.module(), dtype) for name, part in converted.parts.items()}
    dispatchers = {
        "decomposed": Dispatcher(decomposed, converted.routing),
        "quantized": Dispatcher(quantized, converted.routing),
        "device": device,
    }
    returned: dict[str, list[list[np.ndarray]]] = {}
    decided: dict[str, list[Decision | None]] = {}
    for done, (name, dispatcher) in enumerate(dispatchers.items(), 1):
        kind = np.float16 if half and name == "device" else np.float32
        results = run_all(dispatcher, samples, name, kind, outputs=len(converted.outputs))
        returned[name], decided[name] = [ys for ys, _ in results], [d for _, d in results]
        progress("validate", done, len(dispatchers))
    decode = converted.outputs[0].decode
    first = {name: [decode(ys[0]) for ys in values] for name, values in returned.items()}
    return Outputs(
        samples,
        **first,
        decided=decided,
        dispatchers=dispatchers,
        specs=converted.outputs,
        returned=returned,
    )


def run_all(
    run: Dispatcher, samples: Sequence[Sample], program: str, dtype: type = np.float32, *, outputs: int = 1
) -> list[tuple[list[np.ndarray], Decision | None]]:
    """Run a program on every sample; return its outputs (1, ...) in float32, and its decision.

    Raises:
        CheckFailedError: for an output that is not finite, with program, image and noise level; for another
            number of outputs.
    """
    results = []
    for sample in samples:
        values, decision = run.run(*(x.astype(dtype) for x in sample.inputs))
        ys = [np.asarray(y, dtype=np.float32) for y in values]
        if len(ys) != outputs:
            raise CheckFailedError(
                f"the {program} program: found {len(ys)} outputs, expected {outputs}, as the network "
                "returns. This is a defect of edgedyn: choose fewer by outputs: in the recipe."
            )
        if broken := sum(int((~np.isfinite(y)).sum()) for y in ys):
            raise CheckFailedError(
                f"the {program} program: found {broken} of {sum(y.size for y in ys)} values that are NaN or "
                "infinite for "
                f"{sample.source} with noise of sigma {sample.sigma:g}; expected finite ones. A float16 "
                "overflow? Try precision fp32."
            )
        results.append((ys, decision))
    return results


def in_torch(module: nn.Module, dtype: torch.dtype) -> Run:
    """Return a module as a target's ``run``: numpy arrays in and out, computed in ``dtype``."""

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            y = module(*(torch.from_numpy(np.ascontiguousarray(x)).to(dtype) for x in arrays))
        outputs = y if isinstance(y, tuple | list) else (y,)
        return [np.asarray((t if dtype == torch.float64 else t.float()).numpy()) for t in outputs]

    return run


def group_by_condition(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Return the indices of the samples by noise level, ``sigma=25``, the lowest level first."""
    groups: dict[str, list[int]] = {}
    for index in sorted(range(len(samples)), key=lambda i: samples[i].sigma):
        groups.setdefault(samples[index].condition, []).append(index)
    return groups


def psnr_db(y: np.ndarray, sample: Sample) -> float:
    """Return the PSNR of an output (1, C, H, W) against its sample's truth, dB."""
    return metrics.psnr_db(to_hwc(y), to_hwc(sample.truth))


def enlarge(sample: Sample) -> np.ndarray:
    """Return the noisy input, its pixels repeated where the truth is larger, (1, C, H, W)."""
    scale = sample.truth.shape[2] // sample.noisy.shape[2]
    return sample.noisy.repeat(scale, axis=2).repeat(scale, axis=3)


def to_hwc(array: np.ndarray) -> np.ndarray:
    """Turn (1, C, H, W) into (H, W, C)."""
    return np.ascontiguousarray(array[0].transpose(1, 2, 0))
