"""The frozen features of a data set, computed once: what proxies are fitted on in seconds.

A vector is kept under a fingerprint of its picture or prompt and of the network that made it, in
one SQLite file; so a pass that was killed goes on where it stopped, and a second data set of the
same pictures costs nothing.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from fifa.config import InputError
from fifa.images import Pixels, decode, to_batch
from fifa.pairs import IMAGE_COLUMNS, BadRow, Judgment, PairTable, normalise_prompt
from fifa.rewards.nuisance import VERSION, measure

if TYPE_CHECKING:
    import torch

    from fifa.rewards.encoders import Encoder

Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
T = TypeVar("T")

CACHE = "features.sqlite"
BATCH = 128  # pictures a forward pass; the vectors do not depend on it
_LABEL = {"a": 1.0, "b": 0.0, "tie": 0.5}


class VectorStore:
    """Vectors under (maker, key) in one SQLite file; in memory if `path` is None.

    Each `put` is one transaction: it is there as a whole or not at all.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = path
        with self._explained():
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path or ":memory:", timeout=60)
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS vectors (maker TEXT, key BLOB, vector BLOB,"
                " PRIMARY KEY (maker, key)) WITHOUT ROWID"
            )

    def get(self, maker: str, keys: Iterable[bytes]) -> dict[bytes, Floats]:
        """Those of the vectors that are there."""
        query = "SELECT vector FROM vectors WHERE maker = ? AND key = ?"
        found = {}
        with self._explained():
            for key in keys:
                row = self._db.execute(query, (maker, key)).fetchone()
                if row is not None:
                    found[key] = np.frombuffer(row[0], dtype="<f4")
        return found

    def put(self, maker: str, vectors: Mapping[bytes, Floats]) -> None:
        """Keep vectors; one that is there already is replaced."""
        rows = [(maker, key, vector.astype("<f4").tobytes()) for key, vector in vectors.items()]
        with self._explained(), self._db:
            self._db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise InputError(f"cannot use the feature cache {self.path}: {error}") from None


@dataclass(frozen=True)
class PairFeatures:
    """The usable rows of a pair table; each picture and each prompt is there once."""

    pictures: Floats  # (M, D) unit vectors
    nuisances: Floats  # (M, 5), see fifa.rewards.nuisance
    texts: Floats  # (P, D) unit vectors
    prompts: tuple[str, ...]  # (P,)
    first: NDArray[np.int64]  # (N,) into pictures
    second: NDArray[np.int64]
    prompt: NDArray[np.int64]  # (N,) into texts
    label: Floats  # (N,) 1: the first picture won, 0: the second, 0.5: a tie
    users: tuple[str, ...]  # (N,) empty where unknown
    row: NDArray[np.int64]  # (N,) in the table
    rejected: tuple[BadRow, ...]
    data: str  # fingerprint of the table
    encoder: str  # version of the network

    def __len__(self) -> int:
        return len(self.label)


def pair_features(
    path: str | Path,
    encoder: Encoder,
    cache: str | Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> PairFeatures:
    """Features of a pair table, from the file `cache` as far as it holds them.

    A row whose picture cannot be decoded is set aside. Raises InputError if no row is left.
    """
    table = PairTable.open(path)
    with closing(VectorStore(cache)) as store:
        rows = _Rows()
        for i, group in enumerate(table.row_groups()):
            judgments = list(table.judgments(i))
            _encode(judgments, encoder, store, rows)
            progress("encoding pictures", group.start + group.rows, table.num_rows)
        if not rows.label:
            reason = rows.rejected[0].reason if rows.rejected else "it is empty"
            raise InputError(f"not one row of {path} can be used; {reason}")
        return PairFeatures(
            pictures=_stacked(store, encoder.version, rows.pictures),
            nuisances=_stacked(store, VERSION, rows.pictures),
            texts=_stacked(store, encoder.version, [_text_key(p) for p in rows.prompts.values()]),
            prompts=tuple(rows.prompts.values()),
            first=np.array(rows.first, dtype=np.int64),
            second=np.array(rows.second, dtype=np.int64),
            prompt=np.array(rows.prompt, dtype=np.int64),
            label=np.array(rows.label, dtype=np.float32),
            users=tuple(rows.users),
            row=np.array(rows.row, dtype=np.int64),
            rejected=tuple(rows.rejected),
            data=table.fingerprint(),
            encoder=encoder.version,
        )


class _Rows:
    """What is known of the rows while the table is read."""

    def __init__(self) -> None:
        self.pictures: dict[bytes, int] = {}  # key -> number
        self.prompts: dict[str, str] = {}  # normalised -> as first spelled
        self.first: list[int] = []
        self.second: list[int] = []
        self.prompt: list[int] = []
        self.label: list[float] = []
        self.users: list[str] = []
        self.row: list[int] = []
        self.rejected: list[BadRow] = []
        self._numbers: dict[str, int] = {}
        self._read = 0

    def add(self, item: Judgment | BadRow, bad: Mapping[bytes, str]) -> None:
        """Take the next row of the table, whose pictures' keys may be in `bad`."""
        number = self._read
        self._read += 1
        if isinstance(item, BadRow):
            self.rejected.append(item)
            return
        keys = (picture_key(item.image_a), picture_key(item.image_b))
        for key, column in zip(keys, IMAGE_COLUMNS, strict=True):
            if key in bad:
                where = f"{item.where}, {column}: {bad[key]}"
                self.rejected.append(BadRow(number, "an image cannot be decoded", where))
                return
        first, second = (self.pictures.setdefault(key, len(self.pictures)) for key in keys)
        name = normalise_prompt(item.prompt)
        self.prompts.setdefault(name, item.prompt)
        self.first.append(first)
        self.second.append(second)
        self.prompt.append(self._numbers.setdefault(name, len(self._numbers)))
        self.label.append(_LABEL[item.outcome])
        self.users.append(item.who)
        self.row.append(number)


def _encode(
    items: Sequence[Judgment | BadRow], encoder: Encoder, store: VectorStore, rows: _Rows
) -> None:
    judged = [item for item in items if isinstance(item, Judgment)]
    files = [file for item in judged for file in (item.image_a, item.image_b)]
    bad = store_pictures(files, encoder, store)
    for item in items:
        rows.add(item, bad)
    store_texts(
        [rows.prompts.get(normalise_prompt(i.prompt), i.prompt) for i in judged], encoder, store
    )


def store_pictures(
    files: Sequence[bytes], encoder: Encoder, store: VectorStore
) -> dict[bytes, str]:
    """Encode and measure the pictures that the store lacks; key -> reason of those it cannot."""
    by_key = {picture_key(file): file for file in files}
    known = store.get(encoder.version, by_key).keys() & store.get(VERSION, by_key).keys()
    missing = {key: file for key, file in by_key.items() if key not in known}
    bad: dict[bytes, str] = {}
    by_size: dict[tuple[int, ...], list[tuple[bytes, Pixels]]] = {}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for key, found in zip(missing, pool.map(_decoded, missing.values()), strict=True):
            if isinstance(found, str):
                bad[key] = found
            else:
                by_size.setdefault(found.shape, []).append((key, found))
    for group in by_size.values():
        for some in _chunks(group, BATCH):
            keys = [key for key, _ in some]
            images = to_batch([hwc for _, hwc in some])
            store.put(encoder.version, _named(keys, encoder.pictures(images)))
            store.put(VERSION, _named(keys, measure(images)))
    return bad


def store_texts(prompts: Sequence[str], encoder: Encoder, store: VectorStore) -> None:
    """Encode the prompts that the store lacks."""
    by_key = {_text_key(prompt): prompt for prompt in prompts}
    known = store.get(encoder.version, by_key)
    missing = [(key, prompt) for key, prompt in by_key.items() if key not in known]
    for some in _chunks(missing, BATCH):
        vectors = encoder.texts([prompt for _, prompt in some])
        store.put(encoder.version, _named([key for key, _ in some], vectors))


def stored_pictures(
    store: VectorStore, encoder: Encoder, keys: Sequence[bytes]
) -> tuple[Floats, Floats]:
    """Features (N, D) and nuisances (N, 5) of pictures that are in the store."""
    return _stacked(store, encoder.version, keys), _stacked(store, VERSION, keys)


def stored_texts(store: VectorStore, encoder: Encoder, prompts: Sequence[str]) -> Floats:
    """Features (N, D) of prompts that are in the store."""
    return _stacked(store, encoder.version, [_text_key(prompt) for prompt in prompts])


def picture_key(file: bytes) -> bytes:
    """What a picture is known by: 128 bits of its encoded bytes."""
    return hashlib.blake2b(b"picture" + file, digest_size=16).digest()


def _text_key(prompt: str) -> bytes:
    text = prompt.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(b"text" + text, digest_size=16).digest()


def _decoded(file: bytes) -> Pixels | str:
    """The picture, or why there is none."""
    try:
        hwc = decode(file, "the picture")
    except InputError as error:
        return str(error)
    return hwc if min(hwc.shape[:2]) > 1 else f"the picture has {hwc.shape[:2]} pixels"


def _named(keys: Sequence[bytes], vectors: torch.Tensor) -> dict[bytes, Floats]:
    return dict(zip(keys, vectors.detach().cpu().numpy(), strict=True))


def _stacked(store: VectorStore, maker: str, keys: Iterable[bytes]) -> Floats:
    keys = list(keys)
    found = store.get(maker, keys)
    return np.stack([found[key] for key in keys])


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
