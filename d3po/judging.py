"""Who judges the pictures of a rollout, a reward or people, and which pairs follow from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fifa.config import InputError, write_atomic
from fifa.images import encode_png, to_uint8
from fifa.rewards import Reward, load_reward, on_device, score_images

Scores = NDArray[np.float64]  # (images, judges), higher is better
Pairs = Sequence[tuple[int, int]]  # (winner, loser) of a group


def strict_pairs(scores: Scores) -> list[tuple[int, int]]:
    """All (winner, loser) of a group, scores (G, R): no worse by any judge, better by at least one.

    With one judge that is its strict order; with several, Pareto dominance, so a disagreement is a
    tie (Yang et al. 2024, section 5.1, does the same).
    """
    better = (scores[:, None] >= scores[None]).all(-1) & (scores[:, None] > scores[None]).any(-1)
    return [(int(win), int(lose)) for win, lose in np.argwhere(better)]


@dataclass(frozen=True)
class Place:
    """Where a group comes from: its round, and its number among all groups of the round."""

    round: int
    group: int


Judge = Callable[[Tensor, Sequence[str], Sequence[Place]], Scores]
"""judge(images (N, 3, H, W), N prompts, the groups in order) -> scores (N, R)."""


@dataclass(frozen=True)
class RewardJudge:
    """Orders images by one or more rewards."""

    rewards: Sequence[Reward]

    def __call__(self, images: Tensor, prompts: Sequence[str], places: Sequence[Place]) -> Scores:
        """Scores (N, R), a column for each reward."""
        columns = [score_images(reward, images, prompts) for reward in self.rewards]
        return torch.stack(columns, 1).double().cpu().numpy()


class Rewards:
    """Rewards by name, on one device, each loaded once: judges of training often evaluate too."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = str(device)
        self._loaded: dict[str, Reward] = {}

    def __call__(self, names: Sequence[str]) -> list[Reward]:
        """The rewards of these names; InputError for one that cannot be had, or not there."""
        for name in names:
            if name not in self._loaded:
                reward = load_reward(name)
                self._loaded[name] = on_device(reward, self.device, "reward", name)
        return [self._loaded[name] for name in names]


class Hearing:
    """The judging of one round: pictures come in as they are drawn, scores are asked for after.

    Rewards look at single pictures and get them in the parts that they came in. With
    `while_sampling` they begin at once, in a thread of their own, and see the same parts in the
    same order; what they raise is raised where the scores are asked for. Whoever judges groups
    gets the whole round at the end.
    """

    def __init__(self, judge: Judge, while_sampling: bool) -> None:
        self.judge = judge
        self._pool = ThreadPoolExecutor(1, "judge") if while_sampling else None
        self._parts: list[Callable[[], Scores]] = []

    def __enter__(self) -> Hearing:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def hear(self, images: Tensor, prompts: Sequence[str]) -> None:
        """The next pictures (n, 3, H, W) of the round."""
        if not isinstance(self.judge, RewardJudge):
            return
        work = partial(self.judge, images, prompts, ())
        self._parts.append(work if self._pool is None else self._pool.submit(work).result)

    def scores(self, images: Tensor, prompts: Sequence[str], places: Sequence[Place]) -> Scores:
        """Scores (N, R) of the round, all of whose pictures were heard."""
        if not isinstance(self.judge, RewardJudge):
            return self.judge(images, prompts, places)
        return np.concatenate([part() for part in self._parts])


class FileJudge:
    """Orders images by what people wrote into a file, one JSON object a line:

        {"round": 0, "group": 3, "scores": [0, -1, 0, 1]}

    One score an image, higher is better, equal ones tie; several lines of one group are averaged,
    as if each were an annotator. A round whose labels are missing stops the run, after its images
    were written to samples/round-NNNNNN/. Label them and run the command again: the images are
    drawn again from the same seeds and weights, and training goes on.
    """

    def __init__(self, path: str | Path, samples: Path, images: int) -> None:
        self.path = Path(path)
        self.samples = samples
        self.images = images
        self.labels = self._read() if self.path.exists() else {}

    def __call__(self, images: Tensor, prompts: Sequence[str], places: Sequence[Place]) -> Scores:
        """Scores (N, 1); raises InputError, with the images on disk, if some have no label."""
        missing = [i for i, place in enumerate(places) if place not in self.labels]
        if missing:
            folder = self._show(images, prompts, places)
            raise InputError(
                f"{len(missing)} groups of round {places[0].round} have no labels in "
                f"{self.path}; their"
                f" images are in {folder}: label them and run the same command again"
            )
        return np.concatenate([np.mean(self.labels[place], 0) for place in places])[:, None]

    def _show(self, images: Tensor, prompts: Sequence[str], places: Sequence[Place]) -> Path:
        folder = self.samples / f"round-{places[0].round:06d}"
        pictures = to_uint8(images)
        for i, place in enumerate(places):
            for k in range(self.images):
                name = f"group-{place.group:04d}-image-{k}.png"
                write_atomic(folder / name, encode_png(pictures[i * self.images + k]))
            note = {"round": place.round, "group": place.group, "prompt": prompts[i * self.images]}
            text = json.dumps(note, ensure_ascii=False) + "\n"
            write_atomic(folder / f"group-{place.group:04d}.json", text)
        return folder

    def _read(self) -> dict[Place, list[Any]]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read labels from {self.path}: {error}") from None
        labels: dict[Place, list[Any]] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            try:
                row = json.loads(line)
                place, scores = Place(int(row["round"]), int(row["group"])), row["scores"]
                values = np.asarray(scores, dtype=np.float64)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f'{where}: expected {{"round": 0, "group": 0, "scores": [...]}} ({error!r})'
                ) from None
            if values.shape != (self.images,) or not np.isfinite(values).all():
                raise InputError(f"{where}: expected {self.images} finite scores, found {scores}")
            labels.setdefault(place, []).append(values)
        return labels
