"""Cuts a matrix into blocks of rows that are worked on one after the other.

Quantization passes over its numbers some twenty times in each of its iterations. On the CPU a block stays in the
cores' caches between passes, and its temporaries are memory that was used before, not fresh pages; on CUDA a launch
costs more than a block gains, and blocks only bound memory. What a block is decides nothing about results.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["row_slices"]

A_THREAD = 1 << 16  # numbers, 256 KiB in float32; torch gives a thread no fewer than half of it
ON_CUDA = 1 << 26


def row_slices(matrix: Tensor) -> Iterator[slice]:
    """Rows of `matrix` [N, K] that are worked on at once."""
    rows, columns = matrix.shape
    most = A_THREAD * torch.get_num_threads() if matrix.device.type == "cpu" else ON_CUDA
    step = max(1, most // columns)
    for begin in range(0, rows, step):
        yield slice(begin, min(rows, begin + step))
