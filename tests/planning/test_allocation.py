"""Bit allocation against brute force on small random instances, and against what its docstring promises on larger."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
import pytest

from moeflow.errors import UsageError
from moeflow.planning.allocation import Allocation, Floats, Ints, allocate

ROUNDING = 1e-9  # of sums of floats in another order


@dataclass(frozen=True)
class Case:
    errors: Floats
    weights: Floats
    sizes: Ints

    @property
    def weighted(self) -> Floats:
        return self.errors * self.weights[:, None]

    @property
    def least(self) -> int:
        return int(self.sizes.min(axis=1).sum())

    @property
    def most(self) -> int:
        return int(self.sizes.max(axis=1).sum())

    @property
    def largest_step(self) -> float:
        """The most that one unit can save."""
        return float((self.weighted.max(axis=1) - self.weighted.min(axis=1)).max())

    def run(self, budget: int) -> Allocation:
        return allocate(self.errors, self.weights, self.sizes, budget)

    def of(self, choices: tuple[int, ...]) -> tuple[int, float]:
        rows = np.arange(len(choices))
        return int(self.sizes[rows, choices].sum()), float(self.weighted[rows, choices].sum())

    def optimum(self, budget: int) -> float:
        choices = itertools.product(range(self.sizes.shape[1]), repeat=len(self.sizes))
        return min(error for nbytes, error in map(self.of, choices) if nbytes <= budget)


@pytest.fixture
def draw() -> np.random.Generator:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return np.random.default_rng(seed)


def falling(draw: np.random.Generator, units: int, schemes: int) -> Case:
    """As quantizers are: more bytes, less error, all units of a few sizes."""
    bits = np.sort(draw.choice(np.arange(2, 9), schemes, replace=False))
    sizes = bits[None, :] * draw.choice([1024, 4096], (units, 1))
    errors = draw.exponential(size=(units, 1)) * 4.0**-bits * draw.uniform(0.5, 2, (units, schemes))
    return Case(np.sort(errors)[:, ::-1], draw.exponential(size=units), sizes.astype(np.int64))


def wild(draw: np.random.Generator, units: int, schemes: int) -> Case:
    """Anything: errors that rise with bytes, equal sizes, weights of 0, whole numbers that tie."""
    weights = draw.integers(0, 4, units).astype(float)
    return Case(draw.integers(0, 9, (units, schemes)).astype(float), weights, draw.integers(0, 9, (units, schemes)))


KINDS = pytest.mark.parametrize("kind", [falling, wild], ids=lambda kind: kind.__name__)


@KINDS
def test_small_instances_against_brute_force(kind: object, draw: np.random.Generator) -> None:
    for _ in range(60):
        case: Case = kind(draw, int(draw.integers(1, 6)), int(draw.integers(1, 5)))  # type: ignore[operator]
        budget = int(draw.integers(case.least, case.most + 1))
        found, optimum = case.run(budget), case.optimum(budget)
        nbytes, error = case.of(found.choices)
        slack = ROUNDING * (1 + optimum)
        assert nbytes == found.nbytes <= budget
        assert error == pytest.approx(found.error)
        assert found.bound - slack <= optimum <= found.error + slack
        assert found.error <= optimum + case.largest_step + slack
        assert found.error <= found.bound + case.largest_step + slack


@KINDS
def test_the_gap_is_small_where_units_are_many(kind: object, draw: np.random.Generator) -> None:
    """At most one step of one unit above what no choice is below, whatever the number of units."""
    case: Case = kind(draw, 400, 4)  # type: ignore[operator]
    for budget in draw.integers(case.least, case.most + 1, 20).tolist():
        found = case.run(budget)
        assert found.nbytes <= budget
        assert found.bound <= found.error <= found.bound + case.largest_step + ROUNDING * (1 + found.error)


@KINDS
def test_never_worse_than_a_uniform_choice_that_fits(kind: object, draw: np.random.Generator) -> None:
    for _ in range(40):
        case: Case = kind(draw, int(draw.integers(1, 12)), 4)  # type: ignore[operator]
        for choice in range(4):
            nbytes, error = case.of((choice,) * len(case.sizes))
            for budget in (nbytes, nbytes + 1, nbytes + 3000):
                assert case.run(budget).error <= error * (1 + ROUNDING)


@KINDS
def test_more_bytes_are_never_worse(kind: object, draw: np.random.Generator) -> None:
    for _ in range(10):
        case: Case = kind(draw, int(draw.integers(2, 9)), 4)  # type: ignore[operator]
        budgets = np.unique(np.linspace(case.least, case.most, 60).astype(int)).tolist()
        errors = [case.run(budget).error for budget in budgets]
        assert all(after <= before * (1 + ROUNDING) for before, after in itertools.pairwise(errors))
        assert errors[-1] == pytest.approx(case.weighted.min(axis=1).sum())


def test_the_same_numbers_give_the_same_choices(draw: np.random.Generator) -> None:
    case = falling(draw, 50, 4)
    budget = (case.least + case.most) // 2
    before = [case.errors.copy(), case.weights.copy(), case.sizes.copy()]
    assert case.run(budget) == case.run(budget)
    assert all(map(np.array_equal, before, (case.errors, case.weights, case.sizes))), "and are left as they were"


def test_what_counts_more_gets_more() -> None:
    errors, sizes = np.array([[4.0, 1.0]] * 2), np.array([[1, 2]] * 2)
    assert allocate(errors, np.array([1.0, 3.0]), sizes, 3).choices == (0, 1)
    assert allocate(errors, np.array([3.0, 1.0]), sizes, 3).choices == (1, 0)


def test_a_smaller_step_fills_what_a_larger_one_leaves() -> None:
    """The second unit's step saves less a byte, but fits."""
    found = allocate(np.array([[10.0, 0.0], [3.0, 1.0]]), np.ones(2), np.array([[1, 6], [1, 3]]), 5)
    assert (found.choices, found.nbytes, found.error) == ((0, 1), 4, 11.0)
    assert found.bound == 13 - 10 * 3 / 5


def test_a_uniform_choice_is_kept_where_steps_would_miss_it() -> None:
    """Both steps of the first unit are steeper, and take the bytes without which the second's does not fit."""
    errors, sizes = np.array([[20.0, 10.0, 0.0], [12.0, 0.0, 0.0]]), np.array([[1, 2, 4], [1, 4, 5]])
    found = allocate(errors, np.ones(2), sizes, 6)
    assert (found.choices, found.error, found.bound) == ((1, 1), 10.0, 8.0)


def test_a_budget_below_the_least_choices_is_refused() -> None:
    with pytest.raises(UsageError, match="the budget is 3 bytes; the least choices take 4"):
        allocate(np.ones((2, 2)), np.ones(2), np.array([[2, 3], [2, 9]]), 3)
