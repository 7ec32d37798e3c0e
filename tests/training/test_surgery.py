"""Cutting the channels of a chain: which ones stay, what stays exact, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgedyn.errors import TrainingError
from edgedyn.training.surgery import channel_energies, cut_channels, fold_norms


def make_chain(channels: int = 6, *, norms: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for inputs in (3, channels, channels):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=not norms)]
        layers += [nn.BatchNorm2d(channels)] if norms else []
        layers += [nn.ReLU()]
    chain = nn.Sequential(*layers, nn.Conv2d(channels, 2, 3, padding=1))
    for module in chain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.bias, -1, 1)
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    return chain.eval()


def make_input() -> Tensor:
    return torch.rand(2, 3, 9, 12, generator=torch.Generator().manual_seed(5))


def test_a_cut_that_keeps_all_channels_is_exact():
    chain, x = make_chain(), make_input()
    assert torch.equal(cut_channels(chain, 6, lambda: chain(x))(x), chain(x))


def test_norms_are_folded():
    chain, x = make_chain(norms=True).double(), make_input().double()
    cut = cut_channels(chain, 6, lambda: chain(x))
    assert [type(layer) for layer in cut] == [nn.Conv2d, nn.ReLU] * 3 + [nn.Conv2d]
    torch.testing.assert_close(cut(x), chain(x), rtol=1e-12, atol=1e-12)


def test_channels_of_highest_energy_stay_in_their_order_with_their_weights():
    chain, x = make_chain(), make_input()
    with torch.no_grad():
        for loud in (4, 1):
            chain[0].bias[loud] = 50.0
        chain[2].weight[[2, 5]] *= 100
        chain[2].bias[[2, 5]] = 30.0
    cut = cut_channels(chain, 2, lambda: chain(x))
    assert torch.equal(cut[0].weight, chain[0].weight[[1, 4]])
    assert torch.equal(cut[0].bias, chain[0].bias[[1, 4]])
    assert torch.equal(cut[2].weight, chain[2].weight[[2, 5]][:, [1, 4]])
    assert cut[6].weight.shape == (2, 2, 3, 3)
    assert torch.equal(cut[6].bias, chain[6].bias)
    assert (cut[2].in_channels, cut[2].out_channels) == (2, 2)


def test_channels_that_are_never_active_are_cut_without_a_trace():
    chain, x = make_chain(), make_input()
    with torch.no_grad():
        for conv in (chain[0], chain[2], chain[4]):
            conv.bias[[0, 3]] = -1e3
    cut = cut_channels(chain, 4, lambda: chain(x))
    torch.testing.assert_close(cut(x), chain(x), rtol=1e-5, atol=1e-6)


def test_energy_is_the_mean_square_of_what_the_next_convolution_reads():
    chain, x = make_chain(), make_input()
    (first, *rest) = channel_energies(chain, lambda: (chain(x), chain(x / 2)))
    expected = torch.cat([chain[:2](x), chain[:2](x / 2)]).double().square().mean((0, 2, 3))
    torch.testing.assert_close(first, expected)
    assert len(rest) == 2
    assert not chain[2]._forward_pre_hooks


def test_the_chain_itself_is_not_changed():
    chain, x = make_chain(norms=True), make_input()
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    cut = cut_channels(chain, 3, lambda: chain(x))
    nn.init.zeros_(cut[0].weight)
    assert all(torch.equal(before[name], tensor) for name, tensor in chain.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Conv2d(6, 6, 3, groups=2), r"layer 2 of the chain is Conv2d.*expected dense convolutions"),
        (nn.PReLU(6), "layer 2 of the chain is PReLU"),
        (nn.BatchNorm2d(6), "layer 2 of the chain is BatchNorm2d"),
    ],
)
def test_other_layers_are_refused(layer, text):
    chain = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), layer, nn.Conv2d(6, 2, 3)).eval()
    with pytest.raises(TrainingError, match=text):
        fold_norms(chain)


@pytest.mark.parametrize("channels", [0, 7])
def test_impossible_numbers_of_channels_are_refused(channels):
    chain = make_chain()
    with pytest.raises(TrainingError, match=f"cannot be cut to {channels} channels; expected 1 to 6"):
        cut_channels(chain, channels, lambda: chain(make_input()))


def test_a_run_past_the_chain_is_refused():
    with pytest.raises(TrainingError, match="did not reach the chain"):
        cut_channels(make_chain(), 4, lambda: None)
