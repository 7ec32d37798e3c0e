"""PMRID: the published checkpoint fits and denoises packed Bayer; the k-sigma transform is the paper's."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch

from edgedyn.checkpoints.weights import load_weights
from edgedyn.images.bayer import pack_photo
from edgedyn.models.pmrid import ANCHOR_ISO, NETWORK, k_sigma_range, noise_of

PUBLISHED = Path(__file__).parents[3] / "shared/data/weights/pmrid_torch_pretrained.ckp"
# of the names, shapes and order of the published checkpoint's tensors, one line "name shape" each
KEYS_SHA256 = "b860f45bb7afc04ba8b68b01fbba7894e899020f86443d0c8bf80f66d2341aaa"


def described(state: dict[str, torch.Tensor]) -> str:
    return "\n".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(state.items()))


def test_the_network_has_the_tensors_of_the_published_checkpoint():
    state = NETWORK().state_dict()
    assert len(state) == 141
    assert sum(tensor.numel() for tensor in state.values()) == 1_031_908
    assert hashlib.sha256(described(state).encode()).hexdigest() == KEYS_SHA256


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="needs the published checkpoint of MegEngine/PMRID")
def test_the_published_checkpoint_loads_strictly_and_denoises():
    network = NETWORK().eval()
    load_weights(network, PUBLISHED, trust=True)
    photo = skimage.data.astronaut()[:256, 128:384].astype(np.float32) / 255
    clean = pack_photo(photo).transpose(2, 0, 1)[None]
    gain, read = noise_of(ANCHOR_ISO)
    deviation = np.sqrt(gain * clean + read**2)
    noisy = clean + deviation * np.random.default_rng(0).standard_normal(clean.shape).astype(np.float32)
    with torch.no_grad():
        denoised = network(torch.from_numpy(256 * noisy).float()).numpy() / 256
    before, after = (10 * np.log10(1 / np.mean((image - clean) ** 2)) for image in (noisy, denoised))
    assert before == pytest.approx(34, abs=1)
    assert after > before + 2.5


def test_any_size_of_whole_sixteens_gives_the_same_size():
    torch.manual_seed(0)
    network = NETWORK().eval()
    with torch.no_grad():
        assert network(torch.rand(2, 4, 32, 48)).shape == (2, 4, 32, 48)


def test_the_range_of_the_anchor_is_0_to_256():
    assert k_sigma_range(ANCHOR_ISO) == (0.0, 256.0)


@pytest.mark.parametrize("iso", [100.0, 1600.0, 6400.0])
def test_in_the_range_of_a_sensitivity_the_noise_is_that_of_the_anchor(iso):
    """Var[x] = k_a * V * (x / 256) + s_a, in values of the anchor, at every brightness."""
    low, high = k_sigma_range(iso)
    gain, read = noise_of(iso)
    gain_a, read_a = noise_of(ANCHOR_ISO)
    for value in (0.0, 0.1, 0.7):
        x = low + value * (high - low)
        variance = (high - low) ** 2 * (gain * value + read**2)
        assert variance == pytest.approx(256**2 * (gain_a * x / 256 + read_a**2), rel=1e-9)
