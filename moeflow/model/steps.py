"""Passes of a few tokens, a graph for each number of them: one token at once, others when they are first asked for.

Short prompts and turns of a chat are two to eight tokens. Their graph is made in the middle of a sequence, so that
keys and values before it must survive: a pass writes behind the cache's length only, and the length is set back
afterwards. What cannot be captured runs operation by operation from then on, and `kept` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from moeflow.model.step import DecodeStep

__all__ = ["Steps"]


class Steps:
    """Steps of one to `most` tokens.

    Args:
        model: transformers' model.
        cache: its static cache.
        device: where they are.
        inside: surrounds every pass.
        most: more tokens than this read values on the host.
        begin: makes all that passes change as it was before any.
        aside: surrounds passes that are not to be counted.
        abandon: puts in order what a capture that failed has left.
        announce: told before every pass that is computed whether it is a replay.
        counted: told of the tokens of every pass that counts, before another pass is made.
    """

    def __init__(
        self,
        model: Any,
        cache: Any,
        device: torch.device,
        inside: Callable[[], AbstractContextManager[None]],
        most: int,
        begin: Callable[[], None],
        aside: Callable[[], AbstractContextManager[None]],
        abandon: Callable[[], None],
        announce: Callable[[bool], None] = lambda _: None,
        counted: Callable[[int], None] = lambda _: None,
    ):
        self._make = lambda tokens: DecodeStep(model, cache, device, inside, tokens, begin, announce)
        self._cache = cache
        self._room = cache.layers[0].max_cache_len
        self._captures = device.type == "cuda"
        self._aside, self._abandon = aside, abandon
        self._counted = counted
        self.most = most
        self.single = self._make(1)
        self._steps: dict[int, DecodeStep] = {1: self.single}
        self._settled = {1}
        self.kept: dict[int, str] = {}
        """Numbers of tokens that run without a graph, and why."""

    def capture(self) -> None:
        """Record the step of one token; caches are left to be reset.

        Raises:
            RuntimeError: an operation of the model cannot be captured.
        """
        if self._captures:
            self.single.capture()

    def run(self, ids: Sequence[int] | Tensor, position: int) -> Tensor:
        """Logits [T, V] after each of `ids`, the first at `position`, which is the cache's length."""
        tokens = len(ids)
        assert tokens <= self.most
        if tokens not in self._steps:
            self._steps[tokens] = self._make(tokens)
        logits = self._steps[tokens].run(ids, position)
        self._counted(tokens)
        # A step that goes on behind this one is needed to see that the graph counts; without room for it, another time.
        if self._captures and tokens not in self._settled and position + 2 * tokens <= self._room:
            logits = self._record(ids, position, logits.clone())
        return logits

    def _record(self, ids: Sequence[int] | Tensor, position: int, computed: Tensor) -> Tensor:
        """Make the graph of a step that was just `computed`; gives its logits, by the graph if there is one."""
        tokens = len(ids)
        plain, step = self._steps[tokens], self._make(tokens)
        with self._aside():
            after = plain.run(ids, position + tokens).clone()
            try:
                step.record(beside=self.single)
                self._rewind(position)
                found = step.run(ids, position)
                step.compare(found, computed, position)
                step.compare(step.run(ids, position + tokens), after, position + tokens)
                self._steps[tokens] = step
            except RuntimeError as error:  # capture has no error type of its own
                self.kept[tokens] = str(error)
                self._abandon()
                self._rewind(position)
                found = plain.run(ids, position)  # what the replays wrote may be wrong
            self._rewind(position + tokens)
        self._settled.add(tokens)
        return found

    def _rewind(self, length: int) -> None:
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(length)
