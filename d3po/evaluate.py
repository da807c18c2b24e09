"""Policy against reference: the same prompts, the same seeds, several judges, honest intervals.

Image k of prompt p starts from the same noise and meets the same noise on its path under both
networks, so a difference between two pictures is a difference between two sets of weights. Both are
judged by the same rewards; the first one is usually what was trained on, the others keep it honest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from d3po.draws import derive_seed
from d3po.families import Family
from d3po.generate import SamplerConfig, generate, independent_orders
from d3po.health import Health
from d3po.health.pictures import TONES, tone
from d3po.policy import Policy
from d3po.run import Run
from fifa.config import Config, InputError, finite
from fifa.images import Pixels, grid, to_uint8
from fifa.rewards import Reward, score_images

Z95 = 1.959963984540054  # 97.5% quantile of the standard normal
BOOTSTRAP = 2000  # resamples of the prompts


class EvalConfig(Config):
    """On what, how often and by whom a policy is compared with its reference during training."""

    prompts: str | None = Field(
        None,
        description="Prompts: miniworld:heldout, a text file with one a line, or heldout "
        "(those that "
        "offline.held_out_fraction sets aside); null: no evaluation. They never appear in "
        "training.",
    )
    count: int = Field(64, ge=1, description="How many of these prompts are used.")
    images: int = Field(4, ge=1, description="Pictures a prompt, each from its own noise.")
    seed: int = Field(
        1234,
        ge=0,
        description="Seed of the noise; kept apart from run.seed so that runs can be compared.",
    )
    every: int = Field(
        100,
        ge=0,
        description="Optimizer steps between two evaluations, rounded up to whole rounds; 0: "
        "start and end.",
    )
    judges: tuple[str, ...] = Field(
        ("mini",), min_length=1, description="Rewards that judge; name the one trained on first."
    )
    grid_prompts: int = Field(8, ge=0, description="Prompts shown in the picture grid; 0: no grid.")


# ---- what is measured ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PromptResult:
    """The pictures of one prompt under one set of weights, K of them, by R judges."""

    scores: NDArray[np.float64]  # (K, R)
    pixel_distance: float  # mean over pairs of pictures, root mean square difference in [0, 1]
    latent_distance: float  # the same in latents
    pictures: list[Pixels]  # empty where nobody wants to see them
    tone: tuple[float, float] = (math.nan, math.nan)  # mean brightness and saturation


@dataclass(frozen=True)
class JudgeResult:
    """What one judge makes of policy and reference at equal prompts and seeds."""

    judge: str
    policy: float  # mean over all pictures
    reference: float
    difference: float  # policy - reference
    difference_interval: tuple[float, float]  # 95%, bootstrap over prompts
    wins: int  # pictures where the policy's score is the higher one
    losses: int
    ties: int
    win_rate: float | None  # wins / (wins + losses); None if all are ties
    win_rate_interval: tuple[float, float] | None  # 95%, Wilson, over pictures that are no ties


@dataclass(frozen=True)
class Evaluation:
    """Policy against reference."""

    prompts: int
    images: int  # pictures of each prompt under each of the two
    seed: int
    judges: list[JudgeResult]
    pixel_diversity: tuple[
        float, float
    ]  # policy, reference: mean distance of two pictures of a prompt
    latent_diversity: tuple[float, float]
    brightness: tuple[float, float] = (math.nan, math.nan)
    saturation: tuple[float, float] = (math.nan, math.nan)

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(finite(asdict(self)), indent=1, allow_nan=False) + "\n"

    def metrics(self) -> dict[str, Any]:
        """The same as nested numbers, a part for each judge."""
        judges = {}
        for result in self.judges:
            values = asdict(result)
            judges[values.pop("judge")] = values
        both = ("pixel_diversity", "latent_diversity", *TONES)
        pairs = {
            name: dict(zip(("policy", "reference"), getattr(self, name), strict=True))
            for name in both
        }
        return {"prompts": self.prompts, "judges": judges, **pairs}


def measure(
    family: Family,
    denoiser: nn.Module,
    sampler: SamplerConfig,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    images: int,
    seed: int,
    rows: Sequence[int] | None = None,
    keep_pictures: Callable[[int], bool] = lambda row: False,
    advance: Callable[[int], None] = lambda pictures: None,
) -> list[PromptResult]:
    """Draw and judge `images` pictures of each of prompts[rows] (default all) under `denoiser`.

    A prompt's noise depends on (seed, its row, picture) alone. `advance` is told how many pictures
    are done.
    """
    rows = range(len(prompts)) if rows is None else rows
    orders = independent_orders(prompts, images, seed, rows)
    results: list[PromptResult] = []
    waiting: list[
        tuple[Tensor, Tensor, Tensor]
    ] = []  # scores, picture, latent of prompts not complete
    done = 0
    for part in generate(family, denoiser, sampler, orders):
        texts = [order.prompt for order in orders[done : done + len(part.images)]]
        _check_finite(part.images)
        scores = torch.stack([score_images(reward, part.images, texts) for reward in rewards], 1)
        waiting += zip(scores.cpu(), part.images.cpu(), part.trajectory.x0.cpu(), strict=True)
        done += len(part.images)
        while len(waiting) >= images:
            keep = keep_pictures(rows[len(results)])
            results.append(_prompt_result(waiting[:images], keep))
            del waiting[:images]
        advance(done)
    return results


def _check_finite(images: Tensor) -> None:
    broken = int((~images.isfinite().flatten(1).all(1)).sum())
    if broken:
        raise InputError(
            f"{broken} of {len(images)} pictures to be judged are NaN: the network or the VAE "
            "overflows, or its weights are broken; use run.mixed_precision bf16 or no, or go back "
            "to an earlier checkpoint"
        )


def _prompt_result(drawn: Sequence[tuple[Tensor, Tensor, Tensor]], keep: bool) -> PromptResult:
    scores, pictures, latents = (torch.stack(column) for column in zip(*drawn, strict=True))
    shades = tone(pictures).mean(0)
    return PromptResult(
        scores.double().numpy(),
        mean_distance(pictures),
        mean_distance(latents),
        list(to_uint8(pictures)) if keep else [],
        (float(shades[0]), float(shades[1])),
    )


def mean_distance(items: Tensor) -> float:
    """Mean over all pairs of (K, ...) of the root mean square difference; NaN for K = 1."""
    flat = items.double().flatten(1)
    return float(torch.pdist(flat).mean() / math.sqrt(flat.shape[1]))


# ---- what it says -------------------------------------------------------------------------------


def compare(
    policy: Sequence[PromptResult],
    reference: Sequence[PromptResult],
    judges: Sequence[str],
    seed: int,
) -> Evaluation:
    """Put two measurements of the same prompts and seeds side by side."""
    ours = np.stack([result.scores for result in policy])  # (P, K, R)
    theirs = np.stack([result.scores for result in reference])
    return Evaluation(
        prompts=ours.shape[0],
        images=ours.shape[1],
        seed=seed,
        judges=[
            judge_result(name, ours[..., r], theirs[..., r], seed) for r, name in enumerate(judges)
        ],
        pixel_diversity=(
            float(np.mean([result.pixel_distance for result in policy])),
            float(np.mean([result.pixel_distance for result in reference])),
        ),
        latent_diversity=(
            float(np.mean([result.latent_distance for result in policy])),
            float(np.mean([result.latent_distance for result in reference])),
        ),
        brightness=(_mean_tone(policy, 0), _mean_tone(reference, 0)),
        saturation=(_mean_tone(policy, 1), _mean_tone(reference, 1)),
    )


def _mean_tone(results: Sequence[PromptResult], which: int) -> float:
    return float(np.mean([result.tone[which] for result in results]))


def judge_result(
    judge: str, policy: NDArray[np.float64], reference: NDArray[np.float64], seed: int
) -> JudgeResult:
    """One judge's verdict on scores (P, K) of policy and reference."""
    wins, losses = int((policy > reference).sum()), int((policy < reference).sum())
    decided = wins + losses
    return JudgeResult(
        judge=judge,
        policy=float(policy.mean()),
        reference=float(reference.mean()),
        difference=float((policy - reference).mean()),
        difference_interval=bootstrap_mean((policy - reference).mean(1), seed),
        wins=wins,
        losses=losses,
        ties=policy.size - decided,
        win_rate=wins / decided if decided else None,
        win_rate_interval=wilson(wins, decided) if decided else None,
    )


def wilson(wins: int, count: int) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927); close to the truth also near 0 and 1."""
    share, z2 = wins / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_mean(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """95% percentile interval of the mean of (P,) values under resampling (Efron 1979).

    One value a prompt: pictures of a prompt are not independent, prompts are.
    """
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    means = values[rng.integers(len(values), size=(BOOTSTRAP, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def before_after(
    prompts: Sequence[str],
    policy: Sequence[PromptResult],
    reference: Sequence[PromptResult],
    images: int = 2,
    scale: int = 2,
) -> Pixels:
    """A picture grid: a column for each prompt that kept its pictures, reference above policy."""
    shown = [i for i, result in enumerate(policy) if result.pictures and reference[i].pictures]
    tiles: list[Pixels] = []
    labels: list[str] = []
    for k in range(min(images, len(policy[shown[0]].pictures))):
        tiles += [reference[i].pictures[k] for i in shown]
        labels += ["before"] * len(shown)
        tiles += [policy[i].pictures[k] for i in shown]
        labels += [prompts[i] for i in shown]
    return grid(tiles, columns=len(shown), pad=4, labels=labels, scale=scale)


# ---- a whole evaluation -------------------------------------------------------------------------


def evaluate_policy(
    config: EvalConfig,
    sampler: SamplerConfig,
    policy: Policy,
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    advance: Callable[[int], None] = lambda pictures: None,
) -> tuple[Evaluation, Pixels | None]:
    """Draw, judge and compare in this process; the verdict, and the grid if one is wanted."""

    def measured(before: int) -> list[PromptResult]:
        return measure(
            policy.family,
            policy.bare,
            sampler,
            rewards,
            prompts,
            config.images,
            config.seed,
            keep_pictures=lambda row: row < config.grid_prompts,
            advance=lambda done: advance(before + done),
        )

    with policy.reference():
        reference = measured(0)
    trained = measured(len(prompts) * config.images)
    result = compare(trained, reference, config.judges, config.seed)
    picture = before_after(prompts, trained, reference) if config.grid_prompts else None
    return result, picture


class Evaluator:
    """Evaluates the policy of a run at some steps; the reference's pictures are drawn once."""

    def __init__(
        self,
        config: EvalConfig,
        sampler: SamplerConfig,
        family: Family,
        policy: Policy,
        rewards: Sequence[Reward],
        prompts: Sequence[str],
        run: Run,
        health: Health | None = None,
    ) -> None:
        self.config, self.sampler, self.run = config, sampler, run
        self.health = Health() if health is None else health
        self.family, self.policy = family, policy
        self.rewards, self.prompts = rewards, prompts
        self._reference: list[PromptResult] | None = None

    def __call__(self, step: int) -> Evaluation:
        """Compare, write metrics and a grid, warn where the policy looks unhealthy."""
        self.run.status("evaluating")
        if self._reference is None:
            with self.policy.reference():
                self._reference = self._measure()
        if step == 0:
            policy = self._reference  # nothing has been learned: they are the same network
        else:
            with self.policy.averaged():
                policy = self._measure()
        result = compare(policy, self._reference, self.config.judges, self.config.seed)
        self.health.follow(self.run, "eval", step, result.metrics())
        if self.config.grid_prompts:
            picture = before_after(self.prompts, policy, self._reference)
            self.run.save_image(f"step-{step:06d}", picture)
        self.run.say(f"evaluation at step {step}: " + "; ".join(map(sentence, result.judges)))
        self.run.status("training")
        return result

    def _measure(self) -> list[PromptResult]:
        rows = self.run.share(len(self.prompts))
        own = measure(
            self.family,
            self.policy.bare,
            self.sampler,
            self.rewards,
            self.prompts,
            self.config.images,
            self.config.seed,
            rows=self.run.in_step(rows, 0),
            keep_pictures=lambda row: row < self.config.grid_prompts,
        )
        return self.run.collect(own[: len(rows)])


def sentence(result: JudgeResult) -> str:
    """A judge's verdict in one line."""
    low, high = result.difference_interval
    text = (
        f"{result.judge} {result.reference:.4g} -> {result.policy:.4g} "
        f"({result.difference:+.3g}, 95% {low:+.3g} to {high:+.3g})"
    )
    if result.win_rate is None or result.win_rate_interval is None:
        return text + ", all ties"
    low, high = result.win_rate_interval
    return text + f", wins {result.win_rate:.0%} ({low:.0%} to {high:.0%}), {result.ties} ties"
