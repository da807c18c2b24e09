"""Named objectives from absolute ratings, and a gate that says which one counts: ArmoRM.

Wang et al. 2024, arXiv 2406.12845: (1) a ridge head for each objective on frozen features, fitted
on the rows that have its rating; (2) what a head shares with a nuisance is taken out; (3) a gate on
the prompt weighs the debiased rewards, trained by Bradley-Terry on pairs. The published script of
step 3 trains on the rewards before step 2; here it is after, as the paper says. Nuisances are
measured in the pixels, not rated, and several are removed at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fifa.config import InputError
from fifa.features import PairFeatures
from fifa.pairs import BadRow, held_out
from fifa.proxies.likelihood import LIKELIHOODS
from fifa.proxies.ratings import Ratings, rating_features
from fifa.proxies.settings import FitConfig
from fifa.proxies.splits import Split
from fifa.proxies.training import descend, fresh, recipe_of
from fifa.rewards.encoders import Encoder
from fifa.rewards.fitted import ObjectivesProxy
from fifa.rewards.heads import Gate, joint

Doubles = NDArray[np.float64]

ALPHAS = tuple(10.0**power for power in range(-4, 5))  # of the ridge, as in the published script
LEAST_RATINGS = 20  # of an objective in the training and validation part
REFERENCE = 5000  # pictures on which nuisances are removed
SWEEPS = 50


# ---- ridge heads ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class RidgeHeads:
    """One linear head an objective, in standard deviations of its ratings."""

    weight: Doubles  # (K, F)
    bias: Doubles  # (K,)
    alpha: Doubles  # (K,)
    r2: Doubles  # (K,) on the test part; NaN with fewer than two ratings there
    ratings: NDArray[np.int64]  # (K,) ratings in all parts


def fit_ridge(
    features: Doubles, ratings: Doubles, part: NDArray[np.int64], names: tuple[str, ...]
) -> RidgeHeads:
    """Heads on features (N, F) for ratings (N, K) with NaN where one is missing.

    part (N,): 0 is for the fit, 1 chooses alpha by squared error, 2 is for R² alone; the chosen
    head is fitted on 0 and 1 together. Raises InputError for an objective with too few ratings or
    only equal ones.
    """
    fitted = [_one_head(features, ratings[:, k], part, name) for k, name in enumerate(names)]
    weight, bias, alpha, r2, count = (np.array(column) for column in zip(*fitted, strict=True))
    return RidgeHeads(weight, bias, alpha, r2, count)


def _one_head(
    x: Doubles, rated: Doubles, part: NDArray[np.int64], name: str
) -> tuple[Doubles, float, float, float, int]:
    from sklearn.linear_model import Ridge

    there = np.isfinite(rated)
    seen = there & (part < 2)
    if seen.sum() < LEAST_RATINGS or not (seen & (part == 1)).any():
        raise InputError(
            f"objective '{name}' has {int(seen.sum())} ratings outside the test part, "
            f"{int((seen & (part == 1)).sum())} of them for validation; it needs {LEAST_RATINGS} "
            f"and at least 1"
        )
    mean, std = rated[seen].mean(), rated[seen].std()
    if std == 0:
        raise InputError(
            f"objective '{name}' is {mean:g} in every row; there is nothing to learn from it"
        )
    y = (rated - mean) / std
    train, choose, test = (there & (part == number) for number in range(3))

    def error(alpha: float) -> float:
        head = Ridge(alpha=alpha).fit(x[train], y[train])
        return float(((head.predict(x[choose]) - y[choose]) ** 2).mean())

    alpha = min(ALPHAS, key=error) if train.any() else max(ALPHAS)
    head = Ridge(alpha=alpha).fit(x[seen], y[seen])
    r2 = float(head.score(x[test], y[test])) if test.sum() > 1 else float("nan")
    return head.coef_, float(head.intercept_), alpha, r2, int(there.sum())


# ---- nuisances -----------------------------------------------------------------------------------


def find_removal(rewards: Doubles, nuisances: Doubles, target: float) -> Doubles:
    """Coefficients (K, J) so that rewards - nuisances @ removal.T has no rank correlation above
    `target` with any nuisance; rewards (N, K), nuisances (N, J), standardised.

    0 for a reward that is clean already. Otherwise least squares takes out what is linear, then the
    worst nuisance is set right by bisection until all are: ArmoRM's rule for several at once.
    """
    return np.stack([_removal(reward, nuisances, target) for reward in rewards.T])


def worst_correlation(reward: Doubles, nuisances: Doubles) -> float:
    """Largest absolute rank correlation of a reward (N,) with a nuisance (N, J)."""
    return float(np.abs(_correlations(reward, _ranks(nuisances))).max())


def _removal(reward: Doubles, nuisances: Doubles, target: float) -> Doubles:
    ranks = _ranks(nuisances)
    gone = np.zeros(nuisances.shape[1])
    if np.abs(_correlations(reward, ranks)).max() <= target:
        return gone
    centred = nuisances - nuisances.mean(0)
    gone = np.linalg.lstsq(centred, reward - reward.mean(), rcond=None)[0]
    for _ in range(SWEEPS):
        left = _correlations(reward - nuisances @ gone, ranks)
        worst = int(np.abs(left).argmax())
        if abs(left[worst]) <= target:
            break
        gone[worst] += _step(reward - nuisances @ gone, nuisances[:, worst], ranks[:, [worst]])
    return gone


def _step(reward: Doubles, nuisance: Doubles, rank: Doubles) -> float:
    """How much of a nuisance to take out so that the rank correlation is 0, by bisection."""
    span = float(reward.std() / max(nuisance.std(), 1e-12))
    low, high = -4 * span, 4 * span  # correlations of about +1 and -1
    for _ in range(40):
        middle = (low + high) / 2
        if _correlations(reward - middle * nuisance, rank)[0] > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _ranks(values: Doubles) -> Doubles:
    """Centred ranks of each column, of length 1; 0 where a column is constant."""
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=0)
    ranks = ranks - ranks.mean(0)
    return ranks / np.maximum(np.linalg.norm(ranks, axis=0), 1e-12)


def _correlations(reward: Doubles, ranks: Doubles) -> Doubles:
    return _ranks(reward[:, None])[:, 0] @ ranks


# ---- the gate ------------------------------------------------------------------------------------


class GateTrainee(nn.Module):
    """A gate and the tie parameter; the rewards that it weighs stay as they are."""

    def __init__(
        self,
        gate: Gate,
        texts: Tensor,
        difference: Tensor,
        label: Tensor,
        ties: str,
        smoothing: float,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.tie = nn.Parameter(torch.tensor(-1.0))
        self.texts, self.difference, self.label = texts, difference, label
        self.likelihood, self.smoothing = LIKELIHOODS[ties], smoothing

    def loss(self, rows: Tensor) -> Tensor:
        """Mean negative log-likelihood; texts (N, D), differences of rewards (N, K), labels."""
        delta = (self.gate(self.texts[rows]) * self.difference[rows]).sum(1)
        return self.likelihood(delta, self.label[rows], self.tie, smoothing=self.smoothing).mean()


# ---- all three -----------------------------------------------------------------------------------


def fit_objectives(
    config: FitConfig,
    encoder: Encoder,
    cache: Path,
    pairs: PairFeatures,
    split: Split,
    progress: Callable[[str, int, int], None],
) -> tuple[ObjectivesProxy, dict[str, Any], tuple[BadRow, ...]]:
    """The proxy and, for the card, what became of each objective and which ratings are unusable."""
    assert config.ratings is not None
    ratings = rating_features(config.ratings, config.objectives, encoder, cache)
    return *assemble(config, pairs, split, ratings, progress), ratings.rejected


def assemble(
    config: FitConfig,
    pairs: PairFeatures,
    split: Split,
    ratings: Ratings,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> tuple[ObjectivesProxy, dict[str, Any]]:
    """Heads, removal and gate from features alone.

    The ratings of held-out prompts are held out as well: the same hash of the prompt decides.
    """
    proxy = fresh(
        lambda: ObjectivesProxy(pairs.pictures.shape[1], ratings.objectives, config.hidden),
        config.seed,
    )
    heads = _set_heads(proxy, config, ratings)
    shown = np.r_[pairs.first[split.train], pairs.second[split.train]]
    proxy.nuisance.learn(torch.tensor(pairs.nuisances[shown]))
    before, after = _set_removal(proxy, config, pairs, split)
    _set_gate(proxy, config, pairs, split, progress)
    facts = {
        name: {
            "ratings": int(heads.ratings[k]),
            "r2": float(heads.r2[k]) if np.isfinite(heads.r2[k]) else None,
            "alpha": float(heads.alpha[k]),
            "before": before[k],
            "after": after[k],
        }
        for k, name in enumerate(ratings.objectives)
    }
    return proxy.eval().requires_grad_(False), facts


def _set_heads(proxy: ObjectivesProxy, config: FitConfig, ratings: Ratings) -> RidgeHeads:
    rows = joint(torch.tensor(ratings.pictures), torch.tensor(ratings.texts))
    part = np.array([_part(p, config.held_out, config.seed) for p in ratings.prompts])
    proxy.input.learn(rows[part < 2] if (part < 2).any() else rows)
    heads = fit_ridge(proxy.input(rows).double().numpy(), ratings.values, part, ratings.objectives)
    with torch.no_grad():
        proxy.ridge.weight.copy_(torch.from_numpy(heads.weight))
        proxy.ridge.bias.copy_(torch.from_numpy(heads.bias))
    return heads


def _part(prompt: str, fraction: float, seed: int) -> int:
    """0 training, 1 validation, 2 test: those of `split_pairs`."""
    return int(held_out(prompt, 2 * fraction, seed)) + int(held_out(prompt, fraction, seed))


def _set_removal(
    proxy: ObjectivesProxy, config: FitConfig, pairs: PairFeatures, split: Split
) -> tuple[list[float], list[float]]:
    """Take the nuisances out; each objective's worst rank correlation on test rows, both times."""
    rng = np.random.default_rng([config.seed, 2])
    some = rng.permutation(split.train)[:REFERENCE]
    # One picture of each row, of alternate sides: data may list the winner first.
    side = np.where(np.arange(len(pairs)) % 2 == 0, pairs.first, pairs.second)
    shown, test = (_nuisances(proxy, pairs, side[rows]) for rows in (some, split.test))
    raw = objective_rewards(proxy, pairs, side, split.test)
    removal = find_removal(
        objective_rewards(proxy, pairs, side, some), shown, config.rank_correlation
    )
    proxy.removal.copy_(torch.from_numpy(removal))
    left = raw - test @ removal.T
    before, after = ([worst_correlation(r, test) for r in rewards.T] for rewards in (raw, left))
    return before, after


def _nuisances(proxy: ObjectivesProxy, pairs: PairFeatures, shown: NDArray[np.int64]) -> Doubles:
    """Standardised nuisances (N, J) of pictures."""
    return proxy.nuisance(torch.tensor(pairs.nuisances[shown])).double().numpy()


def objective_rewards(
    proxy: ObjectivesProxy, pairs: PairFeatures, side: NDArray[np.int64], rows: NDArray[np.int64]
) -> Doubles:
    """Rewards (N, K) of one picture of each row, `side` being `pairs.first` or `pairs.second`."""
    parts = []
    for some in np.array_split(rows, max(1, len(rows) // 1024)):
        with torch.no_grad():
            rewards = proxy.rewards(
                torch.tensor(pairs.pictures[side[some]]),
                torch.tensor(pairs.nuisances[side[some]]),
                torch.tensor(pairs.texts[pairs.prompt[some]]),
            )
        parts.append(rewards.double().numpy())
    return np.concatenate(parts)


def _set_gate(
    proxy: ObjectivesProxy,
    config: FitConfig,
    pairs: PairFeatures,
    split: Split,
    progress: Callable[[str, int, int], None],
) -> None:
    """Train the gate on the debiased rewards of the pairs."""
    rows = np.arange(len(pairs))
    first, second = (
        objective_rewards(proxy, pairs, side, rows) for side in (pairs.first, pairs.second)
    )
    texts = torch.tensor(pairs.texts)[torch.from_numpy(pairs.prompt)]
    gate = fresh(
        lambda: Gate(texts.shape[1], len(proxy.objectives), config.hidden, config.dropout),
        config.seed,
    )
    gate.input.learn(texts[torch.from_numpy(split.train)])
    trainee = GateTrainee(
        gate,
        texts,
        torch.from_numpy(first - second).float(),
        torch.tensor(pairs.label),
        config.ties,
        config.smoothing,
    )
    recipe = recipe_of(config)
    told = partial(progress, "fitting the gate")
    descend(trainee, trainee.loss, split.train, split.validation, recipe, config.seed, told)
    proxy.gate = gate
