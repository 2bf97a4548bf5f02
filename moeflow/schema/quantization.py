"""How weights are stored: one model per backend, told apart by `backend`.

hqq: half-quadratic quantization, groups along the input dimension, a 16-bit scale and zero per group
(https://mobiusml.github.io/hqq_blog). none: the checkpoint's own 16 bits. Which code does it is the
business of `moeflow.quantization`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moeflow.schema.base import Part

__all__ = ["HqqScheme", "DenseScheme", "Scheme", "Quantization"]


class HqqScheme(Part):
    """HQQ at 2, 3, 4 or 8 bits, `w = (q - zero) * scale` with one scale and zero per group of inputs."""

    backend: Literal["hqq"] = "hqq"
    bits: Literal[2, 3, 4, 8] = 4
    """Bits a weight, without scales and zeros."""
    group_size: Literal[16, 32, 64, 128, 256] = 64
    """Weights that share one scale and zero, along the input dimension."""

    @property
    def label(self) -> str:
        """`2-bit g64`."""
        return f"{self.bits}-bit g{self.group_size}"


class DenseScheme(Part):
    """No quantization: the checkpoint's own numbers."""

    backend: Literal["none"] = "none"

    @property
    def label(self) -> str:
        """`unquantized`."""
        return "unquantized"


Scheme = Annotated[HqqScheme | DenseScheme, Field(discriminator="backend")]


class Quantization(Part):
    """A scheme per role; embeddings, output head, router and norms always stay as they are (paper, section 3.3)."""

    experts: Scheme = HqqScheme(bits=4, group_size=64)
    """The experts' matrices: nearly all of the model."""
    attention: Scheme = HqqScheme(bits=4, group_size=64)
    """The attention's projections: small, read for every token, and sensitive."""
