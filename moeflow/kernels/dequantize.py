"""Packed matrices back to numbers, in plain torch: the meaning of the formats, and the oracle of every kernel."""

from __future__ import annotations

from torch import Tensor, dtype, float32

from moeflow.kernels.packing import unpack

__all__ = ["affine"]


def affine(words: Tensor, high: Tensor | None, scales: Tensor, bits: int, out_dtype: dtype) -> Tensor:
    """`(code - zero) * scale` in float32, rounded once to `out_dtype`.

    Args:
        words: int32 [N, K * bits / 32], or the low two bits' plane for 3 bits.
        high: int32 [N, K / 32], the third bit's plane; None unless `bits` is 3.
        scales: float16 [N, K / group, 2], scale and zero side by side.
        bits: 2, 3, 4 or 8.
        out_dtype: of the result [N, K].
    """
    rows, groups, _ = scales.shape
    codes = unpack(words, high, bits).view(rows, groups, -1).to(float32)  # [N, K / group, group]
    scale, zero = scales.to(float32).unsqueeze(2).unbind(-1)  # each [N, K / group, 1]
    return codes.sub_(zero).mul_(scale).view(rows, -1).to(out_dtype)
