"""Which images of a judged rollout go through the network together.

A group without a strict pair, and an image that is in no pair or says nothing, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d3po.advantage import Numbers
from d3po.families.conditioning import Conditioning
from d3po.judging import Pairs, Place
from d3po.updates import Kind


@dataclass(frozen=True, eq=False)
class Rollout:
    """The groups this process sampled in a round, N = groups * G images."""

    places: Sequence[Place]
    prompts: Sequence[str]  # (N,)
    latents: Tensor  # (N, T+1, C, h, w)
    cond: Conditioning  # N rows
    logp: Tensor  # (N, T), NaN at steps without a density
    images: Tensor  # (N, 3, H, W), black where latents are not finite
    finite: NDArray[np.bool_]  # (N,) whether latents and picture are

    @property
    def group_size(self) -> int:
        """Images G of a group."""
        return len(self.prompts) // len(self.places)


@dataclass(frozen=True, eq=False)
class Judged:
    """What a round's scores mean, on this process; P groups of G images."""

    pairs: Sequence[Pairs]  # of each group, numbered within it
    values: Numbers  # (P * G,) label or advantage; 0: says nothing


@dataclass(frozen=True, eq=False)
class Block:
    """Judged groups that go through the network together: B images, Q pairs among them."""

    latents: Tensor  # (B, T+1, C, h, w)
    cond: Conditioning  # B rows
    old: Tensor  # (B, T) log-probabilities under the policy that drew them
    ref: Tensor  # (B, T) those under the reference, NaN where nobody will look
    win: Tensor  # (Q,) long, rows of this block; none for objectives on single images
    lose: Tensor  # (Q,)
    value: Tensor  # (B,) float32, label or advantage; none for objectives on pairs

    def __len__(self) -> int:
        return len(self.win) + len(self.value)


def teaching_blocks(
    rollout: Rollout, judged: Judged, groups: range, kind: Kind, size: int
) -> list[Block]:
    """The groups that teach an objective of this kind, `size` at a time, without idle images."""
    images = rollout.group_size
    if kind == "pairs":
        teaching = [group for group in groups if judged.pairs[group]]
        make = _pair_block
    else:
        everything = kind == "advantages"
        values = judged.values.reshape(-1, images)
        finite = rollout.finite.reshape(-1, images)
        teaching = [
            group
            for group in groups
            if np.any(values[group]) or (everything and finite[group].any())
        ]
        make = partial(_rated_block, kind)
    return [make(rollout, judged, teaching[i : i + size]) for i in range(0, len(teaching), size)]


def _pair_block(rollout: Rollout, judged: Judged, groups: Sequence[int]) -> Block:
    win, lose = np.array(
        [
            (group * rollout.group_size + won, group * rollout.group_size + lost)
            for group in groups
            for won, lost in judged.pairs[group]
        ]
    ).T
    rows = np.unique([win, lose])
    return _block(
        rollout, rows, np.searchsorted(rows, win), np.searchsorted(rows, lose), np.zeros(0)
    )


def _rated_block(kind: Kind, rollout: Rollout, judged: Judged, groups: Sequence[int]) -> Block:
    size = rollout.group_size
    rows = np.concatenate([np.arange(group * size, (group + 1) * size) for group in groups])
    rows = rows[rollout.finite[rows]]
    if kind == "labels":
        rows = rows[judged.values[rows] != 0]
    nobody = np.zeros(0, dtype=np.int64)
    return _block(rollout, rows, nobody, nobody, judged.values[rows])


def _block(
    rollout: Rollout,
    rows: NDArray[np.int64],
    win: NDArray[np.int64],
    lose: NDArray[np.int64],
    values: Numbers,
) -> Block:
    device = rollout.latents.device
    return Block(
        latents=rollout.latents[rows],
        cond=rollout.cond[rows],
        old=rollout.logp[rows],
        ref=torch.full((len(rows), rollout.logp.shape[1]), torch.nan, device=device),
        win=torch.from_numpy(win).to(device),
        lose=torch.from_numpy(lose).to(device),
        value=torch.from_numpy(values.astype(np.float32)).to(device),
    )


def idle_block(rollout: Rollout) -> Block:
    """One image that nobody said anything about: a way through the network without a term.

    All zeros: a latent of the rollout might be NaN, and 0 times that is no 0.
    """
    nobody = np.zeros(0, dtype=np.int64)
    block = _block(rollout, np.zeros(1, dtype=np.int64), nobody, nobody, np.zeros(0))
    return replace(block, latents=torch.zeros_like(block.latents))
