"""What a round samples, who judges it, and what is learned from it, as settings."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from d3po.advantage import Scope
from d3po.draws import derive_seed
from d3po.schedule import TimeGrid
from d3po.trainer import OptimConfig
from fifa.config import Config, InputError


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
        "d3po.judging.FileJudge.",
    )
    judge_while_sampling: bool = Field(
        False,
        description="Judge pictures in a thread while the next ones are drawn, sampler.batch at a "
        "time: the same scores, sooner where judges leave the sampling device idle (on the CPU "
        "beside a GPU, or over a network).",
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
    advantage: Scope = Field(
        "prompt",
        description="What an image is compared with by objectives on single images: the others "
        "of its prompt, or all of the round.",
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
        if self.labels is not None and self.judge_while_sampling:
            raise ValueError("judge_while_sampling goes with judges; people label a whole round")
        return self


def groups_per_update(config: OnlineConfig, optim: OptimConfig, processes: int) -> int:
    """Groups of one optimizer step, over all processes; InputError if a round is not a multiple."""
    size = optim.units(processes)
    if config.groups % size:
        raise InputError(
            f"online.groups={config.groups} must be a multiple of the groups of an update, "
            f"{optim.micro_batch} (optim.micro_batch) x {optim.accumulation} (optim.accumulation) "
            f"x {processes} (processes) = {size}"
        )
    return size


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
