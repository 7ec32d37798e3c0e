"""FFDNet with MalleConvs: the plain chain at first, canonical form, noise levels, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import skimage
import torch
from torch import Tensor, nn

import edgedyn
from edgedyn.checkpoints.weights import load_weights
from edgedyn.errors import ModelError
from edgedyn.images import metrics
from edgedyn.layers import canonicalize
from edgedyn.layers.malleconv import CanonicalMalleConv, MalleConv
from edgedyn.models.ffdnet import FFDNet
from edgedyn.models.malle_ffdnet import MalleFFDNet, start_as_identity

WEIGHTS = Path(__file__).parents[2] / "recipes/weights/malle-ffdnet.safetensors"


def make_net(**arguments) -> MalleFFDNet:
    torch.manual_seed(2)
    return MalleFFDNet(channels=8, **arguments).eval()


def make_image(height: int = 64, width: int = 32) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(6))


def stir(net: nn.Module) -> nn.Module:
    """Move every weight, as training does: at first MalleConvs do nothing."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


def test_new_malleconvs_leave_the_plain_chain_exactly():
    net, plain = make_net(), FFDNet(channels=8).eval()
    plain.model.load_state_dict(net.model.state_dict())
    x = make_image()
    assert torch.equal(net(x), plain(x))
    assert not torch.equal(stir(net.malle) and net(x), plain(x))


def test_odd_sizes_are_the_plain_chain_up_to_rounding():
    net, plain = make_net(), FFDNet(channels=8).eval()
    plain.model.load_state_dict(net.model.state_dict())
    x = make_image(75, 97)
    torch.testing.assert_close(net(x), plain(x), rtol=1e-5, atol=1e-6)


def test_size_and_keys_of_the_chain_are_those_of_ffdnet():
    net = MalleFFDNet()
    assert sum(p.numel() for p in net.parameters()) == 560268
    assert net.model.state_dict().keys() == FFDNet().model.state_dict().keys()


def test_malleconvs_follow_the_stated_convolutions():
    net, seen = make_net(after=[1, 10]), []
    for module in (*net.model, *net.malle):
        module.register_forward_hook(lambda module, args, y: seen.append(module))
    net(make_image())
    for number, layer in zip((1, 10), net.malle, strict=True):
        place = seen.index(layer)
        assert seen[place - 2 : place] == [net.model[2 * number], net.model[2 * number + 1]]


def test_canonical_network_is_exact():
    net = stir(make_net()).double()
    canonical = canonicalize(net)
    assert sum(isinstance(m, CanonicalMalleConv) for m in canonical.modules()) == 2
    x = make_image(48, 34).double()
    torch.testing.assert_close(canonical(x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [FFDNet, make_net])
def test_levels_of_samples_are_those_of_networks_built_for_them(make):
    x = make_image(33, 40)
    net = make(sigma=25.0).eval()
    y = net.at_levels(x, torch.tensor([10.0, 40.0]))
    for k, sigma in enumerate((10.0, 40.0)):
        fixed = make(sigma=sigma).eval()
        fixed.load_state_dict(net.state_dict())
        torch.testing.assert_close(y[k : k + 1], fixed(x[k : k + 1]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("after", [[11], [-1], [3, 3]])
def test_impossible_places_are_refused(after):
    with pytest.raises(ModelError, match=r"expected different numbers from 0 to 10"):
        make_net(after=after)


def test_only_a_layer_with_as_many_outputs_can_be_the_identity():
    layer, x = MalleConv(8, 8, groups=2), torch.rand(1, 8, 16, 16)
    start_as_identity(layer)
    assert torch.equal(layer(x), x)
    with pytest.raises(ModelError, match="8 input and 12 output channels"):
        start_as_identity(MalleConv(8, 12))


def test_inspection_finds_the_dynamic_layers():
    found = edgedyn.inspect(make_net(), shape=(1, 3, 32, 32))
    assert [layer["path"] for layer in found["layers"]] == ["malle.0", "malle.1"]
    assert {layer["primitive"] for layer in found["layers"]} == {"sliced_depthwise2d"}


@pytest.mark.parametrize(("sigma", "gain_db"), [(15.0, 10), (25.0, 13), (50.0, 16)])
def test_trained_weights_denoise_at_every_level(sigma, gain_db):
    net = MalleFFDNet(**json.loads(WEIGHTS.with_suffix(".json").read_text())["arguments"]).eval()
    load_weights(net, WEIGHTS)
    photo = torch.from_numpy(skimage.data.coffee()[100:228, 200:328].copy())
    clean = photo.permute(2, 0, 1)[None].float() / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    noisy = clean + sigma / 255 * noise
    with torch.no_grad():
        y = net.at_levels(noisy, torch.tensor([sigma]))
    before, after = (metrics.psnr_db(x.numpy(), clean.numpy()) for x in (noisy, y))
    assert after - before > gain_db
