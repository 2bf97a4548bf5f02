"""How well a predictor does on tokens that it was not fitted to, beside the coming layers' own routers and beside LRU.

A recorder of passes: it compares guesses with what routers then choose, and keeps routes and scores for a replay of the
cache. It fits nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from moeflow.artifact.predictors import Matrices
from moeflow.learning.moments import uses
from moeflow.offload.predictor import Guesser
from moeflow.offload.trace import Routes
from moeflow.planning.ranking import scored_hits
from moeflow.planning.simulator import OPTIMUM, hit_rates
from moeflow.schema import Recall, ReuseHits

__all__ = ["Judge", "scores_of"]


def scores_of(matrix: Tensor, hidden_states: Tensor) -> Tensor:
    """float32 [T, E] of hidden states [T, H] by a map [E, H + 1]."""
    return linear(hidden_states.to(matrix.dtype), matrix[:, :-1], matrix[:, -1])


class Judge:
    """Of every MoE layer.

    Args:
        matrices: what is judged; on the device of the hidden states.
        gate: the coming layers' own routers, asked for the most in `fetched`; None where they cannot be.
        fetched: numbers of guesses.
    """

    def __init__(self, matrices: Matrices, gate: Guesser | None, fetched: Sequence[int]):
        self._matrices, self._gate, self._fetched = matrices, gate, fetched
        self._said: dict[tuple[str, int, int], Tensor] = {}  # who, depth, layer -> ids [T, n]
        self._right: dict[tuple[str, int], Tensor] = {}  # who, depth -> uses [n] among the first 1 to n guesses
        self._uses: dict[tuple[str, int], int] = {}
        self._routes: list[list[Any]] = []
        self._scores: list[list[Any]] = []
        self._pass: tuple[list[Any], list[Any]] = ([], [])

    def note(self, layer: int, hidden_states: Tensor, index: Tensor, _weights: Tensor) -> None:
        """As `Recorder.note`."""
        matrices = self._matrices
        keep = matrices.keep[layer]
        self._pass[0].append(index.to("cpu", torch.int16).numpy())
        self._pass[1].append(scores_of(keep, hidden_states).cpu().numpy())
        used = uses(index, keep.shape[0])
        for (who, ahead, target), ids in list(self._said.items()):
            if target == layer:
                right = used.gather(1, ids).sum(0, dtype=torch.float64).cumsum(0)
                self._right[who, ahead] = self._right.get((who, ahead), 0) + right
                self._uses[who, ahead] = self._uses.get((who, ahead), 0) + index.numel()
                del self._said[who, ahead, target]
        most = max(self._fetched)
        for ahead, row in enumerate(matrices.guess, start=1):
            matrix = row[layer + ahead] if layer + ahead < len(row) else None
            if matrix is not None:
                ids = scores_of(matrix, hidden_states).topk(most, dim=1).indices
                self._said["learned", ahead, layer + ahead] = ids
        for ahead, ids in enumerate(self._gate.guess(layer, hidden_states) if self._gate else [], start=1):
            self._said["gate", ahead, layer + ahead] = ids

    def end(self, _tokens: int) -> None:
        """As `Recorder.end`."""
        routes, scores = self._pass
        self._routes.append(routes)
        self._scores.append(scores)
        self._pass = ([], [])
        self._said.clear()

    def recalls(self) -> tuple[Recall, ...]:
        """By depth, then by number of guesses."""
        return tuple(
            Recall(depth=ahead, fetched=count, learned=learned, gate=self._recall("gate", ahead, count))
            for ahead in range(1, len(self._matrices.guess) + 1)
            for count in self._fetched
            if (learned := self._recall("learned", ahead, count)) is not None
        )

    def _recall(self, who: str, ahead: int, count: int) -> float | None:
        """Over all tokens of the layers that can be guessed so far ahead; None where none was."""
        if (who, ahead) not in self._right:
            return None
        return round(float(self._right[who, ahead][count - 1]) / self._uses[who, ahead], 4)

    def routes(self) -> Routes:
        """The experts used, int16 [T, L, K]."""
        return np.concatenate([np.stack(layers, axis=1) for layers in self._routes])

    def hits(self, ks: Sequence[int]) -> tuple[ReuseHits, ...]:
        """At these numbers of slots a layer; layers of different numbers of experts are not replayed."""
        experts = {matrix.shape[0] for matrix in self._matrices.keep}
        if len(experts) > 1 or not self._routes:
            return ()
        routes = self.routes()
        scores = np.concatenate([np.stack(layers, axis=1) for layers in self._scores])  # [T, L, E]
        (count,) = experts
        learned = [scored_hits(routes, scores, k).sum() / routes.size for k in ks]
        lru, best = (hit_rates(routes, count, policy, ks).mean(axis=0) for policy in ("lru", OPTIMUM))
        rows = zip(ks, np.round(lru, 4), np.round(learned, 4), np.round(best, 4), strict=True)
        return tuple(ReuseHits(k=k, lru=float(a), learned=float(b), optimum=float(c)) for k, a, b, c in rows)
