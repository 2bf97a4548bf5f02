"""Writes a matrix into its place in a blob, and reads it back: the packed layout in torch's terms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moeflow.artifact.layout import ALIGNMENT
from moeflow.kernels.dequantize import affine, codebook, pairs, row_scaled
from moeflow.kernels.packing import pack
from moeflow.quantization.base import Codes, Quantizer
from moeflow.schema import BitsAndBytesScheme, DenseScheme, PackedMatrix, Scheme, Segment

__all__ = ["allocate_blobs", "encode", "segment_view", "parts_of", "dequantize"]

AT_ONCE = 1 << 23  # numbers of a matrix that are packed and restored at once


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
        weights: each [N_i, K], on the device that shall quantize and pack.
        quantizer: the backend of `matrix.scheme`.
        blob: uint8, in host memory or, which saves copies, on the weights' device.
        biases: together [N], where the matrix has a bias; they are stored in float32.

    Returns:
        Sums of squares of the error and of the weights, for a relative error over many matrices.
    """
    assert bool(biases) == matrix.bias, "a biased matrix takes biases, and no other"
    parts = parts_of(matrix, blob)
    if biases:
        parts.pop("bias").copy_(torch.cat(list(biases)))
    error = square = torch.zeros((), dtype=torch.float64, device=weights[0].device)
    row = 0
    for weight in weights:
        stored = quantizer.quantize(weight)
        for block in _row_slices(weight):
            place = {name: part[row + block.start : row + block.stop] for name, part in parts.items()}
            arrays = _arrays(matrix.scheme, stored, block)
            assert arrays.keys() == place.keys(), "the backend gives what the layout has"
            for name, array in arrays.items():
                place[name].copy_(array)
            restored = dequantize(matrix, place, torch.float32).to(weight.device)
            square = square + _square_sum(weight[block].float())
            error = error + _square_sum(weight[block].float() - restored)
        row += len(weight)
    assert row == matrix.rows, "the matrix has the rows of its weights"
    return float(error), float(square)


def _row_slices(matrix: Tensor) -> Iterator[slice]:
    """Rows of `matrix` [N, K] that are packed and restored at once: what is restored is twice as large in float32."""
    step = max(1, AT_ONCE // matrix.shape[1])
    for begin in range(0, matrix.shape[0], step):
        yield slice(begin, min(matrix.shape[0], begin + step))


def _arrays(scheme: Scheme, stored: Codes | Tensor, rows: slice) -> dict[str, Tensor]:
    """The segments' contents by part, of some rows."""
    if isinstance(scheme, DenseScheme) or isinstance(stored, Tensor):
        assert isinstance(scheme, DenseScheme) and isinstance(stored, Tensor), "no quantizer but `none` keeps a tensor"
        return {"dense": stored[rows]}
    words, high = pack(stored.codes[rows], scheme.bits)
    factors = {part: factor[rows] for part, factor in stored.factors.items()}
    return {"words": words, **({} if high is None else {"high": high}), **factors}


def _square_sum(tensor: Tensor) -> Tensor:
    return tensor.square().sum(dtype=torch.float64)


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
