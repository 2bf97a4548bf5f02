"""The backend `bitsandbytes`: nf4 by the bitsandbytes library, and int8 as its LLM.int8() stores weights.

nf4's codes are bitsandbytes' own, brought into natural order; the largest magnitude of a block, which it keeps in
float32, is rounded to float16, at most 2^-11 of itself. Its nested quantization of these is not used. int8 is the
plain formula in float32: on CUDA the library's function takes float16 alone, which would lose bits of bfloat16 weights
and make the codes depend on the device. Outlier columns, which LLM.int8() takes out of activations, are no matter
of weights.
"""

from __future__ import annotations

import logging
from types import ModuleType

import torch
from torch import Tensor

from moeflow.quantization.base import Codes
from moeflow.schema import BitsAndBytesScheme

__all__ = ["BitsAndBytesQuantizer"]


class BitsAndBytesQuantizer:
    """nf4 or int8."""

    def __init__(self, scheme: BitsAndBytesScheme):
        self.scheme = scheme

    def quantize(self, weight: Tensor) -> Codes:
        """Quantize `weight` [N, K] on its own device; K is a multiple of 64 for nf4, of 4 for int8."""
        return _nf4(weight.contiguous()) if self.scheme.format == "nf4" else _int8(weight.float())


def _nf4(weight: Tensor) -> Codes:
    rows = weight.shape[0]
    packed, state = _functional().quantize_4bit(weight, quant_type="nf4", blocksize=64)
    halves = packed.view(rows, -1)  # a byte holds two neighbours, the first in its high half
    codes = torch.stack([halves >> 4, halves & 15], dim=-1).view(weight.shape)
    return Codes(codes, {"scales": state.absmax.view(rows, -1).to(torch.float16)})


def _int8(weight: Tensor) -> Codes:
    largest = weight.abs().amax(dim=1)  # [N]
    factors = torch.where(largest > 0, 127 / largest, 0)
    codes = (weight * factors.unsqueeze(1)).round_().to(torch.int8)
    return Codes(codes.view(torch.uint8), {"scales": largest / 127})


def _functional() -> ModuleType:
    """bitsandbytes.functional; importing takes seconds, and warns of optional CPU kernels that nothing here uses."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    finally:
        log.setLevel(level)
    module: ModuleType = functional
    return module
