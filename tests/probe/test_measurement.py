"""A rate is the median of passes, its spread their middle half, and slow passes end it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moeflow.probe.measurement import LEAST, REPEATS, SECONDS, repeat, spread_of


def passes(*seconds: float) -> tuple[Callable[[], float], list[float]]:
    left = list(seconds)
    return lambda: left.pop(0), left


def test_the_median_counts_and_the_first_pass_does_not() -> None:
    timed, left = passes(100.0, 0.25, 1.0, 0.05, 0.05, 0.5)
    found = repeat(1000, timed, repeats=5)
    assert left == []
    assert found.rate == pytest.approx(1000 / 0.25)
    # rates 1000, 2000, 4000, 20000, 20000: the quarters are 2000 and 20000
    assert found.spread == pytest.approx(18000 / 4000)


def test_equal_passes_have_no_spread_and_a_single_one_says_none() -> None:
    assert repeat(10, lambda: 0.125).spread == 0
    assert spread_of([5.0]) == 0


def test_slow_passes_end_it_but_not_before_there_is_a_median() -> None:
    timed, left = passes(*[SECONDS] * 9)
    assert repeat(10, timed).rate == pytest.approx(10 / SECONDS)
    assert len(left) == 9 - 1 - LEAST
    timed, left = passes(*[SECONDS / 5] * 9)
    repeat(10, timed)
    assert len(left) == 9 - 1 - 5


def test_progress_is_told_in_bytes() -> None:
    told: list[tuple[str, int, int]] = []
    repeat(7, lambda: 0.01, "doing it", lambda *report: told.append(report))
    assert told == [("doing it", 7 * n, 7 * REPEATS) for n in range(1, REPEATS + 1)]
