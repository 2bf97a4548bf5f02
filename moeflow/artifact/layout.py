"""Where the parts of a matrix and of an expert lie: pure arithmetic, so that the planner can do it without torch.

Per matrix: packed integers, then scale and zero side by side, then the bias if it has one. Per expert: gate and
up as one matrix, then down, so that each half is one range to copy; the whole padded to a page, so that blobs can
be read directly into page-locked memory and mapped. What the numbers mean: `kernels.dequantize`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from moeflow.errors import DocumentError
from moeflow.schema import (
    BitsAndBytesScheme,
    BlobLayout,
    DenseScheme,
    HqqScheme,
    PackedMatrix,
    ResidentMatrix,
    ResidentRole,
    Scheme,
    Segment,
)
from moeflow.schema.quantization import META_BLOCK

__all__ = ["ALIGNMENT", "PAGE", "packed_matrix", "resident_matrix", "blob_layout", "expert_layout", "row_blocks"]

PAGE = 4096
ALIGNMENT = 256  # of every part inside a blob: a warp's widest row of 16-byte loads is 512, a sector 32
UNPACKED = 1 << 25
"""Numbers of a resident matrix that are dequantized at once: an output head is many times any other matrix, and what
packing saves would be taken again by the memory that unpacks it."""
BLOCK_ROWS = 256  # so many rows begin at an aligned byte whatever their length

_ITEM = {"uint8": 1, "int32": 4, "float32": 4, "float16": 2, "bfloat16": 2}


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


_Parts = list[tuple[str, str, tuple[int, ...]]]  # part, dtype, shape


def _parts(scheme: Scheme, rows: int, columns: int, dense: str) -> _Parts:
    """Each array that `scheme` stores for a matrix `[rows, columns]`."""
    if isinstance(scheme, DenseScheme):
        return [("dense", dense, (rows, columns))]
    low_bits = 2 if scheme.bits == 3 else scheme.bits
    parts: _Parts = [("words", "int32", (rows, columns * low_bits // 32))]
    if isinstance(scheme, BitsAndBytesScheme):
        if scheme.group_size is None:
            return [*parts, ("scales", "float32", (rows,))]
        return [*parts, ("scales", "float16", (rows, columns // scheme.group_size))]
    if scheme.bits == 3:
        parts.append(("high", "int32", (rows, columns // 32)))
    return parts + _affine_parts(scheme, rows, columns // scheme.group_size)


def _affine_parts(scheme: HqqScheme, rows: int, groups: int) -> _Parts:
    """The arrays of scales and zeros."""
    if scheme.metadata_bits == 16:
        return [("scales", "float16", (rows, groups, 2))]
    blocks = -(-groups // META_BLOCK)
    return [("meta", "uint8", (rows, groups, 2)), ("meta_scales", "float32", (rows, blocks, 4))]


def _check_columns(name: str, scheme: Scheme, columns: int) -> None:
    if isinstance(scheme, HqqScheme):
        _check_hqq_columns(name, scheme, columns)
    elif isinstance(scheme, BitsAndBytesScheme):
        step = scheme.group_size or 32 // scheme.bits
        if columns % step:
            remedy = "format int8 would fit" if columns % 4 == 0 else "use backend none"
            raise DocumentError(f"{name} has {columns} inputs, not a multiple of {step} ({scheme.label}); {remedy}")


def _check_hqq_columns(name: str, scheme: HqqScheme, columns: int) -> None:
    word = 32 // (1 if scheme.bits == 3 else scheme.bits)  # columns in a word of the narrowest plane
    if columns % scheme.group_size or columns % word:
        fitting = [g for g in (256, 128, 64, 32, 16) if columns % g == 0 and columns % word == 0]
        remedy = f"group_size {', '.join(map(str, fitting))} would fit" if fitting else "use backend none"
        step = max(scheme.group_size, word)
        raise DocumentError(f"{name} has {columns} inputs, not a multiple of {step} ({scheme.label}); {remedy}")


def packed_matrix(
    name: str, rows: int, columns: int, scheme: Scheme, dense: str, offset: int = 0, bias: bool = False
) -> PackedMatrix:
    """Lay out one matrix from `offset` on.

    Args:
        name: of the matrix, for errors and the manifest.
        rows: outputs.
        columns: inputs.
        scheme: how it is stored.
        dense: dtype of unquantized numbers.
        offset: bytes from the start of the blob.
        bias: whether a float32 bias [rows] follows.

    Raises:
        DocumentError: the scheme's group size does not divide `columns`.
    """
    _check_columns(name, scheme, columns)
    parts = _parts(scheme, rows, columns, dense)
    if bias:
        parts.append(("bias", "float32", (rows,)))
    segments = []
    for part, dtype, shape in parts:
        offset = _round_up(offset, ALIGNMENT)
        nbytes = prod(shape) * _ITEM[dtype]
        segments.append(
            Segment.model_validate({"part": part, "dtype": dtype, "shape": shape, "offset": offset, "nbytes": nbytes})
        )
        offset += nbytes
    return PackedMatrix(name=name, rows=rows, columns=columns, scheme=scheme, segments=tuple(segments))


def resident_matrix(
    role: ResidentRole, name: str, rows: int, columns: int, scheme: Scheme, dense: str
) -> ResidentMatrix:
    """Lay out a matrix outside the experts: a little blob of its own, whose bias is a parameter beside it."""
    packed = packed_matrix(name, rows, columns, scheme, dense)
    return ResidentMatrix(name=name, rows=rows, columns=columns, scheme=scheme, segments=packed.segments, role=role)


def row_blocks(matrix: PackedMatrix) -> list[PackedMatrix]:
    """The matrix as neighbours of at most `UNPACKED` numbers each, in the same blob; itself where it is no larger."""
    if matrix.rows * matrix.columns <= UNPACKED:
        return [matrix]
    most = max(1, UNPACKED // matrix.columns // BLOCK_ROWS) * BLOCK_ROWS
    blocks = []
    for begin in range(0, matrix.rows, most):
        rows = min(most, matrix.rows - begin)
        segments = []
        for segment in matrix.segments:
            each = segment.nbytes // matrix.rows
            moved = {
                "offset": segment.offset + begin * each,
                "nbytes": rows * each,
                "shape": (rows, *segment.shape[1:]),
            }
            segments.append(segment.model_copy(update=moved))
        blocks.append(matrix.model_copy(update={"rows": rows, "segments": tuple(segments)}))
    return blocks


def blob_layout(
    matrices: Iterable[tuple[str, int, int]], scheme: Scheme, dense: str, biased: bool = False
) -> BlobLayout:
    """Lay out `(name, rows, columns)` one after the other in one page-aligned blob, each with a bias or none."""
    packed: list[PackedMatrix] = []
    end = 0
    for name, rows, columns in matrices:
        packed.append(packed_matrix(name, rows, columns, scheme, dense, end, biased))
        last = packed[-1].segments[-1]
        end = last.offset + last.nbytes
    return BlobLayout(nbytes=_round_up(end, PAGE), matrices=tuple(packed))


def expert_layout(hidden: int, intermediate: int, scheme: Scheme, dense: str, biased: bool = False) -> BlobLayout:
    """The blob of a gated expert: gate_up [2I, H], then down [H, I]; `biased` experts have a bias with each."""
    return blob_layout([("gate_up", 2 * intermediate, hidden), ("down", hidden, intermediate)], scheme, dense, biased)
