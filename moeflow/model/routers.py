"""Routers applied out of turn, to guess what a coming layer will choose.

Families route by softmax or sigmoid, in groups, with correction biases. So that a guess follows the family's own
rule, it is the router that chooses: a copy which shares its weights is asked for as many experts as shall be
guessed. Where a router cannot be asked for more than its own number, or only gives scores, the highest scores are
taken. Where neither works there are no guesses; results do not depend on them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moeflow.offload.predictor import Router
from moeflow.schema import ExpertLayer

__all__ = ["find_routers", "router_matrix"]


def find_routers(
    model: nn.Module, layers: Sequence[ExpertLayer], experts: int, dtype: torch.dtype
) -> list[Router] | None:
    """A router per MoE layer that names `experts` experts; None if one of them cannot be applied."""
    found = [_guesser(model, layer, experts, dtype) for layer in layers]
    routers = [router for router in found if router is not None]
    return routers if len(routers) == len(layers) else None


def _guesser(model: nn.Module, layer: ExpertLayer, experts: int, dtype: torch.dtype) -> Router | None:
    """The first way of asking that works on one token."""
    if not layer.router:
        return None
    block = model.get_submodule(layer.router.rpartition(".")[0])
    router: Any = model.get_submodule(layer.router)
    width = next((p.shape[-1] for p in router.parameters() if p.dim() == 2), 0)
    device = next(router.parameters()).device
    arguments = _arguments(router, block)
    asked = experts - 1 if experts == layer.experts > 1 else experts
    for way in (_chosen(_asked_for(router, asked), asked, arguments), _highest(router, layer, asked, arguments)):
        try:
            with torch.inference_mode():
                ids = way(torch.zeros(1, width, device=device, dtype=dtype))
        except Exception:  # a router may refuse in any way; the next way is tried
            continue
        if tuple(ids.shape) == (1, asked) and 0 <= int(ids.min()) <= int(ids.max()) < layer.experts:
            return way if asked == experts else _completed(way, layer.experts)
    return None


def _completed(way: Router, experts: int) -> Router:
    """All experts, the one that `way` leaves out last: of all, weights and scores have one shape."""

    def choose(hidden_states: Tensor) -> Tensor:
        ids = way(hidden_states)
        return torch.cat([ids, experts * (experts - 1) // 2 - ids.sum(-1, keepdim=True)], dim=-1)

    return choose


def _arguments(router: Any, block: nn.Module) -> dict[str, Any]:
    """What a router takes beside hidden states, if the block around it holds it under that name (LFM2's bias)."""
    names = list(inspect.signature(router.forward).parameters)[1:]
    return {name: getattr(block, name) for name in names if hasattr(block, name)}


def _asked_for(router: Any, experts: int) -> Any:
    """The router, choosing `experts` instead of its own number; weights are shared."""
    if getattr(router, "top_k", None) == experts or not hasattr(router, "top_k"):
        return router
    asked = copy.copy(router)
    asked.top_k = experts
    return asked


def _chosen(router: Any, experts: int, arguments: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The router's own choice, ordered by the weights it gives."""

    def choose(hidden_states: Tensor) -> Tensor:
        results = _tensors(router(hidden_states, **arguments))
        ids = next(r for r in results if not r.is_floating_point() and r.shape[-1] == experts)
        weights = next(r for r in results if r.is_floating_point() and r.shape == ids.shape)
        return ids.gather(-1, weights.argsort(dim=-1, descending=True))

    return choose


def _highest(router: Any, layer: ExpertLayer, experts: int, arguments: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The experts of the highest scores [T, E] among a router's results."""

    def choose(hidden_states: Tensor) -> Tensor:
        results = _tensors(router(hidden_states, **arguments))
        scores = next(r for r in results if r.is_floating_point() and r.shape[-1] == layer.experts)
        return scores.topk(experts, dim=-1).indices

    return choose


def _tensors(result: Any) -> list[Tensor]:
    return [r for r in result if isinstance(r, Tensor)] if isinstance(result, tuple | list) else [result]


def router_matrix(module: Any) -> tuple[Tensor, Tensor | None] | None:
    """The one matrix [E, H] that a router has, and its bias [E]; None where it has more, or other parameters."""
    named = dict(module.named_parameters())
    matrices = [name for name, p in named.items() if p.dim() == 2]
    if len(matrices) != 1 or len(named) > 2:
        return None
    bias = named.get(matrices[0].removesuffix("weight") + "bias")
    if len(named) == 2 and bias is None:
        return None
    return named[matrices[0]], bias
