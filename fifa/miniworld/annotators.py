"""Simulated people: what they like is known exactly, what they say is as noisy as a crowd.

Hidden utility of an image for a user of taste group g, in logits at temperature 1:

    u_g = alignment * share + complete * [share = 1] + neat * neatness + taste * feature_g

where share is that of the prompt's conditions that hold; a prompt that asks for nothing of the mini
world leaves neatness and taste. A careful user compares two images by Bradley-Terry with ties (Rao
and Kupper 1967): with d = (u_a - u_b) / temperature and half-width h >= 0,

    P(a) = sigmoid(d - h),   P(b) = sigmoid(-d - h),   P(tie) = the rest,

and sometimes presses the wrong button. A careless user answers without looking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fifa.config import InputError
from fifa.miniworld.captions import Request, UnparsedPrompt, parse
from fifa.miniworld.oracle import Seen, View, judge, look, view_neatness
from fifa.miniworld.scenes import Image, Scene
from fifa.miniworld.vocabulary import BACKGROUND_RGB

Floats = NDArray[np.float64]
A, B, TIE = 0, 1, 2  # outcomes

WARM = frozenset({"red", "orange", "yellow", "pink"})
DARKNESS = {name: 1 - sum(rgb) / 765 for name, rgb in BACKGROUND_RGB.items()}  # 0 white, 1 black


@dataclass(frozen=True)
class Population:
    """Who judges; the weights are in logits at temperature 1.

    Measured on 6,000 pairs of `write_dataset` and six crowds: the defaults give 12% ties, and 73%
    of the strict labels name the image of higher mean utility (75% among careful users). No reward
    model can agree with the labels more often than that, give or take a point.
    """

    users: int = 400  # people; how much each one judges follows a Zipf law
    careless: float = 0.08  # share of users who answer at random
    alignment: float = 3.0  # logits for the share of conditions going from 0 to 1
    complete: float = 1.0  # logits for all conditions holding
    neat: float = 1.5  # logits for neatness going from 0 to 1
    taste: float = 1.0  # logits for the feature that a group likes going from 0 to 1
    temperature: float = 1.1  # divides differences of utility; larger is noisier
    tie_half_width: float = 0.36  # logits; 0 means that careful users never call a tie
    flip: float = 0.04  # chance that a careful user's strict answer comes out reversed
    careless_ties: float = 0.12  # chance that a careless user calls a tie

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("careless", "flip", "careless_ties")}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise InputError(f"Population.{name} is {value}, it must lie in [0, 1]")
        if self.users < 1 or self.temperature <= 0 or self.tie_half_width < 0:
            raise InputError(
                f"Population needs users >= 1, temperature > 0 and tie_half_width >= 0, got "
                f"{self.users}, {self.temperature} and {self.tie_half_width}"
            )


# ---- what a person notices -----------------------------------------------------------------------


def _warm(view: View) -> float:
    """Share of things in a warm colour; one half where there is nothing."""
    warm = [thing.colour in WARM for thing in view.things]
    return sum(warm) / len(warm) if warm else 0.5


def _dark(view: View) -> float:
    """How dark the backdrop is, from about 0 (white) to 1 (black)."""
    return DARKNESS[view.background]


def _large(view: View) -> float:
    """Share of large things; 0 where there is nothing."""
    large = [thing.size == "large" for thing in view.things]
    return sum(large) / len(large) if large else 0.0


def _plain(view: View) -> float:
    """How flat the backdrop is: 1 without texture or dirt."""
    return float(np.exp(-view.residual / 6))


# The feature, from 0 to 1, that the users of a group like. Groups are of equal size.
TASTES = {"warm": _warm, "dark": _dark, "large": _large, "plain": _plain}
GROUPS = tuple(TASTES)


@dataclass(frozen=True)
class Impression:
    """All that a simulated person takes from one image under one prompt."""

    share: float  # of the prompt's conditions that hold; NaN where the prompt asks for nothing
    neatness: float
    features: tuple[float, ...]  # one a taste group, in [0, 1]


def impression(view: View, request: Request | None, truth: View | None = None) -> Impression:
    """What a person notices in an image that the oracle saw as `view`.

    `request` is what the prompt asks for, None where that is nothing of the mini world. Conditions
    are judged on `truth`, what was really painted, where it is known, and on `view` otherwise.
    """
    share = np.nan if request is None else judge(truth or view, request).share
    return Impression(
        share, view_neatness(view), tuple(feature(view) for feature in TASTES.values())
    )


def scene_view(scene: Scene) -> View:
    """What a perfect oracle would see in a scene."""
    things = tuple(Seen(t.shape, t.colour, t.size, t.x, t.y, 1.0) for t in scene.things)
    return View(things, scene.background, 0.0)


def utilities(impressions: Sequence[Impression], population: Population) -> Floats:
    """Utility of N images to each taste group, (N, groups), in logits at temperature 1."""
    share = np.array([seen.share for seen in impressions], np.float64)
    neatness = np.array([seen.neatness for seen in impressions], np.float64)
    features = np.array([seen.features for seen in impressions], np.float64)
    asked = population.alignment * share + population.complete * (share == 1)
    common = np.where(np.isnan(share), 0.0, asked) + population.neat * neatness
    return common[:, None] + population.taste * features.reshape(-1, len(GROUPS))


def mean_utility(
    images: Sequence[Image], prompts: Sequence[str], population: Population | None = None
) -> Floats:
    """What the crowd as a whole thinks of N images under N prompts, (N,): the mean over groups.

    For images of unknown origin; conditions are judged by the oracle.
    """
    impressions = [
        impression(look(image), meaning(prompt))
        for image, prompt in zip(images, prompts, strict=True)
    ]
    return utilities(impressions, population or Population()).mean(axis=1)


def meaning(prompt: str) -> Request | None:
    """What a prompt asks of the mini world; None for nothing."""
    try:
        return parse(prompt)
    except UnparsedPrompt:
        return None


# ---- who they are and what they say --------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What N users said about N pairs, and what they would rather hide."""

    outcome: NDArray[np.int8]  # (N,) A, B or TIE
    flipped: NDArray[np.bool_]  # (N,) a careful user pressed the wrong button


class Annotators:
    """A crowd drawn from a population; user ids are 0 .. users - 1."""

    def __init__(self, population: Population, seed: int) -> None:
        rng = np.random.default_rng([seed, 0x757365])
        self.population = population
        self.group: NDArray[np.intp] = rng.integers(len(GROUPS), size=population.users)
        self.careless: NDArray[np.bool_] = rng.random(population.users) < population.careless
        # Without the offset a single user would hold a seventh of the data.
        activity = 1 / (np.arange(population.users) + 10)
        self._activity = rng.permutation(activity / activity.sum())

    def draw(self, n: int, rng: np.random.Generator) -> NDArray[np.intp]:
        """The ids (n,) of the users who judge n pairs."""
        return rng.choice(self.population.users, size=n, p=self._activity)

    def answer(
        self, users: NDArray[np.intp], a: Floats, b: Floats, rng: np.random.Generator
    ) -> Answers:
        """What `users` (N,) say about images of utility `a` and `b` (N, groups)."""
        p = self.population
        rows = np.arange(len(users))
        group = self.group[users]
        margin = (a[rows, group] - b[rows, group]) / p.temperature
        outcome = rao_kupper(margin, p.tie_half_width, rng.random(len(users)))
        careless = self.careless[users]
        flipped = (rng.random(len(users)) < p.flip) & (outcome != TIE) & ~careless
        outcome = np.where(flipped, 1 - outcome, outcome)
        blind = rng.choice(3, size=len(users), p=_blind_chances(p.careless_ties))
        return Answers(np.where(careless, blind, outcome).astype(np.int8), flipped)


def _blind_chances(ties: float) -> list[float]:
    return [(1 - ties) / 2, (1 - ties) / 2, ties]


def rao_kupper(margin: Floats, half_width: float, uniform: Floats) -> NDArray[np.int64]:
    """Outcomes (N,), A, B or TIE, for margins in logits; `uniform` (N,) in [0, 1) decides."""
    a_wins = 1 / (1 + np.exp(half_width - margin))
    b_wins = 1 / (1 + np.exp(half_width + margin))
    return np.select([uniform < a_wins, uniform >= 1 - b_wins], [A, B], TIE)
