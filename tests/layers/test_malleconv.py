"""The community's FlyingConv: recognised by structure, and refused where it is another layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgedyn import from_authors
from edgedyn.errors import ModelError
from edgedyn.layers import canonicalize
from edgedyn.layers.malleconv import CanonicalMalleConv, MalleConv


def make_foreign(**changes):
    """Make an instance of another class of that name, with the community's attributes and modules."""
    torch.manual_seed(0)
    ours = MalleConv(8, 6, groups=2, num_blocks=2).eval()

    class FlyingConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_channel, self.out_channel, self.n_ch, self.bias = 8, 6, 0, False
            self.pooling, self.num_blocks, self.groups = True, 2, 2
            self.pool, self.clipper = nn.AvgPool2d(4, 4), nn.Hardtanh(-2, 2)
            self.predictor, self.expander, self.pwconv = ours.predictor, ours.expander, ours.pwconv

        def forward(self, x):
            raise NotImplementedError("its operator needs CUDA")

    foreign = FlyingConv().eval()
    for name, value in changes.items():
        setattr(foreign, name, value)
    return foreign.eval(), ours


def test_foreign_layer_deep_in_a_model_becomes_ours_with_its_weights():
    foreign, ours = make_foreign()
    canonical = canonicalize(nn.Sequential(nn.Identity(), nn.Sequential(foreign)).eval().double())
    assert isinstance(canonical[1][0], CanonicalMalleConv)
    x = torch.rand(2, 8, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(canonical(x), ours.double()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": True}, "cannot run"),
        ({"n_ch": 4}, "noise map beside the features"),
        ({"clipper": nn.Hardtanh(-1, 1)}, r"clips its grid to \(-1.*expected \(-2, 2\)"),
        ({"groups": 1}, "of shape"),
        ({"num_blocks": 4}, "other parameters"),
        ({"pwconv": nn.Conv2d(8, 6, 1, stride=2)}, "pwconv.stride"),
    ],
)
def test_layer_of_that_name_that_computes_something_else_is_refused(changes, message):
    foreign, _ = make_foreign(**changes)
    with pytest.raises(ModelError, match=message):
        canonicalize(foreign)


def test_class_of_that_name_without_its_attributes_is_refused():
    FlyingConv = type("FlyingConv", (nn.Conv2d,), {})  # noqa: N806 a class
    with pytest.raises(ModelError, match="not of the published structure"):
        canonicalize(nn.Sequential(FlyingConv(3, 3, 1)).eval())


def test_arguments_without_effect_are_taken_and_unknown_ones_refused():
    weights = MalleConv(8, 6).state_dict()
    assert isinstance(
        from_authors("FlyingConv", {"in_channel": 8, "out_channel": 6, "dropout": 0.1}, weights), MalleConv
    )
    with pytest.raises(ModelError, match=r"FlyingConv got arguments .*kernel"):
        from_authors("model.common.FlyingConv", {"in_channel": 8, "out_channel": 6, "kernel": 3}, weights)
    with pytest.raises(ModelError, match="n_ch=3"):
        from_authors("FlyingConv", {"in_channel": 8, "out_channel": 6, "n_ch": 3}, weights)
