"""Packed matrices times a few vectors on the CPU, without unpacking them first; and unpacked, for many vectors.

Products of hqq's and int8's formats are `kernels.gemv`'s to the last bit (see cpp/matrix.hpp); those of nf4, and of
plain numbers of 16 bits, are sums in float32. One call is one thread's work on a range of rows: Python's lock is free
meanwhile, and who shares rows among threads is another's business. With one plane quantized weights meet activations of
8 bits: half the work, and its own error.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moeflow.errors import DeviceError
from moeflow.kernels.gemv import DTYPES, Format
from moeflow.kernels.library import library
from moeflow.schema import PackedMatrix

__all__ = ["LEVELS", "CpuGemv", "CpuVectors", "Job", "Matrix", "Sizes", "Vectors", "best_level", "unsupported"]

LEVELS = ("portable", "AVX2", "AVX-512", "AVX-512 VNNI")
"""Of instructions, as in cpp/matrix.hpp."""
KINDS = {"DENSE": 0, "AFFINE": 1, "SIGNED": 2, "CODEBOOK": 3}
NUMBERS = {"HALF": 1, "BFLOAT": 2}
PLAIN_STEP = 32  # columns of plain numbers that are taken together
LINE = 64  # bytes: where a vector's numbers begin


class Matrix(ctypes.Structure):
    """Of cpp/matrix.hpp, as all that follow."""

    _fields_ = (
        *((name, c_int32) for name in ("kind", "bits", "group", "meta")),
        *((name, c_int64) for name in ("rows", "columns", "words", "high", "scales", "steps", "bias")),
    )


class Vectors(ctypes.Structure):
    """Prepared activations."""

    _fields_ = (
        ("numbers", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("stride", c_int64),
        ("count", c_int32),
        ("planes", c_int32),
    )


class Job(ctypes.Structure):
    """A range of rows of one matrix times some vectors."""

    _fields_ = (
        ("matrix", POINTER(Matrix)),
        ("blob", c_void_p),
        ("vectors", POINTER(Vectors)),
        ("out", c_void_p),
        ("begin", c_int64),
        ("end", c_int64),
    )


class Sizes(ctypes.Structure):
    """What one vector takes: bytes of numbers, and how many scales and sums."""

    _fields_ = (("numbers", c_int64), ("scales", c_int64), ("sums", c_int64))


@dataclass(frozen=True)
class CpuVectors:
    """Activations [R, K] laid out for one packed format."""

    numbers: Tensor
    """uint8 [R, bytes]."""
    scales: Tensor
    sums: Tensor
    struct: Vectors
    """Points into the tensors."""


@cache
def _functions() -> ctypes.CDLL:
    """The library with its functions' types.

    Raises:
        DeviceError: it is not there.
    """
    loaded = library()
    loaded.moeflow_best_level.argtypes = ()
    loaded.moeflow_sizes.argtypes = (POINTER(Matrix), c_int32, POINTER(Sizes))
    loaded.moeflow_prepare.argtypes = (POINTER(Matrix), c_int32, c_void_p, c_int64, POINTER(Vectors))
    loaded.moeflow_can_multiply.argtypes = (POINTER(Matrix), c_int32, c_int32)
    loaded.moeflow_multiply.argtypes = (POINTER(Job), c_int32)
    loaded.moeflow_unpack.argtypes = (POINTER(Matrix), c_void_p, c_int32, c_void_p, c_int64, c_int64, c_int32)
    return loaded


def best_level() -> int:
    """The highest of `LEVELS` that this machine has.

    Raises:
        DeviceError: the library is missing.
    """
    return int(_functions().moeflow_best_level())


def unsupported(matrix: PackedMatrix) -> str | None:
    """Why these kernels cannot multiply this matrix, or None. Numbers of 32 bits are torch's business."""
    form = Format.of(matrix)
    if form.dtype not in NUMBERS and form.kind == "DENSE":
        return f"{matrix.name} is stored in {form.bits} bits"
    step = PLAIN_STEP if form.kind == "DENSE" else form.chunk
    if matrix.columns % step:
        return f"{matrix.name} has {matrix.columns} inputs, not a multiple of {step} ({matrix.scheme.label})"
    return None


class CpuGemv:
    """One packed matrix shape, ready to multiply.

    Args:
        matrix: its shape, format, and place in a blob.
        planes: bytes of an activation: 2 is the GPU's 16-bit fixed point, 1 has 8 bits.
        level: of instructions, an index of `LEVELS`; None: the best that the machine has.

    Raises:
        DeviceError: the library is missing, or there is no such kernel.
    """

    def __init__(self, matrix: PackedMatrix, planes: int = 2, level: int | None = None):
        if reason := unsupported(matrix):
            raise DeviceError(reason)
        form = Format.of(matrix)
        self.plain = form.kind == "DENSE"
        """Whether the matrix is stored as numbers; there is nothing to unpack then."""
        self.matrix = matrix
        self.planes = planes
        self.level = best_level() if level is None else level
        meta = NUMBERS[form.dtype] if self.plain else form.meta
        self.struct = Matrix(
            KINDS[form.kind], form.bits, form.group, meta, matrix.rows, matrix.columns, *Format.offsets(matrix)
        )
        self._functions = _functions()
        if not self._functions.moeflow_can_multiply(byref(self.struct), planes, self.level):
            name = LEVELS[self.level] if 0 <= self.level < len(LEVELS) else self.level
            raise DeviceError(f"no CPU kernel multiplies {matrix.scheme.label} with {planes} planes at level {name}")
        self.sizes = Sizes()
        """Of one vector."""
        self._functions.moeflow_sizes(byref(self.struct), planes, byref(self.sizes))
        self._nbytes = max(s.offset + s.nbytes for s in matrix.segments)

    def prepare(self, x: Tensor) -> CpuVectors:
        """Lay out x [R, K], float32, float16 or bfloat16."""
        assert x.shape[1] == self.matrix.columns and x.device.type == "cpu", "activations do not fit the matrix"
        x = x.contiguous()
        rows, sizes = len(x), self.sizes
        numbers = _aligned(rows, sizes.numbers)
        scales, sums = torch.empty(rows, sizes.scales), torch.empty(rows, sizes.sums)
        pointers = (tensor.data_ptr() for tensor in (numbers, scales, sums))
        struct = Vectors(*pointers, sizes.numbers, rows, self.planes)
        arguments = (DTYPES[x.dtype], x.data_ptr(), self.matrix.columns, byref(struct))
        self._functions.moeflow_prepare(byref(self.struct), *arguments)
        return CpuVectors(numbers, scales, sums, struct)

    def job(self, blob: Tensor, x: CpuVectors, out: Tensor, begin: int = 0, end: int | None = None) -> Job:
        """What a thread is given: rows `begin` to `end` of the products; it does not keep the tensors alive.

        Args:
            blob: uint8, the matrix's parts at their offsets.
            x: R vectors.
            out: float32 [R, N], contiguous.
            begin: the first row.
            end: the row behind the last; None: N.
        """
        end = self.matrix.rows if end is None else end
        assert 0 <= begin <= end <= self.matrix.rows and x.struct.planes == self.planes, "not the matrix's rows"
        assert blob.is_contiguous() and blob.nbytes >= self._nbytes, "the blob is too small"
        assert out.shape == (x.struct.count, self.matrix.rows) and out.dtype == torch.float32 and out.is_contiguous()
        return Job(ctypes.pointer(self.struct), blob.data_ptr(), ctypes.pointer(x.struct), out.data_ptr(), begin, end)

    def multiply(
        self, blob: Tensor, x: CpuVectors, begin: int = 0, end: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Rows `begin` to `end` of W @ x for every vector, in the calling thread; the arguments are `job`'s.

        Returns:
            float32 [R, N]: `out`, or a new tensor, in which nothing is written outside of the range.
        """
        if out is None:
            out = torch.empty(x.struct.count, self.matrix.rows)
        self.run(self.job(blob, x, out, begin, end))
        return out

    def run(self, job: Job) -> None:
        """Do a job of this matrix in the calling thread."""
        self._functions.moeflow_multiply(byref(job), self.level)

    def unpack(
        self, blob: Tensor, dtype: torch.dtype, out: Tensor | None = None, begin: int = 0, end: int | None = None
    ) -> Tensor:
        """Rows `begin` to `end` of a quantized matrix as plain numbers, `kernels.dequantize`'s to the last bit.

        Returns:
            [N, K] of `dtype`: `out`, or a new tensor, in which nothing is written outside of the range.
        """
        rows, columns = self.matrix.rows, self.matrix.columns
        end = rows if end is None else end
        if out is None:
            out = torch.empty(rows, columns, dtype=dtype)
        assert not self.plain and out.shape == (rows, columns) and out.dtype == dtype and out.is_contiguous(), (
            "out does not fit the matrix"
        )
        assert blob.is_contiguous() and blob.nbytes >= self._nbytes and 0 <= begin <= end <= rows
        arguments = (blob.data_ptr(), DTYPES[dtype], out.data_ptr(), begin, end, self.level)
        self._functions.moeflow_unpack(byref(self.struct), *arguments)
        return out


def _aligned(rows: int, stride: int) -> Tensor:
    """uint8 [rows, stride], from a multiple of LINE on."""
    memory = torch.empty(rows * stride + LINE, dtype=torch.uint8)
    begin = -memory.data_ptr() % LINE
    return memory[begin : begin + rows * stride].view(rows, stride)
