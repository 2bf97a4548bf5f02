"""Bits for every expert, or every layer's experts, under a budget: measured errors in, a quantization out.

Errors of weights count as often as a trace used their expert, so that what is small is the error of what runs; errors
of outputs on a text have that in them already, and count beside those of their own layer: outputs grow from layer to
layer as the residual stream does, and what they lose costs the model about the same in each (docs/bit-allocation.md).
`moeflow.planning.allocation` chooses; here its numbers get their meaning, and its choices become overrides.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from moeflow.offload.trace import Trace
from moeflow.planning.allocation import Floats, Ints, allocate
from moeflow.planning.blobs import Blobs
from moeflow.schema import MeasuredText, Override, Quantization, Scheme, Sensitivity
from moeflow.schema.layers import written

__all__ = ["Allotment", "Uniform", "allot", "even", "importance", "layers_alike", "quantization"]


def importance(trace: Trace) -> Floats:
    """How often each expert is used, [L, E], 1 on average; one that the trace never used counts as if once."""
    used = [np.bincount(layer.ravel(), minlength=trace.experts) for layer in trace.routes.transpose(1, 0, 2)]
    counts = np.array(used, np.float64) + 1
    found: Floats = counts / counts.mean(axis=1, keepdims=True)
    return found


def even(blobs: Blobs) -> Floats:
    """Every expert counts alike, [L, E]."""
    return np.ones((len(blobs.layers), blobs.experts))


def layers_alike(table: Sensitivity) -> Floats:
    """[L, E], what makes the errors of each layer sum to 1 under the scheme that is worst for it; 1 where none errs."""
    errors = np.array([entry.errors for entry in table.layers])  # [L, E, S]
    worst = errors.sum(axis=1).max(axis=-1)  # [L]
    alike = np.divide(1.0, worst, out=np.ones_like(worst), where=worst > 0)
    return np.repeat(alike[:, None], errors.shape[1], axis=1)


@dataclass(frozen=True)
class Uniform:
    """All experts under one scheme."""

    scheme: Scheme
    nbytes: int
    bits: float
    error: float
    """Relative, as an allotment's."""


@dataclass(frozen=True)
class Allotment:
    """A scheme for every expert."""

    blobs: Blobs
    choices: npt.NDArray[np.int64]
    """[L, E], index into the blobs' schemes."""
    errors: Floats
    """[L, E, S], sums of squares, weighted."""
    square: float
    """Of all weights or outputs, weighted alike: what errors are relative to."""
    least: float
    """Weighted sum of squares that no choice within the budget is below."""
    budget: float
    """Bits a weight that were allowed."""
    by_layer: bool
    tokens: int
    """Of the trace that experts are weighted by; 0 without one."""
    text: MeasuredText | None = None
    """Errors are of outputs on its tokens; without, of weights."""

    @cached_property
    def expert_nbytes(self) -> Ints:
        """[L, E]."""
        found: Ints = np.take_along_axis(self.blobs.sizes, self.choices, axis=1)
        return found

    @property
    def nbytes(self) -> int:
        """Of all blobs."""
        return int(self.expert_nbytes.sum())

    @property
    def bits(self) -> float:
        """A weight's, over all experts."""
        return self.blobs.bits(self.nbytes)

    @property
    def error(self) -> float:
        """Root of the weighted squares of errors over those of weights."""
        return self._relative(float(np.take_along_axis(self.errors, self.choices[..., None], axis=2).sum()))

    @property
    def bound(self) -> float:
        """The same, of what nothing within the budget is below."""
        return min(self._relative(self.least), self.error)  # sums in another order may differ in the last digit

    @property
    def layer_bits(self) -> Floats:
        """[L, E], bits a weight of each expert."""
        found: Floats = 8 * self.expert_nbytes / self.blobs.weights[:, None]
        return found

    @property
    def shares(self) -> dict[Scheme, float]:
        """Share of experts under each scheme."""
        return {scheme: float((self.choices == s).mean()) for s, scheme in enumerate(self.blobs.schemes)}

    @property
    def uniform(self) -> tuple[Uniform, ...]:
        """Every scheme for all experts, smallest first."""
        found = []
        for number, scheme in enumerate(self.blobs.schemes):
            nbytes = self.blobs.experts * int(self.blobs.sizes[:, number].sum())
            error = self._relative(float(self.errors[..., number].sum()))
            found.append(Uniform(scheme, nbytes, self.blobs.bits(nbytes), error))
        return tuple(sorted(found, key=lambda row: row.nbytes))

    def _relative(self, error: float) -> float:
        return math.sqrt(error / self.square) if self.square else 0.0

    @property
    def quantization(self) -> Quantization:
        """With default schemes for all but experts."""
        return self.applied_to(Quantization())

    def applied_to(self, asked: Quantization) -> Quantization:
        """The commonest scheme for all experts, and as few overrides as say what differs; the rest as asked."""
        return asked.chosen(*quantization(self.blobs, self.choices))

    @property
    def measured(self) -> str:
        """Errors of what, in words."""
        if self.text is not None:
            return f"outputs on {self.text.tokens:,} tokens of {self.text.name}, layers counting alike"
        return "weights, " + (f"by uses in {self.tokens:,} recorded tokens" if self.tokens else "all experts alike")

    def reasons(self) -> dict[str, str]:
        """Why, by key of the profile, as `moeflow.planning.reasons` has it."""
        what = "layer" if self.by_layer else "expert"
        shares = ", ".join(f"{scheme.label} {share:.0%}" for scheme, share in self.shares.items() if share)
        text = (
            f"Bits of every {what} for at most {self.budget:g} bits a weight over all experts, with scales, zeros and "
            f"padding: {self.bits:.3f}. Chosen for the least sum of squares of errors of {self.measured}. Share of "
            f"experts: {shares}. Relative error {self.error:.4f}; none within the budget is below {self.bound:.4f}. "
            f"All alike: {'; '.join(f'{r.scheme.label} {r.error:.4f} at {r.bits:.3f} bits' for r in self.uniform)}."
        )
        if (self.choices != self.choices[:, :1]).any():
            text += " Experts of one layer differ: the model runs host-driven."
        return {"quantization": text}

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        mine: dict[str, Any] = {"budget": self.budget, "bits": self.bits, "nbytes": self.nbytes, "error": self.error}
        labels = [scheme.label for scheme in self.blobs.schemes]
        rows = zip(self.blobs.layers, self.choices.tolist(), strict=True)
        choices = {str(layer): [labels[number] for number in row] for layer, row in rows}
        alike = [{"scheme": r.scheme.label, "bits": r.bits, "nbytes": r.nbytes, "error": r.error} for r in self.uniform]
        mine |= {"measured": self.measured}
        return {**mine, "bound": self.bound, "uniform": alike, "choices": choices}


def quantization(blobs: Blobs, choices: npt.NDArray[np.int64]) -> tuple[Scheme, tuple[Override, ...]]:
    """The commonest scheme of `choices` [L, E], and as few overrides as say what differs."""
    common = int(np.bincount(choices.ravel()).argmax())
    layers_of: dict[tuple[int, str | None], list[int]] = defaultdict(list)
    for layer, row in zip(blobs.layers, choices, strict=True):
        for number in np.unique(row[row != common]).tolist():
            experts = np.flatnonzero(row == number)
            some = written(experts.tolist()) if len(experts) < len(row) else None
            layers_of[number, some].append(layer)
    overrides = tuple(
        Override(layers=written(layers), only_experts=some, experts=blobs.schemes[number])
        for (number, some), layers in layers_of.items()
    )
    return blobs.schemes[common], overrides


def allot(
    blobs: Blobs, table: Sensitivity, budget: float, weights: Floats, tokens: int = 0, by_layer: bool = False
) -> Allotment:
    """Choose a scheme for every expert.

    Args:
        blobs: sizes of the model's experts.
        table: errors of the same model under the same schemes, in their order.
        budget: bits a weight over all experts, with scales, zeros and padding.
        weights: [L, E], how much an expert's error counts.
        tokens: of the trace that weights come from, for people.
        by_layer: all experts of a layer alike.

    Raises:
        UsageError: the budget is less than the smallest scheme takes, or more than the largest.
    """
    room = blobs.budget(budget)
    errors = np.array([entry.errors for entry in table.layers]) * weights[..., None]  # [L, E, S]
    squares = np.array([entry.squares for entry in table.layers]) * weights  # [L, E]
    layers, experts, schemes = errors.shape
    if by_layer:
        found = allocate(errors.sum(axis=1), np.ones(layers), experts * blobs.sizes, room)
        choices = np.repeat(np.array(found.choices)[:, None], experts, axis=1)
    else:
        sizes = np.repeat(blobs.sizes, experts, axis=0)  # [L * E, S]
        found = allocate(errors.reshape(-1, schemes), np.ones(layers * experts), sizes, room)
        choices = np.array(found.choices).reshape(layers, experts)
    return Allotment(blobs, choices, errors, float(squares.sum()), found.bound, budget, by_layer, tokens, table.text)
