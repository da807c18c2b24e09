"""D3PO online: sample groups, let a judge order them, learn from every strict pair, repeat.

What differs from the published code:

* A group is G images of one prompt, from one starting noise. Each image and step is scored once,
  and all pairs of the group share that score; pair by pair, G = 7 would cost six times as much.
* The reference's scores do not change while a rollout is learned from: they are computed once, and
  inner epochs reuse them.
* A tie costs nothing. A group without a strict pair, and an image that is in no pair, never reach
  the training forward; both are counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from d3po.draws import derive_seed, shuffled
from d3po.families import Family, guided
from d3po.generate import Order, SamplerConfig, generate
from d3po.likelihood import path_logp
from d3po.policy import Policy
from d3po.run import Run
from d3po.sampling import Reduce
from d3po.schedule import TimeGrid
from d3po.trainer import Chunk, OptimConfig, Round, Update, reference_logp
from fifa.config import Config, InputError, write_atomic
from fifa.images import encode_png, to_uint8
from fifa.rewards import Reward, score_images

Scores = NDArray[np.float64]  # (images, judges), higher is better


class OnlineConfig(Config):
    """What is sampled in a round, who judges it, and which steps are learned from."""

    prompts: str = Field(
        "miniworld:train",
        description="Where prompts come from: miniworld:train, or a text file with one a line.",
    )
    prompt_count: int = Field(
        1000,
        ge=1,
        description="How many prompts are taken from a generated source; a file is taken whole.",
    )
    groups: int = Field(
        8,
        ge=1,
        description="Prompts P sampled in a round by all processes together, one group each.",
    )
    images: int = Field(
        4, ge=2, description="Images G of a group, all from one starting noise (D3PO's data: 7)."
    )
    judges: tuple[str, ...] = Field(
        ("mini",),
        description="Rewards that order a group; of several, an image must lose by none and "
        "win by one (Pareto).",
    )
    labels: str | None = Field(
        None,
        description="Instead of judges: a JSON-lines file of human scores, see "
        "d3po.online.FileJudge.",
    )
    train_guidance: float | None = Field(
        None,
        ge=0,
        description="Guidance scale in the training forwards; null: as sampled, 1: none, at "
        "half the cost.",
    )
    steps: Literal["all", "random", "early", "late", "window"] = Field(
        "all",
        description="Denoising steps learned from: all, or step_count of them: random, the "
        "noisiest, the cleanest, or a window of neighbours.",
    )
    step_count: int | None = Field(
        None, ge=1, description="How many steps, for all choices but all; null for all."
    )
    window_start: int | None = Field(
        None,
        ge=0,
        description="First step of the window, 0 the noisiest; null: drawn anew for each update.",
    )
    skip_last: bool = Field(
        False,
        description="Leave the last step out: its sigma is tiny, its log-probability has spikes.",
    )
    steps_at_once: int = Field(
        1,
        ge=1,
        description="Denoising steps of an image that go through the network in one call: faster "
        "where a call alone does not fill the device, at the memory of the larger batch.",
    )
    inner_epochs: int = Field(
        1, ge=1, description="How often a round's groups are gone through (D3PO: 1)."
    )

    @model_validator(mode="after")
    def _consistent(self) -> OnlineConfig:
        if (self.steps == "all") != (self.step_count is None):
            raise ValueError(
                "step_count goes with steps random, early, late or window, and only with them"
            )
        if self.window_start is not None and self.steps != "window":
            raise ValueError("window_start goes with steps window, and only with it")
        if self.labels is None and not self.judges:
            raise ValueError("online needs judges or labels")
        return self


# ---- who wins -----------------------------------------------------------------------------------


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


# ---- which steps --------------------------------------------------------------------------------


def trained_steps(config: OnlineConfig, grid: TimeGrid, *place: int) -> list[int]:
    """The step indices that an update learns from; `place` is what a random choice depends on.

    Only steps with noise have a density. Raises InputError if nothing is left or too little.
    """
    usable = grid.stochastic
    if config.skip_last and usable and usable[-1] == len(grid) - 1:
        usable = usable[:-1]
    count = len(usable) if config.step_count is None else config.step_count
    if not usable or count + (config.window_start or 0) > len(usable):
        where = "" if config.window_start is None else f" from step {config.window_start} on"
        raise InputError(
            f"online.steps={config.steps} wants {count or 'some'} steps{where}, but {len(usable)} "
            f"of the {len(grid)} sampler steps have noise and may be trained on (sampler.eta > 0 "
            "adds noise)"
        )
    draw = np.random.default_rng(derive_seed("steps", *place))
    if config.steps == "random":
        return sorted(draw.choice(usable, count, False).tolist())
    if config.steps == "window":
        start = config.window_start
        start = int(draw.integers(len(usable) - count + 1)) if start is None else start
        return usable[start : start + count]
    return usable[-count:] if config.steps == "late" else usable[:count]


# ---- from a rollout to updates ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Block:
    """Judged groups that go through the network together: B images, Q pairs among them."""

    latents: Tensor  # (B, T+1, C, h, w)
    cond: Tensor  # (B, L, D)
    win: Tensor  # (Q,) long, rows of this block
    lose: Tensor  # (Q,)
    ref: Tensor  # (B, T) log-probabilities under the reference, NaN where nobody will look


@dataclass(frozen=True, eq=False)
class Rollout:
    """The groups this process sampled in a round, N = groups * G images."""

    places: Sequence[Place]
    prompts: Sequence[str]  # (N,)
    latents: Tensor  # (N, T+1, C, h, w)
    cond: Tensor  # (N, L, D)
    images: Tensor  # (N, 3, H, W)


class OnlineSource:
    """Rounds of D3PO: `round(i)` samples with the policy as it is then, judges, and yields updates.

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
    ) -> None:
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

    def round(self, index: int) -> Round:
        """Sample and judge round `index`; its updates are to be made in order."""
        self.run.status("sampling")
        rollout = self._sample(index)
        self.run.status("judging")
        scores = self.run.everywhere(
            lambda: self.judge(rollout.images, rollout.prompts, rollout.places)
        )
        pairs = [strict_pairs(own) for own in np.split(scores, len(rollout.places))]
        metrics = self._metrics(scores, pairs)
        self.run.status("training")
        return Round(metrics, self._updates(index, rollout, pairs))

    def _sample(self, index: int) -> Rollout:
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
        parts = list(generate(self.family, self.policy.bare, self.sampler, orders, self.reduce))
        return Rollout(
            places,
            [order.prompt for order in orders],
            torch.cat([part.trajectory.latents for part in parts]),
            torch.cat([part.cond for part in parts]),
            torch.cat([part.images for part in parts]),
        )

    def _own_groups(self) -> list[int]:
        """Its share of each update: the groups of an update do not depend on the processes."""
        size = self.groups_per_update
        return [u * size + i for u in range(self.updates) for i in self.run.share(size)]

    def _updates(
        self, index: int, rollout: Rollout, pairs: Sequence[Sequence[tuple[int, int]]]
    ) -> Iterator[Update]:
        count = len(rollout.places) // self.updates
        blocks = [
            self._blocks(rollout, pairs, range(u * count, (u + 1) * count))
            for u in range(self.updates)
        ]
        steps = {
            (u, epoch): trained_steps(self.config, self.grid, self.run.config.seed, index, u, epoch)
            for u in range(self.updates)
            for epoch in range(self.config.inner_epochs)
        }
        for u, own in enumerate(blocks):
            needed = sorted({i for (v, _), some in steps.items() if v == u for i in some})
            for block in own:
                logp = partial(self._logp, block.latents, block.cond, needed)
                block.ref[:, needed] = reference_logp(self.policy, logp)
        for epoch in range(self.config.inner_epochs):
            for u, own in enumerate(blocks):
                chunks = [
                    self._chunk(block, some)
                    for block in own
                    for some in self._at_once(steps[u, epoch])
                ]
                found = sum(len(block.win) for block in own)
                yield Update(chunks, found, partial(self._idle, rollout, steps[u, epoch][0]))

    def _blocks(
        self, rollout: Rollout, pairs: Sequence[Sequence[tuple[int, int]]], groups: range
    ) -> list[Block]:
        """The groups with a pair, micro_batch at a time, without the images that are in no pair."""
        judged, size = [group for group in groups if pairs[group]], self.optim.micro_batch
        return [
            self._block(rollout, pairs, judged[i : i + size]) for i in range(0, len(judged), size)
        ]

    def _block(
        self, rollout: Rollout, pairs: Sequence[Sequence[tuple[int, int]]], groups: Sequence[int]
    ) -> Block:
        win, lose = np.array(
            [
                (group * self.config.images + won, group * self.config.images + lost)
                for group in groups
                for won, lost in pairs[group]
            ]
        ).T
        rows = np.unique([win, lose])
        device = rollout.latents.device
        return Block(
            latents=rollout.latents[rows],
            cond=rollout.cond[rows],
            win=torch.from_numpy(np.searchsorted(rows, win)).to(device),
            lose=torch.from_numpy(np.searchsorted(rows, lose)).to(device),
            ref=torch.full((len(rows), len(self.grid)), torch.nan, device=device),
        )

    def _chunk(self, block: Block, steps: Sequence[int]) -> Chunk:
        logp = partial(self._logp, block.latents, block.cond, steps)
        return Chunk(logp, block.win, block.lose, len(steps), block.ref[:, steps])

    def _idle(self, rollout: Rollout, step: int) -> Chunk:
        nobody = torch.empty(0, dtype=torch.long, device=rollout.latents.device)
        logp = partial(self._logp, rollout.latents[:1], rollout.cond[:1], [step])
        return Chunk(logp, nobody, nobody, 1, torch.zeros(1, 1, device=rollout.latents.device))

    def _logp(
        self, latents: Tensor, cond: Tensor, steps: Sequence[int], denoiser: nn.Module
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
        return torch.cat(parts, 1)

    def _at_once(self, steps: Sequence[int]) -> list[Sequence[int]]:
        size = self.config.steps_at_once
        return [steps[i : i + size] for i in range(0, len(steps), size)]

    def _metrics(
        self, scores: Scores, pairs: Sequence[Sequence[tuple[int, int]]]
    ) -> dict[str, Any]:
        """What the judge saw in the whole round, on all processes."""
        tied = float(sum(not own for own in pairs))
        unused = sum(self.config.images - len({i for pair in own for i in pair}) for own in pairs)
        counts = [
            float(len(scores)),
            float(len(pairs)),
            tied,
            float(unused),
            float(sum(map(len, pairs))),
        ]
        sums = self.run.total([*counts, *scores.sum(0), *(scores**2).sum(0)])
        images, groups, tied, unused_images, found, *rest = sums
        means = np.array(rest[: len(self.judge_names)]) / images
        squares = np.array(rest[len(self.judge_names) :]) / images
        stds = np.sqrt(np.maximum(squares - means**2, 0))
        return {
            "reward": dict(zip(self.judge_names, means.tolist(), strict=True)),
            "reward_std": dict(zip(self.judge_names, stds.tolist(), strict=True)),
            "images": int(images),
            "unused_images": int(unused_images),
            "pairs": int(found),
            "tied": tied / groups,
        }


def groups_per_update(config: OnlineConfig, optim: OptimConfig, processes: int) -> int:
    """Groups of one optimizer step, over all processes; InputError if a round is not a multiple."""
    size = optim.micro_batch * optim.accumulation * processes
    if config.groups % size:
        raise InputError(
            f"online.groups={config.groups} must be a multiple of the groups of an update, "
            f"{optim.micro_batch} (optim.micro_batch) x {optim.accumulation} (optim.accumulation) "
            f"x {processes} (processes) = {size}"
        )
    return size
