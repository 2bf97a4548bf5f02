"""Packed matrices times a few vectors on the device, without unpacking them first.

For decoding: one to eight tokens, every expert that they chose in one launch, found through the cache's places.
`prepare` lays activations out for the packed format; `multiply` reads each matrix once. What the formats mean is
said by `kernels.dequantize`, the oracle of this module. Many tokens are `kernels.unpack`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moeflow.kernels.dequantize import NF4_CODEBOOK
from moeflow.kernels.launcher import Launcher
from moeflow.schema import BitsAndBytesScheme, HqqScheme, PackedMatrix

__all__ = ["DTYPES", "Format", "Gate", "Gemv", "Jobs", "Prepared", "ROW_STEP", "Rows", "MOST_TOKENS", "unsupported"]

MOST_TOKENS = 8
"""Vectors that share one reading of a matrix."""
THREADS, SMALL = 256, 128  # of a block
FEW_ROWS = 1 << 13  # of all matrices of a product together
WIDE = 8192  # columns
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
NF4 = 4


@dataclass(frozen=True)
class Gate:
    """What stands between the two matrices of an expert."""

    name: str = "PLAIN"
    """A macro of activation.cu: PLAIN, SILU, GELU, GELU_TANH, RELU, CLAMPED."""
    limit: float = 0.0
    alpha: float = 0.0

    @property
    def width(self) -> int:
        """Inputs per output."""
        return 1 if self.name == "PLAIN" else 2


@dataclass(frozen=True)
class Prepared:
    """Activations [R, K] laid out for one packed format."""

    rows: int
    pieces: Tensor
    scales: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Jobs:
    """Which matrices are multiplied with which vectors.

    For one token, choice `j` is the matrix in `buffers[j]`. For several, `starts` and `lists` name the choices that
    each matrix serves, so that it is read once.
    """

    pool: Tensor
    """uint8 [B, blob bytes]; or one matrix [1, bytes]."""
    buffers: Tensor | None
    """int32 [J]; None: the first."""
    choices: int
    """Rows of the result."""
    share: int = 1
    """Consecutive choices that read the same vector."""
    starts: Tensor | None = None
    lists: Tensor | None = None
    source: int | None = None
    """Where the matrices lie instead of in `pool`, as far apart: an address as the device sees it."""


@dataclass(frozen=True)
class Rows:
    """Which rows of each choice's result are computed; of one token."""

    begin: Tensor | None = None
    """int32 [J], multiples of `ROW_STEP`; None: all from the first."""
    end: Tensor | None = None
    """int32 [J], multiples of `ROW_STEP` or all rows; None: all to the last."""
    only_if: Tensor | None = None
    """int32 [1]: 0 where nothing is computed at all; None: always."""


ROW_STEP = 64
"""Rows of a warp divide it."""
ALL_ROWS = Rows()


def unsupported(matrix: PackedMatrix) -> str | None:
    """Why this matrix cannot be multiplied packed, or None."""
    kernel = Format.of(matrix)
    if matrix.columns % kernel.chunk:
        return f"{matrix.name} has {matrix.columns} inputs, not a multiple of {kernel.chunk} ({matrix.scheme.label})"
    return None


@dataclass(frozen=True)
class Format:
    """A packed format in the kernels' terms; mirrors format.cuh."""

    kind: str
    bits: int
    group: int = 0
    meta: int = 16
    dtype: str = "FLOAT"

    @classmethod
    def of(cls, matrix: PackedMatrix) -> Format:
        """The format in which `matrix` is stored."""
        scheme = matrix.scheme
        if isinstance(scheme, HqqScheme):
            return cls("AFFINE", scheme.bits, scheme.group_size, scheme.metadata_bits)
        if isinstance(scheme, BitsAndBytesScheme):
            return cls("CODEBOOK", 4, 64) if scheme.format == "nf4" else cls("SIGNED", 8)
        dtype = next(s.dtype for s in matrix.segments if s.part == "dense")
        names = {"float32": (32, "FLOAT"), "float16": (16, "HALF"), "bfloat16": (16, "BFLOAT")}
        return cls("DENSE", names[dtype][0], dtype=names[dtype][1])

    @property
    def chunk(self) -> int:
        """Columns of 16 bytes of codes."""
        return 128 // (2 if self.bits == 3 else self.bits)

    @property
    def vectors(self) -> int:
        """16-byte pieces of prepared activations per chunk."""
        return self.chunk // 4 if self.kind == "DENSE" else self.chunk // 8

    @property
    def units(self) -> int:
        """Scales per chunk."""
        return max(1, self.chunk // self.group) if self.kind == "AFFINE" else 1

    @staticmethod
    def offsets(matrix: PackedMatrix) -> tuple[int, int, int, int, int]:
        """Where codes, third bits, scales, steps of 8-bit metadata and bias lie in the blob; -1 for no bias."""
        at = {s.part: s.offset for s in matrix.segments}
        codes, scales = at.get("words", at.get("dense", 0)), at.get("scales", at.get("meta", 0))
        return codes, at.get("high", 0), scales, at.get("meta_scales", 0), at.get("bias", -1)

    def codebook(self, device: torch.device) -> Tensor | None:
        """The numbers that codes stand for, where they are not their own values."""
        return _nf4(device) if self.kind == "CODEBOOK" else None

    @property
    def defines(self) -> dict[str, int | str]:
        """Macros for format.cuh."""
        return {"KIND": self.kind, "BITS": self.bits, "GROUP": self.group, "META": self.meta, "DTYPE": self.dtype}


@cache
def _nf4(device: torch.device) -> Tensor:
    """On the device once: sending it there waits for all that is under way."""
    return torch.tensor(NF4_CODEBOOK, dtype=torch.float32, device=device)


class Gemv:
    """One packed matrix shape, ready to multiply."""

    def __init__(self, launcher: Launcher, matrix: PackedMatrix, device: torch.device):
        self.matrix = matrix
        self._launcher = launcher
        self._format = Format.of(matrix)
        self._device = device
        self._offsets = self._format.offsets(matrix)
        self._codebook = self._format.codebook(device)

    @property
    def layout(self) -> object:
        """Equal for matrices that can share prepared activations."""
        form = self._format
        return (form.kind, form.bits, form.group if form.kind == "AFFINE" else 0, form.dtype, self.matrix.columns)

    def prepare(self, x: Tensor, gate: Gate = Gate()) -> Prepared:
        """Lay out x [R, K], or a gate_up product [R, 2K] through `gate`."""
        columns, rows = self.matrix.columns, x.shape[0]
        assert x.shape[1] == columns * gate.width, "activations do not fit the matrix"
        room = self.room(rows)
        defines = {**self.defines, "GATE": gate.name, "INPUT": DTYPES[x.dtype]}
        kernel = self._launcher.kernel("activation.cu", "prepare", defines)
        grid = (-(-columns // (4 * THREADS)), rows, 1)
        kernel(grid, THREADS, x, room.pieces, room.scales, room.sums, columns, gate.limit, gate.alpha)
        return room

    def room(self, rows: int) -> Prepared:
        """Memory for `rows` prepared vectors; nothing is in it yet."""
        form, device = self._format, self._device
        chunks = self.matrix.columns // form.chunk
        pieces = torch.empty(rows, self.staged_bytes // 16, 4, dtype=torch.int32, device=device)
        scales = torch.empty(rows, chunks, dtype=torch.float32, device=device)
        sums = torch.empty(rows, chunks * form.units, dtype=torch.float32, device=device)
        return Prepared(rows, pieces, scales, sums)

    @property
    def staged_bytes(self) -> int:
        """Of one vector's pieces."""
        chunks = self.matrix.columns // self._format.chunk
        return -(-chunks // 32) * 32 * self._format.vectors * 16

    @property
    def defines(self) -> dict[str, int | str]:
        """Macros that name the packed format."""
        return self._format.defines

    def multiply(
        self, x: Prepared, jobs: Jobs, tokens: int = 1, dtype: torch.dtype = torch.float32, which: Rows = ALL_ROWS,
        out: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """W @ x for every choice.

        Args:
            x: `choices / share` vectors.
            jobs: which matrices.
            tokens: the most choices that a matrix serves.
            dtype: of the result; sums are float32 in any case.
            which: rows that are computed; the others of `out` are left as they are.
            out: where the result goes; None: a new tensor.

        Returns:
            [choices, N].
        """
        rows, columns = self.matrix.rows, self.matrix.columns
        if out is None:
            out = torch.empty(jobs.choices, rows, dtype=dtype, device=x.pieces.device)
        assert tokens == 1 or which is ALL_ROWS, "rows are chosen for one token"
        assert tokens > 1 or jobs.share in (1, jobs.choices), "one token's choices share its vector, or have one each"
        together = 1 if jobs.starts is None else min(MOST_TOKENS, 1 << (tokens - 1).bit_length())
        per_warp, threads = self._share(together, jobs.choices)
        defines = {
            **self.defines,
            "ROWS": per_warp,
            "TOKENS": together,
            "OUTPUT": DTYPES[dtype],
            "COLUMNS": columns,
            "CONSTANT": int(jobs.buffers is None),
        }
        per_block = threads // 32 * per_warp
        if rows % per_block == 0:
            defines["EXACT"] = 1
        kernel = self._launcher.kernel("gemv.cu", "gemv", defines)
        count = jobs.choices if jobs.buffers is not None else 1
        grid = (-(-rows // per_block), count, 1)
        stride = jobs.pool.shape[1]
        kernel(
            grid, threads, jobs.pool if jobs.source is None else jobs.source, stride, jobs.buffers, jobs.starts,
            jobs.lists, jobs.share, *self._offsets, self._codebook, x.pieces, x.scales, x.sums, out, rows, which.begin,
            which.end, which.only_if,
        )  # fmt: skip
        return out

    def _share(self, tokens: int, choices: int) -> tuple[int, int]:
        """Rows of a warp, and threads of a block: as `tools/kernel_speed.py --sweep` found them fastest on an H100.

        More rows share the activations that a lane has read; fewer keep all multiprocessors busy, and registers few.
        """
        form, columns = self._format, self.matrix.columns
        if tokens >= 4:
            return 1, THREADS
        if form.kind == "DENSE" or tokens > 1:
            return 2, THREADS
        if form.kind == "CODEBOOK":
            return 4, THREADS  # a block begins by filling a table
        if self.matrix.rows * choices < FEW_ROWS:
            return 1, THREADS
        if form.bits == 8:
            return 2, SMALL
        if form.units > 1 or form.bits == 3:  # several scales a chunk, or two planes: registers
            return (4 if form.units > 1 else 2) if columns <= WIDE else 1, SMALL
        return 4 if form.bits == 2 or columns <= WIDE else 2, SMALL
