"""How weights are stored: one model per backend, told apart by `backend`.

hqq: half-quadratic quantization, groups along the input dimension, a scale and zero per group
(https://mobiusml.github.io/hqq_blog). bitsandbytes: nf4 (QLoRA, https://arxiv.org/abs/2305.14314) and int8
(LLM.int8(), https://arxiv.org/abs/2208.07339). none: the checkpoint's own 16 bits. Which code does it is the
business of `moeflow.quantization`; what is stored, of `moeflow.artifact.layout`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moeflow.schema.base import Part

__all__ = ["HqqScheme", "BitsAndBytesScheme", "DenseScheme", "Scheme", "Quantization", "ResidentRole", "META_BLOCK"]

ResidentRole = Literal["attention", "shared_experts", "head"]
"""What a quantized matrix outside the experts is."""

META_BLOCK = 128
"""Groups of a row whose 8-bit scales and zeros share one step and offset each; a row's last block may be shorter."""


class HqqScheme(Part):
    """HQQ at 2, 3, 4 or 8 bits, `w = (q - zero) * scale` with one scale and zero per group of inputs."""

    backend: Literal["hqq"] = "hqq"
    bits: Literal[2, 3, 4, 8] = 4
    """Bits a weight, without scales and zeros."""
    group_size: Literal[16, 32, 64, 128, 256] = 64
    """Weights that share one scale and zero, along the input dimension."""
    # Left out of documents where it is 16: those made before it existed keep their digests.
    metadata_bits: Literal[8, 16] = Field(default=16, exclude_if=lambda bits: bits == 16)
    """Bits of each scale and each zero; with 8 they are quantized in turn, along the row."""

    @property
    def label(self) -> str:
        """`2-bit g64`, or `2-bit g16 meta8`."""
        return f"{self.bits}-bit g{self.group_size}" + (" meta8" if self.metadata_bits == 8 else "")


class BitsAndBytesScheme(Part):
    """bitsandbytes' two weight formats; neither has anything to set."""

    backend: Literal["bitsandbytes"] = "bitsandbytes"
    format: Literal["nf4", "int8"]
    """nf4: 4-bit codes of 16 fixed numbers, scaled per 64 inputs; int8: signed bytes, scaled per row."""

    @property
    def bits(self) -> int:
        """Bits a weight, without scales."""
        return 4 if self.format == "nf4" else 8

    @property
    def group_size(self) -> int | None:
        """Weights that share one scale, along the input dimension; None is the whole row."""
        return 64 if self.format == "nf4" else None

    @property
    def label(self) -> str:
        """`nf4` or `int8`."""
        return self.format


class DenseScheme(Part):
    """No quantization: the checkpoint's own numbers."""

    backend: Literal["none"] = "none"

    @property
    def label(self) -> str:
        """`unquantized`."""
        return "unquantized"


Scheme = Annotated[HqqScheme | BitsAndBytesScheme | DenseScheme, Field(discriminator="backend")]


def _is_dense(scheme: Scheme) -> bool:
    return isinstance(scheme, DenseScheme)


class Quantization(Part):
    """A scheme per role; embeddings, routers and norms always stay as they are (paper, section 3.3)."""

    experts: Scheme = HqqScheme(bits=4, group_size=64)
    """The experts' matrices: nearly all of the model."""
    attention: Scheme = HqqScheme(bits=4, group_size=64)
    """The attention's projections: small, read for every token, and sensitive."""
    # Those below are left out of documents where they change nothing: documents made before them keep their digests.
    shared_experts: Scheme = Field(default=DenseScheme(), exclude_if=_is_dense)
    """Matrices of the experts that every token uses, in families that have them."""
    head: Scheme = Field(default=DenseScheme(), exclude_if=_is_dense)
    """The output head; not where the model ties it to the embedding, whose rows are looked up as plain numbers."""
