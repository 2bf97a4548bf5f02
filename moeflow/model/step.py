"""One token through the whole model: captured once in a CUDA graph, then replayed.

A step of a model with 32 layers is thousands of launches, which Python issues in tens of milliseconds and a graph in
one call. Token, position and logits live at fixed addresses; nothing inside a step waits for the host. Without CUDA the
same pass runs as it is, so that it can be tested anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["DecodeStep"]

CHECKED = (1, 2, 3, 1, 4, 2)  # token ids that every vocabulary has
TOLERANCE = 0.05  # of the largest logit; libraries may choose other kernels under capture, and bfloat16 rounds at 2^-8
WARM_UPS = 2  # passes before capture: the first compiles kernels and allocates, the second finds all in place


class DecodeStep:
    """Decoding of one sequence with a static cache."""

    def __init__(
        self,
        model: Any,
        cache: Any,
        device: torch.device,
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        """`inside` surrounds every pass of the model."""
        self._model = model
        self._cache = cache
        self._inside = inside
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._position = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def learn(self, arrange: Callable[[], object]) -> None:
        """Make two passes, the second of which has all fused parts, and `arrange` what they showed."""
        for _ in range(2):
            self._pass()
            self._cache.reset()
        arrange()

    @torch.inference_mode()
    def capture(self) -> None:
        """Record the step; leaves caches in an arbitrary state, to be reset by the caller.

        Raises:
            RuntimeError: an operation of the model cannot be captured.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._pass()
        torch.cuda.current_stream().wait_stream(stream)
        self._cache.reset()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._pass()
        self._graph = graph
        self.check()

    def check(self) -> None:
        """Compare replays with the same steps run operation by operation; caches are left to be reset.

        A model that counts in Python, or chooses by what it counted, is captured without complaint and wrong from the
        second token on.

        Raises:
            RuntimeError: they differ.
        """
        graph, self._graph = self._graph, None
        self._cache.reset()
        expected = [self.run(token, i).clone() for i, token in enumerate(CHECKED)]
        self._graph = graph
        self._cache.reset()
        for i, token in enumerate(CHECKED):
            found = self.run(token, i)
            difference = float((found - expected[i]).abs().max() / expected[i].abs().max().clamp(min=1e-6))
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"the captured step differs from the one it was made of by {difference:.2g} of the largest logit "
                    f"at token {i}"
                )

    def _pass(self) -> Tensor:
        with self._inside():
            output = self._model(
                input_ids=self._token, position_ids=self._position, past_key_values=self._cache, use_cache=True
            )
        self._position.add_(1)
        logits: Tensor = output.logits[0, -1]
        return logits

    def run(self, token: int, position: int) -> Tensor:
        """Logits [V] after `token` at `position`, which is the cache's length."""
        self._token.fill_(token)
        self._position.fill_(position)
        if self._graph is None:
            return self._pass()
        self._graph.replay()
        assert self._logits is not None
        return self._logits.clone()  # the next step writes over it
