"""How fast the engine's own kernels are on a GPU: a part of a hardware profile that only a measurement fills."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from moeflow.schema.base import Part
from moeflow.schema.units import Rate

__all__ = ["Kernels", "Product"]

Seconds = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class Product(Part):
    """Products with packed weights: a launch takes `latency` and the bytes it reads at `rate`."""

    latency: Seconds
    rate: Rate


class Kernels(Part):
    """Measured by `moeflow probe` with small models of random weights; see docs/cost-model.md."""

    layer: Seconds
    """Of a layer whose weights are next to nothing: norms, attention, router, lookup and the gaps between launches."""
    products: dict[str, Product] = Field(min_length=1)
    """By format: `2-bit`, `4-bit`, `2-bit meta8`, `nf4`, `int8`."""
