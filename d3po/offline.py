"""Offline: pairs from a table, encoded once, then re-noised and compared (Diffusion-DPO).

Or compared at points of an inverted path, in place of fresh noise: see inversion.

The pairs are encoded before training (see pair_cache): the loop itself needs neither VAE nor text
encoder.

The time and the noise of a pair are functions of (seed, draw, pair), the same for winner and loser
and for policy and reference (Wallace et al. 2023, section S4: the pseudocode shares both). Every
epoch has a draw of its own, unless their number is limited.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from d3po.draws import derive_seed, shuffled
from d3po.families import Family, guided
from d3po.inversion import InversionConfig, InvertedPaths
from d3po.likelihood import renoise_logp
from d3po.pair_cache import PairCache, PairsConfig
from d3po.policy import Policy
from d3po.reference import ReferenceScores
from d3po.run import Run
from d3po.sampling import Reduce, image_noise
from d3po.speed import SpeedConfig, numerics
from d3po.trainer import OptimConfig, reference_logp
from d3po.updates import PAIRS, Chunk, Rated, Round, Update, Wants
from fifa.config import InputError, fingerprint


class OfflineConfig(PairsConfig):
    """Which pairs are learned from, and how they are compared."""

    empty_prompts: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the pairs trained with the empty prompt, drawn anew each epoch "
        "(published: 0.2).",
    )
    noise: tuple[float, float] = Field(
        (0.0, 1.0),
        description="Part of the noise schedule that pairs are re-noised to: 0 clean, 1 pure "
        "noise (published: all of it). The noisy half is where layout is decided.",
    )
    path: Literal["renoise", "inverted"] = Field(
        "renoise",
        description="Where a picture's noisy latents come from. renoise: fresh noise "
        "(Diffusion-DPO); inverted: its path back to noise under the reference (InPO).",
    )
    inversion: InversionConfig = Field(
        InversionConfig(), description="How that path is made, for path inverted."
    )
    noise_draws: int | None = Field(
        None,
        ge=1,
        description="How many times and noises a pair is compared at; epochs go round among them, "
        "and the reference is asked once for each (8 bytes a pair). null: fresh ones each epoch.",
    )

    @field_validator("noise")
    @classmethod
    def _part_of_the_schedule(cls, part: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= part[0] < part[1] <= 1:
            raise ValueError(f"must be two numbers 0 <= low < high <= 1, got {part}")
        return part

    @model_validator(mode="after")
    def _inversion_of_something(self) -> OfflineConfig:
        if self.path != "inverted" and self.inversion != InversionConfig():
            raise ValueError("inversion goes with path inverted, and only with it")
        return self


# ---- updates ------------------------------------------------------------------------------------


class OfflineSource:
    """Updates of Diffusion-DPO: each holds the next pairs of an endless shuffled sequence.

    An update is a round of its own: nothing has to be sampled from the policy in between.
    """

    updates_per_round = 1

    def __init__(
        self,
        config: OfflineConfig,
        optim: OptimConfig,
        family: Family,
        policy: Policy,
        cache: PairCache,
        run: Run,
        reduce: Reduce = "mean",
        wants: Wants = PAIRS,
        speed: SpeedConfig | None = None,
    ) -> None:
        if wants.kind == "advantages":
            raise InputError(
                "this objective needs rewards and the log-probabilities that images were drawn "
                "with, and stored pairs have neither: use method d3po (rollouts), or an objective "
                "on pairs or labels"
            )
        self.wants = wants
        self.config, self.optim, self.family, self.policy = config, optim, family, policy
        self.cache, self.run, self.reduce = cache, run, reduce
        self.pairs_per_update = optim.units(run.processes)
        self.numerics = run.first(  # one key for all, also where their devices differ
            lambda: self._numerics(speed or SpeedConfig())
        )
        self.paths = self._inverted() if config.path == "inverted" else None
        wanted = wants.reference and config.noise_draws is not None
        self.reference = self._reference() if wanted else None

    def round(self, index: int) -> Round:
        """The one update of round `index`."""
        size, micro = self.pairs_per_update, self.optim.micro_batch
        rows = range(len(self.cache)) if self.paths is None else self.paths.rows
        places = range(index * size, (index + 1) * size)
        order = shuffled(self.run.config.seed, len(rows), places.start, places.stop)
        draws = [self._draw(place // len(rows)) for place in places]
        if self.reference is not None:
            self.reference.ready(sorted(set(draws)))
        own = [(draws[i], rows[order[i]]) for i in self.run.share(size)]
        chunks = [self._chunk(own[i : i + micro]) for i in range(0, len(own), micro)]
        images = 1 if self.wants.kind == "pairs" else 2
        return Round({}, iter([Update(chunks, images * len(own))]))

    def _chunk(self, pairs: Sequence[tuple[int, int]]) -> Chunk | Rated:
        """A chunk of Q pairs, given as (draw, row of the cache): 2Q images, winners first.

        For an objective on labels winners are liked images and losers disliked ones.
        """
        count, device, logp = len(pairs), self.run.device, partial(self._logp, pairs)
        ref = None
        if self.reference is not None:
            ref = torch.from_numpy(self.reference(pairs).T.reshape(-1, 1)).to(device)
        if self.wants.kind == "labels":
            liked = torch.ones(count, device=device)
            return Rated(logp, "labels", torch.cat([liked, -liked]), steps=1, ref=ref)
        rows = torch.arange(count, device=device)
        return Chunk(logp, win=rows, lose=rows + count, steps=1, ref=ref)

    def _reference(self) -> ReferenceScores:
        config, run = self.config, self.run
        choice = [run.config.seed, config.noise, config.empty_prompts, config.encode_batch]
        path = None if self.paths is None else self.paths.key
        how = [self.reduce, path, self.numerics]
        key = fingerprint(self.policy.fingerprint(), json.dumps([choice, how]))

        def score(draw: int, rows: Sequence[int]) -> NDArray[np.float32]:
            logp = partial(self._logp, [(draw, row) for row in rows])
            scores = reference_logp(self.policy, logp).float().cpu().numpy()
            return scores.reshape(2, -1).T

        folder = self.cache.folder / f"reference-{key}"
        return ReferenceScores(folder, len(self.cache), config.encode_batch, score, run)

    def _inverted(self) -> InvertedPaths:
        config, run, batch = self.config, self.run, self.config.encode_batch
        return InvertedPaths(
            config.inversion,
            config.noise,
            batch,
            self.family,
            self.policy,
            self.cache,
            run,
            self.numerics,
        )

    def _numerics(self, speed: SpeedConfig) -> list[Any]:
        """What scores depend on besides weights, pairs and draws."""
        schedule, run = self.family.schedule, self.run
        places = [k << 60 for k in range(8)]
        times = [schedule.random_time(place, (0.0, 1.0)) for place in places]
        t = torch.tensor(times, dtype=schedule.time_dtype)
        one = torch.ones(len(times), 1, dtype=torch.float64)
        noise_levels = schedule.alpha_sigma(t)[1].tolist()
        targets = schedule.target(one, 2 * one, t).flatten().tolist()
        settings = [v for _, v in sorted(vars(self.family).items()) if isinstance(v, (int, float))]
        how = numerics(speed, run.device, run.accelerator.mixed_precision)
        return [times, noise_levels, targets, settings, how]

    def _draw(self, epoch: int) -> int:
        """Which of its times and noises a pair meets in this epoch."""
        return epoch if self.config.noise_draws is None else epoch % self.config.noise_draws

    def _logp(self, pairs: Sequence[tuple[int, int]], denoiser: nn.Module) -> Tensor:
        """Log-probabilities (2Q, 1); one forward over winners and losers."""
        device = self.run.device
        rows = np.array([row for _, row in pairs])
        x0 = torch.from_numpy(np.concatenate([self.cache.win[rows], self.cache.lose[rows]]))
        cond = self.cache.conditioning([self._prompt(*pair) for pair in pairs])
        noise, times = self._noise(pairs)
        predict = guided(self.family, denoiser, cond.repeat(2).to(device))
        return renoise_logp(
            predict,
            self.family.schedule,
            x0.float().to(device),
            noise[:, None].to(device),
            times.repeat(2)[:, None],
            self.reduce,
        )

    def _noise(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The noise of winners and losers, (2Q, C, h, w), and the time of each pair, (Q,)."""
        if self.paths is not None:
            count = len(self.paths.points)
            points = [self._seed("point", *pair) % count for pair in pairs]
            return self.paths.noise([row for _, row in pairs], points), self.paths.times[points]
        fresh = image_noise([self._seed("noise", *p) for p in pairs], self.family.latent_shape, 0)
        times = [self._time(*pair) for pair in pairs]
        schedule = self.family.schedule
        return fresh.repeat(2, 1, 1, 1), torch.tensor(times, dtype=schedule.time_dtype)

    def _time(self, draw: int, row: int) -> float:
        """A time of the schedule, uniform over the part that is trained on."""
        uniform = self._seed("time", draw, row)
        return self.family.schedule.random_time(uniform, self.config.noise)

    def _prompt(self, draw: int, row: int) -> int:
        """Row of `cond`: the pair's prompt, or with probability empty_prompts 0, the empty one."""
        dropped = self._seed("empty", draw, row) < self.config.empty_prompts * 2**63
        return 0 if dropped else int(self.cache.prompt[row])

    def _seed(self, what: str, draw: int, row: int) -> int:
        return derive_seed(self.run.config.seed, what, draw, row)
