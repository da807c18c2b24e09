"""What is done to a picture to see what a reward makes of it: gloss, and damage."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from fifa.images import Pixels, decode, encode_jpeg

DISTORTIONS = {"blur": None, "noise": None, "jpeg": None, "cut": None}


def saturated(pixels: Pixels, factor: float) -> Pixels:
    """Colours moved away from grey by `factor` (1 changes nothing), luma kept but for clipping."""
    return np.asarray(ImageEnhance.Color(Image.fromarray(pixels)).enhance(factor))


def showy(pixels: Pixels, saturation: float, contrast: float) -> Pixels:
    """More saturation, then more contrast, by factors of at least 1."""
    image = Image.fromarray(saturated(pixels, saturation))
    return np.asarray(ImageEnhance.Contrast(image).enhance(contrast))


def distorted(pixels: Pixels, kind: str, strength: float, rng: np.random.Generator) -> Pixels:
    """A picture spoiled by one of DISTORTIONS, barely at strength 0 and badly at 1.

    blur: Gaussian of 0.8 to 2 pixels a 32 of the shorter side; noise: Gaussian of 15 to 60 grey
    levels; jpeg: quality 30 to 5; cut: a window of 80% to 50% of both sides, enlarged.
    """
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels)
    if kind == "blur":
        radius = (0.8 + 1.2 * strength) * min(height, width) / 32
        return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)))
    if kind == "noise":
        noise = rng.normal(0, 15 + 45 * strength, pixels.shape)
        return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)
    if kind == "jpeg":
        return decode(encode_jpeg(pixels, round(30 - 25 * strength)), "a distorted picture")
    share = 0.8 - 0.3 * strength
    rows, columns = round(share * height), round(share * width)
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    window = image.crop((left, top, left + columns, top + rows))
    return np.asarray(window.resize((width, height), Image.Resampling.BICUBIC))
