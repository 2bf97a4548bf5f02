"""How fast the engine's own kernels are, on a GPU and on the CPU: parts of a hardware profile that are measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moeflow.schema.base import Part
from moeflow.schema.units import Rate

__all__ = ["CpuKernels", "JointRates", "Kernels", "Level", "Product"]

Level = Literal["portable", "avx2", "avx512", "vnni"]
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


class JointRates(Part):
    """Of the CPU's products and of the link, while both read host memory."""

    cpu: Rate
    link: Rate


class CpuKernels(Part):
    """Measured by `moeflow probe` on matrices larger than caches; see docs/cost-model.md."""

    level: Level
    """The instructions that were used."""
    threads: int = Field(ge=1)
    """That multiplied."""
    products: dict[str, Rate] = Field(min_length=1)
    """Packed bytes a second that all threads together multiply, by format, as those of a GPU."""
    joint: JointRates | None = Field(default=None, exclude_if=lambda rates: rates is None)
    """None without a GPU, or where it was not measured."""
