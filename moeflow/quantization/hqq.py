"""The backend `hqq`: half-quadratic quantization by the hqq library, without calibration data.

hqq finds codes, scales and zeros with its default optimizer. Groups run along the input dimension (hqq's
axis 1), where packing needs no padding; errors equal those of axis 0. hqq's own packing is not used: ours
is laid out for the kernels that read it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeflow.quantization.base import AffineCodes
from moeflow.schema.quantization import HqqScheme

__all__ = ["HqqQuantizer"]


class HqqQuantizer:
    """hqq at the scheme's bits and group size."""

    def __init__(self, scheme: HqqScheme):
        self.scheme = scheme

    def quantize(self, weight: Tensor) -> AffineCodes:
        """Quantize `weight` [N, K] on its own device; K is a multiple of the group size."""
        from hqq.core.quantize import Quantizer

        rows = weight.shape[0]
        codes, meta = Quantizer.quantize(
            weight.float(),
            nbits=self.scheme.bits,
            group_size=self.scheme.group_size,
            axis=1,
            bitpack=False,
            device=weight.device.type,
        )
        pair = torch.stack([meta["scale"].view(rows, -1), meta["zero"].view(rows, -1)], dim=-1)
        return AffineCodes(codes.view(weight.shape).to(torch.uint8), pair.to(torch.float16))
