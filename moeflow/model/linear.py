"""A linear layer whose weight stays packed in memory and is dequantized when it is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeflow.artifact.matrix import dequantize
from moeflow.schema import PackedMatrix

__all__ = ["PackedLinear"]


class PackedLinear(nn.Module):
    """`x @ W.T + b` with a packed W [out, in]."""

    def __init__(self, matrix: PackedMatrix, parts: dict[str, Tensor], bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.matrix = matrix
        self.dtype = dtype
        self.in_features, self.out_features = matrix.columns, matrix.rows
        for part, tensor in parts.items():
            self.register_buffer(part, tensor)
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None

    @property
    def weight(self) -> Tensor:
        """W, dequantized."""
        return dequantize(self.matrix, dict(self.named_buffers(recurse=False)), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [..., in]."""
        return functional.linear(x, self.weight, self.bias)
