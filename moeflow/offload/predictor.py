"""Which experts a later layer will probably use.

The paper's guess: the residual stream changes slowly from layer to layer, so the coming layer's router, applied
to this layer's hidden states, names most of the experts that it will name when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = ["NextGate", "Router"]

Router = Callable[[Tensor], Tensor]
"""Hidden states [T, H] -> expert ids [T, n], likeliest first."""


class NextGate:
    """Guesses layers `1..depth` ahead by their own routers."""

    def __init__(self, routers: Sequence[Router], depth: int):
        self._routers = routers
        self.depth = depth

    def guess(self, layer: int, hidden_states: Tensor) -> list[Tensor]:
        """Expert ids [T, n], likeliest first, for the layers after `layer`, nearest first."""
        coming = range(layer + 1, min(layer + self.depth, len(self._routers) - 1) + 1)
        return [self._routers[i](hidden_states) for i in coming]
