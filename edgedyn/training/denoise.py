"""Train a Gaussian denoiser: patches, noise, loss and the loop, resumable at any step.

    loss = mean sqrt((net(x + sigma n) - x)^2 + eps^2)        x in [0, 1], sigma ~ U(low, high) / 255

The noise n ~ N(0, 1) is not clipped. Every random choice of step k comes from a generator seeded with
(seed, k), so a resumed run gets the same patches and noise as an uninterrupted one. A network with a method
``at_levels(x, sigma)``, such as FFDNet, gets the noise level of each sample; others are blind.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from edgedyn.errors import TrainingError
from edgedyn.images.formats import SUFFIXES
from edgedyn.training.augment import halve, recolor


@dataclass(frozen=True)
class TrainingPlan:
    """Settings of one run; written into the training card.

    ``sigma`` is the range of noise levels on the 0..255 scale, ``learning_rate`` the peak of a cosine with
    ``warmup`` steps, ``ema`` the decay of the averaged weights that are kept. From step ``freeze_norms`` on
    BatchNorm uses fixed statistics, as a deployed network does: with 8 patches of 64 px the kernel grids are
    2 x 2, their batch statistics rest on 32 values, and a network trained on those alone fails on unusual
    images. ``halve`` is the share of samples from images at half their size, ``recolor`` the probability of
    each change of colour. Parameters whose names start with a prefix in ``fresh``, those that start without
    trained values, learn at ``fresh_rate`` times the learning rate.
    """

    steps: int = 14000
    batch: int = 8
    patch: int = 64
    sigma: tuple[float, float] = (5.0, 50.0)
    learning_rate: float = 1e-3
    warmup: int = 200
    ema: float = 0.999
    freeze_norms: int = 2000
    seed: int = 0
    bfloat16: bool = False
    compile: bool = False
    halve: float = 0.0
    recolor: float = 0.0
    fresh: tuple[str, ...] = ()
    fresh_rate: float = 1.0


class Batch(NamedTuple):
    """The samples of a step.

    Attributes:
        noisy: (B, C, H, W), not clipped.
        clean: (B, C, H, W) in [0, 1].
        sigma: noise levels, (B,), on the 0..255 scale.
    """

    noisy: Tensor
    clean: Tensor
    sigma: Tensor


class Penalty(Protocol):
    """A term of the loss besides the image error, such as ``edgedyn.training.masks.MaskBudget``."""

    def begin(self, progress: float) -> None:
        """Prepare a forward pass; ``progress`` is the share of the steps that are done, 0 to 1."""

    def loss(self) -> Tensor:
        """Return the term for that forward pass, a scalar."""


def load_images(folder: Path, *, gray: bool = False) -> list[Tensor]:
    """Read every image of a folder into memory as uint8 (C, H, W), sorted by name.

    Raises:
        TrainingError: when the folder holds no image, or one cannot be read.
    """
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise TrainingError(f"no images in {folder}: expected files with a suffix of {sorted(SUFFIXES)}.")
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("L" if gray else "RGB"))
        except OSError as error:
            raise TrainingError(f"cannot read {file}: {error}. Remove the file or replace it.") from error
        images.append(torch.from_numpy(np.atleast_3d(pixels).copy()).permute(2, 0, 1))
    return images


def patches(images: list[Tensor], plan: TrainingPlan, step: int) -> Batch:
    """Draw the batch of a step: image, crop, one of 8 orientations, colours, noise level per sample."""
    rng = np.random.default_rng([plan.seed, step])
    crops = []
    for index in rng.integers(len(images), size=plan.batch):
        image = images[index]
        halved = plan.halve > 0 and min(image.shape[1:]) >= 2 * plan.patch and rng.random() < plan.halve
        side = 2 * plan.patch if halved else plan.patch
        top = rng.integers(image.shape[1] - side + 1)
        left = rng.integers(image.shape[2] - side + 1)
        crop = image[:, top : top + side, left : left + side].rot90(int(rng.integers(4)), (1, 2))
        crop = (crop.flip(2) if rng.integers(2) else crop).float() / 255
        crop = halve(crop) if halved else crop
        crops.append(recolor(crop, rng, plan.recolor) if plan.recolor else crop)
    clean = torch.stack(crops)
    sigma = torch.from_numpy(rng.uniform(*plan.sigma, size=plan.batch)).float()
    noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), dtype=np.float32))
    return Batch(clean + sigma.view(-1, 1, 1, 1) / 255 * noise, clean, sigma)


def charbonnier(y: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """Return the Charbonnier loss, a smooth L1."""
    return ((y - target) ** 2 + eps**2).sqrt().mean()


def clean_loss(y: Tensor, batch: Batch) -> Tensor:
    """Return the Charbonnier loss against the clean images."""
    return charbonnier(y, batch.clean)


def denoise(model: nn.Module, noisy: Tensor, sigma: Tensor) -> Tensor:
    """Run a denoiser on (B, C, H, W), at levels (B,) on the 0..255 scale if it is conditioned on them."""
    y: Tensor = model.at_levels(noisy, sigma) if hasattr(model, "at_levels") else model(noisy)  # type: ignore[operator]
    return y


def learning_rate(plan: TrainingPlan, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to zero at ``plan.steps``."""
    ramp = min(1.0, (step + 1) / plan.warmup)
    return plan.learning_rate * ramp * 0.5 * (1 + math.cos(math.pi * min(1.0, step / plan.steps)))


def train(
    model: nn.Module,
    images: list[Tensor],
    plan: TrainingPlan,
    checkpoint: Path,
    *,
    criterion: Callable[[Tensor, Batch], Tensor] = clean_loss,
    penalty: Penalty | None = None,
    report: Callable[[int, float, nn.Module], None] = lambda step, loss, averaged: None,
    save_every: int = 250,
) -> tuple[nn.Module, float]:
    """Run the plan from the checkpoint, or from the start where there is none.

    Args:
        model: the network, (B, C, H, W) -> the same; trained in place.
        images: uint8 (C, H, W), each at least ``plan.patch`` high and wide.
        plan: the settings; a checkpoint may be continued with another number of steps.
        checkpoint: file written every ``save_every`` steps, atomically, and read at the start.
        criterion: the loss of an output (B, C, H, W) in float32 and its batch, a scalar.
        penalty: a further term of the loss.
        report: called after every step with (step, loss, averaged model).
        save_every: steps between checkpoints.

    Returns:
        The averaged model in evaluation mode, and the seconds of all runs together.

    Raises:
        TrainingError: when an image is smaller than a patch, the checkpoint is of another plan, or the loss
            or its gradient is not finite; the checkpoint is then the last good one.
    """
    small = [tuple(i.shape) for i in images if min(i.shape[1:]) < plan.patch]
    if small:
        raise TrainingError(
            f"{len(small)} images are smaller than the {plan.patch} px patch, one is {small[0]}."
        )
    torch.manual_seed(plan.seed)
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    average = get_ema_multi_avg_fn(plan.ema)  # type: ignore[no-untyped-call]
    averaged = AveragedModel(model, multi_avg_fn=average)
    optimizer = _optimizer(model, plan)
    start, seconds = _resume(checkpoint, plan, model, averaged, optimizer)
    forward = torch.compile(denoise) if plan.compile else denoise
    begin = time.monotonic() - seconds
    for step in range(start, plan.steps):
        if step == max(start, plan.freeze_norms):
            switches = step == plan.freeze_norms > 0  # trained weights have statistics that fit them
            _freeze_norms(model, images, plan, measure=switches)
            if switches:
                averaged.n_averaged.zero_()  # the average starts again from the weights as they are now
        batch = patches(images, plan, step)
        torch.manual_seed(int(np.random.default_rng([plan.seed, step, 1]).integers(2**63)))  # Gumbel masks
        if penalty:
            penalty.begin(step / plan.steps)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=plan.bfloat16):
            y = forward(model, batch.noisy.contiguous(memory_format=torch.channels_last), batch.sigma)
            loss = criterion(y.float(), batch)
        _descend(loss + penalty.loss() if penalty else loss, model, optimizer, plan, step)
        averaged.update_parameters(model)
        report(step, loss.item(), averaged)
        if (step + 1) % save_every == 0 or step + 1 == plan.steps:
            _save(checkpoint, plan, step + 1, time.monotonic() - begin, model, averaged, optimizer)
    return averaged.module.eval(), time.monotonic() - begin


def _optimizer(model: nn.Module, plan: TrainingPlan) -> torch.optim.Optimizer:
    """Return AdamW with a group of trained and one of fresh parameters."""
    groups: list[list[nn.Parameter]] = [[], []]
    for name, parameter in model.named_parameters():
        groups[bool(plan.fresh) and name.startswith(plan.fresh)].append(parameter)
    factors = [
        {"params": group, "factor": f} for group, f in zip(groups, (1.0, plan.fresh_rate), strict=True)
    ]
    return torch.optim.AdamW(
        [group for group in factors if group["params"]], lr=plan.learning_rate, weight_decay=1e-4, fused=True
    )


def _descend(
    loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, plan: TrainingPlan, step: int
) -> None:
    """Change the weights by one step; refuse a loss or a gradient that is not finite before that."""
    for group in optimizer.param_groups:
        group["lr"] = group["factor"] * learning_rate(plan, step)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for name, value in (("loss", loss.item()), ("gradient's norm", norm.item())):
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} is {value} at step {step}. Lower the learning rate; resume is safe."
            )
    optimizer.step()


def _freeze_norms(
    model: nn.Module, images: list[Tensor], plan: TrainingPlan, *, measure: bool, batches: int = 100
) -> None:
    """Switch BatchNorm to its running statistics; ``measure`` computes them anew over many batches."""

    def stream() -> Iterator[Tensor]:
        for k in range(batches):
            yield patches(images, plan, plan.steps + k).noisy.contiguous(memory_format=torch.channels_last)

    if measure:
        update_bn(stream(), model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _resume(
    path: Path,
    plan: TrainingPlan,
    model: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    expected, actual = _fixed(plan), state["plan"]
    if changed := sorted(key for key in expected if expected[key] != actual.get(key)):
        raise TrainingError(
            f"checkpoint {path} is of another plan: found {[f'{k}={actual.get(k)}' for k in changed]}, "
            f"expected {[f'{k}={expected[k]}' for k in changed]}. Use those settings, or another checkpoint."
        )
    model.load_state_dict(state["model"])
    averaged.load_state_dict(state["averaged"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def _fixed(plan: TrainingPlan) -> dict[str, object]:
    """Return the settings that a resumed run must share with its checkpoint: all but ``steps``."""
    return {key: value for key, value in asdict(plan).items() if key != "steps"}


def _save(
    path: Path,
    plan: TrainingPlan,
    step: int,
    seconds: float,
    model: nn.Module,
    averaged: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    state = {
        "plan": _fixed(plan),
        "step": step,
        "seconds": seconds,
        "model": model.state_dict(),
        "averaged": averaged.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def plan_card(plan: TrainingPlan) -> dict[str, object]:
    """Return the plan as JSON values for a training card."""
    return asdict(plan)
