"""A learned predictor on the device of the model: coming layers' experts, and how soon a layer's own are used again.

The maps [E, H + 1] of `moeflow.artifact.predictors` as two tensors each, float32, so that the hidden states of any
dtype go in as they are. With a launcher, one kernel computes scores and choice for a few tokens, as for a router.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moeflow.artifact.predictors import Matrices
from moeflow.errors import ArtifactError
from moeflow.kernels.launcher import Launcher
from moeflow.kernels.router import RouterKernel, Rule
from moeflow.offload.predictor import Guesser, Keeper

__all__ = ["learned_guesser", "learned_keeper"]

RULE = Rule("CHOICE", True, torch.float32)  # the order of choices is all that is wanted


class _Map:
    """Scores of a layer's experts, and the greatest `choices` of them."""

    def __init__(self, matrix: Tensor, choices: int, device: torch.device, launcher: Launcher | None):
        self._weight = matrix[:, :-1].to(device).contiguous()  # [E, H]
        self._bias = matrix[:, -1].to(device).contiguous()  # [E]
        self._choices = choices
        self._kernel = RouterKernel(launcher, self._weight, self._bias, choices, RULE) if launcher else None

    def ids(self, hidden_states: Tensor) -> Tensor:
        """Expert ids [T, n], likeliest first."""
        if kernel := self._taken(hidden_states):
            return kernel(hidden_states)[2]
        return self._computed(hidden_states).topk(self._choices, dim=-1).indices

    def scores(self, hidden_states: Tensor) -> Tensor:
        """float32 [T, E]."""
        if kernel := self._taken(hidden_states):
            return kernel(hidden_states)[0]
        return self._computed(hidden_states)

    def _taken(self, x: Tensor) -> RouterKernel | None:
        """The kernel, if it takes these."""
        if self._kernel is None or RouterKernel.refuses(x, self._weight, self._bias, self._choices) is not None:
            return None
        return self._kernel

    def _computed(self, x: Tensor) -> Tensor:
        return functional.linear(x.float(), self._weight, self._bias)


def learned_guesser(
    matrices: Matrices, experts: int, depth: int, device: torch.device, launcher: Launcher | None = None
) -> Guesser:
    """Names `experts` experts of each of the `depth` layers ahead.

    Raises:
        ArtifactError: the predictor reaches fewer layers ahead.
    """
    if depth > len(matrices.guess):
        raise ArtifactError(
            f"the artifact's predictor guesses {len(matrices.guess)} layers ahead, the plan {depth}: lower "
            "prefetch.depth, or make it anew by `moeflow train-predictor --depth`"
        )
    routers = [
        [None if matrix is None else _Map(matrix, experts, device, launcher).ids for matrix in row]
        for row in matrices.guess[:depth]
    ]
    return Guesser(routers)


def learned_keeper(matrices: Matrices, device: torch.device, launcher: Launcher | None = None) -> Keeper:
    """Scores the experts of each layer by the last token's hidden states."""
    maps: Sequence[_Map] = [_Map(matrix, 1, device, launcher) for matrix in matrices.keep]

    def scores(layer: int, hidden_states: Tensor) -> Tensor:
        return maps[layer].scores(hidden_states[-1:])[0]

    return scores
