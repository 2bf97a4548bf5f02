"""What a learned predictor says of itself: whose routers it foresees, and how well it did on text it was not fitted to.

Its matrices lie beside it in the file (`moeflow.artifact.predictors`). There is no text in it, and no token.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from moeflow.schema.base import Document, Part

__all__ = ["PredictorCard", "Recall", "ReuseHits"]

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Recall(Part):
    """Of the experts that a token uses, the share that was among those guessed; the mean of all layers guessed."""

    depth: Count
    """Layers ahead."""
    fetched: Count
    """Guesses a layer."""
    learned: Share
    gate: Share | None
    """The coming layer's own router on the same hidden states; None where it cannot be applied out of turn."""


class ReuseHits(Part):
    """Share of uses that found their expert in one of k slots, from an empty cache; the mean of all layers."""

    k: Count
    lru: Share
    learned: Share
    optimum: Share

    @property
    def closed(self) -> float:
        """The part of the way from least recently used to the optimum."""
        return (self.learned - self.lru) / (self.optimum - self.lru) if self.optimum > self.lru else 0.0


class PredictorCard(Document):
    """The head of a predictor's file."""

    kind: ClassVar[str] = "predictor"

    model: str
    """For people."""
    routers: str
    """SHA-256 of the routers' weights: of two trainings of one architecture it belongs to one."""
    hidden: Count
    """Width of the hidden states."""
    experts: tuple[Count, ...]
    """Per MoE layer."""
    depth: Count
    """Guesses reach so many layers ahead."""
    reuse: Share
    """A use one token later counts so much less than the one before it."""
    tokens: Count
    """That it was fitted to."""
    held_out: int = Field(ge=0)
    """Tokens that follow them in the text, on which it was judged."""
    recalls: tuple[Recall, ...] = ()
    hits: tuple[ReuseHits, ...] = ()
