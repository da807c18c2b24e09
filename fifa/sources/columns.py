"""Readers of tables with the pictures in their columns: Parquet here, or streamed from the Hub.

Of a Parquet file about one row group is in memory at a time.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fifa.config import InputError, nearest
from fifa.pairs import IMAGE_COLUMNS, Judgment, RowError, judgment_from_row
from fifa.sources.reading import Found, ReadOptions, picture, set_aside, shown

_BATCH = 32  # rows read at once
_BUFFER = 2**20  # bytes of a column chunk read ahead
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_PICKAPIC = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
_PICKAPIC_MORE = ("has_label", "user_id", "created_at", "model_0", "model_1")
_OPEN = ("prompt", "chosen", "rejected")
_OPEN_MORE = ("chosen_model", "rejected_model")


def pickapic(path: str, options: ReadOptions) -> Iterator[Found]:
    """Pick-a-Pic v1 or v2: Parquet file, folder, or Hub data set of the columns caption, jpg_0, ...

    Ties are 0.5 and 0.5. A row with `has_label` false or without a picture is set aside.
    """

    def judgment(row: Mapping[str, Any], where: str) -> Judgment:
        here = {name: picture(row.get(name), _beside(path), where) for name in IMAGE_COLUMNS}
        return judgment_from_row({**row, **here}, where)

    return _judged(_rows(path, options, _PICKAPIC, _PICKAPIC_MORE), judgment)


def open_image_preferences(path: str, options: ReadOptions) -> Iterator[Found]:
    """open-image-preferences (binarized): Parquet or Hub data set of prompt, chosen, rejected.

    The chosen picture becomes jpg_0. Other column names go into `prompt`, `win` and `lose`.
    """
    names = (options.prompt or _OPEN[0], options.win or _OPEN[1], options.lose or _OPEN[2])

    def judgment(row: Mapping[str, Any], where: str) -> Judgment:
        prompt, win, lose = (row.get(name) for name in names)
        if not isinstance(prompt, str):
            raise RowError(where, "the prompt is missing or no text", f", it is {shown(prompt)}")
        return Judgment(
            prompt=prompt,
            image_a=picture(win, _beside(path), where),
            image_b=picture(lose, _beside(path), where),
            outcome="a",
            where=where,
            model_a=str(row.get("chosen_model") or ""),
            model_b=str(row.get("rejected_model") or ""),
        )

    return _judged(_rows(path, options, names, _OPEN_MORE), judgment)


Row = tuple[str, Mapping[str, Any] | RowError]  # where, and the row or why there is none


def _judged(
    rows: Iterator[Row], judgment: Callable[[Mapping[str, Any], str], Judgment]
) -> Iterator[Found]:
    for number, (where, row) in enumerate(rows):
        try:
            if isinstance(row, RowError):
                raise row
            yield judgment(row, where)
        except RowError as error:
            yield set_aside(number, error)


def _beside(path: str) -> Path:
    """The folder that paths inside a table start from."""
    return Path(path) if os.path.isdir(path) else Path(path).parent


def _rows(
    path: str, options: ReadOptions, needed: Sequence[str], more: Sequence[str]
) -> Iterator[Row]:
    if os.path.exists(path):
        return _local_rows(Path(path), options, needed, more)
    if _HUB_NAME.fullmatch(path):
        return hub_rows(path, options, needed, more)
    raise InputError(
        f"{shown(path)} does not exist (expected a .parquet file, a folder of them, "
        f"or the name of a Hub data set such as owner/name)"
    )


def _local_rows(
    path: Path, options: ReadOptions, needed: Sequence[str], more: Sequence[str]
) -> Iterator[Row]:
    for file in _files(path, options.split):
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        number = 0
        try:
            # Read ahead, as is the default, the whole file would come to lie in memory.
            with pq.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False) as table:
                columns = _present(table.schema_arrow.names, needed, more, name)
                for group in range(table.num_row_groups):
                    for batch in table.iter_batches(_BATCH, row_groups=[group], columns=columns):
                        for row in batch.to_pylist():
                            yield f"{name} row {number}", row
                            number += 1
        except (OSError, pa.ArrowException) as error:
            where = f"{name} row {number}"
            detail = f" from here on, {shown(str(error))}"
            yield where, RowError(where, "a file cannot be read", detail)


def _files(path: Path, split: str) -> list[Path]:
    """The Parquet files below `path` by name; only those of the split, where files name splits."""
    if path.is_file():
        return [path]
    found = sorted(
        file
        for file in path.rglob("*.parquet")
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise InputError(f"the folder {path} holds no .parquet file")
    return [file for file in found if file.name.startswith(f"{split}-")] or found


def _present(
    names: Sequence[str], needed: Sequence[str], more: Sequence[str], where: str
) -> list[str]:
    for name in needed:
        if name not in names:
            near = nearest(name, names)
            hint = f"; is it '{near}'?" if near else f", it has {', '.join(names)}"
            raise InputError(f"{where} has no column '{name}'{hint}")
    return [*needed, *(name for name in more if name in names and name not in needed)]


def hub_rows(
    name: str, options: ReadOptions, needed: Sequence[str], more: Sequence[str]
) -> Iterator[Row]:
    """The rows of a Hub data set, streamed and undecoded; a folder's path is a name, too."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise InputError(
            f"reading '{name}' from the Hub needs the package datasets: "
            f"pip install 'd3po-fifa[hub]'"
        ) from None
    number = 0
    try:
        # In Arrow format pictures stay the bytes that they are.
        stream = load_dataset(name, split=options.split, streaming=True).with_format("arrow")
        for table in stream.iter(batch_size=_BATCH):
            columns = _present(table.column_names, needed, more, name)
            for row in table.select(columns).to_pylist():
                yield f"{name} row {number}", row
                number += 1
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, pa.ArrowException) as error:
        raise InputError(
            f"cannot read '{name}' from the Hub at row {number}: {shown(str(error), 300)}"
        ) from None
