"""Packs small integers into int32 words along a row, and back.

A word holds the next `32 / bits` columns of its row, the first in the lowest bits. 3-bit integers lie in two
planes, the low two bits as 2-bit words and the third bit as 1-bit words: exactly 3 bits, and no integer
straddles a word. The third bits of 32 columns are ordered so that one shift and mask brings those of four codes to
the bytes where a shift and mask of the low plane brings their low bits: column c goes to bit
`8 * (c % 16 // 4) + 4 * (c // 16) + c % 4`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]

_THIRD = (2, 4, 4)  # 32 columns: two words of the low plane, their four bytes, the four fields of a byte


def pack(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Pack `codes` [N, K] of values below `2**bits` into words [N, K * bits / 32] and, for 3 bits, the high plane.

    `K * bits` must be a multiple of 32 (for 3 bits: K a multiple of 32); the caller has checked it.
    """
    if bits == 3:
        high = (codes >> 2).view(len(codes), -1, *_THIRD).permute(0, 1, 3, 2, 4)  # [N, words, byte, half, field]
        return _pack_plane(codes & 3, 2), _pack_plane(high.reshape(codes.shape), 1)
    return _pack_plane(codes, bits), None


def unpack(words: Tensor, high: Tensor | None, bits: int) -> Tensor:
    """The codes [N, K] as int32, the inverse of `pack`."""
    if bits == 3:
        assert high is not None
        low = _unpack_plane(words, 2)
        third = (
            _unpack_plane(high, 1).view(len(low), -1, 4, 2, 4).permute(0, 1, 3, 2, 4)
        )  # [N, words, half, byte, field]
        return low | third.reshape(low.shape) << 2
    return _unpack_plane(words, bits)


@cache
def _shifts(bits: int, device: torch.device) -> Tensor:
    """Where a word's fields begin; made once, since decoding asks for it a hundred times a token."""
    return torch.arange(32 // bits, dtype=torch.int32, device=device) * bits


def _pack_plane(codes: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    per_word = 32 // bits
    grouped = codes.to(torch.int32).view(rows, columns // per_word, per_word)
    return (grouped << _shifts(bits, codes.device)).sum(-1, dtype=torch.int32)  # bits are disjoint: the sum is an OR


def _unpack_plane(words: Tensor, bits: int) -> Tensor:
    rows, columns = words.shape
    fields = (words.unsqueeze(-1) >> _shifts(bits, words.device)) & (
        (1 << bits) - 1
    )  # arithmetic shift: the mask drops the sign
    return fields.view(rows, columns * (32 // bits))
