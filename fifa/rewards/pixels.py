"""From a batch of images to what a network was trained to see: resize, crop or pad, normalise.

The original code of every scorer here reads 8-bit pictures and resizes them with Pillow, so that
is done wherever no gradient is asked for; the pixels are then equal to the original's. Where one
is, torch's antialiased filter does the same in floating point. It does not round to 8 bits, which
Pillow does twice: a value differs by 0.2 grey levels on average, by 1.1 at most. Only `squash` may
differ by more, 30 at hard edges: there Pillow 13 chooses which direction it resizes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from fifa.config import InputError
from fifa.images import Pixels, to_uint8

if TYPE_CHECKING:
    import torch

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, BLIP and their descendants
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MOST = 2**26  # pixels
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocess:
    """How a network wants its pictures; call it on images (N, 3, H, W) in [0, 1].

    fit: `crop` cuts the middle of the picture whose shorter side has the size, `pad` puts black
    around the one whose longer side has it, `squash` ignores the proportions.
    centre: where the middle lies when an odd number of pixels is cut: torchvision rounds,
    transformers floors.
    """

    size: int  # pixels, of a square
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    fit: Literal["crop", "pad", "squash"] = "crop"
    centre: Literal["round", "floor"] = "round"
    filter: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (N, 3, size, size), float32, on the device of the images."""
        import torch

        if torch.is_grad_enabled() and images.requires_grad:
            return self._scaled(self._smooth(images.float()))
        # Through 8 bits and Pillow, which lets go of the lock while it resizes.
        with ThreadPoolExecutor(4) as pool:
            squares = np.stack(list(pool.map(self.square, to_uint8(images))))
        return self.normalised(torch.from_numpy(squares).to(images.device))

    def normalised(self, squares: torch.Tensor) -> torch.Tensor:
        """What `square` returned, stacked: uint8 (N, size, size, 3), as the pixels of a call."""
        return self._scaled(squares.permute(0, 3, 1, 2).float() / 255)

    def _scaled(self, square: torch.Tensor) -> torch.Tensor:
        mean, std = (square.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (square - mean) / std

    def square(self, hwc: Pixels) -> Pixels:
        """One picture uint8 (H, W, 3) resized and cut or padded to (size, size, 3).

        Raises InputError for one so narrow that its resized form would have MOST pixels.
        """
        height, width = self._resized(*hwc.shape[:2])
        if height * width > MOST:
            raise InputError(
                f"a picture of {hwc.shape[1]} x {hwc.shape[0]} pixels is too narrow to be resized"
            )
        if (height, width) != hwc.shape[:2]:
            image = Image.fromarray(hwc).resize((width, height), _FILTERS[self.filter])
            hwc = np.asarray(image)
        top, left = self._start(height), self._start(width)
        hwc = hwc[top : top + self.size, left : left + self.size]
        return np.pad(hwc, (self._border(height), self._border(width), (0, 0)))

    def _smooth(self, images: torch.Tensor) -> torch.Tensor:
        """In floating point, so that gradients reach the images."""
        from torch.nn import functional as F

        height, width = self._resized(images.shape[2], images.shape[3])
        # Along the rows, then along the columns, as Pillow does. The filter overshoots, 8-bit
        # pictures cannot, so the values are cut after each.
        for size in ((images.shape[2], width), (height, width)):
            if size != images.shape[2:]:
                images = F.interpolate(images, size, mode=self.filter, antialias=True).clamp(0, 1)
        top, left = self._start(height), self._start(width)
        images = images[:, :, top : top + self.size, left : left + self.size]
        return F.pad(images, (*self._border(width), *self._border(height)))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before anything is cut or added."""
        if self.fit == "squash":
            return self.size, self.size
        if self.fit == "pad":
            scale = max(height, width) / self.size
            return max(1, round(height / scale)), max(1, round(width / scale))
        long = int(self.size * max(height, width) / min(height, width))
        return (long, self.size) if height > width else (self.size, long)

    def _start(self, side: int) -> int:
        spare = max(0, side - self.size)
        return round(spare / 2) if self.centre == "round" else spare // 2

    def _border(self, side: int) -> tuple[int, int]:
        spare = max(0, self.size - side)
        return spare // 2, spare - spare // 2


def of_open_clip(config: Mapping[str, Any], where: str) -> Preprocess:
    """The preprocessing that an open_clip model carries as `visual.preprocess_cfg`."""
    size = config["size"]
    sides = {size} if isinstance(size, int) else set(size)
    fits = {"shortest": "crop", "longest": "pad", "squash": "squash"}
    if len(sides) != 1 or config["interpolation"] not in _FILTERS or config["fill_color"] != 0:
        raise InputError(
            f"{where}: the model wants square pictures, resized by {' or '.join(_FILTERS)}, on "
            f"black, and no others; its preprocess_cfg is {dict(config)}"
        )
    return Preprocess(
        size=sides.pop(),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fit=fits[config["resize_mode"]],  # type: ignore[arg-type]  # one of the three above
        filter=config["interpolation"],
    )


def of_transformers(processor: Any, where: str) -> Preprocess:
    """The preprocessing of a CLIPImageProcessor, in either of transformers' major versions."""
    size, crop = processor.size["shortest_edge"], processor.crop_size
    bicubic = int(processor.resample) == int(Image.Resampling.BICUBIC)
    if not (size == crop["height"] == crop["width"] and bicubic):
        raise InputError(
            f"{where}: expected a preprocessor that resizes the shorter side by a bicubic filter "
            f"and crops the middle to the same size, found {size} and {dict(crop)}"
        )
    return Preprocess(
        size=size,
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        centre="floor",
    )
