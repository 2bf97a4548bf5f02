"""What repeated passes say: a rate, and how far the passes lay apart.

The first pass is thrown away and the median of the rest counts, since a busy machine has slow outliers and a rate has
no fast ones. Passes end after a time limit: a slow link or disk is measured on fewer. It moves no bytes itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moeflow.progress import Progress, silent

__all__ = ["REPEATS", "SECONDS", "Measurement", "repeat", "spread_of"]

REPEATS = 9
LEAST = 3  # passes, however slow
SECONDS = 2.0  # for the passes of one measurement together


@dataclass(frozen=True)
class Measurement:
    """A rate as it was measured."""

    rate: float
    """Bytes a second."""
    spread: float
    """Interquartile range of the passes' rates over their median."""


def repeat(
    nbytes: int, timed: Callable[[], float], description: str = "", progress: Progress = silent, repeats: int = REPEATS
) -> Measurement:
    """Measure passes that move `nbytes` each; `timed` makes one and returns its seconds."""
    timed()  # wakes clocks, fills translation caches
    seconds: list[float] = []
    while len(seconds) < repeats and (len(seconds) < LEAST or sum(seconds) < SECONDS):
        seconds.append(timed())
        progress(description, len(seconds) * nbytes, repeats * nbytes)
    return Measurement(nbytes / statistics.median(seconds), spread_of([nbytes / s for s in seconds]))


def spread_of(rates: Sequence[float]) -> float:
    """The interquartile range of `rates` over their median; 0 for a single one."""
    if len(rates) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
    return (high - low) / middle
