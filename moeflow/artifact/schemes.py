"""Which scheme each matrix of one checkpoint is stored under: a quantization, applied to a model.

A scheme that would change nothing, because the model has no such matrices or ties them to others, is refused here,
before work begins. Knows names and layer numbers, not shapes: whether a group fits is `artifact.layout`'s to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moeflow.errors import DocumentError
from moeflow.schema import DenseScheme, Quantization, ResidentRole, Scheme

if TYPE_CHECKING:
    from moeflow.artifact.checkpoint import Checkpoint

__all__ = ["Schemes"]


class Schemes:
    """The schemes of one checkpoint under one quantization.

    Raises:
        DocumentError: a scheme has nothing to apply to.
    """

    def __init__(self, checkpoint: Checkpoint, quantization: Quantization):
        self._quantization = quantization
        self._type = checkpoint.family.model_type
        self._roles: dict[str, ResidentRole] = {}
        for name in checkpoint.resident:
            if role := checkpoint.family.resident_role(name):
                self._roles[name] = role
        self._check_shared_experts()
        self._check_head(checkpoint)

    def experts(self, position: int) -> Scheme:  # noqa: ARG002
        """Of the experts of the MoE layer at `position`."""
        return self._quantization.experts

    @property
    def resident(self) -> dict[str, tuple[ResidentRole, Scheme]]:
        """Parameters outside the experts that are quantized: what they are, and how."""
        found: dict[str, tuple[ResidentRole, Scheme]] = {}
        for name, role in self._roles.items():
            scheme: Scheme = getattr(self._quantization, role)
            if not isinstance(scheme, DenseScheme):
                found[name] = role, scheme
        return found

    def _check_shared_experts(self) -> None:
        scheme = self._quantization.shared_experts
        if not isinstance(scheme, DenseScheme) and "shared_experts" not in self._roles.values():
            raise DocumentError(
                f"quantization.shared_experts is {scheme.label}; this {self._type} has no shared experts: leave it out"
            )

    def _check_head(self, checkpoint: Checkpoint) -> None:
        scheme = self._quantization.head
        if isinstance(scheme, DenseScheme):
            return
        # Where both are one tensor, checkpoints hold it once, under the embedding's name; some hold a copy.
        if checkpoint.config.get("tie_word_embeddings") is True or "head" not in self._roles.values():
            raise DocumentError(
                f"quantization.head is {scheme.label}; this {self._type} ties its output head to the embedding, whose "
                "rows are looked up as plain numbers, so that packing would add a copy and save nothing: leave it out"
            )
