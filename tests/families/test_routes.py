"""The comparison of routes itself: it forgives rounding and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from routes import assert_follows, tokens_routed_alike
from test_engine import NONE, random_ids

import moeflow


def test_a_tie_ends_the_comparison_where_it_is() -> None:
    hidden, index = torch.randn(6, 4), torch.tensor([[0, 1]] * 6)
    other = index.clone()
    other[4] = torch.tensor([0, 2])
    swapped = index.flip(-1)
    steps = [(hidden[:2], index[:2]), (hidden[2:], index[2:])]
    assert tokens_routed_alike({0: steps}, {0: [(hidden, swapped)]}, 6) == 6
    assert tokens_routed_alike({0: steps}, {0: [(hidden + 1e-7, other)]}, 6) == 4


def test_other_routes_for_other_numbers_are_a_fault() -> None:
    hidden, index = torch.randn(6, 4), torch.tensor([[0, 1]] * 6)
    other = index.clone()
    other[4] = torch.tensor([0, 2])
    with pytest.raises(AssertionError, match="layer 0, token 4: the router saw other numbers"):
        tokens_routed_alike({0: [(hidden, index)]}, {0: [(hidden + 0.1, other)]}, 6)


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
