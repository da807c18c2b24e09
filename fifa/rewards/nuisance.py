"""What a picture shows off with, whatever was asked for: the biases that a proxy may pick up.

saturation  mean of max - min over the colour channels, in [0, 1]
brightness  mean of luma (ITU-R BT.601), in [0, 1]
contrast    standard deviation of luma
edges       root mean square of the luma's differences to the right and lower neighbour
jpeg        bits a pixel of a JPEG of quality 95
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fifa.config import InputError
from fifa.rewards.jpeg import kilobytes

if TYPE_CHECKING:
    import torch

NUISANCES = ("saturation", "brightness", "contrast", "edges", "jpeg")
LUMA = (0.299, 0.587, 0.114)
VERSION = "nuisance-1"  # changes whenever a measure would


def measure(images: torch.Tensor) -> torch.Tensor:
    """The five NUISANCES of each image (N, 3, H, W) in [0, 1], float32 (N, 5)."""
    import torch

    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 2:
        raise InputError(
            f"nuisances are measured on images (N, 3, H, W) of at least 2 x 2 pixels, "
            f"got {tuple(images.shape)}"
        )
    pixels = images.detach().float()
    luma = (pixels * pixels.new_tensor(LUMA).view(3, 1, 1)).sum(1)
    across, down = luma.diff(dim=2), luma.diff(dim=1)
    area = images.shape[2] * images.shape[3]
    columns = (
        (pixels.amax(1) - pixels.amin(1)).mean((1, 2)),
        luma.mean((1, 2)),
        luma.flatten(1).std(1, correction=0),
        (across.square().mean((1, 2)) + down.square().mean((1, 2))).sqrt(),
        kilobytes(images).to(luma.device) * 8000 / area,
    )
    return torch.stack(columns, dim=1)


class Saturation:
    """Mean of max - min over the colour channels, in [0, 1]: a taste for gaudy pictures."""

    name = "saturation"
    differentiable = False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The nuisance of this name, float32 (N,); prompts are ignored."""
        return measure(images)[:, NUISANCES.index(self.name)]


class Brightness(Saturation):
    """Mean of luma, in [0, 1]: a taste for light pictures."""

    name = "brightness"


class Contrast(Saturation):
    """Standard deviation of luma: a taste for strong light and shade."""

    name = "contrast"


class Edges(Saturation):
    """Root mean square of the differences of neighbouring luma: a taste for busy pictures."""

    name = "edges"
