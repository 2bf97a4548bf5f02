"""Routes replayed through the policies of the live cache, without guesses: which uses find their expert kept.

The rules of a step are those of `offload.cache`: hits are counted before anything is copied, so that experts of one
step never take each other's place before both were computed; the kept ones are touched first, then the missing ones
are admitted, both in ascending order, as the engine asks for them. With fewer slots than a step needs, the last of
them stay. The policy classes themselves do the work; what is here is the loop around them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moeflow.offload.policy import CachePolicy, Rule
from moeflow.offload.trace import Routes

__all__ = ["replay"]


def replay(routes: Routes, rule: Rule, slots: Sequence[int]) -> list[int]:
    """Hits of each layer [L] on routes [T, L, K], from an empty cache with `slots` [L].

    Raises:
        DocumentError: the policy is unknown.
    """
    # Plain numbers, which policies take faster than numpy's; one layer's at a time, for the memory that they need.
    steps = (np.sort(routes[:, layer], axis=-1).tolist() for layer in range(routes.shape[1]))
    return [_hits(rule.make(i, k), rows) for i, (k, rows) in enumerate(zip(slots, steps, strict=True))]


def _hits(policy: CachePolicy, steps: Iterable[Sequence[int]]) -> int:
    hits = 0
    for needed in steps:
        missing = []
        for expert in needed:
            if expert in policy:
                policy.touch(expert)  # nobody leaves by it, so that the next `in` sees the step's beginning
                hits += 1
            else:
                missing.append(expert)
        for expert in missing:
            policy.admit(expert)
    return hits
