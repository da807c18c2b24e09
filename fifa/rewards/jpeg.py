"""How large a picture is as a JPEG: the first two tasks of DDPO (arXiv 2305.13301, sec. 5.1).

The unit is 1,000 bytes of a quality-95 JPEG at the picture's own size. Prompts are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fifa.images import encode_jpeg, to_uint8

if TYPE_CHECKING:
    import torch

QUALITY = 95


def kilobytes(images: torch.Tensor) -> torch.Tensor:
    """JPEG size of each image (N, 3, H, W) in [0, 1], in units of 1,000 bytes, float32 (N,)."""
    import torch

    sizes = [len(encode_jpeg(image, QUALITY)) / 1000 for image in to_uint8(images)]
    return torch.tensor(sizes, dtype=torch.float32)


class Incompressibility:
    """Large files score high: detail, texture, noise."""

    name = "jpeg_incompressibility"
    source = "DDPO, arXiv 2305.13301"
    differentiable = False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Kilobytes, float32 (N,)."""
        return kilobytes(images)


class Compressibility:
    """Small files score high: smooth and empty pictures."""

    name = "jpeg_compressibility"
    source = "DDPO, arXiv 2305.13301"
    differentiable = False

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Minus kilobytes, float32 (N,)."""
        return -kilobytes(images)
