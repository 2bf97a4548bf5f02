"""Packs small integers into int32 words along a row, and back.

A word holds the next `32 / bits` columns of its row, the first in the lowest bits. 3-bit integers lie in two
planes, the low two bits as 2-bit words and the third bit as 1-bit words: exactly 3 bits, and no integer
straddles a word.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["pack", "unpack"]


def pack(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Pack `codes` [N, K] of values below `2**bits` into words [N, K * bits / 32] and, for 3 bits, the high plane.

    `K * bits` must be a multiple of 32 (for 3 bits: K a multiple of 32); the caller has checked it.
    """
    if bits == 3:
        return _pack_plane(codes & 3, 2), _pack_plane(codes >> 2, 1)
    return _pack_plane(codes, bits), None


def unpack(words: Tensor, high: Tensor | None, bits: int) -> Tensor:
    """The codes [N, K] as int32, the inverse of `pack`."""
    if bits == 3:
        assert high is not None
        return _unpack_plane(words, 2) | _unpack_plane(high, 1) << 2
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
