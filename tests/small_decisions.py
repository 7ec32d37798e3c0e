"""Small networks that decide by rules which can be followed by hand, and samples for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from edgedyn.images.sample import Sample
from edgedyn.layers import RoutedModel, part_inputs, parts
from edgedyn.recipe.recipe import Recipe

CENTERS = (0.125, 0.5, 0.875)


class NearestBrightness(nn.Module):
    """A gate that picks the center nearest to the mean m of an image: argmax of 2 m c - c^2."""

    def __init__(self, centers: tuple[float, ...] = CENTERS) -> None:
        super().__init__()
        self.fc = nn.Linear(1, len(centers))
        c = torch.tensor(centers)
        self.fc.load_state_dict({"weight": 2 * c[:, None], "bias": -(c**2)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.mean((1, 2, 3))[:, None])
        return y


class BrightParts(nn.Module):
    """A convolution where the mean over colours reaches a threshold; the head computes logits from it."""

    def __init__(self, threshold: float = 0.5, channels: int = 4) -> None:
        super().__init__()
        self.threshold = threshold
        self.head = nn.Conv2d(3, 1, 1)
        nn.init.constant_(self.head.weight, 1 / 3)
        nn.init.zeros_(self.head.bias)
        self.body = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + (self.head(x) >= self.threshold).to(x.dtype) * self.body(x)
        return y


class FirstRows(nn.Module):
    """Doubles the first two positive rows; there is no room for more."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        positive = (x.amax((1, 3), keepdim=True) > 0).to(x.dtype)
        fits = positive * (positive.cumsum(2) <= 2).to(x.dtype)
        return x + fits * x, (positive.sum((1, 2, 3)) - 2).clamp(min=0)


class EveryRow(nn.Module):
    """Doubles every positive row."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.amax((1, 3), keepdim=True) > 0).to(x.dtype) * x


def make_routed(variant=BrightParts) -> RoutedModel:
    torch.manual_seed(3)
    return RoutedModel(NearestBrightness(), {f"w{k}": variant() for k in range(3)}).eval()


def routed_denoiser() -> RoutedModel:
    """Return three variants of two convolutions each, and their gate; a recipe names it."""
    return make_routed(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    )


def masked_denoiser() -> BrightParts:
    """Return the one network with a mask; a recipe names it."""
    torch.manual_seed(4)
    return BrightParts().eval()


def make_recipe(*, is_trained: bool = True, folder: Path = Path(), **coverage) -> Recipe:
    return Recipe(
        name="small",
        model={"network": "small", "weights": "of.safetensors" if is_trained else None},
        input={"shape": [1, 3, 8, 10]},
        tile={"overlap": 0},
        target="executorch",
        precision="int8",
        validation="photos",
        quantize={"coverage": coverage},
        folder=str(folder),
    )


def make_samples(*images: float | np.ndarray, sigma: float = 0.0) -> list[Sample]:
    """Return samples of shape (1, 3, 8, 10), constant where a number is given, named a.png, b.png, ..."""
    full = [np.broadcast_to(np.float32(image), (1, 3, 8, 10)).copy() for image in images]
    return [Sample((x,), x, sigma, f"{letter}.png") for letter, x in zip("abcdefgh", full, strict=False)]


def given(model: nn.Module, samples: list[Sample]):
    """Return the programs of a network, and what each takes for each sample."""
    observed = [part_inputs(model, tuple(torch.from_numpy(x) for x in s.inputs)) for s in samples]
    exported = {
        name: torch.export.export(module, observed[0][name], strict=False)
        for name, module in parts(model).items()
    }
    return exported, observed
