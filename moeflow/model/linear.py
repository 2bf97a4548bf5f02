"""A linear layer whose weight stays packed in memory: read as it is for a few tokens, dequantized for many."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeflow.artifact.layout import ALIGNMENT, row_blocks
from moeflow.artifact.matrix import dequantize, parts_of
from moeflow.kernels.cpu import CpuGemv
from moeflow.kernels.gemv import MOST_TOKENS, Gemv, Jobs, unsupported
from moeflow.kernels.launcher import Launcher
from moeflow.kernels.unpack import PIECE, Unpacker, Workspace
from moeflow.model.cpu_linear import CpuLinears
from moeflow.model.inputs import Inputs
from moeflow.model.products import PACKED_TOKENS, CpuUnpacker, Products
from moeflow.schema import PackedMatrix, Segment

__all__ = ["Merged", "PackedLinear", "merge", "multiply", "use_kernels", "use_products"]


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
        self._blocks = row_blocks(matrix)
        self._unpackers: Sequence[Unpacker | CpuUnpacker] = []  # of the blocks, where there are kernels
        self._packed: CpuGemv | None = None
        self._linears: CpuLinears | None = None
        self._workspace: Workspace | None = None
        self.merged: Merged | None = None
        self._inputs = Inputs()

    @property
    def weight(self) -> Tensor:
        """W, dequantized."""
        blocks = [self._block(number, None) for number in range(len(self._blocks))]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _block(self, number: int, workspace: Workspace | None) -> Tensor:
        """The weight's rows in one of the blocks that are dequantized at once."""
        if self._unpackers:
            return self._unpackers[number](self.blob, workspace)
        block = self._blocks[number]
        return dequantize(block, parts_of(block, self.blob), self.dtype)

    def _dense(self, x: Tensor) -> Tensor:
        """The product with the dequantized weight, block by block: in each other's place in the workspace."""
        if len(self._blocks) == 1:
            return functional.linear(x, self._block(0, self._workspace), self.bias)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        begin = 0
        for number, block in enumerate(self._blocks):
            rows = slice(begin, begin := begin + block.rows)
            bias = None if self.bias is None else self.bias[rows]
            out[..., rows] = functional.linear(x, self._block(number, self._workspace), bias)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Apply to x [..., in]."""
        tokens = x.numel() // self.in_features
        if self._packed is not None and self._linears is not None and tokens <= PACKED_TOKENS:
            out = self._linears.multiply(self._packed, self.blob, x).view(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        if self.gemv is None or tokens > MOST_TOKENS:
            return self._dense(x)
        if self.merged is not None:
            out = self.merged.product(self, x, self._inputs)
        else:
            out = multiply(self.gemv, self.blob, x, self._inputs, self)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def attach(self, launcher: Launcher, inputs: Inputs, workspace: Workspace | None = None) -> None:
        """Multiply by kernels from now on, sharing prepared inputs with the layers that hold the same `inputs`."""
        self.launcher, self._workspace = launcher, workspace
        if unsupported(self.matrix) is None:
            self._inputs = inputs
        self.move(self.matrix, self.blob)

    def attach_products(self, products: Products, linears: CpuLinears) -> None:
        """Multiply by the CPU's kernels from now on, where they serve."""
        if (gemv := products.gemv(self.matrix)) is not None:
            self._packed, self._linears, self._workspace = gemv, linears, products.workspace
            if not gemv.plain:
                self._unpackers = [CpuUnpacker(products, CpuGemv(block)) for block in self._blocks]

    def move(self, matrix: PackedMatrix, blob: Tensor) -> None:
        """The same weight at another place."""
        self.matrix, self.blob, self._blocks = matrix, blob, row_blocks(matrix)
        assert self.launcher is not None, "only layers that multiply by kernels move"
        if unsupported(matrix) is None:
            self.gemv = Gemv(self.launcher, matrix, blob.device)
        if matrix.columns % PIECE == 0:
            self._unpackers = [Unpacker(self.launcher, block, self.dtype) for block in self._blocks]


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

    def product(self, member: PackedLinear, x: Tensor, inputs: Inputs) -> Tensor:
        """The member's columns [T, N] for x; a member that comes twice computes anew."""
        ready = self._result if self._result is not None and self._result[0]() is x else None
        if ready is None or id(member) not in self._waiting:
            ready = (weakref.ref(x), multiply(self._gemv, self._blob, x, inputs))
            self._waiting = set(self._columns)
        self._waiting.discard(id(member))
        self._result = ready if self._waiting else None
        return ready[1][:, self._columns[id(member)]]


def merge(members: Sequence[PackedLinear], layers: Iterable[PackedLinear] = ()) -> bool:
    """Join layers that share an input into one product; False if their formats differ.

    `layers`, all of the model, lets the result take the place of the members where they lie in one piece of memory.
    """
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
    before = [member.blob.clone() for member in members]
    blob = _room(members, offset, layers)
    for member, own, source in zip(members, moved, before, strict=True):
        for old, new in zip(member.matrix.segments, own, strict=True):
            blob[new.offset : new.offset + new.nbytes] = source[old.offset : old.offset + old.nbytes]
        member.move(member.matrix.model_copy(update={"segments": tuple(own)}), blob)
    names, rows = " + ".join(m.matrix.name for m in members), sum(m.matrix.rows for m in members)
    matrix = first.matrix.model_copy(update={"name": names, "rows": rows, "segments": tuple(segments)})
    merged = Merged(members, matrix, blob)
    for member in members:
        member.merged = merged
    return True


def _room(members: Sequence[PackedLinear], nbytes: int, layers: Iterable[PackedLinear]) -> Tensor:
    """Memory for the members as one matrix: where they were, if the layers between them can move up; else new."""

    def span(layer: PackedLinear) -> tuple[int, int]:
        begin = int(layer.blob.storage_offset())
        return begin, begin + _padded(layer.blob.nbytes)

    def piece(layer: PackedLinear) -> int:
        return layer.blob.untyped_storage().data_ptr()

    home = piece(members[0])
    spans = [span(member) for member in members]
    begin, end = min(s[0] for s in spans), max(s[1] for s in spans)
    between = [y for y in layers if piece(y) == home and begin <= span(y)[0] < end and y not in members]
    needed = _padded(nbytes) + sum(_padded(layer.blob.nbytes) for layer in between)
    movable = all(piece(member) == home for member in members) and all(y.merged is None for y in between)
    if not movable or needed > end - begin or end > members[0].blob.untyped_storage().nbytes():
        return torch.empty(nbytes, dtype=torch.uint8, device=members[0].blob.device)
    room = members[0].blob.as_strided((end - begin,), (1,), begin)
    place = _padded(nbytes)
    for layer, copy in [(layer, layer.blob.clone()) for layer in between]:
        layer.move(layer.matrix, room[place : place + copy.nbytes].copy_(copy))
        place += _padded(copy.nbytes)
    return room[:nbytes]


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _alike(member: PackedLinear, first: PackedLinear) -> bool:
    """Whether the rows of one may follow those of the other, part by part."""
    if member.gemv is None or first.gemv is None or member.merged is not None or member.dtype != first.dtype:
        return False
    parts = [[(s.part, s.dtype, s.shape[1:]) for s in m.matrix.segments] for m in (member, first)]
    return member.gemv.layout == first.gemv.layout and parts[0] == parts[1]


def use_kernels(model: nn.Module, launcher: Launcher, workspace: Workspace | None = None) -> Inputs:
    """Let all packed layers of `model` multiply by kernels; returns what they share.

    `workspace` is for passes of many tokens.
    """
    inputs = Inputs()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.attach(launcher, inputs, workspace)
    return inputs


def use_products(model: nn.Module, products: Products) -> None:
    """Let all packed layers of `model` multiply by the CPU's kernels."""
    linears = CpuLinears(products)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.attach_products(products, linears)
