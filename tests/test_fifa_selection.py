from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import cdist

from fifa.config import InputError
from fifa.selection import (
    MARGINS,
    NORMS,
    SELECTORS,
    Terms,
    affordable,
    facility_location,
    importance,
    k_centre,
    lazy_greedy,
    make_terms,
    objective,
    parse_count,
    stochastic_greedy,
    top_k,
)


def world(n: int = 300, prompts: int = 120, seed: int = 0, **options: Any) -> Terms:
    """Prompts in a few tight clusters, which one-pass diversity cannot tell apart inside S."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, 16))
    z = centres[rng.integers(8, size=prompts)] + 0.15 * rng.normal(size=(prompts, 16))
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    prompt = rng.integers(prompts, size=n)
    distances = cdist(z, z)
    np.fill_diagonal(distances, np.inf)
    return make_terms(
        win=rng.normal(size=n) + 0.5,
        lose=rng.normal(size=n),
        quality=rng.uniform(0, 10, n),
        log_knn=np.log(distances.min(axis=1))[prompt],
        prompt=prompt,
        vectors=z,
        **options,
    )


def test_norms_by_hand() -> None:
    x = np.array([3.0, 1.0, 3.0, 5.0])
    np.testing.assert_allclose(NORMS["rank"](x), [0.5, 0, 0.5, 1])
    np.testing.assert_allclose(NORMS["minmax"](x), [0.5, 0, 0.5, 1])
    np.testing.assert_allclose(NORMS["zscore"](x), np.array([0, -2, 0, 2]) / np.sqrt(2))


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_equal_values_normalise_to_equal_finite_values(norm: str) -> None:
    out = NORMS[norm](np.array([2.0, 2.0, 2.0]))
    assert np.isfinite(out).all()
    assert len(set(out)) == 1


def test_margins_by_hand() -> None:
    x = np.array([-3.0, 0.0, 1.0, 2.0, 10.0])
    assert MARGINS["signed"](x).tolist() == x.tolist()
    assert MARGINS["absolute"](x).tolist() == [3, 0, 1, 2, 10]
    assert MARGINS["capped"](x).tolist() == pytest.approx([-3, 0, 1, 2, 8.4])  # 95%: 2 + 0.8 * 8


def test_importance_is_the_weighted_sum() -> None:
    terms = world(alpha=2.0, gamma=3.0)
    expected = terms.margin + 2 * terms.quality + 3 * terms.diversity
    np.testing.assert_allclose(importance(terms), expected)


def test_the_objective_against_a_direct_computation() -> None:
    terms = world(alpha=0.7, gamma=1.3, neighbours=2)
    chosen = np.arange(0, 60, 2)
    z = terms.vectors[terms.prompt[chosen]].astype(np.float64)
    second = np.sort(cdist(z, z), axis=1)[:, 2]  # column 0 is the point itself
    h = (np.log(np.maximum(second, terms.floor)).mean() - terms.centre) / terms.spread
    value = objective(chosen, terms)
    assert value.entropy == pytest.approx(h, rel=1e-6)
    assert value.margin == pytest.approx(terms.margin[chosen].mean())
    assert value.f == pytest.approx(
        terms.margin[chosen].mean() + 0.7 * terms.quality[chosen].mean() + 1.3 * h, rel=1e-6
    )


def test_repeating_a_prompt_never_pays() -> None:
    terms = world()
    distinct = top_k(terms.margin, 20, terms.prompt, cap=1)
    groups: dict[int, list[int]] = {}
    for i, p in enumerate(terms.prompt.tolist()):
        groups.setdefault(p, []).append(i)
    repeated = np.array([i for g in groups.values() if len(g) > 1 for i in g][:20])
    assert objective(repeated, terms).entropy < objective(distinct, terms).entropy


def test_too_small_a_set_has_no_entropy() -> None:
    assert np.isnan(objective(np.array([3]), world()).f)


@given(
    arrays(np.float64, st.integers(1, 40), elements=st.sampled_from([0.0, 1.0, 2.0, 3.0])),
    st.integers(1, 40),
    st.integers(1, 3),
    st.integers(1, 6),
)
def test_top_k_against_a_plain_loop(scores: np.ndarray, k: int, cap: int, group_count: int) -> None:
    groups = np.arange(len(scores)) * 7 % group_count
    expected: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if len(expected) < k and sum(groups[j] == groups[i] for j in expected) < cap:
            expected.append(i)
    assert top_k(scores, k, groups, cap).tolist() == expected


def total(picks: list[int], terms: Terms) -> float:
    """F(S) from its definition, every distance in float64."""
    z = terms.vectors[terms.prompt[picks]].astype(np.float64)
    distances = cdist(z, z)
    np.fill_diagonal(distances, 2.0)
    h = (np.log(np.maximum(distances.min(axis=1), terms.floor)) - terms.centre) / terms.spread
    own = terms.margin[picks] + terms.alpha * terms.quality[picks]
    return float((own + terms.gamma * h).sum())


def slow_greedy(terms: Terms, k: int, cap: int | None) -> list[int]:
    """Try every pair at every step and compute F anew."""
    picks: list[int] = []
    while len(picks) < k:
        used = Counter(terms.groups[picks].tolist())
        free = {i for i in range(len(terms)) if cap is None or used[int(terms.groups[i])] < cap}
        if not (open_ := sorted(free - set(picks))):
            break
        gain = gains_of(open_, picks, terms)
        picks.append(max(open_, key=lambda i: (gain[i], -i)))
    return picks


def gains_of(pairs: Iterable[int], picks: list[int], terms: Terms) -> dict[int, float]:
    """How much each pair adds to F."""
    before = total(picks, terms) if picks else 0.0
    return {i: round(total([*picks, i], terms) - before, 6) for i in pairs}


@pytest.mark.parametrize("cap", [None, 1, 2])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.5, 20.0])
def test_lazy_greedy_against_the_definition(cap: int | None, gamma: float) -> None:
    for seed in range(2):
        terms = world(n=70, prompts=30, seed=seed, gamma=gamma)
        assert lazy_greedy(terms, 40, cap).tolist() == slow_greedy(terms, 40, cap)


def corners(seed: int) -> Terms:
    """Vectors with entries of +-1/4 and few values: distances are exact and many gains are equal.

    Some prompts have the same vector, in every second data set some share a group.
    """
    rng = np.random.default_rng(seed)
    prompts, n = 24, 60
    z = rng.choice([-0.25, 0.25], size=(prompts, 16)).astype(np.float32)
    z[::5] = z[0]
    prompt = rng.integers(prompts, size=n)
    return make_terms(
        win=rng.integers(3, size=n).astype(float),
        lose=np.zeros(n),
        quality=rng.integers(2, size=n).astype(float),
        log_knn=rng.normal(size=n),
        prompt=prompt,
        vectors=z,
        gamma=0.7,
        group=(prompt // 2) if seed % 2 else None,
    )


@pytest.mark.parametrize("seed", range(8))
def test_lazy_greedy_breaks_ties_as_the_definition_does(seed: int) -> None:
    terms = corners(seed)
    for cap in (None, 1, 3):
        assert lazy_greedy(terms, 30, cap).tolist() == slow_greedy(terms, 30, cap)


def eager_greedy(terms: Terms, k: int) -> list[int]:
    """Exact greedy for one pair a prompt: all gains at every step, from a table of distances."""
    z = terms.vectors.astype(np.float64)
    apart = np.log(np.maximum(cdist(z, z), terms.floor))
    own_value = terms.margin + terms.alpha * terms.quality
    picks: list[int] = []
    own = np.empty(0)
    while len(picks) < k:
        near = apart[picks].min(axis=0, initial=np.log(2))
        harm = np.minimum(0, apart[picks] - own[:, None]).sum(axis=0)
        gains = own_value + terms.gamma / terms.spread * (near + harm - terms.centre)
        gains[picks] = -np.inf
        best = int(np.round(gains, 6).argmax())
        own = np.append(np.minimum(own, apart[picks, best]), near[best])
        picks.append(best)
    return picks


@pytest.mark.parametrize("gamma", [0.2, 1.0, 5.0])
def test_lazy_greedy_stays_exact_when_most_prompts_are_never_looked_at(gamma: float) -> None:
    n = 2500  # ten blocks, so that prompts enter and leave the pool
    rng = np.random.default_rng(2)
    centres = rng.choice([-0.125, 0.125], size=(12, 64))
    flips = np.where(rng.random((n, 64)) < 0.2, -1, 1)
    z = (centres[rng.integers(12, size=n)] * flips).astype(np.float32)  # distances are exact
    terms = world(n=n, prompts=n, gamma=gamma)
    terms = dataclasses.replace(terms, prompt=np.arange(n), vectors=z, spread=0.2)
    assert lazy_greedy(terms, 300, 1).tolist() == eager_greedy(terms, 300)


def test_stochastic_greedy_with_a_full_sample_is_greedy() -> None:
    for seed in range(3):
        terms = world(seed=seed)
        full = stochastic_greedy(terms, 30, 1, epsilon=1e-30)
        assert full.tolist() == lazy_greedy(terms, 30, 1).tolist()


def test_stochastic_greedy_picks_the_best_of_each_sample() -> None:
    terms = dataclasses.replace(world(n=120), prompt=np.arange(120))
    k, rng = 40, np.random.default_rng(7)
    size = int(np.ceil(120 / k * np.log(1 / 0.05)))
    picks: list[int] = []
    while len(picks) < k:
        left = np.setdiff1d(np.arange(120), picks)
        drawn = rng.choice(left, size, replace=False) if size < len(left) else left
        gain = gains_of(drawn.tolist(), picks, terms)
        picks.append(max(gain, key=lambda i: (gain[i], -i)))
    assert stochastic_greedy(terms, k, 1, seed=7, epsilon=0.05).tolist() == picks


def test_greedy_beats_one_pass_and_chance_and_nears_the_best_set() -> None:
    for seed in range(5):
        terms = world(seed=seed, gamma=1.0)
        f = {name: objective(s.choose(terms, 20, 1, 0), terms).f for name, s in SELECTORS.items()}
        assert objective(lazy_greedy(terms, 20, 1), terms).f == f["greedy"]
        assert f["greedy"] > f["importance"] > f["random"]
        assert f["greedy"] == max(value for name, value in f.items() if name != "stochastic")
    small = world(n=12, prompts=12, gamma=1.0)
    sets = itertools.combinations(range(12), 4)
    best = max(objective(np.array(chosen), small).f for chosen in sets)
    assert objective(lazy_greedy(small, 4), small).f > best - 0.25


def test_the_greedy_selector_is_never_worse_than_one_pass() -> None:
    fell_back = False
    for seed in range(4):
        terms = world(seed=seed)
        one_pass, chosen = (SELECTORS[m].choose(terms, 60, 1, 0) for m in ("importance", "greedy"))
        assert objective(chosen, terms).f >= objective(one_pass, terms).f
        fell_back |= np.array_equal(one_pass, chosen)
    assert fell_back  # half of all prompts: the case that the fallback is there for


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_every_selector_keeps_the_cap_and_repeats_itself(name: str) -> None:
    terms = world()
    chosen = SELECTORS[name].choose(terms, 50, 2, 3)
    assert len(set(chosen.tolist())) == 50
    assert np.bincount(terms.prompt[chosen]).max() <= 2
    assert np.array_equal(chosen, SELECTORS[name].choose(terms, 50, 2, 3))
    assert len(SELECTORS[name].choose(terms, 300, 1, 0)) == len(set(terms.prompt.tolist()))


def test_baselines_maximise_what_they_are_named_after() -> None:
    terms = world()
    for name in ("margin", "quality", "diversity"):
        term = getattr(terms, name)
        chosen = SELECTORS[name].choose(terms, 10, None, 0)
        assert sorted(term[chosen]) == sorted(np.sort(term)[-10:])
    assert not np.array_equal(
        SELECTORS["random"].choose(terms, 10, None, 0),
        SELECTORS["random"].choose(terms, 10, None, 1),
    )


def covered(picks: list[int], terms: Terms) -> float:
    """The objective of facility location over all pairs, from all distances."""
    z = terms.vectors.astype(np.float64)
    cosine = np.maximum(0, 1 - cdist(z, z) ** 2 / 2)
    return float(cosine[terms.prompt][:, terms.prompt[picks]].max(axis=1).sum())


def test_facility_location_against_a_plain_greedy_and_its_bound() -> None:
    terms = world(n=60, prompts=40)  # fewer than the neighbours that are kept: nothing is cut off
    own_value = terms.margin + terms.alpha * terms.quality
    picks: list[int] = []
    while len(picks) < 8:
        open_ = [i for i in range(60) if terms.prompt[i] not in terms.prompt[picks]]
        value = {i: covered([*picks, i], terms) for i in open_}
        equal = [i for i in open_ if value[i] > max(value.values()) - 1e-6]
        picks.append(max(equal, key=lambda i: own_value[i]))
    assert facility_location(terms, 8, 1).tolist() == picks
    small = world(n=12, prompts=12)
    best = max(covered(list(s), small) for s in itertools.combinations(range(12), 3))
    assert covered(facility_location(small, 3, None).tolist(), small) >= (1 - 1 / np.e) * best


def test_k_centre_takes_the_farthest_and_is_within_twice_the_best_radius() -> None:
    terms = world(n=900, prompts=800)
    z = terms.vectors[terms.prompt].astype(np.float64)
    chosen = k_centre(terms, 25, 1)
    assert chosen[0] == (terms.margin + terms.alpha * terms.quality).argmax()
    for i in range(1, 25):
        apart = cdist(z, z[chosen[:i]]).min(axis=1)
        assert apart[chosen[i]] == pytest.approx(apart.max(), abs=1e-3)
    small = world(n=14, prompts=14)
    z = small.vectors[small.prompt].astype(np.float64)
    apart = cdist(z, z)
    best = min(apart[:, list(s)].min(axis=1).max() for s in itertools.combinations(range(14), 3))
    assert apart[:, k_centre(small, 3, None)].min(axis=1).max() <= 2 * best + 1e-6


@pytest.mark.parametrize("name", ["facility_location", "k_centre"])
def test_coverage_takes_the_best_pair_of_a_prompt_and_then_the_best_of_all(name: str) -> None:
    terms = world(n=200, prompts=50)
    own = terms.margin + terms.alpha * terms.quality
    best = {p: own[terms.prompt == p].max() for p in set(terms.prompt.tolist())}
    chosen = SELECTORS[name].choose(terms, 200, None, 0)
    assert sorted(own[chosen[: len(best)]]) == sorted(best.values())
    assert (np.diff(own[chosen[len(best) :]]) <= 0).all()
    assert len(set(chosen.tolist())) == 200


def test_a_cap_counts_a_group_of_near_copies_once() -> None:
    plain = world()
    terms = dataclasses.replace(plain, group=plain.prompt // 4)
    for name, selector in SELECTORS.items():
        chosen = selector.choose(terms, 50, 1, 0)
        assert np.bincount(terms.prompt[chosen] // 4).max() == 1, name
        assert len(chosen) == len(set((terms.prompt // 4).tolist())), name


def test_what_is_too_dear_says_so() -> None:
    terms = world()
    assert [name for name in SELECTORS if affordable(name, terms, 50)] == []
    huge = dataclasses.replace(terms, vectors=np.broadcast_to(np.float32(1), (10**6, 768)))
    assert affordable("margin", huge, 5000) is None
    for name, k in (("facility_location", 5000), ("greedy", 50_000), ("margin", 10**6)):
        assert "more than 2e+13" in (affordable(name, huge, k) or "")


def test_pair_ranking_by_hand() -> None:
    terms = make_terms(
        win=np.array([4.0, 3.0]),
        lose=np.array([2.0, 0.0]),
        quality=np.zeros(2),
        log_knn=np.zeros(2),
        prompt=np.arange(2),
        vectors=np.eye(2, dtype=np.float32),
    )
    # scaled by the range 0..4: 1 * (1 - 0.5) and 0.75 * (1 - 0)
    assert SELECTORS["pair_ranking"].choose(terms, 1, None, 0).tolist() == [1]


@pytest.mark.parametrize(
    ("text", "count"), [("0.5%", 100), ("50 %", 10_000), (7, 7), ("7", 7), ("0.0001%", 1)]
)
def test_counts(text: str | int, count: int) -> None:
    assert parse_count(text, 20_000) == count


@pytest.mark.parametrize("text", ["0", "0%", "half", "-3", "1.5", "101%", "20001", "", "nan%"])
def test_a_wrong_count_is_one_sentence(text: str) -> None:
    with pytest.raises(InputError, match="the number of pairs is"):
        parse_count(text, 20_000)


def test_terms_refuse_nan_and_ragged_columns() -> None:
    good: dict[str, Any] = {
        "win": np.ones(2),
        "lose": np.ones(2),
        "quality": np.ones(2),
        "log_knn": np.ones(2),
        "prompt": np.arange(2),
        "vectors": np.eye(2, dtype=np.float32),
    }
    with pytest.raises(InputError, match="NaN"):
        make_terms(**good | {"quality": np.array([1.0, np.nan])})
    with pytest.raises(InputError, match="one length"):
        make_terms(**good | {"lose": np.ones(3)})
