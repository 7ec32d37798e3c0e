"""Train a blind Gaussian denoiser: patches, noise, loss and the loop, resumable at any step.

    loss = mean sqrt((net(x + sigma n) - x)^2 + eps^2)        x in [0, 1], sigma ~ U(low, high) / 255

The noise n ~ N(0, 1) is not clipped. Every random choice of step k comes from a generator seeded with
(seed, k), so a resumed run gets the same patches and noise as an uninterrupted one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from edgedyn.errors import TrainingError
from edgedyn.images.photo import IMAGE_SUFFIXES


@dataclass(frozen=True)
class TrainingPlan:
    """Settings of one run; written into the training card.

    ``sigma`` is the range of noise levels on the 0..255 scale, ``learning_rate`` the peak of a cosine with
    ``warmup`` steps, ``ema`` the decay of the averaged weights that are kept. From step ``freeze_norms`` on
    BatchNorm uses fixed statistics, as a deployed network does: with 8 patches of 64 px the kernel grids are
    2 x 2, their batch statistics rest on 32 values, and a network trained on those alone fails on unusual
    images.
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
    files = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise TrainingError(
            f"no images in {folder}: expected files with a suffix of {sorted(IMAGE_SUFFIXES)}."
        )
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("L" if gray else "RGB"))
        except OSError as error:
            raise TrainingError(f"cannot read {file}: {error}. Remove the file or replace it.") from error
        images.append(torch.from_numpy(np.atleast_3d(pixels).copy()).permute(2, 0, 1))
    return images


def patches(images: list[Tensor], plan: TrainingPlan, step: int) -> tuple[Tensor, Tensor]:
    """Draw the (noisy, clean) batch of a step: image, crop, one of 8 orientations, noise level per sample."""
    rng = np.random.default_rng([plan.seed, step])
    crops = []
    for index in rng.integers(len(images), size=plan.batch):
        image = images[index]
        top = rng.integers(image.shape[1] - plan.patch + 1)
        left = rng.integers(image.shape[2] - plan.patch + 1)
        crop = image[:, top : top + plan.patch, left : left + plan.patch].rot90(int(rng.integers(4)), (1, 2))
        crops.append(crop.flip(2) if rng.integers(2) else crop)
    clean = torch.stack(crops).float() / 255
    sigma = torch.from_numpy(rng.uniform(*plan.sigma, size=plan.batch)).float().view(-1, 1, 1, 1) / 255
    noise = torch.from_numpy(rng.standard_normal(tuple(clean.shape), dtype=np.float32))
    return clean + sigma * noise, clean


def charbonnier(y: Tensor, target: Tensor, eps: float = 1e-3) -> Tensor:
    """Return the Charbonnier loss, a smooth L1."""
    return ((y - target) ** 2 + eps**2).sqrt().mean()


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
        penalty: a further term of the loss.
        report: called after every step with (step, loss, averaged model).
        save_every: steps between checkpoints.

    Returns:
        The averaged model in evaluation mode, and the seconds of all runs together.

    Raises:
        TrainingError: when an image is smaller than a patch, the checkpoint is of another plan, or the loss
            is not finite.
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=1e-4, fused=True)
    start, seconds = _resume(checkpoint, plan, model, averaged, optimizer)
    forward = torch.compile(model) if plan.compile else model
    begin = time.monotonic() - seconds
    for step in range(start, plan.steps):
        if step == max(start, plan.freeze_norms):
            switches = step == plan.freeze_norms > 0  # trained weights have statistics that fit them
            _freeze_norms(model, images, plan, measure=switches)
            if switches:
                averaged.n_averaged.zero_()  # the average starts again from the weights as they are now
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        noisy, clean = patches(images, plan, step)
        torch.manual_seed(int(np.random.default_rng([plan.seed, step, 1]).integers(2**63)))  # Gumbel masks
        if penalty:
            penalty.begin(step / plan.steps)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=plan.bfloat16):
            y = forward(noisy.contiguous(memory_format=torch.channels_last))
        loss = charbonnier(y.float(), clean)
        if penalty:
            loss = loss + penalty.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the loss is {loss.item()} at step {step}. Lower the learning rate; resume is safe."
            )
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        report(step, loss.item(), averaged)
        if (step + 1) % save_every == 0 or step + 1 == plan.steps:
            _save(checkpoint, plan, step + 1, time.monotonic() - begin, model, averaged, optimizer)
    return averaged.module.eval(), time.monotonic() - begin


def _freeze_norms(
    model: nn.Module, images: list[Tensor], plan: TrainingPlan, *, measure: bool, batches: int = 100
) -> None:
    """Switch BatchNorm to its running statistics; ``measure`` computes them anew over many batches."""

    def stream() -> Iterator[Tensor]:
        for k in range(batches):
            yield patches(images, plan, plan.steps + k)[0].contiguous(memory_format=torch.channels_last)

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
