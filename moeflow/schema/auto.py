"""`quantization.experts: {bits: auto, budget: 2.75}`: what a profile says of bits that packing shall choose.

It holds the wish, no choice: `moeflow.planning.bits` chooses, and the manifest has the schemes that came out. The
budget counts all that experts take: scales, zeros and the padding of blobs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from moeflow.schema.base import Part

__all__ = ["TOKENS", "AutoBits", "auto_backend"]

TOKENS = 4096  # of a text: docs/bit-allocation.md has what more of them bring


def _is_ordered(widths: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(widths)) < len(widths):
        raise ValueError("it names one twice")
    return tuple(sorted(widths))


def _is_none(value: object) -> bool:
    return value is None


class AutoBits(Part):
    """Bits chosen for every layer, or every expert, so that measured errors are least within a size."""

    # Said by `bits: auto`; the key only tells this from the schemes.
    backend: Literal["auto"] = Field(default="auto", exclude=True, repr=False)
    bits: Literal["auto"]
    """Chosen when the model is packed."""
    budget: float = Field(gt=0, allow_inf_nan=False)
    """Bits a weight over all experts, with scales, zeros and padding."""
    widths: Annotated[tuple[Literal[2, 3, 4, 8], ...], AfterValidator(_is_ordered)] = Field(
        default=(2, 3, 4), min_length=1
    )
    """Bits to choose from, hqq."""
    group_size: Literal[16, 32, 64, 128, 256] = 64
    """Weights that share one scale and zero, under every width."""
    units: Literal["layers", "experts"] = "layers"
    """What is chosen for as a whole: layers, whose experts are alike, so that the model can run device-driven; or
    single experts, and then it runs host-driven."""
    text: str | None = Field(default=None, exclude_if=_is_none)
    """A UTF-8 file: errors are of what experts add to its first `tokens`' hidden states; absent: of weights. A path
    that is not absolute is seen from the profile's directory."""
    tokens: int = Field(default=TOKENS, ge=1, exclude_if=lambda count: count == TOKENS)
    """Of the text."""
    trace: str | None = Field(default=None, exclude_if=_is_none)
    """A recorded trace, in place of a text: errors of weights count by how often an expert is used."""

    @property
    def label(self) -> str:
        """`auto, 2.75 bits a weight`."""
        return f"auto, {self.budget:g} bits a weight"

    @model_validator(mode="after")
    def _has_one_measure(self) -> Self:
        if self.text is not None and self.trace is not None:
            raise ValueError("text and trace are both given; outputs on a text count uses already: leave out the trace")
        return self


def auto_backend(value: Any) -> Any:
    """A mapping that says `bits: auto` and no other backend than hqq, told apart from the schemes."""
    if isinstance(value, Mapping) and value.get("bits") == "auto" and value.get("backend", "hqq") == "hqq":
        return {**value, "backend": "auto"}
    return value
