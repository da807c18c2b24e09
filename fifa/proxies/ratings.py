"""Absolute ratings of single pictures: numeric columns, any of them missing in any row.

`.parquet` with the pictures in it (binary column `jpg` or `image`), or `.csv` and `.jsonl` with
paths in the column `image`, taken from the file's own folder. The prompt is `caption` or `prompt`.
A number that names something, such as `rater_id`, is no rating unless it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fifa.config import InputError, unknown
from fifa.features import (
    Floats,
    VectorStore,
    picture_key,
    store_pictures,
    store_texts,
    stored_pictures,
    stored_texts,
)
from fifa.pairs import HIDDEN_PREFIX, BadRow
from fifa.rewards.encoders import Encoder

PROMPT_COLUMNS = ("caption", "prompt")
PICTURE_COLUMNS = ("jpg", "image")
_ID = re.compile(r"(?i:(?:^|[\W_])ids?(?:$|[\W_]))|[a-z]I[dD]s?$")  # id, rater_id, id_2, raterId


@dataclass(frozen=True)
class Ratings:
    """The usable rows of a rating table with their features."""

    objectives: tuple[str, ...]  # (K,)
    values: NDArray[np.float64]  # (N, K) as rated, NaN where a rating is missing
    prompts: tuple[str, ...]  # (N,)
    pictures: Floats  # (N, D) unit vectors
    texts: Floats  # (N, D) unit vectors
    rejected: tuple[BadRow, ...]


def rating_features(
    path: Path, objectives: Sequence[str], encoder: Encoder, cache: str | Path | None
) -> Ratings:
    """Read a rating table and encode it, from the file `cache` as far as it holds the features.

    A rating that is missing, NaN or infinite is no rating; a row with none, without a prompt or
    with a picture that cannot be read is set aside. Raises InputError if no row is left.
    """
    table = _read(path)
    names = _objectives(table, objectives, path)
    values = np.column_stack([_numbers(table[name]) for name in names])
    prompts = _column(table, PROMPT_COLUMNS, path)
    files = [_file(cell, path) for cell in _column(table, PICTURE_COLUMNS, path)]
    with closing(VectorStore(cache)) as store:
        bad = store_pictures([file for file in files if isinstance(file, bytes)], encoder, store)
        rejected = []
        keep = []
        for row, (prompt, file, rated) in enumerate(zip(prompts, files, values, strict=True)):
            wrong = _wrong(prompt, file, rated, bad)
            if wrong:
                rejected.append(BadRow(row, wrong, f"row {row} of {path}: {wrong}"))
            else:
                keep.append(row)
        if not keep:
            raise InputError(f"not one row of {path} can be used; {rejected[0].reason}")
        kept = [prompts[row] for row in keep]
        store_texts(kept, encoder, store)
        keys = [picture_key(files[row] or b"") for row in keep]
        pictures, _ = stored_pictures(store, encoder, keys)
        texts = stored_texts(store, encoder, kept)
    return Ratings(names, values[keep], tuple(kept), pictures, texts, tuple(rejected))


def _read(path: Path) -> pa.Table:
    from pyarrow import csv, json, parquet

    readers = {".parquet": parquet.read_table, ".csv": csv.read_csv, ".jsonl": json.read_json}
    if path.suffix not in readers:
        raise InputError(f"ratings must be a .parquet, .csv or .jsonl file, not {path}")
    try:
        table = readers[path.suffix](path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if table.num_rows == 0:
        raise InputError(f"{path} holds no rows")
    return table


def _objectives(table: pa.Table, wanted: Sequence[str], path: Path) -> tuple[str, ...]:
    """The wanted columns, or every one whose numbers are no ids; each must hold numbers."""
    numeric = [
        field.name
        for field in table.schema
        if not field.name.startswith(HIDDEN_PREFIX)
        and (pa.types.is_floating(field.type) or pa.types.is_integer(field.type))
    ]
    for name in wanted:
        if name not in numeric:
            raise unknown(f"objective (a numeric column of {path})", name, numeric)
    chosen = wanted or [name for name in numeric if not _ID.search(name)]
    if not chosen:
        raise InputError(f"{path} has no numeric column but ids, so there is nothing rated")
    return tuple(chosen)


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """Ratings as float64, NaN where there is none."""
    found = np.array([np.nan if x is None else float(x) for x in column.to_pylist()])
    return np.where(np.isfinite(found), found, np.nan)


def _column(table: pa.Table, names: Sequence[str], path: Path) -> list[Any]:
    for name in names:
        if name in table.column_names:
            return list(table[name].to_pylist())
    raise InputError(f"{path} has no column '{names[0]}' or '{names[1]}'")


def _file(cell: object, path: Path) -> bytes | None:
    """The encoded picture of a cell, None if there is none."""
    if isinstance(cell, bytes):
        return cell or None
    if not isinstance(cell, str) or not cell:
        return None
    try:
        return (path.parent / cell).read_bytes()
    except OSError:
        return None


def _wrong(prompt: object, file: bytes | None, rated: Floats, bad: dict[bytes, str]) -> str:
    """What makes a row unusable, in a few words; empty if nothing does."""
    if not isinstance(prompt, str) or not prompt.strip():
        return "the prompt is missing or empty"
    if file is None:
        return "there is no picture"
    if picture_key(file) in bad:
        return "the picture cannot be decoded"
    return "" if np.isfinite(rated).any() else "there is no rating"
