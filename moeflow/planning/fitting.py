"""What a trace says of a model's habits: which experts its layers use most, and what slots would hit.

A static cache and quotas are fitted to one trace and then used on other text; how well they carry over is what
`moeflow simulate --fit` tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moeflow.offload.policy import Rule
from moeflow.offload.trace import Routes, load_trace
from moeflow.planning.optimum import optimal_hits
from moeflow.planning.quotas import quotas
from moeflow.planning.replay import replay
from moeflow.planning.simulator import OPTIMUM, hit_rates, named, thinned
from moeflow.schema import SimulatedRow
from moeflow.schema.profile import Cache

__all__ = ["Fit", "curves", "fit_of", "most_used", "shared_out"]


def most_used(routes: Routes, experts: int) -> tuple[tuple[int, ...], ...]:
    """Of each layer [L], its experts [E] by their uses in routes [T, L, K], most first; equals in ascending order."""
    layers = range(routes.shape[1])
    counts = np.stack([np.bincount(routes[:, layer].reshape(-1), minlength=experts) for layer in layers])  # [L, E]
    return tuple(map(tuple, np.argsort(-counts, axis=1, kind="stable").tolist()))


class Fit:
    """A policy on the routes of a trace.

    Args:
        routes: [T, L, K].
        experts: E, of a layer.
        name: of the policy.
        half_life: of mix.
    """

    def __init__(self, routes: Routes, experts: int, name: str, half_life: float):
        self._routes, self._experts = routes, experts
        self.rule = Rule(name, half_life, most_used(routes, experts) if name == "static" else ())

    @cached_property
    def hits(self) -> npt.NDArray[np.float64]:
        """Of each layer with 0 to E slots, [L, E + 1]; replayed at 18 numbers at most, straight lines between them."""
        return curves(self._routes, self._experts, self.rule)

    def quotas(self, even: Sequence[int], nbytes: Sequence[int], most: Sequence[int]) -> list[int]:
        """As `planning.quotas`, for these hits."""
        return quotas(self.hits, even, nbytes, most)


def curves(routes: Routes, experts: int, rule: Rule) -> npt.NDArray[np.float64]:
    """Hits of each layer with 0 to E slots, [L, E + 1], made not to fall where a replay does by chance."""
    ks = sorted({0, *thinned(experts), experts})
    found = hit_rates(routes, experts, rule, ks) * routes.shape[0] * routes.shape[2]
    return np.maximum.accumulate(np.stack([np.interp(range(experts + 1), ks, row) for row in found]), axis=1)


def shared_out(routes: Routes, experts: int, fits: Sequence[Fit], ks: Sequence[int]) -> Iterator[SimulatedRow]:
    """Routes [T, L, K] replayed with k slots a layer on average, as each fit's quotas have them.

    Last comes the optimum with quotas of its own, which know the routes replayed: what no policy and no split exceeds.
    """
    layers = routes.shape[1]
    even = {k: ((k,) * layers, (1,) * layers, (experts,) * layers) for k in ks}
    for fit in fits:
        for k in ks:
            slots = fit.quotas(*even[k])
            hits = replay(routes, fit.rule, slots)
            yield SimulatedRow(**named(fit.rule), k=k, quotas=tuple(slots), hits=tuple(hits))
    best = optimal_hits(routes, experts)
    for k in ks:
        slots = quotas(best.astype(np.float64), *even[k])
        hits = [int(row[n]) for row, n in zip(best, slots, strict=True)]
        yield SimulatedRow(policy=OPTIMUM, k=k, quotas=tuple(slots), hits=tuple(hits))


def fit_of(cache: Cache, layers: int, experts: int, top_k: int) -> Fit | None:
    """What the trace says that a profile names; None where it names none.

    Raises:
        StorageError: it cannot be read.
        DocumentError: it is no trace, or one of another shape.
    """
    if cache.trace is None:
        return None
    path = Path(cache.trace)
    policy = "lru" if cache.policy == "learned" else cache.policy  # a trace has no hidden states to learn from
    return _fit(path, _stamp(path), policy, cache.half_life, (layers, experts, top_k))


def _stamp(path: Path) -> int:
    """Changes when the file does; 0 for one that is not there, which reading it will say."""
    return path.stat().st_mtime_ns if path.is_file() else 0


@lru_cache(maxsize=8)
def _fit(path: Path, _stamp: int, policy: str, half_life: float, shape: tuple[int, int, int]) -> Fit:
    """Once for all plans that a search makes."""
    trace = load_trace(path)
    trace.require(*shape, str(path))
    return Fit(trace.routes, trace.experts, policy, half_life)
