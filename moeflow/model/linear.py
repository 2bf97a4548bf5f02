"""A linear layer whose weight stays packed in memory: read as it is for a few tokens, dequantized for many."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeflow.artifact.matrix import dequantize, parts_of
from moeflow.kernels.gemv import MOST_TOKENS, Gemv, Jobs, Prepared, unsupported
from moeflow.kernels.launcher import Launcher
from moeflow.kernels.unpack import PIECE, Unpacker, Workspace
from moeflow.schema import PackedMatrix

__all__ = ["PackedLinear", "use_kernels"]


class PackedLinear(nn.Module):
    """`x @ W.T + b` with a packed W [out, in]."""

    blob: Tensor

    def __init__(self, matrix: PackedMatrix, blob: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.matrix = matrix
        self.dtype = dtype
        self.in_features, self.out_features = matrix.columns, matrix.rows
        self.register_buffer("blob", blob)  # uint8, the matrix's parts at their offsets
        self.bias = nn.Parameter(bias, requires_grad=False) if bias is not None else None
        self._unpacker: Unpacker | None = None
        self._workspace: Workspace | None = None
        self._gemv: Gemv | None = None
        self._inputs = _Inputs()

    @property
    def weight(self) -> Tensor:
        """W, dequantized."""
        if self._unpacker is not None:
            return self._unpacker(self.blob)
        return dequantize(self.matrix, parts_of(self.matrix, self.blob), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [..., in]."""
        tokens = x.numel() // self.in_features
        if self._gemv is None or tokens > MOST_TOKENS:
            weight = self.weight if self._unpacker is None else self._unpacker(self.blob, self._workspace)
            return functional.linear(x, weight, self.bias)
        prepared = self._inputs.prepare(self._gemv, x)
        starts, lists = (None, None) if tokens == 1 else self._inputs.lists(tokens, x.device)
        jobs = Jobs(self.blob[None], None, tokens, 1, starts, lists)
        out = self._gemv.multiply(prepared, jobs, tokens, x.dtype).view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def attach(self, launcher: Launcher, inputs: _Inputs, workspace: Workspace) -> None:
        """Multiply by kernels from now on, sharing prepared inputs with the layers that hold the same `inputs`."""
        if self.matrix.columns % PIECE == 0:
            self._unpacker, self._workspace = Unpacker(launcher, self.matrix, self.dtype), workspace
        if unsupported(self.matrix) is None:
            self._gemv, self._inputs = Gemv(launcher, self.matrix, self.blob.device), inputs


class _Inputs:
    """The last input, prepared: query, key and value projections are given the same tensor one after another."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], object, Prepared] | None = None
        self._lists: dict[int, tuple[Tensor, Tensor]] = {}

    def prepare(self, gemv: Gemv, x: Tensor) -> Prepared:
        if self._last is not None and self._last[0]() is x and self._last[1] == gemv.layout:
            return self._last[2]
        prepared = gemv.prepare(x.reshape(-1, x.shape[-1]).contiguous())
        self._last = (weakref.ref(x), gemv.layout, prepared)
        return prepared

    def lists(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if tokens not in self._lists:
            order = torch.arange(tokens, dtype=torch.int32, device=device)
            self._lists[tokens] = torch.tensor([0, tokens], dtype=torch.int32, device=device), order
        return self._lists[tokens]


def use_kernels(model: nn.Module, launcher: Launcher, workspace: Workspace) -> None:
    """Let all packed layers of `model` multiply by kernels; `workspace` is for passes of many tokens."""
    shared: dict[str, _Inputs] = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            module.attach(launcher, shared.setdefault(name.rpartition(".")[0], _Inputs()), workspace)
