"""Perplexity of a text, and the divergence of two models' predictions; sums are float64, memory does not grow.

A window goes through the engine in chunks, as a prompt does, and each chunk's logits are used up before the next is
computed. Float64, because a small divergence is a difference of nearly equal logarithms, and float32 would drown it.
Knows token ids and logits; where the text comes from is not its business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moeflow.engine import Engine
from moeflow.errors import ArtifactError, UsageError
from moeflow.evaluation.windows import passes, scored, windows
from moeflow.planning.planner import PREFILL_CHUNK
from moeflow.schema import Divergence

__all__ = ["Perplexity", "divergence", "perplexity"]

ROWS = 64  # taken to float64 at once: 64 of 150,000 tokens are 77 MB

Report = Callable[[int, int], None]
Take = Callable[[Tensor], None]


@dataclass(frozen=True)
class Perplexity:
    """How well a text was predicted."""

    tokens: int
    """Predicted and counted."""
    nll: float
    """Sum of their negative log-likelihood, in nats."""
    computed: int
    """Tokens that went through the model."""
    seconds: float
    """In the model's passes."""

    @property
    def value(self) -> float:
        """The perplexity of a token."""
        return float(torch.tensor(self.nll / self.tokens, dtype=torch.float64).exp())


def perplexity(
    engine: Engine,
    ids: Sequence[int],
    context: int,
    stride: int,
    take: Take = lambda _: None,
    report: Report = lambda _done, _total: None,
) -> Perplexity:
    """The perplexity of `ids` in windows of `context` tokens, `stride` apart.

    Args:
        engine: a loaded model, planned for `context` or more.
        ids: token ids of the text.
        context: tokens of a window.
        stride: tokens from a window's start to the next one's, at most `context`.
        take: given the logits, float32 [n, V] in host memory, of the tokens as they are counted, in their order.
        report: told how many tokens are counted, of how many.

    Raises:
        UsageError: context and stride do not fit each other, the engine or the text.
        ArtifactError: logits are no numbers.
    """
    total = scored(len(ids), context, stride)
    if context > engine.plan.context_length:
        raise UsageError(f"context is {context}; the model is loaded for {engine.plan.context_length}")
    if (bad := next((i for i in ids if not 0 <= i < engine.vocabulary), None)) is not None:
        raise UsageError(f"token id {bad} is outside the vocabulary of {engine.vocabulary}")
    passes = _Passes(engine, ids)
    nll, done = 0.0, 0
    for first, logits in passes.run(context, stride):
        nll += _nll(logits, torch.tensor(ids[first : first + len(logits)]))
        if nll != nll:  # NaN: one such logit spoils the sum
            raise ArtifactError(
                f"{engine.artifact.directory}: logits near token {first} of the text are no numbers; "
                "see what `moeflow verify` says of it"
            )
        take(logits)
        done += len(logits)
        report(done, total)
    return Perplexity(done, nll, passes.computed, passes.seconds)


class _Passes:
    """Windows through an engine, and the time they take."""

    def __init__(self, engine: Engine, ids: Sequence[int]):
        self._engine, self._ids = engine, ids
        self.computed = 0
        self.seconds = 0.0

    def run(self, context: int, stride: int) -> Iterator[tuple[int, Tensor]]:
        """Counted tokens in their order: number of the first, and logits [n, V] for it and those that follow."""
        for window in windows(len(self._ids), context, stride):
            cache = self._engine.new_cache()
            # The window's last token predicts none of its own, so it is not run.
            for start, stop, wanted in passes(window.begin, window.end - 1, window.first, PREFILL_CHUNK):
                begin = time.perf_counter()
                logits = self._engine.forward(self._ids[start:stop], cache, last=max(1, wanted)).float().cpu()
                self.seconds += time.perf_counter() - begin
                self.computed += stop - start
                if wanted:
                    yield stop + 1 - wanted, logits


def _nll(logits: Tensor, targets: Tensor) -> float:
    """Of targets [n] under logits [n, V], summed."""
    total = 0.0
    for rows, wanted in zip(logits.split(ROWS), targets.split(ROWS), strict=True):
        total += float(functional.cross_entropy(rows.double(), wanted, reduction="sum"))
    return total


def divergence(reference: Tensor, logits: Tensor) -> Divergence:
    """How far predictions lie from the reference's, over some tokens.

    Args:
        reference: logits [n, V] of the unquantized model.
        logits: [n, V] of the other one.

    Returns:
        Sums over the n tokens: KL(reference || other) in nats, and how many have the same likeliest token.
    """
    total, agreed = 0.0, 0
    for one, other in zip(reference.split(ROWS), logits.split(ROWS), strict=True):
        p, q = (functional.log_softmax(rows.double(), dim=-1) for rows in (one, other))
        total += float(functional.kl_div(q, p, reduction="sum", log_target=True))
        agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
    return Divergence(kl=max(0.0, total), agreed=agreed)  # of equal ones rounding may leave a little less than 0
