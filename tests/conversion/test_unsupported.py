"""Operators and ranks that a target cannot run are refused on the float program, with layer and line."""

from __future__ import annotations

import dataclasses

import pytest
import strangers
import torch
from strangers import conv
from torch import Tensor, nn

from edgedyn import targets
from edgedyn.conversion.capture import capture
from edgedyn.conversion.unsupported import refuse_unsupported
from edgedyn.errors import ModelError
from edgedyn.recipe.recipe import Recipe

LINE = r"\(at .*\.py:\d+: "


class Strange(nn.Module):
    """A convolution behind an operator that few runtimes have."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator, self.tail = operator, conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.operator == "sort":
            return self.tail(torch.sort(x, dim=1)[0])
        if self.operator == "pool":
            return self.tail(nn.functional.max_pool3d(x, (1, 3, 3), stride=1))
        return self.tail(torch.linalg.inv(x))


def refuse(net: nn.Module, target: str) -> None:
    refuse_unsupported({"forward": capture(net.eval(), (torch.rand(1, 3, 16, 16),))}, targets.load(target))


@pytest.mark.parametrize(
    ("net", "target", "message"),
    [
        (
            strangers.Burst(),
            "executorch",
            rf"convolution\.out of rank 5.* conv3d .* in a {LINE}return",
        ),
        (
            Strange("sort"),
            "executorch",
            rf"sort\.values.* sort in the network itself {LINE}.*torch\.sort",
        ),
        (Strange("pool"), "executorch", rf"max_pool3d .*{LINE}return .*max_pool3d"),
        (Strange("inverse"), "executorch", rf"WithEffects.* linalg_inv .*{LINE}return .*linalg\.inv"),
        (Strange("inverse"), "tensorrt", rf"linalg_inv_ex.* linalg_inv .*{LINE}return .*linalg\.inv"),
    ],
    ids=["conv3d", "sort", "pool", "inverse", "inverse in ONNX"],
)
def test_operator_or_rank_that_the_target_lacks_is_refused_with_layer_and_line(net, target, message):
    with pytest.raises(ModelError, match=message):
        refuse(net, target)


@pytest.mark.parametrize(
    ("net", "target"),
    [(strangers.Burst(), "tensorrt"), (Strange("sort"), "onnxruntime")],
    ids=["conv3d", "sort"],
)
def test_what_another_target_has_passes_there(net, target):
    refuse(net, target)


def test_ordinary_operators_cost_nothing():
    def fail(programs):
        raise AssertionError("the program was lowered")

    target = dataclasses.replace(targets.load("executorch"), preview=fail)
    program = capture(strangers.padded("even_same").eval(), (torch.rand(1, 3, 16, 16),))
    refuse_unsupported({"forward": program}, target)


def test_build_refuses_before_an_image_is_read(tmp_path):
    from edgedyn import pipeline

    for name in ("calibration", "validation"):  # opened, and refused as soon as they are read
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(f"no picture for {name}".encode())
    recipe = Recipe(
        name="burst",
        model={"network": "strangers:Burst"},
        input={"shape": [1, 3, 32, 32]},
        tile={"overlap": 4},
        target="executorch",
        precision="int8",
        calibration="calibration",
        validation="validation",
        folder=str(tmp_path),
    )
    phases = []
    with pytest.raises(ModelError, match=r"convolution\.out of rank 5"):
        pipeline.build(recipe, tmp_path / "out", progress=lambda phase, done, total: phases.append(phase))
    assert set(phases) <= {"rewrite layers"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration", "validation"]
