"""The backend `hqq`: half-quadratic quantization as the hqq library does it, without calibration data.

Codes, scales and zeros are, bit for bit, those that hqq's `Quantizer.quantize` finds with its default optimizer; tests
compare them with the installed library's. Groups run along the input dimension (hqq's axis 1), where packing needs no
padding; errors equal those of axis 0. The same operations are done here in place, a block of rows at a time, because
hqq's make eight temporaries of the matrix's size in each of 20 iterations and empty CUDA's memory cache three times a
matrix: for 4096 x 4096 numbers, on 2 CPU cores that others used too, hqq took 11.7 s and this 2.8. hqq's packing is not
used: ours is laid out for the kernels that read it. Nor is its quantization of scales and zeros, which it calls
deprecated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moeflow.quantization.base import Codes
from moeflow.quantization.blocks import each
from moeflow.schema import HqqScheme
from moeflow.schema.quantization import META_BLOCK

__all__ = ["HqqQuantizer"]

ITERATIONS, BETA, NORM = 20, 1e1, 0.7  # hqq's defaults
LEAST_RANGE, LARGEST_SCALE = 1e-4, 2e4  # of a group: hqq's guards against division by nothing and float16's end


class HqqQuantizer:
    """hqq at the scheme's bits and group size."""

    def __init__(self, scheme: HqqScheme):
        self.scheme = scheme

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> Codes:
        """Quantize `weight` [N, K] on its own device; K is a multiple of the group size."""
        largest = (1 << self.scheme.bits) - 1
        inverse, zero = _solve(weight, self.scheme.group_size, largest)
        pair = torch.stack([inverse.reciprocal(), zero], dim=-1)  # [N, G, 2]
        factors = {"scales": pair.to(torch.float16)}
        if self.scheme.metadata_bits == 8:
            meta, steps, pair = _eight_bits(pair)
            factors = {"meta": meta, "meta_scales": steps}
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)

        def choose(blocks: list[slice]) -> None:
            for block in blocks:
                grouped = weight[block].float().view(-1, pair.shape[1], self.scheme.group_size)  # [n, G, group]
                if self.scheme.metadata_bits == 8:
                    found = _nearest(grouped, pair[block])
                else:
                    found = grouped.mul(inverse[block].unsqueeze(2)).add_(zero[block].unsqueeze(2))
                codes[block] = found.round_().clamp_(0, largest).view(-1, weight.shape[1])

        each(weight, choose)
        return Codes(codes, factors)


def _solve(weight: Tensor, group_size: int, largest: int) -> tuple[Tensor, Tensor]:
    """Inverse scales and zeros [N, G] of each group, as hqq finds them: in float32 on the CPU, in float16 on CUDA."""
    exact = torch.float16 if weight.device.type == "cuda" else torch.float32
    rows, groups = weight.shape[0], weight.shape[1] // group_size
    inverse, zero = (torch.empty(rows, groups, 1, dtype=exact, device=weight.device) for _ in range(2))
    misses = torch.empty(rows, groups, group_size, dtype=exact, device=weight.device)

    def begin(blocks: list[slice]) -> None:
        for block in blocks:
            inverse[block], zero[block] = _first(weight[block].float().view(-1, groups, group_size), largest)

    def improve(blocks: list[slice]) -> None:
        scratch = [torch.empty_like(misses[blocks[0]]) for _ in range(4)]
        for block in blocks:
            grouped, *others = (buffer[: block.stop - block.start] for buffer in scratch)
            grouped.copy_(weight[block].view_as(grouped))
            _step(grouped, inverse[block], zero[block], misses[block], others, largest)

    each(weight, begin)
    best = torch.tensor(torch.inf, device=weight.device)
    for _ in range(ITERATIONS):
        each(weight, improve)
        mean = misses.view(-1, group_size).mean().float()  # over all at once: its last digit decides when hqq ends
        if not mean < best:
            break
        best = mean
    return inverse.squeeze(2), zero.squeeze(2)


def _step(weight: Tensor, inverse: Tensor, zero: Tensor, misses: Tensor, scratch: list[Tensor], largest: int) -> None:
    """One step of hqq's proximal solver over groups [n, G, group], each of its roundings in its place.

    Args:
        weight: is restored as `(code - zero) / inverse`.
        inverse: the inverse scales [n, G, 1]; they stay.
        zero: [n, G, 1], replaced by the mean of what each weight would have liked.
        misses: receives `|weight - restored|` under the zeros before.
        scratch: three arrays of the weight's shape.
        largest: code.
    """
    codes, signs, shrunk = scratch
    torch.mul(weight, inverse, out=codes).add_(zero).round_().clamp_(0, largest)
    torch.sub(codes, zero, out=signs).div_(inverse)  # restored
    torch.sub(weight, signs, out=signs)
    torch.abs(signs, out=misses)
    torch.pow(misses, NORM - 1, out=shrunk).mul_(1.0 / BETA)
    torch.sub(misses, shrunk, out=shrunk).clamp_min_(0.0).mul_(signs.sign_())
    torch.sub(weight, shrunk, out=shrunk).mul_(inverse)
    torch.mean(codes.sub_(shrunk), dim=2, keepdim=True, out=zero)


def _first(grouped: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """hqq's start, from the least and the greatest of each group: inverse scales and zeros [n, G, 1]."""
    least = grouped.amin(2, keepdim=True)
    span = grouped.amax(2, keepdim=True) - least
    inverse = torch.where(span <= LEAST_RANGE, 1.0, largest / span).clamp(max=LARGEST_SCALE)
    return inverse, -least * inverse


def _eight_bits(pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and zeros [N, G, 2] as 8-bit codes between the least and the greatest of each block of groups.

    Returns:
        Codes uint8 [N, G, 2]; scale step, scale offset, zero step, zero offset [N, B, 4]; and the pairs [N, G, 2]
        as they will be read back.
    """
    rows, groups, _ = pair.shape
    missing = -groups % META_BLOCK
    padded = functional.pad(pair.mT, (0, missing), mode="replicate").mT  # changes neither least nor greatest
    blocks = padded.reshape(rows, -1, META_BLOCK, 2)  # [N, B, 128, 2]
    offset = blocks.amin(2, keepdim=True)
    step = (blocks.amax(2, keepdim=True) - offset) / 255
    codes = ((blocks - offset) / torch.where(step > 0, step, 1)).round_().clamp_(0, 255)
    restored = (codes * step + offset).view(rows, -1, 2)[:, :groups]
    steps = torch.stack([step, offset], dim=-1).view(rows, -1, 4)  # [N, B, (scale, zero) x (step, offset)]
    return codes.to(torch.uint8).view(rows, -1, 2)[:, :groups], steps, restored


def _nearest(grouped: Tensor, pair: Tensor) -> Tensor:
    """The codes, yet to be rounded, that restore `grouped` [n, G, group] best under the rounded pairs [n, G, 2].

    hqq's own codes were chosen for its own pairs. Relative errors beside those of 16-bit pairs, Gaussian weights,
    hqq's codes kept and chosen again: 2-bit g16 +0.0% both, 4-bit g16 +0.1% both, 8-bit g16 +24% and +9.5%;
    2-bit g16 where every 50th group is zero +1.3% and +1.0%. Refitting zeros to the rounded scales as well gained
    at most 0.1% on whole matrices (0.6% on that one), for least squares in place of hqq's norm: not done.
    """
    scale, zero = pair.unsqueeze(2).unbind(-1)  # each [n, G, 1]
    return grouped.div(scale).add_(zero)
