"""What a replay of routes found: hits per layer for each policy and number of slots, and what guesses were worth.

Counts are stored; shares follow by properties, so that no two figures of a document can disagree.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from moeflow.schema.base import Document, Part

__all__ = ["Guessing", "SimulatedRow", "Simulation", "Timing"]

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Guessing(Part):
    """What is copied before it is asked for."""

    predictor: Literal["recall", "previous"]
    """`recall`: each guess is right with that probability, in place of the next layer's gate, which needs hidden states
    that routes do not have. `previous`: what the token before used in that layer."""
    recall: Annotated[float, Field(ge=0, le=1)] | None = None
    experts: Positive
    """Guessed per layer."""
    depth: Positive
    """Layers ahead; a guess is the same at every distance."""
    staging: Positive
    """Buffers in which copies land, over all layers."""


class SimulatedRow(Part):
    """One policy at one number of slots."""

    policy: Literal["lru", "lfu", "mix", "static", "optimum"]
    half_life: float | None = Field(default=None, exclude_if=lambda uses: uses is None)
    """Of mix, in uses."""
    k: Count
    """Slots per layer; on average where quotas differ."""
    quotas: tuple[Count, ...] | None = Field(default=None, exclude_if=lambda slots: slots is None)
    """Slots of each layer, where they were shared out."""
    hits: tuple[Count, ...]
    """Per layer: uses that found their expert in a slot."""
    guesses: Count | None = None
    """Copies started on a guess; None where nothing was guessed."""
    guesses_used: Count | None = None
    """Uses served by such a copy."""

    @property
    def label(self) -> str:
        """For people: `mix 16`."""
        return self.policy if self.half_life is None else f"{self.policy} {self.half_life:g}"


class Timing(Part):
    """How fast a part of the replay went."""

    what: str
    """The policy, and whether with guesses."""
    steps: Positive
    """Tokens times layers, times numbers of slots where each takes a pass of its own."""
    seconds: Annotated[float, Field(gt=0)]

    @property
    def rate(self) -> float:
        """Steps a second: of one token, in one layer, at one number of slots; the optimum's are of all numbers."""
        return self.steps / self.seconds


class Simulation(Document):
    """One run of `moeflow simulate`."""

    kind: ClassVar[str] = "simulation"

    command: str
    model: str
    """Whose shape or router it is."""
    routing: Literal["uniform", "markov", "recorded"]
    seed: int | None = None
    """Of synthetic routes and of guesses."""
    tokens: Positive
    layers: Positive
    experts: Positive
    """Per layer."""
    top_k: Positive
    guessing: Guessing | None = None
    fit: str | None = Field(default=None, exclude_if=lambda name: name is None)
    """Trace that a static set and quotas were taken from; None where that were the replayed routes themselves."""
    rows: tuple[SimulatedRow, ...] = Field(min_length=1)
    timings: tuple[Timing, ...] = ()

    @property
    def uses(self) -> int:
        """Of experts in one layer."""
        return self.tokens * self.top_k

    def layer_hit_rates(self, row: SimulatedRow) -> list[float]:
        """Share of uses that were hits, per layer; the cache was empty at first."""
        return [hits / self.uses for hits in row.hits]

    def hit_rate(self, row: SimulatedRow) -> float:
        """The same over all layers."""
        return sum(row.hits) / (self.uses * self.layers)

    def served_rate(self, row: SimulatedRow) -> float:
        """Share of uses that found their expert in a slot, or brought by a guess."""
        return (sum(row.hits) + (row.guesses_used or 0)) / (self.uses * self.layers)

    def foreseen(self, row: SimulatedRow) -> float | None:
        """Share of the uses that were no hits which a guess had brought; None without guesses, or such uses."""
        missed = self.uses * self.layers - sum(row.hits)
        return row.guesses_used / missed if row.guesses_used is not None and missed else None

    def wasted(self, row: SimulatedRow) -> int | None:
        """Copies on a guess that nothing used."""
        if row.guesses is None or row.guesses_used is None:
            return None
        return row.guesses - row.guesses_used
