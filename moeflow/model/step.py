"""A few tokens through the whole model: captured once in a CUDA graph, then replayed.

A step of a model with 32 layers is thousands of launches, which Python issues in tens of milliseconds and a graph in
one call. Tokens, positions and logits live at fixed addresses; nothing inside a step waits for the host. Without CUDA
the same pass runs as it is, so that it can be tested anywhere.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from moeflow.model.kv import cache_argument

__all__ = ["DecodeStep"]

CHECKED = (1, 2, 3, 1, 4, 2)  # token ids that every vocabulary has
TOLERANCE = 0.05  # of the largest logit; libraries may choose other kernels under capture, and bfloat16 rounds at 2^-8
WARM_UPS = 2  # passes before capture: the first compiles kernels and allocates, the second finds all in place


class DecodeStep:
    """Always the same number of tokens of one sequence, with a static cache."""

    def __init__(
        self,
        model: Any,
        cache: Any,
        device: torch.device,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
        tokens: int = 1,
        begin: Callable[[], None] | None = None,
        announce: Callable[[bool], None] = lambda _: None,
    ):
        """`inside` surrounds every pass of the model; `begin` makes all that passes change as it was before any;
        `announce` is told before every `run` whether it is a replay."""
        self._model = model
        self._fixed = {"use_cache": True, cache_argument(model): cache}
        self._inside = inside
        self._begin = begin or cache.reset
        self._announce = announce
        self._tokens = torch.zeros(1, tokens, dtype=torch.int64, device=device)
        self._offsets = torch.arange(tokens, device=device)[None]
        self._position = self._offsets.clone()
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def learn(self, arrange: Callable[[], object]) -> None:
        """Make two passes, the second of which has all fused parts, and `arrange` what they showed."""
        for _ in range(2):
            self._pass()
            self._begin()
        arrange()

    @torch.inference_mode()
    def capture(self) -> None:
        """Warm up, record and check the step; leaves caches in an arbitrary state, to be reset by the caller.

        Raises:
            RuntimeError: an operation of the model cannot be captured.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._pass()
        torch.cuda.current_stream().wait_stream(stream)
        self._begin()
        self.record()
        self.check()

    def record(self, beside: DecodeStep | None = None) -> None:
        """Record a pass after one that was computed; nothing is computed. May share the memory of `beside`.

        Raises:
            RuntimeError: an operation of the model cannot be captured.
        """
        gc.collect()  # an engine that was dropped would let go of its host memory, which CUDA forbids during capture
        graph = torch.cuda.CUDAGraph()
        pool = beside._graph.pool() if beside is not None and beside._graph is not None else None
        with torch.cuda.graph(graph, pool=pool):
            self._logits = self._pass()
        self._graph = graph

    def check(self) -> None:
        """Compare replays with the same steps run operation by operation; caches are left to be reset.

        A model that counts in Python, or chooses by what it counted, is captured without complaint and wrong from the
        second token on.

        Raises:
            RuntimeError: they differ.
        """
        graph, self._graph = self._graph, None
        self._begin()
        expected = [self.run([token], i).clone() for i, token in enumerate(CHECKED)]
        self._graph = graph
        self._begin()
        for i, token in enumerate(CHECKED):
            self.compare(self.run([token], i), expected[i], i)

    @staticmethod
    def compare(found: Tensor, expected: Tensor, position: int) -> None:
        """Whether a replay gave what the pass that was recorded gives.

        Raises:
            RuntimeError: not.
        """
        difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"the captured step differs from the one it was made of by {difference:.2g} of the largest logit "
                f"at token {position}"
            )

    def _pass(self) -> Tensor:
        with self._inside():
            output = self._model(input_ids=self._tokens, position_ids=self._position, **self._fixed)
        logits: Tensor = output.logits[0]
        return logits

    def run(self, ids: Sequence[int] | Tensor, position: int) -> Tensor:
        """Logits [T, V] after each of `ids`, the first at `position`, which is the cache's length."""
        self._announce(self._graph is not None)
        if isinstance(ids, Tensor):
            torch.add(ids.view_as(self._tokens), 0, out=self._tokens)  # a copy may be the copy engine's, which is busy
        else:
            for i, token in enumerate(ids):
                self._tokens[:, i].fill_(token)  # a copy from the host would wait for all that is under way
        torch.add(self._offsets, position, out=self._position)
        if self._graph is None:
            return self._pass()
        self._graph.replay()
        assert self._logits is not None
        return self._logits.clone()  # the next step writes over it
