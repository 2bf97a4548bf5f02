"""Writes a matrix into its place in a blob, and reads it back: the packed layout in torch's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moeflow.artifact.layout import ALIGNMENT
from moeflow.kernels.dequantize import affine, codebook, pairs, row_scaled
from moeflow.kernels.packing import pack
from moeflow.quantization.base import Codes, Quantizer
from moeflow.schema import BitsAndBytesScheme, DenseScheme, PackedMatrix, Segment

__all__ = ["allocate_blobs", "encode", "segment_view", "parts_of", "dequantize"]


def allocate_blobs(matrices: Sequence[PackedMatrix], device: torch.device) -> dict[str, Tensor]:
    """Memory for each matrix's parts, by name, all in one piece: an allocator rounds up each that it is asked for."""
    sizes = [max(s.offset + s.nbytes for s in m.segments) for m in matrices]
    padded = [-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes in sizes]
    pieces = torch.split(torch.empty(sum(padded), dtype=torch.uint8, device=device), padded)
    return {m.name: piece[:nbytes] for m, piece, nbytes in zip(matrices, pieces, sizes, strict=True)}


def segment_view(blob: Tensor, segment: Segment) -> Tensor:
    """The array of one segment, as a view into `blob` (uint8, contiguous)."""
    raw = blob[segment.offset : segment.offset + segment.nbytes]
    dtype: torch.dtype = getattr(torch, segment.dtype)
    return raw.view(dtype).view(segment.shape)


def parts_of(matrix: PackedMatrix, blob: Tensor) -> dict[str, Tensor]:
    """All arrays of a matrix, by part, as views into `blob`."""
    return {segment.part: segment_view(blob, segment) for segment in matrix.segments}


def encode(
    matrix: PackedMatrix,
    weights: Sequence[Tensor],
    quantizer: Quantizer,
    blob: Tensor,
    biases: Sequence[Tensor] = (),
) -> tuple[float, float]:
    """Quantize `weights` one by one, stack their rows, and write them to the matrix's place in `blob`.

    Args:
        matrix: where and how; its rows are the sum of the weights'.
        weights: each [N_i, K], on the device that shall quantize.
        quantizer: the backend of `matrix.scheme`.
        blob: uint8, in host memory.
        biases: together [N], where the matrix has a bias; they are stored in float32.

    Returns:
        Sums of squares of the error and of the weights, for a relative error over many matrices.
    """
    assert bool(biases) == matrix.bias, "a biased matrix takes biases, and no other"
    arrays = _arrays(matrix, [quantizer.quantize(weight) for weight in weights])
    if biases:
        arrays["bias"] = torch.cat(list(biases)).float()
    assert arrays.keys() == {segment.part for segment in matrix.segments}, "the backend gives what the layout has"
    for segment in matrix.segments:
        segment_view(blob, segment).copy_(arrays[segment.part].view(segment.shape))
    restored = dequantize(matrix, parts_of(matrix, blob), torch.float32).to(weights[0].device)
    original = torch.cat([w.float() for w in weights])
    weight = _square_sum(original)
    return _square_sum(original.sub_(restored)), weight  # not in place of `restored`, which may be the blob itself


def _arrays(matrix: PackedMatrix, stored: Sequence[Codes | Tensor]) -> dict[str, Tensor]:
    """The segments' contents by part, rows of all `stored` one after the other."""
    if isinstance(matrix.scheme, DenseScheme):
        return {"dense": torch.cat([s for s in stored if isinstance(s, Tensor)])}
    quantized = [s for s in stored if isinstance(s, Codes)]
    words, high = pack(torch.cat([s.codes for s in quantized]), matrix.scheme.bits)
    arrays = {part: torch.cat([s.factors[part] for s in quantized]) for part in quantized[0].factors}
    return {"words": words, **({} if high is None else {"high": high}), **arrays}


def _square_sum(tensor: Tensor) -> float:
    return float(tensor.double().square().sum()) if tensor.numel() < 1 << 20 else float(tensor.norm().double() ** 2)


def dequantize(matrix: PackedMatrix, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The matrix `[rows, columns]` in `dtype`, without its bias; a view of `parts` where nothing has to be computed."""
    scheme = matrix.scheme
    if isinstance(scheme, DenseScheme):
        return parts["dense"].to(dtype)
    if isinstance(scheme, BitsAndBytesScheme):
        restore = codebook if scheme.format == "nf4" else row_scaled
        return restore(parts["words"], parts["scales"], dtype)
    scales = parts["scales"] if scheme.metadata_bits == 16 else pairs(parts["meta"], parts["meta_scales"])
    return affine(parts["words"], parts.get("high"), scales, scheme.bits, dtype)
