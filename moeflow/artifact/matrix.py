"""Writes a matrix into its place in a blob, and reads it back: the packed layout in torch's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moeflow.kernels.dequantize import affine
from moeflow.kernels.packing import pack
from moeflow.quantization.base import AffineCodes, Quantizer
from moeflow.schema import HqqScheme, PackedMatrix, Segment

__all__ = ["encode", "segment_view", "parts_of", "dequantize"]


def segment_view(blob: Tensor, segment: Segment) -> Tensor:
    """The array of one segment, as a view into `blob` (uint8, contiguous)."""
    raw = blob[segment.offset : segment.offset + segment.nbytes]
    dtype: torch.dtype = getattr(torch, segment.dtype)
    return raw.view(dtype).view(segment.shape)


def parts_of(matrix: PackedMatrix, blob: Tensor) -> dict[str, Tensor]:
    """All arrays of a matrix, by part, as views into `blob`."""
    return {segment.part: segment_view(blob, segment) for segment in matrix.segments}


def encode(
    matrix: PackedMatrix, weights: Sequence[Tensor], quantizer: Quantizer, blob: Tensor, bias: Tensor | None = None
) -> tuple[float, float]:
    """Quantize `weights` one by one, stack their rows, and write them to the matrix's place in `blob`.

    Args:
        matrix: where and how; its rows are the sum of the weights'.
        weights: each [N_i, K], on the device that shall quantize.
        quantizer: the backend of `matrix.scheme`.
        blob: uint8, in host memory.
        bias: [N], for a matrix that has one.

    Returns:
        Sums of squares of the error and of the weights, for a relative error over many matrices.
    """
    stored = [quantizer.quantize(weight) for weight in weights]
    arrays = [*_arrays(matrix, stored), *([bias] if bias is not None else [])]
    for segment, value in zip(matrix.segments, arrays, strict=True):
        segment_view(blob, segment).copy_(value.view(segment.shape))
    restored = dequantize(matrix, parts_of(matrix, blob), torch.float32).to(weights[0].device)
    original = torch.cat([w.float() for w in weights])
    weight = _square_sum(original)
    return _square_sum(original.sub_(restored)), weight  # not in place of `restored`, which may be the blob itself


def _arrays(matrix: PackedMatrix, stored: Sequence[AffineCodes | Tensor]) -> list[Tensor]:
    """The segments' contents in the segments' order."""
    if not isinstance(matrix.scheme, HqqScheme):
        return [torch.cat([s for s in stored if isinstance(s, Tensor)])]
    affine_codes = [s for s in stored if isinstance(s, AffineCodes)]
    words, high = pack(torch.cat([s.codes for s in affine_codes]), matrix.scheme.bits)
    scales = torch.cat([s.scales for s in affine_codes])
    return [words, scales] if high is None else [words, high, scales]


def _square_sum(tensor: Tensor) -> float:
    return float(tensor.double().square().sum()) if tensor.numel() < 1 << 20 else float(tensor.norm().double() ** 2)


def dequantize(matrix: PackedMatrix, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The matrix `[rows, columns]` in `dtype`; a view of `parts` where nothing has to be computed."""
    if isinstance(matrix.scheme, HqqScheme):
        return affine(parts["words"], parts.get("high"), parts["scales"], matrix.scheme.bits, dtype)
    return parts["dense"].to(dtype)
