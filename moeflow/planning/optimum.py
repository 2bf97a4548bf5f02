"""Belady's optimum: the most hits that any cache of k slots a layer could have had on given routes, for every k.

What it bounds: any policy, clairvoyant ones included, under the live cache's rules. A step needs its K experts at once
and hits those that are kept when it begins. What is kept after it are at most k of the experts kept before it and the
step's own: nothing enters a slot that is not used, and a policy need not keep what was used. Guesses change nothing
about that, since they land outside the slots until they are used; so hits in slots are bounded with guesses, too, and
uses served by a guess are not. Layers have slots of their own: what moving slots between layers would gain is not
bounded.

Why it is the most: a hit is an interval, from one use of an expert to the next, through which a slot keeps it, and k
slots serve any set of intervals of which no moment sees more than k. Whenever there are more, giving up the one that
ends last is best (Carlisle and Lloyd, "On the k-coloring of intervals", 1995). So the kept are always those k of the
candidates that are used soonest. That order is the same for every k; hence the kept of k slots are among those of
k + 1, and one stack holds the caches of all k (Mattson and others, "Evaluation techniques for storage hierarchies",
1970): its first k entries are what k slots keep.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappushpop

import numpy as np
import numpy.typing as npt

from moeflow.offload.trace import Routes

__all__ = ["optimal_hits"]


def optimal_hits(routes: Routes, experts: int) -> npt.NDArray[np.int64]:
    """Hits [L, E + 1] of each layer for k = 0 to E slots, from an empty cache.

    Args:
        routes: [T, L, K].
        experts: E, of a layer.
    """
    levels = [_levels(_next_uses(routes[:, layer], experts), experts) for layer in range(routes.shape[1])]
    return np.cumsum(levels, axis=-1, dtype=np.int64)


def _next_uses(steps: Routes, experts: int) -> list[list[int]]:
    """For each use [T][K] of steps [T, K]: the next step that uses the expert (T if none), times E, plus its id."""
    flat = steps.reshape(-1).astype(np.int64)
    order = np.argsort(flat, kind="stable")  # uses of one expert side by side, as they follow each other
    coming: npt.NDArray[np.int64] = np.full(len(flat), len(steps), np.int64)
    same = flat[order[1:]] == flat[order[:-1]]
    coming[order[:-1][same]] = order[1:][same] // steps.shape[1]
    keys: npt.NDArray[np.int64] = coming * experts + flat
    return keys.reshape(len(steps), -1).tolist()


def _levels(next_uses: list[list[int]], experts: int) -> list[int]:
    """How many uses [E + 1] are hits from how many slots on.

    The pool holds the step's own and whom the levels passed so far gave up; each level keeps the one that is used
    soonest. What is used in this very step comes first in its old place and stands in the pool with its next use.
    """
    found = [0] * (experts + 1)
    stack: list[int] = []
    for now, pool in enumerate(next_uses):
        used_now = (now + 1) * experts
        heapify(pool)
        for level, kept in enumerate(stack):
            if kept >= used_now:
                stack[level] = heappushpop(pool, kept)
                continue
            found[level + 1] += 1
            stack[level] = heappop(pool)
            if not pool:
                break  # below nothing changes
        else:
            stack += sorted(pool)
    return found
