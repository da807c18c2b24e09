"""The one image convention and every way into and out of it.

A batch is a float32 tensor (N, 3, H, W) with values in [0, 1], RGB. A single picture at rest is a
uint8 array (H, W, 3), written `hwc` below. Nothing else in the house converts images.
"""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from fifa.config import InputError

if TYPE_CHECKING:
    import torch

Pixels = NDArray[np.uint8]  # (H, W, 3), RGB

# Pillow reads more, some of it with the help of other programs (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

DECODE_ERRORS = (
    OSError,  # includes UnidentifiedImageError and truncated files
    SyntaxError,  # how Pillow reports a broken PNG chunk
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    struct.error,
    RuntimeError,  # how Pillow reports a broken AVIF frame
    MemoryError,
    Image.DecompressionBombError,
)


@cache
def _readable() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow knows."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def decode(data: bytes, where: str, max_pixels: int | None = None) -> Pixels:
    """Encoded bytes of one of FORMATS to uint8 (H, W, 3), as a viewer would show them.

    EXIF rotation is applied, transparency is laid on white, 16-bit grey keeps its high byte, of an
    animation the first frame counts. A picture whose header promises more than `max_pixels` is not
    unpacked; grey of 32 bits, whole or floating, is refused, as what is white is not known. Raises
    InputError that begins with `where`.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)) or len(data) == 0:
        raise InputError(f"{where}: there is no image (expected encoded bytes such as JPEG or PNG)")
    try:
        with Image.open(io.BytesIO(data), formats=_readable()) as image:
            width, height = image.size
            if max_pixels is not None and width * height > max_pixels:
                raise ValueError(f"{width} x {height}, at most {max_pixels:,} pixels are allowed")
            image.load()
            kind = image.format
            return np.array(_to_rgb(ImageOps.exif_transpose(image), kind), dtype=np.uint8)
    except DECODE_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not a known image format"
        raise InputError(f"{where}: cannot decode the image ({reason})") from None


def _to_rgb(image: Image.Image, kind: str | None) -> Image.Image:
    # Pillow scales PGM of more than 8 bits to 0..65535.
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PPM"):
        grey = np.asarray(image).astype(np.uint16) >> 8
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("grey of 32 bits has no known white; 8 or 16 bits are read")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def encode_png(hwc: Pixels) -> bytes:
    """Lossless PNG bytes."""
    return _encode(hwc, format="PNG", compress_level=6)


def encode_jpeg(hwc: Pixels, quality: int) -> bytes:
    """JPEG bytes with 4:2:0 chroma, as Pillow writes by default; quality 1..100."""
    return _encode(hwc, format="JPEG", quality=quality)


def _encode(hwc: Pixels, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(_checked(hwc)).save(buffer, **options)
    return buffer.getvalue()


def _checked(hwc: Pixels) -> Pixels:
    if hwc.dtype != np.uint8 or hwc.ndim != 3 or hwc.shape[2] != 3 or hwc.size == 0:
        raise InputError(f"expected a uint8 image (H, W, 3), got {hwc.dtype} {hwc.shape}")
    return hwc


def to_batch(images: Sequence[Pixels]) -> torch.Tensor:
    """Pictures uint8 (H, W, 3) of one size to a float32 batch (N, 3, H, W) in [0, 1]."""
    import torch

    if len(images) == 0:
        raise InputError("a batch needs at least one image")
    sizes = sorted({_checked(image).shape[:2] for image in images})
    if len(sizes) > 1:
        raise InputError(f"a batch needs images of one size (height, width), got {sizes}")
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stacked.to(torch.float32, memory_format=torch.contiguous_format) / 255


def to_uint8(batch: torch.Tensor) -> NDArray[np.uint8]:
    """A batch (N, 3, H, W) in [0, 1] to uint8 (N, H, W, 3): clamped, rounded half to even.

    The exact inverse of `to_batch`. Raises InputError on NaN or infinity: a diverged model
    should be seen, not shown as black.
    """
    import torch

    if batch.ndim != 4 or batch.shape[1] != 3:
        raise InputError(f"expected images (N, 3, H, W), got {tuple(batch.shape)}")
    values = batch.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"images {tuple(batch.shape)} hold NaN or infinite values")
    pixels = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def shrink(hwc: Pixels, side: int) -> Pixels:
    """The picture made smaller, its longer side `side` pixels; one that fits already stays."""
    height, width = _checked(hwc).shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return hwc
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.array(Image.fromarray(hwc).resize(size, Image.Resampling.LANCZOS))


def grid(
    images: Sequence[Pixels],
    columns: int,
    pad: int = 2,
    labels: Sequence[str] | None = None,
    scale: int = 1,
) -> Pixels:
    """Pictures side by side on white, row by row, each enlarged `scale` times by repeating pixels.

    Pictures of different sizes are centred in cells of the largest. `labels`, one a picture, are
    written below it and cut to its width.
    """
    if len(images) == 0 or columns < 1 or pad < 0 or scale < 1:
        raise InputError("a grid needs images, columns >= 1, pad >= 0 and scale >= 1")
    if labels is not None and len(labels) != len(images):
        raise InputError(f"a grid needs one label an image, got {len(labels)} for {len(images)}")
    tiles = [_checked(image).repeat(scale, axis=0).repeat(scale, axis=1) for image in images]
    cell_h = max(tile.shape[0] for tile in tiles)
    cell_w = max(tile.shape[1] for tile in tiles)
    strip = 0 if labels is None else 14
    rows = -(-len(tiles) // columns)
    step_y, step_x = cell_h + strip + pad, cell_w + pad
    canvas = np.full((rows * step_y + pad, columns * step_x + pad, 3), 255, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = pad + (i // columns) * step_y, pad + (i % columns) * step_x
        y, x = top + (cell_h - tile.shape[0]) // 2, left + (cell_w - tile.shape[1]) // 2
        canvas[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
        if labels is not None:
            canvas[top + cell_h : top + cell_h + strip, left : left + cell_w] = _written(
                labels[i], cell_w, strip
            )
    return canvas


def _written(text: str, width: int, height: int) -> Pixels:
    """One line of black text on white, cut with an ellipsis where it does not fit."""
    font = ImageFont.load_default(size=10)
    line = " ".join(text.split())
    while line and font.getlength(line) > width:
        line = line.rstrip("…")[:-1].rstrip() + "…" if len(line) > 1 else ""
    strip = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(strip).text((0, 1), line, fill="black", font=font)
    return np.asarray(strip)


def data_uri(hwc: Pixels) -> str:
    """The picture inside a string that an HTML page can show without another file."""
    return "data:image/png;base64," + base64.b64encode(encode_png(hwc)).decode("ascii")
