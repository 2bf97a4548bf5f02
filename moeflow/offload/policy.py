"""Which experts a layer keeps: small plain classes, used by the live cache and as the oracle of faster ones.

A policy knows expert ids and nothing of buffers, devices or torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

from moeflow.errors import DocumentError, unknown
from moeflow.schema.profile import HALF_LIFE, Policy

__all__ = [
    "CachePolicy",
    "FADING",
    "LearnedPolicy",
    "LfuPolicy",
    "LruPolicy",
    "MixPolicy",
    "POLICIES",
    "RESCALE",
    "SHARE",
    "Rule",
    "StaticPolicy",
    "growth",
]

POLICIES: tuple[str, ...] = tuple(name for name in get_args(Policy) if name != "learned")
"""Those that routes alone decide; `learned` needs hidden states."""
RESCALE = 2.0**32  # of a mix's weights; cache.cu's
FADING = 2.0 ** (-1 / 64)  # of the shares of use that learned scores are added to, per step
SHARE = 0.5  # what such a share counts; cache.cu's


class CachePolicy(Protocol):
    """The experts that one layer keeps, and who leaves next."""

    capacity: int

    def __contains__(self, expert: int) -> bool: ...

    def touch(self, expert: int) -> None:
        """Note the use of a kept expert."""

    def admit(self, expert: int) -> int | None:
        """Keep `expert` and return who leaves: None while there is room, `expert` itself at capacity 0."""

    def see(self, expert: int) -> None:
        """Note the use of an expert that is not kept and does not come in."""

    def wish(self, expert: int) -> float:
        """What an expert that is not kept would be kept for, the greater the more."""


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

    def see(self, expert: int) -> None:
        """Only kept experts have an order."""

    def wish(self, expert: int) -> float:
        """The same for all."""
        del expert
        return 0.0


class _Scored:
    """The least score leaves; ties leave in the order of their last use.

    Scores are kept of experts that left, too: one that returns often must not start from nothing each time.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._scores: dict[int, float] = {}
        self._kept: dict[int, None] = {}  # least recent first

    def __contains__(self, expert: int) -> bool:
        return expert in self._kept

    def touch(self, expert: int) -> None:
        """Note the use of a kept expert."""
        del self._kept[expert]
        self._kept[expert] = None
        self._note(expert)

    def admit(self, expert: int) -> int | None:
        """Keep `expert` and return who leaves."""
        self._note(expert)
        if self.capacity == 0:
            return expert
        victim = None
        if len(self._kept) == self.capacity:
            victim = min(self._kept, key=self._scores.__getitem__)  # min keeps the first of equals
            del self._kept[victim]
        self._kept[expert] = None
        return victim

    def see(self, expert: int) -> None:
        """Note the use of an expert that does not come in."""
        self._note(expert)

    def wish(self, expert: int) -> float:
        """Its score."""
        return self._scores.get(expert, 0.0)

    def _note(self, expert: int) -> None:
        raise NotImplementedError

    def _scale(self, factor: float) -> None:
        self._scores = {e: score * factor for e, score in self._scores.items()}


class LfuPolicy(_Scored):
    """Least frequently used leaves; counts of all experts halve every `period` uses, so that old fame fades."""

    def __init__(self, capacity: int, period: int = 64):
        super().__init__(capacity)
        self.period = period
        self._uses = 0

    def _note(self, expert: int) -> None:
        self._scores[expert] = self._scores.get(expert, 0.0) + 1.0
        self._uses += 1
        if self._uses % self.period == 0:
            self._scale(0.5)


class MixPolicy(_Scored):
    """Recency and frequency in one score: the sum over an expert's uses of 2 to the power of -age / half life.

    (Lee and others, "LRFU", 2001.) Age counts the layer's uses since then, of whichever expert, of which a token makes
    top-k. A half life of 1 is the least recently used: all older uses together weigh no more than one newer. A very
    long one is the least frequently used that never forgets.

    Instead of letting all scores fade at each use, each use weighs more than the one before, by a factor that is
    computed once; now and then all is scaled down by a power of two, which rounds nothing. So there is no power to
    take, and the device's kernel, which is given that factor, does the same additions and products: bit for bit.
    """

    def __init__(self, capacity: int, half_life: float = HALF_LIFE):
        super().__init__(capacity)
        self._weight = 1.0
        self._growth = growth(half_life)

    def _note(self, expert: int) -> None:
        self._scores[expert] = self._scores.get(expert, 0.0) + self._weight
        self._weight *= self._growth
        if self._weight >= RESCALE:
            self._weight /= RESCALE
            self._scale(1 / RESCALE)


class StaticPolicy:
    """A fixed set: its experts come in at their first use and stay, and nobody else is ever kept."""

    def __init__(self, capacity: int, hot: Sequence[int]):
        self.capacity = capacity
        self._hot = frozenset(hot[:capacity])
        self._kept: set[int] = set()

    def __contains__(self, expert: int) -> bool:
        return expert in self._kept

    def touch(self, expert: int) -> None:
        """Use changes nothing."""

    def admit(self, expert: int) -> int | None:
        """Keep `expert` if it is of the set; else it leaves at once."""
        if expert not in self._hot:
            return expert
        self._kept.add(expert)
        return None

    def see(self, expert: int) -> None:
        """Use changes nothing."""

    def wish(self, expert: int) -> float:
        """Whether it is of the set."""
        return float(expert in self._hot)


class LearnedPolicy:
    """Whoever scores least leaves; scores come from outside, before each step, and say who will be used again soon.

    To a score, half of the expert's share of the last steps is added, of a half life of 64: what a map fitted to one
    text knows less well than the cache itself (docs/predictors.md has what it brings). What comes in may leave at once.
    Of equal sums the lower expert id leaves. Each operation is one of the device's kernel, so that both decide alike.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._scores: Sequence[float] = ()
        self._shares: dict[int, float] = {}
        self._kept: set[int] = set()

    def __contains__(self, expert: int) -> bool:
        return expert in self._kept

    def judge(self, scores: Sequence[float]) -> None:
        """A step begins; take the scores of all experts of the layer."""
        self._scores = scores
        self._shares = {expert: share * FADING for expert, share in self._shares.items()}

    def touch(self, expert: int) -> None:
        """Note the use of a kept expert."""
        self._shares[expert] = self._shares.get(expert, 0.0) + (1.0 - FADING)

    def admit(self, expert: int) -> int | None:
        """Keep `expert` and return who leaves, `expert` itself if it scores least."""
        self.touch(expert)
        if self.capacity == 0:
            return expert
        self._kept.add(expert)
        if len(self._kept) <= self.capacity:
            return None
        victim = min(self._kept, key=lambda e: (self._worth(e), e))
        self._kept.remove(victim)
        return victim

    def see(self, expert: int) -> None:
        """Note the use of an expert that does not come in."""
        self.touch(expert)

    def wish(self, expert: int) -> float:
        """Its score and its share."""
        return self._worth(expert)

    def _worth(self, expert: int) -> float:
        return (self._scores[expert] if self._scores else 0.0) + SHARE * self._shares.get(expert, 0.0)


def growth(half_life: float) -> float:
    """By which factor a use weighs more than the one before, so that weights double in `half_life` uses."""
    return float(2.0 ** (1.0 / half_life))


@dataclass(frozen=True)
class Rule:
    """A policy chosen, with what it must be told."""

    name: str = "lru"
    half_life: float = HALF_LIFE
    """Of mix, in uses; 1 or more."""
    hot: tuple[tuple[int, ...], ...] = ()
    """Of static, per layer: its experts, those first that a smaller cache would keep, too."""

    @property
    def label(self) -> str:
        """For people: `mix 16`."""
        return f"{self.name} {self.half_life:g}" if self.name == "mix" else self.name

    def make(self, layer: int, capacity: int) -> CachePolicy:
        """A fresh policy for one layer with `capacity` slots.

        Raises:
            DocumentError: the policy is unknown.
        """
        if self.name not in get_args(Policy):
            raise DocumentError(unknown("cache policy", self.name, get_args(Policy)))
        if self.name == "mix":
            return MixPolicy(capacity, self.half_life)
        if self.name == "static":
            return StaticPolicy(capacity, self.hot[layer])
        if self.name == "learned":
            return LearnedPolicy(capacity)
        return LruPolicy(capacity) if self.name == "lru" else LfuPolicy(capacity)
