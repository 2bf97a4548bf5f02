"""Packed matrices back to numbers by one kernel, where plain torch takes several passes over memory.

For products with many tokens: dequantize, then the library's matrix product. Bit for bit `kernels.dequantize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeflow.kernels.gemv import DTYPES, Format
from moeflow.kernels.launcher import Launcher
from moeflow.schema import PackedMatrix

__all__ = ["unpack"]

THREADS = 256
COLUMNS = 8  # of a thread


def unpack(launcher: Launcher, matrix: PackedMatrix, blob: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] in `dtype`, on the device of `blob` (uint8, the matrix's parts at their offsets)."""
    form = Format.of(matrix)
    if form.kind == "DENSE":
        segment = next(s for s in matrix.segments if s.part == "dense")
        raw = blob[segment.offset : segment.offset + segment.nbytes]
        stored: torch.dtype = getattr(torch, segment.dtype)
        return raw.view(stored).view(segment.shape).to(dtype)
    out = torch.empty(matrix.rows, matrix.columns, dtype=dtype, device=blob.device)
    kernel = launcher.kernel("unpack.cu", "unpack", {**form.defines, "OUTPUT": DTYPES[dtype]})
    codes, high, scales, steps, _ = form.offsets(matrix)
    grid = (matrix.rows, -(-matrix.columns // (COLUMNS * THREADS)), 1)  # a head may have more than 65,535 rows
    kernel(
        grid, THREADS, blob, codes, high, scales, steps, form.codebook(blob.device), out, matrix.rows, matrix.columns
    )
    return out
