"""Draws are functions of their place: stable, different elsewhere, and sliceable."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from d3po.draws import derive_seed, shuffled


def test_a_seed_never_changes_between_versions() -> None:
    # Pinned: a run started with an older version must resume with the same noise.
    assert derive_seed(0, "path", 3, 1) == 8963909734560769663


def test_seeds_of_different_places_differ() -> None:
    places = [(s, r, i) for s in range(10) for r in range(30) for i in range(30)]
    assert len({derive_seed(*place) for place in places}) == len(places)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert all(0 <= derive_seed("x", i) < 2**63 for i in range(1000))


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 30), st.integers(0, 30))
def test_any_slice_is_part_of_one_sequence(count: int, start: int, first: int, second: int) -> None:
    whole = shuffled(7, count, start, start + first + second)
    middle = start + first
    assert shuffled(7, count, start, middle) + shuffled(7, count, middle, middle + second) == whole


def test_every_epoch_visits_everything_once_in_another_order() -> None:
    order = shuffled(0, 10, 0, 30)
    epochs = [order[:10], order[10:20], order[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert shuffled(1, 10, 0, 10) != epochs[0]
