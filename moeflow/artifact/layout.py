"""Where the parts of a matrix and of an expert lie: pure arithmetic, so that the planner can do it without torch.

Per matrix: packed integers, then scale and zero side by side. Per expert: gate and up as one matrix, then
down, so that each half is one range to copy; the whole padded to a page, so that blobs can be read directly
into page-locked memory and mapped.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from moeflow.errors import DocumentError
from moeflow.schema import BlobLayout, DenseScheme, PackedMatrix, Scheme, Segment

__all__ = ["PAGE", "packed_matrix", "blob_layout", "expert_layout"]

PAGE = 4096
ALIGNMENT = 256  # of every part inside a blob: a warp's widest row of 16-byte loads is 512, a sector 32

_ITEM = {"int32": 4, "float32": 4, "float16": 2, "bfloat16": 2}


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _parts(scheme: Scheme, rows: int, columns: int, dense: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """`(part, dtype, shape)` of each array that `scheme` stores for a matrix `[rows, columns]`."""
    if isinstance(scheme, DenseScheme):
        return [("dense", dense, (rows, columns))]
    low_bits = 2 if scheme.bits == 3 else scheme.bits
    parts: list[tuple[str, str, tuple[int, ...]]] = [("words", "int32", (rows, columns * low_bits // 32))]
    if scheme.bits == 3:
        parts.append(("high", "int32", (rows, columns // 32)))
    return [*parts, ("scales", "float16", (rows, columns // scheme.group_size, 2))]


def _check_columns(name: str, scheme: Scheme, columns: int) -> None:
    if isinstance(scheme, DenseScheme):
        return
    word = 32 // (1 if scheme.bits == 3 else scheme.bits)  # columns in a word of the narrowest plane
    if columns % scheme.group_size or columns % word:
        fitting = [g for g in (256, 128, 64, 32, 16) if columns % g == 0 and columns % word == 0]
        remedy = f"group_size {', '.join(map(str, fitting))} would fit" if fitting else "use backend none"
        step = max(scheme.group_size, word)
        raise DocumentError(f"{name} has {columns} inputs, not a multiple of {step} ({scheme.label}); {remedy}")


def packed_matrix(
    name: str, rows: int, columns: int, scheme: Scheme, dense: str, offset: int = 0, bias: bool = False
) -> PackedMatrix:
    """Lay out one matrix, and its bias, from `offset` on; `dense` is the dtype of unquantized numbers.

    Raises:
        DocumentError: the scheme's group size does not divide `columns`.
    """
    _check_columns(name, scheme, columns)
    segments = []
    parts = _parts(scheme, rows, columns, dense)
    if bias:
        parts.append(("bias", "float32", (rows,)))
    for part, dtype, shape in parts:
        offset = _round_up(offset, ALIGNMENT)
        nbytes = prod(shape) * _ITEM[dtype]
        segments.append(
            Segment.model_validate({"part": part, "dtype": dtype, "shape": shape, "offset": offset, "nbytes": nbytes})
        )
        offset += nbytes
    return PackedMatrix(name=name, rows=rows, columns=columns, scheme=scheme, segments=tuple(segments), bias=bias)


def blob_layout(matrices: Iterable[tuple[str, int, int]], scheme: Scheme, dense: str, bias: bool = False) -> BlobLayout:
    """Lay out `(name, rows, columns)` one after the other in one page-aligned blob."""
    packed: list[PackedMatrix] = []
    end = 0
    for name, rows, columns in matrices:
        packed.append(packed_matrix(name, rows, columns, scheme, dense, offset=end, bias=bias))
        last = packed[-1].segments[-1]
        end = last.offset + last.nbytes
    return BlobLayout(nbytes=_round_up(end, PAGE), matrices=tuple(packed))


def expert_layout(hidden: int, intermediate: int, scheme: Scheme, dense: str, bias: bool = False) -> BlobLayout:
    """The blob of a gated expert: gate_up [2I, H], then down [H, I]."""
    return blob_layout([("gate_up", 2 * intermediate, hidden), ("down", hidden, intermediate)], scheme, dense, bias)
