"""What a quantization backend takes and gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Codes", "Quantizer"]


@dataclass(frozen=True)
class Codes:
    """A matrix as integers, and what turns them back into numbers; the rules are in `kernels.dequantize`."""

    codes: Tensor
    """uint8 [N, K]; signed codes as the bytes that they are."""
    factors: Mapping[str, Tensor]
    """The layout's other parts, by name: scales, or meta and meta_scales; rows [N] first, so that they stack."""


class Quantizer(Protocol):
    """A backend with its settings."""

    def quantize(self, weight: Tensor) -> Codes | Tensor:
        """Quantize `weight` [N, K]; a backend that keeps it as it is returns the tensor."""
