"""Routes that are forced upon a model, for benchmarks whose weights are random and route like no trained model.

The tables lie on the device and one index, taken once per pass, serves all layers, so that a captured step can replay
them. The model's own router still runs, and its weights are used: only which experts it names is replaced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeflow.offload.predictor import Keeper

__all__ = ["ForcedRoutes"]


class ForcedRoutes:
    """Takes the router's place in passes of one token; longer passes keep the model's choice.

    Args:
        routes: int64 [T, L, K] on the device, repeated when they end.
        guesses: int64 [T, L, n], what a predictor says of `routes`; None leaves guessing to the model.
        scores: float32 [T, L, E], what the policy `learned` goes by; None leaves it to the artifact's predictor.
        stall: cycles that the GPU waits in every layer, to stretch computation; CUDA only.
    """

    depth = 1

    def __init__(self, routes: Tensor, guesses: Tensor | None = None, stall: int = 0, scores: Tensor | None = None):
        self._routes = routes
        self._guesses = guesses
        self._stall = stall
        self._step = torch.zeros(1, dtype=torch.int64, device=routes.device)
        self._chosen = routes[0].clone()  # [L, K] of this pass
        self._guessed = None if guesses is None else guesses[0].clone()
        self._scores = scores
        self._scored = None if scores is None else scores[0].clone()

    @property
    def keeper(self) -> Keeper | None:
        """What scores a layer's experts; None where scores are not forced."""
        scored = self._scored
        return None if scored is None else lambda layer, _: scored[layer]

    @property
    def guesses(self) -> bool:
        """Whether guesses are forced, too."""
        return self._guesses is not None

    def chosen(self, layer: int, index: Tensor) -> Tensor:
        """Expert ids [T, K] for this layer, in place of the router's."""
        if index.shape[0] > 1:
            return index
        if layer == 0:
            torch.index_select(self._routes, 0, self._step, out=self._chosen[None])
            if self._guesses is not None and self._guessed is not None:
                torch.index_select(self._guesses, 0, self._step, out=self._guessed[None])
            if self._scores is not None and self._scored is not None:
                torch.index_select(self._scores, 0, self._step, out=self._scored[None])
            self._step.add_(1).remainder_(len(self._routes))
        if self._stall:
            torch.cuda._sleep(self._stall)
        return self._chosen[layer][None]

    def guess(self, layer: int, hidden_states: Tensor) -> list[Tensor]:
        """As `Guesser.guess`: ids [T, n] for the next layer."""
        if self._guessed is None or layer + 1 == len(self._guessed) or hidden_states.shape[0] > 1:
            return []
        return [self._guessed[layer + 1][None]]

    def rewind(self) -> None:
        """Begin with the first routes again."""
        self._step.zero_()
