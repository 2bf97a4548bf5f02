"""Packed matrices back to numbers by one kernel, where plain torch takes several passes over memory.

For products with many tokens: dequantize, then the library's matrix product. Bit for bit `kernels.dequantize`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moeflow.kernels.gemv import DTYPES, Format
from moeflow.kernels.launcher import Launcher
from moeflow.schema import PackedMatrix

__all__ = ["PIECE", "Unpacker", "Workspace"]

THREADS, TURNS = 256, 4  # unpack.cu's
PIECE = 8  # columns of a store: what a row must be a multiple of


class Workspace:
    """Memory for one unpacked matrix at a time: whoever takes it takes it from the one before, in the stream's order.

    A model's matrices are multiplied one after another, so one piece of the largest's size serves all of them, and
    nothing is allocated between kernels.
    """

    def __init__(self, matrices: Iterable[PackedMatrix], dtype: torch.dtype, device: torch.device):
        """Room for any of `matrices` in `dtype`; those that are stored as plain numbers need none."""
        sizes = (m.rows * m.columns for m in matrices if Format.of(m).kind != "DENSE")
        self._memory = torch.empty(max(sizes, default=0), dtype=dtype, device=device)

    def take(self, rows: int, columns: int) -> Tensor:
        """[rows, columns], filled with what was there."""
        return self._memory[: rows * columns].view(rows, columns)


class Unpacker:
    """One matrix shape in one dtype, ready to be unpacked."""

    def __init__(self, launcher: Launcher, matrix: PackedMatrix, dtype: torch.dtype):
        self.matrix = matrix
        self._launcher = launcher
        self._format = Format.of(matrix)
        self._offsets = self._format.offsets(matrix)[:4]
        self._dtype = dtype
        self._defines = {**self._format.defines, "OUTPUT": DTYPES[dtype]}
        self._dense = next((s for s in matrix.segments if s.part == "dense"), None)

    def __call__(self, blob: Tensor, workspace: Workspace | None = None) -> Tensor:
        """The matrix [N, K], on the device of `blob` (uint8, the matrix's parts at their offsets).

        In `workspace` if there is one; a matrix of plain numbers stays where it is if it has the dtype.
        """
        rows, columns = self.matrix.rows, self.matrix.columns
        if self._dense is not None:
            raw = blob[self._dense.offset : self._dense.offset + self._dense.nbytes]
            stored: torch.dtype = getattr(torch, self._dense.dtype)
            return raw.view(stored).view(rows, columns).to(self._dtype)
        if workspace is None:
            out = torch.empty(rows, columns, dtype=self._dtype, device=blob.device)
        else:
            out = workspace.take(rows, columns)
        kernel = self._launcher.kernel("unpack.cu", "unpack", self._defines)
        blocks = -(-rows * columns // (PIECE * THREADS * TURNS))
        kernel(blocks, THREADS, blob, *self._offsets, self._format.codebook(blob.device), out, rows, columns)
        return out
