"""Hits of a cache that keeps what is worth most, token by token: `LearnedPolicy` replayed over a trace.

Scores say how soon each expert will be used again, as of the token of the step; a share of past uses is added. After a
step a layer keeps the k greatest sums among what it kept and what the step used; what was used need not stay. The same
as admitting one after the other where the least leaves, which a test compares.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeflow.offload.policy import FADING, SHARE
from moeflow.offload.trace import Routes

__all__ = ["scored_hits"]


def scored_hits(routes: Routes, scores: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Hits of each layer [L] on routes [T, L, K] with scores [T, L, E], from an empty cache of k slots a layer.

    Of equal sums the lower expert id leaves.
    """
    tokens, layers, experts = scores.shape
    kept = np.zeros((layers, experts), np.bool_)
    shares = np.zeros((layers, experts))
    hits = np.zeros(layers, np.int64)
    row = np.arange(layers)[:, None]
    for token in range(tokens):
        used = routes[token]
        hits += kept[row, used].sum(axis=1)
        kept[row, used] = True
        shares *= FADING
        shares[row, used] += 1.0 - FADING
        ranked = np.where(kept, scores[token] + SHARE * shares, -np.inf)
        least = np.argsort(ranked, axis=1, kind="stable")[:, : experts - k]
        kept[row, least] = False
    return hits
