"""Quotas against every possible split, and what they promise whatever the curves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

import numpy as np
import numpy.typing as npt
import pytest

from moeflow.planning.quotas import quotas, saved

Curves = npt.NDArray[np.float64]


@pytest.fixture
def draw() -> random.Random:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return random.Random(seed)


def curves(draw: random.Random, layers: int, experts: int, concave: bool) -> Curves:
    """[L, E + 1] of whole numbers, many of them equal; not falling."""
    steps = [[draw.choice([0, 0, 1, 2, 5, 20]) for _ in range(experts)] for _ in range(layers)]
    return np.array([[0, *np.cumsum(sorted(s, reverse=True) if concave else s)] for s in steps], np.float64)


def used(slots: Sequence[int], nbytes: Sequence[int]) -> int:
    return sum(k * n for k, n in zip(slots, nbytes, strict=True))


def best(hits: Curves, room: int, nbytes: Sequence[int], most: Sequence[int]) -> float:
    """Of every split that fits."""
    splits = product(*(range(m + 1) for m in most))
    return max(saved(hits, split, nbytes) for split in splits if used(split, nbytes) <= room)


@pytest.mark.parametrize("experts", [1, 4, 6])
def test_where_each_slot_gains_less_than_the_one_before_nothing_is_better(draw: random.Random, experts: int) -> None:
    for _ in range(40):
        hits = curves(draw, 4, experts, concave=True)
        even = [draw.randint(0, experts)] * 4
        found = quotas(hits, even, [3] * 4, [experts] * 4)
        assert sum(found) == sum(even)
        assert saved(hits, found, [3] * 4) == best(hits, used(even, [3] * 4), [3] * 4, [experts] * 4)


@pytest.mark.parametrize("nbytes", [(1, 1, 1, 1), (2, 3, 2, 5)], ids=str)
def test_of_any_curves_at_most_a_step_that_did_not_fit_is_lost(draw: random.Random, nbytes: tuple[int, ...]) -> None:
    """Never worse than even, never more room; and less lost than the greatest step of any layer's hull saves."""
    for _ in range(60):
        hits = curves(draw, 4, 5, concave=False)
        most = [draw.randint(1, 5) for _ in range(4)]
        even = [draw.randint(0, m) for m in most]
        found = quotas(hits, even, nbytes, most)
        assert all(0 <= k <= m for k, m in zip(found, most, strict=True))
        assert used(found, nbytes) <= used(even, nbytes)
        assert saved(hits, found, nbytes) >= saved(hits, even, nbytes)
        lost = best(hits, used(even, nbytes), nbytes, most) - saved(hits, found, nbytes)
        assert lost <= max(row[m] * n for row, m, n in zip(hits, most, nbytes, strict=True))
        if len(set(nbytes)) == 1:
            assert sum(found) == sum(even)


def test_a_long_step_is_taken_whole_where_it_is_steepest() -> None:
    """Three slots that gain nothing but together: not by looking one slot ahead."""
    hits = np.array([[0, 0, 0, 9, 9], [0, 2, 4, 4, 4]], np.float64)
    assert quotas(hits, [2, 2], [1, 1], [4, 4]) == [3, 1]


def test_an_even_split_that_is_better_by_luck_is_kept() -> None:
    hits = np.array([[0, 3, 4, 6.5], [0, 3, 6.4, 6.4], [0, 3, 3, 3]], np.float64)
    for slots in range(4):
        even = [slots] * 3
        assert saved(hits, quotas(hits, even, [1] * 3, [3] * 3), [1] * 3) >= saved(hits, even, [1] * 3)


def test_slots_that_gain_nothing_are_spread() -> None:
    assert quotas(np.zeros((4, 9)), [3] * 4, [7] * 4, [8] * 4) == [3] * 4


def test_large_models_take_no_time() -> None:
    """48 layers of 128 experts: some thousand steps."""
    random_ = np.random.default_rng(0)
    hits = np.cumsum(-np.sort(-(random_.random((48, 129)) ** 4), axis=1), axis=1)
    found = quotas(hits - hits[:, :1], [64] * 48, [1] * 48, [128] * 48)
    assert sum(found) == 64 * 48
    assert len(set(found)) > 5
