"""What a quantization backend takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["AffineCodes", "Quantizer"]


@dataclass(frozen=True)
class AffineCodes:
    """A matrix as integers: `w[n, k] = (codes[n, k] - zero) * scale` with one pair per group of columns."""

    codes: Tensor
    """uint8 [N, K]."""
    scales: Tensor
    """float16 [N, K / group, 2]: scale and zero."""


class Quantizer(Protocol):
    """A backend with its settings."""

    def quantize(self, weight: Tensor) -> AffineCodes | Tensor:
        """Quantize `weight` [N, K]; a backend that keeps it as it is returns the tensor."""
