"""The comparison of routes itself: it forgives rounding and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from routes import Routed, assert_follows, tokens_routed_alike
from test_engine import NONE, random_ids

import moeflow


def _steps(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> list[Routed]:
    return [Routed(hidden[:2], index[:2], weights[:2]), Routed(hidden[2:], index[2:], weights[2:])]


def test_a_tie_ends_the_comparison_where_it_is() -> None:
    hidden, index, weights = torch.randn(6, 4), torch.tensor([[0, 1]] * 6), torch.tensor([[0.7, 0.3]] * 6)
    other = index.clone()
    other[4] = torch.tensor([0, 2])
    found, swapped = {0: _steps(hidden, index, weights)}, {0: _steps(hidden, index.flip(-1), weights.flip(-1))}
    assert tokens_routed_alike(found, swapped, 6) == 6
    assert tokens_routed_alike(found, {0: _steps(hidden + 1e-7, other, weights)}, 6) == 4


def test_weights_that_depend_on_which_expert_came_first_are_a_tie_too() -> None:
    """PhiMoE's: the same two experts, and the weights the other way round."""
    hidden, index, weights = torch.randn(6, 4), torch.tensor([[0, 1]] * 6), torch.tensor([[0.5, 1.0]] * 6)
    other = index.clone()
    other[3] = torch.tensor([1, 0])
    assert tokens_routed_alike({0: _steps(hidden, index, weights)}, {0: _steps(hidden, other, weights)}, 6) == 3


@pytest.mark.parametrize("what", ["index", "weights"])
def test_other_routes_for_other_numbers_are_a_fault(what: str) -> None:
    routed = Routed(torch.randn(6, 4), torch.tensor([[0, 1]] * 6), torch.tensor([[0.7, 0.3]] * 6))
    other = getattr(routed, what).clone()
    other[4, 1] = 2
    moved = routed._replace(hidden=routed.hidden + 0.1, **{what: other})
    with pytest.raises(AssertionError, match="layer 0, token 4: the router saw other numbers"):
        tokens_routed_alike({0: [routed]}, {0: [moved]}, 6)


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "deepseek_v3"])
def test_a_wrong_router_is_noticed(
    checkpoint_factory: Callable[..., Path], packed: Callable[..., Path], reference: Callable[[Path], Any], family: str
) -> None:
    """Its choices are not taken for ties."""
    checkpoint = checkpoint_factory(family, layers=3)
    with moeflow.load(packed(checkpoint, NONE), experts_per_layer=3) as engine:
        block = engine._model.get_submodule(engine.artifact.manifest.layers[-1].module.rpartition(".")[0])
        router = next(child for name, child in block.named_children() if name in ("gate", "router"))
        with torch.no_grad():
            router.weight[0] += router.weight[1]
        with pytest.raises(AssertionError, match="another router"):
            assert_follows(engine, reference(checkpoint), random_ids(60), chunks=(1,))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_wrong_expert_is_noticed(
    checkpoint_factory: Callable[..., Path], packed: Callable[..., Path], reference: Callable[[Path], Any], family: str
) -> None:
    checkpoint = checkpoint_factory(family, layers=3)
    with moeflow.load(packed(checkpoint, NONE), experts_per_layer=3) as engine:
        store = engine._store
        original = store.view
        store.view = lambda layer, expert: original(layer, 1 if expert == 0 else expert)
        with pytest.raises(AssertionError):
            assert_follows(engine, reference(checkpoint), random_ids(60), chunks=(1,))
