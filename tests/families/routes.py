"""Compares an engine with transformers' model, where two experts may score alike.

Engine and reference round differently, so that a router may choose another of two experts whose scores differ by less
than rounding, and logits then differ by 0.1. In 5,000 prompts of 40 tokens the closest scores were 2e-6 apart, which
is near the rounding. Routes are therefore compared too: where they part although the router saw the same numbers,
that token and those after it are left out; where they part and it did not, or logits differ without that, something
is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from oracle import logits_of
from test_engine import TOLERANCE, assert_same
from torch import Tensor

from moeflow.engine import Engine

__all__ = ["assert_follows", "engine_routes", "tokens_routed_alike"]

Routes = dict[int, list[tuple[Tensor, Tensor]]]


@contextmanager
def engine_routes(engine: Engine) -> Iterator[Routes]:
    """Per MoE layer, hidden states and chosen ids of every step."""
    seen: Routes = {}
    original = engine._execution.runner.run

    def record(layer: int, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        seen.setdefault(layer, []).append((hidden, index))
        return original(layer, module, hidden, index, weights)

    engine._execution.runner.run = record
    try:
        yield seen
    finally:
        engine._execution.runner.run = original


@contextmanager
def _model_routes(model: Any, modules: Sequence[str]) -> Iterator[Routes]:
    seen: Routes = {}

    def recorder(layer: int) -> Callable[..., None]:
        return lambda _module, inputs: seen.setdefault(layer, []).append((inputs[0], inputs[1]))

    handles = [
        model.get_submodule(name).register_forward_pre_hook(recorder(layer)) for layer, name in enumerate(modules)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def assert_follows(
    engine: Engine, model: Any, ids: Sequence[int], chunks: Sequence[int], bound: float = TOLERANCE
) -> None:
    """The engine's logits are the model's, run `chunk` tokens at a time for each of `chunks`.

    `bound` is of the largest logit, and of the largest number that a router sees.
    """
    with _model_routes(model, [layer.module for layer in engine.artifact.manifest.layers]) as wanted:
        expected = logits_of(model, ids)
    for chunk in chunks:
        with engine_routes(engine) as found:
            logits = engine.logits(ids, chunk=chunk)
        same = tokens_routed_alike(found, wanted, len(ids), bound)
        assert logits.shape == expected.shape
        if same:
            assert_same(logits[:same], expected[:same], bound)


def tokens_routed_alike(found: Routes, wanted: Routes, tokens: int, bound: float = TOLERANCE) -> int:
    """How many tokens come before the first that rounding sent to another expert."""
    assert found.keys() == wanted.keys()
    for layer in sorted(found):
        (hidden, ours), (reference, theirs) = (_joined(side[layer], tokens) for side in (found, wanted))
        parted = (ours.sort(-1).values != theirs.sort(-1).values).any(-1).nonzero()
        if len(parted):
            tokens = int(parted[0])
            difference = (hidden - reference)[: tokens + 1].abs().max()
            largest = reference[: tokens + 1].abs().max()
            assert difference <= bound * largest, f"layer {layer}, token {tokens}: the router saw other numbers"
            print(f"layer {layer}: token {tokens} went to another expert of the same score")
    return tokens


def _joined(steps: list[tuple[Tensor, Tensor]], tokens: int) -> tuple[Tensor, Tensor]:
    hidden, index = (torch.cat(parts)[:tokens] for parts in zip(*steps, strict=True))
    return hidden, index
