"""The loss of a student: its distance to the output of a larger denoiser, and to the clean image.

    loss = w charbonnier(student(y), teacher(y)) + (1 - w) charbonnier(student(y), x)       y = x + noise

The teacher's output lacks the detail that no denoiser can know, so it is easier to follow than x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgedyn.training.denoise import Batch, charbonnier, denoise


class Distillation:
    """A criterion of ``edgedyn.training.denoise.train``.

    Args:
        teacher: a denoiser, (B, C, H, W) -> the same; set to evaluation mode.
        weight: share w of the teacher in the loss, 0 to 1.
    """

    def __init__(self, teacher: nn.Module, weight: float = 0.7) -> None:
        self.teacher = teacher.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weight = weight

    def __call__(self, y: Tensor, batch: Batch) -> Tensor:
        """Return the loss of the student's output (B, C, H, W), a scalar."""
        with torch.no_grad():
            noisy = batch.noisy.contiguous(memory_format=torch.channels_last)
            target = denoise(self.teacher, noisy, batch.sigma).float()
        return self.weight * charbonnier(y, target) + (1 - self.weight) * charbonnier(y, batch.clean)
