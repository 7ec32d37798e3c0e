"""A layer that is dead on the calibration images still has an output scale that XNNPACK can requantize to."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from small_int8 import quantize_program
from torch import Tensor, nn

from edgedyn import quantize, targets
from edgedyn.bundle.dispatch import load_programs
from edgedyn.bundle.manifest import FORWARD
from edgedyn.quantize import CalibrationInputs, Int8Method
from edgedyn.recipe.keys import QuantizeSection

EXECUTORCH = targets.load("executorch")
LAYERS = ("first", "dead", "reader", "last")


class DeadBranch(nn.Module):
    """Convolutions of large values, a ReLU that leaves nothing but zeros, and readers of these."""

    def __init__(self, low: float) -> None:
        super().__init__()
        self.first, self.dead = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.reader, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)
        nn.init.constant_(self.dead.bias, low)
        nn.init.zeros_(self.reader.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reader(torch.relu(self.dead(self.first(x))))
        return x + self.last(torch.relu(y))


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
def test_a_program_with_a_dead_layer_loads_and_runs(scale, tmp_path):
    torch.manual_seed(0)
    net = DeadBranch(-100 * scale).eval()
    generator = torch.Generator().manual_seed(1)
    samples = [(scale * torch.rand(1, 3, 16, 16, generator=generator),) for _ in range(3)]
    program = torch.export.export(net, samples[0])
    section = QuantizeSection(rounding="nearest", equalize=False, equalize_outputs=False)
    calibrated = quantize.calibrate(program, CalibrationInputs(samples), Int8Method(EXECUTORCH.int8, section))
    entries = {entry.name: entry for entry in calibrated.entries}
    for before, layer in pairwise(LAYERS):
        (x, _), (y, _) = (entries[f"{name}.output"].affine for name in (before, layer))
        assert x * max(entries[f"{layer}.weight"].channels) < 256 * y
    made = quantize_program(
        program, samples[0], scheme=EXECUTORCH.int8, section=section, calibrated=calibrated
    )
    artifact = EXECUTORCH.lower({FORWARD: made.program}, tmp_path, "int8")
    run = load_programs(EXECUTORCH.load, tmp_path, artifact.programs, None)
    (y,) = run(samples[0][0].numpy())
    with torch.no_grad():
        expected = net(*samples[0]).numpy()
    assert abs(y - expected).max() < 0.02 * scale
