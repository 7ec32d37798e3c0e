"""A recipe's network is rewritten and captured once, and again only where its programs depend on images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgedyn.conversion import network as rewriting
from edgedyn.conversion.convert import load_target
from edgedyn.conversion.image_sets import open_sets
from edgedyn.conversion.network import Network, add_samples, rewrite_network
from edgedyn.errors import ModelError
from edgedyn.layers import canonicalize
from edgedyn.models.dynconv_denoiser import DynConvDenoiser
from edgedyn.recipe.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["model.arguments={features: 4, blocks: 1}", "input.shape=[1, 3, 24, 32]", "tile.overlap=0"]


def rewrite_both(name: str, *overrides: str) -> tuple[Network, Network]:
    """Return the network of a small recipe without calibration samples, and with them."""
    recipe = load_recipe(RECIPES / f"{name}.phone.int8.yaml", [*SMALL, *overrides])
    target = load_target(recipe)
    network = rewrite_network(recipe, target)
    return network, add_samples(network, target, open_sets(recipe)[0])


@pytest.fixture
def weights(tmp_path) -> str:
    torch.manual_seed(2)
    path = tmp_path / "small.safetensors"
    save_file(DynConvDenoiser(4, 1).state_dict(), path)
    return f"model.weights={path}"


def test_trained_network_is_captured_once(weights):
    bare, network = rewrite_both("dynconv-denoiser", weights, "model.sha256=null")
    assert not bare.drawn
    assert network.color_augmented == network.recipe.quantize.color_augmented == 12
    assert network.natural > 0
    assert network.decomposed is bare.decomposed


def test_statistics_of_an_untrained_network_reach_its_programs():
    bare, network = rewrite_both("dynconv-denoiser", "model.weights=null", "model.sha256=null")
    name = "body.0.expand.weight"  # the BatchNorm behind it is folded
    before, after = (given.decomposed["forward"][1].state_dict[name] for given in (bare, network))
    assert torch.equal(after, canonicalize(network.reference).state_dict()[name])
    assert not torch.allclose(before, after)


def test_operators_of_a_capacity_variant_are_refused_as_well(weights, monkeypatch):
    checked = []

    def refuse(programs, target):
        checked.append(list(programs))
        if "capacity" in programs:
            raise ModelError("no such operator")

    monkeypatch.setattr(rewriting, "refuse_unsupported", refuse)
    with pytest.raises(ModelError, match="no such operator"):
        rewrite_both("dynconv-denoiser-capacity", weights, "model.sha256=null")
    assert checked == [["forward"], ["capacity", "dense"]]
