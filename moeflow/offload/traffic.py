"""Counts of what the link carried and why, and of what the CPU computed instead: the basis of printed statistics."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Traffic"]


@dataclass
class Traffic:
    """Counters since the start, or of an interval (the difference of two)."""

    hits: int = 0
    """Expert uses that found the expert in the cache."""
    misses: int = 0
    """Expert uses that had to wait for a copy made on demand."""
    guesses: int = 0
    """Copies started on a guess."""
    guesses_used: int = 0
    """Expert uses served by such a copy."""
    missed_bytes: int = 0
    guessed_bytes: int = 0
    streamed_bytes: int = 0
    """Copied in whole layers: prefill, and the naive strategy."""
    computed_bytes: int = 0
    """Missed and not copied: multiplied by the CPU where they lie."""

    @property
    def uses(self) -> int:
        """Expert uses that went through the cache."""
        return self.hits + self.misses + self.guesses_used

    @property
    def hit_rate(self) -> float:
        """Share of uses found in the cache; 0 where the cache was never asked."""
        return self.hits / self.uses if self.uses else 0.0

    @property
    def moved_bytes(self) -> int:
        """All bytes over the link."""
        return self.missed_bytes + self.guessed_bytes + self.streamed_bytes

    def copy(self) -> Traffic:
        """The counters as they stand."""
        return Traffic(**{f.name: getattr(self, f.name) for f in fields(self)})

    def since(self, earlier: Traffic) -> Traffic:
        """What was added after `earlier`."""
        return Traffic(**{f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)})
