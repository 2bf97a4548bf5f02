"""Slots shared out between layers so that what their misses copy is least, from hit curves of a trace.

Each layer has a curve, hits by number of slots, and what a miss costs: its blob. Room goes step by step to where it
saves most a byte of room, a step being as many slots of one layer as make that greatest. Seen over all steps that is a
walk along the upper concave hulls of the curves, steepest first. It is optimal as long as every step fits: a hull is
never below its curve, the walk's sum is the most that hulls allow for the room it has used, and at its corners hulls
and curves meet. Only when a step does not fit any more may something be lost: then the best of the smaller ones is
taken, and what all of that loses is less than the first step that did not fit would have saved. An even split, which by
luck of such an end can be better, is kept then, so the result is never worse than even.

Nothing is known here of policies, traces or memory. That the curves of one text hold for another is the caller's hope.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["quotas", "saved"]

Hits = npt.NDArray[np.float64]


def quotas(hits: Hits, even: Sequence[int], nbytes: Sequence[int], most: Sequence[int]) -> list[int]:
    """Slots of each layer [L], in the room that `even` takes; of slots of one size, as many.

    Args:
        hits: [L, E + 1], of each layer with 0 to E slots; not falling.
        even: slots of each layer [L] whose room is shared out anew.
        nbytes: of a slot, which is also what a miss of the layer costs, [L].
        most: slots that a layer may have [L], E or fewer.
    """
    found = [0] * len(even)
    left = sum(k * n for k, n in zip(even, nbytes, strict=True))
    steps = [(0.0, left + 1)] * len(even)  # of each layer the next, in hits a slot and slots: none of these fits
    while True:
        for i, (_, slots) in enumerate(steps):
            if slots * nbytes[i] > left:
                steps[i] = _step(hits[i, found[i] : most[i] + 1], left // nbytes[i])
        able = [i for i, (_, slots) in enumerate(steps) if slots]
        if not able:
            break
        # A miss costs as many bytes as a slot takes: what a byte of room saves is what a slot hits.
        best = max(able, key=lambda i: (steps[i][0], -found[i]))
        found[best] += steps[best][1]
        left -= steps[best][1] * nbytes[best]
        steps[best] = _step(hits[best, found[best] : most[best] + 1], left // nbytes[best])
    return found if saved(hits, found, nbytes) >= saved(hits, even, nbytes) else list(even)


def saved(hits: Hits, slots: Sequence[int], nbytes: Sequence[int]) -> float:
    """Bytes that hits do not copy."""
    return float(sum(row[k] * n for row, k, n in zip(hits, slots, nbytes, strict=True)))


def _step(curve: Hits, room: int) -> tuple[float, int]:
    """The steepest way up from a curve's start, in hits a slot and in slots; (0, 0) where there is no room."""
    rise = curve[1 : room + 1] - curve[0]
    if not len(rise):
        return 0.0, 0
    slopes = rise / np.arange(1, len(rise) + 1)
    best = float(slopes.max())
    return (best, int(np.flatnonzero(slopes == best)[-1]) + 1) if best > 0 else (0.0, 1)
