"""The loss that trains DynConv's masks (arXiv 1912.03203, section 3.3): a budget of active positions.

    L = (mean_b r_b - t)^2 + mean_b [max(0, r_b - u)^2 + max(0, l - r_b)^2]
    c = max(cos^2(pi/2 min(1, p / 0.33)), k),  u = 1 - c (1 - t),  l = c t

r_b: share of block b's positions that are active in this batch   t: the budget, 0 to 1   p: progress, 0 to 1

The bounds u and l start at the budget for every single block and open during the first third of the training,
so that no block is switched off before it has learnt anything. In the paper they open fully, k = 0: a block
may end always on or always off. With k > 0 every block still decides about a share. In the last fifth the
masks are decided without Gumbel noise, as when deployed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgedyn.errors import TrainingError
from edgedyn.layers.dynconv.masks import Masks, MaskUnit


class MaskBudget:
    """The budget loss of a network's masks; every block weighs the same, as suits networks of equal blocks.

    Args:
        network: contains ``MaskUnit`` modules; forward hooks record their masks.
        budget: share of positions that should be active over all blocks, 0 to 1.
        weight: factor on the loss.
        keep: k, 0 to 1, how tight the bounds of single blocks stay.

    Raises:
        TrainingError: for a network without masks or a budget outside (0, 1).
    """

    def __init__(self, network: nn.Module, budget: float, weight: float = 1.0, keep: float = 0.0) -> None:
        self.units = [module for module in network.modules() if isinstance(module, MaskUnit)]
        if not self.units or not 0 < budget < 1:
            raise TrainingError(
                f"a mask budget of {budget} for a network with {len(self.units)} mask units; expected a "
                "share between 0 and 1 and at least one unit. Train a network without masks without --budget."
            )
        self.budget, self.weight, self.keep = budget, weight, keep
        self.shares: list[Tensor] = []
        self.progress = 0.0
        for unit in self.units:
            unit.register_forward_hook(self._watch)

    def _watch(self, unit: nn.Module, args: tuple[Tensor, ...], masks: Masks) -> None:
        if unit.training:
            self.shares.append(masks.mask.float().mean())

    def begin(self, progress: float) -> None:
        """Prepare a forward pass in training mode; ``progress``: share of the steps that are done."""
        self.shares.clear()
        self.progress = progress
        for unit in self.units:
            unit.noisy = progress < 0.8

    def loss(self) -> Tensor:
        """Return the loss of that forward pass."""
        shares = torch.stack(self.shares)
        tight = max(math.cos(math.pi / 2 * min(1.0, self.progress / 0.33)) ** 2, self.keep)
        upper, lower = 1 - tight * (1 - self.budget), tight * self.budget
        outside = (shares - upper).clamp(min=0) ** 2 + (lower - shares).clamp(min=0) ** 2
        return self.weight * ((shares.mean() - self.budget) ** 2 + outside.mean())
