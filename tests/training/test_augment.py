"""Changed colours and halved images: range, repeatability, and cases without any change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from edgedyn.training.augment import halve, recolor
from edgedyn.training.denoise import TrainingPlan, patches

PLAN = TrainingPlan(batch=64, patch=8, sigma=(5.0, 50.0))


def make_crop() -> Tensor:
    return torch.rand(3, 8, 10, generator=torch.Generator().manual_seed(1))


def make_images() -> list[Tensor]:
    """Two images, of which the first is too small to be halved: it is black, the other one has stripes."""
    stripes = torch.zeros(3, 40, 40, dtype=torch.uint8)
    stripes[:, ::2] = 200
    return [torch.zeros(3, 12, 40, dtype=torch.uint8), stripes]


def test_colours_stay_in_range_and_depend_on_the_generator_alone():
    x = make_crop()
    for seed in range(50):
        one, two = (recolor(x, np.random.default_rng(seed), 0.8) for _ in range(2))
        assert torch.equal(one, two)
        assert one.shape == x.shape
        assert one.min() >= 0
        assert one.max() <= 1


@pytest.mark.parametrize(("probability", "changed"), [(0.0, 0), (0.25, 300), (1.0, 400)])
def test_each_change_has_its_own_chance(probability, changed):
    """1 - 0.75^4 = 68 %; of the exchanges alone, one in six is none."""
    x, rng = make_crop(), np.random.default_rng(0)
    found = sum(not torch.equal(recolor(x, rng, probability), x) for _ in range(400))
    assert found == pytest.approx(changed, abs=60 if 0 < probability < 1 else 0)


def test_halving_averages_stripes_of_one_pixel():
    y = halve(make_images()[1].float() / 255)
    assert y.shape == (3, 20, 20)
    torch.testing.assert_close(y[:, 2:-2], torch.full((3, 16, 20), 100 / 255), rtol=0, atol=0.02)


def test_the_share_of_halved_samples_is_of_images_that_are_large_enough():
    plan = replace(PLAN, halve=0.5)
    clean = torch.cat([patches(make_images(), plan, step).clean for step in range(4)])
    large = clean.flatten(1).amax(1) > 0
    halved = large & (clean.flatten(1).std(1) < 0.2)
    assert 0.35 < halved.sum() / large.sum() < 0.65
    assert 0.4 < large.float().mean() < 0.6


def test_plain_plan_draws_the_same_crops_as_without_augmentation():
    """The defaults draw no further random numbers: older runs stay repeatable."""
    images = make_images()
    rng = np.random.default_rng([PLAN.seed, 0])
    index = rng.integers(2, size=PLAN.batch)[0]
    top, left, turns = (rng.integers(n) for n in (images[index].shape[1] - 7, 33, 4))
    crop = images[index][:, top : top + 8, left : left + 8].rot90(int(turns), (1, 2))
    crop = crop.flip(2) if rng.integers(2) else crop
    assert torch.equal(patches(images, PLAN, 0).clean[0], crop.float() / 255)
