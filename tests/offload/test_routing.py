"""Routes for benchmarks: distinct, repeatable, and as often repeated as they say. Statistics are of long traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise, permutations

import numpy as np
import pytest

from moeflow.errors import UsageError
from moeflow.offload.policy import LruPolicy
from moeflow.offload.routing import MIXTRAL, guesses, habits, markov, repetition, uniform
from moeflow.offload.trace import Routes

TOKENS = 30_000  # the standard error of a share near one half is then 0.3 points
Source = Callable[[int, int, int, int, int], Routes]
sources = pytest.mark.parametrize("source", [uniform, markov])


@pytest.fixture(scope="module")
def mixtral() -> Routes:
    return markov(32, 8, 2, TOKENS, seed=1)


def lru_hit_rate(routes: Routes, k: int) -> float:
    """One layer [T, K]: needed experts in ascending order, those in the cache first, as the expert cache takes them."""
    policy, hits = LruPolicy(k), 0
    for row in routes.tolist():
        cached = [expert for expert in sorted(row) if expert in policy]
        for expert in cached:
            policy.touch(expert)
        for expert in sorted(set(row) - set(cached)):
            policy.admit(expert)
        hits += len(cached)
    return hits / routes.size


# -- all sources -------------------------------------------------------------------------------------------


@sources
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 2, 2, 40), (3, 8, 2, 50), (5, 8, 8, 30), (4, 60, 4, 30), (2, 128, 8, 30)]
)
def test_routes_are_distinct_experts_of_the_shape_asked_for(source: Source, shape: tuple[int, int, int, int]) -> None:
    layers, experts, top_k, tokens = shape
    routes = source(layers, experts, top_k, tokens, 7)
    assert (routes.shape, routes.dtype) == ((tokens, layers, top_k), np.dtype(np.int16))
    assert routes.min() >= 0 and routes.max() < experts
    assert all(len(set(row)) == top_k for row in routes.reshape(-1, top_k).tolist())


@sources
def test_a_seed_gives_the_same_routes_and_another_seed_others(source: Source) -> None:
    first = source(4, 8, 2, 200, 11)
    assert (first == source(4, 8, 2, 200, 11)).all()
    assert (first == source(4, 8, 2, 200, 12)).mean() < 0.3


@sources
def test_every_ordered_choice_is_as_likely_as_any_other(source: Source) -> None:
    routes = source(40, 4, 3, 1000, 5).reshape(-1, 3)
    counts = Counter(map(tuple, routes.tolist()))
    assert set(counts) == set(permutations(range(4), 3))
    expected = len(routes) / len(counts)  # 24 rows of 1,667; neighbours of a chain depend, which widens the spread
    assert all(abs(count - expected) < 0.2 * expected for count in counts.values())


@sources
@pytest.mark.parametrize("shape", [(0, 8, 2, 1), (1, 8, 0, 1), (1, 8, 2, 0), (1, 2, 3, 1), (1, 40_000, 2, 1)])
def test_shapes_that_cannot_be_are_refused(source: Source, shape: tuple[int, int, int, int]) -> None:
    with pytest.raises(UsageError, match=r"no routes of .* top-k is at most the experts"):
        source(*shape, 1)


# -- calibration -------------------------------------------------------------------------------------------


def test_uniform_routes_repeat_by_chance_alone() -> None:
    first, shared = repetition(uniform(8, 8, 2, TOKENS, seed=2))
    assert first.mean() == pytest.approx(1 / 8, abs=0.003)
    assert shared.mean() == pytest.approx(1 - (6 * 5) / (8 * 7), abs=0.004)  # 46.4%, the report's 46%


def test_uniform_routes_hit_an_lru_cache_of_half_the_experts_half_of_the_time() -> None:
    routes = uniform(2, 8, 2, TOKENS, seed=3)
    rates = [lru_hit_rate(routes[:, layer], k=4) for layer in range(2)]
    assert rates == pytest.approx([0.5, 0.5], abs=0.01)


@pytest.mark.parametrize("layer", MIXTRAL)
def test_the_chain_repeats_as_mixtral_does(mixtral: Routes, layer: int) -> None:
    first, shared = repetition(mixtral[:, [layer]])
    published = MIXTRAL[layer]
    assert first[0] == pytest.approx(published[0], abs=0.01)
    assert shared[0] == pytest.approx(published[1], abs=0.012)


def test_layers_between_the_published_ones_lie_between_them(mixtral: Routes) -> None:
    first, shared = repetition(mixtral)
    for below, above in ((0, 15), (31, 15)):
        step = 1 if below < above else -1
        for values in (first, shared):
            inner = values[below:above:step]
            assert (np.diff(inner) > -0.015).all(), "rises towards the middle, but for noise"


@pytest.mark.parametrize(("layers", "twin"), [(63, 15 * 2), (94, 15 * 3), (125, 15 * 4)])
def test_other_layer_counts_take_the_habits_of_equal_depth(layers: int, twin: int) -> None:
    for other, known in zip(habits(layers), habits(32), strict=True):
        assert other[[0, twin, -1]] == pytest.approx(known[[0, 15, 31]])


def test_habits_repeat_whatever_the_number_of_experts_and_choices() -> None:
    """Copies are told from chance by counting: shares of the chain less what the formula gives for a copy."""
    layers, experts, top_k = 3, 64, 8
    routes = markov(layers, experts, top_k, 20_000, seed=4)
    first, later = habits(layers)
    same = (routes[1:, :, 0] == routes[:-1, :, 0]).mean(axis=0)
    assert same == pytest.approx(first + (1 - first) / experts, abs=0.01)
    carried = (routes[1:, :, :, None] == routes[:-1, :, None, :]).any(axis=-1)[:, :, 1].mean(axis=0)
    # The second choice: copied, or by chance one of the experts of the token before that the first has not taken.
    assert carried == pytest.approx(later + (1 - later) * top_k / experts, abs=0.015)


def test_a_cache_gains_from_the_chain(mixtral: Routes) -> None:
    by_chance = uniform(1, 8, 2, 10_000, seed=5)
    assert lru_hit_rate(mixtral[:10_000, 15], k=4) > lru_hit_rate(by_chance[:, 0], k=4) + 0.04


def test_copied_choices_come_from_all_of_the_token_before(mixtral: Routes) -> None:
    """Not the second from the second only: a copy may move between the ranks, as in a trained router."""
    before, after = mixtral[:-1, 15], mixtral[1:, 15]
    moved = (after[:, 1] == before[:, 0]).mean()
    stayed = (after[:, 1] == before[:, 1]).mean()
    assert moved > 0.13 and stayed > 0.13


# -- guesses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recall", [0.0, 0.3, 0.7, 0.9, 1.0])
def test_guesses_are_right_as_often_as_they_say(recall: float) -> None:
    routes = uniform(8, 8, 2, 5000, seed=6)
    found = guesses(routes, 8, recall, seed=7)
    assert (found.shape, found.dtype) == (routes.shape, np.dtype(np.int16))
    right = (found[..., :, None] == routes[..., None, :]).any(axis=-1)
    assert right.mean() == pytest.approx(recall, abs=0.006)
    assert ((found == routes) == right).all(), "a wrong guess is never another expert of the row"
    assert (found[..., 0] != found[..., 1]).all()
    both = right.all(axis=-1).mean()
    assert both == pytest.approx(recall**2, abs=0.01), "entries are right independently"


def test_wrong_guesses_are_uniform_over_the_others() -> None:
    routes = np.broadcast_to(np.array([2, 0], np.int16), (20_000, 1, 2))
    found = guesses(routes, 6, 0.0, seed=8).reshape(-1, 2)
    counts = Counter(map(tuple, found.tolist()))
    assert set(counts) == set(permutations((1, 3, 4, 5), 2))
    assert all(abs(count - 20_000 / 12) < 200 for count in counts.values())


def test_guesses_depend_on_their_seed_alone() -> None:
    routes = uniform(3, 60, 4, 100, seed=9)
    assert (guesses(routes, 60, 0.5, 1) == guesses(routes, 60, 0.5, 1)).all()
    assert not (guesses(routes, 60, 0.5, 1) == guesses(routes, 60, 0.5, 2)).all()


@pytest.mark.parametrize("recall", [-0.1, 1.1, float("nan")])
def test_recall_is_a_probability(recall: float) -> None:
    with pytest.raises(UsageError, match="lies between 0 and 1"):
        guesses(uniform(1, 8, 2, 1, 0), 8, recall, 0)


def test_wrong_guesses_need_experts_that_are_not_used() -> None:
    routes = uniform(1, 3, 2, 5, 0)
    assert (guesses(routes, 3, 1.0, 0) == routes).all()
    with pytest.raises(UsageError, match="top-2 of 3 leaves 1; use recall 1"):
        guesses(routes, 3, 0.9, 0)


# -- the measure itself ------------------------------------------------------------------------------------


def test_repetition_counts_by_hand() -> None:
    rows = [(0, 1), (0, 2), (2, 3), (4, 5), (5, 4)]
    first, shared = repetition(np.array(rows, np.int16)[:, None, :])
    assert first[0] == sum(a[0] == b[0] for a, b in pairwise(rows)) / 4 == 1 / 4
    assert shared[0] == 3 / 4
