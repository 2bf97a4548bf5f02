"""`LruPolicy` over whole traces, all layers at once: what `planning.replay` finds, several times as fast.

Each expert has a stamp, greater the more recent its last use is; within a step kept experts come before missing ones,
and smaller ids before greater, as the live cache touches and admits them. So the kept are those with the k greatest
stamps, and a use is a hit if its expert's stamp is not below the k-th. The order within a step depends on what was
kept, hence on k: caches of different k are not nested (with three experts a step or more), and each k takes a pass.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeflow.offload.trace import Routes

__all__ = ["recent_hits"]


def recent_hits(routes: Routes, experts: int, k: int) -> npt.NDArray[np.bool_]:
    """Which uses are hits, [T, L, K] with each row's experts in ascending order, from an empty cache.

    Args:
        routes: [T, L, K].
        experts: E, of a layer.
        k: slots of a layer, 0 to E.
    """
    hits = np.zeros(routes.shape, np.bool_)
    if k == 0:
        return hits
    layers, size = routes.shape[1], routes.shape[1] * experts
    places = np.sort(routes, axis=-1) + np.arange(0, size, experts)[:, None]  # [T, L, K], in the flat table
    stamps = np.full((layers, experts), -1, np.int64)
    flat = stamps.reshape(-1)
    least = np.zeros((layers, 1), np.int64)  # that a kept expert has: not negative, nor below the k-th
    for token, place in enumerate(places):
        hit = np.greater_equal(flat[place], least, out=hits[token])
        flat[place] = place + np.where(hit, 2 * token * size, (2 * token + 1) * size)
        least = np.partition(stamps, experts - k, axis=1)[:, experts - k, None].clip(min=0)
    return hits
