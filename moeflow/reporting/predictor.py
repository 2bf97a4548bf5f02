"""How well a learned predictor did, as text: guesses beside the next gate's, hits beside LRU's and the optimum's."""

from __future__ import annotations

from moeflow.reporting.cells import MISSING, Grid, fill, percent
from moeflow.reporting.text import aligned
from moeflow.schema import PredictorCard

__all__ = ["render"]

WIDTH = 100


def render(card: PredictorCard) -> str:
    """For a terminal; ends with a newline."""
    about = f"{card.model}: fitted to {card.tokens:,} tokens, judged on the {card.held_out:,} that follow."
    lines = fill(about, WIDTH)
    for grid in (_guesses(card), *([_hits(card)] if card.hits else [])):
        lines += ["", *aligned(grid)]
    return "\n".join(lines) + "\n"


def _guesses(card: PredictorCard) -> Grid:
    rows = tuple(
        (
            f"{recall.depth}",
            f"{recall.fetched}",
            _share(recall.gate),
            _share(recall.learned),
        )
        for recall in card.recalls
    )
    return Grid("layers ahead", ("layers ahead", "guesses", "next gate", "learned"), rows, 0)


def _hits(card: PredictorCard) -> Grid:
    rows = tuple(
        (f"k = {hits.k}", _share(hits.lru), _share(hits.learned), _share(hits.optimum), _share(hits.closed))
        for hits in card.hits
    )
    return Grid("hits", ("hits", "lru", "learned", "optimum", "of the way"), rows, 1)


def _share(value: float | None) -> str:
    return percent(value) or MISSING
