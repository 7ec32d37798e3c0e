"""A row of a benchmark: two programs for ExecuTorch, and the limit on the ratio of their times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgedyn import quantize, targets
from edgedyn.ops import choose_forms, decompose
from edgedyn.quantize.quantized import to_float
from edgedyn.recipe.keys import QuantizeSection

QUICK = QuantizeSection(rounding="nearest")  # rounding does not change the time of a run
Inputs = tuple[Tensor, ...]
NetworkAndInputs = tuple[nn.Module, Inputs]


class Lowered(NamedTuple):
    """A program, its inputs, and a function that runs it on them."""

    path: Path
    inputs: Sequence[Tensor]
    run: Callable[[], Sequence[Tensor]]


class Row(NamedTuple):
    """Two functions, each making a program, and the limit on the ratio of the programs' times, if any."""

    name: str
    limit: float | None
    network: Callable[[Path], Lowered]
    yardstick: Callable[[Path], Lowered]
    is_counted: bool = True


class SqnrRow(NamedTuple):
    """Two INT8 programs of a float network, and the least difference of their SQNR, dB."""

    name: str
    limit: float
    network: nn.Module
    ours: Callable[[Path], Lowered]
    yardstick: Callable[[Path], Lowered]


def on_runtime(
    network: NetworkAndInputs,
    kernels: str = "fused",
    *,
    samples: Sequence[Inputs] = (),
    section: QuantizeSection = QUICK,
    **forms: str,
) -> Callable[[Path], Lowered]:
    """Return a function that lowers a network into a folder, as a build does.

    Args:
        network: in evaluation mode, and its inputs.
        kernels: ``fused`` or ``stock``.
        samples: calibration inputs, which may be smaller; the program is INT8 where there are any.
        section: the recipe's section ``quantize``.
        forms: op -> form name.
    """

    def make(folder: Path) -> Lowered:
        module, inputs = network
        target = targets.load("executorch", kernels)

        def prepare(example: Inputs) -> tuple[Any, ExportedProgram]:
            program = torch.export.export(module.eval(), example)
            chosen = choose_forms(program, target, forms)
            return chosen, decompose(program, chosen, "before_quantize")

        chosen, program = prepare(inputs)
        if samples:
            called = {op.overload for op, form in chosen.items() if form.fn is None}
            method = quantize.Int8Method(target.int8, section, kernels=called)
            _, observed = prepare(samples[0])
            calibrated = quantize.calibrate(observed, quantize.CalibrationInputs(samples), method)
            program = quantize.apply(program, inputs, calibrated, method).program
        else:
            program = to_float(program, inputs, "fp32").program
        program = decompose(program, chosen, "after_quantize")
        artifact = target.lower({"forward": program}, folder, "int8" if samples else "fp32")
        path = folder / artifact.programs["forward"]
        return Lowered(path, inputs, run_method(path, inputs))

    return make


def by_executorch(network: NetworkAndInputs, samples: Sequence[Inputs]) -> Callable[[Path], Lowered]:
    """Return a function that quantizes and lowers a network as ExecuTorch's documentation does, without us.

    Its quantizer also makes sums and products INT8.
    """

    def make(folder: Path) -> Lowered:
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from executorch.exir import to_edge_transform_and_lower
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        module, inputs = network
        config = get_symmetric_quantization_config(is_per_channel=True)
        exported = torch.export.export(module.eval(), inputs).module()
        prepared = prepare_pt2e(exported, XNNPACKQuantizer().set_global(config))
        for sample in samples:
            prepared(*sample)
        program = torch.export.export(convert_pt2e(prepared), inputs)
        path = folder / "executorch.pte"
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        path.write_bytes(edge.to_executorch().buffer)
        return Lowered(path, inputs, run_method(path, inputs))

    return make


def run_method(path: Path, inputs: Sequence[Tensor]) -> Callable[[], Sequence[Tensor]]:
    """Return a function that runs a program, and does not copy the output: that costs as much as a kernel."""
    from executorch.extension.pybindings.portable_lib import _load_for_executorch

    program = _load_for_executorch(str(path))
    return lambda: program.run_method("forward", inputs, clone_outputs=False)
