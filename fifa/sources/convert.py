"""A source written as the pair table: shards of Parquet, what was set aside, and a manifest.

The table grows in the hidden folder `.NAME.partial` beside the one that was asked for and gets its
name when it is whole, so a killed conversion leaves nothing that could be taken for a table. The
same command goes on at the first shard that is missing: it reads the source again, which is cheap,
compares what is done with what it was, and neither decodes nor writes it. The bytes of a picture
are written as they came.

    shard-*.parquet   the pairs, columns of Pick-a-Pic v2
    rejected.jsonl    what was set aside, one line each: row, kind, reason
    manifest.json     the settings and the counts
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import Field

from fifa.config import InputError, atomic_path, only_writer, write_atomic
from fifa.images import DECODE_ERRORS, FORMATS, decode
from fifa.pairs import IMAGE_COLUMNS, MAX_PROMPT, BadRow, Judgment, RowError, check_prompt
from fifa.sources import load_source
from fifa.sources.reading import Found, ReadOptions, set_aside, shown

VERSION = 3  # raised whenever the same source would give another table

Progress = Callable[[str, int, int], None]  # stage, rows done, rows in all (0: not known)

REJECTED = "rejected.jsonl"
MANIFEST = "manifest.json"
_STATE = ".parts/state.json"
_GROUP_ROWS = 500  # most rows of a row group
_GROUP_BYTES = 32 * 2**20  # of pictures, after which a row group ends
_CHECKED = 64  # pictures whose check is remembered: a ranking repeats each in many pairs

SCHEMA = pa.schema(
    {
        "caption": pa.string(),
        "jpg_0": pa.binary(),
        "jpg_1": pa.binary(),
        "label_0": pa.float64(),  # 1, 0, or 0.5 for a tie
        "label_1": pa.float64(),
        "has_label": pa.bool_(),
        "are_different": pa.bool_(),
        "image_0_uid": pa.string(),  # 32 hex digits of the picture's BLAKE2b
        "image_1_uid": pa.string(),
        "best_image_uid": pa.string(),  # "tie" for a tie
        "model_0": pa.string(),
        "model_1": pa.string(),
        "ranking_id": pa.int64(),  # number of the row in this table
        "user_id": pa.string(),
        "created_at": pa.string(),
        "source": pa.string(),  # file and row that it was read from
    }
)
_LABELS = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.5, 0.5)}


class ConvertConfig(ReadOptions):
    """What to convert, and what to let through."""

    source: str = Field(description="Kind of source, see `fifa sources`, or package.module:reader.")
    path: str = Field(description="File or folder, or the name of a Hub data set.")
    out: Path = Field(description="Folder for the table; must not exist yet.")
    ties: Literal["keep", "drop"] = Field("keep", description="Keep ties as 0.5 and 0.5, or not.")
    check: Literal["decode", "header"] = Field(
        "decode", description="Decode every picture to find cut ones, or look at headers only."
    )
    max_pixels: int = Field(2**26, ge=1, description="Most pixels of a picture, by its header.")
    max_prompt: int = Field(MAX_PROMPT, ge=1, description="Most characters of a prompt.")
    rows_per_shard: int = Field(5000, ge=1, description="Rows of one Parquet file.")


@dataclass
class Counts:
    """What came and went."""

    found: int = 0  # pairs and bad rows that the reader gave
    written: int = 0
    ties: int = 0  # of those written
    shards: int = 0
    gone: dict[str, int] = field(default_factory=dict)  # kind -> number set aside
    first: str = ""  # reason of the first that was


def no_progress(stage: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass
class _Job:
    """One conversion: where it stands and what it is of."""

    config: ConvertConfig
    out: Path
    work: Path  # the folder that becomes `out`
    settings: dict[str, Any]  # what the table depends on
    counts: Counts
    read: str  # digest of all that was found so far
    progress: Progress


def convert(config: ConvertConfig, progress: Progress = no_progress) -> Counts:
    """Write a source as a pair table into `config.out`, or finish what an earlier call began.

    Raises InputError if the folder exists, the source is not of this kind or cannot be read, not
    one row is usable, or another process is at it.
    """
    reader = load_source(config.source)
    out = config.out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; choose another folder or delete it")
    if out == Path.cwd():  # replaced by the table, it would be gone from under the shell
        raise InputError(f"{out} is the folder that you are in; name another for the table")
    work = out.with_name(f".{out.name}.partial")
    with only_writer(work, ".parts/lock", "converting into"):
        settings = _settings(config)
        counts, read = _resumed(work, settings)
        job = _Job(config, out, work, settings, counts, read, progress)
        try:
            items = reader(config.path, config)
            _skip(items, job)
            while _write_shard(items, job):
                pass
            progress("converting", counts.found, counts.found)
            if not counts.written:
                raise InputError(f"{config.path} holds no usable row{_why(counts)}")
        except (InputError, OSError) as error:
            if not counts.shards:  # nothing that another call could go on from
                shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, InputError):
                raise
            place = error.filename or config.path
            raise InputError(f"cannot read {place}: {error.strerror or error}") from None
        _finish(job)
    return counts


def _why(counts: Counts) -> str:
    return f"; {counts.first}" if counts.first else ""


# ---- the folder ----------------------------------------------------------------------------------


def _settings(config: ConvertConfig) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={"out"})
    return {"version": VERSION, **settings, "content": _stamp(config.path)}


def _stamp(path: str) -> str:
    """Changes with the name, size or time of a source's file, or of one at any depth of its folder.

    Hidden ones aside: none is read as a part of a folder, and the table may grow in one.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in _files(path):
        if os.path.isfile(file):
            found = os.stat(file)
            name = os.path.relpath(file, path)
            digest.update(repr((name, found.st_size, found.st_mtime_ns)).encode())
    return digest.hexdigest()


def _files(path: str) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield os.path.join(folder, name)


def _resumed(work: Path, settings: dict[str, Any]) -> tuple[Counts, str]:
    """The counts of the shards that are there, and the digest of what they were made of.

    InputError if they are of something else.
    """
    path = work / _STATE
    if not path.exists():
        return Counts(), ""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        same, counts = state["settings"] == settings, Counts(**state["counts"])
        read = str(state["read"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged; delete the folder {work}") from None
    if not same:
        raise _other(work)
    return counts, read


def _other(work: Path) -> InputError:
    return InputError(f"{work} holds an unfinished conversion of other data or settings; delete it")


def _skip(items: Iterator[Found], job: _Job) -> None:
    """Pass over what is done; InputError if it is no longer what it was.

    The stamp does not see pictures that lie elsewhere, nor the Hub.
    """
    read = ""
    for item in islice(items, job.counts.found):
        read = _chained(read, item)
    if read != job.read:
        raise _other(job.work)


def _chained(before: str, item: Found) -> str:
    """A digest of an item and, by way of theirs, of all before it."""
    digest = hashlib.blake2b(before.encode(), digest_size=16)
    for value in vars(item).values():
        data = value if isinstance(value, bytes) else repr(value).encode()
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()


def _finish(job: _Job) -> None:
    """Join what was set aside, write the manifest, give the folder its name, then tidy up."""
    work, out = job.work, job.out
    with atomic_path(work / REJECTED) as temporary, temporary.open("wb") as whole:
        for part in sorted((work / ".parts").glob("rejected-*.jsonl")):
            with part.open("rb") as lines:
                shutil.copyfileobj(lines, whole)
    manifest = {"settings": job.settings, "counts": asdict(job.counts)}
    write_atomic(work / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    try:
        os.replace(work, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    shutil.rmtree(out / ".parts", ignore_errors=True)


# ---- a shard -------------------------------------------------------------------------------------


def _write_shard(items: Iterator[Found], job: _Job) -> bool:
    """Write the next shard and what was set aside on the way; False when nothing is left.

    The state is written last: a shard that it does not count is written again.
    """
    counts, number = job.counts, job.counts.shards
    part = job.work / ".parts" / f"rejected-{number:05d}.jsonl"
    with atomic_path(part) as temporary, temporary.open("wb") as rejected:
        rows = _usable(items, job, rejected)
        first = next(rows, None)
        if first is not None:
            rest = islice(rows, job.config.rows_per_shard - 1)
            with atomic_path(job.work / f"shard-{number:05d}.parquet") as shard:
                _write_rows(shard, first, rest, counts)
    if first is None:
        return False
    counts.shards += 1
    state = {"settings": job.settings, "counts": asdict(counts), "read": job.read}
    write_atomic(job.work / _STATE, json.dumps(state))
    return True


def _write_rows(path: Path, first: Judgment, rest: Iterator[Judgment], counts: Counts) -> None:
    """One Parquet file; holds one row group of at most about _GROUP_BYTES in memory."""
    waiting: list[dict[str, Any]] = []
    size = 0
    with pq.ParquetWriter(path, SCHEMA) as out:

        def flush() -> None:
            out.write_table(pa.Table.from_pylist(waiting, schema=SCHEMA))
            waiting.clear()

        row: Judgment | None = first
        while row is not None:
            waiting.append(_columns(row, counts.written))
            counts.written += 1
            counts.ties += row.outcome == "tie"
            size += len(row.image_a) + len(row.image_b)
            if len(waiting) >= _GROUP_ROWS or size >= _GROUP_BYTES:
                flush()
                size = 0
            row = next(rest, None)
        if waiting:
            flush()


def _columns(row: Judgment, number: int) -> dict[str, Any]:
    first, second = _uid(row.image_a), _uid(row.image_b)
    label = _LABELS[row.outcome]
    return {
        "caption": row.prompt,
        "jpg_0": row.image_a,
        "jpg_1": row.image_b,
        "label_0": label[0],
        "label_1": label[1],
        "has_label": True,
        "are_different": row.image_a != row.image_b,
        "image_0_uid": first,
        "image_1_uid": second,
        "best_image_uid": {"a": first, "b": second, "tie": "tie"}[row.outcome],
        "model_0": _plain(row.model_a) or None,
        "model_1": _plain(row.model_b) or None,
        "ranking_id": number,
        "user_id": _plain(row.who) or None,
        "created_at": _plain(row.when) or None,
        "source": _plain(row.where),
    }


def _uid(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _plain(text: str) -> str:
    """Text that UTF-8 can hold: a file name may not be."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# ---- what is usable ------------------------------------------------------------------------------


def _usable(items: Iterator[Found], job: _Job, rejected: IO[bytes]) -> Iterator[Judgment]:
    """The judgments that can be used; the others go into `rejected` with a reason."""
    counts = job.counts
    seen: _Seen = OrderedDict()
    for item in items:
        counts.found += 1
        job.read = _chained(job.read, item)
        if counts.found % 50 == 0:
            job.progress("converting", counts.found, 0)
        bad = _fault(item, counts.found - 1, job.config, seen)
        if not isinstance(item, BadRow) and bad is None:
            yield item
            continue
        if bad is not None:
            counts.gone[bad.kind] = counts.gone.get(bad.kind, 0) + 1
            counts.first = counts.first or bad.reason
            line = json.dumps(asdict(bad), ensure_ascii=False) + "\n"
            rejected.write(line.encode("utf-8", "backslashreplace"))


_Seen = OrderedDict[bytes, tuple[str, str] | None]  # picture -> kind and detail of its fault


def _fault(item: Found, number: int, config: ConvertConfig, seen: _Seen) -> BadRow | None:
    """Why an item is set aside; None for one that can be used."""
    if isinstance(item, BadRow):
        return item
    try:
        _check(item, config, seen)
    except RowError as error:
        return set_aside(number, error)
    return None


def _check(row: Judgment, config: ConvertConfig, seen: _Seen) -> None:
    """Raise RowError if a judgment has no readable prompt or pictures, or says nothing."""
    where = row.where
    check_prompt(row.prompt, where, config.max_prompt)
    if row.outcome == "tie" and config.ties == "drop":
        raise RowError(where, "a tie, and ties are dropped")
    for side, data in zip(IMAGE_COLUMNS, (row.image_a, row.image_b), strict=True):
        key = hashlib.blake2b(data, digest_size=16).digest()
        if key not in seen:
            seen[key] = _picture_fault(data, config)
            if len(seen) > _CHECKED:
                seen.popitem(last=False)
        if fault := seen[key]:
            raise RowError(where, fault[0], f" ({side}), {shown(fault[1])}")
    if row.image_a == row.image_b and row.outcome != "tie":
        raise RowError(where, "a picture is compared with itself")


def _picture_fault(data: bytes, config: ConvertConfig) -> tuple[str, str] | None:
    """Kind and detail of what is wrong with a picture; its header is looked at first."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                (width, height), kind = image.size, image.format
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return "a picture is too large", str(error)
    except DECODE_ERRORS as error:
        return "a picture cannot be decoded", str(error)
    if kind not in FORMATS:
        return "a picture is of a kind that is not read", f"{kind}, allowed are {FORMATS}"
    if width * height > config.max_pixels:
        detail = f"{width} x {height}, at most {config.max_pixels:,} pixels are allowed"
        return "a picture is too large", detail
    if config.check == "decode":
        try:
            decode(data, "its bytes")
        except InputError as error:
            return "a picture cannot be decoded", str(error)
    return None
