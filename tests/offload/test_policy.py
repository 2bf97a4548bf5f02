"""The policies against oracles that keep whole histories and search them; thousands of random steps."""

from __future__ import annotations

import random
import subprocess
import sys
from fractions import Fraction
from math import fsum
from typing import Protocol

import pytest

from moeflow.errors import DocumentError
from moeflow.offload.policy import POLICIES, CachePolicy, LfuPolicy, LruPolicy, MixPolicy, Rule, StaticPolicy

EXPERTS = 8
STEPS = 4000
HOT = (tuple(range(EXPERTS)),)


class _Oracle(Protocol):
    """Says who is kept, from the whole history of uses."""

    def use(self, expert: int) -> int | None:
        """Use an expert; who leaves if it has to come in, as `CachePolicy.admit` tells it."""

    def kept(self) -> set[int]: ...


class _SlowLru:
    """The kept are the last `capacity` different experts of the history."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.history: list[int] = []

    def kept(self) -> set[int]:
        recent: list[int] = []
        for expert in reversed(self.history):
            if expert not in recent:
                recent.append(expert)
        return set(recent[: self.capacity])

    def use(self, expert: int) -> int | None:
        before = self.kept()
        self.history.append(expert)
        if self.capacity == 0:
            return expert
        gone = before - self.kept()
        return gone.pop() if gone else None


class _SlowScored:
    """Scores each expert by its uses in the history, whose worth a subclass tells; the least score leaves."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.history: list[int] = []
        self.inside: set[int] = set()

    def kept(self) -> set[int]:
        return set(self.inside)

    def score(self, expert: int) -> Fraction | float:
        raise NotImplementedError

    def last_use(self, expert: int) -> int:
        return max(i for i, e in enumerate(self.history) if e == expert)

    def use(self, expert: int) -> int | None:
        self.history.append(expert)
        if expert in self.inside:
            return None
        if self.capacity == 0:
            return expert
        victim = None
        if len(self.inside) == self.capacity:
            victim = min(self.inside, key=lambda e: (self.score(e), self.last_use(e)))
            self.inside.remove(victim)
        self.inside.add(expert)
        return victim


class _SlowMix(_SlowScored):
    """Each use is worth 2 to the power of -age / half life."""

    def __init__(self, capacity: int, half_life: float):
        super().__init__(capacity)
        self.half_life = half_life

    def score(self, expert: int) -> float:
        now = len(self.history)
        return fsum(2.0 ** (-(now - i) / self.half_life) for i, e in enumerate(self.history) if e == expert)


class _SlowLfu(_SlowScored):
    """Each use is worth half for every full period that ended since."""

    def __init__(self, capacity: int, period: int):
        super().__init__(capacity)
        self.period = period

    def score(self, expert: int) -> Fraction:
        halvings = len(self.history) // self.period
        uses = (i for i, e in enumerate(self.history, start=1) if e == expert)
        return sum((Fraction(1, 2 ** (halvings - (i - 1) // self.period)) for i in uses), Fraction(0))


def _routes(steps: int) -> list[int]:
    """Experts by a seed that is printed: some far more often than others, with runs and changes of fashion."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    draw = random.Random(seed)
    routes: list[int] = []
    while len(routes) < steps:
        weights = [draw.random() ** 3 for _ in range(EXPERTS)]
        routes += draw.choices(range(EXPERTS), weights, k=draw.randrange(1, 200))
    return routes[:steps]


def _compare(policy: CachePolicy, oracle: _Oracle, routes: list[int]) -> int:
    """Both see the same uses; the number of hits."""
    hits = 0
    for expert in routes:
        assert (expert in policy) == (expert in oracle.kept())
        if expert in policy:
            policy.touch(expert)
            assert oracle.use(expert) is None
            hits += 1
        else:
            assert policy.admit(expert) == oracle.use(expert)
        kept = {e for e in range(EXPERTS) if e in policy}
        assert kept == oracle.kept()
        assert len(kept) <= policy.capacity
    return hits


@pytest.mark.parametrize("capacity", [0, 1, 2, 4, EXPERTS - 1, EXPERTS, EXPERTS + 3])
def test_lru_keeps_the_last_different_experts(capacity: int) -> None:
    routes = _routes(STEPS)
    for start in range(0, STEPS, 250):  # the oracle's time grows with the history's length
        _compare(LruPolicy(capacity), _SlowLru(capacity), routes[start : start + 250])


@pytest.mark.parametrize("period", [1, 7, 64])
@pytest.mark.parametrize("capacity", [0, 1, 2, 4, EXPERTS - 1, EXPERTS, EXPERTS + 3])
def test_lfu_keeps_the_most_used_with_fading_fame(capacity: int, period: int) -> None:
    routes = _routes(STEPS // 2)
    for start in range(0, len(routes), 200):
        _compare(LfuPolicy(capacity, period), _SlowLfu(capacity, period), routes[start : start + 200])


@pytest.mark.parametrize("half_life", [1, 2, 5.5, 64])
@pytest.mark.parametrize("capacity", [0, 1, 2, 4, EXPERTS - 1, EXPERTS, EXPERTS + 3])
def test_mix_keeps_whose_uses_are_worth_most(capacity: int, half_life: float) -> None:
    routes = _routes(STEPS // 2)
    for start in range(0, len(routes), 200):
        _compare(MixPolicy(capacity, half_life), _SlowMix(capacity, half_life), routes[start : start + 200])


def _same(policy: CachePolicy, other: CachePolicy) -> None:
    """Both decide alike on a long random history."""
    for expert in _routes(STEPS):
        assert (expert in policy) == (expert in other)
        if expert in policy:
            policy.touch(expert)
            other.touch(expert)
        else:
            assert policy.admit(expert) == other.admit(expert)


@pytest.mark.parametrize("capacity", [0, 1, 3, EXPERTS])
def test_a_mix_of_half_life_1_is_lru(capacity: int) -> None:
    """Exactly, through thousands of rescalings: where rounding makes scores equal, the last use decides."""
    _same(MixPolicy(capacity, 1), LruPolicy(capacity))


@pytest.mark.parametrize("capacity", [0, 1, 3, EXPERTS])
def test_a_mix_that_never_forgets_is_lfu_without_ageing(capacity: int) -> None:
    _same(MixPolicy(capacity, 1e300), LfuPolicy(capacity, period=10 * STEPS))


def test_the_recent_outweighs_the_frequent_after_some_half_lives() -> None:
    """Eight uses in a row, then h uses of others for each halving: the eight are worth less than one after three."""
    for half_lives, leaves in ((2, 1), (4, 0)):
        policy = MixPolicy(2, half_life=10)
        for expert in (0, 1):
            policy.admit(expert)
        for _ in range(8):
            policy.touch(0)
        for _ in range(10 * half_lives):
            policy._note(7)
        policy.touch(1)
        assert policy.admit(2) == leaves


@pytest.mark.parametrize("capacity", [0, 1, 3, EXPERTS])
def test_a_static_set_fills_at_first_use_and_never_changes(capacity: int) -> None:
    order = random.sample(range(EXPERTS), EXPERTS)
    policy, hot, seen = StaticPolicy(capacity, order), set(order[:capacity]), set()
    for expert in _routes(300):
        if expert in policy:
            policy.touch(expert)
        else:
            assert policy.admit(expert) == (None if expert in hot else expert)
        seen.add(expert)
        assert {e for e in range(EXPERTS) if e in policy} == hot & seen


@pytest.mark.parametrize("name", POLICIES)
def test_with_room_for_all_nobody_leaves_and_each_comes_once(name: str) -> None:
    policy = Rule(name, hot=HOT).make(0, EXPERTS)
    routes = _routes(STEPS)
    admitted = [e for e in routes if e not in policy and policy.admit(e) is None]
    assert sorted(admitted) == sorted(set(routes))


@pytest.mark.parametrize("name", POLICIES)
def test_without_room_nobody_stays(name: str) -> None:
    policy = Rule(name, hot=HOT).make(0, 0)
    for expert in _routes(300):
        assert policy.admit(expert) == expert
        assert expert not in policy


def test_old_fame_fades() -> None:
    """An expert used 100 times long ago leaves before one used 3 times of late."""
    policy = LfuPolicy(2, period=8)
    policy.admit(0)
    for _ in range(100):
        policy.touch(0)
    for _ in range(15):
        policy.admit(1) if 1 not in policy else policy.touch(1)
        policy.admit(2) if 2 not in policy else policy.touch(2)
    assert {e for e in range(3) if e in policy} == {1, 2}


def test_fame_outlives_absence() -> None:
    """An expert that left and returns has its old count: it stays when a newcomer must be made room for."""
    policy = LfuPolicy(2, period=1000)
    for expert in (0, 1):
        policy.admit(expert)
    policy.touch(0)
    assert policy.admit(2) == 1
    policy.touch(2)
    policy.touch(2)
    assert policy.admit(1) == 0
    assert policy.admit(0) == 1


def test_fame_never_runs_out_of_numbers() -> None:
    policy = LfuPolicy(2, period=1)
    policy.admit(0)
    for _ in range(5000):
        policy.touch(0)
    assert policy.admit(1) is None
    assert policy.admit(2) in (0, 1)


def test_an_unknown_policy_lists_the_known_ones() -> None:
    with pytest.raises(DocumentError, match="unknown cache policy 'fifo'; known: learned, lfu, lru, mix, static"):
        Rule("fifo").make(0, 2)


@pytest.mark.parametrize("name", POLICIES)
def test_layers_do_not_share_a_policy(name: str) -> None:
    first, second = (Rule(name, hot=((3, 4), (3, 5))).make(layer, 2) for layer in range(2))
    first.admit(3)
    assert 3 not in second


def test_policies_need_no_torch() -> None:
    script = "import sys, moeflow.offload.policy, moeflow.offload.traffic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
