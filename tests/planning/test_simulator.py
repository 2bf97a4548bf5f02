"""The replay against plain lists, the live cache and every possible decision; fresh random routes each time."""

from __future__ import annotations

import random
from functools import cache as memo
from itertools import combinations, pairwise
from math import fsum
from typing import Any

import numpy as np
import pytest
import torch

from moeflow.artifact.layout import expert_layout
from moeflow.errors import DocumentError, UsageError
from moeflow.offload.cache import ExpertCache
from moeflow.offload.policy import LruPolicy, Rule
from moeflow.offload.routing import markov, uniform
from moeflow.offload.trace import Routes
from moeflow.offload.traffic import Traffic
from moeflow.planning.fitting import Fit
from moeflow.planning.guessing import GuessedCache, guessed_routes, landing_buffers, replay_guesses
from moeflow.planning.optimum import optimal_hits
from moeflow.planning.recency import recent_hits
from moeflow.planning.replay import _hits, replay
from moeflow.planning.simulator import hit_rates, simulate, thinned
from moeflow.schema import DenseScheme, ExpertLayer, Guessing, Manifest, Plan
from moeflow.schema.profile import HALF_LIFE


def fresh_seed() -> int:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return seed


RULES = [Rule("lru"), Rule("lfu"), Rule("mix", 5), Rule("static", hot=(tuple(range(8)), (7, 2, 5, 1, 3, 4, 6, 0)) * 2)]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def guessing(**change: Any) -> Guessing:
    return Guessing(**{"predictor": "recall", "recall": 0.7, "experts": 2, "depth": 1, "staging": 4, **change})


class SlowCache:
    """One layer as a list of who is kept and the whole history of uses, searched anew each time."""

    def __init__(self, policy: str, k: int):
        self.policy, self.k = policy, k
        self.kept: list[int] = []
        self.history: list[int] = []

    def step(self, needed: list[int]) -> int:
        hits = sorted(e for e in needed if e in self.kept)
        for expert in [*hits, *sorted(set(needed) - set(hits))]:
            self.history.append(expert)
            if expert not in self.kept:
                self.kept.append(expert)
                if len(self.kept) > self.k:
                    others = [e for e in self.kept if e != expert]
                    self.kept.remove(min(others, key=self.worth) if others else expert)
        return len(hits)

    def worth(self, expert: int) -> tuple[float, int]:
        uses = [i for i, e in enumerate(self.history) if e == expert]
        if self.policy == "mix":
            return fsum(2.0 ** ((i - len(self.history)) / HALF_LIFE) for i in uses), uses[-1]
        periods = len(self.history) // 64
        fame = sum(0.5 ** (periods - i // 64) for i in uses) if self.policy == "lfu" else 0.0
        return fame, uses[-1]


@pytest.mark.parametrize("policy", ["lru", "lfu", "mix"])
@pytest.mark.parametrize(("experts", "top_k"), [(5, 1), (8, 2), (9, 4)])
def test_hit_rates_are_those_of_plain_lists(policy: str, experts: int, top_k: int) -> None:
    routes = markov(2, experts, top_k, 120, fresh_seed())
    rates = hit_rates(routes, experts, policy)
    assert rates.shape == (2, experts + 1)
    for layer in range(2):
        for k in range(experts + 1):
            slow = SlowCache(policy, k)
            hits = sum(slow.step(row) for row in routes[:, layer].tolist())
            assert rates[layer, k] * routes.shape[0] * top_k == pytest.approx(hits, abs=1e-6)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(4, 1, 300), (8, 2, 600), (6, 3, 300), (32, 8, 100)])
@pytest.mark.parametrize("source", [uniform, markov])
def test_stamps_hit_what_the_policy_hits_step_by_step(source: Any, experts: int, top_k: int, tokens: int) -> None:
    routes = source(2, experts, top_k, tokens, fresh_seed())
    for k in range(experts + 1):
        found = recent_hits(routes, experts, k)
        for layer in range(2):
            policy = LruPolicy(k)
            for step, needed in enumerate(np.sort(routes[:, layer], axis=-1).tolist()):
                assert found[step, layer].tolist() == [e in policy for e in needed], (k, layer, step)
                _hits(policy, [needed])


def test_chosen_ks_are_columns_of_the_whole_curve() -> None:
    routes = markov(3, 8, 2, 50, fresh_seed())
    for policy in ("lru", "lfu", "optimum"):
        assert (hit_rates(routes, 8, policy, [6, 0, 3]) == hit_rates(routes, 8, policy)[:, [6, 0, 3]]).all()


def test_no_slots_hit_nothing_and_slots_for_all_miss_each_expert_once() -> None:
    routes = uniform(4, 8, 2, 60, fresh_seed())
    cold = [len(np.unique(routes[:, layer])) for layer in range(4)]
    for policy in ("lru", "lfu", "optimum"):
        rates = hit_rates(routes, 8, policy)
        assert (rates[:, 0] == 0).all()
        assert (120 * (1 - rates[:, 8])).round(9).tolist() == cold


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_least_recently_used_cache_gains_by_every_slot(top_k: int) -> None:
    rates = hit_rates(markov(6, 8, top_k, 400, fresh_seed()), 8)
    assert (np.diff(rates, axis=1) >= 0).all()
    assert (np.diff(rates.mean(axis=0)) > 0).all()


@pytest.mark.parametrize(("top_k", "nested"), [(1, True), (2, True), (3, False), (4, False)])
def test_caches_are_nested_up_to_two_experts_a_step(top_k: int, nested: bool) -> None:
    """The stack property. Kept experts are touched before missing ones come in, so who is the most recent within a
    step depends on k; from three on that is felt, and no single pass can serve every k."""
    routes = np.sort(uniform(1, 8, top_k, 2000, fresh_seed())[:, 0], axis=-1)
    policies = [LruPolicy(k) for k in range(9)]
    outside = 0
    for row in routes.tolist():
        for policy in policies:
            _hits(policy, [row])
        kept = [{e for e in range(8) if e in policy} for policy in policies]
        outside += sum(not less <= more for less, more in pairwise(kept))
    assert (outside == 0) == nested


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (16, 4), (64, 8)])
@pytest.mark.parametrize("source", [uniform, markov])
def test_no_policy_beats_the_optimum(source: Any, experts: int, top_k: int) -> None:
    routes = source(3, experts, top_k, 80, fresh_seed())
    ks = sorted({0, 1, top_k, experts // 2, experts - 1, experts})
    best = hit_rates(routes, experts, "optimum", ks)
    for rule in (Rule("lru"), Rule("lfu"), Rule("mix", 4), Fit(routes, experts, "static", 1).rule):
        assert (hit_rates(routes, experts, rule, ks) <= best).all()
    assert (np.diff(hit_rates(routes, experts, "optimum"), axis=1) >= 0).all()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_optimum_is_the_best_of_all_decisions(top_k: int) -> None:
    """Every subset that may be kept after every step is tried."""
    for trial in range(12):
        experts, tokens = 5, 7
        routes = uniform(1, experts, top_k, tokens, fresh_seed() + trial)
        steps = [frozenset(row) for row in routes[:, 0].tolist()]
        found = optimal_hits(routes, experts)[0].tolist()
        assert found == [_most(steps, k) for k in range(experts + 1)]


def _most(steps: list[frozenset[int]], k: int) -> int:
    @memo
    def best(step: int, kept: frozenset[int]) -> int:
        if step == len(steps):
            return 0
        candidates = kept | steps[step]
        choices = (c for n in range(min(k, len(candidates)) + 1) for c in combinations(sorted(candidates), n))
        return len(kept & steps[step]) + max(best(step + 1, frozenset(choice)) for choice in choices)

    return best(0, frozenset())


class SilentLink:
    """Copies nothing; the live cache decides all the same."""

    def fetch(self, *_: object) -> Any:
        return self

    def wait(self) -> None:
        pass

    settle = wait


def live_cache(
    layers: int, experts: int, rule: Rule, slots: tuple[int, ...], staging: int
) -> tuple[ExpertCache, Traffic]:
    entry = ExpertLayer(
        module="m", router="r", experts=experts, layout=0, shard="s", data_offset=0, digests=(), relative_error=0.0
    )
    layouts = (expert_layout(64, 64, DenseScheme(), "bfloat16"),)
    manifest = Manifest.model_construct(layouts=layouts, layers=(entry,) * layers)
    plan = Plan.model_construct(
        cache_slots=slots,
        staging_slots=staging,
        policy=rule.name,
        half_life=rule.half_life,
        hot_experts=rule.hot[:layers],
    )
    traffic = Traffic()
    link: Any = SilentLink()
    return ExpertCache(manifest, plan, link, torch.device("cpu"), traffic), traffic


@rules
@pytest.mark.parametrize("slots", [(0, 0, 0), (1, 1, 1), (3, 3, 3), (8, 8, 8), (5, 0, 2)])
def test_the_live_cache_counts_the_same_without_guesses(rule: Rule, slots: tuple[int, ...]) -> None:
    routes = markov(3, 8, 2, 200, fresh_seed())
    live, traffic = live_cache(3, 8, rule, slots, staging=2)
    hits = [0, 0, 0]
    for needed in np.sort(routes, axis=-1).tolist():
        for layer in range(3):
            before = traffic.hits
            list(live.fetch(layer, needed[layer]))
            hits[layer] += traffic.hits - before
    assert hits == replay(routes, rule, slots)
    if len(set(slots)) == 1:
        assert np.allclose(np.array(hits) / 400, hit_rates(routes, 8, rule, slots[:1])[:, 0])


@rules
@pytest.mark.parametrize("staging", [1, 2, 6])
@pytest.mark.parametrize(("k", "depth", "experts"), [(0, 1, 2), (1, 1, 1), (2, 2, 2), (4, 1, 2), (4, 3, 1), (8, 1, 2)])
def test_the_live_cache_decides_the_same_with_guesses(
    rule: Rule, staging: int, k: int, depth: int, experts: int
) -> None:
    """Step by step: hits, guesses started and used, and who is kept."""
    seed = fresh_seed()
    layers, routes = 4, markov(4, 8, 2, 120, seed)
    asked = guessing(experts=experts, depth=depth, staging=staging)
    said = guessed_routes(routes, 8, asked, seed)
    live, traffic = live_cache(layers, 8, rule, (k,) * layers, staging)
    replayed = GuessedCache(layers, rule, k, staging)
    for needed, guessed in zip(np.sort(routes, axis=-1).tolist(), said.tolist(), strict=True):
        for layer in range(layers):
            ahead = range(layer + 1, min(layers, layer + 1 + depth))
            pairs = [(coming, expert) for coming in ahead for expert in guessed[coming]]
            list(live.fetch(layer, needed[layer], pairs))
            replayed.use(layer, needed[layer], pairs)
            assert (sum(replayed.hits), replayed.guesses, replayed.used) == (
                traffic.hits, traffic.guesses, traffic.guesses_used
            )  # fmt: skip
            assert {e for e in range(8) if e in replayed._policies[layer]} == set(live.resident(layer))
    whole = replay_guesses(routes, said, rule, k, asked)
    assert (whole.hits, whole.guesses, whole.used) == (replayed.hits, replayed.guesses, replayed.used)


@pytest.mark.parametrize(
    ("layers", "experts", "top_k", "k", "measured"), [(32, 8, 2, 4, 0.544), (48, 128, 8, 64, 0.553)]
)
def test_a_gpu_hit_as_often(layers: int, experts: int, top_k: int, k: int, measured: float) -> None:
    """docs/benchmarks.md, rows with Markov routes of commit db6c159: 64 tokens of `bench`'s routes after 16."""
    routes = markov(layers, experts, top_k, 128, seed=0)
    assert round(float(recent_hits(routes, experts, k)[16:80].mean()), 3) == measured


def counts(routes: Routes, asked: Guessing, k: int = 2) -> tuple[int, int, int, int]:
    """Hits, guesses, guesses used, and uses outside layer 0, which nothing guesses."""
    rows, _ = simulate(routes, 8, [k], [Rule("lru")], asked, seed=3)
    row = next(row for row in rows if row.guesses is not None)
    assert row.guesses is not None and row.guesses_used is not None
    return sum(row.hits), row.guesses, row.guesses_used, routes[:, 1:].size


def test_perfect_guesses_foresee_every_miss_and_waste_nothing() -> None:
    routes = markov(5, 8, 2, 100, fresh_seed())
    hits, guesses, used, coming = counts(routes, guessing(recall=1.0), k=0)
    assert (hits, guesses, used) == (0, coming, coming)


def test_guesses_that_are_never_right_waste_every_copy() -> None:
    always = np.repeat(uniform(5, 8, 2, 1, fresh_seed()), 100, axis=0)
    hits, guesses, used, _ = counts(always, guessing(recall=0.0))
    assert (hits, used) == (always.size - 10, 0)
    assert guesses > 100


def test_a_guess_too_early_may_serve_a_later_token() -> None:
    """As in the live cache, it stays until its buffer is needed."""
    cache = GuessedCache(2, Rule("lru"), 0, staging=3)
    cache.use(0, [0], [(1, 5)])
    cache.use(1, [4], [])
    cache.use(0, [0], [])
    cache.use(1, [5], [])
    assert (cache.guesses, cache.used) == (1, 1)


def test_a_recall_brings_its_share() -> None:
    routes = uniform(8, 8, 2, 500, fresh_seed())
    hits, guesses, used, coming = counts(routes, guessing(recall=0.7), k=0)
    assert hits == 0 and guesses == coming
    assert used / coming == pytest.approx(0.7, abs=0.03)


def test_the_token_before_is_guessed_where_it_is_not_kept() -> None:
    routes = np.tile(np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], np.int16), (10, 1, 1))
    said = guessed_routes(routes, 8, guessing(predictor="previous", recall=None, experts=1), 0)
    assert said[:3, 1, 0].tolist() == [-1, 2, 6]
    always = np.repeat(routes[:1], 20, axis=0)
    hits, guesses, used, _ = counts(always, guessing(predictor="previous", recall=None), k=0)
    assert (hits, guesses, used) == (0, 38, 38)  # layer 1 of every token but the first
    assert counts(always, guessing(predictor="previous", recall=None))[1] == 0  # all cached: nothing is to be copied


def test_simulate_reports_each_row_once_and_times_every_part() -> None:
    routes, seen = markov(2, 8, 2, 30, fresh_seed()), []
    rows, timings = simulate(routes, 8, [2, 4], [Rule("lru"), Rule("lfu")], guessing(), 1, seen.append)
    assert rows == seen
    names = [(row.policy, row.k, row.guesses is not None) for row in rows]
    plain = [(policy, k, False) for policy in ("lru", "lfu") for k in (2, 4)]
    forced = [(policy, k, True) for policy in ("lru", "lfu") for k in (2, 4)]
    assert names == [*plain, *forced, ("optimum", 2, False), ("optimum", 4, False)]
    assert [(t.what, t.steps) for t in timings] == [
        ("lru", 120), ("lfu", 120), ("lru with guesses", 120), ("lfu with guesses", 120), ("optimum", 60)
    ]  # fmt: skip
    assert all(t.seconds > 0 for t in timings)
    for row in rows:
        rates = hit_rates(routes, 8, row.policy, [row.k])[:, 0] * 60
        if row.guesses is None:
            assert row.hits == tuple(rates.round().astype(int))


def test_a_static_set_hits_its_experts_but_for_their_first_uses() -> None:
    """Fitted to what is replayed, it is the best set that never changes."""
    routes = markov(3, 8, 2, 200, fresh_seed())
    rates = hit_rates(routes, 8, Fit(routes, 8, "static", 1).rule)
    for layer in range(3):
        counts = np.sort(np.bincount(routes[:, layer].reshape(-1), minlength=8))[::-1]
        assert (400 * rates[layer]).round().tolist() == [0, *np.cumsum(np.maximum(counts - 1, 0))]


def test_what_cannot_be_asked_is_refused() -> None:
    routes = uniform(2, 8, 2, 10, 0)
    with pytest.raises(UsageError, match="k is 9; a layer has 8 experts: give 0 to 8"):
        hit_rates(routes, 8, ks=[2, 9])
    with pytest.raises(DocumentError, match="unknown cache policy 'fifo'; known: lfu, lru, mix, optimum, static"):
        hit_rates(routes, 8, "fifo")
    with pytest.raises(UsageError, match="3 guesses a layer; routes are top-2"):
        guessed_routes(routes, 8, guessing(experts=3), 0)


def test_thinned_numbers_of_slots() -> None:
    assert thinned(8) == [1, 2, 3, 4, 5, 6, 7]
    assert thinned(128) == list(range(8, 128, 8))
    assert thinned(1) == [1]
    for experts in range(2, 300):
        assert 1 <= len(thinned(experts)) <= 16 and thinned(experts)[-1] < experts


def test_landing_buffers_are_the_planners() -> None:
    assert [landing_buffers(2, depth, guessed) for depth, guessed in ((0, 0), (1, 1), (1, 3), (2, 2))] == [4, 4, 5, 6]
