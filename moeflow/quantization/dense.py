"""The backend `none`: weights stay the checkpoint's own numbers."""

from __future__ import annotations

from torch import Tensor

from moeflow.schema.quantization import DenseScheme

__all__ = ["DenseQuantizer"]


class DenseQuantizer:
    """Keeps what it is given."""

    def __init__(self, scheme: DenseScheme):
        self.scheme = scheme

    def quantize(self, weight: Tensor) -> Tensor:
        """Return `weight` unchanged."""
        return weight
