"""How often experts will be found cached, before anybody has seen the model's routes: from an assumed habit of routing.

`uniform` is what a model without habits would do: k of E. `markov` is the chain of `offload.routing`, which repeats as
the Mixtral report measured: a choice is one of the token's before, which a cache of top-k or more holds, with the
layer's own probability, and else as likely cached as any. A test compares it with replays through the policy. For
other models than Mixtral it is an assumption, and whoever has a trace does better with `moeflow simulate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal

__all__ = ["Habit", "hit_rates_of"]

Habit = Literal["markov", "uniform"]


def hit_rates_of(experts: Sequence[int], slots: Sequence[int], top_k: int, habit: Habit) -> list[float]:
    """The hit rate of each MoE layer.

    Args:
        experts: E of each.
        slots: k of each.
        top_k: experts that a token uses in a layer.
        habit: of the router.
    """
    repeated = _repeated(len(experts), top_k) if habit == "markov" else (0.0,) * len(experts)
    return [
        again * min(1.0, kept / top_k) + (1 - again) * kept / has
        for again, kept, has in zip(repeated, slots, experts, strict=True)
    ]


@cache
def _repeated(layers: int, top_k: int) -> tuple[float, ...]:
    """Of each layer, the probability that a choice is copied from the token before."""
    from moeflow.offload.routing import habits

    first, later = habits(layers)
    return tuple(((first + (top_k - 1) * later) / top_k).tolist())
