"""Small preference data sets in the columns of Pick-a-Pic v2, for the tests of several rooms."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fifa.images import encode_png

SHAPES = ("circle", "square", "star", "triangle", "heart", "cross")
COLOURS = ("red", "blue", "green", "yellow", "purple")
LABELS = ((1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5))


def picture(seed: int, side: int = 16) -> bytes:
    """A PNG of noise whose strength, and so its JPEG size, depends on the seed."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(128, 4 + seed % 23 * 3, (side, side, 3))
    return encode_png(noise.clip(0, 255).astype(np.uint8))


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises a huge picture."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((8, 2, 0, 0, 0))
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    parts = [
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def caption(i: int) -> str:
    """One of 30 prompts times 5 wordings; every tenth row repeats an earlier one in capitals."""
    if i % 10 == 9:
        return caption(i // 10).upper() + "."
    colour, shape = COLOURS[i % 5], SHAPES[i // 5 % 6]
    return f"a {colour} {shape} above {i // 30 + 2} {COLOURS[i * 7 % 5]} things"


def columns(rows: int, side: int = 16) -> dict[str, Any]:
    """The columns of a clean data set."""
    return {
        "caption": [caption(i) for i in range(rows)],
        "jpg_0": [picture(2 * i, side) for i in range(rows)],
        "jpg_1": [picture(2 * i + 1, side) for i in range(rows)],
        "label_0": [LABELS[i % 4][0] for i in range(rows)],
        "label_1": [LABELS[i % 4][1] for i in range(rows)],
        "user_id": [i % 5 for i in range(rows)],
        "truth_utility_0": [float(i) for i in range(rows)],
    }


def write_pairs(path: Path, rows: int = 40, rows_a_group: int = 8, **changed: Any) -> Path:
    """Write a data set of `rows` pairs; `changed` replaces or adds whole columns."""
    table = pa.table({**columns(rows), **changed})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_a_group)
    return path


def write_loud_pairs(path: Path, rows: int) -> Path:
    """A data set in which people prefer the picture with the stronger noise."""
    sides = [[7 * i for i in range(rows)], [7 * i + 11 for i in range(rows)]]
    first = [float(a % 23 >= b % 23) for a, b in zip(*sides, strict=True)]
    return write_pairs(
        path,
        rows,
        100,
        jpg_0=[picture(seed) for seed in sides[0]],
        jpg_1=[picture(seed) for seed in sides[1]],
        label_0=first,
        label_1=[1 - label for label in first],
    )
