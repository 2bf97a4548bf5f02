"""The backend `hqq`: half-quadratic quantization by the hqq library, without calibration data.

hqq finds codes, scales and zeros with its default optimizer. Groups run along the input dimension (hqq's
axis 1), where packing needs no padding; errors equal those of axis 0. hqq's own packing is not used: ours
is laid out for the kernels that read it. Nor is its quantization of scales and zeros, which it calls deprecated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moeflow.quantization.base import Codes
from moeflow.schema import HqqScheme
from moeflow.schema.quantization import META_BLOCK

__all__ = ["HqqQuantizer"]


class HqqQuantizer:
    """hqq at the scheme's bits and group size."""

    def __init__(self, scheme: HqqScheme):
        self.scheme = scheme

    def quantize(self, weight: Tensor) -> Codes:
        """Quantize `weight` [N, K] on its own device; K is a multiple of the group size."""
        from hqq.core.quantize import Quantizer

        rows = weight.shape[0]
        weight = weight.float()
        codes, meta = Quantizer.quantize(
            weight,
            nbits=self.scheme.bits,
            group_size=self.scheme.group_size,
            axis=1,
            bitpack=False,
            device=weight.device.type,
        )
        pair = torch.stack([meta["scale"].view(rows, -1), meta["zero"].view(rows, -1)], dim=-1)  # [N, G, 2]
        if self.scheme.metadata_bits == 16:
            return Codes(codes.view(weight.shape).to(torch.uint8), {"scales": pair.to(torch.float16)})
        del codes
        packed, steps, restored = _eight_bits(pair)
        return Codes(_nearest(weight, restored, self.scheme.bits), {"meta": packed, "meta_scales": steps})


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


def _nearest(weight: Tensor, pair: Tensor, bits: int) -> Tensor:
    """The codes that restore `weight` [N, K] best under the rounded pairs [N, G, 2].

    hqq's own codes were chosen for its own pairs. Relative errors beside those of 16-bit pairs, Gaussian weights,
    hqq's codes kept and chosen again: 2-bit g16 +0.0% both, 4-bit g16 +0.1% both, 8-bit g16 +24% and +9.5%;
    2-bit g16 where every 50th group is zero +1.3% and +1.0%. Refitting zeros to the rounded scales as well gained
    at most 0.1% on whole matrices (0.6% on that one), for least squares in place of hqq's norm: not done.
    """
    rows, groups, _ = pair.shape
    scale, zero = pair.unsqueeze(2).unbind(-1)  # each [N, G, 1]
    nearest = weight.view(rows, groups, -1).div(scale).add_(zero).round_().clamp_(0, (1 << bits) - 1)
    return nearest.to(torch.uint8).view(weight.shape)
