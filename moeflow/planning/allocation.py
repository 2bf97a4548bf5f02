"""Which width each unit gets so that errors are least and bytes stay within a budget: a pure function of numbers.

A unit is whatever is chosen for as a whole: an expert, or all experts of a layer. The task is a multiple-choice
knapsack. Of each unit's choices only those on the lower convex hull of (bytes, error) are used; the steps from one to
the next are taken in the order of what they save a byte, which is the sweep of a Lagrange multiplier from high to low.
A step that no longer fits ends its unit, and smaller steps of others fill what is left. This is done from the least
choice of every unit, and from every uniform choice that fits; the best result is kept.

What holds of the result:

* It never takes more than the budget, and its error is never above that of a uniform choice that fits.
* Its error is at most one step above `bound`, which no choice within the budget is below: the sweep from the least
  choices is optimal up to the first step that does not fit, and part of that step is all that a better choice can gain.
* A larger budget never has a larger error. Where more bytes change the outcome of one start, the first change is a
  step that now fits exactly: it saves at least as much a byte as all that it displaces, which took fewer bytes.

It knows no model: what errors, weights and sizes mean is `moeflow.planning.bits`' business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moeflow.errors import UsageError

__all__ = ["Allocation", "allocate"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Allocation:
    """One choice per unit."""

    choices: tuple[int, ...]
    nbytes: int
    error: float
    """Weighted sum over units."""
    bound: float
    """No choices within the budget have a smaller error."""


@dataclass(frozen=True)
class _Step:
    """From one choice of a unit to the next on its hull."""

    unit: int
    choice: int
    nbytes: int
    saved: float

    @property
    def slope(self) -> float:
        return self.saved / self.nbytes if self.nbytes else math.inf


def allocate(errors: Floats, weights: Floats, sizes: Ints, budget: int) -> Allocation:
    """Choose for every unit.

    Args:
        errors: [U, S], of each unit under each choice; 0 or more.
        weights: [U], how much a unit's error counts; 0 or more.
        sizes: [U, S], bytes in full.
        budget: bytes of all units together.

    Raises:
        UsageError: the budget is below the least bytes of all units.
    """
    weighted = errors * weights[:, None]
    # The least bytes; of equal ones, the least error.
    least = np.lexsort((weighted, sizes), axis=-1)[:, 0]  # [U]
    if budget < (smallest := _sum(sizes, least)):
        raise UsageError(f"the budget is {budget} bytes; the least choices take {smallest}")
    uniform = [np.full(len(sizes), choice) for choice in range(sizes.shape[1])]
    starts = [least, *(start for start in uniform if _sum(sizes, start) <= budget)]
    found = [_filled(_steps(weighted, sizes, start), start, budget - _sum(sizes, start)) for start in starts]
    best = min(found, key=lambda choices: _error(weighted, choices))
    bound = _bound(_steps(weighted, sizes, least), _error(weighted, least), budget - smallest)
    error = _error(weighted, best)
    return Allocation(tuple(map(int, best)), _sum(sizes, best), error, min(bound, error))


def _sum(sizes: Ints, choices: Ints) -> int:
    return int(sizes[np.arange(len(choices)), choices].sum())


def _error(weighted: Floats, choices: Ints) -> float:
    return math.fsum(weighted[np.arange(len(choices)), choices])


def _steps(weighted: Floats, sizes: Ints, start: Ints) -> list[_Step]:
    """Of every unit's hull from its `start` on, those first that save most a byte; those of one unit stay in order."""
    found: list[_Step] = []
    for unit, choice in enumerate(start.tolist()):
        found += _hull(unit, weighted[unit].tolist(), sizes[unit].tolist(), choice)
    return sorted(found, key=lambda step: -step.slope)


def _hull(unit: int, errors: Sequence[float], sizes: Sequence[int], start: int) -> list[_Step]:
    steps: list[_Step] = []
    now = start
    while True:
        onward = [
            _Step(unit, choice, sizes[choice] - sizes[now], errors[now] - errors[choice])
            for choice in range(len(sizes))
            if sizes[choice] >= sizes[now] and errors[choice] < errors[now]
        ]
        if not onward:
            return steps
        # Steepest; of those on one line the shortest, which leaves more to choose from.
        steps.append(max(onward, key=lambda step: (step.slope, -step.nbytes, step.saved)))
        now = steps[-1].choice


def _filled(steps: Sequence[_Step], start: Ints, room: int) -> Ints:
    """`start` with every step taken that fits in `room` bytes and follows those of its unit."""
    choices = start.copy()
    ended: set[int] = set()
    for step in steps:
        if step.unit in ended:
            continue
        if step.nbytes > room:
            ended.add(step.unit)
            continue
        choices[step.unit] = step.choice
        room -= step.nbytes
    return choices


def _bound(steps: Sequence[_Step], error: float, room: int) -> float:
    """The least error if a part of a step could be taken: all that fit, then the part that does of the next."""
    for step in steps:
        if step.nbytes > room:
            return error - step.saved * room / step.nbytes
        error -= step.saved
        room -= step.nbytes
    return error
