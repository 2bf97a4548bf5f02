"""Attention of a decoding step over a static cache: only valid positions are read, and the host need not know them.

torch's attention over a static cache reads every position behind a mask, and repeats keys and values for each query
head of a group. Here the length lies on the device, a group's heads share each reading, and the cache's size fixes the
grid, so that a CUDA graph can hold it. Sums are float32, probabilities are not rounded. Prefill is torch's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeflow.kernels.dense import aligned, rotate_refuses, strided
from moeflow.kernels.gemv import DTYPES
from moeflow.kernels.launcher import Launcher

__all__ = ["Attention", "Fresh", "Shape", "MOST_TOKENS"]

MOST_TOKENS = 8
"""Query tokens of a step."""
TILE = 64  # positions that a block reads at once; the same in attention.cu
MOST_SPLITS = 64  # shares of the positions: with 8 key/value heads, 512 blocks
WIDEST = 256


@dataclass(frozen=True)
class Fresh:
    """The query tokens' own keys and values, not in the cache yet, and the angles by which keys and queries turn."""

    k: Tensor
    """[1, Hk, T, D], as the projection gives them."""
    v: Tensor
    """[1, Hk, T, V]"""
    cos: Tensor
    """[1, T, D], or [1, T, D / 2] where both halves have the same."""
    sin: Tensor


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for, and how far its grid reaches."""

    width: int
    """Numbers of a key."""
    values: int
    """Numbers of a value."""
    rows: int
    """Query rows of a block."""
    chunks: int
    """Blocks for all rows of a key/value head."""
    splits: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Shape:
        """For q [1, Hq, T, D], k [1, Hk, S, D] and v [1, Hk, S, V]."""
        rows = q.shape[1] // k.shape[1] * q.shape[2]
        most = 8 if v.shape[3] <= 128 else 4  # what the registers, and 48 KiB of shared memory, hold
        together = min(most, rows)
        return cls(k.shape[3], v.shape[3], together, -(-rows // together), min(MOST_SPLITS, -(-k.shape[2] // TILE)))

    @property
    def threads(self) -> int:
        """Of a block: eight warps, each with eight positions of a tile; fewer where a warp holds more rows at once."""
        lanes = 1 << (max(self.width, self.values) // 8 - 1).bit_length()
        return TILE // max(8, 32 // lanes) * 32


class Attention:
    """Attention for one device; layers that run one after another share its workspace.

    A shape's workspace is made at its first call: let a warm-up pass do that before a graph is captured.
    """

    def __init__(self, launcher: Launcher):
        self._launcher = launcher
        # Never replaced: a graph may hold their addresses. The third is zero between launches.
        self._workspaces: dict[tuple[Shape, int], tuple[Tensor, Tensor, Tensor]] = {}

    @staticmethod
    def refuses(q: Tensor, k: Tensor, v: Tensor, length: Tensor, sinks: Tensor | None = None) -> str | None:
        """Why the kernel cannot take these, or None."""
        if q.dtype not in DTYPES or {k.dtype, v.dtype} != {q.dtype} or (sinks is not None and sinks.dtype != q.dtype):
            return f"query {q.dtype}, key {k.dtype}"
        if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
            return f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
        if q.shape[0] != 1 or k.shape[0] != 1 or q.shape[1] % k.shape[1]:
            return f"{q.shape[0]} sequences, {q.shape[1]} heads over {k.shape[1]}"
        if not 1 <= q.shape[2] <= MOST_TOKENS:
            return f"{q.shape[2]} tokens"
        widths = (k.shape[3], v.shape[3])
        if any(width % 8 or width > WIDEST for width in widths):
            return f"heads of {widths[0]} and {widths[1]} numbers"
        if length.dtype != torch.int64 or length.numel() != 1 or length.device != q.device:
            return f"a length of {length.dtype} on {length.device}"
        return None if aligned(q, k, v) else "not aligned to 16 bytes"

    @staticmethod
    def refuses_fresh(q: Tensor, keys: Tensor, fresh: Fresh) -> str | None:
        """Why the kernel cannot rotate and append these itself, or None; beside `refuses`."""
        if reason := rotate_refuses(q, fresh.k, fresh.cos, fresh.sin):
            return reason
        k, v, width = fresh.k, fresh.v, q.shape[3]
        if k.shape[:3] != v.shape[:3] or k.shape[1] != keys.shape[1] or v.dtype != k.dtype or width % 16:
            return f"keys {tuple(k.shape)}, values {tuple(v.shape)}, heads of {width} numbers"
        return None if aligned(k, v) and aligned(fresh.cos, fresh.sin) else "not aligned to 16 bytes"

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        length: Tensor,
        scaling: float,
        window: int | None = None,
        sinks: Tensor | None = None,
        fresh: Fresh | None = None,
    ) -> Tensor:
        """Causal attention of the last T of `length` tokens.

        Args:
            q: [1, Hq, T, D], T at most 8, by any strides.
            k: [1, Hk, S, D], of which the first `length` positions are read.
            v: [1, Hk, S, V].
            length: int64, on the device: the tokens in k and v, those of q included.
            scaling: of the products.
            window: how many positions a token sees, its own included; None: all.
            sinks: [Hq], a logit that takes part in the softmax without a value.
            fresh: the tokens' own keys and values, to be rotated like q and appended at `length`, which then counts the
                tokens before them and is moved on.

        Returns:
            [1, T, Hq, V]
        """
        shape = Shape.of(q, k, v)
        heads, tokens = k.shape[1], q.shape[2]
        partial, stats, finished = self._workspace(shape, heads, q.device)
        out = torch.empty(1, tokens, q.shape[1], shape.values, dtype=q.dtype, device=q.device)
        defines = {
            "ELEMENT": DTYPES[q.dtype], "WIDTH": shape.width, "VALUES": shape.values, "ROWS": shape.rows,
            "FRESH": int(fresh is not None), "TOKENS": tokens,
        }  # fmt: skip
        kernel = self._launcher.kernel("attention.cu", "attend", defines)
        strides = [x.stride(i) for x in (q, k, v) for i in (1, 2)]
        new: list[Tensor | int | None] = [None] * 4
        sizes = [0] * 5
        if fresh is not None:
            new = [strided(fresh.k), strided(fresh.v), fresh.cos.contiguous(), fresh.sin.contiguous()]
            sizes = [fresh.cos.shape[2], *(x.stride(i) for x in (fresh.k, fresh.v) for i in (1, 2))]
        kernel(
            (shape.splits, heads, shape.chunks), shape.threads, strided(q), strided(k), strided(v), out, partial,
            stats, finished, length, sinks, *strides, q.shape[1] // heads, window or 0, float(scaling),
            *new, *sizes, k.shape[2],
        )  # fmt: skip
        return out

    def _workspace(self, shape: Shape, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Partial sums, their maxima and denominators, and how many blocks of a head have finished."""
        if (shape, heads) not in self._workspaces:
            rows = heads * shape.chunks * shape.splits * shape.rows
            self._workspaces[shape, heads] = (
                torch.empty(rows * shape.values, dtype=torch.float32, device=device),
                torch.empty(rows * 2, dtype=torch.float32, device=device),
                torch.zeros(heads * shape.chunks + 1, dtype=torch.int32, device=device),
            )
        return self._workspaces[shape, heads]
