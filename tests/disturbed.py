"""Modules whose every parameter and statistic has its own value: none zero, one or equal by accident."""

from __future__ import annotations

import torch
from torch import nn


def disturb(module: nn.Module, *, seed: int, spread: float) -> nn.Module:
    """Add noise of a spread to every value, in place; variances are drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            tensor.add_(spread * torch.randn(tensor.shape, generator=generator))
    return module


def redraw(module: nn.Module, *, seed: int) -> nn.Module:
    """Draw every value anew, in place, scales around one: nothing is left of a random initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point():
            is_scale = tensor.dim() == 1 and name.endswith("weight")
            tensor.copy_(is_scale + 0.3 * torch.randn(tensor.shape, generator=generator))
    return module
