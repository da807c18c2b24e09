"""What the readers share: options, pictures and records from files that may hold anything.

Nothing here keeps more than one record, or the paths and votes of one prompt, in memory.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import Field

from fifa.config import Config, InputError
from fifa.pairs import BadRow, Judgment, Outcome, RowError

MAX_RECORD = 64 * 2**20  # bytes of one line, JSON item or CSV field
MAX_PICTURE = 128 * 2**20  # bytes of one picture file
MAX_CAPTION = 2**20  # bytes of one caption file
_CHUNK = 2**20  # characters of a JSON array read at once


class ReadOptions(Config):
    """How to read a source; what is not given is guessed from the names that are there."""

    images: Path | None = Field(
        None,
        description="Folder that the paths of pictures start from; beside the file by default.",
    )
    split: str = Field("train", description="Part of a Hub data set, or of a local copy of one.")
    prompt: str | None = Field(None, description="Column of the prompt.")
    win: str | None = Field(None, description="Column of the better picture.")
    lose: str | None = Field(None, description="Column of the worse picture.")
    image_0: str | None = Field(None, description="Column of the first picture.")
    image_1: str | None = Field(None, description="Column of the second picture.")
    label: str | None = Field(
        None, description="Column that says which is better (0, 1, 0.5), or for kto: good or bad."
    )
    tie: str | None = Field(
        None, description="Column that says, beside a better and a worse picture, that none is."
    )
    user: str | None = Field(None, description="Column of the person who judged.")
    prompts: Path | None = Field(
        None, description="File of prompts for folders: NAME, a tab, the prompt, one a line."
    )
    group: int = Field(7, ge=2, description="Pictures of one row of D3PO's feedback.")
    max_pairs: int = Field(100, ge=1, description="Most pairs made of one prompt's votes (kto).")


Found = Judgment | BadRow
Reader = Callable[[str, ReadOptions], Iterator[Found]]


def set_aside(row: int, error: RowError) -> BadRow:
    """The row as one that is left out, for the reason that the error gives."""
    return BadRow(row, error.kind, str(error))


def shown(value: object, length: int = 120) -> str:
    """A value as it can stand in a sentence: one line, not too long."""
    text = " ".join(str(value).split()) if isinstance(value, str) else repr(value)
    return text if len(text) <= length else text[:length] + "..."


def existing(path: str, what: str) -> Path:
    """The path; InputError if it is not there."""
    if not os.path.exists(path):
        raise InputError(f"{shown(path)} does not exist (expected {what})")
    return Path(path)


# ---- pictures ------------------------------------------------------------------------------------


def picture(value: object, folder: Path, where: str, by_name: bool = False) -> bytes:
    """The encoded bytes of a picture.

    `value` is those bytes, a Hub data set's `{"bytes", "path"}`, a path that starts from `folder`,
    base64 text or a data URI. With `by_name` a path whose folders do not exist here is looked up by
    its last part. Raises RowError that begins with `where`.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, str) or not value.strip():
        raise RowError(where, "an image is missing or empty", f", it is {shown(value)}")
    if value.startswith("data:"):
        data = _from_base64(value.partition(",")[2])
    else:
        names = (value, os.path.basename(value)) if by_name else (value,)
        paths = (os.path.join(folder, name) for name in names)
        # isfile answers False where Path.is_file raises: NUL bytes, a name of 50,000 letters
        found = next((path for path in paths if os.path.isfile(path)), None)
        data = _from_base64(value) if found is None else _from_file(found, where)
    if not data:
        raise RowError(where, "a picture file is missing", f", there is no {shown(value)}")
    return data


def _from_file(path: str, where: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_PICTURE + 1)
    except OSError as error:
        raise RowError(where, "a picture file cannot be read", f", {error}") from None
    if not data:
        raise RowError(where, "an image is missing or empty", f", {shown(path)} is empty")
    if len(data) > MAX_PICTURE:
        detail = f", {shown(path)} is larger than {MAX_PICTURE:,} bytes"
        raise RowError(where, "a picture file is too large", detail)
    return data


def _from_base64(text: str) -> bytes:
    """The bytes, or nothing where the text is no base64; a short word is a file name, not data."""
    if len(text) < 32:
        return b""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return b""


# ---- records -------------------------------------------------------------------------------------


def lines(path: Path) -> Iterator[str]:
    """The lines of a text file; of one longer than MAX_RECORD its beginning.

    Bytes that are no UTF-8 become lone surrogates, which no prompt may hold. UTF-16 by its first
    bytes is an InputError.
    """
    with _opened(path) as file:
        if file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise InputError(f"{path} is UTF-16 text, it must be UTF-8")
        first = True
        while line := file.readline(MAX_RECORD):
            if not line.endswith(b"\n"):
                while (rest := file.readline(_CHUNK)) and not rest.endswith(b"\n"):
                    pass
            text = line.decode("utf-8", "surrogateescape")
            yield text.removeprefix("\ufeff") if first else text
            first = False


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def json_lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(number, where, record) of each line that is not blank; a RowError in place of a bad one."""
    for number, line in enumerate(lines(path)):
        if not line.strip():
            continue
        where = f"{path.name} line {number + 1}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield (
                number,
                where,
                RowError(where, "a line is not valid JSON", f", {shown(str(error))}"),
            )
            continue
        yield number, where, record


def json_items(path: Path) -> Iterator[Any]:
    """The items of the JSON array in a file, one at a time.

    What follows a place that is no JSON cannot be read: there a RowError comes in place of an item,
    and nothing after it.
    """
    decoder = json.JSONDecoder()
    with _opened(path) as raw:
        text = _more(raw).removeprefix("\ufeff")
        place = _after(_BLANK, text, 0)
        if text[place : place + 1] != "[":
            yield RowError(path.name, "a file is not a JSON array")
            return
        place, count = place + 1, 0
        while True:
            place = _after(_GAP, text, place)
            if text.startswith("]", place):
                return
            try:
                item, end = decoder.raw_decode(text, place)
                # Only what follows tells "12" from the beginning of "12.5".
                whole = text.startswith((",", "]"), _after(_BLANK, text, end))
            except (ValueError, RecursionError):
                whole = False
            if whole:
                yield item
                place, count = end, count + 1
                continue
            more = _more(raw)
            if not more or len(text) - place > MAX_RECORD:
                yield RowError(f"{path.name} item {count}", "a file breaks off or is no JSON")
                return
            text, place = text[place:] + more, 0


_BLANK = re.compile(r"[ \t\r\n]*")
_GAP = re.compile(r"[ \t\r\n,]*")


def _after(pattern: re.Pattern[str], text: str, place: int) -> int:
    """Where what the pattern matches at `place`, perhaps nothing, ends."""
    found = pattern.match(text, place)
    return found.end() if found else place


def _more(raw: Any) -> str:
    """The next piece of a file as text; bytes that are no UTF-8 become lone surrogates."""
    data = raw.read(_CHUNK)
    return _rest_of_letter(data, raw).decode("utf-8", "surrogateescape") if data else ""


def _rest_of_letter(data: bytes, raw: Any) -> bytes:
    """The data up to the end of its last UTF-8 letter, which `read` may have cut in two."""
    for _ in range(3):
        if data[-1] < 0x80 or (ahead := raw.peek(1)[:1]) == b"" or not 0x80 <= ahead[0] < 0xC0:
            break
        data += raw.read(1)
    return data


def grouped(
    rows: Iterable[tuple[str, Any]], by_name: bool = False
) -> Iterator[tuple[str, list[Any]]]:
    """Rows (key, JSON value) brought together by key, keys as they first come or in their order.

    Sorted in a private file of the system's folder for temporary files, so that memory holds the
    rows of one key.
    """
    try:
        with closing(sqlite3.connect("")) as base:  # "": a database on disk, gone when closed
            base.execute("CREATE TABLE found (item INTEGER PRIMARY KEY, key BLOB, value TEXT)")
            base.executemany(
                "INSERT INTO found (key, value) VALUES (?, ?)",
                ((_key(key), json.dumps(value)) for key, value in rows),
            )
            base.execute("CREATE INDEX by_key ON found (key)")
            order = "key" if by_name else "MIN(item)"
            firsts = base.execute(f"SELECT key FROM found GROUP BY key ORDER BY {order}")
            for (key,) in firsts:
                values = base.execute("SELECT value FROM found WHERE key = ? ORDER BY item", (key,))
                yield _text(key), [json.loads(value) for (value,) in values]
    except sqlite3.Error as error:  # no room, as a rule
        raise InputError(f"cannot sort rows in the folder for temporary files: {error}") from None


def _key(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogatepass")


# ---- verdicts ------------------------------------------------------------------------------------


def outcome_of(first: float, second: float) -> Outcome:
    """Who won by two numbers of which the higher is better."""
    return "tie" if first == second else "a" if first > second else "b"


def number(value: object, where: str, what: str) -> float:
    """A finite number; RowError for anything else, also for true and false."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    raise RowError(where, f"{what} is no number", f", it is {shown(value)}")
