"""Pairs beside the training: held-out ones under the policy, and labels under other judges.

A policy that has learned what people prefer orders pairs that it never saw; one that has learned
its pairs by heart, or learned them the wrong way round, does not. Both checks read a few hundred
pairs of the data set itself and keep them in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d3po.draws import derive_seed
from d3po.families import Family, guided
from d3po.families.conditioning import Conditioning
from d3po.generate import encode_prompts
from d3po.health import Health
from d3po.likelihood import renoise_logp
from d3po.objectives import pair_metrics
from d3po.offline import OfflineConfig
from d3po.pair_cache import fitted
from d3po.policy import Policy
from d3po.run import Run
from d3po.sampling import Reduce, image_noise
from d3po.trainer import reference_logp
from fifa.config import InputError
from fifa.images import Pixels, decode, to_batch
from fifa.pairs import BadRow, PairTable, held_out, pair_from
from fifa.rewards import Reward, score_images

BATCH = 16  # pairs that go through a network at once


@dataclass(frozen=True)
class Shown:
    """A pair as pictures."""

    prompt: str
    win: Pixels
    lose: Pixels


def read_pairs(config: OfflineConfig, count: int, size: int, kept_out: bool) -> list[Shown]:
    """The first `count` usable pairs, in table order, that training sees or that it never sees.

    Pictures are squares of `size` pixels. Rows that are no pair or cannot be decoded are passed
    over: the cache of the training pairs lists them.
    """
    found: list[Shown] = []
    for shown in _shown(config, size, kept_out):
        found.append(shown)
        if len(found) == count:
            break
    return found


def _shown(config: OfflineConfig, size: int, kept_out: bool) -> Iterator[Shown]:
    table = PairTable.open(config.data)
    for group in range(len(table.row_groups())):
        for judgment in table.judgments(group):
            pair = None if isinstance(judgment, BadRow) else pair_from(judgment)
            if pair is None:
                continue
            split = held_out(pair.prompt, config.held_out_fraction, config.held_out_seed)
            if split != kept_out:
                continue
            try:
                win, lose = (decode(data, pair.provenance) for data in (pair.win, pair.lose))
            except InputError:
                continue
            yield Shown(pair.prompt, fitted(win, size), fitted(lose, size))


# ---- labels -------------------------------------------------------------------------------------


def label_agreement(pairs: Sequence[Shown], rewards: Sequence[Reward]) -> dict[str, Any]:
    """The share of pairs whose winner scores higher by each reward, ties as one half.

    A reward that cannot score these prompts or pictures has no say and is left out.
    """
    prompts = [pair.prompt for pair in pairs]
    win, lose = to_batch([pair.win for pair in pairs]), to_batch([pair.lose for pair in pairs])
    agreement = {}
    for reward in rewards:
        try:
            difference = score_images(reward, win, prompts) - score_images(reward, lose, prompts)
        except InputError:
            continue
        agreement[reward.name] = float(((difference.sign() + 1) / 2).mean())
    return {"pairs": len(pairs), "agreement": agreement}


# ---- held-out pairs -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Batch:
    """Encoded pairs, winners first: 2Q images."""

    x0: Tensor  # (2Q, C, h, w)
    cond: Conditioning  # of the 2Q images
    noise: Tensor  # (2Q, 1, C, h, w), the same for winner and loser
    times: Tensor  # (2Q, 1)
    ref: Tensor  # (2Q, 1)


class HeldOut:
    """Scores pairs that training never sees, at every evaluation at the same times and noise.

    Call it with the step: it records accuracy, margin and both log-ratios in metrics.jsonl as
    "held_out", and health says what they mean. Every process takes its share of the pairs.
    """

    def __init__(
        self,
        pairs: Sequence[Shown],
        family: Family,
        policy: Policy,
        run: Run,
        health: Health,
        beta: float,
        noise: tuple[float, float] = (0.0, 1.0),
        reduce: Reduce = "mean",
    ) -> None:
        self.family, self.policy, self.run, self.health = family, policy, run, health
        self.beta, self.noise, self.reduce = beta, noise, reduce
        own = run.share(len(pairs))
        parts = [own[i : i + BATCH] for i in range(0, len(own), BATCH)]
        self.counted = len(parts)  # the others only keep step
        self.batches = [
            self._encoded(rows, [pairs[row] for row in rows])
            for rows in run.in_step(parts, range(1))
        ]

    def __call__(self, step: int) -> dict[str, float]:
        """What the policy makes of the pairs after `step` optimizer steps, averaged weights."""
        sums = torch.zeros(5, dtype=torch.float64)
        with self.policy.averaged(), torch.no_grad():
            for i, batch in enumerate(self.batches):
                win, lose = self._logp(batch, self.policy.bare).chunk(2)
                ref_win, ref_lose = batch.ref.chunk(2)
                values = pair_metrics(win, lose, ref_win, ref_lose, self.beta)
                kept = list(NAMES.values())
                own = [len(win), *(float(values[name].double().sum()) for name in kept)]
                if i < self.counted:
                    sums += torch.tensor(own, dtype=torch.float64)
        pairs, *totals = self.run.total(sums.tolist())
        means = {name: total / pairs for name, total in zip(NAMES, totals, strict=True)}
        found = {"pairs": pairs, **means}
        self.health.follow(self.run, "held_out", step, found)
        return found

    def _encoded(self, rows: Sequence[int], pairs: Sequence[Shown]) -> _Batch:
        device, seed = self.family.device, self.run.config.seed
        pictures = [pair.win for pair in pairs] + [pair.lose for pair in pairs]
        shape = self.family.latent_shape
        noise = image_noise([derive_seed(seed, "held-out noise", row) for row in rows], shape, 0)
        times = [self._time(row) for row in rows]
        batch = _Batch(
            x0=self.family.encode_images(to_batch(pictures).to(device)),
            cond=encode_prompts(self.family, [pair.prompt for pair in pairs] * 2),
            noise=torch.cat([noise, noise])[:, None].to(device),
            times=torch.tensor(times * 2, dtype=self.family.schedule.time_dtype)[:, None],
            ref=torch.empty(0),
        )
        ref = reference_logp(self.policy, lambda denoiser: self._logp(batch, denoiser))
        return _Batch(batch.x0, batch.cond, batch.noise, batch.times, ref)

    def _time(self, row: int) -> float:
        """A time of the part of the schedule that is trained on, the same at every evaluation."""
        draw = derive_seed(self.run.config.seed, "held-out time", row)
        return self.family.schedule.random_time(draw, self.noise)

    def _logp(self, batch: _Batch, denoiser: nn.Module) -> Tensor:
        predict = guided(self.family, denoiser, batch.cond)
        schedule = self.family.schedule
        return renoise_logp(predict, schedule, batch.x0, batch.noise, batch.times, self.reduce)


NAMES = {
    # our name in metrics.jsonl -> name in pair_metrics
    "accuracy": "implicit_accuracy",
    "margin": "implicit_margin",
    "win_ratio": "win_ratio",
    "lose_ratio": "lose_ratio",
}
