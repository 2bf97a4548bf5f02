"""What is fitted to a trace, alone and in plans."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import machines
import numpy as np
import pytest

from moeflow.errors import DocumentError, StorageError
from moeflow.offload.routing import markov, uniform
from moeflow.offload.trace import Routes, Trace, save_trace
from moeflow.planning.fitting import Fit, curves, fit_of, most_used
from moeflow.planning.planner import make_plan
from moeflow.planning.replay import replay
from moeflow.planning.simulator import hit_rates
from moeflow.schema import Profile
from moeflow.schema.profile import Cache

MIB = 1 << 20
LAYER = machines.SIZES.layers[0]
SIZES = replace(machines.SIZES, layers=(replace(LAYER, experts=8, blob_nbytes=84 * MIB),) * 6)
MACHINE = machines.machine(gpu=machines.MACHINE.gpu.model_copy(update={"memory": 5 << 30}))  # type: ignore[union-attr]


def habits(layers: int = 4, experts: int = 8, tokens: int = 300) -> Routes:
    """Top-2 routes whose first layer uses two experts and whose last one all."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draw = np.random.default_rng(seed)
    used = np.linspace(2, experts, layers).astype(int)
    rows = [[draw.choice(n, 2, replace=False) for n in used] for _ in range(tokens)]
    return np.array(rows, np.int16)


def test_the_most_used_come_first() -> None:
    routes = np.array([[[3, 1]], [[3, 2]], [[2, 3]], [[0, 1]]], np.int16)
    assert most_used(routes, 6) == ((3, 1, 2, 0, 4, 5),)


def test_small_curves_are_the_replays() -> None:
    routes = markov(3, 8, 2, 100, 5)
    fit = Fit(routes, 8, "lru", 128)
    assert np.allclose(fit.hits, hit_rates(routes, 8) * 200)


def test_large_curves_are_straight_between_replays_and_do_not_fall() -> None:
    routes = uniform(2, 40, 3, 100, 5)
    found = curves(routes, 40, Fit(routes, 40, "mix", 8).rule)
    assert found.shape == (2, 41)
    assert (np.diff(found, axis=1) >= 0).all()
    assert np.allclose(found[:, [0, 39, 40]], hit_rates(routes, 40, Fit(routes, 40, "mix", 8).rule, [0, 39, 40]) * 300)


@pytest.mark.parametrize("name", ["lru", "lfu", "mix", "static"])
def test_quotas_are_never_worse_than_even_on_their_own_trace(name: str) -> None:
    routes = habits()
    fit = Fit(routes, 8, name, 16)
    for k in range(9):
        found = fit.quotas([k] * 4, [1] * 4, [8] * 4)
        assert sum(found) == 4 * k
        assert sum(replay(routes, fit.rule, found)) >= sum(replay(routes, fit.rule, [k] * 4))
    assert fit.quotas([4] * 4, [1] * 4, [8] * 4)[0] == 2, "a layer of two experts needs two slots"


def profile(**cache: Any) -> Profile:
    return Profile(model="m", cache=Cache(**cache))


@pytest.fixture
def trace(tmp_path: Path) -> str:
    layers, experts = len(SIZES.layers), SIZES.layers[0].experts
    save_trace(tmp_path / "t.npz", Trace(habits(layers, experts), experts, "m"))
    return str(tmp_path / "t.npz")


@pytest.mark.parametrize("policy", ["lru", "mix"])
def test_a_plan_shares_its_slots_out(trace: str, policy: str) -> None:
    even = make_plan(profile(policy=policy), SIZES, MACHINE)
    plan = make_plan(profile(policy=policy, trace=trace, half_life=32), SIZES, MACHINE)
    assert sum(plan.cache_slots) == sum(even.cache_slots)
    assert len(set(plan.cache_slots)) > 1 and plan.cache_slots[0] < plan.cache_slots[-1]
    assert plan.memory == even.memory
    assert (plan.policy, plan.half_life, plan.hot_experts) == (policy, 32, ())


def test_a_number_of_experts_that_was_asked_for_stays(trace: str) -> None:
    plan = make_plan(profile(trace=trace, experts_per_layer=2), SIZES, MACHINE)
    assert set(plan.cache_slots) == {2}


def test_a_static_plan_names_its_experts(trace: str) -> None:
    plan = make_plan(profile(policy="static", trace=trace), SIZES, MACHINE)
    assert [len(hot) for hot in plan.hot_experts] == list(plan.cache_slots)
    fit = fit_of(profile(policy="static", trace=trace).cache, len(SIZES.layers), SIZES.layers[0].experts, 2)
    assert fit is not None
    assert all(hot == most[: len(hot)] for hot, most in zip(plan.hot_experts, fit.rule.hot, strict=True))


def test_traces_that_do_not_serve(trace: str, tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="a trace of m with"):
        fit_of(Cache(trace=trace), 1, 8, 2)
    with pytest.raises(StorageError, match="cannot read"):
        fit_of(Cache(trace=str(tmp_path / "none.npz")), 1, 8, 2)
    with pytest.raises(DocumentError, match="policy static keeps the experts most used in a trace"):
        Profile.parse({"model": "m", "cache": {"policy": "static"}}, "p.yaml")
