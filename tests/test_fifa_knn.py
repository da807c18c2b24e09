from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from fifa.config import InputError
from fifa.knn import (
    EXACT_UP_TO,
    Index,
    entropy,
    exact,
    find_neighbours,
    knn_distances,
    log_knn,
    near_groups,
    nearest,
    repeated_distances,
)
from fifa.knn.approximate import recall


def unit(n: int, dim: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("n", "dim", "k"), [(6, 2, 5), (3000, 8, 1), (1500, 64, 4)])
def test_distances_agree_with_a_tree(n: int, dim: int, k: int) -> None:
    x = unit(n, dim)
    tree = cKDTree(x.astype(np.float64))
    expected = tree.query(x.astype(np.float64), k + 1)[0][:, k]
    np.testing.assert_allclose(knn_distances(x, k), expected, rtol=1e-12)


def test_close_vectors_are_measured_not_rounded_away() -> None:
    x = unit(2000, 128)
    x[1] = x[0]
    x[1, 0] += np.float32(1e-5)
    expected = abs(float(x[1, 0]) - float(x[0, 0]))
    assert knn_distances(x, 1)[0] == pytest.approx(expected, rel=1e-9)


def test_many_coinciding_vectors_are_zero_apart_and_floored() -> None:
    x = np.repeat(unit(3, 16), 40, axis=0)
    assert (knn_distances(x, 1) == 0).all()
    np.testing.assert_allclose(log_knn(x, 1, floor=0.05), np.log(0.05))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("dim", [1, 3])
def test_entropy_of_a_gaussian(dim: int, k: int) -> None:
    sigma = 2.5
    x = np.random.default_rng(0).normal(scale=sigma, size=(8000, dim)).astype(np.float32)
    exact = dim / 2 * np.log(2 * np.pi * np.e * sigma**2)
    assert entropy(x, k, floor=1e-9) == pytest.approx(exact, abs=0.06)


def test_entropy_of_a_uniform_box_is_the_log_of_its_volume() -> None:
    x = np.random.default_rng(0).uniform(0, [4.0, 0.5], size=(8000, 2)).astype(np.float32)
    assert entropy(x, 3, floor=1e-9) == pytest.approx(np.log(2.0), abs=0.05)


def test_entropy_grows_by_the_log_of_the_scale_in_every_dimension() -> None:
    x = unit(500, 5)
    assert entropy(3 * x, 2, 1e-9) - entropy(x, 2, 1e-9) == pytest.approx(5 * np.log(3), abs=1e-5)


@pytest.mark.parametrize("k", [0, 5, 6])
def test_k_must_leave_a_neighbour(k: int) -> None:
    with pytest.raises(InputError, match="neighbours"):
        knn_distances(unit(5, 2), k)


def brute_force(x: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and ids of the k nearest from all differences in float64, equal ones by id."""
    z = x.astype(np.float64)
    distances, ids = np.empty((len(x), k)), np.empty((len(x), k), dtype=np.int64)
    for i in range(len(x)):
        apart = np.sqrt(((z - z[i]) ** 2).sum(axis=1))
        apart[i] = np.inf
        ids[i] = np.lexsort((np.arange(len(x)), apart))[:k]
        distances[i] = apart[ids[i]]
    return distances, ids


def clustered(n: int, dim: int, seed: int = 0) -> np.ndarray:
    """Unit vectors in clusters, a fifth of them close edits of another, some of them copies."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n // 20, dim))[rng.integers(n // 20, size=n)]
    x += 0.5 * rng.normal(size=(n, dim))
    edited = rng.random(n) < 0.2
    x[edited] = x[rng.integers(n, size=edited.sum())] + 0.01 * rng.normal(size=(edited.sum(), dim))
    x[:30] = x[30:60]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


HARD = {
    "spread out": unit(900, 96),
    "clusters and edits": clustered(900, 96),
    "not of unit length": clustered(900, 24)
    * np.linspace(0.01, 30, 900, dtype=np.float32)[:, None],
    "one dimension": np.linspace(0, 1, 900)[:, None] ** 2,
    "hundreds of near copies": unit(900, 32) * np.float32(1e-4) + unit(1, 32),
    "copies of three": np.repeat(unit(3, 32), 300, axis=0),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("bfloat16", [True, False])
def test_the_rough_search_ends_in_the_answer_of_brute_force(
    name: str, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "fast_bfloat16", lambda: bfloat16)  # both ways on every CPU
    monkeypatch.setattr(exact, "_STRIP", 1 << 18)  # more than one block of rows
    x = HARD[name].astype(np.float32)
    distances, ids = nearest(x, 6)
    expected, expected_ids = brute_force(x, 6)
    np.testing.assert_allclose(distances, expected, rtol=1e-12, atol=1e-15)
    if name != "copies of three":  # among hundreds of equals any will do
        np.testing.assert_array_equal(ids, expected_ids)
    rows = np.repeat(np.arange(900), 6)
    np.testing.assert_array_equal(exact.measure(x, rows, ids.ravel()), distances.ravel())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_bound_of_the_error_holds(dtype: str) -> None:
    x = clustered(700, 96) * np.linspace(0.5, 3, 700, dtype=np.float32)[:, None]
    z = x.astype(np.float64)
    true = z @ z.T - (z**2).sum(axis=1) / 2
    search = exact._Search(x, exact._Format(dtype, 64), 5)
    rows = torch.arange(700)
    seen = (search._rough @ search._rough.T - search._half).double().numpy()
    kth = np.sort(np.where(np.eye(700, dtype=bool), -np.inf, seen), axis=1)[:, -5]
    bound = search._bound(rows, torch.from_numpy(kth)).numpy()
    at_least = np.sort(np.where(np.eye(700, dtype=bool), -np.inf, true), axis=1)[:, -5:]
    who = np.argsort(np.where(np.eye(700, dtype=bool), -np.inf, true), axis=1)[:, -5:]
    scores = np.take_along_axis(seen, who, axis=1)
    assert (np.abs(scores - at_least) <= bound[:, None]).all()
    assert np.abs(scores - at_least).max() > bound.max() / 1e4  # and is not absurdly wide
    assert (scores >= kth[:, None] - 2 * bound[:, None]).all()


def test_some_rows_only() -> None:
    x, rows = clustered(500, 16), np.array([400, 3, 77])
    distances, ids = nearest(x, 4, rows)
    everything = nearest(x, 4)
    np.testing.assert_array_equal(distances, everything[0][rows])
    np.testing.assert_array_equal(ids, everything[1][rows])


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_distances_of_repeated_rows_are_those_of_the_rows_repeated(k: int) -> None:
    x = clustered(100, 8)[60:70]
    times = np.array([1, 3, 1, 1, 5, 1, 2, 1, 1, 1])
    expected = brute_force(np.repeat(x, times, axis=0), k)[0][:, -1]
    first = np.cumsum(times) - times
    np.testing.assert_allclose(repeated_distances(x, times, k), expected[first], rtol=1e-12)
    assert repeated_distances(x[:1], np.array([k + 1]), k).tolist() == [0.0]
    with pytest.raises(InputError, match="neighbours need more"):
        repeated_distances(x, np.full(10, 1), 10)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_an_index_tells_the_recall_that_it_has(index: Index) -> None:
    x = clustered(6000, 24)
    found = find_neighbours(x, 5, index, recall=0.95)
    true = nearest(x, 5)[0]
    measured = recall(found.distances, true)
    assert measured >= 0.95
    assert found.recall == pytest.approx(measured, abs=0.02)  # from a sample of 500
    again = find_neighbours(x, 5, index, recall=0.95)
    assert np.array_equal(found.ids, again.ids)
    apart = np.linalg.norm(x[found.ids].astype(np.float64) - x[:, None].astype(np.float64), axis=2)
    np.testing.assert_allclose(found.distances, apart, rtol=1e-9, atol=1e-12)
    assert (found.ids != np.arange(6000)[:, None]).all()


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
@pytest.mark.parametrize("n", [2, 3, 12])
def test_an_index_of_hardly_any_rows_still_finds_all(index: Index, n: int) -> None:
    x = unit(n, 4)
    k = min(5, n - 1)
    found = find_neighbours(x, k, index, recall=0.99)
    np.testing.assert_allclose(found.distances, brute_force(x, k)[0], rtol=1e-9)
    assert found.recall == 1.0


def test_recall_by_hand() -> None:
    truth = np.array([[1.0, 2.0], [1.0, 3.0]])
    assert recall(np.array([[1.0, 2.0], [3.0, 9.0]]), truth) == 0.75


def test_auto_is_exact_up_to_the_stated_size() -> None:
    assert find_neighbours(unit(50, 4), 3).index == "exact"
    assert find_neighbours(unit(50, 4), 3).recall == 1.0
    assert EXACT_UP_TO == 200_000  # as `fifa settings` says


@pytest.mark.parametrize("near", [0.05, 0.3, 0.8])
def test_near_copies_follow_the_rule_word_by_word(
    near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fifa.knn.near._BLOCK", 64)  # leaders of earlier blocks and of the same
    x = clustered(400, 12, seed=3)
    z = x.astype(np.float64)
    leaders: list[int] = []
    expected = []
    for i in range(len(x)):
        led = next((j for j in leaders if np.linalg.norm(z[i] - z[j]) < near), i)
        leaders += [i] if led == i else []
        expected.append(led)
    assert near_groups(x, near).tolist() == expected
    assert 1 < len(leaders) < 400


def test_without_a_threshold_nothing_is_a_copy() -> None:
    assert near_groups(np.repeat(unit(2, 4), 3, axis=0), 0.0).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(InputError, match=r"copies is 2\.5, it must"):
        near_groups(unit(4, 4), 2.5)
