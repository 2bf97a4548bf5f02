"""A router's choice for a few tokens in one launch: its linear layer, softmax, top-k and normalization.

For the rule that most families share: the largest of a softmax over all experts, or a softmax over the largest. Groups,
sigmoids and correction biases are transformers' business. Equal scores: the lower index comes first, as torch's top-k
on CUDA chooses among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeflow.kernels.dense import aligned
from moeflow.kernels.gemv import DTYPES
from moeflow.kernels.launcher import Launcher

__all__ = ["RouterKernel", "Rule"]

WARPS = 8  # router.cu's: experts of a block
MOST_EXPERTS, MOST_CHOICES, MOST_TOKENS = 1024, 32, 8


@dataclass(frozen=True)
class Rule:
    """How logits become choices."""

    first: str
    """SCORES: softmax, then the largest; CHOICE: the largest, then softmax."""
    normalize: bool
    weight_dtype: torch.dtype


class RouterKernel:
    """One router's shape and rule; its workspace is made once, so that a graph may hold its address."""

    def __init__(self, launcher: Launcher, matrix: Tensor, bias: Tensor | None, choices: int, rule: Rule):
        self.matrix, self.bias, self.choices, self.rule = matrix, bias, choices, rule
        self._launcher = launcher
        experts = matrix.shape[0]
        self._exact = torch.empty(MOST_TOKENS * experts, dtype=torch.float32, device=matrix.device)
        self._finished = torch.zeros(MOST_TOKENS, dtype=torch.int32, device=matrix.device)

    @staticmethod
    def refuses(x: Tensor, matrix: Tensor, bias: Tensor | None, choices: int) -> str | None:
        """Why the kernel cannot take these, or None."""
        if x.dtype not in DTYPES or matrix.dtype not in (x.dtype, torch.float32) or matrix.dim() != 2:
            return f"hidden states {x.dtype}, router {matrix.dtype}"
        experts, columns = matrix.shape
        if bias is not None and (bias.dtype != matrix.dtype or bias.numel() != experts):
            return f"a bias of {bias.numel()} {bias.dtype}"
        if experts > MOST_EXPERTS or choices > min(MOST_CHOICES, experts) or columns % 8 or x.shape[-1] != columns:
            return f"top-{choices} of {experts} experts, {columns} numbers"
        if not 1 <= x.numel() // columns <= MOST_TOKENS or not x.is_contiguous() or not matrix.is_contiguous():
            return f"{x.numel() // columns} tokens"
        return None if aligned(x, matrix) else "not aligned to 16 bytes"

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], weights [T, K] and expert ids [T, K] for x [T, N]."""
        experts, columns = self.matrix.shape
        tokens = x.numel() // columns
        logits = torch.empty(tokens, experts, dtype=self.matrix.dtype, device=x.device)
        weights = torch.empty(tokens, self.choices, dtype=self.rule.weight_dtype, device=x.device)
        index = torch.empty(tokens, self.choices, dtype=torch.int64, device=x.device)
        defines: dict[str, int | str] = {
            "ELEMENT": DTYPES[x.dtype], "MATRIX": DTYPES[self.matrix.dtype], "EXPERTS": experts,
            "CHOICES": self.choices, "COLUMNS": columns, "FIRST": self.rule.first,
            "NORMALIZE": int(self.rule.normalize), "WEIGHT": DTYPES[self.rule.weight_dtype],
        }  # fmt: skip
        kernel = self._launcher.kernel("router.cu", "route", defines)
        grid = (-(-experts // WARPS), tokens, 1)
        kernel(grid, 32 * WARPS, x, self.matrix, self.bias, logits, self._exact, self._finished, weights, index)
        return logits, weights, index
