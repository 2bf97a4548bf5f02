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

from moeflow.artifact.predictors import Matrices
from moeflow.learning.moments import uses
from moeflow.offload.predictor import Guesser
from moeflow.planning.ranking import scored_hits
from moeflow.planning.simulator import hit_rates
from moeflow.schema import Recall, ReuseHits

__all__ = ["Judge", "scores_of"]


def scores_of(matrix: Tensor, hidden_states: Tensor) -> Tensor:
    """float32 [T, E] of hidden states [T, H] by a map [E, H + 1]."""
    return torch.addmm(matrix[:, -1], hidden_states.to(matrix.dtype), matrix[:, :-1].T)


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
        self._right: dict[tuple[str, int, int], list[Tensor]] = {}  # who, depth, fetched -> shares
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
                right = used.gather(1, ids)
                for count in self._fetched:
                    share = right[:, :count].sum(1).mean() / index.shape[1]
                    self._right.setdefault((who, ahead, count), []).append(share)
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
        found = {key: float(torch.stack(shares).mean()) for key, shares in self._right.items()}
        return tuple(
            Recall(
                depth=ahead,
                fetched=count,
                learned=round(found["learned", ahead, count], 4),
                gate=round(found["gate", ahead, count], 4) if ("gate", ahead, count) in found else None,
            )
            for ahead in range(1, len(self._matrices.guess) + 1)
            for count in self._fetched
            if ("learned", ahead, count) in found
        )

    def hits(self, ks: Sequence[int]) -> tuple[ReuseHits, ...]:
        """At these numbers of slots a layer; layers of different numbers of experts are not replayed."""
        experts = {matrix.shape[0] for matrix in self._matrices.keep}
        if len(experts) > 1 or not self._routes:
            return ()
        routes = np.concatenate([np.stack(layers, axis=1) for layers in self._routes])  # [T, L, K]
        scores = np.concatenate([np.stack(layers, axis=1) for layers in self._scores])  # [T, L, E]
        (count,) = experts
        found = []
        for k in ks:
            learned = scored_hits(routes, scores, k).sum() / routes.size
            lru, best = (float(hit_rates(routes, count, policy, [k]).mean()) for policy in ("lru", "optimum"))
            found.append(ReuseHits(k=k, lru=round(lru, 4), learned=round(float(learned), 4), optimum=round(best, 4)))
        return tuple(found)
