"""Guesses are the coming router's own choice, by the family's own rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from routes import engine_routes
from test_engine import NONE, random_ids
from tiny import FAMILIES
from torch import Tensor, nn

import moeflow
from moeflow.model.routers import find_routers
from moeflow.schema import ExpertLayer

ANY_FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))


@ANY_FAMILY
def test_a_router_asked_out_of_turn_chooses_what_it_chooses_in_turn(
    checkpoint_factory: Callable[..., Path], packed: Callable[..., Path], family: str
) -> None:
    artifact = packed(checkpoint_factory(family, layers=3), NONE)
    with moeflow.load(artifact, experts_per_layer=3) as engine:
        routers = find_routers(engine._model, engine.artifact.manifest.layers, 2, torch.float32)
        with engine_routes(engine) as seen:
            engine.logits(random_ids(30))
        assert routers is not None
        assert len(seen) == len(routers)
        with torch.inference_mode():
            for layer, [routed] in seen.items():
                chosen = routers[layer](routed.hidden).sort(-1).values
                assert torch.equal(chosen, routed.index.sort(-1).values)


@ANY_FAMILY
@pytest.mark.parametrize("count", [1, 2, 4])
def test_any_number_of_experts_can_be_guessed(
    checkpoint_factory: Callable[..., Path], packed: Callable[..., Path], family: str, count: int
) -> None:
    artifact = packed(checkpoint_factory(family, layers=3), NONE)
    with moeflow.load(artifact, experts_per_layer=1, prefetch_experts=count) as engine:
        assert engine.guessing
        engine.logits(random_ids(40), chunk=1)
        assert engine.traffic.guesses_used > 0


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_of_all_experts_those_that_are_chosen_come_first(
    checkpoint_factory: Callable[..., Path], packed: Callable[..., Path], family: str
) -> None:
    with moeflow.load(packed(checkpoint_factory(family, layers=3), NONE), experts_per_layer=3) as engine:
        layers = engine.artifact.manifest.layers
        few, most = (find_routers(engine._model, layers, n, torch.float32) for n in (2, layers[0].experts))
        assert few is not None and most is not None
        hidden = torch.randn(30, engine._model.config.hidden_size)
        with torch.inference_mode():
            for two, all_of_them in zip(few, most, strict=True):
                ranked = all_of_them(hidden)
                assert torch.equal(ranked[:, :2], two(hidden))
                assert torch.equal(ranked.sort(-1).values, torch.arange(ranked.shape[1]).expand_as(ranked))


class _Block(nn.Module):
    def __init__(self, gate: nn.Module):
        super().__init__()
        self.gate = gate


class _Demanding(nn.Linear):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return super().forward(x) + positions


@pytest.mark.parametrize("router", ["gate", ""])
def test_a_router_that_cannot_be_applied_means_no_guesses(router: str) -> None:
    layer = ExpertLayer(
        module="experts", router=router, experts=8, layout=0, shard="", data_offset=0, digests=(), relative_error=0
    )
    assert find_routers(_Block(_Demanding(16, 8)), [layer], 2, torch.float32) is None
    plain = ExpertLayer(**{**layer.model_dump(), "router": "gate"})
    assert find_routers(_Block(nn.Linear(16, 8)), [plain], 2, torch.float32) is not None
