"""From one product of a decoding step to the next, in one launch: experts' sum, residual connection, norm, layout.

Each of these alone is a kernel of one or two microseconds that computes for a fraction of it; a layer has two such
junctions. Roundings are those of transformers' separate operations. Rows too wide for a block's shared memory are laid
out by `Gemv.prepare` instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeflow.kernels.dense import aligned, norm_refuses
from moeflow.kernels.gemv import DTYPES, Gemv, Prepared
from moeflow.kernels.launcher import Launcher

__all__ = ["ExpertSum", "Joined", "join", "join_refuses"]

NUMBERS = 8  # of a thread at once
MOST_THREADS = 1024
MOST_EACH = 4
STAGED = 40 << 10  # bytes of shared memory for a row's pieces; a block has 48 KiB


@dataclass(frozen=True)
class ExpertSum:
    """What the experts of a layer give, before it is summed."""

    results: Tensor
    """float32 [T * K, N]."""
    weights: Tensor
    """[T, K] of the router."""


@dataclass(frozen=True)
class Joined:
    """The residual stream after the junction, the normalized rows, and these as the next product reads them."""

    total: Tensor
    normal: Tensor
    prepared: Prepared | None


def join_refuses(residual: Tensor, added: Tensor | ExpertSum | None, weight: Tensor) -> str | None:
    """Why `join` cannot take these, or None."""
    if reason := norm_refuses(residual, weight):
        return reason
    if not residual.is_contiguous() or weight.numel() > NUMBERS * MOST_THREADS * MOST_EACH:
        return f"rows of {weight.numel()}, contiguous: {residual.is_contiguous()}"
    if isinstance(added, ExpertSum):
        fits = added.results.dtype == torch.float32 and added.weights.dtype in DTYPES
        ready = added.results.is_contiguous() and added.weights.is_contiguous()
        return None if fits and ready else f"results {added.results.dtype}, weights {added.weights.dtype}"
    if added is None:
        return None
    if added.shape != residual.shape or added.dtype != residual.dtype or not added.is_contiguous():
        return f"{tuple(added.shape)} {added.dtype} is added to {tuple(residual.shape)} {residual.dtype}"
    return None if aligned(added) else "not aligned to 16 bytes"


def join(
    launcher: Launcher,
    residual: Tensor,
    added: Tensor | ExpertSum | None,
    weight: Tensor,
    eps: float,
    late: bool = False,
    product: Gemv | None = None,
    total: Tensor | None = None,
) -> Joined:
    """norm(residual + added), and how `product` wants it.

    Args:
        launcher: runs the kernel.
        residual: [..., N].
        added: of the same shape, or experts' results to be summed, or nothing.
        weight: [N] of the RMS norm.
        eps: added to the mean of squares.
        late: whether the product with the weight is what is rounded, and not the normalized row as well.
        product: who multiplies next; None: nobody known.
        total: where residual + added goes; None: a new tensor.
    """
    columns = weight.numel()
    rows, groups = residual.numel() // columns, columns // NUMBERS
    each = -(-groups // MOST_THREADS)
    threads = min(MOST_THREADS, -(-(-(-groups // each)) // 32) * 32)
    if added is None:
        total = residual
    elif total is None:
        total = torch.empty_like(residual)
    normal = torch.empty_like(residual)
    results = weights = None
    if isinstance(added, ExpertSum):
        results, weights, added = added.results, added.weights, None
    kind = "EXPERTS" if results is not None else "TENSOR" if added is not None else "NOTHING"
    lay_out = product is not None and product.staged_bytes <= STAGED
    prepared = product.room(rows) if product is not None and lay_out else None
    defines: dict[str, int | str] = {
        "ELEMENT": DTYPES[residual.dtype], "ADD": kind, "WEIGHT": DTYPES[weights.dtype] if weights is not None else 0,
        "COLUMNS": columns, "EACH": each, "LATE": int(late), "LAY_OUT": int(lay_out),
        **(product.defines if product is not None and lay_out else {"KIND": "DENSE", "BITS": 32}),
    }  # fmt: skip
    kernel = launcher.kernel("junction.cu", "junction", defines)
    top_k = results.shape[0] // rows if results is not None else 0
    places = (prepared.pieces, prepared.scales, prepared.sums) if prepared is not None else (None, None, None)
    kernel(rows, threads, residual, added, results, weights, top_k, weight, total, normal, *places, float(eps))
    return Joined(total, normal, prepared)
