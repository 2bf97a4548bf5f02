"""The live cache's decisions with guesses, without bytes: what lands, what is used, what is thrown away.

`offload.cache` is replayed buffer by buffer, as a plan whose layers share a size lays it out: a guess takes a free
buffer or that of the oldest guess of an earlier step, a need may take any guess's; none evicts a cached expert. A copy
is taken to have arrived when its expert is needed, which a slow link may belie: then the wait is shorter, not gone.
Routes have no hidden states, so the next layer's gate cannot be asked here: a recall stands for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from moeflow.errors import UsageError
from moeflow.offload.policy import Rule
from moeflow.offload.routing import guesses
from moeflow.offload.trace import Routes
from moeflow.schema import Guessing

__all__ = ["GuessedCache", "guessed_routes", "landing_buffers", "replay_guesses"]


def landing_buffers(top_k: int, depth: int, guessed: int) -> int:
    """Buffers in which copies land, as the planner sets them: a step's own beside guesses of `depth` layers."""
    return top_k + max(1, depth) * max(guessed, top_k)


def guessed_routes(routes: Routes, experts: int, guessing: Guessing, seed: int) -> Routes:
    """What a predictor says before each token of routes [T, L, K], likeliest first: [T, L, n], -1 where it is silent.

    Raises:
        UsageError: it is to guess more than a token uses, which neither a recall nor the token before can, or the
            layers have too few experts for wrong guesses.
    """
    if guessing.experts > routes.shape[-1]:
        raise UsageError(
            f"{guessing.experts} guesses a layer; routes are top-{routes.shape[-1]}, and a recall or the token before "
            "says no more than that"
        )
    if guessing.recall is not None:
        return guesses(routes, experts, guessing.recall, seed)[..., : guessing.experts]
    before = np.full_like(routes, -1)
    before[1:] = routes[:-1]
    return before[..., : guessing.experts]


class GuessedCache:
    """All layers, one policy each, and one pool of buffers."""

    def __init__(self, layers: int, rule: Rule, k: int, staging: int):
        self.hits = [0] * layers
        self.guesses = 0
        self.used = 0
        self._policies = [rule.make(layer, k) for layer in range(layers)]
        self._landed: list[set[int]] = [set() for _ in range(layers)]
        self._guesses: dict[tuple[int, int], int] = {}  # (layer, expert) not used yet -> step, oldest first
        self._free = layers * k + staging
        self._step = 0

    def use(self, layer: int, needed: Sequence[int], guesses: Iterable[tuple[int, int]]) -> None:
        """One token's step in one layer; `guesses` are `(layer, expert)` of later layers, likeliest first."""
        self._step += 1
        policy, landed = self._policies[layer], self._landed[layer]
        hits = [e for e in needed if e in policy]
        arriving = deque(e for e in needed if e in landed)
        missing = deque(e for e in needed if e not in policy and e not in landed)
        self.hits[layer] += len(hits)
        self.used += len(arriving)
        for expert in arriving:
            landed.remove(expert)
            del self._guesses[layer, expert]
        pending = deque(guesses)
        self._fetch(missing, arriving, pending)
        for expert in hits:
            policy.touch(expert)
        while arriving:
            self._free += policy.admit(arriving.popleft()) is not None
            self._fetch(missing, arriving, pending)

    def _fetch(self, missing: deque[int], arriving: deque[int], pending: deque[tuple[int, int]]) -> None:
        """Start what there are buffers for: all that is needed before any guess."""
        while missing and self._take():
            arriving.append(missing.popleft())
        while pending and not missing:
            layer, expert = pending[0]
            if expert not in self._policies[layer] and expert not in self._landed[layer]:
                if not self._take(older_than=self._step):
                    return
                self._landed[layer].add(expert)
                self._guesses[layer, expert] = self._step
                self.guesses += 1
            pending.popleft()

    def _take(self, older_than: int | None = None) -> bool:
        """A free buffer, else that of the oldest unused guess (from an older step)."""
        if self._free:
            self._free -= 1
            return True
        oldest = next(iter(self._guesses), None)
        if oldest is None or (older_than is not None and self._guesses[oldest] >= older_than):
            return False
        del self._guesses[oldest]
        self._landed[oldest[0]].remove(oldest[1])
        return True


def replay_guesses(routes: Routes, guessed: Routes, rule: Rule, k: int, guessing: Guessing) -> GuessedCache:
    """The cache after routes [T, L, K] with guesses [T, L, n], each layer guessing the `depth` layers after it."""
    layers = routes.shape[1]
    cache = GuessedCache(layers, rule, k, guessing.staging)
    for needed, said in zip(np.sort(routes, axis=-1), guessed, strict=True):
        pairs = [[(layer, expert) for expert in row if expert >= 0] for layer, row in enumerate(said.tolist())]
        for layer, row in enumerate(needed.tolist()):
            ahead = pairs[layer + 1 : layer + 1 + guessing.depth]  # nearest first
            cache.use(layer, row, (pair for coming in ahead for pair in coming))
    return cache
