"""From a name in the settings to a loss: an objective with its numbers, told what it asks for.

An objective says by the names of its arguments what it needs: `win` and `lose` are pairs,
`desirable` labels, `advantage` rewards; `ref_win` or `ref` the reference. So one of your own,
given as package.module:function, is understood like those of d3po.objectives.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from d3po.objectives import (
    OBJECTIVES,
    POLICY_GRADIENT,
    REFERENCE_FREE,
    UNPAIRED,
    Objective,
    free_metrics,
    gradient_metrics,
    pair_metrics,
    sft,
    unpaired_metrics,
)
from d3po.sampling import Reduce
from d3po.updates import Facts, Kind, Wants
from fifa.config import Config, InputError, import_from_here, unknown

KNOWN: dict[str, Objective] = {**OBJECTIVES, **REFERENCE_FREE, **UNPAIRED, **POLICY_GRADIENT}

FACTS: dict[Kind, tuple[str, ...]] = {
    "pairs": ("win", "lose", "ref_win", "ref_lose"),
    "labels": ("logp", "ref", "desirable", "baseline"),
    "advantages": ("logp", "ref", "old", "advantage", "kl"),
}
LIMITS = {  # of options, both ends excluded
    "clip": (0.0, 1.0),
    "label_smoothing": (0.0, 0.5),
    "snr": (0.0, math.inf),
    "scale": (0.0, math.inf),
    "desirable_weight": (0.0, math.inf),
    "undesirable_weight": (0.0, math.inf),
}
WATCHED: dict[str, str] = {
    # name in the metrics of d3po.objectives -> ours in metrics.jsonl
    "implicit_accuracy": "accuracy",
    "implicit_margin": "margin",
    "clipped_share": "clipped",
}


class ObjectiveConfig(Config):
    """Which loss, how strongly it is held to the reference, and in which unit."""

    name: str = Field(
        description="A name of d3po.objectives (dpo, d3po_clipped, kto, ddpo, ...; see "
        "docs/methods.md), or package.module:function."
    )
    beta: float | None = Field(
        None,
        gt=0,
        description="Strength of the pull to the reference, per unit of log-probability "
        "(published, on "
        "'mean': D3PO 0.1, Diffusion-DPO 2000 to 5000); null for an objective without one.",
    )
    options: dict[str, float] = Field(
        {}, description="Further numbers the objective takes, such as clip or label_smoothing."
    )
    sft: float = Field(
        0.0,
        ge=0,
        description="Weight of an added term, minus the log-probability of the winner (or of a "
        "liked image).",
    )
    reduce: Reduce = Field(
        "mean",
        description="Unit of log-probability: 'mean' per latent element, as published, or "
        "'sum' in nats.",
    )


@dataclass(frozen=True)
class BoundObjective:
    """An objective with its numbers filled in."""

    function: Objective
    arguments: Mapping[str, float]
    takes: tuple[str, ...] = FACTS["pairs"]  # the names of what it is told
    kind: Kind = "pairs"
    sft: float = 0.0

    @classmethod
    def from_config(cls, config: ObjectiveConfig) -> BoundObjective:
        """Look the objective up and check its numbers against its signature."""
        function = _objective(config.name)
        parameters = _parameters(config.name, function)
        numbers = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        takes = tuple(n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY)
        kind = _kind(config.name, takes)
        given = _checked(config, numbers)
        if config.sft and kind == "advantages":
            raise InputError(
                f"objective.sft: {config.name} has no winner to learn from; it goes with "
                "objectives on pairs or labels"
            )
        return cls(function, {**numbers, **given}, takes, kind, config.sft)

    @property
    def unit(self) -> str:
        """What its loss is a mean over: "pairs", or "images"."""
        return "pairs" if self.kind == "pairs" else "images"

    @property
    def wants(self) -> Wants:
        """What a source has to provide."""
        return Wants(self.kind, "ref" in self.takes or "ref_win" in self.takes)

    @property
    def clip(self) -> float | None:
        """The half width of its band of ratios, if it has one."""
        return self.arguments.get("clip")

    def __call__(self, *facts: Tensor) -> Tensor:
        """The unreduced loss; `facts` in the order of `takes`."""
        return self.function(*facts, **self.arguments)

    def loss(self, facts: Facts) -> Tensor:
        """The unreduced loss, with the added term if one was asked for."""
        loss = self(*(facts[name] for name in self.takes))
        if not self.sft:
            return loss
        if self.kind == "pairs":
            return loss + self.sft * sft(facts["win"])
        return loss + self.sft * sft(facts["logp"]) * (facts["desirable"] > 0)

    def watch(self, facts: Facts) -> dict[str, Tensor]:
        """What is written to metrics.jsonl beside the loss, unreduced, under its name there."""
        seen = self._metrics({name: value.detach() for name, value in facts.items()})
        return {WATCHED.get(name, name): value for name, value in seen.items()}

    def _metrics(self, facts: Facts) -> dict[str, Tensor]:
        beta = self.arguments.get("beta", 1.0)
        if self.kind == "pairs" and "ref_win" in facts:
            win, lose, ref_win, ref_lose = (facts[name] for name in FACTS["pairs"])
            return pair_metrics(win, lose, ref_win, ref_lose, beta, self.clip)
        if self.kind == "pairs":
            return free_metrics(facts["win"], facts["lose"], beta)
        if self.kind == "labels":
            logp, ref, desirable, baseline = (facts[name] for name in FACTS["labels"])
            return unpaired_metrics(logp, ref, desirable, baseline, beta)
        kl = {"kl": facts["kl"]} if "kl" in facts else {}
        return {**gradient_metrics(facts["logp"], facts["old"], self.clip), **kl}


def _parameters(name: str, function: Objective) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise InputError(f"objective.name: {name} is no function of ours: {error}") from None


def _kind(name: str, takes: tuple[str, ...]) -> Kind:
    told: dict[str, Kind] = {"win": "pairs", "desirable": "labels", "advantage": "advantages"}
    for fact, kind in told.items():
        if fact in takes and set(takes) <= set(FACTS[kind]):
            return kind
    allowed = "; or ".join(", ".join(facts) for facts in FACTS.values())
    raise InputError(
        f"objective.name: {name} takes ({', '.join(takes)}); an objective takes some of {allowed}, "
        "and its numbers by keyword"
    )


def _checked(config: ObjectiveConfig, numbers: Mapping[str, object]) -> dict[str, float]:
    """The numbers that were given, if the objective takes them and they are within their limits."""
    given = dict(config.options)
    for name, value in given.items():
        if name not in numbers or name == "beta":
            allowed = ", ".join(sorted(set(numbers) - {"beta"})) or "none"
            raise InputError(
                f"objective.options.{name}: {config.name} takes no such option, allowed: {allowed}"
            )
        low, high = LIMITS.get(name, (-math.inf, math.inf))
        if not low < value < high:
            raise InputError(
                f"objective.options.{name} is {value}, it must lie between {low} and {high}"
            )
    if config.beta is not None and "beta" not in numbers:
        raise InputError(f"objective.beta: {config.name} takes none; remove it")
    if config.beta is not None:
        given["beta"] = config.beta
    for name, default in numbers.items():
        if default is inspect.Parameter.empty and name not in given:
            where = "objective.beta" if name == "beta" else f"objective.options.{name}"
            raise InputError(f"{where} is missing: {config.name} needs it")
    return given


def _objective(name: str) -> Objective:
    if name in KNOWN:
        return KNOWN[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise unknown("objective", name, KNOWN, "package.module:function")
    try:
        found: Objective = getattr(import_from_here(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"objective.name: cannot import '{name}': {error}") from None
    return found
