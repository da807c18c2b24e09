from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fifa.config import InputError
from fifa.images import (
    Pixels,
    data_uri,
    decode,
    encode_jpeg,
    encode_png,
    grid,
    shrink,
    to_batch,
    to_uint8,
)


def noise(height: int = 5, width: int = 7, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_png_is_lossless_and_jpeg_close() -> None:
    image = np.kron(noise(3, 3), np.ones((16, 16, 1), dtype=np.uint8)).astype(np.uint8)
    assert np.array_equal(decode(encode_png(image), "x"), image)
    assert abs(decode(encode_jpeg(image, 95), "x").astype(int) - image).mean() < 6
    assert len(encode_jpeg(image, 30)) < len(encode_jpeg(image, 95))


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def test_decode_shows_what_a_viewer_shows() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))  # hidden red, fully transparent
    assert (decode(encoded(clear, format="PNG"), "x") == 255).all()
    palette = Image.new("P", (2, 2))
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (decode(encoded(palette, format="PNG", transparency=0), "x") == 255).all()
    deep = Image.fromarray(np.full((2, 2), 0x8001, dtype=np.uint16))
    assert (decode(encoded(deep, format="PNG"), "x") == 0x80).all()
    assert decode(encoded(Image.new("L", (4, 3), 7), format="PNG"), "x").shape == (3, 4, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter turn
    turned = encoded(Image.new("RGB", (4, 3)), format="JPEG", exif=exif)
    assert decode(turned, "x").shape == (4, 3, 3)


def test_deep_grey_is_as_bright_as_it_was_or_refused() -> None:
    ramp = np.array([[0, 0x1234, 0x8001], [0xFEDC, 0xFF00, 0xFFFF]], dtype=np.uint16)
    high = (ramp >> 8).astype(np.uint8)[..., None].repeat(3, axis=2)
    pgm = b"P5\n3 2\n65535\n" + ramp.astype(">u2").tobytes()
    for data in (pgm, encoded(Image.fromarray(ramp), format="TIFF")):
        assert np.array_equal(decode(data, "x"), high)
    tenth = b"P5\n3 1\n1000\n" + np.array([0, 500, 1000], dtype=">u2").tobytes()
    assert decode(tenth, "x")[0, :, 0].tolist() == [0, 128, 255]
    for deep in (ramp.astype(np.int32), (ramp / 65535).astype(np.float32)):
        with pytest.raises(InputError, match="grey of 32 bits has no known white"):
            decode(encoded(Image.fromarray(deep), format="TIFF"), "x")


def test_damaged_avif_is_one_sentence() -> None:
    whole = encoded(Image.fromarray(noise(32, 32)), format="AVIF")
    assert decode(whole, "x").shape == (32, 32, 3)
    reasons = set()
    for place in range(0, len(whole), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        try:
            decode(bytes(damaged), "row 3")
        except InputError as error:
            reasons.add(str(error))
    assert any("Failed to decode" in reason for reason in reasons)  # a RuntimeError of Pillow
    assert all(re.fullmatch(r"row 3: cannot decode the image \(.+\)", each) for each in reasons)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_decode_or_raise_one_sentence(cut: int, where: int, value: int) -> None:
    for whole in (encode_png(noise(9, 9)), encode_jpeg(noise(9, 9), 90)):
        damaged = bytearray(whole[: max(1, cut % len(whole))])
        damaged[where % len(damaged)] = value
        try:
            outcome: object = decode(bytes(damaged), "row 3").dtype
        except InputError as error:
            outcome = str(error)
        assert outcome == np.uint8 or re.fullmatch("row 3: .+", str(outcome))


@pytest.mark.parametrize("data", [b"", b"not an image", None, "text", encode_png(noise())[:40]])
def test_what_is_no_image_says_where(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^data\.parquet row 7: "):
        decode(data, "data.parquet row 7")


def test_a_batch_and_back_is_exact_for_every_value() -> None:
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    batch = to_batch([every, 255 - every])
    assert batch.shape == (2, 3, 16, 16)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    assert float(batch.min()) == 0
    assert float(batch.max()) == 1
    assert np.array_equal(to_uint8(batch), np.stack([every, 255 - every]))


def test_channels_rows_and_columns_stay_where_they_were() -> None:
    image = noise(5, 7)
    assert float(to_batch([image])[0, 2, 4, 1]) == pytest.approx(image[4, 1, 2] / 255)


def test_to_uint8_rounds_half_to_even_and_clamps() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, -300.0, 300.0, 254.5]) / 255
    batch = values.reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_uint8(batch)[0, 0, :, 0].tolist() == [0, 2, 2, 0, 255, 254]


def test_to_uint8_refuses_nan_and_wrong_shapes() -> None:
    with pytest.raises(InputError, match="NaN"):
        to_uint8(torch.full((1, 3, 2, 2), float("nan")))
    with pytest.raises(InputError, match="N, 3, H, W"):
        to_uint8(torch.zeros(3, 2, 2))


def test_to_batch_refuses_mixed_sizes_nothing_and_floats() -> None:
    with pytest.raises(InputError, match="one size"):
        to_batch([noise(4, 4), noise(4, 5)])
    with pytest.raises(InputError, match="at least one"):
        to_batch([])
    with pytest.raises(InputError, match="uint8"):
        to_batch([noise().astype(np.float32)])


def test_grid_places_scaled_tiles_and_labels() -> None:
    a, b, c = noise(4, 6, 1), noise(4, 6, 2), noise(2, 2, 3)
    canvas = grid([a, b, c], columns=2, pad=1, scale=2)
    assert canvas.shape == (2 * (8 + 1) + 1, 2 * (12 + 1) + 1, 3)
    assert np.array_equal(canvas[1:9:2, 1:13:2], a)
    assert np.array_equal(canvas[1:9, 14:26][::2, ::2], b)
    assert np.array_equal(canvas[12:16:2, 5:9:2], c)  # the small one sits in the middle
    assert (canvas[0] == 255).all()
    named = grid([a, b], columns=2, labels=["one", "a label far too long for it"], scale=8)
    assert (named[2 + 32 : 2 + 46, 2:50] < 128).any()
    assert named.shape[1] == 2 * (48 + 2) + 2  # a long label does not widen the cell


def test_grid_refuses_nonsense() -> None:
    with pytest.raises(InputError, match="one label an image"):
        grid([noise()], columns=1, labels=["a", "b"])
    with pytest.raises(InputError, match="columns"):
        grid([noise()], columns=0)


def test_shrink_keeps_the_shape_of_large_pictures_and_small_ones_as_they_are() -> None:
    flat = np.full((100, 40, 3), 77, dtype=np.uint8)
    assert shrink(flat, 50).shape == (50, 20, 3)
    assert (shrink(flat, 50) == 77).all()
    assert shrink(np.zeros((1000, 1, 3), dtype=np.uint8), 10).shape == (10, 1, 3)
    assert np.array_equal(shrink(noise(5, 7), 7), noise(5, 7))


def test_data_uri_holds_the_picture() -> None:
    head, _, body = data_uri(noise()).partition(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(decode(base64.b64decode(body), "x"), noise())
