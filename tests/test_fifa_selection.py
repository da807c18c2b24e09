from __future__ import annotations

import itertools
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
    greedy,
    importance,
    make_terms,
    objective,
    parse_count,
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
        same = np.bincount(terms.prompt[picks], minlength=len(terms.vectors))[terms.prompt]
        open_ = [i for i in range(len(terms)) if i not in picks and (cap is None or same[i] < cap)]
        if not open_:
            break
        picks.append(max(open_, key=lambda i: (round(total([*picks, i], terms), 6), -i)))
    return picks


@pytest.mark.parametrize("cap", [None, 1, 2])
def test_greedy_against_its_definition(cap: int | None) -> None:
    terms = world(n=90, prompts=30, gamma=1.5)
    assert greedy(terms, 40, cap).tolist() == slow_greedy(terms, 40, cap)


def test_greedy_beats_one_pass_and_chance_and_nears_the_best_set() -> None:
    for seed in range(5):
        terms = world(seed=seed, gamma=1.0)
        f = {name: objective(s.choose(terms, 20, 1, 0), terms).f for name, s in SELECTORS.items()}
        assert objective(greedy(terms, 20, 1), terms).f == f["greedy"]
        assert f["greedy"] > f["importance"] > f["random"]
        assert f["greedy"] == max(f.values())
    small = world(n=12, prompts=12, gamma=1.0)
    sets = itertools.combinations(range(12), 4)
    best = max(objective(np.array(chosen), small).f for chosen in sets)
    assert objective(greedy(small, 4), small).f > best - 0.25


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
