"""Vectors kept prompt by prompt in one SQLite file, for embedders that need no company."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from fifa.config import InputError
from fifa.embed import PromptEmbedder, Told, Vectors


class VectorStore:
    """Float32 vectors by embedder name and prompt, exact to the bit; a context manager.

    Several processes may use one file: each batch is one transaction. A killed process loses the
    batch it was at, and asks for the same batches again.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=60)
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS vectors (embedder TEXT, prompt TEXT, vector BLOB,"
                " PRIMARY KEY (embedder, prompt)) WITHOUT ROWID"
            )

    def __enter__(self) -> VectorStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._db.close()

    def vectors(
        self, prompts: Sequence[str], embedder: PromptEmbedder, told: Told | None = None
    ) -> Vectors:
        """Vectors (N, D) from the file where it has them, else from the embedder, batch by batch.

        `told` hears how many prompts have one after each batch.
        """
        found = self._stored(prompts, embedder.name)
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
        if new:
            for rows, vectors in embedder.stream(new):
                fresh = {new[row]: vector for row, vector in zip(rows, vectors, strict=True)}
                self._store(fresh, embedder.name)
                found |= fresh
                if told is not None:
                    told(len(found), len(set(prompts)))
        if len({len(vector) for vector in found.values()}) != 1:
            raise InputError(f"{self.path} holds vectors of several lengths; delete it")
        return np.stack([found[prompt] for prompt in prompts])

    def _stored(self, prompts: Sequence[str], name: str) -> dict[str, Vectors]:
        query = "SELECT vector FROM vectors WHERE embedder = ? AND prompt = ?"
        found = {}
        with self._explained():
            for prompt in dict.fromkeys(prompts):
                row = self._db.execute(query, (name, prompt)).fetchone()
                if row is not None:
                    found[prompt] = np.frombuffer(row[0], dtype="<f4")
        return found

    def _store(self, vectors: dict[str, Vectors], name: str) -> None:
        rows = [
            (name, prompt, np.asarray(vector, dtype="<f4").tobytes())
            for prompt, vector in vectors.items()
        ]
        with self._explained(), self._db:  # one transaction
            self._db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What is wrong with the file is one sentence; the embedder's own errors are not caught."""
        try:
            yield
        except (sqlite3.Error, OSError, ValueError) as error:
            raise InputError(f"cannot use the store of vectors {self.path}: {error}") from None
