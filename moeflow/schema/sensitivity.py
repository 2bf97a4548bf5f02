"""What quantizing each expert costs, scheme by scheme: sums of squares, measured once and used for every budget.

Of its weights; or, where a text was read, of what it adds to the hidden states of the text's tokens.

Holds what was measured, no choice. It belongs to one checkpoint by `Checkpoint.digest`, which covers config, names and
shapes but no weights: of two fine-tunings in one shape it cannot tell whose it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from moeflow.errors import DocumentError
from moeflow.schema.base import Document, Part
from moeflow.schema.quantization import Scheme

__all__ = ["LayerErrors", "MeasuredText", "Sensitivity"]

_Square = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class MeasuredText(Part):
    """What outputs were measured on."""

    name: str
    """For people; no directories."""
    digest: str
    """SHA-256 of the token ids that were read."""
    tokens: int = Field(ge=1)


class LayerErrors(Part):
    """The experts of one layer."""

    layer: int = Field(ge=0)
    """Its number in the model, dense layers counted."""
    squares: tuple[_Square, ...] = Field(min_length=1)
    """Per expert: the sum of the squares of its weights, or of its weighted outputs."""
    errors: tuple[tuple[_Square, ...], ...]
    """Per expert and scheme: the sum of the squares of what these differ by once the weights are restored."""


class Sensitivity(Document):
    """A recorded table of errors, `moeflow allocate --table`."""

    kind: ClassVar[str] = "sensitivity"

    model: str
    """As it was named, for people."""
    source_digest: str
    """Of the checkpoint's config, names and shapes."""
    schemes: tuple[Scheme, ...] = Field(min_length=1)
    layers: tuple[LayerErrors, ...] = Field(min_length=1)
    # Left out of documents where there is none: those made before it existed stay as they are.
    text: MeasuredText | None = Field(default=None, exclude_if=lambda text: text is None)
    """Whose tokens the outputs are for; absent: errors are of weights."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if len(set(self.schemes)) < len(self.schemes):
            raise ValueError("schemes names one twice")
        for entry in self.layers:
            shape = {len(row) for row in entry.errors}
            if len(entry.errors) != len(entry.squares) or shape != {len(self.schemes)}:
                raise ValueError(
                    f"layer {entry.layer} has errors of {len(entry.errors)} experts in rows of "
                    f"{', '.join(map(str, sorted(shape)))}; {len(entry.squares)} experts and "
                    f"{len(self.schemes)} schemes are expected"
                )
        return self

    def require(self, digest: str, text: MeasuredText | None, place: str | Path) -> None:
        """Check that it is a checkpoint's own, and of this text, or of weights where there is none.

        Raises:
            DocumentError: it was measured with another; the message names `place`.
        """
        if self.source_digest != digest:
            raise DocumentError(
                f"{place}: measured with {self.model}, whose config or tensors differ from this model's: "
                "name another file, and it is measured anew"
            )
        if (text and text.digest) != (self.text and self.text.digest):
            asked, there = (f"outputs on {t.name}, {t.tokens:,} tokens" if t else "weights" for t in (text, self.text))
            raise DocumentError(
                f"{place}: has errors of {there}, asked are those of {asked}: name another file, and they are measured"
            )

    def missing(self, schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
        """Those of `schemes` that it has no errors of."""
        return tuple(scheme for scheme in schemes if scheme not in self.schemes)

    def of(self, schemes: Sequence[Scheme]) -> Sensitivity:
        """The same for these schemes alone, in this order; all of them are there."""
        columns = [self.schemes.index(scheme) for scheme in schemes]
        layers = tuple(
            entry.model_copy(update={"errors": tuple(tuple(row[c] for c in columns) for row in entry.errors)})
            for entry in self.layers
        )
        return self.model_copy(update={"schemes": tuple(schemes), "layers": layers})

    def joined(self, other: Sensitivity) -> Sensitivity:
        """With the schemes of `other` behind its own; both are of one checkpoint, and share no scheme."""
        layers = tuple(
            mine.model_copy(update={"errors": tuple(a + b for a, b in zip(mine.errors, more.errors, strict=True))})
            for mine, more in zip(self.layers, other.layers, strict=True)
        )
        return self.model_copy(update={"schemes": self.schemes + other.schemes, "layers": layers})
