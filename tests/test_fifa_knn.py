from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree

from fifa.config import InputError
from fifa.knn import entropy, knn_distances, log_knn


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
