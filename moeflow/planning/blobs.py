"""What experts weigh under each scheme that may be chosen, in bytes of whole blobs: with scales, zeros and padding.

From names and shapes alone. It chooses nothing, and knows no errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moeflow.artifact.checkpoint import Checkpoint
from moeflow.artifact.layout import expert_layout
from moeflow.errors import CheckpointError, DocumentError, UsageError
from moeflow.planning.allocation import Ints
from moeflow.schema import HqqScheme, Scheme

__all__ = ["Blobs", "SCHEMES"]

SCHEMES: dict[str, HqqScheme] = {
    "2": HqqScheme(bits=2, group_size=64),
    "2g16": HqqScheme(bits=2, group_size=16, metadata_bits=8),
    "3": HqqScheme(bits=3, group_size=64),
    "4": HqqScheme(bits=4, group_size=64),
    "8": HqqScheme(bits=8, group_size=64),
}
"""What may be chosen from, by short names."""


@dataclass(frozen=True)
class Blobs:
    """What an expert weighs in each layer under each scheme that fits the model."""

    layers: tuple[int, ...]
    """Numbers in the model of the layers that have experts."""
    experts: int
    """Per layer."""
    schemes: tuple[Scheme, ...]
    sizes: Ints
    """[L, S], bytes of one blob."""
    weights: Ints
    """[L], numbers in one expert's matrices."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, schemes: Sequence[Scheme]) -> Blobs:
        """Of a checkpoint; schemes whose groups do not fit its dimensions are left out.

        Raises:
            DocumentError: none fits.
            CheckpointError: layers have different numbers of experts.
        """
        layers, biased = checkpoint.layers, checkpoint.family.biased
        if len(counts := sorted({len(layer.experts) for layer in layers})) > 1:
            raise CheckpointError(
                f"{checkpoint.directory}: layers have {counts[0]} to {counts[-1]} experts; bits are only chosen where "
                "all have as many: write quantization.overrides by hand"
            )
        shapes = dict.fromkeys((layer.hidden, layer.intermediate) for layer in layers)
        found: dict[Scheme, list[int]] = {}
        unfit = None
        for scheme in schemes:
            try:
                blob = {shape: expert_layout(*shape, scheme, checkpoint.dtype, biased).nbytes for shape in shapes}
            except DocumentError as error:
                unfit = error
            else:
                found[scheme] = [blob[layer.hidden, layer.intermediate] for layer in layers]
        if unfit and not found:
            raise unfit
        return cls(
            layers=tuple(layer.index for layer in layers),
            experts=len(layers[0].experts),
            schemes=tuple(found),
            sizes=np.array(list(found.values()), np.int64).T,
            weights=np.array([3 * layer.hidden * layer.intermediate for layer in layers], np.int64),
        )

    def bits(self, nbytes: float) -> float:
        """A weight's, of all experts."""
        return 8 * nbytes / self._total

    @property
    def _total(self) -> int:
        return self.experts * int(self.weights.sum())

    def budget(self, bits: float) -> int:
        """Bytes of all experts.

        Raises:
            UsageError: less than the smallest scheme takes, or more than the largest.
        """
        order = np.argsort(self.sizes.sum(axis=0), kind="stable")
        for number, bound, side in ((order[0], self.sizes.min(axis=1), -1), (order[-1], self.sizes.max(axis=1), 1)):
            there = self.bits(self.experts * int(bound.sum()))
            if side * (bits - there) > 1e-9:  # what is printed with all its digits is taken back
                what = "smallest" if side < 0 else "largest"
                remedy = "give it more" if side < 0 else "give it less, or a larger choice"
                raise UsageError(
                    f"the budget is {bits:g} bits a weight; the {what} choice, {self.schemes[number].label}, takes "
                    f"{there:.4g} with scales, zeros and padding: {remedy}"
                )
        return math.floor(bits * self._total / 8 + 1e-6)
