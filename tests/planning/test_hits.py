"""Hit rates by formula are those of replays through the policy, at shapes far from Mixtral's too."""

from __future__ import annotations

import numpy as np
import pytest

from moeflow.offload.routing import markov, uniform
from moeflow.planning.hits import hit_rates_of
from moeflow.planning.simulator import hit_rates

# Layers, experts, top-k, slots, tokens: of small shapes more, so that chance stays well below what is allowed.
SHAPES = [
    (32, 8, 2, (1, 2, 3, 4, 6, 8), 6000),
    (24, 64, 6, (3, 6, 16, 32, 48), 1500),
    (24, 128, 8, (4, 8, 32, 64, 96), 1500),
    (16, 16, 1, (1, 4, 8, 16), 6000),
]


@pytest.mark.parametrize(("habit", "make"), [("markov", markov), ("uniform", uniform)], ids=["markov", "uniform"])
@pytest.mark.parametrize(("layers", "experts", "top_k", "slots", "tokens"), SHAPES)
def test_rates_are_those_of_replays(layers, experts, top_k, slots, tokens, habit, make) -> None:
    replayed = hit_rates(make(layers, experts, top_k, tokens, seed=11), experts, "lru", slots)  # [L, n]
    rates = [hit_rates_of([experts] * layers, [k] * layers, top_k, habit) for k in slots]
    off = np.transpose(rates) - replayed
    assert np.abs(off).max() < 0.025, "a layer"
    assert np.abs(off.mean(axis=0)).max() < 0.01, "all layers"


def test_habits_differ_from_none_where_there_is_something_to_repeat() -> None:
    """What the test above would not notice: that one formula served both."""
    habit, none = (np.array(hit_rates_of([8] * 32, [4] * 32, 2, h)) for h in ("markov", "uniform"))
    assert none.tolist() == [0.5] * 32
    assert habit.mean() > 0.53
    assert habit[0] < 0.51, "the first layer hardly repeats"


def test_layers_have_their_own_experts_and_slots() -> None:
    assert hit_rates_of([8, 16, 4], [8, 4, 1], 2, "uniform") == [1.0, 0.25, 0.25]
    assert hit_rates_of([8, 8], [0, 8], 2, "markov") == [0.0, 1.0]
    rates = [hit_rates_of([16] * 4, [k] * 4, 4, "markov") for k in range(17)]
    assert (np.diff(rates, axis=0) > 0).all(), "a slot more is worth something"
