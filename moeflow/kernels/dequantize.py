"""Packed matrices back to numbers, in plain torch: the meaning of the formats, and the oracle of every kernel.

All arithmetic is float32, one operation after the other, and the result is rounded once to the wanted dtype. A
kernel that fuses a product and a sum may differ from it by a rounding, no more.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, dtype, float32

from moeflow.kernels.packing import unpack
from moeflow.schema.quantization import META_BLOCK

__all__ = ["affine", "pairs", "codebook", "row_scaled", "NF4_CODEBOOK"]

NF4_CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""The numbers that nf4's codes stand for, as bitsandbytes has them; each is a float32."""


def affine(words: Tensor, high: Tensor | None, scales: Tensor, bits: int, out_dtype: dtype) -> Tensor:
    """`(code - zero) * scale` in float32, rounded once to `out_dtype`.

    Args:
        words: int32 [N, K * bits / 32], or the low two bits' plane for 3 bits.
        high: int32 [N, K / 32], the third bit's plane; None unless `bits` is 3.
        scales: float16 [N, K / group, 2], scale and zero side by side; float32 from `pairs`.
        bits: 2, 3, 4 or 8.
        out_dtype: of the result [N, K].
    """
    rows, groups, _ = scales.shape
    codes = unpack(words, high, bits).view(rows, groups, -1).to(float32)  # [N, K / group, group]
    scale, zero = scales.to(float32).unsqueeze(2).unbind(-1)  # each [N, K / group, 1]
    return codes.sub_(zero).mul_(scale).view(rows, -1).to(out_dtype)


def pairs(meta: Tensor, meta_scales: Tensor) -> Tensor:
    """Scales and zeros from 8-bit metadata, `code * step + offset` in float32: the product is rounded, then the sum.

    Args:
        meta: uint8 [N, G, 2], the codes of scale and zero of each of a row's G groups.
        meta_scales: float32 [N, ceil(G / 128), 4]: scale step, scale offset, zero step, zero offset of each block
            of 128 groups; the last block may be shorter.

    Returns:
        float32 [N, G, 2], scale and zero side by side, as `affine` takes them.
    """
    rows, groups, _ = meta.shape
    spread = meta_scales.repeat_interleave(META_BLOCK, dim=1)[:, :groups].view(rows, groups, 2, 2)
    step, offset = spread.unbind(-1)  # each [N, G, 2]
    return meta.to(float32).mul_(step).add_(offset)


def codebook(words: Tensor, scales: Tensor, out_dtype: dtype) -> Tensor:
    """nf4: `NF4_CODEBOOK[code] * scale` in float32, rounded once to `out_dtype`.

    Args:
        words: int32 [N, K / 8], eight 4-bit codes each.
        scales: float16 [N, K / 64], the largest magnitude of each block of 64 columns.
        out_dtype: of the result [N, K].
    """
    rows, blocks = scales.shape
    codes = unpack(words, None, 4).view(-1)
    numbers = _nf4(words.device).index_select(0, codes).view(rows, blocks, -1)  # [N, K / 64, 64]
    return numbers.mul_(scales.to(float32).unsqueeze(2)).view(rows, -1).to(out_dtype)


def row_scaled(words: Tensor, scales: Tensor, out_dtype: dtype) -> Tensor:
    """int8: `code * scale` in float32, rounded once to `out_dtype`.

    Args:
        words: int32 [N, K / 4], four signed bytes each.
        scales: float32 [N], the largest magnitude of each row, divided by 127.
        out_dtype: of the result [N, K].
    """
    codes = words.view(torch.int8).to(float32)  # [N, K]
    return codes.mul_(scales.unsqueeze(1)).to(out_dtype)


@cache
def _nf4(device: torch.device) -> Tensor:
    """The table, moved to a device once."""
    return torch.tensor(NF4_CODEBOOK, dtype=float32, device=device)
