"""A linear layer whose weight stays packed in memory: read as it is for a few tokens, dequantized for many."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeflow.artifact.matrix import dequantize, parts_of
from moeflow.kernels.gemv import MOST_TOKENS, Gemv, Jobs, unsupported
from moeflow.kernels.launcher import Launcher
from moeflow.kernels.unpack import unpack
from moeflow.model.inputs import Inputs
from moeflow.schema import PackedMatrix, Segment

__all__ = ["Merged", "PackedLinear", "merge", "multiply", "use_kernels"]


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
        self.launcher: Launcher | None = None
        self.gemv: Gemv | None = None
        self.merged: Merged | None = None
        self._inputs = Inputs()

    @property
    def weight(self) -> Tensor:
        """W, dequantized."""
        if self.launcher is not None:
            return unpack(self.launcher, self.matrix, self.blob, self.dtype)
        return dequantize(self.matrix, parts_of(self.matrix, self.blob), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [..., in]."""
        tokens = x.numel() // self.in_features
        if self.gemv is None or tokens > MOST_TOKENS:
            return functional.linear(x, self.weight, self.bias)
        out = self.merged.product(self, x, self._inputs) if self.merged is not None else None
        if out is None:
            out = multiply(self.gemv, self.blob, x, self._inputs, self)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def attach(self, launcher: Launcher, inputs: Inputs) -> None:
        """Multiply by kernels from now on, sharing prepared inputs with the layers that hold the same `inputs`."""
        self.launcher = launcher
        if unsupported(self.matrix) is None:
            self.gemv, self._inputs = Gemv(launcher, self.matrix, self.blob.device), inputs

    def move(self, matrix: PackedMatrix, blob: Tensor) -> None:
        """The same weight at another place."""
        self.matrix, self.blob = matrix, blob
        assert self.launcher is not None, "only layers that multiply by kernels move"
        self.gemv = Gemv(self.launcher, matrix, blob.device)


def multiply(gemv: Gemv, blob: Tensor, x: Tensor, inputs: Inputs, reader: PackedLinear | None = None) -> Tensor:
    """A packed matrix times x [..., K]: [T, N]."""
    tokens = x.numel() // gemv.matrix.columns
    prepared = inputs.prepare(gemv, x, reader)
    starts, lists = (None, None) if tokens == 1 else inputs.lists(tokens, x.device)
    return gemv.multiply(prepared, Jobs(blob[None], None, tokens, 1, starts, lists), tokens, x.dtype)


class Merged:
    """Layers that are given the same input, as one matrix of all their rows: one launch for all of them.

    The first that is asked computes for the others, which find their columns of the result ready.
    """

    def __init__(self, members: Sequence[PackedLinear], matrix: PackedMatrix, blob: Tensor):
        launcher = members[0].launcher
        assert launcher is not None, "layers without kernels are not merged"
        self._gemv, self._blob = Gemv(launcher, matrix, blob.device), blob
        self._columns: dict[int, slice] = {}
        begin = 0
        for member in members:
            self._columns[id(member)] = slice(begin, begin := begin + member.out_features)
        self._result: tuple[weakref.ref[Tensor], Tensor] | None = None
        self._waiting: set[int] = set()

    def product(self, member: PackedLinear, x: Tensor, inputs: Inputs) -> Tensor | None:
        """The member's columns [T, N] for x; a member that comes twice computes anew."""
        ready = self._result if self._result is not None and self._result[0]() is x else None
        if ready is None or id(member) not in self._waiting:
            ready = (weakref.ref(x), multiply(self._gemv, self._blob, x, inputs))
            self._waiting = set(self._columns)
        self._waiting.discard(id(member))
        self._result = ready if self._waiting else None
        return ready[1][:, self._columns[id(member)]]


def merge(members: Sequence[PackedLinear]) -> bool:
    """Join layers that share an input into one product; False if their formats differ."""
    first = members[0]
    if not all(_alike(member, first) for member in members):
        return False
    offset, segments = 0, []
    moved: list[list[Segment]] = [[] for _ in members]
    for position, segment in enumerate(first.matrix.segments):
        begin = offset = -(-offset // 16) * 16
        parts = [member.matrix.segments[position] for member in members]
        for part, own in zip(parts, moved, strict=True):
            own.append(part.model_copy(update={"offset": offset}))
            offset += part.nbytes
        shape = (sum(part.shape[0] for part in parts), *segment.shape[1:])
        segments.append(segment.model_copy(update={"offset": begin, "nbytes": offset - begin, "shape": shape}))
    blob = torch.zeros(offset, dtype=torch.uint8, device=first.blob.device)
    for member, own in zip(members, moved, strict=True):
        for old, new in zip(member.matrix.segments, own, strict=True):
            blob[new.offset : new.offset + new.nbytes] = member.blob[old.offset : old.offset + old.nbytes]
        member.move(member.matrix.model_copy(update={"segments": tuple(own)}), blob)
    names, rows = " + ".join(m.matrix.name for m in members), sum(m.matrix.rows for m in members)
    matrix = first.matrix.model_copy(update={"name": names, "rows": rows, "segments": tuple(segments)})
    merged = Merged(members, matrix, blob)
    for member in members:
        member.merged = merged
    return True


def _alike(member: PackedLinear, first: PackedLinear) -> bool:
    """Whether the rows of one may follow those of the other, part by part."""
    if member.gemv is None or first.gemv is None or member.merged is not None or member.dtype != first.dtype:
        return False
    parts = [[(s.part, s.dtype, s.shape[1:]) for s in m.matrix.segments] for m in (member, first)]
    return member.gemv.layout == first.gemv.layout and parts[0] == parts[1]


def use_kernels(model: nn.Module, launcher: Launcher) -> Inputs:
    """Let all packed layers of `model` multiply by kernels; returns what they share."""
    inputs = Inputs()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.attach(launcher, inputs)
    return inputs
