"""Which experts a later layer will probably use, and which of this layer's will soon be used again.

The paper's guess: the residual stream changes slowly from layer to layer, so the coming layer's router, applied
to this layer's hidden states, names most of the experts that it will name when its turn comes. A learned guess is a
linear map fitted to what the coming router really chose; how maps are fitted is the business of `moeflow.learning`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["Guesser", "Keeper", "Router", "next_gate"]

Router = Callable[[Tensor], Tensor]
"""Hidden states [T, H] -> expert ids [T, n], likeliest first."""

Keeper = Callable[[int, Tensor], Tensor]
"""A layer and its hidden states [T, H] -> float32 [E]: the greater, the sooner after the last token it is used."""


class Guesser:
    """Guesses the layers `1..depth` ahead.

    Args:
        routers: [depth - 1][layer]: what names the layer's experts from the hidden states so many layers before. The
            first layers, which nothing can guess, are never asked for.
    """

    def __init__(self, routers: Sequence[Sequence[Router | None]]):
        self._routers = routers
        self.depth = len(routers)

    def guess(self, layer: int, hidden_states: Tensor) -> list[Tensor]:
        """Expert ids [T, n], likeliest first, for the layers after `layer`, nearest first."""
        found = []
        for ahead, routers in enumerate(self._routers, start=1):
            if layer + ahead < len(routers) and (router := routers[layer + ahead]) is not None:
                found.append(router(hidden_states))
        return found


def next_gate(routers: Sequence[Router], depth: int) -> Guesser:
    """The paper's: coming layers are guessed by their own routers, out of turn."""
    return Guesser([routers] * depth)
