"""What people said about two pictures, the pairs one can train on, and the table they come in.

The table is Parquet in the columns of Pick-a-Pic v2: `caption`, the encoded images `jpg_0` and
`jpg_1`, the labels `label_0` and `label_1` (1 and 0, or 0.5 and 0.5 for a tie), and any others.
Columns named `truth_*` hold what a simulation knows and a person would not; they are never read.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from fifa.config import InputError, atomic_path, fingerprint, nearest

Outcome = Literal["a", "b", "tie"]

IMAGE_COLUMNS = ("jpg_0", "jpg_1")
HIDDEN_PREFIX = "truth_"
_ROWS_A_GROUP = 1000  # row groups of the files written here


@dataclass(frozen=True)
class Judgment:
    """One person's verdict on two pictures, the raw fact; it may be a tie."""

    prompt: str
    image_a: bytes  # encoded
    image_b: bytes
    outcome: Outcome
    who: str = ""  # user id, empty when unknown
    when: str = ""  # as the source wrote it, empty when unknown
    where: str = ""  # file and row it was read from
    model_a: str = ""  # what painted image a, empty when unknown
    model_b: str = ""


@dataclass(frozen=True)
class Pair:
    """A picture that won over another under the same prompt; never a tie."""

    prompt: str
    win: bytes  # encoded
    lose: bytes
    weight: float = 1.0
    provenance: str = ""


@dataclass(frozen=True)
class BadRow:
    """A row that is no judgment, and the sentence that says why."""

    row: int  # in the whole table
    kind: str  # a few words to count by
    reason: str


class RowError(InputError):
    """A row is no judgment; `kind` says in a few words what is wrong, to count by."""

    def __init__(self, where: str, kind: str, detail: str = "") -> None:
        super().__init__(f"{where}: {kind}{detail}")
        self.kind = kind


# ---- one row -------------------------------------------------------------------------------------

MAX_PROMPT = 10_000  # characters


def check_prompt(prompt: str, where: str, most: int = MAX_PROMPT) -> None:
    """Raise RowError, which begins with `where`, for a prompt that nothing can be made of."""
    if not isinstance(prompt, str) or _is_blank(prompt):
        raise RowError(where, "the prompt is empty")
    if "\0" in prompt:
        raise RowError(where, "the prompt holds a NUL byte")
    if len(prompt) > most:
        detail = f", {len(prompt):,} characters where {most:,} are allowed"
        raise RowError(where, "the prompt is too long", detail)
    if _is_broken(prompt):
        raise RowError(where, "the prompt is not valid Unicode")


def _is_blank(text: str) -> bool:
    """Whether there is nothing to see: white space, control and format characters only."""
    return all(unicodedata.category(letter)[0] in "CZ" for letter in text)


_OUTCOMES: dict[tuple[float, float], Outcome] = {(1, 0): "a", (0, 1): "b", (0.5, 0.5): "tie"}


def judgment_from_row(row: Mapping[str, Any], where: str) -> Judgment:
    """One Pick-a-Pic row as a Judgment; RowError that begins with `where` if it is not one."""
    prompt = _caption(row, where)
    for column in IMAGE_COLUMNS:
        if not isinstance(row.get(column), bytes) or not row[column]:
            raise RowError(where, "an image is missing or empty", f" ({column})")
    labels = (row.get("label_0"), row.get("label_1"))
    outcome = _OUTCOMES.get(labels) if None not in labels else None  # type: ignore[arg-type]
    if outcome is None or row.get("has_label") is False:
        detail = f", it is {labels}, allowed are (1, 0), (0, 1) and (0.5, 0.5)"
        raise RowError(where, "the label is missing or wrong", detail)
    return Judgment(
        prompt=prompt,
        image_a=row["jpg_0"],
        image_b=row["jpg_1"],
        outcome=outcome,
        who=known(row.get("user_id")),
        when=known(row.get("created_at")),
        where=where,
        model_a=known(row.get("model_0")),
        model_b=known(row.get("model_1")),
    )


def _caption(row: Mapping[str, Any], where: str) -> str:
    prompt = row.get("caption")
    if not isinstance(prompt, str) or not prompt.strip():
        raise RowError(where, "the caption is missing or empty")
    if _is_broken(prompt):
        raise RowError(where, "the caption is not valid Unicode")
    return prompt


def _is_broken(text: str) -> bool:
    """Whether the text holds half a letter, which UTF-8 cannot express."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def known(value: Any) -> str:
    """A name or a time as text, empty when unknown, as NaN is; 7.0 is 7.

    Integers with gaps become such floats in many a table.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        value = int(value) if value.is_integer() else value
    return "" if value is None else str(value)


def pair_from(judgment: Judgment) -> Pair | None:
    """The pair a judgment stands for; None for a tie, which no pair can express."""
    if judgment.outcome == "tie":
        return None
    images = (judgment.image_a, judgment.image_b)
    win, lose = images if judgment.outcome == "a" else images[::-1]
    return Pair(judgment.prompt, win, lose, provenance=judgment.where)


def to_pairs(judgments: Iterable[Judgment]) -> tuple[list[Pair], Counter[str]]:
    """All pairs in order, and how many judgments were dropped for which reason.

    Dropped are ties, and pictures compared with themselves: neither says what to prefer.
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for judgment in judgments:
        pair = pair_from(judgment)
        if pair is None:
            dropped["tie"] += 1
        elif pair.win == pair.lose:
            dropped["same picture twice"] += 1
        else:
            pairs.append(pair)
    return pairs, dropped


def load_pairs(path: str | Path) -> tuple[list[Pair], Counter[str]]:
    """All pairs of a Parquet file or folder in memory, and what was dropped, bad rows included."""
    table = PairTable.open(path)
    bad: list[BadRow] = []

    def judgments() -> Iterator[Judgment]:
        for group in range(len(table.row_groups())):
            for row in table.judgments(group):
                if isinstance(row, BadRow):
                    bad.append(row)
                else:
                    yield row

    pairs, dropped = to_pairs(judgments())
    if bad:
        dropped["bad row"] = len(bad)
    return pairs, dropped


# ---- prompts -------------------------------------------------------------------------------------


def normalise_prompt(prompt: str) -> str:
    """The form in which two prompts are the same: case, width, spaces and closing marks removed.

    Unicode NFKC with case folding, invisible format characters dropped, runs of white space made
    one blank, `.,;:!` at the end cut. Applying it twice changes nothing.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", prompt).casefold())
    text = unicodedata.normalize("NFKC", text.casefold())
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", text).split()).rstrip(" .,;:!")


def distinct_prompts(prompts: Sequence[str]) -> tuple[list[str], NDArray[np.int64]]:
    """Distinct prompts as first spelled, in order of appearance, and the number of each prompt's.

    Prompts are the same if they are so after `normalise_prompt`.
    """
    numbers: dict[str, int] = {}
    first: list[str] = []
    ids = np.empty(len(prompts), dtype=np.int64)
    for i, prompt in enumerate(prompts):
        key = normalise_prompt(prompt)
        if key not in numbers:
            numbers[key] = len(first)
            first.append(prompt)
        ids[i] = numbers[key]
    return first, ids


def held_out(prompt: str, fraction: float, seed: int) -> bool:
    """Whether a prompt belongs to the test part, which holds about `fraction` of the prompts.

    Decided by a hash of the normalised prompt alone, so repetitions of a prompt never straddle the
    split, and a larger fraction contains every smaller one of the same seed.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"the held-out fraction is {fraction}, it must lie in [0, 1]")
    key = f"{seed}\0{normalise_prompt(prompt)}".encode("utf-8", "surrogatepass")
    draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
    return draw < fraction * 2**64


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowGroup:
    """The unit of reading: rows [start, start + rows) of the table, a row group of one file."""

    path: Path
    index: int  # within the file
    start: int  # row of the table
    rows: int


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


def _plain(schema: pa.Schema) -> pa.Schema:
    """The schema without dictionaries and views, which differ by file or which `take` lacks."""
    for i, field in enumerate(schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_string_view(kind):
            kind = pa.large_string()
        if pa.types.is_binary_view(kind):
            kind = pa.large_binary()
        schema = schema.set(i, field.with_type(kind))
    return schema


_NEEDED = {
    "caption": (_is_text, "text"),
    "jpg_0": (_is_bytes, "bytes"),
    "jpg_1": (_is_bytes, "bytes"),
    "label_0": (_is_number, "a number"),
    "label_1": (_is_number, "a number"),
}
_OPTIONAL = ("user_id", "created_at", "has_label", "model_0", "model_1")


class PairTable:
    """A preference data set on disk, read a row group at a time; made by `PairTable.open`."""

    def __init__(self, path: Path, groups: Sequence[RowGroup], schema: pa.Schema) -> None:
        self.path = path
        self.schema = schema
        self._groups = tuple(groups)

    @classmethod
    def open(cls, path: str | Path, pictures: bool = True) -> PairTable:
        """A `.parquet` file, or a folder of them taken in order of their names.

        Categories and views, as pandas and polars write them, are read as the text that they are.
        Without `pictures` a `caption` is all that it needs to have. Raises InputError if there is
        none, one cannot be read, a column is missing or of the wrong type, or the files disagree
        on their columns.
        """
        path = Path(path)
        groups: list[RowGroup] = []
        schema: pa.Schema | None = None
        start = 0
        for file in _parquet_files(path):
            footer = _footer(file)
            own = _plain(footer.schema.to_arrow_schema())
            _check_columns(own, file, list(_NEEDED) if pictures else ["caption"])
            if schema is not None and not own.equals(schema):
                raise InputError(f"{file}: its columns differ from those of {groups[0].path}")
            schema = schema or own
            for index in range(footer.num_row_groups):
                rows = footer.row_group(index).num_rows
                groups.append(RowGroup(file, index, start, rows))
                start += rows
        if schema is None or start == 0:
            raise InputError(f"{path} holds no rows")
        return cls(path, groups, schema)

    @property
    def num_rows(self) -> int:
        """Rows of all files together."""
        return self._groups[-1].start + self._groups[-1].rows

    def row_groups(self) -> tuple[RowGroup, ...]:
        """The row groups in table order."""
        return self._groups

    def read_group(self, i: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Row group `i` with the given columns, by default all but the hidden `truth_*` ones.

        Asking for a hidden column by name is an InputError: what filters may not see, they cannot.
        """
        known = [name for name in self.schema.names if not name.startswith(HIDDEN_PREFIX)]
        for name in columns or ():
            if name not in known:
                raise InputError(f"{self.path} has no column '{name}', it has {', '.join(known)}")
        return self._read(self._groups[i], known if columns is None else list(columns))

    def read_rows(self, indices: ArrayLike, columns: Sequence[str] | None = None) -> pa.Table:
        """The given rows in table order, columns as in `read_group`; all of them in memory."""
        rows = checked_rows(indices, self.num_rows, self.path)
        pieces = [self.read_group(0, columns).slice(0, 0)]
        for i, group in enumerate(self._groups):
            first, last = np.searchsorted(rows, [group.start, group.start + group.rows])
            if first < last:
                local = pa.array(rows[first:last] - group.start)
                pieces.append(self.read_group(i, columns).take(local))
        return pa.concat_tables(pieces)

    def captions(self, indices: ArrayLike) -> list[str]:
        """The prompts of the given rows, in table order."""
        found: list[str] = self.read_rows(indices, ["caption"])["caption"].to_pylist()
        return found

    def judgments(self, i: int) -> Iterator[Judgment | BadRow]:
        """The rows of group `i` in order; a row that is no judgment comes as a BadRow."""
        group = self._groups[i]
        columns = [*_NEEDED, *(name for name in _OPTIONAL if name in self.schema.names)]
        for offset, row in enumerate(_rows(self.read_group(i, columns))):
            number = group.start + offset
            try:
                yield judgment_from_row(row, f"row {number} ({group.path.name})")
            except RowError as error:
                yield BadRow(number, error.kind, str(error))

    def prompts(self, i: int) -> Iterator[tuple[str, str] | BadRow]:
        """Where each row of group `i` stands and its caption, in order; nothing else is read."""
        group = self._groups[i]
        for offset, row in enumerate(_rows(self.read_group(i, ["caption"]))):
            number = group.start + offset
            where = f"row {number} ({group.path.name})"
            try:
                yield where, _caption(row, where)
            except RowError as error:
                yield BadRow(number, error.kind, str(error))

    def take(self, indices: ArrayLike, out_path: str | Path) -> None:
        """Write the given rows with every column and the same schema, in table order.

        Raises InputError for a row that is not there or is asked for twice. Holds at most one row
        group of the source and 1,000 kept rows in memory.
        """
        rows = checked_rows(indices, self.num_rows, self.path)
        waiting: list[pa.Table] = []
        with atomic_path(out_path) as temporary, pq.ParquetWriter(temporary, self.schema) as out:
            for group in self._groups:
                first, last = np.searchsorted(rows, [group.start, group.start + group.rows])
                if first < last:
                    piece = self._read(group, None).take(pa.array(rows[first:last] - group.start))
                    waiting.append(piece)
                if sum(len(piece) for piece in waiting) >= _ROWS_A_GROUP:
                    out.write_table(pa.concat_tables(waiting))
                    waiting.clear()
            if waiting:
                out.write_table(pa.concat_tables(waiting))

    def fingerprint(self) -> str:
        """16 hex digits that change with any row, found without reading the images.

        Covers each file's footer, which holds the sizes of all column chunks, and the stored bytes
        of every visible column but the images. Exchanging an image for another of the very same
        compressed size, and nothing else, would go unnoticed.
        """
        parts: list[bytes] = []
        for file in dict.fromkeys(group.path for group in self._groups):
            parts += [file.name.encode("utf-8"), *_stored_text(file)]
        return fingerprint(*parts)

    def _read(self, group: RowGroup, columns: list[str] | None) -> pa.Table:
        try:
            with pq.ParquetFile(group.path) as file:
                table = file.read_row_group(group.index, columns=columns)
                plain = _plain(table.schema)
                return table if plain.equals(table.schema) else table.cast(plain)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"cannot read {group.path}: {_one_line(error)}") from None


def checked_rows(indices: ArrayLike, rows: int, path: Path) -> NDArray[np.int64]:
    """Row numbers of a table of so many rows, sorted; InputError for one not there or repeated."""
    found = np.sort(np.asarray(indices, dtype=np.int64).ravel())
    if len(found) and (found[0] < 0 or found[-1] >= rows):
        raise InputError(f"{path} has rows 0..{rows - 1}, not {found[[0, -1]]}")
    if len(np.unique(found)) != len(found):
        raise InputError(f"a row of {path} was asked for twice")
    return found


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as dictionaries. Parquet lets pass text that is not UTF-8: lone surrogates stand in.

    They are found where the text is checked.
    """
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        texts = [name for name in table.column_names if _is_text(table.schema.field(name).type)]
        for name in texts:
            kind = table.schema.field(name).type
            raw = table[name].cast(pa.binary() if kind == pa.string() else pa.large_binary())
            table = table.set_column(table.column_names.index(name), name, raw)
        rows = table.to_pylist()
        for row in rows:
            found = ((name, row[name]) for name in texts if row[name] is not None)
            row |= {name: data.decode("utf-8", "surrogateescape") for name, data in found}
        return rows


def _parquet_files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"{path} does not exist (expected a .parquet file or a folder of them)")
    if path.is_file():
        if path.suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".txt"):
            raise InputError(f"{path} is no Parquet file; `fifa convert` makes a table of it")
        return [path]
    files = sorted(file for file in path.glob("*.parquet") if not file.name.startswith("."))
    if not files:
        raise InputError(f"the folder {path} holds no .parquet file")
    return files


def _footer(file: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {file} as Parquet: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_columns(schema: pa.Schema, file: Path, needed: Sequence[str]) -> None:
    for name in needed:
        fits, wanted = _NEEDED[name]
        if name not in schema.names:
            near = nearest(name, schema.names)
            hint = f"; is it '{near}'?" if near else f", it has {', '.join(schema.names)}"
            if "log_knn" in schema.names:
                hint = ": it holds scores; the pairs are in kept.parquet after `fifa select`"
            raise InputError(f"{file} has no column '{name}'{hint}")
        kind = schema.field(name).type
        if not fits(kind):
            pictures = name in IMAGE_COLUMNS and pa.types.is_struct(kind)
            way = f"; `fifa convert pickapic {file} --out FOLDER` reads those" if pictures else ""
            raise InputError(f"{file}: column '{name}' is {kind}, it must be {wanted}{way}")


def _stored_text(file: Path) -> Iterator[bytes]:
    """The footer of a Parquet file and the raw bytes of its visible columns other than images."""
    footer = _footer(file)
    with file.open("rb") as raw:
        raw.seek(-8, 2)  # a Parquet file ends in the footer's length (4 bytes) and "PAR1"
        length = int.from_bytes(raw.read(4), "little")
        raw.seek(-8 - length, 2)
        yield raw.read(length)
        for group in range(footer.num_row_groups):
            for column in range(footer.num_columns):
                chunk = footer.row_group(group).column(column)
                if chunk.path_in_schema in IMAGE_COLUMNS:
                    continue
                if not chunk.path_in_schema.startswith(HIDDEN_PREFIX):
                    raw.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
                    yield raw.read(chunk.total_compressed_size)
