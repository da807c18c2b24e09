"""What the reference thinks of stored pairs: a number for each picture and draw, kept on disk.

The reference never changes, so with a limited list of noise draws (`offline.noise_draws`) it has to
be asked once for each. An epoch whose draw is new scores all pairs before it trains on any of them,
in batches that depend neither on the order of training nor on the number of processes: a resumed
run, or another run on the same pairs, reads the same numbers to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from d3po.run import Run
from fifa.config import atomic_path

Score = Callable[[int, Sequence[int]], NDArray[np.float32]]
"""score(draw, rows) -> (rows, 2) log-probabilities of winners and losers under the reference."""


class ReferenceScores:
    """Scores of `count` pairs, 8 bytes a pair and draw, in `folder`, made when first asked for."""

    def __init__(self, folder: Path, count: int, batch: int, score: Score, run: Run) -> None:
        self.folder, self.count, self.batch = folder, count, batch
        self.score, self.run = score, run
        self._open: dict[int, NDArray[np.float32]] = {}

    def ready(self, draws: Sequence[int]) -> None:
        """Score these draws if nobody has; together: every process must ask for the same."""
        for draw in draws:
            if draw not in self._open:
                path = self.folder / f"draw-{draw:04d}.bin"
                if not self.run.first(path.exists):
                    self._make(draw, path)
                self._open[draw] = np.memmap(path, np.float32, "r", shape=(self.count, 2))

    def __call__(self, pairs: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
        """Scores (Q, 2) of pairs given as (draw, row); their draws must be `ready`."""
        return np.stack([self._open[draw][row] for draw, row in pairs])

    def _make(self, draw: int, path: Path) -> None:
        self.run.say(f"scoring {self.count} pairs under the reference, once for noise draw {draw}")
        starts = range(0, self.count, self.batch)
        own, parts = self.run.share(len(starts)), [np.empty((0, 2), np.float32)]
        for i in self.run.in_step(own, 0):
            self.run.status(f"reference, pair {starts[i]} of {self.count}")
            rows = range(starts[i], min(starts[i] + self.batch, self.count))
            parts.append(self.score(draw, rows))
        scores = np.concatenate(self.run.collect([np.concatenate(parts[: 1 + len(own)])]))

        def write() -> None:
            with atomic_path(path) as file:
                file.write_bytes(scores.astype(np.float32).tobytes())

        self.run.first(write)
