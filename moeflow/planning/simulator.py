"""Hit rates of caches on given routes, before anything runs: for plans, and for people who choose k and a policy.

Everything starts with an empty cache. Policies are the live store's classes, but for the least recently used,
which a faster replay stands for; the optimum bounds them all. Knows no times and no bytes: what a miss costs is the
cost model's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moeflow.errors import DocumentError, UsageError, unknown
from moeflow.offload.policy import POLICIES, Rule
from moeflow.offload.trace import Routes
from moeflow.planning.guessing import guessed_routes, replay_guesses
from moeflow.planning.optimum import optimal_hits
from moeflow.planning.recency import recent_hits
from moeflow.planning.replay import replay
from moeflow.schema import Guessing, SimulatedRow, Timing

__all__ = ["OPTIMUM", "hit_rates", "named", "simulate", "thinned"]

OPTIMUM: Literal["optimum"] = "optimum"


def hit_rates(
    routes: Routes, experts: int, policy: str | Rule = "lru", ks: Sequence[int] | None = None
) -> npt.NDArray[np.float64]:
    """Share of uses that are hits, [L, E + 1]: of each layer with k = 0 to E slots, or [L, n] for the k of `ks`.

    Args:
        routes: int16 [T, L, K], the experts of a row distinct.
        experts: E, of a layer.
        policy: a rule, the name of one that needs no more, or `optimum` for the bound.
        ks: numbers of slots; a policy takes a pass for each, the optimum one for all.

    Raises:
        DocumentError: the policy is unknown.
        UsageError: a k lies outside 0 to E.
    """
    ks = range(experts + 1) if ks is None else ks
    _check(ks, experts)
    rule = policy if isinstance(policy, Rule) else Rule(policy)
    if rule.name not in (*POLICIES, OPTIMUM):
        raise DocumentError(unknown("cache policy", rule.name, (*POLICIES, OPTIMUM)))
    if rule.name == OPTIMUM:
        hits = optimal_hits(routes, experts)[:, list(ks)]
    else:
        hits = np.array([_hits(routes, experts, rule, k) for k in ks], np.int64).reshape(len(ks), routes.shape[1]).T
    rates: npt.NDArray[np.float64] = hits / (routes.shape[0] * routes.shape[2])
    return rates


def thinned(experts: int) -> list[int]:
    """At most 16 numbers of slots between none and all, at equal distances."""
    step = -(-experts // 16)
    return list(range(step, experts, step)) or [experts]


def simulate(
    routes: Routes,
    experts: int,
    ks: Sequence[int],
    rules: Sequence[Rule],
    guessing: Guessing | None = None,
    seed: int = 0,
    report: Callable[[SimulatedRow], object] = lambda _: None,
) -> tuple[list[SimulatedRow], list[Timing]]:
    """Replay routes [T, L, K] for every rule and k, with guesses too if there are any, and the optimum last.

    Raises:
        UsageError: a k lies outside 0 to E, or guesses are not possible.
    """
    _check(ks, experts)
    rows: list[SimulatedRow] = []
    timings = []

    def timed(what: str, passes: int, make: Callable[[], Iterable[SimulatedRow]]) -> None:
        begin = time.perf_counter()
        for row in make():
            rows.append(row)
            report(row)
        seconds = time.perf_counter() - begin
        timings.append(Timing(what=what, steps=passes * routes.shape[0] * routes.shape[1], seconds=seconds))

    for rule in rules:
        timed(rule.label, len(ks), partial(_plain, routes, experts, rule, ks))
    if guessing is not None:
        guessed = guessed_routes(routes, experts, guessing, seed + 1)  # not the numbers that made synthetic routes
        for rule in rules:
            timed(f"{rule.label} with guesses", len(ks), partial(_guessing, routes, guessed, rule, ks, guessing))
    timed(OPTIMUM, 1, partial(_optimum, routes, experts, ks))
    return rows, timings


def _plain(routes: Routes, experts: int, rule: Rule, ks: Sequence[int]) -> Iterator[SimulatedRow]:
    for k in ks:
        yield SimulatedRow(**named(rule), k=k, hits=tuple(_hits(routes, experts, rule, k)))


def named(rule: Rule) -> dict[str, Any]:
    """How a row says which it is of."""
    return {"policy": rule.name, "half_life": rule.half_life if rule.name == "mix" else None}


def _hits(routes: Routes, experts: int, rule: Rule, k: int) -> list[int]:
    """Of each layer [L], by the fastest way that there is."""
    if rule.name == "lru":
        found: list[int] = recent_hits(routes, experts, k).sum(axis=(0, 2)).tolist()
        return found
    return replay(routes, rule, (k,) * routes.shape[1])


def _guessing(
    routes: Routes, guessed: Routes, rule: Rule, ks: Sequence[int], guessing: Guessing
) -> Iterator[SimulatedRow]:
    for k in ks:
        cache = replay_guesses(routes, guessed, rule, k, guessing)
        hits = tuple(cache.hits)
        yield SimulatedRow(**named(rule), k=k, hits=hits, guesses=cache.guesses, guesses_used=cache.used)


def _optimum(routes: Routes, experts: int, ks: Sequence[int]) -> Iterator[SimulatedRow]:
    hits = optimal_hits(routes, experts)
    for k in ks:
        yield SimulatedRow(policy="optimum", k=k, hits=tuple(hits[:, k].tolist()))


def _check(ks: Sequence[int], experts: int) -> None:
    wrong = [k for k in ks if not 0 <= k <= experts]
    if wrong:
        raise UsageError(f"k is {wrong[0]}; a layer has {experts} experts: give 0 to {experts}")
