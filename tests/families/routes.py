"""Compares an engine with transformers' model, where two experts may score alike.

Engine and reference round differently, so that a router may choose another of two experts whose scores differ by less
than rounding, and logits then differ by 0.1. In 5,000 prompts of 40 tokens the closest scores were 2e-6 apart, which
is near the rounding; activations in 16-bit fixed point round at 1e-4 and meet such a pair sooner. PhiMoE's weights
depend on which of its two experts came first, so that there a tie shows in the weights alone.

Routes are therefore compared too: a token whose route is another is left out with those after it. So that nothing else
is forgiven, the reference's own router is shown the numbers that the engine's saw, and must route every token as the
engine did; and those numbers must be near the reference's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from oracle import logits_of
from test_engine import TOLERANCE, assert_same
from torch import Tensor

from moeflow.engine import Engine

__all__ = ["Routed", "assert_follows", "engine_routes", "logits_by_equal_routers", "tokens_routed_alike"]


class Routed(NamedTuple):
    """What a layer's experts were given."""

    hidden: Tensor
    """[T, H]"""
    index: Tensor
    """[T, K] ids."""
    weights: Tensor
    """[T, K]"""

    def by_expert(self) -> tuple[Tensor, Tensor]:
        """Ids in ascending order, and their weights."""
        index, order = self.index.sort(-1)
        return index, self.weights.gather(-1, order)

    def first(self, tokens: int) -> Routed:
        return Routed(*(part[:tokens] for part in self))


APART = 0.02  # of the largest weight: further than rounding moves it

Routes = dict[int, list[Routed]]
"""MoE layer -> what it was given at every step."""


@contextmanager
def engine_routes(engine: Engine) -> Iterator[Routes]:
    seen: Routes = {}
    original = engine._execution.runner.run

    def record(layer: int, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        seen.setdefault(layer, []).append(Routed(hidden, index, weights))
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
        return lambda _module, inputs: seen.setdefault(layer, []).append(Routed(*inputs))

    with ExitStack() as hooks:
        for layer, name in enumerate(modules):
            hook = model.get_submodule(name).register_forward_pre_hook(recorder(layer))
            hooks.callback(hook.remove)
        yield seen


@contextmanager
def _block_inputs(model: Any, modules: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """What the blocks of router and experts were called with, by name."""
    seen: dict[str, list[Tensor]] = {}

    def recorder(block: str) -> Callable[..., None]:
        return lambda _module, inputs: seen.setdefault(block, []).append(inputs[0].clone())

    with ExitStack() as hooks:
        for block in (name.rpartition(".")[0] for name in modules):
            hooks.callback(model.get_submodule(block).register_forward_pre_hook(recorder(block)).remove)
        yield seen


def assert_follows(
    engine: Engine, model: Any, ids: Sequence[int], chunks: Sequence[int], bound: float = TOLERANCE
) -> None:
    """The engine's logits are the model's, run `chunk` tokens at a time for each of `chunks`.

    `bound` is of the largest logit, and of the largest number that a router sees.
    """
    with _model_routes(model, _modules(engine)) as wanted:
        expected = logits_of(model, ids)
    for chunk in chunks:
        logits, found = logits_by_equal_routers(engine, model, ids, chunk)
        same = tokens_routed_alike(found, wanted, len(ids), bound)
        assert logits.shape == expected.shape
        if same:
            assert_same(logits[:same], expected[:same], bound)


def logits_by_equal_routers(engine: Engine, model: Any, ids: Sequence[int], chunk: int = 512) -> tuple[Tensor, Routes]:
    """The engine's logits [T, V] and routes, where the model's own routers, shown the same numbers, do the same."""
    modules = _modules(engine)
    with engine_routes(engine) as found, _block_inputs(engine._model, modules) as inputs:
        logits = engine.logits(ids, chunk=chunk)
    with _model_routes(model, modules) as wanted, torch.inference_mode():
        for block, steps in inputs.items():
            for hidden in steps:
                model.get_submodule(block)(hidden)
    assert found.keys() == wanted.keys() == set(range(len(modules)))
    for layer in found:
        for ours, theirs in zip(found[layer], wanted[layer], strict=True):
            (index, weights), (reference, their_weights) = ours.by_expert(), theirs.by_expert()
            difference = (weights - their_weights).abs().max()
            same = torch.equal(index, reference) and difference <= TOLERANCE * their_weights.abs().max()
            assert same, f"layer {layer}: another router"
    return logits, found


def _modules(engine: Engine) -> list[str]:
    return [layer.module for layer in engine.artifact.manifest.layers]


def tokens_routed_alike(found: Routes, wanted: Routes, tokens: int, bound: float = TOLERANCE) -> int:
    """How many tokens come before the first that rounding routed otherwise."""
    assert found.keys() == wanted.keys()
    for layer in sorted(found):
        ours, theirs = (_joined(side[layer]).first(tokens) for side in (found, wanted))
        (index, weights), (reference, their_weights) = ours.by_expert(), theirs.by_expert()
        apart = (weights - their_weights).abs() > APART * their_weights.abs().max()
        parted = ((index != reference) | apart).any(-1).nonzero()
        if len(parted):
            tokens = int(parted[0])
            difference = (ours.hidden - theirs.hidden)[: tokens + 1].abs().max()
            largest = theirs.hidden[: tokens + 1].abs().max()
            assert difference <= bound * largest, f"layer {layer}, token {tokens}: the router saw other numbers"
            print(f"layer {layer}: token {tokens} was routed otherwise for the same numbers")
    return tokens


def _joined(steps: list[Routed]) -> Routed:
    return Routed(*(torch.cat(parts) for parts in zip(*steps, strict=True)))
