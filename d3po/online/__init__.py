"""Online: sample groups, let a judge order or rate them, learn from every image, repeat.

D3PO learns from strict pairs; the same rollouts serve objectives on single images, liked or not
(KTO) or with an advantage (DDPO, DPOK, reward-weighted), see `Wants`.

What differs from the published code:

* A group is G images of one prompt, from one starting noise. Each image and step is scored once,
  and all pairs of the group share that score; pair by pair, G = 7 would cost six times as much.
* The reference's scores do not change while a rollout is learned from: they are computed once, and
  inner epochs reuse them.
* A tie costs nothing. A group without a strict pair, and an image that is in no pair, never reach
  the training forward; both are counted.

`settings` says what a round is, `blocks` what of a judged rollout teaches anything; here it is
sampled, judged and learned from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d3po.advantage import Numbers, advantages, combined, labels
from d3po.draws import derive_seed, shuffled
from d3po.families import Family, guided
from d3po.families.conditioning import Conditioning
from d3po.generate import Order, SamplerConfig, generate
from d3po.health.pictures import group_sums, picture_metrics
from d3po.judging import Hearing, Judge, Place, Scores, strict_pairs
from d3po.likelihood import PathScore, log_peak, path_logp, path_score
from d3po.online.blocks import Block, Judged, Rollout, idle_block, teaching_blocks
from d3po.online.settings import OnlineConfig, groups_per_update, trained_steps
from d3po.policy import Policy
from d3po.run import Run
from d3po.sampling import Reduce
from d3po.trainer import OptimConfig
from d3po.updates import PAIRS, Chunk, Rated, Round, Update, Wants
from fifa.config import InputError


class OnlineSource:
    """Rounds: `round(i)` samples with the policy as it is then, judges, and yields updates.

    An update holds micro_batch * accumulation * processes groups, each process its share; a round
    is cut into updates in the order of its groups and gone through inner_epochs times.
    """

    def __init__(
        self,
        config: OnlineConfig,
        sampler: SamplerConfig,
        optim: OptimConfig,
        family: Family,
        policy: Policy,
        judge: Judge,
        judge_names: Sequence[str],
        prompts: Sequence[str],
        run: Run,
        reduce: Reduce = "mean",
        wants: Wants = PAIRS,
    ) -> None:
        self.wants = wants
        self.config, self.sampler, self.optim = config, sampler, optim
        self.family, self.policy, self.run, self.reduce = family, policy, run, reduce
        self.judge, self.judge_names, self.prompts = judge, judge_names, prompts
        self.grid = sampler.grid(family)
        scale = sampler.guidance if config.train_guidance is None else config.train_guidance
        self.scale, self.uncond = scale, family.encode_text([""])
        self.groups_per_update = groups_per_update(config, optim, run.processes)
        self.updates = config.groups // self.groups_per_update
        self.updates_per_round = self.updates * config.inner_epochs
        trained_steps(config, self.grid)  # say now what would fail after the first rollout
        if wants.kind == "advantages" and scale != sampler.guidance:
            raise InputError(
                f"online.train_guidance is {scale}, but this objective compares with the "
                f"log-probabilities of the rollout, drawn at sampler.guidance {sampler.guidance}: "
                "leave train_guidance null"
            )

    def round(self, index: int) -> Round:
        """Sample and judge round `index`; its updates are to be made in order."""
        self.run.status("sampling")
        with Hearing(self.judge, self.config.judge_while_sampling) as hearing:
            rollout = self._sample(index, hearing)
            self.run.status("judging")
            scores = self.run.everywhere(
                lambda: hearing.scores(rollout.images, rollout.prompts, rollout.places)
            )
        # a picture that is not finite beats nobody, loses to nobody, and has no advantage
        scores = np.where(rollout.finite[:, None], scores, np.nan)
        judged, metrics = self._judged(scores, len(rollout.places))
        metrics |= self._pictures(rollout, scores)
        self.run.status("training")
        return Round(metrics, self._updates(index, rollout, judged))

    def _sample(self, index: int, hearing: Hearing) -> Rollout:
        config, seed = self.config, self.run.config.seed
        first = index * config.groups
        chosen = shuffled(seed, len(self.prompts), first, first + config.groups)
        places = [Place(index, group) for group in self._own_groups()]
        orders = [
            Order(
                self.prompts[chosen[place.group]],
                derive_seed(seed, "start", index, place.group),
                derive_seed(seed, "path", index, place.group, image),
            )
            for place in places
            for image in range(config.images)
        ]
        prompts = [order.prompt for order in orders]
        parts, pictures, sound, start = [], [], [], 0
        for part in generate(self.family, self.policy.bare, self.sampler, orders, self.reduce):
            finite = _finite(part.trajectory.latents) & _finite(part.images)
            images = torch.where(finite[:, None, None, None], part.images, 0.0)
            hearing.hear(images, prompts[start : start + len(images)])
            start += len(images)
            parts.append(part)
            pictures.append(images)
            sound.append(finite)
        return Rollout(
            places,
            prompts,
            torch.cat([part.trajectory.latents for part in parts]),
            Conditioning.cat([part.cond for part in parts]),
            torch.cat([part.trajectory.logp for part in parts]),
            torch.cat(pictures),
            torch.cat(sound).cpu().numpy(),
        )

    def _own_groups(self) -> list[int]:
        """Its share of each update: the groups of an update do not depend on the processes."""
        size = self.groups_per_update
        return [u * size + i for u in range(self.updates) for i in self.run.share(size)]

    def _judged(self, scores: Scores, groups: int) -> tuple[Judged, dict[str, Any]]:
        """What the scores mean for the objective, and what is written down about them."""
        pairs = [strict_pairs(own) for own in np.split(scores, groups)]
        mean, std, metrics = self._metrics(scores, pairs)
        if self.wants.kind == "pairs":
            return Judged(pairs, np.zeros(0)), metrics
        values = combined(scores, mean, std)
        _, spread = self._moments(values[:, None])
        found = advantages(values, self.config.images, self.config.advantage, float(spread[0]))
        _, spread = self._moments(found[:, None])
        metrics["advantage_std"] = float(spread[0])
        return Judged(pairs, labels(found) if self.wants.kind == "labels" else found), metrics

    def _blocks(self, rollout: Rollout, judged: Judged) -> list[list[Block]]:
        """The blocks of each update, equally many on all processes."""
        count, idle = len(rollout.places) // self.updates, idle_block(rollout)
        kind, size = self.wants.kind, self.optim.micro_batch
        parts = [range(u * count, (u + 1) * count) for u in range(self.updates)]
        return [
            self.run.in_step(teaching_blocks(rollout, judged, groups, kind, size), idle)
            for groups in parts
        ]

    def _updates(self, index: int, rollout: Rollout, judged: Judged) -> Iterator[Update]:
        blocks = self._blocks(rollout, judged)
        steps = {
            (u, epoch): trained_steps(self.config, self.grid, self.run.config.seed, index, u, epoch)
            for u in range(self.updates)
            for epoch in range(self.config.inner_epochs)
        }
        for u, own in enumerate(blocks):
            needed = sorted({i for (v, _), some in steps.items() if v == u for i in some})
            if self.wants.reference:
                self._ask_reference(own, needed)
        for epoch in range(self.config.inner_epochs):
            for u, own in enumerate(blocks):
                chunks = [
                    self._chunk(block, some)
                    for block in own
                    for some in self._at_once(steps[u, epoch])
                ]
                yield Update(chunks, sum(len(block) for block in own))

    def _ask_reference(self, blocks: Sequence[Block], steps: Sequence[int]) -> None:
        with self.policy.reference():
            for block in blocks:
                scores = self._logp(block.latents, block.cond, steps, self.policy.bare)
                block.ref[:, steps] = scores

    def _chunk(self, block: Block, steps: Sequence[int]) -> Chunk | Rated:
        logp = partial(self._logp, block.latents, block.cond, steps)
        ref = block.ref[:, steps] if self.wants.reference else None
        if self.wants.kind == "pairs":
            return Chunk(logp, block.win, block.lose, len(steps), ref)
        path = partial(self._path, block.latents, block.cond, steps)
        old, kind = block.old[:, steps], self.wants.kind
        chunk = Rated(logp, kind, block.value, len(steps), ref, old, path, self.reduce)
        return chunk if len(block) else _without_terms(chunk)

    def _logp(
        self, latents: Tensor, cond: Conditioning, steps: Sequence[int], denoiser: nn.Module
    ) -> Tensor:
        """Log-probabilities (B, S); a network call for every steps_at_once steps."""
        parts = []
        for some in self._at_once(steps):
            rows = torch.arange(len(latents)).repeat(len(some))
            predict = guided(self.family, denoiser, cond[rows], self.uncond, self.scale)
            schedule, chosen = self.family.schedule, torch.tensor(some)
            parts.append(
                path_logp(predict, self.grid, schedule, latents, chosen, self.reduce, together=True)
            )
        found = torch.cat(parts, 1)
        if self.wants.reference or self.wants.kind != "pairs":
            return found
        # Without a reference to compare with, log-densities of different steps need one scale.
        chosen = torch.tensor(steps)
        peak = log_peak(self.grid, chosen, latents[0, 0].numel(), self.reduce)
        return found - peak.to(found)

    def _at_once(self, steps: Sequence[int]) -> list[Sequence[int]]:
        size = self.config.steps_at_once
        return [steps[i : i + size] for i in range(0, len(steps), size)]

    def _path(
        self, latents: Tensor, cond: Conditioning, steps: Sequence[int], denoiser: nn.Module
    ) -> PathScore:
        predict = guided(self.family, denoiser, cond, self.uncond, self.scale)
        chosen, schedule = torch.tensor(steps), self.family.schedule
        return path_score(predict, self.grid, schedule, latents, chosen, self.reduce)

    def _moments(self, values: Numbers) -> tuple[Numbers, Numbers]:
        """Mean and standard deviation (R,) of the finite values (N, R) over all processes."""
        count = np.isfinite(values).sum(0).astype(float)
        own = [*count, *np.nansum(values, 0), *np.nansum(values**2, 0)]
        count, sums, squares = np.array(self.run.total(own)).reshape(3, -1)
        means = sums / np.maximum(1.0, count)
        return means, np.sqrt(np.maximum(squares / np.maximum(1.0, count) - means**2, 0))

    def _pictures(self, rollout: Rollout, scores: Scores) -> dict[str, Any]:
        """How the pictures of the round look, on all processes."""
        clean = rollout.latents[:, -1]
        own = group_sums(rollout.images, clean, scores[:, 0], len(rollout.places))
        return picture_metrics(self.run.total(own))

    def _metrics(
        self, scores: Scores, pairs: Sequence[Sequence[tuple[int, int]]]
    ) -> tuple[Numbers, Numbers, dict[str, Any]]:
        """Mean and deviation (R,) of the whole round, and all that the judges saw in it."""
        tied = float(sum(not own for own in pairs))
        unused = sum(self.config.images - len({i for pair in own for i in pair}) for own in pairs)
        counts = [
            float(np.isfinite(scores[:, 0]).sum()),
            float(len(pairs)),
            tied,
            float(unused),
            float(sum(map(len, pairs))),
        ]
        images, groups, tied, unused_images, found = self.run.total(counts)
        means, stds = self._moments(scores)
        metrics = {
            "reward": dict(zip(self.judge_names, means.tolist(), strict=True)),
            "reward_std": dict(zip(self.judge_names, stds.tolist(), strict=True)),
            "images": int(images),
            "unused_images": int(unused_images),
            "pairs": int(found),
            "tied": tied / groups,
        }
        return means, stds, metrics


def _finite(values: Tensor) -> Tensor:
    """(B,) whether all of each row's values are finite."""
    return values.isfinite().flatten(1).all(1)


def _without_terms(idle: Rated) -> Rated:
    """A chunk whose images nobody rated: the same way through the network, and no row of it."""
    logp, path, ref, old = idle.logp, idle.path, idle.ref, idle.old
    assert path is not None  # as `_chunk` makes them
    assert old is not None
    return replace(
        idle,
        logp=lambda net: logp(net)[:0],
        path=lambda net: PathScore(*(part[:0] for part in path(net))),
        ref=None if ref is None else ref[:0],
        old=old[:0],
    )
