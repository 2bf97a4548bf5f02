"""Linear maps by least squares with a little ridge, from sums over a text; exact, with nothing to tune.

Logistic regression by gradient descent over the same tokens foresaw no more experts (docs/log.md), takes passes over
hidden states that would have to be kept, and depends on rates and seeds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeflow.artifact.predictors import Matrices
from moeflow.learning.moments import Moments
from moeflow.progress import Progress, silent

__all__ = ["RIDGE", "fit"]

RIDGE = 1e-3
"""Of each number's own mean square: what a text has not shown stays small."""


def fit(moments: Moments, progress: Progress = silent) -> Matrices:
    """The maps [E, H + 1] of all layers.

    Args:
        moments: of at least a few hundred tokens.
        progress: told of layers.
    """
    layers = len(moments.experts)
    keep: list[Tensor] = []
    guess: list[list[Tensor | None]] = [[None] * layers for _ in range(moments.depth)]
    for layer in range(layers):
        progress("fitting", layer, layers)
        coming = [
            (ahead, target)
            for ahead in range(moments.depth)
            if layer + ahead + 1 < layers and (target := moments.guess[ahead][layer + ahead + 1]) is not None
        ]
        targets = [moments.keep[layer], *(target for _, target in coming)]
        solved = _solve(moments.states[layer], torch.cat(targets, dim=1))
        own, *others = torch.split(solved, [target.shape[1] for target in targets], dim=1)
        keep.append(own.T.contiguous())
        for (ahead, _), matrix in zip(coming, others, strict=True):
            guess[ahead][layer + ahead + 1] = matrix.T.contiguous()
    progress("fitting", layers, layers)
    return Matrices(guess, keep)


def _solve(states: Tensor, targets: Tensor) -> Tensor:
    """The W [H + 1, N] of least |X W - Y|^2 + ridge, from X^T X and X^T Y; in float64."""
    products = states.to(torch.float64)
    # Each number counts by its own size: a few of a model's are a hundred times the others.
    scale = products.diagonal().clamp(min=1e-12).rsqrt()
    products = products * scale[:, None] * scale
    products.diagonal().add_(RIDGE)
    factor = torch.linalg.cholesky(products)
    solved = torch.cholesky_solve(targets.to(torch.float64) * scale[:, None], factor)
    return (solved * scale[:, None]).float().cpu()
