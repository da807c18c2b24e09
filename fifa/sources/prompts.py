"""Prompts without pictures: text files, JSON, or the captions of a Parquet table.

.txt     a prompt a line, empty lines aside
.jsonl   a string, or an object with `prompt`, `caption` or `text`, a line
.json    an array of such
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike

from fifa.config import InputError, atomic_path, fingerprint
from fifa.pairs import BadRow, PairTable, RowError, RowGroup, checked_rows
from fifa.sources.reading import json_items, json_lines, lines, set_aside, shown

_SUFFIXES = (".txt", ".jsonl", ".json")
_COLUMNS = ("prompt", "caption", "text")
_ROWS_A_GROUP = 1000  # rows that a pass does at once

_Found = tuple[str, str | RowError]  # where, and the prompt or what is wrong


def open_prompts(path: str | Path) -> PairTable | PromptList:
    """The prompts of a text or JSON file, of a folder of them, or of a Parquet table's `caption`.

    Raises InputError if there is none, or one cannot be read.
    """
    files = prompt_files(Path(path))
    return PromptList(Path(path), files) if files else PairTable.open(path, pictures=False)


def prompt_files(path: Path) -> list[Path]:
    """The text and JSON files that `path` stands for, by name; none for a Parquet table."""
    if path.is_dir() and not any(path.glob("*.parquet")):
        files = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
        return [file for file in files if not file.name.startswith(".")]
    return [path] if path.is_file() and path.suffix in _SUFFIXES else []


class PromptList:
    """Prompts in memory, with what a scoring pass and a selection need of a table."""

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path = path
        self._found: list[_Found] = []
        self._groups: list[RowGroup] = []
        for file in files:
            start = len(self._found)
            self._found += _read(file)
            for first in range(start, len(self._found), _ROWS_A_GROUP):
                rows = min(_ROWS_A_GROUP, len(self._found) - first)
                self._groups.append(RowGroup(file, len(self._groups), first, rows))
        if not self._found:
            raise InputError(f"{path} holds no prompts")

    @property
    def num_rows(self) -> int:
        """Prompts of all files together, those that cannot be read included."""
        return len(self._found)

    def row_groups(self) -> tuple[RowGroup, ...]:
        """Rows in portions of 1,000, in order."""
        return tuple(self._groups)

    def prompts(self, i: int) -> Iterator[tuple[str, str] | BadRow]:
        """Where each row of group `i` stands and its prompt, in order, or why it has none."""
        group = self._groups[i]
        for number in range(group.start, group.start + group.rows):
            where, found = self._found[number]
            yield set_aside(number, found) if isinstance(found, RowError) else (where, found)

    def captions(self, indices: ArrayLike) -> list[str]:
        """The prompts of the given rows, in order."""
        rows = checked_rows(indices, self.num_rows, self.path)
        return [str(self._found[row][1]) for row in rows]

    def take(self, indices: ArrayLike, out_path: str | Path) -> None:
        """Write the given rows as Parquet: `caption` and the `source` that it was read from."""
        found = [self._found[row] for row in checked_rows(indices, self.num_rows, self.path)]
        columns = {
            "caption": pa.array([prompt for _, prompt in found], pa.string()),
            "source": pa.array([where for where, _ in found], pa.string()),
        }
        with atomic_path(out_path) as temporary:
            pq.write_table(pa.table(columns), temporary)

    def fingerprint(self) -> str:
        """16 hex digits that change with any prompt, place or file name."""
        parts = (f"{where}\0{found}" for where, found in self._found)
        return fingerprint(*(part.encode("utf-8", "surrogatepass") for part in parts))


def _read(file: Path) -> Iterator[_Found]:
    if file.suffix == ".txt":
        for number, line in enumerate(lines(file), 1):
            if line.strip():
                yield f"{file.name} line {number}", line.strip()
        return
    if file.suffix == ".jsonl":
        for _, where, record in json_lines(file):
            yield where, _prompt(record, where)
        return
    for number, record in enumerate(json_items(file)):
        where = f"{file.name} item {number}"
        yield where, _prompt(record, where)


def _prompt(record: object, where: str) -> str | RowError:
    """The prompt of a JSON value, or what is wrong with it."""
    if isinstance(record, RowError):
        return record
    text = record
    if isinstance(record, Mapping):
        text = next((record[name] for name in _COLUMNS if name in record), None)
    if isinstance(text, str):
        return text
    return RowError(where, "there is no prompt", f", it is {shown(record)}")
