"""What `bits: auto` came to: the errors that were measured, and what was chosen by them; `bits.json` in an artifact.

For people and for other budgets. Nothing reads it to run the model: the manifest says what is packed.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from moeflow.schema.auto import AutoBits
from moeflow.schema.base import Document
from moeflow.schema.sensitivity import Sensitivity

__all__ = ["BitChoice"]


class BitChoice(Document):
    """A choice of bits for the experts of one model."""

    kind: ClassVar[str] = "bit choice"

    asked: AutoBits
    """As in the profile; files without their directories."""
    measured: str
    """Errors of what."""
    table: Sensitivity
    """What the choice was made by."""
    sizes: tuple[tuple[int, ...], ...]
    """Per layer and scheme of the table: bytes of one expert's blob."""
    choices: tuple[tuple[int, ...], ...]
    """Per layer and expert: index into the table's schemes."""
    nbytes: int = Field(ge=0)
    """Of all blobs."""
    achieved: float
    """Bits a weight, with scales, zeros and padding."""
    error: float = Field(ge=0)
    """Root of the errors' sum over that of the squares; both weighted."""
    bound: float = Field(ge=0)
    """No choice within the budget has a smaller error."""
    reason: str
    """In words."""
