"""Which experts a layer keeps: small plain classes, used by the live cache and as the oracle of faster ones.

A policy knows expert ids and nothing of buffers, devices or torch.
"""

from __future__ import annotations

from typing import Protocol

from moeflow.errors import DocumentError, unknown

__all__ = ["CachePolicy", "LruPolicy", "LfuPolicy", "make_policy", "POLICIES"]


class CachePolicy(Protocol):
    """The experts that one layer keeps, and who leaves next."""

    capacity: int

    def __contains__(self, expert: int) -> bool: ...

    def touch(self, expert: int) -> None:
        """Note the use of a kept expert."""

    def admit(self, expert: int) -> int | None:
        """Keep `expert` and return who leaves: None while there is room, `expert` itself at capacity 0."""


class LruPolicy:
    """Least recently used leaves (paper, section 3.1)."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._order: dict[int, None] = {}  # least recent first

    def __contains__(self, expert: int) -> bool:
        return expert in self._order

    def touch(self, expert: int) -> None:
        """Note the use of a kept expert."""
        del self._order[expert]
        self._order[expert] = None

    def admit(self, expert: int) -> int | None:
        """Keep `expert` and return who leaves."""
        if self.capacity == 0:
            return expert
        victim = next(iter(self._order)) if len(self._order) == self.capacity else None
        if victim is not None:
            del self._order[victim]
        self._order[expert] = None
        return victim


class LfuPolicy:
    """Least frequently used leaves; counts of all experts halve every `period` uses, so that old fame fades.

    Ties leave in the order of their last use. Counts are kept for experts that left, too: an expert that
    returns often must not start from nothing each time.
    """

    def __init__(self, capacity: int, period: int = 64):
        self.capacity = capacity
        self.period = period
        self._counts: dict[int, float] = {}
        self._kept: dict[int, None] = {}  # least recent first
        self._uses = 0

    def __contains__(self, expert: int) -> bool:
        return expert in self._kept

    def touch(self, expert: int) -> None:
        """Note the use of a kept expert."""
        del self._kept[expert]
        self._kept[expert] = None
        self._count(expert)

    def admit(self, expert: int) -> int | None:
        """Keep `expert` and return who leaves."""
        self._count(expert)
        if self.capacity == 0:
            return expert
        victim = None
        if len(self._kept) == self.capacity:
            victim = min(self._kept, key=lambda e: self._counts[e])  # min keeps the first of equals
            del self._kept[victim]
        self._kept[expert] = None
        return victim

    def _count(self, expert: int) -> None:
        self._counts[expert] = self._counts.get(expert, 0.0) + 1.0
        self._uses += 1
        if self._uses % self.period == 0:
            self._counts = {e: count / 2 for e, count in self._counts.items()}


POLICIES: dict[str, type[LruPolicy] | type[LfuPolicy]] = {"lru": LruPolicy, "lfu": LfuPolicy}


def make_policy(name: str, capacity: int) -> CachePolicy:
    """A fresh policy for one layer with `capacity` slots."""
    if name not in POLICIES:
        raise DocumentError(unknown("cache policy", name, POLICIES))
    return POLICIES[name](capacity)
