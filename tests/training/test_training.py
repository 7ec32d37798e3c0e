"""The training loop: it learns, resumes bit by bit, freezes BatchNorm, and refuses impossible plans."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from edgedyn.errors import TrainingError
from edgedyn.layers.dynconv import SparseInvertedResidual
from edgedyn.training.denoise import (
    TrainingPlan,
    charbonnier,
    learning_rate,
    load_images,
    patches,
    plan_card,
    train,
)
from edgedyn.training.masks import MaskBudget

PLAN = TrainingPlan(steps=12, batch=4, patch=16, warmup=4, ema=0.5, freeze_norms=1000, sigma=(40.0, 50.0))


class Denoiser(nn.Module):
    """Two convolutions with BatchNorm that predict the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x)


def make_net() -> Denoiser:
    torch.manual_seed(8)
    return Denoiser()


def make_images() -> list[Tensor]:
    """Three textures: diagonal waves, rings, checks; no two have the same size."""
    images = []
    for k, (height, width) in enumerate([(40, 56), (48, 33), (64, 20)]):
        y, x = np.mgrid[:height, :width]
        texture = [
            np.sin((x + 2 * y) / 5),
            np.sin(np.hypot(x - 9, y - 20) / 3),
            np.sign(np.sin(x / 4) * np.sin(y / 3)),
        ][k]
        pixels = 127 + 60 * np.stack([texture, 0.5 * texture, -texture])
        images.append(torch.from_numpy(pixels.astype(np.uint8)))
    return images


class StopError(Exception):
    """The power is cut."""


def run(folder: Path, plan: TrainingPlan = PLAN, *, stop_at: int = -1, save_every: int = 6):
    """Train from or to the folder's checkpoint; return the averaged model, the trained one and the losses."""
    net, losses = make_net(), []

    def report(step: int, loss: float, averaged: nn.Module) -> None:
        losses.append(loss)
        if step == stop_at:
            raise StopError

    averaged, _ = train(
        net, make_images(), plan, folder / "checkpoint.pt", report=report, save_every=save_every
    )
    return averaged, net, losses


def states(*modules: nn.Module) -> list[Tensor]:
    return [tensor for module in modules for tensor in module.state_dict().values()]


def test_network_learns(tmp_path):
    averaged, _, losses = run(tmp_path, replace(PLAN, steps=40, learning_rate=2e-2))
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.75 * first, (first, last)
    assert not averaged.training
    noisy, clean, _ = patches(make_images(), PLAN, 99999)
    with torch.no_grad():
        assert charbonnier(averaged(noisy), clean) < 0.75 * charbonnier(noisy, clean)


@pytest.mark.parametrize("freeze_norms", [4, 6, 9, 1000])
def test_interrupted_run_ends_at_the_same_bits(tmp_path, freeze_norms):
    """Stopped in step 7, one step after the checkpoint, with BatchNorm frozen before, at and after it."""
    plan = replace(PLAN, freeze_norms=freeze_norms)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    *whole, losses = run(tmp_path / "whole", plan)
    with pytest.raises(StopError):
        run(tmp_path / "cut", plan, stop_at=7)
    *resumed, rest = run(tmp_path / "cut", plan)
    assert rest == losses[6:]
    assert all(torch.equal(a, b) for a, b in zip(states(*whole), states(*resumed), strict=True))


def test_finished_run_is_returned_and_not_trained_again(tmp_path):
    averaged, _, losses = run(tmp_path)
    again, _, more = run(tmp_path)
    assert len(losses) == 12
    assert more == []
    assert all(torch.equal(a, b) for a, b in zip(states(averaged), states(again), strict=True))


def test_checkpoint_of_another_plan_is_refused_but_may_go_on_longer(tmp_path):
    run(tmp_path)
    *_, more = run(tmp_path, replace(PLAN, steps=PLAN.steps + 2))
    assert len(more) == 2
    with pytest.raises(TrainingError, match=r"another plan: found \['seed=.*expected \['seed=77'\]"):
        run(tmp_path, replace(PLAN, seed=77))


def test_checkpoint_is_written_atomically(tmp_path):
    run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_frozen_norms_keep_their_statistics_while_weights_move(tmp_path):
    seen = []
    net = make_net()

    def report(step: int, loss: float, averaged: nn.Module) -> None:
        norm = net.body[1]
        seen.append((norm.running_mean.clone(), norm.weight.detach().clone(), norm.training))

    train(net, make_images(), replace(PLAN, freeze_norms=5), tmp_path / "c.pt", report=report)
    means, weights, training = zip(*seen, strict=True)
    assert training == (True,) * 5 + (False,) * 7
    assert not torch.equal(means[3], means[4])
    assert all(torch.equal(mean, means[5]) for mean in means[5:])
    assert not torch.equal(means[4], means[5])  # measured anew at the switch
    assert not torch.equal(weights[5], weights[-1])


def test_average_follows_the_weights_at_the_stated_decay(tmp_path):
    net, average, expected = make_net(), [], []

    def report(step: int, loss: float, averaged: nn.Module) -> None:
        weight = net.body[0].weight.detach().double()
        expected.append(weight.clone() if not expected else 0.5 * expected[-1] + 0.5 * weight)
        average.append(averaged.module.body[0].weight.detach().clone())

    train(net, make_images(), PLAN, tmp_path / "c.pt", report=report)
    # a float32 rounding at each of 12 steps, halved at the next: under 2 units in the last place below 1
    torch.testing.assert_close(average[-1].double(), expected[-1], rtol=0, atol=2 * 2**-24)


def test_patches_depend_on_seed_and_step_alone():
    images = make_images()
    one, two = patches(images, PLAN, 3), patches(images, PLAN, 3)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], patches(images, PLAN, 4)[0])
    assert not torch.equal(one[0], patches(images, replace(PLAN, seed=1), 3)[0])


def test_patches_have_noise_of_the_stated_range_around_clean_crops():
    noisy, clean, sigma = patches(make_images(), replace(PLAN, batch=16), 0)
    assert noisy.shape == clean.shape == (16, 3, 16, 16)
    assert clean.min() >= 0
    assert clean.max() <= 1
    assert noisy.min() < 0 or noisy.max() > 1, "the noise is not clipped"
    levels = (noisy - clean).flatten(1).std(1) * 255
    torch.testing.assert_close(levels, sigma, rtol=0.15, atol=0)
    spread = 5 / math.sqrt(2 * 768)  # five standard errors of a standard deviation from 768 values, relative
    assert (levels > 40 * (1 - spread)).all()
    assert (levels < 50 * (1 + spread)).all()


def test_patch_may_be_the_whole_image():
    images = [torch.arange(3 * 16 * 16).remainder(251).to(torch.uint8).view(3, 16, 16)]
    _, clean, _ = patches(images, PLAN, 0)
    assert {round(v) for v in (clean[0] * 255).flatten().tolist()} == set(range(251))


def test_learning_rate_rises_and_falls_to_zero():
    plan = TrainingPlan(steps=100, warmup=10, learning_rate=2.0)
    rates = [learning_rate(plan, step) for step in range(101)]
    assert rates[0] == 0.2
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[50] == pytest.approx(1.0, rel=1e-12)
    assert rates[100] == pytest.approx(0, abs=1e-12)


def test_image_smaller_than_a_patch_is_refused_with_its_shape(tmp_path):
    text = r"1 images are smaller than the 33 px patch, one is \(3, 64, 20\)"
    with pytest.raises(TrainingError, match=text) as caught:
        train(
            make_net(), [torch.zeros(3, 64, 40), make_images()[2]], replace(PLAN, patch=33), tmp_path / "c.pt"
        )
    assert caught.value.exit_code == 2


def test_loss_that_is_not_finite_stops_before_the_weights_are_spoilt(tmp_path):
    net = make_net()

    def spoil(step: int, loss: float, averaged: nn.Module) -> None:
        if step == 7:
            net.body[3].bias.data.fill_(math.nan)

    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 8\. Lower the learning rate; resume is safe"
    ):
        train(net, make_images(), PLAN, tmp_path / "c.pt", report=spoil, save_every=6)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert saved["step"] == 6
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


@pytest.mark.parametrize("gray", [False, True])
def test_images_are_read_sorted_as_bytes(tmp_path, gray):
    for name, level in (("b.png", 200), ("a.PNG", 100)):
        Image.new("RGB", (7, 5), (level, level, level)).save(tmp_path / name)
    images = load_images(tmp_path, gray=gray)
    assert [tuple(i.shape) for i in images] == [(1 if gray else 3, 5, 7)] * 2
    assert [i.unique().tolist() for i in images] == [[100], [200]]
    assert images[0].dtype == torch.uint8


def test_folder_without_images_is_refused(tmp_path):
    with pytest.raises(
        TrainingError, match=r"no images in .*expected files with a suffix of \['\.avif', '\.bmp'"
    ):
        load_images(tmp_path)


def test_damaged_image_is_refused_by_name(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(TrainingError, match=r"cannot read .*bad\.png.*Remove the file or replace it"):
        load_images(tmp_path)


def test_card_holds_every_setting():
    card = plan_card(PLAN)
    assert TrainingPlan(**card) == PLAN


def make_masked() -> nn.Sequential:
    torch.manual_seed(8)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), *[SparseInvertedResidual(4, 4) for _ in range(2)], nn.Conv2d(4, 3, 1)
    )


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_masks_learn_to_keep_to_their_budget(tmp_path, share):
    net = make_masked()
    budget, seen = MaskBudget(net, share, weight=10.0), []

    def report(step: int, loss: float, averaged: nn.Module) -> None:
        seen.append(torch.stack(budget.shares).mean().item())

    plan = replace(PLAN, steps=50, learning_rate=5e-2)
    train(net, make_images(), plan, tmp_path / "c.pt", penalty=budget, report=report)
    assert abs(seen[0] - share) > 0.15
    assert sum(seen[30:40]) / 10 == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("stop_at", [7, 10])  # with noise on the masks, and in the last fifth without
def test_interrupted_training_of_masks_ends_at_the_same_bits(tmp_path, stop_at):
    def masked(name: str, stop: int = -1) -> list[Tensor]:
        def report(step: int, loss: float, averaged: nn.Module) -> None:
            if step == stop:
                raise StopError

        net = make_masked()
        done, _ = train(
            net,
            make_images(),
            PLAN,
            tmp_path / name,
            penalty=MaskBudget(net, 0.5),
            report=report,
            save_every=5,
        )
        return states(net, done)

    whole = masked("whole.pt")
    with pytest.raises(StopError):
        masked("cut.pt", stop_at)
    assert all(torch.equal(a, b) for a, b in zip(whole, masked("cut.pt"), strict=True))


def test_budget_loss_is_the_one_of_the_paper():
    """Shares 1 and 0, budget 1/4: bounds at the budget at first, (1, 0) from a third of the steps on."""
    net = make_masked()
    for block, bias in zip(net[1:3], (99.0, -99.0), strict=True):
        block.masker.maskconv.weight.data.zero_()
        block.masker.maskconv.bias.data.fill_(bias)
    budget = MaskBudget(net, 0.25, weight=3.0)
    for progress, outside in (
        (0.0, (0.75**2 + 0.25**2) / 2),
        (0.165, (0.375**2 + 0.125**2) / 2),
        (0.33, 0.0),
    ):
        budget.begin(progress)
        net.train()(torch.rand(1, 3, 8, 8))
        assert budget.loss().item() == pytest.approx(3 * ((0.5 - 0.25) ** 2 + outside), rel=1e-5)
        assert all(block.masker.noisy for block in net[1:3])
    held = MaskBudget(net, 0.25, keep=0.5)
    held.begin(0.9)
    net.train()(torch.rand(1, 3, 8, 8))
    assert held.loss().item() == pytest.approx((0.5 - 0.25) ** 2 + (0.375**2 + 0.125**2) / 2, rel=1e-5)
    budget.begin(0.8)
    assert not any(block.masker.noisy for block in net[1:3])


def test_budget_without_masks_or_out_of_range_is_refused():
    with pytest.raises(TrainingError, match="with 0 mask units; expected a share between 0 and 1"):
        MaskBudget(make_net(), 0.5)
    with pytest.raises(TrainingError, match=r"a mask budget of 1\.5 for a network with 2"):
        MaskBudget(make_masked(), 1.5)


def test_fresh_parameters_learn_at_their_own_rate(tmp_path):
    plan = replace(PLAN, steps=1, warmup=1, learning_rate=1e-3, fresh=("body.3.",), fresh_rate=4.0)
    net = make_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    train(net, make_images(), plan, tmp_path / "c.pt")
    moved = {name: float((p - before[name]).abs().median()) for name, p in net.named_parameters()}
    # the first step of Adam is the rate itself, whatever the gradient; weight decay adds 1e-4 of a weight
    assert moved["body.0.weight"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["body.3.weight"] == pytest.approx(4e-3, rel=1e-2)
